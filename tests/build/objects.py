"""What two objects of one text must have in common, down to lines and debug information.

Where numbers only say in which place of a table something stands, what stands there is compared.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elftools.dwarf.dwarfinfo import DWARFInfo
from elftools.elf.elffile import ELFFile

_PLACES = {"DW_AT_stmt_list", "DW_AT_sibling", "DW_AT_ranges", "DW_AT_str_offsets_base", "DW_AT_addr_base"}
_PLACES |= {"DW_AT_rnglists_base", "DW_AT_loclists_base", "DW_AT_GNU_locviews"}
_CODE = {"DW_AT_low_pc", "DW_AT_location", "DW_AT_ranges"}

Entry = tuple[str, tuple[tuple[str, str], ...]]


def lines(path: Path) -> list[list[tuple[object, ...]]]:
    """Return the rows of each line table, files by their names."""
    with path.open("rb") as file:
        dwarf = ELFFile(file).get_dwarf_info()
        tables = [(unit, dwarf.line_program_for_CU(unit)) for unit in dwarf.iter_CUs()]
        return [list(_rows(unit, table)) for unit, table in tables if table is not None]


def _rows(unit: Any, table: Any) -> Iterator[tuple[object, ...]]:
    for entry in table.get_entries():
        state = entry.state
        if state is not None:
            name = _file_name(unit["version"], table, state.file, _place(unit))
            yield state.address, name, state.line, state.column, state.is_stmt, state.end_sequence


def _file_name(version: int, table: Any, index: int, place: str) -> str:
    """Return a file's path; a compiler may name it from where it was started, or absolutely."""
    header = table.header
    entry = header["file_entry"][index if version >= 5 else index - 1]
    directories = header["include_directory"]
    if version >= 5:
        directory = directories[entry.dir_index]
        directory = directory if isinstance(directory, bytes) else directory.DW_LNCT_path
    else:
        directory = directories[entry.dir_index - 1] if entry.dir_index else b""
    return os.path.normpath(os.path.join(place, os.fsdecode(directory), os.fsdecode(entry.name)))


def _place(unit: Any) -> str:
    return os.fsdecode(unit.get_top_DIE().attributes["DW_AT_comp_dir"].value)


def entries(path: Path) -> tuple[Counter[Entry], Counter[Entry]]:
    """Return the debugging entries, and those among them that have code or storage, each as often as it is there."""
    with path.open("rb") as file:
        dwarf = ELFFile(file).get_dwarf_info()
        found = [_entry(die, dwarf) for unit in dwarf.iter_CUs() for die in unit.iter_DIEs() if die.tag is not None]
    with_code = [entry for entry in found if _CODE & {name for name, _ in entry[1]}]
    return Counter(found), Counter(with_code)


def _entry(die: Any, dwarf: DWARFInfo) -> Entry:
    values = [(name, _value(die, name, attribute, dwarf)) for name, attribute in die.attributes.items()]
    return f"{_scope(die)}/{die.tag}", tuple((name, value) for name, value in values if value is not None)


def _scope(die: Any) -> str:
    parent = die.get_parent()
    return "" if parent is None else f"{_scope(parent)}/{_name(parent)}"


def _name(die: Any) -> str:
    found = [die.attributes[key].value for key in ("DW_AT_linkage_name", "DW_AT_name") if key in die.attributes]
    return f"{die.tag} {found}"


def _value(die: Any, name: str, attribute: Any, dwarf: DWARFInfo) -> str | None:
    if name in _PLACES or (name == "DW_AT_location" and attribute.form in ("DW_FORM_sec_offset", "DW_FORM_loclistx")):
        return "" if name in _CODE else None  # of variables' places, compilers remember more or less from run to run
    if name in ("DW_AT_decl_file", "DW_AT_call_file"):
        table = dwarf.line_program_for_CU(die.cu)
        return _file_name(die.cu["version"], table, attribute.value, _place(die.cu))
    if attribute.form.startswith("DW_FORM_ref") and attribute.form != "DW_FORM_ref_sig8":
        return _name(die.get_DIE_from_attribute(name))
    if attribute.form == "DW_FORM_exprloc":
        return "expression"  # has references in it, and indices
    return str(attribute.value)
