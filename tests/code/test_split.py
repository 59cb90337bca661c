"""Splitting: functions of one section are moved apart with what `hidden_references` found, and run the same."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import Build, Function
from elftools.elf.elffile import ELFFile
from hypothesis import given, settings
from hypothesis import strategies as st

from patcher.code.instructions import UndecodableCode
from patcher.code.split import STUB_SIZE, HiddenReference, Stubs, hidden_references, short_branch_stubs, suspects
from patcher.errors import RelocationOverflow

# --- by hand ---


def test_references_that_leave_their_function() -> None:
    section = bytes.fromhex(
        "e8 0b 00 00 00"  # 0: call 16
        "48 8d 05 04 00 00 00"  # 5: lea 16(%rip)
        "74 02"  # 12: je 16
        "eb f0"  # 14: jmp 0, inside
        "c3"  # 16: ret
        "83 3d e8 ff ff ff 05"  # 17: cmpl $5, 0(%rip)
        "66 c7 05 e8 ff ff ff 34 12"  # 24: movw $0x1234, 9(%rip)
    )
    assert hidden_references(section, [(0, 16), (16, 17)], ()) == (
        HiddenReference(field=1, width=4, target=16, end=0, is_branch=True),
        HiddenReference(field=8, width=4, target=16, end=0, is_branch=False),
        HiddenReference(field=13, width=1, target=16, end=0, is_branch=True),
        HiddenReference(field=19, width=4, target=0, end=1, is_branch=False),
        HiddenReference(field=27, width=4, target=9, end=2, is_branch=False),
    )


def test_relocated_fields_are_not_hidden() -> None:
    call = bytes.fromhex("e8 00 00 00 00 c3")
    assert hidden_references(call, [(0, 5)], [1]) == ()
    assert hidden_references(call, [(0, 5)], [0, 2]) == (HiddenReference(1, 4, 5, 0, True),)


def test_relocated_immediate_does_not_hide_the_operand() -> None:
    section = b"\xc3" * 16 + bytes.fromhex("48 c7 05 f0 ff ff ff 00 00 00 00")  # movq $symbol, 11(%rip)
    assert hidden_references(section, [(16, 11)], [23]) == (HiddenReference(19, 4, 11, 4, False),)
    assert hidden_references(section, [(16, 11)], [19, 23]) == hidden_references(section, [(16, 11)], [19]) == ()


def test_what_points_out_of_the_section_is_left() -> None:
    assert hidden_references(bytes.fromhex("e8 00 01 00 00 c3"), [(0, 6)], ()) == ()
    assert hidden_references(bytes.fromhex("e9 f0 ff ff ff c3"), [(0, 6)], ()) == ()


def test_undecodable_function_is_named_by_section_offset() -> None:
    with pytest.raises(UndecodableCode) as error:
        hidden_references(bytes.fromhex("c3 c3 90 06 c3"), [(0, 1), (2, 3)], ())
    assert error.value.offset == 3


# Instructions with a relative field, `.` for a byte of it, among ones without.
_PIECES = (
    "e8 . . . .",  # call
    "e9 . . . .",  # jmp
    "eb .",  # jmp
    "74 .",  # je
    "2e 7f .",  # jg, with a prefix
    "e2 .",  # loop
    "67 e3 .",  # jecxz
    "0f 84 . . . .",  # je
    "c7 f8 . . . .",  # xbegin
    "48 8d 05 . . . .",  # lea
    "83 3d . . . . 05",  # cmpl with an immediate of one byte
    "66 c7 05 . . . . 34 12",  # movw of two
    "48 c7 05 . . . . e8 eb 74 00",  # movq of four
    "66 0f 3a 0f 0d . . . . 08",  # palignr
    "c5 f8 10 15 . . . .",  # vmovups
    "62 f1 7c 48 10 1d . . . .",  # vmovups, EVEX
    "b8 0f 00 00 00",  # mov $15, before what starts with 80-8f
    "81 c0 c7 00 00 00",  # add $199
    "f8",  # clc
    "90",  # nop
)


@settings(deadline=None)
@given(st.data())
def test_no_function_with_a_hidden_reference_goes_unsuspected(data: st.DataObject) -> None:
    near = st.integers(-70, 70).map(lambda n: n & 0xFFFFFFFF)
    functions, fields, section = [], [], b""
    for _ in range(data.draw(st.integers(1, 6))):
        start = len(section)
        for piece in data.draw(st.lists(st.sampled_from(_PIECES), min_size=1, max_size=5)):
            field, width = len(section) + piece.replace(" ", "").find(".") // 2, piece.count(".")
            value = data.draw(near).to_bytes(4, "little")[:width]
            section += bytes.fromhex(piece.replace(".", "{:02x}").format(*value))
            if width and data.draw(st.booleans()):
                fields.append(field)
        functions.append((start, len(section) - start))
    suspected = suspects(section, functions, np.array(fields, np.int64))
    for function in functions:
        until = suspected.get(function[0])
        found = () if until is None else hidden_references(section, [function], fields, until)
        assert found == hidden_references(section, [function], fields)


def test_compiled_functions_are_suspected_with_reason(libc_functions: tuple[Function, ...]) -> None:
    functions, section = [], b""
    for f in libc_functions[:400]:
        functions.append((len(section), len(f.code)))
        section += f.code
    suspected = suspects(section, functions, np.array([], np.int64))
    hidden = [start for start, size in functions if hidden_references(section, [(start, size)], ())]
    assert set(hidden) <= set(suspected)
    assert 100 < len(hidden) <= len(suspected) < len(functions) * 9 / 10, "not merely all are suspected"


def _short(field: int, target: int) -> HiddenReference:
    return HiddenReference(field, 1, target, 0, True)


def test_stubs_lie_in_the_direction_of_the_branch() -> None:
    references = [_short(105, 150), _short(110, 90), _short(118, 150), HiddenReference(112, 4, 150, 0, True)]
    assert short_branch_stubs((100, 20), references) == Stubs(
        prefix=(90,), suffix=(150,), displacements=((105, 14), (110, 95 - 111), (118, 1))
    )
    assert short_branch_stubs((120, 20), references) == Stubs((), (), ())


def test_the_farthest_branch_gets_the_nearest_stub() -> None:
    far, near = _short(2, 129), _short(90, 125)
    stubs = short_branch_stubs((0, 124), [near, far])
    assert stubs.suffix == (129, 125)
    assert dict(stubs.displacements) == {2: 121, 90: 124 + STUB_SIZE - 91}
    far, near = _short(1120, 999), _short(1010, 998)
    stubs = short_branch_stubs((1000, 130), [near, far])
    assert stubs.prefix == (998, 999)
    assert dict(stubs.displacements) == {1120: 995 - 1121, 1010: 990 - 1011}


def test_too_many_short_branches_are_refused() -> None:
    with pytest.raises(RelocationOverflow, match="section offset 0x4 misses its jump by 1 bytes") as error:
        short_branch_stubs((0, 128), [_short(2, 129), _short(4, 130)])
    assert "-ffunction-sections" in error.value.hint


# --- really moved and run ---


@dataclass(frozen=True, slots=True)
class Object:
    """What the test needs of an object: its text, functions, and relocations as (offset, type, symbol, addend)."""

    text: bytes
    functions: tuple[tuple[str, int, int], ...]
    relocations: tuple[tuple[int, str, str, int], ...]


RELOCATION_TYPES = {1: "R_X86_64_64", 2: "R_X86_64_PC32", 4: "R_X86_64_PLT32", 9: "R_X86_64_GOTPCREL"}
RELOCATION_TYPES |= {41: "R_X86_64_GOTPCRELX", 42: "R_X86_64_REX_GOTPCRELX", 11: "R_X86_64_32S"}


def _read(path: Path) -> Object:
    with path.open("rb") as file:
        elf = ELFFile(file)
        index = elf.get_section_index(".text")
        symbols = list(elf.get_section_by_name(".symtab").iter_symbols())
        functions = {
            s["st_value"]: (s.name, s["st_value"], s["st_size"])
            for s in symbols
            if s["st_info"]["type"] == "STT_FUNC" and s["st_shndx"] == index
        }
        relocations = []
        for r in elf.get_section_by_name(".rela.text").iter_relocations():
            s = symbols[r["r_info_sym"]]
            name = elf.get_section(s["st_shndx"]).name if s["st_info"]["type"] == "STT_SECTION" else s.name
            relocations.append((r["r_offset"], RELOCATION_TYPES[r["r_info_type"]], name, r["r_addend"]))
        return Object(
            elf.get_section(index).data(), tuple(sorted(functions.values(), key=lambda f: f[1])), tuple(relocations)
        )


def _split_source(unit: Object, references: tuple[HiddenReference, ...], *, widen: bool = True) -> str:
    """Write the functions as assembly of raw bytes, far apart and in reverse, every reference a relocation."""
    names = {offset: f"moved_{offset}" for _, offset, _ in unit.functions}
    lines = [".text"]
    for name, offset, size in reversed(unit.functions):
        stubs = short_branch_stubs((offset, size), references) if widen else Stubs((), (), ())
        code = bytearray(unit.text[offset : offset + size])
        for field, displacement in stubs.displacements:
            code[field - offset] = displacement & 0xFF
        lines += [".p2align 4", ".skip 300, 0xcc"]
        lines += [f".byte 0xe9; .long {names[target]} - . - 4" for target in stubs.prefix]
        lines += [f".globl {name}" if name == "run" else "", f"{name}:", f"{names[offset]}:"]
        lines += [f".byte {', '.join(map(str, code))}"]
        lines += [f".byte 0xe9; .long {names[target]} - . - 4" for target in stubs.suffix]
        lines += [
            f".reloc {names[offset]} + {field - offset}, {kind}, {symbol} + {addend}"
            for field, kind, symbol, addend in unit.relocations
            if offset <= field < offset + size
        ]
        lines += [
            f".reloc {names[offset]} + {r.field - offset}, R_X86_64_PC32, {names[r.target]} - {4 + r.end}"
            for r in references
            if r.width == 4 and offset <= r.field < offset + size
        ]
    return "\n".join([*lines, '.section .note.GNU-stack, "", @progbits', ""])


def _run(program: Path) -> str:
    return subprocess.run([program], check=True, capture_output=True, text=True, timeout=20).stdout


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("level", ["-O0", "-O1", "-O2", "-Os"])
def test_moved_functions_run_the_same(build: Build, tmp_path: Path, compiler: str, level: str) -> None:
    stem = f"split{compiler}{level}"
    compiled = build(f"{stem}.o", ["one_section.c"], "-c", "-fpie", level, compiler=compiler)
    expected = _run(build(stem, ["patched_run.c", compiled]))
    unit = _read(compiled)
    fields = frozenset(r[0] for r in unit.relocations)
    references = hidden_references(unit.text, [f[1:] for f in unit.functions], fields)
    source = tmp_path / "moved.s"
    source.write_text(_split_source(unit, references))
    # The object stays for its variables only: its functions become traps, so that none of them can help out.
    data = tmp_path / "data.o"
    text = tmp_path / "traps"
    text.write_bytes(b"\xcc" * len(unit.text))
    update = ["objcopy", "--redefine-sym", "run=old_run", "--update-section", f".text={text}", str(compiled), str(data)]
    subprocess.run(update, check=True, capture_output=True)
    assert _run(build(f"{stem}-moved", ["patched_run.c", source, data])) == expected
    assert len(references) > 10
    assert any(not r.is_branch for r in references)
    if level in ("-O2", "-Os"):
        assert any(r.width == 1 for r in references), "nothing short to widen"


def test_without_its_stubs_a_moved_function_goes_astray(build: Build, tmp_path: Path) -> None:
    compiled = build("astray.o", ["one_section.c"], "-c", "-fpie", "-O2")
    unit = _read(compiled)
    references = hidden_references(unit.text, [f[1:] for f in unit.functions], [r[0] for r in unit.relocations])
    source = tmp_path / "moved.s"
    source.write_text(_split_source(unit, references, widen=False))
    data = tmp_path / "data.o"
    subprocess.run(["objcopy", "--redefine-sym", "run=old_run", str(compiled), str(data)], check=True)
    done = subprocess.run([build("astray", ["patched_run.c", source, data])], capture_output=True, timeout=20)
    assert done.returncode == -5, "the short branch must have hit the int3 between the functions"


def test_code_that_has_no_bytes_is_not_looked_into() -> None:
    none = np.empty(0, np.int64)
    assert suspects(b"", [(0, 16), (16, 16)], none) == {}
    assert suspects(b"\x90\xe8\x20\0\0\0", [(0, 6), (6, 64)], none) == {}
