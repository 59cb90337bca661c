"""EDITS: what becomes of each saved file, from save to save. Pure: told what happens, it says what is to be built.

    LIVE       the process runs what the file says, as far as anybody knows; every file begins here
    SAVED      to be built in the next round
    BUILT      compiled; on its way into the process
    FAILED     does not compile: stays pending, and holds what is saved meanwhile
    HELD       saved, and compiles, while another does not: goes with that one when it is mended
    REFUSED    compiles, and cannot go live as it is: tried again with every round, and in nobody's way
    REVERTED   was live, and somebody took it back: stays as it is until it is saved again

                   saved  built  build failed  held  refused  applied  reverted  gone   restarted    restarted as built
    LIVE           SAVED  -      -             -     -        LIVE     REVERTED  LIVE   SAVED (*)    LIVE
    SAVED          SAVED  BUILT  FAILED        HELD  REFUSED  LIVE     SAVED     SAVED  SAVED        LIVE
    BUILT          SAVED  BUILT  FAILED        HELD  REFUSED  LIVE     BUILT     SAVED  SAVED        LIVE
    FAILED         SAVED  BUILT  FAILED        HELD  REFUSED  LIVE     FAILED    FAILED SAVED        LIVE
    HELD           SAVED  BUILT  FAILED        HELD  REFUSED  LIVE     HELD      HELD   SAVED        LIVE
    REFUSED        SAVED  BUILT  FAILED        HELD  REFUSED  LIVE     REFUSED   REFUSED SAVED       LIVE
    REVERTED       SAVED  -      -             -     -        LIVE     REVERTED  REVERTED REVERTED   LIVE

(*) what was applied to a process is not in the program's file: a program that is started again from the same file gets
it anew. A round that is cancelled takes BUILT back to what it was before. A file that is gone has no state.

Files are what was saved, headers too: which units that makes is decided when they are built. What is SAVED, FAILED or
HELD has to go live together (`core`); what is REFUSED is tried along with it, and left out if it will not go.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from pathlib import Path


class State(enum.Enum):
    """What became of a file's last save."""

    LIVE = "live"
    SAVED = "saved"
    BUILT = "built"
    FAILED = "failed"
    HELD = "held"
    REFUSED = "refused"
    REVERTED = "reverted"


class Happening(enum.Enum):
    """What can happen to a file."""

    SAVED = "saved"
    BUILT = "built"
    BUILD_FAILED = "build failed"
    HELD = "held"
    REFUSED = "refused"
    APPLIED = "applied"
    REVERTED = "reverted"
    GONE = "gone"
    RESTARTED = "restarted"
    RESTARTED_AS_BUILT = "restarted as built"


_PENDING = (State.SAVED, State.BUILT, State.FAILED, State.HELD, State.REFUSED)
_CORE = frozenset({State.SAVED, State.FAILED, State.HELD})

# What is not listed cannot happen.
TRANSITIONS: dict[tuple[State, Happening], State] = {
    **{(state, Happening.SAVED): State.SAVED for state in State},
    **{(state, Happening.APPLIED): State.LIVE for state in State},
    **{(state, Happening.RESTARTED_AS_BUILT): State.LIVE for state in State},
    **{(state, Happening.BUILT): State.BUILT for state in _PENDING},
    **{(state, Happening.BUILD_FAILED): State.FAILED for state in _PENDING},
    **{(state, Happening.HELD): State.HELD for state in _PENDING},
    **{(state, Happening.REFUSED): State.REFUSED for state in _PENDING},
    **{(state, Happening.RESTARTED): State.SAVED for state in (State.LIVE, *_PENDING)},
    (State.REVERTED, Happening.RESTARTED): State.REVERTED,
    **{(state, Happening.REVERTED): state for state in _PENDING},
    (State.LIVE, Happening.REVERTED): State.REVERTED,
    (State.REVERTED, Happening.REVERTED): State.REVERTED,
    **{(state, Happening.GONE): state for state in State if state is not State.BUILT},
    (State.BUILT, Happening.GONE): State.SAVED,
}


class Edits:
    """The states of the files that were saved since the watch began."""

    def __init__(self) -> None:
        self._states: dict[Path, State] = {}
        self._before: dict[Path, State] = {}  # what is built was, should the round be cancelled

    def state(self, file: Path) -> State:
        """Return a file's state."""
        return self._states.get(file, State.LIVE)

    def core(self) -> frozenset[Path]:
        """Return the files that have to go live together."""
        return frozenset(file for file, state in self._states.items() if state in _CORE)

    def pending(self) -> frozenset[Path]:
        """Return all files of which a save is not live."""
        return frozenset(file for file, state in self._states.items() if state in _PENDING)

    # --- what happens -----------------------------------------------------------------------------------------

    def saved(self, files: Iterable[Path]) -> None:
        """Files were saved."""
        self._happen(files, Happening.SAVED)

    def vanished(self, files: Iterable[Path]) -> None:
        """Files are not there any more: nobody waits for them to be mended."""
        for file in files:
            self._states.pop(file, None)
            self._before.pop(file, None)

    def built(self, files: Iterable[Path]) -> None:
        """All that some files make compiled."""
        for file in files:
            self._before[file] = self.state(file)
            self._happen([file], Happening.BUILT)

    def build_failed(self, files: Iterable[Path], blamed: Iterable[Path]) -> None:
        """Some files were built together, and what those make that are to blame does not compile."""
        blame = frozenset(blamed)
        self._happen(blame, Happening.BUILD_FAILED)
        self._happen(frozenset(files) - blame, Happening.HELD)

    def refused(self, files: Iterable[Path]) -> None:
        """Files cannot go live as they are."""
        self._happen(files, Happening.REFUSED)

    def applied(self, files: Iterable[Path]) -> None:
        """The process runs what files say."""
        self._happen(files, Happening.APPLIED)

    def cancelled(self) -> None:
        """The round at hand was given up: something was saved meanwhile."""
        for file, state in self._before.items():
            if self.state(file) is State.BUILT:
                self._states[file] = state
        self._before.clear()

    def reverted(self) -> None:
        """Somebody took the process back: what was live is not."""
        self._happen(tuple(self._states), Happening.REVERTED)

    def gone(self) -> None:
        """The process is gone."""
        self._happen(tuple(self._states), Happening.GONE)
        self._before.clear()

    def restarted(self, *, as_built: bool) -> None:
        """The program was started again, from a file that was built of the sources as they are (`as_built`), or not."""
        happening = Happening.RESTARTED_AS_BUILT if as_built else Happening.RESTARTED
        self._happen(tuple(self._states), happening)

    def _happen(self, files: Iterable[Path], happening: Happening) -> None:
        for file in files:
            self._states[file] = TRANSITIONS[self.state(file), happening]
            if happening is not Happening.BUILT:
                self._before.pop(file, None)
