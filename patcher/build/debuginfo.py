"""Compile commands put together from a program's own debug information.

gcc records the code-changing switches of a unit in DW_AT_producer, the place in DW_AT_comp_dir and DW_AT_name, and
the directories of the headers it used in the line table. It does not record -D, nor -I as such: the line table's
directories stand in for those. clang records switches only with -grecord-command-line, and then all of them.
Only the top entry of each unit is read, once for each program.
Specification: DWARF 4 and 5, sections 3.1 (units) and 6.2 (line table); gcc(1) -grecord-gcc-switches;
clang(1) -grecord-command-line.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patcher.build.command import CompileCommand, is_unit
from patcher.build.database import GET_A_DATABASE
from patcher.build.toolchain import Family, identify, include_directories
from patcher.build.trust import check_trusted
from patcher.errors import NoCompileCommand

_GNU = re.compile(r"GNU (C\+\+|C)(?:\d\w*)? (\d+)\S*")
_ESCAPED_WORD = re.compile(
    r"(?:\\.|[^\\ ])+"
)  # clang puts a backslash before blanks and backslashes, not before quotes
# what the compiler adds by itself when it works in stages or for link-time optimisation
_OF_STAGES = ("-fpreprocessed", "-fdirectives-only", "-flto", "-fltrans", "-fwpa", "-fresolution", "-fno-lto")


@dataclass(frozen=True, slots=True)
class Recorded:
    """What debug information says about one unit."""

    name: str  # as it stood in the command
    directory: str
    producer: str
    program: Path  # whose debug information it is
    offset: int  # of the unit's header in .debug_info

    @property
    def path(self) -> str:
        """The source file, absolute, without `.` and `..`."""
        return os.path.normpath(os.path.join(self.directory, self.name))


class DebugInformation:
    """The units of one program or library (a path that can be opened); read on the first question."""

    def __init__(self, program: Path, name: Path | None = None) -> None:
        self.program = program
        self.name = name or program  # for messages
        self._by_basename: dict[str, list[Recorded]] | None = None
        self._status: os.stat_result | None = None  # of the file that was read
        self._tables: dict[int, tuple[str, ...]] | None = None

    def units(self, source: Path) -> tuple[Recorded, ...]:
        """Return what is recorded of a source file; nothing where there is no debug information to read."""
        known = self._named().get(source.name, [])
        exact = [unit for unit in known if unit.path == str(source)]
        return tuple(exact or [unit for unit in known if os.path.realpath(unit.path) == os.path.realpath(source)])

    def recorded(self) -> tuple[Recorded, ...]:
        """Return all units, in no order that means anything."""
        return tuple(unit for units in self._named().values() for unit in units)

    def __len__(self) -> int:
        return sum(map(len, self._named().values()))

    def extents(self) -> dict[int, tuple[tuple[int, int], ...]]:
        """Return where the code of each unit lies (by the unit's offset), as link-time addresses.

        Nothing for a unit whose ranges cannot be read.
        """
        from elftools.elf.elffile import ELFFile

        with self.program.open("rb") as file:
            dwarf = ELFFile(file).get_dwarf_info()
            return {unit.offset: _extents(dwarf, unit.offset) for unit in self.recorded()}

    def command(self, unit: Recorded, source: Path) -> CompileCommand:
        """Put a unit's compile command together. Raises NoCompileCommand when too little is recorded, saying what."""
        if self._status is not None:
            check_trusted(self._status, self.name)
        if not os.path.isdir(unit.directory):
            raise NoCompileCommand(
                f"{source}: {self.name} was compiled in {unit.directory}, which is not there",
                f"to say how to compile it here, {GET_A_DATABASE}",
            )
        gnu = _GNU.match(unit.producer)
        if gnu:
            arguments = _gnu_arguments(unit, gnu, self._include_directories(unit))
        elif "clang" in unit.producer:
            arguments = _clang_arguments(unit, source, self.name)
        else:
            raise NoCompileCommand(
                f"{source}: the debug information of {self.name} names a compiler that records no switches: "
                f"{unit.producer}",
                GET_A_DATABASE,
            )
        origin = f"debug information of {self.name}"
        return CompileCommand(Path(unit.directory), arguments, source.resolve(), origin, derived=gnu is not None)

    def _named(self) -> dict[str, list[Recorded]]:
        if self._by_basename is None:
            self._by_basename = {}
            self._status, units = _read_units(self.program)
            for unit in units:
                self._by_basename.setdefault(os.path.basename(unit.name), []).append(unit)
        return self._by_basename

    def _include_directories(self, unit: Recorded) -> tuple[str, ...]:
        """Return the directories of headers as a unit names them: its own, those above, then those of all others.

        A header of which a unit uses nothing but macros is not in its line table, but most likely in another's.
        """
        if self._tables is None:
            self._tables = _line_tables(self.program, self.recorded())
        near = [*self._tables[unit.offset], "."]
        above = [place for directory in near for place in _above(directory, unit.directory)]
        others = [
            _seen_from(unit.directory, os.path.join(other.directory, directory))
            for units in self._named().values()
            for other in units
            for directory in (*self._tables[other.offset], ".")
        ]
        return tuple(dict.fromkeys([*near, *above, *others]))


def _gnu_arguments(unit: Recorded, gnu: re.Match[str], directories: Iterable[str]) -> tuple[str, ...]:
    language, major = gnu[1], int(gnu[2])
    compiler = _gnu_compiler("g++" if language == "C++" else "gcc", major)
    switches = [word for word in _switches(unit.producer[gnu.end() :]) if not word.startswith(_OF_STAGES)]
    own = include_directories(compiler, "c++" if language == "C++" else "c")
    includes = _include_switches(directories, unit, own)
    # a suffix says the language, save where a C file was compiled by a C++ compiler
    explicit = ("-x", "c") if language == "C" and not unit.name.endswith(".c") else ()
    return (compiler, *switches, *includes, *explicit, "-c", unit.name)


def _switches(recorded: str) -> list[str]:
    """Split the switches; what stands before the first is the vendor's words: `20230605 (Red Hat 11.4.1-2) -O2`."""
    words = recorded.split()
    first = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    return words[first:]


def _gnu_compiler(name: str, major: int) -> str:
    """Choose `gcc`, or `gcc-11` where the former is of another version than recorded and the latter exists."""
    if shutil.which(name):
        found = identify((name,), Path.cwd())
        if found.family is Family.GCC and found.major == major:
            return name
    exact = f"{name}-{major}"
    return exact if shutil.which(exact) else name


def _clang_arguments(unit: Recorded, source: Path, program: Path) -> tuple[str, ...]:
    """Take what -grecord-command-line put behind the version: `clang version 14.0.6 /usr/bin/clang -O2`."""
    words = [re.sub(r"\\(.)", r"\1", word) for word in _ESCAPED_WORD.findall(unit.producer)]
    first = next((index for index, word in enumerate(words) if word.startswith("-")), 0)
    if first == 0 or "clang" not in words[first - 1]:
        raise NoCompileCommand(
            f"{source}: clang recorded no switches in the debug information of {program}", GET_A_DATABASE
        )
    return tuple(words[first - 1 :])


def _include_switches(directories: Iterable[str], unit: Recorded, own: tuple[Path, ...]) -> Iterator[str]:
    """Yield -I for directories of headers, each once, without the compiler's own.

    What lies below those comes last: it may be a package's, or a part of the C library.
    """
    late: list[str] = []
    seen: set[str] = set()
    for directory in directories:
        real = os.path.realpath(os.path.join(unit.directory, directory))
        path = Path(real)
        if real in seen or path in own or not path.is_dir() or _is_compilers(path, own):
            continue
        seen.add(real)
        if any(path.is_relative_to(place) for place in own):
            late += ["-idirafter", directory]
        else:
            yield f"-I{directory}"
    yield from late


def _is_compilers(path: Path, own: tuple[Path, ...]) -> bool:
    return any(
        place.name == "include" and place.parent.name.isdigit() and path.is_relative_to(place.parent) for place in own
    )


def _above(directory: str, compiled_in: str) -> Iterator[str]:
    """Yield the directories above, down to the last one that the compilation directory shares."""
    path = os.path.normpath(os.path.join(compiled_in, directory))
    shared = os.path.commonpath([path, compiled_in])
    while path != shared and len(shared) > 1:
        path = os.path.dirname(path)
        yield path if os.path.isabs(directory) else os.path.relpath(path, compiled_in)


def _seen_from(directory: str, path: str) -> str:
    """Return a path relative to a directory when both are parts of one tree, else the path."""
    path = os.path.normpath(path)
    shared = os.path.commonpath([path, directory])
    return os.path.relpath(path, directory) if len(Path(shared).parts) > 2 else path


def _read_units(program: Path) -> tuple[os.stat_result | None, tuple[Recorded, ...]]:
    from elftools.common.exceptions import DWARFError, ELFError  # 30 ms, and rarely needed
    from elftools.elf.elffile import ELFFile

    try:
        with program.open("rb") as file:
            elf = ELFFile(file)
            units = _units_of(elf.get_dwarf_info(), program) if elf.has_dwarf_info() else ()
            return os.fstat(file.fileno()), tuple(units)
    except (OSError, ELFError, DWARFError, KeyError, ValueError):
        return None, ()  # a missing or strange file says nothing; the search goes on elsewhere


def _units_of(dwarf: Any, program: Path) -> Iterator[Recorded]:
    for unit in dwarf.iter_CUs():
        top = unit.get_top_DIE()
        name, directory, producer = (_text(top, f"DW_AT_{key}") for key in ("name", "comp_dir", "producer"))
        if name and producer and is_unit(Path(name)):
            yield Recorded(name, directory, producer, program, unit.cu_offset)


def _extents(dwarf: Any, offset: int) -> tuple[tuple[int, int], ...]:
    """Read DW_AT_ranges, or DW_AT_low_pc and DW_AT_high_pc."""
    unit = dwarf.get_CU_at(offset)
    top = unit.get_top_DIE()
    low = top.attributes["DW_AT_low_pc"].value if "DW_AT_low_pc" in top.attributes else 0
    if "DW_AT_high_pc" in top.attributes:
        high = top.attributes["DW_AT_high_pc"]
        return ((low, high.value if high.form == "DW_FORM_addr" else low + high.value),)
    if "DW_AT_ranges" not in top.attributes:
        return ()
    entries = dwarf.range_lists().get_range_list_at_offset(top.attributes["DW_AT_ranges"].value, cu=unit)
    found, start = [], low
    for entry in entries:
        if hasattr(entry, "base_address"):
            start = entry.base_address
        else:
            begin = 0 if getattr(entry, "is_absolute", False) else start
            found.append((begin + entry.begin_offset, begin + entry.end_offset))
    return tuple(found)


def _text(entry: Any, key: str) -> str:
    value = entry.attributes[key].value if key in entry.attributes else b""
    return os.fsdecode(value) if isinstance(value, bytes) else ""


def _line_tables(program: Path, units: Iterable[Recorded]) -> dict[int, tuple[str, ...]]:
    """Return, for each unit's offset, the directories of the files in its line table, in the table's order."""
    from elftools.elf.elffile import ELFFile

    with program.open("rb") as file:
        dwarf = ELFFile(file).get_dwarf_info()
        return {unit.offset: _directories(dwarf.line_program_for_CU(dwarf.get_CU_at(unit.offset))) for unit in units}


def _directories(table: Any) -> tuple[str, ...]:
    return () if table is None else tuple(map(os.fsdecode, _plain(table.header["include_directory"])))


def _plain(directories: Iterable[Any]) -> Iterator[bytes]:
    for directory in directories:
        value = directory if isinstance(directory, bytes) else directory.DW_LNCT_path
        if isinstance(value, bytes):
            yield value
