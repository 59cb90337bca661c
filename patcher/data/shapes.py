"""SHAPES: how the bytes of a variable are divided, and which of them carry over when that changes.

A `Shape` is a value of its own: whoever has two can tell what to copy, without any debug information at hand. Members
are the same by name, elements by index, and whatever has the kind and size that it had is copied as it is. A whole
number of another size keeps its value, if that fits. New members and elements are left to the initialiser. What cannot
be carried over without a decision (a floating number that was a whole one, a pointer to something else, an array that
became shorter, a bit-field that moved within its byte, a member that may be another one renamed) is said, and nothing
is copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum


class Form(Enum):
    """What the bytes of a shape are."""

    NUMBER = "a whole number"
    FLOAT = "a floating number"
    POINTER = "a pointer"
    STRUCT = "a struct"
    UNION = "a union"
    ARRAY = "an array"
    OTHER = "something else"


@dataclass(frozen=True, slots=True)
class Part:
    """A member: where it begins, in bits, and how many bits a bit-field has (0: it is none)."""

    name: str
    offset: int
    bits: int
    shape: Shape


@dataclass(frozen=True, slots=True)
class Shape:
    """A type's size in bytes and what it is made of; `text` is its name, and for a pointer what it leads to.

    `signed` is known of whole numbers that are neither truth values nor of an enum.
    """

    size: int
    form: Form
    text: str = ""
    parts: tuple[Part, ...] = ()
    count: int = 0
    element: Shape | None = None
    signed: bool | None = None


@dataclass(frozen=True, slots=True, order=True)
class Conversion:
    """How a whole number is written with another size: its new size, and which of the two have a sign."""

    size: int
    from_signed: bool
    to_signed: bool


@dataclass(frozen=True, slots=True, order=True)
class Move:
    """Bytes that are copied: from an offset in the old variable to one in the new; or a number that is converted."""

    origin: int
    target: int
    size: int
    conversion: Conversion | None = None

    def carried(self, old: bytes) -> bytes:
        """Return what is written at the target. Raises `OverflowError` for a number that has no room there."""
        data = old[self.origin : self.origin + self.size]
        if self.conversion is None:
            return data
        number = int.from_bytes(data, "little", signed=self.conversion.from_signed)
        return number.to_bytes(self.conversion.size, "little", signed=self.conversion.to_signed)


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a variable's value cannot be carried over: where (`.list[].next`), and what differs."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"`{self.path}`: {self.reason}" if self.path else self.reason


_MOST = 1 << 16  # pieces of a plan
_TOLD = 6  # members that a report names
_TRUTH = ("bool", "_Bool")  # no value but 0 and 1


def copy_plan(old: Shape, new: Shape) -> tuple[Move, ...] | tuple[Obstacle, ...]:
    """Return what to copy of an old variable into a new one that has its initial value, or why that cannot be told.

    Moves lie within both variables, and no two have a target in common; an empty plan means that nothing carries
    over. A member that is gone is dropped.
    """
    obstacles: list[Obstacle] = []
    moves: list[Move] = []
    for step in _steps(old, new, 0, 0, ""):
        if isinstance(step, Obstacle):
            obstacles.append(step)
        else:
            moves.append(step)
        if len(moves) > _MOST:
            return (Obstacle("", f"it has more than {_MOST} pieces"),)
    return tuple(dict.fromkeys(obstacles)) or _joined(moves)


def _steps(old: Shape, new: Shape, origin: int, target: int, path: str) -> Iterator[Move | Obstacle]:
    if old == new:
        yield Move(origin, target, new.size)
    elif old.form is not new.form:
        yield Obstacle(path, f"{_named(old)} became {_named(new)}")
    elif new.form is Form.STRUCT:
        yield from _of_members(old, new, origin, target, path)
    elif new.form is Form.ARRAY:
        yield from _of_elements(old, new, origin, target, path)
    elif new.form is Form.UNION:
        yield Obstacle(path, f"{_named(old)} changed, and which of its members counts is not known")
    elif old.size != new.size and old.signed is not None and new.signed is not None:
        yield Move(origin, target, old.size, Conversion(new.size, old.signed, new.signed))
    elif old.size != new.size:
        yield Obstacle(path, f"{old.form.value} of {old.size} bytes became one of {new.size}")
    elif new.form is Form.POINTER or new.form is Form.OTHER or (new.text in _TRUTH and old.text not in _TRUTH):
        yield Obstacle(path, f"{_named(old)} became {_named(new)}")
    else:
        yield Move(origin, target, new.size)


def _named(shape: Shape) -> str:
    return f"{shape.form.value} ({shape.text})" if shape.text else shape.form.value


def _of_members(old: Shape, new: Shape, origin: int, target: int, path: str) -> Iterator[Move | Obstacle]:
    yield from _renamed(old.parts, new.parts, path)
    for part, before in _of_one_name(old.parts, new.parts):
        within = f"{path}.{part.name}"
        if before is None:
            yield Obstacle(within, "which old member it is cannot be told")
        elif part.bits or before.bits:
            yield from _of_bits(before, part, new, old, origin, target, within)
        else:
            yield from _steps(before.shape, part.shape, origin + before.offset // 8, target + part.offset // 8, within)


def _renamed(old: tuple[Part, ...], new: tuple[Part, ...], path: str) -> Iterator[Obstacle]:
    """Find members that may have another name now: their value would be lost."""
    before, after = {p.name for p in old}, {p.name for p in new}
    gone = [p for p in old if p.name and p.name not in after]
    for part in (p for p in new if p.name and p.name not in before):
        for other in gone:
            if (other.shape, other.bits) == (part.shape, part.bits):
                yield Obstacle(f"{path}.{part.name}", f"whether it is what `{other.name}` was cannot be told")


def _of_one_name(old: tuple[Part, ...], new: tuple[Part, ...]) -> Iterator[tuple[Part, Part | None]]:
    """Join each new member with the old one of its name; members without a name with what they alone can be."""
    before = {p.name: p for p in old if p.name}
    yield from ((p, before[p.name]) for p in new if p.name in before)
    bare, fresh = [p for p in old if not p.name], [p for p in new if not p.name]
    for index, part in enumerate(fresh):
        if len(bare) == len(fresh):
            yield part, bare[index]
        elif bare:
            yield part, None


def _of_bits(
    before: Part, part: Part, new: Shape, old: Shape, origin: int, target: int, path: str
) -> Iterator[Move | Obstacle]:
    """Copy a bit-field with the bytes it is in, where all that is in these came along in the same places."""
    if before.bits != part.bits or before.offset % 8 != part.offset % 8:
        yield Obstacle(path, f"a bit-field of {before.bits or 'all'} bits became one of {part.bits or 'all'}, or moved")
        return
    first, last = before.offset // 8, (before.offset + before.bits - 1) // 8
    shift = part.offset // 8 - first
    there = {p.name: (p.offset - 8 * shift, p.bits) for p in new.parts if _touches(p, first + shift, last + shift)}
    here = {p.name: (p.offset, p.bits) for p in old.parts if _touches(p, first, last)}
    if any(here.get(name, where) != where for name, where in there.items()) or here.keys() - there.keys():
        yield Obstacle(path, "the bit-fields in its bytes are others")
    elif there.keys() - here.keys():
        yield Obstacle(path, "a bit-field that is new is in its bytes")
    else:
        yield Move(origin + first, target + first + shift, last - first + 1)


def _touches(part: Part, first: int, last: int) -> bool:
    bits = part.bits or 8 * part.shape.size
    return part.offset < 8 * (last + 1) and part.offset + bits > 8 * first


def _of_elements(old: Shape, new: Shape, origin: int, target: int, path: str) -> Iterator[Move | Obstacle]:
    a, b = old.element, new.element
    if a is None or b is None:
        yield Obstacle(path, "what it has elements of is not known")
    elif new.count < old.count:
        yield Obstacle(path, f"{old.count} elements became {new.count}")
    elif a == b:
        yield Move(origin, target, min(old.count, new.count) * b.size)
    else:
        for index in range(min(old.count, new.count)):
            yield from _steps(a, b, origin + index * a.size, target + index * b.size, f"{path}[]")


def _joined(moves: list[Move]) -> tuple[Move, ...]:
    """Join moves that follow each other on both sides, and leave out those that others contain."""
    joined: list[Move] = []
    for move in sorted(moves, key=lambda m: (m.target, -m.size)):
        last = joined[-1] if joined else None
        shift = move.origin - move.target
        plain = last is not None and last.conversion is None and move.conversion is None
        if last is not None and plain and last.origin - last.target == shift and move.target <= last.target + last.size:
            end = max(last.target + last.size, move.target + move.size)
            joined[-1] = Move(last.origin, last.target, end - last.target)
        elif move.size:
            joined.append(move)
    return tuple(joined)


def told(old: Shape, new: Shape) -> str:
    """Return how a variable is carried over, in a few words: `members copied by name; new: limit`."""
    inner_old, inner_new = _innermost(old), _innermost(new)
    if inner_new.form is Form.STRUCT and inner_old != inner_new:
        fresh, gone = (list(_only_in(a, b, "")) for a, b in ((inner_new, inner_old), (inner_old, inner_new)))
        how = "members copied by name"
        how += f"; new: {_listed(fresh)}" if fresh else ""
        return how + (f"; gone: {_listed(gone)}" if gone else "")
    return "elements copied by index" if new.form is Form.ARRAY else "value kept"


def _innermost(shape: Shape) -> Shape:
    while shape.element is not None:
        shape = shape.element
    return shape


def _only_in(shape: Shape, other: Shape, path: str) -> Iterator[str]:
    """Yield the members of a struct, and of those within it, that another one does not have."""
    known = {p.name: p.shape for p in other.parts}
    for part in shape.parts:
        if part.name and part.name not in known:
            yield f"{path}{part.name}"
        elif part.shape.form is not Form.POINTER and part.name in known:
            inner = f"{path}{part.name}." if part.name else path
            yield from _only_in(_innermost(part.shape), _innermost(known[part.name]), inner)


def _listed(names: list[str]) -> str:
    more = len(names) - _TOLD
    return ", ".join(names[:_TOLD]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True, slots=True)
class Carried:
    """A variable whose value is carried over; `scoped`: within a function, which its name says."""

    name: str
    old: Shape
    new: Shape
    moves: tuple[Move, ...]
    scoped: bool = False

    @property
    def note(self) -> str:
        return f"{self.old.size} -> {self.new.size} bytes, {told(self.old, self.new)}"
