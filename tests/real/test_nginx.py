"""nginx, a master and four workers under load: all processes change as one, and no request fails."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from patcher.tree import descendants

from .patcherctl import REPOSITORY, attached, timings
from .programs import await_more, running, until
from .trees import Tree

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

WORKERS = 4
CONNECTIONS = 8
CONFIGURATION = """\
daemon off;
worker_processes {workers};
error_log stderr;
pid nginx.pid;
{user}
events {{ worker_connections 64; }}
http {{
    access_log off;
    server_tokens off;
    keepalive_requests 1000000;
    server {{ listen unix:{path}; location / {{ root {root}; }} }}
}}
"""
HEADER = "            p = ngx_http_server_string;\n"
UNIT = "src/http/ngx_http_header_filter_module.c"


class Connection(http.client.HTTPConnection):
    """A client that speaks to a socket in the file system."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(str(self._path))

    def server(self) -> str:
        """Ask for a page, which must come whole, and return what the server calls itself."""
        self.request("GET", "/page.txt")
        answer = self.getresponse()
        assert (answer.status, answer.read()) == (200, b"the page\n" * 500)
        return answer.headers["Server"]


@dataclass
class Load:
    """One connection that asks without pause for as long as it is kept open."""

    path: Path
    stop: threading.Event
    seen: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    requests: int = 0

    def run(self) -> None:
        try:
            with contextlib.closing(Connection(self.path)) as connection:
                connection.connect()
                while not self.stop.is_set():
                    name = connection.server()
                    self.requests += 1
                    if name not in self.seen[-1:]:
                        self.seen.append(name)
        except Exception as error:  # a thread's exception is lost unless kept; any of them is a failed request
            self.failures.append(repr(error))


@contextlib.contextmanager
def loading(path: Path) -> Iterator[list[Load]]:
    stop = threading.Event()
    loads = [Load(path, stop) for _ in range(CONNECTIONS)]
    threads = [threading.Thread(target=load.run) for load in loads]
    for thread in threads:
        thread.start()
    try:
        await_more(loads, 50)
        yield loads
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def names(path: Path) -> set[str]:
    """Return what the server calls itself on many fresh connections, whichever worker takes them."""
    found = set()
    for _ in range(40):
        with contextlib.closing(Connection(path)) as connection:
            found.add(connection.server())
    return found


def generations(pid: int) -> dict[int, int]:
    """Return the live generation of each process of a tree, as the tool tells."""
    command = [sys.executable, "-m", "patcher", "status", str(pid), "--tree", "--json"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return {found["pid"]: found["generation"] for found in map(json.loads, done.stdout.splitlines())}


def named(name: str) -> str:
    return HEADER.replace("ngx_http_server_string", f'(u_char *) "Server: {name}" CRLF')


def test_master_and_workers_change_as_one_under_load(nginx_tree: Tree, tmp_path: Path) -> None:
    path, root = tmp_path / "nginx.sock", tmp_path / "root"
    root.mkdir()
    (root / "page.txt").write_bytes(b"the page\n" * 500)
    (tmp_path / "logs").mkdir()
    user = "user root;" if os.geteuid() == 0 else ""
    configuration = tmp_path / "nginx.conf"
    configuration.write_text(CONFIGURATION.format(workers=WORKERS, path=path, root=root, user=user))
    command = [nginx_tree.program, "-p", tmp_path, "-c", configuration]
    with contextlib.ExitStack() as stack:
        master = stack.enter_context(running(command, tmp_path / "nginx.log"))
        stack.callback(lambda: [os.kill(pid, signal.SIGKILL) for pid in descendants(master.pid)])
        until(lambda: names(path) == {"nginx"} or None, 20, "an nginx that answers")
        workers = descendants(master.pid)
        assert len(workers) == WORKERS
        where = (nginx_tree.watched, nginx_tree.compile_commands, tmp_path, "--tree")
        patcher = stack.enter_context(attached(master.pid, *where))

        with loading(path) as loads:
            for old, new in ((HEADER, named("NGINX")), (named("NGINX"), named("Nginx"))):
                nginx_tree.edit(UNIT, old, new)
                events = patcher.applied(["ngx_http_header_filter"], 60)
                print("server:", timings(events), [len(e["processes"]) for e in events])
                await_more(loads, 50)
        assert [failure for load in loads for failure in load.failures] == []
        # Each connection sees the old name, then the new ones, and never an old one again.
        assert [load.seen for load in loads] == [["nginx", "NGINX", "Nginx"]] * CONNECTIONS
        print(f"{sum(load.requests for load in loads)} requests, none failed")
        assert generations(master.pid) == dict.fromkeys((master.pid, *workers), 2)

        # A worker that dies is replaced by one that has the code from the master.
        os.kill(workers[0], signal.SIGKILL)
        until(lambda: workers[0] not in descendants(master.pid) or None, 20, "the end of a worker")
        until(lambda: len(descendants(master.pid)) == WORKERS or None, 20, "a new worker")
        until(lambda: names(path) == {"Nginx"} or None, 20, "the new worker's answers")
        assert set(generations(master.pid).values()) == {2}
        nginx_tree.edit(UNIT, named("Nginx"), named("NginX"))
        (event,) = patcher.applied(["ngx_http_header_filter"], 60)
        assert {p["generation"] for p in event["processes"]} == {3}
        assert names(path) == {"NginX"}

        subprocess.run(
            [sys.executable, "-m", "patcher", "revert", str(master.pid), "0", "--tree"], cwd=REPOSITORY, check=True
        )
        assert names(path) == {"nginx"}
        assert set(generations(master.pid).values()) == {0}
