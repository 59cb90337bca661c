"""A program that draws the whole screen, with what patcher says in a file: its screen has nothing of ours."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from project import Project

from .conftest import COMMAND, SECONDS, run

PROGRAM = """\
#include <ncurses.h>
int answer(int n);
int main(void)
{
    int keys = 0;
    initscr();
    cbreak();
    noecho();
    curs_set(0);
    do {
        mvprintw(5, 10, "<%d keys, answer %d>", keys++, answer(1));
        refresh();
    } while (getch() != 'q');
    endwin();
    return 7;
}
"""
UNIT = "int count;\nint answer(int n)\n{\n    count++;\n    return n + 1;\n}\n"


def wait_for(log: Path, text: str) -> str:
    deadline = time.monotonic() + SECONDS
    while not log.exists() or text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.01)
    return log.read_text()


@pytest.fixture
def curses(tmp_path: Path) -> Project:
    return Project(tmp_path / "p", {"main.c": PROGRAM, "unit.c": UNIT}, link_flags=["-lncurses"])


def test_the_screen_has_nothing_of_ours(curses, on_screen, tmp_path):
    alone = on_screen(["./program"], curses.root)
    drawn = alone.expect("<0 keys, answer 2>")
    alone.type("q")
    left = alone.rest()

    log = tmp_path / "log"
    log.write_text("earlier\n")
    screen = on_screen([*COMMAND, "spawn", "./program", "--watch", "src", "--log", str(log), "--aslr"], curses.root)
    assert screen.expect("<0 keys, answer 2>") == drawn
    wait_for(log, "watching src\n")
    curses.edit("unit.c", "n + 1", "n +")
    wait_for(log, "the old code runs on\n")
    curses.edit("unit.c", "n +", "n + 41")
    said = wait_for(log, "stop ")
    assert said.startswith("earlier\npatcher: program runs as process ")
    assert "unit.c:5:15: error:" in said
    assert "\x1b" not in said
    assert "\r" not in said
    screen.type("x")
    changed = screen.expect("42>")
    assert b"patcher" not in changed
    assert b"error" not in changed
    assert len(changed) < 80  # it drew what differs, as on a screen that it knows
    screen.type("q")
    assert screen.rest() == left
    assert screen.status == 7


def test_without_a_log_the_screen_is_torn(curses, on_screen):
    """What the log is for."""
    screen = on_screen([*COMMAND, "spawn", "./program", "--watch", "src"], curses.root)
    screen.expect("<0 keys")
    screen.expect("patcher: ")


def test_quiet_goes_for_the_log_too(project, tmp_path):
    log = tmp_path / "log"
    with project.running() as program:
        change = project.object("unit.c", ("n + 1000", "n + 3"))
        assert run("apply", program.pid, change, "--log", log, "--quiet").stderr == ""
        assert log.read_text() == ""
        done = run("revert", program.pid, "--log", log)
        assert (done.stderr, log.read_text()) == ("", "patcher: back to the program as it was started\n")


def test_a_log_that_cannot_be_written(project, tmp_path):
    with project.running() as program:
        done = run("revert", program.pid, "--log", tmp_path / "no" / "log")
        assert done.returncode == 1
        assert "give another file to --log" in done.stderr
