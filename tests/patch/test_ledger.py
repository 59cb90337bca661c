"""Generations in a real process: made live, taken back, counted, and read by others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from project import MAIN, Project, assert_untouched, image_bytes

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
        with patcher.attach(program.pid) as session:
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
