"""Where the dynamic linker has put each module's thread-local block, compared with what threads themselves see."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from living import compile_text, run, running, waiting_object

from patcher.image import Image, LoadedModule
from patcher.linkmap import BLOCK_OFFSET, MODULE_NUMBER, Layout, rendezvous, thread_blocks
from patcher.target import Target

MAIN = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
extern void wait_for_end(void);
extern int *place_early(void);
__thread char before;
__thread __attribute__((aligned(64))) int mine = 3;
long seen[2][5];   /* offsets from the thread pointer, in two threads */
long numbers[5];   /* of modules, as dlinfo tells them */
static int *(*places[5])(void);
static int *place_mine(void) { return &mine; }
static void *look(void *row)
{
    char *pointer;
    __asm__("mov %%fs:0, %0" : "=r"(pointer));
    for (int i = 0; i < 5; i++)
        ((long *)row)[i] = (char *)places[i]() - pointer;
    return row;
}
static void *hold(void *row) { look(row); wait_for_end(); return row; }
int main(int n, char **v)
{
    pthread_t thread;
    places[0] = place_mine;
    places[1] = place_early;
    for (int i = 0; i < n; i++) {
        void *library = dlopen(i ? v[i] : 0, RTLD_NOW);
        if (!library || dlinfo(library, RTLD_DI_TLS_MODID, &numbers[i ? i + 1 : 0]))
            return 1;
        if (i)
            places[i + 1] = (int *(*)(void))dlsym(library, "place");
    }
    look(seen[0]);
    pthread_create(&thread, 0, hold, seen[1]);
    return pthread_join(thread, 0);
}
"""
PLACE = "__thread long first = 1; __thread int variable = 9; int *place(void) { return &variable; }\n"
LATE = {  # what the libraries that are opened late are compiled with
    "dynamic": ("-DNOTHING",),
    "initial": ("-ftls-model=initial-exec",),
    "descriptors": ("-mtls-dialect=gnu2",),
}
STATIC = r"""
extern void wait_for_end(void);
__thread int one = 1, two = 2;
long seen;
int main(void)
{
    char *pointer;
    __asm__("mov %%fs:0, %0" : "=r"(pointer));
    seen = (char *)&two - pointer;
    wait_for_end();
}
"""
NAMES = ("program", "libearly.so", *(f"lib{name}.so" for name in LATE))


def library(folder: Path, name: str, text: str, *flags: str) -> Path:
    text = text.replace("variable", f"variable_{name}")
    unit = compile_text(text, folder / f"{name}.o", "-O1", "-fPIC", *flags, name=f"{name}.c")
    run("gcc", "-shared", "-o", folder / f"lib{name}.so", unit)
    return folder / f"lib{name}.so"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    folder = tmp_path_factory.mktemp("linkmap")
    early = library(folder, "early", PLACE.replace("place", "place_early"))
    late = [str(library(folder, name, PLACE, *flags)) for name, flags in LATE.items()]
    main = compile_text(MAIN, folder / "main.o", "-O1", name="main.c")
    run("gcc", "-pthread", "-o", folder / "program", main, waiting_object(folder), early, f"-Wl,-rpath,{folder}")
    with running(folder / "program", *late) as target:
        yield Image(target)


def module(image: Image, name: str) -> LoadedModule:
    return next(m for m in image.modules if m.name == name)


def longs(image: Image, name: str, count: int) -> list[int]:
    found = image.resolve(name, image.executable)
    assert found is not None
    return list(struct.unpack(f"<{count}q", image.target.memory.read(found.address, 8 * count)))


def offset(image: Image, name: str) -> int | None:
    owner = module(image, name)
    found = image.resolve("mine" if owner is image.executable else f"variable_{name[3:-3]}", owner)
    assert found is not None
    base = image.thread_block(owner)
    (symbol,) = owner.module.symbols.named(found.name)
    return None if base is None else base + symbol.value


def test_static_blocks_are_where_every_thread_sees_them(image: Image) -> None:
    seen = longs(image, "seen", 10)
    first, second = seen[:5], seen[5:]
    found = [offset(image, name) for name in NAMES]
    same = [a if a == b else None for a, b in zip(first, second, strict=True)]
    assert found == same
    assert same[2] is None, "the dynamic one is elsewhere in each thread"
    assert None not in (same[0], same[1], same[3], same[4])


def test_modules_have_the_numbers_that_the_dynamic_linker_tells(image: Image) -> None:
    numbers = longs(image, "numbers", 5)
    found = [image.thread_module(module(image, name)) for name in NAMES]
    assert [found[0], *found[2:]] == [numbers[0], *numbers[2:]]
    assert found[1] not in (None, 0, *numbers)
    assert image.thread_module(module(image, "ld-linux-x86-64.so.2")) is None, "it has no thread-locals"


def test_cells_tell_where_the_link_map_does_not(image: Image) -> None:
    known = {name: (offset(image, name), image.thread_module(module(image, name))) for name in NAMES}
    try:
        image._blocks = {}  # as with a C library that does not describe its link map
        found = {name: (offset(image, name), image.thread_module(module(image, name))) for name in NAMES}
    finally:
        image._blocks = None
    assert found["program"] == known["program"]
    for name in ("libdynamic.so", "libearly.so"):
        assert found[name] == (None, known[name][1])
    for name in ("libinitial.so", "libdescriptors.so"):
        assert found[name] == (known[name][0], None)


def descriptions(image: Image) -> tuple[int, int]:
    libc = module(image, "libc.so.6")
    found = [image.resolve(name, libc) for name in (MODULE_NUMBER, BLOCK_OFFSET)]
    assert found[0] is not None
    assert found[1] is not None
    return found[0].address, found[1].address


def test_a_description_of_another_form_is_not_believed(image: Image) -> None:
    memory, (number, distance) = image.target.memory, descriptions(image)
    layout = Layout.read(memory, number, distance)
    assert layout is not None
    seen = image.resolve("seen", image.executable)
    assert seen is not None
    for words in ((32, 1, layout.block_offset), (64, 2, layout.block_offset), (64, 1, 8), (64, 1, 1 << 30)):
        before = memory.read(seen.address, 12)
        try:
            memory.write(seen.address, struct.pack("<3I", *words))
            assert Layout.read(memory, number, seen.address) is None
        finally:
            memory.write(seen.address, before)


def test_a_list_that_leads_nowhere_ends(image: Image) -> None:
    memory, (number, distance) = image.target.memory, descriptions(image)
    layout = Layout.read(memory, number, distance)
    assert layout is not None
    debug = rendezvous(memory, image.executable.module.dynamic_section + image.executable.bias)
    assert len(thread_blocks(memory, debug, layout)) == 6  # libc has thread-locals too
    assert thread_blocks(memory, 0, layout) == {}
    assert thread_blocks(memory, 8, layout) == {}, "not mapped"


def test_a_dynamic_section_that_nobody_writes_to_is_no_obstacle(tmp_path: Path) -> None:
    early = library(tmp_path, "early", PLACE)
    text = "void wait_for_end(void);\nint *place(void);\nint main(void) { wait_for_end(); return *place(); }\n"
    main = compile_text(text, tmp_path / "main.o", name="main.c")
    flags = ("-fuse-ld=lld", "-Wl,-z,rodynamic", f"-Wl,-rpath,{tmp_path}")
    run("gcc", *flags, "-o", tmp_path / "program", main, waiting_object(tmp_path), early)
    with running(tmp_path / "program") as target:
        image = Image(target)
        executable = image.executable
        assert rendezvous(target.memory, executable.module.dynamic_section + executable.bias) == 0
        assert offset(image, "libearly.so") is not None


def test_a_static_program_has_its_block_below_the_thread_pointer(tmp_path: Path) -> None:
    text = "extern void wait_for_end(void);\n__thread int one = 1, two = 2;\nlong seen;\n"
    text += (
        'int main(void) { char *p; __asm__("mov %%fs:0, %0" : "=r"(p)); seen = (char *)&two - p; wait_for_end(); }\n'
    )
    main = compile_text(text, tmp_path / "main.o", name="main.c")
    run("gcc", "-static", "-o", tmp_path / "program", main, waiting_object(tmp_path))
    with running(tmp_path / "program") as target:
        check_static(target)


def check_static(target: Target) -> None:
    image = Image(target)
    two = image.resolve("two", image.executable)
    assert two is not None
    assert [image.thread_offset(two)] == longs(image, "seen", 1)
    assert image.thread_module(image.executable) == 1
