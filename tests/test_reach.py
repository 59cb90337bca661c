"""Where the address space around a program is full: a further arena, one that is far away, and none at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from project import Project, Running, assert_untouched

import patcher
from patcher.errors import TargetBusy

pytestmark = pytest.mark.timeout(200)  # megabytes go into the program

PROGRAMS = Path(__file__).parent / "programs"
UNIT = """\
#include <stdio.h>
extern int others;
int other(int n);
static int calls = 5;
static int const odd[4] = {1, 3, 5, 7};
static char text[64];
__attribute__((noipa)) static int local(int n) { return n + calls; }
int answer(int n)
{
    calls++;
    snprintf(text, sizeof text, "%d", n);
    return n + odd[n & 3] + local(0) + text[0];
}
"""
# Eleven MiB of constants that code refers to, then twelve: an arena has room for sixteen.
LARGE = "static char const large{0}[{1} << 20] = {{{0}}};\n__attribute__((noipa)) static int local(int n)"


@pytest.fixture(params=["-no-pie", "-pie"])
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Project:
    sources = {"main.c": (PROGRAMS / "crowded.c").read_text(), "unit.c": UNIT}
    flag = "-fno-pie" if request.param == "-no-pie" else "-fPIE"
    return Project(tmp_path / "p", sources, compile_flags=[flag], link_flags=[request.param])


def grow(project: Project, number: int, size: int) -> Path:
    """Let `local` use a constant of that many MiB, and give another answer."""
    project.edit("unit.c", "__attribute__((noipa)) static int local(int n)", LARGE.format(number, size))
    old = "{ return n + calls; }" if number == 1 else f"{{ return n + calls + large{number - 1}[n] + others * 0; }}"
    return project.edit("unit.c", old, f"{{ return n + calls + large{number}[n] + others * 0; }}")


def ask(program: Running, n: int) -> int:
    return int(program.ask(n))


@pytest.mark.parametrize("holes", [1, 2])
def test_a_full_arena_is_followed_by_another(project: Project, holes: int) -> None:
    with project.running(str(holes)) as program, patcher.attach(program.pid) as session:
        low, high = session.image.executable.text
        assert ask(program, 1) == 1 + 3 + 6 + ord("1")
        source = grow(project, 1, 11)
        assert [f.name for f in session.apply(source).functions] == ["local"]
        assert ask(program, 1) == 1 + 3 + 7 + 1 + ord("1")
        grow(project, 2, 12)
        project.edit("unit.c", "n + odd[n & 3] +", "100 + other(n) + odd[n & 3] +")
        assert sorted(f.name for f in session.apply(source).functions) == ["answer", "local"]
        assert ask(program, 1) == 100 + 1 + 3 + 8 + 2 + ord("1")
        arenas = [a for a in session.ledger.arenas.values() if session.ledger.usages[a.base].code > a.code_start]
        assert len(arenas) == 2
        assert [a.reaches(low, high) for a in arenas] == [True, holes == 2]
        assert session.apply(source).functions == (), "the process has this code"
        project.edit("unit.c", "100 + other(n)", "200 + other(n)")  # one more where the second went
        assert [f.name for f in session.apply(source).functions] == ["answer"]
        assert ask(program, 1) == 200 + 2 + 3 + 9 + 2 + ord("1")
        assert session.revert(1) == 1
        assert ask(program, 1) == 1 + 3 + 10 + 1 + ord("1")
        assert session.revert(0) == 0
        assert ask(program, 1) == 1 + 3 + 11 + ord("1")
        assert_untouched(program.pid)


def test_a_process_without_room_for_an_arena_is_refused(project: Project) -> None:
    with project.running("0") as program, patcher.attach(program.pid) as session:
        source = grow(project, 1, 1)
        with pytest.raises(TargetBusy, match="there is no hole of 64 MiB within 2 GiB") as caught:
            session.apply(source)
        assert caught.value.code == "no-arena"
        assert session.status().arenas == ()
        assert ask(program, 1) == 1 + 3 + 6 + ord("1")
