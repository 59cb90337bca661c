"""Programs whose data a model predicts: ten edits each of a process that runs, and the model's answers after each.

PATCHER_RUNS says how many programs; without it, all of CI's, or a few.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pytest

from data.model.play import play

RUNS = int(os.environ.get("PATCHER_RUNS", "200" if os.environ.get("CI") else "32"))
BLOCK = 8  # programs in a test


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Future[str]]]:
    """All runs, under way in as many processes as there are cores; each has a folder, since they share a file."""
    root = tmp_path_factory.mktemp("model")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        yield [pool.submit(_play, seed, root) for seed in range(RUNS)]
        pool.shutdown(cancel_futures=True)


def _play(seed: int, root: Path) -> str:
    mine = root / str(os.getpid())
    mine.mkdir(exist_ok=True)
    return play(seed, mine)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", range(0, RUNS, BLOCK))
def test_data_is_what_the_model_says(results: list[Future[str]], first: int) -> None:
    wrong = [story for run in results[first : first + BLOCK] if (story := run.result())]
    assert not wrong, "\n\n".join(wrong)
