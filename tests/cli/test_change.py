"""apply, revert, status and attach without --watch: what they print, and for whom."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import Project, Running, assert_untouched

from .conftest import COMMAND, ENVIRONMENT, run, sentences

VALUE = "n + 1000 * calls"


@pytest.fixture
def program(project: Project) -> Iterator[Running]:
    with project.running() as program:
        yield program


def status(pid: int) -> dict[str, object]:
    done = run("status", pid, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_apply_status_revert(project, program):
    change = project.object("unit.c", (VALUE, "3"))
    assert status(program.pid) == {
        "pid": program.pid,
        "program": str(project.program),
        "generation": 0,
        "functions": [],
        "arenas": [],
        "objects": [],
    }
    done = run("apply", program.pid, change)
    assert (done.returncode, done.stdout) == (0, "")
    assert "generation 1 is live" in done.stderr
    assert "changed: answer" in done.stderr
    found = status(program.pid)
    assert set(found) == {"pid", "program", "generation", "functions", "arenas", "objects"}
    (function,), (arena,) = found["functions"], found["arenas"]
    assert set(function) == {"name", "module", "file", "original", "current", "generation"}
    assert (function["name"], function["module"], function["file"]) == ("answer", str(project.program), "unit.c")
    assert arena["address"] <= function["current"] < arena["address"] + arena["size"]
    assert not arena["address"] <= function["original"] < arena["address"] + arena["size"]
    assert function["generation"] == found["generation"] == 1
    assert set(arena) == {"address", "size", "used"}
    assert 0 < arena["used"] < arena["size"]
    assert program.ask(5) == "3"

    done = run("revert", program.pid)
    assert (done.returncode, done.stdout) == (0, "")
    assert "back to the program as it was started" in done.stderr
    assert program.ask(5) == "2005"
    (function,) = status(program.pid)["functions"]
    assert (function["current"], function["generation"]) == (function["original"], 0)
    done = run("status", program.pid)
    assert "reverted" in done.stdout
    assert "answer" in done.stdout


def test_json_on_stdout_is_one_object(project, program):
    change = project.object("unit.c", (VALUE, "3"))
    applied = json.loads(run("apply", program.pid, change, "--json").stdout)
    assert (applied["event"], applied["generation"]) == ("applied", 1)
    assert json.loads(run("apply", program.pid, change, "--json").stdout)["event"] == "unchanged"
    assert json.loads(run("revert", program.pid, "--json").stdout)["event"] == "reverted"


def test_the_same_object_again_is_no_success_with_nothing_done(project, program):
    change = project.object("unit.c", (VALUE, "3"))
    run("apply", program.pid, change)
    done = run("apply", program.pid, change)
    assert done.returncode == 0
    assert "nothing to do" in done.stderr
    assert "live" not in done.stderr
    assert status(program.pid)["generation"] == 1


def test_sources_archives_and_objects_without_sections(project, program):
    archive = project.root / "unit.a"
    plain = project.object("unit.c", (VALUE, "4"), flags=())
    subprocess.run(["ar", "rcs", archive, plain], check=True)
    assert run("apply", program.pid, archive).returncode == 0
    assert program.ask(5) == "4"
    assert run("apply", program.pid, project.object("unit.c", (VALUE, "6"), flags=())).returncode == 0
    assert program.ask(5) == "6"
    source = project.edit("unit.c", VALUE, "8")
    done = run("apply", program.pid, source)
    assert done.returncode == 0, done.stderr
    assert program.ask(5) == "8"


def test_a_source_that_does_not_compile(project, program):
    source = project.edit("unit.c", VALUE, "n +")
    done = run("apply", program.pid, source)
    assert done.returncode == 1
    assert "error: expected expression" in done.stderr
    assert len(sentences(done.stderr)) == 1
    assert program.ask(5) == "1005"


def test_attach_without_watch_only_looks(program):
    maps = Path(f"/proc/{program.pid}/maps").read_text()
    done = run("attach", program.pid)
    assert done.returncode == 0
    assert f"process {program.pid}" in done.stderr
    assert "can be patched" in done.stderr
    assert Path(f"/proc/{program.pid}/maps").read_text() == maps


def test_an_empty_output_pipe_is_no_traceback(project, program):
    reading, writing = os.pipe()
    os.close(reading)
    with subprocess.Popen(
        [*COMMAND, "status", str(program.pid)], env=ENVIRONMENT, stdout=writing, stderr=subprocess.PIPE, text=True
    ) as patcher:
        os.close(writing)
        _, errors = patcher.communicate()
    assert "Traceback" not in errors


# --- killed at any moment ---

TEXT = "static int calls;\nint answer(int n)\n{\n    calls++;\n    return %d + n * 0;\n}\n"


def remainder(answer: str) -> str:
    """Return an answer without the number of calls, which the first version adds in thousands."""
    return str(int(answer) % 1000)


def test_killed_while_it_watches_the_program_runs_on(project, tmp_path):
    """kill -9 at many moments from the start to after the patch; then whoever comes next goes on."""
    source = project.sources / "unit.c"
    with project.running() as program:
        live = remainder(program.ask(5))
        for round_number in range(6):
            command = [*COMMAND, "attach", str(program.pid), "--watch", "src", "--quiet"]
            log = tmp_path / f"events{round_number}"
            os.mkfifo(log)
            with subprocess.Popen(
                [*command, "--events", str(log)], cwd=project.root, env=ENVIRONMENT, stderr=subprocess.DEVNULL
            ) as patcher, log.open() as events:  # fmt: skip
                events.readline()
                value = str(10 + round_number)
                source.write_text(TEXT % int(value))
                time.sleep(0.03 * round_number)  # no waiting for luck: any moment will do
                patcher.kill()
            answers = {live, value}
            live = remainder(program.ask(5))
            assert live in answers, f"round {round_number}"
            assert_untouched(program.pid)
        done = run("status", program.pid, "--json")
        assert done.returncode == 0, done.stderr
        done = run("apply", program.pid, project.object("unit.c"), "--force", cwd=project.root)
        assert done.returncode == 0, done.stderr
        assert program.ask(5) == value
        assert run("revert", program.pid, 0).returncode == 0
        assert remainder(program.ask(5)) == "5"
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(10) == -signal.SIGTERM
