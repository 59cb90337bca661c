"""FILES: relocatable objects, archives, modules and their symbols.

Everything here is about bytes on disk: addresses are link-time addresses and sections are
as the file has them. Where a module stands in a process is `patcher.image`'s business.

Specification: System V ABI, chapters 4 and 5; its AMD64 supplement.
"""

from patcher.elf.archive import Archive, is_archive, read_archive
from patcher.elf.object import (
    ObjectFile,
    Relocation,
    Section,
    Symbol,
    SymbolBinding,
    SymbolType,
    parse_object,
)
from patcher.elf.reading import defined_names, read_object, read_objects

__all__ = [
    "Archive",
    "ObjectFile",
    "Relocation",
    "Section",
    "Symbol",
    "SymbolBinding",
    "SymbolType",
    "defined_names",
    "is_archive",
    "parse_object",
    "read_archive",
    "read_object",
    "read_objects",
]
