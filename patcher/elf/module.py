"""A module: an executable or shared library as the dynamic linker sees it, with its symbols.

What the dynamic linker reads comes from `dynamic`, the static symbol table from `symbols`. The file is read
in parts, those that are needed: debug information is not. All addresses are link-time.

Specification: System V ABI, chapter 5; AMD64 supplement, sections 5.1-5.2.
"""

from __future__ import annotations

import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from patcher.elf import tables as t
from patcher.elf.dynamic import Cell, Cells, DynamicSymbol, Exports, read_dynamic
from patcher.elf.relocations import R
from patcher.elf.symbols import StaticSymbol, SymbolIndex
from patcher.errors import ObjectError

__all__ = ["Cell", "DynamicSymbol", "Module", "Segment", "ThreadStorage", "read_module"]


@dataclass(frozen=True, slots=True)
class Segment:
    """One PT_LOAD segment."""

    address: int
    memory_size: int
    file_size: int
    offset: int
    flags: int

    @property
    def executable(self) -> bool:
        return bool(self.flags & 1)

    @property
    def writable(self) -> bool:
        return bool(self.flags & 2)

    @property
    def end(self) -> int:
        return self.address + self.memory_size


@dataclass(frozen=True, slots=True)
class ThreadStorage:
    """The PT_TLS segment: the initial image of the module's thread-local variables, and how many zeros follow."""

    address: int
    memory_size: int
    alignment: int
    file_size: int = 0


@dataclass(frozen=True, eq=False)
class Module:
    """One ELF file that can be mapped. `symbols` is empty for a stripped file without debug file."""

    name: str
    build_id: str
    position_independent: bool
    entry: int
    segments: tuple[Segment, ...]
    thread_storage: ThreadStorage | None
    dynamic_section: int
    soname: str
    needed: tuple[str, ...]
    symbolic: bool  # its own definitions come first for its own references (-Bsymbolic)
    interpreter: str
    cells: Cells
    offset_tables: tuple[tuple[int, int], ...]  # extents of the GOT's sections; empty without section headers
    code_sections: tuple[tuple[int, int], ...]  # extents of what is executable; whole segments without section headers
    stub_tables: tuple[tuple[int, int], ...]  # extents of the PLT's sections, likewise
    read_only_after_start: tuple[int, int]  # what the dynamic linker protects once it has relocated (PT_GNU_RELRO)
    exports: Exports
    symbols: SymbolIndex
    demotes: bool  # linked by mold, which turns an executable's own globals into local symbols
    symbols_from: str  # where the static symbols came from, for messages; "" when there are none

    def constant(self, address: int, size: int) -> bool:
        """Tell whether some bytes lie in a segment that the program cannot write to once it runs."""
        low, high = self.read_only_after_start
        if low <= address and address + size <= high:
            return True
        return any(not s.writable and s.address <= address and address + size <= s.end for s in self.segments)

    def in_offset_table(self, address: int) -> bool:
        """Tell whether a cell lies in the global offset table, as far as the file tells where that is."""
        return not self.offset_tables or any(low <= address < high for low, high in self.offset_tables)

    def demoted(self, symbol: StaticSymbol) -> bool:
        """Tell whether a local symbol is, or with `demotes` may be, a global that the linker turned local."""
        return symbol.local and (self.demotes or symbol.hidden or symbol.group in self._nameless_groups)

    @cached_property
    def _nameless_groups(self) -> frozenset[int]:
        return frozenset((-1, *self.symbols.groups("")))

    @property
    def start(self) -> int:
        return self.segments[0].address & ~0xFFF

    @property
    def end(self) -> int:
        return max(s.end for s in self.segments)

    def asks_for(self, imported: str, wanted: str) -> bool:
        """Tell whether an import of the module is what an object calls `wanted`: a name, or `name@version`."""
        name, _, version = wanted.partition("@")
        if name != imported or not version:
            return name == imported
        return {s.version for s in self.exports.get(name, ())} == {version.lstrip("@")}

    def cells_named(self, name: str) -> list[int]:
        """Return the addresses of the cells that are relocated against a symbol."""
        return self.cells.named(name)

    @cached_property
    def resolver_cells(self) -> tuple[int, ...]:
        """Addresses of the cells that an IFUNC's resolver fills without a symbol (R_X86_64_IRELATIVE)."""
        return tuple(self.cells.of_type(R.IRELATIVE))

    def exported_at(self, address: int) -> list[str]:
        """Return the names of the exported symbols that start at a link-time address."""
        return self.exports.names_at(address)

    @property
    def text(self) -> tuple[int, int]:
        """Return the link-time extent of the executable segments."""
        executable = [s for s in self.segments if s.executable]
        return min(s.address for s in executable), max(s.end for s in executable)


def read_module(name: str, path: Path, debug_files: Callable[[str, str], list[Path]] | None = None) -> Module:
    """Read a module from `path`, calling it `name`.

    `debug_files(build_id, debuglink)` lists where separate debug information may lie; the first file
    with the same build-id and a symbol table is used when the module itself has been stripped.
    Raises `ObjectError` when it is not an x86-64 executable or shared library.
    """
    with _opened(name, path) as raw:
        return _read(raw, debug_files)


@contextmanager
def _opened(name: str, path: Path) -> Iterator[t.RawFile]:
    try:
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise ObjectError(f"{name}: {(error.strerror or str(error)).lower()}", "check that it can be read") from None
    with file:
        yield t.read_raw(name, t.OpenFile(name, file.fileno()))


def _read(raw: t.RawFile, debug_files: Callable[[str, str], list[Path]] | None) -> Module:
    if raw.type not in (t.ET_EXEC, t.ET_DYN):
        raise ObjectError(f"{raw.name}: not an executable or shared library", "")
    segments = tuple(
        Segment(int(p["address"]), int(p["memory_size"]), int(p["file_size"]), int(p["offset"]), int(p["flags"]))
        for p in raw.program_headers
        if int(p["type"]) == t.PT_LOAD and int(p["memory_size"])
    )
    if not any(s.executable for s in segments):
        raise ObjectError(f"{raw.name}: has no executable segment", "")
    build_id = _build_id(raw)
    dynamic = read_dynamic(raw, build_id)
    symbols, origin = _static_symbols(raw, build_id, debug_files)
    return Module(
        name=raw.name,
        build_id=build_id,
        position_independent=raw.type == t.ET_DYN,
        entry=int(np.frombuffer(raw.data[: t.EHDR.itemsize], t.EHDR)[0]["entry"]),
        segments=segments,
        thread_storage=_thread_storage(raw),
        dynamic_section=dynamic.address,
        soname=dynamic.soname,
        needed=dynamic.needed,
        symbolic=dynamic.symbolic,
        interpreter=_interpreter(raw),
        cells=dynamic.cells,
        offset_tables=_extents(raw, ".got", ".got.plt"),
        code_sections=_code_sections(raw, segments),
        stub_tables=_extents(raw, ".plt", ".plt.sec", ".plt.got", ".iplt"),
        read_only_after_start=_relro(raw),
        exports=dynamic.exports,
        symbols=symbols,
        demotes=_linked_by_mold(raw),
        symbols_from=origin,
    )


def _interpreter(raw: t.RawFile) -> str:
    for p in raw.program_headers:
        if int(p["type"]) == t.PT_INTERP:
            return t.string_at(bytes(raw.data[int(p["offset"]) : int(p["offset"]) + int(p["file_size"])]), 0)
    return ""


def _thread_storage(raw: t.RawFile) -> ThreadStorage | None:
    for p in raw.program_headers:
        if int(p["type"]) == t.PT_TLS:
            sizes = int(p["memory_size"]), int(p["alignment"]) or 1, int(p["file_size"])
            return ThreadStorage(int(p["address"]), *sizes)
    return None


def _relro(raw: t.RawFile) -> tuple[int, int]:
    for p in raw.program_headers:
        if int(p["type"]) == t.PT_GNU_RELRO:
            return int(p["address"]), int(p["address"]) + int(p["memory_size"])
    return 0, 0


def _linked_by_mold(raw: t.RawFile) -> bool:
    names = [raw.section_name(i) for i in range(len(raw.section_headers))]
    return ".comment" in names and b"\0mold " in b"\0" + bytes(raw.contents(names.index(".comment")))


def _extents(raw: t.RawFile, *names: str) -> tuple[tuple[int, int], ...]:
    return tuple(
        (address, address + size)
        for name, _, _, address, _, size, *_ in raw.section_headers.tolist()
        if t.string_at(raw.section_names, name) in names
    )


def _code_sections(raw: t.RawFile, segments: tuple[Segment, ...]) -> tuple[tuple[int, int], ...]:
    headers = raw.section_headers
    wanted = headers[(headers["flags"] & t.SHF_EXECINSTR) != 0] if len(headers) else ()
    found = tuple((int(s["address"]), int(s["address"]) + int(s["size"])) for s in wanted)
    return found or tuple((s.address, s.end) for s in segments if s.executable)


def _build_id(raw: t.RawFile) -> str:
    for p in raw.program_headers:
        if int(p["type"]) != t.PT_NOTE:
            continue
        notes = bytes(raw.data[int(p["offset"]) : int(p["offset"]) + int(p["file_size"])])
        position = 0
        while position + 12 <= len(notes):
            name_size = int.from_bytes(notes[position : position + 4], "little")
            size = int.from_bytes(notes[position + 4 : position + 8], "little")
            kind = int.from_bytes(notes[position + 8 : position + 12], "little")
            body = position + 12 + (name_size + 3 & ~3)
            if kind == 3 and notes[position + 12 : position + 16] == b"GNU\0":
                return notes[body : body + size].hex()
            position = body + (size + 3 & ~3)
    return ""


def _static_symbols(
    raw: t.RawFile, build_id: str, debug_files: Callable[[str, str], list[Path]] | None
) -> tuple[SymbolIndex, str]:
    own = _symbol_table(raw, build_id)
    if own is not None:
        return own, raw.name
    sections = {raw.section_name(i): i for i in range(len(raw.section_headers))}
    link = ""
    if ".gnu_debuglink" in sections:
        link = t.string_at(bytes(raw.contents(sections[".gnu_debuglink"])), 0)
    for path in debug_files(build_id, link) if debug_files else ():
        try:
            with _opened(str(path), path) as candidate:
                same = not build_id or _build_id_section(candidate) == build_id
                table = _symbol_table(candidate, build_id) if same else None
        except ObjectError:
            continue
        if table is not None:
            return table, str(path)
    if ".gnu_debugdata" in sections:
        try:
            inner = lzma.decompress(bytes(raw.contents(sections[".gnu_debugdata"])))
            table = _symbol_table(t.read_raw(f"{raw.name}:.gnu_debugdata", inner), build_id)
        except (lzma.LZMAError, ObjectError):
            table = None
        if table is not None:
            return table, f"{raw.name}:.gnu_debugdata"
    return SymbolIndex.empty(), ""


def _build_id_section(raw: t.RawFile) -> str:
    # A debug file keeps its notes as a section; the program headers' offsets may point nowhere.
    for i in range(len(raw.section_headers)):
        if raw.section_name(i) == ".note.gnu.build-id":
            return bytes(raw.contents(i))[16:].hex()
    return _build_id(raw)


def _symbol_table(raw: t.RawFile, build_id: str) -> SymbolIndex | None:
    kinds = raw.section_headers["type"].tolist() if len(raw.section_headers) else []
    if t.SHT_SYMTAB not in kinds:
        return None
    index = kinds.index(t.SHT_SYMTAB)
    link = int(raw.section_headers[index]["link"])
    if link >= len(kinds):
        raise ObjectError(f"{raw.name}: the symbol table has no string table", "the file is damaged")
    return SymbolIndex(raw.table(index, t.SYM), t.as_bytes(raw.contents(link)), build_id)
