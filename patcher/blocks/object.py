"""Cutting an object into blocks, and what each of them refers to, one by one or as columns.

Columns have numbers for targets and blocks, since a large unit has far more references than there is time to make
objects for: `Blocks.fields` gives them, `Blocks.homes` says in which block a target is.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from patcher.blocks import neighbours
from patcher.blocks.block import (
    Absolute,
    Block,
    Cuts,
    Doubt,
    External,
    Kind,
    Linkable,
    Place,
    Reference,
    Target,
)
from patcher.blocks.extents import Extents, data_extents, function_extents, is_one_variable, string_extent
from patcher.blocks.hidden import HiddenReferences, rows_of
from patcher.bulk import collector_paused, first_rows
from patcher.elf import ObjectFile, Relocation, Section, Symbol, SymbolType
from patcher.elf.object import KEY_BITS, Column, SymbolBinding
from patcher.elf.relocations import R, is_pc_relative
from patcher.elf.tables import SHF_EXECINSTR, SHF_MERGE, SHF_TLS
from patcher.errors import ObjectError

if TYPE_CHECKING:
    from patcher.code.split import HiddenReference


@dataclass(frozen=True, slots=True, eq=False)
class Fields:
    """The references of some blocks of one object, as columns.

    `owner`: which of the blocks, by its place in the sequence that was asked for; `target`: a number that
    `Blocks.target` knows.
    """

    owner: Column
    offset: Column
    type: Column
    target: Column
    addend: Column

    def reference(self, blocks: Blocks, row: int) -> Reference:
        """Return one row as the reference that it stands for."""
        target = blocks.target(int(self.target[row]))
        return Reference(int(self.offset[row]), int(self.type[row]), target, int(self.addend[row]))

    @classmethod
    def joined(cls, parts: Sequence[Fields]) -> Fields:
        """Return the rows of several tables about the same blocks, one after another."""
        if len(parts) == 1:
            return parts[0]
        columns = ("owner", "offset", "type", "target", "addend")
        return cls(*(np.concatenate([getattr(p, c) for p in parts]) for c in columns))


STUB_SIZE = 5

_UNKNOWN = -2  # home of a target that was never asked for
_NO_PLAIN_DATA = SHF_EXECINSTR | SHF_TLS | SHF_MERGE
_LARGEST = 1 << 32  # no section is larger
# Comparing with a member of an enum takes as long as making a tuple.
_FILE, _SECTION, _IFUNC = int(SymbolType.FILE), int(SymbolType.SECTION), int(SymbolType.IFUNC)
_SIZES = (R.SIZE32, R.SIZE64)
_SKIPPED = (".eh_frame", ".note", ".comment", ".gnu", ".llvm", ".stapsdt")


class Blocks:
    """The blocks of one object. References are worked out when first asked for, and kept."""

    def __init__(self, source: ObjectFile) -> None:
        self.object = source
        self._made: list[Block] = []
        self._relocations: dict[int, list[Relocation]] = {}
        self._whole: dict[int, Block] = {}  # sections that are one block
        self._cuts: dict[int, Cuts] = {}  # those that have several, or none
        self._entries: dict[tuple[int, int], Block] = {}  # of mergeable pools, as they are asked for
        self._references: dict[Block, tuple[Reference, ...]] = {}
        self._commons: dict[int, Block] = {}
        self._hidden = HiddenReferences(source, self._cuts)
        self._hidden_found: dict[Block, tuple[Reference, ...]] = {}
        self._pointed: dict[int, set[int]] | None = None
        self._targets: dict[int, Target | None] = {}  # of symbols, and of the numbers beyond theirs
        self._numbers: dict[Target, int] = {}
        self._exact: tuple[Column, Column] | None = None
        self._boundaries: dict[Block, list[int]] = {}
        self._runs: dict[Block, tuple[Block, ...]] = {}
        self._doubts: dict[Block, dict[int, tuple[Doubt, ...]]] = {}
        self._homes = np.empty((2, 0), np.int64)
        with collector_paused():
            self._sort_symbols()
            self._cut_code([s for s in source.sections.values() if s.size and _is_looked_at(s) and s.code])
            self.functions: tuple[Block, ...] = tuple(b for b in self._made if b.symbols)

    def _sort_symbols(self) -> None:
        rows = self.object.symbol_rows
        numbers = np.flatnonzero((rows.type != _FILE) & (rows.type != _SECTION))
        self._sorted = numbers[np.argsort(rows.section[numbers], kind="stable")]
        bounds = np.arange(max(self.object.sections, default=0) + 2)
        self._first_symbol = np.searchsorted(rows.section[self._sorted], bounds)
        local = np.flatnonzero((rows.type != _FILE) & (rows.binding == SymbolBinding.LOCAL)).tolist()
        self._keeps_local_names = any(self.object.symbols[number].name for number in local)

    def _symbols_in(self, section: int) -> Column:
        """Return the numbers of the symbols that stand in a section."""
        return self._sorted[self._first_symbol[section] : self._first_symbol[section + 1]]

    # --- blocks -----------------------------------------------------------------------------------------------

    def data_blocks(self) -> Iterable[Block]:
        """Yield every named variable and constant that the object defines, commons included."""
        for section in self.object.sections.values():
            if section.size and not section.code and not section.mergeable and _is_looked_at(section):
                yield from self._named_blocks(section)
        for symbol in self.object.symbols:
            if symbol.common:
                yield self._common(symbol)

    def _named_blocks(self, section: Section) -> Iterable[Block]:
        self._cut(section)
        whole = self._whole.get(section.index)
        blocks = self._cuts[section.index].blocks if whole is None else (whole,)
        return (b for b in blocks if b.symbols)

    def at(self, section_index: int, offset: int) -> Place:
        """Return the block that holds an offset of a section, and the offset within it."""
        whole = self._whole.get(section_index)
        if whole is not None:
            return Place(whole, offset)
        cuts = self._cuts.get(section_index)
        if cuts is not None and cuts.starts:
            i = max(0, bisect.bisect_right(cuts.starts, offset) - 1)
            return Place(cuts.blocks[i], offset - cuts.starts[i])
        section = self.object.sections.get(section_index)
        if section is None:
            raise ObjectError(
                f"{self.object.name}: a reference into section {section_index}, which is not loaded",
                "the object is damaged; compile it again",
            )
        if section.strings:
            return self._string_at(section, offset)
        if section.mergeable and section.entry_size and not section.code:
            return self._entry_at(section, offset)
        self._cut(section)
        if section_index in self._cuts and not self._cuts[section_index].starts:
            raise self._outside(section, offset)
        return self.at(section_index, offset)

    def _cut(self, section: Section) -> None:
        index = section.index
        if index in self._whole or index in self._cuts:
            return
        if section.code:
            self._cut_code([section])
            return
        numbers = self._symbols_in(index)
        symbols = [s for s in map(self.object.symbols.__getitem__, numbers.tolist()) if s.value <= section.size]
        if is_one_variable(section, symbols):
            extents = Extents.whole([section], [tuple(symbols)])
        else:
            extents = data_extents(self.object, section, numbers, self.pointed_offsets(section))
        self._keep(section, self._make([section], extents))

    def _cut_code(self, sections: list[Section]) -> None:
        if not sections:
            return
        numbers = self._sorted if len(sections) > 1 else self._symbols_in(sections[0].index)
        extents = function_extents(self.object, sections, numbers)
        blocks = self._make(sections, extents)
        if len(blocks) == len(sections) and not any(extents.starts):
            self._whole.update(zip([s.index for s in sections], blocks, strict=True))
            return
        bounds = np.searchsorted(extents.owners, np.arange(len(sections) + 1)).tolist()
        for section, low, high in zip(sections, bounds, bounds[1:], strict=False):
            self._keep(section, blocks[low:high])

    def _keep(self, section: Section, blocks: list[Block]) -> None:
        """Remember the pieces of a section."""
        if len(blocks) == 1 and not blocks[0].start:
            self._whole[section.index] = blocks[0]
        else:
            starts = [b.start for b in blocks]
            self._cuts[section.index] = Cuts(starts, blocks, np.array(starts, np.int64))
            if section.code and len(blocks) > 1:
                self._hidden.add(section.index)

    def _make(self, sections: Sequence[Section], extents: Extents) -> list[Block]:
        """Return the pieces of some sections as blocks."""
        made: list[Block] = []
        source, number = self.object, len(self._made)
        last = -1
        for owner, start, end, symbols in zip(*extents, strict=True):
            if owner != last:
                section, last = sections[owner], owner
                index, data, widest = section.index, section.data, section.alignment
                named, nameless = self._kinds(section)
            kind = named if symbols or (named is Kind.DATA and self._is_padding(index, start, end)) else nameless
            name = (symbols[0].name if len(symbols) == 1 else _preferred_name(symbols)) or f"{section.name}+{start:#x}"
            alignment = min(widest, start & -start) if start else widest
            contents = data[start:end]
            made.append(Block(source, kind, name, index, start, end - start, alignment, contents, symbols, number))
            number += 1
        self._made += made
        return made

    def _is_padding(self, index: int, start: int, end: int) -> bool:
        """Tell whether a nameless piece of a section has no contents: it is there to align what follows."""
        if any(self.object.sections[index].data[start:end]):
            return False
        relocations = self._relocations_of(index)
        row = bisect.bisect_left(relocations, start, key=lambda r: r.offset)
        return row == len(relocations) or relocations[row].offset >= end

    def _kinds(self, section: Section) -> tuple[Kind, Kind]:
        """Return the kinds of the blocks with and without symbols of a section."""
        if section.flags & SHF_EXECINSTR:
            return Kind.CODE, Kind.CODE
        if section.flags & SHF_TLS:
            return Kind.THREAD_LOCAL, Kind.THREAD_LOCAL
        if section.read_only:
            return Kind.READ_ONLY, Kind.READ_ONLY
        # Compilers name every variable; nameless writable data is their own pool of initialisers
        # (gcc puts those with relocations into .data), which nothing writes to.
        return Kind.DATA, Kind.READ_ONLY if section.data and self._keeps_local_names else Kind.DATA

    def _string_at(self, section: Section, offset: int) -> Place:
        width = section.entry_size or 1
        if not 0 <= offset <= section.size:
            raise self._outside(section, offset)
        data = section.data
        start, end = string_extent(data, offset, width)
        block = self._entries.get((section.index, start))
        if block is None:
            contents = data[start:end]
            name, number = f"{section.name}+{start:#x}", len(self._made)
            alignment = max(width, min(section.alignment, 32) if section.name.endswith(("8", "16", "32")) else width)
            extent = (section.index, start, len(contents), alignment, contents)
            block = Block(self.object, Kind.READ_ONLY, name, *extent, (), number, True)
            self._made.append(block)
            self._entries[section.index, start] = block
        return Place(block, offset - start)

    def _entry_at(self, section: Section, offset: int) -> Place:
        if not 0 <= offset < section.size:
            raise self._outside(section, offset)
        start = offset - offset % section.entry_size
        block = self._entries.get((section.index, start))
        if block is None:
            end = min(start + section.entry_size, section.size)
            (block,) = self._make([section], Extents([0], [start], [end], [()]))
            self._entries[section.index, start] = block
        return Place(block, offset - start)

    def _common(self, symbol: Symbol) -> Block:
        block = self._commons.get(symbol.number)
        if block is None:
            alignment = symbol.value or 1  # a common symbol's value is its alignment (System V ABI, chapter 4)
            number = len(self._made)
            block = Block(self.object, Kind.DATA, symbol.name, 0, 0, symbol.size, alignment, b"", (symbol,), number)
            self._made.append(block)
            self._commons[symbol.number] = block
        return block

    def contents_of(self, block: Block) -> Block:
        """Return a nameless block of data with the contents of another one, to be placed and linked beside it."""
        extent = (block.section, block.start, block.size, block.alignment, block.data)
        made = Block(self.object, Kind.DATA, f"contents of {block.name}", *extent, (), len(self._made))
        self._made.append(made)
        return made

    def _outside(self, section: Section, offset: int) -> ObjectError:
        return ObjectError(
            f"{self.object.name}: a reference to {section.name}+{offset:#x}, outside its {section.size} bytes",
            "the object is damaged; compile it again",
        )

    # --- references -------------------------------------------------------------------------------------------

    def references(self, block: Block) -> tuple[Reference, ...]:
        """Return what a block refers to, by rising offset."""
        found = self._references.get(block)
        if found is None:
            found = tuple(self.reference(block, r) for r in self.relocations_in(block))
            hidden = self._hidden_references(block)
            if hidden:
                found = tuple(sorted(found + hidden, key=lambda r: r.offset))
            self._references[block] = found
        return found

    def linkable(self, block: Block) -> Linkable:
        """Return a block as it is to be placed.

        A short branch that the assembler resolved to another function of its section cannot reach once the
        function has moved: it goes to a jump that moves with it (`code.short_branch_stubs`).
        """
        references = self.references(block)
        hidden = self._hidden.of(block)
        if not any(h.width == 1 for h in hidden):
            return Linkable(0, block.data, references)
        from patcher.code.split import short_branch_stubs

        stubs = short_branch_stubs((block.start, block.size), hidden)
        body = bytearray(block.data)
        for position, displacement in stubs.displacements:
            body[position - block.start] = displacement & 0xFF
        lead = len(stubs.prefix) * STUB_SIZE
        kept = [r for r in references if r.type != R.PC8]
        jumps = [(i * STUB_SIZE - lead, target) for i, target in enumerate(stubs.prefix)]
        jumps += [(block.size + i * STUB_SIZE, target) for i, target in enumerate(stubs.suffix)]
        kept += [Reference(at + 1, R.PLT32, self.at(block.section, target), -4) for at, target in jumps]
        jump = b"\xe9\0\0\0\0"  # jmp rel32
        data = jump * len(stubs.prefix) + bytes(body) + jump * len(stubs.suffix)
        return Linkable(lead, data, tuple(sorted(kept, key=lambda r: r.offset)))

    def _relocations_of(self, section: int) -> list[Relocation]:
        found = self._relocations.get(section)
        if found is None:
            found = self._relocations[section] = self.object.relocations(section)
        return found

    def relocations_in(self, block: Block) -> list[Relocation]:
        """Return the relocations of a block as they stand."""
        if not block.data:
            return []
        relocations = self._relocations_of(block.section)
        if block.start == 0 and block.size == self.object.sections[block.section].size:
            return relocations
        low = bisect.bisect_left(relocations, block.start, key=lambda r: r.offset)
        high = bisect.bisect_left(relocations, block.start + block.size, key=lambda r: r.offset)
        return relocations[low:high]

    def relocations(self, block: Block) -> list[Relocation] | None:
        """Return the relocations of a block as they stand, or None when it has references without one as well."""
        return None if self._hidden_references(block) else self.relocations_in(block)

    def reference(self, block: Block, r: Relocation) -> Reference:
        """Return one relocation of a block as a reference."""
        offset = r.offset - block.start
        target = None if r.type in _SIZES else self.named_target(r.symbol)
        if target is not None:
            return Reference(offset, r.type, target, r.addend)
        target, addend = self._made_exact(block, r)
        return Reference(offset, r.type, target, addend)

    def _made_exact(self, block: Block, r: Relocation) -> tuple[Target, int]:
        """Return what a relocation against a section's symbol, or for a size, is about, and its addend."""
        symbol = self.object.symbols[r.symbol]
        if r.type in _SIZES:
            known = None if symbol.undefined else Absolute(symbol.size)
            return known or External(symbol.name, symbol.weak, symbol.visibility != 0), r.addend
        bias, offset = 0, r.offset - block.start
        if is_pc_relative(r.type):
            bias = self._bytes_to_end(block, offset) if block.kind is Kind.CODE else -offset
        place = self.at(symbol.section, symbol.value + r.addend + bias)
        if place.block.section in self._cuts and place.block.kind is not Kind.CODE:
            self._note_doubts(block, r, Reference(offset, r.type, place, -bias))
        return place, -bias

    # --- which piece a section's symbol is about ---------------------------------------------------------------

    def run(self, block: Block) -> tuple[Block, ...]:
        """Return the constants without names that lie side by side with one, itself included."""
        cuts = self._cuts.get(block.section)
        if cuts is None:
            return (block,)
        found = self._runs.get(block)
        if found is None:
            found = neighbours.run(cuts, block)
            self._runs.update(dict.fromkeys(found, found))
        return found

    def cuts(self, section: int) -> Cuts:
        """Return the blocks of a section that has several."""
        return self._cuts[section]

    def doubts(self, block: Block) -> tuple[Doubt, ...]:
        """Return what is not certain about the references of a block, once they have been worked out."""
        noted = self._doubts.get(block)
        return tuple(d for doubts in noted.values() for d in doubts) if noted else ()

    def doubtful(self, blocks: Iterable[Block]) -> list[Block]:
        """Return the blocks of some that have doubts."""
        return [b for b in blocks if b in self._doubts] if self._doubts else []

    def _note_doubts(self, block: Block, r: Relocation, reference: Reference) -> None:
        pairs = neighbours.pairs(self, block, r, reference)
        if pairs:
            doubts = tuple(Doubt(reference, first, second) for first, second in pairs)
            self._doubts.setdefault(block, {})[reference.offset] = doubts

    # --- many references at once ------------------------------------------------------------------------------

    def fields(self, blocks: Sequence[Block]) -> Fields:
        """Return what some blocks refer to: what `references` says of each, as columns."""
        first, last = rows_of(self.object, blocks)
        count = last - first
        owner = np.repeat(np.arange(len(blocks)), count)
        rows = np.arange(len(owner)) + np.repeat(first - (np.cumsum(count) - count), count)
        self._make_exact(blocks, owner, rows)
        target, addend = self._exact_columns()
        table = self.object.relocation_rows
        starts = np.array([b.start for b in blocks], np.int64)
        offset = table.offset[rows] - starts[owner]
        plain = Fields(owner, offset, table.type[rows], target[rows], addend[rows])
        hidden = [(i, r) for i, b in self._hidden.suspected(blocks) for r in self._found_hidden(b)]
        return Fields.joined([plain, self.rows(hidden)]) if hidden else plain

    def rows(self, references: Sequence[tuple[int, Reference]]) -> Fields:
        """Return (owner, reference) pairs as columns."""
        rows = [(i, r.offset, r.type, self.number_of(r.target), _wrapped(r.addend)) for i, r in references]
        table = np.array(rows, np.int64).reshape(-1, 5).T
        return Fields(*table)

    def number_of(self, target: Target) -> int:
        """Return the number by which columns know a target."""
        number = self._numbers.get(target)
        if number is None:
            number = self._numbers[target] = self.target_count
            self._targets[number] = target
        return number

    def target(self, number: int) -> Target:
        """Return the target that a number in a column stands for."""
        target = self._targets.get(number)
        if target is None:
            target = self._targets[number] = self._symbol_target(self.object.symbols[number])
        return target

    @property
    def target_count(self) -> int:
        """The number of targets that have a number; it is more than each of those."""
        return len(self.object.symbols) + len(self._numbers)

    def block(self, number: int) -> Block:
        """Return the block of a number."""
        return self._made[number]

    @property
    def block_count(self) -> int:
        """The number of blocks that have been made; it is more than each one's `number`."""
        return len(self._made)

    def homes(self, targets: Column) -> tuple[Column, Column]:
        """Return the numbers of the blocks that some targets are in, and the offsets in these.

        The number is -1 where `target` has to be asked: for what is elsewhere, thread-local or not to be found.
        """
        known = self._homes.shape[1]
        if known < self.target_count:
            room = max(self.target_count, 2 * known) - known
            self._homes = np.concatenate((self._homes, np.full((2, room), _UNKNOWN)), 1)
        new = targets[self._homes[0, targets] == _UNKNOWN]
        if len(new):
            self._find_homes(new[first_rows(new, self.target_count)])
        return self._homes[0, targets], self._homes[1, targets]

    def _find_homes(self, targets: Column) -> None:
        self._homes[0, targets] = -1
        rows, symbolic = self.object.symbol_rows, targets < len(self.object.symbols)
        for number in targets[~symbolic].tolist():
            target = self._targets[number]
            if not isinstance(target, Place) or target.block.kind is Kind.THREAD_LOCAL:
                continue
            if abs(target.offset) <= _LARGEST:
                self._homes[:, number] = target.block.number, target.offset
        numbers = targets[symbolic & (targets > 0)]
        defined = (rows.section[numbers] > 0) & (rows.type[numbers] != _IFUNC) & (rows.value[numbers] <= _LARGEST)
        numbers = numbers[defined]
        numbers = numbers[np.argsort(rows.section[numbers], kind="stable")]
        sections, first = np.unique(rows.section[numbers], return_index=True)
        bounds = [*first.tolist(), len(numbers)]
        self._cut_filled(sections)
        whole = np.array([self._whole_number(index) for index in sections.tolist()], np.int64)
        self._homes[0, numbers] = np.repeat(whole, np.diff(bounds))
        self._homes[1, numbers] = rows.value[numbers].astype(np.int64)
        for i in np.flatnonzero(whole < 0).tolist():
            self._find_homes_among(self._cuts.get(int(sections[i])), numbers[bounds[i] : bounds[i + 1]])

    def _cut_filled(self, indexes: Column) -> None:
        """Cut those of some sections of data that one variable fills: with -fdata-sections nearly all."""
        rows, first = self.object.symbol_rows, self._first_symbol
        new = [i for i in indexes.tolist() if i in self.object.sections and i not in self._whole]
        sections = [self.object.sections[i] for i in new]
        single = np.array([not s.flags & _NO_PLAIN_DATA for s in sections], bool)
        single &= first[1:][new] - first[new] == 1
        chosen = np.flatnonzero(single)
        numbers = self._sorted[first[new][chosen]]
        sizes = np.array([s.size for s in sections], np.uint64)[chosen]
        filled = (rows.value[numbers] == 0) & (rows.size[numbers] == sizes) & (rows.type[numbers] == SymbolType.OBJECT)
        names = [(self.object.symbols[number],) for number in numbers[filled].tolist()]
        found = [sections[i] for i in chosen[filled].tolist()]
        blocks = self._make(found, Extents.whole(found, names))
        self._whole.update(zip([s.index for s in found], blocks, strict=True))

    def _whole_number(self, index: int) -> int:
        """Return the number of the one block of a section, or -1."""
        whole = self._whole.get(index)
        if whole is None:
            section = self.object.sections.get(index)
            if section is None or section.flags & (SHF_TLS | SHF_MERGE):
                return -1
            self._cut(section)
            whole = self._whole.get(index)
        return -1 if whole is None or whole.kind is Kind.THREAD_LOCAL else whole.number

    def _find_homes_among(self, cuts: Cuts | None, numbers: Column) -> None:
        """Find the homes of symbols of a section that is cut in several."""
        if cuts is None or not cuts.starts or cuts.blocks[0].kind is Kind.THREAD_LOCAL:
            return
        value = self.object.symbol_rows.value[numbers].astype(np.int64)
        among = np.maximum(np.searchsorted(cuts.column, value, "right") - 1, 0)
        self._homes[0, numbers] = cuts.blocks[0].number + among  # they were made one after another
        self._homes[1, numbers] = value - cuts.column[among]

    def stretched(self, blocks: Sequence[Block]) -> list[Block]:
        """Return the blocks that need jumps of their own around them, so that `linkable` is not the block as it is."""
        return [b for _, b in self._hidden.suspected(blocks) if any(r.type == R.PC8 for r in self._found_hidden(b))]

    def _exact_columns(self) -> tuple[Column, Column]:
        """Return the target (-1: not worked out yet) and the addend of each row of the object's relocations."""
        if self._exact is None:
            table = self.object.relocation_rows
            nameless = self.object.symbol_rows.type == SymbolType.SECTION
            inexact = nameless[table.symbol] | np.isin(table.type, _SIZES)
            self._exact = np.where(inexact, -1, table.symbol), table.addend.copy()
        return self._exact

    def _make_exact(self, blocks: Sequence[Block], owner: Column, rows: Column) -> None:
        target, addend = self._exact_columns()
        for i in np.flatnonzero(target[rows] < 0).tolist():
            row = int(rows[i])
            exact, rest = self._made_exact(blocks[int(owner[i])], self._relocation(row))
            target[row], addend[row] = self.number_of(exact), rest

    def named_target(self, number: int) -> Target | None:
        """Return what a symbol means, wherever it is referred to from; None for a section's symbol."""
        if number not in self._targets:
            symbol = self.object.symbols[number]
            self._targets[number] = None if symbol.type == _SECTION else self._symbol_target(symbol)
        return self._targets[number]

    def _symbol_target(self, symbol: Symbol) -> Target:
        if symbol.section > 0 and symbol.type != _IFUNC and symbol.number:  # nearly all
            return self.at(symbol.section, symbol.value)
        if symbol.number == 0 or symbol.absolute:
            return Absolute(symbol.value)
        if symbol.undefined:
            return External(symbol.name, symbol.weak, symbol.visibility != 0)
        if symbol.type == _IFUNC:
            return External(symbol.name)  # it denotes what its resolver chose, not the resolver that stands there
        if symbol.common:
            return Place(self._common(symbol), 0)
        return self.at(symbol.section, symbol.value)

    def _bytes_to_end(self, block: Block, offset: int) -> int:
        """Return the bytes from a field to the end of its instruction."""
        from patcher.code.instructions import field_end

        # An instruction ends after a field that was looked at before: no need to decode from the start again.
        known = self._boundaries.get(block)
        if known is None:
            known = self._boundaries[block] = [0, *self._call_ends(block)]
        i = bisect.bisect_right(known, offset)
        start = known[i - 1]
        if offset <= start or offset + 4 > len(block.data):
            raise ObjectError(
                f"{self.object.name}: the reference at `{block.name}`+{offset:#x} is in no instruction of its "
                f"{block.size} bytes",
                "the object is damaged; compile it again",
            )
        trailing = field_end(block.data[start : offset + 16], None, offset - start)
        known.insert(i, offset + 4 + trailing)
        return 4 + trailing

    def _call_ends(self, block: Block) -> Iterable[int]:
        """Yield where the calls and jumps with a relocation end: nothing follows their field."""
        for offset, kind, _, _ in self.relocations_in(block):
            at = offset - block.start
            if kind == R.PLT32 and at and block.data[at - 1] in (0xE8, 0xE9):
                yield at + 4

    def pointed_offsets(self, section: Section) -> set[int]:
        """Return where code and data point into a section that may hold nameless things (jump tables, constants).

        Each such offset starts a block.
        """
        if self._pointed is None:
            self._pointed = {}
            for target, offset in self._pointers():
                self._pointed.setdefault(target, set()).add(offset)
        return self._pointed.get(section.index, set())

    def _pointers(self) -> Iterator[tuple[int, int]]:
        """Yield where relocations against sections' symbols lead: section and offset."""
        table, symbols = self.object.relocation_rows, self.object.symbols
        nameless = np.flatnonzero(self.object.symbol_rows.type == _SECTION).tolist()
        cut_here = [number for number in nameless if self._is_cut_where_pointed(symbols[number].section)]
        for row in np.flatnonzero(np.isin(table.symbol, cut_here)).tolist():
            index, r = int(table.key[row]) >> KEY_BITS, self._relocation(row)
            section, bias = self.object.sections[index], 0
            if not _is_looked_at(section):
                continue
            if is_pc_relative(r.type):
                if not section.code:
                    continue  # relative to the table that holds it, which something else points to
                block, offset = self.at(index, r.offset)
                bias = self._bytes_to_end(block, offset)
            yield symbols[r.symbol].section, symbols[r.symbol].value + r.addend + bias

    def _relocation(self, row: int) -> Relocation:
        table = self.object.relocation_rows
        return Relocation(*(int(c[row]) for c in (table.offset, table.type, table.symbol, table.addend)))

    def _is_cut_where_pointed(self, index: int) -> bool:
        section = self.object.sections.get(index)
        return section is not None and not section.code and not section.mergeable

    def _hidden_references(self, block: Block) -> tuple[Reference, ...]:
        return self._found_hidden(block) if self._hidden.suspected((block,)) else ()

    def _found_hidden(self, block: Block) -> tuple[Reference, ...]:
        """Return the references without relocations of a block that is suspected to have some."""
        found = self._hidden_found.get(block)
        if found is None:
            found = self._hidden_found[block] = tuple(
                [self._hidden_reference(block, h) for h in self._hidden.of(block)]
            )
        return found

    def _hidden_reference(self, block: Block, hidden: HiddenReference) -> Reference:
        kind = {1: R.PC8, 4: R.PLT32 if hidden.is_branch else R.PC32}[hidden.width]
        place = self.at(block.section, hidden.target)
        return Reference(hidden.field - block.start, kind, place, -(hidden.width + hidden.end))


def _is_looked_at(section: Section) -> bool:
    return not section.name.startswith(_SKIPPED)


def _preferred_name(symbols: tuple[Symbol, ...]) -> str:
    if len(symbols) < 2:
        return symbols[0].name if symbols else ""
    return min(symbols, key=lambda s: (s.local, s.type == SymbolType.NOTYPE, s.number)).name


def _wrapped(addend: int) -> int:
    # Code that was rewritten counts from elsewhere, and an object may have the greatest addend there is.
    return (addend + (1 << 63)) % (1 << 64) - (1 << 63)


def unit_of(source: ObjectFile) -> str:
    """Return the name an object's local symbols are kept under: its source file's base name."""
    return source.file_symbol or source.name
