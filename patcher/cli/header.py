"""`patcher header`: the C header by which a program knows of its patcher."""

from __future__ import annotations

from importlib.resources import files

import click


@click.command()
def header() -> int:
    """Print patcher.h: hooks, migrations, and what a program can read about its own generations.

    \b
    patcher header >src/patcher.h
    """
    click.echo(files("patcher").joinpath("header", "patcher.h").read_text("utf-8"), nl=False)
    return 0
