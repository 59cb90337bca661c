"""Every row of the relocation table at its limits and one beyond, through plan and place; and what has no row."""

from __future__ import annotations

import re
import struct

import pytest

from link.linking import FIELD, linked, planned, relocating, spaces, template, written
from patcher.code.descriptor import FIND_THROUGH_DESCRIPTOR
from patcher.errors import RelocationOverflow, UnsupportedRelocation
from patcher.link.place import Placement
from patcher.link.plan import Bound
from patcher.link.relocations import RULES, Operands, R, Rule, Sign, type_name

# The psABI's table 4.9 (and 4.10 for thread-local storage), written down once more: formula, bytes, signedness.
PSABI = {
    R.A64: ("S + A", 8, Sign.EITHER),
    R.A32: ("S + A", 4, Sign.UNSIGNED),
    R.A32S: ("S + A", 4, Sign.SIGNED),
    R.A16: ("S + A", 2, Sign.EITHER),
    R.A8: ("S + A", 1, Sign.EITHER),
    R.PC64: ("S + A - P", 8, Sign.EITHER),
    R.PC32: ("S + A - P", 4, Sign.SIGNED),
    R.PC16: ("S + A - P", 2, Sign.SIGNED),
    R.PC8: ("S + A - P", 1, Sign.SIGNED),
    R.GOT32: ("G + A", 4, Sign.SIGNED),
    R.GOT64: ("G + A", 8, Sign.EITHER),
    R.GOTPC32: ("GOT + A - P", 4, Sign.SIGNED),
    R.GOTPC64: ("GOT + A - P", 8, Sign.EITHER),
    R.GOTPLT64: ("G + A", 8, Sign.EITHER),
    R.PLT32: ("L + A - P", 4, Sign.SIGNED),
    R.PLTOFF64: ("L - GOT + A", 8, Sign.EITHER),
    R.GOTOFF64: ("S + A - GOT", 8, Sign.EITHER),
    R.GOTPCREL: ("G + GOT + A - P", 4, Sign.SIGNED),
    R.GOTPCREL64: ("G + GOT + A - P", 8, Sign.EITHER),
    R.GOTPCRELX: ("G + GOT + A - P", 4, Sign.SIGNED),
    R.REX_GOTPCRELX: ("G + GOT + A - P", 4, Sign.SIGNED),
    R.SIZE32: ("Z + A", 4, Sign.UNSIGNED),
    R.SIZE64: ("Z + A", 8, Sign.EITHER),
    R.TLSGD: ("G + GOT + A - P", 4, Sign.SIGNED),
    R.TLSLD: ("G + GOT + A - P", 4, Sign.SIGNED),
    R.DTPOFF32: ("D + A", 4, Sign.SIGNED),
    R.DTPOFF64: ("D + A", 8, Sign.EITHER),
    R.GOTTPOFF: ("G + GOT + A - P", 4, Sign.SIGNED),
    R.TPOFF32: ("TP + A", 4, Sign.SIGNED),
    R.TPOFF64: ("TP + A", 8, Sign.EITHER),
    R.GOTPC32_TLSDESC: ("G + GOT + A - P", 4, Sign.SIGNED),
    R.TLSDESC_CALL: ("0", 0, Sign.EITHER),
}
CODE = 0x2000_0000_0000
PLACE = CODE + FIELD
WITHOUT_A_ROW = [kind for kind in range(1, 48) if kind not in RULES]
FIELDS = [kind for kind in RULES if PSABI[kind][1]]
NARROW = [kind for kind in FIELDS if PSABI[kind][1] < 8 and kind != R.PLT32]
ASKING = (R.TLSGD, R.TLSLD, R.DTPOFF32, R.DTPOFF64, R.GOTPC32_TLSDESC)  # applied where a variable has no fixed offset


def test_the_table_has_the_rows_of_the_specification() -> None:
    assert set(RULES) == set(PSABI)
    numbers = {"S": 0x7F00_1234_5000, "A": -4, "P": 0x5555_0000_1010, "G": 0x40, "GOT": 0x5555_0010_0000,
               "L": 0x5555_0000_2000, "Z": 24, "TP": -0x48, "D": 0x30}  # fmt: skip
    for kind, (formula, width, sign) in PSABI.items():
        rule = RULES[kind]
        assert (rule.width, rule.sign) == (width, sign), type_name(kind)
        assert rule.formula(Operands(**numbers)) == eval(formula, dict(numbers)), type_name(kind)


def test_everything_that_an_object_may_hold_has_a_row() -> None:
    dynamic = {R.NONE, R.COPY, R.GLOB_DAT, R.JUMP_SLOT, R.RELATIVE, R.DTPMOD64, R.IRELATIVE}
    assert set(R) - dynamic == set(RULES)


def limits(kind: int) -> tuple[int, int]:
    """Return the least and greatest value of a field, worked out from the specification."""
    _, width, sign = PSABI[kind]
    bits = 8 * width
    low = {Sign.SIGNED: -(2 ** (bits - 1)), Sign.UNSIGNED: 0, Sign.EITHER: -(2 ** (bits - 1))}[sign]
    high = {Sign.SIGNED: 2 ** (bits - 1) - 1, Sign.UNSIGNED: 2**bits - 1, Sign.EITHER: 2**bits - 1}[sign]
    return low, high


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return template(tmp_path_factory.mktemp("template"))


def link_value(data: bytes, kind: int, value: int) -> bytes:
    """Return the field of a function that is linked so that the row's formula gives `value`.

    What the linker makes for the symbol is checked on the way: its cells hold what they should.
    """
    rule = RULES[kind]
    letters = set(re.findall("[A-Z]+", PSABI[kind][0]))
    addend, symbol, table, size = -4, 0x7F00_0000_0000, CODE + 0x10_0000, 0
    place = PLACE if "P" in letters else 0
    if letters == {"G", "A"}:
        addend = value  # the only cell stands first
    elif letters & {"G", "GOT"} and letters & {"S", "L"}:
        symbol = value - addend + table
    elif letters & {"G", "GOT"}:
        addend = (PLACE + value) % 8 - 0x1000  # the table is aligned, and apart from the code
        table = place + value - addend - (24 if kind == R.GOTPC32_TLSDESC else 0)  # a descriptor's index comes first
    elif "Z" in letters:
        size, addend = value + 4, -4
    else:
        symbol = value - addend + place
    dynamic = kind in ASKING
    bound = Bound(symbol, thread_local=rule.need.thread_local, module_id=7 if dynamic else 0, size=size)
    found = planned(relocating(data, kind, addend), lambda name: bound if name == "there" else Bound(0x7F00_0000_1000))
    placement = linked(found, spaces(CODE, table, CODE + 0x20_0000))
    if "G" in letters:
        check_cells(placement, kind, table, symbol)
    return written(placement, PLACE, rule.width)


def check_cells(placement: Placement, kind: int, table: int, symbol: int) -> None:
    if kind == R.GOTPC32_TLSDESC:  # the index stands before the descriptor that names it
        function, index = words(placement, table + 24, 2)
        assert written(placement, function, 165) == FIND_THROUGH_DESCRIPTOR
        assert (index, words(placement, index, 3)) == (table, [7, symbol, 0x7F00_0000_1000])
        return
    expected = {R.TLSGD: [7, symbol], R.TLSLD: [7, 0]}.get(R(kind), [symbol & (1 << 64) - 1])
    assert words(placement, table, len(expected)) == expected


def words(placement: Placement, address: int, count: int) -> list[int]:
    return list(struct.unpack(f"<{count}Q", written(placement, address, 8 * count)))


@pytest.mark.parametrize("kind", FIELDS, ids=type_name)
@pytest.mark.parametrize("end", ["low", "high", "zero"])
def test_the_limits_fit(data: bytes, kind: int, end: str) -> None:
    low, high = limits(kind)
    value = {"low": low, "high": high, "zero": 0}[end]
    if RULES[kind].wraps:  # values are 64-bit numbers, which wrap
        value = value & (1 << 64) - 1
        value -= value >> 63 << 64
    width = RULES[kind].width
    assert link_value(data, kind, value) == (value & (1 << 8 * width) - 1).to_bytes(width, "little")


@pytest.mark.parametrize("kind", NARROW, ids=type_name)
@pytest.mark.parametrize("beyond", [1, 0x1000])
@pytest.mark.parametrize("end", ["low", "high"])
def test_one_beyond_is_refused_by_name_and_by_how_much(data: bytes, kind: int, end: str, beyond: int) -> None:
    low, high = limits(kind)
    with pytest.raises(RelocationOverflow) as caught:
        link_value(data, kind, low - beyond if end == "low" else high + beyond)
    message = caught.value.message
    for part in (type_name(kind), "`there`", ".text.f+0x8", "`f`", f"misses its field by {beyond:#x}"):
        assert part in message
    assert caught.value.hint


def test_eight_bytes_take_every_value() -> None:
    for kind in FIELDS:
        assert RULES[kind].wraps == (PSABI[kind][1] == 8)


@pytest.mark.parametrize("end", ["low", "high"])
def test_a_call_beyond_reach_goes_through_a_jump(data: bytes, end: str) -> None:
    low, high = limits(R.PLT32)
    destination = PLACE + 4 + (low - 1 if end == "low" else high + 1)
    found = planned(relocating(data, R.PLT32, -4), lambda name: Bound(destination))
    placement = linked(found, spaces(CODE, CODE + 0x10_0000, CODE + 0x20_0000))
    displacement = int.from_bytes(written(placement, PLACE, 4), "little", signed=True)
    jump = PLACE + 4 + displacement
    code = written(placement, jump, 6)
    assert code[:2] == b"\xff\x25"  # jmp *cell(%rip)
    cell = jump + 6 + int.from_bytes(code[2:], "little", signed=True)
    assert written(placement, cell, 8) == destination.to_bytes(8, "little")


@pytest.mark.parametrize("kind", WITHOUT_A_ROW, ids=type_name)
def test_what_has_no_row_is_refused_by_name(data: bytes, kind: int) -> None:
    with pytest.raises(UnsupportedRelocation) as caught:
        planned(relocating(data, kind, 0), lambda name: Bound(0x1000))
    for part in (type_name(kind), "`there`", ".text.f+0x8", "`f`", "f.o"):
        assert part in caught.value.message
    assert caught.value.hint


def test_names_are_those_of_the_specification() -> None:
    assert [type_name(k) for k in (R.A64, R.A32S, R.PC32, R.REX_GOTPCRELX, R.TPOFF32)] == [
        "R_X86_64_64",
        "R_X86_64_32S",
        "R_X86_64_PC32",
        "R_X86_64_REX_GOTPCRELX",
        "R_X86_64_TPOFF32",
    ]
    assert type_name(200) == "relocation type 200"


def test_a_rule_says_what_fits() -> None:
    rule = Rule(lambda o: o.S, 1, Sign.EITHER)
    assert rule.limits == (-128, 255)
    assert [rule.fits(value) for value in (-129, -128, 255, 256)] == [False, True, True, False]
