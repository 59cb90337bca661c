"""redis under load takes its distribution's security fixes, one after another, as edits of the watched sources.

The server starts without them. Every connection, and every key, is older than the first fix and outlives the last.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .patcherctl import Controller, attached, timings
from .programs import running, until
from .redis_client import RedisClient, Reply
from .security_fixes import BODY_FIXES, CROSS_UNIT_FIXES, LAYOUT_FIX, Fix, apply, wrong_answers
from .trees import Tree

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]

CONNECTIONS = 50
LOADS = (("set", 10), ("get", 10))
Keys = dict[tuple[str, ...], Reply]


@dataclass(frozen=True, slots=True)
class Stage:
    """The server, what loads it, what it must keep, and the tool attached to it."""

    tree: Tree
    socket: Path
    server: subprocess.Popen[bytes]
    loads: tuple[subprocess.Popen[bytes], ...]
    clients: tuple[RedisClient, ...]
    connections: frozenset[int]
    keys: Keys
    patcher: Controller

    def commands_served(self) -> int:
        """Count the commands that the server has processed since its start."""
        information = self.clients[0]("INFO", "stats")
        assert isinstance(information, bytes)
        lines = dict(line.split(b":", 1) for line in information.split(b"\r\n") if b":" in line)
        return int(lines[b"total_commands_processed"])

    def assert_nothing_lost(self) -> None:
        """Every connection that was there is there, every key has its value, and the load goes on."""
        assert self.server.poll() is None, f"the server ended with {self.server.returncode}"
        # redis-benchmark ends at the first connection that breaks and at the first error reply.
        assert [load.poll() for load in self.loads] == [None] * len(self.loads), (
            "redis-benchmark ended: a lost connection"
        )
        assert [client("PING") for client in self.clients] == [b"PONG"] * CONNECTIONS
        assert self.connections <= connection_ids(self.clients[0]), "connections were lost"
        assert values(self.clients[1]) == self.keys
        served = self.commands_served()
        until(lambda: self.commands_served() > served + 1000 or None, 20, "1,000 more commands of the load")


def write_keys(client: RedisClient) -> None:
    for number in range(200):
        client("SET", f"kept:string:{number}", "value " * number)
        client("HSET", "kept:hash", f"field{number}", number)
        client("RPUSH", "kept:list", number)
        client("ZADD", "kept:zset", number, f"member{number}")
    client("PFADD", "kept:hll", *(f"visitor{number}" for number in range(500)))
    client("XADD", "kept:stream", "1-1", "field", "value")


def values(client: RedisClient) -> Keys:
    """Read every key back that `write_keys` wrote."""
    readers: list[tuple[str, ...]] = [("GET", f"kept:string:{number}") for number in range(200)]
    readers += [("HGETALL", "kept:hash"), ("LRANGE", "kept:list", "0", "-1"), ("ZRANGE", "kept:zset", "0", "-1")]
    readers += [("PFCOUNT", "kept:hll"), ("XRANGE", "kept:stream", "-", "+")]
    return {reader: client(*reader) for reader in readers}


def connection_ids(client: RedisClient) -> frozenset[int]:
    answer = client("CLIENT", "LIST")
    assert isinstance(answer, bytes)
    return frozenset(int(line.split()[0].removeprefix(b"id=")) for line in answer.splitlines())


@contextlib.contextmanager
def serving(tree: Tree, directory: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    path = directory / "redis.sock"
    options = ["--port", "0", "--unixsocket", path, "--save", "", "--dir", directory, "--enable-debug-command", "no"]
    with running([tree.program, *options], directory / "redis.log") as server:
        with until(lambda: RedisClient(path), 20, "a redis that accepts connections") as client:
            assert client("PING") == b"PONG"
        yield server, path


@contextlib.contextmanager
def loading(path: Path, directory: Path) -> Iterator[tuple[subprocess.Popen[bytes], ...]]:
    """Load the server with redis-benchmark, without an end, until the block is left."""
    benchmark = shutil.which("redis-benchmark")
    assert benchmark, "redis-benchmark is not installed: package redis-tools"
    with contextlib.ExitStack() as stack, RedisClient(path) as client:
        before = len(connection_ids(client))
        loads = []
        for command, connections in LOADS:
            arguments = f"-t {command} -c {connections} -n 2000000000 -r 10000 -d 64 -q".split()
            log = directory / f"benchmark-{command}.log"
            loads.append(stack.enter_context(running([benchmark, "-s", path, *arguments], log)))
        wanted = before + sum(connections for _, connections in LOADS)
        # Exactly: a passing connection, by which redis-benchmark asks for the configuration, is not to be counted on.
        until(lambda: len(connection_ids(client)) == wanted or None, 20, "the connections of redis-benchmark")
        yield tuple(loads)


@pytest.fixture(scope="module")
def stage(redis_tree: Tree, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    directory = tmp_path_factory.mktemp("redis")
    with contextlib.ExitStack() as stack:
        server, path = stack.enter_context(serving(redis_tree, directory))
        clients = tuple(stack.enter_context(RedisClient(path)) for _ in range(CONNECTIONS))
        write_keys(clients[0])
        keys = values(clients[0])
        loads = stack.enter_context(loading(path, directory))
        everyone = connection_ids(clients[0])
        patcher = stack.enter_context(attached(server.pid, redis_tree.watched, redis_tree.compile_commands, directory))
        yield Stage(redis_tree, path, server, loads, clients, everyone, keys, patcher)


def take(stage: Stage, fix: Fix, seconds: float) -> None:
    """Apply one fix to the watched tree: old answers before, the functions live, new answers after."""
    stage.assert_nothing_lost()
    assert wrong_answers(stage.socket, ((probe.question, probe.old) for probe in fix.probes)) == []
    apply(fix.patch(stage.tree.patches), stage.tree.root)
    generations = stage.patcher.applied(fix.functions, seconds)
    print(f"{fix.name}: {timings(generations)}")
    assert wrong_answers(stage.socket, ((probe.question, probe.new) for probe in fix.probes)) == []
    assert wrong_answers(stage.socket, fix.checks) == []
    stage.assert_nothing_lost()


@pytest.mark.parametrize("fix", BODY_FIXES, ids=lambda fix: fix.name.split(":")[0])
def test_a_fix_of_function_bodies_goes_live_under_load(stage: Stage, fix: Fix) -> None:
    take(stage, fix, seconds=60)


@pytest.mark.parametrize("fix", CROSS_UNIT_FIXES, ids=lambda fix: fix.name.split(":")[0])
def test_a_fix_with_new_functions_across_units_goes_live_under_load(stage: Stage, fix: Fix) -> None:
    # The header it changes is included by some eighty units, compiled on processors that the load keeps busy.
    take(stage, fix, seconds=240)


def test_a_fix_that_changes_the_layout_of_live_data_is_refused_by_name(stage: Stage) -> None:
    stage.assert_nothing_lost()
    patch = LAYOUT_FIX.patch(stage.tree.patches)
    apply(patch, stage.tree.root)
    try:
        refusal = stage.patcher.refused(seconds=240)
    finally:
        apply(patch, stage.tree.root, reverse=True)
    message = f"{refusal['message']} {refusal['hint']}"
    named = [
        name
        for name in ("redisServer", "lua_enable_deprecated_api", "static_configs", "lua_builtins_allow_list")
        if name in message
    ]
    assert named, f"the refusal names neither the type nor the member nor the table: {refusal}"
    stage.assert_nothing_lost()
