"""Detours across the border of two pages: whole after each of their parts, as real programs run them."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from conftest import Build, Function, named_functions

from patcher.code.border import PAGE, is_across, led_to
from patcher.code.entry import DETOUR_SIZE, NotDetourable, detour_parts, displaced_copy, plan_entry

AREA, FLAGS = 0x60000000, 0x70000000  # as in patched_run.c
STATIC = ("-static", "-no-pie", "-Wl,-z,norelro")
# Entries of all kinds, each of which goes on with instructions that tell whether any was left out or done twice.
BODIES = {
    "pushes": "push %rbx; mov %edi, %eax; mov %esi, %ebx; add $3, %eax; REST; add %ebx, %eax; pop %rbx; ret",
    "frame": "push %rbp; mov %rsp, %rbp; push %rbx; mov %edi, %ebx; lea (%rbx, %rsi), %eax; REST; "
    "pop %rbx; pop %rbp; ret",
    "marked": "endbr64; sub $24, %rsp; mov %edi, %eax; REST; add $24, %rsp; ret",
    "constant": "movabs $0x123456789, %rax; add %rdi, %rax; REST; ret",
    "cell": "mov cell(%rip), %eax; add %edi, %eax; REST; ret",
    "early": "test %edi, %edi; js 1f; lea 9(%rdi), %eax; REST; ret; 1: mov $-1, %eax; ret",
    "flags": "cmc; mov %edi, %eax; adc $0, %eax; REST; ret",
    "calls": "call other; nop; nop; mov %edi, %edx; add %edx, %eax; REST; ret",
    "saves": "push %r12; push %r13; mov %edi, %r12d; mov %esi, %r13d; lea (%r12, %r13), %eax; REST; "
    "pop %r13; pop %r12; ret",
}
REST = "; ".join(["lea (%rax, %rax, 2), %eax", "add $5, %eax", "xor $0x55, %eax"] * 2)
MAIN = """\
#include <stdio.h>
void run(void)
{
    for (int n = -3; n < 4; n++) {
CALLS    }
}
"""
# What begins with an instruction of several bytes, one of them before the border, cannot be changed in whole steps.
REFUSED = {(name, 1, True) for name in ("constant", "cell", "early", "calls", "saves")}


def program(build: Build, tmp_path: Path) -> tuple[Path, list[tuple[str, int]]]:
    """Build a program of all bodies, one for each number of bytes that lie before a border."""
    kinds = [(name, before) for name in BODIES for before in range(1, DETOUR_SIZE)]
    text = ".data\ncell: .long 77\n.text\n.type other, @function\nother: mov $6, %eax; ret\n"
    calls = ""
    for name, before in kinds:
        text += f".p2align 12\n.skip {PAGE - before}, 0x90\n.globl {name}{before}\n.type {name}{before}, @function\n"
        text += f"{name}{before}: {BODIES[name].replace('REST', REST)}\n.size {name}{before}, . - {name}{before}\n"
        calls += f'        {{ int {name}{before}(int, int); printf("{name} %d\\n", {name}{before}(n, 7)); }}\n'
    (tmp_path / "kinds.S").write_text(text + '.section .note.GNU-stack, "", @progbits\n')
    (tmp_path / "main.c").write_text(MAIN.replace("CALLS", calls))
    return build("borders", ["patched_run.c", tmp_path / "kinds.S", tmp_path / "main.c"], *STATIC), kinds


def run(path: Path, patches: Path, records: bytes) -> tuple[str, int]:
    patches.write_bytes(records)
    done = subprocess.run([path, patches], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, (done.returncode, done.stdout[-300:])
    return done.stdout, int(done.stderr)


def record(address: int, data: bytes) -> bytes:
    return struct.pack("<QI", address, len(data)) + data


def detoured(f: Function, number: int) -> list[bytes]:
    """Return records: where the detour of a function leads, and then its parts."""
    door = AREA + 256 * number
    plan = plan_entry(f.name, f.code, f.address, len(f.code), f.following)
    copy = displaced_copy(plan, f.code, f.address, door + 7)
    flag = b"\xc6\x05" + (FLAGS + number - door - 7).to_bytes(4, "little", signed=True) + b"\x01"  # movb $1, flag(%rip)
    parts = detour_parts(f.address, f.code[: plan.length], door + 7, door)
    return [record(door, flag + copy), *(record(f.address + p.offset, p.code) for p in parts)]


def test_every_part_leaves_the_program_what_it_was(build: Build, tmp_path: Path) -> None:
    path, kinds = program(build, tmp_path)
    expected = subprocess.run([path], check=True, capture_output=True, text=True, timeout=20).stdout
    functions = {f.name: f for f in named_functions(path)}
    refused, made = set(), []
    for number, (name, before) in enumerate(kinds):
        f = functions[f"{name}{before}"]
        assert f.address % PAGE == PAGE - before
        try:
            made.append(detoured(f, number))
        except NotDetourable as error:
            refused.add((name, before, "a page ends inside" in error.message))
    assert refused == REFUSED
    assert {len(records) for records in made} == {4}
    for parts in range(1, 5):
        output, entered = run(path, tmp_path / "patches", b"".join(b"".join(records[:parts]) for records in made))
        assert output == expected, parts
        assert entered == (len(made) if parts == 4 else 0)
        for records in made:
            for one in records[1:parts]:
                address, size = struct.unpack_from("<QI", one)
                assert address // PAGE == (address + size - 1) // PAGE


def test_parts_that_are_put_in_out_of_order_do_harm(build: Build, tmp_path: Path) -> None:
    """Or the test above would show nothing: a landing that nothing leads past is in the way."""
    path, _ = program(build, tmp_path)
    f = next(f for f in named_functions(path) if f.name == "pushes3")
    door, _, landing, _ = detoured(f, 0)
    (tmp_path / "patches").write_bytes(door + landing)
    expected = subprocess.run([path], check=True, capture_output=True, text=True, timeout=20).stdout
    done = subprocess.run([path, tmp_path / "patches"], capture_output=True, text=True, timeout=20)
    assert done.returncode or done.stdout != expected


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("53 89 f8 83 c0 01 5b c3", "takes 13 bytes, and the function has 8"),
        ("53 89 f8 89 f3 e8 00 10 00 00 90 90 90 90 5b c3", "returns into the overwritten bytes, at offset 10"),
        ("53 89 f8 89 f3 83 c0 01 85 c0 75 f8 90 90 90 90 5b c3", "branches into an instruction"),
        ("53 89 f8 89 f3 83 c0 01 83 c0 01 83 c0 01 83 c0 01 75 f2 5b c3", "branches into these bytes"),
    ],
)
def test_what_a_longer_entry_cannot_have(code: str, found: str) -> None:
    raw = bytes.fromhex(code)
    with pytest.raises(NotDetourable, match=r"cannot take a 5-byte jump") as caught:
        plan_entry("f", raw, 2 * PAGE - 3, len(raw), b"\x90" * 16)
    assert found in caught.value.message


def test_an_entry_that_ends_with_its_page_is_a_plain_one() -> None:
    assert not is_across(PAGE - DETOUR_SIZE)
    assert is_across(PAGE - DETOUR_SIZE + 1)
    assert not is_across(PAGE)
    assert len(detour_parts(PAGE - DETOUR_SIZE, bytes.fromhex("55 48 89 e5 53"), 0x5000, 0x6000)) == 1


def test_where_a_short_jump_leads() -> None:
    assert led_to(0x1000, b"\xeb\x07") == 0x1009
    assert led_to(0x1000, b"\xeb\xfe") == 0
    assert led_to(0x1000, b"\xe9\x07") == 0
