"""Finding the command that compiles a source file.

Decides where to look and in which order: a compilation database that was given, those near the watched paths and the
program, the files that a build works by, the program's debug information. It runs no build.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from patcher.build.buildfiles import BuildFiles
from patcher.build.command import CompileCommand, is_unit
from patcher.build.database import GET_A_DATABASE, NAME, Database, find_databases
from patcher.build.debuginfo import DebugInformation
from patcher.errors import NoCompileCommand


class Commands:
    """Finds compile commands for one target, and remembers what it read."""

    def __init__(
        self,
        *,
        compile_commands: Path | None = None,
        watched: Sequence[Path] = (),
        programs: Sequence[Path] = (),
        program_names: Sequence[Path] = (),
    ) -> None:
        """`programs` are paths that can be opened (`/proc/PID/exe` is one); `program_names` say, in the same order,
        what the user calls them, and where they lie; by default what the paths lead to.
        """
        self._given = Database(compile_commands.absolute()) if compile_commands else None
        self._watched = tuple(path.absolute() for path in watched)
        names = list(program_names) + [_place_of(program) for program in programs[len(program_names) :]]
        self._debug = tuple(DebugInformation(program, name) for program, name in zip(programs, names, strict=False))
        self._starts = tuple(
            dict.fromkeys([_directory_of(path) for path in watched] + [_above(name) for name in names])
        )
        self._databases: dict[Path, Database] = {}
        self._build_files = BuildFiles(self._starts)

    def find(self, source: Path) -> CompileCommand:
        """Return the command that compiles a source file, the first of several.

        Raises NoCompileCommand, which says what was tried and what to do.
        """
        return self.find_all(source)[0]

    def find_all(self, source: Path) -> tuple[CompileCommand, ...]:
        """Return every known command of a source file, at least one, best first. Raises NoCompileCommand."""
        source = source.absolute()
        tried: list[str] = []
        found = (
            self._in_databases(source, tried)
            or (self._given is None and self._build_files.commands(source, tried))
            or self._in_debug_information(source, tried)
        )
        if not found:
            raise NoCompileCommand(
                f"{source}: nothing says how it is compiled (tried: {'; '.join(tried) or 'nothing was there to try'})",
                GET_A_DATABASE,
            )
        return self._best_first(source, found)

    def listed(self) -> tuple[Path, ...]:
        """Return the source files that the given database lists; none without one. Raises NoCompileCommand."""
        return self._given.files() if self._given is not None else ()

    def recorded(self, source: Path, producer: str) -> bool:
        """Tell whether a program's debug information has a unit of a source file by this compiler and its switches."""
        return any(unit.producer == producer for program in self._debug for unit in program.units(source))

    def compiled_with(self, source: Path, switch: str) -> bool:
        """Tell whether a program's debug information has a switch like this one of a source file; clang tells none."""
        units = (unit for program in self._debug for unit in program.units(source))
        return any(word.startswith(switch) for unit in units for word in unit.producer.split())

    def stamp(self) -> tuple[tuple[str, int], ...]:
        """Return what changes when a database that was asked does."""
        asked = [self._given] if self._given is not None else list(self._databases.values())
        return tuple((str(d.path), _modified(d.path)) for d in asked)

    def known(self) -> tuple[CompileCommand, ...]:
        """Return every command of the given database, else of the nearest; none where there is no readable one."""
        places = self._near_all() if self._given is None else (self._given,)
        for database in places:
            try:
                return database.all_commands()
            except NoCompileCommand:
                continue
        return ()

    def _near_all(self) -> Iterator[Database]:
        for start in self._starts:
            for path in find_databases(start):
                yield self._databases.setdefault(path, Database(path))

    def find_each(self, sources: Sequence[Path]) -> list[CompileCommand]:
        """Return a command of each of several source files, as `find` does, with each build file asked once."""
        if len(sources) > 1:  # one is asked for as it is found
            self.foresee(sources)
        return [self.find(source) for source in sources]

    def foresee(self, sources: Iterable[Path]) -> None:
        """Ask build files for all of some source files at once, where those will be asked for them one by one."""
        if self._given is None:
            missing = [s.resolve() for s in sources if not self._in_databases(s.absolute(), [])]
            self._build_files.commands_of(missing, [])

    def every_unit(self) -> tuple[CompileCommand, ...]:
        """Return a command of each source file that anything says how to compile, and that is there; best first."""
        listed: dict[Path, list[CompileCommand]] = {}
        for command in self.known():
            file = Path(os.path.realpath(command.file))
            if is_unit(file) and file.is_file():
                listed.setdefault(file, []).append(replace(command, file=file))
        found = {file: self._best_first(file, tuple(commands))[0] for file, commands in listed.items()}
        recorded = {Path(os.path.realpath(unit.path)): unit for program in self._debug for unit in program.recorded()}
        named = recorded if recorded or found else self._watched_units()
        units = [file for file in named if file not in found and file.is_file()]
        if self._given is None:
            said = self._build_files.commands_of(units, [])
            found |= {file: self._best_first(file, commands)[0] for file, commands in said.items()}
        for program in self._debug:
            for unit in program.recorded():
                file = Path(os.path.realpath(unit.path))
                if file not in found and file.is_file():
                    with suppress(NoCompileCommand):
                        found[file] = program.command(unit, file)
        return tuple(found.values())

    def recorded_files(self) -> tuple[Path, ...]:
        """Return the source file of each unit that the programs have debug information of."""
        return tuple(Path(os.path.realpath(unit.path)) for program in self._debug for unit in program.recorded())

    def _watched_units(self) -> tuple[Path, ...]:
        """Return the source files below the watched places: who has no debug information does not tell its own."""
        found = (
            Path(os.path.join(place, name))
            for start in self._watched
            for place, _, names in os.walk(start)
            for name in sorted(names)
        )
        return tuple(dict.fromkeys(path.resolve() for path in found if is_unit(path)))

    def _best_first(self, source: Path, found: tuple[CompileCommand, ...]) -> tuple[CompileCommand, ...]:
        """Put those first that were run where one of the programs was compiled: another program may have it as well."""
        if len(found) < 2:
            return found
        places = {os.path.realpath(unit.directory) for program in self._debug for unit in program.units(source)}
        return tuple(sorted(found, key=lambda command: os.path.realpath(command.directory) not in places))

    def _in_databases(self, source: Path, tried: list[str]) -> tuple[CompileCommand, ...]:
        if self._given is not None:
            found = self._given.commands(source)  # what the user gave must be readable
            tried.append(f"{self._given.path}, which does not list it")
            return found
        for path in self._near(source):
            database = self._databases.setdefault(path, Database(path))
            try:
                found = database.commands(source)
                tried.append(f"{path}, which does not list it")
            except NoCompileCommand as error:
                found = ()
                tried.append(error.message)
            if found:
                return found
        if not tried:
            places = ", ".join(map(str, self._starts)) or source.parent
            tried.append(f"{NAME} in, above and in build directories beside {places}: none")
        return ()

    def _near(self, source: Path) -> Iterator[Path]:
        """Yield those read before, then all that lie near; a new one counts from the next save on."""
        known = tuple(path for path in self._databases if path.exists())
        yield from known
        seen = set(known)
        for start in (*self._starts, source.parent):
            for path in find_databases(start):
                if path not in seen:
                    seen.add(path)
                    yield path

    def _in_debug_information(self, source: Path, tried: list[str]) -> tuple[CompileCommand, ...]:
        reason: NoCompileCommand | None = None
        for program in self._debug:
            units = program.units(source)
            for unit in units:
                try:
                    return (program.command(unit, source),)
                except NoCompileCommand as error:
                    reason = error
            if not units:
                what = "does not name it" if len(program) else "is not there"
                tried.append(f"the debug information of {program.name}, which {what}")
        if reason is not None:
            raise NoCompileCommand(f"{reason.message} (tried before: {'; '.join(tried)})", reason.hint)
        return ()


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _place_of(program: Path) -> Path:
    """Return what a path such as /proc/PID/exe leads to."""
    try:
        return Path(os.readlink(program).removesuffix(" (deleted)")) if program.is_symlink() else program.absolute()
    except OSError:
        return program.absolute()


def _directory_of(path: Path) -> Path:
    return path.absolute() if path.is_dir() else path.absolute().parent


def _above(name: Path) -> Path:
    return name.absolute().parent
