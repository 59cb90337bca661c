"""patcher.h, as it is printed: compiles everywhere without a warning, and agrees with what patcher writes."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from patcher import directory, hooks

WARNINGS = ("-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-pedantic", "-Werror")
LANGUAGES = [
    *(("c", compiler, standard) for compiler in ("gcc", "clang") for standard in ("c99", "c11", "gnu17")),
    *(("cc", compiler, standard) for compiler in ("g++", "clang++") for standard in ("c++11", "c++17")),
]
USER = """\
#include "patcher.h"
#include "patcher.h"
static size_t told;
void patcher_before(const struct patcher_event *event) { told += event->function_count; }
void patcher_after(const struct patcher_event *event) { told += event->action == PATCHER_CANCEL; }
"""
MAIN = """\
#include "patcher.h"
int main(void)
{
    size_t count = 5;
    const struct patcher_symbol *symbols = patcher_symbols(&count);
    return patcher_generation() || patcher_live() || symbols || count;
}
"""


def printed() -> str:
    return subprocess.run(
        [sys.executable, "-m", "patcher", "header"], capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("header")
    (found / "patcher.h").write_text(printed())
    return found


@pytest.mark.parametrize(("suffix", "compiler", "standard"), LANGUAGES)
def test_compiles_without_a_warning_and_says_that_nothing_is_patched(folder, suffix, compiler, standard):
    for name, text in (("user", USER), ("main", MAIN)):
        (folder / f"{name}.{suffix}").write_text(text)
    output = folder / f"{compiler}-{standard}"
    command = [
        compiler,
        f"-std={standard}",
        *WARNINGS,
        "-o",
        output,
        folder / f"user.{suffix}",
        folder / f"main.{suffix}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert subprocess.run([output], check=False).returncode == 0


def test_layouts_are_those_that_are_written(folder):
    members = {
        "patcher_event": (
            hooks._EVENT,
            "size action generation previous function_count functions variable_count variables",
        ),
        "patcher_name": (hooks._NAME, "name file outcome"),
        "patcher_table": (directory._TABLE, "previous generation count symbols"),
        "patcher_symbol": (directory._SYMBOL, "name file address size"),
        "patcher_state": (directory._STATE, "magic version size live newest"),
    }
    lines, expected = [], []
    for name, (layout, fields) in members.items():
        lines.append(f'printf("%zu ", sizeof(struct {name}));')
        expected.append(layout.size)
        format_ = layout.format
        for i, field in enumerate(fields.split()):
            lines.append(f'printf("%zu ", offsetof(struct {name}, {field}));')
            expected.append(struct.calcsize(format_[: i + 1]))
    lines.append('printf("%d %d", (int)PATCHER_CANCEL, PATCHER_MAGIC == patcher_state.magic);')
    expected += [hooks.Action.CANCEL, 1]
    (folder / "layout.c").write_text(
        f'#include <stdio.h>\n#include "patcher.h"\nint main(void) {{ {" ".join(lines)} }}'
    )
    subprocess.run(["gcc", "-o", folder / "layout", folder / "layout.c"], check=True)
    found = subprocess.run([folder / "layout"], capture_output=True, text=True, check=False).stdout
    assert [int(word) for word in found.split()] == expected
    assert re.search(rf"PATCHER_MAGIC UINT64_C\({directory.MAGIC:#x}\)", printed())
