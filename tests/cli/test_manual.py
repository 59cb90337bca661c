"""The manual's pages are what the commands say, and groff takes them without a word."""

from __future__ import annotations

import configparser
import subprocess
from pathlib import Path

import pytest

from patcher.cli.main import cli
from patcher.cli.manual import main, pages
from patcher.options import TABLE, rows_of

from .conftest import ROOT

MAN = Path(ROOT) / "man"


def test_the_pages_are_those_that_the_commands_make():
    found = {path.name: path.read_text("utf-8") for path in MAN.iterdir()}
    assert found == pages(), "run `make man`"


def test_every_command_has_a_page_and_examples():
    assert pages().keys() == {"patcher.1", *(f"patcher-{name}.1" for name in cli.commands)}
    for name, command in cli.commands.items():
        assert f"\n    patcher {name}" in f"\n    {command.help}".replace("\b", "") or "$(patcher" in str(
            command.help
        ), name


@pytest.mark.parametrize("page", sorted(pages()))
def test_groff_takes_it(page):
    done = subprocess.run(
        ["groff", "-man", "-ww", "-b", "-z", str(MAN / page)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


def rendered(page: str) -> str:
    done = subprocess.run(
        ["groff", "-man", "-Tascii", "-P-cbou", str(MAN / page)], capture_output=True, text=True, check=True
    )
    return " ".join(done.stdout.split())


def test_a_reader_finds_options_and_examples_as_they_are_typed():
    text = rendered("patcher-spawn.1")
    examples = (
        "patcher spawn ./prog --watch src/",
        "patcher spawn --watch src/ -- ./prog -x file",
        "patcher spawn ./prog --watch src/ --build make --restart always",
    )
    assert f"EXAMPLES {' '.join(examples)} OPTIONS" in text
    for row in rows_of("spawn"):
        assert f"--{row.switch}" in text
    assert 'eval "$(patcher completion bash)"' in rendered("patcher-completion.1")
    overview = rendered("patcher.1")
    assert all(row.switch in overview for row in TABLE if row.configured)
    assert 'watch = ["src"]' in overview


def test_they_are_installed():
    setup = configparser.ConfigParser()
    setup.read(Path(ROOT) / "setup.cfg")
    assert setup["options.data_files"]["share/man/man1"].split() == ["man/*.1"]


def test_they_are_written_where_one_asks_for_them(tmp_path):
    assert main([str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/patcher-spawn.1").read_text("utf-8") == pages()["patcher-spawn.1"]
