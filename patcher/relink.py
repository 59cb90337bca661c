"""From what changed to a generation ready to commit: residents, doors, islands, displaced copies, records.

Joins the verdicts of `match` with the pure linker: says where each block of an object already is in the
process, what an external name denotes there, and which functions are entered through an island. Reads the
target (to resolve an IFUNC it may ask the target's own resolver), and writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain, count

from patcher.blocks import Block, Kind, Place
from patcher.code.entry import (
    COPY_SIZE,
    Displaced,
    NotDetourable,
    behind_function,
    displaced_copy,
    plan_entry,
)
from patcher.constructors import Starter, belonging, touched
from patcher.convention import Registers
from patcher.data.constants import Constant, unbound_constants
from patcher.data.counterparts import is_made
from patcher.data.holders import Extent, Holders
from patcher.data.initial import Changed, Initials, first_value
from patcher.data.known import Description, Found, is_scoped
from patcher.data.migrate import ByFunction, ByMoves, How, Migration, migrations, require_users, users
from patcher.data.names import spelling
from patcher.data.outcome import Datum, Fate
from patcher.data.still_used import give_up
from patcher.data.strings import texts_left
from patcher.data.threads import NewThreadLocals
from patcher.data.writing import DataDelta, Writing, data_delta
from patcher.elf import SymbolBinding
from patcher.errors import LinkError, TargetBusy, UnsafeChange
from patcher.image import Image, LoadedModule
from patcher.labels import Kept
from patcher.link.place import ArenaFull, Placement, Region, Space, place
from patcher.link.plan import Bound, Plan, plan
from patcher.linkage import Beyond, Linkage, Supply, is_chosen
from patcher.live import THREAD_LOCAL, UNDEFINED, LiveFunction, base_name, thread_number
from patcher.match import Status
from patcher.part import Part
from patcher.patch.arena import DOOR_SIZE, SLOT_COUNT, Arena, Usage
from patcher.patch.commit import Choice, Commit, Constructor, Fill, ThreadValue
from patcher.patch.journal import (
    Allocation,
    Body,
    GenerationRecord,
    Initial,
    Placed,
    Redirect,
    Rewrite,
    Storage,
    Stretch,
    without,
)
from patcher.patch.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Replaced:
    """A function whose old body some thread may still be in: the extents of that body."""

    name: str
    extents: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Linked:
    """A generation that is linked; nothing of it is in the process yet."""

    commit: Commit
    data: tuple[Datum, ...]  # what becomes of variables
    used: tuple[tuple[str, str], ...] = ()  # variables that new code goes on using: name, file
    supplied: tuple[Part, ...] = ()  # the parts that came in because something was missing
    kept: tuple[str, ...] = ()  # functions that could not be entered anew, and are as they were
    told: tuple[Changed, ...] = ()  # the variables whose initialiser changed, and that keep their value


def link_generation(
    image: Image,
    ledger: Ledger,
    parts: Sequence[Part],
    threads: NewThreadLocals,
    waiting: Sequence[Part] = (),
    supply: Supply | None = None,
    initials: Initials | None = None,
) -> Linked:
    """Link every part's changed functions as one generation.

    `threads` gets the new thread-locals, whose storage is to be loaded before the generation is linked for good.
    `waiting`: units whose new functions nobody called so far; they are placed when something now does. `supply` is
    asked for what is still missing then; `initials` says which variables are to be initialised again.
    Raises `LinkError` and its kin, `UnsafeChange`, and `NeedsArena`.
    """
    linker = _Generation(image, ledger, supply, threads, initials or Initials())
    modules = dict.fromkeys(p.module for p in parts)
    for module in modules:
        linker.link(module, [p for p in parts if p.module is module], [p for p in waiting if p.module is module])
    return linker.finish(parts)


def data_of_idle(image: Image, ledger: Ledger, parts: Sequence[Part], initials: Initials) -> DataDelta:
    """Return what units without new code change of the data that the process has."""
    found = DataDelta()
    for module in dict.fromkeys(p.module for p in parts):
        own = [p for p in parts if p.module is module]
        linkage = Linkage(image, ledger, own, Beyond(module, None, {}, NewThreadLocals(ledger.journal.placed)))
        constants = unbound_constants(image, ledger.view(), own, linkage.constant_of).changed
        found = found.plus(replace(data_delta(own, linkage.address_of, ledger.journal, initials), constants=constants))
    return found


class _Generation:
    def __init__(
        self, image: Image, ledger: Ledger, supply: Supply | None, threads: NewThreadLocals, initials: Initials
    ) -> None:
        self.image = image
        self.ledger = ledger
        self.supply = supply
        self.threads = threads
        self.asked = initials
        self.initials: list[Initial] = []
        self.data_writes: list[tuple[int, bytes]] = []
        self.rewrites: list[Rewrite] = []
        self.told: list[Changed] = []
        self.defined: dict[str, Bound] = {}  # by the modules that were linked before
        self.choices: list[Choice] = []
        self.constructors: list[tuple[int, Constructor]] = []
        self.supplied: list[Part] = []
        self.number = max(ledger.journal.next_number, ledger.least_number)
        self.writes: list[tuple[int, bytes]] = []
        self.usages: dict[int, Usage] = {}  # of the arenas that something was put into
        self.bodies: list[tuple[int, int, int]] = []
        self.statuses: list[tuple[str, str, str]] = []
        self.placed: list[Placed] = []
        self.redirects: list[Redirect] = []
        self.replaced: list[Replaced] = []
        self.quiet: list[Body] = []
        self.quiet_back: list[Body] = []
        self.data: list[Datum] = []
        self.used: dict[tuple[str, str], None] = {}
        self.allocations: dict[str, Allocation] = {}
        self.storages: list[Storage] = []
        self.stretches: list[Stretch] = []
        self.fills: list[Fill] = []
        self.threads_written: list[ThreadValue] = []
        self.constants: list[Constant] = []  # that are other than they were
        self.out_of_use: list[Extent] = []  # old code that nothing enters once the generation is live

    def finish(self, parts: Sequence[Part]) -> Linked:
        known = self.ledger.journal.chosen
        self._give_up_old_storage()
        self.data += texts_left(self.image, self.ledger.view(), parts, self.constants)
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
            chosen=tuple((m, at, to) for (m, at), to in self.image.asked.items() if (m, at) not in known),
            initials=tuple(self.initials),
            rewrites=tuple(self.rewrites),
            storages=tuple(self.storages),
            stretches=tuple(self.stretches),
        )
        constructors = tuple(c for _, c in sorted(self.constructors, key=lambda found: found[0]))
        commit = Commit(
            record,
            tuple(self.writes),
            tuple(self.usages.items()),
            tuple(self.choices),
            constructors,
            tuple(self.data_writes),
            tuple(self.fills),
            tuple(self.threads_written),
        )
        kept = tuple(name for part in parts for name in part.kept)
        return Linked(
            commit,
            tuple(self.data),
            tuple(self.used),
            tuple(self.supplied),
            kept,
            told=tuple(self.told),
        )

    def link(self, module: LoadedModule, parts: list[Part], waiting: list[Part]) -> None:
        _keep_twins(parts)
        while True:
            try:
                return self._link(module, parts, waiting)
            except Kept:
                continue

    def _link(self, module: LoadedModule, parts: list[Part], waiting: list[Part]) -> None:
        homes = self._homes(module)
        first = next(homes)  # chosen now: to resolve a symbol, a function of the target may have to be called
        beyond = Beyond(module, self.supply, self.defined, self.threads)
        linkage = Linkage(self.image, self.ledger, (*parts, *waiting), beyond)
        renewed = self._renewed(linkage, parts, waiting)
        starts = {part: _start(part, linkage) for part in parts}
        wanted = {part: tuple(b for b in part.wanted() if b not in starts[part].left) for part in parts}
        wanted |= {part: part.required_doors() for part in waiting}
        for migration in renewed:
            if isinstance(migration.how, ByFunction):
                wanted[migration.how.part] = (*wanted[migration.how.part], migration.how.function)
        writing = self._writing(linkage, (*parts, *waiting))
        wanted = {part: (*blocks, *writing.copies(part)) for part, blocks in wanted.items()}
        found = _planned(linkage, wanted, starts)
        for block in found.code:
            if linkage.part_of(block).supplied:
                _check_end(block)
            if is_chosen(block):
                _check_resolver(linkage.part_of(block), block)
        full: ArenaFull | None = None
        for home in chain((first,), homes):  # a further arena is planned only when it is wanted
            try:
                return self._settle(home, found, linkage, writing)
            except ArenaFull as error:
                full = error
        assert full is not None
        raise full

    def _writing(self, linkage: Linkage, parts: Sequence[Part]) -> Writing:
        """Return what becomes of initialisers and constants that changed; unchanged constants stay where they are."""
        data = data_delta(parts, linkage.address_of, self.ledger.journal, self.asked)
        constants = unbound_constants(self.image, self.ledger.view(), parts, linkage.constant_of)
        for _, block, address in constants.same:
            linkage.keep_in_place(block, address)
        for constant in constants.changed:
            if constant.in_place:
                linkage.keep_in_place(constant.block, constant.address)
        return Writing(replace(data, constants=constants.changed))

    def _renewed(self, linkage: Linkage, parts: list[Part], waiting: list[Part]) -> tuple[Migration, ...]:
        """Return the variables that get new storage, and have all that refers to them new."""
        if not any(part.layouts for part in parts):
            return ()
        concerned = [*parts, *(part for part in waiting if part.carried)]
        found = migrations(
            concerned, linkage.living, linkage.denoted_variable, lambda block: linkage.described(block).function
        )
        linkage.renewed = {m.variable: m for m in found}
        if found:
            require_users([*parts, *waiting], found)
            _keep_twins(parts)
        return found

    def _record_migrations(self, placement: Placement, linkage: Linkage) -> None:
        renewed = [m for m in linkage.renewed.values() if m.variable in placement.addresses]
        for m in renewed:
            placed = _placed(m.variable, m.part, _KINDS[Kind.DATA], placement.addresses[m.variable])
            start = placed.address
            layout, types = (m.layout.as_text(), m.layout.types) if m.layout is not None else ("", ())
            where = (placed.module, placed.unit, placed.local, start, placed.size, m.old.address, m.old.size)
            self.storages.append(Storage(m.name, m.names(placed.names), *where, types, layout, m.how.name))
            fill = Fill(m.name, m.part.source, start, placed.size, m.old.address, m.old.size)
            self.fills.append(_filled_by(fill, m.how, placement))
            self.data.append(Datum(m.name, m.part.source, Fate.MIGRATED, m.note))
        for part in dict.fromkeys(linkage.part_of(b) for b in placement.addresses) if renewed else ():
            self._record_out_of_use(part)
            for block in users(part, renewed):
                if block in placement.addresses:
                    start = placement.addresses[block]
                    self.quiet_back.append(Body(block.name, start, start + block.size))

    def _record_out_of_use(self, part: Part) -> None:
        for block in part.blocks.functions:
            live = part.live(block)
            if live is not None and part.is_new(block):
                self.out_of_use.append(Extent(live.name, live.body, live.body + live.size))

    def _give_up_old_storage(self) -> None:
        """Have no thread in the old code that refers to old storage; refuse it if other code does as well."""
        if not self.fills:
            return
        replaced = [Extent(r.name, *extent) for r in self.replaced for extent in r.extents]
        holders = Holders(self.image, self.ledger.view(), [*replaced, *self.out_of_use])
        for fill in self.fills:
            using = give_up(holders, fill.name, fill.old, fill.old + fill.old_size)
            self.quiet += [Body(e.name, e.start, e.end) for e in using]

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

    def _settle(self, home: _Home, found: Plan, linkage: Linkage, writing: Writing) -> None:
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
        space, placement = self._place(home.bodies, found, space, islands, originals, linkage)
        self.writes += [(copy.address, copy.code) for copy in copies]
        self._allocate_copies(copies, near.start, linkage)
        self.quiet += [_body(e.live) for e in entries if e.displaced.reentries]
        self._record(found, placement, doors, {copy.block: copy for copy in copies}, linkage)
        self._record_constructors(doors, placement)
        self._record_data(writing, placement)
        self._record_thread_values(writing, placement, linkage)
        self._record_migrations(placement, linkage)
        self._record_stretches(found, space, placement, linkage)
        self._use(home, placement.space, end, [d.index for d in doors if d.fresh])
        placed = {block.object for block in found.placed}
        self.supplied += [p for p in linkage.supplied if p.blocks.object in placed or p.unit.key == UNDEFINED]

    def _place(
        self,
        arena: Arena,
        found: Plan,
        space: Space,
        islands: dict[Block, int],
        originals: dict[Block, int],
        linkage: Linkage,
    ) -> tuple[Space, Placement]:
        """Place a plan into memory that was freed, if there is enough in one piece, or into `space`."""
        # What may run before the generation is live may hand out addresses, also should it then not become live.
        early = linkage.renewed or any(self._starts_something(linkage.part_of(b), b) for b in found.code)
        free = [] if early else self._free_in(arena)
        for reused in _reused(space, free, arena.code_start, found):
            with suppress(ArenaFull):
                return reused, place(found, reused, islands, originals)
        return space, place(found, space, islands, originals)

    @staticmethod
    def _starts_something(part: Part, block: Block) -> bool:
        return bool(part.starters) or is_chosen(block)

    def _free_in(self, arena: Arena) -> list[tuple[int, int]]:
        own = sorted((s.start, s.end) for s in self.stretches)
        usage = self._usage(arena)
        return without([h for h in self.ledger.journal.free if arena.has_used(*h, usage)], own)

    def _record_stretches(self, found: Plan, before: Space, placement: Placement, linkage: Linkage) -> None:
        """Note which memory this took, and what in other stretches its code refers to."""
        arenas = tuple(self.ledger.arenas.values())
        bound = [b for b in (*found.bound.values(), *found.externals.values()) if isinstance(b, Bound)]
        addresses = {b.address for b in bound if not b.thread_local}
        used = tuple(sorted(a for a in addresses if any(arena.contains(a) for arena in arenas)))
        names = {source: linkage.part_with(source).name for source in placement.accounts}
        accounts = [(names[source], account) for source, account in placement.accounts.items()]
        constants = tuple(Allocation(n, read_only=a.read_only, cells=a.cells) for n, a in accounts)
        text = tuple(Allocation(n, text=a.text, islands=a.jumps) for n, a in accounts)
        start = before.read_only.start
        if placement.space.read_only.start > start:
            self.stretches.append(Stretch(self.number, start, placement.space.read_only.start, used, constants))
            used = (*used, start)
        if placement.space.code.start > before.code.start:
            self.stretches.append(Stretch(self.number, before.code.start, placement.space.code.start, used, text))

    def _usage(self, arena: Arena) -> Usage:
        return self.usages.get(arena.base) or self.ledger.usages[arena.base]

    def _use(self, home: _Home, space: Space, end_of_copies: int, doors: Sequence[int]) -> None:
        """Note how far arenas are in use now."""
        entries = self._usage(home.entries)
        self.usages[home.entries.base] = replace(
            entries, code=end_of_copies, slots=max([entries.slots, *(index + 1 for index in doors)])
        )
        bodies = self._usage(home.bodies)
        self.usages[home.bodies.base] = replace(
            bodies,  # which end below what was placed, unless that is in memory that was freed
            read_only=max(bodies.read_only, space.read_only.start),
            code=max(bodies.code, space.code.start),
            data=space.data.start,
        )

    def _doors(self, arena: Arena, found: Plan, linkage: Linkage) -> list[_Door]:
        free = self._free_slots(arena)
        doors, following = [], 0
        for block in found.code:
            if block not in found.doors:
                continue
            part = linkage.part_of(block)
            live = part.live(block)
            if live is not None and live.redirect is not None:
                home = self.ledger.arenas[live.redirect.arena]
                doors.append(_Door(block, part, live, home, live.redirect.index, False))
                continue
            following = next(free)
            doors.append(_Door(block, part, live, arena, following, True))
        if following >= SLOT_COUNT:
            raise ArenaFull(f"the arena at {arena.base:#x} has no slot left", "restart the program")
        return doors

    def _free_slots(self, arena: Arena) -> Iterator[int]:
        """Yield the slots that no function has: those that were given back, and then those that none had yet."""
        taken = {r.index for r in (*self.ledger.journal.redirects, *self.redirects) if r.arena == arena.base}
        slots = self.ledger.slots[arena.base]
        yield from (i for i, body in enumerate(slots) if i and not body and i not in taken)
        yield from count(self._usage(arena).slots)

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
                if door.part.status(door.block) is not Status.SAME or door.part.is_required(door.block):
                    raise
                door.part.keep(door.block)
                kept = True
        if kept:
            raise Kept
        return entries

    def _entry(self, door: _Door, live: LiveFunction) -> _Entry:
        extent = max(door.part.unit.extent(live.address), live.size)
        ahead = self.image.target.memory.read(live.address, min(extent, live.size + 16))
        siblings = [(piece.body, piece.code) for piece in door.part.cold_pieces(door.block)]
        following = behind_function(ahead[live.size :], live.address + extent)
        table = door.part.module.offset_table
        displaced = plan_entry(live.name, ahead, live.address, live.size, following, siblings, table=table)
        return _Entry(door.block, live, ahead, displaced)

    def _record(
        self,
        found: Plan,
        placement: Placement,
        doors: list[_Door],
        copies: dict[Block, _Copy],
        linkage: Linkage,
    ) -> None:
        self.writes += placement.writes
        self._keep_registers(doors, placement)
        for door in doors:
            self._record_door(door, placement.addresses[door.block], copies.get(door.block))
        for block in found.placed:
            if block.symbols:
                part = linkage.part_of(block)
                address = placement.addresses[block]
                said = linkage.described(block) if _is_described(block) else Description()
                self.placed.append(_placed(block, part, _KINDS[block.kind], address, said))
                if block.kind is not Kind.CODE:
                    self._define(block, Bound(address))
                if block.kind is Kind.DATA:
                    self.initials.append(first_value(part, block, address))
                if block.kind is Kind.DATA and not part.supplied and block not in linkage.renewed:
                    self._tell(block, part, Fate.ADDED)
        self._record_thread_locals(found, placement, linkage)
        for block, known in linkage.found.items():
            if block in found.bound:
                self._record_found(block, known, linkage)
        for block in found.bound:
            if block.symbols and block.kind in (Kind.DATA, Kind.THREAD_LOCAL) and block not in linkage.thread_locals:
                self.used[spelling(block.name).source, linkage.part_of(block).source] = None
        for source, account in placement.accounts.items():
            sizes = asdict(account)
            self._allocate(linkage.part_with(source), islands=sizes.pop("jumps"), **sizes)

    def _record_found(self, block: Block, known: Found, linkage: Linkage) -> None:
        """Keep where a variable is that is declared otherwise than before: its own records have another name."""
        part = linkage.part_of(block)
        address = known.variable.address
        said = linkage.described(block)
        told = known.fate is Fate.MOVED and part.unit.has_moved(address, block.name, said.function)
        if known.shifted or (known.fate is Fate.MOVED and not told):
            self.placed.append(_placed(block, part, _KINDS[Kind.DATA], address, said, moved=True))
        if not told:
            self._tell(block, part, known.fate, known.note)

    def _tell(self, block: Block, part: Part, fate: Fate | None, note: str = "") -> None:
        said = spelling(block.name)
        if fate is not None and not said.guard:
            self.data.append(Datum(said.source, part.source, fate, note))

    def _record_thread_locals(self, found: Plan, placement: Placement, linkage: Linkage) -> None:
        for block, part in linkage.thread_locals.items():
            if block not in found.bound:
                continue
            bound, image = found.bound[block], linkage.images.get(block)
            self.threads.fill(block, block.data if image is None else _contents(placement, image))
            place = thread_number(bound.address, bound.module_id)
            self.placed.append(_placed(block, part, THREAD_LOCAL, place))
            self.initials.append(first_value(part, block, place))
            self._define(block, bound)
            if not part.supplied:
                self._tell(block, part, Fate.ADDED, "each thread has its own")

    def _record_data(self, writing: Writing, placement: Placement) -> None:
        """Note what is written into live data with the flip, and what is told of data that keeps its value."""
        written = writing.writes(placement.addresses, placement.writes)
        self.data_writes += written
        constants = {c.address for c in writing.data.rewritten}
        for address, new in written:
            if address in constants:
                old = self.image.target.memory.read(address, len(new))
                home = self.image.module_at(address)
                module = home.path if home is not None else ""
                self.rewrites.append(Rewrite(address, old.hex(), new.hex(), module))
        self.data += [c.datum() for c in writing.data.constants if c.holders]
        self.constants += writing.data.constants
        self.initials += [c.as_record(written=True) for c in writing.data.renewed]
        own = [c for c in writing.data.renewed if c.block.kind is not Kind.THREAD_LOCAL]
        self.data += [c.datum(Fate.REINITIALISED) for c in own]
        news = self.asked.news(writing.data.kept, self.ledger.journal)
        self.initials += self.asked.to_record(writing.data.kept, self.ledger.journal)
        self.data += [c.datum(Fate.KEPT) for c in news]
        self.told += writing.data.kept

    def _record_thread_values(self, writing: Writing, placement: Placement, linkage: Linkage) -> None:
        """Note what each thread's own variables become, and what threads to come start with."""
        for changed, there, new in writing.thread_values(linkage.thread_place, placement.addresses, placement.writes):
            value = ThreadValue(changed.name, changed.part.source, there.offset, there.module_id, new)
            self.threads_written.append(value)
            kept = new[: there.image_size]
            if kept:
                self.data_writes.append((there.image, kept))
            datum = changed.datum(Fate.REINITIALISED)
            said = "in every thread; threads to come start with " + ("zeros" if any(new[len(kept) :]) else "it")
            self.data.append(replace(datum, note=f"{datum.note} {said}".strip()))

    def _record_constructors(self, doors: list[_Door], placement: Placement) -> None:
        for part in dict.fromkeys(door.part for door in doors):
            for starter in part.starters:
                function = starter.function
                if part.status(function) is Status.ADDED and function in placement.addresses:
                    constructor = Constructor(function.name, part.name, placement.addresses[function])
                    self.constructors.append((starter.priority, constructor))

    def _allocate_copies(self, copies: Sequence[_Copy], start: int, linkage: Linkage) -> None:
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
        pieces = tuple((piece.body, piece.body + piece.size) for piece in part.cold_pieces(block))
        if live is not None:
            self.replaced.append(Replaced(live.name, ((live.body, live.body + live.size), *pieces)))
        if not door.fresh:
            return
        if door.index >= self._usage(door.arena).slots:
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
                pieces=pieces if live is not None else (),
                copied=len(copy.code) if copy is not None else 0,
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


def _start(part: Part, linkage: Linkage) -> _Start:
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


def _planned(linkage: Linkage, wanted: dict[Part, tuple[Block, ...]], starts: dict[Part, _Start]) -> Plan:
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
        for block, image in linkage.images.items():
            if image not in placed:
                part = linkage.thread_locals[block]
                missing[part] = (*missing.get(part, ()), image)
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


_STATUSES = {
    Status.CHANGED: "changed",
    Status.ADDED: "added",
    Status.SAME: "relinked",
    Status.LINE_ONLY: "changed",
}


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


def _contents(placement: Placement, block: Block) -> bytes:
    """Return the bytes of a block as they are linked."""
    start = placement.addresses[block]
    return next(data[start - at :][: block.size] for at, data in placement.writes if at <= start < at + len(data))


def _reused(space: Space, free: Sequence[tuple[int, int]], code_start: int, found: Plan) -> Iterator[Space]:
    """Yield spaces that have code and constants where something was freed: the closest fit first, then the largest."""
    code = [hole for hole in free if hole[0] >= code_start]
    constants = [hole for hole in free if hole[0] < code_start]
    sizes = [sum(b.size + max(b.alignment, 16) for b in blocks) for blocks in (found.code, found.read_only)]
    tried: set[Space] = {space}
    for choose in (min, max):
        at = [_hole(holes, size, choose) for holes, size in zip((code, constants), sizes, strict=True)]
        reused = replace(space, code=at[0] or space.code, read_only=at[1] or space.read_only)
        if reused not in tried:
            tried.add(reused)
            yield reused


def _hole(holes: Sequence[tuple[int, int]], size: int, choose: Callable[..., tuple[int, int]]) -> Region | None:
    fitting = [hole for hole in holes if hole[1] - hole[0] >= size]
    return Region(*choose(fitting, key=lambda hole: hole[1] - hole[0])) if fitting else None


def _filled_by(fill: Fill, how: How, placement: Placement) -> Fill:
    if isinstance(how, ByMoves):
        return replace(fill, moved=how.moved)
    called = replace(fill, by=how.name, function=placement.addresses[how.function])
    return replace(called, count=how.count, new_step=how.new_step, old_step=how.old_step)


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
        displaced = entry.ahead[: entry.displaced.length]
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


def _is_described(block: Block) -> bool:
    """Tell whether a later session needs to know what debug information says of a block."""
    declared = block.kind is Kind.READ_ONLY and is_scoped(block) and not is_made(block.name)
    return block.kind is Kind.DATA or declared


_KINDS = {Kind.CODE: "code", Kind.READ_ONLY: "read-only", Kind.DATA: "data"}


def _placed(
    block: Block, part: Part, kind: str, address: int, said: Description | None = None, *, moved: bool = False
) -> Placed:
    said = said or Description()
    depth, order = said.position or (-1, -1)
    return Placed(
        name=block.name,
        names=tuple(dict.fromkeys(s.name for s in block.symbols)),
        kind=kind,
        module=part.module.path,
        unit=part.unit.key_of(block),
        local=not block.exported,
        address=address,
        size=block.size,
        type=said.type,
        scope=said.function,
        moved=moved,
        depth=depth,
        order=order,
    )
