"""Who still runs old code: threads whose program counter or stack refers to a replaced body.

A conservative scan: every word of a stack that lies inside an old body counts. It runs after the flip, with
the target running: a frame that comes and goes is of no interest, one that stays is found.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from patcher.errors import PatcherError
from patcher.patch.transaction import read_stack
from patcher.target import Mapping, StoppedThread, Target


@dataclass(frozen=True, slots=True)
class Active:
    """A thread that has a frame of an old body."""

    thread: int
    function: str


def find_active(
    target: Target, bodies: Sequence[tuple[str, tuple[tuple[int, int], ...]]], threads: Iterable[StoppedThread] = ()
) -> tuple[Active, ...]:
    """Return which threads refer to which of `bodies` (name, extents).

    `threads` are registers known from a stop a moment ago; the others are asked for theirs one by one.
    """
    spans = sorted((start, end, name) for name, extents in bodies for start, end in extents if end > start)
    if not spans:
        return ()
    known = {t.tid: t for t in threads}
    found: list[Active] = []
    try:
        mappings = target.mappings()
        for tid in target.threads():
            thread = known.get(tid) or _registers(target, tid)
            if thread is not None:
                found += [Active(tid, name) for name in _old_frames(target, thread, spans, mappings)]
    except (PatcherError, OSError):  # the change is live by now, and this only tells of it
        return tuple(found)
    return tuple(found)


def _registers(target: Target, tid: int) -> StoppedThread | None:
    # A thread blocked in a system call shows its registers without being stopped (proc(5), syscall).
    try:
        fields = Path(f"/proc/{target.pid}/task/{tid}/syscall").read_text().split()
        if len(fields) >= 3 and fields[0] != "running":
            return StoppedThread(tid, int(fields[-1], 16), int(fields[-2], 16))
        pc, sp = target.thread_registers(tid)
    except (OSError, ValueError, PatcherError):
        return None
    return StoppedThread(tid, pc, sp)


def _old_frames(
    target: Target, thread: StoppedThread, spans: Sequence[tuple[int, int, str]], mappings: Sequence[Mapping]
) -> list[str]:
    words = read_stack(target, thread.sp, mappings)
    words = np.append(words, np.uint64(thread.pc))
    words = words[(words >= np.uint64(spans[0][0])) & (words < np.uint64(max(e for _, e, _ in spans)))]
    starts = np.array([s for s, _, _ in spans], dtype=np.uint64)
    ends = np.array([e for _, e, _ in spans], dtype=np.uint64)
    position = np.searchsorted(starts, words, "right").astype(np.int64) - 1
    # The entry itself on a stack is a function pointer, not a frame.
    inside = (words < ends[position]) & (words != starts[position])
    return list(dict.fromkeys(spans[i][2] for i in sorted(set(position[inside].tolist()))))
