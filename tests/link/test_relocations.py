"""Every row of the relocation table at its limits and one beyond, through plan and place; and what has no row."""

from __future__ import annotations

import pytest

from link.linking import FIELD, linked, planned, relocating, spaces, template, written
from patcher.errors import RelocationOverflow, UnsupportedRelocation
from patcher.link.plan import Bound
from patcher.link.relocations import RULES, Need, Operands, R, Rule, Sign, type_name

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
    R.PLT32: ("S + A - P", 4, Sign.SIGNED),
    R.GOTPCREL: ("G + A - P", 4, Sign.SIGNED),
    R.GOTPCRELX: ("G + A - P", 4, Sign.SIGNED),
    R.REX_GOTPCRELX: ("G + A - P", 4, Sign.SIGNED),
    R.GOTTPOFF: ("G + A - P", 4, Sign.SIGNED),
    R.TPOFF32: ("TP + A", 4, Sign.SIGNED),
    R.TPOFF64: ("TP + A", 8, Sign.EITHER),
}
CODE = 0x2000_0000_0000
PLACE = CODE + FIELD
WITHOUT_A_ROW = [kind for kind in range(1, 48) if kind not in RULES]


def test_the_table_has_the_rows_of_the_specification() -> None:
    assert set(RULES) == set(PSABI)
    numbers = {"S": 0x7F00_1234_5000, "A": -4, "P": 0x5555_0000_1010, "G": 0x5555_0010_0000, "TP": -0x48}
    for kind, (formula, width, sign) in PSABI.items():
        rule = RULES[kind]
        assert (rule.width, rule.sign) == (width, sign), type_name(kind)
        assert rule.formula(Operands(**numbers)) == eval(formula, dict(numbers)), type_name(kind)


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
    """Return the field of a function that is linked so that the row's formula gives `value`."""
    rule = RULES[kind]
    addend, symbol, cell = -4, 0x7F00_0000_0000, CODE + 0x10_0000
    if rule.need in (Need.CELL, Need.THREAD_CELL):
        addend = (PLACE + value) % 8 - 8  # the cell is aligned
        cell = PLACE + value - addend
    elif rule.need is Need.THREAD_OFFSET:
        symbol = value - addend
    else:
        symbol = value - addend + (PLACE if "P" in PSABI[kind][0] else 0)
    thread_local = rule.need in (Need.THREAD_OFFSET, Need.THREAD_CELL)
    found = planned(relocating(data, kind, addend), lambda name: Bound(symbol, thread_local=thread_local))
    placement = linked(found, spaces(CODE, cell, CODE + 0x20_0000))
    if rule.need in (Need.CELL, Need.THREAD_CELL):
        assert written(placement, cell, 8) == (symbol & (1 << 64) - 1).to_bytes(8, "little")
    return written(placement, PLACE, rule.width)


@pytest.mark.parametrize("kind", RULES, ids=type_name)
@pytest.mark.parametrize("end", ["low", "high", "zero"])
def test_the_limits_fit(data: bytes, kind: int, end: str) -> None:
    low, high = limits(kind)
    value = {"low": low, "high": high, "zero": 0}[end]
    width = RULES[kind].width
    assert link_value(data, kind, value) == (value & (1 << 8 * width) - 1).to_bytes(width, "little")


@pytest.mark.parametrize("kind", [k for k in RULES if PSABI[k][1] < 8 and k != R.PLT32], ids=type_name)
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


@pytest.mark.parametrize("kind", [k for k in RULES if PSABI[k][1] == 8], ids=type_name)
def test_eight_bytes_wrap_as_addresses_do(kind: int) -> None:
    assert RULES[kind].encode(-1) == RULES[kind].encode((1 << 64) - 1) == b"\xff" * 8


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
    assert rule.encode(-128) == b"\x80"
    assert rule.encode(255) == b"\xff"
    assert rule.encode(256) is None
    assert rule.encode(-129) is None
