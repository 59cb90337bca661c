"""Commands from a build's own files: small projects, each built by its own tool, without a compile_commands.json."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from patcher.build import Commands, CompileCommand, Compiler, buildfiles
from patcher.build.buildfiles import commands_in
from patcher.errors import NoCompileCommand

from .conftest import run

CMAKE = """cmake_minimum_required(VERSION 3.10)
project(p C)
add_executable(prog src/main.c src/unit.c)
target_compile_definitions(prog PRIVATE NAME="a b" NUMBER=7)
target_include_directories(prog PRIVATE include)
set_source_files_properties(src/unit.c PROPERTIES COMPILE_FLAGS -funroll-loops)
"""
MESON = """project('p', 'c')
executable('prog', 'src/main.c', 'src/unit.c', include_directories: 'include',
           c_args: ['-DNAME="a b"', '-DNUMBER=7', '-funroll-loops'])
"""
MAKE = """CFLAGS = -funroll-loops -DNAME='"a b"' \\
  -DNUMBER=7
prog: src/main.o src/unit.o
\t$(CC) -o $@ $^
%.o: %.c
\t@mkdir -p $(@D); test -d include && \\
\t  $(CC) $(CFLAGS) -Iinclude -c -o $@ $<
"""
RECURSIVE = "all:\n\t$(MAKE) -C src prog\n"
INSIDE = """prog: main.o unit.o
\t$(CC) -o $@ $^
.c.o:
\tccache $(CC) -funroll-loops -DNAME='"a b"' -DNUMBER=7 -I../include -c $<
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "src").mkdir(parents=True)
    (root / "include").mkdir()
    (root / "include/number.h").write_text("int number(void);\n")
    (root / "src/main.c").write_text("int main(void) { return 0; }\n")
    (root / "src/unit.c").write_text(
        '#include "number.h"\nint number(void) { return NUMBER; }\nconst char *name(void) { return NAME; }\n'
    )
    return root


def build(tree: Path, tool: str) -> None:
    """Build a project with its own tool; no database is left."""
    if tool.startswith("cmake"):
        (tree / "CMakeLists.txt").write_text(CMAKE)
        generator = "Ninja" if tool == "cmake-ninja" else "Unix Makefiles"
        run("cmake", "-S", ".", "-B", "build", "-G", generator, cwd=tree)
        run("cmake", "--build", "build", cwd=tree)
    elif tool == "meson":
        (tree / "meson.build").write_text(MESON)
        run("meson", "setup", "build", cwd=tree)
        run("ninja", "-C", "build", cwd=tree)
        (tree / "build/compile_commands.json").unlink()
    elif tool == "make-recursive":
        (tree / "Makefile").write_text(RECURSIVE)
        (tree / "src/Makefile").write_text(INSIDE)
        (tree / "ccache").write_text('#!/bin/sh\nexec "$@"\n')
        (tree / "ccache").chmod(0o755)
        run("make", f"PATH={tree}:{os.environ['PATH']}", cwd=tree)
    else:
        (tree / "Makefile").write_text(MAKE)
        run("make", cwd=tree)
    assert not list(tree.rglob("compile_commands.json"))


def found(tree: Path) -> CompileCommand:
    return Commands(watched=[tree / "src"]).find(tree / "src/unit.c")


@pytest.mark.parametrize("tool", ["cmake-ninja", "cmake-make", "meson", "make", "make-recursive"])
def test_a_project_of_each_kind(tool: str, tree: Path, compiler: Compiler) -> None:
    if tool == "meson" and shutil.which("meson") is None:
        pytest.skip("meson is not installed")
    build(tree, tool)
    before = {path: path.stat().st_mtime_ns for path in tree.rglob("*")}
    command = found(tree)
    assert {'-DNAME="a b"', "-DNUMBER=7", "-funroll-loops"} <= set(command.arguments)
    assert command.file == (tree / "src/unit.c").resolve()
    assert not command.derived
    if "ccache" not in command.arguments:
        assert compiler.compile(command).object.exists()
    assert {path: path.stat().st_mtime_ns for path in tree.rglob("*")} == before


def test_it_is_asked_again_when_the_makefile_changes(tree: Path) -> None:
    build(tree, "make")
    commands = Commands(watched=[tree / "src"])
    assert "-DNUMBER=7" in commands.find(tree / "src/unit.c").arguments
    (tree / "Makefile").write_text(MAKE.replace("NUMBER=7", "NUMBER=18"))
    assert "-DNUMBER=18" in commands.find(tree / "src/unit.c").arguments


def test_a_make_that_calls_another(tree: Path) -> None:
    (tree / "Makefile").write_text("all:\n\t$(MAKE) -C src -f ../inside.mk prog\n")
    (tree / "inside.mk").write_text(INSIDE.replace("ccache ", ""))
    run("make", cwd=tree)
    command = found(tree)
    assert (command.directory, command.arguments[-1]) == (tree / "src", "unit.c")
    assert command.origin == f"{tree}/Makefile (make -n)"


def test_a_make_that_calls_another_by_another_name(tree: Path) -> None:
    (tree / "Makefile").write_text("all:\n\t+make -C src -f ../inside.mk prog\n")
    (tree / "inside.mk").write_text(INSIDE.replace("ccache ", ""))
    run("make", cwd=tree)
    commands = Commands(watched=[tree / "src"])
    with pytest.raises(NoCompileCommand):
        commands.find(tree / "src/unit.c")
    saved = (tree / "src/unit.o").stat().st_mtime_ns + 10**9
    os.utime(tree / "src/unit.c", ns=(saved, saved))
    command = commands.find(tree / "src/unit.c")
    assert (command.directory, command.arguments[-1]) == (tree / "src", "unit.c")


def test_nobody_elses_makefile_is_run(tree: Path) -> None:
    (tree / "Makefile").write_text(f"X := $(shell touch {tree}/ran)\n{MAKE}")
    (tree / "Makefile").chmod(0o666)
    with pytest.raises(NoCompileCommand, match="everybody may write it, so the commands in it are not run"):
        found(tree)
    (tree / "Makefile").chmod(0o644)
    tree.chmod(0o777)
    with pytest.raises(NoCompileCommand, match="everybody may write it"):
        found(tree)
    assert not (tree / "ran").exists()
    tree.chmod(0o755)
    assert found(tree).origin == f"{tree}/Makefile (make -n)"


def test_makefiles_beyond_the_tree_are_not_asked(tree: Path) -> None:
    build(tree, "make")
    (tree / "src/.git").mkdir()
    with pytest.raises(NoCompileCommand):
        found(tree)


def test_a_makefile_that_does_not_end(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "Makefile").write_text("X := $(shell sleep 1000)\n" + MAKE)
    monkeypatch.setattr(buildfiles, "_SECONDS", 0.2)
    with pytest.raises(NoCompileCommand, match="not done after 0 seconds"):
        found(tree)


def test_what_was_tried_is_said(tree: Path) -> None:
    (tree / "Makefile").write_text("all:\n\ttrue\n")
    with pytest.raises(NoCompileCommand) as error:
        found(tree)
    assert f"{tree}/Makefile, which does not compile it" in error.value.message
    assert "--compile-commands" in error.value.hint


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("gcc -O2 -c unit.c", ["gcc -O2 -c unit.c"]),
        ("cd sub && A=b gcc -c ../unit.c; rm x", ["gcc -c ../unit.c"]),
        ("/bin/sh ../libtool --mode=compile gcc -c unit.c", ["/bin/sh ../libtool --mode=compile gcc -c unit.c"]),
        ("gcc -c `test -f unit.c || echo there/`unit.c", ["gcc -c unit.c"]),
        ("gcc -c `test -f 'nowhere' || echo './'`unit.c", ["gcc -c ./unit.c"]),
        ("gcc -c `test -e unit.c || echo there/`unit.c", []),
        (
            "b=`echo u.o | sed 's|\\.o$||'`; gcc -MT u.o -MD -MF $b.Tpo -c unit.c && mv -f $b.Tpo $b.Po",
            ["gcc -MT u.o -MD -c unit.c"],
        ),
        ("gcc -I$(pwd) -MD -MF $b.Tpo -c unit.c", []),
        ("gcc -c $(cat flags) unit.c", []),
        ("gcc -c other.c", []),
        ("echo gcc -c unit.c", []),
        ("gcc -c unit.c > log; true", []),
        ("gcc -c unit.c > log", []),
        ("gcc -o prog unit.c", []),
        ("gcc -DA='b c' -c unit.c 'unfinished", []),
    ],
)
def test_commands_in_a_line(line: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "unit.c").write_text("")
    (tmp_path / "sub").mkdir()
    source = (tmp_path / "unit.c").resolve()
    assert [" ".join(c.arguments) for c in commands_in(line, tmp_path, [source], "a test")] == words


def test_what_automake_looks_for_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "build").mkdir()
    source = tmp_path / "unit.c"
    source.write_text("")
    line = "gcc -c -o p-unit.o `test -f 'unit.c' || echo '../'`unit.c"
    (command,) = commands_in(line, tmp_path / "build", [source.resolve()], "a test")
    assert command.arguments[-1] == "../unit.c"


def test_many_are_asked_for_at_once(tree: Path) -> None:
    count = "$(shell echo asked >> asked)"
    build(tree, "make")
    (tree / "Makefile").write_text(f"X := {count}\n{MAKE}")
    commands = Commands(watched=[tree / "src"])
    both = [tree / "src/main.c", tree / "src/unit.c"]
    assert [c.arguments[-1] for c in commands.find_each(both)] == ["src/main.c", "src/unit.c"]
    assert [c.arguments[-1] for c in commands.find_each(both)] == ["src/main.c", "src/unit.c"]
    assert (tree / "asked").read_text() == "asked\n"


def test_every_unit_of_a_program_without_debug_information(tree: Path) -> None:
    build(tree, "make")
    (tree / "src/other.c").write_text("")  # nobody compiles it
    found = Commands(watched=[tree / "src"], programs=[tree / "prog"]).every_unit()
    assert {c.file.name: c.origin for c in found} == dict.fromkeys(
        ("main.c", "unit.c"), f"{tree.resolve()}/Makefile (make -n)"
    )


def test_every_unit_has_the_macros_that_debug_information_lacks(tree: Path) -> None:
    (tree / "Makefile").write_text(MAKE.replace("CFLAGS =", "CFLAGS = -g"))
    run("make", cwd=tree)
    found = Commands(programs=[tree / "prog"]).every_unit()
    assert {c.file.name: "-DNUMBER=7" in c.arguments for c in found} == {"main.c": True, "unit.c": True}
