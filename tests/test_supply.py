"""What the process has never had, and where it is found: other objects, archives, libraries; and what is nowhere."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from living import run
from project import MAIN, UNIT, Project, assert_untouched, image_bytes

import patcher
from patcher.errors import ObjectError, PatcherError, UnresolvedSymbol, UnsafeChange
from patcher.target import Target

VALUE = "n + 1000 * calls"
HEAD = "static int calls;"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "p")


@pytest.fixture
def static(tmp_path: Path) -> Project:
    return Project(tmp_path / "p", link_flags=["-static"])


def calling(project: Project, expression: str, *declarations: str) -> Path:
    """Return the unit's object, its answer replaced by an expression."""
    return project.object("unit.c", (VALUE, expression), (HEAD, "\n".join((HEAD, *declarations))))


def objects(folder: Path, flags: Sequence[str] = (), **sources: str) -> list[Path]:
    """Compile texts to objects of these names."""
    folder.mkdir(exist_ok=True)
    made = []
    for name, text in sources.items():
        (folder / f"{name}.c").write_text(text)
        run("gcc", "-g", "-O1", *flags, "-c", f"{name}.c", "-o", f"{name}.o", cwd=folder)
        made.append(folder / f"{name}.o")
    return made


def archive(path: Path, flags: str = "rcs", compiling: Sequence[str] = (), **sources: str) -> Path:
    """Make an archive of texts."""
    made = objects(path.parent / path.stem, compiling, **sources)
    path.unlink(missing_ok=True)
    run("ar", flags, path.name, *(m.relative_to(path.parent) for m in made), cwd=path.parent)
    return path


def attached(project: Project, pid: int) -> patcher.Session:
    return patcher.attach(pid, compile_commands=project.root / "compile_commands.json")


def mapped(pid: int) -> list[str]:
    with Target.attach(pid) as target:
        return [f"{m.start:x} {m.permissions} {m.path}" for m in target.mappings() if m.path != "[heap]"]


def names(generation: patcher.Generation) -> list[str]:
    return [f.name for f in generation.functions]


def members(generation: patcher.Generation) -> list[str]:
    return [re.sub(r"^.*/([^/]+\.(?:a|so)\b.*)$", r"\1", s) for s in generation.supplied]


# --- archives ---------------------------------------------------------------------------------------------------------

CYCLE_ONE = (
    "int two(int n); int one(int n) { return n <= 0 ? 1 : 2 * two(n - 1); }\nint unused_one(void) { return 1; }\n"
)
CYCLE_TWO = "int one(int n); int seven(void); int two(int n) { return n <= 0 ? seven() : 3 * one(n - 1); }\n"


@pytest.mark.parametrize("flags", ["rcs", "rcsT", "rcS"], ids=["indexed", "thin", "without an index"])
def test_archives_that_need_each_other(project: Project, tmp_path: Path, flags: str) -> None:
    first = archive(tmp_path / "libfirst.a", flags, one=CYCLE_ONE, other="int unused_other(void) { return 2; }\n")
    second = archive(tmp_path / "libsecond.a", flags, two=CYCLE_TWO, seven="int seven(void) { return 7; }\n")
    wants = calling(project, "one(n)", "int one(int);")
    with project.running() as program, patcher.attach(program.pid, archives=[first, second]) as session:
        before = image_bytes(program.pid)
        generation = session.apply(wants)
        assert set(names(generation)) == {"answer", "one", "two", "seven"}
        assert members(generation) == [
            f"libfirst.a({'libfirst/' * (flags == 'rcsT')}one.o)",
            *(f"libsecond.a({'libsecond/' * (flags == 'rcsT')}{name}.o)" for name in ("two", "seven")),
        ]
        assert program.ask(1) == "14"
        assert program.ask(3) == "84"
        session.revert()
        assert program.ask(1) == "3001"
        assert image_bytes(program.pid) == before
        assert_untouched(program.pid)


def test_a_wide_index_is_read(project: Project, tmp_path: Path) -> None:
    found = archive(tmp_path / "libx.a", extra="int extra(int n) { return n * 5; }\n")
    data = found.read_bytes()
    size = int(data[8 + 48 : 8 + 58])
    narrow = data[68 : 68 + size]
    count = int.from_bytes(narrow[:4], "big")
    shift = 4 + 4 * count + (-(4 + 4 * count + size) % 2)
    offsets = [int.from_bytes(narrow[4 + 4 * i : 8 + 4 * i], "big") for i in range(count)]
    wide = b"".join(number.to_bytes(8, "big") for number in (count, *(o + shift for o in offsets)))
    wide += narrow[4 + 4 * count :].ljust(size + shift - len(wide), b"\0")
    header = b"/SYM64/".ljust(48) + str(len(wide)).encode().ljust(10) + b"`\n"
    found.write_bytes(data[:8] + header + wide + data[68 + size + (size & 1) :])
    assert run("ar", "t", found) == "extra.o\n"
    with project.running() as program, patcher.attach(program.pid, archives=[found]) as session:
        session.apply(calling(project, "extra(n)", "int extra(int);"))
        assert program.ask(3) == "15"


def test_the_process_comes_before_the_archive_and_a_weak_reference_pulls_nothing(
    project: Project, tmp_path: Path
) -> None:
    found = archive(
        tmp_path / "libx.a",
        extra='int atoi(const char *); int extra(int n) { return atoi("40") + n; }\n',
        wrong="int atoi(const char *text) { (void)text; return -1; }\n",
        perhaps="int perhaps(int n) { return n; }\n",
    )
    wants = calling(
        project, "perhaps ? -1 : extra(n)", "int extra(int);", "extern int perhaps(int) __attribute__((weak));"
    )
    with project.running() as program, patcher.attach(program.pid, archives=[found]) as session:
        assert members(session.apply(wants)) == ["libx.a(extra.o)"]
        assert program.ask(2) == "42"


COUNTER = """\
static int count;
int limit = 100;
int next(void) { return ++count; }
int peek(void) { return count + limit; }
"""


def test_later_generations_and_sessions_use_what_the_first_brought_in(project: Project, tmp_path: Path) -> None:
    found = archive(tmp_path / "libx.a", counter=COUNTER)
    declared = ("int next(void);", "int peek(void);", "extern int limit;")
    with project.running() as program:
        with patcher.attach(program.pid, archives=[found]) as session:
            session.apply(calling(project, "next()", *declared))
            assert [program.ask(0), program.ask(0)] == ["1", "2"]
        with patcher.attach(program.pid, archives=[found]) as session:
            generation = session.apply(calling(project, "peek() + 10 * next()", *declared))
            assert set(names(generation)) == {"answer", "peek"}
            assert program.ask(0) in ("132", "133")  # in whichever order the compiler calls them
            generation = session.apply(calling(project, "limit++ + peek()", *declared))
            assert set(names(generation)) == {"answer"}
            assert program.ask(0) in ("203", "204")
            assert program.ask(0) in ("205", "206")


STATE = "static int state = {};\nint {}(void) {{ return ++state; }}\n"


def test_members_of_one_source_name_keep_their_statics_apart(project: Project, tmp_path: Path) -> None:
    archives = []
    for name, start in (("left", 10), ("right", 500)):
        folder = tmp_path / name
        (made,) = objects(folder, state=STATE.format(start, name))
        archives.append(folder / f"lib{name}.a")
        run("ar", "rcs", archives[-1], made)
    declared = ("int left(void);", "int right(void);")
    with project.running() as program, patcher.attach(program.pid, archives=archives) as session:
        session.apply(calling(project, "left()", *declared))
        assert program.ask(0) == "11"
        session.apply(calling(project, "right()", *declared))
        assert program.ask(0) == "501"
        session.apply(calling(project, "left() + right()", *declared))
        assert program.ask(0) == "514"


def test_a_given_archive_reloads_its_members_and_adds_those_that_are_needed(tmp_path: Path) -> None:
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": UNIT})
    place = tmp_path / "p" / "given"
    place.mkdir()

    def given(unit: str, **others: str) -> Path:
        (place / "src").mkdir(exist_ok=True)
        (place / "src" / "unit.c").write_text(unit)
        run("gcc", "-g", "-O2", "-c", "src/unit.c", "-o", "unit.o", cwd=place)
        made = objects(place, **others)
        (place / "libgiven.a").unlink(missing_ok=True)
        run("ar", "rcs", "libgiven.a", "unit.o", *(m.name for m in made), cwd=place)
        return place / "libgiven.a"

    unit = UNIT.replace(VALUE, "ping(n)").replace(HEAD, HEAD + "\nint ping(int);\nint base(void) { return 5; }")
    ping = "int pong(int); int ping(int n) { return n < 1 ? 0 : 1 + pong(n - 1); }\n"
    pong = "int ping(int); int base(void); int pong(int n) { return n < 1 ? base() : 10 * ping(n - 1); }\n"
    with project.running() as program, patcher.attach(program.pid) as session:
        generation = session.apply(given(unit, ping=ping, pong=pong, idle="int idle(void) { return 0; }\n"))
        assert set(names(generation)) == {"answer", "ping", "pong", "base"}
        assert program.ask(3) == "61"
        generation = session.apply(given(unit, ping=ping, pong=pong.replace("10 *", "100 *")))
        assert set(names(generation)) == {"pong"}
        assert program.ask(3) == "601"
        loop = unit.replace("ping(n)", "ping(n) + late(n)").replace("int ping(int);", "int ping(int); int late(int);")
        generation = session.apply(given(loop, ping=ping, late="int late(int n) { return 10000 * n; }\n"))
        assert set(names(generation)) == {"answer", "late"}
        assert program.ask(3) == "30601"
        session.revert(0)
        assert program.ask(3) == "4003"


def test_objects_and_archives_that_need_each_other_are_one_generation(project: Project, tmp_path: Path) -> None:
    first = archive(
        tmp_path / "libfirst.a", one="int two(int); int one(int n) { return n < 1 ? 1 : 2 * two(n - 1); }\n"
    )
    second = archive(tmp_path / "libsecond.a", three="int one(int); int three(int n) { return 5 + one(n); }\n")
    (two,) = objects(tmp_path, two="int three(int); int two(int n) { return 3 * three(n); }\n")
    with project.running() as program, patcher.attach(program.pid) as session:
        generation = session.apply(calling(project, "one(n)", "int one(int);"), first, two, second)
        assert set(names(generation)) == {"answer", "one", "two", "three"}
        assert generation.number == 1
        assert program.ask(2) == str(2 * 3 * (5 + 2 * 3 * (5 + 1)))
        assert session.apply(second).functions == ()


def test_two_modules_that_change_together_share_what_comes_in(tmp_path: Path) -> None:
    part = "int part(int n) { static int calls; calls++; return n + calls; }\n"
    main = MAIN.replace("answer(atoi(line))", "answer(atoi(line)) + part(0)").replace(
        "int answer(int n);", "int answer(int n);\nint part(int n);"
    )
    project = Project(tmp_path / "p", {"main.c": main, "unit.c": UNIT, "part.c": part}, shared=["part.c"])
    found = archive(tmp_path / "libx.a", "rcs", ["-fPIC"], counter=COUNTER)
    declared = "int next(void);"
    changed = project.object(
        "part.c", ("n + calls", "n + 100 * next() + 0 * calls"), ("int part", f"{declared}\nint part")
    )
    with project.running() as program, patcher.attach(program.pid, archives=[found]) as session:
        assert program.ask(0) == "1001"
        generation = session.apply(calling(project, "next() + calls * 0", declared), changed)
        assert sorted(names(generation)) == ["answer", "next", "part"]
        assert program.ask(0) in ("201", "102")
        assert program.ask(0) in ("403", "304")


def test_a_type_that_is_another_one_in_the_archive_is_refused(tmp_path: Path) -> None:
    point = "struct point { int x, y; };\nstruct point origin = {1, 2};\n"
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": point + UNIT})
    text = "struct point { int before, x, y; };\nextern struct point origin;\nint extra(void) { return origin.x; }\n"
    found = archive(tmp_path / "libx.a", extra=text)
    with project.running() as program, patcher.attach(program.pid, archives=[found]) as session:
        with pytest.raises(UnsafeChange, match=r"libx\.a\(extra\.o\) changes the layout .*point") as refused:
            session.apply(calling(project, "extra()", "int extra(void);"))
        assert refused.value.code == "layout"


def test_what_the_linker_dropped_comes_from_the_object_and_shares_its_variables(tmp_path: Path) -> None:
    counter = "int shared = 3;\nint used(int n) { return n + shared; }\nint dropped(int n) { return n * shared++; }\n"
    main = MAIN.replace("answer(atoi(line))", "answer(atoi(line)) + used(0)").replace(
        "int answer(int n);", "int answer(int n);\nint used(int n);"
    )
    project = Project(
        tmp_path / "p",
        {"main.c": main, "unit.c": UNIT, "counter.c": counter},
        compile_flags=["-ffunction-sections", "-fdata-sections"],
        link_flags=["-Wl,--gc-sections"],
    )
    assert "dropped" not in run("nm", project.program)
    with project.running() as program:
        assert program.ask(1) == "1004"
        with attached(project, program.pid) as session:
            session.apply(calling(project, "dropped(n)", "int dropped(int);"))
            assert program.ask(2) == "10"  # 2 * 3, and `used` sees that `shared` is 4
            assert program.ask(2) == "13"


def test_an_object_that_is_older_than_its_source_is_compiled(tmp_path: Path) -> None:
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": UNIT})
    beside(project, "late.c", "int late(int n) { return n; }\n")
    with project.running() as program, attached(project, program.pid) as session:
        (project.sources / "late.c").write_text("int late(int n) { return 100 * n; }\n")
        session.apply(calling(project, "late(n)", "int late(int);"))
        assert program.ask(2) == "200"


def beside(project: Project, name: str, text: str, *flags: str) -> None:
    """Compile a source that the program is not linked with, and list it among the compile commands."""
    (project.sources / name).write_text(text)
    command = ["gcc", "-g", "-O2", *flags, "-c", f"src/{name}", "-o", f"{Path(name).stem}.o"]
    run(*command, cwd=project.root)
    database = project.root / "compile_commands.json"
    entry = {"directory": str(project.root), "file": f"src/{name}", "arguments": command}
    database.write_text(json.dumps([*json.loads(database.read_text()), entry]))


FAR = "extern char **environ;\nint late(int n) { return environ ? 3 * n : 0; }\n"


def test_an_object_that_cannot_reach_a_librarys_data_is_compiled_to_reach_it(project: Project) -> None:
    beside(project, "late.c", FAR)
    with project.running() as program, attached(project, program.pid) as session:
        session.apply(calling(project, "late(n)", "int late(int);"))
        assert program.ask(2) == "6"


def test_a_member_that_cannot_reach_a_librarys_data_is_refused_by_name(project: Project, tmp_path: Path) -> None:
    found = archive(tmp_path / "libx.a", late=FAR)
    with project.running() as program, patcher.attach(program.pid, archives=[found]) as session:
        with pytest.raises(PatcherError, match=r"libx\.a\(late\.o\).* against `environ`") as refused:
            session.apply(calling(project, "late(n)", "int late(int);"))
        assert refused.value.code == "far-data"
        assert "compile the unit" in refused.value.hint


def test_two_objects_of_the_build_that_define_it_are_refused(project: Project) -> None:
    beside(project, "late.c", "int late(int n) { return n; }\n")
    beside(project, "later.c", "int late(int n) { return -n; }\n")
    with project.running() as program:
        with attached(project, program.pid) as session:
            with pytest.raises(UnsafeChange, match=r"`late` is not in the process, and .*late\.o and .*later\.o"):
                session.apply(calling(project, "late(n)", "int late(int);"))
            assert session.status().arenas == ()
        assert program.ask(1) == "1001"


def test_a_member_that_a_program_would_have_started_with_is_started_once(project: Project, tmp_path: Path) -> None:
    text = "static int k;\n__attribute__((constructor)) static void start(void) { k += 30; }\n"
    found = archive(
        tmp_path / "libx.a", extra=text + "int extra(int n) { return n + k; }\nint more(int n) { return k; }\n"
    )
    with project.running() as program, patcher.attach(program.pid, archives=[found]) as session:
        session.apply(calling(project, "extra(n)", "int extra(int);"))
        assert program.ask(1) == "31"
        session.apply(calling(project, "extra(n) + more(n)", "int extra(int), more(int);"))
        assert program.ask(1) == "61"


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("int answer(int n) { return n; }\nint extra(int n) { return n; }\n", "duplicate-symbol", "`answer`"),
        (
            "static int k;\n__attribute__((destructor)) static void end(void) { k = 1; }\n"
            "int extra(int n) { return n + k; }\n",
            "constructor",
            ".fini_array",
        ),
        (
            '__asm__(".globl extra\\n.type extra,@function\\nextra: mov %edi,%eax\\n.size extra,.-extra\\n'
            '.globl rest\\n.type rest,@function\\nrest: ret\\n.size rest,.-rest");\n',
            "falls-through",
            "`extra`",
        ),
    ],
    ids=["duplicate", "destructor", "falls-through"],
)
def test_members_that_cannot_join_are_refused_by_name(
    project: Project, tmp_path: Path, text: str, code: str, message: str
) -> None:
    found = archive(tmp_path / "libx.a", extra=text)
    with project.running() as program, patcher.attach(program.pid, archives=[found]) as session:
        with pytest.raises(PatcherError) as refused:
            session.apply(calling(project, "extra(n)", "int extra(int);"))
        assert refused.value.code == code, refused.value.message
        assert message in refused.value.message
        assert "extra.o" in refused.value.message
        assert session.status().arenas == ()
        assert program.ask(1) == "1001"


def test_a_member_has_its_thread_locals(project: Project, tmp_path: Path) -> None:
    found = archive(tmp_path / "libx.a", extra="__thread int own = 5;\nint extra(int n) { return n + own++; }\n")
    with project.running() as program, patcher.attach(program.pid, archives=[found]) as session:
        session.apply(calling(project, "extra(n)", "int extra(int);"))
        assert program.ask(1) == "6"
        session.apply(calling(project, "extra(n) + 100", "int extra(int);"))
        assert program.ask(1) == "107"
        session.revert(1)
        assert program.ask(1) == "8"


def test_a_share_in_what_the_linker_gathers_is_refused(tmp_path: Path) -> None:
    entry = '__attribute__((section("plugins"), used)) static const int own = {};\n'
    main = entry.format(1) + MAIN.replace("int main(void)", "extern const int __start_plugins[], __stop_plugins[];\n"
        "int plugin_count(void) { return __stop_plugins - __start_plugins; }\nint main(void)")  # fmt: skip
    project = Project(tmp_path / "p", {"main.c": main, "unit.c": UNIT})
    found = archive(tmp_path / "libx.a", extra=entry.format(2) + "int extra(int n) { return n; }\n")
    with project.running() as program, patcher.attach(program.pid, archives=[found]) as session:
        with pytest.raises(UnsafeChange, match=r"extra\.o.* has a share in plugins") as refused:
            session.apply(calling(project, "extra(n)", "int extra(int);"))
        assert refused.value.code == "gathered-section"


CHOSEN = """\
int asked;
static int slow(int n) { return n; }
static int fast(int n) { return 1000 * n; }
static int (*choose(void))(int) { asked++; return asked ? fast : slow; }
int chosen(int n) __attribute__((ifunc("choose")));
int asked_times(void) { return asked; }
"""


def test_an_ifunc_is_resolved_once_before_it_goes_live(project: Project, tmp_path: Path) -> None:
    found = archive(tmp_path / "libx.a", chosen=CHOSEN)
    declared = ("int chosen(int);", "int asked_times(void);")
    with project.running() as program, patcher.attach(program.pid, archives=[found]) as session:
        session.apply(calling(project, "chosen(n) + asked_times()", *declared))
        assert program.ask(3) == "3001"
        session.apply(calling(project, "2 * chosen(n) + asked_times()", *declared))
        assert program.ask(3) == "6001"
        taken = "({ int (*volatile f)(int) = chosen; f(n) + asked_times(); })"
        session.apply(calling(project, taken, *declared))
        assert program.ask(3) == "3001"


def test_a_tentative_definition_beside_a_definition_in_an_archive_is_refused(tmp_path: Path) -> None:
    project = Project(tmp_path / "p", compile_flags=["-fcommon"])
    found = archive(tmp_path / "libx.a", extra="int shared = 5;\nint extra(int n) { return n + shared; }\n")
    with project.running() as program, patcher.attach(program.pid, archives=[found]) as session:
        with pytest.raises(UnsafeChange, match=r"`shared` .*libx\.a\(extra\.o\) defines it") as refused:
            session.apply(calling(project, "shared", "int shared;"))
        assert refused.value.code == "tentative"
        session.apply(calling(project, "other", "int other;"))
        assert program.ask(1) == "0"


def test_new_tentative_definitions_of_one_name_in_two_units_are_refused(tmp_path: Path) -> None:
    project = Project(tmp_path / "p", compile_flags=["-fcommon"])
    (beside,) = objects(tmp_path, ["-fcommon"], late="int shared; int late(int n) { return shared = n; }\n")
    wants = calling(project, "late(n) + shared", "int shared;", "int late(int);")
    with project.running() as program, patcher.attach(program.pid) as session:
        with pytest.raises(UnsafeChange, match=r"`shared` .*late\.o defines it|`shared` .*unit\.o defines it"):
            session.apply(wants, beside)
        assert program.ask(1) == "1001"


def test_a_unit_may_bring_an_ifunc_itself(project: Project) -> None:
    with project.running() as program, patcher.attach(program.pid) as session:
        session.apply(calling(project, "chosen(n) + asked_times()", *CHOSEN.splitlines()))
        assert program.ask(3) == "3001"


def test_the_resolver_itself_is_not_what_its_name_means(project: Project) -> None:
    lines = [
        *CHOSEN.replace("static int (*choose", "__attribute__((noipa)) static int (*choose").splitlines(),
        "int (*resolver(int n))(int) { return n ? choose() : 0; }",
    ]
    with project.running() as program, patcher.attach(program.pid) as session:
        with pytest.raises(PatcherError, match="refers to the resolver of `chosen` itself"):
            session.apply(calling(project, "chosen(n) + (resolver(n) != 0)", *lines))
        assert program.ask(3) == "1003"


# --- the C library of a static program --------------------------------------------------------------------------------


def test_a_static_program_gains_functions_of_the_c_library(static: Project) -> None:
    assert "strtod" not in run("nm", static.program).split()
    wants = calling(static, '(int)(strtod("2.5", 0) * n)', "double strtod(const char *, char **);")
    with static.running() as program, patcher.attach(program.pid) as session:
        before = image_bytes(program.pid)
        generation = session.apply(wants)
        assert "strtod" in names(generation)
        assert "libc.a(strtod.o)" in members(generation)
        assert program.ask(10) == "25"
        session.revert(0)
        assert program.ask(10) == "2010"
        assert image_bytes(program.pid) == before


def test_an_archive_that_is_a_linker_script_is_followed(static: Project) -> None:
    script = run("gcc", "-print-file-name=libm.a").strip()
    with static.running() as program, patcher.attach(program.pid, archives=[script]) as session:
        generation = session.apply(calling(static, "(int)cbrt(n)", "double cbrt(double);"))
        assert any(m.endswith("cbrt.o)") for m in members(generation))
        assert program.ask(27) == "3"


def test_another_build_of_the_c_library_is_refused(static: Project, tmp_path: Path) -> None:
    found = Path(run("gcc", "-print-file-name=libc.a").strip())
    other = tmp_path / "libc.a"
    other.write_bytes(found.read_bytes())
    (changed,) = objects(tmp_path / "changed", ["-fPIE"], strtod_l="int ____strtod_l_internal(void) { return 3; }\n")
    # What `wanted` is made of is new; what it calls is another `strtol` than the process has.
    (wanted, strtol) = objects(
        tmp_path / "other",
        wanted='long strtol(const char *, char **, int);\nint wanted(void) { return strtol("7", 0, 10); }\n',
        strtol="long strtol(const char *t, char **e, int b) { (void)e; return t[0] + b; }\n",
    )
    run("ar", "rs", other, wanted, strtol, changed)
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = -print-file-name=libc.a ] && echo {other} || exec gcc "$@"\n')
    compiler.chmod(0o755)
    database = static.root / "compile_commands.json"
    database.write_text(database.read_text().replace('"gcc"', json.dumps(str(compiler))))
    with static.running() as program, patcher.attach(program.pid, compile_commands=database) as session:
        with pytest.raises(UnsafeChange) as refused:
            session.apply(calling(static, "wanted()", "int wanted(void);"))
        assert refused.value.code == "mismatch"
        assert "is not the archive that program was linked with" in refused.value.message
        assert "`strtol`" in refused.value.message
        assert program.ask(1) == "1001"


# --- libraries --------------------------------------------------------------------------------------------------------

ROOT_OF = ("(int)sqrt(n)", "double sqrt(double);")


@pytest.fixture
def rooted(tmp_path: Path) -> tuple[Project, Path]:
    project = Project(tmp_path / "p", compile_flags=["-fno-builtin"])
    assert "libm" not in run("ldd", project.program)
    return project, calling(project, *ROOT_OF)


@pytest.mark.parametrize("name", ["m", "-lm", "libm.so.6", "/libm.so.6", "/libm.so"])
def test_a_given_library_is_loaded_when_it_has_what_is_missing(rooted: tuple[Project, Path], name: str) -> None:
    project, wants = rooted
    library = run("gcc", f"-print-file-name={name[1:]}").strip() if name.startswith("/") else name
    with project.running() as program, patcher.attach(program.pid, libraries=[library]) as session:
        before = image_bytes(program.pid)
        generation = session.apply(wants)
        assert members(generation) == ["libm.so.6"]
        assert program.ask(49) == "7"
        assert session.apply(calling(project, "(int)sqrt(n) + 1", "double sqrt(double);")).supplied == ()
        assert program.ask(49) == "8"
        session.revert(0)
        after = image_bytes(program.pid)
        assert {key: after[key] for key in before} == before
        assert program.ask(49) == "3049"
        assert_untouched(program.pid)


def test_a_program_that_has_a_librarys_bare_name_is_not_meant(
    rooted: tuple[Project, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, wants = rooted
    (tmp_path / "m").write_bytes(project.program.read_bytes())
    monkeypatch.chdir(tmp_path)
    with project.running() as program, patcher.attach(program.pid, libraries=["m"]) as session:
        assert members(session.apply(wants)) == ["libm.so.6"]
        assert program.ask(49) == "7"


def test_a_library_is_not_loaded_for_nothing(rooted: tuple[Project, Path]) -> None:
    project, _ = rooted
    with project.running() as program, patcher.attach(program.pid, libraries=["m"]) as session:
        session.apply(calling(project, "n"))
        assert not any("libm" in line for line in mapped(program.pid))
        with pytest.raises(UnresolvedSymbol, match="`nowhere`"):
            session.apply(calling(project, "(int)sqrt(n) + nowhere()", "double sqrt(double);", "int nowhere(void);"))
        assert not any("libm" in line for line in mapped(program.pid)), "loaded for a change that was refused"
        assert program.ask(5) == "5"


def test_a_dry_run_touches_nothing(rooted: tuple[Project, Path], tmp_path: Path) -> None:
    project, wants = rooted
    found = archive(tmp_path / "libx.a", extra="int extra(int n) { return n; }\n")
    options = {"libraries": ["m"], "archives": [found], "allow_undefined": True, "dry_run": True}
    with project.running() as program, patcher.attach(program.pid, **options) as session:
        before = image_bytes(program.pid), mapped(program.pid)
        assert members(session.apply(wants)) == ["libm.so.6"]
        assert members(session.apply(calling(project, "extra(n)", "int extra(int);"))) == ["libx.a(extra.o)"]
        assert session.apply(calling(project, "nowhere(n)", "int nowhere(int);")).undefined == ("nowhere",)
        assert (image_bytes(program.pid), mapped(program.pid)) == before
        assert program.ask(49) == "1049"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"libraries": ["no_such_library"]}, "--library no_such_library: there is no such library"),
        ({"libraries": ["/etc/passwd"]}, "/etc/passwd: not an ELF file"),
        ({"libraries": ["/"]}, "--library /: there is no such library"),
        ({"archives": ["/etc/passwd"]}, "/etc/passwd: not an archive"),
        ({"archives": ["/no/such.a"]}, "/no/such.a: no such file"),
        ({"archives": ["/"]}, "/: is a directory"),
    ],
)
def test_what_is_given_and_of_no_use_is_named(project: Project, options: dict[str, list[str]], message: str) -> None:
    wants = calling(project, "extra(n)", "int extra(int);")
    with project.running() as program, patcher.attach(program.pid, **options) as session:  # type: ignore[arg-type]
        with pytest.raises(ObjectError, match=message):
            session.apply(wants)
        assert session.status().arenas == ()
        assert program.ask(1) == "1001"


LINK = "gcc -o program main.o unit.o -L./own -Wl,--as-needed -lown -lm -pthread"


def cmake(root: Path) -> None:
    folder = root / "CMakeFiles" / "program.dir"
    folder.mkdir(parents=True)
    (folder / "link.txt").write_text(f"/usr/bin/{LINK}\n")


def ninja(root: Path) -> None:
    (root / "build.ninja").write_text(
        "rule LINK\n  command = $PRE gcc $in -o $out $LINK_LIBRARIES\n\n"
        "build other: LINK other.o\n  LINK_LIBRARIES = -lz\n\n"
        "build program: LINK main.o $\n    unit.o | own/libown.so\n"
        "  LINK_PATH = -L./own\n  LINK_LIBRARIES = -Wl,--as-needed -lown -lm\n"
    )


def listed(root: Path) -> None:
    database = root / "compile_commands.json"
    entry = {"directory": str(root), "file": "main.o", "arguments": shlex.split(LINK), "output": "program"}
    database.write_text(json.dumps([*json.loads(database.read_text()), entry]))


@pytest.mark.parametrize("written", [cmake, ninja, listed])
def test_libraries_of_the_link_line_that_the_linker_left_out(tmp_path: Path, written: object) -> None:
    project = Project(tmp_path / "p", compile_flags=["-fno-builtin"])
    own = project.root / "own"
    objects(own, ["-fPIC"], own="int own(int n) { return 100 * n; }\n")
    run("gcc", "-shared", "-o", "libown.so", "own.o", cwd=own)
    assert callable(written)
    written(project.root)
    declared = ("double sqrt(double);", "int own(int);")
    with project.running() as program, attached(project, program.pid) as session:
        generation = session.apply(calling(project, "own((int)sqrt(n))", *declared))
        assert set(members(generation)) == {"libm.so.6", "libown.so"}
        assert program.ask(49) == "700"


def test_archives_of_the_link_line_are_looked_in(project: Project) -> None:
    archive(project.root / "libown.a", own="int own(int n) { return 100 * n; }\n")
    folder = project.root / "CMakeFiles" / "program.dir"
    folder.mkdir(parents=True)
    (folder / "link.txt").write_text("/usr/bin/cc -o program main.o unit.o -L. -lown\n")
    with project.running() as program, patcher.attach(program.pid) as session:
        assert members(session.apply(calling(project, "own(n)", "int own(int);"))) == ["libown.a(own.o)"]
        assert program.ask(7) == "700"


# --- what is nowhere --------------------------------------------------------------------------------------------------


def test_what_is_still_missing_is_named_with_who_wants_it_and_where_was_looked(
    project: Project, tmp_path: Path
) -> None:
    found = archive(tmp_path / "libx.a", extra="int nowhere(int); int extra(int n) { return nowhere(n); }\n")
    with project.running() as program, patcher.attach(program.pid, archives=[found]) as session:
        with pytest.raises(UnresolvedSymbol) as refused:
            session.apply(calling(project, "extra(n)", "int extra(int);"))
        assert "`nowhere` is not defined in the process; `extra` refers to it" in refused.value.message
        assert "libx.a(extra.o)" in refused.value.message
        assert "--archive or --library" in refused.value.hint
        assert str(found) in refused.value.hint
        assert session.status().arenas == ()
        assert program.ask(1) == "1001"


BARE = """\
int answer(int n);
static long call(long number, long a, long b, long c)
{
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}
void _start(void)
{
    char byte;
    call(1, 1, (long)"ready\\n", 6);
    while (call(0, 0, (long)&byte, 1) == 1) {
        if (byte == '\\n')
            continue;
        byte = (char)('0' + answer(byte - '0') % 10);
        call(1, 1, (long)&byte, 1);
        call(1, 1, (long)"\\n", 1);
    }
    call(231, 0, 0, 0);
}
"""


@pytest.mark.parametrize("kind", ["dynamic", "static", "bare"])
def test_a_call_of_what_is_nowhere_aborts_when_it_is_reached(tmp_path: Path, kind: str) -> None:
    flags = {"dynamic": [], "static": ["-static"], "bare": ["-static", "-nostdlib"]}[kind]
    sources = {"main.c": BARE if kind == "bare" else MAIN, "unit.c": UNIT.replace("1000", "10")}
    compile_flags = ["-fno-stack-protector"] if kind == "bare" else []
    project = Project(tmp_path / "p", sources, compile_flags=compile_flags, link_flags=flags)
    wants = project.object(
        "unit.c", ("n + 10 * calls", "n == 7 ? nowhere(n) : n + 2"), (HEAD, f"{HEAD}\nint nowhere(int);")
    )
    with started(project.program, tmp_path / "stderr") as process:
        with patcher.attach(process.pid, allow_undefined=True) as session:
            generation = session.apply(wants)
        assert generation.undefined == ("nowhere",)
        assert names(generation) == ["answer"]
        assert ask(process, 1) == "3"
        assert ask(process, 2) == "4"
        assert process.poll() is None
        assert ask(process, 7) == ""
        assert process.wait(10) == -signal.SIGABRT
    message = "patcher: call of undefined `nowhere`, referred to by `answer`\n"
    assert (tmp_path / "stderr").read_text() == message


@contextlib.contextmanager
def started(program: Path, errors: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a program that says a first line, its stderr in a file; it is ended after the block."""
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, bufsize=1
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()
            with contextlib.suppress(BrokenPipeError):
                process.communicate()


def ask(process: subprocess.Popen[str], number: int) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{number}\n")
    return process.stdout.readline().strip()


@pytest.mark.parametrize(
    ("expression", "declaration"),
    [("nowhere", "extern int nowhere;"), ("(int)(long)&nowhere", "int nowhere(int);")],
    ids=["a variable", "an address"],
)
def test_what_may_be_a_variable_stays_refused(project: Project, expression: str, declaration: str) -> None:
    with project.running() as program, patcher.attach(program.pid, allow_undefined=True) as session:
        with pytest.raises(UnresolvedSymbol, match="`nowhere` is not defined in the process; `answer`"):
            session.apply(calling(project, expression, declaration))
        assert session.status().arenas == ()
        assert program.ask(1) == "1001"


def test_what_was_undefined_stays_so_until_it_is_found(project: Project, tmp_path: Path) -> None:
    found = archive(tmp_path / "libx.a", nowhere="int nowhere(int n) { return 9 * n; }\n")
    declared = "int nowhere(int);"
    with project.running() as program:
        with patcher.attach(program.pid, allow_undefined=True) as session:
            assert session.apply(calling(project, "n < 5 ? n : nowhere(n)", declared)).undefined == ("nowhere",)
            assert session.apply(calling(project, "n < 6 ? n : nowhere(n)", declared)).undefined == ("nowhere",)
            session.revert(1)
        with patcher.attach(program.pid) as session:
            with pytest.raises(UnresolvedSymbol, match="`nowhere`"):
                session.apply(calling(project, "n < 7 ? n : nowhere(n)", declared))
            assert program.ask(4) == "4"
        with patcher.attach(program.pid, archives=[found]) as session:
            generation = session.apply(calling(project, "n < 2 ? nowhere(7) : nowhere(n)", declared))
            assert (members(generation), generation.undefined) == (["libx.a(nowhere.o)"], ())
            assert [program.ask(1), program.ask(8)] == ["63", "72"]


def test_the_command_line_has_it_all(project: Project, tmp_path: Path) -> None:
    found = archive(tmp_path / "libx.a", extra="int extra(int n) { return n * 5; }\n")
    wants = calling(project, "n == 7 ? nowhere() : extra(n)", "int extra(int);", "int nowhere(void);")
    command = [sys.executable, "-m", "patcher", "apply"]
    with project.running() as program:
        given = [str(program.pid), str(wants), "--archive", str(found), "--library", "m", "--allow-undefined"]
        done = subprocess.run([*command, *given, "--json"], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["supplied"] == [f"{found}(extra.o)"]
        assert json.loads(done.stdout)["undefined"] == ["nowhere"]
        assert "libx.a(extra.o)" in done.stderr
        assert "undefined, a call aborts: nowhere" in done.stderr
        assert program.ask(2) == "10"
        wrong = subprocess.run([*command, *given[:2], "--archive", "not-there.a"], capture_output=True, text=True)
        assert wrong.returncode == 2
        assert "not-there.a" in wrong.stderr
        text = subprocess.run([*command, *given[:2], "--archive", str(wants)], capture_output=True, text=True)
        assert (text.returncode, "Traceback" in text.stderr) == (0, False)  # nothing is missing any more


def test_what_a_resolver_answered_is_known_to_the_next_session(project: Project) -> None:
    """Nothing in the process has bound `strstr`: the first session asks, and for the next one nothing is new."""
    text = calling(
        project,
        '({ const char *volatile all = "abcd"; strstr(all, "bcd") != 0; })',
        "char *strstr(const char *, const char *);",
    )
    with project.running() as program:
        for expected in (("answer",), ()):
            with patcher.attach(program.pid) as session:
                assert tuple(f.name for f in session.apply(text).functions) == expected
                assert program.ask(3) == "1"
