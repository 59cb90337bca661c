"""Static variables of functions whose type changed: carried over like those of files, or refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from project import MAIN, Project, assert_untouched

import patcher
from patcher.errors import UnsafeChange
from patcher.session import Generation

COMPILERS = [(c, o) for c in ("gcc", "clang") for o in ("-O0", "-O2")]
UNIT = """\
struct state { int calls; int last; };
struct state *volatile kept;
static void note(void *p) { kept = p; }
int other(int n) { static int calls = 7; return calls += n; }
int answer(int n)
{
    static struct state state = {100, 1};
    note(&state);
    state.calls++;
    state.last = n;
    return state.calls * 10 + state.last + other(0) - 7;
}
"""
# clang takes a static apart whose address goes nowhere; one that is kept somewhere would be found there.
UNIT = UNIT.replace("struct state *volatile kept;\n", "").replace(
    "kept = p;", '__asm__ volatile("" : : "r"(p) : "memory");'
)
GROWN = UNIT.replace("int last; }", "int last; int limit; }").replace("{100, 1}", "{100, 1, 7}")
GROWN = GROWN.replace("return state", "return state.limit * 100000 + state")
AGAIN = GROWN.replace("int calls; int last;", "long calls; int last;").replace("limit * 1", "limit * 2")


@pytest.fixture(params=COMPILERS, ids="".join)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Sequence[str]:
    monkeypatch.setattr("project.COMPILE", (request.param[0], "-g", request.param[1]))
    return tuple(request.param)


def saved(project: Project, text: str) -> Path:
    (project.sources / "unit.c").write_text(text)
    return project.sources / "unit.c"


def told(done: Generation) -> list[tuple[str, str, str]]:
    return [(v.name, v.outcome, v.note) for v in done.variables]


NEW = "8 -> 12 bytes, members copied by name; new: limit"


@pytest.mark.parametrize("sections", [(), ("-fdata-sections",), ("-fno-common",)], ids="".join)
def test_a_static_of_a_function_grows(tmp_path: Path, compiled: Sequence[str], sections: Sequence[str]) -> None:
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": UNIT}, compile_flags=sections)
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        assert program.ask(1) == "1011"
        said = session.explain(saved(project, GROWN))
        assert told(said) == [("answer::state", "migrated", NEW)]
        assert program.ask(1) == "1021", "explained, and nothing done"
        assert told(session.apply(saved(project, GROWN))) == [("answer::state", "migrated", NEW)]
        assert program.ask(1) == "701031"
        assert told(session.apply(saved(project, GROWN.replace("state.last + other", "4000 + other")))) == []
        assert program.ask(1) == "705040"
        note = "12 -> 16 bytes, members copied by name"
        assert told(session.apply(saved(project, AGAIN))) == [("answer::state", "migrated", note)]
        assert program.ask(1) == "1401051"
        session.revert()
        assert program.ask(1) == "705050", "the storage before, as it was left"
        session.revert(0)
        assert program.ask(1) == "1031"
        assert told(session.apply(saved(project, GROWN))) == [("answer::state", "migrated", NEW)]
        assert program.ask(1) == "701041", "filled afresh"
        assert_untouched(program.pid)


def test_another_controller_goes_on(tmp_path: Path, compiled: Sequence[str]) -> None:
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": UNIT})
    with project.running() as program:
        assert program.ask(1) == "1011"
        with patcher.attach(program.pid, watched=[project.sources]) as session:
            session.apply(saved(project, GROWN))
            assert program.ask(1) == "701021"
        with patcher.attach(program.pid, watched=[project.sources]) as session:
            assert told(session.apply(saved(project, GROWN.replace("100000", "200000")))) == []
            assert program.ask(1) == "1401031"
            with pytest.raises(UnsafeChange, match="answer::state") as refused:
                session.apply(saved(project, AGAIN))
            assert refused.value.code == "layout"
            assert program.ask(1) == "1401041"
            session.revert(0)
            assert program.ask(1) == "1021"


def test_the_same_size_with_other_members(tmp_path: Path, compiled: Sequence[str]) -> None:
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": UNIT})
    turned = UNIT.replace("int calls; int last;", "int last; int calls;").replace("{100, 1}", "{1, 100}")
    with project.running() as program:
        assert program.ask(1) == "1011"
        for wanted in ([("answer::state", "migrated", "8 -> 8 bytes, members copied by name")], []):
            turned = turned.replace("return ", "return 100000 + ")
            with patcher.attach(program.pid, watched=[project.sources]) as session:
                assert told(session.apply(saved(project, turned))) == wanted
        assert program.ask(2) == "301022"  # other() too has become another one


def test_several_of_one_name_are_refused(tmp_path: Path, compiled: Sequence[str]) -> None:
    second = "    { static struct state state = {5, 5}; note(&state); n += state.calls++; }\n    state.last"
    two = UNIT.replace("    state.last", second, 1)
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": two})
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        assert program.ask(1) == "1016"
        with pytest.raises(UnsafeChange, match="several `answer::state`") as refused:
            session.apply(saved(project, two.replace("int last; }", "int last; int limit; }")))
        assert refused.value.code == "layout"
        assert program.ask(1) == "1027"
        assert_untouched(program.pid)


def test_what_a_function_of_the_users_would_fill_is_refused(tmp_path: Path, compiled: Sequence[str]) -> None:
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": UNIT})
    fill = "void patcher_migrate_state(void *new_object, const void *old_object) { }\n"
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        assert program.ask(1) == "1011"
        for text in (GROWN, UNIT.replace("int calls; int last;", "int last; int calls;")):
            with pytest.raises(UnsafeChange, match="`state` of .* is a static variable of a function") as refused:
                session.apply(saved(project, text + fill))
            assert refused.value.code == "layout"
        assert program.ask(1) == "1021"
        assert_untouched(program.pid)


CXX = """\
#include <stdio.h>
struct state { int calls; int last; };
int made;
static state first(int n) { made++; return {n, 1}; }
namespace { struct counter {
    int count(int n) const;
}; }
__attribute__((noinline)) int counter::count(int n) const
{
    static state kept = first(100 + n);
    __asm__ volatile("" : : "r"(&kept) : "memory");
    kept.calls++;
    kept.last = n;
    return kept.calls * 10 + kept.last;
}
int main()
{
    int n;
    puts("ready");
    fflush(stdout);
    while (scanf("%d", &n) == 1) {
        printf("%d %d\\n", counter().count(n), made);
        fflush(stdout);
    }
}
"""


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize("optimise", ["-O0", "-O2"])
def test_a_guard_goes_along(tmp_path: Path, compiler: str, optimise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("project.COMPILE", (compiler, "-g", optimise))
    project = Project(tmp_path / "p", {"unit.cc": CXX})
    grown = CXX.replace("int last; }", "int last; int limit; }").replace("return {n, 1}", "return {n, 1, 3}")
    grown = grown.replace("return kept", "return kept.limit * 100000 + kept")
    path = project.sources / "unit.cc"
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        assert program.ask(1) == "1021 1"
        for text, outcomes, answer in (
            (grown, ["migrated"], "1031 1"),
            (grown.replace("100000", "200000"), [], "1041 1"),
            (grown.replace("int calls", "long calls"), ["migrated"], "1051 1"),
        ):
            path.write_text(text)
            assert [v.outcome for v in session.apply(path).variables] == outcomes
            assert program.ask(1) == answer, "not initialised again: what is new is zero"
        session.revert(0)
        assert program.ask(1) == "1031 1"
        assert_untouched(program.pid)
