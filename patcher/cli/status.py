"""`patcher status`: what has been patched, read from the process itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import click

from patcher.cli.mistakes import pid_argument
from patcher.cli.options import gather, takes
from patcher.status import ObjectUse, Status
from patcher.target import Target
from patcher.tree import Tree


@click.command()
@pid_argument
@takes("status")
def status(pid: int, **rest: Any) -> int:
    """Tell which generation process PID runs, and where each patched function goes.

    \b
    patcher status 4711
    patcher status 4711 --json | jq .generation

    With --tree, --json prints one object a line; -v tells how much memory each object takes.
    """
    asked = gather("status", rest)
    with Tree(Target.attach(pid)) as session:
        statuses = session.statuses() if asked.tree else [session.status()]
    for found in statuses:
        if asked.json:
            click.echo(json.dumps(found.as_json()))
            continue
        _print(found)
        if asked.verbose and found.objects:
            _print_objects(found.objects)
    return 0


def _print(found: Status) -> None:
    click.echo(f"process {found.pid}: {found.program}")
    if not found.generation:
        click.echo("  runs the program as it was started" + (" (reverted)" if found.recorded else ""))
    else:
        click.echo(f"  generation {found.generation} is live (recorded: {', '.join(map(str, found.recorded))})")
    for f in found.functions:
        state = f"generation {f.generation}" if f.generation else "original"
        click.echo(f"  {f.name:30} {f.file:20} {f.original:#x} -> {f.current:#x}  {state}")
    for arena in found.arenas:
        click.echo(f"  arena at {arena.address:#x}: {arena.used} bytes in use")


def _print_objects(objects: Sequence[ObjectUse]) -> None:
    rows = [astuple(use) for use in objects]
    if len(rows) > 1:
        rows.append(("all", *(sum(column) for column in zip(*(row[1:] for row in rows), strict=True))))
    width = max(len(row[0]) for row in rows)
    click.echo(f"  {'bytes of':{width}} {'text':>9} {'rodata':>9} {'data':>9} {'GOT':>9} {'islands':>9}")
    for name, *sizes in rows:
        click.echo(f"  {name:{width}} " + " ".join(f"{size:9}" for size in sizes))
