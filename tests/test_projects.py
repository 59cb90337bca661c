"""Projects as people have them, each built by its own tool and running: what a save of theirs makes live."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
from project import MAIN, Running

from patcher.build.dependencies import beside_object
from patcher.loop import Loop
from patcher.options import Options
from patcher.report import Applied, BuildFailed, Event, Note, Refused, Saved
from patcher.session import Session
from patcher.target import Target

PART = "static int calls;\nint part(int n) { calls++; return NUMBER * n; }\n"
UNIT = "int part(int n);\nint answer(int n) { return part(n) + 1; }\n"
RULES = "prog: {objects}\n\t$(CC) -o $@ $^ {link}\n%.o: src/%.c\n\t$(CC) {flags} -c $< -o $@\n"

pytestmark = pytest.mark.timeout(240)  # builds by tools that take their time


class Watched:
    """A running program of a project, and a loop that is told of saves."""

    def __init__(self, root: Path, program: str, stack: ExitStack) -> None:
        self.root = root
        self.program = Running([str(root / program)])
        stack.callback(self.program.end)
        self.events: list[Event] = []
        paths = (root / "src",)
        session = stack.enter_context(Session(Target.attach(self.program.pid), Options(watched=paths), self))
        session.remember_texts(paths)
        self.loop = Loop(session, paths)

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def edit(self, name: str, old: str, new: str) -> Event:
        """Save a source, and return what comes of it."""
        file = self.root / "src" / name
        text = file.read_text()
        assert text.count(old) == 1
        file.write_text(text.replace(old, new))
        self.events.clear()
        self.loop.round(frozenset([file]), lambda: False)
        (event,) = [e for e in self.events if not isinstance(e, Note | Saved)]
        return event

    def applied(self, name: str, old: str, new: str) -> set[str]:
        """Save a source, which goes live; return the functions that are others now."""
        event = self.edit(name, old, new)
        assert isinstance(event, Applied), event
        return {f.name for f in event.functions}

    def ask(self) -> str:
        return self.program.ask(1)


def write(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def run(*command: str, cwd: Path, **environment: str) -> None:
    done = subprocess.run(
        command,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def needed(*programs: str) -> None:
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed")


CMAKE = """cmake_minimum_required(VERSION 3.16)
project(p C)
add_compile_options(-g -O2)
add_executable(prog src/main.c src/unit.c src/part.c)
target_compile_definitions(prog PRIVATE NUMBER=7)
"""


@pytest.mark.parametrize("generator", ["Ninja", "Unix Makefiles"])
def test_a_unity_build_of_cmake(generator: str, tmp_path: Path, stack: ExitStack) -> None:
    """The build compiles a file of its own that includes the sources: none of them has a command."""
    files = {"CMakeLists.txt": CMAKE, "src/main.c": MAIN, "src/unit.c": UNIT, "src/part.c": PART}
    root = write(tmp_path / "p", files)
    apart = "-DCMAKE_C_FLAGS=-fno-inline"  # else all of it would be in `main`, which does not return
    run("cmake", "-S", ".", "-B", "build", "-G", generator, "-DCMAKE_UNITY_BUILD=ON", apart, cwd=root)
    run("cmake", "--build", "build", cwd=root)
    watched = Watched(root, "build/prog", stack)
    assert watched.ask() == "8"
    assert "part" in watched.applied("part.c", "NUMBER * n", "NUMBER * n + 100")
    assert watched.ask() == "108"
    assert isinstance(watched.edit("part.c", "+ 100", "+ nothing"), BuildFailed)
    watched.applied("part.c", "+ nothing", "+ 200")
    assert watched.ask() == "208"
    watched.applied("unit.c", "part(n) + 1", "part(n) + 2")
    assert watched.ask() == "209"


def test_a_unit_written_to_include_the_others(tmp_path: Path, stack: ExitStack) -> None:
    rules = RULES.format(objects="main.o all.o", link="", flags="-g -O2 -DNUMBER=7")
    every = '#include "part.c"\n#include "unit.c"\n'
    files = {"Makefile": rules, "src/main.c": MAIN, "src/unit.c": UNIT, "src/part.c": PART, "src/all.c": every}
    root = write(tmp_path / "p", files)
    run("make", cwd=root)
    watched = Watched(root, "prog", stack)
    assert "part" in watched.applied("part.c", "NUMBER * n", "NUMBER * n + 100")
    assert watched.ask() == "108"
    watched.applied("unit.c", "part(n) + 1", "part(n) + 2")
    assert watched.ask() == "109"


def test_response_files_in_response_files(tmp_path: Path, stack: ExitStack) -> None:
    """What is in them that writes must not write: the user's objects and dependency files stay."""
    files = {
        "Makefile": RULES.format(objects="main.o unit.o part.o", link="", flags="@flags.rsp"),
        "flags.rsp": "-g @more.rsp -MD -MF part.dep\n",
        "more.rsp": "-O2 @number.rsp\n",
        "number.rsp": "-DNUMBER=7\n",
    }
    root = write(tmp_path / "p", {**files, "src/main.c": MAIN, "src/unit.c": UNIT, "src/part.c": PART})
    run("make", cwd=root)
    before = {path: path.stat().st_mtime_ns for path in root.iterdir() if path.is_file()}
    watched = Watched(root, "prog", stack)
    assert watched.applied("part.c", "NUMBER * n", "NUMBER * n + 100") == {"part"}
    assert watched.ask() == "108"
    (root / "number.rsp").write_text("-DNUMBER=9\n")
    watched.applied("part.c", "+ 100", "+ 200")
    assert watched.ask() == "210"
    del before[root / "number.rsp"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def with_make(root: Path) -> str:
    (root / "Makefile").write_text(RULES.format(objects="main.o unit.o part.o", link="", flags="-g -O2 -DNUMBER=7"))
    run("make", "CC=ccache gcc", cwd=root)
    (root / "Makefile").write_text("CC = ccache gcc\n" + (root / "Makefile").read_text())
    return "prog"


def with_cmake(root: Path) -> str:
    (root / "CMakeLists.txt").write_text(CMAKE)
    run("cmake", "-S", ".", "-B", "build", "-G", "Ninja", "-DCMAKE_C_COMPILER_LAUNCHER=ccache", cwd=root)
    run("cmake", "--build", "build", cwd=root)
    return "build/prog"


@pytest.mark.parametrize("built", [with_make, with_cmake])
def test_a_real_ccache(
    built: Callable[[Path], str], tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed("ccache")
    monkeypatch.setenv("CCACHE_DIR", str(tmp_path / "cache"))
    root = write(tmp_path / "p", {"src/main.c": MAIN, "src/unit.c": UNIT, "src/part.c": PART})
    watched = Watched(root, built(root), stack)
    command = watched.loop.session.units.commands.find(root / "src/part.c")
    assert Path(command.arguments[0]).name == "ccache"
    assert watched.applied("part.c", "NUMBER * n", "NUMBER * n + 100") == {"part"}
    assert watched.ask() == "108"
    watched.applied("part.c", "+ 100", "+ 200")
    watched.applied("part.c", "+ 200", "+ 100")  # this one comes out of the cache
    assert watched.ask() == "108"
    assert isinstance(watched.edit("part.c", "+ 100", "+ nothing"), BuildFailed)


CONFIGURE = """AC_INIT([p], [1])
AM_INIT_AUTOMAKE([foreign subdir-objects])
AC_PROG_CC
AC_CONFIG_FILES([Makefile])
AC_OUTPUT
"""
AUTOMAKE = "bin_PROGRAMS = prog\nprog_SOURCES = src/main.c src/unit.c src/part.c src/part.h\nAM_CFLAGS = -DNUMBER=7\n"


def test_a_project_of_autotools(tmp_path: Path, stack: ExitStack) -> None:
    """Configured and built elsewhere than in the sources; its headers are known from automake's own records."""
    needed("autoreconf", "automake")
    files = {"configure.ac": CONFIGURE, "Makefile.am": AUTOMAKE, "src/main.c": MAIN, "src/unit.c": UNIT}
    root = write(
        tmp_path / "p", {**files, "src/part.h": "#define MORE 0\n", "src/part.c": '#include "part.h"\n' + PART}
    )
    run("autoreconf", "--install", cwd=root)
    (root / "build").mkdir()
    run("../configure", "CFLAGS=-g -O2", cwd=root / "build")
    run("make", cwd=root / "build")
    watched = Watched(root, "build/prog", stack)
    assert watched.applied("part.c", "NUMBER * n", "NUMBER * n + MORE + 100") == {"part"}
    assert watched.ask() == "108"
    noted = beside_object(watched.loop.session.units.commands.find(root / "src/part.c"))
    assert noted is not None
    assert root / "src/part.h" in noted.files
    assert watched.applied("part.h", "MORE 0", "MORE 1000") == {"part"}
    assert watched.ask() == "1108"


def with_lto(root: Path, flags: str) -> None:
    rules = RULES.format(objects="main.o unit.o part.o", link=f"-flto {flags}", flags=f"-g -flto -DNUMBER=7 {flags}")
    write(root, {"Makefile": rules, "src/main.c": MAIN, "src/unit.c": UNIT, "src/part.c": PART})
    run("make", cwd=root)


@pytest.mark.parametrize(
    ("flags", "reason"), [("-O2", "linked-as-one"), ("-O2 -fno-inline -fno-ipa-cp -fno-ipa-icf", "mismatch")]
)
def test_units_that_were_made_one_at_link_time_are_refused(
    flags: str, reason: str, tmp_path: Path, stack: ExitStack
) -> None:
    """Ours compile, without -flto; that they are what runs cannot be proven where the linker made code of its own."""
    rules = RULES.format(objects="main.o unit.o part.o", link=f"-flto {flags}", flags=f"-g -flto -DNUMBER=7 {flags}")
    root = write(tmp_path / "p", {"Makefile": rules, "src/main.c": MAIN, "src/unit.c": UNIT, "src/part.c": PART})
    run("make", cwd=root)
    watched = Watched(root, "prog", stack)
    refused = watched.edit("part.c", "NUMBER * n", "NUMBER * n + 100")
    assert isinstance(refused, Refused), refused
    assert refused.reason == reason
    assert watched.ask() == "8"
