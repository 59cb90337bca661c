"""COMPARING TYPES: where new code would see old data differently.

No change: another name of a type or of a member, a typedef, const, a sign, a pointer to a type that is laid out
alike, an enumerator that is new, a virtual function that overrides an inherited one. A change: size, a member's
offset or type, an array's bound, an enumerator with another value (or one that is gone, and nothing else has its
value: variables may), bit-fields, base classes, the order and number of virtual functions.
Two members of one name are the same; those that are left are the same if they are in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator

from patcher.data.declared import Declared, Kind, Member, Node

_NAMED = (Kind.STRUCT, Kind.UNION, Kind.ENUM, Kind.INCOMPLETE)
_NUMBERS = {Kind.WHOLE, Kind.ENUM}
_ANYTHING = {Kind.VOID, Kind.INCOMPLETE, Kind.FUNCTION, Kind.OTHER}  # what a pointer to it says of what is there


class Comparison:
    """Types of an old unit against those of a new one."""

    def __init__(self, old: Declared, new: Declared) -> None:
        self.old = old
        self.new = new
        self._alike: dict[tuple[int, int], bool] = {}

    def alike(self, before: int, after: int) -> bool:
        """Tell whether two types are laid out alike.

        Those of one name are, here: whether they really are is told where that name is compared.
        """
        pair = self.old.bare(before), self.new.bare(after)
        if pair not in self._alike:
            self._alike[pair] = True  # types refer to each other in circles
            self._alike[pair] = self._named_alike(*pair) or not any(self.differences(*pair))
        return self._alike[pair]

    def _named_alike(self, before: int, after: int) -> bool:
        a, b = self.old.node(before), self.new.node(after)
        structs = a.kind in _NAMED and b.kind in _NAMED
        return structs and bool(a.name) and a.name == b.name and self._is_single(a.name)

    def _is_single(self, name: str) -> bool:
        return len(self.old.types.get(name, ())) == 1 == len(self.new.types.get(name, ()))

    def differences(self, before: int, after: int) -> Iterator[str]:
        """Say in what two types, or the declarations of one variable, differ."""
        a, b = self.old.node(before), self.new.node(after)
        if a is b or (a == b and not a.of and not a.members):
            return
        if a.kind is not b.kind:
            yield from self._other_kind(a, b, before, after)
        elif a.kind in (Kind.STRUCT, Kind.UNION):
            yield from self._of_structs(a, b)
        elif a.kind is Kind.ENUM:
            yield from _of_sizes(a, b)
            yield from _of_enumerators(a, b)
        elif a.kind is Kind.ARRAY:
            yield from self._of_arrays(a, b)
        elif a.kind in (Kind.POINTER, Kind.REFERENCE):
            if not self._leads_alike(a.of, b.of):
                yield f"type {self.old.text(before)} -> {self.new.text(after)}"
        elif a.size != b.size:
            yield f"type {self.old.text(before)} -> {self.new.text(after)}"

    def _other_kind(self, a: Node, b: Node, before: int, after: int) -> Iterator[str]:
        numbers = {a.kind, b.kind} <= _NUMBERS and a.size == b.size
        if not numbers and Kind.INCOMPLETE not in (a.kind, b.kind):
            yield f"type {self.old.text(before)} -> {self.new.text(after)}"

    def _of_arrays(self, a: Node, b: Node) -> Iterator[str]:
        if a.bound != b.bound and None not in (a.bound, b.bound):
            yield f"array bound {a.bound} -> {b.bound}"
        elif a.bounds != b.bounds and a.bound is not None and b.bound is not None:
            yield f"array bounds {_bounds(a)} -> {_bounds(b)}"
        if not self.alike(a.of, b.of):
            yield f"elements {self.old.text(a.of)} -> {self.new.text(b.of)}"

    def _leads_alike(self, before: int, after: int) -> bool:
        """Tell whether what a pointer leads to may be taken for what the other one leads to."""
        a, b = self.old.node(before), self.new.node(after)
        if a.kind in _ANYTHING or b.kind in _ANYTHING:
            return True
        if (a.kind is Kind.WHOLE and a.size == 1) or (b.kind is Kind.WHOLE and b.size == 1):
            return Kind.POINTER not in (a.kind, b.kind)  # bytes
        return self.alike(before, after)

    # --- structs ----------------------------------------------------------------------------------------------

    def _of_structs(self, a: Node, b: Node) -> Iterator[str]:
        yield from _of_sizes(a, b)
        for m, n in _paired(a.members, b.members):
            if m is None and n is not None:
                yield f"{_called(n)} is new at offset {place(n.offset)}"
            elif n is None and m is not None:
                yield f"{_called(m)} at offset {place(m.offset)} is gone"
            elif m is not None and n is not None:
                yield from self._of_members(m, n)
        yield from _of_virtuals(_introduced(self.old, a), _introduced(self.new, b))

    def _of_members(self, m: Member, n: Member) -> Iterator[str]:
        if m.offset != n.offset:
            yield f"{_called(m)} offset {place(m.offset)} -> {place(n.offset)}"
        elif m.bits != n.bits:
            yield f"{_called(m)} at offset {place(m.offset)} bits {m.bits or 'all'} -> {n.bits or 'all'}"
        elif not self.alike(m.type, n.type):
            before, after = self.old.text(m.type), self.new.text(n.type)
            kinds = f": {before} -> {after}" if before != after else ""
            yield f"{_called(m)} at offset {place(m.offset)} has another type{kinds}"


def _bounds(array: Node) -> str:
    return "".join(f"[{bound}]" for bound in array.bounds)


def _of_sizes(a: Node, b: Node) -> Iterator[str]:
    if a.size != b.size:
        yield f"size {a.size} -> {b.size}"


def _paired(old: tuple[Member, ...], new: tuple[Member, ...]) -> Iterator[tuple[Member | None, Member | None]]:
    """Join members of one name; those that are left by their order, if they can be each other renamed."""
    after = {(n.inherited, n.name): n for n in new if n.name}
    before = {(m.inherited, m.name): m for m in old if m.name}
    yield from ((m, after[key]) for key, m in before.items() if key in after)
    gone = [m for m in old if (m.inherited, m.name) not in after or not m.name]
    fresh = [n for n in new if (n.inherited, n.name) not in before or not n.name]
    if len(gone) == len(fresh) and all(m.offset == n.offset for m, n in zip(gone, fresh, strict=True)):
        yield from zip(gone, fresh, strict=True)
    else:
        yield from ((m, None) for m in gone)
        yield from ((None, n) for n in fresh)


def _called(member: Member) -> str:
    if member.inherited:
        return f"base class `{member.name.partition(' ')[2]}`"
    return f"member `{member.name}`" if member.name else "a member without a name"


def place(bits: int) -> str:
    """Return an offset in bits as people have it: in bytes, and bits behind a point."""
    return f"{bits // 8}" + (f".{bits % 8}" if bits % 8 else "")


def _of_enumerators(a: Node, b: Node) -> Iterator[str]:
    values = dict(b.enumerators)
    for name, value in a.enumerators:
        if name in values and values[name] != value:
            yield f"`{name}` {value} -> {values[name]}"
        elif name not in values and value not in values.values():
            yield f"`{name}` ({value}) is gone"


# --- virtual functions ------------------------------------------------------------------------------------------------


def _introduced(unit: Declared, node: Node) -> dict[str, tuple[int, str]]:
    """Return the virtual functions that a class has a new slot for: by symbol, the slot and the name."""
    taken: set[int] = set()
    for member in node.members:
        if member.inherited:
            taken |= _slots(unit, unit.node(member.type))
    return {symbol: (slot, name) for slot, symbol, name in node.virtuals if slot not in taken}


def _slots(unit: Declared, node: Node) -> set[int]:
    # A compiler that gives a destructor no slot of its own says 0.
    found = {slot for slot, _, name in node.virtuals if slot or not name.startswith("~")}
    for member in node.members:
        if member.inherited:
            found |= _slots(unit, unit.node(member.type))
    return found


def _of_virtuals(before: dict[str, tuple[int, str]], after: dict[str, tuple[int, str]]) -> Iterator[str]:
    for symbol, (slot, name) in before.items():
        if symbol not in after:
            yield f"virtual function `{name}` in slot {slot} is gone"
        elif after[symbol][0] != slot:
            yield f"virtual function `{name}` slot {slot} -> {after[symbol][0]}"
    for symbol, (slot, name) in after.items():
        if symbol not in before:
            yield f"virtual function `{name}` is new in slot {slot}"
