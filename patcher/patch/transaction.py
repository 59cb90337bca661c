"""The flip: what makes a generation live, all or nothing, and what takes it back.

Before it, everything is written to memory that nobody executes, and the journal's record is complete. Then

    first patch of a function   all threads stand still; no PC and no stack word may lie inside the bytes
                                that become a detour; detours and GOT cells are written; then the slots
    later patches               one write of the slots, nobody is stopped

A detour by itself changes nothing: its slot still points at the displaced copy, which is the old body. The
slots are contiguous and the generation's number is the first of them, so one write decides.

Slots on more than one page, or in more than one arena, cannot change in one write. Each is first led to a switch,
which goes on to the old body until the generation's number is the new one; then that number alone is written, and
then each slot is led to where its switch goes by now. Every one of these writes may be the last.

Taking detours away goes the other way round: the slots first.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from patcher.code.entry import switch
from patcher.errors import PatcherError, TargetBusy
from patcher.patch.arena import PAGE, Arena
from patcher.patch.journal import Body
from patcher.target import Mapping, Stopped, StoppedThread, Target

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


@dataclass(frozen=True)
class FlipResult:
    """How long the target stood still (0: not at all), and the threads as they were then."""

    stop_ns: int
    threads: tuple[StoppedThread, ...] = field(default=())


def flip(target: Target, change: Flip) -> FlipResult:
    """Make a change live. Raises `PatcherError` with the target as it was before when it cannot be done."""
    primary, values = change.slots[-1]
    live, number = primary.read_slots(1)[0], values[0]
    if change.in_one_write or live == number:
        return _flip(target, change, [_slot_write(arena, values) for arena, values in change.slots])
    slots = [_Slots(arena, values) for arena, values in change.slots]
    try:
        for each in slots:
            each.write_switches(number)
        for each in slots:
            each.lead_to_switches()
        result = _flip(target, change, [TextWrite(primary.live, _word(live), _word(number))])
    except BaseException:
        for each in slots:
            with suppress(PatcherError):
                each.take_back()
        raise
    # The change is live. What cannot be written now, the next patcher writes.
    with suppress(PatcherError):
        for each in slots:
            each.settle(number)
    return result


class _Slots:
    """The slots of one arena on their way from one generation to another."""

    def __init__(self, arena: Arena, values: dict[int, int]) -> None:
        self._arena = arena
        self._before = arena.read_slots(max(values) + 1)
        self._values = {i: body for i, body in values.items() if i and body != self._before[i]}

    def write_switches(self, number: int) -> None:
        """Put a switch for each slot that changes where nobody looks yet."""
        arena = self._arena
        arena.target.memory.write(arena.coming, _word(number))
        run, following = bytearray(), 0
        for index in [*sorted(self._values), 0]:
            if run and index != following:
                arena.target.memory.write(arena.switch(following) - len(run), bytes(run))
                run.clear()
            if index:
                place = arena.switch(index)
                run += switch(place, arena.live, arena.coming, self._before[index], self._values[index])
                following = index + 1

    def lead_to_switches(self) -> None:
        self._write({index: self._arena.switch(index) for index in self._values})

    def settle(self, number: int) -> None:
        self._write({**self._values, **({0: number} if self._arena.base == self._arena.primary else {})})

    def take_back(self) -> None:
        self._write({})

    def _write(self, values: dict[int, int]) -> None:
        self._arena.write_slots([values.get(index, body) for index, body in enumerate(self._before)])


def _flip(target: Target, change: Flip, slots: Sequence[TextWrite]) -> FlipResult:
    if not change.needs_stop:
        _write_all(target, change, slots)
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


def _word(value: int) -> bytes:
    return value.to_bytes(8, "little")


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
            done.append(write)
            target.memory.write(write.address, write.new)
    except (PatcherError, OSError):
        for write in reversed(done):
            with suppress(PatcherError):
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
