"""The good objects that mutants are made of link; what brought patcher down once (fixtures/hostile) is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fuzz.corpus import PROGRAMS, samples
from fuzz.driver import PATCH, Program, programs
from fuzz.worker import outcome_of, sessions
from patcher.session import Session

HOSTILE = Path(__file__).parent.parent.parent / "fixtures" / "hostile"

REFUSED = {
    "file-symbol-without-name.o": "unresolved-symbol",
    "compressed-badly.o": "debug-info",
    "compressed-to-fill-memory.o": "debug-info",
    "debug-abbreviations.o": "debug-info",
    "debug-name-is-no-text.o": "debug-info",
    "debug-relocation-offset.o": "debug-info",
    "debug-relocation-symbol.o": "debug-info",
    "debug-relocation-type.o": "debug-info",
    "debug-section-beyond.o": "bad-object",
    "debug-symbols-section.o": "debug-info",
    "name-with-control-characters.o": "unresolved-symbol",
    "sections-overlap.o": "debug-info",
    "thin-member-device.a": "bad-object",
    "thin-member-long-device.a": "bad-object",
    "thin-member-nul.a": "bad-object",
    "thread-local-addend.o": "far-data",
    "thread-local-table.o": "thread-local",
}


@dataclass(frozen=True)
class Running:
    """The running programs and the sessions on them, by name."""

    folder: Path
    programs: dict[str, Program]
    sessions: dict[tuple[str, bool], Session]


@pytest.fixture(scope="module")
def running(corpus: Path) -> Iterator[Running]:
    with programs(corpus) as started:
        named = dict(zip(PROGRAMS, started, strict=True))
        with sessions({name: program.pid for name, program in named.items()}) as opened:
            yield Running(corpus, named, opened)


@pytest.mark.parametrize("force", [True, False])
def test_every_good_object_links(running: Running, force: bool) -> None:
    for sample in samples(running.folder):
        outcome = outcome_of(running.sessions[sample.program, force], running.folder / "good" / sample.name)
        # The patch that one of the programs has already is this very object.
        expected = "no change" if sample.name == Path(PATCH).name else "linked"
        assert outcome == {"outcome": expected}, f"{sample.name}: {outcome}"
    for program in running.programs.values():
        program.check()


def test_every_fixture_is_tried() -> None:
    assert {p.name for p in HOSTILE.iterdir()} == {*REFUSED, "README.md"}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_file_is_refused(running: Running, name: str) -> None:
    outcome = outcome_of(running.sessions["pie", True], HOSTILE / name)
    assert outcome["outcome"] == REFUSED[name], outcome
    assert name in str(outcome["message"])
    running.programs["pie"].check()
