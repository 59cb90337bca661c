"""What a second terminal shows of a watch: a picture that is drawn anew as events come and keys are pressed.

Decides what is shown, and what a key means; where events come from, and who does what is asked, is others' business.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from patcher.report.remote import told

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

_SHOWN = 12  # lines of what happened
_GENERATIONS = 8
_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_FRAMES_A_SECOND = 10
UP, DOWN, ENTER, ESCAPE = "up", "down", "enter", "escape"
_MOVES = {UP: 1, DOWN: -1}


@dataclass(frozen=True, slots=True)
class Wish:
    """What a key asks of the watch."""

    method: str
    parameters: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True)
class _Step:
    """A generation that was made, as the history tells it."""

    number: int
    text: str


class View:
    """The picture of a watch."""

    def __init__(self, pid: int) -> None:
        self.ended = False  # there will be no more news
        self.left = False  # by the user
        self._title = f"process {pid}"
        self._paused = False
        self._building: tuple[float, str] | None = None  # since when (monotonic), and what
        self._working = ""  # what takes its time, and how far it has come
        self._steps: dict[int, _Step] = {0: _Step(0, "the program as it was started")}
        self._live = 0
        self._error = ""  # a compiler's words, with its colours, or why a change was refused
        self._lines: list[str] = []
        self._said = ""  # an answer to what was asked
        self._choice: str | None = None  # of a generation to go back to, while that is asked

    # --- what happens -----------------------------------------------------------------------------------------

    def begin(self, status: Mapping[str, Any]) -> None:
        """Take in how things are."""
        for number in status["recorded"]:
            self._steps.setdefault(number, _Step(number, ""))
        self._live = status["generation"]

    def hear(self, event: dict[str, Any]) -> None:
        """Take in an event."""
        match event["event"]:
            case "building":
                self._building = (time.monotonic(), _names(event["files"]))
            case "idle":
                self._building = None
            case "working":
                steps = f" {event['done']}/{event['total']}" if event["total"] else ""
                self._working = "" if event["ended"] else f"{event['text']}{steps}"
            case "ready":
                self._title = f"{_name(event['program'])}, process {event['pid']}"
            case "paused" | "resumed":
                self._paused = event["event"] == "paused"
            case "applied":
                self._live = event["generation"]
                self._steps[self._live] = _Step(self._live, _summary(event))
                self._error = ""
            case "unchanged":
                self._error = ""
            case "reverted":
                self._live = event["generation"]
            case "build_failed":
                self._error = event.get("coloured") or event["diagnostics"]
            case "refused":
                self._error = "\n".join(filter(None, (event["message"], event["hint"])))
        self._note(event)

    def _note(self, event: dict[str, Any]) -> None:
        clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
        if event["event"] == "saved":
            self._lines.append(f"{clock}  saved {_names(event['files'])}")
        elif event["event"] == "build_failed":
            self._lines.append(f"{clock}  {_name(event['file'])} does not compile")
        else:
            self._lines += [f"{clock}  {line}" for line in told(event)[:1]]
        del self._lines[:-_SHOWN]

    def answered(self, message: str) -> None:
        """Take in why something that was asked was not done; "" when it was."""
        self._said = message

    # --- keys -------------------------------------------------------------------------------------------------

    def press(self, key: str) -> Wish | None:
        """Return what a key asks of the watch, if it asks for anything."""
        self._said = ""
        if self._choice is not None:
            return self._choose(key)
        match key:
            case "q":
                self.left = True
            case "p":
                return Wish("resume" if self._paused else "pause")
            case "a":
                return Wish("apply")
            case "r":
                self._choice = ""
        return None

    def _choose(self, key: str) -> Wish | None:
        chosen, self._choice = self._choice or "", None
        known = sorted(self._steps)
        if key.isdecimal() and key.isascii() and len(chosen) < 9:
            self._choice = chosen + key
        elif key in _MOVES:
            now = int(chosen) if chosen and int(chosen) in known else self._live
            place = known.index(now) + _MOVES[key] if now in known else 0
            self._choice = str(known[max(0, min(place, len(known) - 1))])
        elif key == ENTER:
            return Wish("revert", {"generation": int(chosen)} if chosen else None)
        elif key != ESCAPE:
            self._choice = chosen
        return None

    # --- the picture ------------------------------------------------------------------------------------------

    def picture(self) -> Group:
        """Return the picture as it is now."""
        from rich.console import Group
        from rich.text import Text

        state = (
            ("the watch ended", "red")
            if self.ended
            else ("paused", "yellow")
            if self._paused
            else ("watching", "green")
        )
        parts = [Text.assemble((self._title, "bold"), "  ", state, "  ", self._activity()), Text("")]
        parts += self._history()
        parts += [Text(""), *map(Text, self._lines)]
        if self._error:
            parts += [Text(""), Text.from_ansi(self._error)]
        parts += [Text(""), Text(self._footer(), style="dim")]
        return Group(*parts)

    def _activity(self) -> str:
        if self._building is None:
            return self._working
        since, files = self._building
        passed = time.monotonic() - since
        return f"{_FRAMES[int(passed * _FRAMES_A_SECOND) % len(_FRAMES)]} building {files} {passed:.1f} s"

    def _history(self) -> Iterator[Text]:
        from rich.text import Text

        chosen = int(self._choice) if self._choice else None
        for number in sorted(self._steps)[-_GENERATIONS:]:
            mark = ">" if number == chosen else "*" if number == self._live else " "
            style = "reverse" if number == chosen else "bold" if number == self._live else ""
            yield Text(f"{mark} {number:4}  {self._steps[number].text}", style=style)

    def _footer(self) -> str:
        if self._choice is not None:
            return f"back to generation {self._choice or '(the one before)'}: number or arrows, Enter; Esc: not"
        keys = f"q quit  p {'resume' if self._paused else 'pause'}  a apply now  r revert"
        return f"{self._said}\n{keys}" if self._said else keys


class Redrawn(Protocol):
    """A picture on the screen."""

    def draw(self) -> None: ...


class _Live:
    def __init__(self, live: Any, view: View) -> None:
        self._live = live
        self._view = view

    def draw(self) -> None:
        self._live.update(self._view.picture(), refresh=True)


@contextmanager
def shown(view: View) -> Iterator[Redrawn]:
    """Show a view on the whole terminal within the block; `draw` of what is yielded draws it anew."""
    from rich.live import Live

    with Live(view.picture(), screen=True, auto_refresh=False) as live:
        yield _Live(live, view)


def _summary(event: Mapping[str, Any]) -> str:
    functions = ", ".join(f"{f['name']}" for f in event["functions"][:4])
    more = len(event["functions"]) - 4
    named = f"{functions} and {more} more" if more > 0 else functions or "data"
    timings = event["timings"]
    return f"{_names(event['files'])}: {named}  ({timings['total']:.0f} ms, stopped {timings['stop']:.2f} ms)"


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _names(paths: list[str]) -> str:
    return ", ".join(map(_name, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
