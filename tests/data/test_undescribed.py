"""Variables of other units whose types the compiler did not describe: asked for, refused beyond their end, or told."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from project import MAIN, Project

import patcher
from patcher.errors import UnsafeChange
from patcher.report import Event, Note
from patcher.session import Session

DATA = """\
struct node { int first; int second; };
struct node state = {1, 2};
"""
UNIT = """\
struct node { int first; int second; };
int answer(int n)
{
    extern struct node state;
    return n + state.second;
}
"""
SWAPPED = UNIT.replace("int first; int second;", "int second; int first;").replace("n + state", "100 + n + state")
EDITED = UNIT.replace("n + state", "200 + n + state")


class Notes:
    """The sentences that a session says."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, Note):
            self.texts.append(event.text)


def attached(pid: int, project: Project) -> tuple[Session, Notes]:
    session = patcher.attach(pid, watched=[project.sources])
    session._reporter = notes = Notes()
    return session, notes


def started(
    root: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, flags: Sequence[str] = ("-g", "-O2")
) -> Project:
    monkeypatch.setattr("project.COMPILE", (compiler, *flags))
    return Project(root, {"main.c": MAIN, "unit.c": UNIT, "data.c": DATA})


def save(project: Project, text: str) -> Path:
    (project.sources / "unit.c").write_text(text)
    return project.sources / "unit.c"


def told_of_state(notes: Notes) -> int:
    return sum("`state`" in text and "is not checked" in text for text in notes.texts)


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_a_declaration_within_a_function(tmp_path, monkeypatch, compiler):
    project = started(tmp_path / "p", monkeypatch, compiler)
    with project.running() as program:
        session, notes = attached(program.pid, project)
        with session:
            assert program.ask(1) == "3"
            session.apply(save(project, EDITED))
            assert program.ask(1) == "203"
            with pytest.raises(UnsafeChange, match="`struct node`: member `first` offset 0 -> 4"):
                session.apply(save(project, SWAPPED))
            session.apply(save(project, EDITED.replace("200", "300")))
            assert program.ask(1) == "303"
    assert told_of_state(notes) == (compiler == "clang"), "gcc describes it; what is not checked is said once"


def test_a_unit_with_line_numbers_only(tmp_path, monkeypatch):
    project = started(tmp_path / "p", monkeypatch, "gcc")
    unit = save(project, EDITED)
    (tmp_path / "lines").mkdir()
    object_ = tmp_path / "lines/unit.o"
    subprocess.run(["gcc", "-g1", "-O2", "-ffunction-sections", "-c", "-o", object_, unit], check=True)
    with project.running() as program:
        session, notes = attached(program.pid, project)
        with session:
            session.apply(object_)
            assert program.ask(1) == "203"
    assert told_of_state(notes) == 1
