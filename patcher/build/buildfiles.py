"""Compile commands from a build's own files, where nobody wrote a compile_commands.json.

Asks ninja (CMake, Meson and others), reads the makefiles that CMake wrote, and asks make what it would run were the
file newer. Nothing is built; but `make -n` runs what a makefile has in $(shell) and in recipes that begin with + or
call $(MAKE), and makes included files anew, as each use of that makefile does. So only files are believed that
nobody else can have written.
Specification: ninja's manual, "-t compdb"; GNU make's manual, "Instead of Executing Recipes"; shell(1) words.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

from patcher.build.command import CompileCommand
from patcher.build.database import places_near
from patcher.build.running import asked
from patcher.build.toolchain import is_driver, program_index
from patcher.build.trust import check_trusted
from patcher.errors import NoCompileCommand

_SECONDS = 10.0
_AT_ONCE = 200  # source files: their names are words of one command
_ABOVE = 5  # directories above a source in which a makefile may stand
_MAKEFILES = ("GNUmakefile", "makefile", "Makefile")
_DIRECTORY = re.compile(r"make(?:\[\d+\])?: (Entering|Leaving) directory '(.*)'")
_VARIABLE = re.compile(r"^(\w+) = (.*)$", re.M)
_USE = re.compile(r"\$\((\w+)\)")
_SAYING = ("echo", "printf", ":", "true")  # makefiles say which command they run
_ASSIGNED = re.compile(r"\w+=")
_COMPUTED = re.compile(r"`|\$")
# automake's: a source that may lie beside the sources rather than here
_HERE_OR_THERE = re.compile(r"""`test -f (['"]?)([^'"`$ ]+)\1 \|\| echo (['"]?)([^'"`$ ]*)\3`""")

_Stamp = tuple[int, ...]


class BuildFiles:
    """What the build files near some places say; each is asked again when it changes."""

    def __init__(self, starts: Sequence[Path]) -> None:
        self._starts = tuple(starts)
        self._known: dict[tuple[Path, Path], tuple[_Stamp, tuple[CompileCommand, ...]]] = {}

    def commands(self, source: Path, tried: list[str]) -> tuple[CompileCommand, ...]:
        """Return the commands of a source file, of the nearest build file that has some; `tried` gets who has none."""
        source = source.resolve()
        return self.commands_of([source], tried).get(source, ())

    def commands_of(self, sources: Iterable[Path], tried: list[str]) -> dict[Path, tuple[CompileCommand, ...]]:
        """Return as `commands` does for those of many source files, given resolved, that have some.

        A build file is asked for all at once.
        """
        places = {source: self._files(source) for source in dict.fromkeys(sources)}
        found: dict[Path, tuple[CompileCommand, ...]] = {}
        while places:
            nearest: dict[Path, list[Path]] = {}
            for source, files in tuple(places.items()):
                file = next(files, None)
                if file is not None:
                    nearest.setdefault(file, []).append(source)
                else:
                    del places[source]
            for file, those in nearest.items():
                try:
                    said = self._ask(file, those)
                except NoCompileCommand as error:
                    tried.append(error.message)
                    continue
                found |= said
                if len(said) < len(those):
                    tried.append(f"{file}, which does not compile it")
            for source in found.keys() & places.keys():
                del places[source]
        return found

    def _files(self, source: Path) -> Iterator[Path]:
        seen: dict[Path, None] = {}
        for start in (*self._starts, source.parent):
            for name in ("build.ninja", "CMakeCache.txt"):
                seen.update(dict.fromkeys(places_near(start, name)))
        for start in (source.parent, *self._starts):
            seen.update(dict.fromkeys(_makefiles(start)))
        yield from (path for path in seen if not _is_cmakes(path))

    def _ask(self, file: Path, sources: Sequence[Path]) -> dict[Path, tuple[CompileCommand, ...]]:
        """Return the commands that a build file has of some source files; those that it has none of are left out."""
        status = file.stat()
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        # a make that calls others may not tell them what to take for newer, but what was saved is newer by itself
        at_save = {source: (*stamp, _written(source)) for source in sources}
        known = {source: self._known.get((file, source), ((), ())) for source in sources}
        asked = [s for s, (at, said) in known.items() if at != (stamp if said else at_save[s])]
        for some in (asked[n : n + _AT_ONCE] for n in range(0, len(asked), _AT_ONCE)):
            check_trusted(status, file)
            check_trusted(file.parent.stat(), file.parent)
            said: dict[Path, list[CompileCommand]] = {source: [] for source in some}
            for command in _ASKING[file.name](file, some):
                said[command.file].append(command)
            for source, commands in said.items():
                known[source] = (stamp if commands else at_save[source], tuple(commands))
                self._known[file, source] = known[source]
        return {source: commands for source, (_, commands) in known.items() if commands}


def _ask_ninja(file: Path, sources: Sequence[Path]) -> Iterator[CompileCommand]:
    names = {source.name for source in sources}
    try:
        listed = json.loads(_said(("ninja", "-C", str(file.parent), "-t", "compdb", "-x"), file.parent) or "[]")
        pairs = [(str(e["command"]), Path(e["directory"])) for e in listed if os.path.basename(e["file"]) in names]
    except (ValueError, KeyError, TypeError) as error:
        raise NoCompileCommand(f"{file}: ninja -t compdb answers with what is no list of commands: {error}") from None
    for line, directory in pairs:
        yield from commands_in(line, directory, sources, f"{file} (ninja -t compdb)")


def _read_cmake(file: Path, sources: Sequence[Path]) -> Iterator[CompileCommand]:
    """Read the makefiles of each target: its commands name the switches by variables, which stand beside."""
    for makefile in sorted(file.parent.glob("**/CMakeFiles/*.dir/build.make")):
        text = makefile.read_text(errors="replace")
        if not any(str(source) in text for source in sources):
            continue
        variables = dict(_VARIABLE.findall(makefile.with_name("flags.make").read_text(errors="replace")))
        for line in text.splitlines():
            if line.startswith("\t") and " -c " in line:
                yield from commands_in(_substituted(line, variables), file.parent, sources, str(makefile))


def _substituted(line: str, variables: dict[str, str]) -> str:
    return _USE.sub(lambda use: variables.get(use[1], use[0]), line).replace("$$", "$").replace("\\#", "#")


def _ask_make(file: Path, sources: Sequence[Path]) -> Iterator[CompileCommand]:
    names = [name for source in sources for name in (os.path.relpath(source, file.parent), str(source))]
    newer = [word for name in names for word in ("-W", name)]
    # -W is not handed on to a make that this one calls, unless that is what it calls; it may work in their directory
    bare = [word for source in sources for word in ("-W", source.name)]
    calls = [f"MAKE={shlex.join(('make', *newer, *bare))}"] if not any("$" in name for name in names) else []
    said = _said(("make", "-n", "-w", "-f", file.name, "-o", file.name, *newer, *calls), file.parent)
    directories = [file.parent]
    for line in re.sub(r"\\\n\s*", " ", said).splitlines():
        moved = _DIRECTORY.fullmatch(line)
        if moved is None:
            yield from commands_in(line, directories[-1], sources, f"{file} (make -n)")
        elif moved[1] == "Entering":
            directories.append(Path(moved[2]))
        elif len(directories) > 1:
            directories.pop()


_ASKING = {"build.ninja": _ask_ninja, "CMakeCache.txt": _read_cmake, **dict.fromkeys(_MAKEFILES, _ask_make)}


def commands_in(line: str, directory: Path, sources: Collection[Path], origin: str) -> Iterator[CompileCommand]:
    """Yield the commands in a line for the shell that compile source files; none whose words the shell computes.

    Save for what automake has it compute: where a source is, and where dependencies are written, which is left out.
    """
    by_name: dict[str, list[Path]] = {}
    for source in sources:
        by_name.setdefault(source.name, []).append(source)
    if not any(name in line for name in by_name):
        return
    for words in _simple_commands(_HERE_OR_THERE.sub(partial(_place, directory), line)):
        if words[:1] == ("cd",) and len(words) == 2:
            directory = directory / words[1]
            continue
        start = next((at for at, word in enumerate(words) if not _ASSIGNED.match(word)), len(words))
        words = _without_computed_rule(words[start:])
        if not words or words[0] in _SAYING or any(map(_COMPUTED.search, words)):
            continue
        if "-c" not in words or not is_driver(words[program_index(words)]):
            continue
        named = {source for word in words[1:] for source in by_name.get(os.path.basename(word), ())}
        for source in named:
            if any(_is_file(directory, word, source) for word in words[1:]):
                yield CompileCommand(directory, words, source, origin)


def _place(directory: Path, found: re.Match[str]) -> str:
    return "" if (directory / found[2]).is_file() else found[4]


def _without_computed_rule(words: tuple[str, ...]) -> tuple[str, ...]:
    for at, (word, following) in enumerate(pairwise(words)):
        if word == "-MF" and _COMPUTED.search(following):
            return words[:at] + words[at + 2 :]
    return words


def _simple_commands(line: str) -> Iterator[tuple[str, ...]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = ""
    try:
        words = list(lexer)
    except ValueError:
        return  # a quotation that does not end: no command
    commands: list[list[str]] = [[]]
    for word in words:
        if word and set(word) <= set("();|&"):
            commands.append([])
        else:
            commands[-1].append(word)
    # what is behind a redirection is no argument, and a command that has one writes elsewhere
    yield from (tuple(found) for found in commands if not any(word and set(word) <= set("<>&") for word in found))


def _makefiles(start: Path) -> Iterator[Path]:
    """Yield the makefiles in a directory and above, up to the root of the tree under version control."""
    for directory in (start, *start.parents)[:_ABOVE]:
        if directory in (Path("/"), Path.home()):
            return
        yield from [directory / name for name in _MAKEFILES if (directory / name).is_file()][:1]
        if (directory / ".git").exists():
            return


def _is_cmakes(file: Path) -> bool:
    return file.name in _MAKEFILES and (file.parent / "CMakeFiles").is_dir()


def _is_file(directory: str | Path, name: str, source: Path) -> bool:
    return os.path.basename(name) == source.name and os.path.realpath(os.path.join(directory, name)) == str(source)


def _written(source: Path) -> int:
    """Return when a source file was written; 0 where it is not there any more: makefiles try a compiler on such."""
    try:
        return source.stat().st_mtime_ns
    except OSError:
        return 0


def _said(arguments: Sequence[str], directory: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    environment["LC_ALL"] = "C"  # the words looked for are translated otherwise
    try:
        done = asked(arguments, _SECONDS, directory=directory, environment=environment)
    except subprocess.TimeoutExpired:
        raise NoCompileCommand(f"{shlex.join(arguments)}: not done after {_SECONDS:.0f} seconds") from None
    except OSError as error:
        raise NoCompileCommand(f"{arguments[0]} cannot be run in {directory}: {error.strerror}") from None
    return os.fsdecode(done.stdout)
