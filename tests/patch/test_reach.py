"""Addresses in a process's memory and registers, wherever they are, found; and where there are none, none."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from living import compile_text, run

from patcher.patch.reach import memory_of, reached
from patcher.target import Target

LOW = 0x1234_5678_0000
MASK = 0x5555_5555_5555_5555
PLACES = ("stack", "heap", "bss", "protected", "shared", "file", "register", "vector", "freed")

# Says nothing but that it is ready; where the address is, the argument tells.
PROGRAM = """
#define MASK "0x5555555555555555"
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
static volatile long bss[1000];
static long word(char **argv) { return strtol(argv[2], 0, 0); }
static long *mapped(int flags, int fd, long what)
{
    long *p = mmap(0, 1 << 20, PROT_READ | PROT_WRITE, flags, fd, 0);
    p[70000] = what + (p[0] & 1); /* what stands in the file is not the program's */
    return p;
}
int main(int argc, char **argv)
{
    volatile long stack[100];
    long in_register = 0, length = strlen(argv[1]);
    char byte;
    (void)argc;
    for (int i = 0; i < 100; i++)
        stack[i] = 0;
    if (!strcmp(argv[1], "stack")) stack[50] = word(argv);
    if (!strcmp(argv[1], "heap")) *(volatile long *)malloc(8) = word(argv);
    if (!strcmp(argv[1], "freed")) { volatile long *p = malloc(4096); p[100] = word(argv); free((void *)p); }
    if (!strcmp(argv[1], "bss")) bss[500] = word(argv);
    if (!strcmp(argv[1], "protected"))
        mprotect(mapped(MAP_PRIVATE | MAP_ANONYMOUS, -1, word(argv)), 1 << 20, PROT_NONE);
    if (!strcmp(argv[1], "shared")) mapped(MAP_SHARED | MAP_ANONYMOUS, -1, word(argv));
    if (!strcmp(argv[1], "file")) mapped(MAP_PRIVATE, open(argv[3], O_RDWR), word(argv));
    /* In memory these two are never but in disguise. */
    if (!strcmp(argv[1], "register")) in_register = word(argv);
    if (!strcmp(argv[1], "vector"))
        __asm__ volatile("movabs $" MASK ", %%rcx; xor %0, %%rcx; movq %%rcx, %%xmm9; xor %%ecx, %%ecx"
                         : : "r"(word(argv)) : "rcx", "xmm9");
    memset(argv[2], ' ', strlen(argv[2]));
    byte = 'r';
    long number = 1, done;
    /* Says that it is ready, and waits for the end, with the word in a register. */
    __asm__ volatile("movabs $" MASK ", %%r12; xor %[word], %%r12; mov $1, %%eax; mov $1, %%edi; syscall;"
                     "xor %%eax, %%eax; xor %%edi, %%edi; syscall; xor %%r12, %%r12"
                     : "=a"(done), "=D"(length) : "1"(0L), "S"(&byte), [word] "r"(in_register), "d"(number)
                     : "rcx", "r11", "r12", "memory");
    return (int)(stack[50] + bss[500] + length + done) & 0;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reach")
    (folder / "file").write_bytes(struct.pack("<Q", LOW) * (1 << 16) + bytes(1 << 19))
    run("gcc", "-Wl,-z,now", "-o", folder / "program", compile_text(PROGRAM, folder / "unit.o", "-O0"))
    return folder / "program"


def looked_for(program: Path, place: str, address: int) -> Iterator[tuple[tuple[int, int], bool]]:
    """Yield ranges, and whether they were found."""
    shown = address ^ MASK if place in ("register", "vector") else address
    arguments = [program, place, str(shown), program.with_name("file")]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        assert process.stdout.read(1) == b"r"
        with Target.attach(process.pid) as target:
            ranges = [(LOW, LOW + 64), (LOW + 64, LOW + 128), (LOW + 256, LOW + 512)]
            with target.stopped() as stopped:
                found = reached(target, stopped, ranges, [])
            assert sum(end - start for start, end in memory_of(target, [])) < 8 << 20
            yield from ((extent, i in found) for i, extent in enumerate(ranges))
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


@pytest.mark.parametrize("place", PLACES)
def test_an_address_is_found_wherever_it_is(program, place):
    assert [found for _, found in looked_for(program, place, LOW + 300)] == [False, False, True]


def test_the_end_of_a_range_is_the_start_of_the_next(program):
    assert [found for _, found in looked_for(program, "bss", LOW + 64)] == [True, True, False]
    assert [found for _, found in looked_for(program, "bss", LOW + 512)] == [False, False, True]


def test_what_is_not_there_is_not_found(program):
    for address in (LOW - 1, LOW + 129, LOW + 255, LOW + 513, 0):
        assert not any(found for _, found in looked_for(program, "bss", address))
