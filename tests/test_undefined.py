"""What is a call of an undefined function, and what may be anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from living import compile_text

from patcher.blocks import Blocks
from patcher.code.instructions import decode_lite
from patcher.elf import read_object
from patcher.undefined import Use, undefined_function, uses_of

CALLS = """
int nowhere(int n);
int calls(int n) { return nowhere(n) + 1; }
int tail(int n) { return nowhere(n + 1); }
void once(int n) { if (n == 3) nowhere(n); }
"""
ADDRESSES = """
int nowhere(int n);
int (*taken(void))(int) { return nowhere; }
int (*kept)(int) = nowhere;
int compared(int (*f)(int)) { return f == nowhere; }
"""
VARIABLE = "extern int nowhere; int reads(void) { return nowhere; } void writes(void) { nowhere = 3; }"


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize(
    "flags", ["-O0", "-O2", "-Os", "-O2 -fPIC", "-O2 -fPIC -fno-plt", "-O2 -fno-pie", "-O2 -mcmodel=large"]
)
def test_calls_are_told_from_what_may_be_a_variable(tmp_path: Path, compiler: str, flags: str) -> None:
    def uses(name: str, text: str) -> set[Use]:
        made = compile_text(text, tmp_path / f"{name}.o", *flags.split(), compiler=compiler)
        return set(uses_of("nowhere", [Blocks(read_object(made))]))

    called = uses("calls", CALLS)
    assert {use.by for use in called} == {"calls", "tail", "once"}
    # With the large model even a call takes the address first: what for, nobody can tell.
    assert {use.call for use in called} == {"large" not in flags}
    taken = uses("addresses", ADDRESSES)
    assert taken == {Use("taken", False), Use("kept", False), Use("compared", False)}
    assert uses("variable", VARIABLE) == {Use("reads", False), Use("writes", False)}
    assert uses("others", "int elsewhere(void); int f(void) { return elsewhere(); }") == set()


@pytest.mark.parametrize("abort", [None, 0x7FFF_1234_5678])
def test_its_code_says_who_called_and_ends(abort: int | None) -> None:
    made = Blocks(undefined_function("nowhere", ["f", "g", "f", "h", "i"], abort))
    (block,) = made.functions
    assert block.name == "nowhere"
    assert block.exported
    assert made.references(block) == ()
    message = b"patcher: call of undefined `nowhere`, referred to by `f`, `g`, `h` and others\n"
    assert block.data.endswith(message)
    code = decode_lite(block.data[: -len(message)], 0)
    assert code[-1][2] == "hlt"
    (address,) = [
        at + size + int(operands.rpartition("+ ")[2][:-1], 16) for at, size, name, operands in code if name == "lea"
    ]
    assert address == len(block.data) - len(message)
    operands = " ".join(operands for _, _, _, operands in code)
    assert (f"{abort or 0:#x}" in operands.replace("0x7fff12345678,", "0x7fff12345678 ").split()) is (abort is not None)
