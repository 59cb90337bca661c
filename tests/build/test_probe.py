"""What decides about types outside of functions, and asking a compiler for those that it does not describe."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from patcher.build import PROBED, CompileCommand, Compiler, Probes
from patcher.build.dependencies import named_files
from patcher.build.outline import outline
from patcher.data.declared import Declared
from patcher.data.layouts import declared_by

UNIT = b"""#include "types.h"
/* { */ static int before = 1;
__attribute__((noinline)) int step(int n) {
    if (n) { return '{' + x.a; }
    return n; // }
}
int after[2];
"""
SAME = {
    "a body": (b"return n;", b"return n + 1;"),
    "a block": (b"if (n) {", b"if (n) { n++;"),
    "a comment": (b"/* { */", b"/* }} */"),
    "a brace in a string": (b"return n;", b'return "}{"[n];'),
    "a brace in a character": (b"'{'", b"'}'"),
    "a number with a mark": (b"return n;", b"return 1'000 + '{';"),
    "a raw string": (b"return n;", b'return R"x(})" }{ )x"[n];'),
}
OTHER = {
    "a variable": (b"after[2]", b"after[3]"),
    "a directive": (b"types.h", b"other.h"),
    "a directive in a body": (b"    return n;", b"#pragma pack(1)\n    return n;"),
    "a parameter": (b"step(int n)", b"step(long n)"),
    "an initialiser": (b"before = 1", b"before = 2"),
    "a function more": (b"int after", b"int more(void) { return 1; }\nint after"),
}
KEPT = [
    b"struct s { int a; };",
    b"constexpr int n() { if (1) { return 3; } return 4; }",
    b"alignas(4) const int n{5};",
    b"auto f() { return 3; }",
    b"struct __attribute__((packed)) s { int a; };",
    b"int list[sizeof(int)] {1, 2};",
    b"template <class T> int f(T t) { return 3; }",
    b"DEFINE(x) { int a; };",
    b"union { int a; } u;",
    b"int f(a) int a; { return 3; }",
]
LEFT_OUT = [
    b"int f() const { return 3; }",
    b"namespace n { int f() { return 3; } }",
    b'extern "C" { int f(void) { return 3; } }',
    b"W::W(int n) : a(n) { f(3); }",
    b"int f() noexcept { return 3; }",
    b"static inline long f(int a, int b)\n{\n    return 3;\n}",
]


@pytest.mark.parametrize("what", SAME)
def test_bodies_and_comments_do_not_count(what: str) -> None:
    before, after = SAME[what]
    assert UNIT.count(before) == 1
    assert outline(UNIT.replace(before, after)) == outline(UNIT)


@pytest.mark.parametrize("what", OTHER)
def test_everything_else_counts(what: str) -> None:
    before, after = OTHER[what]
    assert UNIT.count(before) == 1
    assert outline(UNIT.replace(before, after)) != outline(UNIT)


@pytest.mark.parametrize("text", KEPT)
def test_what_may_decide_about_types_is_kept(text: bytes) -> None:
    tokens = outline(text).replace(b" ", b"")
    assert tokens == text.replace(b" ", b"")


@pytest.mark.parametrize("text", LEFT_OUT)
def test_what_is_surely_a_body_is_left_out(text: bytes) -> None:
    assert b"3" not in outline(text)


def test_the_files_of_a_rule() -> None:
    rule = "unit.o: a\\ b.h \\\n c.h \\\n  d$$.h x\\#y.h\n"
    assert named_files(rule) == ("a b.h", "c.h", "d$.h", "x#y.h")


# --- asking -----------------------------------------------------------------------------------------------------------

OLD = 1_000_000_000


class Unit:
    """A unit of two files, which were written long ago."""

    def __init__(self, folder: Path, compiler: Compiler, driver: str, name: str) -> None:
        self.folder, self.compiler = folder, compiler
        self.probes = Probes(compiler)
        self.command = CompileCommand(folder, (driver, "-O2", "-g", "-c", name, "-o", "unit.o"), folder / name, "this")

    def write(self, name: str, text: str, time: int = OLD) -> None:
        (self.folder / name).write_text(text)
        os.utime(self.folder / name, (time, time))

    def ask(self, *names: str) -> dict[str, str]:
        """Return the types of names, and note what was answered."""
        unit = self.compiler.compile(self.command)
        self.answer = self.probes.ask(self.command, names, unit.listing)
        assert self.answer is not None
        (found,) = declared_by(self.answer.object, "probe")
        return {n: self.type(found, f"{PROBED}{i}") for i, n in enumerate(names) if i not in self.answer.missing}

    @staticmethod
    def type(found: Declared, struct: str) -> str:
        (place,) = found.types[f"struct {struct}"]
        static = found.variables.get(f"{struct}::value", ())
        return found.text((*static, *found.node(place).members)[0].type)


@pytest.fixture
def unit(tmp_path: Path, compiler: Compiler) -> Unit:
    found = Unit(tmp_path, compiler, "clang", "unit.c")
    found.write("types.h", "struct node { int a; };\n")
    found.write("unit.c", '#include "types.h"\nextern struct node x, row[4];\nint f(int n) { return n + x.a; }\n')
    return found


def test_the_types_of_names(unit: Unit) -> None:
    assert unit.ask("x", "row") == {"x": "struct node", "row": "struct node[4]"}


def test_a_name_that_is_not_there_is_told(unit: Unit) -> None:
    assert unit.ask("x", "absent", "row") == {"x": "struct node", "row": "struct node[4]"}


def test_an_edited_body_asks_nobody(unit: Unit) -> None:
    unit.ask("x")
    first = unit.answer
    unit.write("unit.c", (unit.folder / "unit.c").read_text().replace("return n", "return 1 + n"), OLD + 1)
    unit.ask("x")
    assert unit.answer is first


@pytest.mark.parametrize("file", ["types.h", "unit.c"])
def test_other_edits_ask_again(unit: Unit, file: str) -> None:
    unit.ask("x")
    text = (unit.folder / file).read_text()
    unit.write(file, text.replace("int a", "long a").replace("x, row", "*x, row").replace("+ x.a", ""), OLD + 1)
    first = unit.answer
    assert unit.ask("x") == {"x": "struct node" if file == "types.h" else "struct node *"}
    assert unit.answer is not first


def test_a_header_that_comes_to_stand_before_another_counts(unit: Unit) -> None:
    (unit.folder / "late").mkdir()
    unit.write("late/types.h", (unit.folder / "types.h").read_text())
    (unit.folder / "types.h").unlink()
    unit.command = CompileCommand(
        unit.folder, ("clang", "-g", "-Iearly", "-Ilate", "-c", "unit.c"), unit.command.file, "this"
    )
    unit.ask("x")
    first = unit.answer
    (unit.folder / "early").mkdir()
    unit.write("early/types.h", "struct node { int b, a; };\n")
    unit.ask("x")
    assert unit.answer is not first


def test_a_file_that_was_just_written_is_not_relied_on(unit: Unit) -> None:
    (unit.folder / "types.h").touch()
    os.utime(unit.folder / "types.h", (4e9, 4e9))
    unit.ask("x")
    first = unit.answer
    unit.ask("x")
    assert unit.answer is not first


def test_names_of_classes_and_namespaces(tmp_path: Path, compiler: Compiler) -> None:
    unit = Unit(tmp_path, compiler, "clang++", "unit.cc")
    unit.write(
        "unit.cc",
        "namespace n { struct S { S(); int a; }; extern S x; }\n"
        "class K { static int hidden; int f(); };\nint K::f() { return hidden + n::x.a; }\n",
    )
    assert unit.ask("::n::x", "::K::hidden") == {"::n::x": "struct n::S", "::K::hidden": "int"}


def test_another_compiler_is_not_asked(tmp_path: Path, compiler: Compiler) -> None:
    unit = Unit(tmp_path, compiler, "gcc", "unit.c")
    unit.write("unit.c", "extern int x; int f(void) { return x; }\n")
    assert unit.probes.ask(unit.command, ("x",), ()) is None
