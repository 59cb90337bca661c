"""Programs of csmith run on unchanged when every function is replaced by its own relinked copy.

csmith (Yang, Chen, Eide, Regehr: Finding and Understanding Bugs in C Compilers, PLDI 2011) makes programs without
undefined behaviour that print a checksum of all their variables; here each runs once a round, its variables staying.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest
from living import UNIT, compile_object, compile_text, run

from proof.replacing import prove

COUNT = int(os.environ.get("PATCHER_PROGRAMS", "48")) // 6
STYLES = tuple(product(("gcc", "clang"), ("-O0", "-O1", "-O2", "-O3"), ("-fno-pic -no-pie", "-fPIC -pie")))
ROUNDS = 2
HEADERS = Path("/usr/include/csmith")
MAIN = """
#include <stdio.h>
int csmith_main(int, char **);
int main(void)
{
    char line[80], *words[] = {"program", NULL};
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    while (fgets(line, sizeof line, stdin))
        csmith_main(1, words);
    return 0;
}
"""
pytestmark = pytest.mark.skipif(
    shutil.which("csmith") is None or not HEADERS.is_dir(), reason="csmith is not installed: csmith and libcsmith-dev"
)


@pytest.mark.parametrize("seed", range(COUNT))
def test_a_program_runs_on_when_every_function_is_replaced_by_itself(seed: int, tmp_path: Path) -> None:
    compiler, level, model = STYLES[seed % len(STYLES)]
    flags = (level, *model.split(), "-w", "-Dmain=csmith_main", f"-I{HEADERS}", "-Wno-unused-command-line-argument")
    source = tmp_path / "random.c"
    source.write_text(run("csmith", "--seed", str(seed + 1), "--max-funcs", "12"))
    plain = compile_object(source, tmp_path / "plain.o", *flags, compiler=compiler)
    unit = compile_object(source, tmp_path / "unit.o", *flags, *UNIT, compiler=compiler)
    main = compile_text(MAIN, tmp_path / "main.o", level, *model.split()[:1], compiler=compiler, name="main.c")
    program = tmp_path / "program"
    run(compiler, *model.split(), "-o", program, plain, main)
    if not ends(program):
        pytest.skip(f"csmith's program of seed {seed + 1} does not end")
    mistaken = 8 if (compiler, level) == ("gcc", "-O0") else 0  # as in test_every_function
    prove(program, [unit], rounds=ROUNDS, functions=("csmith_main",), mistaken=mistaken)


def ends(program: Path) -> bool:
    """Tell whether a program of csmith ends, over and over: some have loops without an end."""
    rounds = "1\n" * 6 * ROUNDS
    try:
        return subprocess.run([program], input=rounds, text=True, stdout=subprocess.DEVNULL, timeout=20).returncode == 0
    except subprocess.TimeoutExpired:
        return False
