"""A shared object that has nothing but thread-local storage: what a dynamic linker needs to give each thread a block.

One writable segment holds all of it: headers, the dynamic section, two cells that the dynamic linker fills (the
module's number, and where its block starts), and the initial image. It has no code, defines no name and needs none.
Decides the bytes; how large the block is and what it starts with is the caller's to say.

Specification: System V ABI, chapters 4 and 5; Drepper, ELF Handling For Thread-Local Storage, section 3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from patcher.elf.relocations import R
from patcher.elf.tables import ELF_MAGIC, EM_X86_64, ET_DYN, PT_DYNAMIC, PT_LOAD, PT_TLS

PAGE = 4096

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_RELA = struct.Struct("<QQq")
_SYMBOL_SIZE = 24
_PT_GNU_STACK = 0x6474E551
_READ_WRITE = 6

_HASH = _EHDR.size + 4 * _PHDR.size
_SYMBOLS = _HASH + 16
_RELOCATIONS = _SYMBOLS + _SYMBOL_SIZE
NUMBER_CELL = _RELOCATIONS + 2 * _RELA.size
"""Where the dynamic linker writes the number of the module, counted from the start of the file."""
OFFSET_CELL = NUMBER_CELL + 8
"""Where it writes how far the block is from the thread pointer (negative), if that is the same in each thread."""
_DYNAMIC = OFFSET_CELL + 8
_NEEDED_TAGS = 12
NAMES = _DYNAMIC + 16 * _NEEDED_TAGS
"""Where the names are: an empty one, and the module's own."""

_DT_NULL, _DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_RELA, _DT_RELASZ, _DT_RELAENT = 0, 4, 5, 6, 7, 8, 9
_DT_STRSZ, _DT_SYMENT, _DT_SONAME, _DT_FLAGS, _DT_FLAGS_1 = 10, 11, 14, 30, 0x6FFFFFFB
_BIND_NOW, _STATIC_TLS = 0x8, 0x10
_NOW, _NODELETE = 0x1, 0x8


@dataclass(frozen=True, slots=True)
class LoadedBlock:
    """What a module of this kind says of itself once it is loaded: its number, the distance of its block from the
    thread pointer (0 where that differs), where its initial image is, counted from the start of the module, and the
    sizes of image and block."""

    number: int
    distance: int
    image: int
    image_size: int
    size: int


HEAD_SIZE = _DYNAMIC
"""How much of a loaded module `loaded_block` has to see."""


def loaded_block(head: bytes) -> LoadedBlock | None:
    """Read what the dynamic linker filled in; None for anything that is no module of this kind."""
    if len(head) < HEAD_SIZE or head[: _EHDR.size] != _header():
        return None
    _, _, _, image, _, image_size, size, _ = _PHDR.unpack_from(head, _EHDR.size + 2 * _PHDR.size)
    number, distance = struct.unpack_from("<qq", head, NUMBER_CELL)
    return LoadedBlock(number, distance, image, image_size, size)


@dataclass(frozen=True, slots=True)
class ThreadBlock:
    """A block that each thread is to have: its size and alignment, and the bytes it starts with, then zeros.

    `static`: at a fixed distance from the thread pointer, or the module cannot be loaded at all.
    """

    size: int
    alignment: int
    image: bytes
    static: bool


def names_of(soname: str) -> bytes:
    """Return the string table of a module."""
    return b"\0" + soname.encode() + b"\0"


def thread_module(soname: str, block: ThreadBlock) -> bytes:
    """Return the file of a module that has one thread-local block."""
    names = names_of(soname)
    start = -(-(NAMES + len(names)) // block.alignment) * block.alignment
    size = start + len(block.image)
    relocations = _relocations(static=block.static)
    head = b"".join(
        (
            _header(),
            _PHDR.pack(PT_LOAD, _READ_WRITE, 0, 0, 0, size, size, PAGE),
            _PHDR.pack(PT_DYNAMIC, _READ_WRITE, *(_DYNAMIC,) * 3, *(16 * _NEEDED_TAGS,) * 2, 8),
            _PHDR.pack(PT_TLS, 4, *(start,) * 3, len(block.image), block.size, block.alignment),
            _PHDR.pack(_PT_GNU_STACK, _READ_WRITE, 0, 0, 0, 0, 0, 16),  # without it every stack becomes executable
            struct.pack("<4I", 1, 1, 0, 0),  # one bucket, and only the symbol that stands for none
            bytes(_SYMBOL_SIZE),
            relocations.ljust(2 * _RELA.size, b"\0"),
            bytes(16),
            _dynamic(len(names), len(relocations), static=block.static),
            names,
        )
    )
    return head.ljust(start, b"\0") + block.image


def _header() -> bytes:
    ident = ELF_MAGIC + bytes((2, 1, 1, 0))
    return _EHDR.pack(ident, ET_DYN, EM_X86_64, 1, 0, _EHDR.size, 0, 0, _EHDR.size, _PHDR.size, 4, 0, 0, 0)


def _relocations(*, static: bool) -> bytes:
    # The symbol 0 stands for the module itself.
    number = _RELA.pack(NUMBER_CELL, R.DTPMOD64, 0)
    return number + _RELA.pack(OFFSET_CELL, R.TPOFF64, 0) if static else number


def _dynamic(names: int, relocations: int, *, static: bool) -> bytes:
    tags = (
        (_DT_SONAME, 1),
        (_DT_HASH, _HASH),
        (_DT_STRTAB, NAMES),
        (_DT_STRSZ, names),
        (_DT_SYMTAB, _SYMBOLS),
        (_DT_SYMENT, _SYMBOL_SIZE),
        (_DT_RELA, _RELOCATIONS),
        (_DT_RELASZ, relocations),
        (_DT_RELAENT, _RELA.size),
        (_DT_FLAGS, _BIND_NOW | (_STATIC_TLS if static else 0)),
        (_DT_FLAGS_1, _NOW | _NODELETE),
        (_DT_NULL, 0),
    )
    return b"".join(struct.pack("<qQ", tag, value) for tag, value in tags)
