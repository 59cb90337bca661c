"""What a save would do to a process, as it is shown and as programs read it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from patcher.report.events import OldFrame, Variable, nothing_to_do


class Outlook(Enum):
    """What would become of a save."""

    LIVE = "live"
    UNCHANGED = "unchanged"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class FunctionOutlook:
    """A function that is not what runs: `changed`, `added` or `line-only`; `why` names the first difference."""

    name: str
    file: str
    status: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class TypeOutlook:
    """A type that old data and new code lay out differently: where, and what that means (`refused`, `accepted`)."""

    name: str
    file: str
    change: str
    verdict: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a save would be refused, in the words that it would be refused with."""

    reason: str
    message: str
    hint: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """All of it. `kept`: the variables that new code goes on using, with their values, by name and file.

    `frames`: who is now in the code that would be replaced.
    """

    outlook: Outlook
    files: tuple[str, ...]
    functions: tuple[FunctionOutlook, ...] = ()
    variables: tuple[Variable, ...] = ()
    kept: tuple[tuple[str, str], ...] = ()
    types: tuple[TypeOutlook, ...] = ()
    supplied: tuple[str, ...] = ()
    refusal: Refusal | None = None
    frames: tuple[OldFrame, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "verdict": self.outlook.value,
            "files": list(self.files),
            "functions": [asdict(f) for f in self.functions],
            "data": [asdict(v) for v in self.variables] + [_kept(name, file) for name, file in self.kept],
            "types": [asdict(t) for t in self.types],
            "supplied": list(self.supplied),
            "frames": [asdict(f) for f in self.frames],
            "refusal": None if self.refusal is None else asdict(self.refusal),
        }

    def lines(self) -> Iterator[str]:
        """Yield the lines for people."""
        yield from _table("functions", [(f.status, f.name, f.file, f.why) for f in self.functions])
        told = [(v.outcome, v.name, v.file, v.note) for v in self.variables]
        named = {(v.name, v.file) for v in self.variables}
        yield from _table("data", told + [("as it is", *k, "") for k in self.kept if k not in named])
        yield from _table("types", [(t.verdict, t.name, t.file, t.change) for t in self.types])
        yield from _table("brought in, being missing", [("", name, "", "") for name in self.supplied])
        yield from _table("in the code that changes", [("", f.function, _who(f), "") for f in self.frames])
        if self.refusal is not None:
            yield f"refused ({self.refusal.reason}): {self.refusal.message}"
            if self.refusal.hint:
                yield f"  {self.refusal.hint}"
        else:
            yield "it can go live" if self.outlook is Outlook.LIVE else nothing_to_do(self.variables)


def _who(frame: OldFrame) -> str:
    who = f"thread {frame.thread}" if frame.thread else f"a coroutine, stack at {frame.stack:#x}"
    return who + (", in a loop that does not return" if frame.loops else "")


def _kept(name: str, file: str) -> dict[str, str]:
    return asdict(Variable(name, file, "as it is"))


def _table(title: str, rows: list[tuple[str, str, str, str]]) -> Iterator[str]:
    if rows:
        yield f"{title}:"
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True) if width]
        yield ("  " + "  ".join((*cells, row[3]))).rstrip()
