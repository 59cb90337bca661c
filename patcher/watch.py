"""Which files were saved.

Decides what counts as a save of a source file (every write in place, rename over it, or creation) and when it is
complete: once nobody has the file open for writing. It does not look at contents, save to leave out what was delivered
already (editors set attributes after the last write), and does not know what a save leads to.
Specification: inotify(7) through watchfiles; fcntl(2) F_SETLEASE: a read lease is refused while
the file is open for writing.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from watchfiles._rust_notify import RustNotify, WatchfilesRustInternalError

from patcher.errors import PatcherError

SourceFilter = Callable[[Path], bool]

_SUFFIXES = frozenset(
    ".c .h .cc .cpp .cxx .c++ .cp .C .hh .hpp .hxx .h++ .H .inc .inl .ipp .tcc .s .S .sx".split()  # noqa: SIM905
)
_BUILD_FILES = frozenset(
    "compile_commands.json build.ninja Makefile makefile GNUmakefile CMakeLists.txt meson.build".split()  # noqa: SIM905
)
_SKIPPED_DIRECTORIES = frozenset({".git", ".hg", ".svn", ".bzr", ".jj"})

_STEP_MS = 3  # an event waits one or two of these; an idle one costs 0.2 % of a processor each 1,000 a second
_GROUP_MS = 15  # a stream of events that does not end is delivered in pieces of this
_OPEN_POLL_SECONDS = 0.001
_OPEN_LIMIT_SECONDS = 2.0  # something that keeps a file open for longer than this is not an editor saving
_YOUNG_SECONDS = 0.5  # until when files may appear in a new directory before the kernel tells us of them
_YOUNG_POLL_SECONDS = 0.02
_MANY = 8  # files at once are not saved by hand
_QUIET_SECONDS = 0.15


def source_filter(extensions: Iterable[str] = ()) -> SourceFilter:
    """Return the predicate for source files by name: C, C++, assembly, headers, and further extensions (`.y`).

    What says how they are built counts as well.
    """
    suffixes = _SUFFIXES | {extension if extension.startswith(".") else f".{extension}" for extension in extensions}

    def is_source(path: Path) -> bool:
        # .#name.c is an editor's lock
        return (path.suffix in suffixes and not path.name.startswith(".#")) or is_build_file(path)

    return is_source


def is_build_file(path: Path) -> bool:
    """Tell whether a file says how others are built."""
    return path.name in _BUILD_FILES or path.suffix == ".mk"


def gathered(watcher: Watcher, saved: frozenset[Path], lock: Callable[[], bool]) -> frozenset[Path]:
    """Return what was saved with all that follows at once, where that looks like the work of a tool: many files.

    `lock` tells whether one is at work (git, on a checkout). It is not waited for in vain: an editor that git started
    holds it as well.
    """
    while len(saved) >= _MANY or (len(saved) > 1 and lock()):
        more = watcher.next(_QUIET_SECONDS)
        if not more:
            break
        saved |= more
    return saved


def git_lock(paths: Sequence[Path]) -> Callable[[], bool]:
    """Return whether git is changing a tree that some paths are in."""
    above = {place for path in paths for place in (path.resolve(), *path.resolve().parents)}
    locks = [place / ".git" / "index.lock" for place in above if (place / ".git").is_dir()]
    return lambda: any(lock.exists() for lock in locks)


def saves(
    paths: Sequence[Path], *, stop: threading.Event | None = None, is_source: SourceFilter | None = None
) -> Iterator[frozenset[Path]]:
    """Yield the source files saved together, again and again, until `stop` is set. See Watcher."""
    with Watcher(paths, stop=stop, is_source=is_source) as watcher:
        while (saved := watcher.next()) is not None:
            yield saved


@dataclass(frozen=True, slots=True)
class _Stamp:
    """What a delivered file was: the same again is no save (contents too: two writes can fall into one clock tick)."""

    inode: int
    modified: int
    size: int
    contents: bytes


class Watcher:
    """Watches files and directories (with everything below them) for saves, from the moment it is made.

    The paths delivered are absolute and resolved. To be used from one thread, which Ctrl-C may interrupt; `stop` may be
    set from any.
    """

    def __init__(
        self, paths: Sequence[Path], *, stop: threading.Event | None = None, is_source: SourceFilter | None = None
    ) -> None:
        """Begin to watch. Raises PatcherError when a path is not there or cannot be watched."""
        self._stop = stop or threading.Event()
        self._closed = threading.Event()
        self._woken = threading.Event()
        self._is_source = is_source or source_filter()
        self._news = threading.Condition()
        self._changed: set[str] = set()
        self._failure: Exception | None = None
        self._open: dict[Path, float] = {}  # saved but perhaps not complete: until when to wait
        self._young: dict[Path, float] = {}  # new directories: until when to look into them
        self._looked: float = 0.0
        self._delivered: dict[Path, _Stamp] = {}
        self._roots, self._files = _divide(paths)
        self._files |= {file for root in self._roots for file in _linked_from(root, self._is_source)}
        self._readers: list[threading.Thread] = []
        self._notifiers: list[RustNotify] = []
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def next(self, timeout: float | None = None) -> frozenset[Path] | None:
        """Wait for saves and return the files; None at the end (`stop` or `close`).

        Returns an empty set after `timeout` s, and when it is woken.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._is_over():
            ready = self._complete()
            if ready:
                return ready
            left = None if deadline is None else deadline - time.monotonic()
            if (left is not None and left <= 0) or self._woken.is_set():
                self._woken.clear()
                return frozenset()
            self._wait(left)
        return None

    def wake(self) -> None:
        """Have `next` return now, or when it is called; may be called from any thread."""
        self._woken.set()
        with self._news:
            self._news.notify_all()

    def pending(self) -> bool:
        """Tell, without waiting, whether something was saved, or is being saved, that `next` has not returned yet."""
        self._take_news()
        return bool(self._open)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        for thread in self._readers:
            thread.join()
        for notifier in self._notifiers:
            notifier.close()
        self._readers.clear()
        self._notifiers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def is_set(self) -> bool:
        """Tell whether watching is to end (the name that the notifier asks for)."""
        return self._closed.is_set() or self._stop.is_set()

    def _begin(self) -> None:
        wanted = [(sorted(map(str, self._roots)), True), (sorted({str(file.parent) for file in self._files}), False)]
        wanted = [(paths, recursive) for paths, recursive in wanted if paths]
        for paths, recursive in wanted:
            notifier = _notifier(paths, recursive)
            self._notifiers.append(notifier)
            reader = threading.Thread(
                target=self._read, args=(notifier, _STEP_MS * len(wanted)), name="watch", daemon=True
            )
            self._readers.append(reader)
            reader.start()

    def _read(self, notifier: RustNotify, step: int) -> None:
        """Collect the names of changed files; in a thread, for at a time-out watchfiles drops what came just then."""
        try:
            while isinstance(news := notifier.watch(_GROUP_MS, step, 0, self), set):
                with self._news:
                    self._changed.update(path for _, path in news)
                    self._news.notify_all()
        except Exception as error:
            self._failure = error
        with self._news:
            self._news.notify_all()

    def _is_over(self) -> bool:
        if self._failure is not None:
            raise PatcherError(f"watching for saves failed: {self._failure}", "start again", code="watch")
        return self.is_set()

    def _wait(self, left: float | None) -> None:
        limits = [] if left is None else [left]
        if self._open:
            limits.append(_OPEN_POLL_SECONDS)
        elif self._young:
            limits.append(_YOUNG_POLL_SECONDS)
        with self._news:
            if not self._changed and not self._woken.is_set() and not self.is_set():
                self._news.wait(min(limits) if limits else None)

    def _take_news(self) -> None:
        with self._news:
            changed, self._changed = self._changed, set()
        now = time.monotonic()
        for path in map(Path, changed):
            if path.is_dir():
                self._meet_directory(path, now)
            else:
                self._meet(path, now)
        if self._young and now - self._looked >= _YOUNG_POLL_SECONDS:
            self._look_into_young(now)

    def _meet_directory(self, path: Path, now: float) -> None:
        if not _is_skipped(path, self._roots) and any(path.is_relative_to(root) for root in self._roots):
            self._young.setdefault(path, now + _YOUNG_SECONDS)

    def _meet(self, path: Path, now: float) -> None:
        """Take in a changed file, unless it is none of ours, or gone, or what was delivered already."""
        if path not in self._files and (not self._is_source(path) or not self._is_below(path)):
            return
        real = path.resolve()
        stamp = _stamp(real)
        if stamp is not None and stamp != self._delivered.get(real):
            self._open.setdefault(real, now + _OPEN_LIMIT_SECONDS)

    def _is_below(self, path: Path) -> bool:
        return any(path.is_relative_to(root) for root in self._roots) and not _is_skipped(path, self._roots)

    def _look_into_young(self, now: float) -> None:
        """Find files that were written into a new directory before the kernel watched it."""
        self._looked = now
        for directory in list(self._young):
            for place, _, names in os.walk(directory):
                for name in names:
                    self._meet(Path(place, name), now)
            if now > self._young[directory]:
                del self._young[directory]

    def _complete(self) -> frozenset[Path]:
        """Return the saved files that nobody writes to any more, and remember them."""
        self._take_news()
        now = time.monotonic()
        ready = set()
        for path, limit in list(self._open.items()):
            if now < limit and _is_open_for_writing(path):
                continue
            del self._open[path]
            stamp = _stamp(path)
            if stamp is not None:  # else it was a temporary file
                self._delivered[path] = stamp
                ready.add(path)
        return frozenset(ready)


def _divide(paths: Sequence[Path]) -> tuple[frozenset[Path], frozenset[Path]]:
    """Return the directories and the files to watch: files under the given name and, for a link, where it leads to."""
    roots, files = set(), set()
    for path in paths:
        if not path.exists():
            raise PatcherError(
                f"{path}: nothing there to watch", "give --watch a file or directory that exists", code="watch"
            )
        if path.is_dir():
            roots.add(path.resolve())
        else:
            files |= {path.parent.resolve() / path.name, path.resolve()}
    return frozenset(roots), frozenset(files)


def _linked_from(root: Path, is_source: SourceFilter) -> Iterator[Path]:
    """Yield the source files elsewhere that links below a directory lead to: a write there is no event here."""
    for place, directories, names in os.walk(root):
        directories[:] = [name for name in directories if name not in _SKIPPED_DIRECTORIES]
        for path in (Path(place, name) for name in names):
            if is_source(path) and path.is_symlink() and path.exists():
                target = path.resolve()
                if not target.is_relative_to(root):
                    yield target


def _notifier(paths: list[str], recursive: bool) -> RustNotify:
    try:
        return RustNotify(paths, False, False, 300, recursive, True)
    except (OSError, WatchfilesRustInternalError) as error:
        raise PatcherError(
            f"{', '.join(paths)}: cannot be watched: {error}",
            "watch fewer directories, or raise fs.inotify.max_user_watches (sysctl)",
            code="watch",
        ) from None


def _is_skipped(path: Path, roots: frozenset[Path]) -> bool:
    below = max((root for root in roots if path.is_relative_to(root)), key=lambda root: len(root.parts), default=None)
    return below is not None and not _SKIPPED_DIRECTORIES.isdisjoint(path.relative_to(below).parts)


def _stamp(path: Path) -> _Stamp | None:
    """Return what a regular file is now; None when there is none."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return None
        contents = hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    except OSError:
        return None
    return _Stamp(status.st_ino, status.st_mtime_ns, status.st_size, contents)


def _is_open_for_writing(path: Path) -> bool:
    """Tell whether someone has a file open for writing; False where file system or owner do not let us ask."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # whoever opens the file for writing meanwhile has the lease broken by a signal: one that is ignored by default
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
