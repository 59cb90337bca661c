"""Compile commands come only from files that nobody else can have written; our own files go where nobody else is."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from project import Project

import patcher
from patcher.build import Commands, Compiler
from patcher.build.trust import check_trusted
from patcher.errors import NoCompileCommand

from .conftest import run

NOBODY = 65534
DOUBTS: dict[str, Callable[[Path], None]] = {
    "everybody may write it": lambda path: path.chmod(0o646),
    f"everybody in group {NOBODY} may write it": lambda path: (os.chown(path, -1, NOBODY), path.chmod(0o664))[1],
    f"it belongs to user {NOBODY}, we are user {os.geteuid()}": lambda path: os.chown(path, NOBODY, -1),
}


def planted(path: Path, doubt: str) -> None:
    try:
        DOUBTS[doubt](path)
    except PermissionError:
        pytest.skip("only root can give files away")


def database(project: Path) -> Path:
    path = project / "compile_commands.json"
    listed = {"directory": str(project), "file": "src/unit.c", "arguments": ["gcc", "-Iinclude", "-c", "src/unit.c"]}
    path.write_text(json.dumps([listed]))
    path.chmod(0o644)
    return path


@pytest.mark.parametrize("doubt", DOUBTS)
def test_a_database_that_somebody_else_may_have_written_is_refused(project: Path, doubt: str) -> None:
    path = database(project)
    assert Commands(compile_commands=path).find(project / "src/unit.c").arguments[0] == "gcc"
    planted(path, doubt)
    with pytest.raises(NoCompileCommand) as refused:
        Commands(compile_commands=path).find(project / "src/unit.c")
    assert refused.value.message == f"{path}: {doubt}, so the commands in it are not run"


@pytest.mark.parametrize("doubt", DOUBTS)
def test_one_that_is_only_found_is_passed_over_and_named(project: Path, doubt: str) -> None:
    planted(database(project), doubt)
    commands = Commands(watched=[project / "src"])
    with pytest.raises(NoCompileCommand, match=doubt):
        commands.find(project / "src/unit.c")
    better = project / "build" / "compile_commands.json"
    better.parent.mkdir()
    shutil.copy(project / "compile_commands.json", better)
    better.chmod(0o644)
    assert Commands(watched=[project / "src"]).find(project / "src/unit.c").origin == str(better)


@pytest.mark.parametrize("doubt", DOUBTS)
def test_debug_information_that_somebody_else_may_have_written_is_refused(project: Path, doubt: str) -> None:
    run("gcc", "-g", "-Iinclude", "-shared", "-fPIC", "-o", "program", "src/unit.c", cwd=project)
    source = project / "src/unit.c"
    assert Commands(programs=[project / "program"]).find(source).arguments[0].endswith("gcc")
    planted(project / "program", doubt)
    with pytest.raises(NoCompileCommand, match=doubt):
        Commands(programs=[project / "program"]).find(source)


def test_a_group_of_ones_own_may_write(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch(0o664)
    path.chmod(0o664)
    if os.geteuid() == 0:
        os.chown(path, 0, 0)
    check_trusted(path.stat(), path)


def test_a_pipe_in_place_of_a_database_does_not_block(project: Path) -> None:
    os.mkfifo(project / "compile_commands.json")
    with pytest.raises(NoCompileCommand):
        Commands(compile_commands=project / "compile_commands.json").find(project / "src/unit.c")


@pytest.mark.parametrize("trap", ["link", "open", "open above"])
def test_objects_go_where_nobody_else_can_make_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: str
) -> None:
    runtime, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    runtime.mkdir(0o700)
    elsewhere.mkdir(0o777)
    if trap == "link":
        (runtime / "patcher").symlink_to(elsewhere)
    else:
        (runtime / "patcher").mkdir()
        (runtime / "patcher" if trap == "open" else runtime).chmod(0o777)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    with Compiler() as compiler:
        assert runtime not in compiler.directory.resolve().parents
        assert elsewhere not in compiler.directory.resolve().parents
        assert stat.S_IMODE(compiler.directory.stat().st_mode) == 0o700
    assert list(elsewhere.iterdir()) == []


def test_no_shell_runs_a_compile_command(tmp_path: Path) -> None:
    """What a shell would run is an argument as any other."""
    project = Project(tmp_path / "p")
    made = tmp_path / "made"
    touch = f"touch${{IFS}}{made}"
    command = f"gcc -g -O2 '-DA=;{touch}' -DB=$({touch}) -DC=`{touch}` -DD=|{touch} -c src/unit.c -o unit.o"
    entry = {"directory": str(project.root), "file": "src/unit.c", "command": command}
    (project.root / "compile_commands.json").write_text(json.dumps([entry]))
    with project.running() as program, patcher.attach(program.pid) as session:
        session.apply(project.edit("unit.c", "n + 1000 * calls", "3"))
        assert program.ask(5) == "3"
    assert not made.exists()
