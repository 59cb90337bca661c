"""Console lines: one short block for each event, on stderr or in a file.

Where the target owns the terminal, an event's lines are one write, which ends a line, and nothing is drawn in place.
Work that takes its time is one line when it took two seconds, and one when it is done; on a terminal that is ours
alone it is one line that moves, below the others, and is gone when it is done.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from patcher.report.events import (
    Applied,
    BuildFailed,
    Event,
    Exited,
    Member,
    Note,
    OldFrame,
    Ready,
    Refused,
    Reverted,
    Unchanged,
    Variable,
    Working,
    nothing_to_do,
    plain,
)

if TYPE_CHECKING:
    from rich.console import Console

_PREFIX = "patcher: "
_LISTED = 8
_LONG_SECONDS = 2.0
_ERASE = "\r\x1b[K"  # ECMA-48: to the start of the line, and erase it
_BAR = 20


def write(stream: TextIO, lines: str) -> None:
    """Write lines at once."""
    # Raw terminal modes of the target do not turn a newline into a carriage return as well.
    stream.write(lines.replace("\n", "\r\n") if stream.isatty() else lines)
    stream.flush()


class ConsoleReport:
    """Writes events for people. `quiet` leaves errors only; `verbose` names line-only functions too."""

    def __init__(self, stream: TextIO, *, quiet: bool = False, verbose: bool = False, in_place: bool = False) -> None:
        """`in_place`: the stream is a terminal on which nobody else writes."""
        self._in_place = in_place
        self._drawn = False  # a line that moves stands there
        self._works: set[str] = set()  # what was told to take its time
        self._stream = stream
        self._quiet = quiet
        self._verbose = verbose
        self._console: Console | None = None
        self._lines: list[str] = []  # of the event at hand

    def emit(self, event: Event) -> None:
        if isinstance(event, Working):
            self._show(event)
            return
        self._compose(event)
        self._flush()

    def _flush(self) -> None:
        if self._lines:
            text = "".join(f"{line}\n" for line in self._lines)
            write(self._stream, _ERASE + text if self._drawn else text)
            self._drawn = False
            self._lines.clear()

    def _show(self, event: Working) -> None:
        if self._quiet:
            return
        if self._in_place:
            self._stream.write(_ERASE if event.ended else _ERASE + self._render(_moving(event)))
            self._stream.flush()
            self._drawn = not event.ended
        elif event.ended and event.text in self._works:
            self._works.discard(event.text)
            self._say(f"{_escape(event.text)}: done, {event.seconds:.0f} s")
            self._flush()
        elif not event.ended and event.seconds >= _LONG_SECONDS and event.text not in self._works:
            self._works.add(event.text)
            self._say(f"{_escape(event.text)} ...")
            self._flush()

    def _compose(self, event: Event) -> None:
        if isinstance(event, BuildFailed):
            if event.diagnostics.strip():
                coloured = event.diagnostics.rstrip("\n")
                self._lines.append(coloured if self._stream.isatty() else plain(coloured))
            told = event.message and (self._verbose or not event.file)
            message = event.message if told else f"{event.file} does not compile"
            self._say(f"[red]{_escape(message)}[/]; the old code runs on")
            self._hint(event.hint)
        elif isinstance(event, Refused):
            self._say(f"[red]refused[/]: {_escape(event.message)}")
            self._hint(event.hint)
        elif not self._quiet or (isinstance(event, Note) and event.grave):
            self._tell(event)

    def _tell(self, event: Event) -> None:
        if isinstance(event, Note):
            self._say(_escape(event.text))
        elif isinstance(event, Ready):
            watching = f"watching {_escape(', '.join(event.watching))}"
            unwatched = f"nothing is watched: give --watch, or tell saves with `patcher apply {event.pid} FILE`"
            name = _escape(Path(event.program).name)
            self._say(f"{name} runs as process {event.pid}, {watching if event.watching else unwatched}")
        elif isinstance(event, Applied):
            self._applied(event)
        elif isinstance(event, Unchanged):
            self._unchanged(event)
        elif isinstance(event, Reverted):
            what = "the program as it was started" if event.generation == 0 else f"generation {event.generation}"
            self._say("\n".join([f"back to {what}", *_frames(event.frames)]))
        elif isinstance(event, Exited) and event.signal is not None:
            self._say(f"the program was killed by signal {event.signal}")

    def _applied(self, event: Applied) -> None:
        verb = "would be" if event.dry_run else "is"
        names = _listed([Path(f).name for f in event.files])
        lines = [f"{_escape(names)}: generation {event.generation} {verb} [green]live[/]"]
        for status in ("changed", "added", "relinked"):
            found = [f.name for f in event.functions if f.status == status]
            if found:
                lines.append(f"  {status}: {_escape(_listed(found))}")
        lines += _told(event.variables)
        if event.members:
            lines += _members(event.members)
        if event.supplied:
            lines.append(f"  brought in, being missing: {_escape(_listed([_short(s) for s in event.supplied]))}")
        if event.undefined:
            lines.append(f"  [yellow]undefined, a call aborts[/]: {_escape(_listed(event.undefined))}")
        if event.kept:
            lines.append(f"  kept, no room for a jump at their entry: {_escape(self._some(event.kept))}")
        if event.line_only:
            lines.append(f"  only line numbers differ, left as they are: {_escape(self._some(event.line_only))}")
        lines += _frames(event.frames)
        t = event.timings
        lines.append(
            f"  [dim]detect {t.detect:.0f}, build {t.build:.0f}, link {t.link:.0f}, "
            f"stop {t.stop:.2f}, total {t.total:.0f} ms[/]"
        )
        self._say("\n".join(lines))

    def _unchanged(self, event: Unchanged) -> None:
        names = _escape(_listed([Path(f).name for f in event.files]))
        text = f"{names}: {nothing_to_do(event.variables)}"
        if event.line_only:
            text += f"\n  only line numbers differ, left as they are: {_escape(self._some(event.line_only))}"
        for line in _told(event.variables):
            text += f"\n{line}"
        if event.kept:
            text += f"\n  kept, no room for a jump at their entry: {_escape(self._some(event.kept))}"
        if event.waiting:
            text += f"\n  new, but nothing calls it yet: {_escape(_listed(event.waiting))}"
        self._say(text)

    def _some(self, names: tuple[str, ...]) -> str:
        return ", ".join(names) if self._verbose else f"{len(names)} functions" if len(names) > 3 else _listed(names)

    def _hint(self, hint: str) -> None:
        if hint:
            self._say(f"  {_escape(hint)}")

    def _say(self, markup: str) -> None:
        self._lines.append(self._render(_PREFIX + markup))

    def _render(self, markup: str) -> str:
        from rich.console import Console

        if self._console is None:
            self._console = Console(file=self._stream, highlight=False, soft_wrap=True)
        with self._console.capture() as captured:
            self._console.print(markup, end="", soft_wrap=True)
        return captured.get()


def _moving(event: Working) -> str:
    """Return a line that tells how far work has come, short enough for any terminal."""
    text = _escape(event.text if len(event.text) <= _BAR * 2 else event.text[: _BAR * 2 - 1] + "…")
    if not event.total:
        return f"{_PREFIX}{text} [dim]{event.seconds:.1f} s[/]"
    full = _BAR * event.done // event.total
    return f"{_PREFIX}{text} [green]{'━' * full}[/][dim]{'━' * (_BAR - full)}[/] {event.done}/{event.total}"


_FATES = {
    "added": "new variables",
    "found": "variables that are back, with their values",
    "moved": "the same variables as before",
    "kept": "initialisers that changed, values kept",
    "reinitialised": "written anew",
    "migrated": "migrated",
    "rewritten": "constants written where they stand",
    "stale": "[yellow]constants whose old copy is still in use[/]",
}


def _told(variables: tuple[Variable, ...]) -> list[str]:
    lines = []
    for outcome, words in _FATES.items():
        found = [v for v in variables if v.outcome == outcome]
        named = [f"{v.name} ({v.note})" if v.note else v.name for v in found]
        if found:
            lines.append(f"  {words}: {_escape(_listed(named))}")
    return lines


def _frames(frames: tuple[OldFrame, ...]) -> list[str]:
    """Return who is in old code: those that will return, and loops."""
    lines = []
    staying = list(dict.fromkeys(_frame(f) for f in frames if not f.loops))
    if staying:
        lines.append(f"  [yellow]still in old code until it returns[/]: {_escape(_listed(staying))}")
    loops = list(dict.fromkeys(_frame(f) for f in frames if f.loops))
    if loops:
        lines.append(f"  [yellow]in old code, in a loop that does not return[/]: {_escape(_listed(loops))}")
        lines.append("  move the body of the loop into a function, which can be replaced then")
    return lines


def _frame(frame: OldFrame) -> str:
    where = f"thread {frame.thread}" if frame.thread else f"in a coroutine (stack at {frame.stack:#x})"
    return f"{frame.function} ({where})"


def _members(members: tuple[Member, ...]) -> list[str]:
    live = [m for m in members if not m.why]
    lines = [f"  in {len(live)} processes: {', '.join(str(m.pid) for m in live[:_LISTED])}"]
    return lines + [f"  [yellow]not in process {m.pid}[/]: {_escape(m.why)}" for m in members if m.why]


def _listed(names: list[str] | tuple[str, ...]) -> str:
    shown = ", ".join(names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"


def _short(source: str) -> str:
    """Return a file's name; of an archive's member, the archive's name and the member's."""
    file, parenthesis, member = source.partition("(")
    return Path(file).name + parenthesis + member


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
