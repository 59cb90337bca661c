"""Every change of a type, and every edit that is none, as compilers tell of them."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from data.layout_cases import (
    CHANGED,
    CHANGED_CPP,
    CHANGED_EDITS,
    CPP,
    CPP_EDITS,
    ONLY_GCC,
    SAME,
    SAME_CPP,
    SAME_EDITS,
    C,
    Case,
)
from patcher.data.dies import Elsewhere, NotUnderstood
from patcher.data.layouts import Judgement, LayoutVerdict, Program, Standing, declared_by
from patcher.data.prepare import reading
from patcher.elf.tables import read_raw
from patcher.errors import PatcherError

FORMS = [(compiler, version) for compiler in ("gcc", "clang") for version in ("4", "5")]
IN_CPP = {"gcc": "g++", "clang": "clang++"}


class Built:
    """A program of one unit, and what a new text of that unit is said of."""

    def __init__(self, folder: Path, form: tuple[str, str], name: str, text: str) -> None:
        compiler, version = form
        self.folder, self.name = folder, name
        self.compiler = [IN_CPP[compiler] if name.endswith("cc") else compiler, f"-gdwarf-{version}"]
        self.compile(folder, text)
        (folder / "main.c").write_text("int elsewhere; int main(void) { return 0; }\n")
        link = [*self.compiler, "-o", "program", "unit.o", "-x", "c", "main.c", "-x", "none"]
        subprocess.run(link, cwd=folder, check=True)
        program = Program.of_file(folder / "program")
        assert program is not None
        self.program = program

    def compile(self, folder: Path, text: str, flags: Sequence[str] = ()) -> bytes:
        (folder / self.name).write_text(text)
        mapped = f"-fdebug-prefix-map={folder}={self.folder}"
        subprocess.run([*self.compiler, mapped, *flags, "-c", "-o", "unit.o", self.name], cwd=folder, check=True)
        return (folder / "unit.o").read_bytes()

    def verdicts(self, folder: Path, text: str, *flags: str, keeping: bool = True) -> dict[str, LayoutVerdict]:
        found: dict[str, LayoutVerdict] = {}
        for new in declared_by(self.compile(folder, text, flags), "unit.o"):
            layers = [self.program.units_of(new.file)]
            assert layers[0], f"{new.file} is a unit of the program"
            for verdict in Judgement(layers, layers, new, self.program, lambda: keeping).verdicts():
                found[verdict.type] = verdict
        return found


@pytest.fixture(scope="module", params=FORMS, ids="-".join)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("c"), request.param, "unit.c", C)


@pytest.fixture(scope="module", params=FORMS, ids="-".join)
def built_cpp(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("cpp"), request.param, "unit.cc", CPP)


def edited(text: str, case: Case, more: tuple[str, str] | None) -> str:
    assert text.count(case.before) == 1, case.before
    text = text.replace(case.before, case.after)
    if more is not None:
        assert more[0] in text
        text = text.replace(*more)
    return text


@pytest.mark.parametrize("what", SAME)
def test_no_change(what: str, built: Built, tmp_path: Path) -> None:
    assert built.verdicts(tmp_path, edited(C, SAME[what], SAME_EDITS.get(what))) == {}


@pytest.mark.parametrize("what", CHANGED)
def test_a_change_is_named(what: str, built: Built, tmp_path: Path) -> None:
    case = CHANGED[what]
    found = built.verdicts(tmp_path, edited(C, case, CHANGED_EDITS.get(what)))
    if what in ONLY_GCC and built.compiler[0] == "clang":
        assert found == {}
        return
    assert case.type in found, found
    assert case.detail in found[case.type].describe()
    assert not found[case.type].accepted


@pytest.mark.parametrize("what", SAME_CPP)
def test_no_change_of_classes(what: str, built_cpp: Built, tmp_path: Path) -> None:
    assert built_cpp.verdicts(tmp_path, edited(CPP, SAME_CPP[what], CPP_EDITS.get(what))) == {}


@pytest.mark.parametrize("what", CHANGED_CPP)
def test_a_change_of_classes_is_named(what: str, built_cpp: Built, tmp_path: Path) -> None:
    case = CHANGED_CPP[what]
    found = built_cpp.verdicts(tmp_path, edited(CPP, case, CPP_EDITS.get(what)))
    assert case.type in found, found
    assert case.detail in found[case.type].describe()
    assert not found[case.type].accepted


# --- other forms ------------------------------------------------------------------------------------------------------


def test_what_is_left_to_another_reader(tmp_path: Path) -> None:
    (tmp_path / "unit.cc").write_text(CPP)
    for flags in (["-gdwarf-5", "-fdebug-types-section"], ["-gdwarf-4", "-fdebug-types-section"], ["-gdwarf-3"]):
        subprocess.run(["g++", *flags, "-c", "-o", "unit.o", "unit.cc"], cwd=tmp_path, check=True)
        assert declared_by((tmp_path / "unit.o").read_bytes(), "unit.o") == ()
    subprocess.run(["g++", "-g", "-gsplit-dwarf", "-c", "-o", "unit.o", "unit.cc"], cwd=tmp_path, check=True)
    with pytest.raises(Elsewhere):
        declared_by((tmp_path / "unit.o").read_bytes(), "unit.o")


def test_what_is_the_same_is_read_once(built: Built, tmp_path: Path) -> None:
    first = declared_by(built.compile(tmp_path, C), "unit.o")
    assert declared_by(built.compile(tmp_path, C.replace("{n, 1}", "{n, 2}")), "unit.o", first)[0] is first[0]
    assert declared_by(built.compile(tmp_path, C.replace("int p, q;", "int q, p;")), "unit.o", first)[0] is not first[0]


def test_damaged_debug_information_is_refused(built: Built, tmp_path: Path) -> None:
    data = built.compile(tmp_path, C)
    raw = read_raw("unit.o", data)
    names = [raw.section_name(i) for i in range(len(raw.section_headers))]
    start = int(raw.section_headers[names.index(".debug_info")]["offset"])
    for place in range(start + 16, start + 200, 3):
        damaged = data[:place] + b"\x7e\x7e" + data[place + 2 :]
        with contextlib.suppress(PatcherError, NotUnderstood), reading("unit.o"):
            for new in declared_by(damaged, "unit.o"):
                Judgement(*[[built.program.units_of(new.file)]] * 2, new, built.program, lambda: True).verdicts()


# --- who has one ------------------------------------------------------------------------------------------------------

HELD = """\
#include <stdlib.h>
struct local { int p, q; };
struct single { int a, b; };
struct several { int a, b; };
struct pointed { int a, b; };
struct heap { int a, b; };
struct passed { int a, b; };
struct mixed { int a, b; };
struct within { struct single_within { int a, b; } inner; };
enum sort { ONE = 1, TWO };
static struct single single;
static struct several several[4];
static struct pointed pointed;
static struct pointed *first = &pointed;
static struct mixed mixed;
static struct within within;
int by_value(struct passed p) { return p.a; }
int by_name(int n) { struct local l = {n, 2}; return l.p + l.q; }
int from_heap(void) { struct heap *h = malloc(sizeof *h); int a = h->a; free(h); return a; }
int both(int n) { struct mixed m = {n, 1}; enum sort s = ONE; mixed = m; return m.b + s; }
int all(int n) { return single.a + several[n].b + first->a + within.inner.a; }
"""


@pytest.fixture(scope="module", params=FORMS, ids="-".join)
def held(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("held"), request.param, "unit.c", HELD)


WHO = {
    "struct local": ("int p, q;", "int q, p;", Standing.DEAD, [], [], ["by_name"]),
    "struct single": ("struct single { int a,", "struct single { int x, a,", Standing.STATIC, ["single"], [], []),
    "struct several": ("several { int a,", "several { int x, a,", Standing.STATIC, ["several"], [], []),
    "struct pointed": ("pointed { int a,", "pointed { int x, a,", Standing.HEAP, ["pointed"], ["first"], []),
    "struct heap": ("heap { int a,", "heap { int x, a,", Standing.HEAP, [], [], ["from_heap"]),
    "struct passed": ("passed { int a,", "passed { int x, a,", Standing.HEAP, [], [], ["by_value"]),
    "struct mixed": ("mixed { int a,", "mixed { int x, a,", Standing.HEAP, ["mixed"], [], ["both"]),
    "struct single_within": ("_within { int a,", "_within { int x, a,", Standing.STATIC, ["within"], [], []),
    "enum sort": ("ONE = 1", "ONE = 3", Standing.HEAP, [], [], ["both"]),
}


@pytest.mark.parametrize("name", WHO)
def test_who_has_values_of_a_type(name: str, held: Built, tmp_path: Path) -> None:
    before, after, kind, variables, leading, functions = WHO[name]
    case = Case(before, after)
    found = held.verdicts(tmp_path, edited(HELD, case, None), keeping=False)[name]
    assert found.kind is kind
    assert [v.name for v in found.variables] == variables
    assert list(found.leading) == leading
    assert list(found.functions) == functions
    assert found.accepted is (kind is Standing.DEAD)


def test_what_old_code_may_have_kept_is_not_dead(held: Built, tmp_path: Path) -> None:
    found = held.verdicts(tmp_path, HELD.replace("int p, q;", "int q, p;"), keeping=True)
    assert found["struct local"].kind is Standing.HEAP


def test_a_type_that_another_unit_has_is_not_private(tmp_path: Path) -> None:
    built = Built(tmp_path, ("gcc", "5"), "unit.c", HELD)
    (tmp_path / "main.c").write_text("struct single { int a, b; } *any; int main(void) { return any->a; }\n")
    subprocess.run(["gcc", "-g", "-o", "program", "unit.o", "main.c"], cwd=tmp_path, check=True)
    program = Program.of_file(tmp_path / "program")
    assert program is not None
    built.program = program
    (tmp_path / "new").mkdir()
    found = built.verdicts(tmp_path / "new", HELD.replace("struct single { int a,", "struct single { int x, a,"))
    assert found["struct single"].elsewhere == (str(tmp_path / "main.c"),)
    assert not found["struct single"].accepted
