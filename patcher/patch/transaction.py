"""The flip: what makes a generation live, all or nothing, and what takes it back.

Before it, everything is written to memory that nobody executes, and the journal's record is complete. Then

    first patch of a function   all threads stand still; no PC and no stack word may lie inside the bytes
                                that become a detour; detours and GOT cells are written; then the slots
    later patches               one write of the slots, nobody is stopped

A detour by itself changes nothing: its slot still points at the displaced copy, which is the old body. The
slots are contiguous and the generation's number is the first of them, so one write decides. Slots on more than
one page, or in more than one arena, are copied into place by a stub in the target, which finishes without us.
Taking detours away goes the other way round: the slots first.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from patcher.errors import PatcherError, TargetBusy
from patcher.patch.arena import COPY_FUNCTION, PAGE, Arena
from patcher.patch.journal import Body
from patcher.target import FunctionCall, Mapping, Stopped, StoppedThread, Target, WriteRefused

_STACK_LIMIT = 8 << 20  # a stack's usual limit; a body that is far up in a deep recursion counts too
_NEW_STACK = 64 << 10  # of a thread whose stack was mapped after we looked
_TRIES = 20
_PATIENT_TRIES, _PATIENCE = 1000, 5.0  # where more than the entries has to be clear; in seconds
_STEPS = 16


@dataclass(frozen=True, slots=True)
class TextWrite:
    """Bytes to put into the program's own memory, and what must be there before."""

    address: int
    old: bytes
    new: bytes

    def undone(self) -> TextWrite:
        return TextWrite(self.address, self.new, self.old)


Inside = Callable[[Stopped], str]


@dataclass(frozen=True, slots=True)
class Flip:
    """Everything that changes at once.

    `text`: detours written or taken back; `cells`: GOT cells; `slots`: new values by arena and index, slot 0 of
    the first arena among them; `quiet`: bodies (start, end) that no thread may be inside, because they jump back
    to their own entry and would come out in the new code in the middle of their work; `restores`: the text goes back
    to what it was at first, after the slots; `data`: what the program's own data becomes (address, contents),
    whatever it is by then. `inside` is called while all stand still, before anything is written: it says why that has
    to wait ("" when it has not), or raises, and nothing is changed.
    """

    text: tuple[TextWrite, ...]
    cells: tuple[TextWrite, ...]
    slots: tuple[tuple[Arena, dict[int, int]], ...]
    quiet: tuple[Body, ...] = ()
    restores: bool = False
    data: tuple[tuple[int, bytes], ...] = ()
    inside: Inside | None = None

    @property
    def needs_stop(self) -> bool:
        return bool(self.text or self.cells or self.quiet or self.data or self.inside)

    @property
    def in_one_write(self) -> bool:
        """Whether one write changes every slot, none of them half done if we are killed meanwhile."""
        return len(self.slots) < 2 and all(8 * (max(values) + 1) <= PAGE for _, values in self.slots)

    def undone(self) -> Flip:
        """Return what takes the text and the cells back, and leaves the slots alone."""
        return Flip(tuple(w.undone() for w in self.text), tuple(w.undone() for w in self.cells), ())


@dataclass(frozen=True)
class FlipResult:
    """How long the target stood still (0: not at all), and the threads as they were then."""

    stop_ns: int
    threads: tuple[StoppedThread, ...] = field(default=())


def flip(target: Target, change: Flip) -> FlipResult:
    """Make a change live. Raises `PatcherError` with the target as it was before when it cannot be done."""
    writes = [_slot_write(arena, values) for arena, values in change.slots]
    if change.in_one_write or change.quiet or change.data or change.inside:
        return _flip(target, change, writes)
    if change.restores:
        _copy_slots(target, change.slots, writes)
        return _flip(target, change, ())
    result = _flip(target, change, ())
    try:
        _copy_slots(target, change.slots, writes)
    except PatcherError:
        _flip(target, change.undone(), ())
        raise
    return result


def _flip(target: Target, change: Flip, slots: Sequence[TextWrite]) -> FlipResult:
    if not change.needs_stop:
        for write in slots:
            target.memory.write(write.address, write.new)
        return FlipResult(0)
    detours = _Guard(((w.address, w.address + len(w.new)) for w in change.text), include_start=False)
    bodies = _Guard(((b.start, b.end) for b in change.quiet), include_start=True)
    reason = ""
    until = time.monotonic() + _PATIENCE
    for attempt in range(_TRIES if change.inside is None else _PATIENT_TRIES):
        mappings = target.mappings()
        with target.stopped() as stopped:
            done = detours.clear(target, stopped, mappings) and bodies.clear(target, stopped, mappings)
            reason = change.inside(stopped) if done and change.inside is not None else ""
            done = done and not reason
            if done:
                _write_all(target, change, slots)
        if done:
            return FlipResult(stopped.duration_ns, stopped.threads)
        if attempt >= _TRIES and time.monotonic() > until:
            break
        time.sleep(0.001 * min(attempt + 1, _TRIES))
    if reason:
        raise TargetBusy(
            f"process {target.pid}: data with another layout cannot be filled just now: {reason}",
            "try again when the program is idle",
        )
    if change.quiet:
        names = ", ".join(f"`{b.name}`" for b in change.quiet[:4])
        raise TargetBusy(
            f"process {target.pid}: a thread stays inside {names}, whose code cannot go on beside the new one "
            "(it relies on registers that the other keeps or changes, loops back to its entry, or uses data that gets "
            "another layout)",
            "wait until it has returned; a loop that never returns should call its body as a function of another "
            "file, or be compiled with -fno-ipa-ra",
            code="active",
        )
    raise TargetBusy(
        f"process {target.pid}: a thread keeps standing in the first instructions of a function to be patched",
        "try again; if it stays so, the thread is suspended inside that function's entry",
        code="entry-busy",
    )


def _slot_write(arena: Arena, values: dict[int, int]) -> TextWrite:
    count = max(values) + 1
    before = arena.read_slots(count)
    slots = [values.get(index, value) for index, value in enumerate(before)]
    return TextWrite(arena.slots, struct.pack(f"<{count}Q", *before), struct.pack(f"<{count}Q", *slots))


def _copy_slots(target: Target, arenas: Sequence[tuple[Arena, dict[int, int]]], writes: Sequence[TextWrite]) -> None:
    """Let a thread of the target put new slots in place: once it is on its way, it needs nobody to finish."""
    calls = []
    for (arena, _), write in zip(arenas, writes, strict=True):
        target.memory.write(arena.staging, write.new)
        calls.append(FunctionCall(arena.copy_function, (write.address, arena.staging, len(write.new))))
        target.memory.write(arena.copy_function, COPY_FUNCTION)
    try:
        target.inject(calls, code=arenas[0][0].stub)
    except PatcherError:
        if target.alive():
            for write in writes:
                target.memory.write(write.address, write.old)
        raise


def _write_all(target: Target, change: Flip, slots: Sequence[TextWrite]) -> None:
    done: list[TextWrite] = []
    # The program writes to its data whenever it runs: what it holds is known only now.
    data = [TextWrite(address, target.memory.read(address, len(new)), new) for address, new in change.data]
    text = (*change.text, *change.cells, *data)
    try:
        for write in (*slots, *text) if change.restores else (*text, *slots):
            if target.memory.read(write.address, len(write.old)) != write.old:
                raise PatcherError(
                    f"process {target.pid}: the bytes at {write.address:#x} changed meanwhile",
                    "another tool modifies this process; detach it and try again",
                    code="text-changed",
                )
            target.memory.write(write.address, write.new)
            done.append(write)
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

    def clear(self, target: Target, stopped: Stopped, mappings: Sequence[Mapping]) -> bool:
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
        return not any(self._on_stack(target, thread.sp, mappings) for thread in stopped.threads)

    def _inside(self, address: int) -> bool:
        i = int(np.searchsorted(self._starts, np.uint64(address), "right")) - 1
        return i >= 0 and address < int(self._ends[i])

    def _on_stack(self, target: Target, sp: int, mappings: Sequence[Mapping]) -> bool:
        words = read_stack(target, sp, mappings)
        # Almost every word is out of range altogether: one cheap pass leaves the few that need a search.
        words = words[(words >= self._starts[0]) & (words < self._ends[-1])]
        if not len(words):
            return False
        position = np.searchsorted(self._starts, words, "right").astype(np.int64) - 1
        return bool(np.any(words < self._ends[position]))


def read_stack(target: Target, sp: int, mappings: Sequence[Mapping]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Return the words of a stack from its pointer upwards, to the end of the mapping that holds it.

    Beyond that lie guard pages, which a debugger's read goes through, and other threads' stacks.
    """
    end = next((m.end for m in mappings if sp in m), sp + _NEW_STACK)
    found = target.memory.read_available(sp & -8, min(end - (sp & -8), _STACK_LIMIT))
    return np.frombuffer(found[: len(found) & -8], dtype=np.uint64)
