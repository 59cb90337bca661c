"""Which memory a stopped process can still reach: every word of it, and every register, taken for an address.

Conservative: whatever looks like an address of a range keeps it. Looked at are all pages that the process has, stacks
and heaps, coroutines' stacks among them, those below a stack pointer too, since a function that runs on leaves return
addresses there; and the general and vector registers. Pages of files that nobody wrote to hold no address of ours,
and pages that were never touched hold nothing: /proc/<pid>/pagemap tells (proc(5), pagemap).

Does not decide what may be freed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from patcher.target import Stopped, Target

_PAGE = 4096
_CHUNK = 1 << 18
_NOT_MEMORY = ("[vvar", "[vdso]", "[vsyscall]")

Words = npt.NDArray[np.uint64]
Extents = Sequence[tuple[int, int]]


def memory_of(target: Target, left_out: Extents) -> list[tuple[int, int]]:
    """Return the stretches of a process's memory that can hold an address, without some."""
    found: list[tuple[int, int]] = []
    left_out = sorted(left_out)
    with target.pages() as pages:
        for mapping in target.mappings():
            if not mapping.path.startswith(_NOT_MEMORY):
                for start, end in around(mapping.start, mapping.end, left_out):
                    if mapping.private:
                        found += pages.between(start, end, own=mapping.path.startswith("/"))
                    else:  # what another process wrote need not be in this one's page table
                        found.append((start, end))
    return found


def reached(target: Target, stopped: Stopped, ranges: Extents, left_out: Extents) -> frozenset[int]:
    """Return the indices of those ranges, ends included, that a word or a register of the process leads into.

    The ranges rise and do not overlap; what is in `left_out` does not count.
    """
    search = _Search(ranges)
    for thread in stopped.threads:
        tracee = stopped.tracee(thread.tid)
        search.look_at(bytes(tracee.registers))
        search.look_at(tracee.read_vector_state())
    buffer = memoryview(bytearray(_CHUNK))
    for start, end in memory_of(target, left_out):
        at = start
        while at < end:
            wanted = min(_CHUNK, end - at)
            size = target.memory.read_into(at, buffer[:wanted])
            search.look_at(buffer[:size])
            at += size
            if size < wanted:
                at = (at & -_PAGE) + _PAGE  # a page of a device, which is no memory
    return frozenset(search.found)


class _Search:
    def __init__(self, ranges: Extents) -> None:
        self._starts = np.array([start for start, _ in ranges], np.uint64)
        self._ends = np.array([end for _, end in ranges], np.uint64)
        self._low, self._span = self._starts[0], self._ends[-1] - self._starts[0]
        self._offsets: Words = np.empty(_CHUNK // 8, np.uint64)
        self.found: set[int] = set()

    def look_at(self, data: bytes | memoryview) -> None:
        words: Words = np.frombuffer(data[: len(data) & -8], np.uint64)
        # What is less than the first one wraps around: one comparison leaves the few that need a search.
        offsets = np.subtract(words, self._low, out=self._offsets[: len(words)])
        if len(words) and (near := offsets <= self._span).any():
            words = words[near]
            # A return address may be the end of a range, which is the start of the next one.
            for index in (np.searchsorted(self._starts, words, "right"), np.searchsorted(self._starts, words)):
                before = index[(index > 0) & (words <= self._ends[index - 1])] - 1
                self.found.update(before.tolist())


def around(start: int, end: int, left_out: Extents) -> Iterator[tuple[int, int]]:
    """Yield the parts of a stretch that are in none of some others, which rise."""
    for low, high in left_out:
        if low < end and high > start:
            if low > start:
                yield start, low
            start = max(start, high)
    if start < end:
        yield start, end
