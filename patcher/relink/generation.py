"""Linking a generation: what is wanted of each part, planned, settled somewhere, and noted.

Reads the target (to resolve an IFUNC it may ask the target's own resolver), and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from patcher.blocks import Block, Place
from patcher.data.constants import unbound_constants
from patcher.data.initial import Initials
from patcher.data.migrate import ByFunction, Migration, migrations, require_users, started_anew
from patcher.data.threads import NewThreadLocals
from patcher.data.writing import DataDelta, Writing, data_delta
from patcher.errors import LinkError
from patcher.image import Image, LoadedModule
from patcher.labels import Kept
from patcher.link.place import ArenaFull, Region
from patcher.link.plan import Plan, plan
from patcher.linkage import Beyond, Linkage, Supply, is_chosen
from patcher.match import Status
from patcher.part import Part
from patcher.patch.ledger import Ledger
from patcher.relink.doors import copies_of, doors_of, entries_of
from patcher.relink.draft import Draft, Linked, Settled
from patcher.relink.homes import Home, Homes
from patcher.relink.starting import Start, start_of


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
    return linker.draft.finish(parts)


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
        number = max(ledger.journal.next_number, ledger.least_number)
        self.homes = Homes(ledger, number)
        self.draft = Draft(image, ledger, self.homes, number, threads, initials)

    def link(self, module: LoadedModule, parts: list[Part], waiting: list[Part]) -> None:
        _keep_twins(parts)
        while True:
            try:
                return self._link(module, parts, waiting)
            except Kept:
                continue

    def _link(self, module: LoadedModule, parts: list[Part], waiting: list[Part]) -> None:
        homes = self.homes.of(module)
        first = next(homes)  # chosen now: to resolve a symbol, a function of the target may have to be called
        beyond = Beyond(module, self.supply, self.draft.defined, self.threads)
        linkage = Linkage(self.image, self.ledger, (*parts, *waiting), beyond)
        renewed = self._renewed(linkage, parts, waiting)
        starts = {part: start_of(part, linkage) for part in parts}
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
        data = data_delta(parts, linkage.address_of, self.ledger.journal, self.asked, linkage.renewed)
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
        found = tuple(started_anew(m) if self.asked.names(m.part, m.variable) else m for m in found)
        linkage.renewed = {m.variable: m for m in found}
        if found:
            require_users([*parts, *waiting], found)
            _keep_twins(parts)
        return found

    def _settle(self, home: Home, found: Plan, linkage: Linkage, writing: Writing) -> None:
        """Place a plan somewhere and keep what is to be written. Raises `ArenaFull`, leaving everything as it was."""
        doors = doors_of(found, linkage, self.homes, home.entries)
        near = home.entries.entry_space(self.homes.usage(home.entries))
        entries = entries_of(doors, near.start, self.image)
        copies = copies_of(entries, near)
        end = copies[-1].end if copies else near.start
        space = home.bodies.space(self.homes.usage(home.bodies))
        if home.bodies is home.entries:
            space = replace(space, code=Region(end, max(end, space.code.end)))
        islands = {d.block: d.arena.island(d.index) for d in doors}
        originals = {d.block: d.live.address for d in doors if d.live is not None}
        early = bool(linkage.renewed) or any(_starts_something(linkage.part_of(b), b) for b in found.code)
        space, placement = self.homes.place(home.bodies, found, space, islands, originals, early=early)
        settled = Settled(found, placement, tuple(doors), tuple(entries), tuple(copies), near.start)
        self.draft.add(settled, linkage, writing)
        self.homes.record_stretches(found, space, placement, linkage)
        self.homes.use(home, placement.space, end, [d.index for d in doors if d.fresh])


def _starts_something(part: Part, block: Block) -> bool:
    return bool(part.starters) or is_chosen(block)


def _planned(linkage: Linkage, wanted: dict[Part, tuple[Block, ...]], starts: dict[Part, Start]) -> Plan:
    """Plan what is wanted; a unit that comes in with something brings its initialisers."""
    while True:
        units = [linkage.unit(part, blocks) for part, blocks in wanted.items()]
        found = plan(units, linkage.resolve, linkage.provide)
        placed = set(found.placed)
        for part in dict.fromkeys(linkage.part_of(block) for block in found.placed):
            if part not in starts:
                starts[part] = start_of(part, linkage)
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
