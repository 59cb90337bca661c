"""What a precompiled preamble was made from, and whether it would be made from the same again.

Decides by the files' stamps, and by names: a header that appears where the compiler looks earlier, or one that
`__has_include` asked for, changes the meaning without a change of any file that was read.
Specification: gcc(1) -MD, -v; cpp(1) "Search Path".
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from patcher.build.dependencies import named_files
from patcher.build.preamble.text import spoils

_LIMIT = 8192  # places looked at, each time the preamble is used
_HAS_INCLUDE = re.compile(rb"__has_include(?:_next)?\s*\(\s*(?:[<\"]([^>\"\n]+)[>\"]|(\w))")
_DEFINES_HAS_INCLUDE = re.compile(rb"define\s+__has_include\w*\s*\([^)\n]*\)")
_IGNORED = re.compile(r'^ignoring nonexistent directory "(.*)"$', re.M)
_SEARCHED = re.compile(r"^#include .*? search starts here:\n(?s:(.*?))(?=^#include|^End of search list)", re.M)

_SYSTEM = ("/usr/include/", "/usr/lib/")

Stamp = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class _Place:
    """A directory with the names that are looked for in it, and those that are there."""

    path: str
    stamp: Stamp | None
    names: frozenset[str]
    present: frozenset[str]


@dataclass(frozen=True, slots=True)
class Inputs:
    """The files that were read, and the places in which the compiler looks for their names."""

    files: tuple[tuple[str, Stamp], ...]
    places: tuple[_Place, ...]

    def unchanged(self) -> bool:
        """Tell whether the same files would be read, with the same contents."""
        return all(stamp_of(path) == stamp for path, stamp in self.files) and all(map(_says_the_same, self.places))


def stamp_of(path: str | Path) -> Stamp | None:
    """Return what changes with a file's contents, or None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def inputs_of(files: Sequence[str], searched: Sequence[str], source_directory: str, *, before: int) -> Inputs | str:
    """Stamp the files that a compiler read, named absolutely, and the places where it looked for them.

    `before` is when it began, in nanoseconds since the epoch: what changed later may not be what it read. Returns the
    reason where the files' meaning depends on more than their contents.
    """
    stamps = [(path, stamp_of(path)) for path in files]
    late = next((path for path, stamp in stamps if stamp is None or max(stamp[:2]) >= before), None)
    if late is not None:
        return f"{late} changed meanwhile"
    asked: set[str] = set()
    for path in files:
        text = _read(path)
        if spoils(text) and not _only_goes_on(path, text, searched, source_directory):
            return f"{path} depends on when or where it is compiled"
        names = _asked_for(text)
        if names is None:
            return f"{path} looks for a header by a computed name"
        asked |= names
    places = tuple(_places(files, asked, searched, source_directory))
    if len(places) > _LIMIT:
        return f"{len(places)} places are searched for headers"
    return Inputs(tuple((path, stamp) for path, stamp in stamps if stamp is not None), places)


def files_of(rule: str, directory: Path) -> tuple[str, ...]:
    """Return the files of a rule that the compiler wrote (-MD), absolute, without the one that was compiled."""
    return tuple(dict.fromkeys(os.path.join(directory, name) for name in named_files(rule)[1:]))


def searched_directories(said: str, directory: Path) -> tuple[str, ...]:
    """Return where a compiler searches for headers, from what it says under -v; those that do not exist as well."""
    listed = [line.strip() for found in _SEARCHED.findall(said) for line in found.splitlines()]
    listed += _IGNORED.findall(said)
    return tuple(dict.fromkeys(os.path.realpath(os.path.join(directory, name)) for name in listed))


def _only_goes_on(path: str, text: bytes, searched: Sequence[str], source_directory: str) -> bool:
    """Tell whether a header spoils nothing: it goes on to the next of its name, from a directory that is searched."""
    real = os.path.realpath(path)
    found_by_search = any(real.startswith(place + "/") for place in searched if place != source_directory)
    return found_by_search and not spoils(text.replace(b"include_next", b"include"))


def _asked_for(text: bytes) -> set[str] | None:
    found = _HAS_INCLUDE.findall(_DEFINES_HAS_INCLUDE.sub(b"", text)) if b"__has_include" in text else []
    if any(computed for _, computed in found):
        return None
    return {os.fsdecode(name) for name, _ in found}


def _places(
    files: Sequence[str], asked: Iterable[str], searched: Sequence[str], source_directory: str
) -> Iterator[_Place]:
    # a header that is named in quotes is looked for beside the one that names it; the system's name none so
    real = [os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)) for path in files]
    beside = {os.path.dirname(path) for path in real if not path.startswith(_SYSTEM)}
    roots = tuple(dict.fromkeys([source_directory, *beside, *searched]))
    names = {path[len(root) + 1 :] for path in real for root in roots if path.startswith(root + "/")}
    wanted: dict[str, set[str]] = {}
    for name in (*names, *asked):
        head, tail = os.path.split(name)
        wanted.setdefault(head, set()).add(tail)
    directories: dict[str, set[str]] = {}
    for root in roots:
        for head, tails in wanted.items():
            directories.setdefault(os.path.normpath(os.path.join(root, head)), set()).update(tails)
    for path, tails in directories.items():
        found = frozenset(tails)
        yield _Place(path, stamp_of(path), found, _present(path, found))


def _says_the_same(place: _Place) -> bool:
    return stamp_of(place.path) == place.stamp or _present(place.path, place.names) == place.present


def _present(path: str, names: frozenset[str]) -> frozenset[str]:
    return frozenset(name for name in names if os.path.exists(os.path.join(path, name)))


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""
