"""Safe points: in which states a thread may be made to call a function, and in which it may not."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from living import await_sleep, compile_text, run, running

from patcher.image import Image
from patcher.safepoint import Function, Kind, SafePoints, kind_of, unsafe_extents
from patcher.target import StoppedThread, Target

PROGRAMS = Path(__file__).parent / "programs"

ASLEEP = (
    *(
        "read",
        "poll",
        "select",
        "epoll",
        "nanosleep",
        "sleep",
        "pause",
        "condition",
        "mutex",
        "semaphore",
        "join",
        "wait",
    ),
    *("fgets", "getline", "scanf", "qsort", "handler", "buffer", "stale buffer"),
)
HOLDING = {
    "iterate": "dl_iterate_phdr",
    "unknown visit": "dl_iterate_phdr",
    "puts": "",
    "exit": "exit",
    "fork": "fork",
}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("states")
    built: dict[tuple[str, ...], Path] = {}

    def compile_program(*flags: str) -> Path:
        if flags not in built:
            built[flags] = folder / f"states{len(built)}"
            run("gcc", *flags, "-w", "-o", built[flags], PROGRAMS / "states.c", "-pthread")
        return built[flags]

    return compile_program


@contextlib.contextmanager
def sampled(target: Target, *, tid: int = 0, waiting: bool = True) -> Iterator[StoppedThread]:
    """Stop a thread (the first by default) once it is asleep, or once it is not."""
    while True:
        with target.sampled(tid or target.pid) as thread:
            if thread.waiting == waiting:
                yield thread
                return


def objection(program: Path, state: str, *, second: bool = False, waiting: bool = True) -> str:
    """What is said against the thread that gets into a state: the first one, or a second."""
    with running(program, state, *(["thread"] if second else [])) as target:
        while second and len(target.threads()) < 2:
            pass
        image = Image(target)
        tid = next(tid for tid in target.threads() if tid != target.pid) if second else target.pid
        if waiting:
            await_sleep(target.pid, tid)
        else:
            await_work(target, tid)
        with sampled(target, tid=tid, waiting=waiting) as thread:
            return SafePoints(image).objection(thread)


def await_work(target: Target, tid: int) -> None:
    """Return once a thread has used the processor for a tenth of a second."""
    while True:
        fields = Path(f"/proc/{target.pid}/task/{tid}/stat").read_text().rpartition(")")[2].split()
        if int(fields[11]) > 10:  # utime, in hundredths
            return


@pytest.mark.parametrize("state", ASLEEP)
@pytest.mark.parametrize("flags", [("-O2",), ("-O0",), ("-O2", "-static")], ids=" ".join)
def test_a_thread_asleep_is_at_a_safe_point(build, state, flags):
    assert objection(build(*flags), state) == ""


@pytest.mark.parametrize("state", ["read", "condition", "fgets", "stale buffer"])
def test_so_is_another_thread(build, state):
    assert objection(build("-O2"), state, second=True) == ""


@pytest.mark.parametrize("state", HOLDING)
@pytest.mark.parametrize("flags", [("-O2",), ("-O0",), ("-O2", "-static")], ids=" ".join)
def test_a_thread_asleep_with_a_lock_is_not(build, state, flags):
    found = objection(build(*flags), state)
    assert found
    assert HOLDING[state] in found


@pytest.mark.parametrize("second", [False, True])
def test_a_thread_that_runs_is_at_a_safe_point_in_the_programs_own_code_only(build, second):
    program = build("-O2")
    assert objection(program, "loop", second=second, waiting=False) == ""
    assert objection(program, "strlen", second=second, waiting=False).startswith("runs ")
    assert objection(program, "unknown loop", second=second, waiting=False) == "runs code whose frames cannot be told"


def test_frames_that_cannot_be_told_leave_the_words_of_the_stack(build):
    assert objection(build("-O2"), "unknown", second=True) == ""
    assert objection(build("-O2"), "unknown visit", second=True).startswith("may be in ")


def test_a_static_program_without_names_is_at_no_safe_point(build, tmp_path):
    stripped = tmp_path / "stripped"
    run("strip", "-o", stripped, build("-O2", "-static"))
    assert objection(stripped, "read").startswith("is in ")


OWN_ALLOCATOR = """
#include <stddef.h>
#include <unistd.h>
static char memory[1 << 20];
static size_t used;
volatile int spinning;
void *malloc(size_t size) { while (spinning) ; void *found = memory + used; used += (size + 15) & -16; return found; }
void free(void *block) { (void)block; }
int main(int count, char **arguments)
{
    char byte;
    (void)arguments;
    if (write(1, "r", 1) != 1)
        return 1;
    spinning = count > 1;
    for (; spinning; )
        malloc(1);
    return read(0, &byte, 1);
}
"""


def test_a_program_with_an_allocator_of_its_own_must_be_asleep(tmp_path):
    unit = compile_text(OWN_ALLOCATOR, tmp_path / "unit.o", "-O1", "-fno-builtin")
    run("gcc", "-o", tmp_path / "program", unit)
    assert objection(tmp_path / "program", "", waiting=False).startswith("runs malloc")
    with subprocess.Popen([tmp_path / "program"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"r"
        with Target.attach(process.pid) as target, sampled(target) as thread:
            assert SafePoints(Image(target)).objection(thread) == ""
        process.kill()


CPP = """
#include <condition_variable>
#include <iostream>
#include <mutex>
#include <string>
#include <thread>
#include <unistd.h>
std::mutex mutex;
std::condition_variable condition;
int main(int count, char **)
{
    std::thread waiting([] { std::unique_lock<std::mutex> lock(mutex); condition.wait(lock, [] { return false; }); });
    if (write(1, "r", 1) != 1)
        return 1;
    std::string line;
    if (count > 1)
        std::getline(std::cin, line);
    waiting.join();
}
"""


@pytest.mark.parametrize("state", [(), ("getline",)])
def test_threads_of_a_c_plus_plus_program_asleep_are_at_safe_points(tmp_path, state):
    unit = compile_text(CPP, tmp_path / "unit.o", "-O2", compiler="g++", name="unit.cc")
    run("g++", "-o", tmp_path / "program", unit, "-pthread")
    with running(tmp_path / "program", *state) as target:
        while len(target.threads()) < 2:
            pass
        image = Image(target)
        for tid in target.threads():
            await_sleep(target.pid, tid)
            with sampled(target, tid=tid) as thread:
                assert SafePoints(image).objection(thread) == ""


def test_kinds_of_modules():
    kind = lambda name, executable=False, allocates=False: kind_of(  # noqa: E731
        name, executable=executable, allocates=allocates
    )
    assert {kind(n, allocates=True) for n in ("libc.so.6", "libc-2.31.so")} == {Kind.LIBRARY}
    assert kind("libpthread.so.0") is Kind.LIBRARY
    for name in ("ld-linux-x86-64.so.2", "libdl.so.2", "libgcc_s.so.1", "libjemalloc.so.2", "libtcmalloc_minimal.so.4"):
        assert kind(name) is Kind.FORBIDDEN
    assert kind("libmine.so", allocates=True) is Kind.FORBIDDEN
    assert kind("libcurl.so.4") is kind("libm.so.6") is kind("program", executable=True) is Kind.PROGRAM
    assert kind("libstdc++.so.6") is Kind.RUNTIME
    assert kind("program", executable=True, allocates=True) is Kind.MIXED


def test_unsafe_extents():
    functions = [
        Function(n, 16 * i, 16 * i + 12) for i, n in enumerate(("read", "malloc", "_IO_puts", "je_free", "dlopen"))
    ]
    functions.append(Function("__libc_malloc", 16, 30))
    assert unsafe_extents(Kind.PROGRAM, (0, 99), functions) == ()
    assert unsafe_extents(Kind.FORBIDDEN, (0, 99), functions) == ((0, 99),)
    assert unsafe_extents(Kind.LIBRARY, (0, 99), functions) == ((16, 30), (32, 44), (64, 76))
    assert unsafe_extents(Kind.MIXED, (0, 99), functions) == ((16, 30), (32, 44), (48, 60), (64, 76))
