"""What carries over from an old layout to a new one is what C copies, member by member."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patcher.data.layouts import Program, shape_of
from patcher.data.shapes import Form, Move, Obstacle, Part, Shape, copy_plan, told

INT = Shape(4, Form.NUMBER, "int")
LONG = Shape(8, Form.NUMBER, "long")


def struct(*members: tuple[str, int, Shape], size: int) -> Shape:
    return Shape(size, Form.STRUCT, "struct s", tuple(Part(n, 8 * o, 0, s) for n, o, s in members))


def array(count: int, element: Shape) -> Shape:
    return Shape(count * element.size, Form.ARRAY, "", (), count, element)


OLD = struct(("a", 0, INT), ("b", 4, INT), size=8)


def test_what_is_the_same_is_copied_as_it_is() -> None:
    assert copy_plan(OLD, OLD) == (Move(0, 0, 8),)


def test_members_are_the_same_by_name() -> None:
    new = struct(("b", 0, INT), ("fresh", 8, LONG), ("a", 16, INT), size=24)
    assert copy_plan(OLD, new) == (Move(4, 0, 4), Move(0, 16, 4))


def test_elements_are_the_same_by_index() -> None:
    new = struct(("a", 0, INT), ("fresh", 8, LONG), ("b", 16, INT), size=24)
    expected = (Move(0, 0, 4), Move(4, 16, 4), Move(8, 24, 4), Move(12, 40, 4))
    assert copy_plan(array(2, OLD), array(3, new)) == expected
    assert copy_plan(array(3, INT), array(5, INT)) == (Move(0, 0, 12),)


def reasons(old: Shape, new: Shape) -> str:
    found = copy_plan(old, new)
    assert all(isinstance(f, Obstacle) for f in found)
    assert found
    return "; ".join(map(str, found))


def test_what_cannot_be_told_is_said() -> None:
    wide = struct(("a", 0, LONG), ("b", 8, INT), size=16)
    assert reasons(OLD, wide) == "`.a`: a whole number of 4 bytes became one of 8", "of a sign that is not known"
    assert reasons(array(3, INT), array(2, INT)) == "3 elements became 2"
    truth = Shape(1, Form.NUMBER, "_Bool"), Shape(1, Form.NUMBER, "char", signed=True)
    assert reasons(truth[1], truth[0]) == "a whole number (char) became a whole number (_Bool)"
    floating = struct(("a", 0, Shape(4, Form.FLOAT, "float")), ("b", 4, INT), size=8)
    assert "`.a`: a whole number (int) became a floating number (float)" in reasons(OLD, floating)
    renamed = struct(("a", 0, INT), ("c", 4, INT), ("more", 8, LONG), size=16)
    assert reasons(OLD, renamed) == "`.c`: whether it is what `b` was cannot be told"
    pointers = Shape(8, Form.POINTER, "int *"), Shape(8, Form.POINTER, "long *")
    assert "became a pointer (long *)" in reasons(*(struct(("p", 0, p), size=8) for p in pointers))
    unions = Shape(4, Form.UNION, "union u", (Part("i", 0, 0, INT),)), Shape(8, Form.UNION, "union u")
    assert "which of its members counts" in reasons(*unions)


@pytest.mark.parametrize(
    ("value", "old", "new", "expected"),
    [
        (-5, (4, True), (8, True), -5),
        (0xFFFFFFFF, (4, False), (8, True), 0xFFFFFFFF),
        (-5, (8, True), (4, True), -5),
        (1 << 31, (8, True), (4, True), None),
        (-1, (4, True), (8, False), None),
        (200, (4, True), (1, False), 200),
        (200, (4, True), (1, True), None),
    ],
)
def test_a_number_of_another_size_keeps_its_value_or_is_refused(
    value: int, old: tuple[int, bool], new: tuple[int, bool], expected: int | None
) -> None:
    before, after = (Shape(size, Form.NUMBER, "number", signed=signed) for size, signed in (old, new))
    (move,) = copy_plan(struct(("n", 4, before), size=12), struct(("n", 8, after), size=16))
    assert isinstance(move, Move)
    data = bytes(4) + value.to_bytes(old[0], "little", signed=old[1]) + bytes(8)
    if expected is None:
        with pytest.raises(OverflowError):
            move.carried(data)
    else:
        assert int.from_bytes(move.carried(data), "little", signed=new[1]) == expected
        assert (move.origin, move.target, len(move.carried(data))) == (4, 8, new[0])


def test_what_is_told() -> None:
    assert (
        told(OLD, struct(("b", 0, INT), ("limit", 8, LONG), size=16)) == "members copied by name; new: limit; gone: a"
    )
    assert told(array(2, OLD), array(3, OLD)) == "elements copied by index"
    assert told(array(2, INT), array(3, INT)) == "elements copied by index"
    assert told(INT, LONG) == "value kept"


def bits(*members: tuple[str, int, int]) -> Shape:
    return Shape(4, Form.STRUCT, "struct s", tuple(Part(n, o, b, INT) for n, o, b in members))


def test_bit_fields_come_along_with_their_bytes() -> None:
    old = bits(("a", 0, 3), ("b", 3, 5), ("c", 8, 8))
    new = Shape(
        8,
        Form.STRUCT,
        "struct s",
        (Part("x", 0, 0, INT), *(Part(p.name, p.offset + 32, p.bits, INT) for p in old.parts)),
    )
    assert copy_plan(old, new) == (Move(0, 4, 2),)
    assert "became one of 4, or moved" in reasons(old, bits(("a", 0, 4), ("b", 4, 4), ("c", 8, 8)))
    assert "bit-field that is new is in its bytes" in reasons(
        old, bits(("a", 0, 3), ("b", 3, 5), ("c", 8, 8), ("d", 7, 1))
    )


# --- against a compiler -----------------------------------------------------------------------------------------------

SCALARS = ("char", "short", "int", "long", "float", "double", "int *", "unsigned char", "enum e")
NAMES = tuple("abcdefgh")

Field = tuple[str, str, int, bool]  # name, type, elements (0: no array), within a struct of its own


@st.composite
def pairs(draw: st.DrawFn) -> tuple[list[Field], list[Field]]:
    """Return the members of an old and a new struct: those of one name have one type, arrays may have other bounds."""
    types = {name: draw(st.sampled_from(SCALARS)) for name in NAMES}
    nested = {name: draw(st.booleans()) for name in NAMES}
    arrays = {name: draw(st.booleans()) for name in NAMES}

    def members(names: list[str]) -> list[Field]:
        return [(n, types[n], draw(st.integers(1, 4)) if arrays[n] else 0, nested[n]) for n in names]

    common = draw(st.lists(st.sampled_from(NAMES[:5]), unique=True, min_size=1))
    gone = draw(st.lists(st.sampled_from(NAMES[5:6]), unique=True))
    fresh = draw(st.lists(st.sampled_from(NAMES[6:]), unique=True))
    # What may be one renamed is told apart by type.
    fresh = [] if gone else fresh
    old = members(draw(st.permutations([*common, *gone])))
    new = members(draw(st.permutations([*common, *fresh])))
    counts = {name: count for name, _, count, _ in old}
    return old, [(n, kind, max(count, counts.get(n, 0)), nested) for n, kind, count, nested in new]


def declared(tag: str, fields: list[Field]) -> str:
    lines = []
    for name, kind, count, nested in fields:
        own = f"{kind} {name}{f'[{count}]' if count else ''};"
        lines.append(f"struct {{ char pad_{name}; {own} }} in_{name};" if nested else own)
    return f"struct {tag} {{ {' '.join(lines)} }};"


def access(field: Field, index: int) -> str:
    name, _, count, nested = field
    return (f"in_{name}." if nested else "") + name + (f"[{index}]" if count else "")


def program(cases: list[tuple[list[Field], list[Field]]]) -> str:
    text = ["#include <stdio.h>", "#include <string.h>", "enum e { E };", DUMP]
    body = []
    for number, (old, new) in enumerate(cases):
        text += [declared(f"old{number}", old), declared(f"new{number}", new)]
        text += [f"struct old{number} old{number}; struct new{number} new{number};"]
        body.append(f"fill(&old{number}, sizeof old{number}, 1); fill(&new{number}, sizeof new{number}, 101);")
        body.append(f"dump(&old{number}, sizeof old{number}); dump(&new{number}, sizeof new{number});")
        before = {f[0]: f for f in old}
        for field in new:
            known = before.get(field[0])
            for index in range(min(field[2], known[2]) or 1) if known else ():
                place = access(field, index)
                body.append(
                    f"memcpy(&new{number}.{place}, &old{number}.{access(known, index)}, sizeof new{number}.{place});"
                )
            if known and field[3]:
                body.append(f"new{number}.in_{field[0]}.pad_{field[0]} = old{number}.in_{field[0]}.pad_{field[0]};")
        body.append(f"dump(&new{number}, sizeof new{number});")
    return "\n".join([*text, "int main(void) {", *body, "return 0; }"])


DUMP = """
static void dump(const void *from, unsigned long size) {
    for (unsigned long i = 0; i < size; i++) printf("%02x", ((const unsigned char *)from)[i]);
    printf("\\n");
}
static void fill(void *to, unsigned long size, int first) {
    for (unsigned long i = 0; i < size; i++) ((unsigned char *)to)[i] = (unsigned char)(first + i % 97);
}
"""


def used(shape: Shape, base: int = 0) -> set[int]:
    """Return the offsets of a shape's bytes that are no padding."""
    if shape.form is Form.STRUCT:
        return {o for p in shape.parts for o in used(p.shape, base + p.offset // 8)}
    if shape.form is Form.ARRAY and shape.element is not None:
        size = shape.element.size
        return {o for i in range(shape.count) for o in used(shape.element, base + i * size)}
    return set(range(base, base + shape.size))


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(cases=st.lists(pairs(), min_size=10, max_size=10), compiler=st.sampled_from(["gcc", "clang"]))
def test_a_plan_copies_what_c_does(cases: list[tuple[list[Field], list[Field]]], compiler: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "unit.c").write_text(program(cases))
        subprocess.run([compiler, "-w", "-g", "-o", "program", "unit.c"], cwd=folder, check=True)
        lines = subprocess.run(["./program"], cwd=folder, check=True, capture_output=True, text=True).stdout.split()
        found = Program.of_file(folder / "program")
        assert found is not None
        (unit,) = found.units_of(str(folder / "unit.c"))
    for number in range(len(cases)):
        old, initial, expected = (bytes.fromhex(line) for line in lines[3 * number : 3 * number + 3])
        shapes = [shape_of(unit, unit.variables[f"{tag}{number}"][0].type) for tag in ("old", "new")]
        plan = copy_plan(*shapes)
        result = bytearray(initial)
        for move in plan:
            assert isinstance(move, Move), move
            assert move.origin + move.size <= len(old)
            assert move.target + move.size <= len(result)
            result[move.target : move.target + move.size] = old[move.origin : move.origin + move.size]
        seen = used(shapes[1])
        assert [result[i] for i in sorted(seen)] == [expected[i] for i in sorted(seen)]
        targets = [set(range(m.target, m.target + m.size)) for m in plan if isinstance(m, Move)]
        assert sum(map(len, targets)) == len(set().union(*targets))
