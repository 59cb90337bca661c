"""The dynamic linker's search lists, read from a live process."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from patcher.elf.module import read_module
from patcher.scopes import read_scopes
from patcher.target import Target

MAIN = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <stdio.h>
#include <string.h>
int main(int count, char **words)
{
    char line[80];
    struct link_map *map, *own = dlopen(NULL, RTLD_NOW);
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = 0;
        if (!*line)
            map = own;
        else if (*line == '*')
            map = dlmopen(LM_ID_NEWLM, line + 1, RTLD_NOW);
        else
            map = dlopen(line + 1, RTLD_NOW | (*line == 'd') * RTLD_DEEPBIND | (*line == 'g') * RTLD_GLOBAL);
        printf("%#lx\n", map ? (unsigned long)map->l_ld : 0);
    }
    return 0;
}
"""


class Opener:
    """A program that opens libraries as it is told, and answers with the address of their dynamic section."""

    def __init__(self, program: Path) -> None:
        self.process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def open(self, how: str) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(how + "\n")
        self.process.stdin.flush()
        found = int(self.line(), 16)
        assert found
        return found


@contextmanager
def opener(folder: Path, *flags: str) -> Iterator[tuple[Opener, Target]]:
    (folder / "main.c").write_text(MAIN)
    for name in ("one", "two", "three", "four"):
        (folder / f"{name}.c").write_text(f"int {name};\n")
        library = folder / f"lib{name}.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, folder / f"{name}.c"], check=True)
    path = f"-Wl,-rpath,{folder}"
    subprocess.run(["gcc", "-o", folder / "program", folder / "main.c", path, *flags], check=True)
    program = Opener(folder / "program")
    try:
        with Target.attach(program.process.pid) as target:
            yield program, target
    finally:
        program.process.kill()
        program.process.communicate()


def test_how_a_library_was_opened_is_seen(tmp_path: Path) -> None:
    with opener(tmp_path) as (program, target):
        own = program.open("")
        before = read_scopes(target.memory, own, ())
        assert before is not None
        start = before.order[own]
        assert start[0] == own
        assert len(start) == 3, "the program, the C library, the dynamic linker"
        local, deep = program.open("llibone.so"), program.open("dlibtwo.so")
        found = read_scopes(target.memory, own, (local, deep))
        assert found is not None
        assert found.order[own] == start
        assert found.order[local][: len(start)] == start
        assert found.order[local][len(start)] == local
        assert found.order[deep][0] == deep, "RTLD_DEEPBIND: its own before those of the program"
        everywhere, apart = program.open("glibthree.so"), program.open("*libfour.so")
        found = read_scopes(target.memory, own, (local, deep, everywhere, apart))
        assert found is not None
        assert found.order[own] == (*start, everywhere)
        assert everywhere in found.order[local]
        assert found.order[apart][0] == apart
        assert not set(start[:2]) & set(found.order[apart])
        assert [found.namespace[m] for m in (own, local, everywhere, apart)] == [0, 0, 0, 1]
        for hint in (found.offset, found.offset + 8, 1 << 40):  # what is remembered is checked, not trusted
            assert read_scopes(target.memory, own, (local, deep, everywhere, apart), hint) == found


def test_a_static_program_has_itself(tmp_path: Path) -> None:
    (tmp_path / "main.c").write_text('int main(void) { puts("ready"); fflush(stdout); return getchar(); }')
    command = ["gcc", "-w", "-include", "stdio.h", "-static-pie", "-o", tmp_path / "program", tmp_path / "main.c"]
    subprocess.run(command, check=True)
    with subprocess.Popen([tmp_path / "program"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            with Target.attach(process.pid) as target:
                first = min(m.start for m in target.mappings() if m.path.endswith("/program"))
                dynamic = first + read_module("program", tmp_path / "program").dynamic_section
                found = read_scopes(target.memory, dynamic, ())
                assert found is not None
                assert found.order[dynamic] == (dynamic,)
        finally:
            process.kill()


def test_memory_that_is_no_such_list(tmp_path: Path) -> None:
    with opener(tmp_path) as (program, target):
        own = program.open("")
        assert read_scopes(target.memory, own + 8, ()) is None
        assert read_scopes(target.memory, 8, ()) is None
        assert read_scopes(target.memory, own, (1, 2, own)) is not None
