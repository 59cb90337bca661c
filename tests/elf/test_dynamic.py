"""The dynamic linker's tables, as another reader (lief) understands them, from files with and without sections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lief
import numpy as np
import pytest
from living import compile_text, run

from elf.samples import TEXT
from patcher.elf import tables as t
from patcher.elf.dynamic import Cell, Cells, Exports, _unpacked
from patcher.elf.module import Module, read_module
from patcher.elf.relocations import R
from patcher.errors import ObjectError

VERSIONED = (
    TEXT
    + "__thread int theirs;\nint old(void) { return 1; }\nint new(void) { return 2; }\n"
    + '__asm__(".symver old, call@V1");\n__asm__(".symver new, call@@V2");\n'
)
SCRIPT = "V1 { global: call; };\nV2 { global: call; work; exported; factor; } V1;\n"
PACKED = {"bfd": "-Wl,-z,pack-relative-relocs", "lld": "-Wl,--pack-dyn-relocs=relr"}
INSTALLED = ("libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1")


def build(folder: Path, *options: str, linker: str = "bfd") -> Path:
    (folder / "versions").write_text(SCRIPT)
    unit = compile_text(VERSIONED, folder / "unit.o", "-O1", "-fPIC")
    script = f"-Wl,--version-script={folder / 'versions'}"
    run("gcc", f"-fuse-ld={linker}", "-shared", *options, script, "-o", folder / "lib.so", unit)
    return folder / "lib.so"


def read(path: Path) -> Module:
    return read_module(path.name, path)


def theirs(path: Path) -> Any:
    config = lief.ELF.ParserConfig()
    config.parse_symtab_symbols = False
    return lief.ELF.parse(str(path), config)


def check(path: Path) -> Module:
    """Compare every cell and every export with what lief says."""
    module, binary = read(path), theirs(path)
    cells = {}
    for relocation in (*binary.dynamic_relocations, *binary.pltgot_relocations):
        name = str(relocation.symbol.name) if relocation.has_symbol else ""
        cells[relocation.address] = Cell(int(relocation.type) & 0xFF, name, relocation.addend)
    assert dict(module.cells) == cells
    for name in {cell.name for cell in cells.values() if cell.name}:
        assert module.cells_named(name) == sorted(a for a, cell in cells.items() if cell.name == name)
    expected: dict[str, list[tuple[object, ...]]] = {}
    for symbol in binary.dynamic_symbols:
        if symbol.name:
            expected.setdefault(str(symbol.name), []).append(described(symbol))
    assert list(module.exports) == list(expected)
    for name, symbols in expected.items():
        found = module.exports[name]
        assert [(s.value, s.size, s.type, s.binding, s.version, s.default, s.defined) for s in found] == symbols
        assert all(name in module.exported_at(s.value) for s in found if s.value or s.defined)
    assert module.needed == tuple(binary.libraries)
    return module


def described(symbol: Any) -> tuple[object, ...]:
    version = symbol.symbol_version if symbol.has_version else None
    name = version.symbol_version_auxiliary.name if version is not None and version.has_auxiliary_version else ""
    default = version is None or not version.value & 0x8000
    return (symbol.value, symbol.size, symbol.type.value, symbol.binding.value, name, default, symbol.shndx != 0)


@pytest.mark.parametrize("linker", ["bfd", "gold", "lld", "mold"])
@pytest.mark.parametrize("style", ["sysv", "gnu", "both"])
def test_every_linker_and_hash_table(tmp_path: Path, linker: str, style: str) -> None:
    path = build(tmp_path, f"-Wl,--hash-style={style}", linker=linker)
    module = check(path)
    assert {(s.version, s.default) for s in module.exports["call"]} == {("V1", False), ("V2", True)}
    data = bytearray(path.read_bytes())
    header = np.frombuffer(data, t.EHDR, 1)
    header["shoff"], header["shnum"], header["shstrndx"] = 0, 0, 0
    path.write_bytes(data)
    bare = read(path)
    assert bare.exports == module.exports, "the hash table says how many symbols there are"
    assert bare.cells == module.cells


@pytest.mark.parametrize("linker", ["bfd", "lld"])
def test_packed_relocations(tmp_path: Path, linker: str) -> None:
    module = check(build(tmp_path, PACKED[linker], linker=linker))
    plain = check(build(tmp_path, linker=linker))
    relative = module.cells.of_type(R.RELATIVE)
    assert len(relative) == len(plain.cells.of_type(R.RELATIVE)) > 0


@pytest.mark.parametrize("name", INSTALLED)
def test_installed_libraries(name: str) -> None:
    path = Path(run("gcc", f"-print-file-name={name}").strip())
    if not path.is_absolute():
        pytest.skip(f"{name} is not installed")
    assert check(path.resolve()).exports


def test_bitmaps_of_packed_relocations() -> None:
    words = np.array([0x1000, 0b1011, (1 << 63) | 1, 0x8000, 1], "<u8")
    expected = [0x1000, 0x1008, 0x1018, 0x1008 + 8 * 63 + 8 * 62, 0x8000]
    assert _unpacked(words).tolist() == expected


def test_the_last_relocation_of_a_cell_counts() -> None:
    relocations = np.zeros(4, t.RELA)
    relocations["offset"] = [0x30, 0x10, 0x30, 0x20]
    relocations["addend"] = [1, 2, 3, 4]
    cells = Cells(relocations, Exports.empty())
    assert {address: cell.addend for address, cell in cells.items()} == {0x10: 2, 0x20: 4, 0x30: 3}
    assert cells.get(0x28) is cells.get(-8) is cells.get(1 << 64) is None
    assert len(cells) == 3


def test_a_cell_of_a_symbol_that_is_not_there_has_no_name() -> None:
    relocations = np.zeros(1, t.RELA)
    relocations["symbol"] = 9
    assert Cells(relocations, Exports.empty())[0] == Cell(0, "", 0)


def test_a_dynamic_name_may_have_an_at_sign() -> None:
    table = np.zeros(3, t.SYM)
    table["name"], table["section"] = [1, 9, 2], 1
    exports = Exports(table, b"\0call@V1\0call\0", np.zeros(0, "<u2"), {}, "")
    assert exports.entries("call@V1") == [0]
    assert exports.entries("call") == [1]
    assert exports.entries("all") == []
    assert "" not in exports
    assert list(exports) == ["call@V1", "call", "all@V1"]


def test_a_damaged_dynamic_section_is_refused_or_read_never_more(tmp_path: Path) -> None:
    path = build(tmp_path)
    data = bytearray(path.read_bytes())
    raw = t.read_raw("lib.so", bytes(data))
    header = next(p for p in raw.program_headers if int(p["type"]) == t.PT_DYNAMIC)
    refused = 0
    for offset in range(int(header["offset"]), int(header["offset"]) + int(header["file_size"])):
        original = data[offset]
        for value in (original ^ 1, original ^ 0x80, 0xFF):
            data[offset] = value
            path.write_bytes(data)
            try:
                module = read(path)
                assert len(module.exports) >= 0
                assert module.cells_named("puts") is not None
            except ObjectError:
                refused += 1
        data[offset] = original
    assert refused > 0


def test_a_file_that_becomes_shorter_is_refused(tmp_path: Path) -> None:
    path = build(tmp_path)
    with path.open("rb") as file:
        raw = t.read_raw("lib.so", t.OpenFile("lib.so", file.fileno()))
        symbols = raw.section_headers["type"].tolist().index(t.SHT_SYMTAB)
        assert len(raw.table(symbols, t.SYM))
        with path.open("r+b") as other:
            other.truncate(100)
        with pytest.raises(ObjectError, match="became shorter"):
            raw.table(symbols, t.SYM)


def test_a_folder_is_no_module(tmp_path: Path) -> None:
    with pytest.raises(ObjectError, match="is a directory"):
        read(tmp_path)
