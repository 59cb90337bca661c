"""OCCUPANTS: who is in the code that a change takes out of use: asked before it, in it, and after it.

Joins what the user wants (`policy`) with what is to be seen (`activity`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from patcher.activity import Lookout, seen_again
from patcher.errors import AttachDenied, PatcherError, TargetBusy
from patcher.image import Image
from patcher.options import Options
from patcher.patch.bodies import Version
from patcher.patch.ledger import Ledger
from patcher.patch.transaction import FlipResult
from patcher.policy import Condition, condition, objection
from patcher.report import OldFrame

if TYPE_CHECKING:
    from patcher.relink import Linked  # which going back does without: it takes long to load

_LOOKED_THROUGH = 64 << 20  # bytes for coroutines, after each generation: some 60 ms


class Occupants:
    """Who is in old code of one process; `frames`: after the last change."""

    def __init__(self, image: Image, ledger: Ledger, options: Options) -> None:
        self.lookout = Lookout(image)
        self.frames: tuple[OldFrame, ...] = ()
        self._ledger = ledger
        self._options = options

    def standing(self, linked: Linked) -> tuple[tuple[OldFrame, ...], PatcherError | None]:
        """Return who is now in the code that a change replaces, and why it may not be made then, if so."""
        frames: tuple[OldFrame, ...] = ()
        with suppress(AttachDenied, TargetBusy, OSError):  # as when somebody traces the process
            limit = _LOOKED_THROUGH if self._options.coroutines else 0
            frames = self.lookout.running(self._ledger.unused_by(linked.commit.record), limit)
        return frames, objection(self._options, frames)

    def check(self, linked: Linked) -> None:
        """Raise `UnsafeChange` when a change may not be made because of who is now in the code that it replaces."""
        _, objection = self.standing(linked) if self._options.active == "refuse" else ((), None)
        if objection is not None:
            raise objection

    def look_around(self, result: FlipResult) -> tuple[OldFrame, ...]:
        """Find who is in old code, now that a generation is live."""
        found: tuple[OldFrame, ...] = ()
        with suppress(PatcherError, OSError):  # the change is live, whatever can be told of it
            limit = _LOOKED_THROUGH if self._options.coroutines else 0
            found = self.lookout.running(self._ledger.unused(), limit, result.seen)
        self.frames = seen_again(found, self.frames)
        return self.frames

    def condition(self, versions: Sequence[Version]) -> Condition | None:
        """Return what has to hold before code goes out of use, if the user asks for anything."""
        return condition(self._options, self.lookout, versions)
