"""What blocks and names mean in this process: where it has a block of an object, and what an undefined name denotes.

Knows the modules' scopes, what earlier generations brought, what the units of this one bring, and, when all that has
no answer, asks a `Supply`. Reads the target (to resolve an IFUNC it may ask the target's own resolver), and writes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from patcher.blocks import Block, Blocks, External, Kind, Place
from patcher.data.migrate import Migration
from patcher.data.statics import candidates, find_static
from patcher.elf import ObjectFile, SymbolType
from patcher.elf.relocations import R
from patcher.errors import LinkError, UnsafeChange
from patcher.image import Definition, Image, LoadedModule
from patcher.link.plan import Bound, Unit
from patcher.live import UNDEFINED, LiveVariable, base_name, numbered
from patcher.match import MODULE_BASE, Status, is_private_piece
from patcher.part import Part
from patcher.patch.ledger import Ledger
from patcher.undefined import Use, uses_of


class Supply(Protocol):
    """Where a definition comes from that neither the generation's own units nor the process have."""

    def find(
        self, name: str, module: LoadedModule, uses: Callable[[], tuple[Use, ...]]
    ) -> tuple[Part, Block] | Bound | None:
        """Return the definition, or a far address that stands for one in a library that is still to be loaded.

        None when there is none. `uses` tells who refers to it.
        """
        ...

    def defining(self, name: str, module: LoadedModule) -> ObjectFile | None:
        """Return the object that `find` would take the definition from."""
        ...


class NeedsArena(Exception):
    """An IFUNC has to be asked for its choice before anything else: map the arena, and link again."""


class Kept(Exception):
    """Functions that are the same turned out not to be replaceable: they keep their code, link again."""


def _takes_directly(part: Part, name: str) -> bool:
    """Tell whether a unit's code takes a function's address without a table or cell."""
    references = (r for block in part.blocks.functions for r in part.blocks.references(block))
    return any(r.type == R.PC32 and isinstance(r.target, External) and r.target.name == name for r in references)


def _labels_of_new_code(part: Part, block: Block) -> list[Block]:
    """Return the functions that are to be new and that a table's addresses lead into the middle of (`&&label`)."""
    found = (r.target for r in part.blocks.references(block))
    inside = (t.block for t in found if isinstance(t, Place) and t.block.kind is Kind.CODE and t.offset)
    return [b for b in dict.fromkeys(inside) if part.is_new(b)]


def _check_labels(part: Part, block: Block) -> None:
    """Refuse new code for a function whose labels stand in a live variable: these lead into the old code."""
    functions = _labels_of_new_code(part, block)
    if not functions:
        return
    if all(part.status(f) is Status.SAME for f in functions):
        for function in functions:
            part.keep(function)
        raise Kept
    raise UnsafeChange(
        f"`{base_name(block.name)}` of {part.source} is a variable and holds addresses of labels in "
        f"{', '.join(f'`{f.name}`' for f in functions)}, where they lead into the old code",
        "restart the program; a table of labels that is declared const changes with its function",
        code="label-table",
    )


def _nowhere(name: str, module: LoadedModule) -> LinkError:
    return LinkError(
        f"where each thread has the thread-local `{name}` of {module.name} cannot be told",
        "nothing in the process says so for this library: restart the program with the new code",
        code="thread-local",
    )


def is_chosen(block: Block) -> bool:
    """Tell whether a function is the resolver of an IFUNC: what its name denotes is what it chooses."""
    return any(s.type == SymbolType.IFUNC for s in block.symbols)


def _is_tentative(block: Block) -> bool:
    return any(s.common for s in block.symbols)


def _needs(blocks: Blocks, name: str) -> bool:
    found = (s for s in blocks.object.symbols if s.name == name)
    return any((s.undefined and not s.weak) or s.type == SymbolType.IFUNC for s in found)


@dataclass(frozen=True, slots=True)
class Beyond:
    """What the units of one module may use beside each other and the process."""

    module: LoadedModule
    supply: Supply | None
    defined: dict[str, Bound]


class Linkage:
    """What the blocks and names of one module's parts mean in the process."""

    def __init__(self, image: Image, ledger: Ledger, parts: Sequence[Part], beyond: Beyond) -> None:
        self.image = image
        self.ledger = ledger
        self.supplied: list[Part] = []
        self._awaited: dict[str, Bound] = {}  # in libraries that are still to be loaded
        self._beyond = beyond
        self._missing: dict[str, bool] = {}
        self._parts = {p.blocks: p for p in parts}
        self._objects = {p.blocks.object: p for p in parts}
        self._units: dict[Blocks, Unit] = {}
        self._brought: dict[str, tuple[Part, Block]] = {}
        for part in parts:
            for block in part.blocks.functions:
                if block.exported and part.is_door(block):
                    for symbol in block.symbols:
                        # What stands there is the resolver of an IFUNC: the process chose, unless it is new.
                        if symbol.type != SymbolType.IFUNC or part.live(block) is None:
                            self._brought.setdefault(symbol.name, (part, block))
            for block in part.blocks.data_blocks():
                if block.exported and block.kind in (Kind.DATA, Kind.READ_ONLY):
                    for symbol in block.symbols:
                        known = self._brought.setdefault(symbol.name, (part, block))
                        if _is_tentative(known[1]):
                            self._brought[symbol.name] = part, block
        self.renewed: dict[Block, Migration] = {}  # variables that get new storage
        self._storages = ledger.journal.storages_at(ledger.generation)
        self._outdated = ledger.journal.outdated_at(ledger.generation)
        self._redirects = {r.original: r for r in ledger.journal.redirects}
        self._known: dict[tuple[LoadedModule, str, bool], Bound | None] = {}
        self._stubs: dict[tuple[LoadedModule, str], int] = {}  # of IFUNCs, in position-independent modules
        # What still stands for an undefined function defines nothing.
        stubs = {p.address for p in ledger.journal.placed if p.unit == UNDEFINED}
        self._born = [
            r
            for r in reversed(ledger.journal.redirects)
            if r.born and not r.local and not (r.unit == UNDEFINED and ledger.slots[r.arena][r.index] in stubs)
        ]

    def lives(self, part: Part, variable: Block) -> bool:
        """Tell whether the process has a variable of a unit."""
        return self._variable(part, variable) is not None

    def living(self, part: Part, variable: Block) -> LiveVariable | None:
        """Return where the process has a variable of a unit now, whatever its size; None for one it has not."""
        if not variable.symbols or numbered(variable.name):
            return None
        return self._find_variable(part, variable)

    def denoted_variable(self, part: Part, name: str) -> LiveVariable | None:
        """Return what a name that a unit does not define denotes, if it is a variable of the process."""
        storage = next((s for s in self._storages if not s.local and name in s.names), None)
        if storage is not None:
            return LiveVariable(name, storage.address, storage.size)
        found = self.image.search(name, part.module, weak=True)
        if found is None or found.function or found.thread_local or not found.size:
            return None
        return LiveVariable(name, found.address, found.size)

    def part_of(self, block: Block) -> Part:
        return self.part_with(block.object)

    def part_with(self, source: ObjectFile) -> Part:
        return self._objects[source]

    def unit(self, part: Part, wanted: tuple[Block, ...]) -> Unit:
        unit = Unit(part.blocks, wanted, self._resident(part), part.is_door)
        self._units[part.blocks] = unit
        return unit

    def provide(self, name: str) -> tuple[Unit, Block] | None:
        found = self._brought.get(name)
        if found is None and self._is_missing(name):
            found = self._supply(name)
        if found is None:
            return None
        part, block = found
        return self._units[part.blocks], block

    def _is_missing(self, name: str) -> bool:
        """Tell whether nobody has a definition that somebody needs: a weak reference pulls nothing in."""
        if self._beyond.supply is None:
            return False
        if name not in self._missing:
            has = self._denoted(self._beyond.module, name) is not None
            self._missing[name] = not has and any(_needs(p.blocks, name) for p in self._parts.values())
        return self._missing[name]

    def _supply(self, name: str) -> tuple[Part, Block] | None:
        assert self._beyond.supply is not None
        found = self._beyond.supply.find(name, self._beyond.module, lambda: uses_of(name, self._parts))
        if found is None:
            return None
        if isinstance(found, Bound):
            self._awaited[name] = found
            return None
        part, _ = found
        if part.blocks not in self._parts:
            self._parts[part.blocks] = self._objects[part.blocks.object] = part
            self.unit(part, ())
            self.supplied.append(part)
        self._brought[name] = found
        self._missing[name] = False
        return found

    # --- blocks of the object ---------------------------------------------------------------------------------

    def _resident(self, part: Part) -> Callable[[Block], Bound | None]:
        def resident(block: Block) -> Bound | None:
            if block.kind is Kind.CODE:
                return self._function(part, block)
            if block.kind is Kind.READ_ONLY:
                matched = part.matched(block)
                address = part.delta.bindings.get(matched) if matched is not None and matched.symbols else None
                return Bound(address) if address is not None and not _labels_of_new_code(part, block) else None
            found = self._variable(part, block)
            if found is not None:
                _check_labels(part, block)
            return found

        return resident

    def _function(self, part: Part, block: Block) -> Bound | None:
        if part.is_new(block):
            return self._elsewhere(part, block) if part.supplied else None
        interposed = self._interposed(part, block)
        if interposed is not None and interposed.function:
            return self._entry(interposed.address)
        live = part.live(block)
        if live is None:
            return None
        return self._entry(live.address)

    def _elsewhere(self, part: Part, block: Block) -> Bound | None:
        """Return the process's own definition of what a supplied object defines too, None when it has none."""
        live = part.live(block)
        if live is not None and live.redirect is not None and live.redirect.unit == UNDEFINED:
            return None  # found at last
        if part.status(block) is Status.CHANGED and not is_private_piece(block.name):
            raise UnsafeChange(
                f"`{block.name}` of {part.source} is needed together with what is missing, and what process "
                f"{self.image.target.pid} has of that name is another one",
                f"it was linked from another build: give what it was linked from, or apply {part.source} itself",
                code="mismatch",
            )
        for symbol in block.symbols if part.unit.born else ():
            if not symbol.local and self._is_defined_in(part.module, symbol.name):
                return self._denoted(part.module, symbol.name)
        return None

    def _is_defined_in(self, module: LoadedModule, name: str) -> bool:
        """Tell whether a module, or an earlier generation, has a definition: another module's would be preempted."""
        if self._from_earlier_generation(module, name) is not None:
            return True
        definition = self.image.search(name, module)
        return definition is not None and definition.module is module

    def _entry(self, address: int) -> Bound:
        redirect = self._redirects.get(address)
        if redirect is None or not (redirect.born or self.ledger.is_detoured(redirect)):
            return Bound(address)
        return Bound(address, self.ledger.arenas[redirect.arena].island(redirect.index))

    def _interposed(self, part: Part, block: Block) -> Definition | None:
        """Return what a library's own exported name denotes in the process, where that is another module's."""
        if part.module is self.image.executable:
            return None
        for symbol in block.symbols:
            found = self.image.search(symbol.name, part.module) if not symbol.local else None
            if found is not None and found.module is not part.module:
                return found if found.unique or self.image.binds(part.module, found) else None
        return None

    def _variable(self, part: Part, block: Block) -> Bound | None:
        if block.kind is Kind.THREAD_LOCAL:
            interposed = self._interposed(part, block)
            if interposed is not None and interposed.thread_local:
                return self._thread_local(interposed)
        if block in self.renewed:
            return None
        matched = part.matched(block)
        address = part.delta.bindings.get(matched) if matched is not None else None
        if address is None and part.unit.born and block.exported and block.kind is not Kind.THREAD_LOCAL:
            there = self._elsewhere(part, block)
            if there is not None:
                return there
        if address is None:
            found = self._find_variable(part, block)
            if found is None:
                self._check_tentative(part, block)
                return None
            if found.size and block.size and found.size != block.size:
                raise UnsafeChange(
                    f"`{base_name(block.name)}` has {block.size} bytes in {part.source}, "
                    f"but {found.size} in the process",
                    "its type changed, and the program's data has the old one: restart the program, or keep the size",
                    code="layout",
                )
            address = found.address
        if block.kind is not Kind.THREAD_LOCAL:
            return Bound(address)
        return self._in_thread_block(part.module, address, block.name)

    def _check_tentative(self, part: Part, block: Block) -> None:
        """Refuse a new common symbol that ld would merge with a definition elsewhere."""
        for symbol in block.symbols:
            other = self._defined_elsewhere(part, block, symbol.name) if symbol.common else ""
            if other:
                raise UnsafeChange(
                    f"`{symbol.name}` is new and without an initial value in {part.source}, and {other} defines it",
                    "declare it `extern`, or compile with -fno-common",
                    code="tentative",
                )

    def _defined_elsewhere(self, part: Part, block: Block, name: str) -> str:
        brought = self._brought.get(name)
        if brought is not None and brought[1] is not block:
            return brought[0].blocks.object.name
        supply = self._beyond.supply
        found = supply.defining(name, part.module) if supply is not None else None
        proper = found is not None and any(s.name == name and not s.common for s in found.symbols)
        return found.name if found is not None and proper else ""

    def _find_variable(self, part: Part, block: Block) -> LiveVariable | None:
        interposed = self._interposed(part, block)
        if interposed is not None and not interposed.function and not interposed.thread_local:
            return LiveVariable(interposed.name, interposed.address, interposed.size)
        if not numbered(block.name):
            return next(iter(candidates(part.unit, block)), None)
        return find_static(part, block)

    # --- names the object does not define -----------------------------------------------------------------------

    def resolve(self, blocks: Blocks, external: External) -> Bound | None:
        part = self._parts[blocks]
        found = self._denoted(part.module, external.name, weak=external.weak)
        if found is None:
            return self._awaited.get(external.name)
        stub = self._stubs.get((part.module, external.name))
        if stub is not None and _takes_directly(part, external.name):
            return Bound(stub, found.call or found.address)
        return found

    def _denoted(self, module: LoadedModule, name: str, *, weak: bool = False) -> Bound | None:
        """Return what a name denotes for a unit of a module, in the process or already in this generation."""
        key = (module, name, weak)
        if key not in self._known:
            self._known[key] = self._look_up(module, name, weak)
        return self._known[key]

    def _look_up(self, module: LoadedModule, name: str, weak: bool) -> Bound | None:
        earlier = self._from_earlier_generation(module, name)
        if earlier is not None:
            return earlier
        if name == MODULE_BASE:
            return self._module_base(module)
        definition = self.image.resolve(name, module, weak=weak)
        if definition is None:
            return self._beyond.defined.get(name) or self._born_elsewhere(name)
        return replace(self._defined(module, definition), size=definition.size)

    def _defined(self, module: LoadedModule, definition: Definition) -> Bound:
        if definition.thread_local:
            return self._thread_local(definition)
        if definition.ifunc:
            return self._chosen_function(module, definition)
        if definition.function:
            return self._external_function(module, definition)
        return Bound(definition.address)

    def _external_function(self, module: LoadedModule, definition: Definition) -> Bound:
        entry = self._entry(definition.address)
        canonical = self.image.canonical_plt(definition.name) if definition.module is not module else None
        if canonical is None:
            return entry
        return Bound(canonical, entry.call or definition.address)

    def _chosen_function(self, module: LoadedModule, definition: Definition) -> Bound:
        """Return an IFUNC's implementation, with the address that stands for it where code takes that."""
        chosen = self._entry(self._chosen(definition))
        if definition.module is not module:
            stub = self.image.canonical_plt(definition.name)
        else:
            stub = self.image.chosen_stub(definition)
            if stub is not None and module.module.position_independent:
                # In tables and cells the linker of such a module puts the implementation itself.
                self._stubs[module, definition.name] = stub
                return chosen
        return chosen if stub is None else Bound(stub, chosen.call or chosen.address)

    def _chosen(self, definition: Definition) -> int:
        if self.image.chosen(definition) is None and self.image.stub_area is None:
            raise NeedsArena
        return self.image.choose(definition)

    def _thread_local(self, definition: Definition) -> Bound:
        return self._in_thread_block(definition.module, definition.address, definition.name)

    def _in_thread_block(self, module: LoadedModule, offset: int, name: str) -> Bound:
        """Return what is at an offset of a module's thread-local block, wherever each thread has that."""
        base = self.image.thread_block(module)
        if base is not None:
            return Bound(base + offset, thread_local=True)
        return Bound(offset, thread_local=True, module_id=self._module_number(module, name))

    def _module_base(self, module: LoadedModule) -> Bound:
        # Where the block is static, offsets from this base are made offsets from the thread pointer.
        static = self.image.thread_block(module) is not None
        return Bound(0, thread_local=True, module_id=0 if static else self._module_number(module, MODULE_BASE))

    def _module_number(self, module: LoadedModule, name: str) -> int:
        number = self.image.thread_module(module)
        if number is None:
            raise _nowhere(name, module)
        return number

    def _born_elsewhere(self, name: str) -> Bound | None:
        """Return what only a patch of another module has brought: its functions and its constants."""
        for redirect in self._born:
            if name in redirect.names:
                return Bound(redirect.original)
        for placed in reversed(self.ledger.journal.placed):
            if placed.kind == "read-only" and not placed.local and name in placed.names:
                return Bound(placed.address)
        return None

    def _from_earlier_generation(self, module: LoadedModule, name: str) -> Bound | None:
        for redirect in self._born:
            if name in redirect.names and redirect.module == module.path:
                return Bound(redirect.original)
        for storage in self._storages:
            if not storage.local and name in storage.names:
                return Bound(storage.address, size=storage.size)
        for placed in reversed(self.ledger.journal.placed):
            current = placed.address not in self._outdated
            if placed.kind == "data" and current and not placed.local and name in placed.names:
                return Bound(placed.address)
        return None
