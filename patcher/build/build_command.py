"""The user's own build command (`--build`): running it and seeing which objects it made.

Decides which files count as made by it: objects that are new, or that were written, below the given directories.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from patcher.build.running import BuildCancelled, Job, never, run_all
from patcher.build.workplace import Workplace
from patcher.errors import BuildError

_OBJECT_SUFFIXES = (".o", ".obj")
_SKIPPED = frozenset({".git", ".hg", ".svn"})
_LOOK_SECONDS = 0.02

_Stamp = tuple[int, int, int, int]


class BuildCommand:
    """A command line of the user's, for /bin/sh, run in a directory after each save."""

    def __init__(self, command: str, *, directory: Path, objects_in: Sequence[Path] = ()) -> None:
        """`objects_in` are the directories below which objects appear, beside `directory`."""
        self.command = command
        self.directory = directory.absolute()
        self._roots = tuple(dict.fromkeys([self.directory, *(path.absolute() for path in objects_in)]))
        self._taken = self._seen = self._objects()

    def outstanding(self) -> tuple[Path, ...]:
        """Return the objects that changed since `take` was called last, whoever made them; sorted."""
        self._seen = self._objects()
        return tuple(sorted(path for path, stamp in self._seen.items() if self._taken.get(path) != stamp))

    def take(self) -> None:
        """Note that what was outstanding is live."""
        self._taken = self._seen

    def run(self, changed: Sequence[Path], *, cancelled: Callable[[], bool] = never) -> tuple[Path, ...]:
        """Run the command and return the objects that it created or wrote, sorted (archive members are not looked at).

        `changed` are the saved files it is run for. Raises BuildError with its whole output when it fails,
        BuildCancelled when it was ended before.
        """
        with _turn(self.directory, cancelled):
            return self._run(changed, cancelled)

    def _run(self, changed: Sequence[Path], cancelled: Callable[[], bool]) -> tuple[Path, ...]:
        before = self._objects()
        with Workplace() as place:
            try:
                job = Job(("/bin/sh", "-c", self.command), self.directory, place.path / "output")
                (outcome,) = run_all([job], environment=dict(os.environ), cancelled=cancelled)
            except OSError as error:
                raise BuildError(
                    f"--build {self.command}: {error.filename}: {error.strerror}", "name a directory that is there"
                ) from None
        if outcome.status != 0:
            how = f"signal {-outcome.status}" if outcome.status < 0 else f"status {outcome.status}"
            raise BuildError(
                f"--build {self.command}: ended with {how} in {self.directory}",
                "fix what it says and save again",
                file=str(changed[0]) if changed else "",
                diagnostics=outcome.output,
            )
        return tuple(sorted(path for path, stamp in self._objects().items() if before.get(path) != stamp))

    def _objects(self) -> dict[Path, _Stamp]:
        return {Path(path): stamp for root in self._roots for path, stamp in _objects_below(root)}


@contextmanager
def _turn(directory: Path, cancelled: Callable[[], bool]) -> Iterator[None]:
    """Let no other patcher build in a directory during the block: two watches over one tree see the same saves."""
    try:
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield  # the command itself shows what is wrong
        return
    try:
        while not _locked(lock):
            if cancelled():
                raise BuildCancelled("the build was cancelled", "the newer save is built instead")
            time.sleep(_LOOK_SECONDS)
        yield
    finally:
        os.close(lock)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


def _objects_below(root: Path) -> Iterator[tuple[str, _Stamp]]:
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if name not in _SKIPPED]
        for file in files:
            if file.endswith(_OBJECT_SUFFIXES):
                path = os.path.join(directory, file)
                try:
                    status = os.stat(path)
                except OSError:
                    continue  # gone meanwhile
                yield path, (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
