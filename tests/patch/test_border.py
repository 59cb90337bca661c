"""Functions whose entries lie across the border of two pages, in programs that call them all the time."""

from __future__ import annotations

import pytest
from project import MAIN, Project, assert_untouched, image_bytes

import patcher
from patcher.code.border import PAGE, led_to
from patcher.patch import transaction
from patcher.unwind import Unwinder

# A thread is nearly always in what is displaced: before the border, behind it, or where the landing comes.
UNIT = """\
#define STEP 2
#define TEXT(x) #x
#define VALUE(x) TEXT(x)
#if STEP == 2
#define PLACE(before) ".p2align 12\\n.skip 4096 - " #before ", 0x90\\n"
#else
#define PLACE(before) ".p2align 4\\n"
#endif
#define ACROSS(before) int across##before(void); \\
    __asm__(".text\\n" PLACE(before) ".globl across" #before "\\n.type across" #before ", @function\\n" \\
            "across" #before ":\\n.cfi_startproc\\npushq %rbx\\n.cfi_def_cfa_offset 16\\n.rept 12\\npause\\n.endr\\n" \\
            "movl $" VALUE(STEP) ", %eax\\npopq %rbx\\n.cfi_def_cfa_offset 8\\nret\\n.cfi_endproc\\n" \\
            ".size across" #before ", . - across" #before "\\n");
ACROSS(1)
ACROSS(2)
ACROSS(3)
ACROSS(4)
"""
CALLER = """\
#include <pthread.h>
int across1(void), across2(void), across3(void), across4(void);
static volatile int wrong;
__attribute__((noinline)) int all(void)
{
    return across1() * 1000 + across2() * 100 + across3() * 10 + across4();
}
static void *run(void *unused)
{
    for (;;) {
        int found = all();
        for (int left = found; left; left /= 10)
            wrong |= left % 10 != 2 && left % 10 != 7;
    }
    return unused;
}
int answer(int n)
{
    pthread_t thread;
    if (n == 0)
        return pthread_create(&thread, 0, run, 0);
    return n == 1 ? all() : wrong;
}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("p"), {"main.c": MAIN, "unit.c": UNIT, "caller.c": CALLER})


@pytest.fixture(scope="module")
def change(project):
    return project.object("unit.c", ("#define STEP 2", "#define STEP 7"), flags=())


@pytest.mark.parametrize("forced", [True, False], ids=["", "where the kernel does not force writes"])
def test_they_change_and_come_back_under_threads_that_are_in_them(project, change, forced, monkeypatch):
    stepped = []
    has_stepped = transaction._Guard._has_stepped

    def watched(guard, stopped, thread):
        stepped.append(has_stepped(guard, stopped, thread))
        return stepped[-1]

    monkeypatch.setattr(transaction._Guard, "_has_stepped", watched)
    with project.running() as program, patcher.attach(program.pid, force=True) as session:
        session.target.memory.forced_writes = forced
        before = image_bytes(program.pid)
        assert [program.ask(0), program.ask(0)] == ["0", "0"]
        for _ in range(6):
            session.apply(change)
            assert program.ask(1) == "7777"
            originals = [f.original for f in session.status().functions]
            assert sorted(PAGE - a % PAGE for a in originals) == [1, 2, 3, 4]
            session.revert(0)
            assert program.ask(1) == "2222"
            assert image_bytes(program.pid) == before
        assert stepped, "no thread was ever inside the bytes: the test shows nothing"
        assert program.ask(2) == "0"
        assert_untouched(program.pid)


def test_what_is_half_there_is_on_record_and_goes_with_a_revert(project, change):
    with project.running() as program, patcher.attach(program.pid, force=True) as session:
        before = image_bytes(program.pid)
        session.apply(change)
        originals = [f.original for f in session.status().functions]
        memory = session.target.memory
        for address in originals:  # as if the patcher had died before it wrote the heads
            count = min(2, PAGE - address % PAGE)
            memory.write(address, bytes.fromhex("53f3")[:count])
        assert program.ask(1) == "2222"
        session.apply(change)
        session.revert(0)
        assert program.ask(1) == "2222"
        assert image_bytes(program.pid) == before
        session.apply(change)
        assert program.ask(1) == "7777"


def test_a_thread_on_its_way_through_a_landing_is_walked_as_one_at_the_entry(project, change):
    with project.running() as program, patcher.attach(program.pid, force=True) as session:
        assert program.ask(0) == "0"
        session.apply(change)
        memory = session.target.memory
        landings = {}
        for function in session.status().functions:
            found = led_to(function.original, memory.read(function.original, 2))
            landings[found] = function.original
        assert len(landings) == 4
        session.image.refresh()
        unwinder, seen = Unwinder(session.image), set()
        with session.target.stopped() as stopped:
            tid = max(thread.tid for thread in stopped.threads)
            for _ in range(1000):
                if stopped.step(tid).pc in landings:
                    thread = next(t for t in stopped.described() if t.tid == tid)
                    trace = unwinder.backtrace(thread)
                    symbols = session.image.executable.module.symbols
                    names = [symbols.covering(a - session.image.executable.bias) for a in trace.addresses[:3]]
                    assert trace.complete
                    assert trace.addresses[0] == landings[thread.pc]
                    assert [s.name for s in names[1:] if s is not None] == ["all", "run"]
                    seen.add(thread.pc)
        assert seen == set(landings)
