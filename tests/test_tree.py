"""A process and its descendants, changed as one: preforked workers, and those that come and go meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import Project, Running, assert_untouched

import patcher
from patcher.errors import UnresolvedSymbol
from patcher.tree import descendants

MASTER = r"""
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

int answer(int n);
static int to[64], from[64], pids[64], count;

static void work(int in, int out)
{
    int n;
    while (read(in, &n, sizeof n) == sizeof n) {
        n = answer(n);
        if (write(out, &n, sizeof n) != sizeof n)
            break;
    }
    _exit(0);
}

static int start(void)
{
    int down[2], up[2];
    if (pipe(down) || pipe(up))
        abort();
    pids[count] = fork();
    if (pids[count] == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (int i = 0; i < count; i++)
            close(to[i]);
        close(down[1]);
        close(up[0]);
        work(down[0], up[1]);
    }
    close(down[0]);
    close(up[1]);
    to[count] = down[1];
    from[count] = up[0];
    return pids[count++];
}

/* all N: what the master and every worker answer; fork: one more worker; end K: worker K ends; other: a program */
int main(void)
{
    char line[80];
    int n;
    setvbuf(stdout, NULL, _IOLBF, 0);
    signal(SIGPIPE, SIG_IGN);
    for (int i = 0; i < 3; i++)
        start();
    puts("ready");
    while (fgets(line, sizeof line, stdin)) {
        if (sscanf(line, "all %d", &n) == 1) {
            printf("%d", answer(n));
            for (int i = 0; i < count; i++) {
                int reply = n;
                if (!pids[i] || write(to[i], &reply, sizeof reply) != sizeof reply ||
                    read(from[i], &reply, sizeof reply) != sizeof reply)
                    continue;
                printf(" %d", reply);
            }
            puts("");
        } else if (!strncmp(line, "fork", 4)) {
            printf("%d\n", start());
        } else if (sscanf(line, "end %d", &n) == 1) {
            kill(pids[n], SIGKILL);
            waitpid(pids[n], NULL, 0);
            pids[n] = 0;
            puts("ended");
        } else if (!strncmp(line, "other", 5)) {
            int child = fork();
            if (child == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                execl("/bin/sleep", "sleep", "1000", NULL);
                _exit(1);
            }
            printf("%d\n", child);
        }
    }
    return 0;
}
"""
UNIT = """\
int answer(int n);
int answer(int n)
{
    static int calls;
    return n + 10 * ++calls;
}
"""
VALUE = "n + 10 * ++calls"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "p", {"main.c": MASTER, "unit.c": UNIT})


@pytest.fixture
def program(project: Project) -> Iterator[Running]:
    with project.running() as program:
        yield program


def change(project: Project, new: str) -> Path:
    return project.object("unit.c", (VALUE, new))


def test_all_processes_of_a_tree_are_changed_and_taken_back(project: Project, program: Running) -> None:
    assert program.ask("all 1") == "11 11 11 11"
    with patcher.attach(program.pid, tree=True) as session:
        outcome = session.apply(change(project, "n + 100 * ++calls"))
        assert [m.generation for m in outcome.members] == [1, 1, 1, 1]
        assert {m.pid for m in outcome.members} == {program.pid, *descendants(program.pid)}
        assert program.ask("all 1") == "201 201 201 201", "and every process has its own count"
        session.apply(change(project, "n + 1000 * ++calls"))
        assert program.ask("all 1") == "3001 3001 3001 3001"
        assert session.revert() == 1
        assert program.ask("all 1") == "401 401 401 401"
        assert session.revert(0) == 0
        assert program.ask("all 1") == "51 51 51 51"
        for pid in (program.pid, *descendants(program.pid)):
            assert_untouched(pid)


def test_a_worker_forked_later_has_the_code_and_goes_on_with_the_others(project: Project, program: Running) -> None:
    with patcher.attach(program.pid, tree=True) as session:
        session.apply(change(project, "n + 100 * ++calls"))
        child = int(program.ask("fork"))
        assert program.ask("all 1") == "101 101 101 101 101"
        outcome = session.apply(change(project, "n + 1000 * ++calls"))
        assert child in {m.pid for m in outcome.members}
        assert {m.generation for m in outcome.members} == {2}
        assert program.ask("all 1") == "2001 2001 2001 2001 2001"
        assert session.revert(1) == 1
        assert program.ask("all 1") == "301 301 301 301 301"


def test_numbers_agree_where_one_was_patched_before(project: Project, program: Running) -> None:
    with patcher.attach(program.pid) as session:
        session.apply(change(project, "n + 50"))
        session.apply(change(project, "n + 60"))
        assert program.ask("all 1") == "61 11 11 11"
    with patcher.attach(program.pid, tree=True) as session:
        outcome = session.apply(change(project, "n + 70"))
        assert {m.generation for m in outcome.members} == {3}
        assert program.ask("all 1") == "71 71 71 71"
        assert session.revert() == 2
        assert program.ask("all 1") == "61 21 21 21", "what the workers ran before"


def test_a_worker_that_ends_is_no_failure(project: Project, program: Running) -> None:
    with patcher.attach(program.pid, tree=True) as session:
        session.apply(change(project, "n + 70"))
        program.ask("end 1")
        outcome = session.apply(change(project, "n + 80"))
        assert len(outcome.members) == 3
        assert program.ask("all 1") == "81 81 81"


def test_a_descendant_with_another_program_is_left_alone(project: Project, program: Running) -> None:
    other = int(program.ask("other"))
    while os.readlink(f"/proc/{other}/exe") == str(project.program):
        pass
    with patcher.attach(program.pid, tree=True) as session:
        outcome = session.apply(change(project, "n + 70"))
    why = {m.pid: m.why for m in outcome.members}
    assert "has nothing of this" in why.pop(other)
    assert set(why.values()) == {""}
    assert program.ask("all 1") == "71 71 71 71"


def traced(pid: int) -> subprocess.Popen[bytes]:
    """Let somebody trace a process, and return when that is so."""
    text = "import ctypes, sys; print(ctypes.CDLL(None).ptrace(0x4206, int(sys.argv[1]), 0, 0), flush=True); input()"
    tracer = subprocess.Popen([sys.executable, "-c", text, str(pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert tracer.stdout is not None
    assert tracer.stdout.readline() == b"0\n"
    return tracer


def test_all_or_none_unless_best_effort(project: Project, program: Running) -> None:
    """The first patch of a function takes tracing, which somebody else does in one of the workers."""
    worker = descendants(program.pid)[1]
    first = change(project, "n + 80")
    with traced(worker) as debugger:
        with (
            patcher.attach(program.pid, tree=True) as session,
            pytest.raises(patcher.PatcherError, match=f"process {worker}, a descendant of {program.pid}: .*traced"),
        ):
            session.apply(first)
        assert program.ask("all 1") == "11 11 11 11", "none was changed"
        with patcher.attach(program.pid, tree=True, best_effort=True) as session:
            outcome = session.apply(first)
        why = {m.pid: m.why for m in outcome.members}
        assert "traced" in why[worker]
        assert program.ask("all 1") == "81 81 21 81"
        debugger.communicate()


def test_what_fails_in_one_after_others_changed_is_taken_back(
    project: Project, program: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last worker refuses only when it is its turn: somebody began to trace it after the rehearsal."""
    worker = descendants(program.pid)[-1]
    tracers = []
    with patcher.attach(program.pid, tree=True) as session:
        from patcher.session import Session

        relink = Session.relink

        def late(self, sources):
            if self.target.pid == worker:
                tracers.append(traced(worker))
            return relink(self, sources)

        monkeypatch.setattr(Session, "relink", late)
        with pytest.raises(patcher.PatcherError, match=f"process {worker}"):
            session.apply(change(project, "n + 70"))
        assert len(tracers) == 1
        tracers[0].communicate()
        monkeypatch.undo()
        assert program.ask("all 1") == "11 11 11 11"
        session.apply(change(project, "n + 70"))
        assert program.ask("all 1") == "71 71 71 71"


def test_what_is_refused_is_refused_everywhere(project: Project, program: Running) -> None:
    with patcher.attach(program.pid, tree=True) as session:
        with pytest.raises(UnresolvedSymbol):
            session.apply(
                project.object(
                    "unit.c", (VALUE, "n + nowhere()"), ("int answer(int n);", "int nowhere(void); int answer(int n);")
                )
            )
        assert program.ask("all 1") == "11 11 11 11"


def test_the_command_line(project: Project, program: Running) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "patcher", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    done = run("apply", program.pid, change(project, "n + 70"), "--tree", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["processes"]) == 4
    assert "in 4 processes" in done.stderr
    done = run("status", program.pid, "--tree", "--json")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [f["pid"] for f in found] == [program.pid, *descendants(program.pid)]
    assert {f["generation"] for f in found} == {1}
    assert run("revert", program.pid, "0", "--tree").returncode == 0
    assert program.ask("all 1") == "11 11 11 11"


IN_WORK = ("n = answer(n);", "n = answer(n) + 1;")  # a change of what every worker is in, and the master is not


@pytest.mark.parametrize(
    "options",
    [
        {"active": "refuse"},
        {"active": "drain", "timeout": 0.1},
        {"active": "run-on", "consistency": "generation", "timeout": 0.1},
    ],
    ids=["refuse", "drain", "generation"],
)
def test_somebody_in_the_code_of_one_process(project: Project, program: Running, options: dict[str, object]) -> None:
    """None is changed then, or, with best effort, the others are; and a generation that is live everywhere stays."""
    work = project.object("main.c", IN_WORK)
    with patcher.attach(program.pid, tree=True) as session:
        session.apply(change(project, "n + 70"))
    with patcher.attach(program.pid, tree=True, **options) as session:
        with pytest.raises(patcher.UnsafeChange, match=f"a descendant of {program.pid}: .* is in use") as caught:
            session.apply(work)
        assert caught.value.code == "active"
        assert {s.generation for s in session.statuses()} == {1}
        assert program.ask("all 1") == "71 71 71 71"
        assert session.explain(work).outlook.value == ("refused" if options["active"] == "refuse" else "live")
    with patcher.attach(program.pid, tree=True, best_effort=True, **options) as session:
        outcome = session.apply(work)
        why = {m.pid: m.why for m in outcome.members}
        assert why.pop(program.pid) == ""
        assert all("is in use" in text for text in why.values())
        first, *others = [s.generation for s in session.statuses()]
        assert (first > 1, others) == (True, [1, 1, 1])
        assert session.explain(work).outlook.value == "unchanged"


def test_who_is_in_the_code_of_all_processes_is_told(project: Project, program: Running) -> None:
    with patcher.attach(program.pid, tree=True) as session:
        outcome = session.apply(project.object("main.c", IN_WORK))
        workers = descendants(program.pid)
        assert {f.thread for f in outcome.frames} == set(workers)
        assert program.ask("all 1") == "11 11 11 11", "they are in the loop, and stay there"
        assert session.revert() == 0
        for pid in (program.pid, *workers):
            assert_untouched(pid)


def test_explain_a_change_of_a_tree(project: Project, program: Running) -> None:
    """What one process would refuse is refused for all of them, and it is said which one it is."""

    def explained(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "patcher", "explain", str(program.pid), str(work), *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    work = project.object("main.c", IN_WORK)
    done = explained("--tree")
    assert (done.returncode, "it can go live" in done.stdout) == (0, True), done.stderr
    done = explained("--tree", "--active", "refuse")
    assert done.returncode == 1
    assert f"a descendant of {program.pid}" in done.stdout
    assert "refused (active)" in done.stdout
    done = explained("--active", "refuse")
    assert done.returncode == 0, "the process by itself has nobody there"
