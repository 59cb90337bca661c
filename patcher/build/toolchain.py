"""Which compiler a command runs: gcc or clang, of what version, with what include directories of its own.

Asks the compiler itself, once for each program file; names alone do not tell (`cc`). It decides nothing about switches.
Specification: gcc(1) `--version`, `-v`; the names of drivers as in gcc(1), clang(1).
"""

from __future__ import annotations

import enum
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from patcher.build.running import unstopped

_DRIVER = re.compile(r"(?:.*-)?(?:gcc|g\+\+|cc|c\+\+|clang|clang\+\+|clang-cl)(?:-\d+(?:\.\d+)*)?")
_VERSION = re.compile(r"(?:clang version |\) )(\d+)\.|\b(\d+)\.\d+")
_WRAPPER_WORDS = 6  # a wrapper with its own words comes first: `env LANG=C ccache gcc`


class Family(enum.Enum):
    """Whose compiler it is."""

    GCC = "gcc"
    CLANG = "clang"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Toolchain:
    """A compiler: the driver's program as the command writes it, its family and major version (0: unknown)."""

    program: str
    family: Family
    major: int


def program_index(arguments: Sequence[str]) -> int:
    """Return which argument is the compiler: the first one behind wrappers such as ccache that is named like one."""
    for index, word in enumerate(arguments[:_WRAPPER_WORDS]):
        if is_driver(word):
            return index
    return 0


def is_driver(program: str) -> bool:
    """Tell whether a program is named like a compiler that takes the switches of gcc."""
    return _DRIVER.fullmatch(os.path.basename(program)) is not None


def identify(arguments: Sequence[str], directory: Path) -> Toolchain:
    """Ask the compiler of a command who it is; a compiler that is not there, or does not say, is OTHER."""
    program = arguments[program_index(arguments)]
    path = _locate(program, directory)
    if path is None:
        return Toolchain(program, Family.OTHER, 0)
    family, major = _ask(path, os.stat(path).st_mtime_ns)
    return Toolchain(program, family, major)


def program_stamp(arguments: Sequence[str], directory: Path) -> tuple[int, int, int, int] | None:
    """Return what changes when the compiler of a command is replaced, or None when it is not there."""
    path = _locate(arguments[program_index(arguments)], directory)
    if path is None:
        return None
    status = os.stat(path)
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def include_directories(program: str, language: str) -> tuple[Path, ...]:
    """Return the compiler's own include directories for a language (`c` or `c++`), resolved, in its order."""
    path = _locate(program, Path.cwd())
    return () if path is None else _own_includes(path, language)


def _locate(program: str, directory: Path) -> str | None:
    if "/" in program:
        path = directory / program
        return str(path) if path.exists() else None
    return shutil.which(program)


@lru_cache(maxsize=64)
def _ask(path: str, _mtime: int) -> tuple[Family, int]:
    said = _output([path, "--version"])
    match = _VERSION.search(said)
    major = int(match[1] or match[2]) if match else 0
    if "clang" in said:
        return Family.CLANG, major
    if "Free Software Foundation" in said:
        return Family.GCC, major
    return Family.OTHER, major


@lru_cache(maxsize=16)
def _own_includes(path: str, language: str) -> tuple[Path, ...]:
    said = _output([path, "-x", language, "-E", "-v", "/dev/null"])
    _, _, listed = said.partition("#include <...> search starts here:")
    listed, _, _ = listed.partition("End of search list")
    return tuple(Path(os.path.realpath(line.strip())) for line in listed.splitlines() if line.strip())


def _output(arguments: Sequence[str]) -> str:
    environment = {**os.environ, "LC_ALL": "C"}  # the words looked for are translated otherwise
    try:
        with unstopped():
            done = subprocess.run(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=20,
                check=False,
            )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace")
