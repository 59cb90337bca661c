"""Which bytes behind an address code reaches."""

from __future__ import annotations

import pytest

from patcher.code.pointed import reached_through

LOAD = bytes.fromhex("488b0500000000")  # mov 0(%rip), %rax
USE = bytes.fromhex("8b4810")  # mov 16(%rax), %ecx


@pytest.mark.parametrize(
    ("behind", "found"),
    [
        ("8b4810 c3", (16,)),  # mov 16(%rax), %ecx
        ("8b4810 8b4808 c3", (16, 8)),
        ("488d4810 c3", ()),  # lea 16(%rax), %rcx
        ("8b4c8810 c3", ()),  # mov 16(%rax,%rcx,4), %ecx
        ("488b00 8b4810 c3", (0,)),  # mov (%rax), %rax: another address from then on
        ("31c0 8b4810 c3", ()),  # xor %eax, %eax
        ("e800000000 8b4810 c3", ()),  # call
        ("7400 8b4810 c3", (16,)),  # je
        ("eb00 8b4810 c3", ()),  # jmp
    ],
)
def test_reached(behind: str, found: tuple[int, ...]) -> None:
    code = LOAD + bytes.fromhex(behind.replace(" ", ""))
    assert reached_through(code, 3) == found


def test_what_loads_no_address() -> None:
    assert reached_through(bytes.fromhex("48030500000000") + USE, 3) == ()  # add 0(%rip), %rax
    assert reached_through(b"\x06", 0) == ()
