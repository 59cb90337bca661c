"""spawn --restart: one command for a whole day, whatever becomes of the program meanwhile."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from project import Project

from patcher.control import Connection
from patcher.errors import PatcherError

from .conftest import ENVIRONMENT, Session, run

MAIN = """\
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
int answer(int n);
int main(void)
{
    char line[80];
    if (access("crash", 0) == 0)
        return 4;
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    while (fgets(line, sizeof line, stdin)) {
        int n = atoi(line);
        if (n < 0)
            exit(-n);
        printf("%d\\n", answer(n));
    }
    return 7;
}
"""
UNIT = """\
struct kept { int a; } kept = {5};
struct kept *where = &kept;
int answer(int n)
{
    return n + 1000 + where->a;
}
"""
MAKEFILE = """\
program: main.o unit.o
\tgcc -o $@ $^ -Wl,-z,now
%.o: src/%.c
\tgcc -g -O2 -c $< -o $@
"""

Start = Callable[..., Session]


@pytest.fixture
def made(tmp_path: Path) -> Project:
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": UNIT})
    (project.root / "Makefile").write_text(MAKEFILE)
    return project


@pytest.fixture
def started(watching: Start) -> Start:
    sessions = []

    def start(*arguments: object) -> Session:
        sessions.append(watching(*arguments))
        return sessions[-1]

    yield start
    for session in sessions:
        if session.process.poll() is None:
            session.process.send_signal(signal.SIGTERM)
            session.process.wait(20)


def again(session: Session) -> int:
    """Wait until the program runs again; return its pid."""
    ready = session.event("ready")
    assert session.output.next() == "ready"
    return int(ready["pid"])


def test_what_exits_is_started_again_with_the_edits_that_only_the_old_process_had(made, started) -> None:
    """Without --build the program's file is the old one."""
    session = started(made, "spawn", "./program", "--watch", "src", "--restart", "exit")
    made.edit("unit.c", "1000", "2000")
    session.event("applied")
    assert session.ask(1) == "2006"
    session.process.stdin.write(b"-3\n")
    session.process.stdin.flush()
    assert session.event("exited")["status"] == 3
    again(session)
    assert {f["name"] for f in session.event("applied")["functions"]} == {"answer"}
    assert session.ask(1) == "2006"
    made.edit("unit.c", "2000", "3000")
    assert session.event("applied")["generation"] == 2
    assert session.ask(1) == "3006"


def test_what_exits_is_built_before_it_is_started_again(made, started) -> None:
    build = ["--build", "make -s"]
    session = started(made, "spawn", "./program", "--watch", "src", "--restart", "exit", *build)
    made.edit("unit.c", "1000", "2000")
    session.event("applied")
    session.process.stdin.write(b"-3\n")
    session.process.stdin.flush()
    session.event("exited")
    again(session)
    assert session.ask(1) == "2006", "the new program has it"
    made.edit("unit.c", "2000", "3000")
    assert session.event("applied")["generation"] == 1
    assert session.ask(1) == "3006"


def test_a_build_that_fails_is_waited_for(made, started) -> None:
    session = started(made, "spawn", "./program", "--watch", "src", "--restart", "exit", "--build", "make -s")
    made.edit("unit.c", "1000", "oops")
    session.event("build_failed")
    session.process.stdin.write(b"-3\n")
    session.process.stdin.flush()
    session.event("exited")
    session.event("build_failed")
    made.edit("unit.c", "oops", "2000")
    again(session)
    assert session.ask(1) == "2006"


def test_a_refused_change_is_made_by_a_new_process(made, started) -> None:
    session = started(made, "spawn", "./program", "--watch", "src", "--restart", "refused", "--build", "make -s")
    assert session.ask(1) == "1006"
    made.edit("unit.c", "struct kept { int a; } kept = {5}", "struct kept { int b, a; } kept = {1, 6}")
    assert session.event("refused", "applied")["event"] == "refused"
    assert session.event("exited")["signal"] == signal.SIGTERM
    again(session)
    assert session.ask(1) == "1007"
    made.edit("unit.c", "1000", "2000")
    session.event("applied")
    assert session.ask(1) == "2007"
    assert session.finish() == 7, "an end by itself is one, with --restart refused"


def test_a_refused_change_that_does_not_build_leaves_the_process_running(made, started) -> None:
    """The objects build, the program does not."""
    build = "make -s unit.o main.o; if test -e once; then rm once; else test ! -e broken && make -s; fi"
    session = started(made, "spawn", "./program", "--watch", "src", "--restart", "refused", "--build", build)
    for name in ("once", "broken"):
        (made.root / name).touch()
    made.edit("unit.c", "struct kept { int a; } kept = {5}", "struct kept { int b, a; } kept = {1, 6}")
    assert session.event("refused", "applied", "exited")["event"] == "refused"
    assert session.event("ready", "build_failed", "exited")["event"] == "build_failed"
    assert session.ask(1) == "1006"
    (made.root / "broken").unlink()
    made.edit("unit.c", "1000", "2000")
    assert session.event("refused", "applied", "exited", "ready")["event"] == "refused"
    assert session.event("exited", "ready")["event"] == "exited"
    again(session)
    assert session.ask(1) == "2007"


def test_a_program_that_ends_at_once_waits_for_a_save(made, started) -> None:
    session = started(made, "spawn", "./program", "--watch", "src", "--restart", "exit")
    (made.root / "crash").touch()
    session.process.stdin.write(b"-3\n")
    session.process.stdin.flush()
    assert session.event("exited")["status"] == 3
    assert session.event("exited")["status"] == 4
    while "after the next save" not in session.errors():
        assert session.process.poll() is None
    (made.root / "crash").unlink()
    made.edit("unit.c", "1000", "2000")
    again(session)
    session.event("applied")
    assert session.ask(1) == "2006"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_asks_for_the_end_gets_it(made, started, number) -> None:
    session = started(made, "spawn", "./program", "--watch", "src", "--restart", "always", "--build", "make -s")
    os.kill(session.pid, number)
    assert session.process.wait(20) == 128 + number


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--restart", "exit"], "--watch"), (["--watch", ".", "--restart", "refused"], "--build")],
)
def test_wrong_usage(arguments, word, tmp_path) -> None:
    done = run("spawn", "cat", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert word in done.stderr


def test_who_listens_hears_of_the_next_process_and_reaches_it(made, started, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(ENVIRONMENT, "XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    os.mkfifo(tmp_path / "gate")
    build = f"read x < {tmp_path / 'gate'}; make -s"
    session = started(made, "spawn", "./program", "--watch", "src", "--restart", "exit", "--build", build)
    first = int(session.ready["pid"])
    with Connection(first) as connection:
        connection.call("subscribe", {"events": ["ready", "exited"]})
        session.process.stdin.write(b"-3\n")
        session.process.stdin.flush()
        events = connection.events()
        assert [next(events)["event"] for _ in range(2)] == ["ready", "exited"]
        with pytest.raises(PatcherError, match="there is no process now"):
            connection.call("status")
        (tmp_path / "gate").write_text("go\n")
        second = next(events)["pid"]
        assert second != first
        with Connection(second) as another:
            assert another.call("status")["pid"] == second
    assert [p.name for p in (tmp_path / "patcher").glob("*.sock")] == [f"{second}.sock"]
    assert again(session) == second
