"""Finding out what every unit includes: in the background from the start on, and at once when a header is saved.

Decides what is asked, and when: records of the user's build first, then the compiler, unit after unit, at the lowest
priority and never beside a compile that a save waits for. What is not known yet when a header is saved is asked by
whoever wants to know, on all processors. Answers go to `Dependencies`.
Specification: setpriority(2): the niceness is the thread's own, and its children inherit it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from patcher.build.command import CompileCommand, listing_arguments, object_of
from patcher.build.dependencies import Dependencies, beside_object, noted_by_ninja, prerequisites, read_listing
from patcher.build.running import BuildCancelled, Job, never, run_all
from patcher.build.workplace import Workplace
from patcher.errors import PatcherError

_LEAST = 19
_LOOK_SECONDS = 0.01

Say = Callable[[int], None]
Progress = Callable[[int, int], None]


class Gathering:
    """Gathers, for one session, what its units include. To be used from one thread; has another of its own."""

    def __init__(self, dependencies: Dependencies, units: Callable[[], Sequence[CompileCommand]]) -> None:
        """`units` returns the commands of all units that count; it is called in the background."""
        self._dependencies = dependencies
        self._units = units
        self._commands: tuple[CompileCommand, ...] = ()
        self._listed = threading.Event()
        self._closed = threading.Event()
        self._free = threading.Event()  # nobody waits for a compile
        self._free.set()
        self._holds = 0
        self._thread: threading.Thread | None = None
        self._workplace: Workplace | None = None

    def start(self) -> None:
        """Begin to gather in the background, anew if that was done before."""
        self._end()
        self._closed.clear()
        self._listed.clear()
        self._workplace = Workplace()
        self._thread = threading.Thread(target=self._gather, name="dependencies", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End what is under way."""
        self._end()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Start no compiler in the background during the block."""
        self._holds += 1
        self._free.clear()
        try:
            yield
        finally:
            self._holds -= 1
            if not self._holds:
                self._free.set()

    def left(self) -> int:
        """Return how many units are left to ask about; 0 until it is known which there are."""
        running = self._thread is not None and self._thread.is_alive()
        return sum(not self._dependencies.knows(c.file) for c in self._commands) if running else 0

    def complete(
        self,
        *,
        cancelled: Callable[[], bool] = never,
        say: Say | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Return when it is known of every unit what it includes, save for those that the compiler cannot tell of.

        `say` is told how many units are left to ask, if any, and `progress` how many of them were. Raises
        BuildCancelled.
        """
        if self._thread is None:
            self.start()
        while not self._listed.wait(_LOOK_SECONDS):
            if cancelled():
                raise BuildCancelled("the build was cancelled", "the newer save is built instead")
        with self.held():
            missing = [c for c in self._commands if not self._dependencies.knows(c.file)]
            if missing and say is not None:
                say(len(missing))
            self._ask(missing, cancelled, os.cpu_count() or 1, progress)

    def _end(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._workplace is not None:
            self._workplace.close()
            self._workplace = None

    # --- in the background -------------------------------------------------------------------------------------

    def _gather(self) -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST)
        with suppress(PatcherError, OSError):  # whoever compiles says what is wrong
            self._commands = tuple(self._units())
            self._take_records()
        self._listed.set()
        for command in self._commands:
            while not self._closed.is_set() and not self._free.wait(_LOOK_SECONDS):
                continue
            if self._closed.is_set():
                return
            if not self._dependencies.knows(command.file):
                with suppress(BuildCancelled):
                    self._ask([command], self._closed.is_set, 1)

    def _take_records(self) -> None:
        by_ninja = {place: noted_by_ninja(place) for place in {c.directory for c in self._commands}}
        for command in self._commands:
            if self._closed.is_set():
                return
            made = object_of(command)
            noted = by_ninja[command.directory].get(Path(os.path.realpath(made))) if made is not None else None
            for record in (noted, beside_object(command)):
                if record is not None and record.is_current():
                    self._dependencies.learn_first(command.file, record.files)

    # --- asking the compiler -----------------------------------------------------------------------------------

    def _ask(
        self,
        commands: Sequence[CompileCommand],
        cancelled: Callable[[], bool],
        at_once: int,
        progress: Progress | None = None,
    ) -> None:
        if not commands or self._workplace is None:
            return
        place = Path(tempfile.mkdtemp(dir=self._workplace.path))
        asked = []
        for number, command in enumerate(commands):
            with suppress(PatcherError):  # a command that cannot be rewritten tells nothing
                listing = place / f"{number}.d"
                job = Job(listing_arguments(command, listing), command.directory, place / f"{number}.out")
                asked.append((command, listing, job))
        environment = {**os.environ, "TMPDIR": str(place)}
        try:
            jobs = [job for _, _, job in asked]
            run_all(jobs, environment=environment, cancelled=cancelled, at_once=at_once, progress=progress)
        except OSError:
            return  # no compiler: whoever compiles says so
        for command, listing, _ in asked:
            files = prerequisites(read_listing(listing), command.directory)
            if files:
                self._dependencies.learn_first(command.file, files)
        shutil.rmtree(place, ignore_errors=True)
