"""Changed initialisers: the value is kept and said, once; --reinit writes the new one with the code."""

from __future__ import annotations

from pathlib import Path

import pytest
from project import MAIN, Project

import patcher

UNIT = """\
int limit = 5;
int *place = &limit;
const char *word = "old";
int answer(int n)
{
    static int calls = 10;
    calls++;
    return n + limit + *place + calls + (int)word[0];
}
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path, {"main.c": MAIN, "unit.c": UNIT})


def fates(outcome: patcher.Generation) -> dict[str, tuple[str, str]]:
    return {v.name: (v.outcome, v.note) for v in outcome.variables}


def test_a_changed_initialiser_is_told_once_and_the_value_stays(project: Project) -> None:
    with project.running() as program:
        base = int(program.ask(0))
        with patcher.attach(program.pid) as session:
            source = project.edit("unit.c", "limit = 5", "limit = 7")
            found = session.apply(source)
            assert fates(found) == {"limit": ("kept", "5 -> 7")}
            assert not found.functions
            project.edit("unit.c", "n + limit", "n + 1000 + limit")
            found = session.apply(source)
            assert fates(found) == {}
            assert found.functions
            assert int(program.ask(0)) == base + 1001


def test_what_did_not_change_is_never_told(project: Project) -> None:
    with project.running() as program, patcher.attach(program.pid) as session:
        source = project.edit("unit.c", "n + limit", "n + 1000 + limit")
        assert fates(session.apply(source)) == {}


def test_pointers_are_compared_by_what_they_lead_to(project: Project) -> None:
    with project.running() as program, patcher.attach(program.pid) as session:
        project.edit("unit.c", '"old"', '"new"')
        source = project.edit("unit.c", "int limit = 5;", "int limit = 5, other = 3;")
        project.edit("unit.c", "&limit", "&other")
        assert fates(session.apply(source)) == {
            "word": ("kept", '"old" -> "new"'),
            "place": ("kept", "&limit -> &other"),
        }
        project.edit("unit.c", "&other", "&limit")
        project.edit("unit.c", '"new"', '"old"')
        assert fates(session.apply(source)) == {}
        project.edit("unit.c", '"old"', '"new"')
        assert fates(session.apply(source)) == {"word": ("kept", '"old" -> "new"')}


def test_a_new_process_of_ours_does_not_tell_it_again(project: Project) -> None:
    with project.running() as program:
        source = project.edit("unit.c", "limit = 5", "limit = 7")
        project.edit("unit.c", "n + limit", "n + 1000 + limit")
        with patcher.attach(program.pid) as session:
            assert fates(session.apply(source)) == {"limit": ("kept", "5 -> 7")}
        project.edit("unit.c", "n + 1000", "n + 2000")
        with patcher.attach(program.pid) as session:
            assert fates(session.apply(source)) == {}
        project.edit("unit.c", "limit = 7", "limit = 8")
        with patcher.attach(program.pid) as session:
            assert fates(session.apply(source)) == {"limit": ("kept", "5 -> 8")}


def test_a_variable_of_a_patch_is_compared_with_what_it_was_given(project: Project) -> None:
    with project.running() as program, patcher.attach(program.pid) as session:
        source = project.edit("unit.c", "int limit", 'const char *fresh = "a";\nint more = 40;\nint limit')
        project.edit("unit.c", "n + limit", "n + more + fresh[0] + limit")
        assert {n: f for n, (f, _) in fates(session.apply(source)).items()} == {"fresh": "added", "more": "added"}
        first = int(program.ask(0))
        session.revert(0)
        project.edit("unit.c", "more = 40", "more = 41")
        project.edit("unit.c", '"a"', '"b"')
        assert fates(session.apply(source)) == {"fresh": ("kept", '"a" -> "b"'), "more": ("kept", "40 -> 41")}
        assert int(program.ask(0)) == first + 1


def reinit(pid: int, *names: str, **more: bool) -> patcher.Session:
    return patcher.attach(pid, reinit=names, **more)


def test_reinit_writes_the_new_value_with_the_code(project: Project) -> None:
    with project.running() as program:
        base = int(program.ask(0))
        source = project.edit("unit.c", "limit = 5", "limit = 7")
        project.edit("unit.c", '"old"', '"zoo"')
        project.edit("unit.c", "n + limit", "n + 1000 + limit")
        with reinit(program.pid, "limit", "word", "calls") as session, pytest.raises(patcher.PatcherError) as refused:
            session.apply(source)
        assert refused.value.code == "reinit"
        assert "calls" in refused.value.message
        assert int(program.ask(0)) == base + 1
        with reinit(program.pid, "limit", "word") as session:
            assert fates(session.apply(source)) == {
                "limit": ("reinitialised", "5 -> 7"),
                "word": ("reinitialised", '"old" -> "zoo"'),
            }
            new = base + 2 + 1000 + 2 * 2 + ord("z") - ord("o")
            assert int(program.ask(0)) == new
            session.revert(0)
            assert int(program.ask(0)) == new + 1 - 1000  # data is the program's
        project.edit("unit.c", "limit = 7", "limit = 9")
        with patcher.attach(program.pid) as session:
            assert fates(session.apply(source)) == {"limit": ("kept", "7 -> 9")}


def test_reinit_needs_no_changed_function(project: Project) -> None:
    with project.running() as program:
        base = int(program.ask(0))
        source = project.edit("unit.c", "calls = 10", "calls = 2000")
        with patcher.attach(program.pid) as session:
            assert fates(session.apply(source)) == {"answer.calls": ("kept", "10 -> 2000")}
            assert int(program.ask(0)) == base + 1
        with reinit(program.pid, "answer.calls") as session:
            found = session.apply(source)
            assert fates(found) == {"answer.calls": ("reinitialised", "10 -> 2000")}
            assert not found.functions
            assert found.number == 1
            assert session.status().generation == 1
            assert int(program.ask(0)) == base + 1990
            assert session.revert() == 0
            assert int(program.ask(0)) == base + 1991
            project.edit("unit.c", "calls = 2000", "calls = 0")
            assert fates(session.apply(source)) == {"answer.calls": ("reinitialised", "2000 -> 0")}
            assert int(program.ask(0)) == base - 10


@pytest.mark.parametrize(
    ("name", "words"),
    [("nothing", "no such variable"), ("limit", "is the one that it was given"), ("fresh", "new in")],
)
def test_a_name_without_a_new_value_is_refused(project: Project, name: str, words: str) -> None:
    with project.running() as program:
        base = int(program.ask(0))
        source = project.edit("unit.c", "int limit", "int fresh = 1;\nint limit")
        project.edit("unit.c", "n + limit", "n + 1000 + fresh + limit")
        with reinit(program.pid, name) as session, pytest.raises(patcher.PatcherError) as refused:
            session.apply(source)
        assert refused.value.code == "reinit"
        assert words in refused.value.message
        assert int(program.ask(0)) == base + 1


def test_a_thread_locals_value_is_kept_and_told_once_and_written_when_wanted(tmp_path: Path) -> None:
    unit = "static __thread int mine = 4;\nint answer(int n) { return n + mine++; }\n"
    project = Project(tmp_path, {"main.c": MAIN, "unit.c": unit})
    with project.running() as program:
        assert program.ask(100) == "104"
        source = project.edit("unit.c", "mine = 4", "mine = 50")
        with patcher.attach(program.pid) as session:
            assert [(v.name, v.outcome, v.note) for v in session.apply(source).variables] == [
                ("mine", "kept", "4 -> 50")
            ]
            assert session.apply(source).variables == ()
        assert program.ask(100) == "105"
        with reinit(program.pid, "mine") as session:
            (found,) = session.apply(source).variables
            assert (found.name, found.outcome) == ("mine", "reinitialised")
        assert [program.ask(100), program.ask(100)] == ["150", "151"]
        with reinit(program.pid, "mine") as session, pytest.raises(patcher.PatcherError, match="is the one that"):
            session.apply(source)


def test_units_with_variables_of_one_name_are_told_apart(tmp_path: Path) -> None:
    other = "static int limit = 3;\nint other(void) { return limit++; }\n"
    unit = "int other(void);\nstatic int limit = 5;\nint answer(int n) { limit++; return n * other() + limit; }\n"
    project = Project(tmp_path, {"main.c": MAIN, "unit.c": unit, "other.c": other})
    with project.running() as program:
        assert program.ask(100) == "306"
        sources = [project.edit("unit.c", "limit = 5", "limit = 50"), project.edit("other.c", "= 3", "= 30")]
        with reinit(program.pid, "limit") as session, pytest.raises(patcher.PatcherError, match=r"other\.c:limit"):
            session.apply(*sources)
        with reinit(program.pid, "other.c:limit") as session:
            found = session.apply(*sources)
            assert {(Path(v.file).name, v.outcome, v.note) for v in found.variables} == {
                ("unit.c", "kept", "5 -> 50"),
                ("other.c", "reinitialised", "3 -> 30"),
            }
        assert program.ask(100) == "3007"


def test_with_watch_each_new_value_is_written_once(project: Project) -> None:
    with project.running() as program, reinit(program.pid, "limit") as session:
        base = int(program.ask(0))
        project.edit("unit.c", "calls++", "calls++, limit++")
        source = project.edit("unit.c", "n + limit", "n + 1000 + limit")
        assert fates(session.change([source])) == {}  # nothing to write is no error here
        assert int(program.ask(0)) == base + 1003
        project.edit("unit.c", "limit = 5", "limit = 7")
        assert fates(session.change([source])) == {"limit": ("reinitialised", "5 -> 7")}
        assert int(program.ask(0)) == base + 1008
        project.edit("unit.c", "n + 1000", "n + 2000")
        assert fates(session.change([source])) == {}
        assert int(program.ask(0)) == base + 2011  # goes on from what the program made of it
