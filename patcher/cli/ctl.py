"""`patcher ctl`: ask a watch that runs for something, from a script, an editor or another terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from patcher.cli.mistakes import pid_argument
from patcher.cli.options import takes
from patcher.control import Connection, Method
from patcher.report.remote import told


@click.command()
@pid_argument
@click.argument("method", type=click.Choice([m.value for m in Method]))
@click.argument("words", metavar="[PARAMS]...", nargs=-1)
@takes("ctl")
def ctl(pid: int, method: str, words: tuple[str, ...], **rest: Any) -> int:
    """Ask the patcher that watches for process PID to do something, and tell the outcome.

    \b
    patcher ctl 4711 apply                 what was saved while it was paused, or waits to be mended: now
    patcher ctl 4711 apply src/physics.c   this file, saved or not
    patcher ctl 4711 pause                 let saves be, until
    patcher ctl 4711 resume                they are all applied at once
    patcher ctl 4711 revert                back by one generation; or `revert N`
    patcher ctl 4711 status --json         the generation, what is paused and what waits
    patcher ctl 4711 subscribe             events as they come; or only some: `subscribe applied refused`

    With --json the result is printed as JSON, one object a line for `subscribe`. docs/editors.md has the protocol.
    """
    as_json = bool(rest["json"])
    parameters = _parameters(Method(method), words)
    with Connection(pid) as connection:
        result = connection.call(method, parameters)
        if method == Method.SUBSCRIBE.value:
            return _follow(connection, as_json=as_json)
    click.echo(json.dumps(result) if as_json else "\n".join(_lines(Method(method), result)))
    return 0


def _parameters(method: Method, words: tuple[str, ...]) -> dict[str, Any]:
    """Return a method's parameters from words of the command line."""
    match method:
        case Method.APPLY if words:
            return {"files": [str(Path(word).absolute()) for word in words]}
        case Method.SUBSCRIBE if words:
            return {"events": list(words)}
        case Method.REVERT if len(words) == 1 and words[0].isascii() and words[0].isdigit():
            return {"generation": int(words[0])}
        case _ if words:
            raise click.UsageError(f"{method.value} does not take {' '.join(words)}")
    return {}


def _follow(connection: Connection, *, as_json: bool) -> int:
    try:
        for event in connection.events():
            for line in [json.dumps(event)] if as_json else told(event):
                click.echo(line)
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 0
    return 0


def _lines(method: Method, result: dict[str, Any]) -> list[str]:
    match method:
        case Method.PAUSE:
            return ["paused: saves wait for `resume` or `apply`"]
        case Method.APPLY | Method.RESUME:
            lines = [line for event in result["events"] for line in told(event)]
            return lines or ["nothing waits to be applied"]
        case Method.REVERT:
            return told(result)
        case _:
            return _status(result)


def _status(found: dict[str, Any]) -> list[str]:
    generation = found["generation"]
    lines = [
        f"process {found['pid']}: {found['program']}",
        f"  generation {generation} is live" if generation else "  runs the program as it was started",
        f"  {'paused' if found['paused'] else 'watching'}: {', '.join(found['watching'])}",
    ]
    for what in ("saved", "pending"):
        if found[what]:
            lines.append(f"  {what}, not live: {', '.join(found[what])}")
    return lines
