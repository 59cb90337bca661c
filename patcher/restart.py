"""RESTART: one watch over one process of a program after another.

    the program ends       built anew (--build), started again; edits that only the old process had are applied again
    a change is refused    built anew, and only then is the old process ended: a failing build leaves it running

Decides when a program is started again: not when whoever started us asked for its end, and not, before the next save,
when it ended as soon as it had been started. What an edit's state is then, `edits` decides; how it is built, `--build`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from patcher.build import BuildCancelled, BuildCommand
from patcher.control import Control
from patcher.errors import BuildError, PatcherError, TargetGone
from patcher.ignored import Ignored
from patcher.loop import Loop, builder_of, saves_wanted
from patcher.options import Options
from patcher.report import BuildFailed, Exited, Note, Reporter, Work
from patcher.session import Session
from patcher.target import JobControl, wait_exit
from patcher.watch import Watcher

_GRACE_SECONDS = 5.0  # for a program that is told to end
_TOLD_SECONDS = 5.0  # within this of a signal that ends programs, an end is what was asked for
_AT_ONCE_SECONDS = 1.0
_TICK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class When:
    """When a program is started again."""

    exit: bool
    refused: bool

    @classmethod
    def named(cls, word: str) -> When:
        """Return what `--restart` says."""
        return cls(word in ("exit", "always"), word in ("refused", "always"))


class Restarts:
    """Runs a program, and again when it is time to, with one watch over all its processes."""

    def __init__(
        self,
        start: Callable[[], int],
        session_of: Callable[[int], Session],
        jobs: JobControl,
        reporter: Reporter,
        when: When,
        options: Options,
        control: Control | None = None,
    ) -> None:
        """`start` starts the program and has signals forwarded to it; `options` say what makes it anew (`build`)."""
        self._start = start
        self._session_of = session_of
        self._jobs = jobs
        self._reporter = reporter
        self._when = when
        self._options = options
        self._control = control
        self._build: BuildCommand | None = None

    def run(self, paths: tuple[Path, ...]) -> int | None:
        """Start the program, and again as long as it is time to; return the last one's wait status."""
        self._build = builder_of(self._options, paths)
        pid = self._start()
        restarts = 0
        loop: Loop | None = None
        wanted_saves = saves_wanted(self._options, paths)
        with Watcher(paths, is_source=wanted_saves) as watcher:
            while True:
                began = time.monotonic()
                wanted = False
                try:
                    with self._session_of(pid) as session:
                        loop = self._loop(loop, session, paths, wanted_saves)
                        self._accompany(loop, watcher)
                        wanted = loop.wants_restart
                except TargetGone:
                    pass  # before we looked
                except PatcherError as error:
                    text = f"{error.message}; the program runs on without patcher. {error.hint}".rstrip(" .")
                    self._reporter.emit(Note(text, grave=True))
                if self._control is not None:
                    self._control.away()
                status = self._end(pid, told=wanted)
                self._report(status)
                if not wanted and (not self._when.exit or self._was_asked_for()):
                    return status
                brief = restarts > 0 and not wanted and time.monotonic() - began < _AT_ONCE_SECONDS
                if not self._make_ready(watcher, loop, brief):
                    return status
                restarts += 1
                pid = self._start()

    def _loop(self, loop: Loop | None, session: Session, paths: tuple[Path, ...], wanted: Ignored) -> Loop:
        if loop is None:
            return Loop(
                session,
                paths,
                wanted=wanted,
                builder=self._build,
                restarted_if_refused=self._when.refused,
                control=self._control,
            )
        loop.go_on(session, as_built=self._build is not None)
        return loop

    def _accompany(self, loop: Loop, watcher: Watcher) -> None:
        """Watch until the process ends, or is to be ended for a change that it refuses and that can be built."""
        while True:
            with suppress(TargetGone):
                loop.watch(watcher, self._jobs.ended)
            if not loop.wants_restart or self._built():
                return
            loop.wants_restart = False

    def _end(self, pid: int, *, told: bool) -> int | None:
        """Wait for the end of the process; `told`: it has to be told to end."""
        if told and not self._jobs.ended.is_set():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            status = wait_exit(pid, _GRACE_SECONDS)
            if status is not None:
                return status
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return wait_exit(pid)

    def _was_asked_for(self) -> bool:
        """Tell whether a program ended because of a signal that we handed on, or that a terminal sent us both."""
        return time.monotonic() - self._jobs.told_at < _TOLD_SECONDS

    def _report(self, status: int | None) -> None:
        if status is not None and os.WIFSIGNALED(status):
            self._reporter.emit(Exited(signal=os.WTERMSIG(status)))
        elif status is not None:
            self._reporter.emit(Exited(status=os.WEXITSTATUS(status)))

    def _make_ready(self, watcher: Watcher, loop: Loop | None, brief: bool) -> bool:
        """Build the program, once it is worth trying; return False when we are told to end meanwhile."""
        since = time.monotonic()
        if brief:
            self._reporter.emit(Note("it ended as soon as it was started: it is started again after the next save"))
        while self._jobs.told_at < since:
            saved = watcher.next(_TICK_SECONDS) if brief else frozenset()
            if brief and not saved:
                continue
            if loop is not None:
                loop.missed(saved or ())
            if self._built():
                self._reporter.emit(Note("the program is started again"))
                return True
            brief = True  # what does not build now builds after a save at the earliest
        return False

    def _built(self) -> bool:
        """Build the program as its sources are now; tell whether that succeeded."""
        if self._build is None:
            return True
        try:
            with Work(f"--build {self._build.command}", self._reporter.emit):
                self._build.run(())
        except BuildCancelled:
            return False
        except PatcherError as error:
            diagnostics = error.diagnostics if isinstance(error, BuildError) else ""
            self._reporter.emit(BuildFailed("", diagnostics, error.message, error.hint))
            return False
        return True
