"""Which units are likely to be edited next: those written last, and those that the latest commits changed.

Decides from times on disk and git's log alone; a wrong guess costs idle processor time.
Specification: git-log(1) --name-only.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from patcher.build.command import is_unit
from patcher.build.running import asked

_COMMITS = 20
_GIT_SECONDS = 2.0


def likely_units(paths: Sequence[Path], most: int) -> tuple[Path, ...]:
    """Return at most `most` source files at and below some paths, resolved, the likeliest first."""
    written = {path: time for root in paths for path, time in _units_below(root.resolve())}
    by_time = sorted(written, key=lambda path: written[path], reverse=True)[:most]
    committed = [path for path in _committed(paths) if path in written][:most]
    turns = [path for pair in zip(by_time, committed, strict=False) for path in pair]
    return tuple(dict.fromkeys([*turns, *by_time, *committed]))[:most]


def _units_below(root: Path) -> Iterator[tuple[Path, float]]:
    for path in [root] if root.is_file() else root.rglob("*"):
        if is_unit(path):
            try:
                yield path.resolve(), os.stat(path).st_mtime
            except OSError:
                continue  # gone meanwhile


def _committed(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield the files that the latest commits changed, the newest first; none where there is no git."""
    for root in dict.fromkeys(path if path.is_dir() else path.parent for path in paths):
        top = _git(root, "rev-parse", "--show-toplevel").rstrip("\n")
        names = _git(root, "log", "-z", f"-{_COMMITS}", "--name-only", "--format=", "--", ".") if top else ""
        yield from (Path(os.path.realpath(os.path.join(top, name))) for name in names.split("\0") if name)


def _git(directory: Path, *arguments: str) -> str:
    try:
        done = asked(("git", *arguments), _GIT_SECONDS, directory=directory)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return os.fsdecode(done.stdout) if done.returncode == 0 else ""
