"""Layouts are compared as they are laid out, against a program and objects that compilers made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from patcher.data.dwarf import Layouts, changed_types
from patcher.elf.tables import read_raw
from patcher.errors import PatcherError

OLD = """
#include <stddef.h>
enum colour { RED, GREEN };
struct inner { short a; short b; };
struct record { char tag; long value; struct inner inner; int list[4]; unsigned flag : 3; };
typedef struct { int x, y; } point;
union either { int i; char c[4]; };
struct record records[3];
point where;
union either either;
enum colour colour;
__thread int per_thread;
int use(struct record *r) { return (int)r->value + where.x + either.i + colour + per_thread; }
"""
PROGRAM = OLD + "int main(void) { return use(records); }\n"

SAME = {
    "a member's name": ("long value;", "long amount;"),
    "const": ("char tag;", "const char tag;"),
    "a typedef": ("long value;", "word value;"),
    "a new type": ("__thread", "struct fresh { int x; } fresh; __thread"),
    "a new enumerator": ("GREEN }", "GREEN, BLUE }"),
}
DIFFERENT = {
    "a member in front": ("char tag;", "int more; char tag;", "struct record", "`tag` offset 0 -> 4"),
    "an int hidden in padding": ("char tag;", "char tag; int hidden;", "struct record", "`hidden` is new at offset 4"),
    "a longer array": ("list[4]", "list[5]", "struct record", "size 40 -> 48"),
    "another member type": ("long value", "double value", "struct record", "`value` at offset 8 has another type"),
    "a wider bit-field": ("flag : 3", "flag : 4", "struct record", "`flag`"),
    "an enumerator's value": ("RED, GREEN", "RED, GREEN = 7", "enum colour", "`GREEN` 1 -> 7"),
    "a struct without a tag": ("int x, y;", "int y, z, x;", "point", "size 8 -> 12"),
    "a union": ("char c[4]", "char c[8]", "union either", "size 4 -> 8"),
    "a nested struct": ("short a; short b;", "short b; int a;", "struct inner", "size 4 -> 8"),
}
COMPILERS = ("gcc", "clang")


@pytest.fixture(scope="module", params=COMPILERS)
def compiler(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def layouts(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    folder = tmp_path_factory.mktemp("program")
    (folder / "unit.c").write_text(PROGRAM)
    subprocess.run([compiler, "-g", "-o", "program", "unit.c"], cwd=folder, check=True)
    found = Layouts.of_program(folder / "program")
    assert found is not None
    return found


def build(compiler: str, folder: Path, text: str, *flags: str) -> bytes:
    (folder / "unit.c").write_text(text)
    subprocess.run([compiler, "-g", "-c", *flags, "-o", "unit.o", "unit.c"], cwd=folder, check=True)
    return (folder / "unit.o").read_bytes()


def with_uses(text: str) -> str:
    return "typedef long word;\n" + text.replace("r->value", "*(long *)((char *)r + 8)").replace("where.x", "where.y")


@pytest.mark.parametrize("what", SAME)
def test_what_keeps_the_layout_is_no_change(what: str, compiler: str, layouts: Layouts, tmp_path: Path) -> None:
    before, after = SAME[what]
    assert before in OLD
    assert changed_types(layouts, build(compiler, tmp_path, with_uses(OLD.replace(before, after)))) == ()


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_moves_data_is_named(what: str, compiler: str, layouts: Layouts, tmp_path: Path) -> None:
    before, after, name, detail = DIFFERENT[what]
    assert before in OLD
    changes = changed_types(layouts, build(compiler, tmp_path, with_uses(OLD.replace(before, after))))
    found = {c.name: c.describe() for c in changes}
    assert name in found, found
    assert detail in found[name]


def test_compressed_debug_sections_are_read(compiler: str, layouts: Layouts, tmp_path: Path) -> None:
    text = with_uses(OLD.replace("list[4]", "list[5]"))
    changes = changed_types(layouts, build(compiler, tmp_path, text, "-gz=zlib"))
    assert [c.name for c in changes] == ["struct record"]


def test_types_of_one_name_in_two_files_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "one.c").write_text("struct node { int a; }; struct node one; int f(void) { return one.a; }\n")
    (tmp_path / "two.c").write_text(
        "struct node { long x, y; }; struct node two; int main(void) { return (int)two.y; }\n"
    )
    subprocess.run(["gcc", "-g", "-o", "program", "one.c", "two.c"], cwd=tmp_path, check=True)
    layouts = Layouts.of_program(tmp_path / "program")
    assert layouts is not None
    for name in ("one.c", "two.c"):
        subprocess.run(["gcc", "-g", "-c", "-o", "unit.o", name], cwd=tmp_path, check=True)
        assert changed_types(layouts, (tmp_path / "unit.o").read_bytes()) == ()
    (tmp_path / "one.c").write_text("struct node { char c; int a; }; struct node one; int f(void) { return one.a; }\n")
    subprocess.run(["gcc", "-g", "-c", "-o", "unit.o", "one.c"], cwd=tmp_path, check=True)
    assert [c.name for c in changed_types(layouts, (tmp_path / "unit.o").read_bytes())] == ["struct node"]


def test_a_program_without_debug_information_has_no_layouts(tmp_path: Path) -> None:
    (tmp_path / "unit.c").write_text(PROGRAM)
    subprocess.run(["gcc", "-o", "program", "unit.c"], cwd=tmp_path, check=True)
    assert Layouts.of_program(tmp_path / "program") is None


# --- what cannot be read ---


def refusal(layouts: Layouts, data: bytes) -> str:
    with pytest.raises(PatcherError) as caught:
        changed_types(layouts, data, "unit.o")
    assert caught.value.code == "debug-info"
    assert "unit.o" in caught.value.message
    assert caught.value.hint
    return caught.value.message


def section(data: bytes, wanted: str) -> int:
    """Return where a section's contents are in an object."""
    raw = read_raw("unit.o", data)
    index = next(i for i in range(len(raw.section_headers)) if raw.section_name(i) == wanted)
    return int(raw.section_headers[index]["offset"])


def test_type_units_are_not_understood(layouts: Layouts, tmp_path: Path) -> None:
    data = build("gcc", tmp_path, with_uses(OLD), "-fdebug-types-section")
    assert "unexpected section" in refusal(layouts, data)


def test_damaged_debug_information(layouts: Layouts, compiler: str, tmp_path: Path) -> None:
    data = bytearray(build(compiler, tmp_path, with_uses(OLD)))
    contents = section(bytes(data), ".debug_abbrev")
    data[contents : contents + 20] = bytes(20)
    assert "abbreviation" in refusal(layouts, bytes(data))


def test_damaged_compression(layouts: Layouts, compiler: str, tmp_path: Path) -> None:
    good = build(compiler, tmp_path, with_uses(OLD), "-gz=zlib")
    contents = section(good, ".debug_str")
    assert good[contents] == 1, "it is compressed"
    for offset, value, reason in ((8, 1 << 36, "claims"), (26, 0xFFFF, "decompressing")):
        data = bytearray(good)
        data[contents + offset : contents + offset + 8] = value.to_bytes(8, "little")
        assert reason in refusal(layouts, bytes(data))


def test_threads_that_wait_sleep_and_programs_that_are_started_do_not_know() -> None:
    text = "import os; before = dict(os.environ); import patcher.data.dwarf; assert os.environ == before"
    for given, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE")):
        environment = {"PATH": os.environ["PATH"], "OMP_DISPLAY_ENV": "true", **given}
        done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, check=True)
        assert f"OMP_WAIT_POLICY = '{expected}'" in done.stderr
