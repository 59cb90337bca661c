"""Borrowed calls: what they answer, and that the borrowed thread is as it was."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import signal
import threading
import time

import pytest
from project import statuses

from patcher.errors import PatcherError, TargetBusy, TargetGone
from patcher.target import FunctionCall, Result, SystemCall, Target, wait_exit

GETPID, MMAP, NANOSLEEP, CLOSE, OPEN = 39, 9, 35, 3, 2
PAUSE_ARGS = ((600).to_bytes(8, "little") + bytes(8), 0)


LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.sigqueue.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p)


def send_value(pid, value):
    LIBC.sigqueue(pid, signal.SIGRTMIN, value)


def map_code(target):
    (address,) = target.inject([SystemCall(MMAP, (0, 8192, 5, 0x22, -1, 0))])
    assert any(address in mapping and mapping.permissions == "r-xp" for mapping in target.mappings())
    return address


@pytest.mark.parametrize(("name", "flags"), [("signals", ()), ("signals", ("-static",)), ("vectors", ()), ("bare", ())])
def test_a_system_call_without_memory_of_ours(start, attach, name, flags):
    program = start(name, flags=flags)
    target = attach(program.pid)
    for _ in range(20):
        assert target.inject([SystemCall(GETPID)]) == (program.pid,)
    assert target.inject([SystemCall(CLOSE, (999,))]) == (-errno.EBADF,)
    assert target.inject([SystemCall(OPEN, (b"/nonexistent\0", 0, 0))]) == (-errno.ENOENT,)
    map_code(target)
    assert program.ask("report")
    assert statuses(program.pid, "TracerPid") == {"0"}
    assert program.finish() == 0


def test_text_written_for_a_call_is_put_back(start, attach):
    program = start("bare")
    target = attach(program.pid)
    text = next(m for m in target.mappings() if m.executable and m.inode)
    before = target.memory.read(text.start, text.size)
    assert target.inject([SystemCall(GETPID)]) == (program.pid,)
    assert target.memory.read(text.start, text.size) == before


def test_steps_hand_on_results_and_end_at_the_first_failure(start, attach):
    program = start("vectors")
    target = attach(program.pid)
    answer, trample, _, _, alignment = program.addresses
    code = map_code(target)
    assert target.inject(
        [
            SystemCall(GETPID),
            FunctionCall(answer, (1, 2, 3, Result(0), 5, 6)),
            FunctionCall(trample, (b"hello\0",)),
            FunctionCall(alignment),
        ],
        code=code,
    ) == (program.pid, 75 + 4 * program.pid, 5, 0)
    failed = target.inject([SystemCall(GETPID), SystemCall(CLOSE, (999,)), SystemCall(GETPID)], code=code)
    assert failed == (program.pid, -errno.EBADF)
    assert target.inject([], code=code) == ()


def test_registers_vectors_and_red_zone_are_kept(start, attach):
    program = start("vectors")
    target = attach(program.pid)
    trample = program.addresses[1]
    code = map_code(target)
    for turn in range(60):
        if turn % 2:
            target.inject([SystemCall(GETPID)])
        else:
            target.inject([FunctionCall(trample, (b"text\0",))], code=code)
    rounds, faults = map(int, program.ask("report").split())
    assert rounds > 0
    assert faults == 0


def test_blocked_calls_of_the_borrowed_thread_go_on(start, attach):
    program = start("blockers")
    target = attach(program.pid)
    code = map_code(target)
    masks = statuses(program.pid, "SigBlk")
    for tid in target.threads():
        only = lambda thread, wanted=tid: thread.tid == wanted  # noqa: E731
        for _ in range(3):
            assert target.inject([SystemCall(GETPID)], accept=only) == (program.pid,)
            assert target.inject([SystemCall(GETPID)] * 2, code=code, accept=only) == (program.pid,) * 2
    assert program.ask("report") == ""
    _, short, long = map(int, program.ask("naps").split())
    assert (short, long) == (0, 0)
    assert statuses(program.pid, "SigBlk") == masks


def test_a_function_that_hangs_or_faults_leaves_the_thread_where_it_was(start, attach):
    program = start("vectors")
    target = attach(program.pid)
    _, _, crash, hang, _ = program.addresses
    code = map_code(target)
    with pytest.raises(TargetBusy, match="did not come back"):
        target.inject([FunctionCall(hang)], code=code, timeout=0.1)
    with pytest.raises(PatcherError, match="signal 11") as caught:
        target.inject([FunctionCall(crash)], code=code)
    assert caught.value.code == "call-crashed"
    with pytest.raises(TargetBusy, match="did not come back"):
        target.inject([SystemCall(NANOSLEEP, PAUSE_ARGS)], timeout=0.1)
    assert program.ask("report").split()[1] == "0"
    assert statuses(program.pid, "SigBlk") == {"0" * 16}


@pytest.mark.parametrize("threads", [(), ("spinning",)])
def test_signals_during_calls_arrive_once_each(start, attach, threads):
    program = start("signals", *threads)
    target = attach(program.pid)
    code = map_code(target)
    sent = 300
    sender = threading.Thread(target=lambda: [send_value(program.pid, value) for value in range(sent)])
    sender.start()
    calls = 0
    while sender.is_alive() or calls < 60:
        target.inject([SystemCall(GETPID)])
        target.inject([SystemCall(GETPID)] * 3, code=code)
        calls += 2
    sender.join()
    assert program.ask("report") == f"{sent} 0 {sent}"
    assert statuses(program.pid, "SigBlk") == {"0" * 16}


def test_a_stopped_job_can_be_borrowed_from_and_stays_stopped(start, attach):
    program = start("signals")
    target = attach(program.pid)
    os.kill(program.pid, signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(program.pid, os.WUNTRACED)[1])
    for _ in range(10):
        assert target.inject([SystemCall(GETPID)]) == (program.pid,)
    while statuses(program.pid, "State") != {"T"}:
        time.sleep(0.001)
    assert os.waitpid(program.pid, os.WUNTRACED | os.WNOHANG) == (0, 0)
    os.kill(program.pid, signal.SIGCONT)
    assert program.ask("report") == "0 0 0"


def test_a_program_that_ends_during_a_call_is_gone(start, attach):
    program = start("signals")
    target = attach(program.pid)
    with pytest.raises(TargetGone):
        target.inject([SystemCall(231, (6,))])
    assert os.WEXITSTATUS(target.exit_status) == 6
    assert wait_exit(program.pid) == target.exit_status


def test_a_thread_that_is_not_accepted_is_not_borrowed(start, attach):
    program = start("signals")
    target = attach(program.pid)
    asked = []
    with pytest.raises(TargetBusy, match="not at a safe point"):
        target.inject([SystemCall(GETPID)], timeout=0.05, accept=lambda thread: asked.append(thread) or False)
    assert {thread.tid for thread in asked} == {program.pid}
    assert program.ask("report") == "0 0 0"


def test_steps_that_cannot_be_done_are_refused(start, attach):
    program = start("signals")
    target = attach(program.pid)
    with pytest.raises(ValueError, match="only one system call"):
        target.inject([SystemCall(GETPID), SystemCall(GETPID)])
    with pytest.raises(ValueError, match="not done yet"):
        target.inject([FunctionCall(Result(0))], code=4096)
    with pytest.raises(ValueError, match="six"):
        target.inject([SystemCall(GETPID, (0,) * 7)])


def inject_for_ever(pid, code, trample, ready):
    with Target.attach(pid) as target:
        turn = 0
        while True:
            if code is None:
                assert target.inject([SystemCall(GETPID)]) == (pid,)
            else:
                calls = [SystemCall(GETPID)] * (1 + turn % 3) + [FunctionCall(trample, (b"abc\0",))]
                assert target.inject(calls, code=code)[-1] == 3
            if turn == 0:
                os.write(ready, b"r")
            turn += 1


def controller_killed_at_some_instant(pid, code, trample, after):
    reading, writing = os.pipe()
    controller = os.fork()
    if controller == 0:
        try:
            inject_for_ever(pid, code, trample, writing)
        finally:
            os._exit(1)
    os.close(writing)
    started = os.read(reading, 1)
    os.close(reading)
    time.sleep(after)
    os.kill(controller, 9)
    os.waitpid(controller, 0)
    assert started == b"r", "the controller failed by itself"


@pytest.mark.parametrize(
    ("name", "with_code"), [("vectors", False), ("vectors", True), ("blockers", False), ("bare", False)]
)
def test_a_controller_killed_at_any_instant_leaves_a_sound_target(start, attach, name, with_code):
    program = start(name)
    target = attach(program.pid)
    code = map_code(target) if with_code else None
    trample = program.addresses[1] if with_code else 0
    masks = statuses(program.pid, "SigBlk")
    random.seed(name)
    for _ in range(60 if name == "vectors" else 30):
        controller_killed_at_some_instant(program.pid, code, trample, random.random() * 0.006)
    report = program.ask("report")
    if name == "vectors":
        assert report.split()[1] == "0"
    else:
        assert report == ("report" if name == "bare" else "")
    assert target.inject([SystemCall(GETPID)]) == (program.pid,)
    assert statuses(program.pid, "SigBlk") == masks
    assert statuses(program.pid, "TracerPid") == {"0"}
    assert program.finish() == 0
