"""Quiet: our own process left alone while the target stands still.

Decides what is kept from interrupting us between the first stop and the last detach: signals, Python's own
signal handlers, the garbage collector and other Python threads. Nothing is lost: what was held back is
delivered afterwards. Specification: pthread_sigmask(3), PEP 475.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_ALL = signal.valid_signals()
_SIGINT_FIRST = sorted(_ALL, key=lambda number: number != signal.SIGINT)
# What another Python thread may hold the interpreter for, while the target stands still.
_SWITCH_SECONDS = 0.0001

_Handlers = dict[int, Callable[[int, FrameType | None], object]]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back signals, Python signal handlers and garbage collection for the length of the block.

    A KeyboardInterrupt that was due meanwhile is raised when the block has ended.
    """
    arrived: list[int] = []
    handlers = _hold_handlers(arrived)
    collecting, interval = gc.isenabled(), sys.getswitchinterval()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ALL)
    gc.disable()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        if collecting:
            gc.enable()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _give_back(handlers)
        for number in dict.fromkeys(arrived):
            handlers[number](number, None)


@contextmanager
def ahead() -> Iterator[None]:
    """Keep whoever we wake from taking our processor for the length of the block, where we may (sched(7)).

    Do not wait for them in it: they may be behind us on the same processor.
    """
    before = None
    with suppress(OSError):
        before = os.sched_getscheduler(0), os.sched_getparam(0)
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        if before is not None:
            with suppress(OSError):
                os.sched_setscheduler(0, *before)


def _hold_handlers(arrived: list[int]) -> _Handlers:
    # The mask of this thread is not enough: a signal that another thread of ours takes runs its Python
    # handler, and so raises KeyboardInterrupt, in the main thread whatever is blocked there.
    handlers: _Handlers = {}
    if threading.current_thread() is not threading.main_thread():
        return handlers
    try:
        for number in _SIGINT_FIRST:
            handler = signal.getsignal(number)
            if callable(handler) and not isinstance(handler, signal.Handlers):
                signal.signal(number, lambda caught, _: arrived.append(caught))
                handlers[number] = handler
    except BaseException:
        _give_back(handlers)
        raise
    return handlers


def _give_back(handlers: _Handlers) -> None:
    for number in reversed(handlers):
        signal.signal(number, handlers[number])
