"""Compilation databases, as cmake and ninja write them and as people do."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from patcher.build import Commands, Compiler
from patcher.build.database import find_databases
from patcher.errors import NoCompileCommand

from .conftest import run


def entry(path: Path, *entries: dict[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries))
    return path


@pytest.mark.parametrize("generator", ["Ninja", "Unix Makefiles"])
@pytest.mark.parametrize("compiler_name", ["gcc", "clang"])
def test_made_by_cmake(project: Path, compiler: Compiler, generator: str, compiler_name: str) -> None:
    (project / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.10)\nproject(p C)\n"
        "add_library(unit OBJECT src/unit.c)\ntarget_include_directories(unit PRIVATE include)\n"
        'target_compile_definitions(unit PRIVATE [[TEXT="two words"]])\n'
    )
    (project / "src/unit.c").write_text((project / "src/unit.c").read_text() + "const char *text = TEXT;\n")
    options = (
        "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
        f"-DCMAKE_C_COMPILER={compiler_name}",
        "-DCMAKE_BUILD_TYPE=Release",
    )
    run("cmake", "-S", ".", "-B", "build-it", "-G", generator, *options, cwd=project)
    command = Commands(watched=[project / "src"]).find(project / "src/unit.c")
    assert command.origin == str(project / "build-it/compile_commands.json")
    unit = compiler.compile(command)
    assert b"two words" in unit.object.read_bytes()


def test_command_string_and_relative_paths(project: Path) -> None:
    listed = {"directory": "..", "file": "src/unit.c", "command": "gcc -O1 '-DA=\"b c\"' -Iinclude -c src/unit.c"}
    path = entry(project / "out/compile_commands.json", listed)
    command = Commands(compile_commands=path).find(project / "src/unit.c")
    assert command.directory == project
    assert command.arguments == ("gcc", "-O1", '-DA="b c"', "-Iinclude", "-c", "src/unit.c")
    assert command.file == project / "src/unit.c"


@pytest.mark.parametrize("place", [".", "build", "build-debug", "build_x", "out", "out/Release", "src", ".."])
def test_found_near_the_watched_path(project: Path, place: str) -> None:
    listed = {"directory": str(project), "file": "src/unit.c", "command": "gcc -c src/unit.c"}
    path = entry(project / place / "compile_commands.json", listed)
    found = Commands(watched=[project / "src/unit.c"]).find(project / "src/unit.c")
    assert found.origin == str(path.resolve() if place == ".." else path)


def test_found_near_the_program(project: Path, tmp_path: Path) -> None:
    listed = {"directory": str(project), "file": "src/unit.c", "command": "gcc -c src/unit.c"}
    path = entry(tmp_path / "away/build/compile_commands.json", listed)
    (tmp_path / "away/bin").mkdir()
    program = tmp_path / "away/bin/prog"
    program.write_bytes(b"")
    link = tmp_path / "exe"
    link.symlink_to(program)  # as /proc/PID/exe is one
    assert Commands(programs=[link]).find(project / "src/unit.c").origin == str(path)


def test_a_database_without_the_file_does_not_hide_another(project: Path) -> None:
    entry(project / "src/compile_commands.json", {"directory": str(project), "file": "x.c", "command": "gcc -c x.c"})
    listed = {"directory": str(project), "file": "src/unit.c", "command": "gcc -c src/unit.c"}
    path = entry(project / "compile_commands.json", listed)
    assert Commands(watched=[project / "src"]).find(project / "src/unit.c").origin == str(path)


def test_several_entries(project: Path) -> None:
    listed = [
        {"directory": str(project), "file": "src/unit.c", "command": f"gcc {way} -c src/unit.c"}
        for way in ("-DA", "-DB")
    ]
    commands = Commands(compile_commands=entry(project / "compile_commands.json", *listed))
    assert [command.arguments[1] for command in commands.find_all(project / "src/unit.c")] == ["-DA", "-DB"]
    assert commands.find(project / "src/unit.c").arguments[1] == "-DA"


def test_linked_paths(project: Path, tmp_path: Path, compiler: Compiler) -> None:
    (tmp_path / "link").symlink_to(project)
    (project / "src/other.c").symlink_to(project / "src/unit.c")
    listed = {
        "directory": str(tmp_path / "link"),
        "file": str(tmp_path / "link/src/other.c"),
        "command": "gcc -Iinclude -c src/other.c",
    }
    commands = Commands(compile_commands=entry(project / "compile_commands.json", listed))
    for name in (project / "src/unit.c", project / "src/other.c", tmp_path / "link/src/unit.c"):
        command = commands.find(name)
        assert command.file == project / "src/unit.c"
    assert compiler.compile(command).object.exists()


def test_read_again_when_it_changes(project: Path, database: Callable[..., Path]) -> None:
    commands = Commands(compile_commands=database("gcc", "-O1", "-c", "src/unit.c"))
    assert commands.find(project / "src/unit.c").arguments[1] == "-O1"
    path = database("gcc", "-O2", "-c", "src/unit.c")
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert commands.find(project / "src/unit.c").arguments[1] == "-O2"


def test_one_that_appears_later(project: Path, database: Callable[..., Path]) -> None:
    commands = Commands(watched=[project])
    with pytest.raises(NoCompileCommand):
        commands.find(project / "src/unit.c")
    database("gcc", "-c", "src/unit.c")
    assert commands.find(project / "src/unit.c").arguments[0] == "gcc"


def test_nothing_found_says_what_was_tried_and_what_to_do(project: Path) -> None:
    with pytest.raises(NoCompileCommand) as caught:
        Commands(watched=[project / "src"]).find(project / "src/unit.c")
    assert str(project / "src/unit.c") in caught.value.message
    assert f"beside {project / 'src'}" in caught.value.message
    assert "bear -- make" in caught.value.hint
    assert "--compile-commands" in caught.value.hint


@pytest.mark.parametrize(
    ("contents", "word"),
    [
        ("{", "Expecting"),
        ("{}", "not a list"),
        ("[1]", "entry 0"),
        ('[{"file": "a.c"}]', "no command"),
        (None, "No such"),
    ],
)
def test_given_file_that_is_none(project: Path, contents: str | None, word: str) -> None:
    path = project / "given.json"
    if contents is not None:
        path.write_text(contents)
    with pytest.raises(NoCompileCommand, match=word) as caught:
        Commands(compile_commands=path).find(project / "src/unit.c")
    assert str(path) in caught.value.message


def test_every_unit_once_with_its_first_command(project: Path, database: Callable[..., Path]) -> None:
    path = database("gcc", "-O1", "-c", "src/unit.c")
    entries = json.loads(path.read_text())
    again = {**entries[0], "arguments": ["gcc", "-O3", "-c", "src/../src/unit.c"], "file": "src/../src/unit.c"}
    gone = {**entries[0], "file": "src/gone.c"}
    header = {**entries[0], "file": "src/beside.h"}
    path.write_text(json.dumps([*entries, again, gone, header]))
    (command,) = Commands(compile_commands=path).every_unit()
    assert command.file == project / "src/unit.c"
    assert "-O1" in command.arguments


def test_a_unit_of_two_programs_is_compiled_as_that_of_ours_was(project: Path, tmp_path: Path) -> None:
    """As CMake lists the units of several targets: each is compiled in the target's directory."""
    unit = project / "src/unit.c"
    (tmp_path / "main.c").write_text("int outside;\nint main(void) { return 0; }\n")
    entries = []
    for name in ("library", "program"):
        (tmp_path / name).mkdir()
        arguments = ["gcc", "-g", "-I", str(project / "include"), f"-DPART={len(name)}", "-c", str(unit)]
        run(*arguments, cwd=tmp_path / name)
        entries.append({"directory": str(tmp_path / name), "file": str(unit), "arguments": arguments})
    run("gcc", "-g", "-o", "prog", "../main.c", "unit.o", cwd=tmp_path / "program")
    (tmp_path / "compile_commands.json").write_text(json.dumps(entries))
    commands = Commands(watched=[tmp_path], programs=[tmp_path / "program/prog"])
    assert [Path(c.directory).name for c in commands.find_all(unit)] == ["program", "library"]
    assert [Path(c.directory).name for c in commands.every_unit() if c.file.name == "unit.c"] == ["program"]


def test_a_directory_above_is_listed_when_it_changed_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """People build in places with thousands of names; a save cannot read all of them, several times."""
    (tmp_path / "src").mkdir()
    listed: list[str] = []
    listdir = os.listdir
    monkeypatch.setattr("os.listdir", lambda place: listed.append(os.fspath(place)) or listdir(place))
    long_ago = time.time() - 10
    os.utime(tmp_path, (long_ago, long_ago))
    for _ in range(3):
        assert [p for p in find_databases(tmp_path / "src") if p.is_relative_to(tmp_path)] == []
    assert listed.count(str(tmp_path)) == 1
    places = [tmp_path / name / "compile_commands.json" for name in ("build", "build-2", "out", "out/debug")]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("[]")
        assert place in find_databases(tmp_path / "src"), "made this moment"
    assert [p for p in find_databases(tmp_path / "src") if p.is_relative_to(tmp_path)] == places
