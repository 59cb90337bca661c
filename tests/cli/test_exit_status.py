"""The exit statuses that other tools rely on, each once for every kind of reason."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import MAIN, Project, Running, image_bytes

from cli.conftest import ENVIRONMENT, run

DONE, REFUSED, USAGE, NO_TARGET = 0, 1, 2, 3
# With an argument: a filter that kills for mmap, which a first patch takes.
ENTERED = "int main(int count, char **words)\n{\n    if (count > 1)\n        confine();"
CONFINED = MAIN.replace("int main(void)\n{", ENTERED).replace(
    "int answer(int n);",
    """\
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
int answer(int n);
static void confine(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 9, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {4, code};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
        abort();
}
""",
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    unit = "static int calls;\nint answer(int n)\n{\n    calls++;\n    return n + 1000 * calls;\n}\n"
    return Project(tmp_path_factory.mktemp("status") / "p", {"main.c": CONFINED, "unit.c": unit})


@pytest.fixture(scope="module")
def change(project: Project) -> Path:
    return project.object("unit.c", ("n + 1000 * calls", "3"))


@pytest.fixture
def program(project: Project) -> Iterator[Running]:
    with project.running() as program:
        yield program


def test_done(program: Running, change: Path) -> None:
    assert run("explain", program.pid, change).returncode == DONE
    assert run("apply", program.pid, change, "--dry-run").returncode == DONE
    assert run("apply", program.pid, change).returncode == DONE
    assert run("apply", program.pid, change).returncode == DONE, "nothing to do"
    assert run("status", program.pid).returncode == DONE
    assert run("revert", program.pid).returncode == DONE
    assert run("revert", program.pid, "0").returncode == DONE
    assert run("header").returncode == DONE


def test_refused(project: Project, program: Running, change: Path, tmp_path: Path) -> None:
    missing = project.object("unit.c", ("n + 1000 * calls", "nowhere()"), ("static", "int nowhere(void);\nstatic"))
    broken = tmp_path / "broken.c"
    broken.write_text("int f( {")
    before = image_bytes(program.pid)
    for files in ((missing,), (broken,), (tmp_path / "no.o",), (change, missing)):
        assert run("apply", program.pid, *files).returncode == REFUSED, files
    assert run("explain", program.pid, missing).returncode == REFUSED
    assert run("revert", program.pid).returncode == REFUSED, "nothing to revert"
    assert run("revert", program.pid, "7").returncode == REFUSED
    assert image_bytes(program.pid) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may read another process's filters")
def test_refused_for_its_filters(project: Project, change: Path) -> None:
    with project.running("confined") as program:
        before = image_bytes(program.pid)
        done = run("apply", program.pid, change, "--json")
        assert done.returncode == REFUSED, done.stderr
        assert "seccomp filter that may kill it for mmap" in done.stderr
        assert image_bytes(program.pid) == before
        assert program.ask(5) == "1005"


def test_refused_while_somebody_traces_it(program: Running, change: Path) -> None:
    command = ["strace", "-qq", "-o", "/dev/null", "-p", str(program.pid)]
    with subprocess.Popen(command) as other:
        while f"TracerPid:\t{other.pid}\n" not in Path(f"/proc/{program.pid}/status").read_text():
            assert other.poll() is None
        assert run("apply", program.pid, change).returncode == REFUSED
        other.terminate()
    assert run("apply", program.pid, change).returncode == DONE


@pytest.mark.parametrize(
    "words",
    [
        ("apply", "1", "x.o", "--active", "never"),
        ("apply", "1", "x.o", "--timeout", "-1"),
        ("apply", "1", "x.o", "--keep", "0"),
        ("status", "0"),
        ("attach", "1", "--watch", "/no/such/place"),
        ("explain", "1"),
    ],
    ids=" ".join,
)
def test_wrong_usage(words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.returncode == USAGE, done.stderr
    assert "Traceback" not in done.stderr


def test_no_such_process(change: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    for words in (("status",), ("apply", change), ("revert",), ("attach",), ("explain", change)):
        assert run(words[0], ended.pid, *words[1:]).returncode == NO_TARGET, words


def test_what_cannot_be_worked_on(change: Path) -> None:
    """A thread is no process."""
    script = "import threading; threading.Thread(target=input).start(); print(threading.enumerate()[-1].native_id)"
    command = [sys.executable, "-uc", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert run("apply", int(other.stdout.readline()), change).returncode == NO_TARGET
        other.communicate("\n")


def test_gone_while_it_is_watched(project: Project, program: Running) -> None:
    command = ["attach", str(program.pid), "--watch", str(project.sources)]
    with subprocess.Popen(
        [sys.executable, "-m", "patcher", *command], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as watching:
        assert watching.stderr is not None
        assert "watching" in watching.stderr.readline()
        os.kill(program.pid, signal.SIGKILL)
        program.process.wait()
        watching.communicate(timeout=20)
        assert watching.returncode == DONE


def test_ctrl_c_while_it_is_watched(project: Project, program: Running) -> None:
    command = ["attach", str(program.pid), "--watch", str(project.sources)]
    with subprocess.Popen(
        [sys.executable, "-m", "patcher", *command], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as watching:
        assert watching.stderr is not None
        assert "watching" in watching.stderr.readline()
        watching.send_signal(signal.SIGINT)
        watching.communicate(timeout=20)
        assert watching.returncode == DONE
    assert program.ask(5) == "1005"


@pytest.mark.parametrize(("script", "status"), [("exit 5", 5), ("kill -TERM $$", 128 + 15), ("exit 0", 0)])
def test_the_programs_own(script: str, status: int) -> None:
    assert run("spawn", "sh", "--", "-c", script).returncode == status


def test_a_program_that_cannot_be_started(tmp_path: Path) -> None:
    done = run("spawn", tmp_path / "none")
    assert done.returncode == REFUSED, done.stderr
