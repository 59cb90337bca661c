"""The flip: what makes a generation live, all or nothing, and what takes it back.

Before it, everything is written to memory that nobody executes, and the journal's record is complete. Then

    first patch of a function   all threads stand still; no PC and no stack word may lie inside the bytes
                                that become a detour; detours and GOT cells are written; then the slots
    later patches               one write of the slots, nobody is stopped

A detour by itself changes nothing: its slot still points at the displaced copy, which is the old body. The
slots are contiguous and the generation's number is the first of them, so one write decides. Where a page ends inside
of an entry it is made by several writes, each of which leaves it whole (`code/border.py`).

Slots on more than one page, or in more than one arena, cannot change in one write. Each is first led to a switch,
which goes on to the old body until the generation's number is the new one; then that number alone is written, and
then each slot is led to where its switch goes by now. Every one of these writes may be the last. Switches that were in
use before are written while all stand still, and none in them.

Taking detours away goes the other way round: the slots first.
"""

from __future__ import annotations

import struct
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import attrgetter

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
_LAST = 1 << 64
_TOGETHER = 1 << 20  # bytes of stacks that are searched at once
_MANY = 48  # threads whose stacks are read at once rather than one by one: below, that is the quicker way
_APART, _GAP = 8, 256  # bytes between writes to the text that are written as one

_IDLE_PAUSE, _LONGEST_IDLE_PAUSE = 0.002, 0.05  # between two stops that find somebody in old code; in seconds

Words = np.ndarray[tuple[int], np.dtype[np.uint64]]


@dataclass(frozen=True, slots=True)
class TextWrite:
    """Bytes to put into the program's own memory, and what must be there before.

    What has a lower `turn` is written first, and goes last when the text is restored. No thread may stand in the bytes
    but at the first; nor there and in so many bytes `ahead` of it, if that is not -1.
    """

    address: int
    old: bytes
    new: bytes
    ahead: int = -1
    turn: int = 0


Inside = Callable[[Stopped], str]
Late = Callable[[], Sequence[tuple[int, bytes]]]


@dataclass(frozen=True, slots=True)
class Flip:
    """Everything that changes at once.

    `text`: detours written or taken back; `cells`: GOT cells; `slots`: new values by arena and index, slot 0 of
    the first arena among them; `quiet`: bodies (start, end) that no thread may be inside, because they jump back
    to their own entry and would come out in the new code in the middle of their work; `restores`: the text goes back
    to what it was at first, after the slots; `data`: what the program's own data becomes (address, contents),
    whatever it is by then. `inside` is called while all stand still, before anything is written: it says why that has
    to wait ("" when it has not), or raises, and nothing is changed; `late` returns the data that is known only after
    that. `idle` is asked likewise, before all else; what it
    names is waited for until it raises.
    """

    text: tuple[TextWrite, ...]
    cells: tuple[TextWrite, ...]
    slots: tuple[tuple[Arena, dict[int, int]], ...]
    quiet: tuple[Body, ...] = ()
    restores: bool = False
    data: tuple[tuple[int, bytes], ...] = ()
    inside: Inside | None = None
    idle: Inside | None = None
    late: Late | None = None
    publish: Callable[[], None] | None = None

    @property
    def needs_stop(self) -> bool:
        return bool(self.text or self.cells or self.quiet or self.data or self.inside or self.idle)

    @property
    def switches(self) -> tuple[tuple[int, int], ...]:
        """What a thread may be in that is about to enter an old body, where nobody may do that any more."""
        if self.in_one_write or not (self.quiet or self.idle):
            return ()
        return tuple((arena.switches, arena.switch(max(values) + 1)) for arena, values in self.slots)

    @property
    def in_one_write(self) -> bool:
        """Whether one write changes every slot, none of them half done if we are killed meanwhile."""
        return len(self.slots) < 2 and all(8 * (max(values) + 1) <= PAGE for _, values in self.slots)


@dataclass(frozen=True, slots=True)
class Seen:
    """A thread with its general registers as it stood while a change was made, and its stack from its pointer up."""

    thread: StoppedThread
    stack: bytes


@dataclass(frozen=True, slots=True)
class FlipResult:
    """How long the target stood still (0: not at all), and its threads meanwhile, where they were few."""

    stop_ns: int
    seen: tuple[Seen, ...] = ()


def flip(target: Target, change: Flip) -> FlipResult:
    """Make a change live. Raises `PatcherError` with the target as it was before when it cannot be done."""
    primary, values = change.slots[-1]
    live, number = primary.read_slots(1)[0], values[0]
    if change.in_one_write or live == number:
        return _flip(target, change, [_slot_write(arena, values) for arena, values in change.slots])
    slots = [_Slots(arena, values) for arena, values in change.slots]
    try:
        stood_ns = _write_switches(target, slots, number)
        for each in slots:
            each.lead_to_switches()
        result = _flip(target, change, [TextWrite(primary.live, _word(live), _word(number))])
    except BaseException:
        come = primary.read_slots(1)[0] == number  # an interruption may come after all is done
        for each in slots:
            with suppress(PatcherError):
                each.settle(number) if come else each.take_back()
        raise
    # The change is live. What cannot be written now, the next patcher writes.
    with suppress(PatcherError):
        for each in slots:
            each.settle(number)
    return replace(result, stop_ns=stood_ns + result.stop_ns)


def _write_switches(target: Target, slots: Sequence[_Slots], number: int) -> int:
    """Put a switch for each slot that changes where nobody looks yet; return for how many ns the target stood still.

    Not under a thread that was held up in one when it was last in use: having looked which generation was live then,
    it would enter a body of this one before its time. Raises `TargetBusy` where one stays there.
    """
    writes = [write for each in slots for write in each.switches(number)]
    guard = _Guard((extent for each in slots for extent in each.were_in_use()), include_start=True)
    if not guard:
        _write_all(target, writes)
        return 0
    for attempt in range(_TRIES):
        stacks = _Stacks(target)
        with target.stopped() as stopped:
            clear = stacks.are_clear(stopped, [guard])
            if clear:
                _write_all(target, writes)
        if clear:
            return stopped.duration_ns
        time.sleep(0.001 * attempt)
    raise TargetBusy(
        f"process {target.pid}: a thread was interrupted where it calls a patched function, and is not back there yet",
        "try again when the signal handler that it is in has returned, or apply fewer functions at once",
        code="switch-busy",
    )


def _write_all(target: Target, writes: Iterable[tuple[int, bytes]]) -> None:
    for address, contents in writes:
        target.memory.write(address, contents)


class _Slots:
    """The slots of one arena on their way from one generation to another."""

    def __init__(self, arena: Arena, values: dict[int, int]) -> None:
        self._arena = arena
        self._before = arena.read_slots(max(values) + 1)
        self._values = {i: body for i, body in values.items() if i and body != self._before[i]}

    def were_in_use(self) -> tuple[tuple[int, int], ...]:
        """Return the extent of the switches, if any of them was in use before."""
        count = len(self._before)
        return ((self._arena.switches, self._arena.switch(count)),) if self._arena.switched(count) else ()

    def switches(self, number: int) -> Iterator[tuple[int, bytes]]:
        """Yield what a switch for each slot that changes takes: addresses and contents."""
        arena = self._arena
        yield arena.coming, _word(number)
        run, following = bytearray(), 0
        for index in [*sorted(self._values), 0]:
            if run and index != following:
                yield arena.switch(following) - len(run), bytes(run)
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
    writes = _Writes(target, change, slots)
    if not change.needs_stop:
        writes.write()
        return FlipResult(0)
    detours = _Guard(((w.address - w.ahead - 1, w.address + len(w.new)) for w in change.text), include_start=False)
    bodies = _Guard(((b.start, b.end) for b in change.quiet), include_start=True)
    switches = _Guard(change.switches, include_start=True)
    guards = [guard for guard in (switches, detours, bodies) if guard]
    reason = ""
    until = time.monotonic() + _PATIENCE
    attempt = waits = 0
    while attempt < (_TRIES if change.inside is None else _PATIENT_TRIES):
        stacks = _Stacks(target)
        with target.stopped() as stopped:
            used = change.idle(stopped) if change.idle is not None else ""
            done = not used and stacks.are_clear(stopped, guards)
            reason = change.inside(stopped) if done and change.inside is not None else ""
            done = done and not reason
            if done:
                writes.write()
        if done:
            return FlipResult(stopped.duration_ns, stacks.seen(stopped))
        if used:
            waits += 1
            # However long it takes to look: most of the time the program runs.
            time.sleep(max(min(_IDLE_PAUSE * waits, _LONGEST_IDLE_PAUSE), 4e-9 * stopped.duration_ns))
            continue
        attempt += 1
        if attempt > _TRIES and time.monotonic() > until:
            break
        time.sleep(0.001 * min(attempt, _TRIES))
    if reason:
        raise TargetBusy(
            f"process {target.pid}: data cannot be changed just now: {reason}",
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


class _Writes:
    """What a change writes, put together before the process stands still."""

    def __init__(self, target: Target, change: Flip, slots: Sequence[TextWrite]) -> None:
        self._target = target
        self._change = change
        turns = sorted({write.turn for write in change.text}, reverse=change.restores)
        text = [run for turn in turns for run in _runs([write for write in change.text if write.turn == turn])]
        self._text = [(run, _as_one(target, run)) for run in (*text, *([write] for write in change.cells))]
        self._slots = [([write], write) for write in slots]

    def write(self) -> None:
        """Write all, or nothing."""
        memory = self._target.memory
        if self._change.publish is not None:
            self._change.publish()
        # The program writes to its data whenever it runs: what it holds is known only now.
        wanted = (*self._change.data, *(self._change.late() if self._change.late is not None else ()))
        data = [TextWrite(address, memory.read(address, len(new)), new) for address, new in wanted]
        text = [*self._text, *(([write], write) for write in data)]
        done: list[TextWrite] = []
        try:
            for run, write in (*self._slots, *text) if self._change.restores else (*text, *self._slots):
                if memory.read(write.address, len(write.old)) != write.old:
                    write = _as_one(self._target, run)  # between these, something else has changed
                done.append(write)
                memory.write(write.address, write.new)
        except (PatcherError, OSError):
            for write in reversed(done):
                with suppress(PatcherError):
                    memory.write(write.address, write.old)
            raise


def _runs(text: Sequence[TextWrite]) -> list[list[TextWrite]]:
    """Put together what lies near each other: while all stand still nobody writes to the text in between."""
    runs: list[list[TextWrite]] = []
    end = 0
    for write in sorted(text, key=attrgetter("address")):
        if (
            runs
            and end + _APART <= write.address <= end + _GAP
            and write.address // PAGE == runs[-1][0].address // PAGE
        ):
            runs[-1].append(write)
        else:
            runs.append([write])
        end = write.address + len(write.new)
    return runs


def _as_one(target: Target, run: Sequence[TextWrite]) -> TextWrite:
    """Return writes as one, after a look whether each finds what it has to."""
    start = run[0].address
    before = target.memory.read(start, run[-1].address + len(run[-1].old) - start)
    after = bytearray(before)
    for write in run:
        place = slice(write.address - start, write.address - start + len(write.old))
        if before[place] != write.old:
            raise PatcherError(
                f"process {target.pid}: the bytes at {write.address:#x} changed meanwhile",
                "another tool modifies this process; detach it and try again",
                code="text-changed",
            )
        after[place] = write.new
    return TextWrite(start, before, bytes(after))


def _words(numbers: Sequence[int]) -> Words:
    return np.array(numbers, dtype=np.uint64)


class _Guard:
    """Keeps bytes from changing under a thread that stands in them, or that will return into them."""

    def __init__(self, spans: Iterable[tuple[int, int]], *, include_start: bool) -> None:
        self._spans = sorted((start + (not include_start), end) for start, end in spans)
        self._starts = _words([start for start, _ in self._spans])
        self._ends = _words([end for _, end in self._spans])
        self._step_out = not include_start

    def __bool__(self) -> bool:
        return len(self._starts) > 0

    def step_out(self, stopped: Stopped) -> bool:
        """Tell whether no thread stands in the bytes, after stepping out of a detour's whoever does."""
        counters = stopped.counters()
        for i in self._standing(counters) if len(counters) < _MANY else np.flatnonzero(self._inside(_words(counters))):
            if not self._step_out or not self._has_stepped(stopped, stopped.threads[i]):
                return False
        return True

    def _standing(self, counters: Sequence[int]) -> Iterator[int]:
        """Yield which of a few counters are inside: numpy takes longer to begin than this takes."""
        for number, counter in enumerate(counters):
            position = bisect_right(self._spans, (counter, _LAST)) - 1
            if position >= 0 and counter < self._spans[position][1]:
                yield number

    def _has_stepped(self, stopped: Stopped, thread: StoppedThread) -> bool:
        for _ in range(_STEPS):
            before, thread = thread, stopped.step(thread.tid)
            if thread.pc == before.pc:
                return False
            if not any(True for _ in self._standing([thread.pc])):
                return True
        return False

    def holds(self, words: Words) -> bool:
        """Tell whether one of the words of stacks points into the bytes."""
        # Almost every word is out of range altogether: one cheap pass leaves the few that need a search.
        # What is less than the first start wraps around.
        near = words - self._starts[0] < self._ends[-1] - self._starts[0]
        return bool(near.any()) and bool(np.any(self._inside(words[near])))

    def _inside(self, addresses: Words) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        position = np.searchsorted(self._starts, addresses, "right").astype(np.int64) - 1
        return (position >= 0) & (addresses < self._ends[position])


class _Stacks:
    """Where the stacks of a process may be, looked up before it stands still."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._mappings = target.mappings()
        self._starts = _words([m.start for m in self._mappings])
        self._ends = _words([m.end for m in self._mappings])
        self._buffer = bytearray(2 * _TOGETHER)
        self._few: list[bytes] = []

    def seen(self, stopped: Stopped) -> tuple[Seen, ...]:
        """Return the threads with their stacks, where they were few enough that these were kept."""
        if not self._few:
            return ()
        return tuple(Seen(thread, stack) for thread, stack in zip(stopped.described(), self._few, strict=True))

    def are_clear(self, stopped: Stopped, guards: Sequence[_Guard]) -> bool:
        """Tell whether all bytes that are guarded may change: no thread is in them or will return into them."""
        if not all(guard.step_out(stopped) for guard in guards):
            return False
        return not any(guard.holds(words) for words in self._words(stopped) for guard in guards)

    def _words(self, stopped: Stopped) -> Iterator[Words]:
        """Yield the words of all stacks, many together: a thousand small arrays would take milliseconds.

        What was yielded before is overwritten.
        """
        if len(stopped.pointers()) < _MANY:
            self._few = [_stack_bytes(self._target, pointer, self._mappings) for pointer in stopped.pointers()]
            yield np.frombuffer(b"".join(self._few), dtype=np.uint64)
            return
        pointers = _words(stopped.pointers())
        lows = pointers & np.uint64(~7 & (1 << 64) - 1)
        index = np.searchsorted(self._starts, pointers, "right") - 1
        sizes = np.minimum(self._ends[index] - lows, np.uint64(_STACK_LIMIT)) & np.uint64(~7 & (1 << 64) - 1)
        sizes[(index < 0) | (pointers >= self._ends[index])] = _STACK_LIMIT  # a stack that was mapped since
        extents = np.stack((lows, sizes), axis=1)
        tid = stopped.a_thread
        first = 0
        for last in self._portions(sizes):
            wanted = int(sizes[first:last].sum())
            view = memoryview(self._buffer)[:wanted]
            if wanted <= len(self._buffer) and self._target.memory.read_together(
                tid, extents[first:last].tobytes(), view
            ):
                yield np.frombuffer(view, dtype=np.uint64)
            else:
                for pointer in pointers[first:last].tolist():
                    yield read_stack(self._target, pointer, self._mappings)
            first = last

    def _portions(self, sizes: Words) -> Iterator[int]:
        """Yield where to part the stacks so that each part but the large ones takes no more than _TOGETHER bytes."""
        taken = 0
        for number, size in enumerate(sizes.tolist()):
            if taken and taken + size > _TOGETHER:
                yield number
                taken = 0
            taken += size
        if taken:
            yield len(sizes)


def read_stack(target: Target, sp: int, mappings: Sequence[Mapping]) -> Words:
    """Return the words of a stack from its pointer upwards, to the end of the mapping that holds it.

    Beyond that lie guard pages, which a debugger's read goes through, and other threads' stacks.
    """
    return np.frombuffer(_stack_bytes(target, sp, mappings), dtype=np.uint64)


def _stack_bytes(target: Target, sp: int, mappings: Sequence[Mapping]) -> bytes:
    # Mappings come in the order of their addresses, and each thread has two of its own.
    last = bisect_right(mappings, sp, key=attrgetter("start")) - 1
    end = mappings[last].end if last >= 0 and sp in mappings[last] else sp + _NEW_STACK
    found = target.memory.read_available(sp & -8, min(end - (sp & -8), _STACK_LIMIT))
    return found[: len(found) & -8]
