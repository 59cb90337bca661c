"""ORIGIN: where an object's unit stands in the process: its module, and its group of local names there.

The module is chosen by the functions that it shares with the object (the variables and constants, where it has no
functions), the group by its local names; where two fit equally well, by the sizes of what they have, then by matching
each, and the unit is refused rather than guessed.

Decides which unit it is; what the unit has is `live`'s business.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from patcher.blocks import Blocks, unit_of
from patcher.elf import ObjectFile, SymbolType
from patcher.elf.symbols import StaticSymbol
from patcher.errors import UnsafeChange
from patcher.image import Image, LoadedModule
from patcher.live import UNDEFINED, LiveUnit, base_name
from patcher.match import Status, match
from patcher.patch.journal import ArenaView

MADE_OF_ALL = frozenset({"<artificial>", "ld-temp.o"})  # what gcc and lld call all units that were linked with -flto


def born_unit(image: Image, view: ArenaView, blocks: Blocks, module: LoadedModule) -> LiveUnit:
    """Return the unit of an object that no module was linked with: known, if at all, from earlier generations."""
    known = _born_before(image, view, blocks.object)
    return known or LiveUnit(image, view, module, born_key(blocks.object), None, born=True)


def born_key(source: ObjectFile) -> str:
    """Return the name that the local symbols of a born unit are kept under; members of archives have one each."""
    archive, parenthesis, member = source.name.rpartition("(")
    if not parenthesis or not member.endswith(")"):
        return unit_of(source)
    return f"{source.file_symbol or member[:-1]}#{Path(archive).name}({member}"


def _born_before(image: Image, view: ArenaView, source: ObjectFile) -> LiveUnit | None:
    key = born_key(source)
    homes = {p.module for p in view.journal.placed if p.unit == key}
    module = next((m for m in image.modules if m.path in homes), None)
    return LiveUnit(image, view, module, key, None, born=True) if module is not None else None


def find_unit(
    image: Image, view: ArenaView, blocks: Blocks, modules: Sequence[LoadedModule] | None = None
) -> LiveUnit | None:
    """Return where a unit's object stands in the process, or None when nothing of it is there.

    The module is the one of `modules` (default: all) that has most of the unit's functions. Raises `UnsafeChange`
    when two groups of local symbols, or two modules, fit equally well.
    """
    if "#" in born_key(blocks.object):
        found = _born_before(image, view, blocks.object)
        if found is not None:
            return found
    file_symbol = unit_of(blocks.object)
    candidates: list[tuple[float, LoadedModule, int | None]] = []
    names = _Names.of(blocks)
    for module in image.modules if modules is None else modules:
        if len(module.module.symbols):
            score, group = _best_group(image, view, module, blocks, file_symbol, names)
            if score > 0:
                candidates.append((score, module, group))
    if not candidates:
        known = {(p.module, p.unit) for p in view.journal.placed if p.unit.partition("#")[0] == file_symbol}
        for module in image.modules:
            for path, _ in known:
                if path == module.path:
                    born = (path, file_symbol) in known
                    return LiveUnit(image, view, module, file_symbol, None, born=born)
        return _now_defined(image, view, blocks, names)
    # Any library may have a function of one of these names; the unit itself left its file's name behind.
    named = [c for c in candidates if c[1].module.symbols.groups(file_symbol)] if file_symbol else []
    candidates = named or candidates
    best = max(score for score, _, _ in candidates)
    chosen = [c for c in candidates if c[0] == best]
    if len({m.path for _, m, _ in chosen}) < len(chosen):
        raise UnsafeChange(
            f"{chosen[0][1].name} is loaded {len(chosen)} times, and {blocks.object.name} is part of it",
            "attach to a process that has one copy of it only (dlmopen made another)",
            code="loaded-twice",
        )
    if len(chosen) > 1:
        raise UnsafeChange(
            f"{blocks.object.name} fits {' and '.join(m.name for _, m, _ in chosen)} equally well",
            "rename its functions so that they differ, or attach to a process that has one of the two only",
            code="ambiguous-module",
        )
    module, group = chosen[0][1:]
    return LiveUnit(image, view, module, file_symbol, group, _other_files(image, view, module, blocks))


def _other_files(image: Image, view: ArenaView, module: LoadedModule, blocks: Blocks) -> list[tuple[str, int | None]]:
    """Return the other files of an object that was linked of several, and where their locals are."""
    source = blocks.object
    if len(source.files) < 2:
        return []
    seen: dict[str, str] = {}
    local: dict[str, set[str]] = {name: set() for name in source.files}
    for symbol in source.symbols:
        if symbol.local and symbol.name and symbol.type in (SymbolType.FUNC, SymbolType.OBJECT, SymbolType.TLS):
            name, file = base_name(symbol.name), source.file_of(symbol)
            if seen.setdefault(name, file) != file:
                raise UnsafeChange(
                    f"{source.name} was linked of several objects, and both {seen[name]} and {file} have a static "
                    f"`{name}`",
                    "give the objects that it was linked of",
                    code="ambiguous-symbol",
                )
            local.setdefault(file, set()).add(name)  # some stand under no file's name
    return [
        (name, _best_group(image, view, module, blocks, name, _Names(frozenset(), frozenset(local[name])))[1])
        for name in source.files[1:]
    ]


def _now_defined(image: Image, view: ArenaView, blocks: Blocks, names: _Names) -> LiveUnit | None:
    """Return the unit of an object that defines what an earlier generation had to leave undefined."""
    for redirect in view.journal.redirects:
        if redirect.unit == UNDEFINED and names.exported.intersection(redirect.names):
            module = next((m for m in image.modules if m.path == redirect.module), None)
            if module is not None:
                return born_unit(image, view, blocks, module)
    return None


@dataclass(frozen=True, slots=True)
class _Names:
    """The names by which an object may be known: its global functions, its local functions and variables.

    One that has no functions is known by its global variables and constants (`data`).
    """

    exported: frozenset[str]
    local: frozenset[str]
    data: bool = False

    @classmethod
    def of(cls, blocks: Blocks) -> _Names:
        functions = [s for b in blocks.functions for s in b.symbols]
        data = [s for b in blocks.data_blocks() for s in b.symbols]
        local = {s.name for s in functions if s.local}
        local |= {base_name(s.name) for s in data if s.local}
        exported = functions or data
        return cls(frozenset(s.name for s in exported if not s.local), frozenset(local), not functions)


def _best_group(
    image: Image, view: ArenaView, module: LoadedModule, blocks: Blocks, file_symbol: str, names: _Names
) -> tuple[float, int | None]:
    symbols = module.module.symbols
    score = float(sum(any(s.function != names.data for s in symbols.named(n)) for n in names.exported))
    groups = symbols.groups(file_symbol) if file_symbol else []
    if names.data and not groups and symbols.has_files:
        return 0, None  # nothing else tells it from another file's data of the same names
    ranked = sorted(((len(names.local & _names(symbols.members(g))), g) for g in groups), reverse=True)
    if not ranked:
        return score, None
    if len(ranked) > 1 and ranked[0][0] == ranked[1][0] and ranked[0][0]:
        ranked = _by_size(module, blocks, [g for count, g in ranked if count == ranked[0][0]])
        if ranked[0][0] == ranked[1][0]:
            tied = [LiveUnit(image, view, module, file_symbol, g) for count, g in ranked if count == ranked[0][0]]
            ranked = _by_match(blocks, tied)
        if ranked[0][0] == ranked[1][0]:
            raise UnsafeChange(
                f"{module.name} has {len(ranked)} units called {file_symbol} with the same local names",
                "give the files or their static functions different names and rebuild",
                code="ambiguous-unit",
            )
    return score + ranked[0][0], ranked[0][1] if ranked[0][0] or len(ranked) == 1 else None


def _names(members: Iterable[StaticSymbol]) -> set[str]:
    return {s.name if s.function else base_name(s.name) for s in members}


def _by_match(blocks: Blocks, units: Iterable[LiveUnit]) -> list[tuple[int, int]]:
    """Rank units by how many of their functions run as they are in the object."""
    counts = []
    for unit in units:
        try:
            count = len(match(blocks, unit).with_status(Status.SAME))
        except UnsafeChange:
            count = 0  # a change that this unit could not take
        counts.append((count, unit.groups[0] if unit.groups else 0))
    return sorted(counts, reverse=True)


def _by_size(module: LoadedModule, blocks: Blocks, groups: list[int]) -> list[tuple[int, int]]:
    sizes = {(s.name, b.size) for b in blocks.functions for s in b.symbols if s.local}
    sizes |= {(s.name, b.size) for b in blocks.data_blocks() for s in b.symbols if s.local}
    ranked = []
    for group in groups:
        members = {(s.name, s.size) for s in module.module.symbols.members(group)}
        ranked.append((len(sizes & members), group))
    return sorted(ranked, reverse=True)
