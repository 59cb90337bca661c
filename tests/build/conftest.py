"""A small project to compile, and what compiled code consists of."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from patcher.build import Compiler


@pytest.fixture
def compiler(tmp_path: Path) -> Iterator[Compiler]:
    with Compiler(tmp_path / "objects") as compiler:
        yield compiler


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """src/unit.c includes a header beside it and one by -I; both name their file and line."""
    root = tmp_path / "project"
    (root / "src").mkdir(parents=True)
    (root / "include/sub").mkdir(parents=True)
    (root / "include/sub/wide.h").write_text("static inline const char *wide(void) { return __FILE__; }\n")
    (root / "src/beside.h").write_text(
        "static inline int beside(int n) { return n * __LINE__; }\n"
        "static inline const char *where(void) { return __FILE__; }\n"
    )
    (root / "src/unit.c").write_text(
        '#include "beside.h"\n'
        "#include <sub/wide.h>\n"
        "extern int outside;\n"
        "int line(void) { return __LINE__; }\n"
        "const char *names(int n) { return n == 0 ? __FILE__ : n == 1 ? where() : wide(); }\n"
        "int unit(int n) { return beside(n) + outside; }\n"
    )
    return root


@pytest.fixture
def database(project: Path) -> Callable[..., Path]:
    """Write a compile_commands.json with one entry for src/unit.c."""

    def write(*arguments: str, directory: Path = project, file: str = "src/unit.c", at: Path = project) -> Path:
        path = at / "compile_commands.json"
        path.write_text(json.dumps([{"directory": str(directory), "file": file, "arguments": list(arguments)}]))
        return path

    return write


def section_bytes(path: Path, prefix: str) -> bytes:
    """Return the bytes of all sections whose name begins so, in the order of their names."""
    with path.open("rb") as file:
        found = [section for section in ELFFile(file).iter_sections() if section.name.startswith(prefix)]
        return b"".join(section.data() for section in sorted(found, key=lambda section: section.name))


def section_names(path: Path) -> set[str]:
    with path.open("rb") as file:
        return {section.name for section in ELFFile(file).iter_sections()}


def file_symbol(path: Path) -> str:
    with path.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".symtab")
        return next(symbol.name for symbol in table.iter_symbols() if symbol["st_info"]["type"] == "STT_FILE")


def run(*command: str, cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, check=True, stdin=subprocess.DEVNULL, capture_output=True)
