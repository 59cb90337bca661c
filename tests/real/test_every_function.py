"""Whole programs go on as they were when every function of theirs is replaced by its own relinked copy.

Lua: a script that goes through the language and all libraries answers as in an interpreter that nobody patches, and the
authors' own tests pass in an interpreter that is replaced. redis: its own test-suite (external mode) runs against the
patched server. The short form takes some files of the suite, about data types and scripting, and the objects that the
build left; PATCHER_REAL_FULL=1 all files, and sources compiled again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from project import Running

from .patcherctl import REPOSITORY
from .programs import running, until
from .redis_client import RedisClient
from .test_redis import connection_ids
from .trees import Tree

FULL = os.environ.get("PATCHER_REAL_FULL") == "1"
pytestmark = [pytest.mark.real, pytest.mark.timeout(3000 if FULL else 500)]

EXERCISE = REPOSITORY / "fixtures" / "real" / "exercise.lua"
SUITE = ("unit/type/string", "unit/type/hash", "unit/type/stream", "unit/scripting", "unit/functions", "unit/multi",
         "unit/dump", "unit/pubsub")  # fmt: skip
# They test the client programs, which are not built here.
SKIPPED = ("integration/redis-cli", "integration/redis-benchmark")


def patcher(*arguments: object) -> dict[str, Any]:
    """Run a command of the tool, which must succeed; returns the outcome that it prints."""
    command = [sys.executable, "-m", "patcher", *map(str, arguments), "--json"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def replace_all(pid: int, tree: Tree, files: list[Path]) -> dict[str, Any]:
    """Replace every function of some files by itself, and say how it went."""
    how = ("--every-function", "--compile-commands", tree.compile_commands)
    outcome = patcher("apply", pid, *files, *how)
    count: dict[str, list[str]] = {}
    for function in outcome["functions"]:
        count.setdefault(function["status"], []).append(function["name"])
    print(f"generation {outcome['generation']}: {len(count['relinked'])} relinked, changed: {count.get('changed', [])}")
    print(f"  kept: {outcome['kept']}, active: {outcome['active']}, {outcome['timings']}")
    # What does not match, or cannot be entered anew, is the exception.
    assert len(count["relinked"]) > 50 * (len(outcome["kept"]) + len(count.get("changed", [])))
    return outcome


def files_of(tree: Tree) -> list[Path]:
    """Return the files of the units that the program is made of: their objects; or their sources, in the full run."""
    text = subprocess.run(["readelf", "-sW", tree.program], capture_output=True, text=True, check=True).stdout
    units = set(re.findall(r" FILE +LOCAL +DEFAULT +ABS +(\S+)", text))
    entries = json.loads(tree.compile_commands.read_text())
    compilations = Counter(entry["file"] for entry in entries)
    found = []
    for entry in entries:
        arguments, source = entry["arguments"], Path(entry["file"])
        output = arguments[arguments.index("-o") + 1] if "-o" in arguments else f"{source.stem}.o"
        compiled = Path(entry["directory"]) / output
        if source.name in units and compiled.stem == source.stem and compiled.is_file():
            # What is compiled in several ways (jemalloc) is known by its object only.
            found.append(source if FULL and compilations[entry["file"]] == 1 else compiled)
    return found


@pytest.fixture
def interpreters(lua_tree: Tree) -> Iterator[tuple[Running, Running]]:
    script = "print('ready') io.flush() dofile(arg[0])"
    made = [Running([str(lua_tree.program), "-e", script, str(EXERCISE)]) for _ in range(2)]
    yield made[0], made[1]
    for interpreter in made:
        interpreter.end()


def test_lua_answers_as_before(interpreters: tuple[Running, Running], lua_tree: Tree) -> None:
    program, model = interpreters
    rounds = iter(range(1000))

    def play(when: str) -> None:
        for _ in range(12):
            n = next(rounds)
            expected = model.ask(n)
            assert len(expected) > 1000
            assert program.ask(n) == expected, f"round {n}, {when}"

    play("as it was started")
    source = lua_tree.root / "src"
    sources = [f for f in sorted(source.glob("l*.c")) if f.name != "luac.c"]
    files = sources if FULL else [source / "liblua.a", source / "lua.o"]
    for number in (1, 2):
        outcome = replace_all(program.pid, lua_tree, files)
        assert len(outcome["functions"]) > 600
        play(f"in generation {number}")
    patcher("revert", program.pid, 0)
    play("after all was taken back")


def test_lua_passes_its_own_tests(lua_with_tests_tree: Tree, tmp_path: Path) -> None:
    tree = lua_with_tests_tree
    tests = shutil.copytree(tree.pristine / "testes", tmp_path / "testes")
    # The interpreter's own command line is tested by interpreters that would be started anew: _port leaves that out.
    script = "print('ready') io.flush() io.read() _port = true arg = {[0] = 'all.lua'} dofile('all.lua')"
    program = subprocess.Popen(
        [tree.program, "-e", script],
        cwd=tests,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert program.stdin is not None
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        sources = [f for f in sorted(tree.root.glob("l*.c")) if f.name != "ltests.c"]
        for _ in range(2):
            outcome = replace_all(program.pid, tree, sources)
            assert len(outcome["functions"]) > 600
        report, _ = program.communicate("go\n", 600)
    finally:
        program.kill()
        program.wait(10)
    assert "\nfinal OK !!!\n" in report, report[-4000:]
    assert program.returncode == 0


def test_redis_passes_its_own_tests(redis_tree: Tree, tmp_path: Path) -> None:
    assert shutil.which("tclsh"), "tclsh is not installed: package tcl"
    path = tmp_path / "redis.sock"
    port = free_port()
    options = ["--port", port, "--unixsocket", path, "--save", "", "--dir", tmp_path]
    with running([redis_tree.program, *options, "--enable-debug-command", "yes"], tmp_path / "redis.log") as server:
        with until(lambda: RedisClient(path), 20, "a redis that accepts connections") as client:
            for _ in range(2):
                outcome = replace_all(server.pid, redis_tree, files_of(redis_tree))
                assert len(outcome["functions"]) > 4000
                assert connection_ids(client)
        report = run_suite(redis_tree, port)
        assert server.poll() is None, "the server ended"
    assert "All tests passed without errors" in report, report[-6000:]
    print(f"{report.count('[ok]')} tests passed")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run_suite(tree: Tree, port: int) -> str:
    """Run redis' test-suite against a server that runs already; return what it printed, without colours."""
    which = [w for s in SKIPPED for w in ("--skipunit", s)] if FULL else [w for s in SUITE for w in ("--single", s)]
    command = ["./runtest", "--host", "127.0.0.1", "--port", str(port), "--tags", "-slow", *which]
    done = subprocess.run(command, cwd=tree.root, capture_output=True, text=True, errors="replace")
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
