"""A translation unit as it stands in the process: its functions' current bodies, its variables, its names.

Joins what the modules say (`image`) with what earlier generations placed (`patch.journal`). Local
names are looked up under the unit's own STT_FILE group; a group is chosen by the names it holds, and
when two fit equally well the unit is refused rather than guessed.

Decides where things are; whether they are the same as an object's is `match`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from patcher.blocks import Block, Blocks, unit_of
from patcher.elf import SymbolType
from patcher.elf.symbols import StaticSymbol
from patcher.errors import UnsafeChange
from patcher.image import Image, LoadedModule
from patcher.patch.journal import Journal, Placed, Redirect

_NUMBERED = re.compile(r"\.\d+$")


def base_name(name: str) -> str:
    """Return a compiler-numbered name without its number: `hits.0` gives `hits`."""
    return _NUMBERED.sub("", name)


def numbered(name: str) -> bool:
    return bool(_NUMBERED.search(name))


@dataclass(frozen=True, slots=True)
class LiveFunction:
    """A function that runs. `address` is its address for life, `body` the code that a call reaches now."""

    name: str
    address: int
    size: int
    body: int
    code: bytes = field(repr=False)
    redirect: Redirect | None


@dataclass(frozen=True, slots=True)
class LiveVariable:
    """A variable with storage in the process; for a thread-local one `address` is its thread offset."""

    name: str
    address: int
    size: int


@dataclass(frozen=True, slots=True)
class ArenaView:
    """What earlier generations made: the records, the current slot values and where islands stand."""

    journal: Journal
    bodies: Mapping[tuple[int, int], int]  # (arena, slot index) -> body that the slot points at now
    islands: Mapping[int, tuple[int, int]]  # island address -> (arena, slot index)
    ranges: tuple[tuple[int, int], ...] = ()  # the arenas' extents

    def contains(self, address: int) -> bool:
        return any(start <= address < end for start, end in self.ranges)


class LiveUnit:
    """One unit in one module. Made by `find_unit`."""

    def __init__(self, image: Image, view: ArenaView, module: LoadedModule, file_symbol: str, group: int | None):
        self.image = image
        self.view = view
        self.module = module
        self.group = group
        self.key = f"{file_symbol}#{group}" if group is not None else file_symbol
        self._hidden = {-1, *module.module.symbols.groups("")}
        self._redirects = {r.original: r for r in view.journal.redirects if r.module == module.path}
        self._slots = {(r.arena, r.index): r for r in view.journal.redirects}
        self._placed = {p.address: p for p in view.journal.placed}
        self._bodies = {body: self._slots[key] for key, body in view.bodies.items() if key in self._slots}
        self._names: dict[int, frozenset[tuple[str, bool]]] = {}

    # --- functions --------------------------------------------------------------------------------------------

    def function(self, block: Block) -> LiveFunction | None:
        """Return the live counterpart of a function of the unit's object, or None when it has none.

        Raises `UnsafeChange` when the name stands for several.
        """
        local = all(s.local for s in block.symbols)
        for symbol in sorted(block.symbols, key=lambda s: (s.name != block.name, s.local)):
            redirect = self._redirect_named(symbol.name, local)
            if redirect is not None:
                return self._redirected(redirect)
            found = self._static(symbol.name, local, functions=True)
            if found is not None:
                return self._unpatched(found)
            placed = self._placed_named(symbol.name, local, "code")
            if placed is not None:
                code = self.image.target.memory.read(placed.address, placed.size)
                return LiveFunction(placed.name, placed.address, placed.size, placed.address, code, None)
        return None

    def _redirect_named(self, name: str, local: bool) -> Redirect | None:
        found = [r for r in self._redirects.values() if name in r.names and self._ours(r.local, r.unit, local)]
        return found[-1] if found else None

    def _ours(self, is_local: bool, unit: str, local: bool) -> bool:
        return unit == self.key or not (local or is_local)

    def _redirected(self, redirect: Redirect) -> LiveFunction:
        body = self.view.bodies.get((redirect.arena, redirect.index), redirect.copy)
        memory = self.image.target.memory
        if body == redirect.copy and not redirect.born:
            entry = bytes.fromhex(redirect.entry)
            code = entry + memory.read(redirect.original + len(entry), max(0, redirect.size - len(entry)))
            return LiveFunction(
                redirect.name, redirect.original, redirect.size, redirect.original, code[: redirect.size], redirect
            )
        placed = self._placed.get(body)
        size = placed.size if placed is not None else redirect.size
        return LiveFunction(redirect.name, redirect.original, size, body, memory.read(body, size), redirect)

    def _unpatched(self, symbol: StaticSymbol) -> LiveFunction:
        address = symbol.value + self.module.bias
        size = symbol.size or self.extent(address)
        code = self.image.target.memory.read(address, size)
        return LiveFunction(symbol.name, address, size, address, code, None)

    def extent(self, address: int) -> int:
        """Return the bytes from a live address to the next symbol or the end of its segment."""
        link = address - self.module.bias
        segment = next(s for s in self.module.module.segments if s.address <= link < s.end)
        following = self.module.module.symbols.next_address(link)
        return min(segment.end, following if following is not None else segment.end) - link

    def read_ahead(self, live: LiveFunction, size: int) -> bytes:
        """Return up to `size` bytes of a function's body and what follows it, within its segment."""
        if live.body != live.address or live.redirect is not None:
            return live.code
        link = live.address - self.module.bias
        segment = next(s for s in self.module.module.segments if s.address <= link < s.end)
        return self.image.target.memory.read(live.address, min(size, segment.end - link))

    # --- names ------------------------------------------------------------------------------------------------

    def _static(self, name: str, local: bool, *, functions: bool) -> StaticSymbol | None:
        symbols = [s for s in self.module.module.symbols.named(name) if s.function == functions]
        ranked = [
            [s for s in symbols if s.local and s.group == self.group and self.group is not None],
            [s for s in symbols if not s.local],
            [s for s in symbols if s.local and s.group in self._hidden],
        ]
        if not local:
            ranked = [ranked[1], ranked[2], ranked[0]]
        for found in ranked:
            values = {s.value for s in found}
            if len(values) == 1:
                return found[0]
            if len(values) > 1:
                places = ", ".join(f"{v + self.module.bias:#x}" for v in sorted(values))
                raise UnsafeChange(
                    f"`{name}` of {self.key} stands for several symbols of {self.module.name}: {places}",
                    "give one of them another name and rebuild",
                    code="ambiguous-symbol",
                )
        return None

    def _placed_named(self, name: str, local: bool, kind: str) -> Placed | None:
        found = [
            p
            for p in self.view.journal.placed
            if name in p.names
            and p.kind == kind
            and p.module == self.module.path
            and self._ours(p.local, p.unit, local)
        ]
        return found[-1] if found else None

    def variables(self, name: str, local: bool) -> list[LiveVariable]:
        """Return what a variable's name may stand for: one exact match, or every one that differs in number only."""
        exact = self._static(name, local, functions=False) if not numbered(name) else None
        if exact is not None:
            return [self._variable(exact)]
        wanted = base_name(name)
        placed = [
            LiveVariable(p.name, p.address, p.size)
            for p in self.view.journal.placed
            if p.kind == "data"
            and p.module == self.module.path
            and (name in p.names or (numbered(name) and base_name(p.name) == wanted))
            and self._ours(p.local, p.unit, local)
        ]
        if not numbered(name) or self.group is None:
            return placed[-1:]
        members = self.module.module.symbols.members(self.group)
        found = [s for s in members if numbered(s.name) and base_name(s.name) == wanted and not s.function]
        return [self._variable(s) for s in found] + placed

    def _variable(self, symbol: StaticSymbol) -> LiveVariable:
        bias = 0 if symbol.type == SymbolType.TLS else self.module.bias
        return LiveVariable(symbol.name, symbol.value + bias, symbol.size)

    def sizes_at(self, address: int, name: str) -> list[int]:
        """Return the sizes recorded for a variable of that (base) name at a live address."""
        wanted = base_name(name)
        found = [
            s.size
            for s in self.module.symbols_at(address)
            if base_name(s.name) == wanted and not s.function and self._visible(s)
        ]
        placed = self._placed.get(address)
        if placed is not None and base_name(placed.name) == wanted:
            found.append(placed.size)
        return found

    def _visible(self, symbol: StaticSymbol) -> bool:
        return not symbol.local or symbol.group == self.group or symbol.group in self._hidden

    def denotes(self, address: int, names: Iterable[str], local: bool) -> bool:
        """Tell whether a live address is what one of `names` denotes for this unit.

        An island, a body of a patch, a stub and the original entry all denote the same function.
        """
        here = self.names_at(address)
        return any((name, True) in here or (not local and (name, False) in here) for name in names)

    def names_at(self, address: int) -> frozenset[tuple[str, bool]]:
        """Return the names that an address has, each with whether it is one of this module's own."""
        found = self._names.get(address)
        if found is None:
            found = frozenset(self._read_names(address))
            self._names[address] = found
        return found

    def _read_names(self, address: int) -> Iterable[tuple[str, bool]]:
        key = self.view.islands.get(address)
        redirect = self._slots.get(key) if key is not None else self._bodies.get(address)
        if redirect is None:
            redirect = self._redirects.get(address)
        if redirect is not None:
            if not redirect.local or redirect.unit == self.key:
                yield from ((n, True) for n in redirect.names)
            if redirect.born:
                return  # its address for life is its island, which no module knows
            address = redirect.original
        placed = self._placed.get(address)
        if placed is not None and (not placed.local or placed.unit == self.key):
            yield from ((n, True) for n in placed.names)
        yield from self._module_names(address)

    def _module_names(self, address: int) -> Iterable[tuple[str, bool]]:
        module = self.image.module_at(address)
        if module is None:
            yield from self._through_arena_stub(address)
            return
        for symbol in module.symbols_at(address):
            if not symbol.local or (module is self.module and self._visible(symbol)):
                yield symbol.name, module is self.module
        for name in module.module.exported_at(address - module.bias):
            yield name, module is self.module
        cell = self.image.import_at(address)
        if cell is None:
            return
        if cell.name:
            yield cell.name, False
        else:
            yield from ((s.name, True) for s in module.symbols_at(cell.addend + module.bias))

    def _through_arena_stub(self, address: int) -> Iterable[tuple[str, bool]]:
        from patcher.code.instructions import plt_cell

        if address >> 47 or not self.view.contains(address):
            return
        cell = plt_cell(self.image.target.memory.read(address, 8), address)
        if cell is not None and self.view.contains(cell):
            destination = self.image.target.memory.read_u64(cell)
            if destination != address:
                yield from self.names_at(destination)


def find_unit(image: Image, view: ArenaView, blocks: Blocks) -> LiveUnit | None:
    """Return where a unit's object stands in the process, or None when nothing of it is there.

    The module is the one that has most of the unit's functions. Raises `UnsafeChange` when two groups
    of local symbols, or two modules, fit equally well.
    """
    file_symbol = unit_of(blocks.object)
    candidates: list[tuple[float, LoadedModule, int | None]] = []
    for module in image.modules:
        if len(module.module.symbols):
            score, group = _best_group(module, blocks, file_symbol)
            if score > 0:
                candidates.append((score, module, group))
    if not candidates:
        known = {(p.module, p.unit) for p in view.journal.placed if p.unit.partition("#")[0] == file_symbol}
        for module in image.modules:
            for path, _ in known:
                if path == module.path:
                    return LiveUnit(image, view, module, file_symbol, None)
        return None
    best = max(score for score, _, _ in candidates)
    chosen = [c for c in candidates if c[0] == best]
    if len(chosen) > 1:
        raise UnsafeChange(
            f"{blocks.object.name} fits {' and '.join(m.name for _, m, _ in chosen)} equally well",
            "rename its functions so that they differ, or attach to a process that has one of the two only",
            code="ambiguous-module",
        )
    return LiveUnit(image, view, chosen[0][1], file_symbol, chosen[0][2])


def _best_group(module: LoadedModule, blocks: Blocks, file_symbol: str) -> tuple[float, int | None]:
    symbols = module.module.symbols
    global_names = {s.name for b in blocks.functions for s in b.symbols if not s.local}
    local_names = {s.name for b in blocks.functions for s in b.symbols if s.local}
    local_names |= {base_name(s.name) for b in blocks.data_blocks() for s in b.symbols if s.local}
    score = float(sum(any(s.function for s in symbols.named(n)) for n in global_names))
    groups = symbols.groups(file_symbol) if file_symbol else []
    ranked = sorted(((len(local_names & _names(symbols.members(g))), g) for g in groups), reverse=True)
    if not ranked:
        return score, None
    if len(ranked) > 1 and ranked[0][0] == ranked[1][0] and ranked[0][0]:
        ranked = _by_size(module, blocks, [g for count, g in ranked if count == ranked[0][0]])
        if ranked[0][0] == ranked[1][0]:
            raise UnsafeChange(
                f"{module.name} has {len(ranked)} units called {file_symbol} with the same local names",
                "give the files or their static functions different names and rebuild",
                code="ambiguous-unit",
            )
    return score + ranked[0][0], ranked[0][1] if ranked[0][0] or len(ranked) == 1 else None


def _names(members: list[StaticSymbol]) -> set[str]:
    return {s.name if s.function else base_name(s.name) for s in members}


def _by_size(module: LoadedModule, blocks: Blocks, groups: list[int]) -> list[tuple[int, int]]:
    sizes = {(s.name, b.size) for b in blocks.functions for s in b.symbols if s.local}
    sizes |= {(s.name, b.size) for b in blocks.data_blocks() for s in b.symbols if s.local}
    ranked = []
    for group in groups:
        members = {(s.name, s.size) for s in module.module.symbols.members(group)}
        ranked.append((len(sizes & members), group))
    return sorted(ranked, reverse=True)
