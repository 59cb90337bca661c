"""What became of a variable with a change: one word for each outcome, the same in reports, events and tests."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Fate(Enum):
    """The outcomes that are worth telling; a variable that is simply kept has none."""

    ADDED = "added"  # it has storage from now on, with its initial value
    FOUND = "found"  # it was gone in between, and has its storage and value again
    MOVED = "moved"  # it is declared elsewhere, or otherwise, and is the same variable
    KEPT = "kept"  # its initialiser changed, its value did not
    REINITIALISED = "reinitialised"  # its initialiser changed, and was written
    MIGRATED = "migrated"  # its type changed, and its value was carried over
    REWRITTEN = "rewritten"  # a constant was changed where it stands
    STALE = "stale"  # a constant has a new copy, and others still use the old one


@dataclass(frozen=True, slots=True)
class Datum:
    """One variable or constant, the source file it belongs to, what became of it, and what there is to say of that."""

    name: str
    file: str
    fate: Fate
    note: str = ""
