"""--reinit, and the offer of it: on a terminal the user is asked, once and before anything is written."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess

import pytest
from project import MAIN, Project

from .conftest import COMMAND, ENVIRONMENT, SECONDS, run

UNIT = """\
int limit = 5;
int answer(int n)
{
    return n + limit++;
}
"""


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path, {"main.c": MAIN, "unit.c": UNIT})


def on_terminal(*arguments: object, answer: bytes) -> tuple[int, str]:
    """Run patcher on a terminal of its own, type an answer, and return its exit status and what it showed."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdin=slave, stdout=slave, stderr=slave, env=ENVIRONMENT
    )
    os.close(slave)
    os.write(master, answer)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal nobody holds any more
        while chunk := os.read(master, 4096):
            shown += chunk
    os.close(master)
    return process.wait(SECONDS), shown.decode()


@pytest.mark.parametrize("function", [False, True], ids=["data-only", "with-code"])
@pytest.mark.parametrize(("typed", "value"), [(b"y\n", 70), (b"n\n", 6), (b"\n", 6)], ids=["yes", "no", "default"])
def test_a_terminal_is_asked_once(project, typed, value, function):
    with project.running() as program:
        assert program.ask(0) == "5"
        source = project.edit("unit.c", "limit = 5", "limit = 70")
        if function:
            project.edit("unit.c", "n + limit", "1000 + n + limit")
        status, shown = on_terminal("apply", program.pid, source, answer=typed)
        assert status == 0, shown
        assert shown.count("write the new value of `limit` (5 -> 70)?") == 1
        assert ("written anew: limit (5 -> 70)" in shown) == (value == 70)
        assert program.ask(0) == str(value + 1000 * function)


def test_an_end_of_input_leaves_everything_as_it_was(project):
    with project.running() as program:
        source = project.edit("unit.c", "limit = 5", "limit = 70")
        project.edit("unit.c", "n + limit", "1000 + n + limit")
        status, shown = on_terminal("apply", program.pid, source, answer=b"\x04")
        assert status == 130, shown
        assert program.ask(0) == "5"


def test_without_a_terminal_nobody_is_asked_and_the_command_is_named(project):
    with project.running() as program:
        source = project.edit("unit.c", "limit = 5", "limit = 70")
        done = run("apply", program.pid, source)
        assert done.returncode == 0
        assert "[y/N]" not in done.stderr
        assert "initialisers that changed, values kept: limit (5 -> 70)" in done.stderr
        command = f"patcher apply {program.pid} {source} --reinit limit"
        assert command in done.stderr
        assert program.ask(0) == "5"
        done = run(*command.split()[1:])
        assert done.returncode == 0
        assert "written anew: limit (5 -> 70)" in done.stderr
        assert program.ask(0) == "70"


def test_dry_run_writes_nothing(project):
    with project.running() as program:
        source = project.edit("unit.c", "limit = 5", "limit = 70")
        done = run("apply", program.pid, source, "--reinit", "limit", "--dry-run")
        assert done.returncode == 0
        assert "would be" in done.stderr
        assert "limit (5 -> 70)" in done.stderr
        assert program.ask(0) == "5"
