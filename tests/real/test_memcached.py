"""memcached with four worker threads under load: command handlers change, and no request fails."""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from .patcherctl import attached, timings
from .programs import await_more, running, until
from .trees import Tree

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

WORKERS = 4
LOAD_CONNECTIONS = 8
VERSION = 'out_string(c, "VERSION " VERSION);'
TOUCHED = 'out_string(c, "TOUCHED");'


class Connection:
    """A client of memcached's text protocol."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        try:
            self.socket.connect(str(path))
        except OSError:
            self.socket.close()
            raise
        self.stream = self.socket.makefile("rb")

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self.socket.close()

    def ask(self, request: bytes) -> bytes:
        """Send a request and return the first line of the reply, without its end."""
        self.socket.sendall(request)
        line = self.stream.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("memcached closed the connection")
        return line[:-2]

    def get(self, key: bytes) -> bytes:
        """Return a key's value, empty for a miss."""
        head = self.ask(b"get %b\r\n" % key)
        if head == b"END":
            return b""
        value = self.stream.read(int(head.split()[3]) + 2)[:-2]
        assert self.stream.readline() == b"END\r\n"
        return value


@dataclass
class Load:
    """One connection that writes, reads, counts and touches without pause, and checks every reply."""

    path: Path
    name: bytes
    stop: threading.Event
    failures: list[str] = field(default_factory=list)
    requests: int = 0
    touched: list[bytes] = field(default_factory=list)

    def run(self) -> None:
        try:
            with Connection(self.path) as connection:
                self._expect(connection.ask(b"set n%b 0 0 1\r\n0\r\n" % self.name), b"STORED")
                round_number = 0
                while not self.stop.is_set():
                    round_number += 1
                    self._round(connection, round_number)
        except Exception as error:  # a thread's exception is lost unless kept; any of them is a failed request
            self.failures.append(repr(error))

    def _round(self, connection: Connection, number: int) -> None:
        value = b"%b %d " % (self.name, number) * 20
        self._expect(connection.ask(b"set k%b 0 0 %d\r\n%b\r\n" % (self.name, len(value), value)), b"STORED")
        self._expect(connection.get(b"k" + self.name), value)
        self._expect(connection.ask(b"incr n%b 1\r\n" % self.name), b"%d" % number)
        answer = connection.ask(b"touch k%b 0\r\n" % self.name)
        self.requests += 1
        if answer not in self.touched[-1:]:
            self.touched.append(answer)

    def _expect(self, answer: bytes, expected: bytes) -> None:
        self.requests += 1
        if answer != expected:
            self.failures.append(f"{answer[:80]!r} where {expected[:80]!r} was due")


@contextlib.contextmanager
def loading(path: Path) -> Iterator[list[Load]]:
    stop = threading.Event()
    loads = [Load(path, b"%d" % number, stop) for number in range(LOAD_CONNECTIONS)]
    threads = [threading.Thread(target=load.run) for load in loads]
    for thread in threads:
        thread.start()
    try:
        until(lambda: all(load.requests > 100 for load in loads) or None, 20, "100 requests of every connection")
        yield loads
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_handlers_change_under_four_threads_and_no_request_fails(memcached_tree: Tree, tmp_path: Path) -> None:
    path = tmp_path / "memcached.sock"
    user = ["-u", getpass.getuser()] if os.geteuid() == 0 else []
    command = [memcached_tree.program, "-t", WORKERS, "-s", path, "-m", 64, *user]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running(command, tmp_path / "memcached.log"))
        client = stack.enter_context(until(lambda: Connection(path), 20, "a memcached that accepts connections"))
        assert client.ask(b"set kept 0 0 5\r\nvalue\r\n") == b"STORED"
        version = client.ask(b"version\r\n")
        assert version.startswith(b"VERSION 1.")
        loads = stack.enter_context(loading(path))
        controller = attached(server.pid, memcached_tree.watched, memcached_tree.compile_commands, tmp_path)
        patcher = stack.enter_context(controller)

        # The compiler inlines both handlers into whatever function it likes, so that none is awaited by name.
        memcached_tree.edit("proto_text.c", VERSION, 'out_string(c, "VERSION " VERSION ", patched while it ran");')
        generations = patcher.applied([], 60)
        print("version:", timings(generations))
        assert client.ask(b"version\r\n") == version + b", patched while it ran"

        memcached_tree.edit("proto_text.c", TOUCHED, 'out_string(c, "TOUCHED AGAIN");')
        generations = patcher.applied([], 60)
        print("touch:", timings(generations))
        await_more(loads, 200)

        assert server.poll() is None
        assert [failure for load in loads for failure in load.failures] == []
        # Each connection sees the old reply, then the new one, and never the old one again.
        assert [load.touched for load in loads] == [[b"TOUCHED", b"TOUCHED AGAIN"]] * LOAD_CONNECTIONS
        assert client.get(b"kept") == b"value"
        assert client.ask(b"version\r\n") == version + b", patched while it ran"
        print(f"{sum(load.requests for load in loads)} requests, none failed")
