"""What is new and initialised at run time: run once, before anybody sees it, or refused by name."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from living import run

import patcher
from patcher.errors import PatcherError, UnsafeChange

MAIN = """\
#include <stdio.h>
#include <stdlib.h>
#include <pthread.h>
#include <unistd.h>
int answer(int n);
int runs;
static void *idle(void *unused) { for (;;) getc(stderr == unused ? stdin : (FILE *) unused); }
int main(int argc, char **argv)
{
    char line[80];
    pthread_t thread;
    int pipes[2];
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (int i = 1; i < argc; i++) {
        if (pipe(pipes) || pthread_create(&thread, NULL, idle, fdopen(pipes[0], "r")))
            return 1;
    }
    puts("ready");
    while (fgets(line, sizeof line, stdin))
        printf("%d\\n", answer(atoi(line)));
    return 7;
}
"""

CPLUSPLUS = """\
struct Number { Number(int n); ~Number(); int value; };
extern int runs;
static Number first(5);
int answer(int n) { return n + first.value; }
Number::Number(int n) : value(n) { runs++; }
Number::~Number() { runs = 0; }
"""
NEW_CPLUSPLUS = """\
struct Number { Number(int n); ~Number(); int value; };
extern int runs;
Number late __attribute__((init_priority(300))) (runs * 10);
Number early __attribute__((init_priority(200))) (runs * 100);
Number last(late.value + early.value);
int added(int n) { return n + last.value + 10000 * runs; }
"""
C = """\
#include <stdlib.h>
extern int runs;
static volatile int old = 3;
static __attribute__((constructor)) void start(void) { old = 4; }
int answer(int n) { if (n < 0) abort(); return n + old; }
"""
NEW_C = """\
#include <stdlib.h>
extern int runs;
static int state, arguments;
__attribute__((constructor)) static void begin(int argc, char **argv, char **environment)
{
    state = state * 10 + 7; runs++; arguments = argc + !argv[argc] + (getenv("PATH") != 0);
}
__attribute__((constructor(200))) static void before(void) { state = state * 10 + 2; }
int added(int n) { return n + state + 1000 * runs + 100000 * arguments; }
"""


class Program:
    """A program of main.c and one unit, and its sources."""

    def __init__(self, folder: Path, compiler: str, unit: str, *, link: Sequence[str] = ()) -> None:
        self.folder, self.compiler = folder, compiler
        self.suffix = ".cc" if compiler.endswith("++") else ".c"
        self.commands: list[dict[str, str]] = []
        (folder / "main.c").write_text(MAIN)
        run("gcc" if compiler.startswith("g") else "clang", "-g", "-c", "main.c", cwd=folder)
        text = unit.replace("int answer", 'extern "C" int answer').replace("extern int", 'extern "C" int')
        self.unit = self.write("unit", text if self.suffix == ".cc" else unit)
        run(*self.commands[0]["command"].split(), cwd=folder)
        run(compiler, *link, "-o", "program", "main.o", "unit.o", "-pthread", cwd=folder)

    def write(self, name: str, text: str) -> Path:
        file = self.folder / (name + self.suffix)
        file.write_text(text)
        command = f"{self.compiler} -g -O1 -c {file} -o {name}.o"
        self.commands = [c for c in self.commands if c["file"] != str(file)]
        self.commands.append({"directory": str(self.folder), "command": command, "file": str(file)})
        (self.folder / "compile_commands.json").write_text(json.dumps(self.commands))
        return file

    def edit(self, *replacements: tuple[str, str]) -> Path:
        text = self.unit.read_text()
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        return self.write("unit", text)

    def added(self, text: str) -> Path:
        return self.write("added", text.replace("extern int", 'extern "C" int') if self.suffix == ".cc" else text)

    @contextlib.contextmanager
    def running(self, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], patcher.Session]]:
        command = [str(self.folder / "program"), *arguments]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
                with patcher.attach(process.pid, compile_commands=self.folder / "compile_commands.json") as session:
                    yield process, session
            finally:
                process.kill()


def ask(process: subprocess.Popen[str], line: int = 0) -> int:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def finish(process: subprocess.Popen[str]) -> int:
    assert process.stdin is not None
    process.stdin.close()
    return process.wait()


CALLING = (("int answer", "int added(int n);\nint answer"), ("return n +", "return added(n) +"))
CALLING_CPLUSPLUS = (
    ('extern "C" int answer(int n) { return n', 'int added(int n);\nextern "C" int answer(int n) { return added(n)'),
)


@pytest.mark.parametrize("link", [(), ("-static",)], ids=["dynamic", "static"])
@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_objects_of_a_new_file_are_constructed_once(
    tmp_path: Path, compiler: str, threads: int, link: tuple[str, ...]
) -> None:
    """Two that have a priority come first, the lower one before; the counter is 1 before: the unit's own object."""
    program = Program(tmp_path, compiler, CPLUSPLUS, link=link)
    with program.running(*["x"] * threads) as (process, session):
        assert ask(process) == 5
        added = program.added(NEW_CPLUSPLUS)
        unit = program.edit(*CALLING_CPLUSPLUS)
        session.apply(unit, added)
        expected = 5 + 100 + 20 + 40000
        assert ask(process) == expected
        session.apply(program.edit(("return added(n)", "return 1 + added(n)")))
        assert ask(process) == expected + 1
        session.apply(program.added(NEW_CPLUSPLUS.replace("return n +", "return n + 1 +")))
        assert ask(process) == expected + 2
        session.revert(0)
        assert ask(process) == 5
        session.apply(program.edit(("return 1 + added(n)", "return added(n)")))
        assert ask(process) == expected + 1
        assert finish(process) == 7  # the destructors, registered in what was placed, ran


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_constructors_of_a_new_file_run_in_order_with_the_programs_arguments(tmp_path: Path, compiler: str) -> None:
    program = Program(tmp_path, compiler, C)
    with program.running() as (process, session):
        assert ask(process) == 4
        session.apply(program.edit(*CALLING), program.added(NEW_C))
        assert ask(process) == 4 + 27 + 1000 + 300000
        session.revert(0)
        assert ask(process) == 4
        session.apply(program.edit(("added(n) +", "added(n) + 1 +")))
        assert ask(process) == 5 + 27 + 1000 + 300000


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_a_new_constructor_of_a_file_that_the_program_has_runs(tmp_path: Path, compiler: str) -> None:
    program = Program(tmp_path, compiler, C)
    with program.running() as (process, session):
        more = "__attribute__((constructor)) static void more(void) { old += 10; runs++; }\nint answer"
        generation = session.apply(program.edit(("int answer", more)))
        assert [f.name for f in generation.functions] == ["more"]
        assert ask(process) == 14
        assert not session.apply(program.unit).functions
        session.apply(program.edit(("return n + old", "return n + old + 1000 * runs")))
        assert ask(process) == 1014


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_an_object_beside_others_of_its_file_is_refused(tmp_path: Path, compiler: str) -> None:
    program = Program(tmp_path, compiler, CPLUSPLUS)
    with program.running() as (process, session):
        edited = program.edit(
            ("static Number first(5);", "static Number first(5);\nstatic Number second(6);"),
            ("first.value;", "first.value + second.value;"),
        )
        with pytest.raises(UnsafeChange, match=r"second` of .* is new and initialised .*first`") as refused:
            session.apply(edited)
        assert refused.value.code == "constructor"
        assert ask(process) == 5
        assert session.status().generation == 0


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_another_initial_value_leaves_the_old_one(tmp_path: Path, compiler: str) -> None:
    program = Program(tmp_path, compiler, CPLUSPLUS)
    with program.running() as (process, session):
        assert not session.apply(program.edit(("first(5)", "first(6)"))).functions
        generation = session.apply(program.edit(("return n +", "return 2 * n +")))
        assert [f.name for f in generation.functions] == ["answer"]
        assert ask(process, 1) == 7


def test_an_initialiser_that_only_got_another_name_does_not_run_again(tmp_path: Path) -> None:
    """gcc calls it after the first name of the file."""
    program = Program(tmp_path, "g++", CPLUSPLUS)
    with program.running() as (process, session):
        edited = program.edit(
            ("static Number first(5);", "int earlier(int n) { return n + 1; }\nstatic Number first(5);"),
            ("return n + first.value;", "return earlier(n) + first.value + 100 * runs;"),
        )
        session.apply(edited)
        assert ask(process) == 106


@pytest.mark.parametrize(
    ("body", "code"),
    [("runs = *(volatile int *) (long) (runs + 1);", "call-crashed"), ("abort();", "call-crashed")],
    ids=["fault", "abort"],
)
def test_a_constructor_that_crashes_leaves_the_program_as_it_was(tmp_path: Path, body: str, code: str) -> None:
    program = Program(tmp_path, "gcc", C)
    with program.running() as (process, session):
        added = program.added(NEW_C.replace("state = state * 10 + 7;", body))
        with pytest.raises(PatcherError, match=r"`begin` of .*added\.c") as failed:
            session.apply(program.edit(*CALLING), added)
        assert failed.value.code == code
        assert ask(process) == 4
        assert session.status().generation == 0
        session.apply(program.unit, program.added(NEW_C))
        assert ask(process) == 4 + 27 + 1000 + 300000


def test_a_dry_run_runs_nothing(tmp_path: Path) -> None:
    program = Program(tmp_path, "gcc", C)
    with program.running() as (process, session):
        commands = program.folder / "compile_commands.json"
        edited, added = program.edit(*CALLING), program.added(NEW_C)
        with patcher.attach(process.pid, compile_commands=commands, dry_run=True) as trying:
            assert "begin" in [f.name for f in trying.apply(edited, added).functions]
        session.apply(program.write("unit", C.replace("return n +", "return n + 1000 * runs +")))
        assert ask(process) == 4


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_the_first_object_of_a_file_that_the_program_has_is_constructed(tmp_path: Path, compiler: str) -> None:
    text = CPLUSPLUS.replace("static Number first(5);", "static volatile int first[1];").replace(
        "first.value", "first[0]"
    )
    program = Program(tmp_path, compiler, text)
    with program.running() as (process, session):
        assert ask(process) == 0
        edited = program.edit(
            ("static volatile int first[1];", "static volatile int first[1];\nstatic Number second(6);"),
            ("first[0];", "first[0] + second.value + 100 * runs;"),
        )
        session.apply(edited)
        assert ask(process) == 106


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_an_object_that_only_registers_itself_is_refused_where_it_would_be_forgotten(
    tmp_path: Path, compiler: str
) -> None:
    program = Program(tmp_path, compiler, CPLUSPLUS)
    with program.running() as (process, session):
        edited = program.edit(("static Number first(5);", "static Number first(5);\nstatic Number second(6);"))
        with pytest.raises(UnsafeChange, match=r"second` of .* is new") as refused:
            session.apply(edited)
        assert refused.value.code == "constructor"
        assert ask(process) == 5
