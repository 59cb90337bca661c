"""The program does not notice: a thousand patches in a row, with threads in every call that a stop could end early.

programs/blocked.c counts what it should never see, programs/timers.c what has to come; tests/target has the same for
single stops, and registers, restartable sequences and the red zone (test_unnoticed.py tells where).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from project import Project, Running, assert_untouched

import patcher

PATCHES = 1000
ANSWER = "int count;\nint answer(int n)\n{\n    count++;\n    return n + 1;\n}\n"

libc = ctypes.CDLL(None, use_errno=True)
libc.sigqueue.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    main = (Path(__file__).parent / "programs" / "blocked.c").read_text()
    return Project(tmp_path_factory.mktemp("invisible") / "p", {"main.c": main, "unit.c": ANSWER})


@pytest.fixture
def program(project: Project) -> Iterator[tuple[Running, int]]:
    """The parent, which our lines go through to the child, and the child's pid."""
    with project.running() as parent:
        child = int(parent.greeting)
        yield parent, child
        if parent.process.poll() is None:
            parent.tell("end")  # which also removes its semaphores and its message queue
            try:
                parent.process.wait(5)
            except subprocess.TimeoutExpired:
                os.kill(child, signal.SIGKILL)
                parent.process.wait(10)


def patch_again_and_again(pid: int, change: Path, count: int) -> int:
    """Patch and go back to the original, `count` times; return in how many patches all threads had to stand still."""
    stops = 0
    with patcher.attach(pid) as session:
        for _ in range(count):
            stops += session.apply(change).timings.stop > 0
            assert session.revert(0) == 0
    return stops


class Signals(threading.Thread):
    """Sends signals with values 1, 2, 3 ... all the time; `sent` by number. `before`: what to wait for each time."""

    def __init__(self, pid: int, numbers: range, before: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.pid = pid
        self.sent = dict.fromkeys(numbers, 0)
        self.over = threading.Event()
        self._before = before

    def run(self) -> None:
        while not self.over.wait(0.002):
            self._before()
            for number in self.sent:
                value = self.sent[number] + 1
                if libc.sigqueue(self.pid, number, ctypes.c_void_p(value)) == 0:
                    self.sent[number] = value

    def stop(self) -> None:
        self.over.set()
        self.join()


def real(program: Running, field: int) -> list[int]:
    return [int(word.split(":")[field]) for word in program.ask("real").split()]


HANDLED, INTERRUPTIONS, THREAD = 1, 2, 3


def wait_until_all_sleep(program: Running, pid: int) -> None:
    """Each signal was handled, and each thread is in its call again: between two calls nothing can be interrupted."""
    deadline = time.monotonic() + 10
    while real(program, HANDLED) != real(program, INTERRUPTIONS) or any(
        state(pid, thread) != "S" for thread in real(program, THREAD)
    ):
        assert time.monotonic() < deadline, program.ask("real")


def state(pid: int, thread: int) -> str:
    return Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.timeout(400)
def test_a_thousand_patches_leave_no_trace(project, program):
    parent, pid = program
    change = project.object("unit.c", ("n + 1", "n + 100"))
    queue = Signals(pid, range(signal.SIGRTMIN, signal.SIGRTMIN + 1))
    queue.start()
    try:
        assert patch_again_and_again(pid, change, PATCHES) == PATCHES, "each of them has to stop the program"
    finally:
        queue.stop()
    assert_untouched(pid)
    *early, naps = parent.ask("report").split()
    assert early == [], "calls that came back: name, times, result, errno"
    count, short, failed = map(int, naps.split(":")[1:])
    assert count > 10
    assert (short, failed) == (0, 0)
    (sent,) = queue.sent.values()
    assert sent > 100
    while (arrived := parent.ask("queued").split())[0] != str(sent):
        assert int(arrived[0]) < sent, "signals were added"
    assert arrived == [str(sent), "0"], "none lost, none out of order"
    answered, wrong = map(int, parent.ask("answers").split())
    assert answered > PATCHES
    assert wrong == 0
    assert parent.ask("end") == "0 0 1 7", "what the parent saw: no stop, no continuation, one SIGCHLD, the exit status"


@pytest.mark.timeout(200)
def test_a_real_signal_still_interrupts(project, program):
    """Handlers without SA_RESTART: each signal is handled once, and ends the call with EINTR, patch or no patch."""
    parent, pid = program
    change = project.object("unit.c", ("n + 1", "n + 100"))
    signals = Signals(pid, range(signal.SIGRTMIN + 1, signal.SIGRTMIN + 6), lambda: wait_until_all_sleep(parent, pid))
    signals.start()
    try:
        while min(signals.sent.values()) < 200:
            patch_again_and_again(pid, change, 10)
    finally:
        signals.stop()
    wait_until_all_sleep(parent, pid)
    assert real(parent, HANDLED) == real(parent, INTERRUPTIONS) == list(signals.sent.values())
    *early, _ = parent.ask("report").split()
    assert early == []


@pytest.fixture(scope="module")
def timers(tmp_path_factory: pytest.TempPathFactory) -> Project:
    main = (Path(__file__).parent / "programs" / "timers.c").read_text()
    return Project(tmp_path_factory.mktemp("timers") / "p", {"main.c": main, "unit.c": ANSWER}, link_flags=["-lrt"])


def test_timers_and_errno(timers):
    """Every expiration is seen, once, be it as a signal, by a read, or as one alarm."""
    change = timers.object("unit.c", ("n + 1", "n + 100"))
    with timers.running() as program:
        patch_again_and_again(program.pid, change, 50)
        while True:
            due, signalled, read, most, alarms = map(int, program.ask("report").split())
            assert due <= signalled <= most
            assert due <= read <= most
            assert alarms <= 1
            if alarms:
                break
        assert due > 100
        assert program.ask("errno") == "0"
        assert_untouched(program.pid)


def seen_from_outside(pid: int) -> dict[str, object]:
    """What others can see of a process and what it may not lose: its memory but for ours, descriptors, signals ..."""
    lines = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    ends = {line[0].split("-")[1] for line in lines if "memfd:patcher" in " ".join(line)}
    stubs = [line for line in lines if line[0].split("-")[0] in ends and line[1] == "r-xp"]  # a page behind the arena
    maps = [line for line in lines if line not in stubs and "memfd:patcher" not in " ".join(line)]
    limits = [Path(f"/proc/{pid}/{name}").read_text() for name in ("limits", "coredump_filter", "oom_score_adj")]
    fields = (
        "SigB",
        "SigP",
        "SigI",
        "SigC",
        "Shd",
        "Cap",
        "NoNewPrivs",
        "Seccomp",
        "Uid",
        "Threads",
        "TracerPid",
        "Umask",
        "Tgid",
        "THP_",
    )
    return {
        "maps": maps,
        "descriptors": {n: os.readlink(f"/proc/{pid}/fd/{n}") for n in os.listdir(f"/proc/{pid}/fd")},
        "others": limits,
        "threads": {
            tid: [x for x in Path(f"/proc/{pid}/task/{tid}/status").read_text().splitlines() if x.startswith(fields)]
            for tid in os.listdir(f"/proc/{pid}/task")
        },
    }


def is_part(line: list[str], other: list[str]) -> bool:
    (start, end), (low, high) = ([int(word, 16) for word in each[0].split("-")] for each in (line, other))
    return low <= start < end <= high and line[1] == other[1] and line[5:] == other[5:]


def test_protections_maps_and_descriptors(tmp_path):
    """Apart from the arena all is as before, after patches that map, inject and call functions as well."""
    main = (Path(__file__).parent / "programs" / "meanwhile.c").read_text()
    project = Project(tmp_path / "p", {"main.c": main, "unit.c": ANSWER})
    plain = project.object("unit.c", ("n + 1", "n + 100"))
    calling = project.object(
        "unit.c",
        ("int answer(int n)", "extern int brought(int);\n__attribute__((noipa)) int brought(int n) { return n + 99; }\n"
         "static __thread int mine = 3;\nint answer(int n)"),
        ("return n + 1", "mine++;\n    return brought(n) + (mine > 1)"),
    )  # fmt: skip
    with project.running("threads", "blocked") as program:
        pid = program.pid
        while program.ask("wrong").split()[1] == "0":  # its thread is still being made
            pass
        before = seen_from_outside(pid)
        with patcher.attach(pid) as session:
            session.apply(plain)
            assert seen_from_outside(pid) == before
            for _ in range(5):
                session.revert(0)
                assert seen_from_outside(pid) == before
                session.apply(plain)
            assert seen_from_outside(pid) == before
            session.apply(calling)
        after = seen_from_outside(pid)
        assert {k: after[k] for k in ("descriptors", "others", "threads")} == {
            k: before[k] for k in ("descriptors", "others", "threads")
        }
        # The loader has mapped a module for the thread-local, and its bookkeeping may have made other memory longer.
        assert [m for m in before["maps"] if not any(is_part(m, other) for other in after["maps"])] == []
        assert program.ask(5) == "105"
