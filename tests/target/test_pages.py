"""Which pages a process has, asked both ways."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from patcher.target.maps import read_mappings
from patcher.target.pages import Pages

PAGE = 4096


@pytest.fixture(params=["scanned", "read"])
def pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pages]:
    """Ours, as a kernel tells that can scan, and as one that cannot."""
    if request.param == "read":

        def fails(*_: object, **__: object) -> None:
            raise OSError

        monkeypatch.setattr(Pages, "_scan", fails)
    with Pages(os.getpid()) as found:
        assert (found._runs == found._read) == (request.param == "read")
        yield found


def numbers(parts: Iterator[tuple[int, int]], start: int) -> list[int]:
    return [n for low, high in parts for n in range((low - start) // PAGE, (high - start) // PAGE)]


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def test_pages_that_were_written_to(pages: Pages) -> None:
    memory = mmap.mmap(-1, 64 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = address_of(memory)
    assert numbers(pages.between(start, start + 64 * PAGE), start) == []
    for number in (0, 3, 4, 5, 63):
        memory[number * PAGE] = 1
    assert numbers(pages.between(start, start + 64 * PAGE), start) == [0, 3, 4, 5, 63]
    runs = list(pages.between(start + 4 * PAGE + 8, start + 64 * PAGE))
    assert runs == [(start + 4 * PAGE + 8, start + 6 * PAGE), (start + 63 * PAGE, start + 64 * PAGE)]


def test_more_runs_than_one_call_tells(pages: Pages) -> None:
    count = 4000
    memory = mmap.mmap(-1, count * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    start = address_of(memory)
    for number in range(0, count, 2):
        memory[number * PAGE] = 1
    assert numbers(pages.between(start, start + count * PAGE), start) == list(range(0, count, 2))


def test_own_pages_are_those_that_no_file_has(pages: Pages, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8 * PAGE))
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 8 * PAGE, flags=mmap.MAP_PRIVATE)
    start, end = address_of(memory), address_of(memory) + 8 * PAGE
    assert memory[5 * PAGE] == 0
    memory[2 * PAGE] = 1
    assert {2, 5} <= set(numbers(pages.between(start, end), start))
    assert numbers(pages.between(start, end, own=True), start) == [2]


def test_terabytes_that_nobody_touched(pages: Pages) -> None:
    """As programs with -fsanitize=address map them; a kernel that has to be asked for every page takes its time."""
    size = 1 << (44 if pages._runs != pages._read else 34)
    reserve = 0x4000  # MAP_NORESERVE
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    memory[size // 2] = 1
    start = address_of(memory)
    assert list(pages.between(start, start + size)) == [(start + size // 2, start + size // 2 + PAGE)]


def test_the_kernels_own(pages: Pages) -> None:
    mappings = read_mappings(Path("/proc/self/maps").read_text().splitlines())
    own = [mapping for mapping in mappings if mapping.path.startswith(("[vsyscall]", "[vvar"))]
    assert own
    assert all(list(pages.of(mapping)) == [] for mapping in own)
