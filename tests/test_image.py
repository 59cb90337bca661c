"""The modules of a live process: where they stand, and what names and addresses mean in it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from living import compile_text, run, running, waiting_object

from patcher.elf import SymbolType
from patcher.errors import UnsafeChange
from patcher.image import Image, LoadedModule

MAIN = r"""
#include <stdio.h>
#include <string.h>
extern int shared, both(void), from_left(void);
extern __thread int outer;
__thread char before; __thread long mine = 3;
int own(void) { return 1; }
static int local(void) { return 2; }
int (*pointer)(const char *) = puts;
size_t (*length)(const char *) = strlen;
extern void wait_for_end(void);
int main(int n, char **v)
{
    wait_for_end();
    return own() + local() + shared + both() + from_left() + outer + (int)mine + before + n + (int)length(v[0]);
}
"""
LEFT = "int shared = 4; __thread int outer = 8; int both(void) { return 1; } int from_left(void) { return both(); }\n"
RIGHT = "int both(void) { return 2; } int only_right(void) { return both() + 1; } int twice(void) { return 1; }\n"
LATE = "int late(void) { return 9; } int twice(void) { return 2; }\n"
STYLES = {"pie": ("-fPIE", "-pie"), "fixed": ("-fno-pie", "-no-pie"), "lazy": ("-fPIE", "-pie", "-Wl,-z,lazy")}


def library(folder: Path, name: str, text: str, *flags: str | Path) -> Path:
    unit = compile_text(text, folder / f"{name}.o", "-O1", "-fPIC", name=f"{name}.c")
    run("gcc", "-shared", "-o", folder / f"lib{name}.so", unit, *flags)
    return folder / f"lib{name}.so"


def link(folder: Path, *flags: str) -> Path:
    left, right = library(folder, "left", LEFT), library(folder, "right", RIGHT)
    main = compile_text(MAIN, folder / "main.o", "-O1", flags[0], name="main.c")
    libraries = ("-Wl,--no-as-needed", left, right, f"-Wl,-rpath,{folder}")
    run("gcc", *flags[1:], "-o", folder / "program", main, waiting_object(folder), *libraries)
    return folder / "program"


@pytest.fixture(scope="module", params=STYLES)
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    folder = tmp_path_factory.mktemp("image")
    library(folder, "late", LATE)
    with running(link(folder, *STYLES[request.param])) as target:
        yield Image(target)


def module_named(image: Image, prefix: str) -> LoadedModule:
    return next(m for m in image.modules if m.name.startswith(prefix))


def test_modules_stand_where_the_map_says(image: Image) -> None:
    assert image.modules[0] is image.executable
    assert image.executable.name == "program"
    assert {"libleft.so", "libright.so", "libc.so.6"} <= {m.name for m in image.modules}
    for module in image.modules:
        first = min(m.start for m in image.target.mappings() if m.path == module.path)
        assert module.start == first
        low, high = module.text
        assert image.module_at(low) is module
        assert module.executable_at(low)
        assert not module.executable_at(module.start) or module.start == low
        assert high <= module.end
        memory = image.target.memory.read(low, 64)
        segment = next(s for s in module.module.segments if s.executable)
        assert module.file.read_bytes()[segment.offset : segment.offset + 64] == memory
    assert image.module_at(0x10) is None


def test_names_are_resolved_in_the_order_of_the_dynamic_linker(image: Image) -> None:
    assert [m.name for m in image.scope()][:3] == ["program", "libleft.so", "libright.so"]
    for within in (image.executable, module_named(image, "libright")):
        both = image.resolve("both", within)
        assert both is not None
        assert both.module.name == "libleft.so", "the first in the scope, for every module"
    own = image.resolve("own", image.executable)
    assert own is not None
    assert own.function
    assert own.address - image.executable.bias == next(s.value for s in image.executable.module.symbols.named("own"))
    assert image.resolve("local", image.executable) is None, "another unit's static"
    assert image.resolve("nowhere", image.executable) is None


def test_without_the_dynamic_linker_s_lists_the_order_is_that_of_the_specification(
    image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As where another C library keeps them otherwise.
    monkeypatch.setattr("patcher.image.image.read_scopes", lambda *_: None)
    presumed = Image(image.target)
    assert [m.name for m in presumed.scope()] == [m.name for m in image.scope()]
    for module in presumed.modules:
        found = presumed.search("both", module)
        assert found is not None
        assert found.module.name == "libleft.so"


def test_an_imported_variable_is_where_the_process_has_it(image: Image) -> None:
    found = image.resolve("shared", image.executable)
    assert found is not None
    assert image.target.memory.read(found.address, 4) == b"\4\0\0\0"


def test_indirect_functions_are_the_ones_that_were_chosen(image: Image) -> None:
    strlen = image.resolve("strlen", image.executable)
    assert strlen is not None
    assert strlen.ifunc
    length = image.resolve("length", image.executable)
    assert length is not None
    value = image.target.memory.read_u64(length.address)
    if image.module_at(value) is strlen.module:  # in a fixed executable it is the canonical PLT entry
        assert image.chosen(strlen) == value
    else:
        assert value == image.canonical_plt("strlen")


def test_stubs_lead_to_what_they_import(image: Image) -> None:
    found = set()
    low, high = image.executable.text
    for address in range((low + 15) & ~15, high, 16):
        cell = image.import_at(address)
        if cell is not None and cell.name:
            found.add(cell.name)
    assert {"both", "from_left"} <= found


def thread_pointer(image: Image) -> int:
    """Return the only thread's fs_base: the address of the thread control block, whose first word is itself."""
    for mapping in image.target.mappings():
        if mapping.writable and not mapping.path.startswith("["):
            data = image.target.memory.read(mapping.start, mapping.end - mapping.start)
            for at in range(0, len(data) - 24, 16):
                own = (mapping.start + at).to_bytes(8, "little")
                if data[at : at + 8] == data[at + 16 : at + 24] == own:
                    return mapping.start + at
    raise AssertionError("no thread control block")


def test_thread_locals_have_the_offsets_that_the_process_uses(image: Image) -> None:
    mine, outer = image.resolve("mine", image.executable), image.resolve("outer", image.executable)
    assert mine is not None
    assert outer is not None
    assert mine.type == outer.type == SymbolType.TLS
    for definition, value in ((mine, 3), (outer, 8)):
        offset = image.thread_offset(definition)
        assert offset is not None
        assert offset < 0
        assert image.target.memory.read(thread_pointer(image) + offset, 4) == value.to_bytes(4, "little")


def test_refreshing_keeps_what_is_still_there(image: Image) -> None:
    before = image.modules
    image.refresh()
    assert image.modules is before


def test_a_replaced_executable_is_read_as_it_was(tmp_path: Path) -> None:
    program = link(tmp_path, *STYLES["pie"])
    with running(program) as target:
        value = Image(target).resolve("own", Image(target).executable)
        program.unlink()
        program.write_text("something else\n")
        again = Image(target)
        found = again.resolve("own", again.executable)
        assert found is not None
        assert value is not None
        assert found.address == value.address


def test_a_preloaded_library_comes_first(tmp_path: Path) -> None:
    program = link(tmp_path, *STYLES["pie"])
    preloaded = library(tmp_path, "before", "int both(void) { return 7; }\n")
    with running(program, environment={**os.environ, "LD_PRELOAD": str(preloaded)}) as target:
        image = Image(target)
        found = image.resolve("both", image.executable)
        assert found is not None
        assert found.module.name == "libbefore.so"


LOADER = r"""
#include <dlfcn.h>
extern void wait_for_end(void);
int main(int n, char **v)
{
    for (int i = 1; i < n; i++)
        if (!dlopen(v[i], RTLD_NOW | RTLD_LOCAL))
            return 1;
    wait_for_end();
    return 0;
}
"""


def test_what_only_a_late_library_defines_is_found_and_two_are_refused(tmp_path: Path) -> None:
    libraries = [library(tmp_path, "right", RIGHT), library(tmp_path, "late", LATE)]
    main = compile_text(LOADER, tmp_path / "main.o", name="main.c")
    run("gcc", "-o", tmp_path / "program", main, waiting_object(tmp_path))
    with running(tmp_path / "program", *map(str, libraries)) as target:
        image = Image(target)
        late = image.resolve("late", image.executable)
        assert late is not None
        assert late.module.name == "liblate.so"
        with pytest.raises(UnsafeChange, match=r"`twice` is defined by") as caught:
            image.resolve("twice", image.executable)
        assert caught.value.code == "ambiguous-symbol"
        assert re.search(r"liblate\.so", caught.value.message)
        own = image.resolve("twice", module_named(image, "liblate"))
        assert own is not None
        assert own.module.name == "liblate.so"


def test_the_address_of_an_import_in_a_fixed_executable_is_its_own_stub(tmp_path: Path) -> None:
    text = "#include <stdio.h>\nextern void wait_for_end(void);\nint (*volatile pointer)(const char *);\n"
    text += 'int main(void) { pointer = puts; wait_for_end(); return puts("end"); }\n'
    main = compile_text(text, tmp_path / "main.o", "-O1", "-fno-pie", name="main.c")
    run("gcc", "-no-pie", "-o", tmp_path / "program", main, waiting_object(tmp_path))
    with running(tmp_path / "program") as target:
        image = Image(target)
        pointer = image.resolve("pointer", image.executable)
        assert pointer is not None
        assert image.canonical_plt("puts") == target.memory.read_u64(pointer.address)
        stub = image.import_at(target.memory.read_u64(pointer.address))
        assert stub is not None
        assert stub.name == "puts"
        assert image.canonical_plt("printf") is None


def test_a_static_program_resolves_within_itself(tmp_path: Path) -> None:
    text = "#include <string.h>\nextern void wait_for_end(void);\n"
    text += "size_t (*volatile length)(const char *) = strlen;\n"
    text += "int main(int n, char **v) { wait_for_end(); return n + (int)length(v[0]); }\n"
    main = compile_text(text, tmp_path / "main.o", "-O1", name="main.c")
    run("gcc", "-static", "-o", tmp_path / "program", main, waiting_object(tmp_path))
    with running(tmp_path / "program") as target:
        image = Image(target)
        assert [m.name for m in image.modules] == ["program"]
        strlen = image.resolve("strlen", image.executable)
        assert strlen is not None
        assert strlen.ifunc
        chosen = image.chosen(strlen)
        assert chosen is not None
        assert "strlen" in {s.name.strip("_").partition("_")[0] for s in image.executable.symbols_at(chosen)}
