"""What --every-function leaves as it is: functions whose entry has no room for a jump, or with labels in variables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from project import MAIN, Project

import patcher
from patcher.errors import PatcherError
from patcher.report import Function

TINY = """
__asm__(".text\\n.globl tiny\\n.type tiny, @function\\ntiny: mov %edi, %eax\\nret\\n.size tiny, . - tiny\\n");
"""
NEXT = """
__asm__(".globl next\\n.type next, @function\\nnext: mov %edi, %eax\\nnot %eax\\nnot %eax\\nret\\n"
        ".size next, . - next\\n");
"""
UNIT = f"""
int tiny(int), next(int);
{TINY}{NEXT}
int answer(int n) {{ return tiny(n) + next(n); }}
"""
LABELS = """
static int run(const char *code)
{
    static void *labels[] = {&&end, &&up, &&down};
    int n = 0;
    if (*code > 'y')
        labels[0] = &&down;
    goto *labels[(*code++ - '0') & 3];
up: n++; goto *labels[(*code++ - '0') & 3];
down: n--; goto *labels[(*code++ - '0') & 3];
end: return n;
}
int answer(int n) { return run(n & 1 ? "11120" : "220"); }
"""


def test_a_function_without_room_is_named_and_left(tmp_path: Path) -> None:
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": UNIT})
    unit = project.object("unit.c")
    with project.running() as program:
        command = [sys.executable, "-m", "patcher", "apply", str(program.pid), str(unit), "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert json.loads(done.stdout)["event"] == "unchanged", "nothing is replaced unless it is asked for"
        done = subprocess.run([*command, "--every-function"], capture_output=True, text=True)
        event = json.loads(done.stdout)
        assert event["kept"] == ["tiny"]
        assert {(f["name"], f["status"]) for f in event["functions"]} == {("next", "relinked"), ("answer", "relinked")}
        assert "relinked: next, answer" in done.stderr
        assert "kept, no room for a jump at their entry: tiny" in done.stderr
        assert program.ask(7) == "14"


def test_a_change_of_it_is_refused_as_ever(tmp_path: Path) -> None:
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": UNIT})
    change = project.object("unit.c", ("tiny: mov %edi, %eax", "tiny: not %eax"))
    with project.running() as program, patcher.attach(program.pid, every_function=True) as session:
        with pytest.raises(PatcherError) as refused:
            session.apply(change)
        assert refused.value.code == "entry"
        assert session.status().generation == 0
        assert program.ask(7) == "14"


def test_where_all_are_kept_there_is_no_generation(tmp_path: Path) -> None:
    project = Project(tmp_path / "p", {"main.c": MAIN.replace("answer", "tiny"), "unit.c": TINY + NEXT})
    with project.running() as program, patcher.attach(program.pid, every_function=True) as session:
        generation = session.apply(project.object("unit.c", (NEXT, "")))
        assert (generation.number, generation.functions, generation.kept) == (0, (), ("tiny",))
        assert session.status().functions == ()
        assert program.ask(7) == "7"


def test_labels_in_a_variable_keep_their_function(tmp_path: Path) -> None:
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": LABELS}, compile_flags=["-O0"])
    with project.running() as program, patcher.attach(program.pid, every_function=True) as session:
        assert program.ask(1) == "2"
        generation = session.apply(project.object("unit.c"))
        assert generation.kept == ("run",)
        assert generation.functions == (Function("answer", str(project.program), "relinked"),)
        assert program.ask(1) == "2"
        assert program.ask(2) == "-2"
