"""Objects made with the user's command: theirs in code, ours in place, and nothing of theirs overwritten."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from patcher.build import (
    INDIRECT,
    LARGE,
    LINE_SHIFT,
    PLAIN,
    SHIFTED,
    BuildCancelled,
    Commands,
    CompileCommand,
    Compiler,
    Family,
    identify,
)
from patcher.build.command import object_arguments
from patcher.errors import BuildError

from .conftest import file_symbol, run, section_bytes, section_names

COMPILERS = ["gcc", "clang"]


def command_of(directory: Path, *arguments: str, file: str = "src/unit.c") -> CompileCommand:
    return CompileCommand(directory, arguments, (directory / file).resolve(), "this test")


@pytest.mark.parametrize("cc", COMPILERS)
def test_sections_of_its_own(project: Path, compiler: Compiler, cc: str) -> None:
    unit = compiler.compile(command_of(project, cc, "-O2", "-Iinclude", "-c", "src/unit.c", "-o", "unit.o"))
    assert {".text.unit", ".text.line"} <= section_names(unit.object)
    assert unit.source == project / "src/unit.c"
    assert unit.milliseconds > 1
    assert unit.command[:2] == (cc, "-O2")
    assert unit.diagnostics == ""


@pytest.mark.parametrize("cc", COMPILERS)
@pytest.mark.parametrize("output", [("-o", "unit.o"), ("-ounit.o",)])
def test_nothing_of_the_users_is_written(
    project: Path, compiler: Compiler, cc: str, output: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEPENDENCIES_OUTPUT", str(project / "deps"))
    (project / "more.rsp").write_text("-MD -MF rsp.d -Iinclude")
    switches = (
        "-MD",
        "-MMD",
        "-MP",
        "-MF",
        "unit.d",
        "-MTx",
        "-MQ",
        "y",
        "-Wp,-MMD,wp.d",
        "-save-temps",
        "-flto",
        "-S",
    )
    before = {path: path.stat().st_mtime_ns for path in project.rglob("*")}
    command = command_of(project, cc, "-Wall", *switches, "@more.rsp", *output, "src/unit.c", "-lm", "-Wl,-O1")
    unit = compiler.compile(command)
    assert {path: path.stat().st_mtime_ns for path in project.rglob("*")} == before
    assert ".text.unit" in section_names(unit.object)
    assert unit.diagnostics == ""


def test_response_file_without_outputs_stays(project: Path, compiler: Compiler) -> None:
    (project / "flags.rsp").write_text("-Iinclude -O2")
    unit = compiler.compile(command_of(project, "gcc", "@flags.rsp", "-c", "src/unit.c"))
    assert "@flags.rsp" in unit.command


def test_source_in_a_response_file(project: Path, compiler: Compiler) -> None:
    (project / "all.rsp").write_text("-Iinclude -c src/unit.c -o unit.o")
    unit = compiler.compile(command_of(project, "gcc", "@all.rsp"), variant=SHIFTED)
    assert unit.object.exists()
    assert not (project / "unit.o").exists()


def test_command_that_links_several_sources(project: Path, compiler: Compiler) -> None:
    (project / "main.c").write_text("int outside; int main(void) { return 0; }\n")
    command = command_of(project, "gcc", "-Iinclude", "main.c", "src/unit.c", "-o", "prog", "-lm")
    assert ".text.unit" in section_names(compiler.compile(command).object)


def test_wrapper_before_the_compiler(project: Path, compiler: Compiler) -> None:
    command = command_of(project, "env", "LANG=C", "gcc", "-Iinclude", "-c", "src/unit.c")
    assert compiler.compile(command, variant=SHIFTED | INDIRECT).object.exists()


@pytest.mark.parametrize("cc", COMPILERS)
@pytest.mark.parametrize(("directory", "name"), [(".", "src/unit.c"), ("src", "unit.c"), ("include", "../src/unit.c")])
@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_shifted_moves_lines_and_nothing_else(
    project: Path, compiler: Compiler, cc: str, directory: str, name: str, level: str
) -> None:
    place = project / directory
    includes = ("-I.", f"-I{project / 'include'}")
    arguments = (cc, level, *includes, "-Wall", "-Werror", "-pedantic-errors", "-std=c99", "-c", name)
    command = CompileCommand(place, arguments, project / "src/unit.c", "this test")
    plain, shifted = compiler.compile(command), compiler.compile(command, variant=SHIFTED)
    for section in (".text.unit", ".text.names", ".rodata"):  # __FILE__ of the unit and of its headers
        assert section_bytes(plain.object, section) == section_bytes(shifted.object, section)
    before, after = section_bytes(plain.object, ".text.line"), section_bytes(shifted.object, ".text.line")
    lines = [before.index((4).to_bytes(4, "little")), after.index((4 + LINE_SHIFT).to_bytes(4, "little"))]
    assert lines[0] == lines[1]
    assert name.encode() in section_bytes(shifted.object, ".rodata")
    assert file_symbol(plain.object) == file_symbol(shifted.object)


@pytest.mark.parametrize("cc", COMPILERS)
def test_older_text(project: Path, compiler: Compiler, cc: str) -> None:
    command = command_of(project, cc, "-O1", "-Iinclude", "-c", "src/unit.c")
    old = (project / "src/unit.c").read_bytes()
    baseline = compiler.compile(command)
    (project / "src/unit.c").write_text("this is no C\n")
    again = compiler.compile(command, text=old)
    for section in (".text", ".rodata"):
        assert section_bytes(baseline.object, section) == section_bytes(again.object, section)
    assert file_symbol(again.object) == "unit.c"
    with pytest.raises(BuildError):
        compiler.compile(command)


@pytest.mark.parametrize("cc", COMPILERS)
@pytest.mark.parametrize("position", ["-fPIE", "-fno-pie"])
def test_indirect_reaches_external_data_through_the_got(
    project: Path, compiler: Compiler, cc: str, position: str
) -> None:
    def kinds(path: Path) -> set[int]:
        with path.open("rb") as file:
            elf = ELFFile(file)
            symbols = elf.get_section_by_name(".symtab")
            relocations = elf.get_section_by_name(".rela.text.unit").iter_relocations()
            return {r["r_info_type"] for r in relocations if symbols.get_symbol(r["r_info_sym"]).name == "outside"}

    got = {9, 41, 42}  # GOTPCREL, GOTPCRELX, REX_GOTPCRELX
    command = command_of(project, cc, "-O2", position, "-Iinclude", "-c", "src/unit.c")
    if (cc, position) != ("clang", "-fPIE"):  # which does so anyway
        assert not kinds(compiler.compile(command).object) & got
    indirect = kinds(compiler.compile(command, variant=INDIRECT).object)
    assert indirect
    assert indirect <= got


@pytest.mark.parametrize("cc", COMPILERS)
def test_large_reaches_everything_by_full_addresses(project: Path, compiler: Compiler, cc: str) -> None:
    command = command_of(project, cc, "-O2", "-fno-pie", "-Iinclude", "-c", "src/unit.c")
    with compiler.compile(command, variant=LARGE).object.open("rb") as file:
        relocations = ELFFile(file).get_section_by_name(".rela.text.unit").iter_relocations()
        assert 1 in {r["r_info_type"] for r in relocations}  # R_X86_64_64


def test_failure_has_the_diagnostics_verbatim(project: Path, tmp_path: Path) -> None:
    (project / "src/unit.c").write_text("int unit(void) { return missing; }\n")
    command = command_of(project, "gcc", "-c", "src/unit.c")
    for colour in (False, True):
        with Compiler(tmp_path, colour=colour) as compiler, pytest.raises(BuildError) as caught:
            compiler.compile(command)
        assert "src/unit.c:1:" in caught.value.diagnostics.replace("\x1b[01m\x1b[K", "")
        assert "missing" in caught.value.diagnostics
        assert ("\x1b[" in caught.value.diagnostics) is colour
        assert caught.value.file == str(project / "src/unit.c")
        assert caught.value.hint


def test_warnings_are_kept(project: Path, compiler: Compiler) -> None:
    (project / "src/unit.c").write_text("int unit(void) { int unused; return 1; }\n")
    unit = compiler.compile(command_of(project, "gcc", "-Wall", "-c", "src/unit.c"))
    assert "unused" in unit.diagnostics


def test_compiler_that_is_not_there(project: Path, compiler: Compiler) -> None:
    with pytest.raises(BuildError, match="no-such-gcc") as caught:
        compiler.compile(command_of(project, "no-such-gcc", "-c", "src/unit.c"))
    assert "this test" in caught.value.message
    gone = CompileCommand(project / "gone", ("gcc", "-c", "src/unit.c"), project / "src/unit.c", "this test")
    with pytest.raises(BuildError, match="gone, named by this test, is not there"):
        compiler.compile(gone)


def test_the_directory_is_private_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with Compiler() as compiler:
        assert compiler.directory.parent == tmp_path / "patcher"
        assert compiler.directory.stat().st_mode & 0o777 == 0o700
        (compiler.directory / "something").mkdir()
    assert not compiler.directory.exists()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "not-there"))
    with Compiler() as compiler:
        assert compiler.directory.is_dir()


def test_discard(project: Path, compiler: Compiler) -> None:
    unit = compiler.compile(command_of(project, "gcc", "-Iinclude", "-c", "src/unit.c"))
    compiler.discard(unit)
    assert list(compiler.directory.iterdir()) == []


def test_all_in_parallel_and_in_order(project: Path, compiler: Compiler) -> None:
    commands = []
    for number in range(5):
        (project / f"u{number}.c").write_text(f"int u{number}(void) {{ return {number}; }}\n")
        commands.append(command_of(project, "gcc", "-c", f"u{number}.c", file=f"u{number}.c"))
    units = compiler.compile_all(commands)
    assert [unit.source.name for unit in units] == [f"u{number}.c" for number in range(5)]
    assert all(f".text.u{number}" in section_names(unit.object) for number, unit in enumerate(units))
    for number in (1, 3):
        (project / f"u{number}.c").write_text(f"broken{number}\n")
    with pytest.raises(BuildError) as caught:
        compiler.compile_all(commands)
    assert "broken1" in caught.value.diagnostics
    assert "broken3" in caught.value.diagnostics


def slow_compiler(project: Path) -> tuple[CompileCommand, Path]:
    """A compiler that says it runs, in a FIFO, and whose child would run for ever; both ignore a polite request."""
    script, started = project / "slow-gcc", project / "started"
    script.write_text(
        f"#!/bin/sh\ntrap '' TERM\nsleep 1000 &\necho $$ $! > {started}.tmp\nmv {started}.tmp {started}\nwait\n"
    )
    script.chmod(0o755)
    return command_of(project, str(script), "-c", "src/unit.c"), started


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_cancel_ends_the_whole_group(project: Path, compiler: Compiler) -> None:
    command, started = slow_compiler(project)
    fine = command_of(project, "gcc", "-Iinclude", "-c", "src/unit.c")
    with pytest.raises(BuildCancelled):
        compiler.compile_all([command, fine], cancelled=started.exists)
    pids = started.read_text().split()
    assert len(pids) == 2
    deadline = time.monotonic() + 5
    while any(map(is_running, pids)):  # the child is init's now, which takes its time
        assert time.monotonic() < deadline
    assert compiler.compile(fine).object.exists()


def test_cancel_from_another_thread(project: Path, compiler: Compiler) -> None:
    command, started = slow_compiler(project)
    enough = threading.Event()
    caught: list[BuildCancelled] = []

    def build() -> None:
        try:
            compiler.compile(command, cancelled=enough.is_set)
        except BuildCancelled as error:
            caught.append(error)

    thread = threading.Thread(target=build)
    thread.start()
    while not started.exists():
        assert thread.is_alive()
    enough.set()
    thread.join(5)
    assert len(caught) == 1


class Started:
    """The programs that this process started while `counting` was set; an audit hook stays for good."""

    def __init__(self) -> None:
        self.programs: list[str] = []
        self.counting = False
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.counting and event == "subprocess.Popen":
            self.programs.append(str(arguments[0]))


def test_nothing_but_the_compiler_is_run(project: Path, compiler: Compiler, database: Callable[..., Path]) -> None:
    database("gcc", "-Iinclude", "-c", "src/unit.c")
    commands = Commands(watched=[project])
    compiler.compile(commands.find(project / "src/unit.c"), variant=PLAIN)
    started = Started()
    started.counting = True
    compiler.compile(commands.find(project / "src/unit.c"))
    started.counting = False
    assert [Path(program).name for program in started.programs] == ["gcc"]


def test_cplusplus(project: Path, compiler: Compiler) -> None:
    (project / "src/unit.cpp").write_text(
        "#include <string>\nnamespace { int hidden(int n) { return n + __LINE__; } }\n"
        "std::string text(int n) { return std::to_string(hidden(n)); }\n"
    )
    for cxx in ("g++", "clang++"):
        command = command_of(project, cxx, "-O2", "-c", "src/unit.cpp", file="src/unit.cpp")
        plain, shifted = compiler.compile(command), compiler.compile(command, variant=SHIFTED)
        names = section_names(plain.object) ^ section_names(shifted.object)
        assert names == set()
        run("nm", str(plain.object), cwd=project)


def test_how_far_it_has_come_is_told(project: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    commands = []
    for number in range(3):
        file = project / f"src/more{number}.c"
        file.write_text("int x;\n")
        commands.append(CompileCommand(project, ("gcc", "-c", f"src/more{number}.c"), file, "test"))
    with Compiler(tmp_path / "own", progress=lambda done, total: told.append((done, total))) as compiler:
        compiler.compile_all(commands)
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("cc", COMPILERS)
def test_texts_that_are_not_on_disk_any_more(project: Path, compiler: Compiler, cc: str) -> None:
    """Headers beside the unit and by -I, as they were; all others are found where they are."""
    command = CompileCommand(project, (cc, "-Iinclude", "-c", "src/unit.c"), project / "src/unit.c", "test")
    (project / "include/third.h").write_text("static inline int third(void) { return 3; }\n")
    wide = b'#include "../third.h"\nstatic inline const char *wide(void) { return "as it was" + third(); }\n'
    beside = b'static inline int beside(int n) { return n; }\nstatic inline const char *where(void) { return "old"; }\n'
    headers = {
        project / "include/sub/wide.h": wide,
        project / "src/beside.h": beside,
        project / "include/third.h": b"static inline int third(void) { return 0; }\n",
    }
    text = (project / "src/unit.c").read_bytes()
    for file in headers:
        file.write_text("#error not this one\n")
    unit = compiler.compile(command, text=text, headers=headers)
    assert b"as it was" in unit.object.read_bytes()
    assert b"old" in unit.object.read_bytes()
    assert str(compiler.directory).encode() not in section_bytes(unit.object, ".rodata")


@pytest.mark.parametrize("before", [("distcc",), ("icecc",), ("ccache", "distcc"), ("/usr/bin/icecc",)])
@pytest.mark.parametrize("cc", COMPILERS)
def test_compilers_that_are_started_by_others(before: tuple[str, ...], cc: str, project: Path) -> None:
    """The wrapper stays before its compiler, which is known for what it is; what is made is ours all the same."""
    command = command_of(project, *before, cc, "-Iinclude", "-MD", "-c", "src/unit.c", "-o", "unit.o")
    toolchain = identify(command.arguments, command.directory)
    assert (toolchain.program, toolchain.family) == (cc, Family.GCC if cc == "gcc" else Family.CLANG)
    words = object_arguments(command, project / "ours.o", toolchain=toolchain)
    assert words[: len(before) + 1] == (*before, cc)
    assert words[-2:] == ("-o", str(project / "ours.o"))
    assert "unit.o" not in words
    assert "-MD" not in words
