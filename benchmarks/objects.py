"""Relocatable objects of any size, written directly: an assembler takes twenty seconds for the largest.

Each function calls other functions and adds to variables, at random but the same in every run. In an object with
one `.text` every tenth function also calls its predecessor as an assembler leaves calls of static functions: without
a relocation.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from patcher.elf import tables as t
from patcher.elf.relocations import R

_CALL, _ADD = b"\xe8\0\0\0\0", b"\x01\x05\0\0\0\0"  # call rel32; add %eax, disp32(%rip)
_HIDDEN_CALL = 1  # offset of the call without a relocation


def unit(functions: int, references: int, *, sections: bool) -> bytes:
    """Return an object of so many functions, each with so many relocations, and as many variables.

    `sections`: every function and every variable has a section of its own.
    """
    code, offsets, kinds = _function(references)
    chance = np.random.default_rng(1)
    rows = np.zeros((functions, references), t.RELA)
    rows["offset"], rows["type"], rows["addend"] = offsets, kinds, -4
    chosen = chance.integers(0, functions, (functions, references))
    rows["symbol"] = 2 + chosen + np.where(np.array(kinds) == R.PLT32, 0, functions)  # null, FILE, functions, variables
    if not sections:
        rows["offset"] += (np.arange(functions, dtype=np.uint64) * np.uint64(len(code)))[:, None]
    parts = _separate(functions, code, rows) if sections else _together(functions, code, rows)
    return _file(parts, *_symbols(functions, len(code), sections))


def _function(references: int) -> tuple[bytes, list[int], list[int]]:
    """Return the code of a function, and the offsets and types of its relocations."""
    code, offsets, kinds = b"\x53\x0f\x1f\x44\0\0", [], []  # push %rbx; a nop, where the hidden call goes
    for i in range(references):
        code += _ADD if i % 2 else _CALL
        offsets.append(len(code) - 4)
        kinds.append(R.PC32 if i % 2 else R.PLT32)
    size = max(-(-(len(code) + 9) // 16) * 16, 96)
    code += b"\x48\x8d\x40\x08" * ((size - len(code) - 9) // 4)  # lea 8(%rax), %rax
    code += b"\x74\x05\x83\xf8\x05\x75\xf9\x5b\xc3"  # je, cmp, jne, pop %rbx, ret
    return code.ljust(size, b"\x90"), offsets, kinds


Part = tuple[str, int, int, int, bytes]  # name, type, flags, which section it is about, contents


def _together(functions: int, code: bytes, rows: Any) -> list[Part]:
    text = np.tile(np.frombuffer(code, np.uint8), (functions, 1))
    back = (-len(code) - _HIDDEN_CALL - 5).to_bytes(4, "little", signed=True)
    text[10::10, _HIDDEN_CALL : _HIDDEN_CALL + 5] = np.frombuffer(b"\xe8" + back, np.uint8)
    return [
        (".text", t.SHT_PROGBITS, t.SHF_ALLOC | t.SHF_EXECINSTR, 0, text.tobytes()),
        (".data", t.SHT_PROGBITS, t.SHF_ALLOC | t.SHF_WRITE, 0, bytes(range(1, 9)) * functions),
        (".rela.text", t.SHT_RELA, 0, 1, rows.tobytes()),
    ]


def _separate(functions: int, code: bytes, rows: Any) -> list[Part]:
    text = t.SHF_ALLOC | t.SHF_EXECINSTR
    parts = [(f".text.f{i}", t.SHT_PROGBITS, text, 0, code) for i in range(functions)]
    data = t.SHF_ALLOC | t.SHF_WRITE
    parts += [(f".data.g{i}", t.SHT_PROGBITS, data, 0, bytes(range(1, 9))) for i in range(functions)]
    parts += [(f".rela.text.f{i}", t.SHT_RELA, 0, i + 1, rows[i].tobytes()) for i in range(functions)]
    return parts


def _symbols(functions: int, size: int, sections: bool) -> tuple[Any, Any, bytes]:
    """Return the symbol table, the sections of the symbols, and the names."""
    names = ["", "unit.c", *(f"f{i}" for i in range(functions)), *(f"g{i}" for i in range(functions))]
    table = np.zeros(len(names), t.SYM)
    number = np.arange(functions)
    code, data = slice(2, 2 + functions), slice(2 + functions, None)
    table["name"], strings = _strings(names)
    table["info"][1], table["section"][1] = 4, t.SHN_ABS
    table["info"][code], table["size"][code] = 0x12, size  # GLOBAL FUNC
    table["info"][data], table["size"][data] = 0x11, 8  # GLOBAL OBJECT
    section = np.zeros(len(names), "<u4")
    section[code], section[data] = (1 + number, 1 + functions + number) if sections else (1, 2)
    if not sections:
        table["value"][code], table["value"][data] = number * size, number * 8
    table["section"][2:] = np.where(section < t.SHN_LORESERVE, section, t.SHN_XINDEX)[2:]
    return table, section, strings


def _strings(names: Sequence[str]) -> tuple[list[int], bytes]:
    """Return where each name is in a string table, and the table."""
    encoded = [name.encode() + b"\0" for name in names]
    return [*accumulate(map(len, encoded), initial=0)][:-1], b"".join(encoded)


def _file(parts: list[Part], symbols: Any, sections: Any, strings: bytes) -> bytes:
    table = len(parts) + 1
    parts = [
        ("", t.SHT_NULL, 0, 0, b""),
        *parts,
        (".symtab", t.SHT_SYMTAB, 0, 2, symbols.tobytes()),
        (".symtab_shndx", t.SHT_SYMTAB_SHNDX, 0, 0, sections.tobytes()),
        (".strtab", t.SHT_STRTAB, 0, 0, strings),
        (".shstrtab", t.SHT_STRTAB, 0, 0, b""),
    ]
    names, name_table = _strings([name for name, *_ in parts])
    parts[-1] = (*parts[-1][:4], name_table)
    contents = [data + bytes(-len(data) % 8) for *_, data in parts]
    headers = np.zeros(len(parts), t.SHDR)
    headers["name"], headers["alignment"] = names, 8
    for column, i in (("type", 1), ("flags", 2), ("info", 3)):
        headers[column] = [part[i] for part in parts]
    headers["size"] = [len(part[4]) for part in parts]
    headers["offset"] = [*accumulate(map(len, contents), initial=t.EHDR.itemsize)][:-1]
    for kind, size in ((t.SHT_RELA, 24), (t.SHT_SYMTAB, 24), (t.SHT_SYMTAB_SHNDX, 4)):
        headers["entry_size"][headers["type"] == kind] = size
    headers["link"] = np.where(headers["type"] == t.SHT_RELA, table, 0)
    headers["link"][table : table + 2] = table + 2, table
    return b"".join([_header(headers, len(parts)), *contents, headers.tobytes()])


def _header(headers: Any, count: int) -> bytes:
    """Return the ELF header; counts that it has no room for go into the first section header."""
    header = np.zeros(1, t.EHDR)
    header["ident"] = np.void(b"\x7fELF\x02\x01\x01" + bytes(9))
    header["type"], header["machine"], header["version"] = t.ET_REL, t.EM_X86_64, 1
    header["ehsize"], header["shentsize"] = t.EHDR.itemsize, t.SHDR.itemsize
    header["shoff"] = int(headers["offset"][-1]) + (int(headers["size"][-1]) + 7) // 8 * 8
    small = count < t.SHN_LORESERVE
    header["shnum"], header["shstrndx"] = (count, count - 1) if small else (0, t.SHN_XINDEX)
    if not small:
        headers["size"][0], headers["link"][0] = count, count - 1
    return header.tobytes()
