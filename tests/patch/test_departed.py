"""Libraries that come and go while they are patched: their patches go with them, and nothing else does."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import Project, Running, assert_untouched

import patcher
from patcher.errors import PatcherError, UnsafeChange
from patcher.patch import ledger as ledgers
from patcher.report import Note

MAIN = """\
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
int own(int n);
int main(int count, char **words)
{
    char line[80], *where = NULL;
    void *library = NULL;
    int (*answer)(int) = NULL;
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts(count > 1 ? "ready" : "");
    while (fgets(line, sizeof line, stdin)) {
        if (!strcmp(line, "open\\n")) {
            library = dlopen(words[1], RTLD_NOW);
            answer = (int (*)(int))dlsym(library, "answer");
            printf("%d\\n", where == (char *)answer);
            where = (char *)answer;
        } else if (!strcmp(line, "close\\n")) {
            printf("%d\\n", dlclose(library));
            answer = NULL;
        } else if (!strcmp(line, "occupy\\n")) { /* the page that the function was in */
            where = (char *)((long)where & -4096);
            printf("%d\\n", mmap(where, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == where);
        } else if (!strcmp(line, "own\\n"))
            printf("%d\\n", own(1));
        else
            printf("%d\\n", answer ? answer(atoi(line)) : -1);
    }
    return 7;
}
"""
LIBRARY = """\
static int calls;
int answer(int n)
{
    calls++;
    return n + 1000 * calls;
}
"""
OWN = "int counted;\nint own(int n)\n{\n    counted++;\n    return n + 4;\n}\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    sources = {"main.c": MAIN, "own.c": OWN, "lib.c": LIBRARY}
    project = Project(tmp_path_factory.mktemp("departed") / "p", sources, shared=("lib.c",))
    # The program is not linked with the library: it is unloaded when it is closed.
    subprocess.run(["gcc", "-o", "program", "main.o", "own.o", "-Wl,-z,now"], cwd=project.root, check=True)
    return project


@pytest.fixture(scope="module")
def changes(project: Project) -> list[Path]:
    """Versions of the library that answer n + 10, n + 20 ... more than the original."""
    return [project.object("lib.c", ("n + 1000", f"n + {10 * i} + 1000")) for i in (1, 2, 3)]


@pytest.fixture(scope="module")
def own(project: Project) -> Path:
    return project.object("own.c", ("n + 4", "n + 40"))


@pytest.fixture
def program(project: Project) -> Iterator[Running]:
    with project.running(str(project.root / "libpart.so")) as program:
        program.ask("open")
        yield program


class Told:
    """What a session says."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def emit(self, event: object) -> None:
        if isinstance(event, Note):
            self.notes.append(event.text)


def names(session: patcher.Session) -> list[str]:
    return [f.name for f in session.status().functions]


@pytest.mark.parametrize("moved", [False, True], ids=["to the same place", "elsewhere"])
@pytest.mark.parametrize("same_session", [True, False])
def test_a_patch_goes_with_its_library_and_can_be_made_anew(program, changes, own, moved, same_session):
    with patcher.attach(program.pid) as first:
        first.apply(changes[0])
        first.apply(own)
        assert program.ask(5) == "1015"
        assert program.ask("own") == "41"
        assert program.ask("close") == "0"
        assert names(first) == ["own"]
        with pytest.raises(PatcherError) as caught:
            first.apply(changes[1])
        assert caught.value.code == "not-in-process"
        if moved:
            assert program.ask("occupy") == "1"
        assert program.ask("open") == ("0" if moved else "1")
        assert program.ask(5) == "1005", "a fresh copy of the library"
        with first if same_session else patcher.attach(program.pid) as session:
            assert names(session) == ["own"]
            # What was applied last is applied again: it is not what runs.
            assert [f.name for f in session.apply(changes[0]).functions] == ["answer"]
            assert program.ask(5) == "2015"
            session.apply(changes[1])
            assert program.ask(5) == "3025"
            assert names(session).count("answer") == 1
            assert session.revert() == 3
            assert program.ask(5) == "4015"
            assert program.ask("own") == "41"
            session.revert(1)  # of the copy that has gone nothing comes back
            assert program.ask(5) == "5005"
            assert program.ask("own") == "5"
            session.revert(4)
            assert program.ask(5) == "6025"
            session.revert(0)
            assert program.ask(5) == "7005"
            assert program.ask("own") == "5"
            assert_untouched(program.pid)


def test_it_is_said_once(program, changes, own):
    with patcher.attach(program.pid) as session:
        session._reporter = told = Told()
        session.apply(changes[0])
        program.ask("close")
        session.apply(own)
        session.revert()
        assert len(told.notes) == 1
        assert "libpart.so was unloaded" in told.notes[0]


def test_a_library_closed_for_good_is_no_obstacle_to_anything(program, changes, own):
    with patcher.attach(program.pid) as session:
        session.apply(changes[0], own)
        program.ask("close")
        assert program.ask("occupy") == "1"
        session.revert(0)
        assert program.ask("own") == "5"
        session.revert(1)
        assert program.ask("own") == "41"
        session.revert(0)
        session.apply(own)
        assert program.ask("own") == "41"
        assert_untouched(program.pid)


def test_a_library_that_was_built_anew_meanwhile_is_another_one(project, tmp_path, changes):
    copy = tmp_path / "libpart.so"
    copy.write_bytes((project.root / "libpart.so").read_bytes())
    with project.running(str(copy)) as program, patcher.attach(program.pid, force=True) as session:
        program.ask("open")
        session.apply(changes[0])
        session.revert(0)
        assert names(session) == ["answer"]
        program.ask("close")
        command = ["gcc", "-shared", "-fPIC", "-O1", "-g", "-o", str(copy), str(project.sources / "lib.c")]
        subprocess.run(command, check=True)
        program.ask("open")
        assert names(session) == []
        session.apply(changes[1])
        assert program.ask(5) == "1025"


@pytest.mark.parametrize("reopened", [False, True])
@pytest.mark.parametrize(
    ("moment", "patched_before"), [("written", False), ("written", True), ("flipped", False)]
)  # a later patch is one write of the slots: between the last check and that, nothing could be refused any more
def test_unloaded_between_the_match_and_the_flip(program, changes, monkeypatch, moment, patched_before, reopened):
    """`moment`: before anything is written, or right before the flip, behind all that is checked before it."""
    with patcher.attach(program.pid) as session:
        if patched_before:
            session.apply(changes[2])
        generation = session.status().generation

        def unload():
            assert program.ask("close") == "0"
            assert program.ask("occupy") == "1"
            if reopened:
                program.ask("open")

        commit, flip = ledgers.Ledger.commit, ledgers.flip
        if moment == "written":
            monkeypatch.setattr(ledgers.Ledger, "commit", lambda *a, **k: (unload(), commit(*a, **k))[1])
        else:
            monkeypatch.setattr(ledgers, "flip", lambda *a, **k: (unload(), flip(*a, **k))[1])
        with pytest.raises(UnsafeChange, match=r"libpart\.so was unloaded") as caught:
            session.apply(changes[0])
        monkeypatch.undo()
        assert caught.value.code == "unloaded"
        assert session.status().generation == generation
        assert names(session) == []
        assert program.ask(5) == ("1005" if reopened else "-1")
        if not reopened:
            program.ask("open")
            assert program.ask(5) == "1005"
        session.apply(changes[0])
        assert program.ask(5) == "2015"
        assert_untouched(program.pid)
