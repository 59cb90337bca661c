"""Objects that need not be made again: a header was saved, and what the preprocessor makes of the unit is the same.

A macro that a unit does not use, a block that `#if` leaves out, a save without a change. After each compile the unit is
preprocessed in the background, and its object kept; when only headers changed since, it is preprocessed first.
Decides where that pays. Measured, in processor time: the preprocessor takes 3 to 5 % of a C++ compile with standard
headers, 4 to 10 % of a C compile at -O2, 13 to 43 % at -O0. So it is asked only about units it takes less than half of
the compile for, only if a first few of them, one a processor, take less than a quarter of all that would be compiled,
and about the rest only if one of the first is unchanged. Never for a saved source: nearly every such save changes its
text, and comments are known without (`preamble`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from patcher.build.background import Background
from patcher.build.command import CompileCommand
from patcher.build.dependencies import prerequisites, read_listing
from patcher.build.expansion import Expansion, expansion_of
from patcher.build.preamble.command import Rewriting, rewriting_of
from patcher.build.preamble.inputs import Stamp, stamp_of
from patcher.build.running import Job, run_all
from patcher.build.toolchain import identify, program_stamp
from patcher.errors import PatcherError

_HALF = 0.5  # of the compile's time, at most, for a unit to be asked about
_QUARTER = 0.25  # of the time that all would take, at most, for the first few
_LIMIT = 256 << 20  # bytes of objects that are kept
_SHARE = 8  # and at most one part in so many of what is free, which may be memory
_TICK_SECONDS = 0.02  # beyond the kernel's coarse clock
_COARSE = 5  # CLOCK_REALTIME_COARSE: what a file that is written now is stamped with

_Key = tuple[Path, tuple[str, ...], Path]


@dataclass(frozen=True, slots=True)
class Compiled:
    """A compile that ended well: when it began (`now`), what it read, and its milliseconds."""

    command: CompileCommand
    object: Path
    listing: str
    began: int
    milliseconds: float


@dataclass(frozen=True, slots=True)
class Found:
    """The object of a unit's text as it is now, and what that text was read from, as a dependency file."""

    object: Path
    listing: str
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Task:
    done: Compiled
    rewriting: Rewriting
    kept: Path
    own: Stamp | None  # of the unit's file
    compiler: Stamp | None


@dataclass(frozen=True, slots=True)
class _Known:
    task: _Task
    digest: bytes
    cost: float  # milliseconds of the preprocessor
    size: int


def now() -> int:
    """Return what a file that is written from now on is stamped with at least, in nanoseconds since the epoch."""
    return time.clock_gettime_ns(_COARSE)


def worth_asking(times: Sequence[tuple[float, float]], processors: int) -> tuple[list[int], list[int]]:
    """Return which units to ask about first, and which if one of those is unchanged, by their places.

    `times` are those of the preprocessor and of the compiler, for each.
    """
    asked = sorted((n for n, (cost, whole) in enumerate(times) if cost < _HALF * whole), key=lambda n: times[n][0])
    first = asked[:processors]
    saved = sum(times[n][1] for n in asked) / max(len(first), 1)
    lost = max((times[n][0] for n in first), default=0.0)
    return (first, asked[processors:]) if lost < _QUARTER * saved else ([], [])


class Expansions:
    """Of one session; to be used from one thread, beside which it has another."""

    def __init__(self, directory: Path, environment: dict[str, str], background: Background) -> None:
        """`directory` is made, and removed by `close`; `environment` is that of the compilers."""
        self._directory = directory
        self._environment = environment
        self._background = background
        self._known: dict[_Key, _Known] = {}  # the oldest first
        self._waiting: dict[_Key, _Task] = {}
        self._plain: dict[_Key, float] = {}  # the time of a compile without a preamble
        self._costs: dict[_Key, float] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._numbers = count(1)

    def find(self, commands: Sequence[CompileCommand], cancelled: Callable[[], bool]) -> dict[int, Found]:
        """Return, by their places among `commands`, what need not be compiled. Raises BuildCancelled."""
        with self._changed:
            known = {n: self._known.get(_key(command)) for n, command in enumerate(commands)}
        asked = [(n, k) for n, k in known.items() if k is not None and _only_headers(k)]
        first, rest = worth_asking([(k.cost, k.task.done.milliseconds) for _, k in asked], os.cpu_count() or 1)
        found = self._unchanged([asked[n] for n in first], cancelled)
        return found | self._unchanged([asked[n] for n in rest], cancelled) if found else found

    def learn(self, done: Compiled, *, plain: bool) -> None:
        """Keep an object that was just made, and find out in the background what its text is.

        `plain`: as it would be made once a header is another.
        """
        key = _key(done.command)
        if plain:
            self._plain[key] = done.milliseconds
        milliseconds = self._plain.get(key, done.milliseconds)
        if self._costs.get(key, 0.0) > _HALF * milliseconds:
            return
        with contextlib.suppress(OSError, PatcherError):
            rewriting = rewriting_of(done.command, identify(done.command.arguments, done.command.directory))
            if isinstance(rewriting, Rewriting):
                done = Compiled(done.command, done.object, done.listing, done.began, milliseconds)
                self._wait_for(key, self._task(done, rewriting))

    def wait(self) -> None:
        """Wait until nothing is left to be found out."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting or self._closed)

    def close(self) -> None:
        """Stop, and remove what is kept; whoever made the background ends what runs in it before."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        shutil.rmtree(self._directory, ignore_errors=True)

    # --- when a header was saved --------------------------------------------------------------------------------

    def _unchanged(self, asked: Sequence[tuple[int, _Known]], cancelled: Callable[[], bool]) -> dict[int, Found]:
        if not asked:
            return {}
        with tempfile.TemporaryDirectory(dir=self._directory) as place:
            jobs = [_job(known.task, Path(place, str(number))) for number, known in asked]
            try:
                outcomes = run_all(jobs, environment=self._environment, cancelled=cancelled)
            except OSError:
                return {}  # whoever compiles says what is missing
            found = {}
            for (number, known), job, outcome in zip(asked, jobs, outcomes, strict=True):
                text = _expansion(known.task, job.output) if outcome.status == 0 else None
                if text is not None and text.digest == known.digest and known.task.kept.exists():
                    listing = read_listing(job.output.with_suffix(".d"))
                    found[number] = Found(known.task.kept, listing, known.task.rewriting.words)
            return found

    # --- in the background --------------------------------------------------------------------------------------

    def _task(self, done: Compiled, rewriting: Rewriting) -> _Task:
        self._directory.mkdir(mode=0o700, exist_ok=True)
        kept = self._directory / f"{next(self._numbers)}.o"
        os.link(done.object, kept)
        command = done.command
        return _Task(done, rewriting, kept, stamp_of(command.file), program_stamp(command.arguments, command.directory))

    def _wait_for(self, key: _Key, task: _Task) -> None:
        with self._changed:
            before = self._waiting.pop(key, None)
            if before is not None:
                before.kept.unlink(missing_ok=True)
            self._waiting[key] = task
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="expansions", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                key, task = next(iter(self._waiting.items()))
            known: _Known | None = None
            with contextlib.suppress(OSError):
                known = self._looked_at(key, task)
            with self._changed:
                if self._waiting.get(key) is task:
                    del self._waiting[key]
                    self._replace(key, task, known)
                self._changed.notify_all()

    def _looked_at(self, key: _Key, task: _Task) -> _Known | None:
        time.sleep(_TICK_SECONDS)
        with tempfile.TemporaryDirectory(dir=self._directory) as place:
            job = _job(task, Path(place, "text"))
            said = job.output.with_suffix(".out")
            cost = self._background.run(job.arguments, job.directory, said, self._environment)
            text = _expansion(task, job.output) if cost is not None else None
        if cost is None or text is None or not _read_the_same(task, text):
            return None
        self._costs[key] = cost * 1e3
        return _Known(task, text.digest, cost * 1e3, task.kept.stat().st_size)

    def _replace(self, key: _Key, task: _Task, known: _Known | None) -> None:
        before = self._known.pop(key, None)
        if before is not None:
            before.task.kept.unlink(missing_ok=True)
        if known is None:
            task.kept.unlink(missing_ok=True)
            return
        self._known[key] = known
        size = sum(k.size for k in self._known.values())
        limit = min(_LIMIT, (shutil.disk_usage(self._directory).free + size) // _SHARE)
        while size > limit:
            oldest = self._known.pop(next(iter(self._known)))
            oldest.task.kept.unlink(missing_ok=True)
            size -= oldest.size


def _key(command: CompileCommand) -> _Key:
    return command.directory, command.arguments, command.file


def _job(task: _Task, output: Path) -> Job:
    rule = output.with_suffix(".d")
    return Job(task.rewriting.expanding(output, rule), task.done.command.directory, output)


def _expansion(task: _Task, output: Path) -> Expansion | None:
    words = task.rewriting.words
    exact = task.rewriting.language != "c" or any(word.startswith("-fsanitize") for word in words)
    try:
        return expansion_of(output.read_bytes(), exact=exact)
    except OSError:
        return None


def _only_headers(known: _Known) -> bool:
    """Tell whether a unit's own file and its compiler are what they were."""
    command = known.task.done.command
    same = stamp_of(command.file) == known.task.own
    return same and program_stamp(command.arguments, command.directory) == known.task.compiler


def _read_the_same(task: _Task, text: Expansion) -> bool:
    """Tell whether a text is surely the one that was compiled: it was read from the same files, none of them changed.

    Nor did a directory of theirs, where a header may have come or gone that one asks for by `__has_include`.
    """
    command = task.done.command
    read = frozenset(prerequisites(task.done.listing, command.directory))
    named = frozenset(Path(os.path.realpath(command.directory / name)) for name in text.files)
    places = {file.parent for file in read if not str(file).startswith("/usr/")}
    stamps = [stamp_of(path) for path in (*read, *places)]
    old = all(stamp is not None and max(stamp[:2]) < task.done.began for stamp in stamps)
    return bool(read) and named <= read and old
