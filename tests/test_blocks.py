"""Objects cut into blocks: what the pieces are, and what each reference means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from living import UNIT, compile_text, run

from patcher.blocks import Absolute, Block, Blocks, External, Kind, Place, Reference
from patcher.elf import read_object
from patcher.elf.relocations import R
from patcher.errors import ObjectError

TEXT = r"""
#include <stdio.h>
extern int outside, array[];
int optional(void) __attribute__((weak));
int exported = 3, zeroed[4];
static int counter = 1;
static const int primes[5] = {2, 3, 5, 7, 11};
static const char *const words[3] = {"left", "right", "middle"};
static __thread int mine;
int adds(int n) { counter += 1; return n + primes[n]; }
int compares(void) { return outside == 77; }
int far_in(void) { return array[5]; }
const char *const *word(void) { return words; }
const char *tail(void) { return "a right"; }
double half(double x) { return x * 0.5; }
int cases(int n)
{
    switch (n) {
    case 0: return adds(1);
    case 1: return compares();
    case 2: return exported;
    case 3: return optional ? 1 : 2;
    case 4: return mine++;
    case 5: return zeroed[1];
    default: return 0;
    }
}
int same(int n) __attribute__((alias("adds")));
"""
STYLES = {
    "gcc": ("gcc", "-O1"),
    "gcc-sections": ("gcc", "-O1", *UNIT),
    "gcc-fixed": ("gcc", "-O2", "-fno-pie", *UNIT),
    "clang": ("clang", "-O1"),
    "clang-sections": ("clang", "-O2", *UNIT),
}


@pytest.fixture(scope="module", params=STYLES)
def blocks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Blocks:
    compiler, *flags = STYLES[request.param]
    folder = tmp_path_factory.mktemp("blocks")
    return Blocks(read_object(compile_text(TEXT, folder / "unit.o", *flags, compiler=compiler)))


def function(blocks: Blocks, name: str) -> Block:
    return next(b for b in blocks.functions if name in (s.name for s in b.symbols))


def targets(blocks: Blocks, name: str) -> list[Reference]:
    return list(blocks.references(function(blocks, name)))


def test_functions_are_blocks_with_all_their_names(blocks: Blocks) -> None:
    names = {b.name for b in blocks.functions}
    assert names >= {"compares", "far_in", "word", "tail", "half", "cases"}
    adds = function(blocks, "adds")
    assert {s.name for s in adds.symbols} == {"adds", "same"}
    assert adds.exported
    assert not adds.anonymous
    assert all(b.kind is Kind.CODE and len(b.data) == b.size for b in blocks.functions)


def test_variables_and_constants_are_blocks_of_their_kind(blocks: Blocks) -> None:
    found = {b.name.partition(".")[0]: b for b in blocks.data_blocks()}
    assert found["exported"].kind is Kind.DATA
    assert (found["exported"].data, found["exported"].size) == (b"\3\0\0\0", 4)
    assert found["zeroed"].zero
    assert found["zeroed"].size == 16
    assert found["primes"].kind is Kind.READ_ONLY
    assert found["words"].kind is Kind.READ_ONLY
    assert found["mine"].kind is Kind.THREAD_LOCAL
    assert not found["primes"].exported


def test_a_static_is_found_whatever_the_instruction_is(blocks: Blocks) -> None:
    # addl $1, counter(%rip) has a byte behind the field, and the section's symbol an addend of -5
    found = {r.target.block.name: r.target.offset for r in targets(blocks, "adds") if isinstance(r.target, Place)}
    assert found["counter"] == 0
    assert found["primes"] == 0


def test_externals_keep_their_addends(blocks: Blocks) -> None:
    (reference,) = (r for r in targets(blocks, "far_in") if r.target == External("array"))
    if reference.type in (R.PC32, R.A32S, R.A32):
        assert reference.addend == 20 - (4 if reference.type == R.PC32 else 0)
    assert External("optional", weak=True) in [r.target for r in targets(blocks, "cases")]


def test_strings_are_blocks_of_a_pool_and_tails_are_offsets(blocks: Blocks) -> None:
    table = next(b for b in blocks.data_blocks() if b.name.startswith("words"))
    strings = [r.target for r in blocks.references(table)]
    assert all(isinstance(s, Place) and s.block.string for s in strings)
    assert [s.block.data[s.offset :] for s in strings if isinstance(s, Place)] == [b"left\0", b"right\0", b"middle\0"]
    (tail,) = (r.target for r in targets(blocks, "tail"))
    assert isinstance(tail, Place)
    assert tail.block.data[tail.offset :] == b"a right\0"


def test_a_constant_of_a_pool_is_one_entry(blocks: Blocks) -> None:
    (half,) = (r.target for r in targets(blocks, "half"))
    assert isinstance(half, Place)
    assert half.block.data[half.offset : half.offset + 8] == bytes.fromhex("000000000000e03f")
    assert half.block.kind is Kind.READ_ONLY


def test_a_jump_table_is_a_block_whose_entries_point_into_the_function(blocks: Blocks) -> None:
    cases = function(blocks, "cases")
    tables = {
        r.target.block
        for r in blocks.references(cases)
        if isinstance(r.target, Place) and r.target.block.kind is Kind.READ_ONLY and r.target.block.anonymous
    }
    (table,) = tables
    entries = [r.target for r in blocks.references(table)]
    assert len(entries) >= 5
    assert all(isinstance(e, Place) and e.block is cases and 0 < e.offset < cases.size for e in entries)


def test_references_rise_and_stay_inside(blocks: Blocks) -> None:
    for block in (*blocks.functions, *blocks.data_blocks()):
        offsets = [r.offset for r in blocks.references(block)]
        assert offsets == sorted(offsets)
        assert all(0 <= offset < block.size for offset in offsets)
        assert blocks.references(block) is blocks.references(block), "worked out once"


def test_every_byte_of_a_section_is_in_one_block(blocks: Blocks) -> None:
    for index, section in blocks.object.sections.items():
        if section.code or section.mergeable or not section.size or section.name.startswith((".note", ".eh_frame")):
            continue
        offset = 0
        while offset < section.size:
            place = blocks.at(index, offset)
            assert (place.offset, place.block.start) == (0, offset)
            offset += place.block.size
        assert offset == section.size


def test_a_place_outside_its_section_is_refused(blocks: Blocks) -> None:
    index = next(i for i, s in blocks.object.sections.items() if s.strings)
    with pytest.raises(ObjectError, match="outside its"):
        blocks.at(index, 1 << 20)
    with pytest.raises(ObjectError, match="not loaded"):
        blocks.at(60_000, 0)


def test_commons_are_zeroed_data(tmp_path: Path) -> None:
    blocks = Blocks(read_object(compile_text("double shared[3]; double *get(void) { return shared; }\n",
                                             tmp_path / "unit.o", "-O1", "-fcommon")))  # fmt: skip
    (shared,) = blocks.data_blocks()
    assert (shared.kind, shared.size, shared.zero) == (Kind.DATA, 24, True)
    assert shared.alignment >= 8


def assembled(folder: Path, text: str) -> Blocks:
    (folder / "unit.s").write_text(f'.file "unit.c"\n{text}')
    run("as", folder / "unit.s", "-o", folder / "unit.o")
    return Blocks(read_object(folder / "unit.o"))


def test_what_an_assembler_resolved_is_a_reference_again(tmp_path: Path) -> None:
    blocks = assembled(
        tmp_path,
        ".text\n.type near, @function\nnear: ret\n.size near, 1\n.globl f\n.type f, @function\n"
        "f: call near\n lea near(%rip), %rax\n je near\n jmp 1f\n1: ret\n.size f, . - f\n",
    )
    found = targets(blocks, "f")
    assert [(r.type, r.target.block.name, r.addend) for r in found if isinstance(r.target, Place)] == [
        (R.PLT32, "near", -4),
        (R.PC32, "near", -4),
        (R.PC8, "near", -1),
    ]
    assert blocks.relocations(function(blocks, "f")) is None, "they are not all relocations"
    linkable = blocks.linkable(function(blocks, "f"))
    assert linkable.lead == 5
    assert linkable.data[:1] == b"\xe9"
    assert [r.type for r in linkable.references] == [R.PLT32, R.PLT32, R.PC32]


@pytest.mark.parametrize(
    ("instruction", "offset", "behind"),
    [
        ("addl $1, here(%rip)", 2, 1),
        ("movl $70000, here(%rip)", 2, 4),
        ("movw $700, here(%rip)", 3, 2),
        ("cmpb $3, here(%rip)", 2, 1),
        ("mov here(%rip), %rax", 3, 0),
        ("pshufd $3, here(%rip), %xmm1", 4, 1),
        ("vpermilps $3, here(%rip), %ymm1", 5, 1),
        ("imul $9, here(%rip), %ecx", 2, 1),
    ],
)
def test_immediates_behind_a_field_do_not_move_what_it_means(
    tmp_path: Path, instruction: str, offset: int, behind: int
) -> None:
    text = '.section .data.d,"aw"\n.quad 5\nhere: .quad 6\n.section .text.f,"ax"\n.globl f\n.type f, @function\n'
    blocks = assembled(tmp_path, f"{text}f: {instruction}\n {instruction}\n ret\n.size f, . - f\n")
    found = targets(blocks, "f")
    assert len(found) == 2
    for reference in found:
        assert isinstance(reference.target, Place)
        assert reference.target.block.start + reference.target.offset == 8
        assert reference.addend == -4 - behind
    assert found[0].offset == offset


def test_absolute_symbols_are_values(tmp_path: Path) -> None:
    blocks = assembled(tmp_path, ".globl f\n.type f, @function\n.set fixed, 0x1234\n.globl fixed\nf: mov $fixed, %eax\n"
                                 " movabs $fixed, %rax\n ret\n.size f, . - f\n")  # fmt: skip
    assert {r.target for r in targets(blocks, "f")} <= {Absolute(0x1234)}


def test_references_without_relocations_are_found_far_from_the_start_of_a_section(tmp_path: Path) -> None:
    source = tmp_path / "far.s"
    functions = ["first", "second", "third"]
    bodies = [
        f".type {f}, @function\n{f}: call {g}\nret\n.size {f}, .-{f}\n.skip 100000, 0x90\n"
        for f, g in zip(functions, [*functions[1:], "first"], strict=True)
    ]
    source.write_text("".join(bodies))
    run("as", source, "-o", tmp_path / "far.o")
    blocks = Blocks(read_object(tmp_path / "far.o"))
    first, second, third = (function(blocks, name) for name in functions)
    assert blocks.object.relocation_rows.offset.tolist() == []
    for block, target in ((first, second), (second, third), (third, first)):
        assert blocks.references(block) == (Reference(1, R.PLT32, Place(target, 0), -4),)
        assert blocks.fields([block]).reference(blocks, 0) == blocks.references(block)[0]
    assert blocks.fields([third, first]).owner.tolist() == [0, 1]


@pytest.mark.parametrize("asked", [False, True])
def test_homes_are_where_targets_are(blocks: Blocks, asked: bool) -> None:
    # Asked for all at once, before and after somebody asked for each.
    fresh = Blocks(blocks.object)
    numbers = np.unique(fresh.fields(fresh.functions).target)
    if asked:
        for number in numbers.tolist():
            fresh.target(number)
    homes, offsets = fresh.homes(numbers)
    plain = 0
    for number, home, offset in zip(numbers.tolist(), homes.tolist(), offsets.tolist(), strict=True):
        target = fresh.target(number)
        if home >= 0:
            assert (fresh.block(home), offset) == target
        if isinstance(target, Place) and target.block.kind in (Kind.CODE, Kind.DATA):
            assert home >= 0
            plain += 1
        elif not isinstance(target, Place) or target.block.kind is Kind.THREAD_LOCAL:
            assert home == -1
    assert plain > 2
    assert (homes == -1).any()


FUNCTIONS = r"""
.section .text.many, "ax"
nop
.globl first, again, second
.type first, @function
.type again, @function
.type second, @function
first: again: ret
.size first, 1
.skip 7
.size again, 4
second: ret
.skip 3
.type end, @function
end:
.section .text.label, "ax"
ret
label: ret
.section .text.two, "ax"
.type early, @function
.type late, @function
early: ret
ret
.size early, 1
late:
"""


def test_functions_end_where_their_longest_symbol_says(tmp_path: Path) -> None:
    blocks = assembled(tmp_path, FUNCTIONS)
    extents = {
        (b.object.sections[b.section].name, b.start, b.size): tuple(s.name for s in b.symbols) for b in blocks.functions
    }
    assert extents == {
        (".text.many", 1, 4): ("first", "again"),
        (".text.many", 9, 4): ("second",),  # has no size
        (".text.label", 0, 2): ("label",),  # no function at all
        (".text.two", 0, 2): ("early", "late"),  # nothing else starts in it
    }


OVERLAPPING = r"""
.data
.globl whole, inner, half
.type whole, @object
.type inner, @object
.type half, @object
.size whole, 8
whole: .long 1
inner: .long 2
.size inner, 4
half: .long 3
.size half, 2
note:
.long 4
"""


def test_what_a_variable_covers_is_not_cut(tmp_path: Path) -> None:
    blocks = assembled(tmp_path, OVERLAPPING)
    found = {(b.start, b.size): tuple(s.name for s in b.symbols) for b in blocks.data_blocks()}
    assert found == {(0, 8): ("whole",), (8, 2): ("half",), (12, 4): ("note",)}
    index = next(iter(blocks.data_blocks())).section
    assert (blocks.at(index, 4).offset, blocks.at(index, 10).block.size) == (4, 2)


# --- what shares a section ---

STRINGS = r"""
.text
.globl f
.type f, @function
f:  lea .Ltail(%rip), %rax
    lea .Lwhole(%rip), %rax
    lea .Lnext(%rip), %rax
    lea .Lwide+4(%rip), %rax
    lea .Lwide(%rip), %rax
    ret
.size f, . - f
.section .rodata,"a"
.balign 16
.type named, @object
.size named, 4
named: .long 1
.Lwhole: .ascii "num"
.Ltail: .string "erals"
.Lnext: .string "nextone"
.balign 4
.Lwide: .long 'a', 'b', 0
"""


def test_a_string_is_not_cut_where_its_tail_is_used(tmp_path: Path) -> None:
    blocks = assembled(tmp_path, STRINGS)
    tail, whole, following, wide_tail, wide = (place_of(r) for r in targets(blocks, "f"))
    assert tail.block is whole.block
    assert (tail.offset, whole.offset) == (3, 0)
    assert tail.block.data == b"numerals\0"
    assert wide_tail.block is wide.block
    assert (wide_tail.offset, wide.offset) == (4, 0)
    assert following.block.data.rstrip(b"\0") == b"nextone"
    assert following.offset == 0
    assert [b.name for b in blocks.run(tail.block)] == [".rodata+0x4", ".rodata+0xd", ".rodata+0x18"]
    named = next(b for b in blocks.data_blocks() if b.name == "named")
    assert blocks.run(named) == (named,)


def place_of(reference: Reference) -> Place:
    assert isinstance(reference.target, Place)
    return reference.target


SHARED = r"""
.text
.globl f
.type f, @function
f:  %s
    ret
.size f, . - f
.data
.type one, @object
.size one, 8
one: .quad 1
.type two, @object
.size two, 8
two: .quad 2
.type three, @object
.size three, 8
three: .quad 3
"""


@pytest.mark.parametrize(
    ("instruction", "doubtful"),
    {
        "mov two(%rip), %rax": [],
        "addl $1, two(%rip)": [],
        "lea one(%rip), %rax": [],
        "lea two+4(%rip), %rax": [],
        "lea two(%rip), %rax": [("one", "two")],
        "mov $two, %eax": [("one", "two")],
        "movabs $two+4, %rax": [],
        "mov two(,%rdi,8), %rax": [("one", "two"), ("two", "three")],
        "mov three-4(,%rdi,8), %rax": [("one", "two"), ("two", "three")],
    }.items(),
    ids=str,
)
def test_which_of_two_neighbours_an_address_is_about_is_a_doubt(
    tmp_path: Path, instruction: str, doubtful: list[tuple[str, str]]
) -> None:
    blocks = assembled(tmp_path, SHARED % instruction)
    f = function(blocks, "f")
    blocks.fields([f])
    assert [(d.first.name, d.second.name) for d in blocks.doubts(f)] == doubtful


def test_a_variable_s_own_symbol_leaves_no_doubt(tmp_path: Path) -> None:
    blocks = assembled(tmp_path, SHARED % "lea two(%rip), %rax" + ".globl two\n")
    f = function(blocks, "f")
    blocks.fields([f])
    assert blocks.doubts(f) == ()


TABLE = r"""
.text
.globl f
.type f, @function
f:  lea .Ltable(%%rip), %%rdx
    movslq (%%rdx,%%rdi,4), %%rax
    add %%rdx, %%rax
    jmp *%%rax
.Lcase:
    %s
    ret
.size f, . - f
.section .rodata,"a"
.type sizes, @object
.size sizes, 8
sizes: .long 3, 1
.Ltable: .long .Lcase - .Ltable, .Lcase - .Ltable
"""


def test_a_jump_table_behind_an_array_is_no_array_s_end(tmp_path: Path) -> None:
    for instruction, doubtful in (("nop", 0), ("lea sizes+8(%rip), %rax", 2)):
        blocks = assembled(tmp_path, TABLE % instruction)
        f = function(blocks, "f")
        blocks.fields([f])
        assert len(blocks.doubts(f)) == doubtful
