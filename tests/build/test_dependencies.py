"""Who includes what: from the records of real builds, and from the compiler."""

from __future__ import annotations

import os
import shlex
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from patcher.build import BuildCancelled, CompileCommand, Compiler, Dependencies, Gathering
from patcher.build.dependencies import beside_object, noted_by_ninja, prerequisites

from .conftest import run

UNIT = ("gcc", "-Iinclude", "-c", "src/unit.c", "-o", "unit.o")


def command(project: Path, *arguments: str, file: str = "src/unit.c") -> CompileCommand:
    return CompileCommand(project, arguments or UNIT, project / file, "test")


def own(files: Sequence[Path] | frozenset[Path], project: Path) -> set[str]:
    """Return those of some files that are the project's."""
    return {str(f.relative_to(project)) for f in files if f.is_relative_to(project)}


HEADERS = {"src/unit.c", "src/beside.h", "include/sub/wide.h"}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("u.o: u.c a.h \\\n  sub/b.h\n", ["u.c", "a.h", "sub/b.h"]),
        ("u.o: u.c my\\ header.h a\\#b.h p$$q.h\n", ["u.c", "my header.h", "a#b.h", "p$q.h"]),
        ("u.o: u.c a.h\n\na.h:\n", ["u.c", "a.h"]),
        ("sub/u.o u.d: u.c /abs/../x.h\r\n", ["u.c", "/x.h"]),
        ("u.o: \\\r\n u.c\r\n", ["u.c"]),
        ("u.o: u.c back\\slash.h", ["u.c", "back\\slash.h"]),
        ("", []),
    ],
)
def test_dependency_files_as_make_reads_them(tmp_path: Path, text: str, names: list[str]) -> None:
    assert prerequisites(text, tmp_path) == tuple(tmp_path / name for name in names)


def test_a_name_that_is_a_link_leads_to_the_file(project: Path) -> None:
    (project / "src/link.h").symlink_to(project / "include/sub/wide.h")
    assert prerequisites("u.o: src/link.h", project) == (project / "include/sub/wide.h",)


@pytest.mark.parametrize("where", ["-MD", "-MMD", "-MD -MF odd.dep", "-MD -MFodd.dep", "-MMD -MF .deps/unit.Po"])
def test_what_the_users_build_left_beside_the_object(project: Path, where: str) -> None:
    (project / ".deps").mkdir()
    words = (*UNIT, *shlex.split(where))
    assert beside_object(command(project, *words)) is None
    run(*words, cwd=project)
    # automake names the file in its makefile only
    found = beside_object(command(project) if ".Po" in where else command(project, *words))
    assert found is not None
    assert own(found.files, project) == HEADERS
    assert found.is_current()


@pytest.mark.parametrize("name", ["src/unit.c", "src/beside.h"])
def test_a_record_is_of_no_use_once_something_is_newer(project: Path, name: str) -> None:
    run(*UNIT, "-MD", cwd=project)
    record = beside_object(command(project))
    assert record is not None
    assert record.is_current()
    later = record.written + 1
    os.utime(project / name, ns=(later, later))
    assert not record.is_current()
    (project / name).unlink()
    assert not record.is_current()


NINJA = """\
rule cc
  command = gcc -Iinclude -MD -MF $out.d -c $in -o $out
  deps = gcc
  depfile = $out.d
build unit.o: cc src/unit.c
"""


def test_what_ninja_noted_and_its_log_stays_as_it_is(project: Path) -> None:
    assert noted_by_ninja(project) == {}
    (project / "build.ninja").write_text(NINJA)
    run("ninja", cwd=project)
    before = (project / ".ninja_deps").stat()
    found = noted_by_ninja(project)
    after = (project / ".ninja_deps").stat()
    assert (before.st_mtime_ns, before.st_size, before.st_ino) == (after.st_mtime_ns, after.st_size, after.st_ino)
    assert own(found[project / "unit.o"].files, project) == HEADERS
    assert found[project / "unit.o"].is_current()


def test_our_own_compile_says_what_it_read(project: Path, compiler: Compiler) -> None:
    unit = compiler.compile(command(project))
    known = Dependencies()
    known.learn_listing(project / "src/unit.c", unit.listing, project)
    assert known.knows(project / "src/unit.c")
    assert own(known.of(project / "src/unit.c"), project) == HEADERS
    assert known.includers(project / "src/beside.h") == {project / "src/unit.c"}
    assert known.includers(project / "src/unit.c", new=True) == frozenset(), "a unit does not include itself"


def test_a_header_that_nobody_includes_may_come_before_another_of_its_name(tmp_path: Path) -> None:
    known = Dependencies()
    known.learn_listing(tmp_path / "a.c", "a.o: a.c /usr/include/config.h", tmp_path)
    known.learn_listing(tmp_path / "b.c", "b.o: b.c", tmp_path)
    assert known.includers(tmp_path / "config.h", new=True) == {tmp_path / "a.c"}
    assert known.includers(tmp_path / "config.h") == frozenset(), "it was there, and nobody found it"
    assert known.includers(tmp_path / "other.h", new=True) == frozenset()


def test_what_a_compile_said_is_not_replaced_by_older_records(tmp_path: Path) -> None:
    known = Dependencies()
    unit = tmp_path / "a.c"
    known.learn_listing(unit, "a.o: a.c new.h", tmp_path)
    known.learn_first(unit, [unit, tmp_path / "old.h"])
    assert known.of(unit) == {unit, tmp_path / "new.h"}
    known.learn_listing(unit, "a.o: a.c newer.h", tmp_path)
    assert known.of(unit) == {unit, tmp_path / "newer.h"}


class Gathered:
    """A gathering whose compilers leave a line each in `log`, and wait for `gate` where there is one."""

    def __init__(self, project: Path, count: int) -> None:
        self.project = project
        self.log = project / "log"
        self.gate = project / "gate"
        self.log.touch()
        wrapper = project / "gcc"
        wrapper.write_text(
            f'#!/bin/sh\necho "$(ps -o ni= -p $$) $*" >>{self.log}\n'
            f"if [ -p {self.gate} ]; then read go <{self.gate}; fi\n"
            'exec /usr/bin/env gcc "$@"\n'
        )
        wrapper.chmod(0o755)
        self.units = []
        for number in range(count):
            file = project / f"src/unit{number}.c"
            file.write_text('#include "beside.h"\n' if number % 2 else "int x;\n")
            self.units.append(command(project, str(wrapper), "-c", f"src/unit{number}.c", file=f"src/unit{number}.c"))
        self.dependencies = Dependencies()
        self.gathering = Gathering(self.dependencies, lambda: tuple(self.units))

    def asked(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def gathered(project: Path) -> Iterator[Gathered]:
    found = Gathered(project, 4)
    yield found
    found.gathering.close()


def test_who_asks_gets_to_know_of_all(gathered: Gathered) -> None:
    said: list[int] = []
    with gathered.gathering.held():
        gathered.gathering.start()
        gathered.gathering.complete(say=said.append)
    assert said == [4]
    included = gathered.dependencies.includers(gathered.project / "src/beside.h")
    assert {f.name for f in included} == {"unit1.c", "unit3.c"}
    assert len(gathered.asked()) == 4
    gathered.gathering.complete(say=said.append)
    assert said == [4], "nothing is asked twice"


def test_in_the_background_at_the_lowest_priority(gathered: Gathered) -> None:
    gathered.gathering.start()
    never = threading.Event()
    while not all(gathered.dependencies.knows(c.file) for c in gathered.units):
        never.wait(0.01)
    assert [line.split()[0] for line in gathered.asked()] == ["19"] * 4


def test_only_what_is_not_known_is_asked(gathered: Gathered) -> None:
    for unit in gathered.units[:3]:
        gathered.dependencies.learn_first(unit.file, [unit.file])
    with gathered.gathering.held():
        gathered.gathering.start()
        gathered.gathering.complete()
    (line,) = gathered.asked()
    assert "unit3.c" in line


def test_a_newer_save_ends_the_asking(gathered: Gathered) -> None:
    os.mkfifo(gathered.gate)
    with gathered.gathering.held():
        gathered.gathering.start()
        with pytest.raises(BuildCancelled):
            gathered.gathering.complete(cancelled=lambda: len(gathered.asked()) > 0)
    gathered.gate.unlink()


def test_a_missing_header_counts_when_it_comes(project: Path) -> None:
    (project / "src/unit.c").write_text('#include "coming.h"\n')
    known = Dependencies()
    gathering = Gathering(known, lambda: (command(project),))
    try:
        gathering.complete()
    finally:
        gathering.close()
    assert known.includers(project / "src/coming.h", new=True) == {project / "src/unit.c"}


def test_a_unit_that_cannot_be_asked_does_not_keep_the_others(project: Path) -> None:
    absent = command(project, "/no/such/gcc", "-c", "src/other.c", file="src/other.c")
    nameless = command(project, "gcc", "-c", "elsewhere.c")
    for commands in ((nameless, command(project)), (command(project), nameless)):
        known = Dependencies()
        gathering = Gathering(known, lambda commands=commands: commands)
        try:
            gathering.complete()
        finally:
            gathering.close()
        assert known.includers(project / "src/beside.h") == {project / "src/unit.c"}
    gathering = Gathering(Dependencies(), lambda: (absent,))
    try:
        gathering.complete()
    finally:
        gathering.close()


def test_the_compiler_is_not_asked_where_the_build_left_a_record(project: Path) -> None:
    run(*UNIT, "-MD", cwd=project)
    known = Dependencies()
    gathering = Gathering(known, lambda: (command(project, "/no/such/gcc", *UNIT[1:]),))
    try:
        gathering.complete()
    finally:
        gathering.close()
    assert known.includers(project / "src/beside.h") == {project / "src/unit.c"}
