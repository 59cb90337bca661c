"""What cannot be applied, and what cannot be attached to: one sentence, a status, and a program that is as it was."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from project import Project, Running, assert_untouched, image_bytes, statuses

from .conftest import run, sentences

VALUE = "n + 1000 * calls"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("bad") / "p")


@pytest.fixture(scope="module")
def good(project: Project) -> bytes:
    return project.object("unit.c", (VALUE, "3")).read_bytes()


@pytest.fixture(scope="module")
def program(project: Project) -> Iterator[Running]:
    with project.running() as program:
        yield program


def compiled(tmp_path: Path, text: str, *command: str) -> Path:
    (tmp_path / "unit.c").write_text(text)
    subprocess.run([*command, "-c", "unit.c", "-o", "made.o"], cwd=tmp_path, check=True)
    return tmp_path / "made.o"


ANSWER = "int answer(int n)\n{\n    return n + 5;\n}\n"


def member(name: str, size: int) -> bytes:
    return f"{name + '/':16}{0:<12}{0:<6}{0:<6}{644:<8}{size:<10}`\n".encode()


BAD_OBJECTS: dict[str, Callable[[bytes, Path], object]] = {
    "cut in the header": lambda good, _: good[:40],
    "cut in the middle": lambda good, _: good[: len(good) // 2],
    "cut at the end": lambda good, _: good[:-10],
    "another machine": lambda good, _: good[:18] + struct.pack("<H", 183) + good[20:],
    "32 bits": lambda good, _: good[:4] + b"\x01" + good[5:],
    "big endian": lambda good, _: good[:5] + b"\x02" + good[6:],
    "not an object but a program": lambda good, _: Path("/proc/self/exe").read_bytes()[: 1 << 20],
    "empty": lambda good, _: b"",
    "text": lambda good, _: b"int answer(int n) { return 3; }\n",
    "an archive with nothing in it": lambda good, _: b"!<arch>\n",
    "an archive of texts": lambda good, _: b"!<arch>\n" + member("notes.txt", 6) + b"hello\n",
    "an archive that is cut": lambda good, _: b"!<arch>\n" + member("unit.o", 99999) + good,
    "gcc's LTO bytecode": lambda _, place: compiled(place, ANSWER, "gcc", "-O2", "-flto"),
    "clang's LTO bytecode": lambda _, place: compiled(place, ANSWER, "clang", "-O2", "-flto"),
    "of another program": lambda _, place: compiled(place, "int elsewhere(int n)\n{\n    return n;\n}\n", "gcc"),
    "a directory": lambda _, place: place,
    "not there": lambda _, place: place / "missing.o",
    "an unreadable name": lambda _, place: place / "strange\udcff.o",
}


@pytest.mark.parametrize("kind", BAD_OBJECTS)
def test_objects_that_cannot_be_applied(kind, good, program, tmp_path):
    made = BAD_OBJECTS[kind](good, tmp_path)
    if isinstance(made, bytes):
        (tmp_path / "bad.o").write_bytes(made)
        made = tmp_path / "bad.o"
    before, maps = image_bytes(program.pid), Path(f"/proc/{program.pid}/maps").read_text()
    done = run("apply", program.pid, made)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    (sentence,) = sentences(done.stderr)
    assert str(made).partition("\udcff")[0] in sentence
    assert len(done.stderr.splitlines()) <= 2, "a sentence and a hint"
    assert (image_bytes(program.pid), Path(f"/proc/{program.pid}/maps").read_text()) == (before, maps)
    assert_untouched(program.pid)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("gone.c", None, "no such file"),
        ("stranger.c", "int stranger(void)\n{\n    return 1;\n}\n", "how it is compiled"),
        ("folder.c", "", "directory"),
    ],
)
def test_sources_that_cannot_be_applied(name, text, found, project, program):
    path = project.root / name
    if name == "folder.c":
        path.mkdir(exist_ok=True)
    elif text is not None:
        path.write_text(text)
    done = run("apply", program.pid, path)
    (sentence,) = sentences(done.stderr)
    assert done.returncode == 1
    assert name in sentence
    assert found in sentence


def test_one_bad_file_among_good_ones_stops_all_of_them(project, program, tmp_path):
    change = project.object("unit.c", (VALUE, "3"))
    (tmp_path / "bad.o").write_bytes(b"nothing")
    before = image_bytes(program.pid)
    done = run("apply", program.pid, change, tmp_path / "bad.o")
    assert done.returncode == 1
    assert len(sentences(done.stderr)) == 1
    assert image_bytes(program.pid) == before


def test_nothing_to_revert(program):
    for arguments in ([], [0], [3]):
        done = run("revert", program.pid, *arguments)
        if arguments == [0]:
            continue
        assert done.returncode == 1
        assert len(sentences(done.stderr)) == 1


# --- processes ---


def all_commands(pid: int, file: Path) -> list[tuple[object, ...]]:
    return [("status", pid), ("apply", pid, file), ("revert", pid), ("attach", pid), ("attach", pid, "--watch", ".")]


def refuse(pid: int, file: Path, found: str, status: int = 3) -> None:
    for command in all_commands(pid, file):
        done = run(*command)
        assert done.returncode == status, (command, done.stderr)
        (sentence,) = sentences(done.stderr)
        assert found in sentence
        assert str(pid) in sentence
        assert done.stdout == ""


@pytest.fixture
def change(project: Project) -> Path:
    return project.object("unit.c", (VALUE, "3"))


def test_a_number_that_no_process_has(change):
    ended = subprocess.Popen(["true"])
    ended.wait()
    refuse(ended.pid, change, "no process")


def test_a_zombie(change):
    with subprocess.Popen(["sh", "-c", "exec true"]) as zombie:
        while statuses(zombie.pid, "State") != {"Z"}:
            pass
        refuse(zombie.pid, change, "zombie")


def test_a_thread_of_the_kernel(change):
    kernel = [p for p in map(int, filter(str.isdigit, os.listdir("/proc"))) if is_kernel_thread(p)]
    if not kernel:
        pytest.skip("no thread of the kernel is visible here")
    refuse(kernel[0], change, "kernel")


def is_kernel_thread(pid: int) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return False
    return bool(int(fields[6]) & 0x00200000)


def test_process_one(change):
    """Whatever process 1 is, and whoever we are: a sentence, or an answer that it can be looked at."""
    done = run("apply", 1, change)
    assert done.returncode in (1, 3)
    assert len(sentences(done.stderr)) == 1


@pytest.mark.parametrize("number", ["0", "-4", "99999999999999999999"])
def test_numbers_that_cannot_be_a_process(number):
    done = run("status", number)
    assert done.returncode in (2, 3)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("tracer", ["strace", "gdb"])
def test_a_process_that_somebody_traces(tracer, project, change):
    with project.running() as program:
        if tracer == "strace":
            command = ["strace", "-qq", "-o", "/dev/null", "-p", str(program.pid)]
        else:
            command = ["gdb", "-nx", "-q", "-ex", "continue", "-p", str(program.pid)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as other:
            try:
                while statuses(program.pid, "TracerPid") == {"0"}:
                    assert other.poll() is None
                done = run("apply", program.pid, change)
                assert done.returncode in (1, 3)
                assert any(str(other.pid) in s and tracer in s for s in sentences(done.stderr)), done.stderr
                assert run("status", program.pid).returncode == 0, "to look needs no tracing"
            finally:
                other.kill()
                other.communicate()
        if tracer == "strace":
            assert program.ask(5) == "1005"
            assert run("apply", program.pid, change).returncode == 0
            assert program.ask(5) == "3"


def test_a_stopped_program_can_be_patched_and_stays_stopped(project, change):
    with project.running() as program:
        os.kill(program.pid, signal.SIGSTOP)
        while statuses(program.pid, "State") != {"T"}:
            pass
        done = run("apply", program.pid, change)
        assert done.returncode == 0, done.stderr
        assert statuses(program.pid, "State") == {"T"}
        os.kill(program.pid, signal.SIGCONT)
        assert program.ask(5) == "3"
