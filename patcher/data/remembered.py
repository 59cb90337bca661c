"""REMEMBERED: what the units of each generation declare, kept in files of ours for controllers to come.

The process has the generations, and nothing of their debug information. That is written into a directory of the user's,
one for each process, and found again by number and time of the generations: a process that was forked has those of the
one that it was forked from. What is read is checked, and what does not fit is as good as gone: then the caller has to
be careful (`Admission`). Directories of processes that have ended are removed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from patcher.data.declared import Declared, Variable
from patcher.data.dies import Sections, units
from patcher.errors import PatcherError
from patcher.target import read_stat

_INDEX = "index.json"  # which file has what
_TIMES = "times"  # a line for each generation, added when all that it brought is in files
_LARGEST = 256 << 20  # bytes of one process's files
_PARTS = ("info", "abbreviations", "strings", "line_strings", "string_offsets", "addresses")


@dataclass(frozen=True, slots=True)
class Kept:
    """What a unit of a module declares from a generation on."""

    module: str
    unit: str
    generation: int
    declared: tuple[Declared, ...]


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    checksum: int
    size: int


@dataclass(slots=True)
class _Index:
    times: dict[int, float] = field(default_factory=dict)
    files: dict[tuple[str, str, int], _File] = field(default_factory=dict)  # by module, unit and generation


class Memory:
    """The files of one process, below `folder`, which is nobody's but ours; None: nothing is kept."""

    def __init__(self, folder: Path | None, pid: int) -> None:
        self._folder = folder
        self._own = folder / f"{pid}-{read_stat(pid).start_time}" if folder is not None else None
        self._index = _Index()
        self._size = -1  # of the file of times, as we left it

    def read(self, times: Mapping[int, float]) -> tuple[frozenset[int], tuple[Kept, ...]]:
        """Return the generations that are known of those made at some times, and what their units declare."""
        seen: set[int] = set()
        found: list[Kept] = []
        for directory in self._directories():
            index = _index_in(directory)
            fits = {n for n, time in index.times.items() if times.get(n) == time}
            if not fits or any(n in times and n not in fits for n in index.times if n < max(fits)):
                continue
            # Numbers without a record are of generations that became part of later ones.
            known = {n for n in index.times if n <= max(fits)} - seen
            kept = list(_read(directory, index, known))
            seen |= known - {n for n, complete in kept if complete is None}
            found += [k for _, k in kept if k is not None]
            if directory == self._own:
                self._index = index
        return frozenset(seen), tuple(sorted(found, key=lambda k: k.generation))

    def note(self, generation: int, time: float, layers: Sequence[Kept]) -> None:
        """Keep what a generation brought; layers of earlier ones that say more now are written anew.

        Does without where there is no room: then the generation is not known later.
        """
        if self._own is None:
            return
        if not self._index.times:
            tuple(self._directories())  # those of processes that have ended go
        try:
            self._own.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (self._own / _TIMES).open("ab") as times:
                fcntl.flock(times, fcntl.LOCK_EX)
                if self._index.times and os.fstat(times.fileno()).st_size != self._size:
                    self._index = _index_in(self._own)  # another controller was here
                first = not self._index.times
                if first:
                    times.truncate(0)
                written = [self._write(self._own, kept) for kept in layers]
                if first or any(written):
                    _replace(self._own / _INDEX, _as_text(self._index))
                times.write(_line(generation, time))
                times.flush()
                self._size = os.fstat(times.fileno()).st_size
            self._index.times[generation] = time
        except (OSError, ValueError):
            return

    def _write(self, own: Path, kept: Kept) -> bool:
        """Write what a unit declares; tell whether that is anything new."""
        key = kept.module, kept.unit, kept.generation
        data = _packed(kept.declared)
        new = _File(f"{len(self._index.files)}.types", zlib.crc32(data), len(data))
        old = self._index.files.get(key)
        if old is not None:
            new = replace(new, name=old.name)
        if new == old:
            return False
        if sum(f.size for f in self._index.files.values()) - (old.size if old else 0) + new.size > _LARGEST:
            raise ValueError("too much to keep")
        _replace(own / new.name, data)
        self._index.files[key] = new
        return True

    def _directories(self) -> Iterator[Path]:
        """Find the directories of processes that run, the own one first."""
        if self._folder is None or self._own is None:
            return
        try:
            others = [p for p in self._folder.iterdir() if p != self._own]
        except OSError:
            return
        for directory in (self._own, *others):
            if directory == self._own or _runs(directory.name):
                yield directory
            else:
                shutil.rmtree(directory, ignore_errors=True)


def _runs(name: str) -> bool:
    pid, _, start = name.partition("-")
    try:
        return str(read_stat(int(pid)).start_time) == start
    except (PatcherError, ValueError):
        return False


def _replace(path: Path, data: bytes) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(data)
    os.replace(new, path)


# --- the index --------------------------------------------------------------------------------------------------------


def _as_text(index: _Index) -> bytes:
    return json.dumps([[*key, *astuple(file)] for key, file in index.files.items()]).encode()


def _index_in(directory: Path) -> _Index:
    """Read an index; an empty one when it is damaged, or there is none."""
    try:
        found = json.loads((directory / _INDEX).read_bytes())
        files = {
            (str(module), str(unit), int(generation)): _File(os.path.basename(str(name)), int(checksum), int(size))
            for module, unit, generation, name, checksum, size in found
        }
        return _Index(dict(_lines((directory / _TIMES).read_text())), files)
    except (OSError, ValueError, TypeError):
        return _Index()


def _line(generation: int, time: float) -> bytes:
    # Whoever wrote the line before may have been killed meanwhile.
    return f"\n{generation} {time!r};".encode()


def _lines(text: str) -> Iterator[tuple[int, float]]:
    """Yield number and time of generations. Raises ValueError; a line without its end does not count."""
    for line in text.split("\n"):
        if line.endswith(";"):
            number, _, time = line[:-1].partition(" ")
            yield int(number), float(time)


# --- what a unit declares ---------------------------------------------------------------------------------------------


def _packed(declared: Sequence[Declared]) -> bytes:
    """Return units as bytes: a line with the lengths of sections, and for whom units stand; then the sections."""
    every = list({id(d.sections): d.sections for d in declared}.values())
    blobs = [[getattr(s, part) for part in _PARTS] for s in every]
    told = [
        [next(i for i, s in enumerate(every) if s is d.sections), d.start, d.file, [astuple(v) for v in d.stands_for]]
        for d in declared
    ]
    head = json.dumps({"sections": [[len(b) for b in each] for each in blobs], "units": told}).encode()
    return head + b"\n" + b"".join(b for each in blobs for b in each)


def _read(directory: Path, index: _Index, known: set[int]) -> Iterator[tuple[int, Kept | None]]:
    """Yield what units declare, by generation; None where that cannot be read."""
    for (module, unit, generation), file in index.files.items():
        if generation in known:
            try:
                data = (directory / file.name).read_bytes()
                if zlib.crc32(data) != file.checksum:
                    raise ValueError("of another state")
                yield generation, Kept(module, unit, generation, _unpacked(data))
            except (OSError, ValueError, KeyError, IndexError, TypeError, PatcherError):
                yield generation, None


def _unpacked(data: bytes) -> tuple[Declared, ...]:
    head, _, rest = data.partition(b"\n")
    said: dict[str, Any] = json.loads(head)
    place, every = 0, []
    for lengths in said["sections"]:
        ends = list(accumulate(lengths, initial=place))
        blobs = [rest[start:end] for start, end in pairwise(ends)]
        place = ends[-1]
        info, abbreviations, strings, line_strings, offsets, addresses = blobs
        every.append(Sections(info, abbreviations, strings, line_strings, offsets, addresses))
    headers = [{h.start: h for h in units(s)} for s in every]
    found = []
    for number, start, file, variables in said["units"]:
        unit = Declared(every[number], headers[number][start])
        if variables:
            unit.stand_for(file, tuple(Variable(*v) for v in variables))
        found.append(unit)
    return tuple(found)
