"""Confined: what a thread that runs under seccomp may be made to do.

Decides which system calls are too dangerous to make on a thread, or to have the kernel make for it. The filters are
read while the thread stands still and interpreted (`seccomp.py`). Where they cannot be read (only root may), a thread
that has just as many as we have is taken to be in the same container as we are, and to have the same ones: what they
forbid, such filters answer with an error. Any other one is left alone, unless the user says that it may be tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from functools import lru_cache
from pathlib import Path

from patcher.target.seccomp import NAMES, RESTART_SYSCALL, Action, harshest
from patcher.target.steps import RT_SIGRETURN
from patcher.target.tracing import Tracee

Call = tuple[int, tuple[int | None, ...]]  # a system call's number and its arguments, None where not known


class Mode(Enum):
    """How a thread is confined."""

    FREE = auto()
    STRICT = auto()
    FILTERED = auto()
    UNKNOWN = auto()  # filtered, and nobody tells us how


_known_answer = lru_cache(4096)(harshest)


def mode(tracee: Tracee) -> tuple[Mode, tuple[bytes, ...]]:
    """Return how a thread that stands still is confined, and its filters where they can be read."""
    filters = tracee.seccomp_filters()
    if filters:
        return Mode.FILTERED, filters
    kind, count = _told(f"/proc/{tracee.pid}/task/{tracee.tid}/status")
    if kind == 2:
        return (Mode.FREE if (kind, count) == _told("/proc/self/status") else Mode.UNKNOWN), ()
    return (Mode.STRICT if kind == 1 else Mode.FREE), ()


def confinement(tracee: Tracee, calls: Sequence[Call], *, trusted: bool) -> str:
    """Return why a thread must not be made to do system calls and to come back from them; "" when it may.

    `trusted`: where nothing is known of its filters, it may be tried.
    """
    kind, filters = mode(tracee)
    if kind is Mode.STRICT:
        return "is under strict seccomp: any system call but read, write and exit kills it"
    if kind is Mode.UNKNOWN and not trusted:
        return "is under seccomp filters that we may not read, and a system call that they do not foresee may kill it"
    for number, arguments in calls:
        answer = _known_answer(filters, number, tuple(arguments))
        if not answer.harmless:
            return f"is under a seccomp filter that may {_consequence(answer)} for {_name(number)}"
    answer = _known_answer(filters, RT_SIGRETURN)
    if not answer.permits:
        return f"is under a seccomp filter that may {_consequence(answer)} for rt_sigreturn, so it would not come back"
    return ""


def may_resume_call(tracee: Tracee) -> bool:
    """Whether the kernel may go on with a call that a stop has interrupted, by a call of its own, restart_syscall.

    It is made as if by the thread, so filters are asked about it, and those that do not foresee it kill.
    """
    kind, filters = mode(tracee)
    return kind is Mode.FREE or (kind is Mode.FILTERED and _known_answer(filters, RESTART_SYSCALL).permits)


def _told(path: str) -> tuple[int, int]:
    """Return the mode of seccomp and the number of filters that a status file shows."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    found = dict(line.split(b":\t", 1) for line in lines if line.startswith(b"Seccomp"))
    return int(found.get(b"Seccomp", 0)), int(found.get(b"Seccomp_filters", -1))


def _consequence(answer: Action) -> str:
    if answer is Action.USER_NOTIF:
        return "make it wait for a supervisor"
    return "send it SIGSYS" if answer is Action.TRAP else "kill it"


def _name(number: int) -> str:
    return NAMES.get(number, f"system call {number}")
