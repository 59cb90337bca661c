"""How a unit's command is rewritten to precompile its preamble, and to compile the rest behind it.

gcc compiles a text of ours: the precompiled header, a #line, the rest; what it would say of our directories is mapped
back. clang compiles the file itself and is told how many bytes of it to skip, as editors have it done.
Decides which switches rule a preamble out: those that name the file, or write, in ways that two steps would change.
Specification: gcc(1), "Using Precompiled Headers"; clang's `-cc1 -help`: -include-pch, -preamble-bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from patcher.build.command import CompileCommand, input_argument, object_arguments, quoted_includes
from patcher.build.preamble.text import Cut
from patcher.build.toolchain import Family, Toolchain, program_index

_WRAPPERS = frozenset({"ccache", "sccache", "distcc", "icecc"})
_LANGUAGES = {".c": "c", **dict.fromkeys((".cc", ".cpp", ".cxx", ".c++", ".cp", ".C"), "c++")}
_READ_BEFORE = ("-include", "-imacros")  # what they bring is in the preamble
_RULED_OUT = (
    *(
        "-fpch",
        "-include-pch",
        "-emit-",
        "-fmodules",
        "-fplugin",
        "-fpass-plugin",
        "-fprofile",
        "--coverage",
        "-coverage",
    ),
    *("-ftest-coverage", "-fauto-profile", "-fpreprocessed", "-fdirectives-only", "-traditional", "-g3", "-ggdb3"),
    *("-gdwarf-1", "-gsplit-dwarf", "-fdebug-prefix-map", "-ffile-prefix-map", "-fmacro-prefix-map", "-frandom-seed"),
    *("-fdebug-compilation-dir", "-ffile-compilation-dir", "-Xclang", "-Xpreprocessor", "-I-", "-wrapper", "-specs"),
    *("-Wunused-macros", "-fdump", "-fstack-usage", "-fcallgraph-info", "-grecord-command-line", "--include"),
    *("-frecord-command-line", "-frecord-gcc-switches", "-index-store-path", "--config", "@"),
    *("-fsanitize-ignorelist", "-fsanitize-blacklist", "-fsanitize-coverage-", "-fxray-"),
)


@dataclass(frozen=True, slots=True)
class Rewriting:
    """A command that can be divided in two: its words without the wrapper, ready to make an object."""

    command: CompileCommand
    toolchain: Toolchain
    language: str
    words: tuple[str, ...]
    named: str  # the source file, as the command has it

    def plainly(self, output: Path) -> tuple[str, ...]:
        """Return the command that makes the object of the whole file."""
        return (*self.words[:-1], str(output))

    def precompiling(self, header: Path, output: Path, rule: Path) -> tuple[str, ...]:
        """Return the command that precompiles a header; `rule` gets its dependencies."""
        return (*self._for_header(header), "-MD", "-MF", str(rule), "-MT", "preamble", "-c", "-o", str(output))

    def preprocessing(self, header: Path, output: Path) -> tuple[str, ...]:
        """Return the command that preprocesses a header, and says where it searches."""
        return (*self._for_header(header), "-v", "-E", "-o", str(output))

    def expanding(self, output: Path, rule: Path) -> tuple[str, ...]:
        """Return the command that preprocesses the file itself; `rule` gets its dependencies."""
        return (*_without_output(self.words), "-MD", "-MF", str(rule), "-MT", "unit", "-E", "-o", str(output))

    def behind(self, header: Path, text: Path, cut: Cut, output: Path) -> tuple[str, ...]:
        """Return the command that compiles what follows the preamble; with gcc, `text` is written for it."""
        words = _without_output(tuple(_not_read_before(self.words)))
        if self.toolchain.family is Family.CLANG:
            preamble = ("-include-pch", f"{header}.pch", f"-preamble-bytes={len(cut.preamble)},1")
            added = (*(word for option in preamble for word in ("-Xclang", option)), "-c", "-o", str(output))
            return (*words, *added)
        text.parent.mkdir(exist_ok=True)
        text.write_bytes(f'#include "{header}"\n#line {cut.line} {_quoted(self.named)}\n'.encode() + cut.rest)
        words = tuple(str(text) if word == self.named else word for word in words)
        place = os.path.dirname(self.named)
        back = f"-ffile-prefix-map={text.parent}/={place + '/' if place else ''}"
        return (words[0], *self._quotes(text), *words[1:], back, "-c", "-o", str(output))

    def header_text(self, cut: Cut) -> bytes:
        """Return the text that is precompiled: the preamble, which names itself as the file does."""
        return f"#line 1 {_quoted(self.named)}\n".encode() + cut.preamble

    def precompiled(self, header: Path) -> Path:
        """Return what the precompiled form of a header is called."""
        return Path(f"{header}.pch" if self.toolchain.family is Family.CLANG else f"{header}.gch")

    def _for_header(self, header: Path) -> tuple[str, ...]:
        words = _without_output(tuple(_without_language(self.words)))
        words = tuple(str(header) if word == self.named else word for word in words)
        return (words[0], *self._quotes(header), "-x", f"{self.language}-header", *words[1:])

    def _quotes(self, text: Path) -> tuple[str, ...]:
        found = quoted_includes(self.named, text, self.toolchain)
        maps = [word for word in found if word.startswith("-fmacro-prefix-map=")]
        return (*found, *(word.replace("-fmacro", "-fdebug") for word in maps))


def rewriting_of(command: CompileCommand, toolchain: Toolchain) -> Rewriting | str:
    """Return how a command is divided, or why it is not. Raises NoCompileCommand where it does not name the file."""
    if toolchain.family is Family.OTHER:
        return f"{toolchain.program} is neither gcc nor clang"
    words = object_arguments(command, Path("object"), toolchain=toolchain)
    at = program_index(words)
    before = {os.path.basename(word) for word in words[:at]}
    if before - _WRAPPERS:
        return f"the compiler is started by {' '.join(words[:at])}"
    words = words[at:]
    ruled_out = next((word for word in words if _is_ruled_out(word)), "")
    if ruled_out:
        return f"{ruled_out} is among its switches"
    if any(os.path.exists(command.directory / f"{name}.gch") for name in _values(words, "-include")):
        return "it has a precompiled header of its own"
    language = _language(command, words)
    if language not in ("c", "c++"):
        return "it is neither C nor C++"
    return Rewriting(command, toolchain, language, words, input_argument(command))


def _is_ruled_out(word: str) -> bool:
    joined = any(word.startswith(option) and word != option for option in _READ_BEFORE)
    preprocessor = word.startswith("-Wp,") and not word.startswith(("-Wp,-D", "-Wp,-U"))
    return word.startswith(_RULED_OUT) or joined or preprocessor or word in ("-C", "-CC", "-P", "-H", "--")


def _language(command: CompileCommand, words: Sequence[str]) -> str:
    explicit = list(_values(words, "-x")) + [word[2:] for word in words if word.startswith("-x") and len(word) > 2]
    found = explicit[-1] if explicit else _LANGUAGES.get(command.file.suffix, "")
    by_program = "++" in os.path.basename(words[0]) and not explicit and found == "c"
    return "c++" if by_program else found


def _values(words: Sequence[str], option: str) -> Iterator[str]:
    return (value for word, value in pairwise(words) if word == option)


def _not_read_before(words: Sequence[str]) -> Iterator[str]:
    rest = iter(words)
    for word in rest:
        if word in _READ_BEFORE:
            next(rest, None)
        else:
            yield word


def _without_language(words: Sequence[str]) -> Iterator[str]:
    rest = iter(words)
    for word in rest:
        if word == "-x":
            next(rest, None)
        elif not word.startswith("-x"):
            yield word


def _without_output(words: Sequence[str]) -> tuple[str, ...]:
    """Take away the `-c -o object` that the words were made with."""
    return tuple(words[:-3])


def _quoted(name: str) -> str:
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'
