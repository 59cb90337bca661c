"""PROBING: what types a unit sees names have that its debug information does not declare.

clang describes no variable of another unit. A text that is the unit's own with a struct behind it for each such
variable, which has a member of its type, tells that in its debug information; it is compiled without optimisation, and
only if something may have changed since the last time that decides about types (`outline`, and the files that are
included). Decides nothing about the types. Specification: clang(1), `-fstandalone-debug`: types are described in full
wherever they are used.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from patcher.build.command import ASSEMBLY, CompileCommand, is_cpp
from patcher.build.compiler import Compiler
from patcher.build.dependencies import named_files
from patcher.build.outline import outline
from patcher.build.toolchain import Family, identify
from patcher.errors import BuildError

PREFIX = "patcher_type_"
_FILE = "patcher-probe"
_LINE = re.compile(rf"^{_FILE}:(\d+):", re.MULTILINE)
_OPTIONS = (
    *("-g", "-gno-split-dwarf", "-fstandalone-debug", "-fno-debug-types-section", "-fno-access-control"),
    *("-ferror-limit=0", "-fno-color-diagnostics"),
)
_EVERY_TYPE = "-fno-eliminate-unused-debug-types"  # that of a name that only a function knows is among them
_TICK = 20_000_000  # nanoseconds by which times of files may be behind
_LEVEL = re.compile(r"-O(.*)")

Stamp = tuple[str, int, int, int]  # a file's path, inode, size and time


@dataclass(frozen=True, slots=True)
class Probed:
    """An object that has structs `PREFIX` + index, whose member `value` is as a name; `missing` are not to be had."""

    object: bytes
    missing: frozenset[int]


@dataclass(frozen=True, slots=True)
class _Seen:
    """What decided about the types when a unit was probed."""

    names: tuple[str, ...]
    outline: bytes
    files: tuple[Stamp, ...]
    answer: Probed


class Probes:
    """Probes units, each as seldom as can be."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler
        self._seen: dict[CompileCommand, _Seen] = {}

    def ask(self, command: CompileCommand, names: tuple[str, ...], listing: str) -> Probed | None:
        """Return what types the names have; None when that cannot be asked: another compiler, or it refuses the text.

        `listing` is that of the unit as it was just compiled; "" when it is not known.
        """
        if command.file.suffix in ASSEMBLY or _family(command) is not Family.CLANG:
            return None
        text = command.file.read_bytes()
        seen, outlined = self._seen.get(command), outline(text)
        unchanged = seen is not None and listing and (names, outlined) == (seen.names, seen.outline)
        if seen is not None and unchanged and _stamps(command, named_files(listing)) == seen.files:
            return seen.answer
        self._seen.pop(command, None)
        began = time.time_ns() - _TICK
        try:
            answer, files = self._probed(command, names, text)
        except BuildError:
            return None
        if all(written < began for *_, written in files):  # else it may not be what was read
            self._seen[command] = _Seen(names, outlined, files, answer)
        return answer

    def _probed(self, command: CompileCommand, names: Sequence[str], text: bytes) -> tuple[Probed, tuple[Stamp, ...]]:
        missing: frozenset[int] = frozenset()
        while True:
            lines = [_line(command, i, name) if i not in missing else "" for i, name in enumerate(names)]
            probe = text + f'\n#line 1 "{_FILE}"\n'.encode() + "\n".join(lines).encode() + b"\n"
            try:
                every = (_EVERY_TYPE,) if missing else ()
                unit = self._compiler.compile(command, text=probe, options=(*_OPTIONS, *_cheap(command), *every))
            except BuildError as error:
                failed = {int(line) - 1 for line in _LINE.findall(error.diagnostics)} - missing
                if not failed:
                    raise
                missing |= failed
                continue
            files = _stamps(command, named_files(unit.listing), unit.object.parent)
            found = Probed(unit.object.read_bytes(), missing)
            self._compiler.discard(unit)
            return found, files


def _family(command: CompileCommand) -> Family:
    return identify(command.arguments, command.directory).family


def _line(command: CompileCommand, index: int, name: str) -> str:
    # That of a static member need not be complete, and may be a reference.
    static = "static " if is_cpp(command) else ""
    return f"struct {PREFIX}{index} {{ {static}__typeof__({name}) value; }} {PREFIX}{index};"


def _cheap(command: CompileCommand) -> tuple[str, ...]:
    """Return the switches that turn optimisation off, where texts cannot tell that it is."""
    level = next((found[1] for w in reversed(command.arguments) if (found := _LEVEL.fullmatch(w))), "0")
    if level == "0":
        return ()
    if level not in ("", "1", "2", "3", "g", "s", "z"):
        return ("-Xclang", "-disable-llvm-passes")
    small = ("-D__OPTIMIZE_SIZE__=1",) if level in ("s", "z") else ()
    return ("-O0", "-D__OPTIMIZE__=1", "-U__NO_INLINE__", *small)


def _stamps(command: CompileCommand, files: Sequence[str], ours: Path | None = None) -> tuple[Stamp, ...]:
    """Return the states of included files, save that of the text itself, which is known by its outline."""
    found = set()
    for path in {command.directory / file for file in files}:
        if ours is not None and path.is_relative_to(ours):
            continue
        try:
            state = path.stat()
        except OSError:
            found.add((str(path), 0, 0, 0))
            continue
        if path.name != command.file.name or path.resolve() != command.file:
            found.add((str(path), state.st_ino, state.st_size, state.st_mtime_ns))
    return tuple(sorted(found))
