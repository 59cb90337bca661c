"""A busy program that is changed at random, while whoever changes it is killed: no answer is wrong and nothing is lost.

A run of a minute; `make soak` has one of ten. That a run finds what is wrong is tested on programs that were damaged.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import patcher
from patcher.target import Target
from patcher.target.tracing import Halt, Tracee
from soak.driver import Soak, Wrong, run, soaking

SECONDS = float(os.environ.get("PATCHER_SOAK", "60"))
SEED = int(os.environ.get("PATCHER_SOAK_SEED") or random.SystemRandom().randrange(1 << 31))


@pytest.mark.timeout(SECONDS + 240)
def test_nothing_is_wrong_or_lost(tmp_path: Path) -> None:
    tally = run(tmp_path, SEED, SECONDS)
    print(tally.text(SECONDS))
    assert tally.applied
    assert tally.counts["visits"]
    assert tally.counts["sent"]
    assert tally.counts["unchecked"] * 1000 < tally.counts["visits"]


def _wrong_byte(soak: Soak) -> None:
    """Change a bit of the version in a new function that says it as an immediate."""
    with Target.attach(soak.program.pid) as target:
        for name, address in soak.where.items():
            number = soak.row[int(name[1:])].number
            code = target.memory.read(address, 96)
            at = code.find(number.to_bytes(4, "little"))
            if at >= 0:
                target.memory.write(address + at, bytes([code[at] ^ 1]))
                return


def _crash(soak: Soak) -> None:
    with Target.attach(soak.program.pid) as target:
        for address in soak.where.values():
            target.memory.write(address, b"\x0f\x0b")  # ud2


def _lost_signal(soak: Soak) -> None:
    """Take signals from a thread and do not give them back; one that a timer sent may be missed by the count."""
    if soak.tally.applied > 3:
        return
    tracee = Tracee(soak.program.pid, soak.program.pid)
    assert tracee.seize() == 0
    assert tracee.wait(time.monotonic_ns() + 30 * 10**9) is Halt.SIGNAL
    tracee.signal = 0
    tracee.detach()


def _other_revert(soak: Soak) -> None:
    """Go back to another generation than the driver knows of."""
    if soak.recorded:
        soak.close_controller()
        with patcher.attach(soak.program.pid) as session:
            session.revert(0)


def _published_otherwise(soak: Soak) -> None:
    """Let every function have another version than is published."""
    soak.shared.begin(tuple(reversed(soak.row)))
    soak.shared.finish()


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_wrong_byte, "wrong answers|answers as version"),
        (_crash, "the program ended: Illegal instruction"),
        (_lost_signal, "signals were lost"),
        (_other_revert, "answers as version|wrong answers|is live: neither"),
        (_published_otherwise, "wrong answers"),
    ],
)
def test_a_run_finds(damage: Callable[[Soak], None], told: str, tmp_path: Path) -> None:
    with pytest.raises(Wrong, match=told):
        _run_damaged(tmp_path, damage)


def _run_damaged(folder: Path, damage: Callable[[Soak], None]) -> None:
    with soaking(folder, 7) as soak:
        for _ in range(10):
            soak.step()
            damage(soak)
        soak.end()
