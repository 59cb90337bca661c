"""Which units a saved header touches: those of the process, and no other program's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from project import MAIN, Project

import patcher

HELD = "struct held {\n    int count;\n#ifdef OTHER\n    int other;\n#endif\n};\n"
PART = """\
#include "scale.h"
static struct held held;
int part(int n)
{
    held.count += SCALE;
    return held.count + n;
}
"""
UNIT = '#include "scale.h"\nint part(int);\nint answer(int n)\n{\n    return SCALE * 100 + part(n);\n}\n'


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A program, and beside it what another one is compiled from: a file of the same name, with other types."""
    root = tmp_path / "p"
    for name in ("include", "other"):
        (root / name).mkdir(parents=True)
    (root / "include/scale.h").write_text(f"#define SCALE 3\n{HELD}")
    found = Project(root, {"main.c": MAIN, "unit.c": UNIT, "part.c": PART}, compile_flags=["-Iinclude"])
    (root / "other/part.c").write_text(PART)
    commands = json.loads((root / "compile_commands.json").read_text())
    (ours,) = (c for c in commands if c["file"] == "src/part.c")
    words = ["other/part.c" if word == "src/part.c" else word for word in ours["arguments"]]
    theirs = {**ours, "file": "other/part.c", "arguments": [*words, "-DOTHER"]}
    (root / "compile_commands.json").write_text(json.dumps([*commands, theirs]))
    return found


def saved(project: Project, session: patcher.Session) -> frozenset[Path]:
    """Save the header, and return the units that it touches."""
    header = project.root / "include/scale.h"
    header.write_text(f"#define SCALE 4\n{HELD}")
    (units,) = session.touched.by([header.resolve()], lambda: False).values()
    return units


def test_another_programs_unit_of_the_same_name(project):
    watched = [project.sources, project.root / "include"]
    with project.running() as program, patcher.attach(program.pid, watched=watched) as session:
        assert program.ask(1) == "304"
        units = saved(project, session)
        assert units == {(project.sources / name).resolve() for name in ("unit.c", "part.c")}
        session.apply(*units)
        assert program.ask(1) == "408"


def test_where_the_program_was_compiled_elsewhere_the_name_has_to_do(project, tmp_path):
    moved = tmp_path / "moved"
    with project.running() as program:
        project.root.rename(moved)
        commands = (moved / "compile_commands.json").read_text().replace(str(project.root), str(moved))
        (moved / "compile_commands.json").write_text(commands)
        project.root = moved
        with patcher.attach(program.pid, watched=[moved / "src", moved / "include"]) as session:
            files = {unit.relative_to(moved.resolve()) for unit in saved(project, session)}
            assert files == {Path("src/unit.c"), Path("src/part.c"), Path("other/part.c")}


def test_where_the_program_was_compiled_from_a_copy_that_is_still_there(project, tmp_path):
    """The copy is what debug information names; what is edited is the other one."""
    edited = tmp_path / "edited"
    shutil.copytree(project.root, edited)
    commands = (edited / "compile_commands.json").read_text().replace(str(project.root), str(edited))
    (edited / "compile_commands.json").write_text(commands)
    with project.running() as program:
        project.root = edited
        with patcher.attach(program.pid, watched=[edited / "src", edited / "include"]) as session:
            files = {unit.relative_to(edited.resolve()) for unit in saved(project, session)}
            assert {Path("src/unit.c"), Path("src/part.c")} <= files
