"""Variables whose values are carried over without a function of the user's: by name, by index, or not at all."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from project import MAIN, Project, Running, assert_untouched

import patcher
from patcher.errors import TargetBusy, UnsafeChange
from patcher.report import Event, Note

COMPILERS = [(c, o) for c in ("gcc", "clang") for o in ("-O0", "-O2")]
HEADER = "struct config { int count; char name[12]; };\nextern struct config settings;\n"
GROWN = "struct config { char name[12]; int count; int limit; };\nextern struct config settings;\n"
UNIT = """\
#include "config.h"
struct config settings = {.count = 5, .name = "old"};
int other(int n);
int answer(int n)
{
    if (n == 9) return settings.name[0];
    return settings.count += n + other(n);
}
"""
NEW = UNIT.replace('{.count = 5, .name = "old"}', '{.count = 1, .name = "new", .limit = 70000}')
NEW = NEW.replace("return settings.count +=", "return settings.limit + (settings.count +=") + "\n"
NEW = NEW.replace("other(n);\n}", "other(n));\n}")
OTHER = '#include "config.h"\nint other(int n) { return n * 0 + (settings.name[1] == 122); }\n'


@pytest.fixture(params=COMPILERS, ids="".join)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Sequence[str]:
    monkeypatch.setattr("project.COMPILE", (request.param[0], "-g", request.param[1]))
    return tuple(request.param)


def shared(root: Path, other: str = OTHER, **options: Sequence[str]) -> Project:
    """Two files that have one header."""
    (root / "p/src").mkdir(parents=True)
    (root / "p/src/config.h").write_text(HEADER)
    (root / "p/src").rename(root / "kept")
    project = Project.__new__(Project)
    return start(project, root, {"main.c": MAIN, "unit.c": UNIT, "other.c": other}, options)


def start(project: Project, root: Path, sources: dict[str, str], options: dict[str, Sequence[str]]) -> Project:
    flags = ["-I", str(root / "kept"), *options.get("compile_flags", ())]
    Project.__init__(project, root / "p", sources, compile_flags=flags)
    return project


def rewrite(project: Project, name: str, text: str) -> Path:
    (project.sources / name).write_text(text)
    return project.sources / name


def grow(root: Path, project: Project) -> list[Path]:
    (root / "kept/config.h").write_text(GROWN)
    return [rewrite(project, "unit.c", NEW), project.sources / "other.c"]


NOTE = "16 -> 20 bytes, members copied by name; new: limit"


def test_a_struct_that_grows_with_all_who_know_it(tmp_path, compiled):
    project = shared(tmp_path)
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        assert program.ask(1) == "6"
        files = grow(tmp_path, project)
        said = session.explain(*files)
        assert [(v.name, v.outcome, v.note) for v in said.variables] == [("settings", "migrated", NOTE)]
        assert {t.verdict for t in said.types} == {"accepted: its values are carried over"}
        assert program.ask(1) == "7", "explained, and nothing done"
        done = session.apply(*files)
        assert [(v.name, v.outcome, v.note) for v in done.variables] == [("settings", "migrated", NOTE)]
        assert program.ask(1) == "70008"
        assert program.ask(9) == str(ord("o"))
        again = session.apply(rewrite(project, "unit.c", NEW.replace("n + other", "10 * n + other")))
        assert not again.variables
        assert program.ask(1) == "70018"
        session.revert()
        assert program.ask(1) == "70019"
        session.revert(0)
        assert program.ask(1) == "8", "the old storage, as it was left"
        done = session.apply(rewrite(project, "unit.c", NEW), project.sources / "other.c")
        assert [v.note for v in done.variables] == [NOTE]
        assert program.ask(1) == "70009", "filled afresh"
        assert_untouched(program.pid)


class Asking:
    """Asks the program whenever something is noted."""

    def __init__(self, program: Running) -> None:
        self.program = program
        self.noted: list[tuple[str, str]] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, Note):
            self.noted.append((event.text, self.program.ask(1)))


def test_a_migration_is_told_before_it_happens(tmp_path, compiled):
    project = shared(tmp_path)
    with project.running() as program:
        reporter = Asking(program)
        with patcher.attach(program.pid, watched=[project.sources], dry_run=True) as session:
            session._reporter = reporter
            files = grow(tmp_path, project)
            assert session.apply(*files).variables
            assert not reporter.noted, "a rehearsal is about to do nothing"
        with patcher.attach(program.pid, watched=[project.sources]) as session:
            session._reporter = reporter
            session.apply(*files)
            assert reporter.noted == [(f"about to migrate: settings ({NOTE})", "6")], "while the old code answers"
            assert program.ask(1) == "70007"
            session.apply(rewrite(project, "unit.c", NEW.replace("n + other", "10 * n + other")))
            assert len(reporter.noted) == 1
            assert program.ask(1) == "70017"


def test_who_is_not_saved_is_named(tmp_path):
    project = shared(tmp_path)
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        assert program.ask(1) == "6"
        unit, _ = grow(tmp_path, project)
        for _ in range(2):
            said = session.explain(unit)
            assert said.refusal is not None
            assert said.refusal.reason == "layout"
            with pytest.raises(UnsafeChange, match=r"cannot be carried over: .*other\.c knows it and is not part") as e:
                session.apply(unit)
            assert e.value.code == "layout"
            assert "patcher_migrate_config" in e.value.hint
        assert program.ask(1) == "7"
        assert_untouched(program.pid)


def test_who_is_not_saved_and_has_no_debug_information_is_named(tmp_path):
    project = shared(tmp_path)
    command = ["gcc", "-O2", "-c", "src/other.c", "-o", "other.o", "-I", str(tmp_path / "kept")]
    subprocess.run(command, cwd=project.root, check=True)
    link = ["gcc", "-o", "program", "main.o", "unit.o", "other.o", "-Wl,-z,now"]
    subprocess.run(link, cwd=project.root, check=True)
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        unit, _ = grow(tmp_path, project)
        with pytest.raises(UnsafeChange, match=r"`settings` has another layout now, and `other` of .* still") as e:
            session.apply(unit)
        assert e.value.code == "still-used"
        assert program.ask(1) == "6"
        assert_untouched(program.pid)


HELD = [
    ("static struct config *kept = &settings;\n", "whether one is on the heap"),
    ("static void *kept = &settings;\n", "`kept`, which holds its address"),
    ("static char *kept = (char *)(&settings + 1);\n", "`kept`, which holds the address behind its end"),
]


@pytest.mark.parametrize(("holder", "named"), HELD, ids=["typed", "untyped", "end"])
def test_whoever_holds_its_address_prevents_it(tmp_path, holder, named):
    other = OTHER.replace("int other", holder + "int other").replace("n * 0", "n * 0 + (kept == 0)")
    project = shared(tmp_path, other, compile_flags=["-O0"])
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        files = grow(tmp_path, project)
        with pytest.raises(UnsafeChange, match=named):
            session.apply(*files)
        assert program.ask(1) == "6"
        assert_untouched(program.pid)


def single(tmp_path: Path, text: str, **options: Sequence[str]) -> Project:
    return Project(tmp_path / "p", {"main.c": MAIN, "unit.c": text}, **options)


KINDS = """\
struct point { int x, y; };
struct point points[3];
int grid[2][2] = {{1, 2}, {3, 4}};
short small = -3;
unsigned char byte = 200;
long wide = 77;
char text[4] = "abc";
int answer(int n)
{
    if (n == 100) return grid[1][0];
    if (n == 101) return small;
    if (n == 102) return byte;
    if (n == 103) return (int)wide;
    if (n == 104) return text[2];
    return points[n].y += n + 1;
}
"""
LARGER = KINDS.replace("int x, y;", "int x; char tag; int y;").replace("points[3]", "points[5]")
LARGER = LARGER.replace("grid[2][2]", "grid[2][3]").replace("short small = -3", "long small = 9")
LARGER = LARGER.replace("unsigned char byte", "int byte").replace("long wide", "int wide")
LARGER = LARGER.replace('text[4] = "abc"', 'text[40] = "xyzabcdef"').replace("n + 1;", "n + 1001;")


def test_arrays_and_numbers(tmp_path, compiled):
    project = single(tmp_path, KINDS)
    values = ["3", "-3", "200", "77", str(ord("c"))]
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        assert [program.ask(n) for n in (0, 2)] == ["1", "3"]
        assert [program.ask(n) for n in range(100, 105)] == values
        for times in (1, 2):
            done = session.apply(rewrite(project, "unit.c", LARGER))
            assert {v.name: v.note for v in done.variables} == {
                "points": "24 -> 60 bytes, members copied by name; new: tag",
                "grid": "16 -> 24 bytes, elements copied by index",
                "small": "2 -> 8 bytes, value kept",
                "byte": "1 -> 4 bytes, value kept",
                "wide": "8 -> 4 bytes, value kept",
                "text": "4 -> 40 bytes, elements copied by index",
            }
            assert [program.ask(n) for n in range(100, 105)] == values
            assert [program.ask(n) for n in (0, 2, 4)] == [str(1001 + times), str(1003 + 3 * times), "1005"]
            program.ask(101)  # nothing of the address is left in registers that are saved
            session.revert()
            assert [program.ask(n) for n in (0, 2)] == [str(times + 1), str(3 * times + 3)]
            assert [program.ask(n) for n in range(100, 105)] == values
        assert_untouched(program.pid)


def test_a_number_that_has_no_room_any_more_is_refused(tmp_path):
    text = "long wide = 1;\nint answer(int n) { return (int)((wide = wide * 2 + n) >> 32); }\n"
    project = single(tmp_path, text)
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        for _ in range(40):
            program.ask(0)
        before = program.ask(0)
        new = text.replace("long wide", "int wide").replace("(wide = wide * 2 + n) >> 32", "wide + n")
        with pytest.raises(UnsafeChange, match=r"`wide`.* no room for") as caught:
            session.apply(rewrite(project, "unit.c", new))
        assert caught.value.code == "migration"
        assert int(program.ask(0)) == 2 * int(before)
        assert_untouched(program.pid)


def test_what_cannot_be_carried_over_is_named(tmp_path):
    project = single(tmp_path, KINDS)
    cases = [
        (KINDS.replace("points[3]", "points[2]"), "3 elements became 2"),
        (KINDS.replace("int x, y;", "float x; int y, z;"), r"`points\[\]\.x`: a whole number"),
        (KINDS.replace("int x, y;", "int z, pad, y;"), "whether it is what `x` was"),
        (KINDS.replace("long wide", "double wide"), "floating"),
    ]
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        assert program.ask(0) == "1"
        for text, named in cases:
            with pytest.raises(UnsafeChange, match=named) as caught:
                session.apply(rewrite(project, "unit.c", text.replace("n + 1;", "n + 2;")))
            assert caught.value.code == "layout"
        assert program.ask(0) == "2"
        assert_untouched(program.pid)


@pytest.mark.parametrize("gone", [False, True], ids=["known", "gone"])
def test_another_session_goes_on_from_what_was_carried_over(tmp_path, monkeypatch, gone):
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    project = single(tmp_path, KINDS)
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        assert [program.ask(n) for n in (2, 101)] == ["3", "-3"]
        session.apply(rewrite(project, "unit.c", LARGER))
        if gone:
            shutil.rmtree(tmp_path / "run/patcher/types")
        with patcher.attach(program.pid, watched=[project.sources]) as other:
            if gone:
                most = rewrite(project, "unit.c", LARGER.replace("points[5]", "points[9]"))
                with pytest.raises(UnsafeChange, match=r"`points`.* only the controller knows") as caught:
                    other.apply(most)
                assert caught.value.code == "layout"
            done = other.apply(rewrite(project, "unit.c", LARGER.replace("n + 1001;", "n + 2001;")))
            assert not done.variables
            assert [program.ask(n) for n in (2, 101)] == ["2006", "-3"]
            done = other.apply(rewrite(project, "unit.c", LARGER.replace("points[5]", "points[9]")))
            assert [(v.name, v.note) for v in done.variables] == [
                ("points", "60 -> 108 bytes, elements copied by index")
            ]
            assert [program.ask(n) for n in (2, 8, 101)] == ["3009", "1009", "-3"]
            other.revert(0)
            assert program.ask(2) == "6"


THREADS = """\
#include <pthread.h>
struct tally { int count; int unused; };
struct tally tally;
pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
long made[4];
static void step(int i) { pthread_mutex_lock(&lock); tally.count++; made[i]++; pthread_mutex_unlock(&lock); }
void once(int i) { step(i); }
int answer(int n)
{
    pthread_mutex_lock(&lock);
    long off = tally.count - made[0] - made[1] - made[2] - made[3];
    pthread_mutex_unlock(&lock);
    return (int)off + n;
}
"""
WRITERS = MAIN.replace("int main(void)\n{", """\
#include <pthread.h>
void once(int i);
static void *run(void *i) { for (;;) { once((int)(long)i); for (volatile int j = 0; j < 300; j++); } return i; }
int main(void)
{
    pthread_t t;
    for (long i = 0; i < 4; i++) pthread_create(&t, 0, run, (void *)i);""")  # fmt: skip


def test_no_write_of_another_thread_is_lost(tmp_path):
    """Every thread counts in the variable that is carried over and in one that stays: the two never differ."""
    project = Project(tmp_path / "p", {"main.c": WRITERS, "unit.c": THREADS})
    wide = THREADS.replace("int count; int unused;", "long unused, more; long count;")
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        assert program.ask(3) == "3"
        for text in (wide, wide.replace("long unused", "long further, unused"), THREADS):
            done = session.apply(rewrite(project, "unit.c", text))
            assert [v.outcome for v in done.variables] == ["migrated"]
            assert [program.ask(n) for n in (4, 5)] == ["4", "5"]
        assert_untouched(program.pid)


def test_old_code_that_runs_prevents_it(tmp_path):
    main = MAIN.replace("int answer(int n);", "int values[4] = {5};").replace("answer(atoi(line))", "++values[0]")
    project = Project(tmp_path / "p", {"main.c": main})
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        assert program.ask(1) == "6"
        with pytest.raises(TargetBusy, match="a thread stays inside `main`"):
            session.apply(rewrite(project, "main.c", main.replace("values[4]", "values[8]").replace("++v", "2 + v")))
        assert program.ask(1) == "7"


def test_without_debug_information_it_is_refused(tmp_path):
    project = single(tmp_path, KINDS, compile_flags=["-g0"])
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        with pytest.raises(UnsafeChange, match=r"`(points|grid|small|byte|wide|text)`") as caught:
            session.apply(rewrite(project, "unit.c", LARGER))
        assert caught.value.code == "layout"
        assert program.ask(0) == "1"


SCOPED = """\
struct point { int x, y; };
int grid[2][3] = {{1, 2, 3}, {4, 5, 6}};
int answer(int n)
{
    static struct point last = {3, 4};
    last.x += n;
    return last.x + last.y + grid[1][0];
}
"""


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("int x, y;", "int x, tag; float y;", r"`answer::last\.y`: "),
        ("grid[2][3] = {{1, 2, 3}, {4, 5, 6}}", "grid[3][2]", r"array bounds \[2\]\[3\] -> \[3\]\[2\]"),
    ],
    ids=["function's own", "rows"],
)
def test_what_is_not_done_says_so(tmp_path, old, new, named):
    project = single(tmp_path, SCOPED)
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        assert program.ask(1) == "12"
        with pytest.raises(UnsafeChange, match=named) as caught:
            session.apply(rewrite(project, "unit.c", SCOPED.replace(old, new).replace("+= n", "+= 2 * n")))
        assert caught.value.code == "layout"
        assert program.ask(1) == "13"
        assert_untouched(program.pid)


def test_a_unit_that_only_uses_a_variable_knows_what_it_became(tmp_path, compiled):
    project = shared(
        tmp_path,
        "int used(void);\n"
        + OTHER.replace("== 122)", "== 122) + used()")
        + "int used(void) { return settings.count * 0; }\n",
    )
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        assert program.ask(1) == "6"
        session.apply(*grow(tmp_path, project))
        assert program.ask(1) == "70007"
        other = (project.sources / "other.c").read_text()
        session.apply(rewrite(project, "other.c", other.replace("n * 0", "n + 100")))
        assert program.ask(1) == "70109", "it sees the new layout, as the process has it"
        (tmp_path / "kept/config.h").write_text(HEADER)
        with pytest.raises(UnsafeChange, match="struct config"):
            session.apply(rewrite(project, "other.c", other.replace("n * 0", "n + 200")))
        assert program.ask(1) == "70211"
        session.revert(0)
        session.apply(project.sources / "other.c")
        assert program.ask(1) == "208", "the old layout again"


SPLIT = """\
struct state { int calls; int last; } state = {100, 1};
__attribute__((cold, noinline)) int rare(int n) { return n; }
int answer(int n)
{
    if (n > 900)
        state.calls += rare(n);
    return n;
}
"""


def test_old_code_that_was_split_off_goes_with_its_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("project.COMPILE", ("gcc", "-g", "-O2"))  # clang 14 splits nothing off
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": SPLIT})
    grown = SPLIT.replace("int last; }", "int last; int limit; }").replace(
        "return n;\n}\n", "return n + state.calls;\n}\n"
    )
    grown = grown.replace("    if (n > 900)\n        state.calls += rare(n);\n", "")
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        assert session.image.executable.module.symbols.named("answer.cold")
        assert program.ask(901) == "901"
        for _ in range(2):
            done = session.apply(rewrite(project, "unit.c", grown))
            assert [(v.name, v.outcome) for v in done.variables] == [("state", "migrated")]
            assert program.ask(1) == "1002"
            session.revert(0)
        assert_untouched(program.pid)
