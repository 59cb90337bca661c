"""Without debug information the layouts of types are not compared, and that is said, once."""

from __future__ import annotations

from pathlib import Path

import pytest
from project import MAIN, Project

import patcher
from patcher.report import Event, Note

UNIT = """\
struct state { int calls; int last; } state = {100, 1};
int answer(int n) { state.last = n; return state.calls += n; }
"""


class Notes:
    def __init__(self) -> None:
        self.said: list[str] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, Note):
            self.said.append(event.text)


@pytest.mark.parametrize("optimise", ["-O0", "-O2"])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize(("program_has", "object_has"), [(False, False), (True, False), (False, True), (True, True)])
def test_layouts_are_said_to_be_unchecked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compiler: str,
    optimise: str,
    program_has: bool,
    object_has: bool,
) -> None:
    monkeypatch.setattr("project.COMPILE", (compiler, "-g" if program_has else "-g0", optimise))
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": UNIT})
    commands = (project.root / "compile_commands.json").read_text()
    commands = commands.replace('"-g"', '"-g0"') if not object_has else commands.replace('"-g0"', '"-g"')
    (project.root / "compile_commands.json").write_text(commands)
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        session._reporter = notes = Notes()
        assert program.ask(1) == "101"
        for old, new in (("+= n", "+= 2 * n"), ("+= 2 * n", "+= 3 * n")):
            session.apply(project.edit("unit.c", old, new))
        assert program.ask(1) == "104"
        session.revert(0)
        said = [text for text in notes.said if "the layouts of its types are not checked" in text]
        if program_has and object_has:
            assert not said
        else:
            assert len(said) == 1
            assert ("unit.c" if program_has else "program") in said[0]
