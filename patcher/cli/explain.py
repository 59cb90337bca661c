"""`patcher explain`: what a save would do, without doing it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from patcher.cli.options import common, gather
from patcher.report import Outlook
from patcher.session import Session
from patcher.target import Target, processes_mapping
from patcher.tree import Tree


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="[PID] FILES...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@common(watch=False)
def explain(words: tuple[str, ...], as_json: bool, **rest: Any) -> int:
    """Tell what saving FILES would do to process PID, and whether it would be refused. Changes nothing.

    Without PID, the one process of yours that has been patched.

    \b
    patcher explain 4711 physics.c        functions that change, what becomes of data, types, the verdict
    """
    asked = gather(rest)
    pid, files = _split(words)
    options = replace(asked.options(), dry_run=True)
    kind = Tree if asked.tree else Session
    with asked.reporter() as reporter, kind(Target.attach(pid), options, reporter) as session:
        found = session.explain(*files)
    if as_json:
        click.echo(json.dumps(found.as_json()))
    else:
        click.echo("\n".join(found.lines()))
    return int(found.outlook is Outlook.REFUSED)


def _split(words: tuple[str, ...]) -> tuple[int, tuple[Path, ...]]:
    """Return the process and the files that are meant."""
    first, files = words[0], words[1:]
    if first.isascii() and first.isdigit() and not Path(first).exists():
        if not files:
            raise click.UsageError("which files? give an object, an archive or a source file")
        return int(first), tuple(map(Path, files))
    patched = processes_mapping("/memfd:patcher")
    if len(patched) != 1:
        found = ", ".join(map(str, patched)) or "none"
        raise click.UsageError(f"which process? give its PID before the files (patched ones of yours: {found})")
    return patched[0], tuple(map(Path, words))
