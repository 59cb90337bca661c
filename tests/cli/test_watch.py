"""--watch, from the save to the answer: what is saved, how, and what comes of it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import MAIN, UNIT, Project, assert_untouched

from .conftest import ENVIRONMENT, SECONDS, Session, run, sentences

VALUE = "n + 1000 * calls"
TWO_UNITS = {
    "main.c": MAIN,
    "unit.c": "int other(int);\nint answer(int n)\n{\n    return other(n) * 10 + 1;\n}\n",
    "other.c": "int total;\nint other(int n)\n{\n    total++;\n    return n + 1;\n}\n",
}


def attached(watching, project: Project, program, *arguments: object) -> Session:
    return watching(project, "attach", program.pid, "--watch", "src", *arguments)


def test_from_save_to_answer(project, watching):
    session = watching(project, "spawn", "./program", "--watch", "src/")
    assert session.ask(5) == "1005"
    path = project.edit("unit.c", VALUE, "7 + 1000 * calls")
    saved = session.event()
    assert (saved["event"], saved["files"]) == ("saved", [str(path)])
    applied = session.event()
    assert (applied["event"], applied["generation"]) == ("applied", 1)
    assert session.ask(5) == "2007"
    project.edit("unit.c", "7 +", "8 +")
    assert session.event("applied")["generation"] == 2
    assert session.ask(5) == "3008"
    project.edit("unit.c", "8 +", "n +")
    assert session.event("applied")["generation"] == 3
    assert session.ask(5) == "4005"
    assert session.finish() == 7
    assert [(e["event"], e["status"]) for e in session.events()] == [("exited", 7)]


def test_a_failed_compile_and_its_mend(project, watching):
    session = watching(project, "spawn", "--watch", "src", "--", "./program")
    path = project.edit("unit.c", VALUE, "n + ;")
    failed = session.event("build_failed", "applied")
    assert failed["event"] == "build_failed"
    assert failed["file"] == str(path)
    assert "unit.c:5" in failed["diagnostics"]
    assert "error" in failed["diagnostics"]
    assert session.ask(5) == "1005"
    project.edit("unit.c", "n + ;", "3;")
    assert session.event("build_failed", "applied")["event"] == "applied"
    assert session.ask(5) == "3"
    session.finish()
    assert "error:" in session.errors()


def test_what_was_refused_goes_with_the_next_save(tmp_path, watching):
    project = Project(tmp_path / "p", TWO_UNITS)
    session = watching(project, "spawn", "./program", "--watch", "src")
    project.edit("unit.c", "* 10 + 1", "* 10 + helper()")
    path = project.sources / "unit.c"
    path.write_text("int helper(void);\n" + path.read_text())
    refused = session.event("refused", "applied")
    while refused["event"] == "refused" and "helper" not in refused["message"]:
        refused = session.event("refused", "applied")
    assert (refused["event"], refused["reason"], refused["file"]) == ("refused", "unresolved-symbol", str(path))
    assert refused["hint"]
    assert session.ask(1) == "21"
    other = project.sources / "other.c"
    other.write_text(other.read_text() + "int helper(void)\n{\n    return total * 0 + 9;\n}\n")
    applied = session.event("applied")
    assert {f["name"] for f in applied["functions"]} == {"answer", "helper"}
    assert session.ask(1) == "29"


def test_a_single_file_is_watched(project, watching):
    session = watching(project, "spawn", "./program", "--watch", "src/unit.c")
    project.edit("main.c", "return 7", "return 8")
    project.edit("unit.c", VALUE, "3")
    assert session.event()["files"] == [str(project.sources / "unit.c")]
    assert session.event("applied")["generation"] == 1
    assert session.ask(5) == "3"


def test_an_atomic_rename_is_a_save(project, watching):
    session = watching(project, "spawn", "./program", "--watch", "src")
    path = project.sources / "unit.c"
    for number in (3, 4, 5):
        new = path.with_name(".unit.c.swp")
        new.write_text(UNIT.replace(VALUE, str(number)))
        os.replace(new, path)
        assert session.event("applied")["generation"] == number - 2
        assert session.ask(5) == str(number)


def test_files_saved_together_are_one_generation(tmp_path, watching):
    project = Project(tmp_path / "p", TWO_UNITS)
    session = watching(project, "spawn", "./program", "--watch", "src")
    assert session.ask(1) == "21"
    new = {name: tmp_path / name for name in ("unit.c", "other.c")}
    new["unit.c"].write_text(TWO_UNITS["unit.c"].replace("* 10 + 1", "* 10 + 2"))
    new["other.c"].write_text(TWO_UNITS["other.c"].replace("n + 1", "n + 2"))
    for name, path in new.items():
        os.replace(path, project.sources / name)
    files, functions = set(), []
    while files != {"unit.c", "other.c"}:
        saved = session.event()
        if saved["event"] == "saved":
            files |= {Path(f).name for f in saved["files"]}
    applied = session.event("applied")
    functions += [f["name"] for f in applied["functions"]]
    while len(functions) < 2:
        functions += [f["name"] for f in session.event("applied")["functions"]]
    assert sorted(functions) == ["answer", "other"]
    assert session.ask(1) == "32"


# What is asked of the compiler in the background, as what a unit includes, passes at once.
SLOW = """\
import os, subprocess, sys
if "-c" in sys.argv:
    with open(os.environ["STARTED"], "w") as started:
        started.write(str(os.getpid()))
    with open(os.environ["GO_ON"]) as go_on:
        go_on.read()
sys.exit(subprocess.call(sys.argv[1:]))
"""


class SlowCompiler:
    """A compiler that says when it is started, and waits to be told to go on."""

    def __init__(self, project: Project, place: Path, monkeypatch) -> None:
        wrapper = place / "slow.py"
        wrapper.write_text(SLOW)
        database = project.root / "compile_commands.json"
        commands = json.loads(database.read_text())
        for command in commands:
            command["arguments"] = [sys.executable, str(wrapper), *command["arguments"]]
        database.write_text(json.dumps(commands))
        self._fifos = {name: place / name for name in ("STARTED", "GO_ON")}
        for name, fifo in self._fifos.items():
            os.mkfifo(fifo)
            monkeypatch.setitem(ENVIRONMENT, name, str(fifo))
        self._started: list[int] = []

    def started(self) -> int:
        """Wait until it is started; return its pid."""
        with os.fdopen(os.open(self._fifos["STARTED"], os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as fifo:
            ready, _, _ = select.select([fifo], [], [], SECONDS)
            assert ready, "nothing is compiled"
            self._started.append(int(fifo.read(20)))
        return self._started[-1]

    def go_on(self) -> None:
        self._fifos["GO_ON"].write_text("")

    def end(self) -> None:
        """End those that wait still, as after a test that failed."""
        for pid in self._started:
            with contextlib.suppress(FileNotFoundError):
                if b"slow.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def compiler(project, tmp_path, monkeypatch) -> Iterator[SlowCompiler]:
    made = SlowCompiler(project, tmp_path, monkeypatch)
    yield made
    made.end()


def test_a_save_during_the_build_counts(project, watching, compiler):
    """The compile that is no longer wanted is ended, and the newest text goes live, as one generation."""
    session = watching(project, "spawn", "./program", "--watch", "src")
    project.edit("unit.c", VALUE, "3")
    compiler.started()
    project.edit("unit.c", "return 3", "return 4")
    compiler.started()
    compiler.go_on()
    applied = session.event("applied", "build_failed")
    assert (applied["event"], applied["generation"]) == ("applied", 1)
    assert session.ask(5) == "4"


def test_a_temporary_file_during_the_build_costs_no_save(project, watching, compiler):
    """What was being saved when the build was given up never came: what was built before is built again."""
    session = watching(project, "spawn", "./program", "--watch", "src")
    project.edit("unit.c", VALUE, "3")
    build = os.pidfd_open(compiler.started())
    with (project.sources / "temporary.c").open("w") as temporary:
        ended, _, _ = select.select([build], [], [], SECONDS)
        assert ended, "a file that is being saved may be one of the change"
        Path(temporary.name).unlink()
    os.close(build)
    compiler.started()
    compiler.go_on()
    applied = session.event("applied", "build_failed")
    assert (applied["event"], applied["generation"]) == ("applied", 1)
    assert session.ask(5) == "3"


def test_a_touch_or_a_comment_changes_nothing(project, watching):
    session = watching(project, "spawn", "./program", "--watch", "src")
    path = project.sources / "unit.c"
    path.write_text(path.read_text() + "/* the end */\n")
    assert session.event("applied", "unchanged", "refused")["event"] == "unchanged"
    assert session.ask(5) == "1005"


def test_the_program_ends_while_it_is_watched(project, watching):
    with project.running() as program:
        session = attached(watching, project, program)
        assert program.process.stdin is not None
        program.process.stdin.close()
        assert session.process.wait(10) == 0
        assert [e["event"] for e in session.events()] == ["exited"]


def test_the_program_is_killed_while_it_is_watched(project, watching):
    with project.running() as program:
        session = attached(watching, project, program)
        program.process.kill()
        program.process.wait()
        assert session.process.wait(10) == 0


def test_ctrl_c_on_attach_leaves_the_program_running_with_the_new_code(project, watching):
    with project.running() as program:
        session = attached(watching, project, program)
        project.edit("unit.c", VALUE, "3")
        session.event("applied")
        session.process.send_signal(signal.SIGINT)
        assert session.process.wait(10) == 0
        assert sentences(session.errors())[-1] == f"patcher: process {program.pid} runs on"
        assert program.ask(5) == "3"
        assert_untouched(program.pid)


def test_events_on_stderr_are_the_only_lines_there(project):
    with project.running() as program:
        change = project.object("unit.c", (VALUE, "3"))
        done = run("apply", program.pid, change, "--events", "-")
        (line,) = done.stderr.splitlines()
        assert json.loads(line)["event"] == "applied"
        done = run("revert", program.pid, "--events", "-")
        assert json.loads(done.stderr)["generation"] == 0


def test_quiet_says_nothing_but_errors(project, watching):
    session = watching(project, "spawn", "./program", "--watch", "src", "--quiet")
    project.edit("unit.c", VALUE, "3")
    session.event("applied")
    project.edit("unit.c", "return 3;", "return missing();")
    session.event("build_failed", "refused")
    session.finish()
    errors = session.errors()
    assert "generation" not in errors
    assert "missing" in errors


TABLE = {
    "ready": {"pid", "program", "watching"},
    "saved": {"files"},
    "build_failed": {"file", "diagnostics"},
    "refused": {"reason", "message", "hint", "file"},
    "unchanged": {"files", "data"},
    "applied": {
        "generation",
        "files",
        "functions",
        "data",
        "supplied",
        "undefined",
        "kept",
        "processes",
        "active",
        "frames",
        "timings",
    },
    "reverted": {"generation", "frames"},
    "exited": {"status"},
}


def test_events_have_the_fields_that_are_promised(project, watching, tmp_path):
    session = watching(project, "spawn", "./program", "--watch", "src")
    path = project.edit("unit.c", VALUE, "3")
    seen = [session.event("saved"), session.event("applied")]
    path.write_text(path.read_text() + "/* the end */\n")
    seen.append(session.event("unchanged"))
    project.edit("unit.c", "return 3;", "return n +;")
    seen.append(session.event("build_failed"))
    project.edit("unit.c", "return n +;", "extern int nowhere(int); return nowhere(n);")
    seen.append(session.event("refused"))
    session.finish()
    seen += session.events()
    assert {e["event"] for e in seen} == set(TABLE) - {"ready", "reverted"}
    for event in seen:
        assert set(event) == TABLE[event["event"]] | {"event", "time"}, event
        assert isinstance(event["time"], float)
    applied = seen[1]
    (function,) = applied["functions"]
    assert function == {"name": "answer", "module": str(project.program), "status": "changed"}
    assert set(applied["timings"]) == {"detect", "build", "link", "stop", "total"}
    assert applied["timings"]["total"] >= applied["timings"]["build"] > 0
    assert applied["active"] == []


def test_events_are_appended_to_a_file(project, tmp_path):
    log = tmp_path / "log"
    log.write_text('{"event": "earlier"}\n')
    with project.running() as program:
        change = project.object("unit.c", (VALUE, "3"))
        assert run("apply", program.pid, change, "--events", log).returncode == 0
        assert run("revert", program.pid, "--events", log).returncode == 0
        assert [json.loads(line)["event"] for line in log.read_text().splitlines()] == [
            "earlier",
            "applied",
            "reverted",
        ]
        done = run("apply", program.pid, change, "--events", tmp_path / "no" / "such" / "directory")
        assert done.returncode == 1
        assert len(sentences(done.stderr)) == 1
        assert program.ask(5) == "1005"


# --- --build ---

MAKEFILE = """\
program: main.o unit.o
\tgcc -o $@ $^ -Wl,-z,now
%.o: src/%.c
\tgcc -g -O2 -c $< -o $@
"""


def test_objects_are_taken_from_the_users_own_build(project, watching):
    (project.root / "compile_commands.json").unlink()
    (project.root / "Makefile").write_text(MAKEFILE)
    subprocess.run(["make", "-s", "-B", "main.o", "unit.o"], cwd=project.root, check=True)
    session = watching(project, "spawn", "./program", "--watch", ".", "--build", "make -s unit.o main.o")
    assert session.ask(5) == "1005"
    project.edit("unit.c", VALUE, "n + 2000 * calls")
    assert [f["name"] for f in session.event("applied", "refused", "build_failed")["functions"]] == ["answer"]
    assert session.ask(5) == "4005"
    project.edit("unit.c", "n + 2000 * calls", "n + ")
    failed = session.event("build_failed")
    assert "unit.c" in failed["diagnostics"]
    project.edit("unit.c", "return n + ", "return n + 3")
    session.event("applied")
    assert session.ask(5) == "8"


@pytest.mark.parametrize("arguments", [["--dry-run"], ["--dry-run", "--json"]])
def test_a_dry_run_touches_nothing(project, arguments):
    change = project.object("unit.c", (VALUE, "3"))
    with project.running() as program:
        maps = Path(f"/proc/{program.pid}/maps").read_text()
        done = run("apply", program.pid, change, *arguments)
        assert done.returncode == 0
        assert "answer" in done.stderr
        assert Path(f"/proc/{program.pid}/maps").read_text() == maps
        assert program.ask(5) == "1005"
        assert json.loads(run("status", program.pid, "--json").stdout)["generation"] == 0
