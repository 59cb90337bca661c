"""Addresses and final bytes: alignment, strings, cells, jumps, islands, and what is too far or too large."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from living import UNIT, compile_text, run

from link.linking import linked, planned, spaces, written
from patcher.blocks import Blocks, Kind
from patcher.code.instructions import decode_lite
from patcher.elf import read_object
from patcher.errors import LinkError
from patcher.link.place import FarData, place
from patcher.link.plan import Bound, Unit, plan

CODE, READ_ONLY, DATA = 0x5555_0000_0000, 0x5555_0010_0000, 0x5555_0020_0000
SPACE = spaces(CODE, READ_ONLY, DATA)


def compiled(folder: Path, text: str, *flags: str) -> Blocks:
    return Blocks(read_object(compile_text(text, folder / "unit.o", "-O2", *UNIT, *flags)))


def target_of_call(code: bytes, address: int) -> int:
    at = code.index(b"\xe8") if b"\xe8" in code else code.index(b"\xe9")
    return address + at + 5 + int.from_bytes(code[at + 1 : at + 5], "little", signed=True)


def test_everything_is_aligned_and_nothing_overlaps(tmp_path: Path) -> None:
    text = (
        "struct wide { _Alignas(64) int n; };\nstatic struct wide wide = {3};\nstatic char small = 1;\n"
        "static double number = 2;\nextern void use(void *, ...);\n"
        'void work(double x) { use(&wide, &small, &number, "text", x * 3.5); }\n'
        "_Alignas(32) static int table[5]; void more(void) { use(table); }\n"
    )
    found = planned(compiled(tmp_path, text), lambda name: Bound(CODE + 0x1000_0000))
    placement = linked(found, SPACE)
    extents = sorted((a, a + max(b.size, 1)) for b, a in placement.addresses.items())
    assert all(end <= start for (_, end), (start, _) in pairwise(extents))
    for block, address in placement.addresses.items():
        assert address % block.alignment == 0, block.name
        assert address % 16 == 0 or block.kind is not Kind.CODE
        region = {Kind.CODE: SPACE.code, Kind.READ_ONLY: SPACE.read_only}.get(block.kind, SPACE.data)
        assert region.start <= address < region.end
    assert {b.alignment for b in placement.addresses} >= {64, 32, 8}
    assert placement.space.code.start >= max(a + b.size for b, a in placement.addresses.items()
                                             if b.kind is Kind.CODE)  # fmt: skip
    assert all(space.start <= space.end for space in (placement.space.code, placement.space.read_only))


def test_equal_strings_are_placed_once(tmp_path: Path) -> None:
    text = 'extern void use(const char *);\nvoid %s(void) { use("the same"); use("%s"); }\n'
    units = [compiled(tmp_path / name, text % (name, name)) for name in ("left", "right")]
    for name, blocks in zip(("left", "right"), units, strict=True):
        assert any(b.data == b"the same\0" for b in planned(blocks, lambda n: Bound(CODE)).read_only), name
    found = plan([Unit(b, b.functions, lambda b: None, lambda b: False) for b in units], lambda b, e: Bound(CODE))
    placement = linked(found, SPACE)
    strings: dict[bytes, set[int]] = {}
    for block, address in placement.addresses.items():
        if block.string:
            strings.setdefault(block.data, set()).add(address)
    assert {data: len(at) for data, at in strings.items()} == {b"the same\0": 1, b"left\0": 1, b"right\0": 1}
    assert written(placement, next(iter(strings[b"the same\0"])), 9) == b"the same\0"


def test_zeroed_storage_is_reserved_and_not_written(tmp_path: Path) -> None:
    blocks = compiled(tmp_path, "static int zeroed[64]; int work(int n) { return zeroed[n]++; }\n")
    placement = linked(planned(blocks, lambda name: None), SPACE)
    (address,) = (a for b, a in placement.addresses.items() if b.kind is Kind.DATA)
    assert placement.space.data.start >= address + 256
    assert all(start >= CODE and start + len(data) <= DATA for start, data in placement.writes)


def test_one_cell_and_one_jump_serve_all_references(tmp_path: Path) -> None:
    text = "extern int far(int);\nint work(int n) { return far(n) + far(n + 1) + far(n + 2); }\n"
    text += "int again(int n) { return far(n) ^ 1; }\n"
    found = planned(compiled(tmp_path, text), lambda name: Bound(0x1234_0000))
    placement = linked(found, SPACE)
    jumps = {start for start, data in placement.writes if data[:2] == b"\xff\x25"}
    cells = {start for start, data in placement.writes if data == (0x1234_0000).to_bytes(8, "little")}
    assert len(jumps) == len(cells) == 1
    for block in found.code:
        address = placement.addresses[block]
        assert target_of_call(written(placement, address, block.size), address) in jumps


def test_calls_go_to_islands_and_pointers_to_the_address_for_life(tmp_path: Path) -> None:
    text = "__attribute__((noinline)) int f(int n) { return n * 3; }\n"
    text += "int (*pointer(void))(int) { return f; }\nint calls(int n) { return f(n) + 1; }\n"
    found = planned(compiled(tmp_path, text, "-fno-pic"), lambda name: None, doors=lambda b: True)
    (f, pointer, calls) = found.code
    space = spaces(0x1000_0000, 0x1010_0000, 0x1020_0000)
    islands = {f: 0x1100_0000, pointer: 0x1100_0010, calls: 0x1100_0020}
    placement = place(found, space, islands, {f: 0x40_1000})
    code = written(placement, placement.addresses[pointer], pointer.size)
    assert (0x40_1000).to_bytes(4, "little") in code
    address = placement.addresses[calls]
    assert target_of_call(written(placement, address, calls.size), address) == 0x1100_0000


def test_calls_may_go_elsewhere_than_pointers(tmp_path: Path) -> None:
    text = "extern int f(int);\nint (*pointer(void))(int) { return f; }\nint calls(int n) { return f(n) + 1; }\n"
    bound = Bound(0x40_1000, call=0x1100_0000)
    placement = linked(
        planned(compiled(tmp_path, text, "-fno-pic"), lambda name: bound), spaces(0x1000_0000, 0x1010_0000, 0x1020_0000)
    )
    named = {b.name: (b, a) for b, a in placement.addresses.items()}
    pointer, at = named["pointer"]
    assert (0x40_1000).to_bytes(4, "little") in written(placement, at, pointer.size)
    calls, at = named["calls"]
    assert target_of_call(written(placement, at, calls.size), at) == 0x1100_0000


def test_data_beyond_reach_asks_for_indirect_access(tmp_path: Path) -> None:
    blocks = compiled(tmp_path, "extern int away; int work(void) { return away; }\n", "-fPIE")
    if not any(r.type == 2 for f in blocks.functions for r in blocks.references(f)):
        pytest.skip("this compiler goes through a cell by itself")
    with pytest.raises(FarData) as caught:
        linked(planned(blocks, lambda name: Bound(0x7FFF_0000_0000)), SPACE)
    assert caught.value.object is blocks.object
    assert "`away`" in caught.value.message
    assert "-mcmodel=large" in caught.value.hint


def test_data_of_the_unit_itself_beyond_reach_asks_for_farther_reach(tmp_path: Path) -> None:
    blocks = compiled(tmp_path, "static int near; int work(void) { return near++; }\n")
    with pytest.raises(FarData, match="`near` misses its field by"):
        linked(planned(blocks, lambda name: None), spaces(CODE, READ_ONLY, 0x7FFF_0000_0000))


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("position", ["-fPIC", "-fPIE", "-fno-pic"])
def test_the_large_code_model_reaches_everything(tmp_path: Path, compiler: str, position: str) -> None:
    text = (
        "extern int away, call(int); static int here = 4; static int table[4] = {1};\n"
        "static __attribute__((noinline)) int local(int n) { return n + here++; }\n"
        'extern void use(const char *, void *); int work(int n) { use("text", (void *)call); '
        "return away + here + table[n & 3] + local(n) + call(n); }\n"
    )
    unit = compile_text(text, tmp_path / "unit.o", "-O1", position, "-mcmodel=large", *UNIT, compiler=compiler)
    far = {"here": Bound(0x7FFF_0000_0000), "table": Bound(0x7FFF_0000_0100), "local": Bound(0x7FFF_1000_0000)}
    found = planned(
        Blocks(read_object(unit)),
        lambda name: Bound(0x6FFF_0000_0000),
        wanted=("work",),
        resident=lambda b: far.get(b.name),
    )
    assert linked(found, SPACE).writes


@pytest.mark.parametrize("source", ["lea there(%rip), %r12", "lea there+5(%rip), %rax", "mov $there+16, %r9"])
def test_an_address_beyond_reach_is_loaded_from_a_cell(tmp_path: Path, source: str) -> None:
    (tmp_path / "f.s").write_text(
        f'.file "f.c"\n.section .text.f,"ax"\n.globl f\n.type f, @function\nf: {source}\n ret\n.size f, . - f\n'
    )
    run("as", tmp_path / "f.s", "-o", tmp_path / "f.o")
    found = planned(Blocks(read_object(tmp_path / "f.o")), lambda name: Bound(0x7FFF_0000_1000))
    placement = linked(found, SPACE)
    (block,) = found.code
    at = placement.addresses[block]
    (instruction, *_) = decode_lite(written(placement, at, block.size), at)
    _, size, mnemonic, operands = instruction
    register = source.split("%")[-1]
    assert (mnemonic, operands.split(", ")[0]) == ("mov", register)
    cell = at + size + int.from_bytes(written(placement, at + size - 4, 4), "little", signed=True)
    bias = {"lea there(%rip), %r12": 0, "lea there+5(%rip), %rax": 5, "mov $there+16, %r9": 16}[source]
    assert written(placement, cell, 8) == (0x7FFF_0000_1000 + bias).to_bytes(8, "little")


@pytest.mark.parametrize(("room", "what"), [("code", "code"), ("read_only", "read-only data"), ("data", "data")])
def test_a_full_arena_is_refused_with_what_is_missing(tmp_path: Path, room: str, what: str) -> None:
    text = (
        'static int zeroed[64]; extern void use(const char *); int work(int n) { use("text"); return zeroed[n]++; }\n'
    )
    found = planned(compiled(tmp_path, text), lambda name: Bound(CODE))
    region = getattr(SPACE, room)
    small = replace(SPACE, **{room: replace(region, end=region.start + 3)})
    with pytest.raises(LinkError, match=f"more bytes of {what}") as caught:
        linked(found, small)
    assert caught.value.code == "arena-full"


def test_short_branches_between_functions_reach_from_anywhere(tmp_path: Path) -> None:
    source = tmp_path / "short.s"
    source.write_text(
        '.file "short.c"\n.text\n.type near, @function\nnear: ret\n.size near, 1\n'
        ".globl work\n.type work, @function\nwork: test %edi, %edi\n je near\n jmp after\n.size work, . - work\n"
        ".type after, @function\nafter: ret\n.size after, 1\n"
    )
    run("as", source, "-o", tmp_path / "short.o")
    blocks = Blocks(read_object(tmp_path / "short.o"))
    here = {"near": Bound(CODE + 0x100_0000), "after": Bound(CODE + 0x200_0000)}
    found = planned(blocks, lambda n: None, wanted=("work",), resident=lambda b: here.get(b.name))
    placement = linked(found, SPACE)
    ((start, data),) = ((s, d) for s, d in placement.writes if s < READ_ONLY)
    (work,) = found.code
    address = placement.addresses[work]
    body = data[address - start :]
    assert body[:2] == b"\x85\xff"
    reached = []
    for at in (2, 4):  # je rel8, jmp rel8
        stub = address + at + 2 + int.from_bytes(body[at + 1 : at + 2], "little", signed=True)
        assert data[stub - start] == 0xE9
        reached.append(stub + 5 + int.from_bytes(data[stub - start + 1 : stub - start + 5], "little", signed=True))
    assert reached == [here["near"].address, here["after"].address]


def test_a_field_beyond_its_block_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "end.s"
    source.write_text(
        '.file "end.c"\n.section .data.d,"aw"\n.type d, @object\n.size d, 4\nd: .long 0\n.reloc 0, R_X86_64_64, there\n'
        '.section .text.f,"ax"\n.globl f\n.type f, @function\nf: lea d(%rip), %rax\n ret\n.size f, . - f\n'
    )
    run("as", source, "-o", tmp_path / "end.o")
    found = planned(Blocks(read_object(tmp_path / "end.o")), lambda name: Bound(1))
    with pytest.raises(LinkError, match="reaches beyond the end of its block"):
        linked(found, SPACE)
