"""Generations in a real process: made live, taken back, counted, and read by others."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from project import MAIN, SECTIONS, Project, assert_untouched, image_bytes

import patcher
from patcher.errors import UnsafeChange

VALUE = "n + 1000 * calls"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("project") / "p")


@pytest.fixture(scope="module")
def objects(project: Project) -> list[Path]:
    """Three versions of the unit, which answer 1, 2 and 3 beside the number of calls."""
    return [project.object("unit.c", (VALUE, f"{n} + 1000 * calls")) for n in (1, 2, 3)]


def test_every_generation_can_be_gone_back_to(project, objects):
    with project.running() as program, patcher.attach(program.pid) as session:
        assert program.ask(5) == "1005"
        assert [session.apply(o).number for o in objects] == [1, 2, 3]
        calls = 1
        for generation, answer in [(3, 3), (1, 1), (2, 2), (3, 3), (2, 2), (0, 5), (2, 2), (0, 5), (3, 3), (1, 1)]:
            assert session.revert(generation) == generation
            assert session.status().generation == generation
            calls += 1
            assert program.ask(5) == str(answer + 1000 * calls)
        assert_untouched(program.pid)


def test_revert_without_a_number_goes_to_the_parent(project, objects):
    with project.running() as program, patcher.attach(program.pid) as session:
        for o in objects[:2]:
            session.apply(o)
        session.revert(1)
        assert session.apply(objects[2]).number == 3
        assert session.revert() == 1
        assert program.ask(5) == "1001"
        assert session.revert() == 0
        assert program.ask(5) == "2005"
        with pytest.raises(UnsafeChange, match="nothing to revert"):
            session.revert()


def test_a_generation_that_is_not_recorded(project, objects):
    with project.running() as program, patcher.attach(program.pid) as session:
        session.apply(objects[0])
        with pytest.raises(UnsafeChange, match="generation 9 is not recorded") as caught:
            session.revert(9)
        assert caught.value.code == "no-such-generation"
        assert program.ask(5) == "1001"


def test_after_revert_0_every_byte_is_what_it_was(tmp_path):
    """Text, and the GOT cells of a library's functions that the program calls, also when some are patched again."""
    library = "int shared(int n)\n{\n    return n + 1;\n}\nint other(int n)\n{\n    return shared(n) + 5;\n}\n"
    unit = "int shared(int);\nint other(int);\nint answer(int n)\n{\n    return shared(n) + other(n);\n}\n"
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": unit, "lib.c": library}, shared=("lib.c",))
    change = project.object("lib.c", ("return n + 1;", "return n + 100;"))
    with project.running() as program, patcher.attach(program.pid) as session:
        before = image_bytes(program.pid)
        assert program.ask(1) == "9"
        for _ in range(3):
            assert session.apply(change).functions
            assert image_bytes(program.pid) != before
            assert program.ask(1) == "207"
            session.revert(0)
            assert image_bytes(program.pid) == before
            assert program.ask(1) == "9"


def test_two_hundred_generations_in_a_row(project, objects):
    with project.running() as program:
        with patcher.attach(program.pid, keep=100) as session:
            for count in range(200):
                generation = session.apply(objects[count % 3])
                assert generation.number == count + 1
                assert (generation.timings.stop > 0) == (count == 0), "only a function's first patch needs a stop"
            used = session.status().arenas[0].used
            assert used < 200 * 4096
        assert program.ask(5) == "1002"
        with patcher.attach(program.pid) as session:
            assert session.status().recorded == tuple(range(1, 201))
            session.revert(100)
            assert program.ask(5) == "2001"
            session.revert(0)
        assert program.ask(5) == "3005"


def test_the_state_is_read_from_the_process_itself(project, objects):
    """Another process that knows nothing sees the same, and goes on."""
    with project.running() as program:
        with patcher.attach(program.pid) as session:
            session.apply(objects[0])
            ours = session.status()
        command = [sys.executable, "-m", "patcher"]
        seen = subprocess.run([*command, "status", str(program.pid), "--json"], capture_output=True, check=True)
        theirs = json.loads(seen.stdout)
        (function,) = theirs["functions"]
        assert (theirs["generation"], function["name"], function["generation"]) == (1, "answer", 1)
        assert function["current"] == ours.functions[0].current != function["original"]
        subprocess.run([*command, "apply", str(program.pid), str(objects[1])], capture_output=True, check=True)
        assert program.ask(5) == "1002"
        with patcher.attach(program.pid) as session:
            assert session.status().generation == 2


FAR = """\
#include <stdio.h>
#include <stdlib.h>
static int calls;
static const char *const words[] = {"one", "two", "three"};
int answer(int n)
{
    static int kept = 3;
    calls++;
    printf("%s", words[n % 3] + 5);
    return n + abs(rand()) + kept++ + 1000 * calls;
}
"""


def test_every_byte_of_an_arena_is_some_object_s(tmp_path):
    """Two units of the program, a library far away (its own arena), an archive, several generations of each."""
    sources = {
        "main.c": MAIN,
        "unit.c": "int other(int n);\nint lib(int n);\nint answer(int n) { return other(n) + lib(n); }\n",
        "other.c": "int other(int n) { return n ? n * 2 : 7; }\n",
        "lib.c": "int lib(int n) { return n * n + 1; }\n",
    }
    project = Project(tmp_path / "p", sources, shared=("lib.c",))
    far = tmp_path / "far.c"
    far.write_text(FAR.replace("answer(", "other(").replace("calls", "times"))
    subprocess.run(["gcc", "-O2", "-g", *SECTIONS, "-c", str(far), "-o", str(tmp_path / "other.o")], check=True)
    subprocess.run(["ar", "rcs", str(tmp_path / "libmore.a"), str(tmp_path / "other.o")], check=True)
    with project.running() as program, patcher.attach(program.pid, force=True) as session:
        assert session.status().objects == ()
        taken = []
        for files in (
            [project.object("unit.c", ("return other", "return 1 + other"))],
            [tmp_path / "libmore.a", project.object("lib.c", ("n * n", "n * n * n"))],
            [project.object("unit.c", ("return other", "return 2 + other")), tmp_path / "libmore.a"],
        ):
            session.apply(*files)
            status = session.status()
            taken.append(sum(o.text + o.read_only + o.data + o.cells + o.islands for o in status.objects))
            assert taken[-1] == sum(a.used for a in status.arenas)
        assert taken == sorted(set(taken)), "each generation takes some"
        member = next(o for o in status.objects if o.object == f"{tmp_path}/libmore.a(other.o)")
        assert all((member.text, member.read_only, member.data, member.islands))
        assert len(status.arenas) == 2
        assert len(status.objects) == 4
        command = [sys.executable, "-m", "patcher", "status", str(program.pid)]
        told = subprocess.run([*command, "-v"], capture_output=True, check=True, text=True).stdout
        assert f"libmore.a(other.o) {member.text:9} {member.read_only:9}" in told
        assert sum(map(int, told.splitlines()[-1].split()[1:])) == taken[-1]
        read = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True).stdout)
        assert read["objects"] == [dataclasses.asdict(o) for o in status.objects]
