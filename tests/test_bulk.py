"""The collector is paused for a while, and afterwards as it was; numbers are found where they stand first."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patcher.bulk import collector_paused, first_rows


def test_it_runs_again_after_the_outermost_pause() -> None:
    with collector_paused():
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_runs_again_after_an_error() -> None:
    with pytest.raises(KeyError), collector_paused():
        raise KeyError
    assert gc.isenabled()


def test_a_collector_that_did_not_run_stays_so() -> None:
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@settings(deadline=None)
@given(st.lists(st.integers(0, 9)))
def test_first_rows_are_where_numbers_stand_first(numbers: list[int]) -> None:
    expected = sorted(numbers.index(n) for n in set(numbers))
    assert first_rows(np.array(numbers, np.int64), 10).tolist() == expected
