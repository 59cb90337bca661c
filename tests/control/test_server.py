"""The control socket: who gets in, what is handed to the watch, and what hostile clients can do to it: nothing."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from patcher.control import Asked, Connection, Control, Fault
from patcher.control.place import NoControl
from patcher.control.protocol import LINE_LIMIT
from patcher.errors import PatcherError
from patcher.report import Note, Saved

SECONDS = 10.0
PID = os.getpid()


class Watch:
    """The thread of a watch that does what it is asked between rounds of its own."""

    def __init__(self, control: Control) -> None:
        self.control = control
        self.woken = threading.Event()
        self.done: list[str] = []
        self._rounds = 0
        self._stop = False
        self._thread = threading.Thread(target=self._run)

    def begin(self) -> None:
        self.control.listen(PID, self.woken.set)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop:
            self.woken.wait(0.05)
            self.woken.clear()
            while (asked := self.control.take()) is not None:
                self._do(asked)
            self._rounds += 1

    def _do(self, asked: Asked) -> None:
        self.done.append(asked.call.method.value)
        parameters = dict(asked.call.parameters)
        if parameters.get("generation") == 9:
            asked.answer(Fault.of(PatcherError("no such generation", "try 1", code="unknown")))
        else:
            asked.answer({"did": asked.call.method.value, **parameters})

    def end(self) -> None:
        self._stop = True
        if self._thread.ident is not None:
            self._thread.join()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "patcher"


@pytest.fixture
def control(place: Path) -> Iterator[Control]:
    made = Control()
    yield made
    made.close()


@pytest.fixture
def watch(control: Control) -> Iterator[Watch]:
    made = Watch(control)
    made.begin()
    yield made
    made.end()


@pytest.fixture
def raw(place: Path) -> Iterator[Callable[[], socket.socket]]:
    """Connect without a client of ours."""
    made: list[socket.socket] = []

    def connect() -> socket.socket:
        made.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        made[-1].settimeout(SECONDS)
        made[-1].connect(str(place / f"{PID}.sock"))
        return made[-1]

    yield connect
    for connection in made:
        connection.close()


def replies(connection: socket.socket) -> list[Any]:
    """Return what is said until the other end closes."""
    data = b""
    while part := connection.recv(1 << 16):
        data += part
    return [json.loads(line) for line in data.splitlines()]


def line(method: str, **more: object) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "method": method, **more}).encode() + b"\n"


def test_calls_are_done_by_the_watch_and_answered(watch):
    with Connection(PID) as connection:
        assert connection.call("revert", {"generation": 3}) == {"did": "revert", "generation": 3}
        assert connection.call("status") == {"did": "status"}
        with pytest.raises(PatcherError, match="no such generation") as caught:
            connection.call("revert", {"generation": 9})
        assert (caught.value.code, caught.value.hint) == ("unknown", "try 1")
        with pytest.raises(PatcherError, match="no parameter 'x'"):
            connection.call("pause", {"x": 1})
    assert watch.done == ["revert", "status", "revert"]


def test_a_script_that_sends_and_closes_is_answered_in_order(watch, raw):
    """As `printf ... | socat - UNIX-CONNECT:...` does: the last line has no end, and nothing more will come."""
    connection = raw()
    connection.sendall(line("pause") + line("status", id=1) + b"\n[" + line("apply", id=2).rstrip() + b",3]\n")
    connection.sendall(line("resume", id=4).rstrip())
    connection.shutdown(socket.SHUT_WR)
    found = replies(connection)
    assert [r["id"] if isinstance(r, dict) else [x["id"] for x in r] for r in found] == [1, [2, None], 4]
    assert watch.done == ["pause", "status", "apply", "resume"]


def test_events_go_to_who_subscribed(control, watch):
    with Connection(PID) as everything, Connection(PID) as some:
        assert everything.call("subscribe") == {"subscribed": True}
        some.call("subscribe", {"events": ["note"]})
        control.emit(Saved(("a.c",)))
        control.emit(Note("by the way"))
        control.tell("building", files=["a.c"])
        events = everything.events()
        assert [next(events)["event"] for _ in range(3)] == ["saved", "note", "building"]
        assert next(some.events())["text"] == "by the way"
        control.close()
        assert list(events) == list(some.events()) == []


def test_what_is_told_within_a_call_can_be_its_result(control):
    with control.recorded() as told:
        control.emit(Saved(("a.c",)))
    control.emit(Saved(("b.c",)))
    assert [event["files"] for event in told] == [["a.c"]]


def test_only_the_user_gets_at_it(watch, place):
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert stat.S_IMODE((place / f"{PID}.sock").stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
def test_another_user_who_gets_through_to_it_is_turned_away(watch, place):
    """Were the directory open to all, the peer's user would still tell."""
    above = takewhile(lambda p: p != Path(tempfile.gettempdir()), place.parents)
    for path, mode in ((place / f"{PID}.sock", 0o777), *((p, 0o755) for p in (place, *above))):
        path.chmod(mode)
    text = (
        "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX)\n"
        "s.connect(sys.argv[1]); print(s.makefile().read())"
    )
    done = subprocess.run(
        [sys.executable, "-c", text, str(place / f"{PID}.sock")], capture_output=True, text=True, check=True
    )
    assert "this watch is another user's" in done.stdout
    assert watch.done == []


def test_a_directory_that_others_can_write_to_is_not_used(place, control):
    place.mkdir()
    if os.geteuid() == 0:
        os.chown(place, 65534, 65534)
        with pytest.raises(NoControl, match="others can write"):
            control.listen(PID, lambda: None)
        os.chown(place, 0, 0)
    place.rmdir()
    place.symlink_to("/tmp")
    with pytest.raises(NoControl):
        control.listen(PID, lambda: None)


def test_a_socket_that_nobody_listens_at_is_replaced(place, control):
    place.mkdir(mode=0o700)
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(place / f"{PID}.sock"))
    dead.close()
    with pytest.raises(NoControl, match="nobody watches"):
        Connection(PID)
    control.listen(PID, lambda: None)
    Connection(PID).close()
    control.close()
    assert list(place.iterdir()) == []


def test_a_second_watch_of_a_process_has_no_socket(watch):
    second = Control()
    with pytest.raises(NoControl, match="another patcher"):
        second.listen(PID, lambda: None)
    second.close()
    with Connection(PID) as connection:
        assert connection.call("status") == {"did": "status"}


def test_another_process_is_another_socket_and_clients_stay(control, watch, place):
    other = os.getppid()
    with Connection(PID) as connection:
        connection.call("subscribe")
        control.away()
        with pytest.raises(PatcherError, match="no process now"):
            connection.call("status")
        control.listen(other, watch.woken.set)
        assert connection.call("status") == {"did": "status"}
        with Connection(other) as second:
            second.call("status")
        assert [p.name for p in place.iterdir()] == [f"{other}.sock"]


# --- what must not disturb it ---


def test_a_line_that_does_not_end(watch, raw):
    connection = raw()
    connection.sendall(b"[" * (LINE_LIMIT + 2))
    (reply,) = replies(connection)
    assert reply["error"]["code"] == -32700
    other = raw()
    other.sendall(b"x" * (LINE_LIMIT + 1) + b"\n" + line("status", id=1))
    other.shutdown(socket.SHUT_WR)
    assert replies(other)[0]["error"]["code"] == -32700
    assert_answers(watch)


def assert_answers(watch: Watch) -> None:
    with Connection(PID) as connection:
        assert connection.call("status") == {"did": "status"}


def test_half_lines_and_sudden_ends(watch, raw):
    half = [raw() for _ in range(20)]
    for number, connection in enumerate(half):
        connection.sendall(line("status", id=1)[: 1 + number])
    assert_answers(watch)
    for connection in half:
        connection.close()
    for _ in range(20):
        connection = raw()
        connection.sendall(line("status", id=1) * 3)
        connection.close()
    assert_answers(watch)


def test_a_hundred_clients(watch, raw):
    clients = []
    for _ in range(100):
        clients.append(raw())
        clients[-1].sendall(line("status", id=1))
    answers = [json.loads(client.recv(4096).splitlines()[0]) for client in clients]
    taken = [a for a in answers if "result" in a]
    assert len(taken) == 64
    assert {a["error"]["message"] for a in answers if "error" in a} == {"there are 64 connections already"}
    for client in clients:
        client.close()
    deadline = time.monotonic() + SECONDS
    while True:  # their ends are seen in its own time
        try:
            assert_answers(watch)
            return
        except PatcherError:
            assert time.monotonic() < deadline


def test_a_client_is_heard_so_often_a_second(watch, raw):
    """More than that has to wait for the next second, however quick the watch is."""
    began = time.monotonic()
    connection = raw()
    connection.sendall(line("status", id=1) * 201)
    connection.shutdown(socket.SHUT_WR)
    assert len(replies(connection)) == 201
    assert time.monotonic() - began >= 1


def test_a_flood_is_slowed_down_and_others_are_heard(watch, raw):
    """Each of ten sends far more than is taken of it, and reads nothing."""
    stop = threading.Event()

    def flood(connection: socket.socket) -> None:
        while not stop.is_set():
            try:
                connection.sendall(line("status", id=1) * 500 + b"nonsense\n" * 500)
            except TimeoutError:
                continue

    clients = [raw() for _ in range(10)]
    for client in clients:
        client.settimeout(0.2)
    floods = [threading.Thread(target=flood, args=(client,)) for client in clients]
    for thread in floods:
        thread.start()
    try:
        for _ in range(5):
            assert_answers(watch)
    finally:
        stop.set()
        for thread in floods:
            thread.join()


def test_who_does_not_read_is_dropped(control, watch, raw):
    asleep = raw()
    asleep.sendall(line("subscribe", id=1))
    assert json.loads(asleep.recv(4096))["result"] == {"subscribed": True}
    for _ in range(40):
        control.tell("note", text="x" * 50_000)
    assert_answers(watch)
    data = b""
    while part := asleep.recv(1 << 16):
        data += part
    assert len(data) < 40 * 50_000
