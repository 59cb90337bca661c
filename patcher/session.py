"""The story of one save: build, match, link, commit, report.

    files -> objects -> changes -> linked generation -> flip -> outcome

A session belongs to one process and one thread (the kernel lets only the thread that seized a process trace
it). It keeps nothing that it could not read again from the process: journal and slots are read anew before
every transaction, so several sessions, and one that died, get along.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from patcher.build import Dependencies
from patcher.data.outcome import Fate
from patcher.errors import (
    AttachDenied,
    ObjectError,
    PatcherError,
    TargetBusy,
    TargetGone,
    UnresolvedSymbol,
    UnsafeChange,
    named_shortages,
)
from patcher.options import Options
from patcher.report import (
    Applied,
    Event,
    Explanation,
    Function,
    Member,
    Note,
    OldFrame,
    Reporter,
    Timings,
    Unchanged,
    Variable,
    told_of,
)
from patcher.target import Target
from patcher.texts import Texts

# What follows takes a third of a second to import (drgn, numpy, capstone), and `status` and `revert` need none of it.
if TYPE_CHECKING:
    from patcher.activity import Lookout
    from patcher.data.initial import Changed, Initials, Told
    from patcher.data.threads import NewBlock, NewThreadLocals, StaticModel
    from patcher.elf.thread_module import ThreadBlock
    from patcher.hooks import Happening
    from patcher.image import Image
    from patcher.link.place import FarData
    from patcher.part import Part
    from patcher.patch.bodies import Version
    from patcher.patch.commit import Commit, Constructor
    from patcher.patch.ledger import Ledger
    from patcher.patch.reclaim import Policy
    from patcher.patch.transaction import FlipResult
    from patcher.policy import Condition
    from patcher.relink import Linked
    from patcher.touched import Touched
    from patcher.units import Changes, Source, Standing, Units


_LOOKED_THROUGH = 64 << 20  # bytes for coroutines, after each generation: some 60 ms
_NEEDED_LATER = tuple(
    f"patcher.{name}" for name in ("activity", "directory", "hooks", "loader", "patch.reclaim", "policy", "relink")
)
_ROUNDS = 8  # of linking again: for an arena, for libraries, for objects compiled otherwise


@dataclass(frozen=True, slots=True)
class Generation:
    """The outcome of `apply`: the live generation, and what it changed (nothing, when the process had the code)."""

    number: int
    functions: tuple[Function, ...] = ()
    active: tuple[tuple[int, str], ...] = ()  # threads, and the functions whose old code they are still in
    frames: tuple[OldFrame, ...] = ()  # where they are in it
    timings: Timings = field(default_factory=Timings)
    line_only: tuple[str, ...] = ()
    variables: tuple[Variable, ...] = ()  # what became of data
    waiting: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()  # functions that are the same, and whose entry has no room for a jump
    dry_run: bool = False
    supplied: tuple[str, ...] = ()  # objects and libraries that were brought in, being missing
    undefined: tuple[str, ...] = ()  # functions that are nowhere: a call aborts
    members: tuple[Member, ...] = ()  # the processes, where several were changed together
    data_only: bool = False  # it changed no function

    def as_event(self, files: Sequence[Path]) -> Event:
        """Return the event that tells of it."""
        names = tuple(str(f) for f in files)
        if not self.functions and not self.data_only:
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
            self.members,
            self.frames,
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

    def as_json(self) -> dict[str, object]:
        """Return what goes out of it."""
        found = asdict(self)
        found.pop("recorded")
        return found


class _Offered(Exception):
    """Initialisers changed, and the user has not been asked yet whether the new values are wanted."""

    def __init__(self, variables: tuple[Variable, ...]) -> None:
        super().__init__()
        self.variables = variables


Offer = Callable[[Sequence[Variable]], bool]


class Session:
    """Patches one process. Use as a context manager; leaving it leaves the process running."""

    def __init__(
        self,
        target: Target,
        options: Options | None = None,
        reporter: Reporter | None = None,
        offer: Offer | None = None,
    ) -> None:
        """`offer` is asked, before anything is written, whether variables get their new initial values."""
        self.target = target
        self._offer = offer
        self._told: Told = {}
        self._initials: Initials | None = None
        self._offering = False
        self.options = options or Options()
        if self.options.force:
            target.trust_filters()
        self._reporter = reporter
        self._image: Image | None = None
        self._ledger: Ledger | None = None
        self._units: Units | None = None
        self._policy: Policy | None = None
        self._lookout: Lookout | None = None
        self.frames: tuple[OldFrame, ...] = ()  # who was in old code after the last change
        self._spare: dict[ThreadBlock, int] = {}  # storage that was loaded for a change which then failed
        self._departed: frozenset[str] = frozenset()  # modules that were unloaded, as was told already
        self.texts = Texts()
        self.dependencies = Dependencies()
        self._touched: Touched | None = None
        self.found = 0  # the generation that was live before the last change

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the process, which runs on as it is."""
        if self._touched is not None:
            self._touched.close()
            self._touched = None
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
    def initials(self) -> Initials:
        """What the user wants of changed initialisers in the change at hand."""
        if self._initials is None:
            from patcher.data.initial import Initials

            self._initials = Initials(self.options.reinit, self._told)
        return self._initials

    @property
    def policy(self) -> Policy:
        """What becomes of old generations and their memory."""
        if self._policy is None:
            from patcher.patch.reclaim import Policy

            self._policy = Policy(keep=self.options.keep)
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._policy = policy

    @property
    def ledger(self) -> Ledger:
        if self._ledger is None:
            from patcher.patch.ledger import Ledger

            self._ledger = Ledger(self.target)
        return self._ledger

    @property
    def lookout(self) -> Lookout:
        if self._lookout is None:
            from patcher.activity import Lookout

            self._lookout = Lookout(self.image)
        return self._lookout

    @property
    def units(self) -> Units:
        if self._units is None:
            from patcher.units import Units

            self._units = Units(self.image, self.ledger, self.options, self.texts, self.dependencies, self._say)
        return self._units

    @property
    def touched(self) -> Touched:
        """Which units saved headers touch."""
        if self._touched is None:
            from patcher.touched import Touched

            self._touched = Touched(self.image, self.options, self.texts, self.dependencies, self._say)
        return self._touched

    def _say(self, text: str) -> None:
        self.emit(Note(text))

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

    def report(self, outcome: Generation, files: Sequence[Path]) -> Event:
        """Tell of an outcome, and of what a user may want to do about it; return the event."""
        event = outcome.as_event(files)
        self.emit(event)
        kept = [v for v in outcome.variables if v.outcome == Fate.KEPT.value]
        if kept:
            sources = " ".join(dict.fromkeys(v.file for v in kept))
            names = " ".join(f"--reinit {v.name}" for v in kept)
            what = "the new value" if len(kept) == 1 else "new values"
            self.emit(Note(f"  to write {what}: patcher apply {self.target.pid} {sources} {names}"))
        return event

    # --- apply ------------------------------------------------------------------------------------------------

    def apply(self, *files: str | Path) -> Generation:
        """Make the code of objects, archives or source files live, all of them as one generation.

        Raises `BuildError` with the compiler's words, `PatcherError` and its kin with what was refused and why;
        the process is then as it was.
        """
        return self.change([Path(f) for f in files], strict=True)

    @named_shortages()
    def change(
        self,
        files: Sequence[Path],
        *,
        began: float | None = None,
        detect: float = 0.0,
        cancelled: Callable[[], bool] = lambda: False,
        strict: bool = False,
    ) -> Generation:
        """Do what `apply` does, for a save that was noticed at `began` (perf_counter), `detect` ms after it.

        `cancelled` is asked while compilers run; raises `BuildCancelled` when it says so. `strict`: it is an error
        when a variable that is to be initialised again has no new initial value.
        """
        started = time.perf_counter()
        compiled = self.build(files, cancelled=cancelled)
        return self.make_live(compiled, started=started, began=began, detect=detect, strict=strict)

    def build(
        self,
        files: Sequence[Path],
        *,
        cancelled: Callable[[], bool] = lambda: False,
        standings: Mapping[Path, Standing] | None = None,
    ) -> list[Source]:
        """Compile sources, and read objects and archives, for one change; `standings` are as `Units.sources` has them.

        Raises as `Units.sources` does.
        """
        self.target.check_alive()
        self.units.build_seconds = 0.0
        return self.units.sources(files, cancelled, standings or {})

    @named_shortages()
    def make_live(
        self,
        compiled: Sequence[Source],
        *,
        started: float,
        began: float | None = None,
        detect: float = 0.0,
        strict: bool = False,
    ) -> Generation:
        """Match and link what was built since `started` (perf_counter), and make it live; see `change`."""
        from patcher.data.initial import Initials

        units = self.units
        self._initials = Initials(self.options.reinit, self._told, strict=strict)
        self._offering = self._offer is not None and not self.options.reinit and not self.options.dry_run
        try:
            outcome = self.relink(compiled)
        except _Offered as offered:
            # Outside of the transaction: nobody has to wait for the answer.
            accepted = self._offer is not None and self._offer(offered.variables)
            self._initials = Initials((), self._told, every=accepted)
            self._offering = False
            outcome = self.relink(compiled)
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
                link = partial(self._link, units, dry_run=True)
                return explain(units, sources, self._with_data, link, self._standing)
            finally:
                self.ledger.forget_plans()

    def _standing(self, linked: Linked) -> tuple[tuple[OldFrame, ...], PatcherError | None]:
        """Return who is now in the code that a change replaces, and why it may not be made then, if so."""
        from patcher.policy import objection

        frames: tuple[OldFrame, ...] = ()
        with suppress(AttachDenied, TargetBusy, OSError):  # as when somebody traces the process
            limit = _LOOKED_THROUGH if self.options.coroutines else 0
            frames = self.lookout.running(self.ledger.unused_by(linked.commit.record), limit)
        return frames, objection(self.options, frames)

    def _check_standing(self, linked: Linked) -> None:
        _, objection = self._standing(linked) if self.options.active == "refuse" else ((), None)
        if objection is not None:
            raise objection

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Read the process and its ledger anew, and keep other controllers away."""
        self.image.refresh()
        with self.ledger.transaction():
            self._tell_departed()
            self.image.asked |= self.ledger.journal.chosen
            self.image.stub_area = None if self.ledger.primary is None else self.ledger.primary.stub
            yield

    def _tell_departed(self) -> None:
        for path in sorted(self.ledger.departed - self._departed):
            self.emit(Note(f"{path} was unloaded since it was patched, and its patches went with it"))
        self._departed = self.ledger.departed

    def rehearse(self, sources: Sequence[Source]) -> set[str]:
        """Match and link objects as far as that goes without any effect; returns the modules that they are part of.

        Raises what `relink` would raise.
        """
        self.target.check_alive()
        units = self.units
        with self._transaction():
            changes = units.changes(sources)
            try:
                if changes.parts:
                    self._check_standing(self._link(units, changes, dry_run=True))
            except UnsafeChange as error:
                if error.code != "dry-run":
                    raise
            finally:
                self.ledger.forget_plans()
            return {part.module.path for part in (*changes.parts, *changes.idle)}

    def relink(self, sources: Sequence[Source]) -> Generation:
        """Match objects against the process, and link and commit what is new, as one generation."""
        from patcher.patch.reclaim import reclaim

        units = self.units
        with self._transaction():
            self.found = self.ledger.generation
            if not self.options.dry_run:
                reclaim(self.ledger, self.policy)
            changes = units.changes(sources)
            changes, kept = self._with_data(changes)
            if not changes.parts:
                return self._untouched(changes, kept)
            try:
                linked = self._link(units, changes, dry_run=self.options.dry_run)
                self._ask(linked.told)
                supplied, undefined = units.supplies.outcome(linked)
                outcome = replace(
                    self._commit(linked), line_only=changes.line_only, supplied=supplied, undefined=undefined
                )
                with suppress(OSError):  # it is live
                    self._note(units, changes, linked, outcome)
                return outcome
            finally:
                self.ledger.forget_plans()

    def _with_data(self, changes: Changes) -> tuple[Changes, tuple[Changed, ...]]:
        """Have the units of a change without new code linked if their data has to be written, or told of.

        Otherwise return the variables as well whose initialisers changed, and which keep their values.
        """
        if changes.parts:
            return changes, ()
        from patcher.relink import data_of_idle

        idle = data_of_idle(self.image, self.ledger, changes.idle, self.initials)
        return (replace(changes, parts=changes.idle, idle=()), ()) if idle.matters else (changes, idle.kept)

    def _untouched(self, changes: Changes, kept: Sequence[Changed]) -> Generation:
        self._ask(kept)
        news = self.initials.news(kept, self.ledger.journal)
        if not self.options.dry_run:
            self.initials.remember(kept)
        told = told_of([c.datum(Fate.KEPT) for c in news])
        return Generation(self.ledger.generation, line_only=changes.line_only, waiting=changes.uncalled, variables=told)

    def _ask(self, kept: Sequence[Changed]) -> None:
        news = self.initials.news(kept, self.ledger.journal) if self._offering else []
        if news:
            raise _Offered(told_of([c.datum(Fate.KEPT) for c in news]))

    def _link(self, units: Units, changes: Changes, *, dry_run: bool) -> Linked:
        from patcher.data.threads import NewThreadLocals, StaticModel
        from patcher.link.place import FarData
        from patcher.linkage import NeedsArena
        from patcher.relink import link_generation

        parts = list(changes.parts)
        waiting = [*changes.idle, *units.waiting(changes)]
        supplies, threads = units.supplies, NewThreadLocals(self.ledger.journal.placed)
        supplies.begin()
        for _ in range(2 * len(parts) + _ROUNDS):
            supplies.to_load.clear()
            try:
                linked = link_generation(self.image, self.ledger, parts, threads, waiting, supplies, self.initials)
            except NeedsArena:
                self._map_stub_area(dry_run)
            except FarData as error:
                parts, waiting = _made_again(units.with_farther_reach, units, parts, waiting, error)
                threads.restart()
            except StaticModel as error:
                parts, waiting = _made_again(units.asking_for_thread_locals, units, parts, waiting, error)
                threads.restart()
            except UnresolvedSymbol as error:
                raise UnresolvedSymbol(error.message, supplies.advice()) from None
            else:
                threads.check()
                if dry_run or not (self._load(tuple(supplies.to_load)) or self._load_storage(threads)):
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

    def _load_storage(self, threads: NewThreadLocals) -> bool:
        """Have storage for new thread-locals in the process, and return whether there were any to load."""
        blocks = tuple(threads.to_load())
        for block in blocks:
            try:
                self._load_block(block)
            except UnsafeChange as error:
                if error.code == "dlopen" and block.static:
                    threads.without_static()
                    return True
                if error.code not in ("dlopen", "no-loader"):
                    raise
                raise UnsafeChange(
                    f"threads that run have no storage for the new thread-local {block.names}, and the dynamic loader "
                    f"can make none: {error.message}",
                    "make it a plain variable, or restart the program with the new code",
                    code="new-thread-local",
                ) from None
        return bool(blocks)

    def _load_block(self, block: NewBlock) -> None:
        from patcher.loader import Caller

        wanted = block.as_linked()
        if wanted not in self._spare:
            self._spare[wanted] = Caller(self.image).load_thread_block(wanted)
        block.loaded(wanted, self._spare[wanted])

    def _map_stub_area(self, dry_run: bool) -> None:
        if dry_run:
            raise UnsafeChange(
                "a library function's implementation has to be asked from the process, which --dry-run forbids",
                "run it without --dry-run",
                code="dry-run",
            )
        self.ledger.realise()
        self.image.stub_area = next(iter(self.ledger.arenas.values())).stub

    def _commit(self, linked: Linked) -> Generation:
        record = linked.commit.record
        functions = tuple(Function(*status) for status in record.statuses)
        variables = told_of(linked.data)
        if not functions and not linked.commit.data and not linked.commit.threads and not record.placed:
            return Generation(self.ledger.generation, kept=linked.kept, variables=variables)
        outcome = Generation(record.number, functions, variables=variables, kept=linked.kept, data_only=not functions)
        if self.options.dry_run:
            self._check_standing(linked)
            return outcome
        from patcher.directory import published
        from patcher.hooks import Named, applying

        self._announce(variables)
        commit = published(self.image, self.ledger, linked.commit)
        named = tuple(Named(d.name, Path(d.file).name, d.fate.value) for d in linked.data)
        self.ledger.realise()
        if linked.commit.constructors:
            self._spare.clear()  # they may write to it
        with self._with_hooks(applying(record, named)):
            result = self._made_live(commit)
        self._spare.clear()
        self._look_around(result)
        return replace(
            outcome,
            active=tuple((f.thread, f.function) for f in self.frames),
            frames=self.frames,
            timings=Timings(stop=result.stop_ns / 1e6),
        )

    def _announce(self, variables: Sequence[Variable]) -> None:
        """Say which values are about to be carried over: afterwards it is too late to think of a mistake."""
        migrated = [v for v in variables if v.outcome == Fate.MIGRATED.value]
        if migrated:
            self.emit(Note("about to migrate: " + ", ".join(f"{v.name} ({v.note})" for v in migrated)))

    def _note(self, units: Units, changes: Changes, linked: Linked, outcome: Generation) -> None:
        """Remember what a change that is live means for the next ones."""
        if not self.options.dry_run:
            time = linked.commit.record.time
            units.admission.applied(outcome.number, time, (*changes.parts, *linked.supplied))
        for part in changes.parts:
            self.texts.applied(Path(part.source))
        if not self.options.dry_run:
            self.initials.remember(linked.told)

    def _look_around(self, result: FlipResult) -> None:
        """Find who is in old code, now that a generation is live."""
        from patcher.activity import seen_again

        found: tuple[OldFrame, ...] = ()
        with suppress(PatcherError, OSError):  # the change is live, whatever can be told of it
            limit = _LOOKED_THROUGH if self.options.coroutines else 0
            found = self.lookout.running(self.ledger.unused(), limit, result.seen)
        self.frames = seen_again(found, self.frames)

    def _condition(self, versions: Sequence[Version]) -> Condition | None:
        from patcher.policy import condition

        return condition(self.options, self.lookout, versions)

    def _made_live(self, commit: Commit) -> FlipResult:
        idle = self._condition(self.ledger.unused_by(commit.record))
        if not commit.fills and not commit.threads:
            return self.ledger.commit(commit, self._construct, idle=idle)
        from patcher.filling import Filling
        from patcher.loader import workspace
        from patcher.thread_values import ThreadValues

        values = ThreadValues(self.image, commit.threads)
        if not commit.fills:
            return self.ledger.commit(commit, self._construct, values, idle, values.writes)
        calls = any(f.moved is None for f in commit.fills)
        with workspace(self.target) if calls else nullcontext() as memory:
            filling = Filling(self.image, self.ledger.view(), commit.fills, memory, self.options.hook_timeout)
            inside = (lambda stopped: values(stopped) or filling(stopped)) if commit.threads else filling
            return self.ledger.commit(commit, self._construct, inside, idle, values.writes)

    @contextmanager
    def _with_hooks(self, happening: Happening) -> Iterator[None]:
        """Have the program's hooks called before and after the block."""
        from patcher.hooks import Hooks

        warnings: list[str] = []
        with Hooks(self.image, self.ledger, self.options.hook_timeout).around(happening, warnings):
            yield
        for text in warnings:
            self.emit(Note(text))

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

        Returns its number; `frames` says who is in the code that it took out. Raises `UnsafeChange` when it is not
        recorded, nothing has been patched, or somebody is in that code and must not be.
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
                generation = self.previous()
            if generation != live:
                self._look_around(self._revert(live, generation, self._condition(self.ledger.unused_at(generation))))
        return generation

    def take_back(self, generation: int) -> None:
        """Undo what was done a moment ago, whoever is in that code."""
        with self.ledger.transaction():
            if self.ledger.generation != generation:
                self._revert(self.ledger.generation, generation, None)

    def previous(self) -> int:
        """Return the generation before the live one; 0 when that is the first, or the program as it was started."""
        live = self.ledger.generation
        return self.ledger.journal.before(live) if live else 0

    def _revert(self, live: int, generation: int, idle: Condition | None) -> FlipResult:
        from patcher.hooks import reverting

        try:
            self.image.refresh()
        except ObjectError as error:
            # Going back needs no file of the program; its hooks cannot be found without.
            self.emit(Note(f"hooks are not called: {error.message}"))
            return self.ledger.revert(generation, idle)
        with self._with_hooks(reverting(self.ledger.journal, live, generation)):
            return self.ledger.revert(generation, idle)

    @named_shortages()
    def status(self) -> Status:
        """Tell which generation is live and where every patched function goes. Writes nothing."""
        self.target.check_alive()
        ledger = self.ledger
        ledger.refresh()
        live = ledger.generation
        placed = {p.address: p for p in ledger.journal.placed}
        current = ledger.view().bodies
        free = ledger.journal.free
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
            ArenaUse(a.base, a.end - a.base, a.bytes_used(ledger.usages[a.base], free)) for a in ledger.arenas.values()
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
        for name in _NEEDED_LATER:
            import_module(name)
        self._await_loaded()
        self.image.executable.module.symbols.named("main")
        self.units.know_layouts(self.image.executable)
        self.ledger.refresh()

    def warm(self, paths: Sequence[Path]) -> None:
        """Have what compiling the next saves needs made ready in the background."""
        if not self.options.build:
            self.units.warm(paths)

    def _await_loaded(self) -> None:
        # A program that was started a moment ago is still being put together by its dynamic linker.
        deadline = time.monotonic() + 2.0
        needed = self.image.executable.module.needed
        while time.monotonic() < deadline:
            self.image.refresh()
            if len(self.image.scope()) > len(needed) or not needed:
                return
            time.sleep(0.005)


def _made_again(
    make: Callable[[Part], Part | None],
    units: Units,
    parts: Sequence[Part],
    waiting: Sequence[Part],
    error: FarData | StaticModel,
) -> tuple[list[Part], list[Part]]:
    """Have the unit of the object that `error` is about compiled otherwise; raise it where that is not possible."""

    def made(part: Part) -> Part:
        found = make(part) if part.blocks.object is error.object else part
        if found is None:
            raise error
        return found

    own = any(part.blocks.object is error.object for part in (*parts, *waiting))
    if not own and not units.supply_again(error.object, make):
        raise error
    return [made(p) for p in parts], [made(p) for p in waiting]


__all__ = ["ArenaUse", "Generation", "ObjectUse", "Options", "PatchedFunction", "Session", "Status"]
