"""What the program may do while it is patched, and in which states it may be: nothing breaks, or a sentence says why.

tests/target has single stops and calls in such states, tests/patch libraries that come and go, tests/test_worlds.py
other root directories.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import shutil
import signal
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from project import Project, Running, assert_untouched, image_bytes, statuses

import patcher
from patcher.errors import Forbidden, TargetBusy, TargetGone
from patcher.patch import ledger as ledgers

UNIT = """\
int counted;
int answer(int n)
{
    counted++;
    return n + 5;
}
"""
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="takes root")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    main = (Path(__file__).parent / "programs" / "meanwhile.c").read_text()
    return Project(tmp_path_factory.mktemp("meanwhile") / "p", {"main.c": main, "unit.c": UNIT})


@pytest.fixture(scope="module")
def change(project: Project) -> Path:
    return project.object("unit.c", ("n + 5", "n + 105"))


@pytest.fixture(scope="module")
def back(project: Project) -> Path:
    """The original with a detour."""
    return project.object("unit.c", ("n + 5", "n + 5 - (counted < 0)"))


@pytest.fixture
def start(project: Project) -> Iterator[Callable[..., Running]]:
    with contextlib.ExitStack() as stack:
        yield lambda *words: stack.enter_context(project.running(*words))


def adopted(process: subprocess.Popen[str]) -> Running:
    """Return a program that was started with descriptors or in a world of its own."""
    program = Running.__new__(Running)
    program.process, program.pid = process, process.pid
    assert program.line() == "ready"
    return program


@contextlib.contextmanager
def when(monkeypatch: pytest.MonkeyPatch, moment: str, what: Callable[[], object]) -> Iterator[None]:
    """Have something happen once in the middle of a change: when it is linked, or written and about to be live."""
    done: list[object] = []

    def first(real: Callable[..., object]) -> Callable[..., object]:
        def replaced(*words: object, **more: object) -> object:
            if not done:
                done.append(what())
            return real(*words, **more)

        return replaced

    with monkeypatch.context() as patched:
        if moment == "linked":
            patched.setattr(ledgers.Ledger, "realise", first(ledgers.Ledger.realise))
        else:
            patched.setattr(ledgers, "flip", first(ledgers.flip))
        yield
    assert done, "it never happened"


MOMENTS = pytest.mark.parametrize("moment", ["linked", "written"])
PATCHED = pytest.mark.parametrize("patched", [False, True], ids=["first", "later"])


# --- it ends, or becomes another program --------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [(), ("threads", "threads")])
@pytest.mark.parametrize("end", ["exit", "crash", "kill"])
@PATCHED
@MOMENTS
def test_it_ends(start, change, back, monkeypatch, moment, patched, end, threads):
    program = start(*threads)

    def finish() -> None:
        program.process.kill() if end == "kill" else program.tell(end)
        os.waitid(os.P_PID, program.pid, os.WEXITED | os.WNOWAIT)

    with patcher.attach(program.pid) as session:
        if patched:
            session.apply(back)
        with when(monkeypatch, moment, finish), pytest.raises(TargetGone) as caught:
            session.apply(change)
        assert caught.value.exit_status == 3
    assert program.process.wait(10) == {"exit": 7, "crash": -signal.SIGSEGV, "kill": -signal.SIGKILL}[end]


@PATCHED
@MOMENTS
def test_it_executes_another_program(start, change, back, monkeypatch, moment, patched):
    program = start("threads")

    def execute() -> None:
        assert program.ask("exec") == "executing"
        assert program.ask("first line") == "first line"

    with patcher.attach(program.pid) as session:
        if patched:
            session.apply(back)
        with when(monkeypatch, moment, execute), pytest.raises(TargetGone):
            session.apply(change)
        assert "patcher" not in Path(f"/proc/{program.pid}/maps").read_text()
        assert program.ask("hello") == "hello"
        assert_untouched(program.pid)


# --- processes and threads are made -------------------------------------------------------------------------------


@PATCHED
@MOMENTS
def test_it_forks(project, change, back, monkeypatch, moment, patched):
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [project.program, str(reading)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=(reading,)
    )
    program, children = adopted(process), []
    try:
        with patcher.attach(program.pid) as session:
            if patched:
                session.apply(back)
            with when(monkeypatch, moment, lambda: children.append(int(program.ask("fork")))):
                session.apply(change)
            assert program.ask(5) == "110"
            os.write(writing, b"5")
            assert program.line() == "10", "the child has what was live when it was made"
            assert_untouched(children[0])
            with patcher.attach(children[0]) as other:
                assert other.status().generation == int(patched)
                other.apply(change)
                os.write(writing, b"5")
                assert program.line() == "110"
                other.revert(0)
            session.revert(0)
            assert program.ask(5) == "10"
    finally:
        os.close(writing)
        os.close(reading)
        program.end()
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("option", ["churn", "spawn"])
def test_threads_and_programs_come_and_go(start, change, back, option):
    program = start("threads", option)
    with patcher.attach(program.pid) as session:
        for _ in range(20):
            session.apply(change)
            assert program.ask(5) == "110"
            session.apply(back)
            assert program.ask(5) == "10"
            session.revert(0)
        wrong, calls, *made = map(int, program.ask("wrong").split())
        while not made[option == "spawn"]:
            wrong, calls, *made = map(int, program.ask("wrong").split())
    assert wrong == 0
    assert calls > 100
    assert_untouched(program.pid)


def test_while_it_is_suspended_by_a_vfork(project, change, back):
    """It cannot be stopped then: a first patch is refused with the reason, a later one needs no stop."""
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [project.program, str(reading)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=(reading,)
    )
    program = adopted(process)
    try:
        with patcher.attach(program.pid) as session:
            before = image_bytes(program.pid)
            assert program.ask("vfork") == "waiting"
            while statuses(program.pid, "State") != {"D"}:
                time.sleep(0.001)
            with pytest.raises(TargetBusy, match=r"state D .*vfork"):
                session.apply(change)
            assert image_bytes(program.pid) == before
            os.write(writing, b"x")
            assert program.line() == "back"
            assert program.ask(5) == "10"
            session.apply(back)
            assert program.ask("vfork") == "waiting"
            while statuses(program.pid, "State") != {"D"}:
                time.sleep(0.001)
            session.apply(change)
            os.write(writing, b"x")
            assert program.line() == "back"
            assert program.ask(5) == "110"
            assert_untouched(program.pid)
    finally:
        os.close(writing)
        os.close(reading)
        program.end()


# --- it is stopped ------------------------------------------------------------------------------------------------


def stop_and_see(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])


def assert_stopped(pid: int) -> None:
    while statuses(pid, "State") != {"T"}:
        time.sleep(0.001)
    assert statuses(pid, "TracerPid") == {"0"}
    assert os.waitpid(pid, os.WUNTRACED | os.WNOHANG) == (0, 0), "its parent is told of a stop once"


@pytest.mark.parametrize("threads", [(), ("threads", "threads")])
def test_a_stopped_program_is_patched_and_stays_stopped(start, change, back, threads):
    program = start(*threads)
    stop_and_see(program.pid)
    with patcher.attach(program.pid) as session:
        for file in (change, back, change):
            session.apply(file)
            assert_stopped(program.pid)
        session.revert(0)
        assert_stopped(program.pid)
        session.apply(change)
    assert_stopped(program.pid)
    os.kill(program.pid, signal.SIGCONT)
    assert program.ask(5) == "110"
    assert program.ask("wrong").startswith("0 ")
    assert_untouched(program.pid)


@PATCHED
@MOMENTS
def test_it_is_stopped_in_the_middle(start, change, back, monkeypatch, moment, patched):
    program = start("threads")
    with patcher.attach(program.pid) as session:
        if patched:
            session.apply(back)
        with when(monkeypatch, moment, lambda: stop_and_see(program.pid)):
            session.apply(change)
        assert_stopped(program.pid)
        os.kill(program.pid, signal.SIGCONT)
        assert program.ask(5) == "110"
        # While all threads stand still for us, and continued there.
        with session.target.stopped():
            os.kill(program.pid, signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(program.pid, os.WUNTRACED)[1])
        assert_stopped(program.pid)
        with session.target.stopped():
            os.kill(program.pid, signal.SIGCONT)
        assert program.ask(5) == "110"
        assert program.ask("wrong").startswith("0 ")
        assert_untouched(program.pid)


def own_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_ctrl_z(project, change):
    """A shell starts it as a job of a terminal, whose keys stop it; `fg` goes on with it."""
    ours, theirs = pty.openpty()
    command = ["bash", "--norc", "-i"]
    shell = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=own_terminal
    )
    os.close(theirs)
    told = b""

    def type_and_await(keys: str, answer: str) -> None:
        nonlocal told
        os.write(ours, keys.encode())
        told = b""
        while answer.encode() not in told:
            told += os.read(ours, 1000)

    try:
        type_and_await(f"{project.program} threads\n", "ready")
        (pid,) = map(int, Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split())
        type_and_await("\x1a", "Stopped")
        assert statuses(pid, "State") == {"T"}
        with patcher.attach(pid) as session:
            session.apply(change)
        while statuses(pid, "State") != {"T"}:
            time.sleep(0.001)
        type_and_await("fg\n", "threads")
        type_and_await("5\n", "110")
        assert_untouched(pid)
        os.kill(pid, signal.SIGKILL)
    finally:
        shell.kill()
        shell.wait()
        os.close(ours)


# --- somebody else traces it --------------------------------------------------------------------------------------


@contextlib.contextmanager
def traced_by(tool: str, pid: int) -> Iterator[subprocess.Popen[str]]:
    """`gdb`: it stands still in the debugger. `strace`: it runs on."""
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} here")
    commands = {
        "strace": ["strace", "-f", "-q", "-o", "/dev/null", "-p", str(pid)],
        "gdb": ["gdb", "-q", "-nx", "-p", str(pid), "-ex", "echo attached\\n"],
    }
    tracer = subprocess.Popen(
        commands[tool], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        if tool == "gdb":
            while "attached" not in tracer.stdout.readline():
                pass
        while "0" in statuses(pid, "TracerPid"):
            time.sleep(0.005)
        yield tracer
    finally:
        if tool == "gdb":
            tracer.communicate("detach\nquit\n", timeout=60)
        else:
            tracer.terminate()
            tracer.communicate(timeout=60)
        while statuses(pid, "TracerPid") != {"0"}:
            time.sleep(0.005)


@pytest.mark.parametrize("tool", ["gdb", "strace"])
def test_under_another_tracer(start, change, back, tool):
    """What has to stop the program is refused, naming who has it; the rest is done."""
    program = start("threads")
    with traced_by(tool, program.pid) as tracer, patcher.attach(program.pid) as session:
        before = image_bytes(program.pid)
        assert session.status().generation == 0
        with pytest.raises(TargetBusy, match=rf"traced by process {tracer.pid} \({tool}\)") as caught:
            session.apply(change)
        assert caught.value.hint
        assert image_bytes(program.pid) == before
        assert "patcher" not in Path(f"/proc/{program.pid}/maps").read_text()
    with patcher.attach(program.pid) as session:
        session.apply(back)
    with traced_by(tool, program.pid) as tracer, patcher.attach(program.pid) as session:
        assert session.apply(change).timings.stop == 0
        assert session.status().generation == 2
        session.revert()
        assert session.status().generation == 1
        assert session.apply(change).number == 3
        with pytest.raises(TargetBusy, match=rf"traced by process {tracer.pid} \({tool}\)"):
            session.revert(0)
        assert session.status().generation == 3
    assert program.ask(5) == "110"
    assert program.ask("wrong").startswith("0 ")
    with patcher.attach(program.pid) as session:
        session.revert(0)
    assert program.ask(5) == "10"
    assert_untouched(program.pid)


# --- it may do less than others, or sees another world --------------------------------------------------------------


@ROOT
@pytest.mark.parametrize("options", [("nobody",), ("undumpable",), ("nobody", "undumpable"), ("blocked", "threads")])
def test_less_privileged_or_deaf(start, change, back, options):
    program = start(*options)
    with patcher.attach(program.pid) as session:
        session.apply(change)
        assert program.ask(5) == "110"
        session.apply(back)
        session.revert(0)
        assert program.ask(5) == "10"
    blocked = statuses(program.pid, "SigBlk")
    assert blocked == ({"fffffffe7ffbfeff"} if "blocked" in options else {"0" * 16})
    assert_untouched(program.pid)


MMAP, MPROTECT, MUNMAP, MEMFD_CREATE = 9, 10, 11, 319
KILL, TRAP, EPERM = 0x80000000, 0x30000, 0x50001


@ROOT
@pytest.mark.parametrize(("number", "name"), [(MMAP, "mmap"), (MUNMAP, "munmap")])
@pytest.mark.parametrize("action", [KILL, TRAP])
def test_a_filter_that_kills_for_what_a_first_patch_needs(start, change, back, number, name, action):
    program = start()
    assert program.ask(f"confine {number}:{action:x}") == "0"
    before = image_bytes(program.pid)
    with patcher.attach(program.pid) as session:
        with pytest.raises(Forbidden, match=f"seccomp filter .* for {name}") as caught:
            session.apply(change)
        assert caught.value.code == "seccomp"
        assert session.status().generation == 0
    assert image_bytes(program.pid) == before
    nameless = [line for line in Path(f"/proc/{program.pid}/maps").read_text().splitlines() if line.endswith(" 0 ")]
    assert not any("r-xp" in line for line in nameless), "nothing is left of an arena"
    assert program.ask(5) == "10"
    assert_untouched(program.pid)


@ROOT
@pytest.mark.parametrize("action", [KILL, EPERM])
@pytest.mark.parametrize("number", [MPROTECT, MEMFD_CREATE])
def test_a_filter_against_what_can_be_done_without(start, change, number, action):
    program = start("threads")
    assert program.ask(f"confine {number}:{action:x}") == "0"
    with patcher.attach(program.pid) as session:
        session.apply(change)
        assert program.ask(5) == "110"
        session.revert(0)
        assert program.ask(5) == "10"
    with patcher.attach(program.pid) as session:
        assert session.status().recorded == (1,)
        session.apply(change)
    assert program.ask(5) == "110"
    assert_untouched(program.pid)


@ROOT
def test_a_filter_that_answers_mmap_with_an_error(start, change):
    program = start()
    assert program.ask(f"confine {MMAP}:{EPERM:x}") == "0"
    with patcher.attach(program.pid) as session, pytest.raises(TargetBusy, match="cannot be mapped"):
        session.apply(change)
    assert program.ask(5) == "10"
    assert_untouched(program.pid)


@ROOT
def test_a_filter_that_came_after_the_first_patch(start, change, back):
    program = start()
    with patcher.attach(program.pid) as session:
        session.apply(back)
        assert program.ask(f"confine {MMAP}:{KILL:x}") == "0"
        session.apply(change)
        assert program.ask(5) == "110"
        session.revert(0)
    assert program.ask(5) == "10"
    assert_untouched(program.pid)


@ROOT
def test_in_other_namespaces(project, change):
    """Its process numbers, its mounts and so its files are others than ours."""
    if subprocess.run(["unshare", "-pfm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("namespaces cannot be made here")
    hide = f"mount -t tmpfs none {project.root}/src && exec 9<{project.program} && mount -t tmpfs none {project.root}"
    run = f"{hide} && exec /proc/self/fd/9 threads"
    process = subprocess.Popen(
        ["unshare", "-pf", "--mount-proc", "sh", "-c", run], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    program = adopted(process)
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        program.pid = int(children[0])
        assert "\t1" in next(n for n in Path(f"/proc/{program.pid}/status").read_text().splitlines() if "NSpid" in n)
        with patcher.attach(program.pid) as session:
            session.apply(change)
            assert program.ask(5) == "110"
            session.revert(0)
            assert program.ask(5) == "10"
        assert_untouched(program.pid)
    finally:
        process.kill()
        process.communicate()
        with contextlib.suppress(ProcessLookupError):
            os.kill(program.pid, signal.SIGKILL)
