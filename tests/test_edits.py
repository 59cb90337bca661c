"""The states of saved files, edge by edge, without a process."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patcher.edits import TRANSITIONS, Edits, Happening, State

A, B, C = Path("a.c"), Path("b.c"), Path("c.h")


def edits_with(**states: State) -> Edits:
    """Return edits in which files have these states, brought there by what happens."""
    edits = Edits()
    files = {"a": A, "b": B, "c": C}
    for name, state in states.items():
        bring(edits, files[name], state)
    return edits


def bring(edits: Edits, file: Path, state: State) -> None:
    edits.saved([file])
    if state is State.BUILT:
        edits.built([file])
    elif state is State.FAILED:
        edits.build_failed([file], [file])
    elif state is State.HELD:
        edits.build_failed([file], [])
    elif state is State.REFUSED:
        edits.refused([file])
    elif state is State.LIVE:
        edits.applied([file])
    elif state is State.REVERTED:
        edits.applied([file])
        edits.reverted()
    assert edits.state(file) is state


S = State
# From each state, what each event makes of it; None: the event cannot come.
TABLE = {
    "saved": dict.fromkeys(State, S.SAVED),
    "built": {**dict.fromkeys(State, S.BUILT), S.LIVE: None, S.REVERTED: None},
    "build_failed": {**dict.fromkeys(State, S.FAILED), S.LIVE: None, S.REVERTED: None},
    "held": {**dict.fromkeys(State, S.HELD), S.LIVE: None, S.REVERTED: None},
    "refused": {**dict.fromkeys(State, S.REFUSED), S.LIVE: None, S.REVERTED: None},
    "applied": dict.fromkeys(State, S.LIVE),
    "reverted": {s: s for s in State} | {S.LIVE: S.REVERTED},
    "gone": {s: s for s in State} | {S.BUILT: S.SAVED},
    "restarted": dict.fromkeys(State, S.SAVED) | {S.REVERTED: S.REVERTED},
    "restarted_as_built": dict.fromkeys(State, S.LIVE),
}


@pytest.mark.parametrize("event", TABLE)
@pytest.mark.parametrize("state", State)
def test_each_edge(state: State, event: str) -> None:
    edits = edits_with(a=state)
    happen = {
        "saved": lambda: edits.saved([A]),
        "built": lambda: edits.built([A]),
        "build_failed": lambda: edits.build_failed([A], [A]),
        "held": lambda: edits.build_failed([A], []),
        "refused": lambda: edits.refused([A]),
        "applied": lambda: edits.applied([A]),
        "reverted": edits.reverted,
        "gone": edits.gone,
        "restarted": lambda: edits.restarted(as_built=False),
        "restarted_as_built": lambda: edits.restarted(as_built=True),
    }[event]
    expected = TABLE[event][state]
    if expected is None:
        with pytest.raises(KeyError):
            happen()
    else:
        happen()
        assert edits.state(A) is expected


def test_the_table_has_each_edge_that_can_be() -> None:
    assert {event.value.replace(" ", "_") for event in Happening} == set(TABLE)
    possible = sum(state is not None for row in TABLE.values() for state in row.values())
    assert len(TRANSITIONS) == possible


def test_what_does_not_compile_holds_what_is_saved_meanwhile() -> None:
    edits = edits_with(a=State.FAILED, b=State.SAVED)
    assert edits.core() == {A, B}
    edits.build_failed(edits.core(), [A])
    assert (edits.state(A), edits.state(B)) == (State.FAILED, State.HELD)
    edits.saved([A])
    assert edits.core() == {A, B}, "the mended one takes the other along"
    edits.built([A, B])
    edits.applied([A, B])
    assert not edits.pending()


def test_what_is_refused_is_tried_with_the_others_and_in_nobodys_way() -> None:
    edits = edits_with(a=State.REFUSED, b=State.SAVED)
    assert edits.pending() == {A, B}
    assert edits.core() == {B}
    edits.built([A, B])
    edits.applied([B])
    edits.refused([A])
    assert edits.pending() == {A}
    assert not edits.core()


@pytest.mark.parametrize("state", [State.SAVED, State.FAILED, State.HELD, State.REFUSED])
def test_a_cancelled_round_leaves_everything_as_it_was(state: State) -> None:
    edits = edits_with(a=state)
    edits.built([A])
    edits.cancelled()
    assert edits.state(A) is state


def test_what_was_saved_while_its_round_was_built_is_saved() -> None:
    edits = edits_with(a=State.REFUSED)
    edits.built([A])
    edits.saved([A])
    edits.cancelled()
    assert edits.state(A) is State.SAVED


def test_a_file_that_is_gone_is_waited_for_by_nobody() -> None:
    edits = edits_with(a=State.FAILED, b=State.HELD)
    edits.vanished([A])
    assert edits.core() == {B}
    assert edits.state(A) is State.LIVE


def test_a_revert_by_somebody_else_leaves_what_is_pending() -> None:
    edits = edits_with(a=State.LIVE, b=State.FAILED)
    edits.reverted()
    assert edits.state(A) is State.REVERTED
    assert edits.pending() == {B}
    edits.restarted(as_built=False)
    assert edits.state(A) is State.REVERTED, "nobody wants it back"
    assert edits.core() == {B}


def test_a_program_started_from_the_same_file_gets_everything_again() -> None:
    edits = edits_with(a=State.LIVE, b=State.REFUSED, c=State.BUILT)
    edits.gone()
    edits.restarted(as_built=False)
    assert edits.core() == {A, B, C}


@given(st.lists(st.tuples(st.sampled_from(["save", "round", "revert", "restart"]), st.integers(0, 63)), max_size=30))
def test_nothing_saved_is_ever_lost(steps: list[tuple[str, int]]) -> None:
    """Whatever happens, a file whose last save is not live is pending, or was taken back on purpose."""
    edits, unsettled, files = Edits(), set[Path](), (A, B, C)
    for what, number in steps:
        chosen = [f for n, f in enumerate(files) if number >> n & 1]
        if what == "save":
            edits.saved(chosen)
            unsettled |= set(chosen)
        elif what == "revert":
            edits.reverted()
        elif what == "restart":
            edits.gone()
            edits.restarted(as_built=number & 1 == 1)
            unsettled = set() if number & 1 else unsettled | {f for f in files if edits.state(f) is State.SAVED}
        elif edits.core():
            core = edits.core()
            outcome = number % 4
            if outcome == 0:
                edits.build_failed(core, [f for f in core if f in chosen])
            else:
                edits.built(edits.pending())
                if outcome == 1:
                    edits.cancelled()
                elif outcome == 2:
                    edits.refused(edits.pending())
                else:
                    edits.applied(core)
                    edits.refused(edits.pending())
                    unsettled -= core
        assert edits.pending() == unsettled
