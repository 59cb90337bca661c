"""Backtraces of real threads: the calls that they are in and no others, wherever they stand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from living import await_sleep, compile_text, run, running

from patcher.image import Image
from patcher.target import Target
from patcher.unwind import Backtrace, Unwinder

PROGRAMS = Path(__file__).parent / "programs"
OUTERMOST = ["main", "_start"]


def build(folder: Path, name: str, *flags: str, compiler: str = "gcc") -> Path:
    program = folder / name
    run(compiler, *flags, "-w", "-o", program, PROGRAMS / f"{name}.c", "-pthread")
    return program


def own_functions(image: Image, trace: Backtrace) -> list[str]:
    """The names of the program's own functions in a backtrace."""
    module = image.executable
    found = [module.module.symbols.covering(a - module.bias) for a in trace.addresses if module.executable_at(a)]
    return [symbol.name for symbol in found if symbol is not None]


def backtrace(target: Target, image: Image, unwinder: Unwinder) -> Backtrace:
    with target.sampled(target.pid) as thread:
        return unwinder.backtrace(thread)


CALLS = {
    "qsort": ["sleep_for_ever", "compare", "in_qsort"],
    "handler": ["sleep_for_ever", "on_signal", "in_handler"],
    "iterate": ["sleep_for_ever", "visit", "in_unknown_holding"],
    "stale buffer": ["sleep_for_ever", "in_buffer", "in_stale_buffer"],
    "fgets": ["in_fgets"],
}


@pytest.mark.parametrize("state", CALLS)
@pytest.mark.parametrize(
    ("compiler", "flags"),
    [
        ("gcc", ("-O0",)),
        ("gcc", ("-O2", "-fno-optimize-sibling-calls", "-fno-inline")),
        ("clang", ("-O0",)),
        ("gcc", ("-O0", "-static")),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_backtrace_is_the_calls_that_a_thread_is_in(tmp_path, compiler, flags, state):
    with running(build(tmp_path, "states", *flags, compiler=compiler), state) as target:
        await_sleep(target.pid)
        image = Image(target)
        trace = backtrace(target, image, Unwinder(image))
    assert trace.complete
    known = {*OUTERMOST, *(name for names in CALLS.values() for name in names)}
    found = [name for name in own_functions(image, trace) if name in known]  # but for the C library, if it is static
    assert found == [*CALLS[state], *OUTERMOST]


def test_what_has_no_call_frame_information_ends_the_walk(tmp_path):
    with running(build(tmp_path, "states", "-O0"), "unknown") as target:
        await_sleep(target.pid)
        image = Image(target)
        trace = backtrace(target, image, Unwinder(image))
    assert not trace.complete
    assert own_functions(image, trace) == ["sleep_for_ever", "no_frames"]


@pytest.mark.parametrize("flags", [("-O2",), ("-O2", "-static")], ids=" ".join)
def test_a_busy_thread_is_walked_to_its_end_from_wherever_it_is_met(tmp_path, flags):
    with running(build(tmp_path, "busy", *flags), "0") as target:
        image = Image(target)
        unwinder = Unwinder(image)
        for _ in range(400):
            trace = backtrace(target, image, unwinder)
            names = [image.module_at(a) and own_functions(image, Backtrace((a,), True)) for a in trace.addresses]
            assert trace.complete, names
            assert own_functions(image, trace)[-2:] == OUTERMOST or "-static" in flags
            assert "main" in own_functions(image, trace)


def test_without_registers_there_is_nothing_to_walk(tmp_path):
    with running(build(tmp_path, "states", "-O0"), "read") as target:
        image = Image(target)
        with target.stopped() as stopped:
            assert Unwinder(image).backtrace(stopped.threads[0]) == Backtrace((), False)


CLOCK = """
#include <stdio.h>
#include <time.h>
#include <unistd.h>
int main(void)
{
    struct timespec now;
    if (write(1, "r", 1) != 1)
        return 1;
    for (;;)
        clock_gettime(CLOCK_MONOTONIC, &now);
}
"""


def test_code_of_the_kernel_in_the_process_is_walked_through(tmp_path):
    run("gcc", "-O1", "-o", tmp_path / "clock", compile_text(CLOCK, tmp_path / "clock.o", "-O1"))
    with running(tmp_path / "clock") as target:
        image = Image(target)
        unwinder = Unwinder(image)
        kernels = next(m for m in target.mappings() if m.path == "[vdso]")
        met = 0
        while met < 20:
            trace = backtrace(target, image, unwinder)
            assert trace.complete
            assert own_functions(image, trace) == OUTERMOST
            met += trace.addresses[0] in kernels


OURS = """
#include <unistd.h>
void sleep_in_ours(void) { char byte; while (read(0, &byte, 1) > 0) ; }
"""
LOADS = """
#include <dlfcn.h>
#include <unistd.h>
int main(int count, char **arguments)
{
    void (*sleep_in_ours)(void) = (void (*)(void))dlsym(dlopen(arguments[count - 1], RTLD_NOW), "sleep_in_ours");
    if (write(1, "r", 1) != 1)
        return 1;
    sleep_in_ours();
    return 0;
}
"""


def test_so_is_a_module_of_ours(tmp_path):
    unit = compile_text(OURS, tmp_path / "ours.o", "-O1", "-fPIC")
    run("gcc", "-shared", "-o", tmp_path / "ours.so", unit)
    run("gcc", "-o", tmp_path / "loads", compile_text(LOADS, tmp_path / "loads.o", "-O1"))
    descriptor = os.memfd_create("patcher")
    try:
        os.write(descriptor, (tmp_path / "ours.so").read_bytes())
        with running(tmp_path / "loads", f"/proc/{os.getpid()}/fd/{descriptor}") as target:
            await_sleep(target.pid)
            image = Image(target)
            trace = backtrace(target, image, Unwinder(image))
            ours = [m for m in target.mappings() if m.path == "/memfd:patcher"]
    finally:
        os.close(descriptor)
    assert not any(m.name == "memfd:patcher" for m in image.modules)
    assert trace.complete
    assert own_functions(image, trace) == OUTERMOST
    assert [any(a in m for m in ours) for a in trace.addresses[:3]] == [False, True, False]
