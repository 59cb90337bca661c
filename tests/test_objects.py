"""Objects as other tools make them, applied to a process: partial links, archives, LTO, compressed debug sections."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from project import MAIN, Project

import patcher
from patcher import ObjectError
from patcher.report import Event, Note
from patcher.session import Session
from patcher.target import Target

ONE = """\
static int calls = 5;
static int scale(int n) { return 2 * n; }
int two(int n);
int answer(int n) { calls++; return scale(n) + 1000 * calls + two(n); }
"""
TWO = """\
static int again = 7;
static int larger(int n) { return 30 * n; }
__attribute__((noinline)) int two(int n) { again++; return larger(n) + 100000 * again; }
"""
EDITS = {"one.c": ("2 * n", "3 * n"), "two.c": ("30 * n", "40 * n")}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path, {"main.c": MAIN, "one.c": ONE, "two.c": TWO})


def run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True)


def objects(project: Project, flags: Sequence[str]) -> list[Path]:
    return [project.object(name, edit, flags=flags) for name, edit in EDITS.items()]


PLAIN, SECTIONS = (), ("-ffunction-sections", "-fdata-sections")
PARTIAL = [("bfd", ""), ("bfd", "-d"), ("bfd", "--unique"), ("gold", ""), ("lld", ""), ("mold", "")]


def link_partly(project: Project, linker: str, how: str, flags: Sequence[str]) -> Path:
    merged = project.root / "merged.o"
    run(f"ld.{linker}", "-r", *([how] if how else []), "-o", merged, *objects(project, flags))
    return merged


@pytest.mark.parametrize("flags", [PLAIN, SECTIONS], ids=["plain", "sections"])
@pytest.mark.parametrize(("linker", "how"), PARTIAL)
def test_a_partial_link_of_two_units(project: Project, flags: Sequence[str], linker: str, how: str) -> None:
    with project.running() as program, patcher.attach(program.pid) as session:
        assert program.ask(1) == str(2 + 6000 + 30 + 800000)
        done = session.apply(link_partly(project, linker, how, flags))
        assert {f.name for f in done.functions} == {"answer", "two"}
        assert program.ask(1) == str(3 + 7000 + 40 + 900000)
        session.apply(
            project.object(
                "two.c",
                ("30 * n", "50 * n"),
                ("again = 7", "again = 7, more = 1"),
                ("n) + 100000", "n) + more++ + 100000"),
            )
        )
        assert program.ask(1) == str(3 + 8000 + 51 + 1000000)
        session.apply(project.object("one.c", ("2 * n", "4 * n")))
        assert program.ask(1) == str(4 + 9000 + 52 + 1100000)
        session.revert(0)
        assert program.ask(1) == str(2 + 10000 + 30 + 1200000)


def test_a_partial_link_of_units_with_statics_of_one_name(tmp_path: Path) -> None:
    project = Project(tmp_path, {"main.c": MAIN, "one.c": ONE, "two.c": TWO.replace("again", "calls")})
    with project.running() as program, patcher.attach(program.pid) as session:
        with pytest.raises(patcher.PatcherError, match=r"both one.c and two.c have a static `calls`") as refusal:
            session.apply(link_partly(project, "bfd", "", PLAIN))
        assert refusal.value.code == "ambiguous-symbol"
        assert program.ask(1) == str(2 + 6000 + 30 + 800000)


@pytest.mark.parametrize("thin", [False, True])
def test_archives(project: Project, thin: bool) -> None:
    one, two = objects(project, SECTIONS)
    long = two.with_name("a_name_that_does_not_fit_into_an_archive_header.o")
    two.rename(long)
    archive = project.root / "libparts.a"
    run("ar", "rcsT" if thin else "rcs", archive, one, long)
    assert archive.read_bytes()[:7] == (b"!<thin>" if thin else b"!<arch>")
    with project.running() as program, patcher.attach(program.pid) as session:
        session.apply(archive)
        assert program.ask(1) == str(3 + 6000 + 40 + 800000)
        if thin:
            long.unlink()
            with pytest.raises(ObjectError, match=r"a_name_that_does_not_fit_into_an_archive_header.o"):
                session.apply(archive)


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_an_object_with_both_machine_code_and_bytecode(tmp_path: Path, compiler: str) -> None:
    if compiler == "clang":
        pytest.skip("clang 14 has no -ffat-lto-objects")
    project = Project(tmp_path, {"main.c": MAIN, "one.c": ONE, "two.c": TWO})
    with project.running() as program, patcher.attach(program.pid) as session:
        session.apply(*objects(project, ("-flto", "-ffat-lto-objects", *SECTIONS)))
        assert program.ask(1) == str(3 + 6000 + 40 + 800000)


@pytest.mark.parametrize("command", [("gcc", "-flto"), ("clang", "-flto"), ("clang", "-flto=thin")], ids="-".join)
@pytest.mark.parametrize("packed", [False, True])
def test_bytecode_alone_is_refused(project: Project, command: tuple[str, ...], packed: bool) -> None:
    given = project.root / "bytecode.o"
    run(*command, "-O2", "-c", project.sources / "one.c", "-o", given)
    if packed:
        given = project.root / "libbytecode.a"
        run("gcc-ar", "rcs", given, project.root / "bytecode.o")
    with project.running() as program, patcher.attach(program.pid) as session:
        with pytest.raises(ObjectError, match=r"bytecode.o.*LTO") as refusal:
            session.apply(given)
        assert "-fno-lto" in refusal.value.hint
        assert program.ask(1) == str(2 + 6000 + 30 + 800000)


def with_swapped_members(project: Project) -> Path:
    """Return an object that sees the members of a live structure in another order."""
    text = ONE.replace("int two", "struct pair { int x, y; } kept;\nint two").replace("calls++;", "kept.y++, calls++;")
    (project.sources / "one.c").write_text(text)
    project.build()
    return project.object("one.c", ("int x, y;", "int y, x;"))


def test_compressed_debug_sections_are_read(project: Project) -> None:
    given = with_swapped_members(project)
    run("objcopy", "--compress-debug-sections=zlib", given)
    with project.running() as program, patcher.attach(program.pid) as session:
        done = session.apply(given)
        assert ("kept", "migrated") in {(v.name, v.outcome) for v in done.variables}
        assert program.ask(1) == str(2 + 6000 + 30 + 800000)


class Notes:
    """Keeps what a session says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def emit(self, event: Event) -> None:
        self.said += [event.text] if isinstance(event, Note) else []


@pytest.mark.parametrize("kind", ["zlib-gnu", "zstd"])
def test_debug_sections_that_cannot_be_read_are_said_to_be_unchecked(project: Project, kind: str) -> None:
    given = with_swapped_members(project)
    run("objcopy", f"--compress-debug-sections={kind}", given)
    notes = Notes()
    with project.running() as program, Session(Target.attach(program.pid), None, notes) as session:
        session.apply(given)
        assert program.ask(1) == str(2 + 6000 + 30 + 800000)
    assert any("one.o" in said and "not checked" in said for said in notes.said)


def test_an_object_of_more_sections_than_a_symbol_can_number(project: Project, tmp_path: Path) -> None:
    filler = tmp_path / "filler.s"
    filler.write_text("".join(f'.section .text.f{i},"ax",@progbits\nf{i}: ret\n' for i in range(66_000)))
    run("as", "-o", tmp_path / "filler.o", filler)
    merged = tmp_path / "many.o"
    run("ld", "-r", "--unique", "-o", merged, tmp_path / "filler.o", *objects(project, SECTIONS))
    with project.running() as program, patcher.attach(program.pid) as session:
        session.apply(merged)
        assert program.ask(1) == str(3 + 6000 + 40 + 800000)


@pytest.mark.parametrize("alignment", [4096, 65536, 1 << 21])
def test_new_storage_of_large_alignment(project: Project, alignment: int) -> None:
    edits = (
        ("static int calls", f"_Alignas({alignment}) static char wide[8192] = {{1}};\nstatic int calls"),
        (
            "return scale(n)",
            "if ((unsigned long)wide % sizeof wide % 4096) return -1;\n wide[n]++;\n return wide[n] + scale(n)",
        ),
    )
    with project.running() as program, patcher.attach(program.pid) as session:
        session.apply(project.object("one.c", *edits))
        assert program.ask(1) == str(1 + 2 + 6000 + 30 + 800000)
        assert program.ask(1) == str(2 + 2 + 7000 + 30 + 900000)
        wide = next(p for p in session.ledger.journal.placed if p.name == "wide")
        assert wide.address % alignment == 0
