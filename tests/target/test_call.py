"""Functions called on a borrowed thread: arguments, the stack they run on, errno, and what happens when they fail."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import re
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from project import statuses

from patcher.errors import PatcherError, TargetBusy, TargetGone
from patcher.target import FunctionCall, Result, SystemCall, Target, tracing

MMAP = 9
STACK_SIZE = 256 << 10
ADD_ONE = b"\x48\x8d\x47\x01\xc3"  # lea 1(%rdi), %rax; ret


class Callees(NamedTuple):
    """What programs/callees.c says at its start."""

    errno_location: int
    sum: int
    length: int
    deep: int
    where: int
    wait_for: int
    give_up: int
    fault: int
    count_calls: int
    pipe_out: int
    pipe_in: int
    code: int
    stack: int
    leave: int
    hold: int
    trap: int
    count_spoiled: int


class Ground:
    """A target running callees.c, with memory of ours in it for calls."""

    def __init__(self, program, target):
        self.program = program
        self.target = target
        self.callees = Callees(*program.addresses)
        self.code = self.callees.code
        self.stack = (self.callees.stack, self.callees.stack + STACK_SIZE)

    def call(self, *calls, stack=True, **options):
        return self.target.call(
            calls,
            code=self.code,
            objection=lambda thread: "",
            stack=self.stack if stack else None,
            errno_location=self.callees.errno_location,
            **options,
        )

    def check(self):
        """The program never saw another errno than its own, and nobody traces it any more."""
        faults, handled, _ = map(int, self.program.ask("report").split())
        assert faults == 0
        assert statuses(self.program.pid, "TracerPid") == {"0"}
        assert statuses(self.program.pid, "SigBlk") == {"0" * 16}
        return handled


def mapped(target):
    """Map code and stack in a target, by two system calls."""
    (code,) = target.inject([SystemCall(MMAP, (0, 4096, 5, 0x22, -1, 0))])
    (low,) = target.inject([SystemCall(MMAP, (0, STACK_SIZE, 3, 0x22, -1, 0))])
    return code, (low, low + STACK_SIZE)


@pytest.fixture(params=["main stack", "small stack"])
def ground(request, start, attach):
    program = start("callees", *(["small"] if request.param == "small stack" else []))
    return Ground(program, attach(program.pid))


def test_functions_run_in_order_and_hand_on_results(ground):
    c = ground.callees
    for _ in range(30):
        assert ground.call(
            FunctionCall(c.length, (b"four\0",)),
            FunctionCall(c.sum, (1, Result(0), 3, 4, 5, -6)),
            FunctionCall(c.length, (b"sixsix\0",)),
        ) == (4, 1 + 8 + 9 + 16 + 25 - 36, 6)
    assert ground.call(FunctionCall(c.count_calls)) == (30,)
    ground.check()
    assert ground.program.finish() == 0


def test_the_stack_is_the_given_one_or_the_threads_own(start, attach):
    program = start("callees")
    ground = Ground(program, attach(program.pid))
    low, high = ground.stack
    (inside,) = ground.call(FunctionCall(ground.callees.where))
    assert low < inside < high
    (outside,) = ground.call(FunctionCall(ground.callees.where), stack=False)
    own = next(m for m in ground.target.mappings() if m.path == "[stack]")
    assert outside in own
    assert ground.call(FunctionCall(ground.callees.deep, (STACK_SIZE // 2,))) == (STACK_SIZE // 2,)
    with pytest.raises(ValueError, match="too small"):
        ground.target.call(
            [FunctionCall(ground.callees.where)],
            code=ground.code,
            objection=lambda thread: "",
            stack=(high - 8192, high),
        )
    ground.check()


def test_a_small_stack_is_no_hindrance_with_one_of_ours(start, attach):
    program = start("callees", "small")
    ground = Ground(program, attach(program.pid))
    with pytest.raises(TargetBusy, match="stack"):
        ground.call(FunctionCall(ground.callees.where), stack=False, wait=0.1)
    assert ground.call(FunctionCall(ground.callees.deep, (64 << 10,))) == (64 << 10,)
    ground.check()


def test_a_function_that_faults_or_aborts_leaves_the_thread_where_it_was(ground):
    for function, number in ((ground.callees.fault, 11), (ground.callees.give_up, 6)):
        with pytest.raises(PatcherError, match=f"signal {number}") as caught:
            ground.call(FunctionCall(function))
        assert caught.value.code == "call-crashed"
        ground.check()
    assert ground.call(FunctionCall(ground.callees.length, (b"on\0",))) == (2,)


def test_a_function_that_hangs_is_abandoned(ground):
    c = ground.callees
    with pytest.raises(TargetBusy, match=r"did not come back within 0\.1 s") as caught:
        ground.call(FunctionCall(c.wait_for, (c.pipe_out,)), timeout=0.1)
    assert caught.value.code == "call-timeout"
    ground.check()
    assert ground.call(FunctionCall(c.sum, (1, 0, 0, 0, 0, 0))) == (1,)


def test_a_thread_whose_call_is_abandoned_goes_on_sleeping(start, attach):
    program = start("blockers")
    target = attach(program.pid)
    code, stack = mapped(target)
    target.memory.write(code + 2048, b"\xeb\xfe")  # jmp to itself
    for tid in target.threads():
        with pytest.raises(TargetBusy, match="did not come back"):
            target.call(
                [FunctionCall(code + 2048)],
                code=code,
                objection=lambda thread, wanted=tid: "" if thread.tid == wanted else "is another",
                stack=stack,
                timeout=0.01,
            )
    assert program.ask("report") == ""
    assert statuses(program.pid, "TracerPid") == {"0"}


def test_signals_wait_for_the_end_of_the_call(ground):
    c = ground.callees
    for _ in range(3):
        os.kill(ground.program.pid, signal.SIGUSR1)
        assert ground.call(FunctionCall(c.sum, (1, 0, 0, 0, 0, 0))) == (1,)
    os.kill(ground.program.pid, signal.SIGUSR1)
    with pytest.raises(TargetBusy, match="did not come back"):
        ground.call(FunctionCall(c.wait_for, (c.pipe_out,)), timeout=0.1)
    assert 1 <= ground.check() <= 4
    assert ground.program.ask("report")


def test_a_thread_at_no_safe_point_is_not_borrowed_and_the_reason_is_told(ground):
    with pytest.raises(TargetBusy, match="is in its kitchen"):
        ground.target.call(
            [FunctionCall(ground.callees.where)],
            code=ground.code,
            objection=lambda thread: "is in its kitchen",
            wait=0.05,
        )
    ground.check()


@pytest.mark.parametrize("stack", [True, False])
def test_registers_vectors_and_red_zone_are_kept(start, attach, stack):
    program = start("vectors")
    target = attach(program.pid)
    trample = program.addresses[1]
    code, memory = mapped(target)
    for _ in range(60):
        (length,) = target.call(
            [FunctionCall(trample, (b"text\0",))],
            code=code,
            objection=lambda thread: "",
            stack=memory if stack else None,
        )
        assert length == 4
    rounds, faults = map(int, program.ask("report").split())
    assert rounds > 0
    assert faults == 0


def test_blocked_calls_of_the_borrowed_thread_go_on(start, attach):
    program = start("blockers")
    target = attach(program.pid)
    code, stack = mapped(target)
    target.memory.write(code + 2048, ADD_ONE)
    for tid in target.threads():
        for _ in range(3):
            assert target.call(
                [FunctionCall(code + 2048, (41,))],
                code=code,
                objection=lambda thread, wanted=tid: "" if thread.tid == wanted else "is another",
                stack=stack,
            ) == (42,)
    assert program.ask("report") == ""
    _, short, long = map(int, program.ask("naps").split())
    assert (short, long) == (0, 0)


def test_a_stopped_job_stays_stopped(start, attach):
    program = start("callees")
    ground = Ground(program, attach(program.pid))
    os.kill(program.pid, signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(program.pid, os.WUNTRACED)[1])
    for _ in range(5):
        assert ground.call(FunctionCall(ground.callees.length, (b"on\0",))) == (2,)
    with pytest.raises(TargetBusy, match="is asleep"):
        ground.target.call(
            [FunctionCall(ground.callees.where)], code=ground.code, objection=lambda thread: "is asleep", wait=0.1
        )
    while statuses(program.pid, "State") != {"T"}:
        pass
    assert os.waitpid(program.pid, os.WUNTRACED | os.WNOHANG) == (0, 0)
    os.kill(program.pid, signal.SIGCONT)
    ground.check()


def test_a_program_that_ends_in_the_call_is_gone(start, attach):
    program = start("callees")
    ground = Ground(program, attach(program.pid))
    with pytest.raises(TargetGone):
        ground.call(FunctionCall(ground.callees.leave, (6,)))
    assert os.WEXITSTATUS(ground.target.exit_status) == 6


def call_for_ever(pid, code, stack, callees, ready):
    with Target.attach(pid) as target:
        while True:
            result = target.call(
                [FunctionCall(callees.length, (b"abc\0",)), FunctionCall(callees.sum, (Result(0), 0, 0, 0, 0, 0))],
                code=code,
                objection=lambda thread: "",
                stack=stack,
                errno_location=callees.errno_location,
            )
            assert result == (3, 3)
            os.write(ready, b"r")


def killed_controller(work, instant):
    """Run `work(ready descriptor)` in a child; kill it when `instant()` returns, which its first byte starts."""
    reading, writing = os.pipe()
    controller = os.fork()
    if controller == 0:
        try:
            work(writing)
        finally:
            os._exit(1)
    os.close(writing)
    started = os.read(reading, 1)
    instant()
    os.kill(controller, 9)
    os.waitpid(controller, 0)
    os.close(reading)
    assert started == b"r", "the controller failed by itself"


def test_a_controller_killed_at_any_instant_leaves_a_sound_thread(ground):
    random.seed(4)
    for _ in range(40):
        killed_controller(
            lambda ready: call_for_ever(ground.program.pid, ground.code, ground.stack, ground.callees, ready),
            lambda: time.sleep(random.random() * 0.004),
        )
        ground.check()
    assert ground.call(FunctionCall(ground.callees.sum, (1, 0, 0, 0, 0, 0))) == (1,)


def dies_after(requests, work):
    """Do `work` in a child that is killed right after so many ptrace requests; return whether it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            left, ptrace = [requests], tracing.ptrace

            def ptrace_and_die(*arguments):
                result = ptrace(*arguments)
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            tracing.ptrace = ptrace_and_die
            work()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code == 0


def test_a_controller_killed_after_any_ptrace_request_leaves_a_sound_thread(ground):
    c = ground.callees

    def call():
        with Target.attach(ground.program.pid) as target:
            target.call(
                [FunctionCall(c.length, (b"abc\0",)), FunctionCall(c.sum, (Result(0), 0, 0, 0, 0, 0))],
                code=ground.code,
                objection=lambda thread: "",
                stack=ground.stack,
                errno_location=c.errno_location,
            )

    requests = 1
    while not dies_after(requests, call):
        ground.check()
        requests += 1
    assert requests > 20
    (calls,) = ground.call(FunctionCall(c.count_calls))
    assert 3 < calls < requests


def test_a_thread_asleep_goes_on_sleeping_after_any_ptrace_request_of_a_killed_controller(start, attach):
    program = start("blockers")
    target = attach(program.pid)
    code, stack = mapped(target)
    target.memory.write(code + 2048, ADD_ONE)

    def call(wanted):
        with Target.attach(program.pid) as own:
            own.call(
                [FunctionCall(code + 2048, (41,))],
                code=code,
                objection=lambda thread: "" if thread.tid == wanted else "is another",
                stack=stack,
            )

    for tid in target.threads():
        requests = 1
        while not dies_after(requests, lambda wanted=tid: call(wanted)):
            requests += 5
    early = set(re.findall(r"(\w+)\(", program.ask("report")))
    # These report EINTR after any stop: killed between the stop and its concealment, nobody conceals it.
    assert early <= {"epoll_wait", "accept", "sigtimedwait", "recv", "semop"}
    assert statuses(program.pid, "TracerPid") == {"0"}


def test_a_function_is_finished_without_its_controller_and_the_next_one_waits_for_it(ground):
    c = ground.callees

    def call(ready):
        with Target.attach(ground.program.pid) as target:
            os.write(ready, b"r")
            target.call(
                [FunctionCall(c.wait_for, (c.pipe_out,)), FunctionCall(c.sum, (1, 0, 0, 0, 0, 0))],
                code=ground.code,
                objection=lambda thread: "",
                stack=ground.stack,
                errno_location=c.errno_location,
            )

    def until_it_waits():
        while f"0 {c.pipe_out:#x} " not in Path(f"/proc/{ground.program.pid}/syscall").read_text():
            pass

    killed_controller(call, until_it_waits)
    with pytest.raises(TargetBusy, match="earlier"):
        ground.call(FunctionCall(c.count_calls), wait=0.05)
    with open(f"/proc/{ground.program.pid}/fd/{c.pipe_in}", "wb", buffering=0) as pipe:
        pipe.write(b"x")
    assert ground.call(FunctionCall(c.count_calls)) == (1,)
    ground.check()


def test_a_function_that_is_abandoned_computes_with_its_own_registers_until_it_ends(ground):
    """A controller that dies while it takes the thread out of the function leaves it in it, or out of it."""
    c = ground.callees

    def abandon():
        with Target.attach(ground.program.pid) as target, pytest.raises(TargetBusy, match="did not come back"):
            target.call(
                [FunctionCall(c.hold, (1_200_000_000,))],
                code=ground.code,
                objection=lambda thread: "",
                stack=ground.stack,
                timeout=0.02,
            )

    requests = 15  # the thread is in the function by then
    while not dies_after(requests, abandon):
        requests += 1
        assert ground.call(FunctionCall(c.count_spoiled)) == (0,)  # when it is through
    ground.check()
    assert requests > 17


@contextmanager
def refusing_to_go_on():
    """Let no thread be traced on from the moment on in which it was sent away."""
    ptrace, syscall = tracing.ptrace, 24

    def refuse(request, *arguments):
        if request != syscall:
            return ptrace(request, *arguments)
        ctypes.set_errno(errno.EPERM)
        return -1

    tracing.ptrace = refuse
    try:
        yield
    finally:
        tracing.ptrace = ptrace


def await_reading(ground, other_than=""):
    """Wait until it reads on another stack than before; return where its stack pointer is."""
    while True:
        words = Path(f"/proc/{ground.program.pid}/syscall").read_text().split()
        if words[:2] == ["0", f"{ground.callees.pipe_out:#x}"] and words[-2] != other_than:
            return words[-2]


def go_on(ground):
    with open(f"/proc/{ground.program.pid}/fd/{ground.callees.pipe_in}", "wb", buffering=0) as pipe:
        pipe.write(b"x")


def test_a_thread_left_alone_is_waited_for_wherever_it_is(start, attach):
    """It is in the function, and then, on another stack, in a handler that goes back to it."""
    program = start("callees")
    ground = Ground(program, attach(program.pid))
    c, target = ground.callees, ground.target
    with refusing_to_go_on(), pytest.raises(PatcherError, match="refused"):
        ground.call(FunctionCall(c.trap, (c.pipe_out,)))
    place = ""
    for _ in ("in the function", "in the handler"):
        place = await_reading(ground, other_than=place)
        assert target.left_alone(ground.code)
        assert not target.has_left(ground.code, stack=ground.stack)
        go_on(ground)
    while target.left_alone(ground.code):
        pass
    assert target.has_left(ground.code, stack=ground.stack)
    assert ground.call(FunctionCall(c.count_calls)) == (0,)
    ground.check()


def test_another_controller_may_have_left_a_thread_in_memory_that_we_know(start, attach):
    program = start("callees", "small", "two")
    ground = Ground(program, attach(program.pid))
    c = ground.callees
    assert ground.call(FunctionCall(c.count_calls)) == (0,)
    with Target.attach(ground.program.pid) as other:
        own, ground.target = ground.target, other
        with refusing_to_go_on(), pytest.raises(PatcherError, match="refused"):
            ground.call(FunctionCall(c.wait_for, (c.pipe_out,)))  # on the first of two threads
        ground.target = own
    await_reading(ground)
    own.expect_others()
    with pytest.raises(TargetBusy, match="earlier"):
        ground.call(FunctionCall(c.count_calls), wait=0.05)
    go_on(ground)
    assert ground.call(FunctionCall(c.count_calls)) == (0,)
    ground.check()
