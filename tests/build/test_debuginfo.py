"""Commands put together from debug information: the same code must come out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from patcher.build import BuildCommand, Commands, Compiler
from patcher.build.debuginfo import DebugInformation
from patcher.errors import BuildError, NoCompileCommand

from .conftest import run, section_bytes

MAIN = "int outside; extern int unit(int); int main(int argc, char **argv) { return unit(argc) + (argv == 0); }\n"


@pytest.fixture
def build(project: Path) -> Callable[..., Path]:
    """Compile src/unit.c with given switches, in sections of its own to be comparable, and link a program."""
    (project / "main.c").write_text(MAIN)

    def compile_and_link(*switches: str, cc: str = "gcc", name: str = "src/unit.c", directory: Path = project) -> Path:
        run(cc, *switches, "-ffunction-sections", "-c", name, "-o", str(project / "unit.o"), cwd=directory)
        position = ["-no-pie"] if "-fno-pie" in switches else []
        run("gcc", "-g", *position, "main.c", "unit.o", "-o", "prog", cwd=project)
        return project / "prog"

    return compile_and_link


def assert_same_code(project: Path, program: Path, compiler: Compiler) -> None:
    command = Commands(watched=[project], programs=[program]).find(project / "src/unit.c")
    assert command.derived
    assert str(program) in command.origin
    unit = compiler.compile(command)
    assert section_bytes(project / "unit.o", ".text") != b""
    assert section_bytes(unit.object, ".text") == section_bytes(project / "unit.o", ".text")
    assert section_bytes(unit.object, ".rodata") == section_bytes(project / "unit.o", ".rodata")


@pytest.mark.parametrize("level", ["-O0", "-O2", "-Os"])
@pytest.mark.parametrize("debug", ["-gdwarf-4", "-gdwarf-5"])
@pytest.mark.parametrize("directory", [".", "src", "build/deep"])
def test_same_code(
    project: Path, build: Callable[..., Path], compiler: Compiler, level: str, debug: str, directory: str
) -> None:
    place = project / directory
    place.mkdir(parents=True, exist_ok=True)
    up = {".": "", "src": "../", "build/deep": "../../"}[directory]
    program = build(level, debug, f"-I{up}include", name=f"{up}src/unit.c", directory=place)
    assert_same_code(project, program, compiler)


@pytest.mark.parametrize(
    "switches",
    [
        ("-O2", "-fno-pie", "-std=c99"),
        ("-O3", "-march=native", "-fno-strict-aliasing"),
        ("-O2", "-fPIC", "-fno-omit-frame-pointer", "-mcmodel=large"),
        ("-O2", "-flto", "-ffat-lto-objects"),
        ("-O1", "-gz", "-fstack-protector-all"),
    ],
)
def test_switches_come_back(
    project: Path, build: Callable[..., Path], compiler: Compiler, switches: tuple[str]
) -> None:
    program = build("-g", *switches, "-Iinclude")
    assert_same_code(project, program, compiler)


def test_absolute_and_linked_paths(
    project: Path, tmp_path: Path, build: Callable[..., Path], compiler: Compiler
) -> None:
    (tmp_path / "link").symlink_to(project)
    program = build("-g", "-O2", f"-I{tmp_path}/link/include", name=f"{tmp_path}/link/src/../src/unit.c")
    assert_same_code(project, program, compiler)


def test_header_of_macros_only_is_found_through_another_unit(project: Path, compiler: Compiler) -> None:
    (project / "far").mkdir()
    (project / "far/far.h").write_text("#define FAR 7\nstruct far { int n; };\n")
    (project / "user.c").write_text("#include <far.h>\nint user(struct far *f) { return f->n; }\n")
    (project / "src/unit.c").write_text("#include <far.h>\nint unit(int n) { return n + FAR; }\n")
    (project / "main.c").write_text("int main(void) { return 0; }\n")
    for name in ("user.c", "src/unit.c"):
        run("gcc", "-g", "-O2", "-Ifar", "-c", name, "-o", f"{Path(name).stem}.o", cwd=project)
    run("gcc", "main.c", "user.o", "unit.o", "-o", "prog", cwd=project)
    unit = compiler.compile(Commands(programs=[project / "prog"]).find(project / "src/unit.c"))
    assert section_bytes(unit.object, ".text") == section_bytes(project / "unit.o", ".text")


def test_headers_of_a_package_below_a_system_directory(
    project: Path, build: Callable[..., Path], compiler: Compiler
) -> None:
    source = project / "src/unit.c"
    source.write_text("#include <stdio.h>\n#include <pthread.h>\n#include <sys/stat.h>\n" + source.read_text())
    program = build("-g", "-O2", "-Iinclude")
    assert_same_code(project, program, compiler)
    arguments = Commands(programs=[program]).find(source).arguments
    assert "-I/usr/include" not in arguments
    assert not any(word.startswith("-I/usr/lib/gcc") for word in arguments)


def test_cplusplus(project: Path, compiler: Compiler) -> None:
    (project / "src/unit.cpp").write_text("#include <string>\nstd::string f(int n) { return std::to_string(n); }\n")
    (project / "main.cpp").write_text("int main() { return 0; }\n")
    run("g++", "-g", "-O2", "-ffunction-sections", "-c", "src/unit.cpp", "-o", "unit.o", cwd=project)
    run("g++", "-g", "main.cpp", "unit.o", "-o", "prog", cwd=project)
    command = Commands(programs=[project / "prog"]).find(project / "src/unit.cpp")
    assert command.arguments[0] == "g++"
    unit = compiler.compile(command)
    assert section_bytes(unit.object, ".text") == section_bytes(project / "unit.o", ".text")


def test_two_files_of_one_name(project: Path, compiler: Compiler) -> None:
    for number in (1, 2):
        (project / f"d{number}").mkdir()
        (project / f"d{number}/same.c").write_text(f"int same{number}(void) {{ return {number}; }}\n")
        run("gcc", "-g", f"-O{number}", "-c", "same.c", "-o", f"../same{number}.o", cwd=project / f"d{number}")
    (project / "main.c").write_text("int main(void) { return 0; }\n")
    run("gcc", "main.c", "same1.o", "same2.o", "-o", "prog", cwd=project)
    commands = Commands(programs=[project / "prog"])
    for number in (1, 2):
        command = commands.find(project / f"d{number}/same.c")
        assert command.directory == project / f"d{number}"
        assert f"-O{number}" in command.arguments


def test_missing_definition_says_why(project: Path, build: Callable[..., Path], compiler: Compiler) -> None:
    source = project / "src/unit.c"
    source.write_text(source.read_text() + "int defined(void) { return DEFINED; }\n".replace("defined", "given"))
    program = build("-g", "-O2", "-DDEFINED=3", "-Iinclude")
    command = Commands(programs=[program]).find(source)
    with pytest.raises(BuildError) as caught:
        compiler.compile(command)
    assert "DEFINED" in caught.value.diagnostics
    for word in ("-D switches", "--compile-commands", "bear -- make", str(program)):
        assert word in caught.value.hint


def test_clang_records_nothing_by_itself(project: Path, build: Callable[..., Path]) -> None:
    program = build("-g", "-O2", "-Iinclude", cc="clang")
    with pytest.raises(NoCompileCommand, match="clang recorded no switches") as caught:
        Commands(programs=[program]).find(project / "src/unit.c")
    assert "CMAKE_EXPORT_COMPILE_COMMANDS" in caught.value.hint


def test_clang_that_records(project: Path, build: Callable[..., Path], compiler: Compiler) -> None:
    source = project / "src/unit.c"
    source.write_text(source.read_text() + "const char *text(void) { return TEXT; }\n")
    program = build("-g", "-O2", "-Iinclude", '-DTEXT="a b"', "-grecord-command-line", cc="clang")
    command = Commands(programs=[program]).find(source)
    assert not command.derived
    unit = compiler.compile(command)
    assert section_bytes(unit.object, ".text") == section_bytes(project / "unit.o", ".text")
    assert section_bytes(unit.object, ".rodata") == section_bytes(project / "unit.o", ".rodata")


def test_a_database_comes_first(project: Path, build: Callable[..., Path], database: Callable[..., Path]) -> None:
    program = build("-g", "-O2", "-Iinclude")
    database("gcc", "-Os", "-c", "src/unit.c")
    assert "-Os" in Commands(watched=[project / "src"], programs=[program]).find(project / "src/unit.c").arguments


def test_program_without_debug_information(project: Path, build: Callable[..., Path]) -> None:
    program = build("-O2", "-Iinclude")
    run("strip", str(program), cwd=project)
    text = project / "text"
    text.write_text("no program")
    with pytest.raises(NoCompileCommand) as caught:
        Commands(programs=[program, text, project / "gone"]).find(project / "src/unit.c")
    assert f"the debug information of {program}, which is not there" in caught.value.message


def test_compilation_directory_that_is_gone(project: Path, build: Callable[..., Path]) -> None:
    program = build("-g", "-O2", "-Iinclude", f"-fdebug-prefix-map={project}=/no/such/place")
    with pytest.raises(NoCompileCommand) as caught:
        Commands(programs=[program]).find(project / "src/unit.c")
    assert caught.value.hint


def test_the_index_has_every_unit(project: Path) -> None:
    names = [f"many{number}.c" for number in range(100)]
    for number, name in enumerate(names):
        (project / name).write_text(f"#include <stddef.h>\nint many{number}(size_t n) {{ return (int)n; }}\n")
    (project / "main.c").write_text("int main(void) { return 0; }\n")
    run("gcc", "-g", "-O1", "main.c", *names, "-o", "prog", cwd=project)
    information = DebugInformation(project / "prog")
    assert all(information.units(project / name) for name in names)
    assert len(information) == 101


def test_build_command_returns_what_it_made(project: Path) -> None:
    (project / "old.o").write_bytes(b"old")
    (project / "Makefile").write_text("unit.o: src/unit.c src/beside.h\n\tgcc -Iinclude -c $< -o $@ && echo done\n")
    build = BuildCommand("make", directory=project)
    assert build.run([project / "src/unit.c"]) == (project / "unit.o",)
    assert build.run([project / "src/unit.c"]) == ()
    (project / "src/unit.c").write_text("int unit(void) { return 2; }\n")
    assert build.run([project / "src/unit.c"]) == (project / "unit.o",)


def test_build_command_in_another_directory(project: Path, tmp_path: Path) -> None:
    out = tmp_path / "objects"
    build = BuildCommand(f"mkdir -p {out}/x && : > {out}/x/unit.c.o", directory=project, objects_in=[out])
    assert build.run([]) == (out / "x/unit.c.o",)


def test_build_command_that_fails(project: Path) -> None:
    with pytest.raises(BuildError, match="status 3") as caught:
        BuildCommand("echo to-out; echo to-err >&2; exit 3", directory=project).run([project / "src/unit.c"])
    assert caught.value.diagnostics == "to-out\nto-err\n"
    assert caught.value.file == str(project / "src/unit.c")
    with pytest.raises(BuildError, match="nowhere"):
        BuildCommand("true", directory=project / "nowhere").run([])
