"""Lines for an editor that runs a watch as a task: FILE:LINE:COLUMN: SEVERITY: MESSAGE, and when they begin and end.

    patcher: problems begin                       files were saved: what was told before holds no more
    /home/me/p/src/unit.c:5:15: error: expected expression before ';' token
    /home/me/p/src/unit.c:1:1: error: MESSAGE [REASON]; HINT       a refused change, which has no line
    patcher: problems end                         what was saved is live, or is not

FILE is absolute where that can be told; SEVERITY is error, warning or note. Everything else is told as without this.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from patcher.report.console import write
from patcher.report.events import Applied, BuildFailed, Event, Refused, Reporter, Saved, Unchanged, plain

_BEGIN = "patcher: problems begin\n"
_END = "patcher: problems end\n"
_PLACED = re.compile(
    r"(?P<file>[^:\n]+):(?P<line>\d+)(?::(?P<column>\d+))?: (?:fatal )?(?P<severity>error|warning|note): (?P<text>.+)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong, and where."""

    file: str
    line: int
    column: int
    severity: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.severity}: {self.message}"


def problems(event: BuildFailed | Refused) -> tuple[Problem, ...]:
    """Return what an event says is wrong, with places; a change as a whole is wrong at the start of its files."""
    if isinstance(event, BuildFailed):
        found = tuple(_placed(plain(event.diagnostics), event.file))
        if found:
            return found
        message = event.message or plain(event.diagnostics) or "does not compile"
        return (Problem(event.file or ".", 1, 1, "error", _one_line(message)),)
    message = f"{event.message} [{event.reason}]" + (f"; {event.hint}" if event.hint else "")
    return tuple(Problem(f, 1, 1, "error", _one_line(message)) for f in (event.file or ".").split(", "))


class ProblemReport:
    """Writes problems for editors, and hands everything else on to a report for people."""

    def __init__(self, stream: TextIO, others: Reporter) -> None:
        self._stream = stream
        self._others = others

    def emit(self, event: Event) -> None:
        if isinstance(event, Saved):
            write(self._stream, _BEGIN)
        elif isinstance(event, BuildFailed | Refused):
            write(self._stream, "".join(f"{problem}\n" for problem in problems(event)) + _END)
            return
        self._others.emit(event)
        if isinstance(event, Applied | Unchanged):
            write(self._stream, _END)


def _placed(diagnostics: str, file: str) -> Iterator[Problem]:
    base = _base(diagnostics, file)
    for found in map(_PLACED.fullmatch, diagnostics.splitlines()):
        if found is not None:
            place = _absolute(found["file"], base)
            column = int(found["column"] or 1)
            yield Problem(place, int(found["line"]), column, found["severity"].lower(), found["text"])


def _base(diagnostics: str, file: str) -> Path:
    """Return the directory that a compiler ran in: with what it calls the file, it makes the file's name."""
    for found in map(_PLACED.fullmatch, diagnostics.splitlines()):
        if found is not None and file.endswith("/" + found["file"].removeprefix("./")):
            return Path(file.removesuffix(found["file"].removeprefix("./")))
    return Path.cwd()


def _absolute(named: str, base: Path) -> str:
    place = base / named
    return str(place) if place.exists() else named


def _one_line(text: str) -> str:
    return " ".join(text.split())
