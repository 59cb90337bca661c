"""A watch that is asked for things over its control socket, by `patcher ctl` and by clients of others."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from project import Project

from .conftest import COMMAND, ENVIRONMENT, SECONDS, Lines, Session, run

VALUE = "n + 1000 * calls"
Watching = Callable[..., Session]


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(ENVIRONMENT, "XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "patcher"


@pytest.fixture
def session(project: Project, watching: Watching) -> Session:
    return watching(project, "spawn", "./program", "--watch", "src")


def target(session: Session) -> int:
    return int(session.ready["pid"])


def ctl(session: Session, *words: object, status: int = 0) -> Any:
    done = run("ctl", target(session), *words, "--json")
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout) if status == 0 else done.stderr


def test_what_is_saved_while_it_is_paused_waits(project, session):
    assert ctl(session, "pause") == {"paused": True}
    path = project.edit("unit.c", VALUE, "3")
    while not (found := ctl(session, "status"))["saved"]:
        assert found["paused"]
    assert found["saved"] == [str(path)]
    assert found["generation"] == 0
    assert session.ask(5) == "1005"
    events = ctl(session, "resume")["events"]
    assert [e["event"] for e in events if e["event"] in ("saved", "applied", "resumed")] == [
        "resumed",
        "saved",
        "applied",
    ]
    assert session.ask(5) == "3"
    found = ctl(session, "status")
    assert (found["paused"], found["saved"], found["pending"], found["generation"]) == (False, [], [], 1)
    project.edit("unit.c", "return 3", "return 4")
    session.event("applied")
    session.event("applied")
    assert session.ask(5) == "4"


def test_apply_takes_it_while_it_goes_on_being_paused(project, session):
    ctl(session, "pause")
    path = project.edit("unit.c", VALUE, "3")
    assert ctl(session, "apply", path)["paused"]
    assert session.ask(5) == "3"
    assert ctl(session, "apply")["events"] == []


def test_a_file_that_was_not_saved_and_one_that_is_not_there(project, session):
    found = ctl(session, "apply", project.sources / "unit.c")["events"]
    assert [e["event"] for e in found] == ["saved", "building", "unchanged", "idle"]
    assert "no such file" in ctl(session, "apply", "nowhere.c", status=1)


def test_what_does_not_go_is_an_error_with_its_reason(project, session):
    project.edit("unit.c", VALUE, "n +")
    session.event("build_failed")
    assert "unit.c does not compile" in ctl(session, "apply", status=1)
    path = project.edit("unit.c", "return n +;", "extern int nowhere(int); return nowhere(n);")
    session.event("refused")
    with connected(session) as client:
        client.sendall(message("apply", id="x", params=[[str(path)]]))
        error = json.loads(client.makefile().readline())["error"]
    assert error["code"] == -32000
    assert error["data"]["reason"] == "unresolved-symbol"
    assert "nowhere" in error["message"]
    assert session.ask(5) == "1005"


def test_revert_and_the_next_save(project, session):
    project.edit("unit.c", VALUE, "3")
    session.event("applied")
    project.edit("unit.c", "return 3", "return 4")
    session.event("applied")
    assert ctl(session, "revert")["generation"] == 1
    assert session.event("reverted")["generation"] == 1
    assert session.ask(5) == "3"
    assert ctl(session, "revert", 0)["generation"] == 0
    assert session.ask(5).endswith("005")
    project.edit("unit.c", "return 4", "return 5")
    session.event("applied")
    assert session.ask(5) == "5"
    assert "generation 77" in ctl(session, "revert", 77, status=1)


def test_words_for_people(project, session):
    pid = target(session)
    assert run("ctl", pid, "pause").stdout == "paused: saves wait for `resume` or `apply`\n"
    path = project.edit("unit.c", VALUE, "3")
    assert run("ctl", pid, "apply", path).stdout.splitlines()[:2] == [
        "unit.c: generation 1 is live",
        "  changed: answer",
    ]
    assert run("ctl", pid, "resume").stdout.splitlines()[0] == "watching again"
    assert run("ctl", pid, "status").stdout.splitlines()[1:] == ["  generation 1 is live", "  watching: src"]
    assert run("ctl", pid, "revert").stdout == "back to the program as it was started\n"


def test_wrong_words(session):
    pid = target(session)
    for words, said in (
        (["revert", "x"], "revert does not take x"),
        (["pause", "1"], "pause does not take 1"),
        (["stop"], "'stop' is not one of"),
    ):
        done = run("ctl", pid, *words)
        assert done.returncode == 2
        assert said in done.stderr
    done = run("ctl", os.getpid(), "status")
    assert done.returncode == 1
    assert f"nobody watches process {os.getpid()}" in done.stderr


def test_subscribe_streams_events_until_the_watch_ends(project, session):
    command = [*COMMAND, "ctl", str(target(session)), "subscribe"]
    popen = {"env": ENVIRONMENT, "stdout": subprocess.PIPE}
    with (
        subprocess.Popen([*command, "--json", "ready", "applied", "exited"], **popen) as some,
        subprocess.Popen(command, **popen) as people,
    ):
        lines, words = Lines(some.stdout), Lines(people.stdout)
        assert words.next().startswith("program runs as process")  # it begins with how things are
        assert json.loads(lines.next())["event"] == "ready"
        project.edit("unit.c", VALUE, "3")
        assert words.next() == "unit.c: generation 1 is live"
        session.finish()
        events = [json.loads(line)["event"] for line in iter(lines.next, "")]
        assert events == ["applied", "exited"]
        assert some.wait(SECONDS) == people.wait(SECONDS) == 0


def test_the_socket_goes_with_the_watch(project, session, runtime):
    assert [p.name for p in runtime.glob("*.sock")] == [f"{target(session)}.sock"]
    session.finish()
    assert list(runtime.glob("*.sock")) == []


def test_a_watch_that_attached(project, watching, runtime):
    with project.running() as program:
        session = watching(project, "attach", program.pid, "--watch", "src")
        assert ctl(session, "status")["pid"] == program.pid
        session.process.send_signal(signal.SIGINT)
        assert session.process.wait(SECONDS) == 0
        assert list(runtime.glob("*.sock")) == []


def test_without_a_place_for_the_socket_it_watches_all_the_same(project, watching, runtime):
    runtime.write_text("in the way")
    session = watching(project, "spawn", "./program", "--watch", "src")
    project.edit("unit.c", VALUE, "3")
    session.event("applied")
    assert "`patcher ctl` cannot reach this watch" in session.errors()


def message(method: str, **more: object) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "method": method, **more}).encode() + b"\n"


def connected(session: Session) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(SECONDS)
    client.connect(str(Path(ENVIRONMENT["XDG_RUNTIME_DIR"]) / "patcher" / f"{target(session)}.sock"))
    return client


def test_floods_do_not_hold_up_saves(project, session):
    stop = threading.Event()

    def flood(client: socket.socket) -> None:
        with client:
            client.settimeout(0.2)
            while not stop.is_set():
                try:
                    client.sendall(message("status", id=1) * 200 + b"[[[[" * 2000 + b"\n" + message("no", id=2) * 200)
                except TimeoutError:
                    continue
                except OSError:
                    return

    floods = [threading.Thread(target=flood, args=(connected(session),)) for _ in range(8)]
    for thread in floods:
        thread.start()
    try:
        text = VALUE
        for number in range(1, 4):
            project.edit("unit.c", f"return {text}", f"return {number}")
            text = str(number)
            session.event("applied")
            assert session.ask(5) == text
    finally:
        stop.set()
        for thread in floods:
            thread.join()


def test_how_far_long_work_has_come_is_told(project, watching):
    """The build waits for us: it is told of on the socket, and, when it takes more than two seconds, in a line."""
    os.mkfifo(project.root / "gate")
    build = "read x < gate; gcc -g -O2 -c src/unit.c -o unit.o"
    session = watching(project, "spawn", "./program", "--watch", "src", "--build", build)
    command = [*COMMAND, "ctl", str(target(session)), "subscribe", "--json", "ready", "working"]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE) as client:
        lines = Lines(client.stdout)
        assert json.loads(lines.next())["event"] == "ready"
        project.edit("unit.c", VALUE, "3")
        text = f"--build {build}"
        while text not in session.errors():
            told = json.loads(lines.next())
            assert (told["event"], told["ended"]) == ("working", False)
        assert f"patcher: {text} ...\n" in session.errors()
        (project.root / "gate").write_text("go\n")
        while not told["ended"] or told["text"] != text:
            told = json.loads(lines.next())
        assert told["seconds"] > 2
        session.event("applied")
        assert f"patcher: {text}: done, {told['seconds']:.0f} s\n" in session.errors()
        session.finish()
        client.wait(SECONDS)
