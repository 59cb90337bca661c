"""Texts that new code does not have any more, and who keeps their addresses.

New code has its own strings, so that a changed one is seen at once, except by what the program has stored: a variable,
a list on the heap. That is told; no string is written where it stands, since linkers merge equal ones of all units,
and let one that ends like another be the tail of that. For the same reason only the very address of a text counts
(what leads to its middle may be another string's), and code that goes on using that address has a text of its own,
which is equal: then whose of the two a stored address is cannot be known, and that is said.

Looked for are texts in bytes, in code that is replaced and in constants that changed. Whether one is gone shows
without decoding anything, as long as none is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property

from patcher.blocks import Block, Place, Reference
from patcher.data.constants import Constant, listed, place_of, replaced
from patcher.data.holders import MOST, Holders, Range, displacements, numbers
from patcher.data.initial import FirstContents
from patcher.data.outcome import Datum, Fate
from patcher.elf.relocations import is_pc_relative
from patcher.image import Image
from patcher.live import LiveFunction
from patcher.match import Status
from patcher.part import Part
from patcher.patch.journal import ArenaView

_LONGEST = 4096  # bytes of a text that is looked for
_SHOWN = 40
_WORD = 8
_PIECE = re.compile(rb"[^\0]+")
_FIELD = 4  # bytes of a distance in code; the instruction ends behind it
_PRIVATE = ".L"  # compilers' names for what has none; mold keeps them
_BEYOND = frozenset("\t\n\r\f\v\b\a\x1b")  # that is part of texts, and not printed


def texts_left(
    image: Image, view: ArenaView, parts: Sequence[Part], constants: Sequence[Constant]
) -> tuple[Datum, ...]:
    """Return the texts that some units' new code is without, of which the program still has the address somewhere."""
    gone: dict[int, tuple[Part, bytes]] = {}
    for part in parts:
        texts = _Texts(image, view, part)
        own = [c for c in constants if c.part is part]
        gone |= {address: (part, text) for address, text in texts.gone(own).items()}
    return tuple(_told(image, view, parts, constants, gone)) if gone else ()


class _Texts:
    """The texts of one unit, in its object and in the process."""

    def __init__(self, image: Image, view: ArenaView, part: Part) -> None:
        self._image = image
        self._view = view
        self._part = part
        self._known: dict[int, bytes] = {}

    def gone(self, constants: Sequence[Constant]) -> dict[int, bytes]:
        """Return the texts that the new object has nowhere, by their addresses.

        The program may have what earlier code gave it: where texts are gone, the other places of these count as well.
        """
        found = {a: self._text(a) for live in self._bodies() for a in self._pointed(live) if self._is_lost(live, a)}
        for constant in constants:
            pointers = self._pointers(constant.block, constant.address, constant.size)
            found |= {a: self._text(a) for a in pointers if self._is_gone(a)}
        if found:
            texts = set(found.values())
            found |= {a: self._text(a) for a in self._earlier(constants) if self._text(a) in texts and self._is_gone(a)}
        return found

    # --- the process --------------------------------------------------------------------------------------------

    def _changed(self) -> Iterator[tuple[Block, LiveFunction]]:
        for block in self._part.blocks.functions:
            live = self._part.live(block) if self._part.status(block) is Status.CHANGED else None
            if live is not None and self._part.is_new(block):
                yield block, live

    def _bodies(self) -> Iterator[LiveFunction]:
        for block, live in self._changed():
            yield live
            yield from self._part.cold_pieces(block)

    def _earlier(self, constants: Sequence[Constant]) -> Iterator[int]:
        """Yield the addresses in what earlier generations, and the program at first, had in the place of code and
        constants that change."""
        for _, live in self._changed():
            for body in (body for bodies in self._part.unit.earlier_bodies(live) for body in bodies):
                yield from (a for a in self._pointed(body) if self._text(a) and _takes(body, a))
        for constant in constants:
            for known in self._part.unit.constants_like(constant.block, self._view.generation):
                yield from self._pointers(constant.block, known.address, known.size)

    def _is_lost(self, live: LiveFunction, address: int) -> bool:
        return self._is_gone(address) and _takes(live, address)

    def _pointed(self, live: LiveFunction) -> Iterator[int]:
        """Yield the addresses that a body may take; not all of them are real."""
        text = live.code
        for at, _ in displacements(text, live.body, self._ranges):
            yield live.body + at + 4 + int.from_bytes(text[at : at + 4], "little", signed=True)
        if not self._part.module.module.position_independent or self._view.contains(live.body):
            for at, width, _ in numbers(text, self._ranges):
                yield int.from_bytes(text[at : at + width], "little")

    @cached_property
    def _ranges(self) -> tuple[Range, ...]:
        module = self._part.module
        segments = (s for s in module.module.segments if not s.writable)
        return (*((s.address + module.bias, s.end + module.bias) for s in segments), *self._view.constants)

    def _pointers(self, block: Block, address: int, size: int) -> Iterator[int]:
        """Yield the addresses that the old contents of a constant lead to: as words, or as distances (clang)."""
        kinds = {is_pc_relative(r.type) for r in self._part.blocks.references(block)}
        data = self._image.target.memory.read_available(address, size) if kinds else b""
        for relative in kinds:
            for at in range(0, len(data), 4 if relative else 8):
                value = int.from_bytes(data[at : at + (4 if relative else 8)], "little", signed=relative)
                value += address if relative else 0
                if any(low <= value < high for low, high in self._ranges):
                    yield value

    def _text(self, address: int) -> bytes:
        """Return the text at an address, b"" where there is none."""
        if address not in self._known:
            data = self._image.target.memory.read_available(address, _LONGEST)
            found, end, _ = data.partition(b"\0")
            self._known[address] = found if end and _is_text(found) else b""
        return self._known[address]

    def _is_gone(self, address: int) -> bool:
        text = self._text(address)
        return bool(text) and text not in self._pieces and self._is_nameless(address) and text not in self._referred

    def _is_nameless(self, address: int) -> bool:
        placed = self._view.journal.placed
        if self._view.contains(address):
            return not any(p.address <= address < p.address + p.size for p in placed)
        module = self._part.module
        found = module.module.symbols.covering(address - module.bias)
        return found is None or not found.size or found.name.startswith(_PRIVATE)

    # --- the object ---------------------------------------------------------------------------------------------

    @cached_property
    def _pieces(self) -> frozenset[bytes]:
        """What stands between zeros in the object's constants: nearly every text that it has, and more."""
        sections = self._part.blocks.object.sections.values()
        return frozenset(p for s in sections if s.read_only and not s.code for p in _PIECE.findall(s.data))

    @cached_property
    def _referred(self) -> frozenset[bytes]:
        """The texts to which the object refers: some are tails of others."""
        blocks = self._part.blocks
        owners = [(b, _FIELD) for b in blocks.functions] + [(b, 0) for b in blocks.data_blocks()]
        return frozenset(text for b, field in owners for r in blocks.references(b) if (text := _tail(r, field)))


def _tail(reference: Reference, field: int) -> bytes:
    """Return what a reference leads to in a constant without a name; `field`: its bytes, in code that takes addresses.

    In a constant, distances count from its start.
    """
    target = reference.target
    if not isinstance(target, Place) or not target.block.anonymous:
        return b""
    bias = (field or -reference.offset) if is_pc_relative(reference.type) else 0
    return target.block.data[max(target.offset + reference.addend + bias, 0) :].partition(b"\0")[0]


def _is_text(data: bytes) -> bool:
    try:
        return bool(data) and all(c.isprintable() or c in _BEYOND for c in data.decode())
    except UnicodeDecodeError:
        return False


def _takes(live: LiveFunction, address: int) -> bool:
    """Tell whether a body takes an address, and not what stands there."""
    from patcher.code.instructions import UndecodableCode, decode_lite, lite_reference

    try:
        listing = decode_lite(live.code, live.body)
    except UndecodableCode:
        return False
    for instruction in listing:
        mnemonic, operands = instruction[2:]
        if mnemonic == "lea" and lite_reference(instruction, live.body) == address:
            return True
        if operands.endswith(hex(address)) and mnemonic in ("mov", "movabs", "push", "cmp"):
            return True
    return False


# --- who has them -------------------------------------------------------------------------------------------------


def _told(
    image: Image,
    view: ArenaView,
    parts: Sequence[Part],
    constants: Sequence[Constant],
    gone: dict[int, tuple[Part, bytes]],
) -> Iterator[Datum]:
    search, ranges = Holders(image, view, replaced(parts)), [(address, address + 1) for address in gone]
    kept = [w.others for w in search.words([*search.mapped(), *search.heaps()], ranges, MOST)]
    if not any(kept):
        return
    left = [(c.address, c.address + c.size) for c in constants]
    first = FirstContents()
    for (address, (part, text)), words, users in zip(gone.items(), kept, search.users(ranges), strict=True):
        words = tuple(at for at in words if not any(low <= at < high for low, high in left))
        own = {at for at in words if _started_with(image, first, part, at, address)}
        places = dict.fromkeys(place for at in words if at not in own if (place := place_of(image, search, at)))
        if places:
            equal = [u.name for u in users if not u.out_of_use]
            equal += [name for at in own if (name := search.variable_at(at))]
            yield Datum(_quoted(text), part.source, Fate.STALE, _note([*places], [*dict.fromkeys(equal)]))


def _started_with(image: Image, first: FirstContents, part: Part, at: int, address: int) -> bool:
    """Tell whether a variable has an address since the program started: a text of its own source then."""
    module = image.module_at(at)
    found = first.of(module, at, _WORD) if module is not None else None
    if module is None or found is None:
        return False
    return int.from_bytes(first.relocated(part, module, at, found), "little") == address


def _note(places: Sequence[str], equal: Sequence[str]) -> str:
    note = listed(places)
    return f"{note}; or an equal text of {listed(equal)}" if equal else note


def _quoted(text: bytes) -> str:
    shown = text.decode()
    shown = shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "..."
    return '"' + shown.encode("unicode_escape").decode() + '"'
