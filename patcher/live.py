"""A translation unit as it stands in the process: its functions' current bodies, its variables, its names.

Joins what the modules say (`image`) with what earlier generations placed (`patch.journal`). Local
names are looked up under the unit's own STT_FILE group; which one that is, `origin` finds out.

Decides where things are; whether they are the same as an object's is `match`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum

from patcher.blocks import Block
from patcher.elf import SymbolBinding, SymbolType
from patcher.elf.symbols import StaticSymbol
from patcher.errors import UnsafeChange
from patcher.image import Image, LoadedModule
from patcher.patch.journal import ArenaView, Placed, Redirect

UNDEFINED = "(undefined)"  # the unit of the functions that stand for undefined ones
_NUMBERED = re.compile(r"\.\d+$")
_DISCRIMINATED = re.compile(r"^_Z(?:GV)?Z.*E(\d+)([A-Za-z_]\w*?)(?:_\d|__\d+_)$")


def base_name(name: str) -> str:
    """Return a compiler-numbered name without its number: `hits.0` gives `hits`, `_ZZ1fvE4hits_0` `_ZZ1fvE4hits`."""
    plain = _NUMBERED.sub("", name)
    found = _DISCRIMINATED.search(plain)
    if found is not None and len(found[2]) == int(found[1]):
        return plain[: found.end(2)]
    return plain


def _nowhere(address: int) -> bool:
    return False


def numbered(name: str) -> bool:
    return base_name(name) != name


class Scope(Enum):
    """Who knows an address by a name."""

    UNIT = "a static of the unit"
    MODULE = "every unit of the module"
    PROCESS = "other modules"


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
    """A variable with storage in the process.

    For a thread-local one `address` is its offset in the block of the unit's module; or, when a patch brought it, the
    number that stands for its place (`thread_number`). `born`: a patch brought it, or gave it this name; `type` and
    `scope` are what its record says then.
    """

    name: str
    address: int
    size: int
    local: bool = True
    born: bool = False
    type: str = ""
    scope: str = ""
    thread_local: bool = False


THREAD_LOCAL = "thread-local"
"""The kind of a thread-local variable that a patch brought, in the journal."""

_IN_MODULE = 1 << 62
_OFFSET_BITS = 40


def thread_number(offset: int, module_id: int = 0) -> int:
    """Return one number for the place of a thread-local that a patch brought; it is like no address and no offset.

    The place is an offset in the block of a module of ours, or, without one, from the thread pointer (negative).
    """
    return _IN_MODULE | module_id << _OFFSET_BITS | offset if module_id else offset & (1 << 64) - 1


def thread_place(number: int) -> tuple[int, int] | None:
    """Return the offset and the module of a number that `thread_number` gave, None for any other number."""
    if number >> 63:
        return number - (1 << 64), 0
    if number & _IN_MODULE:
        return number & (1 << _OFFSET_BITS) - 1, (number ^ _IN_MODULE) >> _OFFSET_BITS
    return None


class LiveUnit:
    """One unit in one module. Made by `origin`; `born`: the module was linked without it, a patch brings it."""

    def __init__(
        self,
        image: Image,
        view: ArenaView,
        module: LoadedModule,
        file_symbol: str,
        group: int | None,
        others: Iterable[tuple[str, int | None]] = (),
        *,
        born: bool = False,
    ):
        """`others`: the files behind the first, and their groups, when the object was linked of several."""
        self.image = image
        self.view = view
        self.module = module
        self.born = born
        files = ((file_symbol, group), *others)
        self.groups = tuple(dict.fromkeys(g for _, g in files if g is not None))
        self._keys = {name: f"{name}#{g}" if g is not None else name for name, g in files}
        self.key = self._keys[file_symbol]
        self._redirects = {r.original: r for r in view.journal.redirects if r.module == module.path}
        self._slots = {(r.arena, r.index): r for r in view.journal.redirects}
        self._recorded: dict[int, list[Placed]] = {}  # a variable that moved has several records
        for placed in view.journal.placed:
            self._recorded.setdefault(placed.address, []).append(placed)
        self._placed = {p.address: p for p in view.journal.placed}
        self._storages = view.journal.storages_at(view.generation)
        self._outdated = view.journal.outdated_at(view.generation)
        self._bodies = {body: self._slots[key] for key, body in view.bodies.items() if key in self._slots}
        self._names: dict[int, frozenset[tuple[str, Scope]]] = {}
        self._pieces = self._live_pieces()
        self._constants: tuple[int, dict[str, list[Placed]]] | None = None

    # --- functions --------------------------------------------------------------------------------------------

    def function(self, block: Block) -> LiveFunction | None:
        """Return the live counterpart of a function of the unit's object, or None when it has none.

        Raises `UnsafeChange` when the name stands for several.
        """
        local = all(s.local for s in block.symbols)
        for symbol in sorted(block.symbols, key=lambda s: (s.name != block.name, s.local)):
            redirect = self._redirect_named(symbol.name, local)
            # The island of an IFUNC that a patch brought leads to what it chose; the resolver itself was placed.
            if redirect is not None and not (redirect.born and symbol.type == SymbolType.IFUNC):
                return self._redirected(redirect)
            piece = self._pieces.get(symbol.name)
            if piece is not None:
                code = self.image.target.memory.read(piece.address, piece.size)
                return LiveFunction(piece.name, piece.address, piece.size, piece.address, code, None)
            found = self._static(symbol.name, local, functions=True)
            if found is not None:
                return self._unpatched(found)
        return None

    def _live_pieces(self) -> dict[str, Placed]:
        """Return what was split off the unit's functions (clones, cold parts) and came with bodies that run now.

        Of several generations the newest: whoever uses an older one's piece is seen to use another.
        """
        found: dict[str, Placed] = {}
        for record in self.view.journal.generations.values():
            if any(self.view.bodies.get((arena, index)) == body for arena, index, body in record.bodies):
                own = [p for p in record.placed if p.kind == "code" and p.module == self.module.path]
                found |= {name: p for p in own if p.unit == self.key for name in p.names}
        return found

    def _redirect_named(self, name: str, local: bool) -> Redirect | None:
        found = [r for r in self._redirects.values() if name in r.names and self._ours(r.local, r.unit, local)]
        return found[-1] if found else None

    def _ours(self, is_local: bool, unit: str, local: bool) -> bool:
        return unit in self._keys.values() or not (local or is_local)

    def key_of(self, block: Block) -> str:
        """Return the key of the file that a block belongs to; for a global one that need not be exact."""
        local = next((s for s in block.symbols if s.local), None)
        if local is None or len(self._keys) == 1:
            return self.key
        return self._keys.get(block.object.file_of(local), self.key)

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

    def overridden(self, block: Block) -> bool:
        """Tell whether the module has another unit's definition of a function that is weak in this one."""
        if not block.symbols or not all(s.weak for s in block.symbols):
            return False
        found = self._static(block.name, False, functions=True)
        if found is None or not found.local:
            return found is not None and found.binding != SymbolBinding.WEAK
        # A linker that turned it local keeps it under the file that defined it, or under none.
        return found.group not in self.groups and bool(self.module.module.symbols.group_name(found.group))

    def folded_with(self, live: LiveFunction, block: Block) -> list[str]:
        """Return the other functions that the linker gave the same code, by name (--icf)."""
        own = {s.name.partition("@")[0] for s in block.symbols}  # `name@version` where the unit says .symver
        return sorted(
            {s.name for s in self.module.symbols_at(live.address) if s.function and s.size and s.name not in own}
        )

    # --- names ------------------------------------------------------------------------------------------------

    def _static(self, name: str, local: bool, *, functions: bool) -> StaticSymbol | None:
        if self.born:
            return None  # whatever the module has of this name is another unit's
        if "@" in name:
            definition = self.image.exported(self.module, name)
            plain = name.partition("@")[0]
            there = self.module.symbols_at(definition.address) if definition is not None else ()
            return next((s for s in there if s.name == plain and s.function == functions), None)
        symbols = [s for s in self.module.module.symbols.named(name) if s.function == functions]
        own = [s for s in symbols if self._own(s)]
        exported = [s for s in symbols if not s.local]
        demoted = [s for s in symbols if self.module.module.demoted(s) and not (local and self.module.module.demotes)]
        ranked = (own, exported, demoted) if local else (exported, own, demoted)
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

    def variables(
        self, name: str, local: bool, *, trusted: Callable[[int], bool] = _nowhere, thread_local: bool = False
    ) -> list[LiveVariable]:
        """Return what a variable's name may stand for: one exact match, or every one that differs in number only.

        Either variables that each thread has, or such that there are once; a name may have been both. `trusted`: the
        addresses of globals that are known to be this unit's own.
        """
        for s in self._storages if not thread_local else ():
            if name in s.names and s.module == self.module.path and self._ours(s.local, s.unit, local):
                return [LiveVariable(s.name, s.address, s.size, s.local, born=True)]
        exact = self._static(name, local, functions=False) if not numbered(name) else None
        if exact is not None and (exact.type == SymbolType.TLS) == thread_local:
            if local and not exact.local and not trusted(exact.value + self.module.bias):
                raise self._elsewhere(name, "variable")
            return [] if self._was_constant(exact, local) else [self._variable(exact)]
        wanted = base_name(name)
        placed = [
            v
            for v, names, unit in self._placed_variables()
            if (name in names or (numbered(name) and base_name(v.name) == wanted))
            and v.thread_local == thread_local
            and self._ours(v.local, unit, local)
        ]
        if not numbered(name):
            return placed[-1:]
        if not local:
            return [v for v in self.exported_variables(wanted) if v.thread_local == thread_local] + placed
        if not self.groups:
            return placed if self.born else placed[-1:]
        linked = [v for v in self._linked_variables() if numbered(v.name) and base_name(v.name) == wanted]
        return [v for v in linked if v.thread_local == thread_local] + placed

    def exported_variables(self, wanted: str) -> list[LiveVariable]:
        """Return the module's C++ variables of a name that others may see, those with a number behind it included."""
        names = (wanted, *(f"{wanted}_{n}" for n in range(10)))
        found = (s for name in names for s in self.module.module.symbols.named(name))
        return [self._variable(s) for s in found if not s.local and not s.function]

    def own_variables(self) -> list[LiveVariable]:
        """Return every variable that is the unit's own by its name: its statics, and what patches brought to it.

        Storage that was given up for one of another layout is nobody's.
        """
        given_up = {s.old for s in self._storages}
        return [v for v in self.every_variable() if v.address not in given_up or v.thread_local]

    def before_migrations(self, address: int) -> int:
        """Return where a variable was at first that got other storage because its layout changed."""
        earlier = {s.address: s.old for s in self._storages}
        while address in earlier:
            address = earlier[address]
        return address

    def every_variable(self) -> list[LiveVariable]:
        """Return the unit's own variables, with the storage that was given up."""
        keys = self._keys.values()
        placed = [v for v, _, unit in self._placed_variables() if unit in keys]
        return ([] if self.born else self._linked_variables()) + placed

    def _linked_variables(self) -> list[LiveVariable]:
        members = (s for group in self.groups for s in self.module.module.symbols.members(group))
        return [self._variable(s) for s in members if not s.function and s.size]

    def _placed_variables(self) -> list[tuple[LiveVariable, tuple[str, ...], str]]:
        """Return what patches brought to the module: each variable, its names, and its unit."""
        return [
            (_brought(p), p.names, p.unit)
            for p in self.view.journal.placed
            if p.kind == THREAD_LOCAL or (p.kind == "data" and p.address not in self._outdated)
            if p.module == self.module.path
        ]

    def constant(self, block: Block, generation: int) -> LiveVariable | None:
        """Return the constant that a block's name stands for while a generation is live, None if it cannot be told."""
        local = not block.exported
        for p in self._constants_at(generation).get(block.name, ()):
            if self._ours(p.local, p.unit, local):
                return _constant(p)
        found = self._constant_symbols(block.name, local)
        return self._variable(found[0]) if len({s.value for s in found}) == 1 else None

    def constants_like(self, block: Block, generation: int) -> list[LiveVariable]:
        """Return the constants whose names differ from a block's in their numbers only, while a generation is live."""
        wanted, local = base_name(block.name), not block.exported
        placed = {p.address: p for every in self._constants_at(generation).values() for p in every}
        found = [_constant(p) for p in placed.values() if base_name(p.name) == wanted]
        found = [v for v in found if self._ours(v.local, placed[v.address].unit, local)]
        if self.born:
            return found
        members = (s for group in self.groups for s in self.module.module.symbols.members(group))
        linked = {s.value: s for s in members if s.size and not s.function and base_name(s.name) == wanted}
        found += [self._variable(s) for s in linked.values() if self.module.module.constant(s.value, s.size)]
        exported = [] if local else self.exported_variables(wanted)
        return found + [v for v in exported if self.module.constant(v.address, v.size)]

    def _constants_at(self, generation: int) -> dict[str, list[Placed]]:
        """Return the constants that the patches which lead to a generation have brought, by name, the newest first."""
        if self._constants is None or self._constants[0] != generation:
            found: dict[str, list[Placed]] = {}
            for record in reversed(self.view.journal.lineage(generation)):
                own = [p for p in record.placed if p.kind == "read-only" and p.module == self.module.path]
                for name, placed in ((name, p) for p in own for name in p.names):
                    found.setdefault(name, []).append(placed)
            self._constants = generation, found
        return self._constants[1]

    def _constant_symbols(self, name: str, local: bool) -> list[StaticSymbol]:
        symbols = self.module.module.symbols
        if self.born:
            return []
        named = symbols.named(name)
        found = [s for s in named if (self._own(s) if local else not s.local)]
        found = found or [s for s in named if not local and self.module.module.demoted(s)]
        return [s for s in found if s.size and not s.function and self.module.module.constant(s.value, s.size)]

    def _variable(self, symbol: StaticSymbol) -> LiveVariable:
        bias = 0 if symbol.type == SymbolType.TLS else self.module.bias
        local = symbol.local and not self.module.module.demoted(symbol)
        is_thread_local = symbol.type == SymbolType.TLS
        return LiveVariable(symbol.name, symbol.value + bias, symbol.size, local, thread_local=is_thread_local)

    def has_moved(self, address: int, name: str, scope: str) -> bool:
        """Tell whether it is recorded that a variable of that name, in that function, is what stood at an address."""
        known = (p for p in self._recorded.get(address, ()) if p.moved and p.unit in self._keys.values())
        return any((base_name(p.name), p.scope) == (base_name(name), scope) for p in known)

    def scope_of(self, address: int) -> str:
        """Return the function that a variable is in by the newest record of it, "" if there is none."""
        found = self._newest(address, lambda p: bool(p.scope))
        return found.scope if found is not None else ""

    def position_of(self, address: int) -> tuple[int, int] | None:
        """Return the place of a variable in its function (depth and order) by the newest record of it."""
        found = self._newest(address, lambda p: p.depth >= 0)
        return (found.depth, found.order) if found is not None else None

    def _newest(self, address: int, says: Callable[[Placed], bool]) -> Placed | None:
        """Return the newest record of a variable that says something: one of a live generation, if there is any."""
        known = [p for p in self._recorded.get(address, ()) if says(p)]
        if not known:
            return None
        return next((p for p in reversed(known) if self._is_live(p)), known[-1])

    def _is_live(self, placed: Placed) -> bool:
        return any(placed in record.placed for record in self.view.journal.lineage(self.view.generation))

    def moved_away(self, address: int, *, exported: bool) -> bool:
        """Tell whether a variable is another unit's now: the last that it moved to in what is live.

        What both units export is one variable.
        """
        found = self._newest(address, lambda p: p.moved)
        if found is None or found.unit in self._keys.values() or (exported and not found.local):
            return False
        return self._is_live(found)

    def became_global(self, address: int) -> bool:
        """Tell whether a variable is one that other units may use, by what is live."""
        found = self._newest(address, lambda p: p.moved)
        return found is not None and not found.local and self._is_live(found)

    # --- bodies that refer to variables -----------------------------------------------------------------------

    def pieces_of(self, live: LiveFunction) -> list[LiveFunction]:
        """Return what was split off a function that runs as the module has it, or with the body that it has now."""
        if live.redirect is not None and (live.redirect.born or live.body != live.redirect.original):
            found = [p for name, p in self._pieces.items() if name.startswith(f"{live.name}.")]
            return [self._piece(p) for p in found]
        members = (s for group in self.groups for s in self.module.module.symbols.members(group))
        return [self._unpatched(s) for s in members if s.function and s.name.startswith(f"{live.name}.")]

    def _piece(self, placed: Placed) -> LiveFunction:
        code = self.image.target.memory.read(placed.address, placed.size)
        return LiveFunction(placed.name, placed.address, placed.size, placed.address, code, None)

    def earlier_bodies(self, live: LiveFunction) -> list[list[LiveFunction]]:
        """Return the bodies that a function had, with their pieces: of every generation, and the module's."""
        redirect = live.redirect
        if redirect is None:
            return []
        found = []
        for record in reversed(self.view.journal.generations.values()):
            bodies = {
                body for arena, index, body in record.bodies if (arena, index) == (redirect.arena, redirect.index)
            }
            pieces = [p for p in record.placed if p.kind == "code" and p.name.startswith(f"{live.name}.")]
            found += [[self._piece(p) for p in (self._placed[b], *pieces)] for b in bodies if b in self._placed]
        if not redirect.born:
            entry = bytes.fromhex(redirect.entry)
            rest = self.image.target.memory.read(redirect.original + len(entry), max(0, redirect.size - len(entry)))
            code = (entry + rest)[: redirect.size]
            original = LiveFunction(live.name, live.address, redirect.size, redirect.original, code, None)
            found.append([original, *self.pieces_of(original)])
        return found

    def function_at(self, address: int) -> LiveFunction | None:
        """Return the module's function that starts at an address, as it runs now."""
        redirect = self._redirects.get(address)
        if redirect is None and address in self.view.islands:
            redirect = self._slots.get(self.view.islands[address])
        if redirect is not None:
            return self._redirected(redirect)
        placed = self._placed.get(address)
        if placed is not None and placed.kind == "code":
            return self._piece(placed)
        if not self.module.contains(address):
            return None
        found = next((s for s in self.module.symbols_at(address) if s.function and s.size), None)
        return self._unpatched(found) if found is not None else None

    def sizes_at(self, address: int, name: str, local: bool) -> list[int]:
        """Return the sizes recorded for a variable of that (base) name at a live address; if `local`, of the unit."""
        wanted = base_name(name)
        found = [
            s.size
            for s in self.module.symbols_at(address)
            if base_name(s.name) == wanted and not s.function and (self._own(s) or not local)
        ]
        return found + [p.size for p in self._recorded.get(address, ()) if base_name(p.name) == wanted]

    def _own(self, symbol: StaticSymbol) -> bool:
        return symbol.local and symbol.group in self.groups

    def _was_constant(self, symbol: StaticSymbol, local: bool) -> bool:
        """Tell whether what is now a variable is a constant in the process: then the unit needs a new variable."""
        if (
            symbol.type == SymbolType.TLS
            or not symbol.size
            or not self.module.module.constant(symbol.value, symbol.size)
        ):
            return False
        if local:
            return True
        raise UnsafeChange(
            f"`{symbol.name}` is a constant of {self.module.name}, which other units may use, and a variable now",
            "restart the program, or give the variable another name",
            code="layout",
        )

    def _elsewhere(self, name: str, what: str) -> UnsafeChange:
        return UnsafeChange(
            f"`{name}` of {self.key} is static now, and {self.module.name} has a global {what} of that name, "
            "which may be another unit's",
            "keep it global, or give the static one another name",
            code="ambiguous-symbol",
        )

    def refuse_elsewhere(self, live: LiveFunction, block: Block) -> None:
        """Raise `UnsafeChange` when a static function's live counterpart is a global, which need not be this unit's."""
        names = {s.name for s in block.symbols}
        if live.redirect is not None or any(not s.local for s in block.symbols):
            return
        if any(not s.local and s.name in names for s in self.module.symbols_at(live.address)):
            raise self._elsewhere(block.name, "function")

    def denotes(self, address: int, names: Iterable[str], local: bool) -> bool:
        """Tell whether a live address is what one of `names` denotes for this unit.

        An island, a body of a patch, a stub and the original entry all denote the same function.
        """
        here = self.names_at(address)
        return any(
            (name, Scope.UNIT) in here or (name, Scope.MODULE) in here or (not local and (name, Scope.PROCESS) in here)
            for name in names
        )

    def denotes_external(self, address: int, name: str) -> bool:
        """Tell whether a live address is what a name that the unit does not define denotes: no static of its own."""
        if "@" in name:
            cell = self.image.import_at(address)
            return cell is not None and self.module.module.asks_for(cell.name, name)
        here = self.names_at(address)
        return (name, Scope.PROCESS) in here or (name, Scope.MODULE) in here or self._is_choice(address, name)

    def _is_choice(self, address: int, name: str) -> bool:
        """Tell whether a far jump of ours leads to the process's choice for an IFUNC, which has no name of its own."""
        destination = self.beyond_jump(address)
        definition = self.image.search(name, self.module) if destination is not None else None
        return definition is not None and definition.ifunc and self.image.chosen(definition) == destination

    def names_at(self, address: int) -> frozenset[tuple[str, Scope]]:
        """Return the names that an address has, each with who knows it by that name."""
        found = self._names.get(address)
        if found is None:
            found = frozenset(self._read_names(address))
            self._names[address] = found
        return found

    def _read_names(self, address: int) -> Iterable[tuple[str, Scope]]:
        key = self.view.islands.get(address)
        redirect = self._slots.get(key) if key is not None else self._bodies.get(address)
        if redirect is None:
            redirect = self._redirects.get(address)
        if redirect is not None:
            if not redirect.local or redirect.unit in self._keys.values():
                yield from ((n, Scope.UNIT if redirect.local else Scope.MODULE) for n in redirect.names)
            if redirect.born:
                return  # its address for life is its island, which no module knows
            address = redirect.original
        for placed in self._recorded.get(address, ()):
            if not placed.local or placed.unit in self._keys.values():
                yield from ((n, Scope.UNIT if placed.local else Scope.MODULE) for n in placed.names)
        yield from self._module_names(address)

    def _module_names(self, address: int) -> Iterable[tuple[str, Scope]]:
        module = self.image.module_at(address)
        if module is None:
            yield from self._through_arena_stub(address)
            return
        scope = Scope.MODULE if module is self.module else Scope.PROCESS
        for symbol in module.symbols_at(address):
            if module is self.module and self._own(symbol):
                yield symbol.name, Scope.UNIT
            elif not symbol.local or (module is self.module and module.module.demoted(symbol)):
                # Code cannot refer to a static of another unit, so that what may be a demoted global is one.
                yield symbol.name, scope
        for name in module.module.exported_at(address - module.bias):
            yield name, scope
        cell = self.image.import_at(address)
        if cell is None:
            return
        if cell.name:
            yield cell.name, Scope.PROCESS
        else:
            yield from ((s.name, scope) for s in module.symbols_at(cell.addend + module.bias))

    def _through_arena_stub(self, address: int) -> Iterable[tuple[str, Scope]]:
        destination = self.beyond_jump(address)
        if destination is not None and destination != address:
            yield from self.names_at(destination)

    def beyond_jump(self, address: int) -> int | None:
        """Return where a jump of ours leads to (far, or on the way of a short branch), None for anything else."""
        from patcher.code.instructions import plt_cell

        if address >> 47 or not self.view.contains(address):
            return None
        code = self.image.target.memory.read(address, 8)
        if code[0] == 0xE9:  # jmp rel32
            return address + 5 + int.from_bytes(code[1:5], "little", signed=True)
        cell = plt_cell(code, address)
        if cell is None or not self.view.contains(cell):
            return None
        return self.image.target.memory.read_u64(cell)


def _constant(placed: Placed) -> LiveVariable:
    return LiveVariable(
        placed.name, placed.address, placed.size, placed.local, True, type=placed.type, scope=placed.scope
    )


def _brought(placed: Placed) -> LiveVariable:
    is_thread_local = placed.kind == THREAD_LOCAL
    return LiveVariable(
        placed.name, placed.address, placed.size, placed.local, True, placed.type, placed.scope, is_thread_local
    )
