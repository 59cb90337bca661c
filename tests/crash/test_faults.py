"""What a patcher asks of the kernel, or has the process ask, fails: the process is as it was, and it is said why."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from project import Running, assert_untouched, image_bytes

from crash.scene import Case, Ending, answer

EVERY = os.environ.get("PATCHER_KILLS") == "every"
PREAD, PWRITE, MMAP, FLOCK, PTRACE, OPENAT, GETDENTS = 17, 18, 9, 73, 101, 257, 217
MPROTECT, MUNMAP, MEMFD_CREATE, FTRUNCATE = 10, 11, 319, 77
READABLE, WRITABLE, EXECUTABLE = 1, 3, 5
# What fails, how, and how many calls are between two tries.
FAULTS = [
    ("first", PTRACE, errno.EPERM, 23),
    ("first", PWRITE, errno.EIO, 3),
    ("first", PWRITE, errno.ENOMEM, 7),
    ("first", OPENAT, errno.EMFILE, 19),
    ("first", PREAD, errno.EIO, 211),
    ("first", GETDENTS, errno.ENOMEM, 7),
    ("first", FLOCK, errno.ENOLCK, 1),
    ("first", MMAP, errno.ENOMEM, 5),
    ("later", PWRITE, errno.EFAULT, 1),
    ("later of many functions", PWRITE, errno.EIO, 5),
    ("undo", PTRACE, errno.EPERM, 5),
    ("undo", PWRITE, errno.EIO, 1),
    ("first with a constructor", PTRACE, errno.EPERM, 71),
    ("first with a slow constructor", PTRACE, errno.EPERM, 37),
]


def maps(pid: int) -> list[str]:
    """What is mapped, apart from what the program itself lets grow."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line for line in lines if not line.endswith(("[heap]", "[stack]"))]


def descriptors(pid: int) -> set[str]:
    return set(os.listdir(f"/proc/{pid}/fd"))


class Before:
    """A program as it was before something failed."""

    def __init__(self, program: Running) -> None:
        self.program = program
        self.answer = answer(program)
        self.state = self._state()

    def _state(self) -> tuple[object, ...]:
        return image_bytes(self.program.pid), maps(self.program.pid), descriptors(self.program.pid)

    def assert_same(self, where: str) -> None:
        assert answer(self.program) == self.answer, where
        assert self._state() == self.state, where


def try_it(case: Case, program: Running, ended: Ending, before: Before, where: str) -> None:
    """Either it was done all the same, or nothing was done and the error says why; then it can be done."""
    assert program.process.poll() is None, where
    assert_untouched(program.pid)
    assert ended.said is not None, where
    assert "traceback" not in ended.said, f"{where}: {ended.said['traceback']}"
    if ended.code:
        assert ended.code in (1, 3), f"{where}: {ended}"
        assert ended.said["message"], where
        if case.constructs:
            assert answer(program) == before.answer, where  # what a constructor did is done, and stays in its arena
            assert image_bytes(program.pid) == before.state[0], where
        else:
            before.assert_same(where)
    else:
        assert answer(program) != before.answer, where


@pytest.mark.timeout(3600 if EVERY else 120)
@pytest.mark.parametrize(("name", "call", "error", "stride"), FAULTS)
def test_any_call_of_ours_fails(name, call, error, stride, case, mortals):
    patched, moment, failed = case(name), 1, 0
    while True:
        with patched.running() as program:
            before = Before(program)
            ended = patched.harm(mortals, program, action=f"fail:{error}", moment=moment, calls=str(call))
            where = f"call {moment} ({ended.met}) failed with {errno.errorcode[error]}"
            try_it(patched, program, ended, before, where)
            again = patched.harm(mortals, program)
            assert again.code == 0, f"{where}, then {again}"
            failed += ended.code != 0
        if ended.met < 0:
            break
        moment += 1 if EVERY else stride
    assert moment > 1
    assert failed or call in (PWRITE, GETDENTS, MMAP), "nothing was refused: the test shows nothing"


@pytest.mark.parametrize(
    ("name", "forbidden", "code"),
    [
        ("first", (MMAP,), "no-arena"),
        ("first", (MMAP, READABLE), "no-arena"),
        ("first", (MMAP, WRITABLE), "no-arena"),
        ("first", (MMAP, EXECUTABLE), "no-arena"),
        ("first", (MEMFD_CREATE,), ""),
        ("first", (FTRUNCATE,), ""),
        ("first with a constructor", (MPROTECT, WRITABLE), "no-memory"),
        ("first with a constructor", (MPROTECT, EXECUTABLE), "no-memory"),
        ("first with a library", (MMAP, 0), "no-memory"),
    ],
)
def test_a_call_that_the_process_makes_for_us_fails(name, forbidden, code, case, mortals):
    patched = case(name)
    with patched.running(*map(str, forbidden)) as program:
        before = Before(program)
        ended = patched.harm(mortals, program)
        try_it(patched, program, ended, before, f"{forbidden}: {ended}")
        assert (ended.said or {}).get("code", "") == code
        if code:
            before.assert_same(str(ended))


@pytest.mark.parametrize("more", [0, 1 << 20, 63 << 20])
def test_the_process_may_have_no_more_memory(more, case, mortals):
    patched = case("first")
    with patched.running() as program:
        size = int(re.search(r"VmSize:\s*(\d+)", Path(f"/proc/{program.pid}/status").read_text())[1]) << 10
        before = Before(program)
        resource.prlimit(program.pid, resource.RLIMIT_AS, (size + more, resource.RLIM_INFINITY))
        ended = patched.harm(mortals, program)
        try_it(patched, program, ended, before, str(ended))
        assert "prlimit" in ended.said["hint"]
        resource.prlimit(program.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert patched.harm(mortals, program).code == 0


@pytest.mark.parametrize("name", ["first", "later", "undo"])
@pytest.mark.parametrize(("limit", "values"), [("RLIMIT_NOFILE", range(6, 16, 3)), ("RLIMIT_AS", range(0, 40, 13))])
def test_the_patcher_runs_out_of_something(name, limit, values, case, mortals):
    patched = case(name)
    refused = 0
    for value in values:
        with patched.running() as program:
            before = Before(program)
            given = value if limit == "RLIMIT_NOFILE" else -value - 1
            ended = patched.harm(mortals, program, limits={limit: given})
            try_it(patched, program, ended, before, f"{limit} {value}: {ended}")
            refused += ended.code != 0
            assert patched.harm(mortals, program).code == 0
    assert refused or name != "first"


def test_the_terminal_is_gone(case):
    """Nothing can be said any more; what was asked for is done."""
    patched = case("first")
    with patched.running() as program:
        command = [sys.executable, "-m", "patcher", "apply", "--force", str(program.pid), *map(str, patched.files)]
        master, slave = os.openpty()
        os.close(master)
        done = subprocess.run(command, stdin=slave, stdout=slave, stderr=slave, check=False)
        os.close(slave)
        assert answer(program) == ("2" if done.returncode == 0 else "1"), done
        assert_untouched(program.pid)
        assert done.returncode in (0, 1)
