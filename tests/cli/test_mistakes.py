"""What a newcomer does wrong: one sentence that says what, one that says what to do, a status, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import COMMAND, ENVIRONMENT, SECONDS, run, sentences

MISTAKES: dict[str, tuple[str, int, str, str]] = {
    # what is typed; the status; parts of the sentence, and of the hint
    "a name instead of a process": ("attach {name}", 2, "'{name}' is not a process id; {name} runs as {pid}", "--help"),
    "a program that does not run": (
        "attach ./{name}x",
        2,
        "no process of that name runs; start one with `patcher spawn`",
        "",
    ),
    "a process that is not there": ("status {gone}", 3, "there is no process {gone}", ""),
    "no process": ("attach", 2, "which process? attach wants its id", "pidof"),
    "process 0": ("status 0", 2, "0 is no process id", ""),
    "files without a process": ("apply unit.c a.o", 2, "'unit.c' is a file; the process id comes before it", ""),
    "no files": ("apply {pid}", 2, "which files?", "physics.c"),
    "a directory instead of a program": ("spawn ./dir", 1, "./dir is a directory, not a program", "name the program"),
    "a source instead of a program": ("spawn ./unit.c", 1, "./unit.c is not a program", "build it"),
    "a text that may be executed": ("spawn ./text", 1, "./text is not a program", "build it"),
    "a script that may not be executed": ("spawn ./script", 1, "may not be executed", "chmod +x ./script"),
    "a program that was not built": ("spawn ./missing", 1, "there is no program ./missing", "build it first"),
    "a program of this directory": ("spawn prog", 1, "there is no program prog in PATH", "write ./prog"),
    "no program": ("spawn", 2, "which program? spawn wants one", "patcher spawn ./prog --watch"),
    "a program's own option": ("spawn ./prog -x", 2, "spawn has no option -x", "patcher spawn PROG -- -x"),
    "a path that is not there": ("attach {pid} --watch nowhere", 2, "--watch nowhere: no such file or directory", ""),
    "a path of spawn that is not there": ("spawn ./prog --watch nowhere", 2, "--watch nowhere: no such file", ""),
    "a directory as a database": ("spawn ./prog --compile-commands dir", 2, "dir: is a directory, not a file", ""),
    "an option of another command": ("apply {pid} unit.c --watch .", 2, "--watch is an option of spawn, attach", ""),
    "the one of another command": ("attach {pid} --aslr", 2, "--aslr is an option of spawn, not of attach", ""),
    "an option before the command": ("--watch . spawn ./prog", 2, "--watch stands behind a command: spawn", ""),
    "an option with a slip": ("attach {pid} --wacth .", 2, "no option --wacth; did you mean --watch?", "--help"),
    "an option without its value": ("attach {pid} --keep", 2, "'--keep' requires an argument", ""),
    "a value that is none": ("attach {pid} --active never", 2, "'never' is not one of 'run-on', 'drain'", ""),
    "a number that is none": ("revert {pid} first", 2, "'first' is not a number", ""),
    "a command with a slip": ("statsu {pid}", 2, "there is no command statsu; did you mean status?", "--help"),
    "a program as an object": ("apply {pid} ./prog", 1, "not a relocatable object", "-c"),
    "a source of another program": ("apply {pid} unit.c", 1, "nothing says how it is compiled", "compile_commands"),
    "nothing to go back to": ("revert {pid}", 1, "", ""),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "dir").mkdir()
    (tmp_path / "unit.c").write_text("int f(void)\n{\n    return 1;\n}\n")
    (tmp_path / "text").write_text("hello\n")
    (tmp_path / "text").chmod(0o755)
    (tmp_path / "script").write_text("#!/bin/sh\n")
    shutil.copy("/bin/true", tmp_path / "prog")
    return tmp_path


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """A process with a name that no other has."""
    name = f"wait{os.getpid()}"
    shutil.copy("/bin/cat", tmp_path / name)
    with subprocess.Popen([tmp_path / name], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"x\n")
        process.stdin.flush()
        process.stdout.readline()  # it is what it will be
        yield name, process.pid
        process.kill()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_a_sentence(mistake, place, waiting):
    typed, status, sentence, hint = MISTAKES[mistake]
    ended = subprocess.Popen(["true"])
    ended.wait()
    name, pid = waiting
    words = {"name": name, "pid": pid, "gone": ended.pid}
    done = run(*(word.format(**words) for word in typed.split()), cwd=place)
    assert done.returncode == status, done.stderr
    (said,) = sentences(done.stderr)
    assert sentence.format(**words) in said
    assert done.stdout == ""
    rest = done.stderr.replace(said, "").strip()
    assert hint in rest
    assert len(rest.splitlines()) <= 1


def test_nothing_is_watched(place):
    with subprocess.Popen(
        [*COMMAND, "spawn", "cat"], cwd=place, env=ENVIRONMENT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        _, rest = process.communicate("", timeout=SECONDS)
    assert "nothing is watched: give --watch, or tell saves with `patcher apply" in line
    assert (rest, process.returncode) == ("", 0)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="gives up what only root has")
def test_a_process_of_somebody_else(place):
    mortal = ["setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace", *COMMAND]
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, user=65534) as other:
        for command in (["attach"], ["status"], ["attach", "--watch", "."]):
            done = subprocess.run(
                [*mortal, command[0], str(other.pid), *command[1:]],
                cwd=place, env=ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS, check=False,
            )  # fmt: skip
            (said,) = sentences(done.stderr)
            assert done.returncode == 3
            assert f"not permitted to trace process {other.pid}" in said
            assert "run patcher as user 65534 or as root" in done.stderr
        other.communicate(timeout=SECONDS)


def test_a_program_that_ended_before_anything_was_saved(place):
    (place / "prog").chmod(0o755)
    done = run("spawn", "./prog", "--watch", ".", cwd=place)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
