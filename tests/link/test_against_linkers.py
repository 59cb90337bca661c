"""GNU ld, gold, lld, mold and we link the same objects at the same addresses: the bytes must come out the same.

The inputs are the sources of all scenarios and generated programs, dealt out over compilers, optimisation levels, code
models and linkers. What is compared: every byte of every function, constant and variable, thread-locals' initial values
excepted (nothing in them is linked here), merged strings by meaning, cells by contents. `.eh_frame` is left out.
"""

from __future__ import annotations

import contextlib
import os
from itertools import product
from pathlib import Path
from random import Random

import pytest
from living import UNIT, compile_object
from proof.generated import generate
from scenario import read_scenario

from link.reference import LINKERS, Comparison, Linked, LinkerDefect, NotThere, compare, link_with, read_linked
from patcher.blocks import Blocks
from patcher.elf import read_object

COUNT = int(os.environ.get("PATCHER_PROGRAMS", "30"))
LINKERS_EACH = 4 if "PATCHER_PROGRAMS" in os.environ else 2
STYLES = tuple(product(("gcc", "clang"), ("-O0", "-O1", "-O2", "-O3"), ("-fno-pic", "-fPIE", "-fPIC")))
SCENARIOS = Path(__file__).parents[2] / "fixtures" / "scenarios"
SOURCES = sorted(SCENARIOS.glob("**/*.c"))


def linkers(number: int) -> list[str]:
    """Return the linkers for one input, others for the next."""
    start = number // len(STYLES) + number
    return [LINKERS[(start + i) % len(LINKERS)] for i in range(LINKERS_EACH)]


def compare_with(objects: list[Path], number: int, folder: Path) -> list[Comparison]:
    found = []
    for linker in linkers(number):
        with contextlib.suppress(LinkerDefect):
            found.append(compare(objects, link_with(linker, objects, folder)))
            assert found[-1].differences == (), f"{linker}, {STYLES[number % len(STYLES)]}"
    assert found
    return found


@pytest.mark.parametrize("number", range(len(SOURCES)), ids=[str(s.relative_to(SCENARIOS)) for s in SOURCES])
def test_a_source_of_a_scenario(number: int, tmp_path: Path) -> None:
    source = SOURCES[number]
    compiler, *flags = STYLES[number % len(STYLES)]
    described = source.parent / "scenario.toml"
    scenario = read_scenario(source.parent) if described.exists() else None
    if scenario is not None:
        compiler = compiler if compiler in (scenario.compilers or (compiler,)) else scenario.compilers[0]
        flags += scenario.flags
    flags = [flag.replace("SOURCES", str(source.parent)) for flag in flags]
    unit = compile_object(source, tmp_path / "unit.o", *flags, f"-I{SCENARIOS}", "-w", *UNIT, compiler=compiler)
    missing = [s.name for s in read_object(unit).symbols if s.undefined]
    if any("@" in name or name == "_DYNAMIC" for name in missing):
        pytest.skip("asks for what a static program does not have: a symbol's version, or a dynamic section")
    for comparison in compare_with([unit], number, tmp_path):
        assert comparison.blocks or not Blocks(read_object(unit)).functions


@pytest.mark.parametrize("seed", range(COUNT))
def test_a_generated_program(seed: int, tmp_path: Path) -> None:
    compiler, *flags = STYLES[seed % len(STYLES)]
    # Half of them as a user compiles, without a section for each function.
    sections = UNIT if seed // len(STYLES) % 2 == 0 else ()
    made = generate(1000 + seed)
    for name, text in made.files.items():
        (tmp_path / name).write_text(text)
    objects = [
        compile_object(tmp_path / unit, tmp_path / f"{unit}.o", *flags, "-w", *sections, compiler=compiler)
        for unit in made.units
    ]
    for comparison in compare_with(objects, seed, tmp_path):
        assert comparison.blocks > 30


def differs(objects: list[Path], reference: Linked) -> bool:
    try:
        return compare(objects, reference).differences != ()
    except NotThere:
        return True


def test_a_byte_that_differs_is_found(tmp_path: Path) -> None:
    made = generate(7)
    for name, text in made.files.items():
        (tmp_path / name).write_text(text)
    objects = [compile_object(tmp_path / u, tmp_path / f"{u}.o", "-O2", "-w", *UNIT) for u in made.units]
    reference = link_with("bfd", objects, tmp_path)
    assert compare(objects, reference).differences == ()
    program = (tmp_path / "program.bfd").read_bytes()
    text = (tmp_path / "map.bfd").read_text()
    random = Random(7)
    for section in (".text", ".rodata", ".data"):
        headers = reference.raw.section_headers
        header = next(h for i, h in enumerate(headers) if reference.raw.section_name(i) == section)
        start, size = int(header["offset"]), int(header["size"])
        found = 0
        for _ in range(10):
            at = start + random.randrange(size)
            damaged = program[:at] + bytes((program[at] ^ 1 << random.randrange(8),)) + program[at + 1 :]
            found += differs(objects, read_linked(damaged, text))
        assert found >= 6, f"{found} of 10 changed bits of {section} were seen; the rest are in gaps"
