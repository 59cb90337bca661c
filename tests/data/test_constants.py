"""Constants with other contents: who holds the old ones is found, and they are written or told."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import MAIN, Project, Running

import patcher
from patcher.report import Outlook
from patcher.report.console import ConsoleReport
from patcher.target import Target

TABLES = """\
const int limits[2] = {1, 2};
const char label[] = "abc";
static const int own[2] = {3, 4};
static const int given[2] = {5, 6};
const int *give(void) { return given; }
int sum(int n) { return own[n] + n; }
"""
UNIT = """\
#include <stdlib.h>
extern const int limits[2];
extern const char label[];
const int *give(void);
int sum(int n);
static struct { const int *table; } *box;
int answer(int n)
{
    if (!box) {
        box = malloc(sizeof *box);
        box->table = give();
    }
    return 1000 * limits[n] + 100 * box->table[n] + 10 * sum(n) + label[n] - 'a';
}
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path, {"main.c": MAIN, "unit.c": UNIT, "tables.c": TABLES})


@pytest.fixture
def program(project: Project) -> Iterator[Running]:
    with project.running() as program:
        assert program.ask(1) == str(2000 + 600 + 50 + 1)
        yield program


def fates(outcome: patcher.Generation) -> dict[str, str]:
    return {v.name: f"{v.outcome} {v.note}" for v in outcome.variables}


def test_a_generation_may_change_constants_only(project: Project, program: Running) -> None:
    source = project.edit("tables.c", "{1, 2}", "{1, 7}")
    with patcher.attach(program.pid) as session:
        found = session.apply(source)
        assert fates(found) == {"limits": "rewritten `answer`"}
        assert found.functions == ()
        assert found.number == 1
        assert program.ask(1) == str(7000 + 600 + 50 + 1)
        assert fates(session.apply(source)) == {}
        session.revert()
        assert program.ask(1) == str(2000 + 600 + 50 + 1)
        assert fates(session.apply(source)) == {"limits": "rewritten `answer`"}
        assert program.ask(1) == str(7000 + 600 + 50 + 1)


def test_what_the_program_keeps_on_the_heap_is_found(project: Project, program: Running) -> None:
    source = project.edit("tables.c", "{5, 6}", "{5, 8}")
    with patcher.attach(program.pid) as session:
        told = fates(session.apply(source))["given"]
        assert told.startswith("rewritten stored at 0x")
        assert program.ask(1) == str(2000 + 800 + 50 + 1)
        project.edit("tables.c", "given[2] = {5, 8}", "given[3] = {5, 9, 9}")
        told = fates(session.apply(source))["given"]
        assert told.startswith("stale 8 -> 12 bytes; stored at 0x")
        assert program.ask(1) == str(2000 + 800 + 50 + 1)


def test_a_constant_that_nobody_else_holds_is_not_worth_a_word(project: Project, program: Running) -> None:
    source = project.edit("tables.c", "{3, 4}", "{3, 5}")
    with patcher.attach(program.pid) as session:
        assert fates(session.apply(source)) == {}
        assert program.ask(1) == str(2000 + 600 + 60 + 1)


def test_the_old_copy_is_told_and_units_patched_later_use_the_new_one(project: Project, program: Running) -> None:
    source = project.edit("tables.c", '"abc"', '"aefgh"')
    with patcher.attach(program.pid) as session:
        assert fates(session.apply(source)) == {"label": "stale 4 -> 6 bytes; `answer`"}
        assert program.ask(1) == str(2000 + 600 + 50 + 1)
        assert fates(session.apply(source)) == {}
        unit = project.edit("unit.c", "label[n] - 'a'", "label[n] - 'a' + 100000")
        assert fates(session.apply(unit)) == {}
        assert program.ask(1) == str(100000 + 2000 + 600 + 50 + 4)
        session.revert(0)
        assert program.ask(1) == str(2000 + 600 + 50 + 1)
        assert fates(session.apply(unit)) == {}
        assert program.ask(1) == str(100000 + 2000 + 600 + 50 + 1)


def test_units_of_one_generation_agree_on_a_constant_that_grew(project: Project, program: Running) -> None:
    tables = project.edit("tables.c", '"abc"', '"aefgh"')
    unit = project.edit("unit.c", "label[n] - 'a'", "label[n] - 'a' + 100000")
    with patcher.attach(program.pid) as session:
        session.apply(tables, unit)
        assert program.ask(1) == str(100000 + 2000 + 600 + 50 + 4)


def test_a_constant_that_a_dying_controller_left_undone_is_mended(project: Project, program: Running) -> None:
    source = project.edit("tables.c", "{1, 2}", "{1, 7}")
    with patcher.attach(program.pid) as session:
        session.apply(source)
        ((address, new),) = session.ledger.journal.rewrites_at(1).items()
        ((_, old),) = session.ledger.journal.rewrites_at(0).items()
        assert (new[4], old[4]) == (7, 2)
    with Target.attach(program.pid) as target:
        target.memory.write(address, old)
    assert program.ask(1) == str(2000 + 600 + 50 + 1)
    with patcher.attach(program.pid) as session:
        assert fates(session.apply(source)) == {}
    assert program.ask(1) == str(7000 + 600 + 50 + 1)


def test_two_that_the_linker_made_one_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("project.COMPILE", ("clang", "-g", "-O2", "-faddrsig"))
    other = "const int other[4] = {1, 2, 3, 4};\nint more(int n) { return other[n]; }\n"
    tables = "const int limits[4] = {1, 2, 3, 4};\nint sum(int n) { return n; }\n"
    unit = (
        "extern const int limits[4];\nint sum(int n);\nint more(int n);\n"
        "int answer(int n) { return 100 * limits[n] + 10 * more(n) + sum(n); }\n"
    )
    project = Project(
        tmp_path,
        {"main.c": MAIN, "unit.c": unit, "tables.c": tables, "other.c": other},
        compile_flags=("-ffunction-sections", "-fdata-sections"),
        link_flags=("-fuse-ld=lld", "-Wl,--icf=all"),
    )
    with project.running() as program:
        assert program.ask(1) == "221"
        source = project.edit("tables.c", "{1, 2, 3, 4}", "{1, 9, 3, 4}")
        with patcher.attach(program.pid) as session:
            assert fates(session.apply(source))["limits"].partition(" ")[0] == "stale"
        assert program.ask(1) == "221"


LIKE_NAMED = """\
__attribute__((noinline)) int one(int n) { return n; }
__attribute__((noinline)) int two(int n)
{
    static const int table[4] = {2, 2, 2, 2};
    return table[n & 3];
}
int answer(int n) { return 10 * one(n) + two(n); }
"""


def test_a_static_constant_is_not_taken_for_another_of_its_name(tmp_path: Path) -> None:
    project = Project(tmp_path, {"main.c": MAIN, "unit.c": LIKE_NAMED})
    source = project.edit(
        "unit.c", "{ return n; }", "{ static const int table[4] = {7, 7, 7, 7}; return table[n & 3]; }"
    )
    with project.running() as program, patcher.attach(program.pid) as session:
        assert program.ask(1) == "12"
        assert fates(session.apply(source)) == {}
        assert program.ask(1) == "72"


def test_without_debug_information_a_functions_constant_is_told_and_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("project.COMPILE", ("gcc", "-O2"))
    unit = (
        "static const int *kept;\n"
        "__attribute__((noinline)) static const int *give(int n)\n"
        "{\n    static const int table[2] = {1, 2};\n    return n < 4 ? table : 0;\n}\n"
        "int answer(int n) { if (!kept) kept = give(n); return 10 * kept[n] + give(n)[n]; }\n"
    )
    project = Project(tmp_path, {"main.c": MAIN, "unit.c": unit})
    with project.running() as program, patcher.attach(program.pid) as session:
        assert program.ask(1) == "22"
        assert fates(session.apply(project.edit("unit.c", "{1, 2}", "{1, 3}"))) == {
            "give.table": "stale stored in `kept`"
        }
        assert program.ask(1) == "23"


SWITCHES = """\
__attribute__((noinline)) int one(int n) {
    switch (n) { case 0: return 17; case 1: return 3; case 2: return 9; case 3: return 55; case 4: return 6; }
    return n;
}
__attribute__((noinline)) int two(int n) {
    switch (n) { case 0: return 27; case 1: return 4; case 2: return 9; case 3: return 56; case 4: return 7; }
    return n;
}
int answer(int n) { return 100 * one(n) + two(n); }
"""


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_tables_made_of_switches_are_never_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    monkeypatch.setattr("project.COMPILE", (compiler, "-g", "-O2"))
    project = Project(tmp_path, {"main.c": MAIN, "unit.c": SWITCHES})
    with project.running() as program, patcher.attach(program.pid) as session:
        assert program.ask(1) == "304"
        source = project.edit("unit.c", "case 1: return 3;", "case 1: return 5;")
        assert fates(session.apply(source)) == {}
        assert program.ask(1) == "504"
        project.edit("unit.c", "case 0: return 17;", "case 0: return two(n);")  # its table is gone
        assert fates(session.apply(source)) == {}
        project.edit("unit.c", "case 1: return 4;", "case 1: return 8;")
        assert fates(session.apply(source)) == {}
        assert program.ask(1) == "508"
        session.revert(0)
        assert program.ask(1) == "304"


HELD = """\
static const int first[2] = {1, 2};
static const int *volatile chosen = first;
int answer(int n)
{
    return chosen[n & 1] + n;
}
"""
GOES_ON = "nothing to do, no code changes; what holds the old constants goes on with them"


@pytest.mark.parametrize("optimise", ["-O0", "-O2"])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_what_others_go_on_with_is_no_reason_to_say_that_something_goes_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, optimise: str
) -> None:
    monkeypatch.setattr("project.COMPILE", (compiler, "-g", optimise))
    project = Project(tmp_path, {"main.c": MAIN, "unit.c": HELD})
    said = io.StringIO()
    with project.running() as program:
        assert program.ask(1) == "3"
        source = project.edit("unit.c", "first[2] = {1, 2}", "first[3] = {1, 5, 6}")
        with patcher.attach(program.pid) as session:
            found = session.explain(source)
            assert (found.outlook, found.functions, found.refusal) == (Outlook.UNCHANGED, (), None)
            told = {(v.name, v.outcome, v.note) for v in found.variables}
            assert told == {("first", "stale", "8 -> 12 bytes; stored in `chosen`"), ("chosen", "kept", "")}
            assert list(found.lines())[-1] == GOES_ON
            done = session.apply(source)
            assert (done.number, {(v.name, v.outcome, v.note) for v in done.variables}) == (0, told)
            ConsoleReport(said).emit(done.as_event([source]))
            assert GOES_ON in said.getvalue()
            assert program.ask(1) == "3"
        with patcher.attach(program.pid, reinit=["chosen"]) as session:
            assert session.explain(source).outlook is Outlook.LIVE
            assert session.apply(source).number == 1
            assert program.ask(1) == "6"
            session.revert()


ONE_NAME = """\
const int *kept;  // what only this file can write to, a compiler may know the value of
HELPER
__attribute__((noinline)) static const int *first(int n)
{
    FIRST
}
__attribute__((noinline)) static int second(int n)
{
    SECOND
}
int answer(int n)
{
    if (!kept)
        kept = first(n);
    return 1000 * kept[1] + 100 * first(n)[1] + second(n);
}
"""
TABLE = "static const int table[4] = {CONTENTS};"


def one_name(first: str, second: str, helper: str = "") -> str:
    return ONE_NAME.replace("HELPER", helper).replace("FIRST", first).replace("SECOND", second)


def table(contents: str) -> str:
    return TABLE.replace("CONTENTS", contents)


HELPER = "static inline const int *helper(void) { static const int table[4] = {1, 2, 3, 4}; return table; }"
BLOCK = "if (n > 7) { static const int table[4] = {5, 6, 7, 8}; return table; }"


@pytest.mark.parametrize(
    ("debug", "old", "new", "expected"),
    [
        pytest.param(
            "-g0",
            one_name(table("1, 2, 3, 4") + " return n < 4 ? table : 0;", "return n;"),
            one_name("return n < 4 ? kept : 0;", table("9, 9, 9, 9") + " return table[n & 3];"),
            ("2201", "2209", {}),
            id="of a function that did not use it, without debug information",
        ),
        pytest.param(
            "-g",
            one_name("return n < 4 ? helper() : 0;", "return n;", HELPER),
            one_name(table("9, 9, 9, 9") + " return n < 4 ? table : 0;", "return n;"),
            ("2201", "2901", {}),
            id="of a function that was inlined into the one that has its own now",
        ),
        pytest.param(
            "-g",
            one_name(table("1, 2, 3, 4") + " return n < 4 ? table : 0;", "return n;"),
            one_name(BLOCK + table("1, 2, 3, 4") + " return n < 5 ? table : 0;", "return n;"),
            ("2201", "2201", {}),
            id="of two in one function that may be it",
        ),
    ],
)
@pytest.mark.parametrize("optimise", ["-O0", "-O2"])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_which_table_of_one_name_it_is(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compiler: str,
    optimise: str,
    debug: str,
    old: str,
    new: str,
    expected: tuple[str, str, dict[str, str]],
) -> None:
    monkeypatch.setattr("project.COMPILE", (compiler, debug, optimise))
    project = Project(tmp_path, {"main.c": MAIN, "unit.c": old})
    before, after, said = expected
    with project.running() as program, patcher.attach(program.pid) as session:
        assert program.ask(1) == before
        (project.sources / "unit.c").write_text(new)
        for _ in range(2):
            assert fates(session.apply(project.sources / "unit.c")) == said
            assert program.ask(1) == after
            session.revert(0)
            assert program.ask(1) == before


INLINED = """\
const int *kept;
int same(int n) { static const int table[4] = {4, 3, 2, 1}; return table[n & 3]; }
__attribute__((noinline)) static const int *first(int n)
{
    static const int table[4] = {1, 2, 3, 4};
    return n < 4 + same(n) ? table : 0;
}
int answer(int n)
{
    if (!kept)
        kept = first(n);
    return 100 * kept[n] + 10 * first(n)[n] + same(n);
}
"""


@pytest.mark.parametrize("optimise", ["-O0", "-O2"])
def test_what_is_known_to_be_another_functions_table_is_out_of_the_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimise: str
) -> None:
    monkeypatch.setattr("project.COMPILE", ("gcc", optimise))  # without debug information, only code tells
    project = Project(tmp_path, {"main.c": MAIN, "unit.c": INLINED})
    with project.running() as program, patcher.attach(program.pid) as session:
        assert program.ask(1) == "223"
        source = project.edit("unit.c", "{1, 2, 3, 4}", "{1, 5, 3, 4}")
        assert fates(session.apply(source)) == {"first.table": "stale stored in `kept`"}
        assert program.ask(1) == "253"


def test_a_constant_that_the_linker_made_one_with_another_leaves_that_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("project.COMPILE", ("clang", "-g", "-O2", "-faddrsig"))
    unit = (
        "const int one[4] = {1, 2, 3, 4};\nconst int two[4] = {1, 2, 3, 4};\n"
        "__attribute__((noinline)) int first(int n) { return one[n & 3]; }\n"
        "__attribute__((noinline)) int second(int n) { return two[n & 3] + 1; }\n"
        "int answer(int n) { return 10 * first(n) + second(n); }\n"
    )
    project = Project(
        tmp_path,
        {"main.c": MAIN, "unit.c": unit},
        compile_flags=("-ffunction-sections", "-fdata-sections"),
        link_flags=("-fuse-ld=lld", "-Wl,--icf=all"),
    )
    with project.running() as program, patcher.attach(program.pid) as session:
        (one,), (two,) = (session.image.executable.module.symbols.named(name) for name in ("one", "two"))
        assert one.value == two.value
        source = project.edit("unit.c", "two[4] = {1, 2,", "two[4] = {1, 7,")
        assert fates(session.apply(source)) == {}
        assert program.ask(1) == "28"
        session.revert()
        assert program.ask(1) == "23"
