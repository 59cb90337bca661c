"""PAGES: which pages a process has of what it mapped. To read others would make them, and takes for ever.

Decides how that is asked: PAGEMAP_SCAN since Linux 6.7, in which memory that was never touched costs nothing (of a
program with -fsanitize=address that are terabytes), else every entry is read. Does not decide what they are asked for.
Specification: proc_pid_pagemap(5), PAGEMAP_SCAN (Documentation/admin-guide/mm/pagemap.rst).
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import numpy as np

from patcher.target.maps import Mapping

_PAGE = 4096
_SCAN = 0xC0606610  # PAGEMAP_SCAN: _IOWR('f', 16, struct pm_scan_arg)
_ARGUMENT = struct.Struct("12Q")
_WALKED = 4  # the word of it that says how far it came
_IS_FILE, _IS_PRESENT, _IS_SWAPPED = 1 << 2, 1 << 3, 1 << 4  # PAGE_IS_...
_REGIONS = 512
_RESIDENT, _FILE = np.uint64(3 << 62), np.uint64(1 << 61)  # of an entry
_ENTRIES = 1 << 16  # read at once


class Pages:
    """The pages of a process, asked anew each time."""

    def __init__(self, pid: int) -> None:
        """Raises OSError where the process is gone, or is not ours to look at."""
        self._file = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._regions = np.empty((_REGIONS, 3), np.uint64)
        try:
            self._scan(0, 0, own=False)
        except OSError:
            self._runs = self._read  # an older kernel
        else:
            self._runs = self._scanned

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def of(self, mapping: Mapping) -> Iterator[tuple[int, int]]:
        """Yield the parts of a mapping that are in memory, or swapped out, as (start, end), ascending."""
        return self.between(mapping.start, mapping.end)

    def between(self, start: int, end: int, *, own: bool = False) -> Iterator[tuple[int, int]]:
        """Yield the parts of a stretch that are in memory, or swapped out; `own`: those that are no page of a file."""
        low, high = -1, -1
        for first, behind in self._runs(start & -_PAGE, (end + _PAGE - 1) & -_PAGE, own):
            if first == high:
                high = behind
                continue
            if high >= 0:
                yield max(low, start), min(high, end)
            low, high = first, behind
        if high >= 0:
            yield max(low, start), min(high, end)

    def _scanned(self, start: int, end: int, own: bool) -> Iterator[tuple[int, int]]:
        while start < end:
            try:
                found, start = self._scan(start, end, own=own)
            except OSError:
                return  # it has ended, which whoever reads its memory is told, or this is the kernel's own
            yield from found

    def _scan(self, start: int, end: int, *, own: bool) -> tuple[list[tuple[int, int]], int]:
        """Return some runs of pages, and up to where these are all."""
        file, resident = _IS_FILE if own else 0, _IS_PRESENT | _IS_SWAPPED
        where = self._regions.ctypes.data
        wanted = (file, file, resident, resident)  # inverted, all of, any of, to be told
        argument = bytearray(_ARGUMENT.pack(_ARGUMENT.size, 0, start, end, 0, where, _REGIONS, 0, *wanted))
        count = fcntl.ioctl(self._file, _SCAN, argument)
        return [(low, high) for low, high in self._regions[:count, :2].tolist()], _ARGUMENT.unpack(argument)[_WALKED]

    def _read(self, start: int, end: int, own: bool) -> Iterator[tuple[int, int]]:
        for first in range(start // _PAGE, end // _PAGE, _ENTRIES):
            count = min(end // _PAGE - first, _ENTRIES)
            entries = np.frombuffer(os.pread(self._file, 8 * count, 8 * first), np.uint64)
            there = (entries & _RESIDENT) != 0
            if own:
                there &= (entries & _FILE) == 0
            edges = np.flatnonzero(np.diff(np.concatenate(([False], there, [False]))))
            for low, high in edges.reshape(-1, 2).tolist():
                yield (first + low) * _PAGE, (first + high) * _PAGE
