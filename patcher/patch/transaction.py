"""The flip: what makes a generation live, all or nothing, and what takes it back.

Before it, everything is written to memory that nobody executes, and the journal's record is complete. Then

    first patch of a function   all threads stand still; no PC and no stack word may lie inside the bytes
                                that become a detour; detours and GOT cells are written; then the slots
    later patches               one write of the slots, nobody is stopped

A detour by itself changes nothing: its slot still points at the displaced copy, which is the old body. The
slots are contiguous and the generation's number is the first of them, so one write decides.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from patcher.errors import PatcherError, TargetBusy
from patcher.patch.arena import PAGE, Arena
from patcher.target import Stopped, StoppedThread, Target, WriteRefused

_STACK_LIMIT = 256 << 10
_TRIES = 20
_STEPS = 16


@dataclass(frozen=True, slots=True)
class TextWrite:
    """Bytes to put into the program's own memory, and what must be there before."""

    address: int
    old: bytes
    new: bytes


@dataclass(frozen=True, slots=True)
class Flip:
    """Everything that changes at once.

    `text`: detours written or taken back; `cells`: GOT cells; `slots`: new values by arena and index, slot 0 of
    the first arena among them; `quiet`: bodies (start, end) that no thread may be inside, because they jump back
    to their own entry and would come out in the new code in the middle of their work.
    """

    text: tuple[TextWrite, ...]
    cells: tuple[TextWrite, ...]
    slots: tuple[tuple[Arena, dict[int, int]], ...]
    quiet: tuple[tuple[int, int], ...] = ()

    @property
    def needs_stop(self) -> bool:
        if self.text or self.cells or self.quiet or len(self.slots) > 1:
            return True
        return any(8 * (max(values) + 1) > PAGE for _, values in self.slots if values)


@dataclass(frozen=True)
class FlipResult:
    """How long the target stood still (0: not at all), and the threads as they were then."""

    stop_ns: int
    threads: tuple[StoppedThread, ...] = field(default=())


def flip(target: Target, change: Flip) -> FlipResult:
    """Make a change live. Raises `PatcherError` with the target as it was before when it cannot be done."""
    writes = [_slot_write(arena, values) for arena, values in change.slots if values]
    if not change.needs_stop:
        for address, data in writes:
            target.memory.write(address, data)
        return FlipResult(0)
    detours = _Guard(((w.address, w.address + len(w.new)) for w in change.text), include_start=False)
    bodies = _Guard(change.quiet, include_start=True)
    for attempt in range(_TRIES):
        with target.stopped() as stopped:
            done = detours.clear(target, stopped) and bodies.clear(target, stopped)
            if done:
                _write_all(target, change, writes)
        if done:
            return FlipResult(stopped.duration_ns, stopped.threads)
        time.sleep(0.001 * (attempt + 1))
    raise TargetBusy(
        f"process {target.pid}: a thread keeps standing in the first instructions of a function to be patched",
        "try again; if it stays so, the thread is suspended inside that function's entry",
        code="entry-busy",
    )


def _slot_write(arena: Arena, values: dict[int, int]) -> tuple[int, bytes]:
    count = max(values) + 1
    slots = arena.read_slots(count)
    for index, value in values.items():
        slots[index] = value
    return arena.slots, struct.pack(f"<{count}Q", *slots)


def _write_all(target: Target, change: Flip, writes: Sequence[tuple[int, bytes]]) -> None:
    done: list[TextWrite] = []
    try:
        for write in (*change.text, *change.cells):
            if target.memory.read(write.address, len(write.old)) != write.old:
                raise PatcherError(
                    f"process {target.pid}: the bytes at {write.address:#x} changed meanwhile",
                    "another tool modifies this process; detach it and try again",
                    code="text-changed",
                )
            target.memory.write(write.address, write.new)
            done.append(write)
        for address, data in writes:
            target.memory.write(address, data)
    except (PatcherError, WriteRefused):
        for write in reversed(done):
            target.memory.write(write.address, write.old)
        raise


class _Guard:
    """Keeps bytes from changing under a thread that stands in them, or that will return into them."""

    def __init__(self, spans: Iterable[tuple[int, int]], *, include_start: bool) -> None:
        ordered = sorted(spans)
        self._starts = np.array([s + (not include_start) for s, _ in ordered], dtype=np.uint64)
        self._ends = np.array([e for _, e in ordered], dtype=np.uint64)
        self._step_out = not include_start

    def clear(self, target: Target, stopped: Stopped) -> bool:
        if not len(self._starts):
            return True
        for thread in stopped.threads:
            pc, steps = thread.pc, 0
            while self._inside(pc):
                if not self._step_out or steps == _STEPS:
                    return False
                moved = stopped.step(thread.tid)
                if moved.pc == pc:
                    return False
                pc, steps = moved.pc, steps + 1
        return not any(self._on_stack(target, thread) for thread in stopped.threads)

    def _inside(self, address: int) -> bool:
        i = int(np.searchsorted(self._starts, np.uint64(address), "right")) - 1
        return i >= 0 and address < int(self._ends[i])

    def _on_stack(self, target: Target, thread: StoppedThread) -> bool:
        words = read_stack(target, thread.sp, _STACK_LIMIT)
        # Almost every word is out of range altogether: one cheap pass leaves the few that need a search.
        words = words[(words >= self._starts[0]) & (words < self._ends[-1])]
        if not len(words):
            return False
        position = np.searchsorted(self._starts, words, "right").astype(np.int64) - 1
        return bool(np.any(words < self._ends[position]))


def read_stack(target: Target, sp: int, limit: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Return the words of a stack from its pointer upwards, as far as memory is mapped, at most `limit` bytes."""
    found = target.memory.read_available(sp & -8, limit)
    return np.frombuffer(found[: len(found) & -8], dtype=np.uint64)
