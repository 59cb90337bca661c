"""THREAD VALUES: what each thread has of a thread-local variable, written anew while all stand still.

A variable at a fixed distance from the thread pointer is written in every thread. Others are written in the threads
that have them; the rest get them from the initial image when they first ask. Threads to come start from that image as
well, so it is written beside, as far as it reaches: what it has no bytes for starts with zeros.

A thread that is just being made may have its storage and not be there yet, so that nobody may be making one.

Specification: Drepper, ELF Handling For Thread-Local Storage, sections 3 and 4; glibc, sysdeps/x86_64/nptl/tls.h.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from patcher.errors import UnsafeChange
from patcher.image import Image
from patcher.linkmap import GENERATION_NAMES, generations
from patcher.patch.commit import ThreadValue
from patcher.patch.transaction import read_stack
from patcher.target import Mapping, Stopped, StoppedThread
from patcher.unwind import Unwinder

_SELF = 0x10  # where a thread's control block has its own address, which is the thread pointer
_TABLE = 8  # and the address of its table of blocks
_NOT_YET = (1 << 64) - 1  # TLS_DTV_UNALLOCATED
_ENTRY = 16
_CREATES = "pthread_create"


class ThreadValues:
    """The values of one generation. Called in the stop, it says why it has to wait; `writes` is what is written."""

    def __init__(self, image: Image, values: Sequence[ThreadValue]) -> None:
        self._image = image
        self._memory = image.target.memory
        self._values = tuple(values)
        self._unwinder = Unwinder(image)
        self._creating = self._extent_of_creation()
        self._exports = {name: image.exported_anywhere(name) for name in GENERATION_NAMES}
        self._found: tuple[tuple[int, bytes], ...] = ()

    def __call__(self, stopped: Stopped) -> str:
        """Find the places. Raises `UnsafeChange` where they cannot be told."""
        mappings = self._image.target.mappings()
        for thread in stopped.described():
            if self._is_creating(thread, mappings):
                return f"thread {thread.tid} is starting another one"
        pointers = {stopped.tracee(t.tid).registers.fs_base for t in stopped.threads}
        self._found = tuple(self._places([p for p in pointers if self._has_block(p)]))
        return ""

    def writes(self) -> tuple[tuple[int, bytes], ...]:
        """Return what is written beside the rest of the generation: addresses and contents."""
        return self._found

    def _extent_of_creation(self) -> tuple[int, int]:
        found = self._image.search(_CREATES, self._image.executable)
        return (found.address, found.address + found.size) if found is not None else (0, 0)

    def _is_creating(self, thread: StoppedThread, mappings: Sequence[Mapping]) -> bool:
        """Tell whether a thread is, or may be, making another one."""
        low, high = self._creating
        trace = self._unwinder.backtrace(thread)
        if trace.complete or any(low <= address < high for address in trace.addresses):
            return any(low <= address < high for address in trace.addresses)
        words = read_stack(self._image.target, thread.sp, mappings)
        return bool(np.any((words >= np.uint64(low)) & (words < np.uint64(high))))

    def _has_block(self, pointer: int) -> bool:
        found = self._memory.read_available(pointer + _SELF, 8) if pointer else b""
        return int.from_bytes(found, "little") == pointer and len(found) == 8

    def _places(self, pointers: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        numbered = any(value.module_id for value in self._values)
        known = generations(self._memory, self._exports.__getitem__) if numbered else {}
        for value in self._values:
            if value.module_id and (known is None or value.module_id not in known):
                raise UnsafeChange(
                    f"which threads have the thread-local `{value.name}` of {value.file} cannot be told",
                    "leave out --reinit for it, or restart the program",
                    code="thread-local",
                )
            for pointer in pointers:
                start = pointer
                if value.module_id:
                    assert known is not None
                    start = self._block(pointer, value.module_id, known[value.module_id])
                if start:
                    yield start + value.offset, value.contents

    def _block(self, pointer: int, number: int, since: int) -> int:
        """Return where a thread has a module's block, 0 where it has none yet."""
        table = self._memory.read_u64(pointer + _TABLE)
        length = self._memory.read_u64(table - _ENTRY)
        # What is older than the module's own number is about another module.
        if number > length or self._memory.read_u64(table) < since:
            return 0
        block = self._memory.read_u64(table + _ENTRY * number)
        return 0 if block == _NOT_YET else block
