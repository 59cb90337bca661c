"""patcher completion: tried in the shells themselves, in a terminal as a user has it."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import ENVIRONMENT, SECONDS, run

LOAD = {
    "bash": 'eval "$(patcher completion bash)"',
    "zsh": 'autoload -U compinit; compinit -u -D; eval "$(patcher completion zsh)"',
}
SHELL = {"bash": ["bash", "--norc", "-i"], "zsh": ["zsh", "-f", "-i"]}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with the command `patcher` in bin/, and one source file."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/patcher").write_text(f'#!/bin/sh\nexec {sys.executable} -m patcher "$@"\n')
    (tmp_path / "bin/patcher").chmod(0o755)
    (tmp_path / "physics.c").write_text("")
    return tmp_path


def environment(place: Path) -> dict[str, str]:
    return {
        **ENVIRONMENT,
        "PATH": f"{place}/bin:{os.environ['PATH']}",
        "TERM": "xterm",
        "HOME": str(place),
        "PS1": "$ ",
    }


class Terminal:
    """A shell in a terminal of its own."""

    def __init__(self, shell: str, place: Path) -> None:
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            SHELL[shell],
            cwd=place,
            env=environment(place),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)

    def type(self, text: str, expected: str) -> None:
        """Type something, and wait until the terminal shows what is expected."""
        os.write(self._master, text.encode())
        shown, deadline = "", time.monotonic() + SECONDS
        while expected not in shown:
            ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"typed {text!r}, and never saw {expected!r}: {shown!r}"
            shown += os.read(self._master, 4096).decode(errors="replace")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)


@pytest.fixture(params=sorted(SHELL))
def terminal(request: pytest.FixtureRequest, place: Path) -> Iterator[Terminal]:
    terminal = Terminal(request.param, place)
    try:
        terminal.type(f"{LOAD[request.param]}; echo lo''aded\n", "loaded\r\n")
        yield terminal
    finally:
        terminal.end()


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("patcher hea\t", "header"),
        ("patcher spawn --comp\t", "--compile-commands"),
        ("patcher apply 1 phy\t", "physics.c"),
    ],
)
def test_a_terminal_completes(typed, completed, terminal):
    terminal.type(typed, completed)


@pytest.mark.parametrize(
    ("typed", "completed"),
    [("patcher hea", "header"), ("patcher spawn --comp", "--compile-commands"), ("patcher apply 1 phy", "physics.c")],
)
def test_fish_completes(typed, completed, place):
    script = f"patcher completion fish | source; complete -C {typed!r}"
    done = subprocess.run(
        ["fish", "--no-config", "-c", script],
        cwd=place,
        env=environment(place),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == [completed], done.stderr


def test_another_shell_is_no_shell_of_ours():
    done = run("completion", "tcsh")
    assert done.returncode == 2
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in done.stderr
