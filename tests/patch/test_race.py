"""Two controllers that want the same process at the same time: one after the other, never both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from project import MAIN, Project, assert_untouched

import patcher

ROUNDS = int(os.environ.get("PATCHER_RACES", "150"))  # of each of the two; `make races` runs a thousand

UNIT = """\
int first(void) { return 0; }
int second(void) { return 0; }
int answer(int n);
int answer(int n) { return n ? 100 * first() + second() : -1; }
"""
RACER = """
import sys
from pathlib import Path
from patcher.errors import PatcherError
from patcher.options import Options
from patcher.session import Session
from patcher.target import Target

pid, rounds, *objects = int(sys.argv[1]), int(sys.argv[2]), *map(Path, sys.argv[3:])
made = reverted = locked = 0
with Session(Target.attach(pid), Options(keep=10_000)) as session:
    session.ledger, session.units
    print("ready", flush=True)
    sys.stdin.readline()
    while made + reverted < rounds:
        try:
            if made % 3 == 2 and session.status().generation:
                session.revert()
                reverted += 1
            # What the other one made in between, this object changes again.
            made += bool(session.apply(objects[made % len(objects)]).functions)
        except PatcherError as error:
            if error.code not in ("locked", "nothing-to-revert"):
                raise
            locked += 1
print(made, reverted, locked, flush=True)
"""


@pytest.mark.timeout(60 + ROUNDS)
def test_two_controllers_racing_never_mix(tmp_path: Path) -> None:
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": UNIT}, compile_flags=["-fno-inline", "-fno-ipa-cp"])
    texts = [
        ("first(void) { return 0; }", "first(void) { return %d; }"),
        ("second(void) { return 0; }", "second(void) { return %d; }"),
    ]
    versions = [project.object("unit.c", *((old, new % n) for old, new in texts)) for n in range(1, 9)]
    with project.running() as program:
        command = [sys.executable, "-c", RACER, str(program.pid), str(ROUNDS)]
        racers = [
            subprocess.Popen([*command, *objects], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for objects in (versions[:4], versions[4:])
        ]
        try:
            for racer in racers:
                assert racer.stdout.readline() == "ready\n"
            for racer in racers:
                racer.stdin.write("go\n")
                racer.stdin.flush()
            while any(racer.poll() is None for racer in racers):
                assert int(program.ask(1)) >= 0
            counts = [tuple(map(int, racer.stdout.read().split())) for racer in racers]
        finally:
            for racer in racers:
                racer.kill()
                racer.communicate()
        assert all(racer.returncode == 0 for racer in racers)
        assert all(len(count) == 3 for count in counts), counts
        assert sum(locked for *_, locked in counts), "they never met: this proved nothing"
        assert_untouched(program.pid)
        with patcher.attach(program.pid) as session:
            status = session.status()
            # Every generation that somebody was told of is recorded once.
            assert list(status.recorded) == list(range(1, sum(made for made, *_ in counts) + 1))
            first, second = divmod(int(program.ask(1)), 100)
            assert first == second
            for number in status.recorded[-20:]:
                session.revert(number)
                first, second = divmod(int(program.ask(1)), 100)
                assert first == second
                assert 1 <= first <= 8
            session.revert(0)
            assert program.ask(1) == "0"
