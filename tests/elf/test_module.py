"""Executables and shared libraries as the dynamic linker sees them, and where their symbols come from."""

from __future__ import annotations

import contextlib
import lzma
import shutil
from pathlib import Path

import pytest
from living import compile_text, run

from elf.samples import TEXT
from patcher.elf.module import Module, read_module
from patcher.elf.relocations import R
from patcher.errors import ObjectError

MAIN = TEXT + "__thread int theirs;\nint main(int n, char **v) { (void)v; return work(n); }\n"
KINDS = {
    "pie": ((), ("-pie",)),
    "fixed": (("-fno-pie",), ("-no-pie",)),
    "static": (("-fno-pie",), ("-static",)),
    "static-pie": ((), ("-static-pie",)),
    "library": (("-fPIC",), ("-shared", "-Wl,-soname,libsample.so.3")),
}


def link(folder: Path, kind: str = "pie", *options: str, linker: str = "bfd", text: str = MAIN) -> Path:
    flags, mode = KINDS[kind]
    unit = compile_text(text, folder / "main.o", "-O1", *flags)
    run("gcc", f"-fuse-ld={linker}", *mode, *options, "-o", folder / "program", unit)
    return folder / "program"


def read(path: Path) -> Module:
    return read_module(path.name, path)


def listed(path: Path, name: str) -> int:
    return next(int(f[0], 16) for f in (line.split() for line in run("nm", path).splitlines()) if f[-1] == name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("linker", ["bfd", "gold", "lld", "mold"])
def test_every_kind_by_every_linker(tmp_path: Path, kind: str, linker: str) -> None:
    if (kind, linker) == ("static-pie", "gold"):
        pytest.skip("gold has no --no-dynamic-linker")
    program = link(tmp_path, kind, linker=linker)
    module = read(program)
    assert module.position_independent == (kind not in ("fixed", "static"))
    assert [s.value for s in module.symbols.named("work")] == [listed(program, "work")]
    (total,) = module.symbols.named("total")
    assert (total.local, total.size, module.symbols.group_name(total.group)) == (True, 4, "unit.c")
    low, high = module.text
    assert low <= listed(program, "work") < high
    assert bool(module.interpreter) == (kind in ("pie", "fixed"))
    assert module.thread_storage is not None
    assert module.thread_storage.memory_size >= 8
    assert module.demotes == (linker == "mold")
    if kind == "library":
        assert module.soname == "libsample.so.3"
        (work,) = module.exports["work"]
        assert work.defined
        assert work.value == listed(program, "work")
    if "static" not in kind:
        assert "libc.so.6" in module.needed
        (puts,) = module.cells_named("puts")
        assert module.cells[puts].type in (R.JUMP_SLOT, R.GLOB_DAT)
        assert module.in_offset_table(puts)
        assert not module.in_offset_table(listed(program, "exported"))
    else:
        assert module.resolver_cells
        assert {module.cells[c].type for c in module.resolver_cells} == {R.IRELATIVE}


def test_constants_are_told_from_variables(tmp_path: Path) -> None:
    program = link(tmp_path)
    module = read(program)
    assert module.constant(listed(program, "factor"), 8)
    assert module.constant(listed(program, "items"), 32)  # relocated, and read-only from then on (RELRO)
    assert not module.constant(listed(program, "exported"), 4)
    assert not module.constant(listed(program, "zeroed"), 32)


@pytest.mark.parametrize("linker", ["bfd", "lld", "mold"])
def test_packed_relative_relocations_are_no_cells_with_names(tmp_path: Path, linker: str) -> None:
    option = "-Wl,--pack-dyn-relocs=relr" if linker != "bfd" else "-Wl,-z,pack-relative-relocs"
    module = read(link(tmp_path, "pie", option, linker=linker))
    assert module.cells_named("puts")
    assert all(not c.name for c in module.cells.values() if c.type == R.RELATIVE)


def test_versions_and_which_is_the_default(tmp_path: Path) -> None:
    text = (
        "int old(void) { return 1; }\nint new(void) { return 2; }\n"
        '__asm__(".symver old, call@V1");\n__asm__(".symver new, call@@V2");\n'
    )
    script = tmp_path / "versions"
    script.write_text("V1 { global: call; local: *; };\nV2 { global: call; } V1;\n")
    module = read(link(tmp_path, "library", f"-Wl,--version-script={script}", text=text))
    found = {(s.version, s.default) for s in module.exports["call"]}
    assert found == {("V1", False), ("V2", True)}
    assert not module.exports.get("old")


# --- where symbols come from ---


def names(module: Module) -> set[str]:
    return {name for name in ("work", "total", "main") if module.symbols.named(name)}


def test_a_stripped_program_has_what_the_dynamic_linker_needs_and_no_more(tmp_path: Path) -> None:
    program = link(tmp_path)
    run("strip", program)
    module = read(program)
    assert (len(module.symbols), module.symbols_from) == (0, "")
    assert module.cells_named("puts")


def test_symbols_come_from_a_debug_file_of_the_same_build(tmp_path: Path) -> None:
    program = link(tmp_path, "pie", "-Wl,--build-id")
    debug, other = tmp_path / "program.debug", tmp_path / "other.debug"
    run("objcopy", "--only-keep-debug", program, debug)
    shutil.copy(debug, other)
    run("strip", program)
    run("objcopy", f"--add-gnu-debuglink={debug}", program)
    asked: list[tuple[str, str]] = []

    def search(found: list[Path]) -> Module:
        def where(build_id: str, file: str) -> list[Path]:
            asked.append((build_id, file))
            return found

        return read_module("program", program, where)

    module = search([tmp_path / "missing", debug])
    assert names(module) == {"work", "total", "main"}
    assert module.symbols_from == str(debug)
    assert asked == [(module.build_id, "program.debug")]
    assert len(module.build_id) == 40
    assert module.in_offset_table(module.cells_named("puts")[0]), "a debug file's sections hold nothing"
    link(tmp_path, "pie", "-Wl,--build-id", text=MAIN + "int more;\n")
    run("objcopy", "--only-keep-debug", tmp_path / "program", other)
    run("strip", tmp_path / "program")
    assert names(search([debug])) == set(), "a file of another build"
    assert names(search([debug, other])) == {"work", "total", "main"}


def test_symbols_come_from_a_compressed_table_in_the_file(tmp_path: Path) -> None:
    program = link(tmp_path)
    small, packed = tmp_path / "small", tmp_path / "small.xz"
    run("objcopy", "-S", "--remove-section", ".comment", "--keep-symbol=work", "--keep-symbol=main", program, small)
    packed.write_bytes(lzma.compress(small.read_bytes()))
    run("strip", program)
    run("objcopy", f"--add-section=.gnu_debugdata={packed}", program)
    module = read(program)
    assert names(module) == {"work", "main"}
    assert module.symbols_from == "program:.gnu_debugdata"
    packed.write_bytes(b"\xfd7zXZ damaged")
    run("objcopy", f"--update-section=.gnu_debugdata={packed}", program)
    assert names(read(program)) == set()


# --- what is no module ---


@pytest.mark.parametrize(
    ("contents", "sentence"),
    [(b"", "the file is empty"), (b"#!/bin/sh\n", "not an ELF file"), (None, "no such file")],
)
def test_what_is_no_module_is_refused(tmp_path: Path, contents: bytes | None, sentence: str) -> None:
    if contents is not None:
        (tmp_path / "file").write_bytes(contents)
    with pytest.raises(ObjectError, match=sentence):
        read(tmp_path / "file")


def test_an_object_is_no_module(tmp_path: Path) -> None:
    with pytest.raises(ObjectError, match="not an executable or shared library"):
        read(compile_text(TEXT, tmp_path / "unit.o"))


def test_a_truncated_module_is_refused_or_read_never_more(tmp_path: Path) -> None:
    data = link(tmp_path).read_bytes()
    cut = tmp_path / "cut"
    refused = 0
    for size in range(0, len(data), 512):
        cut.write_bytes(data[:size])
        try:
            read(cut)
        except ObjectError:
            refused += 1
    assert refused > 0


def test_damaged_headers_of_a_module_are_refused_or_read_never_more(tmp_path: Path) -> None:
    data = bytearray(link(tmp_path).read_bytes())
    program = tmp_path / "damaged"
    for offset in range(16, 64 + 56 * 13, 3):
        original = data[offset]
        for value in (original ^ 1, original ^ 0x80, 0xFF):
            data[offset] = value
            program.write_bytes(data)
            with contextlib.suppress(ObjectError):
                read(program)
        data[offset] = original
