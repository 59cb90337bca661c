"""One function with one relocation, planned and placed where a test wants it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from living import run

from patcher.blocks import Block, Blocks, External
from patcher.elf import tables as t
from patcher.elf.object import parse_object
from patcher.link.place import Placement, Region, Space, place
from patcher.link.plan import Bound, Plan, Unit, plan

FIELD = 8
"""Offset of the relocated field in the function."""


def template(folder: Path) -> bytes:
    """Return an object with `f`, 32 bytes long, and one relocation in it against the undefined `there`."""
    source, nops = folder / "f.s", "0x9090909090909090"
    source.write_text(
        f'.file "f.c"\n.globl f\n.type f, @function\n.section .text.f,"ax",@progbits\n'
        f"f: .quad {nops}, {nops}, {nops}, {nops}\n.size f, 32\n.reloc {FIELD}, R_X86_64_64, there\n"
    )
    run("as", source, "-o", folder / "f.o")
    return (folder / "f.o").read_bytes()


def relocating(data: bytes, kind: int, addend: int) -> Blocks:
    """Return the template with another relocation type and addend."""
    raw = t.read_raw("f.o", data)
    section = next(h for h in raw.section_headers if int(h["type"]) == t.SHT_RELA)
    patched = bytearray(data)
    struct.pack_into("<I", patched, int(section["offset"]) + 8, kind)
    struct.pack_into("<q", patched, int(section["offset"]) + 16, addend)
    return Blocks(parse_object("f.o", bytes(patched)))


def planned(
    blocks: Blocks,
    resolve: Callable[[str], Bound | None],
    *,
    wanted: tuple[str, ...] | None = None,
    resident: Callable[[Block], Bound | None] = lambda block: None,
    doors: Callable[[Block], bool] = lambda block: False,
) -> Plan:
    functions = tuple(b for b in blocks.functions if wanted is None or b.name in wanted)

    def resolved(_: Blocks, target: External) -> Bound | None:
        return resolve(target.name)

    return plan([Unit(blocks, functions, resident, doors)], resolved)


def spaces(code: int, read_only: int, data: int, size: int = 1 << 16) -> Space:
    return Space(Region(read_only, read_only + size), Region(code, code + size), Region(data, data + size))


def written(placement: Placement, address: int, size: int) -> bytes:
    """Return what a placement writes at an address."""
    for start, contents in reversed(placement.writes):  # cells come after blocks
        if start <= address and address + size <= start + len(contents):
            return contents[address - start : address - start + size]
    raise AssertionError(f"nothing is written at {address:#x}")


def linked(found: Plan, space: Space, islands: dict[Block, int] | None = None) -> Placement:
    return place(found, space, islands or {}, {})
