"""`patcher config`: which value each option has, and where it comes from."""

from __future__ import annotations

import json
from typing import Any

import click

from patcher.cli.options import Chosen, choose, takes
from patcher.options import SHOWING


@click.command()
@click.option("--show", is_flag=True, help="Tell the value of each option (what it does anyway).")
@takes(SHOWING)
def config(show: bool, **rest: Any) -> int:
    """Tell the value of each option, and where it comes from: FILE:LINE, a flag, or the default.

    A file `patcher.toml`, or the section [tool:patcher] of setup.cfg, says what one would repeat: each option by
    its name, paths relative to the file. It is looked for from the current directory upwards, as far as the root
    of the checkout or the home directory. What is given on the command line wins.

    \b
    patcher config --show                     what spawn, attach and the others would take
    patcher config --show --json
    patcher config --show --watch lib         with an option as one would give it to them
    """
    chosen = choose(SHOWING, {**rest, "json": None})
    if rest["json"]:
        click.echo(json.dumps([_as_json(one) for one in chosen if one.row.configured]))
        return 0
    for one in chosen:
        if one.row.configured:
            click.echo(f"{one.row.switch:18} {_shown(one.value):40} {one.origin}".rstrip())
    return 0


def _as_json(chosen: Chosen) -> dict[str, object]:
    setting = chosen.setting
    return {
        "option": chosen.row.switch,
        "value": json.loads(json.dumps(chosen.value, default=str)),
        "from": "file" if setting else chosen.origin,
        "file": str(setting.file) if setting else None,
        "line": setting.line if setting else None,
    }


def _shown(value: Any) -> str:
    """Write a value as it could stand in patcher.toml; nothing where there is none."""
    if value is None or value == "":
        return "-"
    if isinstance(value, tuple):
        return "[" + ", ".join(json.dumps(str(word), ensure_ascii=False) for word in value) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value if isinstance(value, int) else str(value), ensure_ascii=False)
