"""The raw tables of an ELF64 little-endian file, as numpy arrays over its bytes.

Decides only whether a table lies within the file; what the entries mean is left to the readers.
Bulk tables (symbols, relocations) are never turned into objects here: a large program has a
million symbols, and a unit's debug relocations are never looked at.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from patcher.errors import ObjectError

ET_REL, ET_EXEC, ET_DYN, ET_CORE = 1, 2, 3, 4
EM_X86_64 = 62

SHT_NULL, SHT_PROGBITS, SHT_SYMTAB, SHT_STRTAB, SHT_RELA, SHT_NOBITS, SHT_REL = 0, 1, 2, 3, 4, 8, 9
SHT_DYNSYM, SHT_GROUP, SHT_SYMTAB_SHNDX = 11, 17, 18
SHT_X86_64_UNWIND = 0x70000001

SHF_WRITE, SHF_ALLOC, SHF_EXECINSTR, SHF_MERGE, SHF_STRINGS = 0x1, 0x2, 0x4, 0x10, 0x20
SHF_GROUP, SHF_TLS, SHF_COMPRESSED = 0x200, 0x400, 0x800

SHN_UNDEF, SHN_LORESERVE, SHN_ABS, SHN_COMMON, SHN_XINDEX = 0, 0xFF00, 0xFFF1, 0xFFF2, 0xFFFF
SHN_X86_64_LCOMMON = 0xFF02
STV_PROTECTED = 3

PT_LOAD, PT_DYNAMIC, PT_INTERP, PT_NOTE, PT_PHDR, PT_TLS = 1, 2, 3, 4, 6, 7
PT_GNU_RELRO = 0x6474E552

ELF_MAGIC = b"\x7fELF"
BITCODE_MAGIC = (b"BC\xc0\xde", b"\xde\xc0\x17\x0b")  # plain, and in LLVM's wrapper
OBJECT_MAGIC = (ELF_MAGIC, *BITCODE_MAGIC)

EHDR = np.dtype(
    [
        ("ident", "V16"),
        ("type", "<u2"),
        ("machine", "<u2"),
        ("version", "<u4"),
        ("entry", "<u8"),
        ("phoff", "<u8"),
        ("shoff", "<u8"),
        ("flags", "<u4"),
        ("ehsize", "<u2"),
        ("phentsize", "<u2"),
        ("phnum", "<u2"),
        ("shentsize", "<u2"),
        ("shnum", "<u2"),
        ("shstrndx", "<u2"),
    ]
)
SHDR = np.dtype(
    [
        ("name", "<u4"),
        ("type", "<u4"),
        ("flags", "<u8"),
        ("address", "<u8"),
        ("offset", "<u8"),
        ("size", "<u8"),
        ("link", "<u4"),
        ("info", "<u4"),
        ("alignment", "<u8"),
        ("entry_size", "<u8"),
    ]
)
PHDR = np.dtype(
    [
        ("type", "<u4"),
        ("flags", "<u4"),
        ("offset", "<u8"),
        ("address", "<u8"),
        ("physical", "<u8"),
        ("file_size", "<u8"),
        ("memory_size", "<u8"),
        ("alignment", "<u8"),
    ]
)
SYM = np.dtype(
    [("name", "<u4"), ("info", "u1"), ("other", "u1"), ("section", "<u2"), ("value", "<u8"), ("size", "<u8")]
)
RELA = np.dtype([("offset", "<u8"), ("type", "<u4"), ("symbol", "<u4"), ("addend", "<i8")])

Table = npt.NDArray[Any]

_MACHINES = {3: "x86", 40: "arm", 183: "aarch64", 243: "riscv", 21: "powerpc64", 8: "mips", 22: "s390"}


class Contents(Protocol):
    """The bytes of a file, a part at a time."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> memoryview: ...


class OpenFile:
    """The bytes of an open file, each part read when it is asked for.

    Not mapped: when somebody truncates a mapped file, reading it ends us (SIGBUS).
    """

    def __init__(self, name: str, descriptor: int) -> None:
        self._name = name
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice, /) -> memoryview:
        start, end, _ = part.indices(self._size)
        try:
            data = os.pread(self._descriptor, max(0, end - start), start)
            while data and start + len(data) < end:  # the kernel reads at most 2 GiB at a time
                more = os.pread(self._descriptor, end - start - len(data), start + len(data))
                data = data + more if more else b""
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise ObjectError(f"{self._name}: {reason}", "check that it can be read") from None
        if len(data) < end - start:
            raise ObjectError(f"{self._name}: became shorter while it was read", "wait until it is written")
        return memoryview(data)


@dataclass(frozen=True, slots=True)
class RawFile:
    """An ELF file's header and its section and program header tables."""

    name: str
    data: Contents
    type: int
    section_headers: Table
    program_headers: Table
    section_names: bytes

    def table(self, section: int, dtype: np.dtype[Any]) -> Table:
        """Return the entries of a section as an array. Raises `ObjectError` when they lie outside the file."""
        header = self.section_headers[section]
        count = int(header["size"]) // dtype.itemsize
        return _array(self.name, self.data, int(header["offset"]), count, dtype, f"section {section}")

    def contents(self, section: int) -> memoryview:
        """Return a section's bytes; empty for a section that takes no room in the file."""
        header = self.section_headers[section]
        if int(header["type"]) == SHT_NOBITS:
            return self.data[:0]
        start, size = int(header["offset"]), int(header["size"])
        if start + size > len(self.data):
            raise ObjectError(
                f"{self.name}: section {section} ({self.section_name(section)}) reaches beyond the end of the file",
                "the file is truncated; compile it again",
            )
        return self.data[start : start + size]

    def section_name(self, section: int) -> str:
        return string_at(self.section_names, int(self.section_headers[section]["name"]))


def as_bytes(view: memoryview) -> bytes:
    """Return the bytes of a view; those of a part of an `OpenFile` are not copied."""
    whole = view.obj
    return whole if isinstance(whole, bytes) and len(whole) == view.nbytes else bytes(view)


def string_at(strings: bytes, offset: int) -> str:
    """Return the NUL-terminated string at `offset` of a string table ("" when it lies outside)."""
    if offset >= len(strings):
        return ""
    end = strings.find(b"\0", offset)
    return strings[offset : end if end >= 0 else len(strings)].decode("utf-8", "replace")


def strings_at(strings: bytes, offsets: npt.NDArray[Any]) -> list[str]:
    """Return what `string_at` returns, for many offsets at once."""
    ended = strings + b"\0"
    terminators = np.flatnonzero(np.frombuffer(ended, np.uint8) == 0)
    starts = np.minimum(offsets.astype(np.int64), len(strings))
    extents = zip(starts.tolist(), terminators[np.searchsorted(terminators, starts)].tolist(), strict=True)
    if ended.isascii():  # cutting text is quicker than decoding every piece
        text = ended.decode("ascii")
        return [text[start:end] for start, end in extents]
    return [ended[start:end].decode("utf-8", "replace") for start, end in extents]


def read_raw(name: str, data: bytes | memoryview | OpenFile) -> RawFile:
    """Read the tables of an ELF64 x86-64 file. Raises `ObjectError` naming what it is instead."""
    view = data if isinstance(data, OpenFile) else memoryview(data)
    _check_identity(name, view)
    header = np.frombuffer(view[: EHDR.itemsize], EHDR)[0]
    machine = int(header["machine"])
    if machine != EM_X86_64:
        known = _MACHINES.get(machine, f"machine {machine}")
        raise ObjectError(
            f"{name}: built for {known}, not for x86-64", "compile it for the machine the process runs on"
        )
    shoff, shnum, shstrndx = int(header["shoff"]), int(header["shnum"]), int(header["shstrndx"])
    if shoff and (shnum == 0 or shstrndx == SHN_XINDEX):
        # More than 65,279 sections: the counts stand in section header 0 (System V ABI, chapter 4).
        first = _array(name, view, shoff, 1, SHDR, "section header table")[0]
        shnum = shnum or int(first["size"])
        shstrndx = int(first["link"]) if shstrndx == SHN_XINDEX else shstrndx
    if shoff and int(header["shentsize"]) != SHDR.itemsize:
        raise ObjectError(f"{name}: section headers of {int(header['shentsize'])} bytes", "the file is damaged")
    sections = _array(name, view, shoff, shnum if shoff else 0, SHDR, "section header table")
    phnum = int(header["phnum"]) if int(header["phoff"]) else 0
    programs = _array(name, view, int(header["phoff"]), phnum, PHDR, "program header table")
    raw = RawFile(name, view, int(header["type"]), sections, programs, b"")
    if not shstrndx:
        return raw
    if shstrndx >= len(sections):
        raise ObjectError(f"{name}: no section {shstrndx} for the section names", "the file is damaged")
    return RawFile(name, view, raw.type, sections, programs, bytes(raw.contents(shstrndx)))


def _check_identity(name: str, view: Contents) -> None:
    if len(view) == 0:
        raise ObjectError(f"{name}: the file is empty", "compile it again")
    start = bytes(view[:16])
    if start[:4] in BITCODE_MAGIC:
        raise ObjectError(f"{name}: LLVM bytecode (LTO), not machine code", "compile it with -fno-lto")
    if start[:4] != ELF_MAGIC:
        raise ObjectError(
            f"{name}: not an ELF file", "give a relocatable object (.o), an archive (.a) or a source file"
        )
    if len(view) < EHDR.itemsize:
        raise ObjectError(f"{name}: cut off within the ELF header", "the file is truncated; compile it again")
    if start[4] != 2 or start[5] != 1:
        raise ObjectError(f"{name}: not a 64-bit little-endian ELF file", "compile it for x86-64")


def _array(name: str, view: Contents, offset: int, count: int, dtype: np.dtype[Any], what: str) -> Table:
    if count == 0:
        return np.empty(0, dtype)
    if offset + count * dtype.itemsize > len(view):
        raise ObjectError(
            f"{name}: the {what} reaches beyond the end of the file", "the file is truncated; compile it again"
        )
    return np.frombuffer(view[offset : offset + count * dtype.itemsize], dtype)
