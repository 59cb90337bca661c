"""The state of a patched process: its arenas, its journal and its slots, read together and changed together.

A ledger is a view that is read again before every transaction, since another controller may have been there.
Decides what a commit or a revert writes, and in which order; what is in a generation is decided before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from patcher.code.entry import detour_parts, island
from patcher.errors import PatcherError, TargetBusy, TargetGone, UnsafeChange
from patcher.patch import journal as records
from patcher.patch.arena import (
    Arena,
    Usage,
    arena_anywhere,
    arena_near,
    create_arena,
    find_arenas,
    half_made_arenas,
    remove_arena,
)
from patcher.patch.bodies import Bodies, Door, Version
from patcher.patch.commit import Commit, Constructor
from patcher.patch.departed import find_departed, instances, missing, modules_of, without_departed
from patcher.patch.journal import ArenaView, Body, GenerationRecord, Journal, Redirect
from patcher.patch.transaction import Flip, FlipResult, Inside, Late, TextWrite, flip
from patcher.target import FunctionCall, Target, read_stat

_READINGS = 20  # of what another controller may be changing just now


Construct = Callable[[Iterable[Constructor]], None]


_AT_ENTRY = 9


class Ledger:
    """What patcher has done to one process. `refresh` before looking."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.arenas: dict[int, Arena] = {}
        self.usages: dict[int, Usage] = {}
        self.journal = Journal()  # of what is still there
        self.departed: frozenset[str] = frozenset()  # modules that were patched and are not there any more
        self._recorded = Journal()
        self.slots: dict[int, list[int]] = {}
        self.least_number = 1  # of the next generation: processes of one tree count together
        self._planned: set[int] = set()  # arenas that are chosen and not mapped
        self._fresh: list[Arena] = []  # arenas that this transaction mapped, and that nothing refers to yet
        self._unsettled = False  # some slots hold switches
        self._journal_read = b""
        self._code = Bodies()
        self._controller = (os.getpid(), read_stat(os.getpid()).start_time)
        self.refresh()

    # --- reading ----------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Read everything again that another controller may have changed."""
        for _ in range(_READINGS):
            found = self._read()
            # Whoever only looks holds no lock: another controller may have been at work between two of these reads.
            after = {base: arena.usage() for base, arena in self.arenas.items()}
            if after == self.usages and all(a.read_slots(1) == self.slots[b][:1] for b, a in self.arenas.items()):
                break
        if found != self._journal_read:
            if not found.startswith(self._journal_read):
                self._journal_read, self._recorded = b"", Journal()
            more = records.decode(found[len(self._journal_read) :])
            for record in more.generations.values():
                self._recorded.add(record, more.frames[record.number])
            self._journal_read = found
        self.journal = self._recorded
        self._check()
        self._leave_out_departed()

    def _read(self) -> bytes:
        """Read what the arenas say of themselves, and the slots; return the journal's bytes."""
        self.arenas = {a.base: a for a in find_arenas(self.target)}
        self.usages = {base: arena.usage() for base, arena in self.arenas.items()}
        found_slots = {base: arena.read_slots(self.usages[base].slots) for base, arena in self.arenas.items()}
        self.slots = {base: arena.led_to(found_slots[base]) for base, arena in self.arenas.items()}
        self._unsettled = self.slots != found_slots
        primary = self.primary
        return primary.read_journal(self.usages[primary.base].journal) if primary else b""

    def _check(self) -> None:
        """Raise `UnsafeChange` when the journal speaks of slots that are not there."""
        named = [(r.arena, r.index) for r in self.journal.redirects]
        named += [(arena, index) for g in self.journal.generations.values() for arena, index, _ in g.bodies]
        for arena, index in named:
            if not 0 < index < len(self.slots.get(arena, ())):
                raise records.damaged(f"it names slot {index} of an arena at {arena:#x}, which is not there")

    def _leave_out_departed(self) -> None:
        self.journal = without_departed(self._recorded, frozenset())
        self.departed = self._departed() if any(g.instances for g in self.journal.generations.values()) else frozenset()
        self.journal = without_departed(self._recorded, self.departed)

    def _departed(self) -> frozenset[str]:
        mappings, entry = self.target.mappings(), self.target.auxv().get(_AT_ENTRY, 0)
        executable = next((m.path for m in mappings if entry in m), "")
        return find_departed(
            self.journal, self.generation, mappings, executable, self.target.time_written, self.is_detoured
        )

    @property
    def primary(self) -> Arena | None:
        return next((a for a in self.arenas.values() if a.base == a.primary), None)

    @property
    def generation(self) -> int:
        """The number of the live generation; 0 for the program as it was started."""
        primary = self.primary
        return self.slots[primary.base][0] if primary is not None else 0

    def view(self) -> ArenaView:
        """Return what matching and linking need to know."""
        bodies = {
            (base, index): body for base, slots in self.slots.items() for index, body in enumerate(slots) if index
        }
        islands = {
            address: (base, index)
            for base, arena in self.arenas.items()
            for address, index in arena.islands(len(self.slots[base]))
        }
        ranges = tuple((a.base, a.end) for a in self.arenas.values())
        constants = tuple((base, usage.read_only) for base, usage in self.usages.items())
        return ArenaView(self.journal, bodies, islands, ranges, self.generation, constants)

    def is_detoured(self, redirect: Redirect) -> bool:
        """Tell whether a function's entry leads to its island, or has always been it."""
        return redirect.born or all(self._is_written(part) for part in self._detour(redirect))

    def is_in_place(self, redirect: Redirect) -> bool:
        """Tell whether a detour, or a part of one, stands in the text."""
        return not redirect.born and any(self._is_written(part) for part in self._detour(redirect))

    def _detour(self, redirect: Redirect) -> list[TextWrite]:
        """Return the writes that make a detour, all of which change something."""
        target = self.arenas[redirect.arena].island(redirect.index)
        entry = bytes.fromhex(redirect.entry)
        parts = detour_parts(redirect.original, entry, redirect.copy, target)
        found = [(part, entry[part.offset : part.offset + len(part.code)]) for part in parts]
        return [
            TextWrite(redirect.original + part.offset, old, part.code, part.ahead, turn)
            for turn, (part, old) in enumerate(found, 1 - len(found))
            if part.code != old
        ]

    def _is_written(self, write: TextWrite) -> bool:
        return self.target.memory.read_available(write.address, len(write.new)) == write.new

    def void(self) -> list[tuple[GenerationRecord, Redirect]]:
        """Return the functions, and the records of them, that went with a library which was unloaded."""
        counted = {(r.arena, r.index) for r in self.journal.redirects}
        every = ((g, r) for g in self._recorded.generations.values() for r in g.redirects)
        return [(g, r) for g, r in every if (r.arena, r.index) not in counted]

    # --- arenas -----------------------------------------------------------------------------------------------

    def plan_near(self, low: int, high: int, *, below_2g: bool) -> Arena:
        """Choose where an arena within reach of the text in `low`..`high` could be made.

        Nothing is mapped yet; `realise` does that. Raises `TargetBusy` where the address space is full.
        """
        return self._planned_at(arena_near(self.target, low, high, below_2g=below_2g))

    def plan_anywhere(self) -> Arena:
        """Do what `plan_near` does for an arena that may lie anywhere."""
        return self._planned_at(arena_anywhere(self.target))

    def _planned_at(self, base: int) -> Arena:
        primary = self.primary
        arena = Arena(self.target, base, primary.base if primary is not None else base)
        self._planned.add(base)
        self.arenas[base] = arena
        self.usages[base] = arena.fresh_usage()
        self.slots[base] = [0]
        return arena

    def realise(self) -> None:
        """Map every arena that so far is only planned. Raises `TargetBusy` when the kernel refuses."""
        if self._planned:
            for leftover in half_made_arenas(self.target):
                remove_arena(self.target, leftover)
        while self._planned:
            arena = self.arenas[min(self._planned)]
            create_arena(self.target, arena)
            self._planned.remove(arena.base)
            self._fresh.append(arena)

    def forget_plans(self) -> None:
        """Drop arenas that were planned and never mapped."""
        for base in self._planned & set(self.arenas):
            del self.arenas[base], self.usages[base], self.slots[base]
        self._planned.clear()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the target's lock, and finish what a controller that died left half done.

        Raises `TargetBusy` naming who has it. The lock in the arena says who it is, and reaches beyond containers;
        the claim makes taking it one step.
        """
        with self._claimed():
            self.refresh()
            primary = self.primary
            if primary is None:
                with self._without_leftovers():
                    yield
                return
            primary.lock(*self._controller)
            try:
                self._mend()
                with self._without_leftovers():
                    yield
            finally:
                # A lock that stays is seen as a dead controller's, and must not make a failure of what is done.
                with suppress(PatcherError):
                    primary.unlock()

    @contextmanager
    def _without_leftovers(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            for arena in self._fresh:
                with suppress(PatcherError, OSError):
                    remove_arena(self.target, arena)
            raise
        finally:
            self._fresh.clear()

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        with ExitStack() as stack:
            try:
                stack.enter_context(self.target.memory.claimed())
            except TargetBusy:
                self.refresh()
                if self.primary is not None:
                    self.primary.refuse_owner(*self._controller)
                raise
            self.target.expect_others()
            yield

    def _mend(self) -> None:
        if self._unsettled:
            for base, slots in self.slots.items():
                self.arenas[base].write_slots(slots)
        live = self.generation
        torn = self.slots != {base: self._slots_at(base, live) for base in self.slots}
        # Detours that lead to the old bodies do no harm, but a process that was taken back to 0 has none.
        detoured = live == 0 and any(self.is_in_place(r) for r in self.journal.redirects)
        if torn or detoured or self._rewrites_to(live):
            self.revert(live)

    def _slots_at(self, base: int, number: int) -> list[int]:
        """Return what an arena's slots hold while a generation is live."""
        slots, bodies = list(self.slots[base]), self.journal.bodies_at(number)
        for redirect in self.journal.redirects:
            if redirect.arena == base and not (redirect.born and (base, redirect.index) not in bodies):
                slots[redirect.index] = bodies.get((base, redirect.index), redirect.copy)
        return slots

    # --- changing ---------------------------------------------------------------------------------------------

    def commit(
        self,
        change: Commit,
        construct: Construct | None = None,
        inside: Inside | None = None,
        idle: Inside | None = None,
        late: Late | None = None,
    ) -> FlipResult:
        """Make a generation live, or leave everything as it was and raise.

        `construct` runs the generation's constructors in the target, or raises. What they may have handed out to the
        program by then is not used again, should the generation not become live. `inside` does the fills and finds
        what threads have of their own, which `late` returns; `idle` says who is in the old code: see `Flip`.
        """
        change = self._with_instances(change)
        running: list[Constructor] = []
        exposed = False  # whether the program may know of what was written

        def expose() -> None:
            nonlocal exposed
            exposed = True
            self._fresh.clear()

        def publish() -> None:
            for address, data in change.published:
                expose()
                self.target.memory.write(address, data)

        before = {base: self.arenas[base].usage() for base in self.arenas}
        primary = self.primary
        assert primary is not None
        start = before[primary.base].journal
        try:
            for base, usage in change.usage:
                journal = before[base].journal
                self.arenas[base].set_usage(replace(usage, journal=journal))
            for address, data in change.writes:
                self.target.memory.write(address, data)
            self._write_islands(change)
            if change.choices:
                expose()  # a resolver that we leave alone in the middle goes on in it
                change = self._chosen(change)
                self._write_islands(change)
            if change.constructors:
                assert construct is not None
                construct(self._begun(change.constructors, running))
            encoded = records.encode(change.record)
            if start + len(encoded) > primary.journal_part(start)[1]:
                raise UnsafeChange(
                    "the journal in the process is full",
                    "restart the program with the new code",
                    code="journal-full",
                )
            self.target.memory.write(primary.journal + start, encoded)
            usage = primary.usage()
            primary.set_usage(replace(usage, journal=start + len(encoded)))
            if change.fills:
                expose()
            self._refuse_departed(change)
            decided = replace(self._flip(change), inside=inside, idle=idle, late=late, publish=publish)
            if not decided.needs_stop:
                expose()  # threads may be in it by the time at which the last of several writes fails
            result = flip(self.target, decided)
        except BaseException as error:
            with suppress(PatcherError, OSError):
                self._take_back(change, before, exposed or bool(running))
            if isinstance(error, PatcherError) and not isinstance(error, TargetGone):
                self._refuse_departed(change)  # which says more than that some memory is not there
            raise
        self._fresh.clear()
        with suppress(PatcherError, OSError):  # it is live, whatever we can see of it just now
            self.refresh()
        return result

    def _with_instances(self, change: Commit) -> Commit:
        record = change.record
        found = instances(record, self.target.mappings(), self.target.time_written)
        return replace(change, record=replace(record, instances=found, departed=tuple(sorted(self.departed))))

    def _refuse_departed(self, change: Commit) -> None:
        """Raise `UnsafeChange` when a module that a change is made for was unloaded since it was looked at."""
        record = change.record
        gone = missing(record, self.target.mappings()) | (self._departed() & modules_of(record))
        if gone:
            primary = self.primary
            assert primary is not None
            self.target.memory.read(primary.header, 1)  # raises, where all of the program has been replaced
            names = ", ".join(sorted(Path(path).name for path in gone))
            raise UnsafeChange(
                f"{names} was unloaded by process {self.target.pid} while the change was made",
                "apply it again when the library is loaded",
                code="unloaded",
            )

    def _begun(self, constructors: Sequence[Constructor], running: list[Constructor]) -> Iterator[Constructor]:
        for constructor in constructors:
            running.append(constructor)
            self._fresh.clear()
            yield constructor

    def _take_back(self, change: Commit, before: Mapping[int, Usage], exposed: bool) -> None:
        primary = self.primary
        assert primary is not None
        # What is live must stay on record (an interruption may come after all is done), and a detour that is in place.
        live = primary.read_slots(1)[0] == change.record.number
        if live or any(self.is_in_place(r) for r in change.record.redirects):
            self._fresh.clear()
        else:
            for base, usage in before.items():
                kept = replace(self.arenas[base].usage(), journal=usage.journal) if exposed else usage
                self.arenas[base].set_usage(kept)
            if exposed:
                self._withdraw(change)
        self.refresh()

    def _withdraw(self, change: Commit) -> None:
        """Note that memory which was free and got what the program may know of by now is free no longer."""
        self.refresh()
        primary, taken = self.primary, sorted((s.start, s.end) for s in change.record.stretches)
        free = self._recorded.free
        left = records.without(free, taken)
        if primary is None or left == free:
            return
        first, *others = self._recorded.generations.values()
        written = [replace(first, holes=tuple(left)), *(replace(g, holes=()) for g in others)]
        primary.replace_journal(self.usages[primary.base].journal, b"".join(map(records.encode, written)))

    def _chosen(self, change: Commit) -> Commit:
        """Ask the resolvers of new IFUNCs, whose code is in place by now, and return the change with their choices."""
        primary = self.primary
        assert primary is not None
        asked = [FunctionCall(choice.resolver, (0, 0)) for choice in change.choices]
        found = [self.target.inject([call], code=primary.stub)[-1] for call in asked]
        executable = [m for m in self.target.mappings() if m.executable]
        bodies = {(arena, index): body for arena, index, body in change.record.bodies}
        for choice, address in zip(change.choices, found, strict=True):
            if not any(address in m for m in executable):
                raise UnsafeChange(
                    f"the resolver of `{choice.name}` gave {address:#x}, which is not code",
                    "link the program with what defines it, and restart it",
                    code="ifunc",
                )
            bodies[choice.arena, choice.index] = address
        record = replace(change.record, bodies=tuple((*key, body) for key, body in bodies.items()))
        return replace(change, record=record)

    def _write_islands(self, change: Commit) -> None:
        for redirect in change.record.redirects:
            arena = self.arenas[redirect.arena]
            address = arena.island(redirect.index)
            body = self._first_body(change.record, redirect)
            self.target.memory.write(arena.slot(redirect.index), body.to_bytes(8, "little"))
            self.target.memory.write(address, island(address, arena.slot(redirect.index)))

    def _first_body(self, record: GenerationRecord, redirect: Redirect) -> int:
        if not redirect.born:
            return redirect.copy  # until the flip the island leads to the old body
        return next(body for arena, index, body in record.bodies if (arena, index) == (redirect.arena, redirect.index))

    def _flip(self, change: Commit) -> Flip:
        record = change.record
        values: dict[int, dict[int, int]] = {}
        for arena, index, body in record.bodies:
            values.setdefault(arena, {})[index] = body
        touched = {(arena, index) for arena, index, _ in record.bodies}
        known = [r for r in (*self.journal.redirects, *record.redirects) if (r.arena, r.index) in touched]
        return replace(self._assemble(values, record.number, known, record.quiet), data=change.data)

    def _assemble(
        self,
        values: dict[int, dict[int, int]],
        number: int,
        detoured: Sequence[Redirect],
        quiet: tuple[Body, ...],
    ) -> Flip:
        primary = self.primary
        assert primary is not None
        values.setdefault(primary.base, {})[0] = number
        text, cells = [], []
        for redirect in detoured:
            if not self.is_detoured(redirect):
                text += [part for part in self._detour(redirect) if not self._is_written(part)]
                cells += self._cells(redirect)
        ordered = sorted(values, key=lambda base: base == primary.base)  # the generation's number last
        slots = tuple((self.arenas[base], values[base]) for base in ordered)
        return Flip(tuple(text), tuple(cells), slots, quiet)

    def _cells(self, redirect: Redirect) -> list[TextWrite]:
        cells = [TextWrite(address, _cell(before), _cell(after)) for address, before, after in redirect.cells]
        return [c for c in cells if self.target.memory.read_available(c.address, 8) == c.old]

    def unused_by(self, record: GenerationRecord) -> tuple[Version, ...]:
        """Return the code of the functions of a generation that is not of it: all that they had before."""
        slots = {(arena, index): body for arena, index, body in record.bodies}
        return self._code.out_of_use(Journal({**self.journal.generations, record.number: record}), slots)

    def unused_at(self, number: int) -> tuple[Version, ...]:
        """Return the code that a revert puts out of use."""
        before, after = self._bodies_at(self.generation), self._bodies_at(number)
        changed = {door: body for door, body in after.items() if before[door] != body}
        return self._code.out_of_use(self.journal, changed)

    def _bodies_at(self, number: int) -> dict[Door, int]:
        bodies = self.journal.bodies_at(number)
        return {(r.arena, r.index): bodies.get((r.arena, r.index), r.copy) for r in self.journal.redirects}

    def unused(self) -> tuple[Version, ...]:
        """Return all code that was ever in use, and is not now."""
        return self._code.out_of_use(self.journal, self.view().bodies)

    def revert(self, number: int, idle: Inside | None = None) -> FlipResult:
        """Go back to an earlier generation; 0 takes back every detour and GOT cell as well.

        Raises `UnsafeChange` for a generation that is not recorded.
        """
        bodies = self.journal.bodies_at(number)
        values: dict[int, dict[int, int]] = {}
        kept: list[Redirect] = []
        for redirect in self.journal.redirects:
            key = (redirect.arena, redirect.index)
            if key in bodies:
                kept.append(redirect)
            elif redirect.born:
                continue
            values.setdefault(redirect.arena, {})[redirect.index] = bodies.get(key, redirect.copy)
        change = self._assemble(values, number, kept, self._quiet_between(self.generation, number))
        if number == 0:
            change = self._restoring(change)
        change = replace(change, data=self._rewrites_to(number), idle=idle)
        result = flip(self.target, change)
        with suppress(PatcherError, OSError):
            self.refresh()
        return result

    def _rewrites_to(self, number: int) -> tuple[tuple[int, bytes], ...]:
        """Return what constants have to become so that they are as in a generation."""
        wanted = self.journal.rewrites_at(number).items()
        return tuple((a, data) for a, data in wanted if self.target.memory.read(a, len(data)) != data)

    def _quiet_between(self, live: int, number: int) -> tuple[Body, ...]:
        """Return the bodies that must have no frame on the way from one generation to another."""
        before, after = self.journal.lineage(live), self.journal.lineage(number)
        undone = [body for record in before if record not in after for body in record.quiet_back]
        redone = [body for record in after if record not in before for body in record.quiet]
        return tuple(undone + redone)

    def _restoring(self, change: Flip) -> Flip:
        text, cells = [], []
        for redirect in self.journal.redirects:
            if redirect.born:
                continue
            written = [part for part in self._detour(redirect) if self._is_written(part)]
            if not written:
                continue
            text += [replace(part, old=part.new, new=part.old) for part in written]
            for address, before, after in redirect.cells:
                if self.target.memory.read_available(address, 8) == _cell(after):
                    cells.append(TextWrite(address, _cell(after), _cell(before)))
        return Flip(tuple(text), tuple(cells), change.slots, change.quiet, restores=True)


def _cell(value: int) -> bytes:
    return value.to_bytes(8, "little")
