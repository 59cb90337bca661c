"""Preambles compiled before: the objects are the same, and nothing that they were made from may change unseen."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from elftools.common.exceptions import ELFError

from patcher.build import CompileCommand, CompiledUnit, Compiler, likely_units
from patcher.build.dependencies import named_files
from patcher.build.preamble import Preambles, preambles
from patcher.build.preamble.inputs import Stamp, stamp_of
from patcher.build.preamble.objects import same_but_debug
from patcher.build.preamble.text import bare, cut, includes_more, leaves_state
from patcher.errors import BuildError

from .conftest import run
from .objects import entries, lines

ROOT = Path(__file__).parents[2]
COMPILERS = ["gcc", "clang"]
EVERY = os.environ.get("PATCHER_PREAMBLES") == "every"
HEAVY = "#pragma once\nstruct Described { int a; };\nclass Abstract { virtual void f(); Described d; };\n" + "".join(
    f"inline int heavy{n}(int x) {{ return x * {n} + __LINE__; }}\n" for n in range(4000)
)
UNIT = """#define START 7
#include "heavy.h"

int work(int n, Described *, Abstract *) { return heavy11(n) + START + __LINE__; }
"""
PLUS = {"gcc": "g++", "clang": "clang++"}


def sources() -> list[Path]:
    """Return the C and C++ units of this project: every one, or a sample and all that are C++."""
    found = [
        p for room in ("fixtures", "tests") for p in sorted((ROOT / room).rglob("*.c*")) if p.suffix in (".c", ".cc")
    ]
    return found if EVERY else [p for n, p in enumerate(found) if n % 25 == 0 or p.suffix == ".cc"][:20]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a unit and a header that takes long to compile."""
    root = tmp_path / "place"
    root.mkdir()
    (root / "heavy.h").write_text(HEAVY)
    (root / "unit.cc").write_text(UNIT)
    return root


@pytest.fixture
def preamble_store(tmp_path: Path) -> Iterator[Preambles]:
    store = Preambles(tmp_path / "preambles", dict(os.environ))
    yield store
    store.close()


def command_of(place: Path, *words: str, file: str = "unit.cc") -> CompileCommand:
    return CompileCommand(place, (*words, "-c", file), (place / file).resolve(), "this test")


def learnt(compiler: Compiler, command: CompileCommand) -> None:
    compiler.learn([command])
    compiler.await_learnt()


def is_behind(unit: CompiledUnit) -> bool:
    """Tell whether a unit was compiled behind its preamble."""
    return "-include-pch" in unit.command or any(word.startswith("-ffile-prefix-map") for word in unit.command)


def built(compiler: Compiler, command: CompileCommand) -> CompiledUnit:
    (unit,) = compiler.compile_all([command])
    return unit


def save(place: Path, more: str) -> None:
    (place / "unit.cc").write_text(UNIT + more)


def assert_same(command: CompileCommand, store: Preambles, *, why: str = "") -> None:
    """Hold an object made behind a preamble against the plain one: code, symbols, lines, debug information."""
    store.learn([command])
    store.wait()
    (ready,) = store.ready([command])
    assert (ready is None) == bool(why)
    if ready is None:
        assert why in store.why_not(command)
        return
    plain, quick = ready.made.object, ready.made.object.with_name("behind.o")
    arguments = ready.arguments(quick.parent, quick)
    subprocess.run(arguments, cwd=command.directory, check=True, capture_output=True)
    assert same_but_debug(plain.read_bytes(), quick.read_bytes())
    try:
        assert lines(plain) == lines(quick)
        (before, code_before), (after, code_after) = entries(plain), entries(quick)
    except ELFError:
        return  # thread-local variables: a relocation that this reader does not know
    assert code_before == code_after
    assert after <= before
    if "clang++" not in command.arguments[0]:  # which leaves out what `using` brings in, and what only that names
        assert after == before


@pytest.mark.timeout(1200 if EVERY else 240)
@pytest.mark.parametrize("cc", COMPILERS)
def test_objects_of_this_project_are_the_same(cc: str, tmp_path: Path) -> None:
    divided = 0
    for number, source in enumerate(sources()):
        compiler = PLUS[cc] if source.suffix == ".cc" else cc
        command = command_of(source.parent, compiler, "-O2", "-g", "-w", "-I.", "-I..", file=source.name)
        if cut(source.read_bytes()) is None:
            continue
        store = Preambles(tmp_path / str(number), dict(os.environ))
        try:
            store.learn([command])
            store.wait()
            if "does not compile" in store.why_not(command):
                continue  # it needs switches that only its scenario knows
            assert_same(command, store)
            divided += 1
        finally:
            store.close()
    assert divided >= 10


MANY = """
// -*- C++ -*-
#define _GNU_SOURCE 1
#if defined(NEVER)
#include <never>
#else /* a comment
   over lines */
#include <algorithm>
#include <map>
#include <string>
#include <vector>
#endif
#include "near.h"
#include "far.h"

namespace { struct Pair { int x; }; int hidden(Pair p) { return p.x + __COUNTER__; } }
template <typename T> struct Box { T value; virtual ~Box() = default; virtual int size() const; };
template <typename T> int Box<T>::size() const { return sizeof value; }
static int last;
int work(std::vector<int> &v, int n) {
    static int calls;
    static std::string text = "once";
    std::map<std::string, int> m;
    for (int x : v) m[std::to_string(x)] += near_it(x) + far_it(x) + __LINE__;
    std::sort(v.begin(), v.end(), [](int a, int b) { return a > b; });
    Box<int> box; box.value = n;
    last += ++calls + hidden({n}) + box.size() + int(text.size());
    return m.size() + (__FILE__[0] == NEAR_FILE[0]) + last;
}
"""
HEADER = """#pragma once
#include <cstdio>
static int {0}_count = __COUNTER__;
static inline int {0}_it(int x) {{ static int calls; std::puts(__FILE__); return ++calls + x + {0}_count; }}
#define {1}_FILE __FILE__
"""


@pytest.mark.parametrize("cc", ["g++", "clang++"])
@pytest.mark.parametrize(("level", "named"), [("-O2", "unit.cc"), ("-O0", "src/unit.cc"), ("-O2", "absolute")])
def test_objects_of_a_large_unit_are_the_same(
    cc: str, level: str, named: str, tmp_path: Path, preamble_store: Preambles
) -> None:
    source = tmp_path / ("src" if named == "src/unit.cc" else ".") / "unit.cc"
    (tmp_path / "include").mkdir()
    source.parent.mkdir(exist_ok=True)
    source.write_text(MANY)
    (source.parent / "near.h").write_text(HEADER.format("near", "NEAR"))
    (tmp_path / "include/far.h").write_text(HEADER.format("far", "FAR"))
    name = str(source) if named == "absolute" else named
    assert_same(command_of(tmp_path, cc, level, "-g", "-Iinclude", file=name), preamble_store)


@pytest.mark.parametrize("cc", COMPILERS)
def test_a_save_is_compiled_behind_the_preamble(cc: str, place: Path, compiler: Compiler) -> None:
    command = command_of(place, PLUS[cc], "-O1", "-g")
    assert not is_behind(built(compiler, command))
    learnt(compiler, command)
    save(place, "int more(void) { return __LINE__; }\n")
    unit = built(compiler, command)
    plain = compiler.compile(command)
    assert is_behind(unit)
    assert same_but_debug(unit.object.read_bytes(), plain.object.read_bytes())
    assert entries(unit.object) == entries(plain.object)
    assert lines(unit.object) == lines(plain.object)


@pytest.mark.parametrize("cc", COMPILERS)
def test_what_a_unit_is_made_from_is_known_all_the_same(cc: str, place: Path, compiler: Compiler) -> None:
    command = command_of(place, PLUS[cc], "-O1", "-g")
    (place / "beside #1 $.h").write_text("")
    (place / "unit.cc").write_text('#include "beside #1 $.h"\n' + UNIT)

    def files(unit: CompiledUnit) -> set[Path]:
        return {place / file for file in named_files(unit.listing)} - {place / "unit.cc"}

    plain = files(compiler.compile(command))
    learnt(compiler, command)
    (place / "late.h").write_text("int late;\n")
    for more in ("int more;\n", "int more; // a\n", '#include "late.h"\n'):
        (place / "unit.cc").write_text('#include "beside #1 $.h"\n' + UNIT + more)
        (unit,) = compiler.compile_all([command])
        assert is_behind(unit) or unit.milliseconds == 0
        late = {place / "late.h"} if "late.h" in more else set()
        assert files(unit) == plain | late >= {place / "heavy.h", place / "beside #1 $.h"}


@pytest.mark.parametrize("cc", COMPILERS)
def test_errors_are_those_of_the_plain_compile(cc: str, place: Path, compiler: Compiler) -> None:
    command = command_of(place, PLUS[cc])
    learnt(compiler, command)
    save(place, "int more(void) { return unknown + 1; }\n")
    with pytest.raises(BuildError) as plain:
        compiler.compile(command)
    with pytest.raises(BuildError) as error:
        built(compiler, command)
    assert error.value.diagnostics == plain.value.diagnostics
    assert "unit.cc:5:" in error.value.diagnostics
    assert "/text/" not in error.value.message
    save(place, "int more(void) { return 1; }\n")
    assert is_behind(built(compiler, command))


def test_saved_while_the_preamble_is_made(place: Path, preamble_store: Preambles) -> None:
    """The compiler saves the file itself, once, before it makes the plain object that is compared."""
    script = place / "g++"
    script.write_text(
        '#!/bin/sh\ncase "$*" in --version) ;; *plain.o)\n'
        '[ -e saved ] || { touch saved; echo "int x = 1;" >> unit.cc; } ;; esac\n'
        'exec g++ "$@"\n'
    )
    script.chmod(0o755)
    assert_same(command_of(place, str(script)), preamble_store)
    assert (place / "saved").exists()


def test_only_comments_changed(place: Path, compiler: Compiler) -> None:
    command = command_of(place, "g++", "-O1", "-g")
    save(place, 'const char *a = "// a"; // one\n')
    learnt(compiler, command)
    save(place, 'const char *a = "// a"; /* two of them */\n')
    unit = built(compiler, command)
    assert unit.milliseconds == 0
    assert same_but_debug(unit.object.read_bytes(), compiler.compile(command).object.read_bytes())
    save(place, 'const char *a = "// b"; /* two of them */\n')
    assert built(compiler, command).milliseconds > 0
    save(place, '/* moved */ const char *a = "// b"; /* two of them */\n')
    assert built(compiler, command).milliseconds > 0


def test_a_text_that_reads_further_files_is_compiled(place: Path, compiler: Compiler) -> None:
    command = command_of(place, "g++")
    (place / "table.inc").write_text("1, 2")
    save(place, 'int table[] = {\n#include "table.inc"\n};\n')
    learnt(compiler, command)
    (place / "table.inc").write_text("1, 3")
    assert built(compiler, command).milliseconds > 0


def edit_header(place: Path) -> None:
    (place / "heavy.h").write_text(HEAVY + "int another;\n")


def replace_header(place: Path) -> None:
    (place / "new.h").write_text(HEAVY.replace("* 11", "* 12"))
    os.replace(place / "new.h", place / "heavy.h")


def hide_header(place: Path) -> None:
    (place / "first/heavy.h").write_text(HEAVY.replace("* 11 ", "* 12 "))


def bring_what_was_asked_for(place: Path) -> None:
    (place / "first/sub").mkdir()
    (place / "first/sub/asked.h").write_text("")


def edit_preamble(place: Path) -> None:
    (place / "unit.cc").write_text(UNIT.replace("START 7", "START 8"))


def replace_compiler(place: Path) -> None:
    (place / "bin/g++").write_text('#!/bin/sh\nexec g++ -DNEW "$@"\n')


CHANGES = [edit_header, replace_header, hide_header, bring_what_was_asked_for, edit_preamble, replace_compiler]


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_preamble_is_made_from(change: Callable[[Path], None], place: Path, compiler: Compiler) -> None:
    (place / "bin").mkdir()
    (place / "bin/g++").write_text('#!/bin/sh\nexec g++ "$@"\n')
    (place / "bin/g++").chmod(0o755)
    (place / "first").mkdir()
    (place / "last").mkdir()
    (place / "heavy.h").rename(place / "last/heavy.h")
    (place / "last/asks.h").write_text("#if __has_include(<sub/asked.h>)\nint asked;\n#endif\n")
    (place / "unit.cc").write_text(UNIT.replace("#include", "#include <asks.h>\n#include", 1))
    change_in = place / "last" if change in (edit_header, replace_header) else place
    command = command_of(place, str(place / "bin/g++"), "-Ifirst", "-Ilast")
    learnt(compiler, command)
    text = (place / "unit.cc").read_text()
    (place / "unit.cc").write_text(text + "int more;\n")
    (place / "editors.tmp").write_text("what an editor leaves for a moment in the directory")
    assert is_behind(built(compiler, command)), compiler
    change(change_in)
    if change is not edit_preamble:
        (place / "unit.cc").write_text(text + "int others;\n")
    unit = built(compiler, command)
    assert not is_behind(unit)
    assert unit.milliseconds > 0
    compiler.await_learnt()
    (place / "unit.cc").write_text((place / "unit.cc").read_text() + "int last;\n")
    assert is_behind(built(compiler, command))


@pytest.mark.parametrize(
    ("before", "switches", "why"),
    [
        ("#pragma pack(push, 1)\n", (), "leaves a pragma in effect: pack(push, 1)"),
        ('_Pragma("GCC visibility push(hidden)")\n', (), "leaves a pragma in effect"),
        ("inline const char *when(void) { return __TIME__; }\n", (), "depends on when"),
        ("#define HAS(x) __has_include(x)\n", (), "by a computed name"),
        ("namespace open {\n", (), "cannot be compiled by itself"),
        ("", ("-g3",), "-g3 is among its switches"),
        ("", ("-include", "own.h"), "a precompiled header of its own"),
    ],
)
def test_no_preamble(before: str, switches: tuple[str, ...], why: str, place: Path, preamble_store: Preambles) -> None:
    (place / "own.h").write_text("")
    (place / "own.h.gch").write_text("")
    (place / "heavy.h").write_text(before + "int heavy11(int);\n")
    if "open" in before:
        save(place, "}\n")
    assert_same(command_of(place, "g++", *switches), preamble_store, why=why)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("env", "A=B", "g++"), "started by env"),
        (("not-there/ccache", "g++"), ""),
        (("g++", "-xassembler"), "neither C nor C++"),
    ],
)
def test_wrappers_and_languages(words: tuple[str, ...], why: str, place: Path, preamble_store: Preambles) -> None:
    assert_same(command_of(place, *words), preamble_store, why=why)


def test_they_are_private_take_bounded_space_and_go(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "other.cc").write_text(UNIT)
    commands = [command_of(place, "g++"), command_of(place, "g++", file="other.cc")]
    store = Preambles(tmp_path / "own", dict(os.environ))
    store.learn(commands[:1])
    store.wait()
    (ready,) = store.ready(commands[:1])
    assert ready is not None
    assert ready.made.header.parent.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(preambles, "_LIMIT", ready.made.size + 1)
    store.learn(commands[1:])
    store.wait()
    first, second = store.ready(commands)
    assert first is None
    assert second is not None
    assert not ready.made.header.parent.exists()
    store.close()
    assert not (tmp_path / "own").exists()


def test_the_end_of_a_session_ends_the_making(place: Path, tmp_path: Path) -> None:
    """The compiler says through a pipe that it runs, and is gone when `close` returns: the pipe ends."""
    here, there = os.pipe()
    (place / "g++").write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec g++ --version\necho x >&{there}\nsleep 1000\n')
    (place / "g++").chmod(0o755)
    os.set_inheritable(there, True)
    text = (place / "g++").read_text().replace(f">&{there}", f"> /proc/{os.getpid()}/fd/{there}")
    (place / "g++").write_text(text.replace("sleep 1000", f"exec sleep 1000 > /proc/{os.getpid()}/fd/{there}"))
    store = Preambles(tmp_path / "own", dict(os.environ))
    store.learn([command_of(place, str(place / "g++"))])
    assert os.read(here, 1) == b"x"
    store.close()
    os.close(there)
    while os.read(here, 100):
        pass  # ends only when nobody else has the pipe
    os.close(here)


@pytest.mark.parametrize(
    ("text", "preamble"),
    [
        ("#include <a>\nint x;\n#include <b>\n", "#include <a>\n"),
        (
            "// a\n/* b\n*/ #define X \\\n 1\n# include <a>\n\nint x;\n",
            "// a\n/* b\n*/ #define X \\\n 1\n# include <a>\n",
        ),
        ("#ifdef A\n#include <a>\n#else\n#endif\nint x;\n", "#ifdef A\n#include <a>\n#else\n#endif\n"),
        ("#include <a>\n#if A\nint x;\n#endif\n", "#include <a>\n"),
        ("#ifndef GUARD\n#define GUARD\n#include <a>\nint x;\n#endif\n", None),
        ("#pragma once\n#include <a>\n", None),
        ("#pragma pack(1)\n#include <a>\n", None),
        ("int x;\n", None),
        ("#define X '\"'\n#include <a>\n// \"\nint x;\n", "#define X '\"'\n#include <a>\n"),
        ('#define X "/*"\n#include <a>\n', '#define X "/*"\n#include <a>\n'),
        ("#include <a>\nconst char *f = __BASE_FILE__;\n", None),
        ("#include <a>\nconst char *f = __TIMESTAMP__;\n", None),
        ("#define A ??/\n#include <a>\n", None),
        ("#include <a>", None),
    ],
)
def test_where_a_text_is_cut(text: str, preamble: str | None) -> None:
    found = cut(text.encode())
    assert (found.preamble.decode() if found else None) == preamble
    if found is not None:
        assert found.preamble + found.rest == text.encode()
        assert found.line == found.preamble.count(b"\n") + 1


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("int x; // a\n", "int x; /* b */\n", True),
        ("int /* a */ x;\n", "int /* b */ x;\n", True),
        ("int /* a */ x;\n", "int /* bb */ x;\n", False),
        ("/* a\n */ int x;\n", "/* a */ int x;\n", False),
        ('f("// a");\n', 'f("// b");\n', False),
        ("f('\"'); // \"a\n", "f('\"'); // \"b\n", True),
        ("f(1'0, '\"', \"//a\");\n", "f(1'0, '\"', \"//b\");\n", False),
        ('f(R"(\n// a)");\n', 'f(R"(\n// b)");\n', False),
        ("// a \\\nint x;\n", "// a\nint x;\n", False),
    ],
)
def test_what_differs_in_comments_only(one: str, other: str, same: bool) -> None:
    assert (bare(one.encode()) == bare(other.encode())) == same


@pytest.mark.parametrize(
    ("pragmas", "left"),
    [
        ("pack(push, 1)|pack(2)|pack(pop)", ""),
        ("pack(1)|pack()", ""),
        ("pack(1)", "pack(1)"),
        ("pack(push,1)|pack()", "pack(push,1)"),
        ("GCC visibility push(default)|GCC visibility pop", ""),
        ("GCC visibility push(default)", "GCC visibility push(default)"),
        ('GCC push_options|GCC target("avx2")|GCC pop_options', ""),
        ('GCC target("avx2")', 'GCC target("avx2")'),
        ('push_macro("M")', 'push_macro("M")'),
        ("GCC diagnostic ignored|once|weak f", ""),
        ("something else", "something else"),
    ],
)
def test_what_pragmas_leave(pragmas: str, left: str) -> None:
    assert leaves_state("".join(f"#pragma {words}\nint x;\n" for words in pragmas.split("|")).encode()) == left


@pytest.mark.parametrize(
    "rest", ['#include "a"\n', "/* */ # /**/ include <a>\n", "#inc\\\nlude <a>\n", "%:include <a>\n"]
)
def test_what_reads_further_files(rest: str) -> None:
    assert includes_more(rest.encode())
    assert not includes_more(b"// #include\nint x;\n")


def test_likely_units(tmp_path: Path) -> None:
    for number, name in enumerate(("old.c", "committed.c", "written.c", "header.h")):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (number, number) if name != "written.c" else None)
    assert likely_units([tmp_path], 1) == ((tmp_path / "written.c").resolve(),)
    run("git", "init", "-q", ".", cwd=tmp_path)
    run("git", "add", "committed.c", cwd=tmp_path)
    run("git", "-c", "user.name=a", "-c", "user.email=a", "commit", "-qm", "a", cwd=tmp_path)
    os.utime(tmp_path / "old.c", (5, 5))
    assert [path.name for path in likely_units([tmp_path], 2)] == ["written.c", "committed.c"]


def test_a_preamble_that_changes_the_object_is_not_used(place: Path, preamble_store: Preambles) -> None:
    script = place / "g++"
    script.write_text('#!/bin/sh\ncase "$*" in *quick.o) exec g++ -DMORE "$@" ;; esac\nexec g++ "$@"\n')
    script.chmod(0o755)
    save(place, "#ifdef MORE\nint more;\n#endif\n")
    assert_same(command_of(place, str(script)), preamble_store, why="its object is another")


def test_what_two_objects_have_in_common(place: Path, compiler: Compiler) -> None:
    def made(text: str, *switches: str) -> bytes:
        save(place, text)
        return compiler.compile(command_of(place, "g++", *switches)).object.read_bytes()

    one = made("int f(void) { return heavy1(1); }\n", "-g")
    assert same_but_debug(one, made("int\nf(void) { return heavy1(1); }\n", "-g", "-gno-column-info"))
    assert not same_but_debug(one, made("int f(void) { return heavy1(2); }\n", "-g"))
    assert not same_but_debug(one, made("int f(void) { return heavy2(1); }\n", "-g"))
    assert not same_but_debug(one, made("int h(void) { return heavy1(1); }\n", "-g"))
    assert not same_but_debug(one, made("int f(void) { return heavy1(1); }\nint v;\n", "-g"))
    for broken in (b"", b"text that is long enough to be an object, but is none at all, as it does not begin like one"):
        with pytest.raises(ValueError, match="not a 64-bit"):
            same_but_debug(broken, broken)


def test_headers_are_looked_at_once_for_each_compile(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = command_of(place, "g++", "-g")
    looked: list[str] = []
    with Compiler(tmp_path / "own") as compiler:
        learnt(compiler, command)

        def looking(path: str | Path) -> Stamp | None:
            looked.append(str(path))
            return stamp_of(path)

        monkeypatch.setattr("patcher.build.preamble.inputs.stamp_of", looking)
        save(place, "int more;\n")
        assert is_behind(built(compiler, command))
    assert looked.count(str(place / "heavy.h")) == 1
