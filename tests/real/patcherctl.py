"""Run `patcher attach` beside a program, or `patcher spawn` with it, and wait for what it says about each save.

Uses nothing but the documented command line and the NDJSON events, as any other tool would.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Event = dict[str, Any]
REPOSITORY = Path(__file__).parents[2]
PATCHER = (sys.executable, "-m", "patcher")
FAILURES = ("refused", "build_failed")
POLL_SECONDS = 0.005
# A save of several files may come in several rounds, of which a first may lack what a second brings.
SECONDS_TO_RECOVER = 5.0


class PatcherFailed(AssertionError):
    """The tool refused, ended or stayed silent; the message carries its events and its stderr."""


class Controller:
    """A running `patcher`, and the events it has written so far."""

    def __init__(self, process: subprocess.Popen[bytes], events: Path, stderr: Path) -> None:
        self.process = process
        self.pid = 0  # of the program, as soon as it is ready
        self.events: list[Event] = []
        self._file = events
        self._stderr = stderr
        self._offset = 0
        self._unseen: collections.deque[Event] = collections.deque()

    def next(self, deadline: float, what: str) -> Event:
        """Take the next event, each event once; raises PatcherFailed at the deadline or when the tool ends."""
        while not self._unseen:
            ended = self.process.poll() is not None  # before the read: what it wrote last must be seen
            self._read()
            if self._unseen:
                break
            if ended:
                raise self.failure(f"patcher ended with {self.process.returncode}, still awaited: {what}")
            if time.monotonic() > deadline:
                raise self.failure(f"nothing came in time, still awaited: {what}")
            time.sleep(POLL_SECONDS)
        return self._unseen.popleft()

    def _read(self) -> None:
        """Read what was written since the last call; a line that is not complete yet stays for the next."""
        if not self._file.exists():
            return
        with self._file.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        fresh = [json.loads(line) for line in complete.splitlines()]
        self.events += fresh
        self._unseen.extend(fresh)

    def ready(self, seconds: float = 60) -> Event:
        """Wait until the tool watches."""
        deadline = time.monotonic() + seconds
        while (event := self.next(deadline, "ready"))["event"] != "ready":
            pass
        self.pid = int(event["pid"])
        return event

    def applied(self, functions: Iterable[str], seconds: float = 120) -> list[Event]:
        """Wait until every named function is live, in one generation or several; return their events.

        With no name given, wait for one generation, whatever it changes.

        Raises PatcherFailed when the tool refuses, or cannot build, and nothing saved after that mends it.
        """
        missing = set(functions)
        generations: list[Event] = []
        limit = deadline = time.monotonic() + seconds
        while missing or not generations:
            event = self.next(deadline, f"a generation with {', '.join(sorted(missing))}")
            if event["event"] == "applied":
                generations.append(event)
                missing -= plain_names(event)
            elif event["event"] in FAILURES:
                deadline = min(limit, time.monotonic() + SECONDS_TO_RECOVER)
            elif event["event"] == "saved":
                deadline = limit
        return generations

    def refused(self, seconds: float = 120) -> Event:
        """Wait for a refusal; raises PatcherFailed when something is applied instead."""
        deadline = time.monotonic() + seconds
        while (event := self.next(deadline, "refusal"))["event"] not in ("applied", *FAILURES):
            pass
        if event["event"] != "refused":
            raise self.failure(f"{event['event']} where a refusal was due")
        return event

    def build_failed(self, seconds: float = 120) -> Event:
        """Wait for a save that does not compile; raises PatcherFailed when something else comes of it."""
        deadline = time.monotonic() + seconds
        while (event := self.next(deadline, "failing build"))["event"] not in ("applied", "unchanged", *FAILURES):
            pass
        if event["event"] != "build_failed":
            raise self.failure(f"{event['event']} where a failing build was due")
        return event

    def said(self) -> str:
        """Return what it wrote for people so far."""
        return self._stderr.read_text(errors="replace")

    def failure(self, what: str) -> PatcherFailed:
        """Make the error that shows what the tool did."""
        events = "\n".join(json.dumps(event)[:2000] for event in self.events[-12:])
        stderr = self._stderr.read_text(errors="replace")[-6000:]
        return PatcherFailed(f"{what}\n--- last events\n{events}\n--- stderr of patcher\n{stderr}")


def plain_names(event: Event) -> set[str]:
    """Name the functions of an `applied` event, a clone (`f.constprop.0`) under its parent's name too."""
    names = {str(function["name"]) for function in event["functions"]}
    return names | {name.split(".")[0] for name in names}


def timings(generations: Iterable[Event]) -> str:
    """Say in a line how long each generation took, for the log of the run."""
    return "; ".join(
        f"generation {event['generation']}, {len(event['functions'])} functions: "
        + ", ".join(f"{name} {value:.1f} ms" for name, value in event["timings"].items())
        for event in generations
    )


@contextlib.contextmanager
def attached(
    pid: int, watched: Sequence[Path], compile_commands: Path, directory: Path, *options: str
) -> Iterator[Controller]:
    """Attach patcher to a process for the length of the block; Ctrl-C ends it and leaves the process running."""
    with attached_only(pid, watched, directory, "--compile-commands", str(compile_commands), *options) as controller:
        yield controller


@contextlib.contextmanager
def attached_only(pid: int, watched: Sequence[Path], directory: Path, *options: str) -> Iterator[Controller]:
    """Do as `attached` does, with nothing to say how sources are compiled."""
    events, stderr = directory / "events.ndjson", directory / "patcher.stderr"
    command = [*PATCHER, "attach", str(pid), *watching(watched), "--events", str(events), *options]
    with stderr.open("wb") as sink:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, cwd=REPOSITORY)
    controller = Controller(process, events, stderr)
    try:
        controller.ready()
        yield controller
    finally:
        _end(process)


@contextlib.contextmanager
def spawned(program: Sequence[str], watched: Sequence[Path], directory: Path, *options: str) -> Iterator[Controller]:
    """Have patcher start a program, on pipes of ours, for the length of the block; both have ended after it."""
    events, stderr = directory / "events.ndjson", directory / "patcher.stderr"
    command = [*PATCHER, "spawn", *watching(watched), "--events", str(events), *options, "--", *program]
    pipe = subprocess.PIPE
    with stderr.open("wb") as sink:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=sink, cwd=REPOSITORY)
    controller = Controller(process, events, stderr)
    with process:
        try:
            controller.ready()
            yield controller
        finally:
            # who starts a program ends with it; one that ended before may have left it behind
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if controller.pid and os.path.samefile(f"/proc/{controller.pid}/exe", program[0]):
                    os.kill(controller.pid, signal.SIGKILL)
            if not controller.pid:
                process.kill()
            process.wait(timeout=120)  # it may be compiling what was saved last


def watching(paths: Sequence[Path]) -> list[str]:
    """Return the options that say what is watched."""
    return [part for path in paths for part in ("--watch", str(path))]


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
