"""OUTCOME: what came of a change, as callers of `apply` and as reports have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from patcher.report import Applied, Event, Function, Member, OldFrame, Timings, Unchanged, Variable


@dataclass(frozen=True, slots=True)
class Generation:
    """The outcome of `apply`: the live generation, and what it changed (nothing, when the process had the code)."""

    number: int
    functions: tuple[Function, ...] = ()
    active: tuple[tuple[int, str], ...] = ()  # threads, and the functions whose old code they are still in
    frames: tuple[OldFrame, ...] = ()  # where they are in it
    timings: Timings = field(default_factory=Timings)
    line_only: tuple[str, ...] = ()
    variables: tuple[Variable, ...] = ()  # what became of data
    waiting: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()  # functions that are the same, and whose entry has no room for a jump
    dry_run: bool = False
    supplied: tuple[str, ...] = ()  # objects and libraries that were brought in, being missing
    undefined: tuple[str, ...] = ()  # functions that are nowhere: a call aborts
    members: tuple[Member, ...] = ()  # the processes, where several were changed together
    data_only: bool = False  # it changed no function

    def as_event(self, files: Sequence[Path]) -> Event:
        """Return the event that tells of it."""
        names = tuple(str(f) for f in files)
        if not self.functions and not self.data_only:
            return Unchanged(names, self.line_only, self.waiting, self.kept, self.variables)
        return Applied(
            self.number,
            names,
            self.functions,
            self.active,
            self.timings,
            self.line_only,
            self.variables,
            self.dry_run,
            self.supplied,
            self.undefined,
            self.kept,
            self.members,
            self.frames,
        )
