"""Seccomp: filters as the kernel understands them, and threads that are not borrowed for what would kill them."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import signal
import struct
import time
from pathlib import Path

import pytest
from project import statuses

import patcher.target.confined as confined
import patcher.target.stop as stop
from patcher.errors import Forbidden, TargetGone
from patcher.target import FunctionCall, SystemCall, wait_exit
from patcher.target.seccomp import Action, harshest

LIBC = ctypes.CDLL(None, use_errno=True)
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="the filters of another process are shown to root only")
GETPID, MMAP, SIGRETURN, RESTART, UNUSED = 39, 9, 15, 219, 500
KILL, KILL_THREAD, TRAP, ERRNO, NOTIFY, ALLOW = 0x80000000, 0, 0x30000, 0x50001, 0x7FC00000, 0x7FFF0000
LOAD, JEQ, JGT, JGE, JSET, RETURN = 0x20, 0x15, 0x25, 0x35, 0x45, 0x06


def program(*instructions: tuple[int, int, int, int]) -> bytes:
    return b"".join(struct.pack("<HBBI", *each) for each in instructions)


def kernel_allows(filters: list[bytes], number: int, arguments: tuple[int, ...]) -> bool:
    """Whether a system call that does not exist is answered by the kernel itself (ENOSYS), not by a filter."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        LIBC.prctl(38, 1, 0, 0, 0)
        for each in filters:
            code = ctypes.create_string_buffer(each)
            described = ctypes.create_string_buffer(struct.pack("<H6xQ", len(each) // 8, ctypes.addressof(code)))
            if LIBC.prctl(22, 2, ctypes.byref(described), 0, 0):
                os._exit(1)
        LIBC.syscall(ctypes.c_long(number), *(ctypes.c_ulong(a) for a in arguments))
        os.write(writing, b"%d" % ctypes.get_errno())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as answer:
        found = answer.read()
    assert os.waitpid(child, 0)[1] == 0, "the kernel refused the filter"
    return {b"38": True, b"1": False}[found]


def random_filter(choose: random.Random) -> bytes:
    """Some arithmetic on some word of the call, in the accumulator, the index register and memory, and a comparison."""
    number = lambda: choose.choice([0, 1, 2, 3, 7, 31, 0x80, 0xFFFF, choose.getrandbits(32)])  # noqa: E731
    body = [(0x20, 0, 0, choose.choice(range(0, 64, 4)) & ~8)]
    for _ in range(choose.randrange(8)):
        body.append(
            choose.choice(
                [
                    (choose.choice([0x04, 0x14, 0x24, 0x44, 0x54]), 0, 0, number()),
                    (choose.choice([0x64, 0x74]), 0, 0, choose.randrange(32)),
                    (0x34, 0, 0, number() or 1),
                    (0x84, 0, 0, 0),
                    (0x07, 0, 0, 0),
                    (choose.choice([0x0C, 0x1C, 0x2C, 0x4C, 0x5C]), 0, 0, 0),
                    (0x01, 0, 0, number()),
                    (0x02, 0, 0, 3),
                    (0x20, 0, 0, 16 + 4 * choose.randrange(12)),
                    (0x80, 0, 0, 0),
                ]
            )
        )
    own = [(0x20, 0, 0, 0), (JEQ, 1, 0, UNUSED), (RETURN, 0, 0, ALLOW)]
    start = [*own, (0x00, 0, 0, number()), (0x02, 0, 0, 3), (0x07, 0, 0, 0)]
    back = [(0x61, 0, 0, 3)] if choose.random() < 0.3 else []
    jump = choose.choice([JEQ, JGT, JGE, JSET]) | (8 if back else 0)
    return program(*start, *body, *back, (jump, 0, 1, number()), (RETURN, 0, 0, ERRNO), (RETURN, 0, 0, ALLOW))


def test_filters_answer_as_in_the_kernel():
    choose = random.Random(5)
    answers = []
    for _ in range(150):
        filters = [random_filter(choose) for _ in range(choose.randrange(1, 3))]
        arguments = tuple(choose.choice([0, 1, 2, choose.getrandbits(64)]) for _ in range(6))
        allowed = kernel_allows(filters, UNUSED, arguments)
        assert harshest(filters, UNUSED, arguments).permits == allowed, (filters, arguments)
        assert not harshest(filters, UNUSED).permits or allowed, "what is not known may be what is not allowed"
        answers.append(allowed)
    assert 20 < sum(answers) < 130


def test_the_harshest_answer_of_all_that_are_possible():
    by_argument = program(
        *((LOAD, 0, 0, 32), (JEQ, 0, 1, 7), (RETURN, 0, 0, KILL)),
        *((LOAD, 0, 0, 36), (JEQ, 0, 1, 0), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, TRAP)),
    )  # fmt: skip
    assert harshest([by_argument], MMAP, (0, 0, 5)) is Action.ALLOW
    assert harshest([by_argument], MMAP, (0, 0, 7)) is Action.KILL_PROCESS
    assert harshest([by_argument], MMAP, (0, 0, 5 << 32)) is Action.TRAP
    assert harshest([by_argument], MMAP, (0, 0, None)) is Action.KILL_PROCESS
    errors = program((RETURN, 0, 0, ERRNO))
    assert harshest([errors, by_argument], MMAP, (0, 0, 5)) is Action.ERRNO
    assert harshest([errors, program((RETURN, 0, 0, KILL_THREAD))], MMAP) is Action.KILL_THREAD
    assert harshest([program((RETURN, 0, 0, 0x12340000))], MMAP) is Action.KILL_PROCESS
    assert harshest([], MMAP) is Action.ALLOW


def forbidding(**actions: int) -> list[str]:
    numbers = {"getpid": GETPID, "sigreturn": SIGRETURN, "restart": RESTART}
    return [f"{numbers[name]:x}:{action:x}" for name, action in actions.items()]


@ROOT
@pytest.mark.parametrize(
    ("action", "words"), [(KILL, "kill it"), (KILL_THREAD, "kill it"), (TRAP, "SIGSYS"), (NOTIFY, "supervisor")]
)
def test_a_call_that_would_kill_is_not_made(start, attach, action, words):
    program = start("confined", *forbidding(getpid=action))
    target = attach(program.pid)
    with pytest.raises(Forbidden, match=f"may .*{words}.* for system call {GETPID}") as caught:
        target.inject([SystemCall(GETPID)])
    assert caught.value.code == "seccomp"
    assert caught.value.hint
    assert target.inject([SystemCall(MMAP, (0, 4096, 5, 0x22, -1, 0))])[0] > 0, "another call is none of its business"
    assert program.ask("hello") == "hello"
    assert statuses(program.pid, "TracerPid") == {"0"}
    assert program.finish() == 3


@ROOT
def test_the_same_call_kills_indeed(start, attach, monkeypatch):
    monkeypatch.setattr(confined, "confinement", lambda *_, **__: "")
    monkeypatch.setattr("patcher.target.borrow.confinement", lambda *_, **__: "")
    program = start("confined", *forbidding(getpid=KILL))
    target = attach(program.pid)
    with pytest.raises(TargetGone):
        target.inject([SystemCall(GETPID)])
    assert os.WTERMSIG(wait_exit(program.pid, 10)) == signal.SIGSYS


@ROOT
def test_a_call_that_fails_is_made_and_the_thread_comes_back(start, attach):
    program = start("confined", *forbidding(getpid=ERRNO))
    assert attach(program.pid).inject([SystemCall(GETPID)]) == (-errno.EPERM,)
    assert program.ask("hello") == "hello"


@ROOT
def test_a_thread_that_could_not_come_back_is_not_sent_away(start, attach):
    for action in (KILL, ERRNO):
        program = start("confined", *forbidding(sigreturn=action))
        with pytest.raises(Forbidden, match="rt_sigreturn"):
            attach(program.pid).inject([SystemCall(GETPID)])
        assert program.ask("hello") == "hello"


@ROOT
def test_another_thread_is_borrowed_where_the_first_must_not(start, attach):
    program = start("confined", "thread", *forbidding(getpid=KILL))
    target = attach(program.pid)
    assert target.inject([SystemCall(GETPID)]) == (program.pid,)
    assert program.ask("hello") == "hello"


@ROOT
def test_what_is_planned_for_later_is_thought_of_before(start, attach):
    program = start("confined", *forbidding(getpid=KILL))
    target = attach(program.pid)
    # Far from where the dynamic linker had something mapped: words of that may still be on the stack.
    (page,) = target.inject([SystemCall(MMAP, (1 << 40, 4096, 5, 0x22, -1, 0))])
    with pytest.raises(Forbidden, match="seccomp"):
        target.inject([SystemCall(MMAP, (0, 4096, 5, 0x22, -1, 0))], planned=[SystemCall(GETPID)])
    with pytest.raises(Forbidden, match="seccomp"):
        target.call(
            [FunctionCall(page)], code=page, stack=(page, page), objection=lambda _: "", planned=[SystemCall(GETPID)]
        )
    assert program.ask("hello") == "hello"


def test_filters_that_cannot_be_read_are_taken_to_kill(start, attach, monkeypatch):
    monkeypatch.setattr("patcher.target.tracing.Tracee.seccomp_filters", lambda _: ())
    program = start("confined", *forbidding(getpid=ERRNO))
    target = attach(program.pid)
    with pytest.raises(Forbidden, match="filters that we may not read") as caught:
        target.inject([SystemCall(GETPID)])
    assert "--force" in caught.value.hint
    target.trust_filters()
    assert target.inject([SystemCall(GETPID)]) == (-errno.EPERM,)
    # With as many filters as we have, it is in our container.
    monkeypatch.setattr(confined, "_told", lambda path: (2, 1))
    assert attach(program.pid).inject([SystemCall(GETPID)]) == (-errno.EPERM,)
    assert program.ask("hello") == "hello"


def asleep(pid: int) -> None:
    while not Path(f"/proc/{pid}/syscall").read_text().startswith(("35 ", "230 ")):  # nanosleep, clock_nanosleep
        time.sleep(0.001)


@pytest.mark.parametrize("readable", [True, False])
def test_a_stop_does_not_make_a_thread_do_what_its_filter_kills_for(start, attach, monkeypatch, readable):
    """The kernel goes on with a sleep by restart_syscall, which filters know nothing of."""
    if readable and os.geteuid():
        pytest.skip("the filters of another process are shown to root only")
    if not readable:
        monkeypatch.setattr("patcher.target.tracing.Tracee.seccomp_filters", lambda _: ())
    program = start("confined", "nap", *forbidding(restart=KILL))
    asleep(program.pid)
    target = attach(program.pid)
    for _ in range(3):
        with target.stopped():
            pass
    assert program.line() == "0"
    assert program.ask("hello") == "hello"


def test_without_that_the_stop_kills(start, attach, monkeypatch):
    monkeypatch.setattr(stop, "may_resume_call", lambda _: True)
    program = start("confined", "nap", *forbidding(restart=KILL))
    asleep(program.pid)
    with attach(program.pid).stopped():
        pass
    assert program.process.wait(10) < 0
