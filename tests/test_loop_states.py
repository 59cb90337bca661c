"""Saves, round after round, on a real process: headers, what fails, what is refused, and what others do meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import pytest
from project import MAIN, UNIT, Project, Running

from patcher.edits import State
from patcher.loop import Loop
from patcher.options import Options
from patcher.report import Applied, BuildFailed, Event, Note, Refused, Saved, Unchanged
from patcher.session import Session
from patcher.target import Target

E = TypeVar("E", bound=Event)

SOURCES = {
    "main.c": MAIN,
    "unit.c": '#include "scale.h"\nint other(int);\nint answer(int n) { return SCALE * n + other(n); }\n',
    "other.c": '#include "scale.h"\nint other(int n) { return 1000 * SCALE + spare(n); }\n',
    "spare.c": "int spare(int n) { return 0 * n; }\n",
}
SCALE = "#define SCALE 3\nint spare(int);\n"


class Watched:
    """A project, its program, and a loop that is told of saves."""

    def __init__(self, root: Path, stack: ExitStack, sources: dict[str, str], *flags: str, **options: object) -> None:
        (root / "p/src").mkdir(parents=True)
        self.root = root / "p"
        (self.root / "src/scale.h").write_text(SCALE)
        self.project = _Existing(self.root, sources, compile_flags=flags)
        self.program: Running = stack.enter_context(self.project.running())
        self.events: list[Event] = []
        self.stack = stack
        self.loop = self.controller(**options)

    def controller(self, **options: object) -> Loop:
        """Return one more loop on the process, whose events come with the others."""
        paths = (self.root / "src",)
        session = Session(Target.attach(self.program.pid), Options(watched=paths, **options), self)  # type: ignore[arg-type]
        self.stack.enter_context(session)
        session.remember_texts(paths)
        return Loop(session, paths)

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def path(self, name: str) -> Path:
        return self.root / "src" / name

    def edit(self, name: str, old: str, new: str) -> Path:
        text = self.path(name).read_text()
        assert text.count(old) == 1
        self.path(name).write_text(text.replace(old, new))
        return self.path(name)

    def save(self, *files: Path, pending: Callable[[], bool] = lambda: False) -> list[Event]:
        """Have the loop told of saves, and return what it says, notes left out."""
        self.events.clear()
        self.loop.round(frozenset(files), pending)
        return [e for e in self.events if not isinstance(e, Note | Saved)]

    def one(self, kind: type[E], *files: Path) -> E:
        """Do the same, with one event of some kind to come."""
        (event,) = self.save(*files)
        assert isinstance(event, kind), event
        return event

    def notes(self) -> str:
        return "\n".join(e.text for e in self.events if isinstance(e, Note))

    def ask(self, number: int = 1) -> str:
        return self.program.ask(number)

    def state(self, name: str) -> State:
        return self.loop.edits.state(self.path(name))


class _Existing(Project):
    """A project whose directory of sources is there already: with a header."""

    def __init__(self, root: Path, sources: dict[str, str], **options: object) -> None:
        header = (root / "src/scale.h").read_text()
        (root / "src/scale.h").unlink()
        (root / "src").rmdir()
        self._header = header
        super().__init__(root, sources, **options)  # type: ignore[arg-type]

    def build(self) -> None:
        if not (self.sources / "scale.h").exists():
            (self.sources / "scale.h").write_text(self._header)
        super().build()


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    with ExitStack() as stack:
        yield Watched(tmp_path, stack, SOURCES)


def names(event: Applied) -> set[str]:
    return {f.name for f in event.functions}


# --- headers ---


def test_a_saved_header_takes_every_unit_that_includes_it_along_as_one_generation(watched: Watched) -> None:
    assert watched.ask() == "3003"
    applied = watched.one(Applied, watched.edit("scale.h", "SCALE 3", "SCALE 4"))
    assert names(applied) == {"answer", "other"}
    assert applied.generation == 1
    assert "scale.h: 2 units include it" in watched.notes()
    assert watched.ask() == "4004"


def test_a_header_and_a_unit_saved_together_are_one_generation(watched: Watched) -> None:
    header = watched.edit("scale.h", "SCALE 3", "SCALE 5")
    applied = watched.one(Applied, header, watched.edit("spare.c", "0 * n", "7 * n"))
    assert names(applied) == {"answer", "other", "spare"}
    assert watched.ask() == "5012"


def test_a_header_that_a_unit_includes_only_since_its_last_save(watched: Watched) -> None:
    watched.path("late.h").write_text("#define LATE 70\n")
    spare = watched.edit(
        "spare.c", "int spare(int n) { return 0 * n", '#include "late.h"\nint spare(int n) { return LATE'
    )
    watched.one(Applied, spare)
    assert watched.ask() == "3073"
    assert names(watched.one(Applied, watched.edit("late.h", "70", "80"))) == {"spare"}
    assert watched.ask() == "3083"


def test_a_broken_header_stays_pending_until_it_is_mended(watched: Watched) -> None:
    failed = watched.one(BuildFailed, watched.edit("scale.h", "SCALE 3", "SCALE 3 +"))
    assert Path(failed.file).name in ("unit.c", "other.c")
    assert watched.state("scale.h") is State.FAILED
    assert watched.ask() == "3003"
    assert names(watched.one(Applied, watched.edit("scale.h", "3 +", "6"))) == {"answer", "other"}
    assert watched.ask() == "6006"


def test_a_header_that_no_unit_of_the_process_includes(watched: Watched) -> None:
    watched.path("lonely.h").write_text("int lonely;\n")
    assert watched.save(watched.path("lonely.h")) == []
    assert "lonely.h: nothing that the process was built from includes it" in watched.notes()
    assert not watched.loop.edits.pending()


MANY = "\n".join(f"int f{n}(int n) {{ return SCALE * n + {n}; }}" for n in range(8))


def test_a_header_that_changes_most_of_a_unit(tmp_path: Path) -> None:
    """The unit as it was at the start is what runs: with the headers as they were."""
    sum_ = " + ".join(f"f{n}(n)" for n in range(8))
    unit = f'#include "scale.h"\n{MANY}\nint answer(int n) {{ return {sum_}; }}\n'
    with ExitStack() as stack:
        watched = Watched(tmp_path, stack, {"main.c": MAIN, "unit.c": unit})
        assert watched.ask() == "52"
        applied = watched.one(Applied, watched.edit("scale.h", "SCALE 3", "SCALE 4"))
        assert len(applied.functions) == 9
        assert watched.ask() == "60"


def test_most_of_a_unit_is_not_what_runs_although_a_header_changed(tmp_path: Path) -> None:
    sum_ = " + ".join(f"f{n}(n)" for n in range(8))
    unit = f'#include "scale.h"\n{MANY}\nint answer(int n) {{ return {sum_}; }}\n'
    with ExitStack() as stack:
        watched = Watched(tmp_path, stack, {"main.c": MAIN, "unit.c": unit})
        commands = watched.root / "compile_commands.json"
        commands.write_text(commands.read_text().replace('"-O2"', '"-O0"'))
        refused = watched.one(Refused, watched.edit("scale.h", "SCALE 3", "SCALE 4"))
        assert refused.reason == "mismatch"
        assert watched.ask() == "52"


def test_another_program_of_the_same_tree_is_left_out(watched: Watched) -> None:
    (watched.root / "src/tool").mkdir()
    tool = watched.root / "src/tool/main.c"
    tool.write_text('#include "../scale.h"\nint main(void) { return SCALE; }\n')
    path = watched.root / "compile_commands.json"
    entries = json.loads(path.read_text())
    entries.append({**entries[0], "file": "src/tool/main.c", "arguments": ["gcc", "-O2", "-c", "src/tool/main.c"]})
    path.write_text(json.dumps(entries))
    assert names(watched.one(Applied, watched.edit("scale.h", "SCALE 3", "SCALE 4"))) == {"answer", "other"}
    assert watched.ask() == "4004"
    watched.loop = watched.controller()
    refused = watched.one(Refused, watched.edit("tool/main.c", "return SCALE", "return 1 + SCALE"))
    assert refused.reason == "mismatch"
    applied = watched.one(Applied, tool, watched.edit("spare.c", "0 * n", "5"))
    assert names(applied) == {"spare"}
    assert "tool/main.c" in watched.notes()


def test_a_source_that_another_includes_counts_as_a_header(tmp_path: Path) -> None:
    unit = '#include "part.c"\n' + UNIT.replace("return n +", "return part(n) +")
    with ExitStack() as stack:
        watched = Watched(tmp_path, stack, {"main.c": MAIN, "unit.c": UNIT})
        watched.path("part.c").write_text("static int part(int n) { return n + 10; }\n")
        watched.path("unit.c").write_text(unit)
        watched.one(Applied, watched.path("unit.c"))
        watched.one(Applied, watched.edit("part.c", "10", "20"))
        assert watched.ask() == "1021"


# --- what fails, and what is refused ---


def test_what_is_saved_while_another_does_not_compile_goes_with_it(watched: Watched) -> None:
    broken = watched.edit("spare.c", "0 * n", "oops")
    watched.one(BuildFailed, broken)
    failed = watched.one(BuildFailed, watched.edit("other.c", "1000", "2000"))
    assert failed.file == str(broken)
    assert "other.c: goes live when that is mended" in watched.notes()
    assert (watched.state("spare.c"), watched.state("other.c")) == (State.FAILED, State.HELD)
    assert watched.ask() == "3003"
    applied = watched.one(Applied, watched.edit("spare.c", "oops", "5"))
    assert names(applied) == {"spare", "other"}
    assert applied.generation == 1
    assert watched.ask() == "6008"


def test_what_does_not_compile_holds_nobody_once_it_is_deleted(watched: Watched) -> None:
    watched.path("stray.c").write_text("int spare(")
    entries = json.loads((watched.root / "compile_commands.json").read_text())
    stray = ["gcc", "-c", "src/stray.c"]
    entries.append({**entries[0], "file": "src/stray.c", "arguments": stray})
    (watched.root / "compile_commands.json").write_text(json.dumps(entries))
    watched.one(BuildFailed, watched.path("stray.c"))
    watched.path("stray.c").unlink()
    assert names(watched.one(Applied, watched.edit("spare.c", "0 * n", "5"))) == {"spare"}


GROWN = "struct grown { int a; } grown; struct grown *where = &grown; int spare(int n) { return grown.a; }\n"


def refused_layout(tmp_path: Path, stack: ExitStack) -> Watched:
    """Return a watch in which spare.c is refused: something that may be anywhere got another layout."""
    watched = Watched(tmp_path, stack, {**SOURCES, "spare.c": GROWN})
    refused = watched.one(Refused, watched.edit("spare.c", "{ int a; } grown;", "{ int b, a; } grown;"))
    assert refused.file == str(watched.path("spare.c"))
    return watched


def test_what_is_refused_is_in_nobodys_way_and_not_told_again(tmp_path: Path) -> None:
    with ExitStack() as stack:
        watched = refused_layout(tmp_path, stack)
        assert watched.state("spare.c") is State.REFUSED
        applied = watched.one(Applied, watched.edit("other.c", "1000", "2000"))
        assert names(applied) == {"other"}
        assert watched.state("spare.c") is State.REFUSED
        assert watched.ask() == "6003"
        watched.edit("spare.c", "{ int b, a; } grown;", "{ int a; } grown;")
        watched.one(Unchanged, watched.path("spare.c"))
        assert not watched.loop.edits.pending()


def test_what_is_refused_stays_so_when_another_does_not_compile(tmp_path: Path) -> None:
    with ExitStack() as stack:
        watched = refused_layout(tmp_path, stack)
        failed = watched.one(BuildFailed, watched.edit("other.c", "1000", "2000 oops"))
        assert failed.file == str(watched.path("other.c"))
        assert (watched.state("spare.c"), watched.state("other.c")) == (State.REFUSED, State.FAILED)
        watched.one(Applied, watched.edit("other.c", " oops", ""))
        assert watched.ask() == "6003"


def test_edited_back_it_is_patched_back(watched: Watched) -> None:
    before = watched.path("other.c").read_text()
    watched.one(Applied, watched.edit("other.c", "1000", "2000"))
    watched.path("other.c").write_text(before)
    assert names(watched.one(Applied, watched.path("other.c"))) == {"other"}
    assert watched.ask() == "3003"


def test_touched_without_a_change_nothing_happens(watched: Watched) -> None:
    for name in ("other.c", "scale.h"):
        os.utime(watched.path(name))
        watched.one(Unchanged, watched.path(name))
    assert watched.loop.session.status().generation == 0


# --- saved meanwhile ---


def test_saved_while_it_was_built_the_next_round_has_everything(watched: Watched) -> None:
    other = watched.edit("other.c", "1000", "2000")
    assert watched.save(other, pending=lambda: True) == []
    assert watched.state("other.c") is State.SAVED
    assert watched.ask() == "3003"
    applied = watched.one(Applied, watched.edit("spare.c", "0 * n", "5"))
    assert names(applied) == {"spare", "other"}
    assert applied.generation == 1


def test_saved_right_after_it_was_built_nothing_goes_live(watched: Watched) -> None:
    """The last moment in which a round can be given up: what is saved later is the next round's."""
    other = watched.edit("other.c", "1000", "2000")
    build = watched.loop.session.build
    built = []

    def noticed(*arguments: object, **options: object) -> object:
        built.append(build(*arguments, **options))  # type: ignore[arg-type]
        return built[-1]

    watched.loop.session.build = noticed  # type: ignore[method-assign, assignment]
    assert watched.save(other, pending=lambda: bool(built)) == []
    assert built
    assert watched.ask() == "3003"
    assert watched.state("other.c") is State.SAVED


# --- others at work ---


def test_two_controllers_on_one_process_get_along(watched: Watched) -> None:
    first, second = watched.loop, watched.controller()
    watched.one(Applied, watched.edit("other.c", "1000", "2000"))
    watched.loop = second
    watched.one(Unchanged, watched.path("other.c"))
    watched.one(Applied, watched.edit("spare.c", "0 * n", "5"))
    watched.loop = first
    watched.one(Unchanged, watched.path("spare.c"))
    assert watched.ask() == "6008"


def test_what_somebody_took_back_is_not_brought_again_by_another_save(watched: Watched) -> None:
    watched.one(Applied, watched.edit("other.c", "1000", "2000"))
    with Session(Target.attach(watched.program.pid)) as session:
        session.revert(0)
    assert names(watched.one(Applied, watched.edit("spare.c", "0 * n", "5"))) == {"spare"}
    assert watched.state("other.c") is State.REVERTED
    assert watched.ask() == "3008"
    assert names(watched.one(Applied, watched.path("other.c"))) == {"other"}, "saved again, it counts"


def test_the_program_is_built_again_in_another_window(watched: Watched) -> None:
    """Binary and objects change, sources do not."""
    watched.one(Applied, watched.edit("other.c", "1000", "2000"))
    watched.project.build()
    assert watched.loop.session.status().generation == 1
    watched.one(Unchanged, watched.path("other.c"))
    watched.one(Applied, watched.edit("other.c", "2000", "4000"))
    assert watched.ask() == "12003"


# --- the user's own build ---

MADE = '#include "scale.h"\n' + "".join(
    f"int many{n}(int n) {{ return SCALE * n + {n}; }}\n" for n in range(6)
)  # fmt: skip


def with_build(root: Path, stack: ExitStack, *flags: str) -> Watched:
    """A project with a unit that a header makes nearly all of, built by a command of the user's."""
    sources = {
        **SOURCES,
        "many.c": MADE,
        "unit.c": '#include "scale.h"\nint many1(int);\nint answer(int n) { return many1(n); }\n',
    }
    build = "for u in unit many other spare; do gcc -g -O2 {} -c src/$u.c -o $u.o || exit 1; done"
    watched = Watched(root, stack, sources, *flags, build=build.format(" ".join(flags)), build_in=root / "p")
    assert watched.ask() == "4"
    return watched


def test_a_header_that_changes_most_of_a_unit_goes_live_from_the_users_build(tmp_path: Path) -> None:
    with ExitStack() as stack:
        watched = with_build(tmp_path, stack)
        applied = watched.one(Applied, watched.edit("scale.h", "SCALE 3", "SCALE 4"))
        assert {f"many{n}" for n in range(6)} <= names(applied)
        assert watched.ask() == "5"


@pytest.mark.parametrize(("old", "new"), [("-O2", "-O1"), ("-c src/$u.c", "-c $PWD/else/$u.c")])
def test_an_object_of_other_switches_or_of_another_file_is_refused(tmp_path: Path, old: str, new: str) -> None:
    with ExitStack() as stack:
        watched = with_build(tmp_path, stack)
        builder = watched.loop.session.options.build
        assert builder.count(old) == 1
        (watched.root / "else").mkdir()
        for name in ("unit.c", "many.c", "other.c", "spare.c"):
            (watched.root / "else" / name).write_text('#include "../src/scale.h"\n' + watched.path(name).read_text())
        shutil.copy(watched.path("scale.h"), watched.root / "else")
        watched.loop = watched.controller(build=builder.replace(old, new), build_in=watched.root)
        (watched.root / "else/scale.h").write_text(SCALE.replace("SCALE 3", "SCALE 4"))
        refused = watched.one(Refused, watched.edit("scale.h", "SCALE 3", "SCALE 4"))
        assert refused.reason == "mismatch"
        assert watched.ask() == "4"


# --- new files, other commands ---


def test_a_new_source_waits_until_something_says_how_it_is_compiled(watched: Watched) -> None:
    watched.path("new.c").write_text("int fresh(int n) { return 9 * n; }\n")
    unit = watched.edit("unit.c", "int other(int);", "int other(int); int fresh(int);")
    spare = watched.edit("spare.c", "0 * n", "5")
    refused, applied = watched.save(watched.path("new.c"), unit, spare)
    assert isinstance(refused, Refused)
    assert (refused.reason, refused.file) == ("no-compile-command", str(watched.path("new.c")))
    assert isinstance(applied, Applied)
    assert names(applied) == {"spare"}
    assert watched.state("new.c") is State.REFUSED
    entries = json.loads((watched.root / "compile_commands.json").read_text())
    entries.append({**entries[0], "file": "src/new.c", "arguments": ["gcc", "-O2", "-g", "-c", "src/new.c"]})
    (watched.root / "compile_commands.json").write_text(json.dumps(entries))
    watched.one(Unchanged, watched.root / "compile_commands.json")
    assert watched.state("new.c") is State.LIVE
    applied = watched.one(Applied, watched.edit("unit.c", "other(n)", "other(n) + fresh(n)"))
    assert names(applied) == {"answer", "fresh"}
    assert watched.ask() == "3017"


def test_commands_that_changed_outside_of_what_is_watched_are_noticed(watched: Watched) -> None:
    path = watched.root / "compile_commands.json"
    good = path.read_text()
    path.write_text(good.replace('"-g"', '"-include", "/no/such/file", "-g"'))
    unit = watched.edit("other.c", "1000", "2000")
    watched.one(BuildFailed, unit)
    path.write_text(good)
    os.utime(path, ns=(1, 1))
    watched.events.clear()
    watched.loop._look_at_commands(lambda: False)
    assert "compile_commands.json: compile commands are read anew" in watched.notes()
    assert [names(e) for e in watched.events if isinstance(e, Applied)] == [{"other"}]


def test_a_renamed_source_is_told_from_what_runs(watched: Watched) -> None:
    watched.path("other.c").rename(watched.path("renamed.c"))
    path = watched.root / "compile_commands.json"
    path.write_text(path.read_text().replace("other.c", "renamed.c"))
    watched.one(Unchanged, watched.path("renamed.c"))
    refused = watched.one(Refused, watched.edit("renamed.c", "1000", "2000"))
    assert refused.reason == "mismatch"
    assert "renamed" in refused.hint
    assert watched.ask() == "3003"


# --- many at once ---


def test_a_checkout_of_many_files_is_one_generation(tmp_path: Path) -> None:
    count = 24
    sources = {f"part{n}.c": f'#include "scale.h"\nint part{n}(int n) {{ return SCALE * n; }}\n' for n in range(count)}
    heads = "".join(f"int part{n}(int);\n" for n in range(count))
    sources["unit.c"] = (
        heads + "int answer(int n) { return " + " + ".join(f"part{n}(n)" for n in range(count)) + "; }\n"
    )
    with ExitStack() as stack:
        watched = Watched(tmp_path, stack, {"main.c": MAIN, **sources})
        git = ["git", "-C", str(watched.root), "-c", "user.name=a", "-c", "user.email=a@b"]
        for command in (["init", "-q"], ["add", "src"], ["commit", "-q", "-m", "old"], ["checkout", "-q", "-b", "new"]):
            subprocess.run([*git, *command], check=True)
        for n in range(count):
            watched.edit(f"part{n}.c", "SCALE * n", f"SCALE * n + {n}")
        watched.edit("scale.h", "SCALE 3", "SCALE 4")
        for command in (["commit", "-q", "-a", "-m", "new"], ["checkout", "-q", "master"], ["checkout", "-q", "new"]):
            subprocess.run([*git, *command], check=True)
        applied = watched.one(Applied, *watched.root.glob("src/*"))
        assert len(applied.functions) == count
        assert watched.ask() == str(count * 4 + sum(range(count)))


def test_a_copy_of_the_tree_that_the_program_was_built_in_does_not_come_in_between(watched: Watched) -> None:
    """Debug information names the units of the copy, with a header that the tree has as well, and uses no more."""
    copy = watched.root / "copy"
    (watched.root / "src").rename(copy)
    copy.joinpath("scale.h").rename(copy / "old.h")
    for path in copy.glob("*.c"):
        path.write_text(path.read_text().replace("scale.h", "old.h"))
    watched.program.end()
    (watched.root / "src").mkdir()
    for path in copy.iterdir():
        watched.path(path.name).write_text(path.read_text())
    commands = []
    for name in ("main", "unit", "other", "spare"):
        command = ["gcc", "-g", "-O2", "-c", f"{name}.c", "-o", f"{name}.o"]
        subprocess.run(command, cwd=copy, check=True)
        commands.append({"directory": str(watched.path("")), "file": f"{name}.c", "arguments": command})
    (watched.root / "compile_commands.json").write_text(json.dumps(commands))
    subprocess.run(["gcc", "-o", "../program", "main.o", "unit.o", "other.o", "spare.o"], cwd=copy, check=True)
    watched.program = watched.stack.enter_context(watched.project.running())
    watched.loop = watched.controller()
    old = watched.path("old.h")
    watched.path("new.h").write_text(old.read_text().replace("SCALE 3", "SCALE 4"))
    watched.one(Applied, watched.edit("other.c", "old.h", "new.h"), watched.edit("unit.c", "old.h", "new.h"))
    assert watched.ask() == "4004"
    old.write_text(old.read_text() + "#define MORE\n")
    watched.save(old, watched.edit("other.c", "1000", "2000"))
    assert watched.ask() == "8004"
