"""Addresses for everything in a plan, and the final bytes: every relocation applied and range-checked.

Pure: addresses and blocks in, (address, bytes) out. Cells and far jumps are made here as references turn
out to need them; each serves all references of the generation to the same address.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from patcher.blocks import Absolute, Block, Blocks, External, Kind, Place, Reference
from patcher.elf import ObjectFile
from patcher.errors import LinkError, RelocationOverflow
from patcher.link.plan import Bound, Plan, where
from patcher.link.relocations import RULES, Need, Operands, R, Rule, type_name

_CODE_ALIGNMENT = 16
_MASK = (1 << 64) - 1


class FarData(RelocationOverflow):
    """Data, or a function's address, beyond the reach of a direct reference; indirect access would reach it.

    `object` is the object that has to be compiled with indirect access.
    """

    code = "far-data"

    def __init__(self, message: str, hint: str = "", *, object: ObjectFile | None = None) -> None:
        super().__init__(message, hint)
        self.object = object


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


@dataclass(frozen=True)
class Placement:
    """Where everything stands and what is to be written there. `space` is what is left."""

    addresses: dict[Block, int]
    sizes: dict[Block, int]
    writes: tuple[tuple[int, bytes], ...]
    space: Space


def place(plan: Plan, space: Space, islands: Mapping[Block, int], originals: Mapping[Block, int]) -> Placement:
    """Lay a plan out in `space` and link it.

    `islands`: the island of each door; `originals`: the address for life of each door that the program had
    before. Raises `RelocationOverflow` or `FarData` naming symbol, type, place and by how much it missed,
    and `LinkError` when the memory is too small.
    """
    return _Placer(plan, space, islands, originals).run()


class _Cursor:
    """The next free address of one region."""

    def __init__(self, region: Region, what: str) -> None:
        self.at = region.start
        self.end = region.end
        self._what = what

    def take(self, size: int, alignment: int) -> int:
        address = (self.at + alignment - 1) & -alignment
        self.at = address + size
        if self.at > self.end:
            raise LinkError(
                f"the arena has no room for {size} more bytes of {self._what}",
                "revert what is not needed, or restart the program with the new code",
                code="arena-full",
            )
        return address

    @property
    def rest(self) -> Region:
        return Region(self.at, self.end)


class _Placer:
    def __init__(self, plan: Plan, space: Space, islands: Mapping[Block, int], originals: Mapping[Block, int]) -> None:
        self.plan = plan
        self.islands = islands
        self.originals = originals
        self.read_only = _Cursor(space.read_only, "read-only data")
        self.code = _Cursor(space.code, "code")
        self.data = _Cursor(space.data, "data")
        self.addresses: dict[Block, int] = {}
        self.sizes: dict[Block, int] = {}
        self.cells: dict[int, int] = {}
        self.jumps: dict[int, int] = {}
        self.writes: list[tuple[int, bytes]] = []

    def run(self) -> Placement:
        self._lay_out()
        for block in self.plan.placed:
            self._link(block)
        space = Space(self.read_only.rest, self.code.rest, self.data.rest)
        return Placement(self.addresses, self.sizes, tuple(self.writes), space)

    def _lay_out(self) -> None:
        strings: dict[bytes, int] = {}
        for block in self.plan.placed:
            linkable = self.plan.linkables[block]
            size = max(len(linkable.data), block.size)
            self.sizes[block] = block.size
            if block.string and block.alignment == 1 and block.data in strings:
                self.addresses[block] = strings[block.data]
                continue
            start = self._cursor(block).take(size + (block.kind is Kind.DATA), self._alignment(block, linkable.lead))
            self.addresses[block] = start + linkable.lead
            if block.string:
                strings.setdefault(block.data, start)

    def _cursor(self, block: Block) -> _Cursor:
        if block.kind is Kind.CODE:
            return self.code
        return self.read_only if block.kind is Kind.READ_ONLY else self.data

    def _alignment(self, block: Block, lead: int) -> int:
        if block.kind is Kind.CODE and not lead:
            return max(block.alignment, _CODE_ALIGNMENT)
        return max(block.alignment, 1)

    def _link(self, block: Block) -> None:
        linkable = self.plan.linkables[block]
        if not linkable.data:
            return  # zero-initialised: fresh memory is zero already
        start = self.addresses[block] - linkable.lead
        contents = bytearray(linkable.data)
        for reference in linkable.references:
            offset = linkable.lead + reference.offset
            field = self._field(block, reference, contents, offset)
            if offset < 0 or offset + len(field) > len(contents):
                raise LinkError(
                    f"{where(block, reference)}: {type_name(reference.type)} reaches beyond the end of its block",
                    "the object is damaged; compile it again",
                )
            contents[offset : offset + len(field)] = field
        self.writes.append((start, bytes(contents)))

    # --- references -------------------------------------------------------------------------------------------

    def _field(self, block: Block, r: Reference, contents: bytearray, offset: int) -> bytes:
        rule = RULES[r.type]
        place = self.addresses[block] + r.offset
        if rule.need in (Need.THREAD_OFFSET, Need.THREAD_CELL):
            thread = self._thread_offset(block, r)
            cell = self._cell(thread & _MASK) if rule.need is Need.THREAD_CELL else 0
            return self._encode(block, r, rule, Operands(0, r.addend, place, G=cell, TP=thread))
        call = r.type == R.PLT32 or (rule.need is Need.CELL and bytes(contents[offset - 2 : offset]) in _CALLS)
        owner = self.plan.owners[block]
        symbol = self._address(owner, r, call)
        if rule.need is Need.CELL:
            return self._encode(block, r, rule, Operands(symbol, r.addend, place, G=self._cell(symbol)))
        operands = Operands(symbol, r.addend, place)
        if rule.need is Need.ISLAND and rule.encode(rule.formula(operands)) is None:
            operands = Operands(self._far_jump(symbol), r.addend, place)
        return self._encode(block, r, rule, operands)

    def _encode(self, block: Block, r: Reference, rule: Rule, operands: Operands) -> bytes:
        value = rule.formula(operands)
        encoded = rule.encode(value)
        if encoded is not None:
            return encoded
        low, high = rule.limits
        missed = low - value if value < low else value - high
        name = _name(r)
        message = (
            f"{where(block, r)}: {type_name(r.type)} against `{name}` misses its field by {missed:#x} "
            f"(value {value:#x}, {rule.width} bytes, {rule.sign.value})"
        )
        hint = "compile the unit with -fPIC, which reaches everything through cells"
        if isinstance(r.target, External):
            raise FarData(message, hint, object=block.object)
        raise RelocationOverflow(message, hint)

    def _address(self, owner: Blocks, r: Reference, call: bool) -> int:
        target = r.target
        if isinstance(target, Absolute):
            return target.value
        if isinstance(target, External):
            found = self.plan.externals[owner, target.name]
            if isinstance(found, Block):
                return self._block_address(found, 0, call)
            return _entry(found, call)
        return self._block_address(target.block, target.offset, call)

    def _block_address(self, block: Block, offset: int, call: bool) -> int:
        if block not in self.addresses:
            return _entry(self.plan.bound[block], call and not offset) + offset
        if offset == 0 and block in self.islands:
            # Calls go to the island and so reach every later generation; the address that the program
            # can see stays the one it has always been.
            return self.islands[block] if call else self.originals.get(block, self.islands[block])
        return self.addresses[block] + offset

    def _thread_offset(self, block: Block, r: Reference) -> int:
        target = r.target
        bound: Bound | Block | None = None
        if isinstance(target, External):
            bound = self.plan.externals[self.plan.owners[block], target.name]
        elif isinstance(target, Place):
            bound = self.plan.bound.get(target.block)
        if not isinstance(bound, Bound) or not bound.thread_local:
            raise LinkError(
                f"{where(block, r)}: `{_name(r)}` has no fixed offset from the thread pointer",
                "compile the unit with -ftls-model=global-dynamic, or restart the program",
                code="thread-local",
            )
        return bound.address + (target.offset if isinstance(target, Place) else 0)

    # --- cells and jumps --------------------------------------------------------------------------------------

    def _cell(self, value: int) -> int:
        value &= _MASK
        address = self.cells.get(value)
        if address is None:
            address = self.read_only.take(8, 8)
            self.cells[value] = address
            self.writes.append((address, value.to_bytes(8, "little")))
        return address

    def _far_jump(self, destination: int) -> int:
        address = self.jumps.get(destination)
        if address is None:
            from patcher.code.entry import far_jump

            address = self.code.take(8, 8)
            self.jumps[destination] = address
            self.writes.append((address, far_jump(address, self._cell(destination))))
        return address


_CALLS = (b"\xff\x15", b"\xff\x25")  # call *cell(%rip), jmp *cell(%rip)


def _entry(bound: Bound, call: bool) -> int:
    return bound.call if call and bound.call else bound.address


def _name(r: Reference) -> str:
    if isinstance(r.target, External):
        return r.target.name
    return r.target.block.name if isinstance(r.target, Place) else hex(r.target.value)
