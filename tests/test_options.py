"""The table of options: what the command line offers and the public API spells out is what stands there."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path

import click
import pytest

import patcher
from patcher.cli.main import cli
from patcher.errors import PatcherError
from patcher.options import TABLE, Options, Row, Settings, rows_of

OF_A_COMMAND = {
    "build",
    "ignore",
    "gitignore",
}  # what of a session's options the API does not take: it watches without a build of its own
OF_THE_API = {"tree"}  # what is no option of a session, and is taken all the same


def parameters(function: object) -> dict[str, object]:
    found = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return {p.name: p.default for p in found if p.kind is p.KEYWORD_ONLY}


def test_the_api_takes_every_option_of_a_session_with_its_default():
    names = {f.name for f in fields(Options)}
    wanted = {r.field: r.default for r in TABLE if r.field in names - OF_A_COMMAND or r.field in OF_THE_API}
    assert parameters(patcher.attach) == wanted


def test_spawn_takes_nothing_else_and_nothing_otherwise():
    taken, attached = parameters(patcher.spawn), parameters(patcher.attach)
    assert taken.pop("aslr") is next(r.default for r in TABLE if r.field == "aslr")
    assert taken == {name: attached[name] for name in taken}


@pytest.mark.parametrize("command", sorted({c for r in TABLE for c in r.commands}))
def test_a_command_has_the_options_of_the_table(command):
    found = {p.name: p for p in cli.commands[command].params if isinstance(p, click.Option)}
    found.pop("show", None)  # of `config`, which does nothing else
    rows = {r.parameter: r for r in rows_of(command)}
    assert rows.keys() == found.keys()
    for name, row in rows.items():
        assert f"--{row.switch}" in found[name].opts
        assert found[name].secondary_opts == ([f"--no-{row.switch}"] if row.negatable else [])
        assert row.meaning[:-1] in (found[name].help or "")


def test_every_switch_is_there_once():
    switches = [row.switch for row in TABLE]
    assert len(set(switches)) == len(switches)
    assert {row.field for row in TABLE} == {f.name for f in fields(Settings)} - {"colour", "ignore_from", "build_in"}


def test_the_readme_tells_every_switch():
    text = (Path(patcher.__file__).parents[1] / "README.md").read_text("utf-8")
    told = {r.switch for r in TABLE if f"`--{r.switch}" in text or f"`--no-{r.switch}" in text}
    assert {r.switch for r in TABLE} - told == set()


@pytest.mark.parametrize("row", [r for r in TABLE if r.choices], ids=lambda r: r.switch)
def test_a_choice_is_one_of_those_of_the_table(row: Row):
    for choice in row.choices:
        Settings(**{row.field: choice})
    with pytest.raises(PatcherError, match=f"{row.switch}: 'nonsense' is none of"):
        Settings(**{row.field: "nonsense"})
