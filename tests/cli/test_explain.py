"""`patcher explain`: what a save would do, told before it is done."""

from __future__ import annotations

import json

import pytest
from project import Project, image_bytes

from patcher.target import processes_mapping

from .conftest import run, sentences

VALUE = "n + 1000 * calls"
TYPED = {
    "main.c": """\
#include <stdio.h>
#include "state.h"
struct state state = {1, 2};
int answer(int);
int main(void)
{
    int n;
    puts("ready");
    fflush(stdout);
    while (scanf("%d", &n) == 1) {
        printf("%d\\n", answer(n));
        fflush(stdout);
    }
    return 0;
}
""",
    "unit.c": """\
#include "state.h"
extern struct state state;
static int calls;
int answer(int n)
{
    calls++;
    return n + state.first + 10 * state.second + 100 * calls;
}
""",
    "state.h": "struct state { int first; int second; };\n",
}


def explained(*arguments: object, status: int = 0) -> dict[str, object]:
    done = run("explain", *arguments, "--json")
    assert done.returncode == status, done.stderr
    assert sentences(done.stderr) == []
    found: dict[str, object] = json.loads(done.stdout)
    assert set(found) == {"verdict", "files", "functions", "data", "types", "supplied", "frames", "refusal"}
    return found


def test_a_change_is_explained_and_not_made(project: Project) -> None:
    with project.running() as program:
        source = project.edit("unit.c", VALUE, "({ static int fresh = 7; n + fresh++ + 1000 * calls; })")
        before = program.ask(1)
        untouched = image_bytes(program.pid)
        found = explained(program.pid, source)
        words = run("explain", program.pid, source).stdout
        assert image_bytes(program.pid) == untouched
        assert found["verdict"] == "live"
        assert found["refusal"] is None
        (function,) = found["functions"]
        assert (function["name"], function["file"], function["status"]) == ("answer", str(source), "changed")
        assert function["why"]
        outcomes = {v["name"]: v["outcome"] for v in found["data"]}
        assert outcomes["fresh"] == "added"
        assert outcomes["calls"] == "as it is"
        assert "it can go live" in words
        assert int(program.ask(1)) == int(before) + 1000, "the old code counts on"


def test_nothing_to_do(project: Project) -> None:
    with project.running() as program:
        found = explained(program.pid, project.sources / "unit.c")
    assert (found["verdict"], found["functions"], found["data"]) == ("unchanged", [], [])


def test_a_changed_initialiser_is_explained_though_no_function_changes(project: Project) -> None:
    with project.running() as program:
        source = project.edit("unit.c", "static int calls;", "static int calls = 7;")
        found = explained(program.pid, source)
        assert found["verdict"] == "unchanged"
        assert [(v["name"], v["outcome"]) for v in found["data"]] == [("calls", "kept")]
        again = explained(program.pid, source, "--reinit", "calls")
        assert again["verdict"] == "live"
        assert "reinitialised" in [v["outcome"] for v in again["data"] if v["name"] == "calls"]
        assert program.ask(1) == "1001", "nothing was written"


def test_what_is_refused_is_explained_as_far_as_it_was_understood(tmp_path) -> None:
    project = Project(tmp_path / "p", TYPED)
    with project.running() as program:
        assert program.ask(0) == "121"
        project.edit("state.h", "int first;", "long first;")
        source = project.sources / "unit.c"
        untouched = image_bytes(program.pid)
        found = explained(program.pid, source, status=1)
        words = run("explain", program.pid, source)
        assert image_bytes(program.pid) == untouched
        assert found["verdict"] == "refused"
        assert [f["name"] for f in found["functions"]] == ["answer"]
        assert found["refusal"]["reason"] == "layout"
        (type_,) = found["types"]
        assert type_["name"].endswith("state")
        assert "size 8 -> 16" in type_["change"]
        assert type_["verdict"].startswith("refused")
        assert type_["change"] in words.stdout
        assert words.returncode == 1
        assert "refused (layout)" in words.stdout
        allowed = explained(program.pid, source, "--allow-layout-change", "state")
        assert allowed["verdict"] == "live"
        assert [t["verdict"] for t in allowed["types"]] == ["accepted: --allow-layout-change"]
        assert program.ask(0) == "221", "the process was not changed"


def test_the_one_patched_process_is_meant(project: Project) -> None:
    with project.running() as program:
        source = project.edit("unit.c", VALUE, "n + 2000 * calls")
        assert program.pid not in processes_mapping("/memfd:patcher")
        assert run("apply", program.pid, source).returncode == 0
        patched = processes_mapping("/memfd:patcher")
        assert program.pid in patched
        done = run("explain", source)
        outcome = done.returncode, "nothing to do" in done.stdout, "which process?" in done.stderr
        others = {*patched, *processes_mapping("/memfd:patcher")} - {program.pid}
        # Somebody else on this machine may patch as well, and may have begun or ended meanwhile.
        assert outcome == (0, True, False) or (others and outcome == (2, False, True)), done.stderr


@pytest.mark.parametrize("arguments", [("4711",), ("/nowhere.c",), ("1", "/nowhere.c")])
def test_mistakes_are_told_in_a_sentence(arguments) -> None:
    done = run("explain", *arguments)
    assert done.returncode in (1, 2, 3)
    assert "Traceback" not in done.stderr
    assert done.stderr
