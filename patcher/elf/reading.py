"""Reading objects from disk: one, every object of an archive, or no more than the names that one defines."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from patcher.elf import tables as t
from patcher.elf.archive import is_archive, read_archive
from patcher.elf.object import ObjectFile, SymbolBinding, parse_object
from patcher.errors import ObjectError


def read_object(path: Path) -> ObjectFile:
    """Read one relocatable object. Raises `ObjectError` with what the file is instead."""
    return parse_object(str(path), _file_bytes(path))


def read_objects(path: Path) -> tuple[ObjectFile, ...]:
    """Read an object, or every object of an archive, in archive order."""
    data = _file_bytes(path)
    if not is_archive(data):
        return (parse_object(str(path), data),)
    members = read_archive(path, data)
    objects = tuple(
        parse_object(f"{path}({name})", contents) for name, contents in members if contents[:4] in t.OBJECT_MAGIC
    )
    if not objects:
        raise ObjectError(f"{path}: an archive without objects", "give an archive of relocatable objects")
    return objects


def defined_names(path: Path) -> dict[str, bool]:
    """Return the names that an object defines for others, each with whether its definition is weak.

    Empty for what is no object. Only the symbol table is looked at.
    """
    try:
        raw = t.read_raw(str(path), _file_bytes(path))
        kinds = raw.section_headers["type"].tolist() if raw.type == t.ET_REL else []
        if t.SHT_SYMTAB not in kinds:
            return {}
        index = kinds.index(t.SHT_SYMTAB)
        table = raw.table(index, t.SYM)
        strings = bytes(raw.contents(int(raw.section_headers[index]["link"])))
    except (ObjectError, IndexError):
        return {}
    bindings = table["info"] >> 4
    chosen = np.flatnonzero((table["section"] != t.SHN_UNDEF) & (bindings != SymbolBinding.LOCAL))
    names = (t.string_at(strings, int(offset)) for offset in table["name"][chosen])
    return dict(zip(names, (bindings[chosen] == SymbolBinding.WEAK).tolist(), strict=True))


def _file_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except IsADirectoryError:
        raise ObjectError(f"{path}: is a directory", "give an object, an archive or a source file") from None
    except OSError as error:
        raise ObjectError(f"{path}: {(error.strerror or str(error)).lower()}", "check the path") from None
