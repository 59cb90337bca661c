"""Link lines as build systems write them, and the files that the names of libraries stand for."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from patcher.build import find_link_line, locate_library


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "x.c").write_text("int x;\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", "sub/libx.so", "x.c"], cwd=tmp_path, check=True)
    subprocess.run(["gcc", "-c", "x.c"], cwd=tmp_path, check=True)
    for name in ("sub/liby.a", "sub/libx.a"):
        subprocess.run(["ar", "rcs", name, "x.o"], cwd=tmp_path, check=True)
    (tmp_path / "program").write_text("")
    return tmp_path


def write_cmake(root: Path, line: str) -> None:
    for name, text in (("other", "cc -o other other.o -lz"), ("program", line)):
        folder = root / "CMakeFiles" / f"{name}.dir"
        folder.mkdir(parents=True)
        (folder / "link.txt").write_text(f"ranlib it\n{text}\n")


WORDS = [
    ("-Lsub -lx -ly", ["sub/libx.so"], ["sub/liby.a"]),
    ("-L sub -l x", ["sub/libx.so"], []),
    ("-Wl,-L,sub,--push-state,--as-needed,-lx,--pop-state", ["sub/libx.so"], []),
    ("-Lsub -l:libx.a -Xlinker -ly", [], ["sub/libx.a", "sub/liby.a"]),
    ("-static -Lsub -lx", [], ["sub/libx.a"]),
    ("sub/libx.so sub/liby.a sub/not-there.so -lnot-there", ["sub/libx.so"], ["sub/liby.a"]),
    ("-Wl,-rpath,/sub -Wl,-o,sub/libx.so -Lsub", [], []),
]


@pytest.mark.parametrize(("words", "libraries", "archives"), WORDS)
def test_what_a_link_line_names(tree: Path, words: str, libraries: list[str], archives: list[str]) -> None:
    write_cmake(tree, f"/usr/bin/cc -g main.o dir/unit.o -o program {words}")
    line = find_link_line(tree / "program", (), "gcc")
    assert line is not None
    assert line.origin.endswith("CMakeFiles/program.dir/link.txt")
    assert line.objects == (tree / "main.o", tree / "dir/unit.o")
    assert [str(p.relative_to(tree)) for p in line.libraries] == libraries
    assert [str(p.relative_to(tree)) for p in line.archives] == archives


def test_ninja_and_compile_commands(tree: Path) -> None:
    assert find_link_line(tree / "program", (), "gcc") is None
    commands = [(tree, ("cc", "-c", "-o", "program", "-lz")), (tree, ("cc", "-o", "program", "m.o", "-Lsub", "-lx"))]
    found = find_link_line(tree / "program", commands, "gcc")
    assert found is not None
    assert found.libraries == (tree / "sub/libx.so",)
    (tree / "build.ninja").write_text(
        "build other: LINK a.o\n  LINK_LIBRARIES = -lz\n"
        "build program: LINK main.o $\n  unit.o | sub/libx.so || order\n  LINK_LIBRARIES = -Lsub -ly\n\n"
        "build all: phony\n"
    )
    found = find_link_line(tree / "program", (), "gcc")
    assert found is not None
    assert found.objects == (tree / "main.o", tree / "unit.o")
    assert (found.libraries, found.archives) == ((tree / "sub/libx.so",), (tree / "sub/liby.a",))


def test_linker_scripts_are_followed(tree: Path) -> None:
    script = tree / "sub" / "libscript.so"
    script.write_text("/* GROUP ( no.so ) */\nOUTPUT_FORMAT(elf64-x86-64)\nGROUP ( libx.so AS_NEEDED ( -ly ) )\n")
    found = locate_library("script", [tree / "sub"], "gcc")
    assert found == (tree / "sub/libx.so", tree / "sub/liby.a")
    endless = tree / "sub" / "libagain.so"
    endless.write_text("INPUT ( -lagain )\n")
    assert locate_library("again", [tree / "sub"], "gcc") == ()


def test_the_compiler_knows_its_own() -> None:
    assert [p.name for p in locate_library("m", (), "gcc")][:1] == ["libm.so.6"]
    assert all(p.suffix == ".a" and p.is_file() for p in locate_library("libm.a", (), "gcc", static=True))
    assert locate_library("no-such-library", (), "gcc") == ()
    assert locate_library("m", (), "no-such-compiler") == ()
