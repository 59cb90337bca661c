"""patcher as a user runs it: as a command, with a program, its streams and its events."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from fcntl import ioctl
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from project import Project

COMMAND = (sys.executable, "-m", "patcher")
ROOT = str(Path(__file__).parents[2])
ENVIRONMENT = {**os.environ, "PYTHONPATH": ROOT}
SECONDS = 20.0


def run(*arguments: object, cwd: Path | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run patcher to its end; what it prints is text."""
    command = [*COMMAND, *map(str, arguments)]
    options = {"stdin": subprocess.DEVNULL, **options} if "input" not in options else options
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS, **options)


class Lines:
    """Complete lines of a stream, with a limit to the waiting."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._data = b""

    def next(self, seconds: float = SECONDS) -> str:
        """Return the next line; "" at the end."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._data:
            ready, _, _ = select.select([self._stream], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no line within {seconds} s; so far: {self._data!r}"
            part = os.read(self._stream.fileno(), 1 << 16)
            if not part:
                return ""
            self._data += part
        line, _, self._data = self._data.partition(b"\n")
        return line.decode()


class Session:
    """patcher spawn or attach with --watch: events, and (for spawn) a program to talk to."""

    def __init__(self, cwd: Path, *arguments: object, events: Path) -> None:
        os.mkfifo(events)
        # Without waiting for a writer: one that never comes is then noticed after a while.
        self._fifo = os.fdopen(os.open(events, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)
        command, *rest = map(str, arguments)
        self._errors = events.with_suffix(".stderr").open("w+b")
        self.process = subprocess.Popen(
            [*COMMAND, command, "--events", str(events), *rest],
            cwd=cwd,
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        assert self.process.stdout is not None
        self._events = Lines(self._fifo)
        self.output = Lines(self.process.stdout)
        self.pid = self.process.pid
        self.ready: dict[str, Any] = {}

    def event(self, *names: str) -> dict[str, Any]:
        """Return the next event, or the next one that has one of some names."""
        while line := self._events.next():
            found: dict[str, Any] = json.loads(line)
            if not names or found["event"] in names:
                return found
        raise AssertionError(f"patcher ended before it said {names}: {self.errors()}")

    def events(self) -> list[dict[str, Any]]:
        """Return every event that is still to come."""
        return [json.loads(line) for line in iter(self._events.next, "")]

    def ask(self, text: object) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{text}\n".encode())
        self.process.stdin.flush()
        return self.output.next()

    def finish(self) -> int:
        """Close the program's input and return patcher's exit status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(SECONDS)

    def errors(self) -> str:
        """Return what was written on stderr so far."""
        self._errors.seek(0)
        return self._errors.read().decode()

    def end(self, target: int) -> None:
        for pid in (self.pid, target):
            if pid and (pid != self.pid or self.process.poll() is None):
                try:
                    os.kill(pid, 9)
                except ProcessLookupError:
                    continue
        for stream in (self.process.stdin, self.process.stdout, self._errors, self._fifo):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                continue
        self.process.wait(SECONDS)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "p")


@pytest.fixture
def watching(tmp_path: Path) -> Iterator[Callable[..., Session]]:
    """Start patcher in a project's directory; returns when it is ready, with `ready` the event."""
    sessions: list[tuple[Session, int]] = []

    def start(project: Project, *arguments: object) -> Session:
        session = Session(project.root, *arguments, events=tmp_path / f"events{len(sessions)}")
        sessions.append((session, 0))
        ready = session.ready = session.event("ready")
        # A program that was only attached to is ended by whoever started it.
        sessions[-1] = (session, ready["pid"] if arguments[0] == "spawn" else 0)
        if arguments[0] == "spawn":
            assert session.output.next() == "ready"
        return session

    yield start
    for session, target in sessions:
        session.end(target)


def sentences(errors: str) -> Sequence[str]:
    """Return patcher's own lines on stderr without hints, which are indented."""
    assert "Traceback" not in errors, errors
    return [line for line in errors.splitlines() if line.startswith("patcher: ") and not line.startswith("patcher:  ")]


class Screen:
    """A command on a terminal of its own, and every byte that it shows."""

    def __init__(self, command: list[str], cwd: Path) -> None:
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            os.execvpe(command[0], command, {**ENVIRONMENT, "TERM": "xterm", "LANG": "C.UTF-8"})
        ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.seen = b""
        self.status: int | None = None

    def expect(self, text: str) -> bytes:
        """Return what was shown up to some text, since it was last waited for."""
        deadline = time.monotonic() + SECONDS
        while text.encode() not in self.seen:
            ready, _, _ = select.select([self.terminal], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {text!r} in {self.seen!r}"
            self.seen += os.read(self.terminal, 1 << 14)
        before, found, self.seen = self.seen.partition(text.encode())
        return before + found

    def type(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def rest(self) -> bytes:
        """Return what is shown until the end."""
        with contextlib.suppress(OSError):
            while part := os.read(self.terminal, 1 << 14):
                self.seen += part
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.seen

    def end(self) -> None:
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGHUP)
            os.close(self.terminal)
            os.waitpid(self.pid, 0)


@pytest.fixture
def on_screen() -> Iterator[Callable[[list[str], Path], Screen]]:
    screens: list[Screen] = []

    def start(command: list[str], cwd: Path) -> Screen:
        screens.append(Screen(command, cwd))
        return screens[-1]

    yield start
    for screen in screens:
        screen.end()
