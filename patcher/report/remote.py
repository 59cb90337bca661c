"""Events that come from another patcher, back as values and as the lines that it would write of them.

What did not go out is not there: an event tells here what its JSON form has.
"""

from __future__ import annotations

import io
from typing import Any

from patcher.report.console import ConsoleReport
from patcher.report.events import (
    Applied,
    BuildFailed,
    Event,
    Exited,
    Function,
    Member,
    Note,
    OldFrame,
    Ready,
    Refused,
    Reverted,
    Saved,
    Timings,
    Unchanged,
    Variable,
)

_PAUSED = "paused: what is saved waits"
_NOTES = {"paused": _PAUSED, "resumed": "watching again", "held": "saved, and waits, as it is paused: {files}"}


def event_of(found: dict[str, Any]) -> Event | None:
    """Return the event of its JSON form; None for one that nobody has words for."""
    time = float(found["time"])
    match found["event"]:
        case "ready":
            return Ready(found["pid"], found["program"], tuple(found["watching"]), time=time)
        case "saved":
            return Saved(tuple(found["files"]), time=time)
        case "build_failed":
            return BuildFailed(found["file"], found["diagnostics"], time=time)
        case "refused":
            return Refused(found["reason"], found["message"], found["hint"], found["file"], time=time)
        case "unchanged":
            return Unchanged(tuple(found["files"]), variables=_variables(found), time=time)
        case "applied":
            return _applied(found, time)
        case "reverted":
            return Reverted(found["generation"], _frames(found), time=time)
        case "exited":
            return Exited(found.get("status"), found.get("signal"), time=time)
        case "note":
            return Note(found["text"], time=time)
        case name if name in _NOTES:
            return Note(_NOTES[name].format(files=", ".join(found.get("files", ()))), time=time)
        case _:
            return None


def told(found: dict[str, Any]) -> list[str]:
    """Return the lines that tell people of an event, without colours."""
    event = event_of(found)
    stream = io.StringIO()
    if event is not None:
        ConsoleReport(stream).emit(event)
    return [line.removeprefix("patcher: ") for line in stream.getvalue().splitlines()]


def _applied(found: dict[str, Any], time: float) -> Applied:
    return Applied(
        found["generation"],
        tuple(found["files"]),
        tuple(Function(**f) for f in found["functions"]),
        (),
        Timings(**found["timings"]),
        variables=_variables(found),
        supplied=tuple(found["supplied"]),
        undefined=tuple(found["undefined"]),
        kept=tuple(found["kept"]),
        members=tuple(Member(**m) for m in found["processes"]),
        frames=_frames(found),
        time=time,
    )


def _variables(found: dict[str, Any]) -> tuple[Variable, ...]:
    return tuple(Variable(**v) for v in found["data"])


def _frames(found: dict[str, Any]) -> tuple[OldFrame, ...]:
    return tuple(OldFrame(**f) for f in found["frames"])
