"""From what changed to a generation ready to commit: residents, doors, islands, displaced copies, records.

Joins the verdicts of `match` with the pure linker: says where each block of an object already is in the
process, what an external name denotes there, and which functions are entered through an island. Reads the
target (to resolve an IFUNC it may ask the target's own resolver), and writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from patcher.blocks import Block, Blocks, External, Kind
from patcher.code.entry import COPY_SIZE, DETOUR_SIZE, displaced_copy, plan_entry
from patcher.convention import Registers
from patcher.elf import ObjectFile
from patcher.elf.relocations import R
from patcher.errors import LinkError, UnsafeChange
from patcher.image import Definition, Image, LoadedModule
from patcher.link.place import Placement, Region, Space, place
from patcher.link.plan import Bound, Plan, Unit, plan
from patcher.live import LiveFunction, LiveVariable, base_name, numbered
from patcher.match import Delta, FunctionMatch, Status, is_cold_piece, is_private_piece, parent_of
from patcher.patch.arena import DOOR_SIZE, SLOT_COUNT, Arena, Usage
from patcher.patch.journal import Allocation, Body, GenerationRecord, Placed, Redirect
from patcher.patch.ledger import Commit, Ledger
from patcher.statics import candidates, find_static

_SAME = (Status.SAME, Status.LINE_ONLY)


class Part:
    """One unit's share of a generation: its verdicts, and the object that new code is taken from.

    That object is the one that was matched, or the same unit compiled with indirect access to external data;
    its blocks then go by the names of the matched one's.
    """

    def __init__(self, delta: Delta, source: str, blocks: Blocks | None = None) -> None:
        self.delta = delta
        self.source = source
        self.blocks = blocks or delta.blocks
        self.unit = delta.unit
        self._verdicts = {f.block: f for f in delta.functions}
        self._named: dict[tuple[Kind, str], Block] = {}
        if self.blocks is not delta.blocks:
            matched = (*delta.blocks.functions, *delta.blocks.data_blocks())
            self._named = {(b.kind, b.name): b for b in matched}

    @property
    def module(self) -> LoadedModule:
        return self.unit.module

    @property
    def name(self) -> str:
        """The file that it comes from, for people; `archive(member)` for a member."""
        given = self.delta.blocks.object.name
        return given if given.startswith(self.source) else self.source

    def matched(self, block: Block) -> Block | None:
        """Return the block of the matched object that stands for one of this part's."""
        if self.blocks is self.delta.blocks:
            return block
        return self._named.get((block.kind, block.name))

    def verdict(self, block: Block) -> FunctionMatch | None:
        matched = self.matched(block)
        return self._verdicts.get(matched) if matched is not None else None

    def status(self, block: Block) -> Status:
        verdict = self.verdict(block)
        return verdict.status if verdict is not None else Status.ADDED

    def live(self, block: Block) -> LiveFunction | None:
        verdict = self.verdict(block)
        return verdict.live if verdict is not None else None

    def is_door(self, block: Block) -> bool:
        return self.status(block) not in _SAME and not is_private_piece(block.name)

    def wanted(self) -> tuple[Block, ...]:
        """Return the functions that have to be new. Private pieces follow from who uses them."""
        return tuple(
            b for b in self.blocks.functions if self.status(b) is Status.CHANGED and not is_private_piece(b.name)
        )

    def added(self) -> tuple[Block, ...]:
        """Return the functions that are new to the process and can be called from other units."""
        return tuple(
            b
            for b in self.blocks.functions
            if self.status(b) is Status.ADDED and b.exported and not is_private_piece(b.name)
        )

    def cold_pieces(self, block: Block) -> list[LiveFunction]:
        """Return the live pieces that were split off a function."""
        pieces = (b for b in self.delta.blocks.functions if is_cold_piece(b.name) and parent_of(b.name) == block.name)
        return [live for b in pieces if (live := self._verdicts[b].live) is not None]


@dataclass(frozen=True, slots=True)
class Replaced:
    """A function whose old body some thread may still be in: the extents of that body."""

    name: str
    extents: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Linked:
    """A generation that is linked; nothing of it is in the process yet."""

    commit: Commit
    replaced: tuple[Replaced, ...]
    new_variables: tuple[str, ...]


class NeedsArena(Exception):
    """An IFUNC has to be asked for its choice before anything else: map the arena, and link again."""


def link_generation(image: Image, ledger: Ledger, parts: Sequence[Part], waiting: Sequence[Part] = ()) -> Linked:
    """Link every part's changed functions as one generation.

    `waiting`: units whose new functions nobody called so far; they are placed when something now does.
    Raises `LinkError` and its kin, `UnsafeChange`, and `NeedsArena`.
    """
    linker = _Generation(image, ledger)
    modules = dict.fromkeys(p.module for p in parts)
    for module in modules:
        linker.link(module, [p for p in parts if p.module is module], [p for p in waiting if p.module is module])
    return linker.finish([p.source for p in parts])


class _Generation:
    def __init__(self, image: Image, ledger: Ledger) -> None:
        self.image = image
        self.ledger = ledger
        self.number = ledger.journal.next_number
        self.writes: list[tuple[int, bytes]] = []
        self.usage: list[tuple[int, Usage]] = []
        self.bodies: list[tuple[int, int, int]] = []
        self.statuses: list[tuple[str, str, str]] = []
        self.placed: list[Placed] = []
        self.redirects: list[Redirect] = []
        self.replaced: list[Replaced] = []
        self.quiet: list[Body] = []
        self.quiet_back: list[Body] = []
        self.new_variables: list[str] = []
        self.allocations: dict[str, Allocation] = {}

    def finish(self, sources: Iterable[str]) -> Linked:
        record = GenerationRecord(
            number=self.number,
            parent=self.ledger.generation,
            time=time.time(),
            files=tuple(dict.fromkeys(sources)),
            bodies=tuple(self.bodies),
            statuses=tuple(self.statuses),
            placed=tuple(self.placed),
            redirects=tuple(self.redirects),
            quiet=tuple(self.quiet),
            quiet_back=tuple(self.quiet_back),
            allocations=tuple(self.allocations.values()),
        )
        commit = Commit(record, tuple(self.writes), tuple(self.usage))
        return Linked(commit, tuple(self.replaced), tuple(self.new_variables))

    def link(self, module: LoadedModule, parts: list[Part], waiting: list[Part]) -> None:
        low, high = module.text
        fixed = not module.module.position_independent
        arena = self.ledger.arena_near(low, high, below_2g=fixed)
        linkage = _Linkage(self.image, self.ledger, (*parts, *waiting))
        units = [linkage.unit(part, part.wanted()) for part in parts]
        units += [linkage.unit(part, ()) for part in waiting]
        found = plan(units, linkage.resolve, linkage.provide)
        doors = self._doors(arena, found, linkage)
        space = self.ledger.space(arena)
        copies, space = self._copies(doors, space)
        islands = {d.block: arena.island(d.index) for d in doors}
        originals = {d.block: d.live.address for d in doors if d.live is not None}
        placement = place(found, space, islands, originals)
        self._record(arena, found, placement, doors, copies, linkage)

    def _doors(self, arena: Arena, found: Plan, linkage: _Linkage) -> list[_Door]:
        following = self.ledger.usages[arena.base].slots
        doors = []
        for block in found.code:
            if block not in found.doors:
                continue
            part = linkage.part_of(block)
            live = part.live(block)
            if live is not None and live.redirect is not None:
                home = self.ledger.arenas[live.redirect.arena]
                doors.append(_Door(block, part, live, home, live.redirect.index, False))
                continue
            doors.append(_Door(block, part, live, arena, following, True))
            following += 1
        if following > SLOT_COUNT:
            raise LinkError(f"the arena at {arena.base:#x} has no slot left", "restart the program", code="arena-full")
        return doors

    def _copies(self, doors: list[_Door], space: Space) -> tuple[dict[Block, tuple[int, bytes]], Space]:
        """Displace the entries of the functions that get their island now: block -> (copy, original bytes)."""
        copies: dict[Block, tuple[int, bytes]] = {}
        cursor = space.code.start
        for door in doors:
            if not door.fresh or door.live is None:
                continue
            live, unit = door.live, door.part.unit
            extent = max(unit.extent(live.address), live.size)
            ahead = self.image.target.memory.read(live.address, min(extent, live.size + 16))
            siblings = [(piece.body, piece.code) for piece in door.part.cold_pieces(door.block)]
            following = _filled(ahead[live.size :], live.address + extent)
            entry = plan_entry(live.name, ahead, live.address, live.size, following, siblings)
            address = (cursor + 15) & -16
            code = displaced_copy(entry, ahead, live.address, address)
            if address + COPY_SIZE > space.code.end:
                raise LinkError("the arena has no room for more code", "restart the program", code="arena-full")
            self.writes.append((address, code))
            self._allocate(door.part, islands=address + len(code) - cursor)
            cursor = address + len(code)
            copies[door.block] = address, ahead[: max(entry.length, DETOUR_SIZE)]
            if entry.reentries:
                self.quiet.append(_body(live))
        return copies, Space(space.read_only, Region(cursor, space.code.end), space.data)

    def _record(
        self,
        arena: Arena,
        found: Plan,
        placement: Placement,
        doors: list[_Door],
        copies: dict[Block, tuple[int, bytes]],
        linkage: _Linkage,
    ) -> None:
        self.writes += placement.writes
        self._keep_registers(doors, placement)
        for door in doors:
            self._record_door(door, placement.addresses[door.block], copies.get(door.block))
        for block in found.placed:
            if block.symbols:
                part = linkage.part_of(block)
                self.placed.append(_placed(block, part, placement))
                if block.kind is Kind.DATA:
                    self.new_variables.append(base_name(block.name))
        for source, account in placement.accounts.items():
            sizes = asdict(account)
            self._allocate(linkage.part_with(source), islands=sizes.pop("jumps"), **sizes)
        fresh = sum(1 for d in doors if d.fresh)
        space, before = placement.space, self.ledger.usages[arena.base]
        usage = Usage(space.read_only.start, space.code.start, space.data.start, before.slots + fresh, before.journal)
        self.usage.append((arena.base, usage))

    def _allocate(self, part: Part, **sizes: int) -> None:
        known = self.allocations.get(part.name, Allocation(part.name))
        self.allocations[part.name] = known.plus(**sizes)

    def _keep_registers(self, doors: list[_Door], placement: Placement) -> None:
        """Note which changed functions must have no frame when their callees change under them."""
        for part in dict.fromkeys(door.part for door in doors):
            registers = Registers(part.blocks, part.live, part.is_door)
            risk = registers.callers_at_risk(d.block for d in doors if d.part is part)
            for live in risk.old:
                self.quiet.append(_body(live))
            for block in risk.new:
                start = placement.addresses[block]
                self.quiet_back.append(Body(block.name, start, start + block.size))

    def _record_door(self, door: _Door, body: int, copy: tuple[int, bytes] | None) -> None:
        block, part, live = door.block, door.part, door.live
        self.bodies.append((door.arena.base, door.index, body))
        self.statuses.append((block.name, part.module.path, "changed" if live is not None else "added"))
        if live is not None:
            extents = [(live.body, live.body + live.size)]
            extents += [(piece.body, piece.body + piece.size) for piece in part.cold_pieces(block)]
            self.replaced.append(Replaced(live.name, tuple(extents)))
        if not door.fresh:
            return
        self._allocate(part, islands=DOOR_SIZE)
        island = door.arena.island(door.index)
        names = tuple(dict.fromkeys(s.name for s in block.symbols))
        self.redirects.append(
            Redirect(
                name=block.name,
                names=names,
                module=part.module.path,
                unit=part.unit.key_of(block),
                local=not block.exported,
                original=live.address if live is not None else island,
                size=live.size if live is not None else block.size,
                arena=door.arena.base,
                index=door.index,
                copy=copy[0] if copy is not None else 0,
                entry=copy[1].hex() if copy is not None else "",
                cells=self._cells(live, names, island),
            )
        )

    def _cells(
        self, live: LiveFunction | None, names: tuple[str, ...], island: int
    ) -> tuple[tuple[int, int, int], ...]:
        if live is None:
            return ()
        return tuple(
            (cell, value, island) for name in names for cell, value in self.image.jump_slots(name, live.address)
        )


def _filled(following: bytes, end: int) -> bytes:
    """Return what follows a function; zeros up to the next aligned one are padding too (mold fills gaps so)."""
    gap = end % 16 == 0 and len(following) < 16 and not any(following)
    return b"\x90" * len(following) if gap else following


@dataclass(frozen=True, slots=True)
class _Door:
    """A function that is entered through an island; `fresh` when it gets it with this generation."""

    block: Block
    part: Part
    live: LiveFunction | None
    arena: Arena
    index: int
    fresh: bool


def _body(live: LiveFunction) -> Body:
    return Body(live.name, live.body, live.body + live.size)


def _placed(block: Block, part: Part, placement: Placement) -> Placed:
    kind = {Kind.CODE: "code", Kind.READ_ONLY: "read-only"}.get(block.kind, "data")
    return Placed(
        name=block.name,
        names=tuple(dict.fromkeys(s.name for s in block.symbols)),
        kind=kind,
        module=part.module.path,
        unit=part.unit.key_of(block),
        local=not block.exported,
        address=placement.addresses[block],
        size=block.size,
    )


def _takes_directly(part: Part, name: str) -> bool:
    """Tell whether a unit's code takes a function's address without a table or cell."""
    references = (r for block in part.blocks.functions for r in part.blocks.references(block))
    return any(r.type == R.PC32 and isinstance(r.target, External) and r.target.name == name for r in references)


def _without_fixed_place(name: str, module: LoadedModule) -> LinkError:
    return LinkError(
        f"the thread-local `{name}` of {module.name} has no fixed place in each thread",
        "it belongs to a library that was loaded late; restart the program",
        code="thread-local",
    )


class _Linkage:
    """What the blocks and names of one module's parts mean in the process."""

    def __init__(self, image: Image, ledger: Ledger, parts: Sequence[Part]) -> None:
        self.image = image
        self.ledger = ledger
        self._parts = {p.blocks: p for p in parts}
        self._objects = {p.blocks.object: p for p in parts}
        self._units: dict[Blocks, Unit] = {}
        self._brought: dict[str, tuple[Part, Block]] = {}
        for part in parts:
            for block in part.blocks.functions:
                if block.exported and part.is_door(block):
                    for symbol in block.symbols:
                        self._brought.setdefault(symbol.name, (part, block))
            for block in part.blocks.data_blocks():
                if block.exported and block.kind is Kind.DATA:
                    for symbol in block.symbols:
                        self._brought.setdefault(symbol.name, (part, block))
        self._redirects = {r.original: r for r in ledger.journal.redirects}

    def part_of(self, block: Block) -> Part:
        return self.part_with(block.object)

    def part_with(self, source: ObjectFile) -> Part:
        return self._objects[source]

    def unit(self, part: Part, wanted: tuple[Block, ...]) -> Unit:
        unit = Unit(part.blocks, wanted, self._resident(part), part.is_door)
        self._units[part.blocks] = unit
        return unit

    def provide(self, name: str) -> tuple[Unit, Block] | None:
        found = self._brought.get(name)
        if found is None:
            return None
        part, block = found
        return self._units[part.blocks], block

    # --- blocks of the object ---------------------------------------------------------------------------------

    def _resident(self, part: Part) -> Callable[[Block], Bound | None]:
        def resident(block: Block) -> Bound | None:
            if block.kind is Kind.CODE:
                return self._function(part, block)
            if block.kind is Kind.READ_ONLY:
                matched = part.matched(block)
                address = part.delta.bindings.get(matched) if matched is not None and matched.symbols else None
                return Bound(address) if address is not None else None
            return self._variable(part, block)

        return resident

    def _function(self, part: Part, block: Block) -> Bound | None:
        if part.status(block) not in _SAME:
            return None
        interposed = self._interposed(part, block)
        if interposed is not None and interposed.function:
            return self._entry(interposed.address)
        live = part.live(block)
        if live is None:
            return None
        return self._entry(live.address)

    def _entry(self, address: int) -> Bound:
        redirect = self._redirects.get(address)
        if redirect is None or not (redirect.born or self.ledger.is_detoured(redirect)):
            return Bound(address)
        return Bound(address, self.ledger.arenas[redirect.arena].island(redirect.index))

    def _interposed(self, part: Part, block: Block) -> Definition | None:
        """Return what a library's own exported name denotes in the process, where that is another module's."""
        if part.module is self.image.executable:
            return None
        for symbol in block.symbols:
            found = self.image.search(symbol.name, part.module) if not symbol.local else None
            if found is not None and found.module is not part.module:
                return found if found.unique or self.image.binds(part.module, found) else None
        return None

    def _variable(self, part: Part, block: Block) -> Bound | None:
        thread_local = block.kind is Kind.THREAD_LOCAL
        matched = part.matched(block)
        address = part.delta.bindings.get(matched) if matched is not None else None
        if address is None:
            found = self._find_variable(part, block)
            if found is None:
                return None
            if found.size and block.size and found.size != block.size:
                raise UnsafeChange(
                    f"`{base_name(block.name)}` has {block.size} bytes in {part.source}, "
                    f"but {found.size} in the process",
                    "its type changed, and the program's data has the old one: restart the program, or keep the size",
                    code="layout",
                )
            address = found.address
        if not thread_local:
            return Bound(address)
        base = self.image.thread_block(part.module)
        if base is None:
            raise _without_fixed_place(block.name, part.module)
        return Bound(base + address, thread_local=True)

    def _find_variable(self, part: Part, block: Block) -> LiveVariable | None:
        interposed = self._interposed(part, block)
        if interposed is not None and not interposed.function and not interposed.thread_local:
            return LiveVariable(interposed.name, interposed.address, interposed.size)
        if not numbered(block.name):
            return next(iter(candidates(part.unit, block)), None)
        base = self.image.thread_block(part.module) if block.kind is Kind.THREAD_LOCAL else None
        return find_static(part, block, base)

    # --- names the object does not define -----------------------------------------------------------------------

    def resolve(self, blocks: Blocks, external: External) -> Bound | None:
        part = self._parts[blocks]
        earlier = self._from_earlier_generation(part, external.name)
        if earlier is not None:
            return earlier
        definition = self.image.resolve(external.name, part.module, weak=external.weak)
        if definition is None:
            return None
        if definition.thread_local:
            return self._thread_local(definition)
        if definition.ifunc:
            return self._chosen_function(part, definition)
        if definition.function:
            return self._external_function(part, definition)
        return Bound(definition.address)

    def _external_function(self, part: Part, definition: Definition) -> Bound:
        entry = self._entry(definition.address)
        canonical = self.image.canonical_plt(definition.name) if definition.module is not part.module else None
        if canonical is None:
            return entry
        return Bound(canonical, entry.call or definition.address)

    def _chosen_function(self, part: Part, definition: Definition) -> Bound:
        chosen = self._entry(self._chosen(definition))
        if definition.module is not part.module:
            stub = self.image.canonical_plt(definition.name)
        elif part.module.module.position_independent and not _takes_directly(part, definition.name):
            stub = None  # in tables and cells the linker of a position-independent module has the choice itself
        else:
            stub = self.image.chosen_stub(definition)
        return chosen if stub is None else Bound(stub, chosen.call or chosen.address)

    def _chosen(self, definition: Definition) -> int:
        if self.image.chosen(definition) is None and self.image.stub_area is None:
            raise NeedsArena
        return self.image.choose(definition)

    def _thread_local(self, definition: Definition) -> Bound:
        offset = self.image.thread_offset(definition)
        if offset is None:
            raise _without_fixed_place(definition.name, definition.module)
        return Bound(offset, thread_local=True)

    def _from_earlier_generation(self, part: Part, name: str) -> Bound | None:
        for redirect in reversed(self.ledger.journal.redirects):
            if redirect.born and not redirect.local and name in redirect.names and redirect.module == part.module.path:
                return Bound(redirect.original)
        for placed in reversed(self.ledger.journal.placed):
            if placed.kind == "data" and not placed.local and name in placed.names:
                return Bound(placed.address)
        return None
