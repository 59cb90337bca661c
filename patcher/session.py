"""The story of one save: build, match, link, commit, report.

    files -> objects -> changes -> linked generation -> flip -> outcome

A session belongs to one process and one thread (the kernel lets only the thread that seized a process trace
it). It keeps nothing that it could not read again from the process: journal and slots are read anew before
every transaction, so several sessions, and one that died, get along.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from patcher.errors import AttachDenied, PatcherError, TargetGone, UnresolvedSymbol, UnsafeChange, named_shortages
from patcher.options import Options
from patcher.report import Applied, Event, Explanation, Function, Note, Reporter, Timings, Unchanged, Variable
from patcher.target import Target
from patcher.texts import Texts

# What follows takes a third of a second to import (drgn, numpy, capstone), and `status` and `revert` need none of it.
if TYPE_CHECKING:
    from patcher.image import Image
    from patcher.link.place import FarData
    from patcher.part import Part
    from patcher.patch.ledger import Constructor, Ledger
    from patcher.relink import Linked
    from patcher.units import Changes, Source, Units


_ROUNDS = 8  # of linking again: for an arena, for libraries, for objects compiled otherwise


@dataclass(frozen=True, slots=True)
class Generation:
    """The outcome of `apply`: the live generation, and what it changed (nothing, when the process had the code)."""

    number: int
    functions: tuple[Function, ...] = ()
    active: tuple[tuple[int, str], ...] = ()  # threads, and the functions whose old code they are still in
    timings: Timings = field(default_factory=Timings)
    line_only: tuple[str, ...] = ()
    variables: tuple[Variable, ...] = ()  # what became of data
    waiting: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()  # functions that are the same, and whose entry has no room for a jump
    dry_run: bool = False
    supplied: tuple[str, ...] = ()  # objects and libraries that were brought in, being missing
    undefined: tuple[str, ...] = ()  # functions that are nowhere: a call aborts

    def as_event(self, files: Sequence[Path]) -> Event:
        """Return the event that tells of it."""
        names = tuple(str(f) for f in files)
        if not self.functions:
            return Unchanged(names, self.line_only, self.waiting, self.kept, self.variables)
        return Applied(
            self.number,
            names,
            self.functions,
            self.active,
            self.timings,
            self.line_only,
            self.variables,
            self.dry_run,
            self.supplied,
            self.undefined,
            self.kept,
        )


@dataclass(frozen=True, slots=True)
class PatchedFunction:
    """A function that has been patched: its address for life and the code that it leads to now."""

    name: str
    module: str
    file: str
    original: int
    current: int
    generation: int


@dataclass(frozen=True, slots=True)
class ArenaUse:
    address: int
    size: int
    used: int


@dataclass(frozen=True, slots=True)
class ObjectUse:
    """How many bytes of the arenas an object takes, in all generations together, gaps for alignment included."""

    object: str
    text: int
    read_only: int
    data: int
    cells: int
    islands: int  # with their slots, the entries that they displaced, and jumps to what is far away


@dataclass(frozen=True, slots=True)
class Status:
    """What `status` tells of a process."""

    pid: int
    program: str
    generation: int
    recorded: tuple[int, ...]
    functions: tuple[PatchedFunction, ...]
    arenas: tuple[ArenaUse, ...]
    objects: tuple[ObjectUse, ...]


class Session:
    """Patches one process. Use as a context manager; leaving it leaves the process running."""

    def __init__(self, target: Target, options: Options | None = None, reporter: Reporter | None = None) -> None:
        self.target = target
        self.options = options or Options()
        self._reporter = reporter
        self._image: Image | None = None
        self._ledger: Ledger | None = None
        self._units: Units | None = None
        self.texts = Texts()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the process, which runs on as it is."""
        if self._units is not None:
            self._units.close()
            self._units = None
        self.target.close()

    @property
    def image(self) -> Image:
        if self._image is None:
            from patcher.image import Image

            self._image = Image(self.target)
        return self._image

    @property
    def ledger(self) -> Ledger:
        if self._ledger is None:
            from patcher.patch.ledger import Ledger

            self._ledger = Ledger(self.target)
        return self._ledger

    @property
    def units(self) -> Units:
        if self._units is None:
            from patcher.units import Units

            self._units = Units(self.image, self.ledger, self.options, self.texts, lambda text: self.emit(Note(text)))
        return self._units

    def remember_texts(self, paths: Sequence[Path] = ()) -> None:
        """Keep the sources as they are now, below `paths` and those that the given compile commands list.

        What the process runs is presumed to come from them; without them no line number can be told to be one.
        """
        from patcher.build import Commands

        listed = Commands(compile_commands=self.options.compile_commands).listed()
        self.texts.remember([*paths, *self.options.watched, *listed])

    def emit(self, event: Event) -> None:
        if self._reporter is not None:
            self._reporter.emit(event)

    # --- apply ------------------------------------------------------------------------------------------------

    def apply(self, *files: str | Path) -> Generation:
        """Make the code of objects, archives or source files live, all of them as one generation.

        Raises `BuildError` with the compiler's words, `PatcherError` and its kin with what was refused and why;
        the process is then as it was.
        """
        return self.change([Path(f) for f in files])

    @named_shortages()
    def change(
        self,
        files: Sequence[Path],
        *,
        began: float | None = None,
        detect: float = 0.0,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Generation:
        """Do what `apply` does, for a save that was noticed at `began` (perf_counter), `detect` ms after it.

        `cancelled` is asked while compilers run; raises `BuildCancelled` when it says so.
        """
        self.target.check_alive()
        started = time.perf_counter()
        units = self.units
        units.build_seconds = 0.0
        outcome = self._relink(units, units.sources(files, cancelled))
        now = time.perf_counter()
        build, stop = units.build_seconds * 1e3, outcome.timings.stop
        total = detect + (now - (began if began is not None else started)) * 1e3
        timings = Timings(detect, build, (now - started) * 1e3 - build - stop, stop, total)
        return replace(outcome, timings=timings, dry_run=self.options.dry_run)

    @named_shortages()
    def explain(self, *files: str | Path) -> Explanation:
        """Tell what `apply` would do, and whether it would be refused. Changes nothing.

        Raises `BuildError` and its kin for what does not compile or cannot be read.
        """
        from patcher.explain import explain

        self.target.check_alive()
        units = self.units
        sources = units.sources([Path(f) for f in files], lambda: False)
        with self._transaction():
            try:
                return explain(units, sources, lambda changes: self._link(units, changes, dry_run=True))
            finally:
                self.ledger.forget_plans()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Read the process and its ledger anew, and keep other controllers away."""
        self.image.refresh()
        with self.ledger.transaction():
            self.image.asked |= self.ledger.journal.chosen
            self.image.stub_area = None if self.ledger.primary is None else self.ledger.primary.stub
            yield

    def _relink(self, units: Units, sources: Sequence[Source]) -> Generation:
        with self._transaction():
            changes = units.changes(sources)
            if not changes.parts:
                return Generation(self.ledger.generation, line_only=changes.line_only, waiting=changes.uncalled)
            try:
                linked = self._link(units, changes, dry_run=self.options.dry_run)
                supplied, undefined = units.supplies.outcome(linked)
                outcome = replace(
                    self._commit(linked), line_only=changes.line_only, supplied=supplied, undefined=undefined
                )
                with suppress(OSError):  # it is live
                    for part in changes.parts:
                        self.texts.applied(Path(part.source))
                return outcome
            finally:
                self.ledger.forget_plans()

    def _link(self, units: Units, changes: Changes, *, dry_run: bool) -> Linked:
        from patcher.link.place import FarData
        from patcher.linkage import NeedsArena
        from patcher.relink import link_generation

        parts = list(changes.parts)
        waiting = [*changes.idle, *units.waiting(changes)]
        supplies = units.supplies
        supplies.begin()
        for _ in range(2 * len(parts) + _ROUNDS):
            supplies.to_load.clear()
            try:
                linked = link_generation(self.image, self.ledger, parts, waiting, supplies)
            except NeedsArena:
                self._map_stub_area(dry_run)
            except FarData as error:
                own = any(part.blocks.object is error.object for part in (*parts, *waiting))
                if not own and not units.supply_farther(error.object):
                    raise
                parts = [self._reaching(units, part, error) for part in parts]
                waiting = [self._reaching(units, part, error) for part in waiting]
            except UnresolvedSymbol as error:
                raise UnresolvedSymbol(error.message, supplies.advice()) from None
            else:
                if dry_run or not self._load(tuple(supplies.to_load)):
                    units.check_supplied(linked.supplied)
                    return linked
        raise UnsafeChange("the change cannot be linked", "restart the program with the new code")

    def _load(self, libraries: Sequence[Path]) -> bool:
        """Load libraries into the process, and return whether there were any."""
        from patcher.loader import Caller

        for path in libraries:
            Caller(self.image).load_library(str(path))
            self.units.supplies.loaded.append(path)
        return bool(libraries)

    def _reaching(self, units: Units, part: Part, error: FarData) -> Part:
        if part.blocks.object is not error.object:
            return part
        found = units.with_farther_reach(part)
        if found is None:
            raise error
        return found

    def _map_stub_area(self, dry_run: bool) -> None:
        if dry_run:
            raise UnsafeChange(
                "a library function's implementation has to be asked from the process, which --dry-run forbids",
                "run it without --dry-run",
            )
        self.ledger.realise()
        self.image.stub_area = next(iter(self.ledger.arenas.values())).stub

    def _commit(self, linked: Linked) -> Generation:
        from patcher.patch.active import find_active

        record = linked.commit.record
        functions = tuple(Function(*status) for status in record.statuses)
        if not functions:
            return Generation(self.ledger.generation, kept=linked.kept)
        variables = tuple(Variable(d.name, d.file, d.fate.value, d.note) for d in linked.data)
        outcome = Generation(record.number, functions, variables=variables, kept=linked.kept)
        if self.options.dry_run:
            return outcome
        self.ledger.realise()
        result = self.ledger.commit(linked.commit, self._construct)
        bodies = [(r.name, r.extents) for r in linked.replaced]
        active = find_active(self.target, bodies, result.threads)
        return replace(
            outcome,
            active=tuple((a.thread, a.function) for a in active),
            timings=Timings(stop=result.stop_ns / 1e6),
        )

    def _construct(self, constructors: Iterable[Constructor]) -> None:
        """Run constructors on a thread of the target that is at a safe point, one after another."""
        from patcher.loader import Caller, workspace

        caller = Caller(self.image)
        with workspace(self.target) as memory:
            for constructor in constructors:
                try:
                    caller.run_constructors([constructor.address], memory)
                except (TargetGone, AttachDenied):
                    raise
                except PatcherError as error:
                    raise UnsafeChange(
                        f"`{constructor.name}` of {constructor.unit} initialises what is new, and could not be run to "
                        f"its end: {error.message}",
                        error.hint,
                        code=error.code,
                    ) from None

    # --- revert, status ---------------------------------------------------------------------------------------

    @named_shortages()
    def revert(self, generation: int | None = None) -> int:
        """Go back to an earlier generation (default: the one before the live one; 0: the program as it was started).

        Returns its number. Raises `UnsafeChange` when it is not recorded, or nothing has been patched.
        """
        self.target.check_alive()
        with self.ledger.transaction():
            live = self.ledger.generation
            if generation is None and not live:
                raise UnsafeChange(
                    f"process {self.target.pid} runs the program as it was started, there is nothing to revert",
                    "",
                    code="nothing-to-revert",
                )
            if generation is None:
                generation = self.ledger.journal.lineage(live)[-1].parent
            if generation != live:
                self.ledger.revert(generation)
        return generation

    @named_shortages()
    def status(self) -> Status:
        """Tell which generation is live and where every patched function goes. Writes nothing."""
        self.target.check_alive()
        ledger = self.ledger
        ledger.refresh()
        live = ledger.generation
        placed = {p.address: p for p in ledger.journal.placed}
        current = ledger.view().bodies
        made = {(a, i, body): g.number for g in ledger.journal.generations.values() for a, i, body in g.bodies}
        functions = []
        for redirect in ledger.journal.redirects:
            body = current.get((redirect.arena, redirect.index), redirect.copy)
            number = made.get((redirect.arena, redirect.index, body), 0)
            where = redirect.original if body == redirect.copy and not redirect.born else body
            known = placed.get(body)
            file = redirect.unit.partition("#")[0] if known is None else known.unit.partition("#")[0]
            functions.append(PatchedFunction(redirect.name, redirect.module, file, redirect.original, where, number))
        arenas = tuple(
            ArenaUse(a.base, a.end - a.base, a.bytes_used(ledger.usages[a.base])) for a in ledger.arenas.values()
        )
        return Status(
            self.target.pid,
            self.target.program,
            live,
            tuple(sorted(ledger.journal.generations)),
            tuple(functions),
            arenas,
            tuple(ObjectUse(**asdict(a)) for a in ledger.journal.allocations),
        )

    # --- watching ---------------------------------------------------------------------------------------------

    def watch(self, paths: Sequence[str | Path], *, stop: threading.Event | None = None) -> None:
        """Apply every save below `paths`, until `stop` is set or the process ends (`TargetGone`).

        What is refused or does not compile is reported and tried again with the next save.
        """
        from patcher.loop import Loop

        Loop(self, [Path(p) for p in paths]).run(stop or threading.Event())

    def prepare(self) -> None:
        """Load what the first save needs, so that it is as quick as the later ones."""
        self._await_loaded()
        self.image.executable.module.symbols.named("main")
        self.units.layouts_of(self.image.executable)
        self.ledger.refresh()

    def _await_loaded(self) -> None:
        # A program that was started a moment ago is still being put together by its dynamic linker.
        deadline = time.monotonic() + 2.0
        needed = self.image.executable.module.needed
        while time.monotonic() < deadline:
            self.image.refresh()
            if len(self.image.scope()) > len(needed) or not needed:
                return
            time.sleep(0.005)


__all__ = ["ArenaUse", "Generation", "ObjectUse", "Options", "PatchedFunction", "Session", "Status"]
