"""Static variables of functions whose type changed: carried over like those of files, or refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from project import MAIN, Project, assert_untouched

import patcher
from patcher.errors import UnsafeChange
from patcher.outcome import Generation

COMPILERS = [(c, o) for c in ("gcc", "clang") for o in ("-O0", "-O2")]
UNIT = """\
struct state { int calls; int last; };
static void note(void *p) { __asm__ volatile("" : : "r"(p) : "memory"); }  // no compiler takes it apart
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


def test_another_controller_goes_on(tmp_path: Path, compiled: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": UNIT})
    with project.running() as program:
        assert program.ask(1) == "1011"
        with patcher.attach(program.pid, watched=[project.sources]) as session:
            session.apply(saved(project, GROWN))
            assert program.ask(1) == "701021"
        with patcher.attach(program.pid, watched=[project.sources]) as session:
            assert told(session.apply(saved(project, GROWN.replace("100000", "200000")))) == []
            assert program.ask(1) == "1401031"
        with monkeypatch.context() as elsewhere:
            elsewhere.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # where nothing is remembered of earlier changes
            tmp_path.chmod(0o700)
            with patcher.attach(program.pid, watched=[project.sources]) as session:
                with pytest.raises(UnsafeChange) as refused:
                    session.apply(saved(project, AGAIN))
                assert refused.value.code == "layout", refused.value
                assert program.ask(1) == "1401041"
        with patcher.attach(program.pid, watched=[project.sources]) as session:
            note = "12 -> 16 bytes, members copied by name"
            assert told(session.apply(saved(project, AGAIN))) == [("answer::state", "migrated", note)]
            assert program.ask(1) == "1401051"
            session.revert(0)
            assert program.ask(1) == "1021"


def test_the_same_size_with_other_members(tmp_path: Path, compiled: Sequence[str]) -> None:
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": UNIT})
    turned = UNIT.replace("int calls; int last;", "int last; int calls;").replace("{100, 1}", "{1, 100}")
    with project.running() as program:
        assert program.ask(1) == "1011"
        for wanted in ([("answer::state", "migrated", "8 -> 8 bytes, members copied by name")], []):
            turned = turned.replace("+ other", "+ 100000 + other")
            with patcher.attach(program.pid, watched=[project.sources]) as session:
                assert told(session.apply(saved(project, turned))) == wanted
        assert program.ask(2) == "201022"


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


FILL = """\
void patcher_migrate_state(void *new_object, const void *old_object)
{
    const struct { int calls, last; } *old = old_object;
    struct state *new = new_object;
    new->calls = old->calls + 1000;
    new->last = old->last;
}
"""


IN_ARRAY = (("state state = {", "state states[2] = {{1, 2}, {"), ("};\n    note(&state)", "}};\n    note(states)"))


@pytest.mark.parametrize("replaced", [(), (*IN_ARRAY, ("state.", "states[1]."))], ids=["one", "array"])
def test_a_function_of_the_users_fills_it(
    tmp_path: Path, compiled: Sequence[str], replaced: Sequence[tuple[str, str]]
) -> None:
    old, new = UNIT, GROWN
    for a, b in replaced:
        old, new = old.replace(a, b), new.replace(a, b)
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": old})
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        assert program.ask(1) == "1011"
        done = session.apply(saved(project, new + FILL))
        assert [v.outcome for v in done.variables] == ["migrated"]
        assert program.ask(1) == "711021"
        session.revert(0)
        assert program.ask(1) == "1021"


WITHIN = (
    ("struct state state = {100, 1}", "struct { struct state state; int more; } all = {{100, 1}, 2}"),
    ("&state", "&all"),
    ("state.calls", "all.state.calls"),
    ("state.last", "all.state.last"),
)


def test_what_a_function_of_the_users_cannot_fill_is_refused(tmp_path: Path, compiled: Sequence[str]) -> None:
    within = UNIT
    for a, b in WITHIN:
        within = within.replace(a, b)
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": within})
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        assert program.ask(1) == "1011"
        for new in ("int last; int calls; }", "int calls; float last; }"):
            with pytest.raises(UnsafeChange, match=r"is a static variable of a function|cannot be carried") as refused:
                session.apply(saved(project, within.replace("int calls; int last; }", new) + FILL))
            assert refused.value.code == "layout"
        assert program.ask(1) == "1021"
        assert_untouched(program.pid)


CXX = """\
struct state { int calls; int last; };
int made;
static int first(int n) { made++; return n; }
namespace counter { struct one { int count(int n); }; }
__attribute__((noinline)) int counter::one::count(int n)
{
    static state kept = {first(99 + n), 1};
    __asm__ volatile("" : : "r"(&kept) : "memory");
    kept.calls++;
    kept.last = n;
    return kept.calls * 10 + kept.last;
}
int answer(int n) { counter::one one; return 10 * one.count(n) + made; }
"""


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize("optimise", ["-O0", "-O2"])
def test_a_guard_goes_along(tmp_path: Path, compiler: str, optimise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("project.COMPILE", (compiler, "-x", "c++", "-g", optimise))
    grown = CXX.replace("int last; }", "int last; int limit; }").replace("n), 1}", "n), 1, 3}")
    grown = grown.replace("return kept", "return kept.limit * 10000 + kept")
    limit = 300000 if compiler == "g++" else 0  # it initialises by code what is not constant, clang all of it
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": CXX}, link_flags=["-lstdc++"])
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        assert program.ask(1) == "10111"
        for text, outcomes, answer in (
            (grown, ["migrated"], 10211 + limit),
            (grown.replace("10000", "20000"), [], 10311 + 2 * limit),
            (grown.replace("int calls", "long calls"), ["migrated"], 10411 + limit),
        ):
            assert [v.outcome for v in session.apply(saved(project, text)).variables] == outcomes
            assert program.ask(1) == str(answer), "not initialised again"
        session.revert(0)
        assert program.ask(1) == "10211"
        assert_untouched(program.pid)
