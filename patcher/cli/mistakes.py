"""What wrong usage is told: a sentence and what to do, where the words of the command line's library do not say it."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import click

from patcher.build import is_unit
from patcher.options import TABLE, rows_of
from patcher.target import processes_named


class Pid(click.types.IntParamType):
    """A process, by its number. The name of one that runs is a mistake that is told with the number."""

    name = "pid"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        text = str(value)
        if text.isascii() and text.isdigit() and int(text):
            return int(text)
        if text.lstrip("-").isdigit():
            raise click.UsageError(f"{text} is no process id: they begin at 1", context)
        if Path(text).suffix in (".o", ".a") or is_unit(Path(text)):
            raise click.UsageError(f"{text!r} is a file; the process id comes before it", context)
        name = Path(text).name
        running = processes_named(name)
        if running:
            numbers = ", ".join(map(str, running[:_LISTED])) + (" and others" if len(running) > _LISTED else "")
            raise click.UsageError(f"{text!r} is not a process id; {name} runs as {numbers}", context)
        raise click.UsageError(
            f"{text!r} is not a process id, and no process of that name runs; start one with `patcher spawn`", context
        )


_NO_COMMAND = re.compile("No such command '(.*?)'")
_LISTED = 5

pid_argument = click.argument("pid", type=Pid())


def explained(error: click.ClickException) -> tuple[str, str]:
    """Return a sentence about wrong usage, and a hint."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    command = context.info_name if context is not None and context.parent is not None else ""
    hint = f"`patcher {command} --help` tells what there is" if command else "`patcher --help` tells what there is"
    if isinstance(error, click.NoSuchOption):
        return _no_such_option(error.option_name, command or "", context, hint)
    if isinstance(error, click.MissingParameter) and error.param is not None:
        return _missing(error.param.name or "", command or "", hint)
    if (unknown := _NO_COMMAND.match(error.format_message())) and isinstance(context, click.Context):
        return _no_such_command(unknown[1], context), hint
    return error.format_message().rstrip(".").replace("a valid integer range", "a number that it may be"), hint


def _no_such_command(name: str, context: click.Context) -> str:
    known = context.command.commands if isinstance(context.command, click.Group) else {}
    near = difflib.get_close_matches(name, known, 1)
    return f"there is no command {name}" + (f"; did you mean {near[0]}?" if near else "")


def _no_such_option(option: str, command: str, context: click.Context | None, hint: str) -> tuple[str, str]:
    others = _commands_with(option)
    if others and not command:
        return f"{option} stands behind a command: {others}", hint
    if others:
        return f"{option} is an option of {others}, not of {command}", hint
    known = [f"--{row.switch}" for row in rows_of(command)]
    near = difflib.get_close_matches(option, known, 1)
    message = f"{command or 'patcher'} has no option {option}" + (f"; did you mean {near[0]}?" if near else "")
    if command == "spawn" and not near:
        hint = f"what is the program's own stands behind --: patcher spawn PROG -- {option}"
    return message, hint


def _commands_with(option: str) -> str:
    names = [c for row in TABLE if option in (f"--{row.switch}", f"--no-{row.switch}") for c in row.commands]
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


_MISSING = {
    "pid": ("which process? {command} wants its id", "`pidof NAME` tells it; `patcher {command} 4711` for example"),
    "files": ("which files? {command} wants an object, an archive or a source", "`patcher {command} 4711 physics.c`"),
    "words": ("which files? {command} wants an object, an archive or a source", "`patcher {command} 4711 physics.c`"),
    "program": ("which program? {command} wants one to start", "`patcher {command} ./prog --watch src/` for example"),
}


def _missing(parameter: str, command: str, hint: str) -> tuple[str, str]:
    message, example = _MISSING.get(parameter, (f"{command} wants {parameter.upper()}", hint))
    return message.format(command=command), example.format(command=command)
