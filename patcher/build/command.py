"""The command that compiles one unit, and how it is rewritten to make an object of ours.

Decides which of the user's switches stay, go or are added, so that the object has the user's own
code in sections of its own and none of the user's files (objects, dependency files, temporary
files) is written. It does not know where a command came from, nor does it run one.
Specification: gcc(1) and clang(1); the JSON compilation database format for `directory` and `file`.
"""

from __future__ import annotations

import enum
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from patcher.build.mirror import searched_first
from patcher.build.toolchain import Family, Toolchain, is_driver, program_index
from patcher.errors import BuildError, NoCompileCommand

SOURCE_SUFFIXES = frozenset({".c", ".cc", ".cpp", ".cxx", ".c++", ".cp", ".C", ".s", ".S", ".sx"})
ASSEMBLY = (".s", ".S", ".sx")
_C_SUFFIXES = (".c", ".i", *ASSEMBLY)
HEADER_SUFFIXES = frozenset({".h", ".hh", ".hpp", ".hxx", ".h++", ".H", ".inc", ".inl", ".ipp", ".tcc"})
LINE_SHIFT = 100_000


def _words(listed: str) -> frozenset[str]:
    return frozenset(listed.split())


_LINK_INPUTS = frozenset({".o", ".lo", ".obj", ".a", ".so", ".la"})
# the last three are refused by clang without -flto
_DROPPED = _words("""
    -c -S -E -M -MM -MD -MMD -MP -MG -fsyntax-only -fuse-linker-plugin -ffat-lto-objects -fno-fat-lto-objects
    -fwhole-program-vtables -fsplit-lto-unit -fvirtual-function-elimination
""")
_DROPPED_WITH_VALUE = _words("""
    -o -MF -MT -MQ -MJ -L -l -dumpdir -dumpbase -dumpbase-ext -aux-info --serialize-diagnostics
    -serialize-diagnostics
""")
_DROPPED_PREFIXES = (
    *("-o", "-MF", "-MT", "-MQ", "-MJ", "-L", "-l", "-Wl,", "-Wp,-M"),
    *("-flto", "-fno-lto", "-fthinlto-index", "-save-temps", "--save-temps"),
)
_KEPT_WITH_VALUE = _words("""
    -I -D -U -include -imacros -isystem -iquote -idirafter -iprefix -iwithprefix -iwithprefixbefore -isysroot
    -imultilib -x -T -u -e -z -A -B -G -F -iframework -framework -arch -target --param --sysroot -wrapper -Xlinker
    -Xassembler -Xpreprocessor -Xclang -mllvm -ivfsoverlay -include-pch -specs --config
""")
# Else a class is described only where its virtual functions are, or (clang) where one is constructed.
_WHOLE_CLASSES = {Family.GCC: ("-femit-class-debug-always",), Family.CLANG: ("-fstandalone-debug",)}
_STRICTNESS = ("-Werror", "-pedantic-errors")  # of no use where the text is not the file's own


@dataclass(frozen=True, slots=True)
class CompileCommand:
    """How one source file is compiled: no shell, `arguments` are given to the program as they are."""

    directory: Path
    arguments: tuple[str, ...]
    file: Path  # absolute and resolved
    origin: str  # where it was found, for messages
    derived: bool = False  # put together from debug information, which does not record -D


class Variant(enum.Flag):
    """In which way an object differs from what the user's command makes; they combine with `|`."""

    PLAIN = 0
    SHIFTED = enum.auto()  # every __LINE__ is 100,000 higher
    INDIRECT = enum.auto()  # the address of external data comes from the GOT
    LARGE = enum.auto()  # the large code model: everything is reached, wherever it is
    ASKING = enum.auto()  # where each thread has a thread-local variable is asked for, variable by variable


def is_unit(path: Path) -> bool:
    """Tell whether a file is compiled by itself (and is not a header)."""
    return path.suffix in SOURCE_SUFFIXES


def is_cpp(command: CompileCommand) -> bool:
    """Tell whether a command compiles C++."""
    driver = os.path.basename(command.arguments[program_index(command.arguments)])
    return command.file.suffix not in _C_SUFFIXES or "++" in driver


def is_header(path: Path) -> bool:
    """Tell whether a file is named like one that others include."""
    return path.suffix in HEADER_SUFFIXES


def object_arguments(
    command: CompileCommand,
    output: Path,
    *,
    toolchain: Toolchain | None = None,
    variant: Variant = Variant.PLAIN,
    text: Path | None = None,
    colour: bool = False,
    options: Sequence[str] = (),
    listing: Path | None = None,
    mirror: Path | None = None,
) -> tuple[str, ...]:
    """Rewrite a command so that it makes the object `output` and writes no other file of the user's.

    `text` is compiled in place of the source file (see `text_of`), `options` are added. `toolchain` must be given
    with a variant or a text, or for C++: classes are described in full then. What the compile reads is written to
    `listing`, where the compiler is one that can. Headers below `mirror` come before those of the same paths.
    Raises BuildError when the compiler cannot make the variant.
    """
    program, switches = _divided(command)
    named = input_argument(command)
    groups: Iterable[tuple[str, ...]] = (group for group in _groups(switches) if _stays(group, named))
    if mirror is not None:
        groups = searched_first(groups, mirror, command.directory)
    kept = [word for group in groups for word in group]
    front: tuple[str, ...] = ()
    if text is not None and toolchain is not None:
        kept = [str(text) if word == named else word for word in kept if not word.startswith(_STRICTNESS)]
        front = (*quoted_includes(named, text, toolchain), "-w")
    added = ["-ffunction-sections", "-fdata-sections", "-fno-lto"]
    if variant & Variant.INDIRECT and toolchain is not None:
        added.append(_indirect(toolchain))
    if variant & Variant.LARGE:
        added.append("-mcmodel=large")
    if variant & Variant.ASKING and toolchain is not None:
        added += _asking(command, toolchain)
    if toolchain is not None and is_cpp(command):
        added += _WHOLE_CLASSES.get(toolchain.family, ())
    if colour:
        added.append("-fdiagnostics-color=always")
    if listing is not None and is_driver(program[-1]):
        added += listing_switches(listing)
    added += [*options, "-c", "-o", str(output)]
    end = kept.index("--") if "--" in kept else len(kept)
    return (*program, *front, *kept[:end], *added, *kept[end:])


def listing_switches(listing: Path) -> tuple[str, ...]:
    """Return what has a compiler write what it reads to `listing`, besides its object."""
    return ("-MD", "-MF", str(listing))


def listing_arguments(command: CompileCommand, listing: Path) -> tuple[str, ...]:
    """Rewrite a command so that it only writes what a compile would read to `listing`; a missing header counts."""
    program, switches = _divided(command)
    named = input_argument(command)
    kept = [word for group in _groups(switches) if _stays(group, named) for word in group]
    end = kept.index("--") if "--" in kept else len(kept)
    return (*program, *kept[:end], "-w", "-M", "-MG", "-MF", str(listing), *kept[end:])


def object_of(command: CompileCommand) -> Path | None:
    """Return the object that a compile command makes, or None for a command that does not compile to one."""
    words = command.arguments
    if "-c" not in words:
        return None
    for word, following in zip(words, (*words[1:], ""), strict=True):
        if word == "-o" and following:
            return command.directory / following
        if word.startswith("-o") and len(word) > 2:
            return command.directory / word[2:]
    return command.directory / f"{command.file.stem}.o"


def input_argument(command: CompileCommand) -> str:
    """Return the argument that names the source file, as it is written.

    Raises NoCompileCommand when no argument does (it may stand in a response file).
    """
    _, switches = _divided(command)
    for group in _groups(switches):
        if len(group) == 1 and _names(group[0], command):
            return group[0]
    raise NoCompileCommand(
        f"{command.file}: its compile command ({command.origin}) does not name the file",
        "give a compile_commands.json whose command contains the source file itself, not a response file",
    )


def text_of(command: CompileCommand, contents: bytes, variant: Variant) -> bytes:
    """Return `contents` behind a #line that names the file as the command does, so __FILE__ stays as it is."""
    name = input_argument(command).replace("\\", "\\\\").replace('"', '\\"')
    first = 1 + (LINE_SHIFT if variant & Variant.SHIFTED else 0)
    return f'#line {first} "{name}"\n'.encode() + contents


def _divided(command: CompileCommand) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the compiler (with the wrappers before it) and its switches."""
    at = program_index(command.arguments)
    program = command.arguments[: at + 1]
    if "libtool" in {Path(word).name for word in program}:
        program = program[-1:]  # it would put objects into places of its own
    return program, tuple(_expanded(command.arguments[at + 1 :], command))


def _expanded(switches: Sequence[str], command: CompileCommand) -> Iterator[str]:
    """Yield the arguments; a response file stays as it is, unless it has what must go (-MF, -o) or the source."""
    for word in switches:
        try:
            inside = shlex.split((command.directory / word[1:]).read_text()) if word.startswith("@") else []
        except (OSError, ValueError):
            inside = []
        if all(_stays(group, "") and not _names(group[0], command) for group in _groups(inside)):
            yield word
        else:
            yield from _expanded(inside, command)


def _names(word: str, command: CompileCommand) -> bool:
    path = command.directory / word
    return not word.startswith(("-", "@")) and path.suffix != "" and _same(path, command.file)


def _groups(switches: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield the arguments one by one, a switch together with its separate value."""
    rest = iter(switches)
    for word in rest:
        if word in _KEPT_WITH_VALUE or word in _DROPPED_WITH_VALUE:
            value = next(rest, None)
            yield (word,) if value is None else (word, value)
        else:
            yield (word,)


def _stays(group: tuple[str, ...], named: str) -> bool:
    word = group[0]
    if word in _DROPPED or word in _DROPPED_WITH_VALUE:
        return False
    if word.startswith(_DROPPED_PREFIXES):
        return False
    if word.startswith(("-", "@")) or word == named:
        return True
    return Path(word).suffix not in SOURCE_SUFFIXES | _LINK_INPUTS


def _same(path: Path, file: Path) -> bool:
    try:
        return path.samefile(file)
    except OSError:
        return os.path.realpath(path) == str(file)


def quoted_includes(named: str, text: Path, toolchain: Toolchain) -> tuple[str, ...]:
    """Return the switches by which a text elsewhere finds, under the same names, what the file itself includes.

    gcc names the headers beside `a.c` "x.h", clang "./x.h". gcc forgets the last -iquote when it is the first -I
    as well, hence the second one, which is empty.
    """
    place = os.path.dirname(named)
    elsewhere = ("-iquote", str(text.parent))
    if place:
        return ("-iquote", place, *elsewhere)
    if toolchain.family is Family.CLANG:
        return ("-iquote", ".", *elsewhere)
    spelled = "./././."  # a spelling of "." that nobody else uses, to be taken away again
    return ("-iquote", spelled, *elsewhere, f"-fmacro-prefix-map={spelled}/=")


def _asking(command: CompileCommand, toolchain: Toolchain) -> tuple[str, ...]:
    """Return the switches for the general-dynamic model.

    Other than by an attribute, gcc cannot be kept from asking once for all static ones, nor, in an executable, from
    not asking at all; clang never can be for static ones.
    """
    if toolchain.family is Family.CLANG:
        return ("-fPIC", "-ftls-model=global-dynamic")
    if toolchain.family is Family.GCC:
        words = ("__thread", "thread_local" if is_cpp(command) else "_Thread_local")
        attribute = '__attribute__((__tls_model__("global-dynamic")))'
        return ("-w", *(f"-D{word}={word} {attribute}" for word in words))
    raise BuildError(
        f"{toolchain.program}: neither gcc nor clang, so it cannot be told to ask for each thread-local variable",
        "compile the program with gcc or clang",
    )


def _indirect(toolchain: Toolchain) -> str:
    if toolchain.family is Family.CLANG:
        return "-fno-direct-access-external-data"
    if toolchain.family is Family.GCC:
        return "-mno-direct-extern-access" if toolchain.major >= 12 else "-fPIC"
    raise BuildError(
        f"{toolchain.program}: neither gcc nor clang, so it cannot be told to reach external data through the GOT",
        "compile the program with gcc or clang",
    )
