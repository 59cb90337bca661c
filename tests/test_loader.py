"""Libraries loaded by the target's own loader: into idle programs, busy ones, and such as have no loader."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from living import await_sleep, compile_text, run, running

from patcher.errors import PatcherError, TargetBusy, UnsafeChange
from patcher.image import Image
from patcher.loader import RTLD_NOW, Caller, workspace
from patcher.target import FunctionCall, Result, Target

PROGRAMS = Path(__file__).parent / "programs"

LIBRARY = """
#include <stdio.h>
#include <stdlib.h>
int count, turns;
char **arguments, **environment;
static void *block;
__attribute__((constructor)) static void begin(int c, char **v, char **e)
{
    count = c, arguments = v, environment = e;
    block = malloc(100);
    turns++;
}
__attribute__((destructor)) static void end(void) { free(block); }
void again(int c, char **v, char **e) { turns += c == count && v == arguments && e == environment; }
int seen(void) { return turns; }
"""
FAILING = """
#include <stdlib.h>
#include <unistd.h>
__attribute__((constructor)) static void begin(void) { %s; }
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loader")


@pytest.fixture(scope="module")
def library(folder: Path) -> Path:
    return make_library(folder, "libextra.so", LIBRARY)


def make_library(folder: Path, name: str, text: str, *flags: str, compiler: str = "gcc") -> Path:
    unit = compile_text(text, folder / f"{name}.o", "-O1", "-fPIC", compiler=compiler)
    run(compiler, "-shared", "-o", folder / name, unit, *flags)
    return folder / name


class Program:
    """A program of tests/programs that says "r" and answers lines."""

    def __init__(self, command: list[str | Path]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid = self.process.pid
        assert self.process.stdout is not None
        assert self.process.stdout.read(1) == b"r"

    def ask(self) -> list[int]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"report\n")
        self.process.stdin.flush()
        return [int(word) for word in self.process.stdout.readline().split()]

    def await_progress(self) -> None:
        """Return as soon as it has done something more."""
        rounds = self.ask()[0]
        while self.ask()[0] == rounds:
            pass

    def finish(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(10)


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Program]]:
    with contextlib.ExitStack() as stack:

        def start_program(name: str, *arguments: str, flags: tuple[str, ...] = ("-O2",)) -> Program:
            output = folder / f"{name}{''.join(flags)}"
            if not output.exists():
                run("gcc", *flags, "-w", "-o", output, PROGRAMS / f"{name}.c", "-pthread")
            program = Program([output, *arguments])
            stack.enter_context(program.process)
            stack.callback(program.process.kill)
            return program

        yield start_program


@contextlib.contextmanager
def calling(pid: int, **options: float) -> Iterator[Caller]:
    with Target.attach(pid) as target:
        yield Caller(Image(target), **options)


def maps(pid: int) -> list[str]:
    """The mappings, but for the heap, which grows."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line for line in lines if not line.endswith("[heap]")]


def workspaces(pid: int) -> set[str]:
    """The mappings that are the page for the stub of a workspace."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line for line in lines if line.split()[1] == "r-xp" and line.split()[4] == "0" and len(line.split()) == 5}


def tracers(pid: int) -> set[str]:
    status = [Path(task, "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return {line.split()[1] for text in status for line in text.splitlines() if line.startswith("TracerPid")}


def address(caller: Caller, name: str) -> int:
    found = caller.image.resolve(name, caller.image.executable)
    assert found is not None
    return found.address


@pytest.mark.parametrize("state", ["read", "poll", "condition", "fgets", "nanosleep", "stale buffer"])
def test_a_library_is_loaded_into_an_idle_program_and_nothing_else_is_changed(start, library, state):
    program = start("states", state)
    await_sleep(program.pid)
    before = maps(program.pid)
    with calling(program.pid) as caller:
        assert caller.image.resolve("seen", caller.image.executable) is None
        assert caller.load_library(str(library)) > 0
        assert caller.call([FunctionCall(address(caller, "seen"))]) == (1,)
    changed = [line for line in maps(program.pid) if line not in before]
    assert changed
    assert all(line.endswith(str(library)) for line in changed)
    assert [line for line in maps(program.pid) if line not in changed] == before
    assert tracers(program.pid) == {"0"}
    assert program.process.poll() is None


def test_constructors_are_given_what_the_loader_gives_them(start, library):
    program = start("states", "read")
    with calling(program.pid) as caller:
        caller.load_library(str(library))
        caller.run_constructors([address(caller, "again")] * 3)
        assert caller.call([FunctionCall(address(caller, "seen"))]) == (4,)
        memory = caller.target.memory
        assert memory.read_u64(address(caller, "count")) & 0xFFFFFFFF == 2
        first = memory.read_u64(memory.read_u64(address(caller, "arguments")) + 8)
        assert memory.read(first, 5) == b"read\0"


def test_what_the_loader_says_is_passed_on(start, folder):
    program = start("states", "read")
    needy = make_library(folder, "libneedy.so", "int nowhere(void); int needy(void) { return nowhere(); }")
    with calling(program.pid) as caller:
        with pytest.raises(UnsafeChange, match="cannot open shared object file") as caught:
            caller.load_library(str(folder / "libnothing.so"))
        assert caught.value.code == "dlopen"
        with pytest.raises(UnsafeChange, match="undefined symbol: nowhere"):
            caller.load_library(str(needy))
        with pytest.raises(ValueError, match="absolute"):
            caller.load_library("libextra.so")
    assert tracers(program.pid) == {"0"}


BARE = """
__asm__(".globl _start\\n_start: mov $1, %eax\\nmov $1, %edi\\nlea text(%rip), %rsi\\nmov $1, %edx\\nsyscall\\n"
        "1: xor %eax, %eax\\nxor %edi, %edi\\nlea -8(%rsp), %rsi\\nmov $1, %edx\\nsyscall\\njmp 1b\\n"
        "text: .byte 'r'\\n");
"""


def test_a_program_without_a_loader_is_refused(folder, library):
    unit = compile_text(BARE, folder / "bare.o")
    run("gcc", "-static", "-nostdlib", "-o", folder / "bare", unit)
    with running(folder / "bare") as target:
        before = maps(target.pid)
        with pytest.raises(UnsafeChange, match="no `dlopen`: it is linked statically") as caught:
            Caller(Image(target)).load_library(str(library))
        assert caught.value.code == "no-loader"
        assert maps(target.pid) == before


@pytest.mark.parametrize("flags", [("-O2", "-static"), ("-O2", "-static-pie")], ids=" ".join)
def test_a_static_program_with_the_loader_in_it_can_load(start, library, flags):
    program = start("states", "read", flags=flags)
    with calling(program.pid) as caller:
        caller.load_library(str(library))
        assert caller.call([FunctionCall(address(caller, "seen"))]) == (1,)
    assert program.process.poll() is None


def test_a_library_that_wants_executable_stacks_is_refused(start, folder):
    program = start("states", "read")
    wanting = make_library(folder, "libwanting.so", LIBRARY, "-Wl,-z,execstack")
    before = maps(program.pid)
    with calling(program.pid) as caller, pytest.raises(UnsafeChange, match="wants executable stacks") as caught:
        caller.load_library(str(wanting))
    assert caught.value.code == "executable-stack"
    assert maps(program.pid) == before


def test_no_library_is_loaded_while_the_only_thread_holds_a_lock(start, library):
    program = start("states", "iterate")
    await_sleep(program.pid)
    before = maps(program.pid)
    with calling(program.pid, wait=0.2) as caller, pytest.raises(TargetBusy, match="dl_iterate_phdr"):
        caller.load_library(str(library))
    assert maps(program.pid) == before


@pytest.mark.parametrize(
    ("body", "message"),
    [("abort()", "signal 6"), ("*(volatile int *)8 = 1", "signal 11"), ("for (;;) pause()", "did not come back")],
)
def test_a_constructor_that_fails_does_not_end_the_program(start, folder, body, message):
    program = start("busy", "1")
    bad = make_library(folder, f"libbad{len(message)}.so", FAILING % body)
    before = workspaces(program.pid)
    with calling(program.pid, timeout=0.3) as caller, pytest.raises(PatcherError, match=message):
        caller.load_library(str(bad))
    assert len(workspaces(program.pid) - before) == 1, "the loader still has pointers into the stack"
    program.await_progress()
    assert tracers(program.pid) == {"0"}


def test_an_exception_that_leaves_a_constructor_does_not_end_the_program(start, folder):
    program = start("states", "read")
    text = "struct A { A() { throw 1; } } a;"
    unit = compile_text(text, folder / "throws.o", "-O1", "-fPIC", compiler="g++", name="throws.cc")
    run("g++", "-shared", "-o", folder / "libthrows.so", unit)
    with calling(program.pid) as caller, pytest.raises(PatcherError, match="signal 6"):
        caller.load_library(str(folder / "libthrows.so"))
    assert program.process.poll() is None


def load_again_and_again(caller: Caller, library: Path, count: int) -> None:
    opening, closing = address(caller, "dlopen"), address(caller, "dlclose")
    path = os.fsencode(library) + b"\0"
    with workspace(caller.target) as memory:
        for _ in range(count):
            calls = [FunctionCall(opening, (path, RTLD_NOW)), FunctionCall(closing, (Result(0),))]
            handle, failed = caller.call(calls, memory)
            assert handle
            assert not failed


# Where all threads are busy, each must be waited for until it gets a processor: fewer loads then.
@pytest.mark.parametrize(
    ("busy", "loads"), [(("0",), 1000), (("2",), 300), (("2", "first too"), 50)], ids=["one", "others", "all"]
)
def test_many_loads_in_a_program_that_is_busy_in_the_allocator(start, library, busy, loads):
    program = start("busy", *busy)
    with calling(program.pid, wait=10.0) as caller:
        load_again_and_again(caller, library, loads)
    program.await_progress()
    assert program.ask()[1] == 0
    assert tracers(program.pid) == {"0"}
    assert program.finish() == 0


def load_for_ever(pid: int, library: Path, ready: int) -> None:
    with calling(pid) as caller:
        os.write(ready, b"r")
        while True:
            load_again_and_again(caller, library, 5)


@pytest.mark.parametrize("threads", ["0", "2"])
def test_a_controller_killed_while_it_loads_leaves_a_sound_program(start, library, threads):
    program = start("busy", threads)
    random.seed(threads)
    for _ in range(25):
        reading, writing = os.pipe()
        controller = os.fork()
        if controller == 0:
            try:
                load_for_ever(program.pid, library, writing)
            finally:
                os._exit(1)
        os.close(writing)
        assert os.read(reading, 1) == b"r"
        time.sleep(random.random() * 0.03)
        os.kill(controller, 9)
        os.waitpid(controller, 0)
        assert os.read(reading, 1) == b"", "the controller came to its end"
        os.close(reading)
    with calling(program.pid) as caller:
        load_again_and_again(caller, library, 3)
    assert program.ask()[1] == 0
    assert tracers(program.pid) == {"0"}
    assert program.finish() == 0
