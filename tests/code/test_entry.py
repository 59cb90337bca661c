"""Entries: which can be detoured, and that displaced copies do what the original did."""

from __future__ import annotations

import itertools
import struct
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from capstone import CS_ARCH_X86, CS_MODE_64, Cs
from conftest import Build, Function, named_functions
from hypothesis import given, settings
from hypothesis import strategies as st

from patcher.code import entry
from patcher.code.entry import (
    COPY_SIZE,
    DETOUR_SIZE,
    FAR_JUMP_SIZE,
    ISLAND_SIZE,
    SWITCH_CELLS,
    SWITCH_SIZE,
    Displaced,
    NotDetourable,
    detour,
    displaced_copy,
    far_jump,
    island,
    plan_entry,
    switch,
)
from patcher.code.instructions import Instruction, Kind, decode_lite, decode_start, lite_target
from patcher.errors import RelocationOverflow

AREA, FLAGS = 0x60000000, 0x70000000  # as in patched_run.c
ENTRY = 0x401000
NEAR, FAR = ENTRY + 0x20000000, ENTRY + (1 << 40)


def plan(code: str, following: str = "", **more: object) -> Displaced:
    raw = bytes.fromhex(code)
    return plan_entry("f", raw, ENTRY, len(raw), bytes.fromhex(following), **more)  # type: ignore[arg-type]


def copied(code: str, following: str = "", at: int = NEAR) -> bytes:
    return displaced_copy(plan(code, following), bytes.fromhex(code), ENTRY, at)


# --- what can be detoured ---


def test_whole_instructions_are_displaced() -> None:
    assert plan("55 48 89 e5 53 c3") == Displaced("f", 5, 5, frozenset({0, 1, 4}))  # push; mov; push; ret
    assert plan("f3 0f 1e fa 48 83 ec 08 c3").length == 8  # endbr64; sub $8, %rsp


def test_short_function_takes_padding() -> None:
    assert plan("31 c0 c3", "66 90") == Displaced("f", 5, 3, frozenset({0, 2}))  # xor; ret | xchg %ax, %ax
    assert plan("c3", "66 2e 0f 1f 84 00 00 00 00 00").copied == 1  # the nop is longer than what is needed
    assert plan("eb 10", "cc cc cc").length == DETOUR_SIZE


@pytest.mark.parametrize(
    ("code", "following", "found"),
    [
        ("31 c0 c3", "90", "3 bytes, followed by 90"),
        ("31 c0 c3", "00 00", "which is not padding"),
        ("31 c0 c3", "90 55", "followed by 90 55"),
        ("31 c0", "90 90 90", "goes on into what follows"),
        ("", "90 90 90 90 90", "no instructions"),
        ("06 90 90 90 90", "", "no instruction at 0x401000"),  # push %es: not in 64-bit mode
        ("90 90 90 48", "", "no instruction at 0x401003"),
        ("31 c0 ff c8 90 c3 eb fa", "", "branches into these bytes"),  # jmp f+2
        ("31 c0 ff c8 90 c3 75 fb", "", "branches into these bytes"),  # jne f+3, inside an instruction
        ("31 c0 ff c8 90 c3 e2 fa", "", "branches into these bytes"),  # loop f+2
        ("31 c0 ff c8 90 c3 e3 fa", "", "branches into these bytes"),  # jrcxz f+2
        ("31 c0 ff c8 90 c3 0f 84 f6 ff ff ff", "", "je 0x401002 at offset 6"),
        ("31 c0 ff c8 90 c3 e8 f7 ff ff ff", "", "call 0x401002"),
        ("31 c0 ff c8 90 c3 48 8d 05 f5 ff ff ff", "", "refers into these bytes"),  # lea f+2(%rip)
        ("31 c0 ff c8 90 c3 c6 05 f5 ff ff ff 90", "", "refers into these bytes"),  # movb $0x90, f+2(%rip)
        ("ff d0 5b 90 90 c3", "", "call rax at offset 0 returns into the overwritten bytes, at offset 2"),
        ("53 ff 57 08 5b c3", "", "returns into the overwritten bytes, at offset 4"),  # push; call *8(%rdi)
        ("31 c0 75 01 48 89 c3 c3", "", "branches into an instruction"),
        ("66 e9 00 00 00 00 00", "", "cannot be moved"),  # 16 or 32 bits of displacement
        ("c7 f8 00 00 00 00", "", "cannot be moved"),  # xbegin
        ("67 8b 05 00 00 00 00", "", "cannot be moved"),  # mov (%eip), %eax
        ("48 8d 05 fb ff ff ff c3", "", "refers to the overwritten bytes"),  # lea f+2(%rip)
        ("31 c0 ff c8 90 c3 06 eb f9", "", "no telling whether it branches there"),
    ],
)
def test_refused_with_the_reason(code: str, following: str, found: str) -> None:
    with pytest.raises(NotDetourable, match=r"entry of f at 0x401000 .*") as error:
        plan(code, following)
    assert found in error.value.message
    assert error.value.code == "entry"
    assert error.value.hint


def test_an_address_that_only_leads_to_the_offset_table_may_be_taken_there() -> None:
    # push %rbp; mov %rsp, %rbp; label: lea label(%rip), %rax; movabs $table-label, %rcx; ret
    code = "55 48 89 e5 48 8d 05 f9 ff ff ff 48 b9 fc 2f 00 00 00 00 00 00 c3"
    assert plan(code, table=ENTRY + 0x3000).length == 11
    for table in (None, ENTRY + 0x3001):
        with pytest.raises(NotDetourable, match="refers to the overwritten bytes"):
            plan(code, table=table)


def test_jump_back_to_the_entry_is_reported() -> None:
    assert plan("31 c0 ff c8 90 c3 eb f8").reentries == (6,)
    assert plan("31 c0 ff c8 90 c3 e8 f5 ff ff ff").reentries == ()  # recursion is a new call


def test_sibling_is_searched() -> None:
    body, cold = "31 c0 ff c8 90 c3", ENTRY + 0x1000
    back = detour(cold, ENTRY + 2)
    with pytest.raises(NotDetourable, match="jmp 0x401002 at offset 4096 branches into"):
        plan(body, siblings=[(cold, back)])
    assert plan(body, siblings=[(cold, detour(cold, ENTRY))]).reentries == (0x1000,)
    assert plan(body, siblings=[(cold, detour(cold, ENTRY + 5))]).reentries == ()


def test_other_entrances_are_heeded() -> None:
    assert plan("31 c0 ff c8 90 c3", entered=[0, 5]).length == 5
    with pytest.raises(NotDetourable, match="may enter at offset 2 "):
        plan("31 c0 ff c8 90 c3", entered=[0, 4, 2])


def test_nearly_all_of_the_c_library_can_be_detoured(libc_functions: tuple[Function, ...]) -> None:
    refused = []
    for f in libc_functions:
        try:
            plan_entry(f.name, f.code, f.address, len(f.code), f.following, f.siblings)
        except NotDetourable as error:
            refused.append(error.message)
    assert len(libc_functions) > 1000
    assert len(refused) <= len(libc_functions) * 0.015, refused


# --- copies: the same meaning, by decoding ---


def test_plain_instructions_are_copied_and_jump_back() -> None:
    assert copied("55 48 89 e5 53 c3") == bytes.fromhex("55 48 89 e5 53") + detour(NEAR + 5, ENTRY + 5)
    back = b"\xff\x25\0\0\0\0" + (ENTRY + 5).to_bytes(8, "little")
    assert copied("55 48 89 e5 53 c3", at=FAR) == bytes.fromhex("55 48 89 e5 53") + back


def test_nothing_follows_where_control_does_not_go_on() -> None:
    assert copied("31 c0 c3", "90 90") == bytes.fromhex("31 c0 c3")
    assert copied("0f 0b", "90 90 90") == bytes.fromhex("0f 0b")


def test_operand_out_of_reach_is_refused() -> None:
    with pytest.raises(NotDetourable, match=r"mov rax, qword ptr \[rip \+ 0x10\] refers to 0x401017, out of reach"):
        copied("48 8b 05 10 00 00 00", at=FAR)


def test_copies_mean_what_the_original_does(unwound_functions: tuple[Function, ...]) -> None:
    checked = 0
    for f in unwound_functions:
        for at in (f.address + 0x30000000, f.address - 0x1234567, f.address + (1 << 33)):
            try:
                plan = plan_entry(f.name, f.code, f.address, len(f.code), f.following)
                code = displaced_copy(plan, f.code, f.address, at)
            except NotDetourable:
                continue
            checked += 1
            _assert_same_meaning(plan, f, code, at)
    assert checked > len(unwound_functions) * 2


def copy_positions(plan: Displaced, code: bytes, address: int, at: int) -> tuple[tuple[int, int], ...]:
    """Return, for each displaced instruction, its offset in the function and its offset in the copy."""
    return tuple(entry._copy(plan, code, address, at).positions.items())


def _assert_same_meaning(plan: Displaced, f: Function, code: bytes, at: int) -> None:
    positions = dict(copy_positions(plan, f.code, f.address, at))
    original = decode_start(f.code[: plan.copied], f.address, plan.copied)
    assert tuple(positions) == tuple(i.offset for i in original)
    assert len(code) <= COPY_SIZE
    inside = {f.address + offset: at + position for offset, position in positions.items()}
    for i, end in zip(original, [*list(positions.values())[1:], None], strict=True):
        piece = code[positions[i.offset] : end]
        assert _meaning(piece, at + positions[i.offset], i) == _expected(i, f.address, inside, plan, end is None), (
            f,
            i,
        )


def _expected(i: Instruction, address: int, inside: dict[int, int], plan: Displaced, is_last: bool) -> list[object]:
    target = inside.get(i.target or 0, i.target)
    on = [("jmp", address + plan.length)] if is_last and i.falls_through and i.kind is not Kind.CALL else []
    if i.kind is Kind.CALL:
        return [("return to", address + i.end), ("jmp", target or i.reference or i.operands)]
    if i.kind is Kind.JUMP and i.target is not None:
        return [("jmp", target)]
    if i.target is not None:
        return [(i.mnemonic, target), *on]
    return [(i.mnemonic, i.operands if i.reference is None else i.reference), *on]


def _meaning(piece: bytes, at: int, original: Instruction) -> list[object]:
    """Read a piece of a copy back: pushes of a return address, jumps of all lengths, inverted branches."""
    if piece.startswith(b"\x68") and original.kind is Kind.CALL:
        assert piece[5:9] == bytes.fromhex("c7 44 24 04")
        back = int.from_bytes(piece[1:5] + piece[9:13], "little")
        return [("return to", back), *_meaning(piece[13:], at + 13, original)]
    found: list[object] = []
    steps = list(_steps(piece, at))
    while steps:
        here, name, pointed = steps.pop(0)
        following = [step[0] for step in steps] + [at + len(piece)]
        if name in INVERSE and len(steps) >= 1 and pointed == following[1] and original.mnemonic == INVERSE[name]:
            name, pointed = INVERSE[name], steps.pop(0)[2]  # jncc over a jump
        elif name.startswith(LOOPS):
            assert (pointed, steps[0][1:]) == (following[1], ("jmp", following[2])), here
            pointed = steps[1][2]
            del steps[:2]
        found.append((name, pointed))
    return found


LOOPS = ("loop", "jrcxz", "jecxz")
INVERSE = dict(
    zip(
        ["jo", "jno", "jb", "jae", "je", "jne", "jbe", "ja", "js", "jns", "jp", "jnp", "jl", "jge", "jle", "jg"],
        ["jno", "jo", "jae", "jb", "jne", "je", "ja", "jbe", "jns", "js", "jnp", "jp", "jge", "jl", "jg", "jle"],
        strict=True,
    )
)


def _steps(piece: bytes, at: int) -> Iterator[tuple[int, str, object]]:
    """Yield (address, mnemonic, what it points to or its operands); a far jump and its eight bytes are one jmp."""
    offset = 0
    while offset < len(piece):
        i = decode_start(piece[offset:], at + offset, 1)[0]
        if i.raw == b"\xff\x25\0\0\0\0":
            yield at + offset, "jmp", int.from_bytes(piece[offset + 6 : offset + 14], "little")
            offset += 14
            continue
        pointed = i.target if i.target is not None else i.reference
        yield at + offset, i.mnemonic, i.operands if pointed is None else pointed
        offset += i.size


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "75 20",
                "e2 20",
                "e3 20",
                "67 e3 20",
                "0f 84 00 10 00 00",
                "eb 20",
                "e8 00 10 00 00",
                "ff d0",
                "ff 54 24 08",
                "ff 94 24 08 00 00 00",
                "41 ff 94 24 00 01 00 00",
                "90",
                "48 8b 05 00 10 00 00",
                "c3",
                "66 c7 05 00 10 00 00 34 12",
                "48 b8 11 22 33 44 55 66 77 88",
                "64 ff 14 25 10 00 00 00",
            ]
        ),
        min_size=5,
        max_size=8,
    ),
    st.sampled_from([NEAR, FAR, ENTRY - 0x1000, ENTRY + 5 + (1 << 31), ENTRY + 60 + (1 << 31)]),
)
def test_copies_decode_and_stay_within_the_size(pieces: list[str], at: int) -> None:
    code = " ".join(pieces) + " c3" * 0x30
    try:
        copy = copied(code, at=at)
    except NotDetourable:
        return
    assert len(copy) <= COPY_SIZE
    positions = copy_positions(plan(code), bytes.fromhex(code), ENTRY, at)
    for (_, here), (_, there) in itertools.pairwise(positions):
        assert there > here


def test_worst_case_fits() -> None:
    assert len(copied("e3 20 e2 20 ff 94 24 00 01 00 00" + " c3" * 0x30, at=FAR)) <= COPY_SIZE
    assert len(copied("e3 20 e2 20 e1 20" + " c3" * 0x30, at=FAR)) <= COPY_SIZE


# --- copies: really executed ---


def _branch_targets(f: Function) -> set[int]:
    targets = (lite_target(instruction) for instruction in decode_lite(f.code, f.address))
    return {target for target in targets if target is not None}


def _run_patched(program: Path, patches: Path, functions: Iterable[Function]) -> tuple[str, int, int]:
    """Run a program with its entries detoured; return its output, and how many entries were patched and entered.

    A detour goes to `movb $1, flag(%rip)` (no register, no flags) and the displaced copy after it.
    """
    functions, records, patched = list(functions), bytearray(), 0
    outside = {t for f in functions for t in _branch_targets(f) if not f.contains(t)}
    for f in functions:
        door = AREA + patched * 128
        entered = [n for n in range(1, DETOUR_SIZE) if f.address + n in outside]
        try:
            plan = plan_entry(f.name, f.code, f.address, len(f.code), f.following, f.siblings, entered=entered)
        except NotDetourable:
            continue
        copy = displaced_copy(plan, f.code, f.address, door + 7)
        flag = b"\xc6\x05" + (FLAGS + patched - door - 7).to_bytes(4, "little", signed=True) + b"\x01"
        for address, data in ((door, flag + copy), (f.address, detour(f.address, door))):
            records += struct.pack("<QI", address, len(data)) + data
        patched += 1
    patches.write_bytes(records)
    done = subprocess.run([program, patches], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, (done.returncode, done.stdout[-300:], done.stderr)
    return done.stdout, patched, int(done.stderr)


def _output(program: Path) -> str:
    return subprocess.run([program], check=True, capture_output=True, text=True, timeout=20).stdout


STATIC = ("-static", "-no-pie", "-Wl,-z,norelro", "-Wno-free-nonheap-object")


def test_every_special_entry_runs_the_same(build: Build, tmp_path: Path) -> None:
    program = build("entries", ["patched_run.c", "entries.c", "entries.S"], "-O1", *STATIC)
    expected = _output(program)
    names = {line.split()[0] for line in expected.splitlines()}
    functions = [f for f in named_functions(program) if f.name in names]
    output, patched, entered = _run_patched(program, tmp_path / "patches", functions)
    assert output == expected
    assert len(names) >= 70
    assert patched == entered == len(names)


@pytest.mark.parametrize(
    ("compiler", "level"),
    [("gcc", "-O0"), ("gcc", "-O2"), ("gcc", "-O3"), ("gcc", "-Os"), ("clang", "-O1"), ("clang", "-Os")],
)
def test_a_program_and_its_c_library_run_the_same(build: Build, tmp_path: Path, compiler: str, level: str) -> None:
    """Every function of a static program is detoured: the C library's, start-up code included."""
    name = f"corpus{compiler}{level}"
    program = build(name, ["patched_run.c", "corpus.c"], level, *STATIC, compiler=compiler)
    functions = [f for f in named_functions(program) if f.name not in ("main", "apply")]
    apart = [f for f, g in itertools.pairwise(functions) if g.address - f.address >= DETOUR_SIZE]
    output, patched, entered = _run_patched(program, tmp_path / "patches", apart)
    assert output == _output(program)
    assert patched > 1000
    assert entered > 100


# --- jumps ---


def test_jumps() -> None:
    assert detour(0x1000, 0x2000) == bytes.fromhex("e9 fb 0f 00 00")
    assert detour(0x2000, 0x1000) == bytes.fromhex("e9 fb ef ff ff")
    assert far_jump(0x1000, 0x2000) == bytes.fromhex("ff 25 fa 0f 00 00 cc cc")
    assert island(0x1000, 0x2000) == bytes.fromhex("ff 25 fa 0f 00 00") + b"\xcc" * 10
    assert (len(far_jump(0, 0)), len(island(0, 0))) == (FAR_JUMP_SIZE, ISLAND_SIZE)


@pytest.mark.parametrize(("jump", "size"), [(detour, 5), (far_jump, 6), (island, 6)])
def test_jumps_are_range_checked(jump: Callable[[int, int], bytes], size: int) -> None:
    end = 0x1000 + size
    assert jump(0x1000, end + (1 << 31) - 1)[size - 4 : size] == bytes.fromhex("ff ff ff 7f")
    assert jump(0x1000, end - (1 << 31))[size - 4 : size] == bytes.fromhex("00 00 00 80")
    with pytest.raises(RelocationOverflow, match="0x1 bytes beyond 2 GiB"):
        jump(0x1000, end + (1 << 31))
    with pytest.raises(RelocationOverflow, match="0x2 bytes beyond 2 GiB"):
        jump(0x1000, end - (1 << 31) - 2)


def test_a_switch_reads_its_own_words_and_those_it_is_told() -> None:
    near, live = ENTRY + 0x1000, FAR
    code = switch(ENTRY, live, near, 0x1111, 0x2222)
    assert len(code) == SWITCH_SIZE
    assert struct.unpack_from("<QQ", code, SWITCH_CELLS) == (0x1111, 0x2222)
    shown = [(i.mnemonic, i.op_str) for i in Cs(CS_ARCH_X86, CS_MODE_64).disasm(code[:SWITCH_CELLS], ENTRY)]
    words = [hex(near - (ENTRY + 0x14)), hex(SWITCH_CELLS - 0x1B), hex(SWITCH_CELLS + 8 - 0x23)]
    assert [what for what, _ in shown[:4]] == ["push", "pushfq", "push", "movabs"]
    assert hex(live) in shown[3][1]
    assert shown[4:7] == [
        ("cmp", f"rax, qword ptr [rip + {words[0]}]"),
        ("mov", f"rax, qword ptr [rip + {words[1]}]"),
        ("cmove", f"rax, qword ptr [rip + {words[2]}]"),
    ]
    assert [what for what, _ in shown[7:11]] == ["mov", "pop", "popfq", "ret"]
    with pytest.raises(RelocationOverflow):
        switch(ENTRY, live, FAR, 0, 0)
