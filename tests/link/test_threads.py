"""Thread-local code in the dynamic models, made local-exec where offsets are fixed: as GNU ld makes it."""

from __future__ import annotations

from pathlib import Path

import pytest
from living import UNIT, compile_text, run

from link.linking import linked, planned, spaces, written
from link.reference import loaded
from patcher.blocks import Blocks
from patcher.elf import read_object
from patcher.elf import tables as t
from patcher.errors import LinkError
from patcher.link.plan import Bound
from patcher.link.relocations import R

TEXT = """
__thread int counter = 3, others[9];
static __thread long hidden = 5, more[4];
int general(int n) { return counter + others[n]; }
int *pointer(void) { return &counter; }
long local(int n) { hidden += n; more[n & 3] = hidden; return hidden + more[1]; }
long *where(void) { return &more[2]; }
int both(int n) { return counter++ + (int)hidden; }
"""
STYLES = {
    "gcc": ("gcc", "-O2"),
    "gcc -O0": ("gcc", "-O0"),
    "gcc -fno-plt": ("gcc", "-O2", "-fno-plt"),
    "gcc descriptors": ("gcc", "-O2", "-mtls-dialect=gnu2"),
    "clang": ("clang", "-O2"),
    "clang -fno-plt": ("clang", "-O2", "-fno-plt"),
    "gcc large": ("gcc", "-O1", "-mcmodel=large"),
}


@pytest.mark.parametrize("style", STYLES)
def test_dynamic_models_become_local_exec_as_ld_does_it(tmp_path: Path, style: str) -> None:
    compiler, *flags = STYLES[style]
    unit = compile_text(TEXT, tmp_path / "unit.o", *flags, "-fPIC", "-falign-functions=16", *UNIT, compiler=compiler)
    getter = compile_text("void *__tls_get_addr(void *index) { return index; }\n", tmp_path / "getter.o")
    program = tmp_path / "program"
    run("ld", "-z", "norelro", "-e", "general", "-o", program, unit, getter)
    theirs = t.read_raw("program", program.read_bytes())
    lines = [line.split() for line in run("nm", program).splitlines()]
    symbols = {f[-1]: int(f[0], 16) for f in lines if len(f) == 3}
    (storage,) = (p for p in theirs.program_headers if int(p["type"]) == t.PT_TLS)
    size = int(storage["memory_size"]) + int(storage["alignment"]) - 1 & -int(storage["alignment"])
    blocks = Blocks(read_object(unit))
    asking = {r.type for b in blocks.functions for r in blocks.references(b)} & {R.TLSGD, R.TLSLD, R.GOTPC32_TLSDESC}
    assert asking
    for block in blocks.functions:
        start = symbols[block.name]
        found = planned(
            blocks,
            lambda name: Bound(symbols[name] - size, thread_local=True) if name != "_GLOBAL_OFFSET_TABLE_" else None,
            wanted=(block.name,),
            resident=lambda b: Bound(symbols[b.name] - size, thread_local=True),
        )
        placement = linked(found, spaces(start, 0x70_0000, 0x80_0000))
        ours, expected = written(placement, start, block.size), loaded(theirs, start, block.size)
        if style == "gcc large":  # ld fills with other no-operations, and its table is elsewhere
            pointer_loads = [code.count(b"\x64\x48\x8b\x04\x25\0\0\0\0") for code in (ours, expected)]
            assert pointer_loads[0] == pointer_loads[1] > 0, block.name
            continue
        assert ours == expected, block.name


def test_code_in_no_known_sequence_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "odd.s"
    source.write_text(
        '.file "odd.c"\n.section .text.f,"ax"\n.globl f\n.type f, @function\n'
        "f: lea counter@tlsgd(%rip), %rsi\n ret\n.size f, . - f\n"
    )
    run("as", source, "-o", tmp_path / "odd.o")
    blocks = Blocks(read_object(tmp_path / "odd.o"))
    with pytest.raises(LinkError, match=r"`f`: R_X86_64_TLSGD at 0x3 stands in none of") as caught:
        planned(blocks, lambda name: Bound(-8, thread_local=True))
    assert caught.value.code == "thread-local"


@pytest.mark.parametrize("flags", [("-O2",), ("-O2", "-mtls-dialect=gnu2")], ids=["calls", "descriptors"])
def test_what_has_no_fixed_offset_is_asked_for_through_cells(tmp_path: Path, flags: tuple[str, ...]) -> None:
    blocks = Blocks(read_object(compile_text(TEXT, tmp_path / "unit.o", *flags, "-fPIC", *UNIT)))

    def resolve(name: str) -> Bound:
        thread_local = name in ("counter", "others")
        return Bound(0x40, thread_local=True, module_id=5) if thread_local else Bound(0x1_2345_6780)

    found = planned(
        blocks, resolve, wanted=("pointer",), resident=lambda b: Bound(0x40, thread_local=True, module_id=5)
    )
    placement = linked(found, spaces(0x10_0000, 0x20_0000, 0x30_0000))
    (block,) = found.code
    code = written(placement, placement.addresses[block], block.size)
    assert code[: block.data.index(b"\x8d") + 2] == block.data[: block.data.index(b"\x8d") + 2]  # nothing rewritten
    index = (5).to_bytes(8, "little") + (0x40).to_bytes(8, "little")
    assert any(index in data for _, data in placement.writes)


def test_a_new_cell_of_initial_exec_code_needs_a_fixed_offset(tmp_path: Path) -> None:
    text = "extern __thread int counter; int f(void) { return counter; }\n"
    unit = compile_text(text, tmp_path / "unit.o", "-O2", "-fPIC", "-ftls-model=initial-exec", *UNIT)
    blocks = Blocks(read_object(unit))
    with pytest.raises(LinkError, match="`counter` has no fixed offset from the thread pointer"):
        planned(blocks, lambda name: Bound(0x40, thread_local=True, module_id=5))
    with pytest.raises(LinkError, match="`counter`, which is not thread-local in the process"):
        planned(blocks, lambda name: Bound(0x40))
