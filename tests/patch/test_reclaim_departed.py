"""Old code is freed though a library that it belonged to was unloaded; who still can reach it finds it as it was."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from project import Project, Running, assert_untouched

import patcher
from patcher.patch.reclaim import Policy

CYCLES = 16
BULK = "    " + "bulk += 1;" * 1200 + "\n"  # more than what is treated as one piece of memory

MAIN = """\
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
int own(int n);
static int ends[2];
static volatile int waited;
static int (*waiting)(int);
static void *wait_inside(void *unused) { waited = waiting(ends[0]); return unused; }
int main(int count, char **words)
{
    char line[80];
    void *library = NULL;
    int (*answer)(int) = NULL, (*kept)(int) = NULL;
    int (*(*give)(void))(int);
    pthread_t thread;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (pipe(ends))
        return 1;
    puts(count > 1 ? "ready" : "");
    while (fgets(line, sizeof line, stdin)) {
        switch (*line) {
        case 'o':
            library = dlopen(words[1], RTLD_NOW);
            answer = (int (*)(int))dlsym(library, "answer");
            puts("open");
            break;
        case 'c': printf("%d\\n", dlclose(library)); break;
        case 'v': printf("%d\\n", answer(1)); break;
        case 'n': printf("%d\\n", own(1)); break;
        case 't':
            waiting = (int (*)(int))dlsym(library, "waiting");
            pthread_create(&thread, NULL, wait_inside, NULL);
            puts("waits");
            break;
        case 'e': write(ends[1], "x", 1); pthread_join(thread, NULL); printf("%d\\n", waited); break;
        case 'k':
            give = (int (*(*)(void))(int))dlsym(library, "give");
            kept = give();
            puts(kept ? "kept" : "none");
            break;
        case 'p': printf("%d\\n", kept(1)); break;
        }
    }
    return 7;
}
"""
LIBRARY = f"""\
#include <unistd.h>
static volatile int bulk;
int answer(int n)
{{
{BULK}    return n + 100;
}}
int waiting(int fd)
{{
    char byte;
    while (read(fd, &byte, 1) != 1)
        ;
    return 100;
}}
int (*give(void))(int)
{{
    bulk += 1;
    return 0;
}}
"""
# Of the function that is new only its address is kept; it calls another, which nobody has an address of.
BY_POINTER = """\
static __attribute__((noinline, noclone)) int called_only(int n) { return n * TIMES; }
static __attribute__((noinline, noclone)) int by_pointer(int n) { return called_only(n) + ANSWER; }
int (*give(void))(int)
"""
OWN = f"static volatile int bulk;\nint own(int n)\n{{\n{BULK}    return n + 100;\n}}\n"


def loading(root: Path) -> Project:
    """A program that is not linked with its library: it is unloaded when it is closed."""
    project = Project(root, {"main.c": MAIN, "own.c": OWN, "lib.c": LIBRARY}, shared=("lib.c",))
    subprocess.run(["gcc", "-o", "program", "main.o", "own.o", "-pthread"], cwd=project.root, check=True)
    return project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return loading(tmp_path_factory.mktemp("departed") / "p")


@pytest.fixture(scope="module")
def changes(project: Project) -> list[Path]:
    """Versions of the library in which every function is another one, and which have two more."""
    found = []
    for i in (200, 300):
        new = BY_POINTER.replace("ANSWER", str(i)).replace("TIMES", str(i // 100))
        edits = [("n + 100", f"n + {i}"), ("return 100", "return called_only(100)"), ("return 0", "return by_pointer")]
        declared = ("static volatile", "static int called_only(int n);\nstatic volatile")
        found.append(project.object("lib.c", declared, *edits, ("int (*give(void))(int)\n", new)))
    return found


@pytest.fixture(scope="module")
def own(project: Project) -> list[Path]:
    return [project.object("own.c", ("n + 100", f"n + {i}")) for i in (200, 300)]


def used(session: patcher.Session) -> tuple[int, int, int]:
    """Return how far the arenas' code and slots reach, and the bytes of the journal."""
    ledger = session.ledger
    ledger.refresh()
    assert ledger.primary is not None
    journal = ledger.usages[ledger.primary.base].journal
    journal -= ledger.primary.journal_part(journal)[0]
    usages = ledger.usages.values()
    return sum(u.code for u in usages), sum(u.slots for u in usages), journal


def cycle(program: Running, session: patcher.Session, changes: list[Path], own: list[Path], count: int) -> None:
    for i in range(count):
        program.ask("o")
        session.apply(changes[i % 2])
        assert program.ask("v") == str((201, 301)[i % 2])
        session.apply(own[i % 2])
        assert program.ask("c") == "0"
        session.apply(own[1 - i % 2])
        assert program.ask("n") == str((301, 201)[i % 2])


def test_a_library_that_comes_and_goes(project, changes, own):
    """The code of a copy that has gone is used again, and its records are forgotten."""
    with project.running(str(project.root / "libpart.so")) as program, patcher.attach(program.pid) as session:
        session.policy = Policy(keep=3, enough=1 << 10, poison=True)
        cycle(program, session, changes, own, 8)
        code, slots, _ = used(session)
        cycle(program, session, changes, own, CYCLES)
        later, still, journal = used(session)
        assert later - code < 64 << 10, "what is free is not used again"
        assert still == slots
        assert journal < 32 << 10
        status = session.status()
        taken = sum(o.text + o.read_only + o.data + o.cells + o.islands for o in status.objects)
        assert taken == sum(arena.used for arena in status.arenas)
        assert session.ledger.journal.free
        session.revert(0)
        assert program.ask("n") == "101"
        program.ask("o")
        assert program.ask("v") == "101"
        assert_untouched(program.pid)


@pytest.mark.parametrize("patches", [1, 2])
def test_what_can_be_reached_of_one_that_has_gone_stays(project, changes, own, patches):
    """A thread in its code, what that calls, and a pointer to a function that a patch brought."""
    with project.running(str(project.root / "libpart.so")) as program, patcher.attach(program.pid) as session:
        session.policy = Policy(keep=3, enough=1 << 10, poison=True)
        program.ask("o")
        session.apply(changes[0])
        program.ask("t")
        (thread,) = {int(tid) for tid in os.listdir(f"/proc/{program.pid}/task")} - {program.pid}
        while not Path(f"/proc/{program.pid}/task/{thread}/syscall").read_text().startswith("0 "):  # read
            pass
        if patches == 1:
            assert program.ask("k") == "kept"
        else:
            session.apply(changes[1])  # which the thread calls, from what it is in, through an island
        assert program.ask("c") == "0"
        cycle(program, session, changes, own, 8)
        assert session.ledger.journal.free, "nothing was freed"
        assert patches == 2 or program.ask("p") == "202"
        assert program.ask("e") == str(100 * (patches + 1))


def test_once_nobody_can_reach_it_any_more_it_is_free(project, changes, own):
    with project.running(str(project.root / "libpart.so")) as program, patcher.attach(program.pid) as session:
        session.policy = Policy(keep=2, enough=1, poison=True)
        program.ask("o")
        session.apply(changes[0])
        bodies = {body for _, _, body in session.ledger.journal.generations[1].bodies}
        assert len(bodies) >= 4
        assert program.ask("c") == "0"
        for i in range(8):
            session.apply(own[i % 2])
        memory = session.target.memory
        assert {memory.read(body, 1) for body in bodies} <= {b"\xcc"} or _taken(session, bodies)
        assert not bodies & set(session.ledger.view().bodies.values())


def _taken(session: patcher.Session, bodies: set[int]) -> bool:
    """Tell whether all bodies are in memory that is free, or in use by a later generation."""
    journal = session.ledger.journal
    extents = [*journal.free, *((s.start, s.end) for g in journal.generations.values() for s in g.stretches)]
    later = [s for g in journal.generations.values() for s in g.stretches if s.generation > 1]
    inside = all(any(a <= body < b for a, b in extents) for body in bodies)
    return inside and all(s.generation > 1 for s in later)
