"""Modules of thread-local storage, as the dynamic linker of this very machine takes them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from patcher.elf.tables import PT_TLS, read_raw
from patcher.elf.thread_module import NUMBER_CELL, ThreadBlock, thread_module

# One thread waits while the module is loaded, one starts after it; each shows its copy and overwrites it.
LOADING = """\
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
void *__tls_get_addr(unsigned long *);
static pthread_barrier_t gate;
static unsigned long index_[2];
static long offset, size;
static void *show(void *waits)
{
    if (waits)
        pthread_barrier_wait(&gate);
    if (waits)
        pthread_barrier_wait(&gate);
    unsigned char *own = offset ? (unsigned char *)__builtin_thread_pointer() + offset : __tls_get_addr(index_);
    printf("%lu ", (unsigned long)own);
    for (long i = 0; i < size; i++)
        printf("%02x", own[i]);
    puts("");
    memset(own, 0xee, size);
    return 0;
}
int main(int count, char **words)
{
    pthread_t early, late;
    pthread_barrier_init(&gate, 0, 2);
    pthread_create(&early, 0, show, words);
    pthread_barrier_wait(&gate);
    char **map = dlopen(words[1], RTLD_NOW);
    if (!map)
        return puts(dlerror());
    index_[0] = *(unsigned long *)(*map + atoi(words[2]));
    offset = *(long *)(*map + atoi(words[2]) + 8);
    size = atoi(words[3]);
    printf("%lu %ld\\n", index_[0], offset);
    pthread_barrier_wait(&gate);
    pthread_join(early, 0);
    pthread_create(&late, 0, show, 0);
    pthread_join(late, 0);
    show(0);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loading")
    (folder / "loading.c").write_text(LOADING)
    subprocess.run(["gcc", "-O1", "-pthread", "-o", "loading", "loading.c"], cwd=folder, check=True)
    return folder / "loading"


@pytest.mark.parametrize("static", [True, False], ids=["fixed", "asked"])
@pytest.mark.parametrize(("size", "alignment", "image"), [(40, 8, b"first values"), (64, 32, b""), (1, 1, b"\xff")])
def test_each_thread_gets_a_copy(
    program: Path, tmp_path: Path, static: bool, size: int, alignment: int, image: bytes
) -> None:
    path = tmp_path / "storage.so"
    path.write_bytes(thread_module("storage", ThreadBlock(size, alignment, image, static)))
    done = subprocess.run([program, path, str(NUMBER_CELL), str(size)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (number, offset), *found = (line.split() for line in done.stdout.splitlines())
    assert int(number) > 0
    assert (int(offset) < 0) == static
    assert [contents for _, contents in found] == [image.ljust(size, b"\0").hex()] * 3
    assert all(int(place) % alignment == 0 for place, _ in found)


def test_its_block_is_aligned_in_the_file_too() -> None:
    data = thread_module("storage", ThreadBlock(70000, 8192, b"x", static=False))
    (segment,) = [h for h in read_raw("storage", data).program_headers if h["type"] == PT_TLS]
    assert (segment["memory_size"], segment["file_size"], segment["alignment"]) == (70000, 1, 8192)
    assert segment["address"] % 8192 == 0
    assert data[segment["offset"] :] == b"x"
