"""COMMIT: a generation that is linked and ready to be made live. Decides what there is to do, and does nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from patcher.patch.arena import Usage
from patcher.patch.journal import GenerationRecord


@dataclass(frozen=True, slots=True)
class Choice:
    """A new IFUNC: its island's slot gets what its resolver, called in the target once it is written, chooses."""

    name: str
    arena: int
    index: int
    resolver: int


@dataclass(frozen=True, slots=True)
class Constructor:
    """A function that has to run once, when all of its generation is written and nobody can see it yet."""

    name: str
    unit: str
    address: int


@dataclass(frozen=True, slots=True)
class Fill:
    """New storage of a variable that is filled from the old.

    By a function called for each of `count` elements; or, where there is none, by `moved`: what of the old contents
    goes where, as (offset in the new, what there is from then on). That raises `OverflowError` for what has no room.
    """

    name: str
    unit: str
    new: int
    new_size: int
    old: int
    old_size: int
    by: str = ""
    function: int = 0
    count: int = 0
    new_step: int = 0
    old_step: int = 0
    moved: Callable[[bytes], Sequence[tuple[int, bytes]]] | None = None


@dataclass(frozen=True, slots=True)
class ThreadValue:
    """What every thread's own of a thread-local variable becomes; the offset is in the block of the module of a
    number, or, for 0, from the thread pointer."""

    name: str
    file: str
    offset: int
    module_id: int
    contents: bytes


@dataclass(frozen=True, slots=True)
class Commit:
    """A generation that is linked and ready: what to write where nobody looks yet, and what then changes at once."""

    record: GenerationRecord
    writes: tuple[tuple[int, bytes], ...]
    usage: tuple[tuple[int, Usage], ...]  # arena base -> how far it will be in use
    choices: tuple[Choice, ...] = ()
    constructors: tuple[Constructor, ...] = ()  # in the order in which they run
    data: tuple[tuple[int, bytes], ...] = ()  # what the program's own data becomes with it: address, contents
    fills: tuple[Fill, ...] = ()  # done when all stand still, right before the generation is live
    threads: tuple[ThreadValue, ...] = ()  # found and written when all stand still
    published: tuple[tuple[int, bytes], ...] = ()  # what leads the program to some of the writes, in this order

    @property
    def does_nothing(self) -> bool:
        """Whether the process would be the same with it."""
        return not (self.record.statuses or self.record.placed or self.data or self.threads)
