"""A Lua interpreter in a script that never ends: a message of its library changes, then an instruction of its machine.

`luaV_execute`, the interpreter loop, is one function, and active as long as any script runs. A change of it is seen by
those who enter it afterwards: each pcall of the script, each resumed coroutine. The activation that the main chunk
runs in finishes in the old code, which is what the tool must say.
"""

from __future__ import annotations

import json
import selectors
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .patcherctl import attached, timings
from .trees import Tree

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

SCRIPT = Path(__file__).parents[2] / "fixtures" / "real" / "session.lua"


class Script:
    """The interpreter with its script, asked line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def ask(self, command: str) -> str:
        """Send a command and return the answer; fails when none comes within ten seconds."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            assert selector.select(10), f"no answer to {command!r}; exit status {self.process.poll()}"
        return self.process.stdout.readline().rstrip("\n")


@pytest.fixture
def script(lua_tree: Tree) -> Iterator[Script]:
    with subprocess.Popen(
        [lua_tree.program, SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        try:
            yield Script(process)
        finally:
            process.kill()


def test_a_library_message_and_an_instruction_change_and_the_state_stays(
    script: Script, lua_tree: Tree, tmp_path: Path
) -> None:
    assert script.ask("tick first") == "ok 1 1 first"
    assert script.ask("mistake") == "ok bad argument #1 to 'string.rep' (string expected, got no value)"
    assert script.ask("xor 6 3") == "ok 5"
    assert script.ask("series 6 3") == "ok 5"

    with attached(script.process.pid, lua_tree.watched, lua_tree.compile_commands, tmp_path) as patcher:
        lua_tree.edit(
            "src/lauxlib.c", """"bad argument #%d to '%s' (%s)\"""", """"argument %d of '%s' does not fit (%s)\""""
        )
        print("message:", timings(patcher.applied(["luaL_argerror"], 60)))
        assert script.ask("mistake") == "ok argument 1 of 'string.rep' does not fit (string expected, got no value)"
        assert script.ask("xor 6 3") == "ok 5"
        assert script.ask("tick second") == "ok 2 2 first,second"

        lua_tree.edit("src/lvm.c", "op_bitwise(L, l_bxor);", "op_bitwise(L, l_bor);")
        generations = patcher.applied(["luaV_execute"], 60)
        print("instruction:", timings(generations))
        assert "luaV_execute" in json.dumps([event["active"] for event in generations]), "the main chunk's loop is old"
        assert script.ask("xor 6 3") == "ok 7"
        # The coroutine's frame was begun under the old instruction, and its sum of 5 too.
        assert script.ask("series 6 3") == "ok 12"
        assert script.ask("mistake") == "ok argument 1 of 'string.rep' does not fit (string expected, got no value)"
        assert script.ask("tick third") == "ok 3 3 first,second,third"

    assert script.ask("tick fourth") == "ok 4 4 first,second,third,fourth"
    assert script.ask("xor 6 3") == "ok 7"
