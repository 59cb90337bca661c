"""`patcher monitor` in a second terminal, which is a real one, and without a terminal."""

from __future__ import annotations

import json
import os
import subprocess
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from project import Project

from .conftest import COMMAND, ENVIRONMENT, SECONDS, Lines, Screen, Session

VALUE = "n + 1000 * calls"
Watching = Callable[..., Session]
OnScreen = Callable[[list[str], Path], Screen]
UP, ENTER, ESCAPE = "\x1b[A", "\r", "\x1b"


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRONMENT, "XDG_RUNTIME_DIR", str(tmp_path))


@pytest.fixture
def session(project: Project, watching: Watching) -> Session:
    return watching(project, "spawn", "./program", "--watch", "src")


@pytest.fixture
def screen(session: Session, on_screen: OnScreen, tmp_path: Path) -> Screen:
    found = on_screen([*COMMAND, "monitor", str(session.ready["pid"])], tmp_path)
    found.expect("program, process")
    return found


def test_saves_functions_and_history(project, session, screen):
    project.edit("unit.c", VALUE, "3")
    screen.expect("saved unit.c")
    screen.expect("* ")
    screen.expect("1  unit.c: answer  (")
    project.edit("unit.c", "return 3", "return 4")
    screen.expect("2  unit.c: answer  (")
    screen.type("q")
    assert screen.rest().endswith(b"\x1b[?25h\x1b[?1049l")  # the cursor and what was on the screen are back
    assert screen.status == 0
    assert session.ask(5) == "4"


def test_a_build_is_seen_while_it_lasts(project, watching, on_screen, tmp_path):
    """The compiler waits for us: the picture moves on while it does."""
    os.mkfifo(project.root / "gate")
    build = "read x < gate; gcc -g -O2 -c src/unit.c -o unit.o; gcc -g -O2 -c src/main.c -o main.o"
    session = watching(project, "spawn", "./program", "--watch", "src", "--watch", ".", "--build", build)
    screen = on_screen([*COMMAND, "monitor", str(session.ready["pid"])], tmp_path)
    screen.expect("watching")
    project.edit("unit.c", VALUE, "3")
    screen.expect("building unit.c ")
    screen.expect("building unit.c 2.")  # one of ten pictures of that second
    (project.root / "gate").write_text("go\n")
    screen.expect("1  unit.c: answer  (")


def test_work_in_the_background_is_seen(project, watching, on_screen):
    """The compiler that precompiles waits for us."""
    os.mkfifo(project.root / "gate")
    slow = project.root / "gcc"
    slow.write_text(f'#!/bin/sh\ncase "$*" in *-header*) read x < {project.root}/gate ;; esac\nexec gcc "$@"\n')
    slow.chmod(0o755)
    text = (project.root / "compile_commands.json").read_text()
    (project.root / "compile_commands.json").write_text(text.replace('"gcc"', json.dumps(str(slow))))
    session = watching(project, "spawn", "./program", "--watch", "src")
    screen = on_screen([*COMMAND, "monitor", str(session.ready["pid"])], project.root)
    screen.expect("precompiling what units begin with 0/")
    (project.root / "gate").write_text("go\n")
    screen.expect("q quit")


def test_on_a_terminal_of_ours_work_is_a_line_that_moves(project, on_screen):
    """The program is on another one."""
    os.mkfifo(project.root / "gate")
    build = "read x < gate; gcc -g -O2 -c src/unit.c -o unit.o"
    with project.running() as program:
        command = [*COMMAND, "attach", str(program.pid), "--watch", "src", "--build", build]
        screen = on_screen(command, project.root)
        screen.expect("watching src")
        project.edit("unit.c", VALUE, "3")
        shown = screen.expect("--build read x < gate; gcc -g -O2 -c sr")
        assert shown.rpartition(b"\n")[2].startswith(b"\r\x1b[K")
        (project.root / "gate").write_text("go\n")
        assert b"\r\x1b[K" in screen.expect("generation 1 is")
        assert program.ask(1) == "3"


def test_errors_have_the_compilers_colours(project, screen):
    project.edit("unit.c", VALUE, "n +")
    shown = screen.expect("expected expression before")
    assert b"\x1b[1;31merror: \x1b[0m" in shown
    screen.expect("unit.c does not compile")
    project.edit("unit.c", "n +", "3")
    screen.expect("1  unit.c: answer  (")
    assert b"expected expression" not in screen.expect("q quit").rpartition(b"watching")[2]


def test_back_by_keys(project, session, screen):
    for number, (old, new) in enumerate(((VALUE, "3"), ("return 3", "return 4"), ("return 4", "return 5")), 1):
        project.edit("unit.c", old, new)
        screen.expect(f"{number}  unit.c: answer  (")
    screen.type("r1")
    screen.expect("back to generation 1")
    screen.type(ENTER)
    screen.expect("back to generation 1 ")
    assert session.event("reverted")["generation"] == 1
    assert session.ask(5) == "3"
    screen.type("r" + UP + UP)
    screen.expect("back to generation 3")
    screen.type(ENTER)
    assert session.event("reverted")["generation"] == 3
    screen.type("r0" + ESCAPE)
    screen.expect("q quit")
    assert session.ask(5) == "5"
    screen.type("r77" + ENTER)
    screen.expect("generation 77")
    assert session.ask(5) == "5"


def test_pause_and_resume_by_keys(project, session, screen):
    screen.type("p")
    screen.expect("paused")
    project.edit("unit.c", VALUE, "3")
    screen.expect("as it is paused")
    assert session.ask(5) == "1005"
    screen.type("p")
    screen.expect("1  unit.c: answer  (")
    assert session.ask(5) == "3"


def test_the_end_of_the_watch_is_shown(session, screen):
    assert termios.tcgetattr(screen.terminal)[3] & (termios.ICANON | termios.ECHO) == 0
    session.finish()
    screen.expect("the watch ended")
    screen.type("q")
    screen.rest()
    assert screen.status == 0


def test_without_a_terminal_plain_lines(project, session):
    command = [*COMMAND, "monitor", str(session.ready["pid"])]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as monitor:
        assert monitor.stdout is not None
        lines = Lines(monitor.stdout)
        assert lines.next().startswith("program runs as process")
        project.edit("unit.c", VALUE, "n +")
        assert "unit.c: In function" in lines.next()
        assert "\x1b" not in (error := lines.next())
        assert "error: expected expression" in error
        session.finish()
        assert "the program" not in lines.next()
        assert monitor.wait(SECONDS) == 0
