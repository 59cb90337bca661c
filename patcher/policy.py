"""POLICY: whether a change may go live while somebody is in the code that it replaces.

    run-on    it may: who is in old code goes on there
    drain     it waits until nobody is, and gives up after a time
    refuse    it may not

Nobody: no thread, and no coroutine that none runs. It is decided, with all threads standing still, in the stop in which
the change goes live. `consistency` generation asks for the same, whatever the functions do: a thread in the old code of
one would call the new code of another, and so it waits as well.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from patcher.activity import Lookout, TooMuchMemory, described
from patcher.errors import UnsafeChange
from patcher.options import Options
from patcher.patch.bodies import Version
from patcher.report import OldFrame
from patcher.target import Stopped

_LIMIT = 1 << 30  # bytes to look through for coroutines while all stand still, at about 1 GB a second
_NAMED = 4


def condition(options: Options, lookout: Lookout, versions: Sequence[Version]) -> Condition | None:
    """Return what has to hold before code goes out of use, if the user asks for anything."""
    if not versions or (options.active == "run-on" and options.consistency == "function"):
        return None
    seconds = 0.0 if options.active == "refuse" else options.timeout
    return Condition(lookout, versions, seconds, _LIMIT if options.coroutines else 0)


def objection(options: Options, frames: Sequence[OldFrame]) -> UnsafeChange | None:
    """Return why code may not go out of use while there are these frames of it, if so."""
    return _active(frames, 0.0) if frames and options.active == "refuse" else None


class Condition:
    """That nobody is in some code, within so many seconds from now."""

    def __init__(self, lookout: Lookout, versions: Sequence[Version], seconds: float, limit: int) -> None:
        self._lookout = lookout
        self._versions = tuple(versions)
        self._seconds = seconds
        self._limit = limit
        self._until = time.monotonic() + seconds

    def __call__(self, stopped: Stopped) -> str:
        """Say who is in the code, "" for nobody. Raises `UnsafeChange` when the time is over."""
        try:
            found = self._lookout.standing(self._versions, stopped, self._limit)
        except TooMuchMemory:
            raise UnsafeChange(
                f"the process has more than {self._limit >> 30} GiB of memory that may hold stacks of coroutines, too "
                "much to look whether one is in the code that is to be replaced",
                "leave them out with --no-coroutines, or let it change with --active run-on",
                code="active",
            ) from None
        if found and time.monotonic() >= self._until:
            raise _active(found, self._seconds)
        return described(found[0]) if found else ""


def _active(found: Sequence[OldFrame], seconds: float) -> UnsafeChange:
    who = "; ".join(described(f) for f in found[:_NAMED])
    more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    waited = f" after {seconds:g} s" if seconds else ""
    loop = next((f for f in found if f.loops), None)
    if not any(f.thread for f in found):
        hint = (
            "if that stack is not in use, leave those that no thread is on out with --no-coroutines; "
            "or let them go on in their old code: --active run-on"
        )
        return UnsafeChange(f"the code that is to be replaced is in use{waited}: {who}{more}", hint, code="active")
    if loop is not None:
        hint = f"move the body of the loop in `{loop.function}` into a function, which can be replaced then"
    elif seconds:
        hint = "give it longer with --timeout, or let who is in old code go on there: --active run-on"
    else:
        hint = "wait for them: --active drain; or let them go on in their old code: --active run-on"
    return UnsafeChange(f"the code that is to be replaced is in use{waited}: {who}{more}", hint, code="active")
