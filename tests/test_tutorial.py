"""The tutorial shows what happens: its transcript is that of a run of today."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tutorial() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tutorial", ROOT / "fixtures" / "tutorial" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tutorial"] = module
    spec.loader.exec_module(module)
    return module


def test_the_transcript_is_that_of_a_fresh_run(tutorial):
    text = (ROOT / "docs" / "tutorial.md").read_text("utf-8")
    assert tutorial.comparable(tutorial.replayed(text)) == tutorial.comparable(text), "run `make tutorial`"


def test_what_is_shown_is_more_than_commands(tutorial):
    """A run in which nothing happened would be equal to a file that shows nothing."""
    text = (ROOT / "docs" / "tutorial.md").read_text("utf-8")
    for number in (1, 2, 3):
        assert f"flight.c: generation {number} is live" in text
    assert "the old code runs on" in text
    assert "back to the program as it was started" in text
    assert "crashed" in text
