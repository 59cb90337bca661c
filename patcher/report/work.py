"""WORK that takes its time: while it lasts, it is told again and again how far it has come.

Decides when: not within the first half second, then four times a second, and once when it is done, if it was told of
at all. What is made of that is the reporters' business.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from patcher.report.events import Event, Working

_FIRST_SECONDS = 0.5
_NEXT_SECONDS = 0.25


class Work:
    """A piece of work, most often for the length of a block. It is told of from a thread of its own."""

    def __init__(self, what: str, emit: Callable[[Event], None], *, total: int = 0) -> None:
        """`total`: how many steps it has, 0 where that is not known."""
        self._what = what
        self._emit = emit
        self._done = 0
        self._total = total
        self._began = 0.0
        self._over = threading.Event()
        self._told = False
        self._thread = threading.Thread(target=self._tell, name="work", daemon=True)

    def update(self, done: int, total: int) -> None:
        """Note how many steps of how many are done."""
        self._done, self._total = done, total

    def begin(self) -> Self:
        """Begin; for work that is no block."""
        self._began = time.monotonic()
        self._thread.start()
        return self

    def end(self) -> None:
        """End what was begun."""
        self._over.set()
        self._thread.join()
        if self._told:
            self._emit(self._event(ended=True))

    def __enter__(self) -> Self:
        return self.begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def _tell(self) -> None:
        pause = _FIRST_SECONDS
        while not self._over.wait(pause):
            pause = _NEXT_SECONDS
            self._told = True
            self._emit(self._event(ended=False))

    def _event(self, *, ended: bool) -> Working:
        return Working(self._what, False, self._done, self._total, time.monotonic() - self._began, ended)


def silently(what: str) -> Work:
    """Return work that nobody is told of."""
    return Work(what, lambda event: None)
