"""Verdicts: what matching says of a function and of a unit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from patcher.blocks import Block, Blocks, Place, Target
from patcher.live import LiveFunction, LiveUnit
from patcher.stamps import NONE as NO_STAMPS
from patcher.stamps import Stamps


class Status(Enum):
    SAME = "same"
    CHANGED = "changed"
    LINE_ONLY = "line-only"
    ADDED = "added"


class Cause(Enum):
    """What kind of difference came first; only some can come from a moved line."""

    NONE = "none"
    CODE = "code"
    CONSTANT = "constant"
    REFERENCE = "reference"
    DEPENDENT = "dependent"


@dataclass(frozen=True, slots=True)
class FunctionMatch:
    """The verdict on one function block. `live` is None for an added one."""

    block: Block
    status: Status
    live: LiveFunction | None
    cause: Cause = Cause.NONE
    reason: str = ""

    @property
    def name(self) -> str:
        return self.block.name


@dataclass(frozen=True, slots=True)
class Delta:
    """What a unit's object changes against what runs."""

    blocks: Blocks
    unit: LiveUnit
    functions: tuple[FunctionMatch, ...]
    bindings: dict[Block, int] = field(repr=False)
    stamps: Stamps = NO_STAMPS  # what the object's compile wrote of its own moment

    def taken_as(self, status: Status, functions: Sequence[FunctionMatch]) -> Delta:
        """Return this delta with another verdict on some functions."""
        chosen = {f.block for f in functions}
        changed = tuple(replace(f, status=status) if f.block in chosen else f for f in self.functions)
        return replace(self, functions=changed)

    def with_status(self, *statuses: Status) -> tuple[FunctionMatch, ...]:
        return tuple(f for f in self.functions if f.status in statuses)


_PRIVATE = re.compile(r"\.(cold|part|isra|constprop)(\.\d+)*$|\.(part|isra|constprop)\.")
_COLD = re.compile(r"\.cold(\.\d+)?$")


def is_private_piece(name: str) -> bool:
    """Tell whether a function is a piece the compiler split off, callable by its own unit's code only.

    Such pieces may have a calling convention of their own, so that new code must never be reached by a
    caller that was compiled with the old piece, nor the reverse: they live and die with their callers.
    """
    return bool(_PRIVATE.search(name))


def fingerprint(blocks: Blocks, block: Block) -> object:
    """Return a value that is equal for equal code: its bytes, and what its references mean by name or contents."""
    return block.data, tuple((r.offset, r.type, r.addend, _meaning(r.target)) for r in blocks.references(block))


def _meaning(target: Target) -> object:
    if not isinstance(target, Place):
        return target
    block = target.block
    return block.kind, block.name if block.symbols else block.data, target.offset


def parent_of(cold_piece: str) -> str:
    """Return the name of the function that a cold piece was split off."""
    return _COLD.sub("", cold_piece)


def is_cold_piece(name: str) -> bool:
    return bool(_COLD.search(name))


class Mismatch(Exception):
    """A function is not what runs; ends its comparison."""

    def __init__(self, cause: Cause, reason: str) -> None:
        super().__init__(reason)
        self.cause = cause
        self.reason = reason
