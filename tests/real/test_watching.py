"""A day of work in watch mode on programs as people have them, which tell nobody how they are compiled.

A header that several units include is edited, then a source does not compile and is mended, then all is put back, and
edited again: each time the running program has the new answers, and none but those that should be others. At the end it
answers as a cold build of the same sources does.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from .conftest import built_tree
from .patcherctl import PATCHER, Controller, attached_only, spawned, timings, watching
from .programs import until
from .trees import Tree, cold, restored
from .watched import IN_MEMCACHED, IN_REDIS, PROGRAMS, Edit, Place, Program, free_port, pages

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

SECONDS = 300  # for a header of many units, on processors that are busy
Answers = dict[str, str]
Ask = Callable[[], Answers]


def rows() -> Iterator[object]:
    """All programs; in the short form (PATCHER_REAL=short, as .ci/run has it) those whose builds do not take long."""
    for program in PROGRAMS:
        long = program in (IN_REDIS, IN_MEMCACHED) and os.environ.get("PATCHER_REAL") == "short"
        marks = [pytest.mark.skip(reason="its builds take minutes: in the whole `make real`")] if long else []
        yield pytest.param(program, id=program.name, marks=marks)


@pytest.mark.parametrize("program", tuple(rows()))
def test_the_day(program: Program, tmp_path: Path) -> None:
    tree = restored(built_tree(program.recipe))
    assert commands_from(program, tree), f"nothing is like {program.commands_from}"
    try:
        with pages() as port:
            with watched(program, tree, Place(tmp_path, free_port(), port)) as (patcher, ask):
                answers = work(program, tree, patcher, ask)
            anew = cold(tree, tmp_path / "cold")
            with alone(program, anew, Place(anew.root, free_port(), port)) as ask:
                assert ask() == answers
    finally:
        restored(tree)


def work(program: Program, tree: Tree, patcher: Controller, ask: Ask) -> Answers:
    """Make the edits, and return the answers of the last."""
    first = ask()
    header, mended = program.header, program.mended

    tree.edit(header.file, header.old, header.new)
    generation = applied(patcher, "the header")
    assert program.units <= units_of(generation, patcher), "not all in one generation"
    assert_changed(first, ask(), header)

    line = line_of(tree, program.broken)
    tree.edit(program.broken.file, program.broken.old, program.broken.new)
    diagnostics = patcher.build_failed(SECONDS)["diagnostics"]
    place = f"{Path(mended.file).name}:{line}:"
    assert place in diagnostics
    assert place in patcher.said()
    assert_changed(first, ask(), header)
    tree.edit(mended.file, mended.old, mended.new)
    applied(patcher, "the mended")
    both = ask()
    assert_changed(first, both, header, mended)

    put_back(tree, header.file)
    applied(patcher, "the header put back")
    assert_changed(first, ask(), mended)
    put_back(tree, mended.file)
    applied(patcher, "the source put back")
    assert ask() == first

    tree.edit(program.broken.file, program.broken.old, mended.new)
    applied(patcher, "the source again")
    tree.edit(header.file, header.old, header.new)
    applied(patcher, "the header again")
    assert ask() == both
    return both


def commands_from(program: Program, tree: Tree) -> bool:
    """Tell whether `patcher doctor` finds the commands of the program's units where they are expected to be."""
    command = [*PATCHER, "doctor", str(tree.program), "--json", *watching(tree.watched)]
    told = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    ours = [unit["command"] for unit in told["units"] if Path(unit["file"]).name in program.units]
    # a program without debug information does not tell its units
    places = ours or [f["message"] for f in told["findings"] if f["topic"] == "commands"]
    return all(re.search(program.commands_from + "$", place) for place in places)


def applied(patcher: Controller, what: str) -> int:
    """Wait for one generation; return its number."""
    generations = patcher.applied([], SECONDS)
    print(f"{what}: {timings(generations)}")
    return int(generations[-1]["generation"])


def units_of(generation: int, patcher: Controller) -> set[str]:
    """Return the names of the units with functions of a generation, as `patcher status` has them."""
    command = [*PATCHER, "status", str(patcher.pid), "--json"]
    told = subprocess.run(command, capture_output=True, check=True).stdout
    return {Path(f["file"]).name for f in json.loads(told)["functions"] if f["generation"] == generation}


def assert_changed(first: Answers, now: Answers, *edits: Edit) -> None:
    """Every answer is as at the first, save those that the edits change, each to what the edit says."""
    new: Mapping[str, str] = {question: part for edit in edits for question, part in edit.answers.items()}
    assert {q: a for q, a in now.items() if q not in new} == {q: a for q, a in first.items() if q not in new}
    assert [(q, now[q]) for q, part in new.items() if part not in now[q]] == []
    assert [(q, first[q]) for q, part in new.items() if part in first[q]] == []


def line_of(tree: Tree, edit: Edit) -> int:
    text = (tree.root / edit.file).read_text()
    return text[: text.index(edit.old)].count("\n") + 1


def put_back(tree: Tree, file: str) -> None:
    """Save a file with its first text, as an editor does: with the time of now."""
    saved = (tree.root / file).with_suffix(".saving")
    saved.write_bytes((tree.pristine / file).read_bytes())
    saved.replace(tree.root / file)


@contextlib.contextmanager
def watched(program: Program, tree: Tree, place: Place) -> Iterator[tuple[Controller, Ask]]:
    """Run a program with a patcher that watches its sources: one that starts it, or one that comes to it."""
    command = [str(tree.program), *map(str, program.arguments(place))]
    if program.spawned:
        with spawned(command, tree.watched, place.directory) as patcher:
            yield patcher, asking(program, patcher.process, place)
    else:
        with started(command) as process:
            ask = asking(program, process, place)
            with attached_only(process.pid, tree.watched, place.directory) as patcher:
                yield patcher, ask


@contextlib.contextmanager
def alone(program: Program, tree: Tree, place: Place) -> Iterator[Ask]:
    with started([str(tree.program), *map(str, program.arguments(place))]) as process:
        yield asking(program, process, place)


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def asking(program: Program, process: subprocess.Popen[bytes], place: Place) -> Ask:
    """Wait until a program answers; return what asks it all questions."""

    def ask() -> Answers:
        return {question: program.ask(process, place, question) for question in program.all_questions}

    until(ask, 20, f"answers of {program.name}")
    return ask
