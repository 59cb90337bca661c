"""Which fields of an object are line numbers: those that move with the text, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest
from living import UNIT, compile_text

from patcher.elf import ObjectFile, read_object
from patcher.lines import NONE, Fields, LineNumbers, line_fields, moved_lines

SHIFT = 100_000
HEAD = "#include <stdio.h>\n" * 200  # so that line numbers take four bytes
TEXT = (
    HEAD
    + r"""
struct where { int line; const char *text; long wide; };
int logs(int n) { return printf("%d %d", __LINE__, n); }
int doubled(void) { return __LINE__ * 2; }
int sums(int n) { return n + __LINE__; }
int fixed(int n) { return n + 100205; }
const struct where *place(void) { static const struct where here = {__LINE__, "text", __LINE__}; return &here; }
const char *text(void) { return "unchanged"; }
"""
)


@pytest.fixture(scope="module", params=["gcc", "clang"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ObjectFile, ObjectFile]:
    folder = tmp_path_factory.mktemp("lines")
    texts = (TEXT, f'#line {SHIFT + 1} "unit.c"\n{TEXT}')
    plain, shifted = (
        read_object(compile_text(text, folder / f"{i}.o", "-O1", *UNIT, compiler=request.param))
        for i, text in enumerate(texts)
    )
    return plain, shifted


def values(source: ObjectFile, fields: Fields) -> dict[str, list[int]]:
    found = {}
    for index, offsets in fields.items():
        section = source.sections[index]
        found[section.name] = [int.from_bytes(section.data[o : o + 4], "little") for o in sorted(offsets)]
    return found


def line_of(part: str) -> int:
    return next(number for number, line in enumerate(TEXT.splitlines(), 1) if part in line)


def test_fields_that_moved_with_the_text_are_line_numbers(pair: tuple[ObjectFile, ObjectFile]) -> None:
    plain, shifted = pair
    found = values(plain, line_fields(plain, shifted, SHIFT))
    assert found[".text.logs"] == [line_of("int logs")]
    assert found[".text.sums"] == [line_of("int sums")]
    (table,) = (v for name, v in found.items() if "here" in name)
    assert table == [line_of("place(void)")] * 2


def test_what_moved_by_another_distance_is_none(pair: tuple[ObjectFile, ObjectFile]) -> None:
    plain, shifted = pair
    found = values(plain, line_fields(plain, shifted, SHIFT))
    assert ".text.doubled" not in found
    assert ".text.fixed" not in found
    assert line_fields(plain, shifted, SHIFT + 1) == {}


def test_an_object_has_none_against_itself(pair: tuple[ObjectFile, ObjectFile]) -> None:
    assert line_fields(pair[0], pair[0], SHIFT) == {}


def test_sections_of_another_length_are_left_out(tmp_path: Path) -> None:
    # A line below 128 is a byte in the plain object and four in the shifted one: no field, so no verdict is loosened.
    text = "int sums(int n) { return n + __LINE__; }\n"
    plain = read_object(compile_text(text, tmp_path / "plain.o", "-O1", *UNIT))
    shifted = read_object(compile_text(f"#line {SHIFT + 1}\n{text}", tmp_path / "shifted.o", "-O1", *UNIT))
    assert line_fields(plain, shifted, SHIFT) == {}


# --- which line is which ---


def test_a_line_that_both_texts_have_keeps_its_identity() -> None:
    assert moved_lines(b"a\nb\nc", b"a\nnew\nb\nc") == {1: 1, 2: 3, 3: 4}
    assert moved_lines(b"a\nb\nc", b"a\nc") == {1: 1, 3: 2}
    assert moved_lines(b"a\nb", b"a\nb") == {1: 1, 2: 2}
    assert moved_lines(b"a", b"b") == {}


def test_a_field_says_the_same_when_it_names_the_same_line(pair: tuple[ObjectFile, ObjectFile]) -> None:
    plain, shifted = pair
    old = TEXT.replace("#include <stdio.h>\n", "", 5)
    moves = tuple(moved_lines(text, TEXT.encode()) for text in (b"another text", old.encode()))
    numbers = LineNumbers(line_fields(plain, shifted, SHIFT), moves)
    here, before = line_of("int logs"), line_of("int logs") - 5
    assert numbers.says_the_same(before.to_bytes(4, "little"), here.to_bytes(4, "little"))
    assert not numbers.says_the_same(here.to_bytes(4, "little"), (here + 1).to_bytes(4, "little"))
    assert not numbers.says_the_same((100_000).to_bytes(4, "little"), here.to_bytes(4, "little"))
    assert any(numbers.in_section(index) for index in plain.sections)
    assert not NONE.says_the_same(here.to_bytes(4, "little"), here.to_bytes(4, "little"))


OLD = b"a\nb\nc\nd\ne\n"


@pytest.mark.parametrize(
    ("new", "moves"),
    [
        (OLD, {1: 1, 2: 2, 3: 3, 4: 4, 5: 5}),
        (b"new\n" + OLD, {1: 2, 2: 3, 3: 4, 4: 5, 5: 6}),
        (b"a\nb\nx\nd\ne\n", {1: 1, 2: 2, 4: 4, 5: 5}),
        (b"a\nx\nb\nc\nd\ny\nz\ne\n", {1: 1, 2: 3, 3: 4, 4: 5, 5: 8}),
        (b"d\ne\n", {4: 1, 5: 2}),
    ],
)
def test_each_line_is_found_where_it_is_now(new: bytes, moves: dict[int, int]) -> None:
    found = moved_lines(OLD, new)
    assert {old: now for old, now in found.items() if old <= 5} == moves


def test_a_number_is_a_line_only_where_that_line_went() -> None:
    numbers = LineNumbers({}, (moved_lines(OLD, b"new\n" + OLD),))
    assert numbers.says_the_same((3).to_bytes(4, "little"), (4).to_bytes(4, "little"))
    assert not numbers.says_the_same((3).to_bytes(4, "little"), (3).to_bytes(4, "little"))
    assert not numbers.says_the_same((3).to_bytes(4, "little"), (104).to_bytes(4, "little"))
    assert not LineNumbers({}, ()).says_the_same((3).to_bytes(4, "little"), (3).to_bytes(4, "little"))
