"""The options of the table as the command line takes them, and the session and reporters that they ask for."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO, TypeVar

import click

from patcher.configuration import ConfigurationError, Setting, read_configuration
from patcher.errors import PatcherError
from patcher.options import Kind, Options, Row, Settings, rows_of
from patcher.report.console import ConsoleReport
from patcher.report.events import EventStream, Reporter, Reporters
from patcher.report.problems import ProblemReport
from patcher.session import Offer, Session
from patcher.target import Target
from patcher.tree import Tree

F = TypeVar("F", bound=Callable[..., Any])

FLAG = "flag"
DEFAULT = "default"

# Nothing here has a default: what was not given is told from what was given and is the default.
_TYPES: dict[Kind, Callable[[Row], Any]] = {
    Kind.TEXT: lambda row: click.Choice(row.choices) if row.choices else click.STRING,
    Kind.TEXTS: lambda row: click.STRING,
    Kind.PATH: lambda row: click.Path(path_type=Path),
    Kind.PATHS: lambda row: click.Path(path_type=Path),
    Kind.COUNT: lambda row: click.IntRange(min=int(row.least)),
    Kind.SECONDS: lambda row: click.FloatRange(min=row.least, min_open=row.above),
}


def takes(command: str) -> Callable[[F], F]:
    """Add a command's options; it gets them as keyword arguments, for `gather`."""

    def decorate(function: F) -> F:
        for row in reversed(rows_of(command)):
            function = _declared(row)(function)
        return function

    return decorate


def _declared(row: Row) -> Callable[[F], F]:
    names = [f"-{row.short}"] if row.short else []
    names.append(f"--{row.switch}/--no-{row.switch}" if row.negatable else f"--{row.switch}")
    if row.kind is Kind.FLAG:
        return click.option(row.parameter, *names, is_flag=True, default=None, help=_help(row))
    return click.option(
        row.parameter,
        *names,
        type=_TYPES[row.kind](row),
        multiple=row.kind.repeatable,
        metavar=row.metavar or None,
        help=_help(row),
    )


def _help(row: Row) -> str:
    if row.kind.repeatable:
        return f"{row.meaning} Repeatable."
    default = ("on" if row.default else "") if row.kind is Kind.FLAG else row.default
    if isinstance(default, float):
        default = f"{default:g}"
    return f"{row.meaning[:-1]} (default: {default})." if default else row.meaning


@dataclass(frozen=True, slots=True)
class Chosen:
    """The value of an option, and where it comes from: the command line, a file (its name and line), or nowhere."""

    row: Row
    value: Any
    origin: str  # "flag", "default", or FILE:LINE
    setting: Setting | None = None


def choose(command: str, arguments: dict[str, Any]) -> tuple[Chosen, ...]:
    """Return a command's options: what was given wins over what is configured, as a whole, and that over defaults."""
    rows = [row for row in rows_of(command) if row.field != "config"]
    found = read_configuration(Path.cwd()) if arguments["config"] in (None, True) else ()
    configured = {setting.row: setting for setting in found}
    chosen = tuple(_choose(row, arguments[row.parameter], configured.get(row)) for row in rows)
    for one in chosen:
        _check_present(one)
    return chosen


def _choose(row: Row, given: Any, setting: Setting | None) -> Chosen:
    if given not in (None, ()):
        return Chosen(row, given, FLAG)
    if setting is not None:
        return Chosen(row, setting.value, setting.place, setting)
    return Chosen(row, row.default, DEFAULT)


def gather(command: str, arguments: dict[str, Any]) -> Settings:
    """Take a command's options out of its arguments and the configuration."""
    chosen = {one.row.field: one for one in choose(command, arguments)}
    values = {field: one.value for field, one in chosen.items()}
    for field, place in (("ignore", "ignore_from"), ("build", "build_in")):
        if field in chosen and (setting := chosen[field].setting) is not None:
            values[place] = setting.file.parent
    return Settings(**values)


def _check_present(chosen: Chosen) -> None:
    """Refuse paths that lead nowhere before anything is started."""
    row, value = chosen.row, chosen.value
    said = f"--{row.switch}" if chosen.setting is None else f"{chosen.origin}: {row.switch}"
    for path in value if row.kind is Kind.PATHS else (value,) if row.kind is Kind.PATH and value else ():
        wrong = ""
        if not path.exists():
            wrong = "no such file or directory"
        elif row.metavar == "FILE" and path.is_dir():
            wrong = "is a directory, not a file"
        if wrong and chosen.setting is None:
            raise click.UsageError(f"{said} {path}: {wrong}")
        if wrong:
            raise ConfigurationError(f"{said} {path}: {wrong}", "correct the file, or give another on the command line")


def options_for(settings: Settings) -> Options:
    """Return what a session is to know. Compilers use colour, in a watch in any case: someone may look on."""
    return replace(settings, colour=bool(settings.watched) or (sys.stderr.isatty() and not settings.log))


def open_session(settings: Settings, pid: int, reporter: Reporter, offer: Offer | None = None) -> Session:
    """Open a session on a process, or on it and its descendants, where nobody is asked."""
    if settings.tree:
        return Tree(Target.attach(pid), options_for(settings), reporter)
    return Session(Target.attach(pid), options_for(settings), reporter, offer)


@contextlib.contextmanager
def open_reporter(settings: Settings, *others: Reporter, beside: int = 0) -> Iterator[Reporter]:
    """Yield what events go to: the console, the stream or file of --events, and others.

    `beside`: a process; where it is on another terminal, ours is ours alone.
    """
    reporters: list[Reporter] = [*others]
    with contextlib.ExitStack() as stack:
        if settings.log or settings.events != "-":
            stream = stack.enter_context(_appended("log", settings.log)) if settings.log else sys.stderr
            alone = stream is sys.stderr and bool(beside) and _is_alone(stream, beside)
            console = ConsoleReport(stream, quiet=settings.quiet, verbose=settings.verbose, in_place=alone)
            reporters.append(ProblemReport(stream, console) if settings.problems else console)
        if settings.events == "-":
            reporters.append(EventStream(sys.stderr))
        elif settings.events:
            reporters.append(EventStream(stack.enter_context(_appended("events", settings.events))))
        yield Reporters(reporters)


def _is_alone(stream: TextIO, pid: int) -> bool:
    """Tell whether a stream is a terminal, and not that of a process."""
    if not stream.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        return False
    try:
        terminal = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[4])  # proc(5): tty_nr
    except (OSError, ValueError):
        return False
    device = os.fstat(stream.fileno()).st_rdev
    # bits 31 to 20 and 7 to 0 are the minor, bits 15 to 8 the major number
    return (os.major(device), os.minor(device)) != (terminal >> 8 & 0xFFF, terminal >> 12 & 0xFFF00 | terminal & 0xFF)


def _appended(switch: str, file: str) -> TextIO:
    try:
        return open(file, "a", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise PatcherError(f"{file}: {error.strerror}", f"give another file to --{switch}") from None
