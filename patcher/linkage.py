"""What blocks and names mean in this process: where it has a block of an object, and what an undefined name denotes.

Knows the modules' scopes, what earlier generations brought, what the units of this one bring, and, when all that has
no answer, asks a `Supply`. Reads the target (to resolve an IFUNC it may ask the target's own resolver), and writes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from patcher.blocks import Block, Blocks, External, Kind
from patcher.data.counterparts import Counterpart, goes_by_use
from patcher.data.migrate import Migration
from patcher.data.statics import Found, Variables, is_scoped
from patcher.data.threads import (
    Models,
    NewThreadLocals,
    StaticModel,
    ThreadPlace,
    initialised_with,
    place_of,
)
from patcher.elf import ObjectFile, SymbolType
from patcher.elf.relocations import R
from patcher.errors import LinkError, UnsafeChange
from patcher.image import Definition, Image, LoadedModule
from patcher.labels import check_labels, labels_of_new_code
from patcher.link.plan import FIND_THREAD_LOCAL, Bound, Unit
from patcher.live import THREAD_LOCAL, UNDEFINED, LiveVariable, base_name, thread_place
from patcher.match import MODULE_BASE, Status, is_private_piece
from patcher.part import Part
from patcher.patch.ledger import Ledger
from patcher.undefined import Use, needs, uses_of


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


def _takes_directly(part: Part, name: str) -> bool:
    """Tell whether a unit's code takes a function's address without a table or cell."""
    references = (r for block in part.blocks.functions for r in part.blocks.references(block))
    return any(r.type == R.PC32 and isinstance(r.target, External) and r.target.name == name for r in references)


_THREAD_GUARD = "__tls_guard"  # what compilers call that which says whether a thread has initialised a unit's


def _added(number: int) -> Bound | None:
    """Return where a thread-local of ours is, from the number that stands for its place; None for other numbers."""
    place = thread_place(number)
    return Bound(place[0], thread_local=True, module_id=place[1]) if place is not None else None


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


@dataclass(frozen=True, slots=True)
class Beyond:
    """What the units of one module may use beside each other and the process."""

    module: LoadedModule
    supply: Supply | None
    defined: dict[str, Bound]
    threads: NewThreadLocals


class Linkage:
    """What the blocks and names of one module's parts mean in the process."""

    def __init__(self, image: Image, ledger: Ledger, parts: Sequence[Part], beyond: Beyond) -> None:
        self.image = image
        self.ledger = ledger
        self.supplied: list[Part] = []
        self.thread_locals: dict[Block, Part] = {}  # the new ones
        self.images: dict[Block, Block] = {}  # their initial values that have to be linked, as blocks of their own
        self._models: dict[Blocks, Models] = {}
        self._awaited: dict[str, Bound] = {}  # in libraries that are still to be loaded
        self._beyond = beyond
        self._missing: dict[str, bool] = {}
        self._parts = {p.blocks: p for p in parts}
        self._objects = {p.blocks.object: p for p in parts}
        self._units: dict[Blocks, Unit] = {}
        self._variables = Variables(parts)
        self.found: dict[Block, Found] = {}  # variables of which there is something to tell
        self._brought: dict[str, tuple[Part, Block]] = {}
        for part in parts:
            for block in part.blocks.functions:
                if block.exported and part.is_door(block):
                    for symbol in block.symbols:
                        # What stands there is the resolver of an IFUNC: the process chose, unless it is new.
                        if symbol.type != SymbolType.IFUNC or part.live(block) is None:
                            self._brought.setdefault(symbol.name, (part, block))
            for block in part.blocks.data_blocks():
                if block.exported and block.kind is not Kind.CODE:
                    for symbol in block.symbols:
                        known = self._brought.setdefault(symbol.name, (part, block))
                        if _is_tentative(known[1]):
                            self._brought[symbol.name] = part, block
        placed = [p for p in ledger.journal.placed if p.kind == THREAD_LOCAL]
        self._added_names = {*beyond.defined, *(name for p in placed for name in p.names)}
        self._in_place: dict[Block, int] = {}
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

    def address_of(self, part: Part, variable: Block) -> int | None:
        """Return where the process has a variable of a unit, or the number that stands for a thread-local.

        None where it cannot be told.
        """
        if variable.kind is Kind.THREAD_LOCAL:
            there = self.thread_place(part, variable)
            return there.key if there is not None else None
        if variable.kind is not Kind.DATA:
            return None
        try:
            found = self._variable(part, variable)
        except (UnsafeChange, StaticModel):
            return None  # refused, or compiled otherwise, if new code uses it
        return found.address if found is not None else None

    def thread_place(self, part: Part, variable: Block) -> ThreadPlace | None:
        """Return where each thread has a thread-local of a unit; None for a new one, and where it cannot be told."""
        if self._interposed(part, variable) is not None:
            return None
        matched = part.matched(variable)
        address = part.delta.bindings.get(matched) if matched is not None else None
        try:
            found = self._find_variable(part, variable) if address is None else None
            address = found.address if found is not None and found.size == variable.size else address
            if address is None:
                return None
            bound = _added(address) or self._in_thread_block(part.module, address, variable.name)
        except (UnsafeChange, LinkError):
            return None  # refused, if new code uses it
        added = {p.address for p in self.ledger.journal.placed if p.kind == THREAD_LOCAL}
        return place_of(self.image, part.module, bound, added)

    def constant_of(self, part: Part, block: Block) -> Counterpart | None:
        """Return the live constant that a block is, None where there is none or it cannot be told."""
        generation = self.ledger.generation
        found = self._interposed_variable(part, block)
        if found is None and goes_by_use(block):
            known = part.unit.constants_like(block, generation)
            return self._variables.constant(part, block, known) if known else None
        found = found or part.unit.constant(block, generation)
        return Counterpart(found) if found is not None else None

    def keep_in_place(self, block: Block, address: int) -> None:
        """Have a constant be what stands at an address, where it has its contents or is to get them."""
        self._in_place[block] = address

    def living(self, part: Part, variable: Block) -> LiveVariable | None:
        """Return where the process has a variable of a unit now, whatever its size; None for one it has not."""
        if not variable.symbols or is_scoped(variable):
            return None
        interposed = self._interposed_variable(part, variable)
        return interposed or next((v for s in variable.symbols for v in part.unit.variables(s.name, s.local)), None)

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
        if block.kind is Kind.THREAD_LOCAL:
            bound = self._resident(part)(block)
            assert bound is not None
            if block in self.thread_locals or name in self._added_names:
                self._check_users(name, bound)
        return self._units[part.blocks], block

    def _is_missing(self, name: str) -> bool:
        """Tell whether nobody has a definition that somebody needs: a weak reference pulls nothing in."""
        if self._beyond.supply is None:
            return False
        if name not in self._missing:
            has = self._denoted(self._beyond.module, name) is not None
            self._missing[name] = not has and any(needs(p.blocks, name) for p in self._parts.values())
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
            if block in self._in_place:
                return Bound(self._in_place[block])
            if block.kind is Kind.READ_ONLY:
                matched = part.matched(block)
                address = part.delta.bindings.get(matched) if matched is not None and matched.symbols else None
                return Bound(address) if address is not None and not labels_of_new_code(part, block) else None
            found = self._variable(part, block)
            if found is not None:
                check_labels(part, block)
            elif block.kind is Kind.THREAD_LOCAL:
                return self._new_thread_local(part, block)
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

    def _interposed_variable(self, part: Part, block: Block) -> LiveVariable | None:
        """Return the other module's variable or constant that a library's own exported name denotes, if it is one."""
        found = self._interposed(part, block)
        if found is None or found.function or found.thread_local:
            return None
        return LiveVariable(found.name, found.address, found.size)

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
                self._check_alike(part, block)
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
        added = _added(address)
        if added is not None:
            self._check_model(part.blocks, block, added)
            return added
        return self._in_thread_block(part.module, address, block.name)

    # --- thread-locals that the process was not started with -----------------------------------------------------

    def _new_thread_local(self, part: Part, block: Block) -> Bound:
        shared = next((found for s in block.symbols if (found := self._brought.get(s.name)) and not s.local), None)
        if shared is not None and shared[1] is not block and shared[1].kind is Kind.THREAD_LOCAL:
            bound = self._resident(shared[0])(shared[1])  # an inline variable of C++, which several units define
            assert bound is not None
            self._check_model(part.blocks, block, bound)
            return bound
        self._check_initialised(part, block)
        bound = self._beyond.threads.place(block)
        if bound.module_id and self._denoted(part.module, FIND_THREAD_LOCAL.name) is None:
            raise LinkError(
                f"`{base_name(block.name)}` of {part.source} is new and too large for a place at a fixed distance from "
                f"the thread pointer, and process {self.image.target.pid} has no function that finds another one"
                + ("" if self.image.executable.module.interpreter else ": it is linked statically"),
                "make it smaller, or a plain variable; or restart the program with the new code",
                code="new-thread-local",
            )
        self._check_model(part.blocks, block, bound)
        self.thread_locals[block] = part
        if block not in self.images and part.blocks.references(block):
            self.images[block] = part.blocks.contents_of(block)
        return bound

    def _check_initialised(self, part: Part, block: Block) -> None:
        """Refuse a new thread-local that is initialised together with others, which threads have done already."""
        guard = next((b for b in part.blocks.data_blocks() if _THREAD_GUARD in (s.name for s in b.symbols)), None)
        if guard is None or guard is block or self._variable(part, guard) is None:
            return
        if block in initialised_with(part.blocks, guard):
            raise UnsafeChange(
                f"`{base_name(block.name)}` of {part.source} is new and initialised in each thread together with the "
                "unit's other thread-locals, and threads that have these would not do it again",
                "move it to a new source file, make it a function's static variable, or give it a constant initial "
                "value",
                code="new-thread-local",
            )

    def _check_users(self, name: str, bound: Bound) -> None:
        """Refuse code of any unit that cannot reach a thread-local that another one brings."""
        for blocks in self._parts:
            self._check_model(blocks, name, bound)

    def _check_model(self, blocks: Blocks, target: Block | str, bound: Bound) -> None:
        if blocks not in self._models:
            self._models[blocks] = Models(blocks)
        module = self._parts[blocks].module
        fixed = module.module.thread_storage is None or self.image.thread_block(module) is not None
        self._models[blocks].check(target, bound, fixed_base=fixed)

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

    def _check_alike(self, part: Part, block: Block) -> None:
        """Refuse a variable that each thread is to have, and that other units know as one for all; or the reverse."""
        is_thread_local = block.kind is Kind.THREAD_LOCAL
        for symbol in block.symbols if not part.unit.born else ():
            known = self.image.resolve(symbol.name, part.module) if not symbol.local else None
            if known is not None and known.module is part.module and known.thread_local != is_thread_local:
                raise UnsafeChange(
                    f"`{symbol.name}` of {part.source} is {'' if is_thread_local else 'no longer '}thread-local now, "
                    f"and {'not ' if is_thread_local else ''}so for the other units of {part.module.name}",
                    "give it another name, or restart the program with the new code",
                    code="layout",
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
        interposed = self._interposed_variable(part, block)
        if interposed is not None:
            return interposed
        found = self._variables.find(part, block)
        if found is None:
            return None
        if found.fate is not None:
            self.found[block] = found
        return found.variable

    def described(self, block: Block) -> tuple[str, str]:
        """Return the type and the function of a variable, "" where no debug information says so."""
        return self._variables.describe(self.part_of(block), block)

    # --- names the object does not define -----------------------------------------------------------------------

    def resolve(self, blocks: Blocks, external: External) -> Bound | None:
        part = self._parts[blocks]
        found = self._denoted(part.module, external.name, weak=external.weak)
        if found is None:
            return self._awaited.get(external.name)
        if found.thread_local and external.name in self._added_names:
            self._check_model(blocks, external.name, found)
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
        earlier = self._from_earlier_generation(module, name) or self._newest_constant(module, name)
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
        static = module.module.thread_storage is None or self.image.thread_block(module) is not None
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

    def _newest_constant(self, module: LoadedModule, name: str) -> Bound | None:
        """Return the copy that the live generation has of an exported constant of a module."""
        for record in reversed(self.ledger.journal.lineage(self.ledger.generation)):
            for placed in record.placed:
                own = placed.kind == "read-only" and not placed.local and placed.module == module.path
                if own and name in placed.names:
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
            current = placed.kind == THREAD_LOCAL or (placed.kind == "data" and placed.address not in self._outdated)
            if current and not placed.local and name in placed.names:
                return _added(placed.address) or Bound(placed.address)
        return None
