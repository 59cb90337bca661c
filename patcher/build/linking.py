"""How the running program was linked: its link line, and where the libraries that it names lie.

Decides where to look for a link line (an entry of a compilation database, CMake's link.txt, a build.ninja) and which
files `-l` stands for. It runs no build and no linker, and opens no ELF file.

Specification: ld(1) (-l, -L, `-l:`, linker scripts with GROUP and INPUT); the Ninja manual, "Build statements".
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from patcher.build.running import asked

_COMPILER_SECONDS = 20
_ABOVE = 4  # directories above the program in which a build may have its root
_COMMENT = re.compile(r"/\*.*?\*/", re.S)
_PUNCTUATION = re.compile(r"\bAS_NEEDED\b|[(),]")
_COMMAND = re.compile(r"\b(?:GROUP|INPUT)\s*\(([^()]*(?:\([^()]*\)[^()]*)*)\)")
_SHARED = re.compile(r".*\.so(\.[\w.]+)?$")
_WITH_VALUE = frozenset({"-o", "-L", "-l", "-T", "-u", "-e", "-z", "-x", "-Xlinker", "-MF", "-MT", "-MQ"})
_SCRIPT_BYTES = 64 << 10  # a linker script is short; anything longer is a library itself


@dataclass(frozen=True, slots=True)
class LinkLine:
    """What a program was linked from. `archives` and `libraries` in their order; `objects` by their paths."""

    origin: str
    objects: tuple[Path, ...]
    archives: tuple[Path, ...]
    libraries: tuple[Path, ...]


def find_link_line(program: Path, commands: Iterable[tuple[Path, tuple[str, ...]]], compiler: str) -> LinkLine | None:
    """Return how a program was linked, or None when nothing says so.

    `commands` are known command lines, each with its directory; `compiler` is asked for the libraries' places.
    """
    for origin, directory, arguments in _candidates(program, commands):
        return _read_line(origin, directory, arguments, compiler)
    return None


def _candidates(
    program: Path, commands: Iterable[tuple[Path, tuple[str, ...]]]
) -> Iterator[tuple[str, Path, tuple[str, ...]]]:
    for directory, arguments in commands:
        if "-c" not in arguments and _output(directory, arguments) == program:
            yield "the compile commands", directory, arguments
    for root in (program.parent, *program.parent.parents[: _ABOVE - 1]):
        for file in sorted(root.glob("CMakeFiles/*/link.txt")):
            for line in _lines(file):
                arguments = _split(line)
                if _output(root, arguments) == program:
                    yield str(file), root, arguments
        ninja = root / "build.ninja"
        if ninja.is_file():
            for arguments in _ninja_edges(ninja, program):
                yield str(ninja), root, arguments


def _output(directory: Path, arguments: Sequence[str]) -> Path | None:
    for word, following in zip(arguments, (*arguments[1:], ""), strict=True):
        if word == "-o" and following:
            return Path(os.path.realpath(directory / following))
    return None


def _lines(file: Path) -> Iterator[str]:
    try:
        yield from file.read_text(errors="replace").splitlines()
    except OSError:
        return


def _split(line: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(line))
    except ValueError:
        return ()


def _ninja_edges(file: Path, program: Path) -> Iterator[tuple[str, ...]]:
    """Yield the inputs of the build statement that makes the program, with the words of its variables."""
    unfolded = "\n".join(_lines(file)).replace("$\n", "").splitlines()
    for number, line in enumerate(unfolded):
        if not line.startswith("build "):
            continue
        outputs, separator, inputs = line.removeprefix("build ").partition(":")
        made = {os.path.realpath(file.parent / _ninja_word(word)) for word in outputs.split()}
        if not separator or str(program) not in made:
            continue
        words = [_ninja_word(word) for word in inputs.split()[1:] if word not in ("|", "||")]
        for variable in unfolded[number + 1 :]:
            if not variable.startswith(" "):
                break
            words += _split(variable.partition("=")[2].strip())
        yield tuple(words)


def _ninja_word(word: str) -> str:
    return word.replace("$ ", " ").replace("$:", ":").replace("$$", "$")


def _read_line(origin: str, directory: Path, arguments: tuple[str, ...], compiler: str) -> LinkLine:
    words = list(_linker_words(arguments))
    places = [directory / word[2:] for word in words if word.startswith("-L") and len(word) > 2]
    static = "-static" in words or "-static-pie" in words
    objects: list[Path] = []
    found: list[Path] = []
    for word in words:
        path = directory / word
        if word.startswith("-l"):
            found += locate_library(word[2:], places, compiler, static=static)
        elif not word.startswith("-") and path.suffix in (".o", ".lo", ".obj"):
            objects.append(path)
        elif not word.startswith("-") and (path.suffix == ".a" or _SHARED.match(path.name)) and path.is_file():
            found += _resolved(path, places, compiler, static)
    archives = tuple(dict.fromkeys(p for p in found if p.suffix == ".a"))
    return LinkLine(origin, tuple(objects), archives, tuple(dict.fromkeys(p for p in found if _SHARED.match(p.name))))


def _linker_words(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the arguments one by one, -l and -L joined with their values, what goes to the linker taken apart."""
    rest = iter(arguments)
    for word in rest:
        if word.startswith("-Wl,"):
            yield from _linker_words(word.split(",")[1:])
        elif word in ("-l", "-L", "-Xlinker"):
            yield ("" if word == "-Xlinker" else word) + next(rest, "")
        elif word in _WITH_VALUE:
            next(rest, None)
        else:
            yield word


def locate_library(name: str, places: Sequence[Path], compiler: str, *, static: bool = False) -> tuple[Path, ...]:
    """Return the files that a library's name stands for: more than one where it is a linker script, or none.

    `name` is what -l has (`m`, `:libm.so.6`), or a file's name (`libm.so.6`). `places` come before the compiler's own.
    """
    path = _find(name, places, compiler, static)
    return () if path is None else _resolved(path, places, compiler, static)


def _find(name: str, places: Sequence[Path], compiler: str, static: bool) -> Path | None:
    if name.startswith(":"):
        files = [name[1:]]
    elif name.startswith("lib") and (name.endswith(".a") or _SHARED.match(name)):
        files = [name]
    else:
        files = [f"lib{name}.a"] if static else [f"lib{name}.so", f"lib{name}.a"]
    own = (place / file for place in places for file in files if (place / file).is_file())
    theirs = (path for file in files if (path := file_of_compiler(compiler, file)) is not None)
    return next(own, None) or next(theirs, None)


def _resolved(path: Path, places: Sequence[Path], compiler: str, static: bool) -> tuple[Path, ...]:
    """Return the files that a library stands for: itself, or those that its linker script names."""
    found: list[Path] = []
    seen: set[Path] = set()
    work = [path]
    while work:
        path = work.pop(0)
        if path in seen:
            continue
        seen.add(path)
        listed = _script(path)
        if listed is None:
            found.append(path)
            continue
        for word in listed:
            beside = path.parent / word
            named = beside if beside.is_file() else _find(word.removeprefix("-l"), places, compiler, static)
            work += [named] if named is not None else []
    return tuple(found)


def _script(path: Path) -> tuple[str, ...] | None:
    """Return the files that a linker script names, or None for a library."""
    try:
        with path.open("rb") as file:
            start = file.read(_SCRIPT_BYTES + 1)
    except OSError:
        return None  # whoever wants the library finds out
    if start[:4] == b"\x7fELF" or start[:7] in (b"!<arch>", b"!<thin>") or len(start) > _SCRIPT_BYTES:
        return None
    text = _COMMENT.sub(" ", start.decode("utf-8", "replace"))
    return tuple(word for listed in _COMMAND.findall(text) for word in _PUNCTUATION.sub(" ", listed).split())


@lru_cache(maxsize=256)
def file_of_compiler(compiler: str, name: str) -> Path | None:
    """Return where a compiler finds one of its own files or libraries, or None."""
    try:
        done = asked([compiler, f"-print-file-name={name}"], _COMPILER_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    said = done.stdout.decode("utf-8", "replace").strip()
    path = Path(os.path.realpath(said)) if "/" in said else None
    return path if path is not None and path.is_file() else None
