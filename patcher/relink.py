"""From what changed to a generation ready to commit: residents, doors, islands, displaced copies, records.

Joins the verdicts of `match` with the pure linker: says where each block of an object already is in the
process, what an external name denotes there, and which functions are entered through an island. Reads the
target (to resolve an IFUNC it may ask the target's own resolver), and writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Protocol

from patcher.blocks import Block, Blocks, External, Kind, Place
from patcher.code.entry import COPY_SIZE, DETOUR_SIZE, Displaced, NotDetourable, displaced_copy, plan_entry
from patcher.constructors import Starter, belonging, starters, touched
from patcher.convention import Registers
from patcher.elf import ObjectFile, SymbolBinding, SymbolType
from patcher.elf.relocations import R
from patcher.errors import LinkError, TargetBusy, UnsafeChange
from patcher.image import Definition, Image, LoadedModule
from patcher.link.place import ArenaFull, Placement, Region, Space, place
from patcher.link.plan import Bound, Plan, Unit, plan
from patcher.live import UNDEFINED, LiveFunction, LiveVariable, base_name, numbered
from patcher.match import MODULE_BASE, Delta, FunctionMatch, Status, is_cold_piece, is_private_piece, parent_of
from patcher.patch.arena import DOOR_SIZE, SLOT_COUNT, Arena, Usage
from patcher.patch.journal import Allocation, Body, GenerationRecord, Placed, Redirect
from patcher.patch.ledger import Choice, Commit, Constructor, Ledger
from patcher.statics import candidates, find_static
from patcher.undefined import Use, uses_of


class Part:
    """One unit's share of a generation: its verdicts, and the object that new code is taken from.

    That object is the one that was matched, or the same unit compiled with indirect access to external data;
    its blocks then go by the names of the matched one's. A part that is `supplied` is there only for what others
    miss: nothing of it that the process has is replaced.

    `every`: functions that are the same are to be new as well, all but those that `keep` names.
    """

    def __init__(
        self, delta: Delta, source: str, blocks: Blocks | None = None, *, supplied: bool = False, every: bool = False
    ) -> None:
        self.delta = delta
        self.supplied = supplied
        self.source = source
        self.blocks = blocks or delta.blocks
        self.every = every
        self.kept: list[str] = []
        self._left: set[Block] = set()
        self.unit = delta.unit
        self._verdicts = {f.block: f for f in delta.functions}
        self._named: dict[tuple[Kind, str], Block] = {}
        if self.blocks is not delta.blocks:
            matched = (*delta.blocks.functions, *delta.blocks.data_blocks())
            self._named = {(b.kind, b.name): b for b in matched}

    def compiled_otherwise(self, blocks: Blocks) -> Part:
        """Return the same part with the blocks of another object, made from the same source."""
        return Part(self.delta, self.source, blocks, supplied=self.supplied, every=self.every)

    def judged(self, delta: Delta) -> Part:
        """Return the same part with other verdicts."""
        return Part(delta, self.source, self.blocks, supplied=self.supplied, every=self.every)

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

    def keep(self, block: Block) -> None:
        """Leave a function that is the same as it is, though every one is to be new, and say so."""
        self.leave(block)
        self.kept.append(block.name)

    def leave(self, block: Block) -> None:
        """Leave a function that is the same to another unit, which replaces it."""
        self._left.add(block)

    def is_new(self, block: Block) -> bool:
        """Tell whether new code takes the place of a function's code, or there is none yet."""
        status = self.status(block)
        if status is Status.SAME:
            return self.every and block not in self._left
        return status is not Status.LINE_ONLY

    def is_door(self, block: Block) -> bool:
        return self.is_new(block) and not is_private_piece(block.name)

    def wanted(self) -> tuple[Block, ...]:
        """Return the functions that have to be new. Private pieces follow from who uses them."""
        if self.supplied:
            return ()
        started = {s.function for s in self.starters}
        return tuple(
            b for b in self.blocks.functions if self.is_door(b) and (self.status(b) is not Status.ADDED or b in started)
        )

    @cached_property
    def starters(self) -> tuple[Starter, ...]:
        """The functions that a program linked with this unit starts with."""
        # What the process was started with has run, whatever it is.
        return starters(self.blocks, complete=self.unit.born)

    def added(self) -> tuple[Block, ...]:
        """Return the functions that are new to the process and can be called from other units."""
        return tuple(
            b
            for b in self.blocks.functions
            if self.status(b) is Status.ADDED and b.exported and not is_private_piece(b.name)
        )

    def defining(self, name: str) -> Block | None:
        """Return the function or variable that the unit defines for others under a name."""
        for block in (*self.blocks.functions, *self.blocks.data_blocks()):
            if any(s.name == name and not s.local for s in block.symbols):
                return block
        return None

    def cold_pieces(self, block: Block) -> list[LiveFunction]:
        """Return the live pieces that were split off a function."""
        pieces = (b for b in self.delta.blocks.functions if is_cold_piece(b.name) and parent_of(b.name) == block.name)
        return [live for b in pieces if (live := self._verdicts[b].live) is not None]


@dataclass(frozen=True, slots=True)
class Replaced:
    """A function whose old body some thread may still be in: the extents of that body."""

    name: str
    extents: tuple[tuple[int, int], ...]


class Supply(Protocol):
    """Where a definition comes from that neither the generation's own units nor the process have."""

    def find(
        self, name: str, module: LoadedModule, uses: Callable[[], tuple[Use, ...]]
    ) -> tuple[Part, Block] | Bound | None:
        """Return the definition, or a far address that stands for one in a library that is still to be loaded.

        None when there is none. `uses` tells who refers to it.
        """
        ...

    def defining(self, name: str, module: LoadedModule) -> ObjectFile | None:
        """Return the object that `find` would take the definition from."""
        ...


@dataclass(frozen=True)
class Linked:
    """A generation that is linked; nothing of it is in the process yet."""

    commit: Commit
    replaced: tuple[Replaced, ...]
    new_variables: tuple[str, ...]
    supplied: tuple[Part, ...] = ()  # the parts that came in because something was missing
    kept: tuple[str, ...] = ()  # functions that could not be entered anew, and are as they were


class _Kept(Exception):
    """Functions that are the same turned out not to be replaceable: they keep their code, link again."""


class NeedsArena(Exception):
    """An IFUNC has to be asked for its choice before anything else: map the arena, and link again."""


def link_generation(
    image: Image, ledger: Ledger, parts: Sequence[Part], waiting: Sequence[Part] = (), supply: Supply | None = None
) -> Linked:
    """Link every part's changed functions as one generation.

    `waiting`: units whose new functions nobody called so far; they are placed when something now does. `supply` is
    asked for what is still missing then.
    Raises `LinkError` and its kin, `UnsafeChange`, and `NeedsArena`.
    """
    linker = _Generation(image, ledger, supply)
    modules = dict.fromkeys(p.module for p in parts)
    for module in modules:
        linker.link(module, [p for p in parts if p.module is module], [p for p in waiting if p.module is module])
    return linker.finish(parts)


class _Generation:
    def __init__(self, image: Image, ledger: Ledger, supply: Supply | None) -> None:
        self.image = image
        self.ledger = ledger
        self.supply = supply
        self.defined: dict[str, Bound] = {}  # by the modules that were linked before
        self.choices: list[Choice] = []
        self.constructors: list[tuple[int, Constructor]] = []
        self.supplied: list[Part] = []
        self.number = ledger.journal.next_number
        self.writes: list[tuple[int, bytes]] = []
        self.usages: dict[int, Usage] = {}  # of the arenas that something was put into
        self.bodies: list[tuple[int, int, int]] = []
        self.statuses: list[tuple[str, str, str]] = []
        self.placed: list[Placed] = []
        self.redirects: list[Redirect] = []
        self.replaced: list[Replaced] = []
        self.quiet: list[Body] = []
        self.quiet_back: list[Body] = []
        self.new_variables: list[str] = []
        self.allocations: dict[str, Allocation] = {}

    def finish(self, parts: Sequence[Part]) -> Linked:
        record = GenerationRecord(
            number=self.number,
            parent=self.ledger.generation,
            time=time.time(),
            files=tuple(dict.fromkeys(p.source for p in parts)),
            bodies=tuple(self.bodies),
            statuses=tuple(self.statuses),
            placed=tuple(self.placed),
            redirects=tuple(self.redirects),
            quiet=tuple(self.quiet),
            quiet_back=tuple(self.quiet_back),
            allocations=tuple(self.allocations.values()),
        )
        constructors = tuple(c for _, c in sorted(self.constructors, key=lambda found: found[0]))
        commit = Commit(record, tuple(self.writes), tuple(self.usages.items()), tuple(self.choices), constructors)
        kept = tuple(name for part in parts for name in part.kept)
        return Linked(commit, tuple(self.replaced), tuple(self.new_variables), tuple(self.supplied), kept)

    def link(self, module: LoadedModule, parts: list[Part], waiting: list[Part]) -> None:
        _keep_twins(parts)
        while True:
            try:
                return self._link(module, parts, waiting)
            except _Kept:
                continue

    def _link(self, module: LoadedModule, parts: list[Part], waiting: list[Part]) -> None:
        homes = self._homes(module)
        first = next(homes)  # chosen now: to resolve a symbol, a function of the target may have to be called
        linkage = _Linkage(self.image, self.ledger, (*parts, *waiting), _Beyond(module, self.supply, self.defined))
        starts = {part: _start(part, linkage) for part in parts}
        wanted = {part: tuple(b for b in part.wanted() if b not in starts[part].left) for part in parts}
        wanted |= dict.fromkeys(waiting, ())
        found = _planned(linkage, wanted, starts)
        for block in found.code:
            if linkage.part_of(block).supplied:
                _check_end(block)
            if is_chosen(block):
                _check_resolver(linkage.part_of(block), block)
        full: ArenaFull | None = None
        for home in chain((first,), homes):  # a further arena is planned only when it is wanted
            try:
                return self._settle(home, found, linkage)
            except ArenaFull as error:
                full = error
        assert full is not None
        raise full

    def _homes(self, module: LoadedModule) -> Iterator[_Home]:
        """Yield where a module's new code may go, the best first; raises `TargetBusy` when there is no arena for it.

        Islands and the copies of displaced entries are within reach of the module's text. Bodies are as well, as long
        as the address space has room there.
        """
        low, high = module.text
        near = [arena for arena in self.ledger.arenas.values() if arena.reaches(low, high)]
        for arena in near:
            yield _Home(arena, arena)
        try:
            arena = self.ledger.plan_near(low, high, below_2g=not module.module.position_independent)
        except TargetBusy:
            if not near:
                raise
        else:
            yield _Home(arena, arena)
            return
        far = [arena for arena in self.ledger.arenas.values() if arena not in near]
        yield from (_Home(entries, bodies) for bodies in far for entries in near)
        anywhere = self.ledger.plan_anywhere()
        yield from (_Home(entries, anywhere) for entries in near)

    def _settle(self, home: _Home, found: Plan, linkage: _Linkage) -> None:
        """Place a plan somewhere and keep what is to be written. Raises `ArenaFull`, leaving everything as it was."""
        doors = self._doors(home.entries, found, linkage)
        near = home.entries.entry_space(self._usage(home.entries))
        entries = self._entries(doors, near.start)
        copies = _copies(entries, near)
        end = copies[-1].end if copies else near.start
        space = home.bodies.space(self._usage(home.bodies))
        if home.bodies is home.entries:
            space = replace(space, code=Region(end, max(end, space.code.end)))
        islands = {d.block: d.arena.island(d.index) for d in doors}
        originals = {d.block: d.live.address for d in doors if d.live is not None}
        placement = place(found, space, islands, originals)
        self.writes += [(copy.address, copy.code) for copy in copies]
        self._allocate_copies(copies, near.start, linkage)
        self.quiet += [_body(e.live) for e in entries if e.displaced.reentries]
        self._record(found, placement, doors, {copy.block: copy for copy in copies}, linkage)
        self._record_constructors(doors, placement)
        self._use(home, placement.space, end, sum(1 for d in doors if d.fresh))
        placed = {block.object for block in found.placed}
        self.supplied += [p for p in linkage.supplied if p.blocks.object in placed or p.unit.key == UNDEFINED]

    def _usage(self, arena: Arena) -> Usage:
        return self.usages.get(arena.base) or self.ledger.usages[arena.base]

    def _use(self, home: _Home, space: Space, end_of_copies: int, slots: int) -> None:
        """Note how far arenas are in use now."""
        entries = self._usage(home.entries)
        self.usages[home.entries.base] = replace(entries, code=end_of_copies, slots=entries.slots + slots)
        self.usages[home.bodies.base] = replace(
            self._usage(home.bodies),
            read_only=space.read_only.start,
            code=space.code.start,
            data=space.data.start,
        )

    def _doors(self, arena: Arena, found: Plan, linkage: _Linkage) -> list[_Door]:
        following = self._usage(arena).slots
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
            raise ArenaFull(f"the arena at {arena.base:#x} has no slot left", "restart the program")
        return doors

    def _entries(self, doors: list[_Door], near: int) -> list[_Entry]:
        """Plan the entries of the functions that get their island now, with copies to stand at `near` or behind it."""
        entries = []
        kept = False
        for door in doors:
            if not door.fresh or door.live is None:
                continue
            try:
                entry = self._entry(door, door.live)
                displaced_copy(entry.displaced, entry.ahead, door.live.address, near)
                entries.append(entry)
            except NotDetourable:
                if door.part.status(door.block) is not Status.SAME:
                    raise
                door.part.keep(door.block)
                kept = True
        if kept:
            raise _Kept
        return entries

    def _entry(self, door: _Door, live: LiveFunction) -> _Entry:
        extent = max(door.part.unit.extent(live.address), live.size)
        ahead = self.image.target.memory.read(live.address, min(extent, live.size + 16))
        siblings = [(piece.body, piece.code) for piece in door.part.cold_pieces(door.block)]
        following = _filled(ahead[live.size :], live.address + extent)
        table = door.part.module.offset_table
        displaced = plan_entry(live.name, ahead, live.address, live.size, following, siblings, table=table)
        return _Entry(door.block, live, ahead, displaced)

    def _record(
        self,
        found: Plan,
        placement: Placement,
        doors: list[_Door],
        copies: dict[Block, _Copy],
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
                if block.kind is not Kind.CODE:
                    self._define(block, Bound(placement.addresses[block]))
                if block.kind is Kind.DATA and not part.supplied:
                    self.new_variables.append(base_name(block.name))
        for source, account in placement.accounts.items():
            sizes = asdict(account)
            self._allocate(linkage.part_with(source), islands=sizes.pop("jumps"), **sizes)

    def _record_constructors(self, doors: list[_Door], placement: Placement) -> None:
        for part in dict.fromkeys(door.part for door in doors):
            for starter in part.starters:
                function = starter.function
                if part.status(function) is Status.ADDED and function in placement.addresses:
                    constructor = Constructor(function.name, part.name, placement.addresses[function])
                    self.constructors.append((starter.priority, constructor))

    def _allocate_copies(self, copies: Sequence[_Copy], start: int, linkage: _Linkage) -> None:
        for copy in copies:
            self._allocate(linkage.part_of(copy.block), islands=copy.end - start)
            start = copy.end

    def _allocate(self, part: Part, **sizes: int) -> None:
        known = self.allocations.get(part.name, Allocation(part.name))
        self.allocations[part.name] = known.plus(**sizes)

    def _define(self, block: Block, bound: Bound) -> None:
        for symbol in block.symbols:
            if not symbol.local:
                self.defined.setdefault(symbol.name, bound)

    def _keep_registers(self, doors: list[_Door], placement: Placement) -> None:
        """Note which changed functions must have no frame when their callees change under them."""
        for part in dict.fromkeys(door.part for door in doors if not door.part.supplied):
            registers = Registers(part.blocks, part.live, part.is_door)
            # A caller that is the same relies on nothing that its new callees were not compiled to keep.
            new = [d.block for d in doors if d.part is part and part.status(d.block) is not Status.SAME]
            risk = registers.callers_at_risk(new)
            for live in risk.old:
                self.quiet.append(_body(live))
            for block in risk.new:
                start = placement.addresses[block]
                self.quiet_back.append(Body(block.name, start, start + block.size))

    def _record_door(self, door: _Door, body: int, copy: _Copy | None) -> None:
        block, part, live = door.block, door.part, door.live
        self.bodies.append((door.arena.base, door.index, body))
        if part.unit.key != UNDEFINED:
            self.statuses.append((block.name, part.module.path, _STATUSES[part.status(block)]))
        if live is not None:
            extents = [(live.body, live.body + live.size)]
            extents += [(piece.body, piece.body + piece.size) for piece in part.cold_pieces(block)]
            self.replaced.append(Replaced(live.name, tuple(extents)))
        if not door.fresh:
            return
        self._allocate(part, islands=DOOR_SIZE)
        island = door.arena.island(door.index)
        if live is None:
            self._define(block, Bound(island))
            if is_chosen(block):  # the entry of a resolver that the program has is the resolver's for life
                self.choices.append(Choice(block.name, door.arena.base, door.index, body))
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
                copy=copy.address if copy is not None else 0,
                entry=copy.displaced.hex() if copy is not None else "",
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


@dataclass(frozen=True, slots=True)
class _Start:
    """What becomes of the functions that a unit has the program start with: those to run, those left as they are."""

    run: tuple[Block, ...] = ()
    left: frozenset[Block] = frozenset()


def _start(part: Part, linkage: _Linkage) -> _Start:
    """Decide what a unit's initialisers have to do in a program that has started.

    Those that are new run. Those that changed have run: to run them again would initialise again what lives, so they
    are left as they are, and refused where they initialise something new.
    """
    run: list[Block] = []
    left: set[Block] = set()
    functions = [s.function for s in part.starters]
    if all(part.status(f) is Status.ADDED for f in functions) and (part.unit.born or not functions):
        return _Start(tuple(functions))
    belongs = belonging(part.blocks, functions)
    for starter in part.starters:
        function, own = starter.function, belongs[starter.function]
        is_added = part.status(function) is Status.ADDED
        if all(part.status(f) in (Status.SAME, Status.LINE_ONLY) for f in own):
            continue
        variables = touched(part.blocks, own)
        living = [v for v in variables if linkage.lives(part, v)]
        # A compiler names what it makes after something else in the unit: a new name may be an old initialiser.
        again = not is_added or (starter.made and any(not _is_shared(v) for v in living))
        new = [v for v in variables if v not in living]
        if again and new:
            raise _initialised_together(part, starter, new, living)
        if again:
            left |= {f for f in own if not f.exported}
        else:
            run.append(function)
    return _Start(tuple(run), frozenset(left))


def _is_shared(variable: Block) -> bool:
    """Tell whether other units may define a variable as well: its initialiser asks whether it is initialised."""
    return all(s.binding not in (SymbolBinding.LOCAL, SymbolBinding.GLOBAL) for s in variable.symbols)


def _initialised_together(part: Part, starter: Starter, new: Sequence[Block], living: Sequence[Block]) -> UnsafeChange:
    others = ", ".join(f"`{base_name(v.name)}`" for v in living[:3])
    return UnsafeChange(
        f"{', '.join(f'`{base_name(v.name)}`' for v in new[:3])} of {part.source} is new and initialised when the "
        f"program starts, in `{starter.function.name}`"
        + (f" together with {others}, which would be initialised again" if others else ", which has run already"),
        "move it to a new source file, or make it a static variable of a function",
        code="constructor",
    )


def _planned(linkage: _Linkage, wanted: dict[Part, tuple[Block, ...]], starts: dict[Part, _Start]) -> Plan:
    """Plan what is wanted; a unit that comes in with something brings its initialisers."""
    while True:
        units = [linkage.unit(part, blocks) for part, blocks in wanted.items()]
        found = plan(units, linkage.resolve, linkage.provide)
        placed = set(found.placed)
        for part in dict.fromkeys(linkage.part_of(block) for block in found.placed):
            if part not in starts:
                starts[part] = _start(part, linkage)
        missing = {
            part: tuple(b for b in start.run if b not in placed)
            for part, start in starts.items()
            if not placed.issuperset(start.run)
        }
        if not missing:
            return found
        wanted |= {part: (*wanted.get(part, ()), *blocks) for part, blocks in missing.items()}


_ENDS = ("jmp", "ret", "call", "ud2", "hlt", "int3", "syscall")  # what is called there does not come back


def _check_end(block: Block) -> None:
    """Refuse a function, written in assembler, that goes on into the next one of its section: they are placed apart."""
    from patcher.code.instructions import decode_lite

    if block.start + block.size >= block.object.sections[block.section].size:
        return
    words = [mnemonic.split()[-1] for _, _, mnemonic, _ in decode_lite(block.data, 0)]
    last = next((word for word in reversed(words) if word != "nop"), "nop")
    if last not in _ENDS:
        raise LinkError(
            f"`{block.name}` of {block.object.name} ends with `{last}` and goes on in the function behind it",
            "restart the program, linked with it",
            code="falls-through",
        )


_STATUSES = {Status.CHANGED: "changed", Status.ADDED: "added", Status.SAME: "relinked"}


def _keep_twins(parts: Sequence[Part]) -> None:
    """Let one unit replace what several have the same (inline functions, code that the linker folded)."""
    wanted = [
        (part, block, live) for part in parts for block in part.wanted() if (live := part.live(block)) is not None
    ]
    claimed = {live.address for part, block, live in wanted if part.status(block) is not Status.SAME}
    for part, block, live in wanted:
        if part.status(block) is Status.SAME:
            if live.address in claimed:
                part.leave(block)
            claimed.add(live.address)


def _check_resolver(part: Part, resolver: Block) -> None:
    """Refuse code that means the resolver of a new IFUNC itself, and not what it chooses."""
    if part.live(resolver) is not None:
        return
    for block in (*part.blocks.functions, *part.blocks.data_blocks()):
        if any(isinstance(r.target, Place) and r.target.block is resolver for r in part.blocks.references(block)):
            raise LinkError(
                f"`{block.name}` of {part.source} refers to the resolver of `{resolver.name}` itself",
                "let it use what the resolver chooses, or restart the program",
                code="ifunc",
            )


def _filled(following: bytes, end: int) -> bytes:
    """Return what follows a function; zeros up to the next aligned one are padding too (mold fills gaps so)."""
    gap = end % 16 == 0 and len(following) < 16 and not any(following)
    return b"\x90" * len(following) if gap else following


@dataclass(frozen=True, slots=True)
class _Home:
    """Where new code goes: islands and displaced entries in one arena, bodies in the same or in another."""

    entries: Arena
    bodies: Arena


@dataclass(frozen=True, slots=True)
class _Copy:
    """The first instructions of a function where they stand from now on; `displaced` is what they were."""

    block: Block
    address: int
    code: bytes
    displaced: bytes

    @property
    def end(self) -> int:
        return self.address + len(self.code)


def _copies(entries: Sequence[_Entry], near: Region) -> list[_Copy]:
    """Displace the entries of functions into the code of an arena. Raises `ArenaFull`."""
    copies: list[_Copy] = []
    cursor = near.start
    for entry in entries:
        address = (cursor + 15) & -16
        if address + COPY_SIZE > near.end:
            raise ArenaFull("the arena has no room for more code", "restart the program")
        code = displaced_copy(entry.displaced, entry.ahead, entry.live.address, address)
        displaced = entry.ahead[: max(entry.displaced.length, DETOUR_SIZE)]
        copies.append(_Copy(entry.block, address, code, displaced))
        cursor = copies[-1].end
    return copies


@dataclass(frozen=True, slots=True)
class _Door:
    """A function that is entered through an island; `fresh` when it gets it with this generation."""

    block: Block
    part: Part
    live: LiveFunction | None
    arena: Arena
    index: int
    fresh: bool


@dataclass(frozen=True, slots=True)
class _Entry:
    """An entry that is to be displaced, and the live bytes from there."""

    block: Block
    live: LiveFunction
    ahead: bytes
    displaced: Displaced


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


def _labels_of_new_code(part: Part, block: Block) -> list[Block]:
    """Return the functions that are to be new and that a table's addresses lead into the middle of (`&&label`)."""
    found = (r.target for r in part.blocks.references(block))
    inside = (t.block for t in found if isinstance(t, Place) and t.block.kind is Kind.CODE and t.offset)
    return [b for b in dict.fromkeys(inside) if part.is_new(b)]


def _check_labels(part: Part, block: Block) -> None:
    """Refuse new code for a function whose labels stand in a live variable: these lead into the old code."""
    functions = _labels_of_new_code(part, block)
    if not functions:
        return
    if all(part.status(f) is Status.SAME for f in functions):
        for function in functions:
            part.keep(function)
        raise _Kept
    raise UnsafeChange(
        f"`{base_name(block.name)}` of {part.source} is a variable and holds addresses of labels in "
        f"{', '.join(f'`{f.name}`' for f in functions)}, where they lead into the old code",
        "restart the program; a table of labels that is declared const changes with its function",
        code="label-table",
    )


def _nowhere(name: str, module: LoadedModule) -> LinkError:
    return LinkError(
        f"where each thread has the thread-local `{name}` of {module.name} cannot be told",
        "nothing in the process says so for this library: restart the program with the new code",
        code="thread-local",
    )


def is_chosen(block: Block) -> bool:
    """Tell whether a function is the resolver of an IFUNC: what its name denotes is what it chooses."""
    return any(s.type == SymbolType.IFUNC for s in block.symbols)


def _is_tentative(block: Block) -> bool:
    return any(s.common for s in block.symbols)


def _needs(blocks: Blocks, name: str) -> bool:
    found = (s for s in blocks.object.symbols if s.name == name)
    return any((s.undefined and not s.weak) or s.type == SymbolType.IFUNC for s in found)


@dataclass(frozen=True, slots=True)
class _Beyond:
    """What the units of one module may use beside each other and the process."""

    module: LoadedModule
    supply: Supply | None
    defined: dict[str, Bound]


class _Linkage:
    """What the blocks and names of one module's parts mean in the process."""

    def __init__(self, image: Image, ledger: Ledger, parts: Sequence[Part], beyond: _Beyond) -> None:
        self.image = image
        self.ledger = ledger
        self.supplied: list[Part] = []
        self._awaited: dict[str, Bound] = {}  # in libraries that are still to be loaded
        self._beyond = beyond
        self._missing: dict[str, bool] = {}
        self._parts = {p.blocks: p for p in parts}
        self._objects = {p.blocks.object: p for p in parts}
        self._units: dict[Blocks, Unit] = {}
        self._brought: dict[str, tuple[Part, Block]] = {}
        for part in parts:
            for block in part.blocks.functions:
                if block.exported and part.is_door(block):
                    for symbol in block.symbols:
                        # What stands there is the resolver of an IFUNC: the process chose, unless it is new.
                        if symbol.type != SymbolType.IFUNC or part.live(block) is None:
                            self._brought.setdefault(symbol.name, (part, block))
            for block in part.blocks.data_blocks():
                if block.exported and block.kind is Kind.DATA:
                    for symbol in block.symbols:
                        known = self._brought.setdefault(symbol.name, (part, block))
                        if _is_tentative(known[1]):
                            self._brought[symbol.name] = part, block
        self._redirects = {r.original: r for r in ledger.journal.redirects}
        self._known: dict[tuple[LoadedModule, str, bool], Bound | None] = {}
        self._stubs: dict[tuple[LoadedModule, str], int] = {}  # of IFUNCs, in position-independent modules
        # What still stands for an undefined function defines nothing.
        stubs = {p.address for p in ledger.journal.placed if p.unit == UNDEFINED}
        self._born = [
            r
            for r in reversed(ledger.journal.redirects)
            if r.born and not r.local and not (r.unit == UNDEFINED and ledger.slots[r.arena][r.index] in stubs)
        ]

    def lives(self, part: Part, variable: Block) -> bool:
        """Tell whether the process has a variable of a unit."""
        return self._variable(part, variable) is not None

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
        if found is None and self._is_missing(name):
            found = self._supply(name)
        if found is None:
            return None
        part, block = found
        return self._units[part.blocks], block

    def _is_missing(self, name: str) -> bool:
        """Tell whether nobody has a definition that somebody needs: a weak reference pulls nothing in."""
        if self._beyond.supply is None:
            return False
        if name not in self._missing:
            has = self._denoted(self._beyond.module, name) is not None
            self._missing[name] = not has and any(_needs(p.blocks, name) for p in self._parts.values())
        return self._missing[name]

    def _supply(self, name: str) -> tuple[Part, Block] | None:
        assert self._beyond.supply is not None
        found = self._beyond.supply.find(name, self._beyond.module, lambda: uses_of(name, self._parts))
        if found is None:
            return None
        if isinstance(found, Bound):
            self._awaited[name] = found
            return None
        part, _ = found
        if part.blocks not in self._parts:
            self._parts[part.blocks] = self._objects[part.blocks.object] = part
            self.unit(part, ())
            self.supplied.append(part)
        self._brought[name] = found
        self._missing[name] = False
        return found

    # --- blocks of the object ---------------------------------------------------------------------------------

    def _resident(self, part: Part) -> Callable[[Block], Bound | None]:
        def resident(block: Block) -> Bound | None:
            if block.kind is Kind.CODE:
                return self._function(part, block)
            if block.kind is Kind.READ_ONLY:
                matched = part.matched(block)
                address = part.delta.bindings.get(matched) if matched is not None and matched.symbols else None
                return Bound(address) if address is not None and not _labels_of_new_code(part, block) else None
            found = self._variable(part, block)
            if found is not None:
                _check_labels(part, block)
            return found

        return resident

    def _function(self, part: Part, block: Block) -> Bound | None:
        if part.is_new(block):
            return self._elsewhere(part, block) if part.supplied else None
        interposed = self._interposed(part, block)
        if interposed is not None and interposed.function:
            return self._entry(interposed.address)
        live = part.live(block)
        if live is None:
            return None
        return self._entry(live.address)

    def _elsewhere(self, part: Part, block: Block) -> Bound | None:
        """Return the process's own definition of what a supplied object defines too, None when it has none."""
        live = part.live(block)
        if live is not None and live.redirect is not None and live.redirect.unit == UNDEFINED:
            return None  # found at last
        if part.status(block) is Status.CHANGED and not is_private_piece(block.name):
            raise UnsafeChange(
                f"`{block.name}` of {part.source} is needed together with what is missing, and what process "
                f"{self.image.target.pid} has of that name is another one",
                f"it was linked from another build: give what it was linked from, or apply {part.source} itself",
                code="mismatch",
            )
        for symbol in block.symbols if part.unit.born else ():
            if not symbol.local and self._is_defined_in(part.module, symbol.name):
                return self._denoted(part.module, symbol.name)
        return None

    def _is_defined_in(self, module: LoadedModule, name: str) -> bool:
        """Tell whether a module, or an earlier generation, has a definition: another module's would be preempted."""
        if self._from_earlier_generation(module, name) is not None:
            return True
        definition = self.image.search(name, module)
        return definition is not None and definition.module is module

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
        if block.kind is Kind.THREAD_LOCAL:
            interposed = self._interposed(part, block)
            if interposed is not None and interposed.thread_local:
                return self._thread_local(interposed)
        matched = part.matched(block)
        address = part.delta.bindings.get(matched) if matched is not None else None
        if address is None and part.unit.born and block.exported and block.kind is not Kind.THREAD_LOCAL:
            there = self._elsewhere(part, block)
            if there is not None:
                return there
        if address is None:
            found = self._find_variable(part, block)
            if found is None:
                self._check_tentative(part, block)
                return None
            if found.size and block.size and found.size != block.size:
                raise UnsafeChange(
                    f"`{base_name(block.name)}` has {block.size} bytes in {part.source}, "
                    f"but {found.size} in the process",
                    "its type changed, and the program's data has the old one: restart the program, or keep the size",
                    code="layout",
                )
            address = found.address
        if block.kind is not Kind.THREAD_LOCAL:
            return Bound(address)
        return self._in_thread_block(part.module, address, block.name)

    def _check_tentative(self, part: Part, block: Block) -> None:
        """Refuse a new common symbol that ld would merge with a definition elsewhere."""
        for symbol in block.symbols:
            other = self._defined_elsewhere(part, block, symbol.name) if symbol.common else ""
            if other:
                raise UnsafeChange(
                    f"`{symbol.name}` is new and without an initial value in {part.source}, and {other} defines it",
                    "declare it `extern`, or compile with -fno-common",
                    code="tentative",
                )

    def _defined_elsewhere(self, part: Part, block: Block, name: str) -> str:
        brought = self._brought.get(name)
        if brought is not None and brought[1] is not block:
            return brought[0].blocks.object.name
        supply = self._beyond.supply
        found = supply.defining(name, part.module) if supply is not None else None
        proper = found is not None and any(s.name == name and not s.common for s in found.symbols)
        return found.name if found is not None and proper else ""

    def _find_variable(self, part: Part, block: Block) -> LiveVariable | None:
        interposed = self._interposed(part, block)
        if interposed is not None and not interposed.function and not interposed.thread_local:
            return LiveVariable(interposed.name, interposed.address, interposed.size)
        if not numbered(block.name):
            return next(iter(candidates(part.unit, block)), None)
        return find_static(part, block)

    # --- names the object does not define -----------------------------------------------------------------------

    def resolve(self, blocks: Blocks, external: External) -> Bound | None:
        part = self._parts[blocks]
        found = self._denoted(part.module, external.name, weak=external.weak)
        if found is None:
            return self._awaited.get(external.name)
        stub = self._stubs.get((part.module, external.name))
        if stub is not None and _takes_directly(part, external.name):
            return Bound(stub, found.call or found.address)
        return found

    def _denoted(self, module: LoadedModule, name: str, *, weak: bool = False) -> Bound | None:
        """Return what a name denotes for a unit of a module, in the process or already in this generation."""
        key = (module, name, weak)
        if key not in self._known:
            self._known[key] = self._look_up(module, name, weak)
        return self._known[key]

    def _look_up(self, module: LoadedModule, name: str, weak: bool) -> Bound | None:
        earlier = self._from_earlier_generation(module, name)
        if earlier is not None:
            return earlier
        if name == MODULE_BASE:
            return self._module_base(module)
        definition = self.image.resolve(name, module, weak=weak)
        if definition is None:
            return self._beyond.defined.get(name) or self._born_elsewhere(name)
        return replace(self._defined(module, definition), size=definition.size)

    def _defined(self, module: LoadedModule, definition: Definition) -> Bound:
        if definition.thread_local:
            return self._thread_local(definition)
        if definition.ifunc:
            return self._chosen_function(module, definition)
        if definition.function:
            return self._external_function(module, definition)
        return Bound(definition.address)

    def _external_function(self, module: LoadedModule, definition: Definition) -> Bound:
        entry = self._entry(definition.address)
        canonical = self.image.canonical_plt(definition.name) if definition.module is not module else None
        if canonical is None:
            return entry
        return Bound(canonical, entry.call or definition.address)

    def _chosen_function(self, module: LoadedModule, definition: Definition) -> Bound:
        """Return an IFUNC's implementation, with the address that stands for it where code takes that."""
        chosen = self._entry(self._chosen(definition))
        if definition.module is not module:
            stub = self.image.canonical_plt(definition.name)
        else:
            stub = self.image.chosen_stub(definition)
            if stub is not None and module.module.position_independent:
                # In tables and cells the linker of such a module puts the implementation itself.
                self._stubs[module, definition.name] = stub
                return chosen
        return chosen if stub is None else Bound(stub, chosen.call or chosen.address)

    def _chosen(self, definition: Definition) -> int:
        if self.image.chosen(definition) is None and self.image.stub_area is None:
            raise NeedsArena
        return self.image.choose(definition)

    def _thread_local(self, definition: Definition) -> Bound:
        return self._in_thread_block(definition.module, definition.address, definition.name)

    def _in_thread_block(self, module: LoadedModule, offset: int, name: str) -> Bound:
        """Return what is at an offset of a module's thread-local block, wherever each thread has that."""
        base = self.image.thread_block(module)
        if base is not None:
            return Bound(base + offset, thread_local=True)
        return Bound(offset, thread_local=True, module_id=self._module_number(module, name))

    def _module_base(self, module: LoadedModule) -> Bound:
        # Where the block is static, offsets from this base are made offsets from the thread pointer.
        static = self.image.thread_block(module) is not None
        return Bound(0, thread_local=True, module_id=0 if static else self._module_number(module, MODULE_BASE))

    def _module_number(self, module: LoadedModule, name: str) -> int:
        number = self.image.thread_module(module)
        if number is None:
            raise _nowhere(name, module)
        return number

    def _born_elsewhere(self, name: str) -> Bound | None:
        """Return what only a patch of another module has brought: its functions and its constants."""
        for redirect in self._born:
            if name in redirect.names:
                return Bound(redirect.original)
        for placed in reversed(self.ledger.journal.placed):
            if placed.kind == "read-only" and not placed.local and name in placed.names:
                return Bound(placed.address)
        return None

    def _from_earlier_generation(self, module: LoadedModule, name: str) -> Bound | None:
        for redirect in self._born:
            if name in redirect.names and redirect.module == module.path:
                return Bound(redirect.original)
        for placed in reversed(self.ledger.journal.placed):
            if placed.kind == "data" and not placed.local and name in placed.names:
                return Bound(placed.address)
        return None
