"""ACTIVITY: who is in old code, thread by thread, and in the coroutines that no thread runs.

    a thread       its frames by the call frame information of the modules; where that does not tell, every word of
                   its stack that lies inside old code counts
    a coroutine    a return address into old code (a word behind a call there) in memory that can hold a stack: all
                   that is writable, save the stacks that threads are on and what lies below their stack pointers

What is found is there or may be there, and what is there is found, save for coroutines whose stacks are part of a frame
of a thread, and for addresses that a program hides (a `jmp_buf` has one, and its stack another that is not hidden).
The stack of a thread that has ended, which the C library keeps, is nobody's. A coroutine's stack, and one for signals,
keeps return addresses of calls that are over below its pointer, which nobody can tell from here: they count.

Decides also which of those frames are loops that will not return. Does not decide what that means for a change.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from patcher.code.instructions import UndecodableCode, decode_lite, lite_target
from patcher.errors import PatcherError, TargetGone
from patcher.image import Image
from patcher.patch.bodies import Version
from patcher.patch.reach import around
from patcher.patch.transaction import Seen, read_stack
from patcher.report import OldFrame
from patcher.target import Mapping, Memory, Stopped, StoppedThread, Target
from patcher.unwind import Backtrace, Unwinder

Array = npt.NDArray[np.uint64]

_CHUNK = 256 << 10  # what a processor's cache holds: four times as fast as 4 MiB
_COMPARED = 64
_SAME_STACK = 16 << 10  # return addresses closer than this are of one coroutine
_CONTROL_BLOCK = 16 << 10  # from the end of a thread's stack, there is its control block
_LISTED_AT, _THREAD_AT = 0x2C0, 0x2D0  # in it: neighbours in the C library's list of stacks, number of the thread
_BOTTOM = 2  # frames below the function that a thread starts with: start_thread, clone3


class TooMuchMemory(Exception):
    """There is more memory to look through than was allowed."""


class Lookout:
    """Looks for frames of old code in one target. What it learns of the target's modules it keeps."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._target = image.target
        self._unwinder = Unwinder(image)

    def standing(self, versions: Iterable[Version], stopped: Stopped, limit: int) -> tuple[OldFrame, ...]:
        """Return the frames of some code while all threads stand still.

        Coroutines are looked for when no thread is in it. Raises `TooMuchMemory` when what may hold them has more than
        `limit` bytes; 0: they are not looked for.
        """
        look = _Look(self._target, versions)
        layout = _Layout(self._target.mappings())
        for thread in stopped.described():
            self._take(look, thread, _Stack.of(self._target, thread.sp, layout), layout)
        if limit and not look.frames():
            look.search(layout, limit)
        return look.frames()

    def running(self, versions: Iterable[Version], limit: int, seen: Iterable[Seen] = ()) -> tuple[OldFrame, ...]:
        """Return the frames of some code while the threads run, as far as they stay where they are.

        A thread that waits in a system call is not stopped; one that runs is, for a moment, unless it was `seen` when
        the code went out of use, and not in it: nothing leads there any more. At most `limit` bytes are looked through
        for coroutines.
        """
        look = _Look(self._target, versions)
        if not look.spans:
            return ()
        try:
            layout = _Layout(self._target.mappings())
            elsewhere = self._elsewhere(look, seen, layout)
            for tid in self._target.threads():
                self._take_running(look, tid, layout, elsewhere)
            with suppress(TooMuchMemory):
                if limit:
                    look.search(_Layout(self._target.mappings()), limit)
        except TargetGone:
            pass
        return look.frames()

    def _elsewhere(self, look: _Look, seen: Iterable[Seen], layout: _Layout) -> dict[int, tuple[StoppedThread, _Stack]]:
        """Return those threads that were in none of the code, by their numbers, with their stacks."""
        found = {}
        for each in seen:
            words = np.frombuffer(each.stack, np.uint64)
            stack = _Stack.of(self._target, each.thread.sp, layout, words)
            if not look.suspects(each.thread, stack):
                found[each.thread.tid] = each.thread, stack
        return found

    def _take_running(
        self, look: _Look, tid: int, layout: _Layout, elsewhere: dict[int, tuple[StoppedThread, _Stack]]
    ) -> None:
        waiting = _waiting(self._target.pid, tid)
        if waiting is not None:
            self._take(look, waiting, _Stack.of(self._target, waiting.sp, layout), layout)
            return
        if tid in elsewhere:
            self._take(look, *elsewhere[tid], layout)
            return
        try:
            with self._target.sampled(tid) as thread:
                stack = _Stack.of(self._target, thread.sp, layout)
        except PatcherError:
            return  # it has ended, or cannot be stopped just now
        self._take(look, thread, stack, layout)

    def _take(self, look: _Look, thread: StoppedThread, stack: _Stack, layout: _Layout) -> None:
        suspected = look.suspects(thread, stack)
        if not suspected and stack.is_own:
            look.claim(stack.bottom, stack.end)
            return
        trace = self._unwinder.backtrace(thread, stack)
        if not trace.complete:
            look.claim(stack.bottom, stack.end)
            for place, word, version in suspected:
                outer = version.name == "main"
                look.add(version, thread.tid, place, outer and look.loops(version, word - 1))
            return
        for index, (address, place) in enumerate(zip(trace.addresses, trace.pointers, strict=True)):
            found = look.version_at(address)
            if found is not None:
                outer = found.name == "main" or self._is_outer(trace, index)
                look.add(found, thread.tid, place, outer and look.loops(found, address))
        for low, high in _covered(self._target, trace, stack, layout):
            look.claim(low, high)

    def _is_outer(self, trace: Backtrace, index: int) -> bool:
        """Tell whether a frame is of the function that a thread started with, or of one that `main` called."""
        further = trace.addresses[index + 1 :]
        if len(further) <= _BOTTOM:
            return True
        executable = self._image.executable
        return any(
            s.value <= further[0] - executable.bias < s.value + s.size for s in executable.module.symbols.named("main")
        )


def _waiting(pid: int, tid: int) -> StoppedThread | None:
    # A thread that waits in a system call shows its registers without being stopped (proc(5), syscall).
    try:
        fields = Path(f"/proc/{pid}/task/{tid}/syscall").read_text().split()
    except OSError:
        return None
    if len(fields) < 3 or fields[0] == "running":
        return None
    return StoppedThread(tid, int(fields[-1], 16), int(fields[-2], 16))


class _Layout:
    """What is mapped, for finding quickly what an address is in."""

    def __init__(self, mappings: Sequence[Mapping]) -> None:
        self.mappings = mappings
        self._starts = [m.start for m in mappings]
        self._guards = frozenset(m.end for m in mappings if not (m.readable or m.writable))

    def at(self, address: int) -> Mapping | None:
        """Return what holds an address."""
        index = bisect_right(self._starts, address) - 1
        return self.mappings[index] if index >= 0 and address in self.mappings[index] else None

    def is_guarded(self, mapping: Mapping) -> bool:
        """Tell whether nobody may go below a mapping."""
        return mapping.start in self._guards


# --- the stack that a thread is on --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Stack:
    """The words from a stack pointer upwards, as they were. `bottom`: from where on the memory is this stack's own.

    `is_own`: whether it is the stack that the thread was made with, which nobody else has a part of.
    """

    low: int
    words: Array
    bottom: int
    is_own: bool
    memory: Memory

    @property
    def end(self) -> int:
        return self.low + 8 * len(self.words)

    @classmethod
    def of(cls, target: Target, sp: int, layout: _Layout, words: Array | None = None) -> _Stack:
        low = sp & -8
        home = layout.at(sp)
        if words is None:
            words = read_stack(target, sp, () if home is None else (home,))
        if home is None:
            return cls(low, words, low, False, target.memory)
        if home.path == "[stack]":
            return cls(low, words, home.start, True, target.memory)
        own = layout.is_guarded(home) and bool(len(_control_blocks(low, words)))
        return cls(low, words, home.start if own else low, own, target.memory)

    def read_u64(self, address: int) -> int:
        """Return a word of it, as it was, or of what is elsewhere, as it is."""
        offset = address - self.low
        if offset % 8 or not 0 <= offset < 8 * len(self.words):
            return self.memory.read_u64(address)
        return int(self.words[offset // 8])


def _control_blocks(low: int, words: Array) -> Array:
    """Return where control blocks of threads may be, which stand above their stacks.

    Each has its own address in its first and third word (psABI; glibc's `tcbhead_t`).
    """
    own = np.uint64(low) + np.uint64(8) * np.arange(len(words), dtype=np.uint64)
    itself = words == own
    found: Array = own[:-2][itself[:-2] & (words[2:] == own[:-2])]
    return found


def _is_left(target: Target, mapping: Mapping, threads: Container[int]) -> bool:
    """Tell whether memory is the stack of a thread that has ended, which the C library (glibc) keeps for another."""
    memory, low = target.memory, max(mapping.start, mapping.end - _CONTROL_BLOCK)
    found = memory.read_available(low, mapping.end - low)
    for block in _control_blocks(low, np.frombuffer(found, np.uint64)).tolist():
        entry = block + _LISTED_AT
        with suppress(PatcherError):
            following, before = memory.read_u64(entry), memory.read_u64(entry + 8)
            listed = memory.read_u64(following + 8) == entry == memory.read_u64(before)
            number = int.from_bytes(memory.read(block + _THREAD_AT, 4), "little", signed=True)
            return listed and number not in threads
    return False


def _covered(target: Target, trace: Backtrace, stack: _Stack, layout: _Layout) -> Iterator[tuple[int, int]]:
    """Yield the memory that a thread's frames are in: in several stacks, where a signal handler has one of its own."""
    groups: dict[Mapping, list[int]] = {}
    for pointer in trace.pointers:
        home = layout.at(pointer)
        if home is not None:
            groups.setdefault(home, []).append(pointer)
    for pointers in groups.values():
        low, high = min(pointers), max(pointers)
        part = stack if stack.low <= low < stack.end else _Stack.of(target, low, layout)
        yield part.bottom, high


# --- one look -----------------------------------------------------------------------------------------------------


@dataclass
class _Spans:
    """The extents of code, for looking up many words at once."""

    versions: list[Version]
    starts: Array = field(init=False)
    ends: Array = field(init=False)
    ranges: list[tuple[np.uint64, np.uint64]] = field(init=False)  # that hold all of it, with what lies between

    def __post_init__(self) -> None:
        self.versions.sort(key=lambda v: v.start)
        self.starts = np.array([v.start for v in self.versions], np.uint64)
        self.ends = np.array([v.end for v in self.versions], np.uint64)
        merged: list[list[int]] = []
        for version in self.versions:
            if merged and version.start - merged[-1][1] < 1 << 20:
                merged[-1][1] = max(merged[-1][1], version.end)
            else:
                merged.append([version.start, version.end])
        self.ranges = [(np.uint64(low), np.uint64(high - low)) for low, high in merged]

    def holding(self, words: Array) -> Iterator[tuple[int, int, Version]]:
        """Yield (position, word, code) for the words that are addresses inside of code, or right behind it."""
        for low, size in self.ranges:
            positions = np.flatnonzero(words - low <= size)
            if not len(positions):
                continue
            near = words[positions]
            # At the end of one function another may start: the end belongs to the former here.
            index = np.searchsorted(self.starts, near, "left").astype(np.int64) - 1
            inside = (index >= 0) & (near <= self.ends[np.maximum(index, 0)])
            for position, word, i in zip(
                positions[inside].tolist(), near[inside].tolist(), index[inside].tolist(), strict=True
            ):
                yield position, word, self.versions[i]

    def at(self, address: int) -> Version | None:
        """Return the code that holds an address. The entry of what a detour stands in leads to what is new."""
        index = int(np.searchsorted(self.starts, np.uint64(address), "right")) - 1
        if index < 0 or address >= int(self.ends[index]):
            return None
        found = self.versions[index]
        return None if found.entry and address == found.start else found


class _Look:
    """What is found, thread by thread and then in the rest of the memory."""

    def __init__(self, target: Target, versions: Iterable[Version]) -> None:
        self._target = target
        self.spans = [v for v in versions if v.end > v.start]
        self._spans = _Spans(self.spans)
        self._code: dict[Version, bytes] = {}
        self._returns: dict[Version, frozenset[int]] = {}
        self._claims: list[tuple[int, int]] = []
        self._found: dict[OldFrame, None] = {}

    def frames(self) -> tuple[OldFrame, ...]:
        return tuple(self._found)

    def add(self, version: Version, thread: int, place: int, loops: bool) -> None:
        self._found[OldFrame(version.name, thread, place, version.generation, loops)] = None

    def claim(self, low: int, high: int) -> None:
        """Take memory for a thread's: it holds no coroutine."""
        self._claims.append((low, high))

    def version_at(self, address: int) -> Version | None:
        return self._spans.at(address) if self.spans else None

    def suspects(self, thread: StoppedThread, stack: _Stack) -> list[tuple[int, int, Version]]:
        """Return (address, word, code) of what may be frames of a thread, at most one for each piece of code."""
        found: dict[Version, tuple[int, int, Version]] = {}
        running = self.version_at(thread.pc)
        if running is not None:
            found[running] = stack.low, thread.pc + 1, running
        # A hand-made switch may have the address that it goes on at in a register only.
        general = np.array(thread.general[:-1], np.uint64)
        for words, low, only_returns in ((general, stack.low, True), (stack.words, stack.low, False)):
            for position, word, version in self._spans.holding(words) if self.spans else ():
                if version in found:
                    continue
                if word in self.returns(version) or (not only_returns and word < version.end):
                    found[version] = low + (0 if only_returns else 8 * position), word, version
        return list(found.values())

    # --- code -----------------------------------------------------------------------------------------------------

    def code(self, version: Version) -> bytes:
        """Return a piece of code as it was before a detour was written to its entry."""
        if version not in self._code:
            live = self._target.memory.read_available(version.start, version.end - version.start)
            self._code[version] = version.entry[: len(live)] + live[len(version.entry) :]
        return self._code[version]

    def returns(self, version: Version) -> frozenset[int]:
        """Return the addresses in a piece of code that may be return addresses: those right behind a call."""
        if version not in self._returns:
            self._returns[version] = frozenset(version.start + end for end in _call_ends(self.code(version)))
        return self._returns[version]

    def loops(self, version: Version, address: int) -> bool:
        """Tell whether an address is inside a loop of a function."""
        try:
            listing = decode_lite(self.code(version), version.start)
        except UndecodableCode:
            return False
        for instruction in listing:
            target = lite_target(instruction)
            if target is not None and "call" not in instruction[2]:
                end = version.start + instruction[0] + instruction[1]
                if version.start <= target <= address < end:
                    return True
        return False

    # --- coroutines -----------------------------------------------------------------------------------------------

    def search(self, layout: _Layout, limit: int) -> None:
        """Find return addresses in memory that no thread has claimed. Raises `TooMuchMemory`."""
        if not self.spans:
            return
        left = limit
        places: dict[str, list[int]] = {}
        for start, end in self._unclaimed(layout):
            for low in range(start, end, _CHUNK):
                left -= min(_CHUNK, end - low)
                if left < 0:
                    raise TooMuchMemory
                self._search_chunk(low, min(low + _CHUNK, end), places)

    def _search_chunk(self, low: int, high: int, places: dict[str, list[int]]) -> None:
        found = self._target.memory.read_available(low, high - low)
        words = np.frombuffer(found[: len(found) & -8], np.uint64)
        for position, word, version in self._spans.holding(words):
            if word not in self.returns(version):
                continue
            place = low + 8 * position
            if position:
                place = self._of_context(int(words[position - 1]), word, place)
            known = places.setdefault(version.name, [])
            if all(abs(place - other) >= _SAME_STACK for other in known[-_COMPARED:]):
                known.append(place)
                self.add(version, 0, place, False)

    def _of_context(self, pointer: int, word: int, place: int) -> int:
        """Return where a return address stands on its stack, if a `ucontext_t` has it beside the stack pointer."""
        below = pointer - 8
        if below % 8 or below < 0:
            return place
        there = self._target.memory.read_available(below, 8)
        return below if there == word.to_bytes(8, "little") else place

    def _unclaimed(self, layout: _Layout) -> Iterator[tuple[int, int]]:
        claims = sorted(self._claims)
        threads = frozenset(self._target.threads())
        with self._target.pages() as pages:
            for mapping in layout.mappings:
                if not _may_hold_stacks(mapping):
                    continue
                if layout.is_guarded(mapping) and _is_left(self._target, mapping, threads):
                    continue
                for start, end in pages.of(mapping):
                    yield from (((low + 7) & -8, high) for low, high in around(start, end, claims))


def _may_hold_stacks(mapping: Mapping) -> bool:
    if not (mapping.readable and mapping.writable):
        return False
    return not mapping.path.startswith("/dev/") or mapping.path.startswith(("/dev/zero", "/dev/shm/"))


def _call_ends(code: bytes) -> set[int]:
    """Return the offsets right behind what may be a call: `call rel32`, or `call` by a register or memory."""
    text = np.frombuffer(code, np.uint8)
    found = (np.flatnonzero(text == 0xE8) + 5).tolist()
    for at in np.flatnonzero(text[:-1] == 0xFF).tolist():
        modrm = code[at + 1]
        if modrm >> 3 & 7 == 2:
            found.append(at + _length_of_call(code, at + 1, modrm))
    return {end for end in found if end <= len(code)}


def _length_of_call(code: bytes, at: int, modrm: int) -> int:
    mode, memory = modrm >> 6, modrm & 7
    if mode == 3:
        return 2
    scaled = memory == 4
    if mode == 0:
        absolute = scaled and at + 1 < len(code) and code[at + 1] & 7 == 5
        return 6 if memory == 5 else 2 + scaled + 4 * absolute
    return 2 + scaled + (1 if mode == 1 else 4)


# --- words --------------------------------------------------------------------------------------------------------


def described(frame: OldFrame) -> str:
    """Return a frame in words: who is in which function."""
    where = f"thread {frame.thread}" if frame.thread else f"a coroutine (stack at {frame.stack:#x})"
    return f"{where} is in `{frame.function}`" + (", in a loop that does not return" if frame.loops else "")


def seen_again(frames: Sequence[OldFrame], before: Iterable[OldFrame]) -> tuple[OldFrame, ...]:
    """Mark those frames of threads that were there when the generation before went live: they are not to return."""
    known = {(f.thread, f.stack, f.function, f.generation) for f in before if f.thread}
    again = [f.thread and (f.thread, f.stack, f.function, f.generation) in known for f in frames]
    return tuple(replace(f, loops=True) if a else f for f, a in zip(frames, again, strict=True))
