"""COMPILED FROM: which source file an object's debug information says it was compiled from, and by which compiler.

Specification: DWARF 5, section 3.1.1: DW_AT_name, DW_AT_comp_dir, DW_AT_producer.
"""

from __future__ import annotations

from patcher.data.dies import At, Dies, NotUnderstood, units
from patcher.data.prepare import sections
from patcher.elf import tables as t
from patcher.errors import PatcherError


def compiled_from(data: bytes, name: str) -> tuple[tuple[str, str], ...]:
    """Return the source file, absolute, and the producer of each unit of an object; nothing where that is not told.

    gcc names among the latter the switches that change code.
    """
    try:
        found = sections(t.read_raw(name, data))
        if found is None:
            return ()
        return tuple((unit.file, _producer(Dies(found, unit), unit.first)) for unit in units(found))
    except (NotUnderstood, PatcherError):
        return ()


def _producer(dies: Dies, root: int) -> str:
    return dies.text(dies.attributes(root).get(At.PRODUCER))
