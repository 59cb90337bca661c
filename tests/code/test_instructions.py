"""Decoding: kinds, fields and targets against the decoder's details and against real linkers' stubs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Build, Function
from elftools.elf.elffile import ELFFile

from patcher.code.instructions import (
    Instruction,
    Kind,
    UndecodableCode,
    decode,
    decode_lite,
    decode_start,
    field_end,
    lite_reference,
    lite_target,
    may_have_immediate,
    padding_length,
    plt_cell,
    references_into,
    wide_displacements,
)


def one(code: str, address: int = 0x1000) -> Instruction:
    (instruction,) = decode(bytes.fromhex(code), address)
    return instruction


@pytest.mark.parametrize(
    ("code", "kind", "target", "field", "width"),
    [
        ("e8 10 00 00 00", Kind.CALL, 0x1015, 1, 4),
        ("67 e8 10 00 00 00", Kind.CALL, 0x1016, 2, 4),  # addr32 call
        ("66 66 48 e8 10 00 00 00", Kind.CALL, 0x1018, 4, 4),  # as in general-dynamic TLS
        ("e9 fb ff ff ff", Kind.JUMP, 0x1000, 1, 4),
        ("eb fe", Kind.JUMP, 0x1000, 1, 1),
        ("f2 eb 10", Kind.JUMP, 0x1013, 2, 1),  # bnd jmp
        ("74 80", Kind.CONDITIONAL_JUMP, 0xF82, 1, 1),
        ("3e 74 10", Kind.CONDITIONAL_JUMP, 0x1013, 2, 1),  # with a branch hint
        ("0f 84 10 00 00 00", Kind.CONDITIONAL_JUMP, 0x1016, 2, 4),
        ("e2 10", Kind.CONDITIONAL_JUMP, 0x1012, 1, 1),  # loop
        ("67 e3 10", Kind.CONDITIONAL_JUMP, 0x1013, 2, 1),  # jecxz
        ("c7 f8 10 00 00 00", Kind.CONDITIONAL_JUMP, 0x1016, 2, 4),  # xbegin
        ("ff d0", Kind.CALL, None, 0, 0),
        ("3e ff e0", Kind.JUMP, None, 0, 0),  # notrack jmp *%rax
        ("c3", Kind.RETURN, None, 0, 0),
        ("f3 c3", Kind.RETURN, None, 0, 0),
        ("66 90", Kind.NOP, None, 0, 0),
        ("0f 1f 44 00 00", Kind.NOP, None, 0, 0),
        ("cc", Kind.TRAP, None, 0, 0),
        ("0f 0b", Kind.TRAP, None, 0, 0),
        ("f3 0f 1e fa", Kind.OTHER, None, 0, 0),
    ],
)
def test_kinds_and_targets(code: str, kind: Kind, target: int | None, field: int, width: int) -> None:
    found = one(code)
    assert (found.kind, found.target, found.field, found.width) == (kind, target, field, width)


@pytest.mark.parametrize(
    ("code", "field", "trailing"),
    [
        ("48 8b 05 10 00 00 00", 3, 0),  # mov
        ("83 05 10 00 00 00 01", 2, 1),  # addl $1
        ("66 c7 05 10 00 00 00 34 12", 3, 2),  # movw
        ("48 c7 05 10 00 00 00 04 03 02 01", 3, 4),  # movq
        ("f6 05 10 00 00 00 01", 2, 1),  # testb
        ("f7 15 10 00 00 00", 2, 0),  # notl
        ("66 0f 70 05 10 00 00 00 1b", 4, 1),  # pshufd
        ("66 0f 3a 0f 05 10 00 00 00 08", 5, 1),  # palignr
        ("c4 e3 7d 39 05 10 00 00 00 01", 5, 1),  # vextracti128
        ("c5 fd 70 05 10 00 00 00 1b", 4, 1),  # vpshufd
        ("62 f3 fd 48 03 05 10 00 00 00 01", 6, 1),  # valignq
        ("ff 15 10 00 00 00", 2, 0),  # call *
    ],
)
def test_rip_relative_operands(code: str, field: int, trailing: int) -> None:
    found, raw = one(code), bytes.fromhex(code)
    assert (found.field, found.width, found.trailing) == (field, 4, trailing)
    assert found.reference == 0x1000 + len(raw) + 0x10
    assert field_end(raw, 0, field) == field_end(b"\x90\x55" + raw, None, field + 2) == trailing


def test_undecodable_bytes_are_named() -> None:
    for decoding in (decode, decode_lite):
        with pytest.raises(UndecodableCode, match=r"0x1001 .offset 0x1 of the code at 0x1000.: found 06 90") as error:
            decoding(bytes.fromhex("90 06 90"), 0x1000)
        assert error.value.offset == 1
    with pytest.raises(UndecodableCode, match="found e8 00"):
        decode(bytes.fromhex("90 e8 00"), 0)


def test_decode_start_stops_where_it_may() -> None:
    code = bytes.fromhex("55 48 89 e5 06")
    assert [i.size for i in decode_start(code, 0, 2)] == [1, 3]
    assert [i.size for i in decode_start(b"\xc3", 0, 5)] == [1]
    with pytest.raises(UndecodableCode):
        decode_start(code, 0, 5)


def test_targets_near_address_zero() -> None:
    (jump,) = decode_lite(bytes.fromhex("eb 03"), 0)
    assert lite_target(jump) == 5


def _rip_relative(functions: tuple[Function, ...]) -> Iterator[tuple[Function, int, Instruction]]:
    for f in functions:
        for listed in decode_lite_or_nothing(f):
            if "[rip" in listed[3]:
                raw = f.code[listed[0] : listed[0] + listed[1]]
                yield f, listed[0], decode(raw, f.address + listed[0])[0]


def decode_lite_or_nothing(f: Function) -> list[tuple[int, int, str, str]]:
    try:
        return decode_lite(f.code, f.address)
    except UndecodableCode:
        return []


def test_field_end_is_exact_on_real_code(unwound_functions: tuple[Function, ...]) -> None:
    seen = fast = with_immediate = 0
    for f, start, i in _rip_relative(unwound_functions):
        field = start + i.field
        listed = (start, i.size, i.mnemonic, i.operands)
        assert field_end(f.code, start, field) == i.trailing, (f, i)
        assert lite_reference(listed, f.address) == i.reference
        assert i.reference == f.address + start + i.size + int.from_bytes(
            f.code[field : field + 4], "little", signed=True
        )
        fast += not may_have_immediate(f.code, field)
        with_immediate += i.trailing > 0
        assert not i.trailing or may_have_immediate(f.code, field)
        if seen % 50 == 0:
            assert field_end(f.code, None, field) == i.trailing
        seen += 1
    assert seen > 10_000
    assert with_immediate > 300
    assert fast > seen * 0.8


def test_details_and_listing_agree_on_targets(unwound_functions: tuple[Function, ...]) -> None:
    seen = 0
    for f in unwound_functions[::40]:
        for i in decode(f.code, f.address):
            listed = (i.offset, i.size, i.mnemonic, i.operands)
            assert (lite_target(listed), lite_reference(listed, f.address)) == (i.target, i.reference)
            if i.width and i.target is not None:
                value = int.from_bytes(i.raw[i.field : i.field + i.width], "little", signed=True)
                assert i.target == f.address + i.end + value
                seen += 1
    assert seen > 1000


def test_references_into_finds_what_a_listing_finds(unwound_functions: tuple[Function, ...]) -> None:
    choose, found = random.Random(1), 0
    for f in unwound_functions[::10]:
        listing = decode_lite_or_nothing(f)
        pointed = [lite_target(i) or lite_reference(i, f.address) for i in listing]
        low = choose.choice([p for p in pointed if p is not None] or [f.address])
        expected = tuple((i, p) for i, p in zip(listing, pointed, strict=True) if p is not None and low <= p < low + 8)
        if listing:
            assert references_into(f.code, f.address, low, low + 8) == expected
        found += len(expected)
    assert found > 300


@pytest.mark.parametrize(
    "code", ["c6 05 10 00 00 00 01", "66 c7 05 10 00 00 00 01 00", "c7 05 10 00 00 00 01 00 00 00", "8b 05 10 00 00 00"]
)
def test_references_into_counts_from_behind_an_immediate(code: str) -> None:
    raw = bytes.fromhex(code)
    for low in range(0x1000, 0x1030):
        found = [pointed for _, pointed in references_into(raw, 0x1000, low, low + 1)]
        assert found == ([low] if low == 0x1010 + len(raw) else [])


def test_targets_of_branches() -> None:
    code = bytes.fromhex(
        "55 e8 01 00 00 00 67 e8 02 00 00 00 0f 84 00 00 00 00 eb 00 48 b8 e8 e8 e8 e8 e8 e8 e8 e8 e9 fb ff ff ff"
    )
    found = {i[0]: target for i in decode_lite(code, 0x1000) if (target := lite_target(i)) is not None}
    assert found == {1: 0x1007, 6: 0x100E, 12: 0x1012, 18: 0x1014, 30: 0x101E}


@pytest.mark.parametrize(
    "code",
    ["", "90", "66 90", "0f 1f 00", "0f 1f 40 00", "0f 1f 44 00 00", "66 0f 1f 44 00 00", "0f 1f 80 00 00 00 00",
     "0f 1f 84 00 00 00 00 00", "66 0f 1f 84 00 00 00 00 00", "66 2e 0f 1f 84 00 00 00 00 00",
     "66 66 2e 0f 1f 84 00 00 00 00 00", "66 66 66 66 66 66 2e 0f 1f 84 00 00 00 00 00", "cc", "cc cc 90"],
)  # fmt: skip
def test_padding(code: str) -> None:
    assert padding_length(bytes.fromhex(code)) == len(bytes.fromhex(code))


@pytest.mark.parametrize(
    "code", ["00", "90 00", "c3", "0f 1f", "0f 1f 44 00", "f3 90", "66", "0f 1e fa", "0f 0b", "48 90"]
)
def test_not_padding(code: str) -> None:
    assert padding_length(bytes.fromhex(code)) < len(bytes.fromhex(code))


def test_padding_length_counts_whole_instructions() -> None:
    assert padding_length(bytes.fromhex("66 90 0f 1f 44 00")) == 2
    assert padding_length(bytes.fromhex("90 cc 55")) == 2


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_padding_of_assemblers(build: Build, tmp_path: Path, compiler: str) -> None:
    source = tmp_path / "padding.s"
    source.write_text("".join(f".skip {n}, 0xc3\n.p2align 4\n" for n in range(1, 16)))
    with build(f"padding-{compiler}.o", [source], "-c", compiler=compiler).open("rb") as file:
        code = ELFFile(file).get_section_by_name(".text").data()
    for n in range(1, 16):
        start = 16 * (n - 1) + n
        assert padding_length(code[start : 16 * n]) == 16 * n - start, code[start : 16 * n].hex(" ")


LINKERS = [
    (),
    ("-fuse-ld=bfd", "-Wl,-z,now"),
    ("-fuse-ld=bfd", "-Wl,-z,lazy"),
    ("-fuse-ld=bfd", "-Wl,-z,ibtplt"),
    ("-fuse-ld=bfd", "-Wl,-z,lazy", "-no-pie"),
    ("-fuse-ld=gold",),
    ("-fuse-ld=gold", "-Wl,-z,now"),
    ("-fuse-ld=lld",),
    ("-fuse-ld=lld", "-Wl,-z,now"),
    ("-fuse-ld=lld", "-Wl,-z,force-ibt"),
    ("-fuse-ld=mold",),
    ("-fuse-ld=mold", "-Wl,-z,now"),
    ("-fuse-ld=mold", "-Wl,-z,lazy"),
]


@pytest.mark.parametrize("flags", LINKERS, ids=" ".join)
def test_plt_stubs_of_every_linker(build: Build, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Calls of an imported function lead to a stub that jumps through the cell its relocation names."""
    source = tmp_path / "imports.c"
    # The address taken in one place makes a .plt.got stub for puts.
    source.write_text(
        "int puts(const char *); int putchar(int); int (*volatile p)(const char *) = puts;\n"
        "int main(void) { puts(\"\"); putchar('a'); return p != puts; }\n"
    )
    program = build(f"imports{LINKERS.index(flags)}", [source], "-O1", *flags)
    with program.open("rb") as file:
        elf = ELFFile(file)
        cells = _imported_cells(elf)
        main = elf.get_section_by_name(".symtab").get_symbol_by_name("main")[0]
        address = main["st_value"]
        code = _at(elf, address, main["st_size"])
        calls = [i for i in decode_lite(code, address) if i[2].endswith("call")]
        targets = [target for call in calls if (target := lite_target(call)) is not None]
        found = [plt_cell(_at(elf, target, 32), target) for target in targets]
    assert [cells[cell] for cell in found if cell is not None] == ["puts", "putchar"]


def _imported_cells(elf: ELFFile) -> dict[int, str]:
    symbols = elf.get_section_by_name(".dynsym")
    sections = list(elf.iter_sections("SHT_RELA"))
    relocations = [r for s in sections if s.name in (".rela.dyn", ".rela.plt") for r in s.iter_relocations()]
    return {r["r_offset"]: symbols.get_symbol(r["r_info_sym"]).name for r in relocations if r["r_info_sym"]}


def _at(elf: ELFFile, address: int, size: int) -> bytes:
    for section in elf.iter_sections("SHT_PROGBITS"):
        if section["sh_addr"] <= address < section["sh_addr"] + section["sh_size"]:
            return section.data()[address - section["sh_addr"] :][:size]
    return b""


def test_plt_forms() -> None:
    assert plt_cell(bytes.fromhex("ff 25 10 00 00 00 68 01 00 00 00 e9 00 00 00 00"), 0x1000) == 0x1016
    assert plt_cell(bytes.fromhex("f3 0f 1e fa f2 ff 25 f0 ff ff ff"), 0x1000) == 0xFFB
    assert plt_cell(bytes.fromhex("f3 0f 1e fa 41 bb 07 00 00 00 ff 25 10 00 00 00"), 0x1000) == 0x1020
    assert plt_cell(bytes.fromhex("f3 0f 1e fa 68 00 00 00 00 f2 e9 00 00 00 00"), 0x1000) is None
    assert plt_cell(bytes.fromhex("ff 15 10 00 00 00"), 0x1000) is None  # a call
    assert plt_cell(bytes.fromhex("ff 25 10 00"), 0x1000) is None


def test_a_displacement_that_is_wider_than_its_number_is_a_linkers() -> None:
    code = bytes.fromhex(
        "8b 88 04 00 00 00"  # mov 4(%rax), %ecx
        "8b 48 08"  # mov 8(%rax), %ecx
        "8b 0d 10 00 00 00"  # mov 16(%rip), %ecx
        "64 48 8b 04 25 20 00 00 00"  # mov %fs:32, %rax
        "42 89 8c 00 e8 ff ff ff"  # mov %ecx, -24(%rax,%r8)
        "48 8b 04 fd 40 00 00 00"  # mov 64(,%rdi,8), %rax
        "81 c0 50 00 00 00"  # add $80, %eax
    )
    assert wide_displacements(code) == {4, -24}
    with pytest.raises(UndecodableCode):
        wide_displacements(code + b"\x06")
