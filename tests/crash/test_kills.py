"""A patcher that is killed, stopped, or runs out of something, at any of its system calls, and what is then.

PATCHER_KILLS=every (`make kills`) tries every call that reaches the process; without it, every so many. Of a first
patch of 520 functions, which makes the same calls for each, the full form tries every seventh.
"""

from __future__ import annotations

import os

import pytest
from project import image_bytes

from crash.scene import READING, kill_at_every

EVERY = os.environ.get("PATCHER_KILLS") == "every"
PWRITE = "18"
# Hundreds of functions that are patched for the first time take a few calls each, which are the same for all.
REPEATED, MANY = 7, 1000  # calls between two tries then; and above which number of them in the short form it is so
# What comes to harm, how many calls are between two tries, and the answers that are found when all are tried.
CASES = {
    "first": (23, {"1", "2"}),
    "later": (4, {"2", "3"}),
    "back": (2, {"2", "3"}),
    "undo": (7, {"1", "3"}),
    "first in two modules": (47, {"1", "2"}),
    "later in two modules": (7, {"2", "3"}),
    "undo in two modules": (11, {"1", "3"}),
    "first across pages": (29, {"1", "2"}),
    "undo across pages": (3, {"1", "3"}),
    "first of many functions": (1201, {"1", "2"}),
    "later of many functions": (7, {"2", "3"}),
    "undo of many functions": (499, {"1", "3"}),
    "first of many quiet functions": (1301, {"1", "2"}),
    "first with an IFUNC": (31, {"1", "2"}),
    "first with a constructor": (67, {"1", "2"}),
    "first with a library": (71, {"1", "2"}),
    "first with tables": (71, {"1", "2"}),
    "later with tables": (7, {"2", "3"}),
    "undo with tables": (9, {"1", "3"}),
    "first with hooks": (211, {"1", "2"}),
    "later with hooks": (149, {"2", "3"}),
}


@pytest.mark.timeout(3600 if EVERY else 120)
@pytest.mark.parametrize("name", CASES)
def test_killed_at_any_call_the_program_runs_one_generation_and_patchers_go_on(name, case, mortals):
    stride, answers = CASES[name]
    seen = kill_at_every(case(name), mortals, stride=(REPEATED if stride > MANY else 1) if EVERY else stride)
    assert seen == answers if EVERY else seen <= answers


@pytest.mark.timeout(3600 if EVERY else 120)
@pytest.mark.parametrize(
    "name",
    [
        *("first of many quiet functions", "later of many functions", "undo of many functions"),
        *("first across pages", "undo across pages"),
    ],
)
def test_killed_while_the_kernel_goes_from_one_page_to_the_next(name, case, mortals):
    across = name.endswith("across pages")  # few writes are left that can be cut
    seen = kill_at_every(case(name), mortals, stride=1 if EVERY or across else 3, calls=PWRITE, action="cut")
    assert across or len(seen) > 1 or not EVERY


@pytest.mark.timeout(3600 if EVERY else 120)
def test_killed_while_it_only_reads(case, mortals):
    seen = kill_at_every(case("first"), mortals, stride=1 if EVERY else 171, calls=READING)
    assert seen <= {"1", "2"}


@pytest.mark.timeout(3600 if EVERY else 120)
@pytest.mark.parametrize(("name", "stride"), [("first", 5), ("later", 1), ("undo", 1), ("later of many functions", 5)])
def test_interrupted_at_any_call(name, stride, case, mortals):
    """By Ctrl-C, which may come when all is done already; in the short form at any write."""
    how = {"stride": 1} if EVERY else {"stride": stride, "calls": PWRITE}
    seen = kill_at_every(case(name), mortals, action="interrupt", **how)
    assert seen <= CASES[name][1]


@pytest.mark.timeout(3600 if EVERY else 120)
@pytest.mark.parametrize("name", ["first", "later", "undo"])
def test_stopped_at_any_call_and_continued(name, case, mortals):
    """At most a pause: the change comes to its end, or is given up whole."""
    patched, moment = case(name), 1
    while True:
        paused = []
        with patched.scene.project.running() as program:
            before = image_bytes(program.pid)
            patched.prepare(program)
            ended = patched.harm(
                mortals, program, action="stop", moment=moment, while_stopped=lambda found=paused: found.append(1)
            )
            assert ended.code in (0, 1), ended
            found = patched.check(program, before, f"stopped at call {moment}")
            if ended.code == 0:
                assert found == patched.steps[max(patched.steps) if patched.files else 0]
        if ended.met < 0:
            break
        assert paused
        moment += 1 if EVERY else 29 if name == "first" else 4
    assert moment > 2
