"""Hostile objects end in a clean error or a valid link, and the process that they are for never notices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz import driver
from fuzz.corpus import samples
from fuzz.driver import Program, Report, programs, work
from fuzz.faulty import FAULTS
from fuzz.mutate import mutant, shape
from patcher.target import Target

MUTANTS = 2000  # `make fuzz` tries many more


@pytest.mark.timeout(600)
def test_no_mutant_brings_it_down(corpus: Path) -> None:
    report = driver.run(corpus, seed=0, first=0, count=MUTANTS)
    assert report.defects == {}
    assert report.count == MUTANTS
    assert report.outcomes["linked"] > MUTANTS / 10, "mutants that get all the way"
    assert report.outcomes["bad-object"] > MUTANTS / 10
    assert len(report.outcomes) > 10, "many different ways to be refused"


def test_a_seed_and_an_index_give_the_same_mutant(corpus: Path) -> None:
    good = samples(corpus)
    mutants = [mutant(good, 3, index) for index in range(200)]
    assert [mutant(good, 3, index) for index in range(200)] == mutants
    assert sum(data != sample.data for sample, data in mutants) > 150
    assert mutants != [mutant(good, 4, index) for index in range(200)]


def test_the_tables_of_an_object_are_found(corpus: Path) -> None:
    good = {s.name: s for s in samples(corpus)}
    kinds = {t.kind for s in good.values() for t in shape(s.data).tables}
    assert kinds == {
        "header", "section", "symbol", "relocation", "debug relocation", "group", "compression", "archive",
    }  # fmt: skip
    assert len(shape(good["pie-plain.a"].data).of("header")) == 2


# --- what the driver notices ---


@pytest.fixture
def running(corpus: Path) -> Iterator[list[Program]]:
    with programs(corpus) as started:
        yield started


def test_every_fault_is_a_defect(corpus: Path) -> None:
    report = Report()
    for line in work(corpus, [], 0, 0, len(FAULTS), worker="fuzz.faulty"):
        report.add(line)
    found = [report.defects.get(index, "") for index in range(len(FAULTS))]
    assert report.outcomes == {"DEFECT": 5, "bad-object": 1, "no change": 1}
    for text, (fault, word) in zip(found, FAULTS.items(), strict=True):
        assert bool(text) == bool(word)
        assert word in text, fault


def test_a_program_that_was_written_to_is_not_as_it_was(running: list[Program]) -> None:
    for program in running:
        program.check()
    with Target.attach(running[0].pid) as target:
        text = next(m for m in target.mappings() if m.executable and m.path == target.program)
        stack = next(m for m in target.mappings() if m.path == "[stack]")
        for address in (text.start, stack.start):
            before = target.memory.read(address, 1)
            target.memory.write(address, bytes([before[0] ^ 1]))
            with pytest.raises(AssertionError, match="not as it was"):
                running[0].check()
            target.memory.write(address, before)
            running[0].check()
