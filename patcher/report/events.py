"""The events of a session, as values, and their form for other programs: one JSON object a line.

The names and fields of what goes out are a promise (README, "Events"); what else an event carries is for people.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TextIO

from patcher.data.outcome import Datum, Fate


@dataclass(frozen=True, slots=True)
class Function:
    """A function that a generation changed, added, or linked again though it is the same (`relinked`)."""

    name: str
    module: str
    status: str


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable or constant that a change did something to. `outcome` is one of the words of `data.outcome`."""

    name: str
    file: str
    outcome: str
    note: str = ""


_COLOURS = re.compile(r"\x1b(\[[0-9;:]*[A-Za-z]|\][^\x07\x1b]*(\x07|\x1b\\))")  # ECMA-48: CSI, and OSC for links


def plain(text: str) -> str:
    """Return a compiler's words without its colours."""
    return _COLOURS.sub("", text)


def told_of(data: Iterable[Datum]) -> tuple[Variable, ...]:
    """Return what became of variables, as it is told."""
    return tuple(Variable(d.name, d.file, d.fate.value, d.note) for d in data)


def nothing_to_do(variables: Iterable[Variable]) -> str:
    """Return the verdict on a save that changes nothing in the process."""
    if any(v.outcome == Fate.STALE.value for v in variables):
        return "nothing to do, no code changes; what holds the old constants goes on with them"
    return "nothing to do, the process has this code"


@dataclass(frozen=True, slots=True)
class Member:
    """One of several processes that were changed together: its generation, or why it has none (0)."""

    pid: int
    generation: int
    why: str = ""


@dataclass(frozen=True, slots=True)
class OldFrame:
    """A call of a function's old code that has not returned, and where its frame is.

    `thread` is 0 where no thread is on that stack: a coroutine. `generation`: which one's code it is (0: the program's
    own); `loops`: it is in a loop, and is not expected to return.
    """

    function: str
    thread: int
    stack: int
    generation: int
    loops: bool = False


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds from the save to the new code. `stop` is how long the target stood still."""

    detect: float = 0.0
    build: float = 0.0
    link: float = 0.0
    stop: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened; `time` is in seconds since the epoch."""

    time: float = field(default_factory=time.time, kw_only=True)

    @property
    def name(self) -> str:
        return "".join("_" + c.lower() if c.isupper() else c for c in type(self).__name__).lstrip("_")

    def fields(self) -> dict[str, Any]:
        """Return what goes out beside `event` and `time`."""
        return {}

    def as_json(self) -> dict[str, Any]:
        return {"event": self.name, "time": self.time, **self.fields()}


@dataclass(frozen=True, slots=True)
class Ready(Event):
    pid: int
    program: str
    watching: tuple[str, ...]

    def fields(self) -> dict[str, Any]:
        return {"pid": self.pid, "program": self.program, "watching": list(self.watching)}


@dataclass(frozen=True, slots=True)
class Saved(Event):
    files: tuple[str, ...]

    def fields(self) -> dict[str, Any]:
        return {"files": list(self.files)}


@dataclass(frozen=True, slots=True)
class BuildFailed(Event):
    file: str
    diagnostics: str
    message: str = ""
    hint: str = ""

    def fields(self) -> dict[str, Any]:
        return {"file": self.file, "diagnostics": plain(self.diagnostics)}


@dataclass(frozen=True, slots=True)
class Refused(Event):
    reason: str
    message: str
    hint: str
    file: str

    def fields(self) -> dict[str, Any]:
        return {"reason": self.reason, "message": self.message, "hint": self.hint, "file": self.file}


@dataclass(frozen=True, slots=True)
class Unchanged(Event):
    files: tuple[str, ...]
    line_only: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    variables: tuple[Variable, ...] = ()

    def fields(self) -> dict[str, Any]:
        return {"files": list(self.files), "data": [asdict(v) for v in self.variables]}


@dataclass(frozen=True, slots=True)
class Applied(Event):
    generation: int
    files: tuple[str, ...]
    functions: tuple[Function, ...]
    active: tuple[tuple[int, str], ...]  # thread, function
    timings: Timings
    line_only: tuple[str, ...] = ()
    variables: tuple[Variable, ...] = ()
    dry_run: bool = False
    supplied: tuple[str, ...] = ()  # objects and libraries that were brought in because something was missing
    undefined: tuple[str, ...] = ()  # functions that are nowhere
    kept: tuple[str, ...] = ()  # wanted to be relinked, and left as they are
    members: tuple[Member, ...] = ()  # the processes, where there are several
    frames: tuple[OldFrame, ...] = ()  # who is in old code, and where

    def fields(self) -> dict[str, Any]:
        t = self.timings
        return {
            "generation": self.generation,
            "files": list(self.files),
            "functions": [{"name": f.name, "module": f.module, "status": f.status} for f in self.functions],
            "data": [asdict(v) for v in self.variables],
            "supplied": list(self.supplied),
            "undefined": list(self.undefined),
            "kept": list(self.kept),
            "processes": [asdict(m) for m in self.members],
            "active": list(dict.fromkeys(function for _, function in self.active)),
            "frames": [asdict(f) for f in self.frames],
            "timings": {name: round(getattr(t, name), 3) for name in ("detect", "build", "link", "stop", "total")},
        }


@dataclass(frozen=True, slots=True)
class Reverted(Event):
    generation: int
    frames: tuple[OldFrame, ...] = ()  # who is in the code that it took out

    def fields(self) -> dict[str, Any]:
        return {"generation": self.generation, "frames": [asdict(f) for f in self.frames]}


@dataclass(frozen=True, slots=True)
class Exited(Event):
    status: int | None = None
    signal: int | None = None

    def fields(self) -> dict[str, Any]:
        return {"signal": self.signal} if self.signal is not None else {"status": self.status}


@dataclass(frozen=True, slots=True)
class Note(Event):
    """A sentence for people; never goes out as an event. `grave`: who wants to hear of errors only hears it too."""

    text: str
    grave: bool = False


@dataclass(frozen=True, slots=True)
class Working(Note):
    """How far a piece of work has come that takes its time: `done` of `total` steps (0: nobody knows how many)."""

    done: int = 0
    total: int = 0
    seconds: float = 0.0
    ended: bool = False


class Reporter(Protocol):
    """Whoever wants to know what happens in a session."""

    def emit(self, event: Event) -> None: ...


class EventStream:
    """Writes events to a stream, one JSON object a line, each complete when it is written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def emit(self, event: Event) -> None:
        if not isinstance(event, Note):
            self._stream.write(json.dumps(event.as_json()) + "\n")
            self._stream.flush()


class Reporters:
    """Hands each event to several."""

    def __init__(self, reporters: Iterable[Reporter]) -> None:
        self._reporters = tuple(reporters)
        self._lock = threading.Lock()  # work is told of from threads of its own

    def emit(self, event: Event) -> None:
        with self._lock:
            for reporter in self._reporters:
                reporter.emit(event)
