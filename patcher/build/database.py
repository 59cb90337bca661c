"""Compilation databases: reading a compile_commands.json, and where one may lie.

Decides which entries are those of a source file (compared as files: links and odd spellings do not matter).
It does not choose between databases and does not change a command.
Specification: the JSON Compilation Database format (`directory`, `file`, `arguments` or `command`, `output`).
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from patcher.build.command import CompileCommand
from patcher.build.trust import check_trusted
from patcher.errors import NoCompileCommand

NAME = "compile_commands.json"
GET_A_DATABASE = (
    "run `bear -- make` in a clean tree, or cmake with -DCMAKE_EXPORT_COMPILE_COMMANDS=ON (meson and "
    "ninja -t compdb make it too), and give the compile_commands.json with --compile-commands"
)
_BESIDE = ("build", "cmake-build", "_build", "out")  # the first two with anything behind them
_ANYTHING_BEHIND = _BESIDE[:2]
_SETTLED_NS = 100_000_000  # a directory that changed later than this may have changed again within one tick


@dataclass(frozen=True, slots=True)
class _Entry:
    directory: Path
    path: Path  # of the source file, absolute, as written
    arguments: tuple[str, ...]


class Database:
    """One compile_commands.json; it is read again when the file changes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int, int] | None = None
        self._entries: tuple[_Entry, ...] = ()

    def commands(self, source: Path) -> tuple[CompileCommand, ...]:
        """Return all commands of a source file, in the file's order.

        Raises NoCompileCommand when the file cannot be read or is no compilation database.
        """
        self._refresh()
        likely = [entry for entry in self._entries if entry.path.name == source.name and _is_file(entry.path, source)]
        found = likely or [entry for entry in self._entries if _is_file(entry.path, source)]
        origin = str(self.path)
        file = source.resolve()
        return tuple(CompileCommand(entry.directory, entry.arguments, file, origin) for entry in found)

    def files(self) -> tuple[Path, ...]:
        """Return the source files it lists. Raises as `commands` does."""
        self._refresh()
        return tuple(dict.fromkeys(entry.path for entry in self._entries))

    def all_commands(self) -> tuple[CompileCommand, ...]:
        """Return every command, in the file's order; one that links is among them. Raises as `commands` does."""
        self._refresh()
        origin = str(self.path)
        return tuple(CompileCommand(entry.directory, entry.arguments, entry.path, origin) for entry in self._entries)

    def __len__(self) -> int:
        self._refresh()
        return len(self._entries)

    def _refresh(self) -> None:
        try:
            # Only a regular file: a pipe in its place must not block.
            with open(self.path, "rb", opener=_opener) as file:
                status = os.fstat(file.fileno())
                check_trusted(status, self.path)
                stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
                if stamp != self._stamp:
                    self._entries = tuple(_entries(self.path, file.read()))
                    self._stamp = stamp
        except OSError as error:
            raise NoCompileCommand(
                f"{self.path}: {error.strerror}", "give --compile-commands a file that is there"
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise NoCompileCommand(
                f"{self.path}: not a compilation database: {_reason(error)}", "make it again with the build system"
            ) from None


def find_databases(start: Path) -> Iterator[Path]:
    """Yield the databases in and beside a directory and all above it, the nearest first."""
    return places_near(start, NAME)


def places_near(start: Path, name: str) -> Iterator[Path]:
    """Yield the files of a name in a directory, in build directories beside it, and so on above, the nearest first."""
    for directory in (start, *start.parents):
        if (directory / name).is_file():
            yield directory / name
        for beside in _build_directories(str(directory)):
            if os.path.isfile(path := os.path.join(beside, name)):
                yield Path(path)


def _build_directories(directory: str) -> Iterator[str]:
    names = _told(directory, beside=True)
    yield from (os.path.join(directory, name) for name in names)
    if "out" in names:
        out = os.path.join(directory, "out")
        yield from (os.path.join(out, name) for name in _told(out, beside=False))


def _told(directory: str, *, beside: bool) -> tuple[str, ...]:
    """Return the names in a directory, or those that build directories have; large ones are listed when they change."""
    try:
        status = os.stat(directory)
        settled = time.time_ns() - status.st_mtime_ns > _SETTLED_NS
        listing = _listed if settled else _listed.__wrapped__
        return listing(directory, beside, status.st_mtime_ns, status.st_ino)
    except OSError:
        return ()


@lru_cache(maxsize=256)
def _listed(directory: str, beside: bool, *_: int) -> tuple[str, ...]:
    names = os.listdir(directory)
    if not beside:
        return tuple(sorted(names))
    found = (n for n in names if n.startswith(_ANYTHING_BEHIND) or n in _BESIDE)
    return tuple(sorted(found, key=lambda n: (next(i for i, begin in enumerate(_BESIDE) if n.startswith(begin)), n)))


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _entries(path: Path, text: bytes) -> Iterator[_Entry]:
    listed = json.loads(text)
    if not isinstance(listed, list):
        raise TypeError("the file is not a list")
    for number, entry in enumerate(listed):
        if not isinstance(entry, dict) or "file" not in entry:
            raise TypeError(f"entry {number} has no file")
        directory = Path(os.path.normpath(path.parent.absolute() / entry.get("directory", "")))
        yield _Entry(directory, directory / entry["file"], _arguments(entry, number))


def _arguments(entry: dict[str, Any], number: int) -> tuple[str, ...]:
    arguments = tuple(entry["arguments"]) if "arguments" in entry else tuple(shlex.split(entry.get("command", "")))
    if not arguments or not all(isinstance(word, str) for word in arguments):
        raise TypeError(f"entry {number} ({entry['file']}) has no command")
    return arguments


def _is_file(path: Path, source: Path) -> bool:
    try:
        return path.samefile(source)
    except OSError:
        return os.path.realpath(path) == os.path.realpath(source)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
