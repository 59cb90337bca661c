"""A saved header that makes no difference to a unit: the object of its last compile stands, and only then."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from patcher.build import CompileCommand, CompiledUnit, Compiler
from patcher.build.dependencies import prerequisites
from patcher.build.expansion import expansion_of
from patcher.build.expansions import now, worth_asking

from .objects import lines

HEADER = "#define USED 3\nextern int shared;\nstruct Pair { int a, b; };\nenum Kind { ONE, TWO };\nint other(int);\n"
CODE = "static inline int twice(int n) { return 2 * n + __LINE__; }\n"
# long enough for the preprocessor to take less than a quarter of the compile; that word keeps preambles out of the way
UNIT = '#include "shared.h" /* __DATE__ */\nint shared;\n' + "".join(
    f"int f{n}(int x) {{ for (int i = 0; i < x; i++) shared += i * USED; return shared + {n}; }}\n" for n in range(100)
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    root = tmp_path / "place"
    root.mkdir()
    (root / "shared.h").write_text(HEADER)
    (root / "unit.c").write_text(UNIT)
    return root


@pytest.fixture
def command(place: Path, request: pytest.FixtureRequest) -> CompileCommand:
    return command_of(place, getattr(request, "param", "gcc"), "-g", "-O1")


@pytest.fixture
def learning(tmp_path: Path) -> Iterator[Compiler]:
    with Compiler(tmp_path / "objects") as compiler:
        compiler.learn([])
        yield compiler


def command_of(place: Path, *words: str, name: str = "unit.c") -> CompileCommand:
    return CompileCommand(place, (*words, "-c", name), (place / name).resolve(), "this test")


def settle(place: Path) -> None:
    """Return when a file that is written from now on gets another stamp than those that are there."""
    written = max(max(p.stat().st_mtime_ns, p.stat().st_ctime_ns) for p in (place, *place.iterdir()))
    while now() <= written:
        continue


def built(compiler: Compiler, command: CompileCommand) -> CompiledUnit:
    settle(command.directory)
    (unit,) = compiler.compile_all([command])
    compiler.await_learnt()
    return unit


def save(place: Path, text: str, name: str = "shared.h") -> None:
    (place / name).write_text(text)


def is_kept(unit: CompiledUnit) -> bool:
    return unit.milliseconds == 0.0


def plain(command: CompileCommand, made: Path) -> Path:
    words = (*command.arguments, "-ffunction-sections", "-fdata-sections", "-fno-lto", "-o", str(made))
    subprocess.run(words, cwd=command.directory, check=True, capture_output=True)
    return made


NO_DIFFERENCE = {
    "nothing": HEADER,
    "an unused macro": "#define UNUSED(x) (x)\n" + HEADER,
    "an unused macro's value": HEADER + "#define UNUSED 7\n",
    "a block that is left out": HEADER + "#if 0\nint nowhere(void) { return 1; }\n#endif\n",
    "a comment of many lines": "/*" + "\n" * 20 + "*/\n" + HEADER,
}
DIFFERENCE = {
    "a used macro": HEADER.replace("USED 3", "USED 4"),
    "a declaration": HEADER + "int more(void);\n",
    "a member": HEADER.replace("int a, b;", "int a, b, c;"),
    "a pragma": HEADER + "#pragma GCC visibility push(default)\n",
    "code": HEADER + CODE,
    "another header": HEADER + '#include "second.h"\n',
}


def both(cases: Iterable[str]) -> list[tuple[str, str]]:
    """Return all of some cases for one compiler, and two of them for the other, which says the same otherwise."""
    names = list(cases)
    return [("gcc", name) for name in names] + [("clang", name) for name in names[1:3]]


@pytest.mark.parametrize(("command", "what"), both(NO_DIFFERENCE), indirect=["command"])
def test_a_header_that_makes_no_difference_compiles_nothing(
    what: str, command: CompileCommand, place: Path, learning: Compiler, tmp_path: Path
) -> None:
    built(learning, command)
    save(place, NO_DIFFERENCE[what])
    unit = built(learning, command)
    assert is_kept(unit)
    made = plain(command, tmp_path / "plain.o")
    assert lines(unit.object) == lines(made)
    read = [file for file in prerequisites(unit.listing, place) if file.is_relative_to(place)]
    assert read == [place / "unit.c", place / "shared.h"]


@pytest.mark.parametrize(("command", "what"), both(DIFFERENCE), indirect=["command"])
def test_a_header_that_makes_a_difference_compiles(
    what: str, command: CompileCommand, place: Path, learning: Compiler
) -> None:
    save(place, "int second(void);\n", "second.h")
    built(learning, command)
    save(place, DIFFERENCE[what])
    assert not is_kept(built(learning, command))
    save(place, DIFFERENCE[what] + "#define UNUSED 7\n")
    assert is_kept(built(learning, command))
    save(place, HEADER)
    assert not is_kept(built(learning, command))


@pytest.mark.parametrize("cc", ["gcc", "clang"])
@pytest.mark.parametrize(("first", "kept"), [("#define UNUSED 7\n", False), ("", True)])
def test_lines_count_where_a_header_has_code(cc: str, first: str, kept: bool, place: Path, learning: Compiler) -> None:
    command = command_of(place, cc, "-g", "-O1")
    save(place, CODE + HEADER)
    built(learning, command)
    save(place, first + CODE + HEADER + "#define UNUSED 7\n")
    assert is_kept(built(learning, command)) is kept


@pytest.mark.parametrize(("option", "name"), [("-fsanitize=address", "unit.c"), ("-O0", "unit.cc")])
def test_lines_count_where_data_may_name_them_and_in_cpp(
    option: str, name: str, place: Path, learning: Compiler
) -> None:
    command = command_of(place, "gcc", "-g", option, name=name)
    save(place, UNIT, name)
    built(learning, command)
    save(place, "#define UNUSED 7\n" + HEADER)
    assert not is_kept(built(learning, command))
    save(place, "#define ANOTHER 7\n" + HEADER)
    assert is_kept(built(learning, command))


@pytest.mark.parametrize("option", ["-g3", "-ggdb3"])
def test_macros_in_debug_information_count(option: str, place: Path, learning: Compiler) -> None:
    command = command_of(place, "gcc", option, "-O1")
    built(learning, command)
    save(place, HEADER + "#define UNUSED 7\n")
    assert not is_kept(built(learning, command))


def test_of_a_saved_source_the_preprocessor_is_not_asked(
    command: CompileCommand, place: Path, learning: Compiler
) -> None:
    built(learning, command)
    save(place, UNIT + "#if 0\n#endif\n", "unit.c")
    assert not is_kept(built(learning, command))


def test_a_header_that_changed_while_it_was_compiled_is_not_taken_for_what_was(
    place: Path, learning: Compiler, tmp_path: Path
) -> None:
    # the compiler saves the header itself, behind what it reads
    slow = tmp_path / "gcc"
    saving = f'{{ : >"{tmp_path}/saved"; sed -i s/USED.3/USED\\ 4/ "{place}/shared.h"; }}'
    compiling = f'case "$*" in *-ffunction*.o) [ -e "{tmp_path}/saved" ] || {saving} ;; esac'
    slow.write_text(f'#!/bin/sh\ngcc "$@" && {compiling}\n')
    slow.chmod(0o755)
    command = command_of(place, str(slow), "-g", "-O1")
    settle(place)
    learning.compile_all([command])
    learning.await_learnt()
    assert "USED 4" in (place / "shared.h").read_text()
    assert not is_kept(built(learning, command))
    assert is_kept(built(learning, command))


def test_a_header_that_is_found_earlier_is_seen(place: Path, learning: Compiler) -> None:
    (place / "one").mkdir()
    (place / "two").mkdir()
    save(place, HEADER, "two/shared.h")
    (place / "shared.h").unlink()
    command = command_of(place, "gcc", "-g", "-O1", "-Ione", "-Itwo")
    built(learning, command)
    save(place, HEADER.replace("USED 3", "USED 4"), "one/shared.h")
    assert not is_kept(built(learning, command))


@pytest.mark.parametrize(
    ("times", "asked"),
    [
        ([], ([], [])),
        ([(10, 100)], ([0], [])),
        ([(30, 100)], ([], [])),  # nothing else pays for it, should it have changed
        ([(30, 100)] * 3, ([0, 1], [2])),
        ([(60, 100)] * 40, ([], [])),
        ([(40, 100), (10, 100), (20, 100), (60, 100)], ([1, 2], [0])),
    ],
)
def test_the_preprocessor_is_asked_where_that_pays(
    times: list[tuple[float, float]], asked: tuple[list[int], list[int]]
) -> None:
    assert worth_asking(times, 2) == asked


def test_what_the_assembler_reads_is_no_part_of_the_text() -> None:
    head = b'# 1 "a.c"\n'
    assert expansion_of(head + b"int a;\n", exact=False) is not None
    assert expansion_of(head + b'asm(".incbin \\"data\\"");\n', exact=False) is None
    assert expansion_of(head + b'asm(".INCLUDE \\"data\\"");\n', exact=False) is None


@pytest.mark.parametrize(
    ("text", "shifts"),
    [
        (b"struct S { int a; };\n", True),
        (b"static const int table[] = { 1, 2 };\n", True),
        (b"typedef enum { A, B } E;\n", True),
        (b"static int f(void) { return 1; }\n", False),
        (b"static int f(a) int a; { return a; }\n", False),
        (b"struct S f(void)\n{ struct S s = { 0 }; return s; }\n", False),
    ],
)
def test_a_header_without_code_may_stand_in_other_lines(text: bytes, shifts: bool) -> None:
    def digest(first: bytes) -> bytes:
        parts = b'# 1 "a.c"\n# 1 "h.h" 1\n' + first + text + b'# 2 "a.c" 2\nint a;\n'
        found = expansion_of(parts, exact=False)
        assert found is not None
        assert found.files == {"a.c", "h.h"}
        return found.digest

    assert (digest(b"") == digest(b"\n\n")) is shifts
    assert digest(b"") != digest(b"int more;\n")


def test_the_bytes_of_a_literal_count() -> None:
    def digest(text: bytes) -> bytes:
        found = expansion_of(b'# 1 "a.c"\n# 1 "h.h" 1\n' + text, exact=False)
        assert found is not None
        return found.digest

    assert digest(b'static char a[] = "a  b";\n') != digest(b'static char a[] = "a b";\n')
