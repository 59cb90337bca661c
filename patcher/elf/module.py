"""A module: an executable or shared library as the dynamic linker sees it, with its symbols.

Dynamic symbols, versions, relocations and program headers come from lief; the static symbol table,
which may have a million entries, is read as arrays (`symbols`). All addresses are link-time.

Specification: System V ABI, chapter 5; AMD64 supplement, sections 5.1-5.2; LSB, symbol versioning.
"""

from __future__ import annotations

import lzma
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from patcher.elf import tables as t
from patcher.elf.object import SymbolType
from patcher.elf.relocations import R
from patcher.elf.symbols import StaticSymbol, SymbolIndex
from patcher.errors import ObjectError

_HIDDEN_VERSION = 0x8000


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
    """The PT_TLS segment: the initial image of the module's thread-local variables."""

    address: int
    memory_size: int
    alignment: int


@dataclass(frozen=True, slots=True)
class DynamicSymbol:
    """One .dynsym entry. `value` of an undefined function may be its canonical PLT address."""

    name: str
    value: int
    size: int
    type: int
    binding: int
    version: str
    default: bool  # the version that a reference without a version binds to
    defined: bool
    absolute: bool = False  # `value` is the same wherever the module is loaded
    protected: bool = False  # the module's own references to it stay within it

    @property
    def function(self) -> bool:
        return self.type in (SymbolType.FUNC, SymbolType.IFUNC)


@dataclass(frozen=True, slots=True)
class Cell:
    """What the dynamic linker puts at one address: a relocation of type `type` against `name` (or "")."""

    type: int
    name: str
    addend: int


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
    interpreter: str
    cells: dict[int, Cell]
    offset_tables: tuple[tuple[int, int], ...]  # extents of the GOT's sections; empty without section headers
    stub_tables: tuple[tuple[int, int], ...]  # extents of the PLT's sections, likewise
    read_only_after_start: tuple[int, int]  # what the dynamic linker protects once it has relocated (PT_GNU_RELRO)
    exports: dict[str, tuple[DynamicSymbol, ...]]
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
        return self._cells_by_name.get(name, [])

    @cached_property
    def _cells_by_name(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for address, cell in self.cells.items():
            if cell.name:
                found.setdefault(cell.name, []).append(address)
        return found

    @cached_property
    def resolver_cells(self) -> tuple[int, ...]:
        """Addresses of the cells that an IFUNC's resolver fills without a symbol (R_X86_64_IRELATIVE)."""
        return tuple(address for address, cell in self.cells.items() if cell.type == R.IRELATIVE)

    def exported_at(self, address: int) -> list[str]:
        """Return the names of the exported symbols that start at a link-time address."""
        return self._exports_by_address.get(address, [])

    @cached_property
    def _exports_by_address(self) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for name, symbols in self.exports.items():
            for symbol in symbols:
                if symbol.defined or symbol.value:
                    found.setdefault(symbol.value, []).append(name)
        return found

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
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ObjectError(f"{name}: {(error.strerror or str(error)).lower()}", "check that it can be read") from None
    raw = t.read_raw(name, data)
    if raw.type not in (t.ET_EXEC, t.ET_DYN):
        raise ObjectError(f"{name}: not an executable or shared library", "")
    linkage = _linkage(name, data)
    segments = tuple(
        Segment(int(p["address"]), int(p["memory_size"]), int(p["file_size"]), int(p["offset"]), int(p["flags"]))
        for p in raw.program_headers
        if int(p["type"]) == t.PT_LOAD and int(p["memory_size"])
    )
    if not any(s.executable for s in segments):
        raise ObjectError(f"{name}: has no executable segment", "")
    build_id = _build_id(raw)
    symbols, origin = _static_symbols(raw, build_id, debug_files)
    dynamic = _dynamic_table(raw)
    return Module(
        name=name,
        build_id=build_id,
        position_independent=raw.type == t.ET_DYN,
        entry=int(np.frombuffer(raw.data, t.EHDR, 1)[0]["entry"]),
        segments=segments,
        thread_storage=_thread_storage(raw),
        dynamic_section=dynamic,
        soname=linkage.soname,
        needed=linkage.needed if dynamic else (),
        interpreter=linkage.interpreter,
        cells=linkage.cells or _resolver_cells(raw),
        offset_tables=_extents(raw, ".got", ".got.plt"),
        stub_tables=_extents(raw, ".plt", ".plt.sec", ".plt.got", ".iplt"),
        read_only_after_start=_relro(raw),
        exports=linkage.exports,
        symbols=symbols,
        demotes=_linked_by_mold(raw),
        symbols_from=origin,
    )


@dataclass(frozen=True, slots=True)
class _Linkage:
    """What the dynamic tables say."""

    soname: str
    needed: tuple[str, ...]
    interpreter: str
    cells: dict[int, Cell]
    exports: dict[str, tuple[DynamicSymbol, ...]]


def _linkage(name: str, data: bytes) -> _Linkage:
    try:
        binary = _parse(name, data)
        interpreter = binary.interpreter if binary.has_interpreter else ""
        return _Linkage(_soname(binary), tuple(binary.libraries), interpreter, _cells(binary), _exports(binary))
    except (SystemError, TypeError, ValueError, RuntimeError, AttributeError) as error:  # lief, on impossible tables
        raise ObjectError(f"{name}: its dynamic tables cannot be read ({error})", "the file is damaged") from None


def _resolver_cells(raw: t.RawFile) -> dict[int, Cell]:
    """Return the cells of a static executable: IFUNCs' only, which its own start-up code fills."""
    found = {}
    for index, header in enumerate(raw.section_headers):
        if int(header["type"]) == t.SHT_RELA and int(header["flags"]) & t.SHF_ALLOC:
            for offset, kind, _, addend in raw.table(index, t.RELA).tolist():
                if kind == R.IRELATIVE:
                    found[offset] = Cell(kind, "", addend)
    return found


def _parse(name: str, data: bytes) -> Any:
    import lief

    lief.logging.disable()
    config = lief.ELF.ParserConfig()
    config.parse_symtab_symbols = False
    config.parse_overlay = False
    binary = lief.ELF.parse(data, config)
    if binary is None:
        raise ObjectError(f"{name}: its dynamic tables cannot be read", "the file is damaged")
    return binary


def _soname(binary: Any) -> str:
    import lief

    entry = binary.get(lief.ELF.DynamicEntry.TAG.SONAME) if binary.has(lief.ELF.DynamicEntry.TAG.SONAME) else None
    return str(entry.name) if entry is not None else ""


def _cells(binary: Any) -> dict[int, Cell]:
    mask = 0xFFFFFFFF
    found = {}
    for relocation in binary.dynamic_relocations:
        found[relocation.address] = _cell(relocation, mask)
    for relocation in binary.pltgot_relocations:
        found[relocation.address] = _cell(relocation, mask)
    return found


def _cell(relocation: Any, mask: int) -> Cell:
    name = relocation.symbol.name if relocation.has_symbol else ""
    return Cell(int(relocation.type) & mask & 0xFF, str(name), relocation.addend)


def _exports(binary: Any) -> dict[str, tuple[DynamicSymbol, ...]]:
    found: dict[str, list[DynamicSymbol]] = {}
    for symbol in binary.dynamic_symbols:
        if not symbol.name:
            continue
        version, default = "", True
        if symbol.has_version:
            entry = symbol.symbol_version
            default = not entry.value & _HIDDEN_VERSION
            version = entry.symbol_version_auxiliary.name if entry.has_auxiliary_version else ""
        found.setdefault(symbol.name, []).append(
            DynamicSymbol(
                symbol.name,
                symbol.value,
                symbol.size,
                symbol.type.value,
                symbol.binding.value,
                version,
                default,
                symbol.shndx != t.SHN_UNDEF,
                symbol.shndx == t.SHN_ABS,
                symbol.visibility.value == t.STV_PROTECTED,
            )
        )
    return {name: tuple(symbols) for name, symbols in found.items()}


def _thread_storage(raw: t.RawFile) -> ThreadStorage | None:
    for p in raw.program_headers:
        if int(p["type"]) == t.PT_TLS:
            return ThreadStorage(int(p["address"]), int(p["memory_size"]), int(p["alignment"]) or 1)
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


def _dynamic_table(raw: t.RawFile) -> int:
    return next((int(p["address"]) for p in raw.program_headers if int(p["type"]) == t.PT_DYNAMIC), 0)


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
    own = _symbol_table(raw)
    if own is not None:
        return own, raw.name
    sections = {raw.section_name(i): i for i in range(len(raw.section_headers))}
    link = ""
    if ".gnu_debuglink" in sections:
        link = t.string_at(bytes(raw.contents(sections[".gnu_debuglink"])), 0)
    for path in debug_files(build_id, link) if debug_files else ():
        try:
            candidate = t.read_raw(str(path), path.read_bytes())
        except (OSError, ObjectError):
            continue
        table = _symbol_table(candidate) if not build_id or _build_id_section(candidate) == build_id else None
        if table is not None:
            return table, str(path)
    if ".gnu_debugdata" in sections:
        try:
            inner = lzma.decompress(bytes(raw.contents(sections[".gnu_debugdata"])))
            table = _symbol_table(t.read_raw(f"{raw.name}:.gnu_debugdata", inner))
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


def _symbol_table(raw: t.RawFile) -> SymbolIndex | None:
    kinds = raw.section_headers["type"].tolist() if len(raw.section_headers) else []
    if t.SHT_SYMTAB not in kinds:
        return None
    index = kinds.index(t.SHT_SYMTAB)
    link = int(raw.section_headers[index]["link"])
    if link >= len(kinds):
        raise ObjectError(f"{raw.name}: the symbol table has no string table", "the file is damaged")
    return SymbolIndex(raw.table(index, t.SYM), bytes(raw.contents(link)))
