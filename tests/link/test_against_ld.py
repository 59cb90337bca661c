"""GNU ld and we link the same objects at the same addresses: the code must come out byte for byte the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from living import UNIT, compile_text, run

from patcher.blocks import Block, Blocks, External
from patcher.elf import read_object
from patcher.elf import tables as t
from patcher.link.place import Region, Space, place
from patcher.link.plan import Bound, Unit, plan
from patcher.link.relocations import R

TEXT = r"""
extern int outside(int), variable, array[];
extern void nothing(void) __attribute__((weak));
static int hits = 4;
static long totals[8];
int counter = 3;
static const int primes[4] = {2, 3, 5, 7};
static __attribute__((noinline)) int inner(int n) { return n * hits++; }
int plain(int a, int b) { return a * 3 + b; }
int calls(int n) { return inner(n) + outside(n + 1) + plain(n, 2); }
int tail(int n) { return outside(n); }
int reads(int n) { return variable + array[n] + array[3] + counter + totals[n & 7] + (int)totals[2]; }
void writes(int n) { variable = n; array[n] = 7; counter += 5; totals[1] = n; hits = -1; }
int constants(int n) { return primes[n & 3]; }
double floats(double x) { return x * 1.5 + 0.125; }
int cases(int n)
{
    switch (n) {
    case 0: return outside(1);
    case 1: return plain(1, 2);
    case 2: return inner(3);
    case 3: return counter;
    case 4: return variable;
    case 5: return -3;
    default: return 0;
    }
}
void *addresses(int n)
{
    void *const all[4] = {(void *)outside, (void *)&variable, (void *)inner, (void *)&hits};
    return n == 0 ? all[0] : n == 1 ? all[1] : n == 2 ? all[2] : all[3];
}
int weakly(void) { return nothing != 0; }
"""
OTHER = "int variable = 9, array[16]; int outside(int n) { return n ^ 0x55; }\n"
STYLES = {
    "gcc -O0": ("gcc", "-O0", "-fno-pic"),
    "gcc -O2": ("gcc", "-O2", "-fno-pic"),
    "gcc -O1 pie": ("gcc", "-O1", "-fPIE"),
    "gcc -O2 sections": ("gcc", "-O2", "-fPIE", *UNIT),
    "clang -O0": ("clang", "-O0", "-fno-pic"),
    "clang -O2": ("clang", "-O2", "-fno-pic", *UNIT),
    "clang -O3 pie": ("clang", "-O3", "-fPIE"),
}


@pytest.mark.parametrize("style", STYLES)
def test_code_is_linked_as_ld_links_it(tmp_path: Path, style: str) -> None:
    compiler, *flags = STYLES[style]
    flags.append("-falign-functions=16")  # as we place every function
    unit = compile_text(TEXT, tmp_path / "unit.o", *flags, compiler=compiler)
    other = compile_text(OTHER, tmp_path / "other.o", *flags, compiler=compiler, name="other.c")
    program = tmp_path / "program"
    where = ("-Ttext=0x401000", "-Tdata=0x600000")
    run(
        "ld", "--no-relax", "-z", "norelro", "-e", "plain", *where, "-Map", tmp_path / "map", "-o", program, unit, other
    )
    theirs = t.read_raw("program", program.read_bytes())
    starts = section_starts((tmp_path / "map").read_text(), unit)
    blocks = Blocks(read_object(unit))
    symbols = {f[-1]: int(f[0], 16) for f in (line.split() for line in run("nm", program).splitlines()) if len(f) == 3}
    compared = 0
    for block in blocks.functions:
        start = starts[blocks.object.sections[block.section].name] + block.start
        writes = link_one(blocks, block, start, starts, symbols)
        if writes is None:
            continue  # a cold part
        ours, expected = bytearray(writes[start]), bytearray(loaded(theirs, start, block.size))
        for r in blocks.references(block):
            if r.type in (R.GOTPCREL, R.GOTPCRELX, R.REX_GOTPCRELX):  # cells are elsewhere, and hold the same
                cells = [start + r.offset - r.addend + field(code, r.offset) for code in (ours, expected)]
                assert ours_at(writes, cells[0]) == loaded(theirs, cells[1], 8), block.name
                ours[r.offset : r.offset + 4] = expected[r.offset : r.offset + 4] = bytes(4)
        assert ours == expected, block.name
        compared += 1
    assert compared >= 11


def ours_at(writes: dict[int, bytes], address: int) -> bytes:
    """Return the eight bytes that we write at an address."""
    return next(d[address - a : address - a + 8] for a, d in writes.items() if a <= address < a + len(d))


def field(code: bytes | bytearray, offset: int) -> int:
    return int.from_bytes(code[offset : offset + 4], "little", signed=True)


def section_starts(text: str, unit: Path) -> dict[str, int]:
    """Return where ld put the unit's sections, from its map."""
    words = text[text.index("Linker script and memory map") :].split()
    found = {}
    for i, word in enumerate(words):
        if word == str(unit) and words[i - 2].startswith("0x") and words[i - 3].startswith("."):
            found.setdefault(words[i - 3], int(words[i - 2], 16))
    return found


def loaded(raw: t.RawFile, address: int, size: int) -> bytes:
    for p in raw.program_headers:
        if int(p["type"]) == t.PT_LOAD and int(p["address"]) <= address < int(p["address"]) + int(p["file_size"]):
            start = int(p["offset"]) + address - int(p["address"])
            return bytes(raw.data[start : start + size])
    raise AssertionError(f"{address:#x} is not loaded")


def link_one(
    blocks: Blocks, block: Block, start: int, starts: dict[str, int], symbols: dict[str, int]
) -> dict[int, bytes] | None:
    """Link one function at an address, all others and all data being where ld put them: address -> bytes."""
    if start % 16:
        return None

    def resident(other: Block) -> Bound | None:
        if other is block:
            return None
        section = blocks.object.sections[other.section].name
        assert section in starts, section
        return Bound(starts[section] + other.start)

    def resolve(_: Blocks, target: External) -> Bound | None:
        return Bound(symbols[target.name]) if target.name in symbols else None

    found = plan([Unit(blocks, (block,), resident, lambda b: False)], resolve)
    space = Space(Region(0x700000, 0x710000), Region(start, start + 0x10000), Region(0x800000, 0x810000))
    return dict(place(found, space, {}, {}).writes)
