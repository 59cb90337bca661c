"""Hostile objects end in a clean error or a valid link, and the process that they are for never notices."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz import driver
from fuzz.corpus import Sample, build, samples
from fuzz.driver import Report, programs, work
from fuzz.mutate import mutant, shape

MUTANTS = 2000  # `make fuzz` tries many more


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "corpus"
    build(folder)
    return folder


@pytest.mark.timeout(600)
def test_no_mutant_brings_it_down(folder: Path) -> None:
    report = driver.run(folder, seed=0, first=0, count=MUTANTS)
    assert report.defects == {}
    assert report.count == MUTANTS
    assert report.outcomes["linked"] > MUTANTS / 10, "mutants that get all the way"
    assert report.outcomes["bad-object"] > MUTANTS / 10
    assert len(report.outcomes) > 10, "many different ways to be refused"


def test_a_seed_and_an_index_give_the_same_mutant(folder: Path) -> None:
    good = samples(folder)
    mutants = [mutant(good, 3, index) for index in range(200)]
    assert [mutant(good, 3, index) for index in range(200)] == mutants
    assert sum(data != sample.data for sample, data in mutants) > 150
    assert mutants != [mutant(good, 4, index) for index in range(200)]


def test_the_tables_of_an_object_are_found(folder: Path) -> None:
    good = {s.name: s for s in samples(folder)}
    kinds = {t.kind for s in good.values() for t in shape(s.data).tables}
    assert kinds == {
        "header", "section", "symbol", "relocation", "debug relocation", "group", "compression", "archive",
    }  # fmt: skip
    assert len(shape(good["pie-plain.a"].data).of("header")) == 2


# --- what the driver would notice ---


def outcomes(folder: Path, lines: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    """Let the driver run another worker in place of its own: a script."""
    ...
