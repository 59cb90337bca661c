"""Variables whose layout changes in a generation that writes initial values: named themselves, or others are."""

from __future__ import annotations

from pathlib import Path

import pytest
from project import MAIN, Project, assert_untouched

import patcher
from patcher.errors import UnsafeChange
from patcher.session import Generation

UNIT = """\
static void note(void *p) { __asm__ volatile("" : : "r"(p) : "memory"); }  // no compiler takes it apart
struct state { int calls; int last; } state = {100, 1};
int limit = 5;
int answer(int n)
{
    static struct state inner = {40, 1};
    note(&inner);
    limit++;
    state.calls += n;
    inner.calls += n;
    return state.calls * 10000 + inner.calls * 100 + limit;
}
"""
GROWN = UNIT.replace("int last; }", "int last; int more; }").replace("{100, 1}", "{200, 1, 7}")
GROWN = GROWN.replace("{40, 1}", "{50, 1, 7}").replace("limit = 5", "limit = 30")
LARGER = GROWN.replace("int more; }", "int more; int most; }").replace("{200, 1, 7}", "{300, 1, 7, 8}")
FILL = "void patcher_migrate_state(void *new_object, const void *old_object) { *(int *)new_object = 900; }\n"


# gcc's -O0 leaves the address of a function's static on the stack, below what waits for the next question: refused.
@pytest.fixture(params=[("gcc", "-O2"), ("clang", "-O0"), ("clang", "-O2")], ids="".join, autouse=True)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("project.COMPILE", (request.param[0], "-g", request.param[1]))


def told(done: Generation) -> set[tuple[str, str, str]]:
    return {(v.name, v.outcome, v.note) for v in done.variables}


def apply(pid: int, project: Project, text: str, *reinit: str) -> set[tuple[str, str, str]]:
    """Apply a text in a session of its own; an explanation says the same beforehand."""
    (project.sources / "unit.c").write_text(text)
    with patcher.attach(pid, reinit=reinit) as session:
        before = {(v.name, v.outcome, v.note) for v in session.explain(project.sources / "unit.c").variables}
        found = told(session.apply(project.sources / "unit.c"))
        assert found == before
        return found


def revert(pid: int, generation: int) -> None:
    with patcher.attach(pid) as session:
        session.revert(generation)


CARRIED = {
    ("state", "migrated", "8 -> 12 bytes, members copied by name; new: more"),
    ("answer::inner", "migrated", "8 -> 12 bytes, members copied by name; new: more"),
}
LIMIT = ("limit", "reinitialised", "5 -> 30")


def test_another_variable_is_written_in_the_same_generation(tmp_path: Path) -> None:
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": UNIT})
    with project.running() as program:
        assert program.ask(1) == "1014106"
        assert apply(program.pid, project, GROWN, "limit") == {*CARRIED, LIMIT}
        assert program.ask(1) == "1024231"
        revert(program.pid, 0)
        assert program.ask(1) == "1024232", "the old storage; what was written stays"
        assert apply(program.pid, project, GROWN) == CARRIED
        assert program.ask(1) == "1034333"
        assert_untouched(program.pid)


def test_one_that_is_named_itself_starts_anew(tmp_path: Path) -> None:
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": UNIT})
    anew = {("state", "reinitialised", "8 -> 12 bytes"), ("answer::inner", "reinitialised", "8 -> 12 bytes")}
    with project.running() as program:
        assert program.ask(1) == "1014106"
        assert apply(program.pid, project, GROWN, "state", "limit") == {
            LIMIT,
            ("state", "reinitialised", "8 -> 12 bytes"),
            ("answer::inner", "migrated", "8 -> 12 bytes, members copied by name; new: more"),
        }
        assert program.ask(1) == "2014231"
        revert(program.pid, 0)
        assert program.ask(1) == "1024232"
        assert apply(program.pid, project, GROWN, "state", "answer.inner") == anew
        assert program.ask(1) == "2015133"
        later = apply(program.pid, project, LARGER, "inner")
        assert {(name, outcome) for name, outcome, _ in later} == {
            ("state", "migrated"),
            ("answer::inner", "reinitialised"),
        }
        assert program.ask(1) == "2025134"
        # What has its new storage already is written there.
        assert ("state", "reinitialised") in {v[:2] for v in apply(program.pid, project, LARGER, "state")}
        assert program.ask(1) == "3015235"
        revert(program.pid, 0)
        assert program.ask(1) == "1034336"
        assert_untouched(program.pid)


def test_the_word_of_the_user_counts_more_than_a_function_that_would_fill_it(tmp_path: Path) -> None:
    unit, grown = (text.replace("struct state inner", "struct { int calls, last; } inner") for text in (UNIT, GROWN))
    grown = grown.replace("{50, 1, 7}", "{40, 1}")
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": unit})
    with project.running() as program:
        assert program.ask(1) == "1014106"
        assert apply(program.pid, project, grown + FILL, "state") >= {("state", "reinitialised", "8 -> 12 bytes")}
        assert program.ask(1) == "2014207"
        revert(program.pid, 0)
        assert ("state", "migrated") in {v[:2] for v in apply(program.pid, project, grown + FILL)}
        assert program.ask(1) == "9014308"


CXX = """\
struct state { int calls; int last; };
static int first(int n) { return n; }
int answer(int n)
{
    static state kept = {first(99 + n), 1};
    __asm__ volatile("" : : "r"(&kept) : "memory");
    return kept.calls++ + kept.last;
}
"""


def test_what_code_initialises_is_not_started_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("project.COMPILE", ("g++", "-x", "c++", "-g", "-O2"))
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": CXX}, link_flags=["-lstdc++"])
    with project.running() as program:
        assert program.ask(1) == "101"
        with pytest.raises(UnsafeChange, match=r"kept` of .* got its initial value from code") as refused:
            apply(program.pid, project, CXX.replace("int last; }", "int last; int more; }"), "kept")
        assert refused.value.code == "reinit"
        assert program.ask(1) == "102"
