r"""Saves, one round after another: what is saved together goes live together, or is reported and stays pending.

    saved --> build --> applied | unchanged
                |  \-> refused                  the file stays pending: the next save takes it along
                \--> failed                     likewise
                \--> saved again meanwhile      cancelled: the next round has everything

A round first tries what is saved with what is pending; if that does not go, what is saved alone, so that a file
that is refused does not hold up the others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from patcher.build import BuildCancelled, BuildCommand, is_unit
from patcher.errors import BuildError, PatcherError, TargetGone
from patcher.ignored import IGNORE, Ignored
from patcher.report import BuildFailed, Note, Ready, Refused, Saved
from patcher.session import Session
from patcher.watch import Watcher, source_filter

Pending = Callable[[], bool]


class Loop:
    """Watches for one session."""

    def __init__(self, session: Session, paths: Sequence[Path]) -> None:
        self.session = session
        self.paths = tuple(paths)
        self._pending: set[Path] = set()
        self._built: set[Path] = set()  # what compiled at least once: its command is right
        self._told: set[str] = set()  # whose rules were told of
        build = session.options.build
        roots = [p.resolve() for p in paths]
        self._builder = (
            BuildCommand(build, directory=session.options.build_in or Path.cwd(), objects_in=roots) if build else None
        )

    def run(self, stop: threading.Event) -> None:
        """Apply every save until `stop` is set. Raises `TargetGone` when the process ends."""
        session = self.session
        options = session.options
        wanted = Ignored(
            self.paths,
            source_filter(),
            globs=options.ignore,
            globs_from=options.ignore_from or Path.cwd(),
            git=options.gitignore,
        )
        with Watcher(self.paths, stop=stop, is_source=wanted) as watcher:
            session.remember_texts(self.paths)
            session.prepare()
            session.emit(Ready(session.target.pid, session.target.program, tuple(str(p) for p in self.paths)))
            session.warm(self.paths)
            while not stop.is_set():
                saved = watcher.next(0.5)
                self._say_left_out(wanted.left_out)
                if saved is None:
                    return
                if saved:
                    self.round(saved, watcher.pending)
                else:
                    session.target.check_alive()

    def round(self, saved: Iterable[Path], pending: Pending) -> None:
        """Handle one round of saves; `pending` tells whether more was saved meanwhile.

        Raises `TargetGone` only: without a target there is nothing to go on with.
        """
        began = time.perf_counter()
        detect = _since_save(saved)
        self.session.emit(Saved(tuple(sorted(str(p) for p in saved))))
        units = {p for p in saved if p.exists() and (self._builder is not None or is_unit(p))}
        if not units:
            self._say_untouched(saved)
            return
        together = units | {p for p in self._pending if p.exists()}
        attempts = [together, units] if together != units else [units]
        self._pending |= units
        with suppress(BuildCancelled):  # saved again while it was compiled: the next round has everything
            for attempt in attempts:
                error = self._try(sorted(attempt), began, detect, pending)
                if error is None:
                    self._pending -= attempt
                    return
                if attempt is units:
                    self._report(error, sorted(units))

    def _say_left_out(self, left_out: Mapping[str, Path]) -> None:
        """Say once for each .gitignore that a save is left alone for it: --ignore was asked for, this was not."""
        for rule, path in left_out.items():
            if rule != IGNORE and rule not in self._told:
                self._told.add(rule)
                hint = "give it to --watch by name, or --no-gitignore, to have such files applied"
                self.session.emit(Note(f"{path.name}: left alone, as {rule} ignores it; {hint}"))

    def _say_untouched(self, saved: Iterable[Path]) -> None:
        names = ", ".join(sorted(p.name for p in saved if p.exists()))
        if names:
            self.session.emit(Note(f"{names}: no source file; save one that includes it to have it compiled"))

    def _try(self, files: Sequence[Path], began: float, detect: float, pending: Pending) -> PatcherError | None:
        try:
            inputs = self._builder.run(files, cancelled=pending) if self._builder is not None else files
            outcome = self.session.change(inputs, began=began, detect=detect, cancelled=pending)
        except BuildCancelled:
            raise
        except PatcherError as error:
            if isinstance(error, TargetGone):
                raise
            return error
        self._built.update(files)
        self.session.report(outcome, files)
        return None

    def _report(self, error: PatcherError, files: Sequence[Path]) -> None:
        named = ", ".join(str(f) for f in files)
        if isinstance(error, BuildError):
            hint = "" if self._built.issuperset(files) else error.hint
            self.session.emit(BuildFailed(error.file or named, error.diagnostics, error.message, hint))
        else:
            self.session.emit(Refused(error.code, error.message, error.hint, named))


def _since_save(files: Iterable[Path]) -> float:
    """Return the milliseconds since the last of some files was written."""
    written = 0.0
    for file in files:
        try:
            stat = file.stat()
        except OSError:
            continue
        # A rename keeps the time of writing, but changes the inode.
        written = max(written, stat.st_mtime, min(stat.st_ctime, time.time()))
    return max(0.0, (time.time() - written) * 1e3) if written else 0.0
