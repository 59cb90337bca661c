"""Who includes what: for each unit, the files that its compile read.

Decides which units a saved header touches, from what is known of each unit: what our own compile of it read, the
dependency file that the user's build left beside the object, the deps log of ninja, or the compiler's own listing. A
record of the user's build counts only while everything that it names is older than it, as make has it. Does not run a
compiler (`gathering`).
Specification: gcc(1), -M and -MF; the Ninja manual, "C/C++ header dependencies" and "-t deps".
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from patcher.build.command import CompileCommand, object_of
from patcher.build.running import asked

_WORD = re.compile(r"(?:\\[ #]|\$\$|\\(?!\s)|[^\s\\])+")
_RULE = re.compile(r"(?<!\\):(?=\s|$)")
_NINJA_SECONDS = 20


class Dependencies:
    """The files that units are known to include. Any thread may ask, and add."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._included: dict[Path, frozenset[Path]] = {}
        self._listings: dict[Path, tuple[str, Path]] = {}  # not looked at yet: nobody may ever ask

    def learn(self, unit: Path, files: Iterable[Path]) -> None:
        """Note all that a compile of a unit read; what was known of it before is forgotten."""
        found = frozenset(files)
        with self._lock:
            self._included[unit] = found

    def learn_listing(self, unit: Path, text: str, directory: Path) -> None:
        """Note what the dependency file says that a compile of a unit just wrote; nothing when it wrote none."""
        if text:
            with self._lock:
                self._listings[unit] = text, directory

    def learn_first(self, unit: Path, files: Iterable[Path]) -> None:
        """Note what a unit includes if nothing is known of it: what its own compile told is never older."""
        found = frozenset(files)
        with self._lock:
            if unit not in self._listings:
                self._included.setdefault(unit, found)

    def knows(self, unit: Path) -> bool:
        """Tell whether it is known what a unit includes."""
        with self._lock:
            return unit in self._included or unit in self._listings

    def of(self, unit: Path) -> frozenset[Path]:
        """Return what a unit is known to include, itself among it."""
        with self._lock:
            self._look_at_listings()
            return self._included.get(unit, frozenset())

    def forget(self) -> None:
        """Forget all: units are compiled otherwise now."""
        with self._lock:
            self._included.clear()
            self._listings.clear()

    def includers(self, header: Path, *, new: bool = False) -> frozenset[Path]:
        """Return the known units that include a file.

        A file that is `new` may be found before another of its name: units that include that one count.
        """
        with self._lock:
            self._look_at_listings()
            known = tuple(self._included.items())
        found = frozenset(unit for unit, files in known if header in files and unit != header)
        if found or not new:
            return found
        named = ((unit, {file for file in files if file.name == header.name}) for unit, files in known)
        return frozenset(unit for unit, files in named if files - {unit})

    def _look_at_listings(self) -> None:
        for unit, (text, directory) in self._listings.items():
            self._included[unit] = frozenset(prerequisites(text, directory))
        self._listings.clear()


@dataclass(frozen=True, slots=True)
class Record:
    """What the user's build noted of one compile, and when (nanoseconds since the epoch)."""

    written: int
    files: tuple[Path, ...]

    def is_current(self) -> bool:
        """Tell whether nothing that was read has changed since: another compile would read the same."""
        try:
            return bool(self.files) and all(os.stat(file).st_mtime_ns <= self.written for file in self.files)
        except OSError:
            return False


def prerequisites(text: str, directory: Path) -> tuple[Path, ...]:
    """Return the files that the rules of a dependency file name, resolved; relative ones are below `directory`."""
    return _resolved(named_files(text), directory)


def named_files(text: str) -> tuple[str, ...]:
    """Return what the rules of a dependency file name behind their colons, each once, as it is written there."""
    words: list[str] = []
    for line in text.replace("\\\r\n", " ").replace("\\\n", " ").split("\n"):
        rule = _RULE.split(line, maxsplit=1)
        words += _WORD.findall(rule[1]) if len(rule) == 2 else []
    return tuple(re.sub(r"\\([ #])", r"\1", word).replace("$$", "$") for word in dict.fromkeys(words))


def _resolved(names: Iterable[str], directory: Path) -> tuple[Path, ...]:
    places: dict[str, str] = {}  # headers come by the hundred from a few directories
    found = []
    for name in names:
        place, base = os.path.split(os.path.join(directory, name))
        if place not in places:
            places[place] = os.path.realpath(place)
        path = os.path.join(places[place], base)
        found.append(Path(os.path.realpath(path) if os.path.islink(path) else path))
    return tuple(dict.fromkeys(found))


def read_listing(file: Path) -> str:
    """Return the text of a dependency file, "" where there is none."""
    try:
        return file.read_text("utf-8", "surrogateescape")
    except OSError:
        return ""


def beside_object(command: CompileCommand) -> Record | None:
    """Return what the dependency file of a compile says, which -MD or -MF had written; None where there is none."""
    for file in _places(command):
        try:
            written = file.stat().st_mtime_ns
        except OSError:
            continue
        files = prerequisites(read_listing(file), command.directory)
        if command.file in files:
            return Record(written, files)
    return None


def _places(command: CompileCommand) -> Iterator[Path]:
    words = command.arguments
    for word, following in zip(words, (*words[1:], ""), strict=True):
        named = following if word == "-MF" else word[3:] if word.startswith("-MF") else ""
        if named:
            yield command.directory / named
    made = object_of(command)
    if made is not None:
        yield made.with_suffix(".d")
        yield made.with_name(made.name + ".d")
        yield made.parent / ".deps" / f"{made.stem}.Po"  # automake
        yield made.parent / ".deps" / f"{made.stem}.d"


def noted_by_ninja(directory: Path) -> dict[Path, Record]:
    """Return what ninja noted of the objects of a build directory: nothing where it is none, or ninja is not there."""
    if not (directory / ".ninja_deps").is_file():
        return {}
    try:
        # -n: otherwise the log would be opened for writing, and written anew when that is due
        done = asked(["ninja", "-n", "-t", "deps"], _NINJA_SECONDS, directory=directory)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(_ninja_records(done.stdout.decode("utf-8", "surrogateescape"), directory))


_NINJA_HEAD = re.compile(r"(.*): #deps \d+, deps mtime (\d+) \((VALID|STALE)\)")


def _ninja_records(listed: str, directory: Path) -> Iterator[tuple[Path, Record]]:
    for block in listed.split("\n\n"):
        head, *lines = block.strip("\n").split("\n")
        found = _NINJA_HEAD.fullmatch(head)
        if found and found[3] == "VALID":
            files = _resolved((line.removeprefix("    ") for line in lines), directory)
            yield Path(os.path.realpath(directory / found[1])), Record(int(found[2]), files)
