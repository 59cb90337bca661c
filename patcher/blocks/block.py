"""What objects are cut into, and what a piece refers to: the words that the linker and the matcher speak in."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from patcher.elf import ObjectFile, Symbol
from patcher.elf.object import Column


class Kind(Enum):
    CODE = "code"
    READ_ONLY = "read-only data"
    DATA = "data"
    THREAD_LOCAL = "thread-local data"


# Not frozen: a large unit has hundreds of thousands, and a frozen dataclass takes three times as long to make.
@dataclass(slots=True, eq=False)
class Block:
    """A piece of an object; it never changes. `data` is empty for zero-initialised storage; `number` is its place
    in the order in which its `Blocks` made them."""

    object: ObjectFile = field(repr=False)
    kind: Kind
    name: str
    section: int
    start: int
    size: int
    alignment: int
    data: bytes = field(repr=False)
    symbols: tuple[Symbol, ...] = field(repr=False)
    number: int = field(repr=False)
    string: bool = False

    @property
    def anonymous(self) -> bool:
        return not self.symbols

    @property
    def exported(self) -> bool:
        return any(not s.local for s in self.symbols)

    @property
    def zero(self) -> bool:
        return not self.data and self.size > 0


class Place(NamedTuple):
    """A position in a block of the same object."""

    block: Block
    offset: int


class External(NamedTuple):
    """A symbol that the object does not define."""

    name: str
    weak: bool = False
    hidden: bool = False


@dataclass(frozen=True, slots=True)
class Absolute:
    """A symbol with a fixed value."""

    value: int


Target = Place | External | Absolute


class Reference(NamedTuple):
    """A field of a block: apply relocation `type` at `offset`, with S = address of `target`, A = `addend`."""

    offset: int
    type: int
    target: Target
    addend: int


@dataclass(frozen=True, slots=True)
class Linkable:
    """The bytes of a block and the fields in them. The block starts `lead` bytes into `data`; field offsets count
    from the block's start, and may lie before or behind it."""

    lead: int
    data: bytes
    references: tuple[Reference, ...]


class Doubt(NamedTuple):
    """Two pieces of a section that one reference may be about: it is right when they stay as far apart as they are."""

    reference: Reference
    first: Block
    second: Block


class Cuts(NamedTuple):
    """The blocks of one section, by rising start; `column` are the starts again."""

    starts: list[int]
    blocks: list[Block]
    column: Column
