"""patcher doctor on programs as compilers and linkers make them, good and bad."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import run

TEXT = """\
#include <stdio.h>
__attribute__((noinline)) int twice(int n)
{
    return n * 2 + 1;
}
int main(int argc, char **argv)
{
    return printf("%s %d\\n", argv[0], twice(argc)) < 0;
}
"""
SHORT = """\
__asm__(".globl tiny\\n.type tiny, @function\\ntiny: ret\\n.size tiny, 1\\n.globl other\\n.type other, @function\\n"
        "other: mov %edi, %eax\\nadd $5, %eax\\nret\\n.size other, 6\\n");
"""


@pytest.fixture
def built(tmp_path: Path) -> Callable[..., Path]:
    def build(*command: str, text: str = TEXT) -> Path:
        (tmp_path / "main.c").write_text(text)
        subprocess.run([*command, "main.c", "-o", "prog"], cwd=tmp_path, check=True)
        return tmp_path / "prog"

    return build


def examined(program: object, *options: object, cwd: Path | None = None) -> tuple[int, dict[str, Any]]:
    done = run("doctor", program, "--json", *options, cwd=cwd)
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout)


def of_topic(told: dict[str, Any], topic: str) -> list[dict[str, str]]:
    return [f for f in told["findings"] if f["topic"] == topic]


def states(told: dict[str, Any]) -> dict[str, str]:
    return {f["topic"]: f["state"] for f in told["findings"]}


def test_this_machine_is_one_where_the_tests_run():
    done = run("doctor")
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("machine\n  ok    system: Linux ")
    assert "  ok    tracing: a process was stopped, and its code written to\n" in done.stdout
    assert "\nprogram" not in done.stdout


def test_nothing_is_left_of_the_process_that_it_was_tried_on():
    before = children()
    run("doctor")
    assert children() <= before


def children() -> set[int]:
    found = set()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if Path(f"/proc/{entry}/cmdline").read_bytes() == b"sleep\x0060\x00":
                found.add(int(entry))
        except OSError:
            continue
    return found


def test_a_plain_program(built):
    status, told = examined(built("gcc", "-g", "-O2", "-fcf-protection"))
    assert (status, told["ok"]) == (0, True)
    assert "bad" not in states(told).values()
    (unit,) = told["units"]
    assert Path(unit["file"]).name == "main.c"
    assert (unit["functions"], unit["refused"]) == (2, [])
    assert unit["compiler"] == unit["found"] != ""
    assert unit["command"].startswith("debug information of ")
    assert "-fcf-protection" in of_topic(told, "hardening")[0]["message"]
    text = run("doctor", built("gcc", "-g", "-O2")).stdout
    assert "  ok    functions: 2 of 2 in 1 unit can be changed\n" in text


def test_a_compilation_database_is_preferred(built, tmp_path):
    program = built("gcc", "-g", "-O2")
    command = {"directory": str(tmp_path), "file": "main.c", "command": "gcc -g -O2 -c main.c"}
    (tmp_path / "compile_commands.json").write_text(json.dumps([command]))
    _, told = examined(program)
    (found,) = of_topic(told, "commands")
    assert (found["state"], found["message"]) == ("ok", f"main.c: from {tmp_path}/compile_commands.json")


def test_a_stripped_program(built):
    status, told = examined(built("gcc", "-g", "-s"))
    assert status == 1
    assert states(told)["symbols"] == "bad"
    assert "strip" in of_topic(told, "symbols")[0]["hint"]


def test_a_stripped_program_with_its_debug_file(built, tmp_path):
    program = built("gcc", "-g", "-O2", "-Wl,--build-id")
    subprocess.run(["objcopy", "--only-keep-debug", "prog", "prog.debug"], cwd=tmp_path, check=True)
    subprocess.run(["objcopy", "--strip-all", "--add-gnu-debuglink=prog.debug", "prog"], cwd=tmp_path, check=True)
    _, told = examined(program)
    assert states(told)["symbols"] == "ok"
    assert told["units"][0]["functions"] == 2


def test_without_debug_information(built, tmp_path):
    program = built("gcc", "-O2")
    status, told = examined(program)
    assert (status, states(told)["debug information"], states(told)["commands"]) == (1, "note", "bad")
    assert "-g" in of_topic(told, "commands")[0]["hint"]
    status, told = examined(program, "--build", "make")
    assert (status, states(told)["commands"]) == (0, "ok")
    command = {"directory": str(tmp_path), "file": "main.c", "command": "gcc -O2 -c main.c"}
    (tmp_path / "compile_commands.json").write_text(json.dumps([command]))
    status, told = examined(program)
    assert (status, states(told)["commands"]) == (0, "ok")


def test_without_debug_information_a_makefile_tells_how_it_is_compiled(tmp_path):
    (tmp_path / "main.c").write_text(TEXT)
    (tmp_path / "Makefile").write_text("prog: main.o\n\tcc -o $@ $^\nmain.o: main.c\n\tcc -O2 -c main.c\n")
    subprocess.run(["make", "-s"], cwd=tmp_path, check=True)
    status, told = examined(tmp_path / "prog", "--watch", tmp_path)
    assert status == 0
    (commands,) = of_topic(told, "commands")
    assert (commands["state"], commands["message"]) == ("ok", f"main.c: from {tmp_path}/Makefile (make -n)")


def test_link_time_optimisation(built):
    status, told = examined(built("gcc", "-g", "-O2", "-flto"))
    assert (status, states(told)["link-time optimisation"]) == (1, "bad")
    assert "main.c" in of_topic(told, "link-time optimisation")[0]["message"]


def test_a_static_program(built):
    status, told = examined(built("gcc", "-g", "-O2", "-static"))
    assert (status, states(told)["file"]) == (0, "note")
    assert "--archive" in of_topic(told, "file")[0]["hint"]
    assert told["units"][0]["functions"] == 2, "those of libc.a are not counted"


def test_another_compiler(built, tmp_path):
    program = built("gcc", "-g", "-O2")
    command = {"directory": str(tmp_path), "file": "main.c", "command": "clang -g -O2 -c main.c"}
    (tmp_path / "compile_commands.json").write_text(json.dumps([command]))
    status, told = examined(program)
    assert (status, states(told)["compiler"]) == (1, "bad")
    (found,) = of_topic(told, "compiler")
    assert "compiled by gcc " in found["message"]
    assert "would be compiled again by clang " in found["message"]


def test_clang_without_recorded_switches_and_with_them(built):
    status, told = examined(built("clang", "-g", "-O2"))
    assert (status, states(told)["commands"]) == (1, "bad")
    assert "clang recorded no switches" in of_topic(told, "commands")[0]["message"]
    status, told = examined(built("clang", "-g", "-O2", "-grecord-command-line"))
    assert (status, states(told)["commands"]) == (0, "ok")


def test_sources_that_are_gone_or_newer(built, tmp_path):
    program = built("gcc", "-g", "-O2")
    os.utime(tmp_path / "main.c", (2e9, 2e9))
    status, told = examined(program)
    assert (status, states(told)["sources"]) == (0, "note")
    (tmp_path / "main.c").unlink()
    status, told = examined(program)
    assert (status, states(told)["commands"]) == (1, "bad")
    assert "main.c: the source is not there" in of_topic(told, "commands")[0]["message"]


def test_functions_whose_entries_have_no_room_are_named(built):
    _, told = examined(built("gcc", "-g", "-O2", text=SHORT + TEXT))
    assert [r["name"] for r in told["units"][0]["refused"]] == ["tiny"]
    named = [f for f in of_topic(told, "functions") if f["state"] == "note"]
    assert [f["message"].partition(":")[0] for f in named] == ["tiny"]


NOT_PROGRAMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda p: p.write_text("int main;\n"), "not a program"),
    "empty": (lambda p: p.write_text(""), "not a program"),
    "script": (lambda p: p.write_text("#!/bin/sh -e\nexit\n"), "a script for /bin/sh -e"),
    "directory": (lambda p: p.mkdir(), "is a directory"),
    "missing": (lambda p: None, "no such file"),
    "cut": (lambda p: p.write_bytes(Path("/bin/true").read_bytes()[:100]), ""),
    "another machine": (
        lambda p: p.write_bytes((d := Path("/bin/true").read_bytes())[:18] + b"\xb7\0" + d[20:]),
        "",
    ),
}


@pytest.mark.parametrize("kind", NOT_PROGRAMS)
def test_what_is_no_program(kind, tmp_path):
    make, sentence = NOT_PROGRAMS[kind]
    make(tmp_path / "prog")
    status, told = examined("./prog", cwd=tmp_path)
    (found,) = told["findings"]
    assert (status, found["topic"], found["state"]) == (1, "file", "bad")
    assert sentence in found["message"]
    assert found["hint"]


def test_a_name_without_a_slash_is_looked_for_in_path():
    _, told = examined("sh")
    assert states(told)["file"] == "ok"
    status, told = examined("no-such-program-anywhere")
    assert (status, told["findings"][0]["message"]) == (1, "no-such-program-anywhere: no such program in PATH")
