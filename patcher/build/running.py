"""Running compilers: several at once, each with its process group, cancellable, output kept in files.

Decides how long to wait and how to end what is not wanted any more. It does not know what it runs.
Output goes to files, not pipes: a server that a compiler wrapper leaves behind would hold a pipe open for ever.
Specification: vfork(2), setpgid(2), kill(2), signal(7).
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from patcher.errors import PatcherError

_LOOK_SECONDS = 0.005  # how often to ask whether the result is still wanted
_STOPPING = frozenset({signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})
_GRACE_SECONDS = 0.2  # gcc deletes its temporary files when told to end


class BuildCancelled(PatcherError):
    """The result was not wanted any more (the file was saved again) and the compilers were ended."""

    code = "build-cancelled"


@dataclass(frozen=True, slots=True)
class Job:
    """A program to run: no shell, in a directory, output (both streams) into a file of ours."""

    arguments: tuple[str, ...]
    directory: Path
    output: Path


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended: its status (negative: the signal that killed it), what it printed and how long it took."""

    status: int
    output: str
    milliseconds: float


@contextmanager
def unstopped() -> Iterator[None]:
    """Start programs in the block without Ctrl-Z in between: it would stop the child before it is a program.

    We would wait for that child (vfork) and so could not stop ourselves; the shell would wait for us for ever.
    Measured: 4 of 16 times when programs are started all the time. They keep the signals blocked.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def never() -> bool:
    """Say that nothing is cancelled."""
    return False


def asked(
    arguments: Sequence[str],
    seconds: float,
    *,
    directory: Path | None = None,
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end for what it prints; its complaints are dropped, and it has nothing to read.

    Raises OSError where it cannot be started, TimeoutExpired after so many seconds.
    """
    with unstopped():
        return subprocess.run(
            arguments,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=False,
        )


def run_all(
    jobs: Sequence[Job],
    *,
    environment: dict[str, str],
    cancelled: Callable[[], bool] = never,
    at_once: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Outcome, ...]:
    """Run programs, as many at once as there are processors, and return how each ended, in order.

    `cancelled` is asked every few milliseconds, in the calling thread; `progress` is told how many of how many have
    ended. Raises BuildCancelled, or OSError with the
    program's or directory's name when one cannot be started; all that run are ended first.
    """
    waiting = list(enumerate(jobs))[::-1]
    running: dict[int, subprocess.Popen[bytes]] = {}
    ended: queue.SimpleQueue[tuple[int, float]] = queue.SimpleQueue()
    outcomes: dict[int, Outcome] = {}
    limit = at_once or os.cpu_count() or 1
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                index, job = waiting.pop()
                running[index] = _start(job, environment, index, ended)
            if cancelled():
                raise BuildCancelled("the build was cancelled", "the newer save is built instead")
            with contextlib.suppress(queue.Empty):
                index, milliseconds = ended.get(timeout=_LOOK_SECONDS)
                status = running.pop(index).returncode
                outcomes[index] = Outcome(status, _read(jobs[index].output), milliseconds)
                if progress is not None:
                    progress(len(outcomes), len(jobs))
    finally:
        _end(tuple(running.values()))
    return tuple(outcomes[index] for index in range(len(jobs)))


def _start(
    job: Job, environment: dict[str, str], index: int, ended: queue.SimpleQueue[tuple[int, float]]
) -> subprocess.Popen[bytes]:
    began = time.perf_counter()
    with job.output.open("wb") as output, unstopped():
        program = subprocess.Popen(
            job.arguments,
            cwd=job.directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )

    def wait() -> None:
        program.wait()
        ended.put((index, (time.perf_counter() - began) * 1000))

    # a thread that waits sees the end at once; Popen.wait(timeout) looks in ever longer intervals
    threading.Thread(target=wait, name=f"compile-{program.pid}", daemon=True).start()
    return program


def _end(programs: Sequence[subprocess.Popen[bytes]]) -> None:
    for program in programs:
        _signal(program, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    for program in programs:
        try:
            program.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(program, signal.SIGKILL)
            program.wait()


def _signal(program: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(program.pid, number)


def _read(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace")
