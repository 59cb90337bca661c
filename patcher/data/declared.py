"""WHAT A UNIT DECLARES: its types and its variables with static storage, by qualified name.

A type is a `Node`; those that it is made of stand in it as places of the unit's debug information, since types refer
to each other in circles. What only gives a type another name, or says who may change it (typedef, const, volatile),
is seen through. Specification: DWARF 5, chapter 5; bit-fields of DWARF 4 in section 5.5.6 of that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import NamedTuple

from patcher.data.dies import At, Dies, Entry, Header, Sections, Tag, Value


class Kind(Enum):
    """The kinds of types whose values are laid out differently."""

    WHOLE = "a whole number"
    FLOAT = "a floating number"
    STRUCT = "a struct"
    UNION = "a union"
    ENUM = "an enum"
    ARRAY = "an array"
    POINTER = "a pointer"
    REFERENCE = "a reference"
    MEMBER_POINTER = "a pointer to a member"
    FUNCTION = "a function"
    VOID = "void"
    INCOMPLETE = "incomplete"
    OTHER = "of another kind"


class Member(NamedTuple):
    """A member or a part that stems from another class; `bits` is 0 for what is no bit-field."""

    name: str
    offset: int  # in bits
    bits: int
    type: int
    inherited: bool = False


class Node(NamedTuple):
    """A type; `of` is what an array, a pointer or a reference is of."""

    kind: Kind
    name: str = ""
    size: int = 0
    members: tuple[Member, ...] = ()
    of: int = 0
    bound: int | None = None
    enumerators: tuple[tuple[str, int], ...] = ()
    virtuals: tuple[tuple[int, str, str], ...] = ()  # slot, symbol, name
    bounds: tuple[int | None, ...] = ()  # of an array of arrays, one by one
    signed: bool | None = None  # of a whole number that is no truth value


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable with static storage; `defined` is False where another unit has it. New code has its own constants."""

    name: str
    type: int
    defined: bool
    constant: bool = False
    external: bool = False
    symbol: str = ""


_NAMES = {Tag.STRUCTURE: "struct ", Tag.CLASS: "class ", Tag.UNION: "union ", Tag.ENUMERATION: "enum "}
_KINDS = {
    Tag.STRUCTURE: Kind.STRUCT,
    Tag.CLASS: Kind.STRUCT,
    Tag.UNION: Kind.UNION,
    Tag.ENUMERATION: Kind.ENUM,
    Tag.ARRAY: Kind.ARRAY,
    Tag.POINTER: Kind.POINTER,
    Tag.REFERENCE: Kind.REFERENCE,
    Tag.RVALUE_REFERENCE: Kind.REFERENCE,
    Tag.POINTER_TO_MEMBER: Kind.MEMBER_POINTER,
    Tag.SUBROUTINE_TYPE: Kind.FUNCTION,
}
_SEEN_THROUGH = frozenset((Tag.TYPEDEF, Tag.CONST, Tag.VOLATILE, Tag.RESTRICT, Tag.ATOMIC))
_FLOATS = (0x03, 0x04, 0x09, 0x0F)  # DW_ATE_complex_float, float, imaginary_float, decimal_float
_SIGNED = {5: True, 6: True, 7: False, 8: False}  # DW_ATE_signed, signed_char, unsigned, unsigned_char
_ADDRESS, _ADDRESS_INDEX, _GNU_ADDRESS_INDEX = 0x03, 0xA1, 0xFB  # DW_OP_addr, addrx, GNU_addr_index
_THREAD_LOCAL = (0x9B, 0xE0)  # DW_OP_form_tls_address, GNU_push_tls_address
_PIECE = 0x93  # DW_OP_piece
_PLUS, _CONSTANT = 0x23, 0x10  # DW_OP_plus_uconst, constu
_NOWHERE = 0  # the place of no entry: `void`
VOID = Node(Kind.VOID)
_NESTED = re.compile(r"_ZN[rVK]*(.*)")
_LENGTH = re.compile(r"\d+")
_LEADING = frozenset((Tag.POINTER, Tag.REFERENCE, Tag.RVALUE_REFERENCE, Tag.POINTER_TO_MEMBER))
_MENTIONING = _LEADING | {Tag.PARAMETER, Tag.VARIABLE, Tag.SUBPROGRAM, Tag.SUBROUTINE_TYPE}


@dataclass(frozen=True, slots=True)
class _Mentions:
    """The types that a unit names, by what names them: see the properties of `Declared`."""

    passed: frozenset[int]
    pointed: frozenset[int]
    automatic: frozenset[int]
    by_function: Mapping[int, Sequence[int]]  # of each function, in what order they stand


class Declared:
    """The types and variables of one unit. Entries that are damaged raise `IndexError`, `KeyError` or `ValueError`."""

    def __init__(self, sections: Sections, header: Header) -> None:
        self.file = header.file
        self.start = header.start
        self.sections = sections
        self.stands_for: tuple[Variable, ...] = ()
        self._dies = Dies(sections, header)
        self._entries = self._dies.walk()
        self._at = {e.offset: e for e in self._entries}
        self._names: dict[int, str] = {}
        self._nodes: dict[int, Node] = {_NOWHERE: VOID}
        self._bare: dict[int, int] = {_NOWHERE: _NOWHERE}
        self._ends: dict[int, int] = {}

    def stand_for(self, file: str, variables: tuple[Variable, ...]) -> None:
        """Have the unit speak for another file, which has these variables."""
        self.file, self.stands_for = file, variables
        found: dict[str, tuple[Variable, ...]] = {}
        for variable in variables:
            found[variable.name] = (*found.get(variable.name, ()), variable)
        self.variables = found

    # --- by name ----------------------------------------------------------------------------------------------

    @cached_property
    def types(self) -> Mapping[str, tuple[int, ...]]:
        """The places of complete structs, classes, unions and enums with a name, by kind and qualified name."""
        found: dict[str, tuple[int, ...]] = {}
        unnamed: list[int] = []
        for entry in self._entries:
            if entry.tag in _NAMES and entry.complete:
                name = self.type_name(entry.offset)
                if name:
                    found[name] = (*found.get(name, ()), entry.offset)
                else:
                    unnamed.append(entry.offset)
        return {**found, **self._named_by_typedef(frozenset(unnamed))} if unnamed else found

    def _named_by_typedef(self, unnamed: frozenset[int]) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for entry, target in self._typedefs:
            if target in unnamed:
                name = self._qualified(entry)
                found[name] = (*found.get(name, ()), target)
        return found

    @cached_property
    def _typedefs(self) -> tuple[tuple[Entry, int], ...]:
        return tuple((e, self._type_at(e.offset)) for e in self._entries if e.tag == Tag.TYPEDEF)

    @cached_property
    def variables(self) -> Mapping[str, tuple[Variable, ...]]:
        """The variables with static storage, and those of other units that are used, by qualified name."""
        found: dict[str, tuple[Variable, ...]] = {}
        for entry in self._entries:
            if entry.tag in (Tag.VARIABLE, Tag.MEMBER):
                variable = self._variable(entry)
                if variable is not None:
                    found[variable.name] = (*found.get(variable.name, ()), variable)
        return {name: tuple(v for v in every if v.defined) or every[:1] for name, every in found.items()}

    def _variable(self, entry: Entry) -> Variable | None:
        raw = self._dies.attributes(entry.offset)
        defined = _is_static(raw.get(At.LOCATION, b""))
        declared = At.DECLARATION in raw and At.EXTERNAL in raw
        if not defined and not declared:
            return None
        name = self._qualified(entry)
        place: int | None = entry.offset
        external = At.EXTERNAL in raw
        symbol = self._dies.text(raw.get(At.LINKAGE_NAME))
        while place and At.TYPE not in raw:
            place = self._reference(raw, At.SPECIFICATION) or self._reference(raw, At.ABSTRACT_ORIGIN)
            raw = self._dies.attributes(place) if place else raw
            external = external or At.EXTERNAL in raw
            symbol = symbol or self._dies.text(raw.get(At.LINKAGE_NAME))
        if not name or not place:
            return None
        found = self._reference(raw, At.TYPE)
        return Variable(name, found, defined, self._is_constant(found), external, symbol or name.rpartition("::")[2])

    def _is_constant(self, offset: int) -> bool:
        """Tell whether a type is const: itself, or the elements of an array."""
        tag, seen = self._dies.tag(offset) if offset else 0, 0
        while tag in (Tag.TYPEDEF, Tag.ARRAY) and seen < 99:
            offset, seen = self._type_at(offset), seen + 1
            tag = self._dies.tag(offset) if offset else 0
        return tag == Tag.CONST

    @cached_property
    def functions(self) -> frozenset[str]:
        """The functions that the unit has code or declarations of, by qualified name."""
        return frozenset(filter(None, map(self._qualified, self._subprograms)))

    @cached_property
    def _subprograms(self) -> tuple[Entry, ...]:
        return tuple(e for e in self._entries if e.tag == Tag.SUBPROGRAM)

    def functions_naming(self, type_: int) -> tuple[str, ...]:
        """Return the functions whose result, parameters or variables lead to a type, by qualified name."""
        found = map(self._qualified, self._naming.get(type_, ()))
        return tuple(name for name in dict.fromkeys(found) if name)

    @cached_property
    def _naming(self) -> Mapping[int, Sequence[Entry]]:
        found: dict[int, list[Entry]] = {}
        for entry in self._subprograms:
            for end in dict.fromkeys(map(self._end, self._mentions.by_function.get(entry.offset, ()))):
                found.setdefault(end, []).append(entry)
        return found

    def _end(self, place: int) -> int:
        """Return the place of the type that is left of one without pointers, references and arrays."""
        if place not in self._ends:
            at, seen = self.bare(place), {place}
            while (of := self.node(at).of) and of not in seen:
                seen.add(of)
                at = self.bare(of)
            self._ends[place] = at
        return self._ends[place]

    @property
    def passed(self) -> frozenset[int]:
        """The types that functions take and return, those of other units too."""
        return self._mentions.passed

    @property
    def automatic(self) -> frozenset[int]:
        """The types of variables without static storage."""
        return self._mentions.automatic

    @property
    def pointed(self) -> frozenset[int]:
        """The types that pointers and references lead to."""
        return self._mentions.pointed

    @cached_property
    def _mentions(self) -> _Mentions:
        passed: set[int] = set()
        pointed: set[int] = set()
        variables: list[tuple[int, int]] = []
        by_function: dict[int, list[int]] = {}
        inside: list[tuple[int, list[int]]] = []  # the functions that the entry is in: depth, and the types there
        for tag, place, type_, depth in self._dies.typed(_MENTIONING):
            while inside and depth <= inside[-1][0]:
                inside.pop()
            if tag in _LEADING:
                pointed.add(type_)
                continue
            if tag == Tag.VARIABLE:
                variables.append((place, type_))
            else:
                passed.add(type_)
            if tag == Tag.SUBPROGRAM:
                inside.append((depth, by_function.setdefault(place, [])))
            if tag != Tag.SUBROUTINE_TYPE:
                for _, types in inside:
                    types.append(type_)
        automatic = {type_ for place, type_ in variables if type_ and self._is_automatic(place)}
        for type_ in passed | pointed | automatic:
            self._dies.reference(type_ or None)
        nowhere = {_NOWHERE}
        return _Mentions(frozenset(passed - nowhere), frozenset(pointed - nowhere), frozenset(automatic), by_function)

    def _is_automatic(self, place: int) -> bool:
        raw = self._dies.attributes(place)
        return not _is_static(raw.get(At.LOCATION, b"")) and At.DECLARATION not in raw

    def _type_at(self, offset: int) -> int:
        return self._dies.type_at(offset)

    @cached_property
    def plain_typedefs(self) -> Mapping[str, tuple[int, ...]]:
        """The typedefs of numbers and arrays, outside of classes and functions, by qualified name."""
        found: dict[str, tuple[int, ...]] = {}
        for entry, target in self._typedefs:
            outside = entry.outer is None or entry.outer.tag == Tag.NAMESPACE
            if outside and target and self._dies.tag(target) in (Tag.BASE, Tag.ARRAY):
                name = self._qualified(entry)
                found[name] = (*found.get(name, ()), target)
        return found

    def type_name(self, offset: int) -> str:
        """Return a type's kind and qualified name as C has it; empty for one without a name."""
        entry = self._at.get(offset)
        name = self._qualified(entry) if entry is not None else ""
        return _NAMES[entry.tag] + name if entry is not None and name else ""

    def _qualified(self, entry: Entry) -> str:
        if entry.offset in self._names:
            return self._names[entry.offset]
        plain = self._dies.plain_name(entry.offset)
        if plain:
            name = self._names[entry.offset] = self._joined(entry, plain)
            return name
        raw = self._dies.attributes(entry.offset)
        own = self._dies.text(raw.get(At.NAME))
        origin = self._reference(raw, At.SPECIFICATION) or self._reference(raw, At.ABSTRACT_ORIGIN)
        if origin and origin != entry.offset and origin in self._at:
            name = self._qualified(self._at[origin])
        elif origin and not own:
            name = self._declared_elsewhere(origin)
        elif not own and entry.tag == Tag.NAMESPACE:
            name = self._joined(entry, "(anonymous namespace)")
        else:
            name = self._joined(entry, own) if own else ""
        self._names[entry.offset] = name
        return name

    def _declared_elsewhere(self, offset: int) -> str:
        """Return the qualified name of a function that is declared in a class or namespace, and defined outside."""
        raw = self._dies.attributes(offset)
        symbol, own = self._dies.text(raw.get(At.LINKAGE_NAME)), self._dies.text(raw.get(At.NAME))
        found = _NESTED.match(symbol)
        parts = list(_parts(found[1])) if found is not None else []
        return "::".join(parts) if parts and parts[-1] == own else own

    def _joined(self, entry: Entry, own: str) -> str:
        outer = entry.outer
        while outer is not None and outer.tag in (Tag.LEXICAL_BLOCK, Tag.COMPILE_UNIT):
            outer = outer.outer
        above = self._qualified(outer) if outer is not None else ""
        return f"{above}::{own}" if above else own

    # --- types ------------------------------------------------------------------------------------------------

    def bare(self, offset: int) -> int:
        """Return the place of the type behind typedefs and qualifiers."""
        if offset not in self._bare:
            seen = [offset]
            while offset and self._dies.tag(offset) in _SEEN_THROUGH:
                offset = self._type_at(offset)
                if offset in seen:
                    raise ValueError("a typedef of itself")
                seen.append(offset)
            self._bare.update(dict.fromkeys(seen, offset))
        return self._bare[offset]

    def node(self, offset: int) -> Node:
        """Return the type at a place, behind typedefs and qualifiers."""
        offset = self.bare(offset)
        if offset not in self._nodes:
            self._nodes[offset] = self._node(offset)
        return self._nodes[offset]

    def text(self, offset: int) -> str:
        """Return a type as a message has it."""
        node = self.node(offset)
        if node.kind in (Kind.POINTER, Kind.REFERENCE):
            return f"{self.text(node.of)} {'*' if node.kind is Kind.POINTER else '&'}".replace("* *", "**")
        if node.kind is Kind.ARRAY:
            return f"{self.text(node.of)}[{'' if node.bound is None else node.bound}]"
        return node.name or node.kind.value

    def _node(self, offset: int) -> Node:
        raw = self._dies.attributes(offset)
        tag = self._dies.tag(offset)
        size = _int(raw.get(At.BYTE_SIZE, 0))
        name = self.type_name(offset)
        if tag == Tag.BASE:
            encoding = _int(raw.get(At.ENCODING, 0))
            kind = Kind.FLOAT if encoding in _FLOATS else Kind.WHOLE
            return Node(kind, self._dies.text(raw.get(At.NAME)), size, signed=_SIGNED.get(encoding))
        kind = _KINDS.get(tag, Kind.OTHER)
        if kind in (Kind.STRUCT, Kind.UNION, Kind.ENUM) and At.DECLARATION in raw:
            return Node(Kind.INCOMPLETE, name)
        if kind in (Kind.STRUCT, Kind.UNION):
            entry = self._at[offset]
            return Node(kind, name, size, self._members(entry), virtuals=self._virtuals(entry))
        if kind is Kind.ENUM:
            return Node(kind, name, size, enumerators=self._enumerators(self._at[offset]))
        target = self._reference(raw, At.TYPE)
        if kind is Kind.ARRAY:
            return self._array(target, self._at[offset])
        if kind in (Kind.POINTER, Kind.REFERENCE, Kind.MEMBER_POINTER):
            return Node(kind, size=size or 8, of=target)
        return Node(kind, self._dies.text(raw.get(At.NAME)), size)

    def _members(self, entry: Entry) -> tuple[Member, ...]:
        found = []
        for inner in entry.inner:
            if inner.tag in (Tag.MEMBER, Tag.INHERITANCE):
                raw = self._dies.attributes(inner.offset)
                if At.EXTERNAL in raw or At.DECLARATION in raw:
                    continue  # static: a variable
                inherited = inner.tag == Tag.INHERITANCE
                target = self._reference(raw, At.TYPE)
                name = self.type_name(self.bare(target)) if inherited else self._dies.text(raw.get(At.NAME))
                offset, virtual = _member_offset(raw)
                found.append(Member(name + virtual, offset, _int(raw.get(At.BIT_SIZE, 0)), target, inherited))
        return tuple(found)

    def _virtuals(self, entry: Entry) -> tuple[tuple[int, str, str], ...]:
        found = []
        for inner in entry.inner:
            if inner.tag == Tag.SUBPROGRAM:
                raw = self._dies.attributes(inner.offset)
                slot = raw.get(At.VTABLE_SLOT, None)
                if slot is not None:
                    name = self._dies.text(raw.get(At.NAME))
                    symbol = self._dies.text(raw.get(At.LINKAGE_NAME))
                    found.append((_expression(slot, _CONSTANT), name if name.startswith("~") else symbol or name, name))
        return tuple(sorted(found))

    def _enumerators(self, entry: Entry) -> tuple[tuple[str, int], ...]:
        every = [self._dies.attributes(i.offset) for i in entry.inner if i.tag == Tag.ENUMERATOR]
        return tuple((self._dies.text(raw.get(At.NAME)), _int(raw[At.CONST_VALUE])) for raw in every)

    def _array(self, element: int, entry: Entry) -> Node:
        counts = [self._count(inner.offset) for inner in entry.inner if inner.tag == Tag.SUBRANGE] or [None]
        count: int | None = 1
        for each in counts:
            count = None if count is None or each is None else count * each
        size = (count or 0) * self.node(element).size
        return Node(Kind.ARRAY, size=size, of=element, bound=count, bounds=tuple(counts))

    def _count(self, offset: int) -> int | None:
        raw = self._dies.attributes(offset)
        count, bound = raw.get(At.COUNT, None), raw.get(At.UPPER_BOUND, None)
        if isinstance(count, int):
            return count
        return bound + 1 if isinstance(bound, int) else None

    def _reference(self, raw: Mapping[int, Value], attribute: int) -> int:
        return self._dies.reference(raw.get(attribute))


def _parts(mangled: str) -> Iterator[str]:
    """Yield the plain names that a nested name begins with (Itanium C++ ABI, section 5.1.3)."""
    while (found := _LENGTH.match(mangled)) is not None:
        end = found.end() + int(found[0])
        name, mangled = mangled[found.end() : end], mangled[end:]
        yield "(anonymous namespace)" if name.startswith("_GLOBAL__N") else name


def _int(value: Value) -> int:
    return value if isinstance(value, int) else 0


def _is_static(location: Value) -> bool:
    if not isinstance(location, bytes):
        return False
    while location[:1] == bytes([_PIECE]):  # of a variable that was split, one that is gone
        location = location[1:].lstrip(bytes(range(0x80, 0x100)))[1:]
    if not location:
        return False
    return location[0] in (_ADDRESS, _ADDRESS_INDEX, _GNU_ADDRESS_INDEX) or location[-1] in _THREAD_LOCAL


def _expression(value: Value, operation: int) -> int:
    """Return the number in an expression of one operation, or where it is a number itself."""
    if isinstance(value, int):
        return value
    if isinstance(value, bytes) and value and value[0] == operation:
        return sum((byte & 0x7F) << (7 * i) for i, byte in enumerate(value[1:]))
    return -1


def _member_offset(raw: Mapping[int, Value]) -> tuple[int, str]:
    """Return a member's offset in bits; for a virtual base class 0, and where its offset stands."""
    if At.DATA_BIT_OFFSET in raw:
        return _int(raw[At.DATA_BIT_OFFSET]), ""
    location = raw.get(At.MEMBER_LOCATION, 0)
    if isinstance(location, bytes) and location[:1] != bytes([_PLUS]):
        return 0, f" (virtual, {location.hex()})"
    offset = 8 * _expression(location, _PLUS)
    if At.BIT_OFFSET in raw:  # counted from the most significant bit of the storage unit
        storage, bits = _int(raw.get(At.BYTE_SIZE, 0)), _int(raw[At.BIT_SIZE])
        offset += 8 * storage - _int(raw[At.BIT_OFFSET]) - bits
    return offset, ""
