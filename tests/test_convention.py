"""A caller that keeps a value in a register its callee leaves alone must not find it overwritten by a new callee."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import patcher

# gcc -O2 keeps `k` and `seed` in call-clobbered registers across f, which it sees does not touch them.
UNIT = """
#include <stdio.h>
#include <string.h>
int seed = 3;
__attribute__((noinline)) int f(int x) { return x * seed + 1; }
int main(void)
{
    char line[100];
    while (fgets(line, sizeof line, stdin)) {
        int n = (int)strlen(line), k = n * seed, r = f(n);
        printf("%d\\n", r + k + seed);
        fflush(stdout);
    }
    return 0;
}
"""
BUSY = UNIT.replace(
    "{ return x * seed + 1; }",
    '{ char text[64]; snprintf(text, sizeof text, "%d", x); return (int)strlen(text) * 1000; }',
)


class Program:
    def __init__(self, folder: Path, *flags: str) -> None:
        self.source = folder / "unit.c"
        self.source.write_text(UNIT)
        command = ["gcc", "-g", *flags, "-c", "unit.c", "-o", "unit.o"]
        subprocess.run(command, cwd=folder, check=True)
        subprocess.run(["gcc", "-o", "program", "unit.o"], cwd=folder, check=True)
        entry = {"directory": str(folder), "file": "unit.c", "arguments": command}
        self.commands = folder / "compile_commands.json"
        self.commands.write_text(json.dumps([entry]))
        self.process = subprocess.Popen(
            [folder / "program"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def ask(self) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("x\n")
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_a_callee_that_takes_registers_from_an_active_caller_is_refused(tmp_path: Path) -> None:
    program = Program(tmp_path, "-O2")
    try:
        assert program.ask() == 16
        program.source.write_text(BUSY)
        with patcher.attach(program.process.pid, compile_commands=program.commands) as session:
            with pytest.raises(patcher.TargetBusy) as refused:
                session.apply(program.source)
            assert refused.value.code == "active"
            assert "`main`" in refused.value.message
            assert session.status().generation == 0
        assert program.ask() == 16
    finally:
        program.close()


def test_without_that_optimisation_the_same_change_goes_live(tmp_path: Path) -> None:
    program = Program(tmp_path, "-O2", "-fno-ipa-ra")
    try:
        assert program.ask() == 16
        program.source.write_text(BUSY)
        with patcher.attach(program.process.pid, compile_commands=program.commands) as session:
            generation = session.apply(program.source)
            assert "f" in [f.name for f in generation.functions]
        assert program.ask() == 1000 + 2 * 3 + 3
    finally:
        program.close()
