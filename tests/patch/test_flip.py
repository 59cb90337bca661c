"""The flip itself: threads in the way, many functions at once, and what a controller that dies leaves behind."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from project import MAIN, Project, assert_untouched, image_bytes

import patcher
from patcher.errors import TargetBusy
from patcher.patch import transaction
from patcher.target import Memory, Stopped, StoppedThread

ENTRY_UNIT = """\
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <unistd.h>

int spin(volatile int *go);
volatile int go;
static atomic_int done, wrong;
static const int threads = 4;
static void *run(void *unused)
{
    while (!go || go > 1)
        spin(&go);
    done++;
    return unused;
}

int answer(int n)
{
    if (n == 0) {
        for (int i = 0; i < threads; i++) {
            pthread_t thread;
            pthread_create(&thread, NULL, run, NULL);
        }
        return 0;
    }
    return n == 1 ? spin(&go) : done;
}
"""


# A thread is nearly always between the first instruction and the end of the five bytes.
SLOW_ENTRY = """\
__asm__(".text\\n.p2align 4\\n.globl spin\\n.type spin, @function\\nspin:\\n"
        "pause\\npause\\nmovl $2, %eax\\nret\\n.size spin, .-spin\\n");
"""


def test_threads_that_stand_in_the_entry_are_stepped_out_of_it(tmp_path, monkeypatch):
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": ENTRY_UNIT, "spin.c": SLOW_ENTRY})
    change = project.object("spin.c", ("$2", "$12"), flags=())
    stepped = []
    has_stepped = transaction._Guard._has_stepped

    def watched(guard: transaction._Guard, stopped: Stopped, thread: StoppedThread) -> bool:
        stepped.append(has_stepped(guard, stopped, thread))
        return stepped[-1]

    monkeypatch.setattr(transaction._Guard, "_has_stepped", watched)
    with project.running() as program, patcher.attach(program.pid) as session:
        assert program.ask(0) == "0"
        assert program.ask(1) == "2"
        for _ in range(4):
            session.apply(change)
            assert program.ask(1) == "12"
            session.revert(0)
            assert program.ask(1) == "2"
        assert any(stepped), "no thread was ever inside the bytes: the test shows nothing"
        assert_untouched(program.pid)


# A function whose first instruction is the loop's head: a jump inside it leads back to its entry.
LOOP_UNIT = """\
__asm__(".text\\n.p2align 4\\n.globl loop\\n.type loop, @function\\nloop:\\n"
        "addl $%d, (%%rdi)\\n"
        "movl (%%rsi), %%eax\\n"
        "cmpl $0, (%%rsi)\\n"
        "je loop\\n"
        "movl $%d, %%eax\\n"
        "ret\\n.size loop, .-loop\\n");
"""
LOOP_CALLER = """\
#include <pthread.h>
int loop(volatile int *count, volatile int *stop);
volatile int count, stop;
static volatile int result;
static pthread_t thread;
static void *run(void *unused)
{
    result = loop(&count, &stop);
    return unused;
}
int answer(int n)
{
    if (n == 0)
        return stop = 0, pthread_create(&thread, 0, run, 0);
    if (n == 1)
        return stop = 1, pthread_join(thread, 0), result;
    return count != 0;
}
"""


def test_a_function_that_jumps_back_to_its_entry_changes_only_while_nobody_is_in_it(tmp_path):
    sources = {"main.c": MAIN, "unit.c": LOOP_CALLER, "loop.c": LOOP_UNIT % (1, 5)}
    project = Project(tmp_path / "p", sources)
    change = project.object("loop.c", ("movl $5", "movl $6"), flags=())
    with project.running() as program, patcher.attach(program.pid) as session:
        assert program.ask(0) == "0"
        while program.ask(2) == "0":
            pass
        before = image_bytes(program.pid)
        with pytest.raises(TargetBusy, match="loop") as caught:
            session.apply(change)
        assert caught.value.hint
        assert image_bytes(program.pid) == before
        assert session.status().generation == 0
        assert program.ask(1) == "5"
        session.apply(change)
        program.ask(0)
        assert program.ask(1) == "6"
        assert_untouched(program.pid)


# --- many functions, several arenas ---


def many_functions(count: int) -> str:
    lines = [f"int f{i}(int n)\n{{\n    return n * STEP + {i};\n}}\n" for i in range(count)]
    table = ", ".join(f"f{i}" for i in range(count))
    return (
        "#define STEP 1\n" + "".join(lines) + f"static int (*const table[])(int) = {{{table}}};\n"
        "int answer(int n)\n{\n    unsigned sum = 0;\n"
        f"    for (int i = 0; i < {count}; i++)\n        sum += table[i](n);\n    return sum;\n}}\n"
    )


def test_six_hundred_functions_at_once(tmp_path):
    """Their slots take more than a page."""
    count = 600
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": many_functions(count)})
    change = project.object("unit.c", ("#define STEP 1", "#define STEP 3"))
    again = project.object("unit.c", ("#define STEP 1", "#define STEP 7"))
    base = sum(range(count))
    with project.running() as program, patcher.attach(program.pid, force=True) as session:
        before = image_bytes(program.pid)
        assert program.ask(10) == str(base + 10 * count)
        for _ in range(2):
            assert len(session.apply(change).functions) == count
            assert program.ask(10) == str(base + 30 * count)
            assert session.apply(again).timings.stop > 0, "nobody may be in a switch that is written anew"
            assert program.ask(10) == str(base + 70 * count)
            session.revert()
            assert program.ask(10) == str(base + 30 * count)
            session.revert(0)
            assert program.ask(10) == str(base + 10 * count)
            assert image_bytes(program.pid) == before
        assert_untouched(program.pid)


LIBRARY = "int count;\nint shared(int n)\n{\n    count++;\n    return n + 1;\n}\n"
UNIT = "int shared(int);\nint answer(int n)\n{\n    return shared(n) + 1;\n}\n"


IN_A_HANDLER = """\
#include <pthread.h>
#include <signal.h>
#include <unistd.h>
int f0(int n);
static volatile int calls, handled, go_on;
static void handler(int number)
{
    handled = number;
    while (!go_on)
        usleep(1000);
}
static void *run(void *unused)
{
    for (;; calls++)
        f0(1);
    return unused;
}
int answer(int n)
{
    pthread_t thread;
    if (n == 0) {
        signal(SIGUSR1, handler);
        return pthread_create(&thread, 0, run, 0);
    }
    if (n == 1)
        return f0(1);
    if (n == 2)
        go_on = 1;
    return n == 3 ? calls : handled;
}
"""


def test_a_switch_stays_as_it_is_under_a_thread(tmp_path, monkeypatch):
    """One that was interrupted there knows that the generation is live which was coming then; not now."""
    count = 520
    functions = "".join(f"int f{i}(int n)\n{{\n    return n * STEP + {i};\n}}\n" for i in range(count))
    text = f"#define STEP 1\n{functions}"
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": IN_A_HANDLER, "table.c": text})
    edits = [project.object("table.c", ("#define STEP 1", f"#define STEP {n}")) for n in (3, 7)]
    settle = transaction._Slots.settle

    with project.running() as program, patcher.attach(program.pid, force=True) as session:

        def interrupted(slots: transaction._Slots, number: int) -> None:
            """The thread is in a switch when a signal comes."""
            (arena,) = session.ledger.arenas.values()
            (tid,) = {int(name) for name in os.listdir(f"/proc/{program.pid}/task")} - {program.pid}
            with session.target.stopped() as stopped:
                while not arena.switches <= stopped.step(tid).pc < arena.header:
                    pass
                ctypes.CDLL(None).tgkill(program.pid, tid, signal.SIGUSR1)
            settle(slots, number)

        assert program.ask(0) == "0"
        monkeypatch.setattr(transaction._Slots, "settle", interrupted)
        session.apply(edits[0])
        monkeypatch.undo()
        assert program.ask(1) == "3"
        while program.ask(4) == "0":
            pass
        with pytest.raises(TargetBusy, match="is not back there yet") as refused:
            session.apply(edits[1])
        assert refused.value.code == "switch-busy"
        assert program.ask(1) == "3"
        program.ask(2)
        calls = int(program.ask(3))
        assert session.apply(edits[1]).number == 2
        assert program.ask(1) == "7"
        while int(program.ask(3)) == calls:
            pass
        assert_untouched(program.pid)


def test_program_and_library_in_one_generation(tmp_path):
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": UNIT, "lib.c": LIBRARY}, shared=("lib.c",))
    both = [project.object("unit.c", ("+ 1", "+ 10")), project.object("lib.c", ("n + 1", "n + 20"))]
    more = [project.object("unit.c", ("+ 1", "+ 30")), project.object("lib.c", ("n + 1", "n + 40"))]
    with project.running() as program, patcher.attach(program.pid) as session:
        before = image_bytes(program.pid)
        assert program.ask(1) == "3"
        generation = session.apply(*both)
        assert {Path(f.module).name for f in generation.functions} == {"program", "libpart.so"}
        assert program.ask(1) == "31"
        assert session.apply(*more).number == 2
        assert program.ask(1) == "71"
        assert session.revert() == 1
        assert program.ask(1) == "31"
        assert session.revert(0) == 0
        assert program.ask(1) == "3"
        assert image_bytes(program.pid) == before


# --- a kernel that does not force writes ---


def test_everything_works_where_the_kernel_refuses_to_write_to_read_only_pages(tmp_path):
    sources = {"main.c": MAIN, "unit.c": many_functions(550), "lib.c": LIBRARY}
    project = Project(tmp_path / "p", sources, shared=("lib.c",))
    change = [project.object("unit.c", ("#define STEP 1", "#define STEP 3"))]
    change += [project.object("lib.c", ("n + 1", "n + 20"))]
    base = sum(range(550))
    with project.running() as program, patcher.attach(program.pid, force=True) as session:
        session.target.memory.forced_writes = False
        before = image_bytes(program.pid)
        protections = [(m.start, m.permissions) for m in session.target.mappings() if m.inode]
        for _ in range(2):
            session.apply(*change)
            assert program.ask(10) == str(base + 30 * 550)
            session.revert(0)
            assert program.ask(10) == str(base + 10 * 550)
            assert image_bytes(program.pid) == before
            assert session.apply(change[0]).functions
            assert program.ask(10) == str(base + 30 * 550)
            session.revert(0)
        kept = [(m.start, m.permissions) for m in session.target.mappings() if m.inode and "memfd" not in m.path]
        assert kept == protections
        assert_untouched(program.pid)


def test_the_mode_without_forced_writes_does_refuse(tmp_path):
    """Or the test above would show nothing."""
    with Project(tmp_path / "p").running() as program, patcher.attach(program.pid) as session:
        memory = session.target.memory
        text = next(m for m in session.target.mappings() if m.executable)
        memory.forced_writes = False
        memory._poke = None
        with pytest.raises(patcher.PatcherError) as caught:
            memory.write(text.start, b"\x90")
        assert caught.value.code == "write-refused"
        assert memory.read(text.start, 1) != b"\x90" or text.start == 0


# --- a controller that dies ---


class Mortals:
    """A process that forks others, each of which patches and is killed after one of its writes.

    Forked from a small one, which has everything loaded and no threads, they start quickly.
    """

    def __init__(self) -> None:
        program = str(Path(__file__).with_name("mortals.py"))
        self.process = subprocess.Popen(
            [sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def die_at(self, moment: int, pid: int, *files: Path) -> int:
        """Apply files (without files: revert 0), being killed right after write number `moment`.

        Returns 0, or the number of writes if it came to its end before.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(" ".join(map(str, (moment, pid, *files))) + "\n")
        self.process.stdin.flush()
        code, writes = map(int, self.process.stdout.readline().split())
        assert code in (0, -signal.SIGKILL)
        return writes


@pytest.fixture(scope="module")
def mortals() -> Iterator[Mortals]:
    found = Mortals()
    yield found
    found.process.communicate()


# Two functions that change together, and a third that calls both and never changes.
TOGETHER = {
    "main.c": MAIN,
    "unit.c": "int tens(int n);\nint ones(int n);\nint answer(int n)\n{\n    return tens(n) * 10 + ones(n);\n}\n",
    "tens.c": "int count_tens;\nint tens(int n)\n{\n    count_tens++;\n    return n + 1;\n}\n",
    "ones.c": "int count_ones;\nint ones(int n)\n{\n    count_ones++;\n    return n + 1;\n}\n",
}


def together(project: Project, step: int) -> list[Path]:
    return [project.object(name, ("n + 1", f"n + {step}")) for name in ("tens.c", "ones.c")]


@pytest.mark.parametrize("kind", ["apply", "apply again", "revert"])
def test_killed_after_any_write_the_program_runs_one_generation_and_the_next_patcher_goes_on(tmp_path, mortals, kind):
    project = Project(tmp_path / "p", TOGETHER)
    first, second = together(project, 2), together(project, 3)
    answers = {"apply": {"22", "33"}, "apply again": {"33", "44"}, "revert": {"33", "22"}}[kind]
    seen, moment = set(), 0
    while True:
        moment += 1
        with project.running() as program:
            before = image_bytes(program.pid)
            if kind != "apply":
                with patcher.attach(program.pid) as session:
                    session.apply(*first)
            files = {"apply": first, "apply again": second, "revert": []}[kind]
            ended = mortals.die_at(moment, program.pid, *files)
            answer = program.ask(1)
            assert answer in answers, f"killed after write {moment}: a mixture of two generations"
            seen.add(answer)
            with patcher.attach(program.pid) as session:
                session.apply(*second)
                assert program.ask(1) == "44", f"killed after write {moment}"
                session.revert(0)
                assert program.ask(1) == "22", f"killed after write {moment}"
            assert image_bytes(program.pid) == before
            assert_untouched(program.pid)
        if ended:
            break
    assert moment > 4
    assert seen == answers


def test_killed_while_a_program_and_its_library_change_together(tmp_path, mortals):
    """Slots in two arenas; the last writes are those that matter."""
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": UNIT, "lib.c": LIBRARY}, shared=("lib.c",))
    first = [project.object("unit.c", ("+ 1", "+ 10")), project.object("lib.c", ("n + 1", "n + 20"))]
    second = [project.object("unit.c", ("+ 1", "+ 30")), project.object("lib.c", ("n + 1", "n + 40"))]
    with project.running() as program:
        before = image_bytes(program.pid)
        with patcher.attach(program.pid) as session:
            session.apply(*first)
            writes = mortals.die_at(1 << 40, program.pid, *second)
            assert writes > 8
            answers = []
            for moment in range(writes - 8, writes + 1):
                session.revert(1)
                assert program.ask(1) == "31"
                mortals.die_at(moment, program.pid, *second)
                answers.append(program.ask(1))
            assert set(answers) == {"31", "71"}, "a mixture of two generations"
            assert answers == sorted(answers)
            session.revert(0)
        assert image_bytes(program.pid) == before
        assert_untouched(program.pid)


def test_slots_that_a_dead_controller_left_half_written_are_mended(tmp_path):
    project = Project(tmp_path / "p", TOGETHER)
    change = together(project, 2)
    with project.running() as program, patcher.attach(program.pid) as session:
        session.apply(*change)
        assert program.ask(1) == "33"
        ledger = session.ledger
        redirect = ledger.journal.redirects[0]
        session.target.memory.write(ledger.primary.slot(redirect.index), struct.pack("<Q", redirect.copy))
        assert program.ask(1) == "23"
        with patcher.attach(program.pid) as other:
            assert other.apply(*change).functions == ()
        assert program.ask(1) == "33"


DIES_WHILE_ALL_STAND_STILL = """
import os, signal, sys
from patcher.target import Target
with Target.attach(int(sys.argv[1])) as target, target.stopped():
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_patcher_is_no_obstacle_and_leaves_no_tracer(tmp_path):
    project = Project(tmp_path / "p")
    change = project.object("unit.c", ("n + 1000 * calls", "n"))
    with project.running() as program:
        command = [sys.executable, "-c", DIES_WHILE_ALL_STAND_STILL]
        assert subprocess.run([*command, str(program.pid)], check=False).returncode == -signal.SIGKILL
        assert program.ask(1) == "1001"
        with patcher.attach(program.pid) as session:
            session.apply(change)
        assert program.ask(1) == "1"
        assert os.path.exists(f"/proc/{program.pid}")


# --- the stacks of many threads ---

MANY = """\
#include <pthread.h>
#include <unistd.h>
static volatile long deep;
__attribute__((noinline)) static long down(long n)
{
    volatile long kept[64] = {n};
    return n ? down(n - 1) + kept[0] : pause() + kept[0];
}
static void *run(void *depth)
{
    __atomic_add_fetch(&deep, 1, __ATOMIC_SEQ_CST);
    return (void *)down((long)depth);
}
int answer(int n)
{
    for (long i = 0; i < n; i++) {
        pthread_t thread;
        pthread_create(&thread, 0, run, (void *)(i * 40));
    }
    while (deep < n)
        ;
    return n;
}
"""


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("count", [3, 90])
def test_the_stacks_of_all_threads_are_read_whole(tmp_path, monkeypatch, count, at_once):
    together = []
    read_together = Memory.read_together

    def watched(memory, tid, extents, buffer):
        together.append(at_once and read_together(memory, tid, extents, buffer))
        return together[-1]

    monkeypatch.setattr(Memory, "read_together", watched)
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": MANY})
    with project.running() as program, patcher.attach(program.pid) as session:
        assert program.ask(count) == str(count)
        target = session.target
        stacks = transaction._Stacks(target)
        with target.stopped() as stopped:
            found = np.concatenate([words.copy() for words in stacks._words(stopped)])
            wanted = [transaction.read_stack(target, sp, target.mappings()) for sp in stopped.pointers()]
            assert np.array_equal(found, np.concatenate(wanted))
            assert len(wanted) == count + 1
            on_a_stack = int(wanted[-1 if count == 3 else 50][0])
            inside, outside = (
                transaction._Guard([(at, at + 4)], include_start=True) for at in (on_a_stack, 0x123456789ABC0)
            )
            assert not stacks.are_clear(stopped, [outside, inside])
            assert stacks.are_clear(stopped, [outside])
            seen = stacks.seen(stopped)
        assert set(together) == (set() if count == 3 else {at_once})
        assert [len(s.stack) for s in seen] == ([] if count == 90 else [8 * len(w) for w in wanted])
