"""Which functions leave nothing behind, as compilers make them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from patcher.blocks import Blocks
from patcher.code.frames import keeps_to_its_frame
from patcher.elf import read_object

SOURCE = """
#include <stdlib.h>
#include <string.h>
struct s { int a, b, c, d, e, f; };
int kept;
char buffer[64];
void take(struct s *);
int give(int);
int local(int n) { volatile struct s l = {n, 1}; return l.a + l.f; }
int local_large(int n) { volatile struct s l[4] = {{n}}; l[n & 3].b = 2; return l[1].a; }
int calls(int n) { volatile struct s l = {n, 1}; return give(l.a) + l.b; }
int reads(struct s *p) { return p->a * 2; }
int stores_global(int n) { struct s l = {n, 1}; kept = l.a; return l.b; }
int stores_pointer(struct s *p) { p->a = 2; return 0; }
int shares(int n) { struct s l = {n, 1}; take(&l); return l.a; }
int copies(int n) { volatile struct s l = {n}; memcpy(buffer, (void *)&l, sizeof l); return 0; }
int adds(int *p) { return *p += 2; }
"""
HARMLESS = {"local", "calls", "reads"}  # a struct made at once may be cleared through its address


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_what_leaves_nothing_behind(compiler: str, level: str, tmp_path: Path) -> None:
    (tmp_path / "unit.c").write_text(SOURCE)
    command = [compiler, level, "-fno-stack-protector", "-ffunction-sections", "-c", "-o", "unit.o", "unit.c"]
    subprocess.run(command, cwd=tmp_path, check=True)
    blocks = Blocks(read_object(tmp_path / "unit.o"))
    found = {f.name for f in blocks.functions if keeps_to_its_frame(f.data, 0)}
    assert "calls" in found or "local" in found
    assert found - {"local_large"} <= HARMLESS
    assert "reads" in found


def test_what_is_no_code_counts_as_leaving_something() -> None:
    assert not keeps_to_its_frame(b"\x06\x06", 0)
    assert keeps_to_its_frame(b"\xc3", 0)
    assert not keeps_to_its_frame(b"\x48\x89\xe0\xc3", 0)  # mov %rsp, %rax; ret
    assert not keeps_to_its_frame(b"\x89\x07\xc3", 0)  # mov %eax, (%rdi); ret
    assert not keeps_to_its_frame(b"\x89\x45\xf8\xc3", 0)  # mov %eax, -8(%rbp); ret: no frame of its own
    assert keeps_to_its_frame(b"\x89\x44\x24\xf8\xc3", 0)  # mov %eax, -8(%rsp); ret
    assert not keeps_to_its_frame(b"\x48\xab\xc3", 0)  # stos; ret
