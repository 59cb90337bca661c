"""The Python API on real processes: what it answers, what it says of threads in old code, and sessions side by side."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from project import MAIN, Project, assert_untouched, image_bytes

import patcher
from patcher.errors import BuildError, NoCompileCommand, TargetGone, UnresolvedSymbol
from patcher.report import Function

VALUE = "n + 1000 * calls"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "p")


def test_attach_apply_revert_status(project):
    with project.running() as program, patcher.attach(program.pid) as session:
        assert session.target.pid == program.pid
        assert session.status().generation == 0
        generation = session.apply(str(project.object("unit.c", (VALUE, "3"))))
        assert generation.number == 1
        assert generation.functions == (Function("answer", str(project.program), "changed"),)
        assert generation.active == ()
        assert 0 < generation.timings.stop < generation.timings.total
        assert program.ask(5) == "3"
        status = session.status()
        assert (status.pid, status.program, status.generation, status.recorded) == (
            program.pid,
            str(project.program),
            1,
            (1,),
        )
        assert [f.name for f in status.functions] == ["answer"]
        assert session.revert() == 0
        assert program.ask(5) == "2005"
    with project.running() as program, patcher.attach(program.pid) as session:
        source = project.edit("unit.c", VALUE, "4")
        assert session.apply(source).functions[0].name == "answer"
        assert program.ask(5) == "4"
        assert session.apply(source).functions == (), "the process has this code"


def test_spawn(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    script = f'echo "$1" >{tmp_path}/out; exec cat {tmp_path}/fifo'
    with patcher.spawn("sh", ["-c", script, "sh", "a b"]) as session:
        pid = session.target.pid
        assert session.status().pid == pid
        (tmp_path / "fifo").write_text("")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert (tmp_path / "out").read_text() == "a b\n"
        with pytest.raises(TargetGone):
            session.status()
    with pytest.raises(patcher.PatcherError, match="there is no program"):
        patcher.spawn(tmp_path / "missing")


def test_leaving_the_block_leaves_the_process_running(project):
    with project.running() as program:
        descriptors = len(os.listdir("/proc/self/fd"))
        with patcher.attach(program.pid) as session:
            session.apply(project.object("unit.c", (VALUE, "3")))
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert program.ask(5) == "3"
        assert_untouched(program.pid)


def test_a_process_that_ends_in_between(project):
    with project.running() as program, patcher.attach(program.pid) as session:
        change = project.object("unit.c", (VALUE, "3"))
        session.apply(change)
        program.process.kill()
        program.process.wait()
        for action in (session.status, session.revert, lambda: session.apply(change)):
            with pytest.raises(TargetGone):
                action()


def test_dry_run(project):
    with project.running() as program, patcher.attach(program.pid, dry_run=True) as session:
        before, maps = image_bytes(program.pid), Path(f"/proc/{program.pid}/maps").read_text()
        generation = session.apply(project.object("unit.c", (VALUE, "3")))
        assert [f.name for f in generation.functions] == ["answer"]
        assert (image_bytes(program.pid), Path(f"/proc/{program.pid}/maps").read_text()) == (before, maps)
        assert session.status().generation == 0
        assert program.ask(5) == "1005"


# --- what fails, and then does not ---


def test_a_failed_build_and_its_mend(project):
    with project.running() as program, patcher.attach(program.pid) as session:
        source = project.edit("unit.c", VALUE, "n +")
        with pytest.raises(BuildError) as caught:
            session.apply(source)
        assert "unit.c:5" in caught.value.diagnostics
        assert program.ask(5) == "1005"
        project.edit("unit.c", "n +;", "n + 1;")
        session.apply(source)
        assert program.ask(5) == "6"


def test_a_name_that_is_nowhere_and_then_there(project):
    with project.running() as program, patcher.attach(program.pid) as session:
        before = image_bytes(program.pid)
        caller = project.object(
            "unit.c", (f"    return {VALUE}", "    extern int nowhere(void);\n    return nowhere()")
        )
        with pytest.raises(UnresolvedSymbol, match="nowhere") as caught:
            session.apply(caller)
        assert "answer" in caught.value.message + caught.value.hint
        assert image_bytes(program.pid) == before
        added = project.object("main.c", ("int main(void)", "int nowhere(void)\n{\n    return 12;\n}\nint main(void)"))
        generation = session.apply(added, caller)
        assert {(f.name, f.status) for f in generation.functions} == {("answer", "changed"), ("nowhere", "added")}
        assert program.ask(5) == "12"


def test_a_source_that_nothing_says_how_to_compile(project, tmp_path):
    (tmp_path / "stray.c").write_text("int stray;\n")
    with project.running() as program, patcher.attach(program.pid) as session:
        with pytest.raises(NoCompileCommand) as caught:
            session.apply(tmp_path / "stray.c")
        assert "compile_commands.json" in caught.value.hint


# --- who is still in old code ---

WAITING = """\
#include <pthread.h>
#include <unistd.h>
static volatile int spinning = 1;
static int ends[2], entered;
static pthread_t threads[2];
int step(int n);

__attribute__((noinline)) void *block(void *unused)
{
    char byte;
    __atomic_add_fetch(&entered, 1, __ATOMIC_SEQ_CST);
    if (read(ends[0], &byte, 1) != 1)
        return NULL;
    return step(1) > 0 ? unused : NULL;
}

__attribute__((noinline)) void *spin(void *unused)
{
    int sum = 0;
    __atomic_add_fetch(&entered, 1, __ATOMIC_SEQ_CST);
    while (spinning)
        sum += step(sum);
    return sum ? unused : NULL;
}

int answer(int n)
{
    if (n == 0)
        return pipe(ends) + pthread_create(&threads[0], NULL, block, NULL) +
               pthread_create(&threads[1], NULL, spin, NULL);
    if (n == 1) {
        spinning = 0;
        return write(ends[1], "x", 1) + pthread_join(threads[0], NULL) + pthread_join(threads[1], NULL);
    }
    return n == 2 ? entered : 0;
}
"""
STEP = "int count;\nint step(int n)\n{\n    count++;\n    return n & 1;\n}\n"


def test_threads_in_old_code_are_named(tmp_path):
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": WAITING, "step.c": STEP})
    first = project.object("unit.c", ("sum += step(sum)", "sum -= step(sum)"), ("step(1) > 0", "step(1) > 2"))
    second = project.object("unit.c", ("sum += step(sum)", "sum -= step(sum)"), ("step(1) > 0", "step(1) > 3"))
    with project.running() as program, patcher.attach(program.pid) as session:
        assert program.ask(0) == "0"
        while program.ask(2) != "2":
            pass
        generation = session.apply(first)
        threads = {int(t) for t in os.listdir(f"/proc/{program.pid}/task")} - {program.pid}
        assert {function for _, function in generation.active} == {"block", "spin"}
        assert {thread for thread, _ in generation.active} == threads
        again = session.apply(second)
        assert [f.name for f in again.functions] == ["block"]
        assert {(f.function, f.generation) for f in again.frames} == {("block", 0), ("spin", 0)}
        assert all(f.loops for f in again.frames), "they were there before as well"
        assert program.ask(1) == "1"
        assert program.ask(0) == "0"
        while program.ask(2) != "4":
            pass
        last = session.apply(first)
        assert {(f.function, f.generation) for f in last.frames} == {("block", 2)}
        assert program.ask(1) == "1"
        assert_untouched(program.pid)


# --- sessions side by side ---


def test_two_sessions_take_turns(project):
    objects = [project.object("unit.c", (VALUE, str(n))) for n in (1, 2, 3, 4)]
    with (
        project.running() as program,
        patcher.attach(program.pid) as one,
        patcher.attach(program.pid) as other,
    ):
        for turn, (session, change) in enumerate(zip((one, other) * 2, objects, strict=True)):
            assert session.apply(change).number == turn + 1
            assert program.ask(5) == str(turn + 1)
            assert one.status() == other.status()
        assert other.apply(objects[3]).functions == (), "the other session knows what the first one did"
        assert one.revert(2) == 2
        assert other.revert() == 1
        assert program.ask(5) == "1"
        assert one.apply(objects[3]).number == 5
        assert other.revert(0) == 0
        assert program.ask(5).endswith("005")


def test_after_many_changes_and_ways_back_the_program_is_as_it_was(project):
    objects = [project.object("unit.c", (VALUE, str(n))) for n in (1, 2)]
    with project.running() as program, patcher.attach(program.pid) as session:
        before = image_bytes(program.pid)
        for turn in range(20):
            session.apply(objects[turn % 2])
            if turn % 3 == 0:
                session.revert(0)
        session.revert(0)
        assert image_bytes(program.pid) == before
