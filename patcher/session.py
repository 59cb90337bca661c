"""The story of one save: build, match, link, commit, report.

    files -> objects -> changes -> linked generation -> flip -> outcome

A session belongs to one process and one thread (the kernel lets only the thread that seized a process trace
it). It puts together what the options ask for, and tells of what came of it; how a change is made is `applying`'s
business, how it is gone back from `committing`'s.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from patcher.build import Dependencies
from patcher.data.outcome import Fate
from patcher.errors import UnsafeChange, named_shortages
from patcher.options import Options
from patcher.outcome import Generation
from patcher.report import Event, Explanation, Note, OldFrame, Reporter, Timings, Variable, Work
from patcher.target import Target
from patcher.texts import Texts

# What follows takes a third of a second to import (drgn, numpy, capstone), and `status` and `revert` need none of it.
if TYPE_CHECKING:
    from patcher.applying import Applying
    from patcher.committing import Committing
    from patcher.data.initial import Initials, Told
    from patcher.image import Image
    from patcher.linking import Linking
    from patcher.occupants import Occupants
    from patcher.patch.ledger import Ledger
    from patcher.patch.reclaim import Policy
    from patcher.status import Status
    from patcher.touched import Touched
    from patcher.units import Source, Standing, Units


_NEEDED_LATER = ("patcher.applying", "patcher.directory")
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
        self._units: Units | None = None
        self.frames: tuple[OldFrame, ...] = ()  # who was in old code after the last change
        self.texts = Texts()
        self.dependencies = Dependencies()
        self._touched: Touched | None = None

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

    @cached_property
    def image(self) -> Image:
        from patcher.image import Image

        return Image(self.target)

    @property
    def initials(self) -> Initials:
        """What the user wants of changed initialisers in the change at hand."""
        if self._initials is None:
            from patcher.data.initial import Initials

            self._initials = Initials(self.options.reinit, self._told)
        return self._initials

    @cached_property
    def policy(self) -> Policy:
        """What becomes of old generations and their memory."""
        from patcher.patch.reclaim import Policy

        return Policy(keep=self.options.keep)

    @cached_property
    def ledger(self) -> Ledger:
        from patcher.patch.ledger import Ledger

        return Ledger(self.target)

    @cached_property
    def occupants(self) -> Occupants:
        """Who is in old code."""
        from patcher.occupants import Occupants

        return Occupants(self.image, self.ledger, self.options)

    @cached_property
    def linking(self) -> Linking:
        from patcher.linking import Linking

        return Linking(self.units)

    @cached_property
    def committing(self) -> Committing:
        from patcher.committing import Committing

        return Committing(self.image, self.ledger, self.options, self.occupants, self._say)

    @cached_property
    def applying(self) -> Applying:
        from patcher.applying import Applying

        return Applying(self.units, self.linking, self.committing, self.occupants, self._say)

    @property
    def found(self) -> int:
        """The generation that was live before the last change."""
        return self.applying.found

    @property
    def units(self) -> Units:
        if self._units is None:
            from patcher.units import Units

            known = (self.options, self.texts, self.dependencies)
            self._units = Units(self.image, self.ledger, *known, self._say, self.working)
        return self._units

    @property
    def touched(self) -> Touched:
        """Which units saved headers touch."""
        if self._touched is None:
            from patcher.touched import Touched

            known = (self.options, self.texts, self.dependencies)
            self._touched = Touched(self.image, *known, self._say, self.working)
        return self._touched

    def working(self, what: str) -> Work:
        """Return a piece of work that is told of while it lasts, should it take its time."""
        return Work(what, self.emit)

    def in_background(self) -> Iterator[tuple[str, int]]:
        """Yield what is done in the background, and how many steps of it are left."""
        if self._touched is not None:
            yield "finding out what each unit includes", self._touched.left()
        if self._units is not None:
            yield "precompiling what units begin with", self._units.compiler.left()

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
        from patcher.applying import Offered
        from patcher.data.initial import Initials

        self._initials = Initials(self.options.reinit, self._told, strict=strict)
        self._offering = self._offer is not None and not self.options.reinit and not self.options.dry_run
        try:
            outcome = self.relink(compiled)
        except Offered as offered:
            # Outside of the transaction: nobody has to wait for the answer.
            accepted = self._offer is not None and self._offer(offered.variables)
            self._initials = Initials((), self._told, every=accepted)
            self._offering = False
            outcome = self.relink(compiled)
        now = time.perf_counter()
        build, stop = self.units.build_seconds * 1e3, outcome.timings.stop
        total = detect + (now - (began if began is not None else started)) * 1e3
        timings = Timings(detect, build, (now - started) * 1e3 - build - stop, stop, total)
        return replace(outcome, timings=timings, dry_run=self.options.dry_run)

    @named_shortages()
    def explain(self, *files: str | Path) -> Explanation:
        """Tell what `apply` would do, and whether it would be refused. Changes nothing.

        Raises `BuildError` and its kin for what does not compile or cannot be read.
        """
        self.target.check_alive()
        sources = self.units.sources([Path(f) for f in files], lambda: False)
        return self.applying.explain(sources, self.initials)

    def rehearse(self, sources: Sequence[Source]) -> set[str]:
        """Match and link objects as far as that goes without any effect; returns the modules that they are part of.

        Raises what `relink` would raise.
        """
        self.target.check_alive()
        return self.applying.rehearse(sources, self.initials)

    def relink(self, sources: Sequence[Source]) -> Generation:
        """Match objects against the process, and link and commit what is new, as one generation."""
        outcome = self.applying.apply(sources, self.initials, self.policy, ask=self._offering)
        self.frames = self.occupants.frames
        return outcome

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
                condition = self.occupants.condition(self.ledger.unused_at(generation))
                self.frames = self.occupants.look_around(self.committing.revert(live, generation, condition))
        return generation

    def take_back(self, generation: int) -> None:
        """Undo what was done a moment ago, whoever is in that code."""
        with self.ledger.transaction():
            if self.ledger.generation != generation:
                self.committing.revert(self.ledger.generation, generation, None)

    def previous(self) -> int:
        """Return the generation before the live one; 0 when that is the first, or the program as it was started."""
        live = self.ledger.generation
        return self.ledger.journal.before(live) if live else 0

    @named_shortages()
    def status(self) -> Status:
        """Tell which generation is live and where every patched function goes. Writes nothing."""
        from patcher.status import status_of

        self.target.check_alive()
        return status_of(self.ledger)

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
        with self.working(f"reading the debug information of {self.image.executable.name}"):
            self.units.agreement.know(self.image.executable)
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
