"""Generated programs run on unchanged when every function is replaced by its own relinked copy (`replacing.prove`)."""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path

import pytest
from living import UNIT, compile_object, run

from proof.generated import generate
from proof.replacing import prove

COUNT = int(os.environ.get("PATCHER_PROGRAMS", "48"))
MODELS = ("-fno-pic -no-pie", "-fPIE -pie", "-fPIC -pie")
STYLES = tuple(product(("gcc", "clang"), ("-O0", "-O1", "-O2", "-O3"), MODELS))
LINKERS = ("bfd", "gold", "lld", "mold")
ROUNDS = 5


def style(seed: int) -> tuple[str, ...]:
    """Return a program's compiler and flags."""
    compiler, level, model = STYLES[seed % len(STYLES)]
    linker = LINKERS[(seed + seed // len(STYLES)) % len(LINKERS)]
    return compiler, level, f"-fuse-ld={linker}", *model.split()


def built(seed: int, folder: Path) -> tuple[Path, list[Path]]:
    """Build a generated program as a user does; return it, and its units' objects.

    These are as patcher compiles them, or those of the program itself: functions share a section there.
    Variables have one each even so: what leads to a variable's end is otherwise what leads to the next one, the known
    defect of scenario array-end.
    """
    compiler, *flags = style(seed)
    made = generate(seed, tails="gcc -O0" not in " ".join(style(seed)))  # the known defect of scenario string-tail
    for name, text in made.files.items():
        (folder / name).write_text(text)
    flags = [*flags, "-w", "-pthread", "-Wno-unused-command-line-argument"]
    shared = seed // len(STYLES) % 2
    plain_flags = [*flags, "-fdata-sections"] if shared else flags
    plain = [compile_object(folder / u, folder / f"{u}.plain.o", *plain_flags, compiler=compiler) for u in made.units]
    run(compiler, *flags, "-o", folder / "program", *plain)
    if shared:
        return folder / "program", plain
    units = [compile_object(folder / u, folder / f"{u}.o", *flags, *UNIT, compiler=compiler) for u in made.units]
    return folder / "program", units


@pytest.mark.parametrize("seed", range(COUNT))
def test_a_program_runs_on_when_every_function_is_replaced_by_itself(seed: int, tmp_path: Path) -> None:
    program, objects = built(seed, tmp_path)
    # gcc at -O0 leaves strings in .rodata between constants, with padding that nothing tells from contents,
    # and branches to its nops.
    mistaken = 3 if "-O0" in style(seed) else 0
    prove(program, objects, rounds=ROUNDS, functions=("main", "answer", "round_of", "state0"), mistaken=mistaken)
