"""What has to be placed, what is bound, and which names nobody defines."""

from __future__ import annotations

from pathlib import Path

import pytest
from living import UNIT, compile_text, run

from link.linking import planned, spaces
from patcher.blocks import Block, Blocks, Kind
from patcher.elf import read_object
from patcher.errors import LinkError, UnresolvedSymbol
from patcher.link.place import lay_out
from patcher.link.plan import Bound, Plan, Unit, plan

TEXT = r"""
#include <stdio.h>
extern int maybe(void) __attribute__((weak));
static int counter, unused;
static const char *const words[2] = {"left", "right"};
static __attribute__((noinline)) int inner(int n) { return n * counter++; }
static __attribute__((noinline)) int outer(int n) { return inner(n) + words[n][0]; }
int work(int n) { return outer(n) + (maybe ? maybe() : 0); }
int other(int n) { return n + unused++; }
int prints(void) { return puts("text"); }
__thread int mine;
int threads(void) { return mine++; }
"""


@pytest.fixture
def blocks(tmp_path: Path) -> Blocks:
    return Blocks(read_object(compile_text(TEXT, tmp_path / "unit.o", "-O1", "-fPIE", *UNIT)))


def names(blocks: tuple[Block, ...]) -> set[str]:
    return {b.name for b in blocks if b.symbols}


def nowhere(name: str) -> Bound | None:
    return None


def test_what_is_wanted_brings_what_it_needs_and_nothing_else(blocks: Blocks) -> None:
    found = planned(blocks, nowhere, wanted=("work",))
    assert names(found.code) == {"work", "outer", "inner"}
    assert names(found.read_only) == {"words"}
    assert {b.data for b in found.read_only if b.string} == {b"left\0", b"right\0"}
    assert names(found.data) == {"counter"}


def test_what_the_process_has_is_bound_and_not_followed(blocks: Blocks) -> None:
    here = {"outer": Bound(0x1000), "counter": Bound(0x2000)}
    found = planned(blocks, nowhere, wanted=("work",), resident=lambda b: here.get(b.name))
    assert names(found.code) == {"work"}
    assert found.read_only == found.data == ()
    assert {b.name: bound.address for b, bound in found.bound.items()} == {"outer": 0x1000}


def test_a_name_that_is_nowhere_is_refused_with_who_wants_it(blocks: Blocks) -> None:
    with pytest.raises(UnresolvedSymbol) as caught:
        planned(blocks, nowhere, wanted=("prints",))
    for part in ("`puts`", "`prints`", "unit.o", ".text.prints+0x"):
        assert part in caught.value.message
    assert caught.value.hint


def test_a_weak_name_that_is_nowhere_is_zero(blocks: Blocks) -> None:
    found = planned(blocks, nowhere, wanted=("work",))
    assert {name: bound for (_, name), bound in found.externals.items()} == {"maybe": Bound(0)}


def test_a_new_thread_local_is_refused_and_a_live_one_bound(blocks: Blocks) -> None:
    with pytest.raises(LinkError, match="`threads` uses the new thread-local variable `mine`") as caught:
        planned(blocks, nowhere, wanted=("threads",))
    assert caught.value.code == "new-thread-local"
    here = {"mine": Bound(-16, thread_local=True)}
    found = planned(blocks, nowhere, wanted=("threads",), resident=lambda b: here.get(b.name))
    assert [b.kind for b in found.bound] == [Kind.THREAD_LOCAL]


def test_doors_are_the_placed_functions_that_are_entered_through_an_island(blocks: Blocks) -> None:
    found = planned(blocks, nowhere, wanted=("work",), doors=lambda b: b.exported)
    assert {b.name for b in found.doors} == {"work"}


def two_units(folder: Path) -> tuple[Unit, Unit]:
    texts = ("extern int born(int); int caller(int n) { return born(n); }\n", "int born(int n) { return n * 2; }\n")
    found = [Blocks(read_object(compile_text(text, folder / f"{i}.o", "-O1", *UNIT))) for i, text in enumerate(texts)]
    left, right = (
        Unit(b, (b.functions if i == 0 else ()), lambda b: None, lambda b: True) for i, b in enumerate(found)
    )
    return left, right


def test_another_object_of_the_generation_brings_a_definition(tmp_path: Path) -> None:
    left, right = two_units(tmp_path)
    (born,) = right.blocks.functions
    found: Plan = plan([left, right], lambda b, e: None, lambda name: (right, born) if name == "born" else None)
    assert names(found.code) == {"caller", "born"}
    assert found.externals[left.blocks, "born"] is born
    assert {g.source: [b.name for b in g.members] for g in found.groups}[right.blocks] == ["born"]


# --- what shares a section ---

SHARED = """
.globl f
.type f, @function
f:  lea two(%rip), %rax
    ret
.size f, . - f
.data
.balign 16
.type one, @object
.size one, 8
one: .quad 1
.type two, @object
.size two, 8
two: .quad 2
"""


def shared(folder: Path) -> Blocks:
    (folder / "unit.s").write_text(SHARED)
    run("as", folder / "unit.s", "-o", folder / "unit.o")
    return Blocks(read_object(folder / "unit.o"))


def test_neighbours_that_are_both_new_stay_neighbours(tmp_path: Path) -> None:
    found = planned(shared(tmp_path), nowhere)
    layout = lay_out(found, spaces(0x10000, 0x20000, 0x30003))
    at = {block.name: address for block, address in layout.addresses.items()}
    assert at["two"] == at["one"] + 8
    assert at["one"] % 16 == 0


def test_neighbours_that_the_process_has_side_by_side_are_bound(tmp_path: Path) -> None:
    here = {"one": Bound(0x1000), "two": Bound(0x1008)}
    found = planned(shared(tmp_path), nowhere, resident=lambda b: here.get(b.name))
    assert {b.name: bound.address for b, bound in found.bound.items()} == {"two": 0x1008}
    assert found.data == ()


@pytest.mark.parametrize(
    "here", [{"one": Bound(0x1000), "two": Bound(0x1010)}, {"one": Bound(0x1000)}, {"two": Bound(0x1008)}]
)
def test_an_address_that_may_be_about_either_neighbour_is_refused(tmp_path: Path, here: dict[str, Bound]) -> None:
    with pytest.raises(LinkError) as caught:
        planned(shared(tmp_path), nowhere, resident=lambda b: here.get(b.name))
    assert caught.value.code == "ambiguous-reference"
    for part in ("`one`", "`two`", "`f`", "unit.o"):
        assert part in caught.value.message
    assert "-fdata-sections" in caught.value.hint


GAP = """
.globl f
.type f, @function
f:  lea two-16(%rip), %rax
    lea two(%rip), %rcx
    ret
.size f, . - f
.data
.balign 32
.type one, @object
.size one, 8
one: .quad 1
.balign 32
.type two, @object
.size two, 8
two: .quad 2
"""


@pytest.mark.parametrize(
    ("here", "gap"), [({"one": 0x1000, "two": 0x1020}, 0x1010), ({}, None), ({"one": 0x1000, "two": 0x2000}, "refused")]
)
@pytest.mark.parametrize("section", [".data", ".bss"])
def test_an_address_in_a_gap_is_about_what_lies_around(
    tmp_path: Path, section: str, here: dict[str, int], gap: int | str | None
) -> None:
    """Loops count from an element before the first one."""
    text = (
        GAP
        if section == ".data"
        else GAP.replace(".data", ".bss").replace(".quad 1", ".zero 8").replace(".quad 2", ".zero 8")
    )
    (tmp_path / "unit.s").write_text(text)
    run("as", tmp_path / "unit.s", "-o", tmp_path / "unit.o")
    blocks = Blocks(read_object(tmp_path / "unit.o"))
    if gap == "refused":
        with pytest.raises(LinkError, match="may be about"):
            planned(blocks, nowhere, resident=lambda b: Bound(here[b.name]) if b.name in here else None)
        return
    found = planned(blocks, nowhere, resident=lambda b: Bound(here[b.name]) if b.name in here else None)
    if here:
        assert sorted(bound.address for bound in found.bound.values()) == [gap, here["two"]]
        return
    layout = lay_out(found, spaces(0x10000, 0x20000, 0x30003))
    starts = {b.start: address for b, address in layout.addresses.items() if b in found.data}
    assert starts[0x20] == starts[0x10] + 0x10 == starts[0] + 0x20


def test_nameless_constants_are_placed_as_they_lie(tmp_path: Path) -> None:
    (tmp_path / "unit.s").write_text(
        ".globl f\n.type f, @function\nf: lea .Lb(%rip), %rax\nmov .Lc(%rip), %rax\nret\n.size f, . - f\n"
        '.section .rodata,"a"\n.balign 16\n.type named, @object\n.size named, 4\nnamed: .long 7\n'
        ".La: .quad 0\n.Lb: .long 0\n.Lc: .quad 5, 6\n"
    )
    run("as", tmp_path / "unit.s", "-o", tmp_path / "unit.o")
    found = planned(Blocks(read_object(tmp_path / "unit.o")), nowhere)
    layout = lay_out(found, spaces(0x10000, 0x20001, 0x30000))
    at = {block.name: address for block, address in layout.addresses.items() if block.kind is Kind.READ_ONLY}
    assert {name: address - at[".rodata+0x4"] for name, address in at.items()} == {
        ".rodata+0x4": 0,
        ".rodata+0xc": 8,
        ".rodata+0x10": 12,
    }
    assert at[".rodata+0x10"] % 16 == 0
