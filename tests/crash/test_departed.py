"""A patcher that is killed while it frees the code of a library that was unloaded: at any of its calls.

PATCHER_KILLS=every (`make kills`) tries every call that reaches the process; without it, every so many writes.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from patch.test_reclaim_departed import BY_POINTER, loading
from project import Project, Running, assert_untouched

import patcher
from crash.scene import REACHING, Mortals
from patcher.patch.reclaim import Policy

EVERY = os.environ.get("PATCHER_KILLS") == "every"
POLICY = {"keep": 2, "enough": 1 << 10, "poison": True}
CALLS, STRIDE = (REACHING, 1) if EVERY else ("18", 5)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return loading(tmp_path_factory.mktemp("departed") / "p")


@pytest.fixture(scope="module")
def changed(project: Project) -> Path:
    """The library with other functions, one of which is new and known by its address only."""
    new = BY_POINTER.replace("ANSWER", "200").replace("TIMES", "2")
    edits = [("n + 100", "n + 200"), ("return 0", "return by_pointer"), ("int (*give(void))(int)\n", new)]
    return project.object("lib.c", *edits)


@pytest.fixture(scope="module")
def own(project: Project) -> list[Path]:
    return [project.object("own.c", ("n + 100", f"n + {i}")) for i in (200, 300)]


def prepare(program: Running, changed: Path, own: list[Path]) -> None:
    """Have so much to forget and to free that the next change does it."""
    with patcher.attach(program.pid) as session:
        session.policy = Policy(keep=50)
        program.ask("o")
        session.apply(changed)
        assert program.ask("v") == "201"
        assert program.ask("k") == "kept"
        for i in range(4):
            session.apply(own[i % 2])
    assert program.ask("c") == "0"


def freed(session: patcher.Session) -> bool:
    return bool(session.ledger.journal.free)


@pytest.mark.timeout(3600 if EVERY else 120)
def test_killed_while_it_frees_what_went_with_a_library(project, changed, own, mortals: Mortals):
    moment, outcomes = 1, set()
    while True:
        with project.running(str(project.root / "libpart.so")) as program:
            prepare(program, changed, own)
            ended = mortals.patch(program.pid, own[:1], moment=moment, calls=CALLS, policy=POLICY)
            where = f"killed at call {moment} ({ended.met})"
            assert program.process.poll() is None, where
            assert_untouched(program.pid)
            assert program.ask("n") in ("201", "301"), where
            with patcher.attach(program.pid) as session:
                outcomes.add((program.ask("n"), freed(session)))
                session.policy = Policy(**POLICY)
                for i in (1, 0, 1):
                    session.apply(own[i])
                    assert program.ask("n") == str((201, 301)[i]), where
                    assert program.ask("p") == "202", where  # of code that nothing but a pointer leads to
                assert freed(session), where
                program.ask("o")
                assert program.ask("v") == "101", where
                session.apply(changed)
                assert program.ask("v") == "201", where
                session.revert(0)
            assert (program.ask("n"), program.ask("v"), program.ask("p")) == ("101", "101", "202"), where
        if ended.met < 0:
            break
        moment += STRIDE
    assert ("201", True) in outcomes
    assert ("301", False) in outcomes
