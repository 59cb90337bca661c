"""DRAFT: what a generation is made of, written down module by module as it is settled, and its record in the end.

Decides what of a linked module the journal, the flip and the user have to know; where everything is has been decided
before. Reads what the target has where it is going to be overwritten, and writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from patcher.blocks import Block, Kind
from patcher.convention import Registers
from patcher.data.constants import Constant
from patcher.data.counterparts import is_made
from patcher.data.holders import Extent, Holders
from patcher.data.initial import Changed, Initials, carried_value, first_value
from patcher.data.known import Description, Found, is_scoped
from patcher.data.migrate import ByMoves, How, users
from patcher.data.names import spelling
from patcher.data.outcome import Datum, Fate
from patcher.data.still_used import give_up
from patcher.data.strings import texts_left
from patcher.data.threads import NewThreadLocals
from patcher.data.writing import Writing
from patcher.image import Image
from patcher.link.place import Placement
from patcher.link.plan import Bound, Plan
from patcher.linkage import Linkage, is_chosen
from patcher.live import THREAD_LOCAL, UNDEFINED, LiveFunction, thread_number
from patcher.match import Status
from patcher.part import Part
from patcher.patch.arena import DOOR_SIZE
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
)
from patcher.patch.ledger import Ledger
from patcher.relink.doors import Copy, Door, Entry
from patcher.relink.homes import Homes


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


@dataclass(frozen=True, slots=True)
class Settled:
    """One module's share of a generation, with addresses; the copies of displaced entries begin at `start`."""

    found: Plan
    placement: Placement
    doors: tuple[Door, ...]
    entries: tuple[Entry, ...]
    copies: tuple[Copy, ...]
    start: int


class Draft:
    """What one generation is made of."""

    def __init__(
        self, image: Image, ledger: Ledger, homes: Homes, number: int, threads: NewThreadLocals, initials: Initials
    ) -> None:
        self.image = image
        self.ledger = ledger
        self.homes = homes
        self.threads = threads
        self.asked = initials
        self.number = number
        self.defined: dict[str, Bound] = {}  # by the modules that were linked before
        self.initials: list[Initial] = []
        self.data_writes: list[tuple[int, bytes]] = []
        self.rewrites: list[Rewrite] = []
        self.told: list[Changed] = []
        self.choices: list[Choice] = []
        self.constructors: list[tuple[int, Constructor]] = []
        self.supplied: list[Part] = []
        self.writes: list[tuple[int, bytes]] = []
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
        self.fills: list[Fill] = []
        self.threads_written: list[ThreadValue] = []
        self.constants: list[Constant] = []  # that are other than they were
        self.out_of_use: list[Extent] = []  # old code that nothing enters once the generation is live

    def add(self, settled: Settled, linkage: Linkage, writing: Writing) -> None:
        """Note what one module's share writes, and what is to be known of it."""
        found, placement, doors, copies = settled.found, settled.placement, settled.doors, settled.copies
        self.writes += [(copy.address, copy.code) for copy in copies]
        self._allocate_copies(copies, settled.start, linkage)
        self.quiet += [_body(e.live) for e in settled.entries if e.displaced.reentries]
        self._record(found, placement, doors, {copy.block: copy for copy in copies}, linkage)
        self._record_constructors(doors, placement)
        self._record_data(writing, placement)
        self._record_thread_values(writing, placement, linkage)
        self._record_migrations(placement, linkage)
        placed = {block.object for block in found.placed}
        self.supplied += [p for p in linkage.supplied if p.blocks.object in placed or p.unit.key == UNDEFINED]

    def finish(self, parts: Sequence[Part]) -> Linked:
        """Return the generation. Raises `UnsafeChange` when old storage is in use that was to be given up."""
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
            stretches=tuple(self.homes.stretches),
        )
        constructors = tuple(c for _, c in sorted(self.constructors, key=lambda found: found[0]))
        commit = Commit(
            record,
            tuple(self.writes),
            tuple(self.homes.usages.items()),
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

    def _give_up_old_storage(self) -> None:
        """Have no thread in the old code that refers to old storage; refuse it if other code does as well."""
        if not self.fills:
            return
        replaced = [Extent(r.name, *extent) for r in self.replaced for extent in r.extents]
        holders = Holders(self.image, self.ledger.view(), [*replaced, *self.out_of_use])
        for fill in self.fills:
            using = give_up(holders, fill.name, fill.old, fill.old + fill.old_size)
            self.quiet += [Body(e.name, e.start, e.end) for e in using]

    def _record(
        self,
        found: Plan,
        placement: Placement,
        doors: Sequence[Door],
        copies: dict[Block, Copy],
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
                    carried = block in linkage.renewed and linkage.renewed[block].fate is Fate.MIGRATED
                    self.initials += (carried_value if carried else first_value)(part, block, address)
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
            self.initials += first_value(part, block, place)
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
            self.data.append(Datum(m.name, m.part.source, m.fate, m.note))
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

    def _record_constructors(self, doors: Sequence[Door], placement: Placement) -> None:
        for part in dict.fromkeys(door.part for door in doors):
            for starter in part.starters:
                function = starter.function
                if part.status(function) is Status.ADDED and function in placement.addresses:
                    constructor = Constructor(function.name, part.name, placement.addresses[function])
                    self.constructors.append((starter.priority, constructor))

    def _allocate_copies(self, copies: Sequence[Copy], start: int, linkage: Linkage) -> None:
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

    def _keep_registers(self, doors: Sequence[Door], placement: Placement) -> None:
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

    def _record_door(self, door: Door, body: int, copy: Copy | None) -> None:
        block, part, live = door.block, door.part, door.live
        self.bodies.append((door.arena.base, door.index, body))
        if part.unit.key != UNDEFINED:
            self.statuses.append((block.name, part.module.path, _STATUSES[part.status(block)]))
        pieces = tuple((piece.body, piece.body + piece.size) for piece in part.cold_pieces(block))
        if live is not None:
            self.replaced.append(Replaced(live.name, ((live.body, live.body + live.size), *pieces)))
        if not door.fresh:
            return
        if door.index >= self.homes.usage(door.arena).slots:
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


_STATUSES = {
    Status.CHANGED: "changed",
    Status.ADDED: "added",
    Status.SAME: "relinked",
    Status.LINE_ONLY: "changed",
}


def _contents(placement: Placement, block: Block) -> bytes:
    """Return the bytes of a block as they are linked."""
    start = placement.addresses[block]
    return next(data[start - at :][: block.size] for at, data in placement.writes if at <= start < at + len(data))


def _filled_by(fill: Fill, how: How, placement: Placement) -> Fill:
    if isinstance(how, ByMoves):
        return replace(fill, moved=how.moved)
    called = replace(fill, by=how.name, function=placement.addresses[how.function])
    return replace(called, count=how.count, new_step=how.new_step, old_step=how.old_step)


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
