"""Relocatable objects: what is read, and the sentence for each thing that is none."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from living import compile_text, run

from elf.samples import FLAGS, TEXT, sample
from patcher.elf import SymbolType, read_object, read_objects
from patcher.elf import tables as t
from patcher.elf.object import parse_object
from patcher.errors import ObjectError


@pytest.fixture(scope="module", params=FLAGS)
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample(tmp_path_factory.mktemp("objects"), request.param)


def test_sections_symbols_and_relocations_are_those_of_readelf(good: Path) -> None:
    source = read_object(good)
    named = {s.name: s for s in source.symbols if s.type in (SymbolType.FUNC, SymbolType.OBJECT)}
    listed = 0
    for line in run("readelf", "-sW", good).splitlines():
        fields = line.split()
        if len(fields) == 8 and fields[3] in ("FUNC", "OBJECT"):
            symbol = named[fields[7]]
            assert (symbol.value, symbol.size) == (int(fields[1], 16), int(fields[2], 0))
            assert symbol.section == int(fields[6])
            assert symbol.local == (fields[4] == "LOCAL")
            listed += 1
    assert listed == len(named) >= 7
    loaded = {s.name for s in source.sections.values()}
    assert not any(name.startswith(".debug") for name in loaded)
    counts = {}
    for line in run("readelf", "-rW", good).splitlines():
        if line.startswith("Relocation section"):
            counts[line.split("'")[1].removeprefix(".rela")] = int(line.split("contains ")[1].split()[0])
    for index, section in source.sections.items():
        assert len(source.relocations(index)) == counts.get(section.name, 0), section.name
    assert source.file_symbol == "unit.c"


def test_thread_local_data_and_commons_are_told_apart(tmp_path: Path) -> None:
    text = "int common;\nstatic __thread int mine = 3;\nint take(void) { return mine++ + common; }\n"
    source = read_object(compile_text(text, tmp_path / "unit.o", "-O1", "-fcommon"))
    symbols = {s.name: s for s in source.symbols}
    assert symbols["common"].common
    assert symbols["common"].value == 4  # its alignment
    assert source.sections[symbols["mine"].section].thread_local


def test_more_sections_than_a_header_can_count(tmp_path: Path) -> None:
    count = 70_000
    assembly = tmp_path / "many.s"
    lines = (f'.section .text.f{i},"ax",@progbits\nf{i}: ret\n' for i in range(count))
    assembly.write_text("".join(lines) + ".globl last\n.set last, f69999\n.data\n.quad f69998\n.comm shared, 8, 8\n")
    run("as", assembly, "-o", tmp_path / "many.o")
    source = read_object(tmp_path / "many.o")
    symbols = {s.name: s for s in source.symbols}
    for i in (0, 65_279, 65_300, 65_521, 65_522, 69_999):  # 65,521 is SHN_ABS, and here a section's number too
        symbol = symbols[f"f{i}"]
        assert not symbol.absolute
        assert not symbol.common
        assert source.sections[symbol.section].name == f".text.f{i}"
    assert symbols["last"].section == symbols["f69999"].section
    assert symbols["shared"].common
    data = next(index for index, s in source.sections.items() if s.name == ".data")
    (relocation,) = source.relocations(data)
    assert source.sections[source.symbols[relocation.symbol].section].name == ".text.f69998"


# --- what is no object ---


def refusal(path: Path) -> ObjectError:
    with pytest.raises(ObjectError) as caught:
        read_objects(path)
    assert caught.value.message.startswith(str(path))
    assert caught.value.hint
    return caught.value


def make_executable(folder: Path) -> Path:
    run("gcc", "-o", folder / "program", compile_text("int main(void) { return 0; }\n", folder / "main.o"))
    return folder / "program"


def make_library(folder: Path) -> Path:
    unit = compile_text("int f(void) { return 0; }\n", folder / "f.o", "-fPIC")
    run("gcc", "-shared", "-o", folder / "lib.so", unit)
    return folder / "lib.so"


def make_file(contents: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "file.o").write_bytes(contents)
        return folder / "file.o"

    return write


def make_lto(compiler: str) -> Callable[[Path], Path]:
    return lambda folder: compile_text(TEXT, folder / "lto.o", "-O2", "-flto", compiler=compiler)


def make_archive(*members: str, options: str = "rc") -> Callable[[Path], Path]:
    def archive(folder: Path) -> Path:
        for member in members:
            (folder / member).write_text("no object\n")
        run("ar", options, folder / "lib.a", *(folder / m for m in members))
        return folder / "lib.a"

    return archive


def make_directory(folder: Path) -> Path:
    (folder / "file.o").mkdir()
    return folder / "file.o"


def make_32_bit(folder: Path) -> Path:
    (folder / "f.s").write_text("f: ret\n")
    run("as", "--32", folder / "f.s", "-o", folder / "f.o")
    return folder / "f.o"


def make_other_machine(folder: Path) -> Path:
    path = sample(folder, "gcc")
    data = bytearray(path.read_bytes())
    data[18:20] = struct.pack("<H", 183)
    path.write_bytes(data)
    return path


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "executable": (make_executable, "not a relocatable object"),
    "library": (make_library, "a shared library or executable, not a relocatable object"),
    "empty": (make_file(b""), "the file is empty"),
    "text": (make_file(b"int main(void) { return 0; }\n"), "not an ELF file"),
    "short": (make_file(b"\x7fELF\2\1\1"), "cut off within the ELF header"),
    "directory": (make_directory, "is a directory"),
    "missing": (lambda folder: folder / "nothing.o", "no such file"),
    "32-bit": (make_32_bit, "not a 64-bit"),
    "other machine": (make_other_machine, "built for aarch64, not for x86-64"),
    "gcc -flto": (make_lto("gcc"), "LTO bytecode without machine code"),
    "clang -flto": (make_lto("clang"), "LLVM bytecode"),
    "archive of text": (make_archive("readme.txt"), "an archive without objects"),
    "empty archive": (make_archive(), "an archive without objects"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_object_is_refused_in_a_sentence(tmp_path: Path, what: str) -> None:
    make, sentence = REFUSED[what]
    assert sentence in refusal(make(tmp_path)).message


def test_fat_lto_is_an_object_like_any_other(tmp_path: Path) -> None:
    for text in (TEXT, "int only_data[4];\n"):
        source = read_object(compile_text(text, tmp_path / "fat.o", "-O2", "-flto", "-ffat-lto-objects"))
        assert any(s.name in ("work", "only_data") for s in source.symbols)


# --- archives ---


def test_members_of_archives_are_read_in_order(tmp_path: Path) -> None:
    long_name = "a_member_with_a_name_that_does_not_fit_into_the_header.o"
    paths = [
        compile_text(f"int f{i}(void) {{ return {i}; }}\n", tmp_path / n) for i, n in enumerate(["a.o", long_name])
    ]
    for options in ("rc", "rcS", "rcT"):  # with the linker's index, without, and thin
        archive = tmp_path / f"lib{options}.a"
        run("ar", options, archive, *paths, cwd=tmp_path)
        members = read_objects(archive)
        assert [m.name.startswith(f"{archive}(") for m in members] == [True, True]
        assert [Path(m.name[:-1]).name.partition("(")[2] or Path(m.name[:-1]).name for m in members] == [
            "a.o",
            long_name,
        ]
        assert [next(s.name for s in m.symbols if s.type == SymbolType.FUNC) for m in members] == ["f0", "f1"]


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    unit = compile_text("int f(void) { return 3; }\n", tmp_path / "f.o")
    run("ar", "rc", tmp_path / "lib.a", unit)
    data = (tmp_path / "lib.a").read_bytes()
    for size in range(9, len(data) - 1, 16):
        (tmp_path / "cut.a").write_bytes(data[:size])
        refusal(tmp_path / "cut.a")
    run("ar", "rcT", tmp_path / "thin.a", "f.o", cwd=tmp_path)
    unit.unlink()
    assert "f.o of this thin archive cannot be read" in refusal(tmp_path / "thin.a").message


# --- damage (tests/fuzz does much more of it) ---


def test_a_truncated_object_is_refused(good: Path) -> None:
    data = good.read_bytes()
    for size in range(0, len(data) - 1, 64):
        with pytest.raises(ObjectError):
            parse_object("cut", data[:size])


def test_relocations_without_addends_are_refused(tmp_path: Path) -> None:
    unit = sample(tmp_path, "gcc")
    data = bytearray(unit.read_bytes())
    table, count = struct.unpack_from("<Q", data, 40)[0], struct.unpack_from("<H", data, 60)[0]
    for i in range(count):
        if struct.unpack_from("<I", data, table + 64 * i + 4)[0] == 4:
            struct.pack_into("<I", data, table + 64 * i + 4, 9)
    source = parse_object("rel.o", bytes(data))
    with pytest.raises(ObjectError, match="SHT_REL"):
        source.relocations(next(iter(source.sections)))


@given(st.binary(max_size=40), st.lists(st.integers(0, 50), max_size=8))
def test_strings_are_the_same_one_by_one_and_together(strings: bytes, offsets: list[int]) -> None:
    together = t.strings_at(strings, np.array(offsets, np.uint32))
    assert together == [t.string_at(strings, offset) for offset in offsets]
