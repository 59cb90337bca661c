"""What brought patcher down once, or would have: fixtures/hostile, applied to a running program, is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz.corpus import build
from fuzz.driver import Program, programs
from fuzz.worker import outcome_of, sessions
from patcher.session import Session

HOSTILE = Path(__file__).parent.parent.parent / "fixtures" / "hostile"

REFUSED = {
    "compressed-badly.o": "debug-info",
    "compressed-otherwise.o": "debug-info",
    "compressed-to-fill-memory.o": "debug-info",
    "debug-abbreviations.o": "debug-info",
    "debug-name-is-no-text.o": "debug-info",
    "debug-relocation-offset.o": "debug-info",
    "debug-relocation-symbol.o": "debug-info",
    "debug-relocation-type.o": "debug-info",
    "debug-section-beyond.o": "debug-info",
    "debug-symbols-section.o": "debug-info",
    "name-with-control-characters.o": "unresolved-symbol",
    "sections-overlap.o": "debug-info",
    "thin-member-device.a": "bad-object",
    "thin-member-long-device.a": "bad-object",
    "thin-member-nul.a": "bad-object",
    "thread-local-table.o": "thread-local",
}


@pytest.fixture(scope="module")
def pie(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Program, Session]]:
    folder = tmp_path_factory.mktemp("fuzz") / "corpus"
    build(folder)
    with (
        programs(folder) as running,
        sessions({"pie": running[0].pid}) as opened,
    ):
        yield running[0], opened["pie", True]


def test_every_fixture_is_tried() -> None:
    assert {p.name for p in HOSTILE.iterdir()} == {*REFUSED, "README.md"}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_file_is_refused(pie: tuple[Program, Session], name: str) -> None:
    program, session = pie
    outcome = outcome_of(session, HOSTILE / name)
    assert outcome["outcome"] == REFUSED[name], outcome
    assert name in str(outcome["message"])
    program.check()
