"""New thread-locals where they are hard to have: large ones, in objects given as they are, in C++, without a loader."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from project import Project, Running, assert_untouched

import patcher
from patcher.data.threads import STATIC_SHARE
from patcher.errors import PatcherError, TargetBusy
from patcher.live import thread_number, thread_place
from patcher.patch.ledger import Ledger

# Each line is answered by the main thread and by one that has been there from the start: "main" + 1000000 * "other".
PROGRAM = """\
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#ifdef __cplusplus
extern "C"
#endif
long answer(long n);
static int asked[2], told[2];
static void *other(void *nothing)
{
    long n;
    while (read(asked[0], &n, sizeof n) == sizeof n) {
        n = answer(n);
        if (write(told[1], &n, sizeof n) != sizeof n)
            break;
    }
    return nothing;
}
int main(void)
{
    char line[80];
    pthread_t thread;
    if (pipe(asked) || pipe(told) || pthread_create(&thread, NULL, other, NULL))
        return 1;
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    while (fgets(line, sizeof line, stdin)) {
        long n = atol(line), found = 0;
        if (write(asked[1], &n, sizeof n) != sizeof n || read(told[0], &found, sizeof found) != sizeof found)
            return 2;
        printf("%ld %ld\\n", answer(n), found);
    }
    return 7;
}
"""
UNIT = "long answer(long n)\n{\n    return n + 1;\n}\n"
MORE = "long twice(long n)\n{\n    return n * 2;\n}\n"
HEAD = "long answer(long n)\n{\n"
ASKING = ("-fPIC", "-ftls-model=global-dynamic", "-ffunction-sections", "-fdata-sections")


def made(root: Path, unit: str = UNIT, compiler: str = "gcc", flags: Sequence[str] = ()) -> Project:
    """Return a project whose unit is compiled by a compiler of choice."""
    sources = {"main.c": PROGRAM, "unit.c": unit, "more.c": MORE}
    project = Project(root / "p", sources, compile_flags=flags, link_flags=["-no-pie"] if "-fno-pie" in flags else [])
    if compiler != "gcc":
        project._compile = (compiler, *project._compile[1:])
        project.build()
    return project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return made(tmp_path)


def refused(session: patcher.Session, path: Path, *names: str, code: str = "new-thread-local") -> None:
    with pytest.raises(PatcherError) as caught:
        session.apply(path)
    assert caught.value.code == code, caught.value.message
    assert all(name in caught.value.message for name in names), caught.value.message
    assert caught.value.hint


def maps(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


# --- larger than what is taken at fixed distances -------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["-O0"], ["-O2"], ["-O2", "-fno-pie"]], ids=" ".join)
def test_clang_reaches_large_global_ones(tmp_path: Path, flags: Sequence[str]) -> None:
    project = made(tmp_path, compiler="clang", flags=flags)
    with project.running() as program, patcher.attach(program.pid) as session:
        source = project.edit(
            "unit.c", HEAD, f"static __thread int small = 1;\n__thread long big[900] = {{4, 5}};\n{HEAD}"
        )
        project.edit("unit.c", "n + 1;", "n + ++big[1] + 100 * ++big[899] + 1000 * ++small;")
        assert [v.outcome for v in session.apply(source).variables] == ["added", "added"]
        assert program.ask(0) == "2106 2106"
        project.edit("unit.c", "big[900] = {4, 5};", "big[900] = {4, 5};\n__thread char last[2000];")
        project.edit("unit.c", "1000 *", "10000 * ++last[7] + 1000 *")
        assert [v.name for v in session.apply(source).variables] == ["last"]
        assert program.ask(0) == "13207 13207"
        session.revert(1)
        assert program.ask(0) == "4308 4308"
        session.revert(0)
        assert program.ask(0) == "1 1"


def test_a_large_static_one_is_refused_where_the_compiler_counts_from_the_unit_s_others(tmp_path: Path) -> None:
    project = made(tmp_path, compiler="clang")
    with project.running() as program, patcher.attach(program.pid) as session:
        source = project.edit("unit.c", HEAD, f"static __thread long big[900];\n{HEAD}")
        project.edit("unit.c", "n + 1;", "n + ++big[n];")
        refused(session, source, "`big`", "unit.c")
        assert "memfd:patcher-threads" not in maps(program.pid)
        project.edit("unit.c", "static __thread long big[900]", "static __thread long big[9]")
        session.apply(source)
        assert program.ask(0) == "1 1"
        assert program.ask(0) == "2 2"


def test_an_object_must_ask_for_large_ones(project: Project) -> None:
    edits = ((HEAD, f"static int k;\n__thread long big[900] = {{4}};\n{HEAD}"), ("n + 1;", "n + ++big[0] + ++k * 0;"))
    with project.running() as program, patcher.attach(program.pid) as session:
        refused(session, project.object("unit.c", *edits), "`big`", "unit.o")
        assert program.ask(0) == "1 1"
        session.apply(project.object("unit.c", *edits, flags=ASKING))
        assert program.ask(0) == "5 5"
        again = project.object("unit.c", *edits[:1], ("n + 1;", "n + ++big[0] + 100;"), flags=ASKING)
        session.apply(again)
        assert program.ask(0) == "106 106"
        session.revert(1)
        assert program.ask(0) == "7 7"


def test_others_get_their_share_of_fixed_distances(project: Project) -> None:
    size = STATIC_SHARE // 2 - 100
    with project.running() as program, patcher.attach(program.pid) as session:
        source = project.edit("unit.c", "n + 1;", "n + 1 + 0;")
        for i in range(4):
            project.edit("unit.c", HEAD, f"static __thread char many{i}[{size}] = {{{i}}};\n{HEAD}")
            project.edit("unit.c", "+ 0;", f"+ ++many{i}[0] + 0;")
            session.apply(source)
        places = [thread_place(p.address) for p in session.ledger.journal.placed if p.kind == "thread-local"]
        assert [bool(place and place[1]) for place in places] == [False, False, False, True]
        assert program.ask(0) == "11 11"
        assert program.ask(0) == "15 15"


def test_a_process_without_room_at_fixed_distances(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.rtld.nns=1:glibc.rtld.optional_static_tls=0")
    with project.running() as program, patcher.attach(program.pid) as session:
        source = project.edit("unit.c", HEAD, f"static __thread long some[60] = {{4}};\n{HEAD}")
        project.edit("unit.c", "n + 1;", "n + ++some[0];")
        session.apply(source)
        assert program.ask(0) == "5 5"
        project.edit("unit.c", "++some[0];", "++some[0] + 100;")
        session.apply(source)
        assert program.ask(0) == "106 106"
        session.revert(1)
        assert program.ask(0) == "7 7"


# --- several units --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 900])
def test_another_unit_uses_it(project: Project, size: int) -> None:
    with project.running() as program, patcher.attach(program.pid) as session:
        unit = project.edit("unit.c", HEAD, f"long twice(long);\n__thread long both[{size}] = {{4}};\n{HEAD}")
        project.edit("unit.c", "n + 1;", "twice(n) + ++both[0];")
        more = project.edit("more.c", "long twice", f"extern __thread long both[{size}];\nlong twice")
        project.edit("more.c", "n * 2;", "n * 2 + 100 * ++both[0];")
        session.apply(unit, more)
        assert program.ask(0) == "506 506"
        # The library leaves the process as it is; a later session finds what the first one brought.
        with patcher.attach(program.pid) as later:
            assert later.apply(unit, more).functions == ()
            project.edit("more.c", "n * 2 + 100", "n * 2 + 1000")
            assert [f.name for f in later.apply(more).functions] == ["twice"]
            assert program.ask(0) == "7008 7008"
            later.revert(1)
            assert program.ask(0) == "910 910"


def test_what_is_one_for_all_threads_elsewhere_is_refused(tmp_path: Path) -> None:
    project = made(
        tmp_path,
        unit=f"int shared = 1;\n__thread int own = 2;\nstatic int mine = 3;\n{UNIT}".replace(
            "+ 1", "+ mine + shared + own"
        ),
    )
    with project.running() as program, patcher.attach(program.pid) as session:
        assert program.ask(0) == "6 6"
        source = project.edit("unit.c", "int shared", "__thread int shared")
        refused(session, source, "`shared`", code="layout")
        project.edit("unit.c", "__thread int shared", "int shared")
        project.edit("unit.c", "__thread int own", "int own")
        refused(session, source, "`own`", code="layout")
        project.edit("unit.c", "int own", "__thread int own")
        project.edit("unit.c", "static int mine", "static __thread int mine")
        project.edit("unit.c", "+ mine +", "+ mine++ +")
        session.apply(source)
        assert [program.ask(0), program.ask(0)] == ["6 6", "7 7"]
        project.edit("unit.c", "+ mine++ +", "+ mine++ * 10 +")
        session.apply(source)
        assert program.ask(0) == "53 53"


# --- C++ ------------------------------------------------------------------------------------------------------------

CPLUSPLUS = """\
{}
extern "C" long answer(long n)
{{
    return n + {};
}}
"""


def cplusplus(
    tmp_path: Path, declarations: str, expression: str, flags: Sequence[str], *others: str
) -> tuple[Path, Path]:
    (tmp_path / "main.cc").write_text(PROGRAM)
    unit = tmp_path / "unit.cc"
    unit.write_text(CPLUSPLUS.format(declarations, expression))
    command = [
        *flags,
        "-g",
        "-pthread",
        "main.cc",
        "unit.cc",
        *others,
        "-o",
        "program",
        "-Wl,--no-as-needed",
        "-lstdc++",
    ]
    subprocess.run(command, cwd=tmp_path, check=True)
    entries = [
        {"directory": str(tmp_path), "file": name, "arguments": [*flags, "-g", "-c", name]}
        for name in ("unit.cc", *others)
    ]
    (tmp_path / "compile_commands.json").write_text(json.dumps(entries))
    return tmp_path / "program", unit


@pytest.mark.parametrize(
    "flags", [("g++", "-O2"), ("g++", "-O0"), ("clang++", "-O2"), ("clang++", "-O0")], ids=" ".join
)
def test_initialisers_run_in_each_thread(tmp_path: Path, flags: Sequence[str]) -> None:
    binary, unit = cplusplus(tmp_path, "static int uses;", "++uses * 0 + 1", flags)
    program = Running([str(binary)])
    try:
        with patcher.attach(program.pid) as session:
            first = "static int uses;\nint seven() { return 7; }\nthread_local long own = seven();"
            unit.write_text(CPLUSPLUS.format(first, "++own"))
            session.apply(unit)
            assert [program.ask(0), program.ask(0)] == ["8 8", "9 9"]
            second = (
                'static long counted() { static thread_local std::string text = "a"; text += "b"; return text.size(); }'
            )
            unit.write_text(CPLUSPLUS.format(f"#include <string>\n{first}\n{second}", "++own + 100 * counted()"))
            session.apply(unit)
            assert [program.ask(0), program.ask(0)] == ["210 210", "311 311"]
            unit.write_text(
                CPLUSPLUS.format(
                    f"#include <string>\n{first}\n{second}\nthread_local long late = seven();", "++own + ++late"
                )
            )
            refused(session, unit, "`late`")
            session.revert(1)
            assert program.ask(0) == "12 12"
    finally:
        program.end()


@pytest.mark.parametrize("size", [1, 900])
def test_an_inline_variable_is_one_for_all_units(tmp_path: Path, size: int) -> None:
    header = tmp_path / "common.h"
    header.write_text("")
    (tmp_path / "more.cc").write_text('#include "common.h"\nlong more(long n) { return n * 12345 / 7; }\n')
    base = '#include "common.h"\nlong more(long);'
    flags = ("g++", "-O2", "-std=c++17", "-I", ".")
    program, unit = cplusplus(tmp_path, base, "more(n)", flags, "more.cc")
    running = Running([str(program)])
    try:
        with patcher.attach(running.pid) as session:
            header.write_text(f"inline thread_local long common[{size}] = {{4}};\n")
            unit.write_text(CPLUSPLUS.format(base, "more(n) + ++common[0]"))
            (tmp_path / "more.cc").write_text('#include "common.h"\nlong more(long n) { return 100 * ++common[0]; }\n')
            found = session.apply(unit, tmp_path / "more.cc")
            assert [v.name for v in found.variables] == ["common"]
            assert running.ask(0) == "506 506"
            (tmp_path / "more.cc").write_text('#include "common.h"\nlong more(long n) { return 200 * ++common[0]; }\n')
            session.apply(tmp_path / "more.cc")
            assert running.ask(0) == "1408 1408"
            session.revert(1)
            assert running.ask(0) == "910 910"
    finally:
        running.end()


# --- no loader ------------------------------------------------------------------------------------------------------


def test_a_static_program_has_no_room_for_large_ones(tmp_path: Path) -> None:
    project = Project(tmp_path / "p", {"main.c": PROGRAM, "unit.c": UNIT}, link_flags=["-static"])
    with project.running() as program, patcher.attach(program.pid) as session:
        source = project.edit("unit.c", HEAD, f"static __thread int own = 4;\n{HEAD}")
        project.edit("unit.c", "n + 1;", "n + ++own;")
        session.apply(source)
        assert program.ask(0) == "5 5"
        project.edit("unit.c", HEAD, f"static __thread long big[900] = {{4}};\n{HEAD}")
        project.edit("unit.c", "n + ++own;", "n + ++own + ++big[0];")
        refused(session, source, "`big`", "statically")
        assert_untouched(program.pid)
        assert program.ask(0) == "6 6"


@pytest.mark.skipif(shutil.which("musl-gcc") is None, reason="musl-gcc (musl-tools) is not installed")
def test_another_c_library_has_no_loader_that_is_known(tmp_path: Path) -> None:
    (tmp_path / "main.c").write_text(PROGRAM)
    (tmp_path / "unit.c").write_text(UNIT)
    subprocess.run(["musl-gcc", "-O2", "-g", "main.c", "unit.c", "-o", "program"], cwd=tmp_path, check=True)
    edited = UNIT.replace(HEAD, f"static __thread int own = 4;\n{HEAD}").replace("n + 1;", "n + ++own;")
    (tmp_path / "unit.c").write_text(edited)
    subprocess.run(["musl-gcc", "-O2", "-g", "-c", "unit.c"], cwd=tmp_path, check=True)
    program = Running([str(tmp_path / "program")])
    try:
        with patcher.attach(program.pid) as session:
            refused(session, tmp_path / "unit.o", "`own`", "another C library")
            assert_untouched(program.pid)
            assert program.ask(0) == "1 1"
    finally:
        program.end()


def test_a_rehearsal_loads_nothing(project: Project) -> None:
    source = project.edit("unit.c", HEAD, f"static __thread long own = 4;\n{HEAD}")
    project.edit("unit.c", "n + 1;", "n + ++own;")
    with project.running() as program:
        with patcher.attach(program.pid, dry_run=True) as session:
            assert [v.name for v in session.apply(source).variables] == ["own"]
            assert "memfd:patcher" not in maps(program.pid)
        with patcher.attach(program.pid) as session:
            session.apply(source)
            assert maps(program.pid).count("memfd:patcher-threads") == 1
            assert not [fd for fd in os.listdir(f"/proc/{program.pid}/fd") if int(fd) > 6]
        assert program.ask(0) == "5 5"


def test_storage_serves_the_next_try_when_a_change_fails(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Ledger, *_: object, **__: object) -> None:
        raise TargetBusy("a thread is where it must not be")

    source = project.edit("unit.c", HEAD, f"static __thread long own = 4;\n{HEAD}")
    project.edit("unit.c", "n + 1;", "n + ++own;")
    with project.running() as program, patcher.attach(program.pid) as session:
        with monkeypatch.context() as patched:
            patched.setattr(Ledger, "commit", fails)
            for _ in range(2):
                with pytest.raises(TargetBusy):
                    session.apply(source)
        assert program.ask(0) == "1 1"
        session.apply(source)
        assert maps(program.pid).count("memfd:patcher-threads") == 1
        assert program.ask(0) == "5 5"


FORKING = """\
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
long answer(long n);
int main(void)
{
    char line[80];
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    while (fgets(line, sizeof line, stdin)) {
        pid_t child = atol(line) == 50 ? fork() : -1;
        if (child > 0 && wait(NULL) == child)
            continue;
        printf("%ld\\n", answer(atol(line)));
        if (child == 0)
            _exit(0);
    }
}
"""


def test_a_child_has_what_its_parent_had(tmp_path: Path) -> None:
    project = Project(tmp_path / "p", {"main.c": FORKING, "unit.c": UNIT})
    source = project.edit("unit.c", HEAD, f"static __thread long own = 4;\n{HEAD}")
    project.edit("unit.c", "n + 1;", "n + ++own;")
    with project.running() as program, patcher.attach(program.pid) as session:
        session.apply(source)
        assert [program.ask(n) for n in (0, 0, 50, 0)] == ["5", "6", "57", "7"]


@pytest.mark.parametrize(("offset", "module"), [(-8, 0), (-(1 << 30), 0), (0, 1), (1 << 32, 1 << 20)])
def test_the_number_of_a_place_says_where_it_is(offset: int, module: int) -> None:
    number = thread_number(offset, module)
    assert thread_place(number) == (offset, module)
    assert 1 << 62 <= number < 1 << 64
    assert thread_place(0x7FFF_FFFF_F000) is None
