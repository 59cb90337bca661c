"""What code expects of registers across calls, on code that an assembler made."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from patcher.code.registers import ALL, outgoing, overwritten, relies_on

# each calls f (at the label `site`), which is going to overwrite rdx and xmm2
RELYING = {
    "kept in rdx": "mov $5, %edx; site: call f; add %edx, %eax; ret",
    "kept across a branch": "mov $5, %edx; site: call f; test %eax, %eax; je 1f; ret; 1: mov %rdx, %rax; ret",
    "kept round a loop": "1: mov $5, %edx; site: call f; dec %ebx; jne 2f; ret; 2: add %edx, %ebx; jmp 1b",
    "an argument passed on": "mov $5, %edx; site: call f; call g; ret",
    "a parameter": "site: call f; add %edx, %eax; ret",
    "a vector register": "movaps (%rsi), %xmm2; site: call f; addps %xmm2, %xmm0; ret",
    "part of it": "mov $5, %edx; site: call f; mov $1, %dl; mov %edx, %eax; ret",
    "in a tail call": "mov $5, %edx; site: call f; jmp g",
    "through a jump table": "mov $5, %edx; site: call f; jmp *%rax",
}
FREE = {
    "never set": "call g; site: call f; add %edx, %eax; ret",
    "set again": "mov $5, %edx; site: call f; mov $6, %edx; add %edx, %eax; ret",
    "zeroed": "mov $5, %edx; site: call f; xor %edx, %edx; add %edx, %eax; ret",
    "an argument of f": "call g; mov $5, %edx; site: call f; mov %eax, %ebx; mov $0, %edx; call g; ret",
    "in a saved register": "call g; mov $5, %ebx; site: call f; add %ebx, %eax; ret",
    "set after another call": "mov $5, %edx; call g; site: call f; add %edx, %eax; ret",
}
TAKEN = frozenset({"rdx", "xmm2"})


def assemble(folder: Path, text: str) -> tuple[bytes, int]:
    """Return the code of `text`, with f and g behind it, and the offset of the call at `site`."""
    source = f".globl start, end, f, g, site\nstart: {text}\nend: nop\nf: ret\ng: ret\n"
    subprocess.run(["as", "-o", "unit.o"], input=source, text=True, cwd=folder, check=True)
    subprocess.run(["ld", "-e", "start", "-Ttext=0x10000", "-o", "unit", "unit.o"], cwd=folder, check=True)
    listed = subprocess.run(["nm", "unit"], capture_output=True, text=True, cwd=folder, check=True).stdout
    symbols = {name: int(value, 16) for value, _, name in (line.split() for line in listed.splitlines())}
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", "unit", "code"], cwd=folder, check=True)
    code = (folder / "code").read_bytes()[: symbols["end"] - symbols["start"]]
    return code, symbols["site"] - symbols["start"]


@pytest.mark.parametrize("what", RELYING)
def test_a_value_that_must_survive_is_seen(what: str, tmp_path: Path) -> None:
    code, site = assemble(tmp_path, RELYING[what])
    assert relies_on(code, {site: ALL - TAKEN}, {site: TAKEN})


@pytest.mark.parametrize("what", FREE)
def test_a_register_without_a_value_to_keep_is_free(what: str, tmp_path: Path) -> None:
    code, site = assemble(tmp_path, FREE[what])
    assert not relies_on(code, {site: ALL - TAKEN}, {site: TAKEN})


def test_registers_are_named_by_their_widest_form(tmp_path: Path) -> None:
    code, _ = assemble(tmp_path, "mov $1, %cl; xor %r9d, %r9d; vaddps %ymm1, %ymm2, %ymm3; push %rbx; site: ret")
    assert overwritten(code) == {"rcx", "r9", "xmm3"}


def test_where_code_leaves_to_is_listed(tmp_path: Path) -> None:
    code, site = assemble(tmp_path, "jmp 1f; 1: site: call f; jmp g")
    found = outgoing(code, 0x10000)
    assert [offset for offset, _ in found.targets] == [site, site + 5]
    assert not found.anywhere
    code, _ = assemble(tmp_path, "site: call *%rax; ret")
    assert outgoing(code, 0x10000).anywhere
