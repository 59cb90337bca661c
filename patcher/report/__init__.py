"""What people and programs look at: events, console lines."""

from patcher.report.events import (
    Applied,
    BuildFailed,
    Event,
    Exited,
    Function,
    Note,
    Ready,
    Refused,
    Reporter,
    Reverted,
    Saved,
    Timings,
    Unchanged,
    Variable,
)

__all__ = [
    "Applied",
    "BuildFailed",
    "Event",
    "Exited",
    "Function",
    "Note",
    "Ready",
    "Refused",
    "Reporter",
    "Reverted",
    "Saved",
    "Timings",
    "Unchanged",
    "Variable",
]
