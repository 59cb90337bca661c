"""What people and programs look at: events, console lines."""

from patcher.report.events import (
    Applied,
    BuildFailed,
    Event,
    Exited,
    Function,
    Member,
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
from patcher.report.explanation import Explanation, FunctionOutlook, Outlook, Refusal, TypeOutlook

__all__ = [
    "Applied",
    "BuildFailed",
    "Event",
    "Exited",
    "Explanation",
    "Function",
    "FunctionOutlook",
    "Member",
    "Note",
    "Outlook",
    "Ready",
    "Refusal",
    "Refused",
    "Reporter",
    "Reverted",
    "Saved",
    "Timings",
    "TypeOutlook",
    "Unchanged",
    "Variable",
]
