"""A program's variables stay what they are, whatever a compiler calls them and wherever they are declared."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from project import MAIN, Project

import patcher
from patcher.data.located import NONE, declared_in_object, declared_in_program
from patcher.data.names import guard_of, spelling
from patcher.outcome import Generation
from patcher.session import Session

TWO = """\
int last;
__attribute__((noinline)) int f(int x)
{
    if (x & 1) {
        static int n;
        n = n > 0 ? n : 11;
        last = n;
        return n;
    } else {
        static int n;
        n = n > 0 ? n : 22;
        last = n;
        return n;
    }
}
int answer(int x) { return f(x); }
"""
FIRST = TWO[TWO.index("        static") : TWO.index("    } else")]
SECOND = TWO[TWO.index("        static", TWO.index("} else")) : TWO.index("    }\n}")]

FILES = """\
static int own = 100;
int everyones = 500;
__attribute__((noinline)) int f(int x)
{
    own += x;
    everyones += x;
    return own + everyones;
}
int answer(int x) { return f(x); }
"""
AWAY = "int other(int);\nint away(int x) { return other(x); }\n"
OTHER = """\
int last;
int other(int x)
{
    last = x;
    return x;
}
"""


def project(root: Path, unit: str, *flags: str, **more: str) -> Project:
    sources = {"main.c": MAIN, "unit.c": unit} | {f"{name}.c": text for name, text in more.items()}
    return Project(root, sources, compile_flags=flags)


def session(made: Project, pid: int) -> Session:
    return patcher.attach(pid, compile_commands=made.root / "compile_commands.json")


def fates(done: Generation) -> set[tuple[str, str]]:
    return {(v.name, v.outcome) for v in done.variables}


def refusal(patching: Session, path: Path) -> patcher.PatcherError | None:
    try:
        patching.apply(path)
    except patcher.PatcherError as error:
        return error
    return None


@pytest.mark.parametrize("optimise", ["-O0", "-O1", "-O2"])
@pytest.mark.parametrize("change", ["swapped", "swapped and edited", "the first is gone", "a third"])
def test_one_of_two_statics_is_never_taken_for_the_other(tmp_path: Path, optimise: str, change: str):
    made = project(tmp_path, TWO, optimise)
    path = made.sources / "unit.c"
    texts = {
        "swapped": swapped(),
        "swapped and edited": swapped().replace("return n;", "return n + 100;", 1),
        "the first is gone": TWO.replace(FIRST, "        return 7;\n").replace("22", "33"),
        "a third": TWO.replace(
            "if (x & 1) {", "if (x == 3) {\n" + FIRST.replace("11", "55") + "    } else if (x & 1) {"
        ),
    }
    with made.running() as program, session(made, program.pid) as patching:
        assert (program.ask(1), program.ask(2)) == ("11", "22")
        path.write_text(texts[change])
        error = refusal(patching, path)
        if error is not None:
            assert error.code == "ambiguous-variable"
            assert error.message.count("` at 0x") == 2, error.message  # both are named, and where they are declared
            assert "line 5 of `f`" in error.message
            assert "line 10 of `f`" in error.message
        else:
            assert program.ask(1) == ("7" if change == "the first is gone" else "11")
        assert program.ask(2) in (("22", "122") if change == "swapped and edited" else ("22",))
        assert program.ask(1) != "22"


def swapped() -> str:
    turned = TWO.replace("if (x & 1)", "if (!(x & 1))")
    return turned.replace(FIRST, "<>").replace(SECOND, FIRST).replace("<>", SECOND)


@pytest.mark.parametrize("optimise", ["-O0", "-O2"])
def test_what_became_of_a_variable_is_told_once(tmp_path: Path, optimise: str):
    made = project(tmp_path, FILES, optimise)
    with made.running() as program, session(made, program.pid) as patching:
        assert program.ask(1) == "602"
        unit = made.edit("unit.c", "static int own", "int own")
        made.edit("unit.c", "int everyones = 500;\n", "")
        made.edit("unit.c", "    own += x", "    static int everyones, fresh = 9;\n    fresh++;\n    own += x")
        done = patching.apply(unit)
        assert fates(done) == {("own", "moved"), ("everyones", "moved"), ("f.everyones", "kept"), ("fresh", "added")}
        assert {v.name: v.note for v in done.variables}["own"] == "was static"
        made.edit("unit.c", "return own", "return 1000 + own")
        assert fates(patching.apply(unit)) == set()
        assert program.ask(1) == "1604"
        patching.revert(0)
        assert program.ask(1) == "606"
        made.edit("unit.c", "return 1000 + own", "return fresh * 10000 + own")
        assert fates(patching.apply(unit)) == {("fresh", "found")}
        assert program.ask(1) == "110608", "9, and one for each of two calls"


def test_a_variable_that_moves_to_another_unit_is_the_same_when_both_are_saved(tmp_path: Path):
    made = project(tmp_path, AWAY + FILES, other=OTHER)
    made.edit("unit.c", "return f(x)", "return x > 50 ? away(x) : f(x)")
    made.build()
    with made.running() as program, session(made, program.pid) as patching:
        assert program.ask(1) == "602"
        unit = made.edit("unit.c", "static int own = 100;\n", "")
        made.edit("unit.c", "    own += x;\n", "")
        made.edit("unit.c", "return own + everyones", "return everyones")
        other = made.edit("other.c", "int last;", "int last;\nstatic int own = 100;")
        made.edit("other.c", "return x;", "return own += 1000;")
        done = patching.apply(unit, other)
        assert fates(done) == {("own", "moved")}
        assert (program.ask(1), program.ask(99)) == ("502", "1101")
        patching.revert(0)
        assert program.ask(1) == "1605"
        made.edit("other.c", "own += 1000", "own += 2000")
        assert fates(patching.apply(other)) == {("own", "found")}
        assert program.ask(99) == "3102"


def test_a_static_is_new_in_a_unit_that_is_saved_alone(tmp_path: Path):
    made = project(tmp_path, AWAY + FILES, other=OTHER)
    made.edit("unit.c", "return f(x)", "return x > 50 ? away(x) : f(x)")
    made.build()
    with made.running() as program, session(made, program.pid) as patching:
        assert program.ask(1) == "602"
        other = made.edit("other.c", "int last;", "int last;\nstatic int own = 7;")
        made.edit("other.c", "return x;", "return own += 1000;")
        assert fates(patching.apply(other)) == {("own", "added")}
        assert (program.ask(99), program.ask(1)) == ("1007", "604")
        made.edit("other.c", "own += 1000", "own += 2000")
        patching.apply(other)
        patching.revert(1)
        assert program.ask(99) == "2007"


def test_what_is_extern_elsewhere_has_not_moved(tmp_path: Path):
    unit = "extern int everyones;\nint answer(int x) { return everyones += x; }\n"
    made = project(tmp_path, unit, "-O0", other="int everyones = 500;\n")
    with made.running() as program, session(made, program.pid) as patching:
        assert program.ask(1) == "501"
        path = made.edit("unit.c", "extern int everyones;\n", "")
        made.edit("unit.c", "{ return", "{ static int everyones = 7; return")
        assert fates(patching.apply(path)) == {("everyones", "added")}
        assert program.ask(1) == "8"
        made.edit("unit.c", "+= x", "+= 2 * x")
        patching.apply(path)
        assert program.ask(1) == "10"
        patching.revert(0)
        assert program.ask(1) == "502"


@pytest.mark.parametrize("optimise", ["-O0", "-O2"])
def test_a_static_of_another_type_is_refused_while_it_is_in_use(tmp_path: Path, optimise: str):
    text = "int answer(int x)\n{\n    static int n = 5;\n    n += x;\n    return n;\n}\n"
    made = project(tmp_path, text, optimise)
    with made.running() as program, session(made, program.pid) as patching:
        assert program.ask(1) == "6"
        path = made.edit("unit.c", "static int n = 5;", "static float n = 5;")
        with pytest.raises(patcher.PatcherError, match=r"`answer::n`: type int -> float"):
            patching.apply(path)
        assert program.ask(1) == "7"
        made.edit("unit.c", "static float n = 5;", "static unsigned n = 5;")
        patching.apply(path)
        assert program.ask(1) == "8"


def test_a_variable_that_a_patch_brought_may_come_back_as_another_one(tmp_path: Path):
    made = project(tmp_path, "int answer(int x) { return x; }\n", "-O0")
    path = made.sources / "unit.c"
    back = {("n", "found"), ("n", "kept")}  # with the value it had, although its initialiser is another one
    with made.running() as program, session(made, program.pid) as patching:
        for text, expected, fate in (
            ("static int n = 5;\nint answer(int x) { return n += x; }\n", ("6", "7"), {("n", "added")}),
            ("int answer(int x) { return x + 50; }\n", ("51", "51"), set()),
            ("static float n = 8;\nint answer(int x) { return n += x; }\n", ("9", "10"), {("n", "added")}),
            ("int answer(int x) { return x + 60; }\n", ("61", "61"), set()),
            ("static float n = 9;\nint answer(int x) { return n += 2 * x; }\n", ("12", "14"), back),
        ):
            path.write_text(text)
            done = patching.apply(path)
            assert (program.ask(1), program.ask(1)) == expected, text
            assert fates(done) == fate, text
        made.edit("unit.c", "static float", "static int")
        with pytest.raises(patcher.PatcherError, match=r"`n`: type float -> int"):
            patching.apply(path)
        assert program.ask(1) == "16"


@pytest.mark.parametrize("optimise", ["-O0", "-O2"])
@pytest.mark.parametrize("debug", ["-g", "-g0"])
def test_a_static_of_the_file_does_not_become_two_of_a_function(tmp_path: Path, optimise: str, debug: str):
    text = "static int n = 5;\nint answer(int x)\n{\n    n += x;\n    return n;\n}\n"
    made = project(tmp_path, text, optimise, debug)
    inner = "    if (x == 2) {\n        static int n = 900;\n        return n += 30;\n    }\n"
    with made.running() as program, session(made, program.pid) as patching:
        assert program.ask(1) == "6"
        path = made.sources / "unit.c"
        path.write_text(text.replace("static int n = 5;\n", "").replace("{\n", "{\n    static int n = 5;\n" + inner, 1))
        error = refusal(patching, path)
        if error is not None:
            assert error.code == "ambiguous-variable"
            assert program.ask(2) == "8"
        else:
            assert program.ask(2) == "930"
            assert program.ask(1) == "7"


@pytest.mark.parametrize("optimise", ["-O0", "-O2"])
def test_a_new_function_is_not_one_that_was_gone_before(tmp_path: Path, optimise: str):
    text = """\
#define OWN __attribute__((noinline)) static int
OWN one(int x) { static int n = 100; return n += x; }
OWN two(int x) { return 10 * x; }
int answer(int x) { return x > 5 ? one(x) : two(x); }
"""
    made = project(tmp_path, text, optimise)
    path = made.sources / "unit.c"
    gone = "".join(line for line in text.splitlines(keepends=True) if "one(int" not in line)
    gone = gone.replace("x > 5 ? one(x) :", "x > 5 ? 77 :")
    new = gone.replace("int answer", "OWN three(int x) { static int n = 500; return n -= x; }\nint answer")
    with made.running() as program, session(made, program.pid) as patching:
        assert program.ask(6) == "106"
        path.write_text(gone)
        patching.apply(path)
        assert program.ask(6) == "77"
        path.write_text(new.replace("? 77", "? three(x)"))
        assert fates(patching.apply(path)) == {("n", "added")}
        assert program.ask(6) == "494"
        path.write_text(text)
        assert ("n", "added") not in fates(patching.apply(path))
        assert program.ask(6) == "112"


# --- what compilers say ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "source", "function"),
    [
        ("hits", "hits", ""),
        ("hits.3", "hits", ""),
        ("count.hits", "hits", "count"),
        ("count.hits.1", "hits", "count"),
        ("_ZZ5countvE4hits", "hits", "_Z5countv"),
        ("_ZZ5countvE4hits_0", "hits", "_Z5countv"),
        ("_ZZL5countvE6hits_0", "hits_0", "_ZL5countv"),
        ("_ZZ5countvE4hits__12_", "hits", "_Z5countv"),
        ("_ZZL5countvE4hits.0", "hits", "_ZL5countv"),
        ("_ZZN1A1fEvE1E", "E", "_ZN1A1fEv"),
        ("_ZGVZ5countvE4hits_0", "hits", "_Z5countv"),
        ("_ZZZ1fvENKUlvE_clEvE1n", "n", "_ZZ1fvENKUlvE_clEv"),
    ],
)
def test_names_are_read_as_the_source_has_them(name: str, source: str, function: str):
    found = spelling(name)
    assert (found.source, found.function) == (source, function)
    assert found.scoped == (name != "hits")
    assert found.guard == name.startswith("_ZGV")


def test_a_guard_is_named_after_its_variable():
    assert guard_of("_ZZ5countvE4hits_0") == "_ZGVZ5countvE4hits_0"
    assert guard_of("_ZZL5countvE4hits.0") == "_ZGVZL5countvE4hits"


DECLARED = """\
static int first; int second[3];
static inline int g(int x) { static long n = 4; return n += x; }
int f(int x)
{
    static const char *n;
    if (x) {
        static struct pair { int a, b; } n;
        return n.a += x + g(x);
    }
    n += x + first++ + second[x];
    return *n + g(x);
}
int main(void) { return f(0); }
"""
FORMS = [
    ("gcc", "-O0", "-gdwarf-5"),
    ("gcc", "-O2", "-gdwarf-4"),
    ("gcc", "-O2", "-g", "-gz", "-fdata-sections"),
    ("clang", "-O0", "-gdwarf-5"),
    ("clang", "-O2", "-gdwarf-4", "-fdata-sections"),
]


@pytest.mark.parametrize("command", FORMS, ids=" ".join)
def test_declarations_are_read_from_objects_and_programs(tmp_path: Path, command: tuple[str, ...]):
    (tmp_path / "unit.c").write_text(DECLARED)
    unit, program = tmp_path / "unit.o", tmp_path / "program"
    subprocess.run([*command, "-c", "unit.c", "-o", unit], cwd=tmp_path, check=True)
    subprocess.run([command[0], unit, "-o", program], cwd=tmp_path, check=True)
    for found in (
        declared_in_object(unit.read_bytes(), "unit.o"),
        declared_in_program(program, program.stat().st_mtime_ns, "unit.c"),
    ):
        kinds = {(v.name, v.line, v.type) for v in found.variables.values()}
        assert {
            ("first", 1, "integer (4)"),
            ("second", 1, "integer (4)[3]"),
            ("n", 2, "integer (8)"),
            ("n", 5, "pointer"),
        } <= kinds
        functions = {v.line: v.function for v in found.variables.values()}
        assert functions[5] == "f"
        assert functions[1] == ""
        assert {v.name: v.external for v in found.variables.values() if v.line == 1} == {"first": False, "second": True}
        assert {"f", "g"} <= found.functions


def test_what_cannot_be_read_declares_nothing(tmp_path: Path):
    (tmp_path / "unit.c").write_text(DECLARED)
    unit = tmp_path / "unit.o"
    subprocess.run(["gcc", "-g", "-c", "unit.c", "-o", unit], cwd=tmp_path, check=True)
    data = bytearray(unit.read_bytes())
    whole = declared_in_object(bytes(data), "unit.o")
    assert whole.variables
    for start in range(0, len(data), 64):
        damaged = data[:start] + bytes(b ^ 0x5A for b in data[start : start + 64]) + data[start + 64 :]
        declared_in_object(bytes(damaged), "unit.o")  # may know less, or something else; never fails
    assert declared_in_object(b"", "unit.o") == NONE
    assert declared_in_program(tmp_path / "none", 0, "unit.c") == NONE
