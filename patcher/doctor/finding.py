"""One thing that was looked at: how it is, and what to do about it."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class State(enum.Enum):
    """How something is."""

    GOOD = "ok"
    NOTE = "note"  # a limit: less can be changed, or less is known
    BAD = "bad"  # nothing can be changed until it is otherwise


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at (`topic`), how it is, in a sentence, and what to do; no hint where nothing is to be done."""

    topic: str
    state: State
    message: str
    hint: str = ""


def good(topic: str, message: str) -> Finding:
    """Return a finding that is as it should be."""
    return Finding(topic, State.GOOD, message)


def note(topic: str, message: str, hint: str = "") -> Finding:
    """Return a finding that limits what can be done."""
    return Finding(topic, State.NOTE, message, hint)


def bad(topic: str, message: str, hint: str) -> Finding:
    """Return a finding that stands in the way."""
    return Finding(topic, State.BAD, message, hint)
