"""Addresses for everything in a plan, and the final bytes: every relocation applied and range-checked.

Two steps: `lay_out` gives each block its address, `link` fills in the fields. Pure: addresses and blocks in,
(address, bytes) out. Cells and far jumps are made as references turn out to need them; each serves all
references of the generation to the same address. The fields of one type in one object are computed together,
as arrays; only what misses its field is looked at one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from operator import attrgetter

import numpy as np

from patcher.blocks import Absolute, Block, Blocks, External, Kind, Linkable, Place, Reference
from patcher.bulk import collector_paused
from patcher.code.descriptor import FIND_THROUGH_DESCRIPTOR
from patcher.elf import ObjectFile
from patcher.elf.object import Column
from patcher.elf.relocations import OFFSET_TABLE
from patcher.errors import LinkError, RelocationOverflow
from patcher.link.plan import FIND_THREAD_LOCAL, Bound, Group, Plan, where
from patcher.link.relocations import RULES, Need, Operands, R, Rule, type_name

_CODE_ALIGNMENT = 16
_MASK = (1 << 64) - 1
_BEYOND_VARIABLE = 1  # so that a pointer to a variable's end never points to the next one
_TRAP = 0xCC  # int3, between functions


class FarData(RelocationOverflow):
    """Something beyond the reach of a direct reference. `object` has to be compiled so that it reaches farther."""

    code = "far-data"

    def __init__(self, message: str, hint: str = "", *, object: ObjectFile | None = None) -> None:
        super().__init__(message, hint)
        self.object = object


class ArenaFull(LinkError):
    """The free memory that was given is too small for the plan."""

    code = "arena-full"


@dataclass(frozen=True, slots=True)
class Region:
    """A stretch of free memory: `start` is the next free address, `end` the first one beyond."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Space:
    """The free memory of an arena, by protection."""

    read_only: Region
    code: Region
    data: Region


@dataclass(frozen=True, slots=True)
class Account:
    """How many bytes of the arena went to one object, the gaps before its blocks included."""

    text: int = 0
    read_only: int = 0
    data: int = 0
    cells: int = 0
    jumps: int = 0

    def plus(self, **more: int) -> Account:
        return replace(self, **{name: getattr(self, name) + size for name, size in more.items()})


@dataclass(frozen=True)
class Layout:
    """An address for each block of a plan. `table` is that of the table of cells; `space` is what is left."""

    addresses: dict[Block, int]
    table: int
    space: Space
    accounts: dict[ObjectFile, Account] = field(default_factory=dict)


@dataclass(frozen=True)
class Placement:
    """Where everything stands and what is to be written there. `space` is what is left."""

    addresses: dict[Block, int]
    writes: tuple[tuple[int, bytes], ...]
    space: Space
    accounts: dict[ObjectFile, Account]


def place(plan: Plan, space: Space, islands: Mapping[Block, int], originals: Mapping[Block, int]) -> Placement:
    """Lay a plan out in `space` and link it; see `lay_out` and `link`."""
    with collector_paused():
        return link(plan, lay_out(plan, space), islands, originals)


# --- addresses ------------------------------------------------------------------------------------------------


class _Cursor:
    """The next free address of one region."""

    def __init__(self, region: Region, what: str) -> None:
        self.at = region.start
        self.end = region.end
        self._what = what

    def take(self, size: int, alignment: int, phase: int = 0) -> int:
        """Return the next address that is `phase` bytes beyond an aligned one."""
        address = self.at + (phase - self.at) % alignment
        self.at = address + size
        if self.at > self.end:
            raise ArenaFull(
                f"the arena has no room for {size} more bytes of {self._what}",
                "revert what is not needed, or restart the program with the new code",
            )
        return address

    @property
    def rest(self) -> Region:
        return Region(min(self.at, self.end), self.end)


class _Cursors:
    """The cursors of the three regions."""

    def __init__(self, space: Space) -> None:
        self.read_only = _Cursor(space.read_only, "read-only data")
        self.code = _Cursor(space.code, "code")
        self.data = _Cursor(space.data, "data")

    @property
    def rest(self) -> Space:
        return Space(self.read_only.rest, self.code.rest, self.data.rest)


def lay_out(plan: Plan, space: Space) -> Layout:
    """Give every block of a plan its address in `space`. Equal strings share one. Raises `ArenaFull`."""
    cursors = _Cursors(space)
    addresses: dict[Block, int] = {}
    accounts: dict[ObjectFile, Account] = {}
    # What is only zeros comes last: it need not be written.
    data = sorted(plan.data, key=lambda block: block.zero)
    for name, cursor, blocks, least, beyond in (
        ("text", cursors.code, plan.code, _CODE_ALIGNMENT, 0),
        ("read_only", cursors.read_only, plan.read_only, 1, 0),
        ("data", cursors.data, data, 1, _BEYOND_VARIABLE),
    ):
        used = _Addresses(plan, cursor, addresses, least, beyond).give(blocks)
        for source, size in used.items():
            accounts[source] = accounts.get(source, Account()).plus(**{name: size})
    table = (cursors.read_only.at + 7) & -8
    return Layout(addresses, table, cursors.rest, accounts)


class _Addresses:
    """Places the blocks of one kind one after another."""

    def __init__(
        self, plan: Plan, cursor: _Cursor, addresses: dict[Block, int], least_alignment: int, beyond: int
    ) -> None:
        self._plan = plan
        self._cursor = cursor
        self._addresses = addresses
        self._least_alignment = least_alignment
        self._beyond = beyond
        self._strings: dict[bytes, int] = {}

    def give(self, blocks: Sequence[Block]) -> dict[ObjectFile, int]:
        """Place some blocks; return how many bytes each object took."""
        used: dict[ObjectFile, int] = {}
        runs, linkables, addresses = self._plan.runs, self._plan.linkables, self._addresses
        take, least, beyond = self._cursor.take, self._least_alignment, self._beyond
        for source, group in groupby(blocks, key=attrgetter("object")):
            before = self._cursor.at
            for block in group:
                if block in runs:
                    self._give_run(runs[block])
                elif block in linkables:
                    self._give_stretched(block, linkables[block])
                elif block.string:
                    self._give_string(block)
                else:
                    addresses[block] = take(block.size + beyond, max(block.alignment, least))
            used[source] = used.get(source, 0) + self._cursor.at - before
        return used

    def _give_run(self, run: Sequence[Block]) -> None:
        """Place some blocks of one section as they lie there."""
        first, last = run[0], run[-1]
        if first in self._addresses:
            return
        alignment = first.object.sections[first.section].alignment
        size = last.start + last.size - first.start + self._beyond
        start = self._cursor.take(size, alignment, first.start % alignment)
        self._addresses.update({block: start + block.start - first.start for block in run})

    def _give_stretched(self, block: Block, linkable: Linkable) -> None:
        alignment = max(block.alignment, 1 if linkable.lead else self._least_alignment)
        start = self._cursor.take(max(len(linkable.data), block.size) + self._beyond, alignment)
        self._addresses[block] = start + linkable.lead

    def _give_string(self, block: Block) -> None:
        if block.alignment > 1 or block.data not in self._strings:
            start = self._cursor.take(block.size, block.alignment)
            self._strings.setdefault(block.data, start)
        else:
            start = self._strings[block.data]
        self._addresses[block] = start


# --- contents -------------------------------------------------------------------------------------------------


def link(plan: Plan, layout: Layout, islands: Mapping[Block, int], originals: Mapping[Block, int]) -> Placement:
    """Compute the contents of everything that is laid out.

    `islands`: the island of each door; `originals`: the address for life of each door that the program had
    before. Raises `RelocationOverflow` or `FarData` naming symbol, type, place and by how much it missed,
    and `ArenaFull` when there is no room for cells.
    """
    return _Linker(plan, layout, islands, originals).run()


class _Image:
    """The bytes of the blocks that have contents, those next to each other in one array."""

    def __init__(self, plan: Plan, addresses: Mapping[Block, int]) -> None:
        blocks = [b for b in plan.placed if b.data and b not in plan.linkables]
        contents = [b.data for b in blocks]
        starts = [addresses[b] for b in blocks]
        for block, linkable in plan.linkables.items():
            blocks.append(block)
            contents.append(linkable.data)
            starts.append(addresses[block] - linkable.lead)
        self._arrange(blocks, contents, np.array(starts, np.int64))

    def _arrange(self, blocks: list[Block], contents: list[bytes], starts: Column) -> None:
        order = np.argsort(starts, kind="stable")
        ordered = order.tolist()
        starts, sizes = starts[order], np.array([len(contents[i]) for i in ordered], np.int64)
        gaps = starts - np.concatenate(([-_CLOSE], np.maximum.accumulate(starts + sizes)[:-1]))[: len(starts)]
        kept = gaps >= 0  # others are equal strings at the same address
        opens = gaps[kept] >= _CLOSE
        fillers = np.where(opens, 0, gaps[kept])
        ends = np.cumsum(fillers + sizes[kept])
        positions = ends - sizes[kept]
        # index of the block's first byte, minus its address: the same for all of a stretch
        shifts = (positions - starts[kept])[np.cumsum(kept) - 1]
        self.shift = dict(zip(map(blocks.__getitem__, ordered), shifts.tolist(), strict=True))
        self._starts = starts[kept][opens].tolist()
        self._bounds = [*positions[opens].tolist(), int(ends[-1]) if len(ends) else 0]
        chosen = order[kept].tolist()
        parts: list[bytes] = []
        for i, filler in zip(chosen, fillers.tolist(), strict=True):
            if filler:
                parts.append((_TRAPS if blocks[i].kind is Kind.CODE else _ZEROS)[:filler])
            parts.append(contents[i])
        self.bytes = np.frombuffer(bytearray().join(parts), np.uint8)

    def writes(self) -> list[tuple[int, bytes]]:
        """Return each stretch with its address."""
        extents = zip(self._starts, pairwise(self._bounds), strict=True)
        return [(start, self.bytes[a:b].tobytes()) for start, (a, b) in extents]


_CLOSE = 4096  # blocks with a smaller gap between them are written together
_TRAPS, _ZEROS = bytes((_TRAP,)) * _CLOSE, bytes(_CLOSE)


class _Values(dict[int, int]):
    """A number for each target of one object, worked out when it is first asked for."""

    def __init__(self, compute: Callable[[int], int]) -> None:
        super().__init__()
        self._compute = compute

    def __missing__(self, target: int) -> int:
        value = self[target] = _signed(self._compute(target))
        return value

    def of(self, targets: Column) -> Column:
        return np.array([self[t] for t in targets.tolist()], np.int64)


class _Linker:
    def __init__(
        self, plan: Plan, layout: Layout, islands: Mapping[Block, int], originals: Mapping[Block, int]
    ) -> None:
        self.plan = plan
        self.layout = layout
        self.islands = islands
        self.originals = originals
        self.addresses = layout.addresses
        self.cursors = _Cursors(layout.space)
        self.accounts = dict(layout.accounts)
        self.image = _Image(plan, layout.addresses)
        self.starts: dict[Blocks, Column] = {}  # by block number, where a block without an island is; 0 if not placed
        self.cells: dict[tuple[int, ...], int] = {}
        self.jumps: dict[int, int] = {}
        self.writes: list[tuple[int, bytes]] = []

    def run(self) -> Placement:
        linkers = [_GroupLinker(self, group) for group in self.plan.groups]
        for linker in linkers:
            self._note_starts(linker)
        for linker in linkers:
            linker.run()
        cells = [(address, b"".join(map(_word, values))) for values, address in self.cells.items()]
        writes = [*self.image.writes(), *_joined(cells), *self.writes]
        return Placement(self.addresses, tuple(writes), self.cursors.rest, self.accounts)

    def _note_starts(self, linker: _GroupLinker) -> None:
        source, members = linker.group.source, linker.group.members
        starts = self.starts.setdefault(source, np.zeros(source.block_count, np.int64))
        starts[[b.number for b in members]] = linker.bases
        if self.islands:
            starts[[b.number for b in members if b in self.islands]] = 0

    # --- cells and jumps --------------------------------------------------------------------------------------

    def cell(self, owner: ObjectFile, *values: int) -> int:
        """Return the address of cells that hold some values, one after another."""
        address = self.cells.get(values)
        if address is None:
            before = self.cursors.read_only.at
            address = self.cells[values] = self.cursors.read_only.take(8 * len(values), 8)
            self._account(owner, cells=self.cursors.read_only.at - before)
        return address

    def far_jump(self, owner: ObjectFile, destination: int) -> int:
        """Return the address of a jump to somewhere."""
        address = self.jumps.get(destination)
        if address is None:
            from patcher.code.entry import FAR_JUMP_SIZE, far_jump

            address = self.jumps[destination] = self._code(owner, FAR_JUMP_SIZE, 8)
            self.writes.append((address, far_jump(address, self.cell(owner, destination))))
        return address

    def descriptor_function(self, owner: ObjectFile) -> int:
        """Return the address of the function that thread-local descriptors of ours name."""
        if _DESCRIPTOR not in self.jumps:
            address = self.jumps[_DESCRIPTOR] = self._code(owner, len(FIND_THROUGH_DESCRIPTOR), _CODE_ALIGNMENT)
            self.writes.append((address, FIND_THROUGH_DESCRIPTOR))
        return self.jumps[_DESCRIPTOR]

    def _code(self, owner: ObjectFile, size: int, alignment: int) -> int:
        before = self.cursors.code.at
        address = self.cursors.code.take(size, alignment)
        self._account(owner, jumps=self.cursors.code.at - before)
        return address

    def _account(self, owner: ObjectFile, **more: int) -> None:
        self.accounts[owner] = self.accounts.get(owner, Account()).plus(**more)


_DESCRIPTOR = -1


class _GroupLinker:
    """Fills in the fields of some blocks of one object."""

    def __init__(self, linker: _Linker, group: Group) -> None:
        self.linker = linker
        self.plan = linker.plan
        self.group = group
        self.fields = group.fields
        self.object = group.source.object
        self.table = linker.layout.table
        self.bases = np.array([linker.addresses[b] for b in group.members], np.int64)
        self._addresses = _Values(lambda t: self._address(t, call=False))
        self._calls = _Values(lambda t: self._address(t, call=True))
        self._address_cells = _Values(lambda t: linker.cell(self.object, self._addresses[t]))
        self._call_cells = _Values(lambda t: linker.cell(self.object, self._calls[t]))
        self._sizes = _Values(self._size)
        self._thread_offsets = _Values(lambda t: self._thread_local(t).address)
        self._thread_cells = {
            Need.THREAD_CELL: _Values(lambda t: linker.cell(self.object, self._thread_offsets[t])),
            Need.MODULE_CELLS: _Values(self._make_module_cells),
            Need.MODULE_BASE_CELLS: _Values(lambda t: linker.cell(self.object, self._thread_local(t).module_id, 0)),
            Need.DESCRIPTOR: _Values(self._make_descriptor),
        }

    def run(self) -> None:
        members, fields = self.group.members, self.fields
        if not len(fields.owner):
            return
        shift = self.linker.image.shift
        self.places = self.bases[fields.owner] + fields.offset
        self.positions = self.places + np.array([shift.get(b, 0) for b in members], np.int64)[fields.owner]
        self._check_extents()
        for kind in np.flatnonzero(np.bincount(fields.type)).tolist():
            rule = RULES[kind]
            if rule.width:
                self._fill(np.flatnonzero(fields.type == kind), rule)

    def _check_extents(self) -> None:
        fields, members, linkables = self.fields, self.group.members, self.plan.linkables
        low, high = np.zeros(len(members), np.int64), np.array([len(b.data) for b in members], np.int64)
        for i in [i for i, b in enumerate(members) if b in linkables] if linkables else ():
            linkable = linkables[members[i]]
            low[i], high[i] = -linkable.lead, len(linkable.data) - linkable.lead
        width = _WIDTHS[fields.type]
        bad = (fields.offset < low[fields.owner]) | (fields.offset + width > high[fields.owner])
        if bad.any():
            block, r = self._reference(int(np.argmax(bad)))
            raise LinkError(
                f"{where(block, r)}: {type_name(r.type)} reaches beyond the end of its block",
                "the object is damaged; compile it again",
            )

    def _fill(self, rows: Column, rule: Rule) -> None:
        """Compute the fields of one type and put them in."""
        values = rule.formula(self._operands(rows, rule.need))
        if not rule.wraps:
            low, high = rule.limits
            for i in np.flatnonzero((values < low) | (values > high)).tolist():
                values[i] = self._brought_near(int(rows[i]), rule, int(values[i]))
        encoded = np.ascontiguousarray(values, "<i8").view(np.uint8).reshape(-1, 8)[:, : rule.width]
        self.linker.image.bytes[self.positions[rows, None] + np.arange(rule.width)] = encoded

    def _operands(self, rows: Column, need: Need) -> Operands:
        targets, a, p = self.fields.target[rows], self.fields.addend[rows], self.places[rows]
        got = np.int64(self.table)
        if need is Need.TABLE:
            return Operands(A=a, P=p, GOT=got)
        if need is Need.CELL:
            return Operands(A=a, P=p, G=self._cells(rows, targets) - got, GOT=got)
        if need is Need.SIZE:
            return Operands(A=a, Z=self._sizes.of(targets))
        if need is Need.THREAD_OFFSET:
            return Operands(A=a, TP=self._thread_offsets.of(targets))
        if need is Need.MODULE_OFFSET:
            return Operands(A=a, D=self._thread_offsets.of(targets))
        if need in self._thread_cells:
            return Operands(A=a, P=p, G=self._thread_cells[need].of(targets) - got, GOT=got)
        if need is Need.ISLAND:
            return Operands(A=a, P=p, GOT=got, L=self._addresses_of(targets, call=True))
        return Operands(self._addresses_of(targets, call=False), a, p, GOT=got)

    def _cells(self, rows: Column, targets: Column) -> Column:
        """Return the cells of some references: a call through one may go elsewhere than a pointer."""
        at, image = self.positions[rows], self.linker.image.bytes
        calls = (image[at - 2] == 0xFF) & np.isin(image[at - 1], (0x15, 0x25))  # call or jmp *cell(%rip)
        made = (self._address_cells, self._call_cells)
        return np.array([made[c][t] for c, t in zip(calls.tolist(), targets.tolist(), strict=True)], np.int64)

    # --- what targets are -------------------------------------------------------------------------------------

    def _addresses_of(self, targets: Column, call: bool) -> Column:
        """Return the addresses of some targets; nearly all are in blocks that are placed."""
        home, offset = self.group.source.homes(targets)
        starts = self.linker.starts[self.group.source][home]
        addresses = starts + offset
        values = self._calls if call else self._addresses
        others = np.flatnonzero((home < 0) | (starts == 0))
        addresses[others] = values.of(targets[others])
        return addresses

    def _address(self, number: int, call: bool) -> int:
        target = self.group.source.target(number)
        if isinstance(target, Absolute):
            return target.value
        if isinstance(target, Place):
            return self._block_address(target.block, target.offset, call)
        if target.name == OFFSET_TABLE:
            return self.table
        found = self.plan.externals[self.group.source, target.name]
        if isinstance(found, Block):
            return self._block_address(found, 0, call)
        return _entry(found, call)

    def _block_address(self, block: Block, offset: int, call: bool) -> int:
        linker = self.linker
        if block not in linker.addresses:
            return _entry(self.plan.bound[block], call and not offset) + offset
        if offset == 0 and block in linker.islands:
            # Calls go to the island and so reach every later generation; the address that the program
            # can see stays the one it has always been.
            return linker.islands[block] if call else linker.originals.get(block, linker.islands[block])
        return linker.addresses[block] + offset

    def _size(self, number: int) -> int:
        target = self.group.source.target(number)
        if isinstance(target, Absolute):
            return target.value
        assert isinstance(target, External)
        found = self.plan.externals[self.group.source, target.name]
        return found.size

    def _thread_local(self, number: int) -> Bound:
        target = self.group.source.target(number)
        if isinstance(target, Place):
            bound = self.plan.bound[target.block]
            return replace(bound, address=bound.address + target.offset)
        assert isinstance(target, External)
        found = self.plan.externals[self.group.source, target.name]
        return self.plan.bound[found] if isinstance(found, Block) else found

    def _make_module_cells(self, number: int) -> int:
        bound = self._thread_local(number)
        return self.linker.cell(self.object, bound.module_id, bound.address)

    def _make_descriptor(self, number: int) -> int:
        bound, linker = self._thread_local(number), self.linker
        function = self.plan.externals[self.group.source, FIND_THREAD_LOCAL.name]
        assert isinstance(function, Bound)
        index = linker.cell(self.object, bound.module_id, bound.address, _entry(function, call=True))
        return linker.cell(self.object, linker.descriptor_function(self.object), index)

    # --- what misses its field --------------------------------------------------------------------------------

    def _reference(self, row: int) -> tuple[Block, Reference]:
        return self.group.members[int(self.fields.owner[row])], self.fields.reference(self.group.source, row)

    def _brought_near(self, row: int, rule: Rule, value: int) -> int:
        """Return a value that fits, for a reference that goes through something of ours within reach."""
        near = None
        if rule.need is Need.ISLAND:
            target, place = int(self.fields.target[row]), int(self.places[row])
            near = self.linker.far_jump(self.object, self._calls[target]) + int(self.fields.addend[row]) - place
        elif rule.need is Need.NOTHING:
            near = self._through_cell(row)
        if near is not None and rule.fits(near):
            return near
        raise self._overflow(row, rule, value)

    def _through_cell(self, row: int) -> int | None:
        """Make an instruction that computes an address load it from a cell; return its new field.

        `lea x(%rip), %r` and, in code for fixed addresses, `mov $x, %r` are as long as `mov cell(%rip), %r`.
        """
        kind, at = int(self.fields.type[row]), int(self.positions[row])
        image, place = self.linker.image.bytes, int(self.places[row])
        before = bytes(image[max(at - 3, 0) : at])
        if len(before) < 3:
            return None
        prefix, opcode, modrm = before
        address = self._addresses[int(self.fields.target[row])] + int(self.fields.addend[row])
        if kind == R.PC32 and prefix & 0xFB == 0x48 and opcode == 0x8D and modrm & 0xC7 == 5:
            image[at - 2] = 0x8B
            return self.linker.cell(self.object, address + 4) - place - 4
        if kind == R.A32S and prefix & 0xFE == 0x48 and opcode == 0xC7 and modrm & 0xF8 == 0xC0:
            register = modrm & 7  # moves from ModRM.rm to ModRM.reg
            image[at - 3 : at] = (0x48 | (prefix & 1) << 2, 0x8B, register << 3 | 5)
            return self.linker.cell(self.object, address) - place - 4
        return None

    def _overflow(self, row: int, rule: Rule, value: int) -> LinkError:
        block, r = self._reference(row)
        low, high = rule.limits
        missed = low - value if value < low else value - high
        message = (
            f"{where(block, r)}: {type_name(r.type)} against `{_name(r)}` misses its field by {missed:#x} "
            f"(value {value:#x}, {rule.width} bytes, {rule.sign.value})"
        )
        if rule.width < 4:
            return RelocationOverflow(message, "compile the unit again; no compiler wants so narrow a field here")
        return FarData(message, "compile the unit with -mcmodel=large, which reaches everything", object=block.object)


_WIDTHS = np.array([RULES[kind].width if kind in RULES else 0 for kind in range(max(RULES) + 1)], np.int64)


def _joined(writes: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Join writes that follow each other, given in rising order."""
    joined: list[tuple[int, list[bytes]]] = []
    end = -1
    for address, data in writes:
        if address == end:
            joined[-1][1].append(data)
        else:
            joined.append((address, [data]))
        end = address + len(data)
    return [(address, b"".join(parts)) for address, parts in joined]


def _word(value: int) -> bytes:
    return (value & _MASK).to_bytes(8, "little")


def _signed(value: int) -> int:
    """Return a number of 64 bits as the signed one that stands for it in the arrays; arithmetic wraps alike."""
    return ((value & _MASK) ^ 1 << 63) - (1 << 63)


def _entry(bound: Bound, call: bool) -> int:
    return bound.call if call and bound.call else bound.address


def _name(r: Reference) -> str:
    if isinstance(r.target, External):
        return r.target.name
    return r.target.block.name if isinstance(r.target, Place) else hex(r.target.value)
