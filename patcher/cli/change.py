"""`patcher apply` and `patcher revert`: one change, no watching."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from patcher.cli.mistakes import pid_argument
from patcher.cli.options import gather, open_reporter, open_session, takes
from patcher.report import Applied, Reverted, Variable


@click.command()
@pid_argument
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@takes("apply")
def apply(pid: int, files: tuple[Path, ...], **rest: Any) -> int:
    """Make the code of FILES live in process PID, as one generation.

    \b
    patcher apply 4711 physics.o          an object, with or without -ffunction-sections
    patcher apply 4711 libphysics.a       every object of an archive
    patcher apply 4711 physics.c          a source: compiled as the program was
    """
    asked = gather("apply", rest)
    offer = _offer if sys.stdin.isatty() and sys.stderr.isatty() else None
    with open_reporter(asked) as reporter, open_session(asked, pid, reporter, offer) as session:
        outcome = session.apply(*files)
        event = session.report(outcome, files)
        if asked.json:
            click.echo(json.dumps(event.as_json()))
        if asked.dry_run and isinstance(event, Applied):
            for function in event.functions:
                click.echo(f"{function.status} {function.name}", err=True)
    return 0


def _offer(variables: Sequence[Variable]) -> bool:
    """Ask whether variables get their new initial values."""
    names = ", ".join(f"`{v.name}` ({v.note})" if v.note else f"`{v.name}`" for v in variables)
    return click.confirm(f"write the new value{'s' if len(variables) > 1 else ''} of {names}?", err=True)


@click.command()
@pid_argument
@click.argument("generation", required=False, type=click.IntRange(min=0))
@takes("revert")
def revert(pid: int, generation: int | None, **rest: Any) -> int:
    """Take process PID back to GENERATION (default: the one before; 0: as it was started).

    \b
    patcher revert 4711                   back by one
    patcher revert 4711 0                 the program as it was started
    patcher revert 4711 --active refuse   not while anybody is in the code that goes
    """
    asked = gather("revert", rest)
    with open_reporter(asked) as reporter, open_session(asked, pid, reporter) as session:
        number = session.revert(generation)
        event = Reverted(number, session.frames)
        reporter.emit(event)
        if asked.json:
            click.echo(json.dumps(event.as_json()))
    return 0
