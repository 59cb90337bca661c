"""What a unit may change: it must be part of what runs, and a line number must name the line it named."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from project import MAIN, Project

import patcher
from patcher.texts import Texts

PROGRAM = """
#include <stdio.h>
#include <string.h>
__attribute__((noipa)) int size(const char *line) { return (int)strlen(line); }
int main(void)
{
    char line[100];
    while (fgets(line, sizeof line, stdin)) {
        printf("%d\\n", size(line));
        fflush(stdout);
    }
    return 0;
}
"""
OTHER = """
#include <stdio.h>
__attribute__((noipa)) int size(const char *line) { return line[0] * 100; }
int main(int count, char **words) { printf("another program: %d\\n", size(words[count - 1])); return 0; }
"""


class Tree:
    """A folder with two programs; only the first one runs."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.folder = folder
        entries = []
        for name, text in (("program.c", PROGRAM), ("other.c", OTHER)):
            (folder / name).write_text(text)
            command = ["gcc", "-O1", *flags, "-c", name, "-o", name + ".o"]
            entries.append({"directory": str(folder), "file": name, "arguments": command})
        subprocess.run(entries[0]["arguments"], cwd=folder, check=True)
        subprocess.run(["gcc", "-o", "program", "program.c.o"], cwd=folder, check=True)
        (folder / "compile_commands.json").write_text(json.dumps(entries))
        self.process = subprocess.Popen(
            [folder / "program"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        return self.process.stdout.readline().strip()

    def attach(self, **options: bool) -> patcher.Session:
        return patcher.attach(self.process.pid, compile_commands=self.folder / "compile_commands.json", **options)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_another_programs_source_is_refused_although_names_are_the_same(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    try:
        assert tree.ask("abc") == "4"
        with tree.attach() as session:
            with pytest.raises(patcher.UnsafeChange) as refused:
                session.apply(tmp_path / "other.c")
            assert refused.value.code == "mismatch"
            assert "other.c is not among the files" in refused.value.message
            assert "`size`" in refused.value.message
            assert session.status().arenas == ()
        assert tree.ask("abc") == "4"
        with tree.attach(force=True) as session:
            session.apply(tmp_path / "other.c")
        assert tree.ask("abc") == str(ord("a") * 100)
    finally:
        tree.close()


def test_a_first_text_stays_known_however_many_are_applied(tmp_path: Path) -> None:
    file = tmp_path / "unit.c"
    file.write_text("first")
    texts = Texts()
    texts.remember([tmp_path])
    for number in range(20):
        file.write_text(f"text {number}")
        texts.applied(file)
    known = texts.of(file)
    assert known[0] == b"first"
    assert known[-1] == b"text 19"
    assert len(known) < 10
    texts.remember([tmp_path])
    assert texts.of(file) == known


STAMPED = PROGRAM.replace(
    "int main(void)",
    '__attribute__((noipa)) const char *built(void) { return "built " __DATE__ " at " __TIME__ ", " __TIMESTAMP__; }\n'
    "int main(void)",
).replace('printf("%d\\n", size(line));', 'printf("%d %s\\n", size(line), built());')


def test_a_build_stamp_alone_makes_no_function_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(__name__ + ".PROGRAM", STAMPED)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")  # the program was built long ago
    tree = Tree(tmp_path)
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    try:
        before = tree.ask("abc")
        assert "built Sep  9 2001 at 01:46:40" in before
        with tree.attach() as session:
            (tmp_path / "program.c").write_text(STAMPED.replace("strlen(line)", "strlen(line) * 2"))
            assert [f.name for f in session.apply(tmp_path / "program.c").functions] == ["size"]
            assert tree.ask("abc") == before.replace("4 ", "8 ", 1)
            other = STAMPED.replace("__DATE__", '"Sep  9 2002"').replace("strlen(line)", "strlen(line) * 2")
            (tmp_path / "program.c").write_text(other)
            assert [f.name for f in session.apply(tmp_path / "program.c").functions] == ["built"]
            assert "built Sep  9 2002 at " in tree.ask("abc")
    finally:
        tree.close()


def test_an_object_without_anything_or_with_data_of_nobody_is_refused(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    try:
        for name, text in (("data.o", b"int lonely = 5;"), ("nothing.o", b"")):
            subprocess.run(["gcc", "-x", "c", "-c", "-o", name, "-"], input=text, cwd=tmp_path, check=True)
        with tree.attach() as session:
            with pytest.raises(patcher.ObjectError, match="neither code nor data in it"):
                session.apply(tmp_path / "nothing.o")
            with pytest.raises(patcher.UnsafeChange, match=r"nothing of .*data.o is in process .*lonely"):
                session.apply(tmp_path / "data.o")
    finally:
        tree.close()


def test_a_function_that_was_taken_out_again_before_anything_called_it_is_not_there(tmp_path: Path) -> None:
    head = "int one(void);\nint foo(void);\n"
    (tmp_path / "a.c").write_text(head + "__attribute__((noipa)) int one(void) { return 1; }\n")
    main = head + PROGRAM.replace("(int)strlen(line)", "one()")
    (tmp_path / "main.c").write_text(main)
    commands = {name: ["gcc", "-O1", "-c", f"{name}.c", "-o", f"{name}.o"] for name in ("a", "main")}
    for command in commands.values():
        subprocess.run(command, cwd=tmp_path, check=True)
    subprocess.run(["gcc", "-o", "program", "a.o", "main.o"], cwd=tmp_path, check=True)
    entries = [{"directory": str(tmp_path), "file": f"{n}.c", "arguments": c} for n, c in commands.items()]
    (tmp_path / "compile_commands.json").write_text(json.dumps(entries))
    process = subprocess.Popen([tmp_path / "program"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        with patcher.attach(process.pid, compile_commands=tmp_path / "compile_commands.json") as session:
            before = (tmp_path / "a.c").read_text()
            (tmp_path / "a.c").write_text(before + "int foo(void) { return 7; }\n")
            assert session.apply(tmp_path / "a.c").waiting == ("foo",)
            (tmp_path / "a.c").write_text(before)
            assert session.apply(tmp_path / "a.c").waiting == ()
            (tmp_path / "main.c").write_text(main.replace("return one()", "return foo()"))
            with pytest.raises(patcher.UnresolvedSymbol, match="`foo`"):
                session.apply(tmp_path / "main.c")
    finally:
        process.kill()
        process.communicate()


TABLES = "const int limits[2] = {1, 2};\n"
USER = "extern const int limits[2];\nint answer(int n) { return limits[n]; }\n"


def test_data_of_a_file_that_the_program_was_not_linked_with_is_not_taken_for_its_own(tmp_path: Path) -> None:
    made = Project(tmp_path, {"main.c": MAIN, "unit.c": USER, "tables.c": TABLES})
    (made.sources / "others.c").write_text(TABLES.replace("2}", "9}"))
    command = ["gcc", "-g", "-O2", "-c", str(made.sources / "others.c"), "-o", str(tmp_path / "others.o")]
    subprocess.run(command, check=True)
    with made.running() as program, patcher.attach(program.pid) as session:
        with pytest.raises(patcher.UnsafeChange, match=r"nothing of .*others.o is in process .*limits") as caught:
            session.apply(tmp_path / "others.o")
        assert caught.value.code == "not-in-process"
        assert program.ask(1) == "2"
        session.apply(made.object("tables.c", ("{1, 2}", "{1, 7}")))
        assert program.ask(1) == "7"


def test_a_unit_without_functions_is_explained(tmp_path: Path) -> None:
    made = Project(tmp_path, {"main.c": MAIN, "unit.c": USER, "tables.c": TABLES})
    with made.running() as program, patcher.attach(program.pid) as session:
        found = session.explain(made.edit("tables.c", "{1, 2}", "{1, 7}"))
        assert [(v.name, v.outcome, v.note) for v in found.variables] == [("limits", "rewritten", "`answer`")]
        assert program.ask(1) == "2"
