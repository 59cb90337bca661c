"""What a thread could notice of a stop or a borrowed call, looked at from inside; tests beside this one have the rest:

blocked calls, time-outs and signals with values: test_stop, test_borrow and ../test_invisible.py (which also has the
parent's SIGCHLD, timers, protections, descriptors); vector registers to 256 bits, x87 stack, red zone: test_borrow
(programs/vectors.c); errno: test_call.
"""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from patcher.target import FunctionCall, SystemCall
from patcher.target.borrow import Borrowing

GETPID, MMAP = 39, 9
LIBRARY = tuple(map(int, platform.libc_ver()[1].split(".")[:2])) if platform.libc_ver()[0] == "glibc" else (0, 0)
SEQUENCES = pytest.mark.skipif(LIBRARY < (2, 35), reason="this C library registers no restartable sequences")


def borrow_each(target, program, calls, rounds):
    """Borrow each thread in turn, all of them being stopped in between."""
    code = target.inject([SystemCall(MMAP, (0, 8192, 5, 0x22, -1, 0))])[0]
    for _ in range(rounds):
        for tid in target.threads():
            only = lambda thread, wanted=tid: thread.tid == wanted  # noqa: E731
            assert target.inject([SystemCall(GETPID)], accept=only, timeout=20) == (program.pid,)
            assert target.inject([SystemCall(GETPID), *calls], code=code, accept=only, timeout=20)[0] == program.pid
            with target.stopped() as stopped:
                for _ in range(5):
                    stopped.step(tid)


@SEQUENCES
def test_restartable_sequences(start, attach):
    program = start("sequences")
    if program.greeting == "none":
        pytest.skip("the kernel has no restartable sequences")
    target = attach(program.pid)
    before = [int(n) for n in program.ask("report").split()]
    borrow_each(target, program, (), 3)
    made, counted, anew = map(int, program.ask("report").split())
    assert made > before[0]
    assert anew > before[2]
    assert counted >= made, "counts were lost: a sequence went on where it had to begin anew"
    assert program.finish() == 0


@SEQUENCES
def test_without_looking_for_them_counts_are_lost(start, attach, monkeypatch):
    monkeypatch.setattr(Borrowing, "_in_restartable_sequence", lambda *_: False)
    program = start("sequences")
    if program.greeting == "none":
        pytest.skip("the kernel has no restartable sequences")
    target = attach(program.pid)
    for _ in range(50):
        borrow_each(target, program, (), 2)
        made, counted, _ = map(int, program.ask("report").split())
        if counted < made - 4:
            return
    pytest.fail("nothing was lost: the test above shows nothing")


def has(*features: str) -> bool:
    return set(features) <= set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())


@pytest.mark.skipif(not has("avx512f", "avx512bw"), reason="this processor has no AVX-512")
def test_all_vector_and_mask_registers_and_floating_point_modes(start, attach):
    program = start("wide")
    target = attach(program.pid)
    (trample,) = program.addresses
    code = target.inject([SystemCall(MMAP, (0, 8192, 5, 0x22, -1, 0))])[0]
    for turn in range(60):
        if turn % 3 == 0:
            target.inject([SystemCall(GETPID)])
        elif turn % 3 == 1:
            assert target.inject([FunctionCall(trample)], code=code) == (0,), "called with the modes of the ABI"
        else:
            with target.stopped() as stopped:
                stopped.step(program.pid)
    rounds, faults = map(int, program.ask("report").split())
    assert rounds > 0
    assert faults == 0
