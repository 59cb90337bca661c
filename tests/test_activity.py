"""Who is in old code: threads, signal handlers, coroutines; and what becomes of a change then."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from project import MAIN, Project, Running, assert_untouched, image_bytes

import patcher
from patcher.activity import Lookout
from patcher.errors import UnsafeChange
from patcher.session import Session
from patcher.target import StoppedThread, Target

# `inner` waits for a byte; `outer` calls it in the middle, `deep` through itself; each says which version it is.
WORK = """\
#include <signal.h>
#include <unistd.h>
#include <stdlib.h>
int inner(int n);
static volatile int kept;
__attribute__((noinline)) int outer(int n)
{
    int before = 1;
    kept = n;
    return before * 1000 + inner(n) + kept * 0;
}
__attribute__((noinline)) int deep(int n)
{
    if (n > 1)
        return deep(n - 1) + kept * 0 + 10;
    kept = n;
    return inner(n) + 10 * kept;
}
"""
CHANGE = ("before = 1;", "before = 2;")
DEEPER = ("return inner(n) + 10", "return inner(n) + 20")

INNER = """\
#include <pthread.h>
#include <signal.h>
#include <unistd.h>
#include <stdlib.h>
int outer(int), deep(int);
int ends[2];
volatile int entered, result[4];
static pthread_t threads[4];

int inner(int n)
{
    char byte;
    __atomic_add_fetch(&entered, 1, __ATOMIC_SEQ_CST);
    if (read(ends[0], &byte, 1) != 1)
        abort();
    return n & 1;
}

static void *call_outer(void *at)
{
    *(int *)at = outer(1);
    return at;
}
static void *call_deep(void *at)
{
    *(int *)at = deep(5);
    return at;
}

int answer(int n)
{
    switch (n) {
    case 0:  /* two threads, in `outer` and in `deep` */
        entered = 0;
        if (!ends[1] && pipe(ends))
            abort();
        pthread_create(&threads[0], NULL, call_outer, (void *)&result[0]);
        pthread_create(&threads[1], NULL, call_deep, (void *)&result[1]);
        return 0;
    case 1:
        return entered;
    case 2:  /* let them go */
        if (write(ends[1], "xx", 2) != 2)
            abort();
        pthread_join(threads[0], NULL);
        pthread_join(threads[1], NULL);
        return result[0];
    case 3:
        return result[1];
    case 4:  /* one byte only */
        return write(ends[1], "x", 1);
    }
    return -1;
}
"""


def until(program: Running, question: int, wanted: str) -> None:
    while program.ask(question) != wanted:
        pass


def functions(generation: patcher.Generation) -> set[str]:
    return {f.function for f in generation.frames}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Project:
    sources = {"main.c": MAIN, "unit.c": INNER, "work.c": WORK}
    # Or the compiler makes a loop of the recursion.
    flags = ("-fno-optimize-sibling-calls", "-fno-inline")
    return Project(tmp_path_factory.mktemp("work") / "p", sources, compile_flags=flags)


@pytest.fixture(scope="module")
def change(work: Project) -> Path:
    return work.object("work.c", CHANGE, DEEPER)


@contextmanager
def entered(work: Project, **options: object) -> Iterator[tuple[Running, Session]]:
    """The program with a thread in `outer` and one in `deep`, five calls deep, and a session."""
    with work.running() as program, patcher.attach(program.pid, **options) as session:  # type: ignore[arg-type]
        program.ask(0)
        until(program, 1, "2")
        yield program, session


def test_who_runs_on_is_told_with_thread_function_and_generation(work: Project, change: Path) -> None:
    with entered(work) as (program, session):
        generation = session.apply(change)
        threads = {int(t) for t in os.listdir(f"/proc/{program.pid}/task")} - {program.pid}
        assert functions(generation) == {"outer", "deep"}
        assert {f.thread for f in generation.frames} == threads
        assert len([f for f in generation.frames if f.function == "deep"]) == 5, "one for each call"
        assert not any(f.loops or f.generation for f in generation.frames)
        assert program.ask(2) == "1001", "old frames finish in old code"
        program.ask(0)
        until(program, 1, "2")
        assert session.revert() == 0
        assert {(f.function, f.generation) for f in session.frames} == {("outer", 1), ("deep", 1)}
        assert program.ask(2) == "2001"
        assert_untouched(program.pid)


def test_refuse_leaves_everything_as_it_was_and_names_who_is_there(work: Project, change: Path) -> None:
    with entered(work, active="refuse") as (program, session):
        before = image_bytes(program.pid)
        with pytest.raises(UnsafeChange) as refused:
            session.apply(change)
        assert refused.value.code == "active"
        assert "drain" in refused.value.hint
        assert re.search(r"thread \d+ is in `outer`", refused.value.message), refused.value.message
        assert re.search(r"thread \d+ is in `deep`", refused.value.message), refused.value.message
        assert image_bytes(program.pid) == before
        assert session.status().generation == 0
        assert program.ask(2) == "1001"
        assert session.apply(change).frames == ()
        program.ask(0)
        until(program, 1, "2")
        with pytest.raises(UnsafeChange, match="`outer`"):
            session.revert()
        assert session.status().generation == 1
        assert program.ask(2) == "2001", "the refused revert changed nothing"
        assert session.revert() == 0
        program.ask(0)
        assert program.ask(2) == "1001"
        assert_untouched(program.pid)


@pytest.mark.parametrize("options", [{}, {"active": "drain"}, {"active": "refuse"}, {"consistency": "generation"}])
def test_it_is_told_beforehand(work: Project, change: Path, options: dict[str, str]) -> None:
    """What would be refused just now is, by `explain` and by a dry run; who would have to be waited for is named."""
    refused = options.get("active") == "refuse"
    with entered(work, **options) as (program, session):
        before = image_bytes(program.pid)
        found = session.explain(change)
        assert {f.function for f in found.frames} == {"outer", "deep"}
        assert found.outlook.value == ("refused" if refused else "live")
        lines = "\n".join(found.lines())
        assert "in the code that changes:" in lines
        assert "outer  thread" in lines
        with patcher.attach(program.pid, dry_run=True, **options) as trying:  # type: ignore[arg-type]
            if refused:
                with pytest.raises(UnsafeChange, match="`outer`"):
                    trying.apply(change)
            else:
                assert trying.apply(change).number == 1
        assert image_bytes(program.pid) == before
        program.ask(2)
        found = session.explain(change)
        assert (found.outlook.value, found.frames) == ("live", ())
        assert_untouched(program.pid)


def test_drain_waits_and_gives_up_whole(work: Project, change: Path) -> None:
    with entered(work, active="drain", timeout=0.3) as (program, session):
        before = image_bytes(program.pid)
        with pytest.raises(UnsafeChange, match=r"in use after 0\.3 s") as refused:
            session.apply(change)
        assert "--timeout" in refused.value.hint
        assert image_bytes(program.pid) == before
        assert session.status().generation == 0
        assert program.ask(2) == "1001"


@pytest.mark.parametrize("options", [{"active": "drain"}, {"consistency": "generation"}])
def test_a_change_waits_until_the_last_has_left(work: Project, change: Path, options: dict[str, str]) -> None:
    with entered(work, timeout=60, **options) as (program, session):
        looks: list[bool] = []
        standing = Lookout.standing

        def watched(*arguments: object) -> object:
            found = standing(*arguments)  # type: ignore[arg-type]
            looks.append(bool(found))
            if len(looks) == 2:
                program.tell(2)  # they leave while it waits
            return found

        Lookout.standing = watched  # type: ignore[method-assign, assignment]
        try:
            generation = session.apply(change)
        finally:
            Lookout.standing = standing  # type: ignore[method-assign]
        assert looks[:2] == [True, True]
        assert not looks[-1]
        assert program.line() == "1001", "it was still the old code when they left"
        assert generation.frames == ()
        assert generation.number == 1
        program.ask(0)
        assert program.ask(2) == "2001"
        # Back likewise.
        program.ask(0)
        until(program, 1, "2")
        waiting = threading.Timer(0.2, program.tell, (2,))
        waiting.start()
        assert session.revert() == 0
        waiting.join()
        assert program.line() == "2001"
        assert_untouched(program.pid)


def test_frames_of_all_generations_count(work: Project, change: Path) -> None:
    second = work.object("work.c", ("before = 1;", "before = 3;"), DEEPER)
    with entered(work) as (program, session):
        session.apply(change)
        with patcher.attach(program.pid, active="refuse") as strict, pytest.raises(UnsafeChange, match="`outer`"):
            strict.apply(second)  # the thread is in the code that the program was started with, two generations ago
        assert program.ask(2) == "1001"
        with patcher.attach(program.pid, active="refuse") as strict:
            assert strict.apply(second).number == 2


def test_other_functions_do_not_matter(work: Project) -> None:
    only_deep = work.object("work.c", DEEPER)
    with entered(work, active="refuse") as (program, session):
        program.tell(4)
        program.line()
        # One of the two is gone; which one, is luck: what it is in decides.
        until(program, 1, "2")
        while len(os.listdir(f"/proc/{program.pid}/task")) > 2:
            pass
        with patcher.attach(program.pid) as look:
            left = {f.function for f in look.apply(work.object("work.c", CHANGE, DEEPER)).frames}
            look.revert()
        if left == {"deep"}:
            with pytest.raises(UnsafeChange, match="`deep`"):
                session.apply(only_deep)
        else:
            assert session.apply(only_deep).number


# --- signal handlers ---

HANDLER = """\
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static volatile int inside, rounds, stop, here;
static int ends[2];
static pthread_t thread;
static char area[65536];
int leaf(volatile int *stop, volatile int *here);
int caught(int number);

static void handle(int number)
{
    caught(number);
}
static void *run(void *at)
{
    stack_t other = {.ss_sp = area, .ss_size = sizeof area};
    if (at)
        sigaltstack(&other, NULL);
    rounds = leaf(&stop, &here);
    return NULL;
}
int answer(int n)
{
    struct sigaction action;
    switch (n) {
    case 0:
    case 1:
        memset(&action, 0, sizeof action);
        action.sa_handler = handle;
        action.sa_flags = n ? SA_ONSTACK : 0;
        sigaction(SIGUSR1, &action, NULL);
        inside = stop = here = 0;
        if (pipe(ends))
            abort();
        pthread_create(&thread, NULL, run, n ? area : NULL);
        while (!here)
            ;
        pthread_kill(thread, SIGUSR1);
        return 0;
    case 2:
        return inside;
    case 3:
        stop = 1;
        if (write(ends[1], "x", 1) != 1)
            abort();
        pthread_join(thread, NULL);
        return rounds;
    }
    return -1;
}
void wait_inside(void)
{
    char byte;
    inside = 1;
    if (read(ends[0], &byte, 1) != 1)
        abort();
}
"""
LEAF = """\
int leaf(volatile int *stop, volatile int *here)
{
    int n = 0;
    *here = 1;
    while (!*stop)
        n |= 1;
    return n + 4;
}
"""
CAUGHT = """\
void wait_inside(void);
int caught(int number)
{
    wait_inside();
    return number + 1;
}
"""


@pytest.mark.parametrize("other_stack", [0, 1])
def test_signal_handlers_and_what_they_interrupt(tmp_path: Path, other_stack: int) -> None:
    sources = {"main.c": MAIN, "unit.c": HANDLER, "leaf.c": LEAF, "caught.c": CAUGHT}
    project = Project(tmp_path / "p", sources)
    both = [project.object("leaf.c", ("n + 4", "n + 5")), project.object("caught.c", ("number + 1", "number + 2"))]
    with project.running() as program, patcher.attach(program.pid, active="refuse") as session:
        program.ask(other_stack)
        until(program, 2, "1")
        for file, name in zip(both, ("leaf", "caught"), strict=True):
            # `leaf` calls nothing: where it was interrupted is known from the frame of the signal only.
            with pytest.raises(UnsafeChange, match=rf"thread \d+ is in `{name}`"):
                session.apply(file)
        program.ask(3)
        if other_stack:  # what was called there is on it for ever, and that nobody uses it cannot be told
            with pytest.raises(UnsafeChange, match="a coroutine") as refused:
                session.apply(*both)
            assert "--no-coroutines" in refused.value.hint
        with patcher.attach(program.pid, active="refuse", coroutines=not other_stack) as last:
            assert last.apply(*both).number == 1
        assert_untouched(program.pid)


# --- coroutines ---

UCONTEXT = """\
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
int step(int n);
static ucontext_t main_context, contexts[3];
static int results[3], current;
static char fixed[65536];

static void body(void)
{
    int own = current;
    results[own] = step(own);
}
void yield(void)
{
    swapcontext(&contexts[current], &main_context);
}
int answer(int n)
{
    if (n < 3) {  /* begin one: its stack is malloc'ed, mapped, or static */
        size_t size = sizeof fixed;
        getcontext(&contexts[n]);
        contexts[n].uc_stack.ss_sp =
            n == 0 ? malloc(size) : n == 1 ? mmap(NULL, size, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) : fixed;
        contexts[n].uc_stack.ss_size = size;
        contexts[n].uc_link = &main_context;
        makecontext(&contexts[n], body, 0);
    }
    current = n % 10;
    swapcontext(&main_context, &contexts[current]);
    return results[current];
}
"""
HAND_MADE = """\
#include <stdlib.h>
#include <sys/mman.h>
int step(int n);
/* switch_to(save, to): keep what a call keeps on the stack, and change the stack */
void switch_to(void **save, void *to);
__asm__(".text\\n.globl switch_to\\n.type switch_to, @function\\nswitch_to:\\n"
        "push %rbp\\npush %rbx\\npush %r12\\npush %r13\\npush %r14\\npush %r15\\n"
        "mov %rsp, (%rdi)\\nmov %rsi, %rsp\\n"
        "pop %r15\\npop %r14\\npop %r13\\npop %r12\\npop %rbx\\npop %rbp\\nret\\n"
        ".size switch_to, .-switch_to\\n");
static void *main_stack, *stacks[3];
static int results[3], current;
static char fixed[65536] __attribute__((aligned(16)));
static void body(void)
{
    results[current] = step(current);
    switch_to(&stacks[current], main_stack);
    abort();
}
void yield(void)
{
    switch_to(&stacks[current], main_stack);
}
int answer(int n)
{
    current = n % 10;
    if (n < 3) {
        size_t size = sizeof fixed;
        char *low = n == 0 ? malloc(size) : n == 1 ? mmap(NULL, size, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) : fixed;
        void **top = (void **)(((size_t)low + size) & -16);
        *--top = 0;
        *--top = (void *)body;
        stacks[n] = top - 6;
    }
    switch_to(&main_stack, stacks[current]);
    return results[current];
}
"""
STEP = "void yield(void);\nint step(int n)\n{\n    int value = 100;\n    yield();\n    return value + n;\n}\n"


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["malloc", "mmap", "static"])
@pytest.mark.parametrize("switching", [UCONTEXT, HAND_MADE], ids=["ucontext", "hand-made"])
def test_coroutines_that_no_thread_runs(tmp_path: Path, switching: str, kind: int) -> None:
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": switching, "step.c": STEP})
    change = project.object("step.c", ("= 100", "= 200"))
    with project.running() as program, patcher.attach(program.pid) as session:
        program.ask(kind)
        with patcher.attach(program.pid, active="refuse") as strict:
            with pytest.raises(UnsafeChange, match=r"a coroutine \(stack at 0x[0-9a-f]+\) is in `step`"):
                strict.apply(change)
            assert strict.status().generation == 0
        patient = patcher.attach(program.pid, active="drain", timeout=0.1)
        with patient, pytest.raises(UnsafeChange, match=r"a coroutine \(stack at 0x[0-9a-f]+\) is in `step`"):
            patient.apply(change)
        generation = session.apply(change)
        assert [(f.function, f.thread) for f in generation.frames] == [("step", 0)]
        place = generation.frames[0].stack
        home = next(m for m in session.target.mappings() if place in m)
        assert home.writable
        assert home.path != "[stack]"
        assert (home.path == "[heap]") == (kind == 0)
        assert program.ask(kind + 10) == str(100 + kind), "it went on in the old code"
        assert_untouched(program.pid)


def test_a_change_of_what_no_coroutine_is_in(tmp_path: Path) -> None:
    """Or those above would show nothing: what is refused there is not refused for having coroutines."""
    other = "int other(int n)\n{\n    return n + 5;\n}\n"
    sources = {
        "main.c": MAIN,
        "unit.c": UCONTEXT,
        "step.c": STEP.replace("value + n", "value + other(n) - 5"),
        "o.c": other,
    }
    sources["step.c"] = "int other(int);\n" + sources["step.c"]
    project = Project(tmp_path / "p", sources)
    with project.running() as program, patcher.attach(program.pid, active="refuse") as session:
        for kind in (0, 1, 2):
            program.ask(kind)
        generation = session.apply(project.object("o.c", ("n + 5", "n + 15")))
        assert generation.number == 1
        assert generation.frames == ()
        assert program.ask(10) == "110"


RUNNING = """\
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
int enter(int n);
int work(int n);
int ends[2];
ucontext_t main_context, context;
static int result;
static void body(void)
{
    result = work(3);
}
int answer(int n)
{
    return enter(n);
}
int begin(void)
{
    char *stack = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED || pipe(ends))
        abort();
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = 65536;
    context.uc_link = &main_context;
    makecontext(&context, body, 0);
    swapcontext(&main_context, &context);
    return result;
}
"""
ENTER = "int begin(void);\nint enter(int n)\n{\n    return n + 1000 + begin();\n}\n"
BLOCKED = """\
#include <unistd.h>
extern int ends[2];
int work(int n)
{
    char byte;
    return read(ends[0], &byte, 1) * 10 + n;
}
"""


def test_a_thread_on_the_stack_of_a_coroutine_and_its_own_that_waits(tmp_path: Path) -> None:
    sources = {"main.c": MAIN, "unit.c": RUNNING, "enter.c": ENTER, "work.c": BLOCKED}
    project = Project(tmp_path / "p", sources)
    changes = {
        r"thread \d+ is in `work`": project.object("work.c", ("* 10", "* 30")),
        r"a coroutine \(stack at 0x7ff[0-9a-f]+\) is in `enter`": project.object("enter.c", ("+ 1000", "+ 3000")),
    }
    before = [project.object("work.c", ("* 10", "* 20")), project.object("enter.c", ("+ 1000", "+ 2000"))]
    with project.running() as program, patcher.attach(program.pid, active="refuse") as session:
        assert session.apply(*before).frames == ()
        program.tell(5)
        while not re.match("0 0x[3-9] ", Path(f"/proc/{program.pid}/syscall").read_text()):
            pass  # read(2) from a descriptor of its own
        for who, change in changes.items():
            with pytest.raises(UnsafeChange, match=who):
                session.apply(change)
        ending = os.open(f"/proc/{program.pid}/fd/4", os.O_WRONLY)
        os.write(ending, b"x")
        os.close(ending)
        assert program.line() == "2028"


def test_more_memory_than_can_be_looked_through(work: Project, change: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patcher.policy._LIMIT", 4096)
    with work.running() as program, patcher.attach(program.pid, active="drain") as session:
        with pytest.raises(UnsafeChange, match="too much to look") as refused:
            session.apply(change)
        assert "--no-coroutines" in refused.value.hint
        assert session.status().generation == 0
        with patcher.attach(program.pid, active="drain", coroutines=False) as without:
            assert without.apply(change).number == 1


# --- loops that do not return ---


def test_a_main_loop_is_told_as_such(tmp_path: Path) -> None:
    unit = "int answer(int n)\n{\n    return n + 1;\n}\n"
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": unit})
    change = project.object("main.c", ("return 7", "return 8"))
    with project.running() as program, patcher.attach(program.pid) as session:
        assert program.ask(1) == "2"
        generation = session.apply(change)
        assert [(f.function, f.thread, f.loops) for f in generation.frames] == [("main", program.pid, True)]
        with patcher.attach(program.pid, active="drain", timeout=0.1) as patient:
            with pytest.raises(UnsafeChange, match="a loop that does not return") as refused:
                patient.apply(project.object("main.c", ("return 7", "return 9")))
            assert "move the body of the loop in `main` into a function" in refused.value.hint
        assert program.ask(1) == "2"


def test_a_main_that_only_waits_once_is_no_loop(tmp_path: Path) -> None:
    """Its loop is over: what it is in now will return."""
    main = MAIN.replace("    return 7;", "    fgets(line, sizeof line, stdin);\n    return 7;").replace(
        "while (fgets(line, sizeof line, stdin))", "while (fgets(line, sizeof line, stdin) && *line != '.')"
    )
    project = Project(tmp_path / "p", {"main.c": main, "unit.c": "int answer(int n)\n{\n    return n + 1;\n}\n"})
    change = project.object("main.c", ("return 7", "return 8"))
    with project.running() as program, patcher.attach(program.pid) as session:
        program.ask(1)
        program.tell(".")
        while "pipe" not in Path(f"/proc/{program.pid}/wchan").read_text():
            pass
        generation = session.apply(change)
        assert [(f.function, f.loops) for f in generation.frames] == [("main", False)]


# --- without a pause ---


def test_later_patches_stop_no_thread(work: Project, tmp_path: Path) -> None:
    """Every request of the controller is seen, and none of them stops anything."""
    first, second = work.object("work.c", CHANGE), work.object("work.c", ("before = 1;", "before = 3;"))
    with work.running() as program:
        program.ask(0)
        until(program, 1, "2")
        assert "PTRACE_INTERRUPT" in _requests(program.pid, first, tmp_path / "first"), "the test sees nothing"
        assert "PTRACE" not in _requests(program.pid, second, tmp_path / "second")
        assert program.ask(2) == "1001"
        program.ask(0)
        assert program.ask(2) == "3001"
        assert "PTRACE_INTERRUPT" in _requests(program.pid, first, tmp_path / "third", "--consistency", "generation")


def _requests(pid: int, file: Path, log: Path, *options: str) -> str:
    command = [sys.executable, "-m", "patcher", "apply", str(pid), str(file), *options]
    subprocess.run(["strace", "-f", "-e", "trace=ptrace", "-o", str(log), *command], check=True, timeout=60)
    return log.read_text()


# --- functions that must agree ---

AGREE = """\
#include <pthread.h>
#include <unistd.h>
int first(void);
static volatile int stop, wrong, rounds;
static pthread_t threads[2];
static void *run(void *unused)
{
    while (!stop) {
        if (!first())
            __atomic_add_fetch(&wrong, 1, __ATOMIC_SEQ_CST);
        __atomic_add_fetch(&rounds, 1, __ATOMIC_SEQ_CST);
        for (volatile int i = 0; i < 100000; i++)
            ;
    }
    return unused;
}
int answer(int n)
{
    if (n == 0)
        for (int i = 0; i < 2; i++)
            pthread_create(&threads[i], NULL, run, NULL);
    return n == 2 ? rounds : wrong;
}
"""
FIRST = """\
int second(void);
int first(void)
{
    volatile int version = 1;
    for (volatile int i = 0; i < 100000; i++)
        ;
    return second() == version;
}
"""
SECOND = "int second(void)\n{\n    return 1;\n}\n"


def _disagreements(project: Project, **options: str) -> int:
    """How often two functions of different generations met, in twenty changes and as many ways back."""
    changes = [
        (project.object("first.c", ("version = 1", f"version = {n}")), project.object("second.c", ("1;", f"{n};")))
        for n in (2, 3)
    ]
    with project.running() as program, patcher.attach(program.pid, timeout=60, **options) as session:  # type: ignore[arg-type]
        program.ask(0)
        for turn in range(20):
            seen = int(program.ask(2))
            session.apply(*changes[turn % 2])
            while int(program.ask(2)) < seen + 4:
                pass
            if turn % 2:
                session.revert()
        assert_untouched(program.pid)
        return int(program.ask(1))


def test_functions_of_different_generations_meet_unless_they_must_not(tmp_path: Path) -> None:
    sources = {"main.c": MAIN, "unit.c": AGREE, "first.c": FIRST, "second.c": SECOND}
    project = Project(tmp_path / "p", sources)
    assert _disagreements(project) > 0, "the test sees nothing"
    assert _disagreements(project, consistency="generation") == 0


SUMS = """\
#include <pthread.h>
int added(int *step);
static volatile int rounds, wrong;
static int sum_is_of_one_step(int *step)
{
    int sum = added(step);
    return sum == *step * %d + %d;
}
static void *run(void *unused)
{
    for (int step;; rounds++) {
        if (!sum_is_of_one_step(&step))
            wrong++;
        for (volatile int i = 0; i < 10000; i++)
            ;
    }
    return unused;
}
int answer(int n)
{
    pthread_t thread;
    int step;
    if (n == 0)
        return pthread_create(&thread, 0, run, 0);
    if (n == 1)
        return sum_is_of_one_step(&step) ? step : -1;
    return n == 2 ? rounds : wrong;
}
"""
ADDED = """\
int added(int *step)
{
    int sum = 0;
    *step = STEP;
    for (int i = 0; i < %d; i++)
        sum += table[i](1);
    return sum;
}
"""


def test_slots_on_more_than_one_page(tmp_path: Path) -> None:
    """Their switches lead to old bodies until the last moment: nobody may be in one then."""
    count = 520
    table = "".join(f"int f{i}(int n)\n{{\n    return n * STEP + {i};\n}}\n" for i in range(count))
    names = ", ".join(f"f{i}" for i in range(count))
    project = Project(
        tmp_path / "p",
        {
            "main.c": MAIN,
            "unit.c": SUMS % (count, sum(range(count))),
            "table.c": f"#define STEP 1\n{table}static int (*const table[])(int) = {{{names}}};\n" + ADDED % count,
        },
    )
    edits = [project.object("table.c", ("#define STEP 1", f"#define STEP {n}")) for n in (3, 7)]
    with project.running() as program, patcher.attach(program.pid, force=True, active="drain", timeout=60) as session:
        program.ask(0)
        for step, file in zip((3, 7), edits, strict=True):
            assert len(session.apply(file).functions) == count + 1
            assert program.ask(1) == str(step)
        session.revert()
        assert program.ask(1) == "3"
        session.revert(0)
        assert program.ask(1) == "1"
        assert int(program.ask(2)) > 0, "the thread calls none of it"
        assert program.ask(3) == "0", "functions of different generations met"
        assert_untouched(program.pid)


def test_the_commands_have_the_policies(work: Project, change: Path) -> None:
    def patch(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "patcher", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    with work.running() as program:
        program.ask(0)
        until(program, 1, "2")
        pid = str(program.pid)
        refused = patch("apply", pid, str(change), "--active", "refuse")
        assert refused.returncode == 1
        assert "is in `outer`" in refused.stderr
        assert "after 0.1 s" in patch("apply", pid, str(change), "--active", "drain", "--timeout", "0.1").stderr
        assert patch("apply", pid, str(change), "--active", "sometimes").returncode == 2
        done = patch("apply", pid, str(change))
        assert done.returncode == 0
        assert "still in old code until it returns" in done.stderr
        assert "outer (thread" in done.stderr
        assert program.ask(2) == "1001"
        program.ask(0)
        until(program, 1, "2")
        refused = patch("revert", pid, "--active", "refuse")
        assert refused.returncode == 1
        assert "is in `outer`" in refused.stderr
        back = patch("revert", pid)
        assert back.returncode == 0
        assert "still in old code until it returns" in back.stderr
        assert program.ask(2) == "2001"


def test_a_choice_that_is_none(work: Project) -> None:
    with work.running() as program, pytest.raises(patcher.PatcherError, match="run-on, drain, refuse"):
        patcher.attach(program.pid, active="later")


SPIN = """\
#include <pthread.h>
int changed(int n);
static volatile int stop, started;
__attribute__((noinline)) void inside(void)
{
    while (!stop)
        started |= 1;
}
__attribute__((noinline)) void outside(void)
{
    while (!stop)
        started |= 2;
}
static void *run(void *inner)
{
    return inner ? inside() : outside(), inner;
}
int answer(int n)
{
    static pthread_t threads[2];
    for (long i = 0; n == 0 && i < 2; i++)
        pthread_create(&threads[i], 0, run, (void *)i);
    while (n == 0 && started != 3)
        ;
    return n;
}
"""


def test_a_computing_thread_that_was_not_in_old_code_is_not_stopped_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": SPIN})
    change = project.object("unit.c", ("started |= 1;", "started |= 5;"))
    sampled: list[int] = []
    sample = Target.sampled

    def watched(target: Target, tid: int) -> AbstractContextManager[StoppedThread]:
        sampled.append(tid)
        return sample(target, tid)

    with project.running() as program, patcher.attach(program.pid) as session:
        assert program.ask(0) == "0"
        monkeypatch.setattr(Target, "sampled", watched)
        done = session.apply(change)
        assert [f.function for f in done.frames] == ["inside"]
        assert set(sampled) == {f.thread for f in done.frames}
        assert len(session.target.threads()) == 3
        sampled.clear()
        session.revert(0)
        assert sampled == []  # whoever runs is in what is in use again
