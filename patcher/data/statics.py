"""Which live variable one of an object is: its storage and value outlive every compile, its name may not.

A file's own names last. Compilers number the static variables of functions (`names`), so these go by evidence, in this
order: what matching could bind; who uses them (`uses`); the function that debug information declares them in, and
their type (`declared`); and where several of one function are left, the places in its code (`sites`) with the order
and the initial contents of both. Never by number. Whoever is left without any is a new variable; what cannot be told
is refused, never guessed.

A variable that is declared otherwise than before (static or global, in a function or outside, in another unit) is the
same one where that is certain; it has moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from weakref import WeakKeyDictionary

from patcher.blocks import Block, Blocks, Kind
from patcher.data.counterparts import Counterpart, counterpart
from patcher.data.located import NONE, Declarations, Declared, declared_in_object, declared_in_program, place
from patcher.data.names import Spelling, guard_of, guards, spelling
from patcher.data.outcome import Fate
from patcher.data.sites import Pairs, clearly, same_code, votes
from patcher.data.uses import Bodies, Uses, owner
from patcher.elf import tables as t
from patcher.errors import ObjectError, UnsafeChange
from patcher.image import LoadedModule
from patcher.live import LiveVariable, base_name
from patcher.part import Part

_declared: WeakKeyDictionary[Blocks, Declarations] = WeakKeyDictionary()  # an object may be linked more than once
_HINT = "give the function's static variables different names, one save at a time"


@dataclass(frozen=True, slots=True)
class Found:
    """A live variable that one of an object is; `fate` is what became of it, when that is worth telling."""

    variable: LiveVariable
    fate: Fate | None = None
    note: str = ""


def is_scoped(block: Block) -> bool:
    """Tell whether a block is a variable that only a function's code can name."""
    return bool(block.symbols) and spelling(block.name).scoped


class Variables:
    """The variables of some units that are linked together."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._units = {part: _Unit(part) for part in parts}

    def find(self, part: Part, block: Block) -> Found | None:
        """Return the live variable that one of a unit is, or None when it is new.

        Raises `UnsafeChange` when two would do, or when it would do for two.
        """
        if block.anonymous:
            return None
        unit = self._unit(part)
        found = unit.scoped(block) if is_scoped(block) else unit.plain(block)
        return found or unit.moved(block) or self._from_another_unit(unit, block)

    def constant(self, part: Part, block: Block, known: Sequence[LiveVariable]) -> Counterpart | None:
        """Return which of some live constants a function's own one is, None when it is new or cannot be told."""
        return counterpart(self._unit(part), block, known)

    def describe(self, part: Part, block: Block) -> tuple[str, str]:
        """Return the type and the function that debug information gives for a variable, "" where it does not."""
        unit = self._unit(part)
        known = unit.declared(block)
        return (known.type if known else ""), unit.function_of(block)

    def _unit(self, part: Part) -> _Unit:
        if part not in self._units:
            self._units[part] = _Unit(part)
        return self._units[part]

    def _from_another_unit(self, unit: _Unit, block: Block) -> Found | None:
        """Return the variable that left another unit of the same generation, and came to this one."""
        others = [u for u in self._units.values() if u is not unit and u.module is unit.module]
        found = [(u, v) for u in others for v in u.left(block, unit)]
        if not found:
            return None
        if len(found) > 1 or any(u.has_new(block) for u in others):
            raise _ambiguous(unit, block, [v for _, v in found], [u.describe(v) for u, v in found])
        other, variable = found[0]
        return Found(replace(variable, born=False), Fate.MOVED, f"was in {other.part.source}")


def _ambiguous(
    unit: _Unit, block: Block, variables: Sequence[LiveVariable], scopes: Sequence[str] = ()
) -> UnsafeChange:
    said = [*scopes, *("" for _ in variables)]
    places = " or ".join(
        f"`{v.name}` at {v.address:#x}" + (f" ({scope})" if scope else "")
        for v, scope in zip(variables, said, strict=False)
    )
    where = f" of `{function}`" if (function := unit.function_of(block)) else ""
    return UnsafeChange(
        f"whether the static `{spelling(block.name).source}`{where} of {unit.part.source} is {places} cannot be told",
        _HINT,
        code="ambiguous-variable",
    )


class _Unit:
    """One unit's variables, in the object and in the process."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.live = part.unit
        self.module = part.unit.module
        self.uses = Uses(part)
        self._options: dict[tuple[Kind, str, bool], dict[Block, list[LiveVariable]]] = {}

    # --- what is known --------------------------------------------------------------------------------------------

    @cached_property
    def _bound(self) -> set[tuple[bool, int]]:
        bindings = self.part.delta.bindings
        return {(b.kind is Kind.THREAD_LOCAL, a) for b, a in bindings.items() if b.kind is not Kind.READ_ONLY}

    @cached_property
    def _variables(self) -> list[LiveVariable]:
        return self.live.own_variables()

    @cached_property
    def _in_object(self) -> Declarations:
        blocks = self.part.blocks
        found = _declared.get(blocks)
        if found is None:
            found = _declared[blocks] = declared_in_object(bytes(blocks.object.contents), blocks.object.name)
        return found

    @cached_property
    def _in_program(self) -> Declarations:
        files = self.part.blocks.object.files or (self.part.blocks.object.file_symbol,)
        module = self.module
        path = Path(module.module.symbols_from)
        path = module.file if str(path) == module.path or not path.is_file() else path
        try:
            stamp = path.stat().st_mtime_ns
        except OSError:
            return NONE
        return declared_in_program(path, stamp, files[0])

    def declared(self, block: Block) -> Declared | None:
        """Return what the object's debug information says of a variable."""
        kind = block.kind is Kind.THREAD_LOCAL
        found = self._in_object.at(place(block.section, block.start), thread_local=kind)
        # Thread-locals are told by their offset in the unit's own block, which the linker lays out anew.
        return None if kind else found

    def declaration(self, variable: LiveVariable) -> Declared | None:
        """Return what the program's debug information says of one of its variables."""
        if not self.module.contains(variable.address):
            return None
        return self._in_program.at(variable.address - self.module.bias)

    def function_of(self, block: Block) -> str:
        known = self.declared(block)
        return spelling(block.name).function or (known.function if known is not None else "")

    def function_declaring(self, variable: LiveVariable) -> str:
        """Return the function that a live variable was declared in, "" where that is not known, or none."""
        known = self.declaration(variable)
        said = spelling(variable.name).function or (known.function if known is not None else "")
        return said or variable.scope

    def _functions_of(self, variable: LiveVariable) -> set[str]:
        """Return the functions that a variable has been declared in, as far as that is known."""
        records = (v for v in self._variables if v.address == variable.address and v.born)
        found = {self.function_declaring(variable), *(v.scope or spelling(v.name).function for v in records)}
        return found - {""}

    def type_of(self, variable: LiveVariable) -> str:
        known = self.declaration(variable)
        return known.type if known is not None else variable.type

    def describe(self, variable: LiveVariable) -> str:
        """Return where a live variable was declared, for a message."""
        known = self.declaration(variable)
        if known is not None:
            return known.scope
        return f"of `{variable.scope}`" if variable.scope else ""

    def same_type(self, block: Block, variable: LiveVariable) -> bool:
        """Tell whether a variable may be one of an object: same size, and same type as far as that is known."""
        if variable.size != block.size:
            return False
        known, old = self.declared(block), self.type_of(variable)
        return known is None or not known.type or not old or known.type == old

    # --- names of the file's own ----------------------------------------------------------------------------------

    def plain(self, block: Block) -> Found | None:
        """Return the variable that a name of the file, or of the program, has always denoted."""
        found: dict[int, LiveVariable] = {}
        for symbol in block.symbols:
            for variable in self.live.variables(
                symbol.name, symbol.local, trusted=self._is_own, thread_local=block.kind is Kind.THREAD_LOCAL
            ):
                found.setdefault(variable.address, variable)
        if not found:
            return None
        variable = next(iter(found.values()))
        if self._became_another(block, variable):
            return None
        if block.kind is Kind.THREAD_LOCAL:
            return Found(variable)
        if self.live.moved_away(variable.address) and not self._is_used(variable):
            raise _ambiguous(self, block, [variable], ["which another unit has now"])
        if not variable.born and self._was_static(variable) == block.exported:
            return Found(variable, Fate.MOVED, "was static" if block.exported else "was global")
        return self._found_again(block, variable)

    def _is_own(self, address: int) -> bool:
        """Tell whether a global is known to be defined by this unit."""
        known = self._in_program.at(address - self.module.bias)
        if known is not None:
            return known.external and not known.function
        return False

    def _was_static(self, variable: LiveVariable) -> bool | None:
        """Tell whether the program has a variable as a static; None when the linker left no difference."""
        known = self.declaration(variable)
        if known is not None:
            return not known.external
        return None if self.module.module.demotes else variable.local

    def _became_another(self, block: Block, variable: LiveVariable) -> bool:
        """Tell whether what a patch brought under a name is gone, so that another type may have the name."""
        if not variable.born or self.same_type(block, variable):
            return False
        if self._is_used(variable):
            raise UnsafeChange(
                f"`{base_name(block.name)}` of {self.part.source} has another type than before, and code that runs "
                "uses the old one",
                "give it another name, or go back to the type that it had",
                code="layout",
            )
        return True

    def _found_again(self, block: Block, variable: LiveVariable) -> Found:
        users = self.uses.users(block)
        if not (variable.local or variable.born):
            return Found(variable)  # other units may have used it all the time
        if any(self.uses.uses(self.uses.current(f), variable) for f in users) or self._is_used(variable):
            return Found(variable)
        return Found(variable, Fate.FOUND, "was gone, and has its value again")

    def _is_used(self, variable: LiveVariable) -> bool:
        """Tell whether code of the unit that runs now refers to a variable."""
        if (False, variable.address) in self._bound:
            return True
        bodies = (self.uses.current(f) for f in self.part.blocks.functions)
        return any(self.uses.uses(b, variable) for b in bodies)

    # --- the static variables of functions ------------------------------------------------------------------------

    def scoped(self, block: Block) -> Found | None:
        """Return the variable that a function's static variable is."""
        return self._guard(block) if spelling(block.name).guard else self._by_evidence(block)

    def _by_evidence(self, block: Block) -> Found | None:
        options = self._resolved(block)
        found = options.get(block, [])
        doubtful = found or self._unclaimed(block, options)
        if len(doubtful) > len(found) or len(found) > 1 or self._is_shared(options, found):
            raise _ambiguous(self, block, doubtful, [self.describe(v) for v in doubtful])
        if not found:
            self._check_size(block, options)
            return None
        if block.kind is Kind.THREAD_LOCAL:
            return Found(found[0])
        before = self._functions_of(found[0])
        if before and self.function_of(block) not in {"", *before}:
            return Found(found[0], Fate.MOVED, f"was in `{min(before)}`")
        return self._found_again(block, found[0])

    def _check_size(self, block: Block, options: dict[Block, list[LiveVariable]]) -> None:
        """Refuse a variable that the functions which use it have, in another size or of another type."""
        claimed = {v.address for found in options.values() for v in found}
        for variable in self._named_alike(block):
            used = any(self.uses.uses(self.uses.current(f), variable) for f in self.uses.users(block))
            if used and variable.address not in claimed and self._agrees(block, variable):
                raise UnsafeChange(
                    f"`{spelling(block.name).source}` has {block.size} bytes in {self.part.source}, but "
                    f"{variable.size} in the process{self._other_type(block, variable)}",
                    "its type changed, and the program's data has the old one: restart the program, or keep the type",
                    code="layout",
                )

    def _other_type(self, block: Block, variable: LiveVariable) -> str:
        known, old = self.declared(block), self.type_of(variable)
        return f" ({known.type} instead of {old})" if known is not None and known.type and old else ""

    @staticmethod
    def _is_shared(options: dict[Block, list[LiveVariable]], found: list[LiveVariable]) -> bool:
        return bool(found) and sum(found == o for o in options.values()) > 1

    def _resolved(self, block: Block) -> dict[Block, list[LiveVariable]]:
        name = spelling(block.name)
        key = block.kind, name.source, name.guard
        if key not in self._options:
            self._options[key] = self._resolve(block)
        return self._options[key]

    def _matched(self, block: Block) -> bool:
        matched = self.part.matched(block)
        return matched is not None and matched in self.part.delta.bindings

    def _family(self, block: Block) -> list[Block]:
        """Return the static variables of functions that share a name and that matching did not bind."""
        name = spelling(block.name)
        data = (b for b in self.part.blocks.data_blocks() if b.kind is block.kind and b.symbols)
        return [b for b in data if _alike(spelling(b.name), name) and not self._matched(b)]

    def _resolve(self, block: Block) -> dict[Block, list[LiveVariable]]:
        options = {b: self._evident(b) for b in self._family(block)}
        self._exclude(options)
        for variable in [found[0] for found in options.values() if len(found) == 1]:
            self._prefer_same_users(options, variable)
        self._tell_apart(options)
        self._exclude(options)
        return options

    @staticmethod
    def _exclude(options: dict[Block, list[LiveVariable]]) -> None:
        for _ in options:  # what is certain for one is out of the question for the others
            certain = [found[0] for found in options.values() if len(found) == 1]
            for block, found in options.items():
                if len(found) > 1:
                    options[block] = [v for v in found if v not in certain]

    def free(self, block: Block) -> list[LiveVariable]:
        """Return the live variables that a scoped one may be, and that nothing is bound to."""
        return [v for v in self._named_alike(block) if self.same_type(block, v)]

    def _named_alike(self, block: Block) -> list[LiveVariable]:
        name, kind = spelling(block.name), block.kind is Kind.THREAD_LOCAL
        found: dict[int, LiveVariable] = {}
        exported = block.symbols[0].name if block.exported else ""
        known = self.live.exported_variables(base_name(exported)) if exported else []
        for variable in (*self._variables, *known):
            if _alike(spelling(variable.name), name) and variable.thread_local == kind:
                found.setdefault(variable.address, variable)
        return [v for v in found.values() if (kind, v.address) not in self._bound]

    def _evident(self, block: Block) -> list[LiveVariable]:
        """Return the live variables that the functions which use one have used, or that it is declared to be."""
        free = self.free(block)
        users = self.uses.users(block)
        used = self._used(block, free, [b for f in users if (b := self.uses.current(f))])
        if not used:
            used = self._used_before(block, free, users)
        found = used or [v for v in free if self._agrees(block, v, certainly=True)]
        same = [v for v in found if self._agrees(block, v, certainly=True)]
        if not same:
            found = [v for v in found if self._agrees(block, v) and self._carries_over(block, v)]
            same = [v for v in found if self._is_renamed(block, v)] if len(found) > 1 else []
        return same or found

    def _used(self, block: Block, free: list[LiveVariable], old: list[Bodies]) -> list[LiveVariable]:
        kind = block.kind is Kind.THREAD_LOCAL
        used = [v for v in free if any(self.uses.uses(bodies, v, thread_local=kind) for bodies in old)]
        # A caller that a function is inlined into uses its own variables as well; the function does not.
        return [v for v in used if all(self.uses.uses(bodies, v, thread_local=kind) for bodies in old)] or used

    def _used_before(self, block: Block, free: list[LiveVariable], users: set[Block]) -> list[LiveVariable]:
        """Return what the functions that use a variable used in other generations."""
        if block.kind is Kind.THREAD_LOCAL:
            return []
        for function in users:
            for bodies in self.uses.earlier(function):
                found = self._used(block, free, [bodies])
                if found:
                    return found
        return []

    def _agrees(self, block: Block, variable: LiveVariable, *, certainly: bool = False) -> bool:
        """Tell whether a variable may be declared where a live one is, or is said to be."""
        ours, theirs = self.function_of(block), self._functions_of(variable)
        if not ours or not theirs:
            return not certainly
        if ours in theirs:
            return True
        if certainly:
            return False
        # Of two functions that are both still there, each has its own.
        return not (any(map(self._has_function, theirs)) and self._had_function(ours))

    def _has_function(self, name: str) -> bool:
        return name in self.uses.functions or name in self._in_object.functions

    def _had_function(self, name: str) -> bool:
        blocks = (b for b in self.part.blocks.functions if any(owner(s.name) == name for s in b.symbols))
        return any(self.part.live(b) is not None for b in blocks) or name in self._in_program.functions

    def _carries_over(self, block: Block, variable: LiveVariable) -> bool:
        """Tell whether a new function that stands for one that is gone is that function, renamed."""
        ours, theirs = self.function_of(block), self.function_declaring(variable)
        direct = self.uses.direct(block)
        if any(self.part.live(f) is not None for f in direct):
            return True
        callers = self.uses.users(block) - direct
        own = [b for f in callers for b in self.uses.current(f) if owner(b.name) == owner(f.name)]
        if self.uses.uses(own, variable):
            return True  # it was part of the caller, and has become a function of its own
        if ours and theirs and self._has_function(theirs):
            return False
        old = self._owners(variable)
        if {owner(b.name) for b in old} & {owner(f.name) for f in direct}:
            return True  # it is the same function, in another clone of it
        seen = votes(self.part.blocks, direct, old, [block], [variable])
        return seen.of(block) == {variable.address} and block not in seen.loose_new

    def _is_renamed(self, block: Block, variable: LiveVariable) -> bool:
        """Tell whether a variable's function is one that is gone, in all but its name."""
        old = self._owners(variable)
        return any(same_code(self.part.blocks, f, b) for f in self.uses.direct(block) for b in old)

    def _owners(self, variable: LiveVariable) -> Bodies:
        """Return the bodies of functions that are gone and that refer to a variable."""
        bodies = {b.body: b for f in self.part.blocks.functions for b in self.uses.current(f)[1:]}
        return tuple(b for b in bodies.values() if self.uses.uses((b,), variable))

    def _prefer_same_users(self, options: dict[Block, list[LiveVariable]], variable: LiveVariable) -> None:
        """Of several that one would do for, take the only one that is used by the very functions that used it."""
        rivals = [block for block, found in options.items() if found == [variable]]
        if len(rivals) < 2:
            return
        kind = rivals[0].kind is Kind.THREAD_LOCAL
        functions = self.part.blocks.functions
        before = {f for f in functions if self.uses.uses(self.uses.current(f), variable, thread_local=kind)}
        same = [block for block in rivals if self.uses.direct(block) == before]
        if len(same) == 1:
            options.update({block: [] for block in rivals if block is not same[0]})

    def _unclaimed(self, block: Block, options: dict[Block, list[LiveVariable]]) -> list[LiveVariable]:
        """Return the program's own variables that a block might be and no other one is."""
        claimed = {v.address for found in options.values() for v in found}
        own = [v for v in self.free(block) if not v.born and v.address not in claimed]
        return [v for v in own if self._agrees(block, v)]

    # --- several of one function ----------------------------------------------------------------------------------

    def _tell_apart(self, options: dict[Block, list[LiveVariable]]) -> None:
        """Settle which is which where several variables of one function have one name."""
        for block in list(options):
            found = options[block]
            group = [b for b, other in options.items() if other == found]
            if (len(found) > 1 or len(group) > 1) and found and block.kind is not Kind.THREAD_LOCAL:
                pairs = self._paired(group, found)
                options.update({b: [pairs[b]] if b in pairs else [] for b in group} if pairs is not None else {})

    def _paired(self, group: list[Block], found: list[LiveVariable]) -> dict[Block, LiveVariable] | None:
        """Pair new and old variables by all evidence together; None when it does not agree, or is not enough."""
        by_contents, by_order = self._by_contents(group, found), self._by_order(group, found)
        by_code = self._by_code(group, found)
        if by_code is None:
            return None
        if len(by_contents) == len(group) == len(found):
            if any(by_contents[b] is not v for b, v in by_code.pairs.items()):
                return None
            return by_contents if by_code.pairs or by_contents == by_order else None
        if len(by_code.pairs) < min(len(group), len(found)) or not by_code.likely:
            return None
        if len(group) == len(found):
            agrees = by_code.pairs == by_order if by_order is not None else by_code.complete
            return by_code.pairs if agrees and (by_code.complete or by_code.distinct) else None
        # Some are new, or gone: those that are the same are so in every place, and are declared as deep as they were.
        alike = all(self._depth(b) == self._depth_of(v) is not None for b, v in by_code.pairs.items())
        return by_code.pairs if by_code.complete and by_code.distinct and alike else None

    def _by_code(self, group: list[Block], found: list[LiveVariable]) -> Pairs | None:
        """Pair by the places in the code; None when these contradict each other."""
        functions = sorted({f for b in group for f in self.uses.direct(b)}, key=lambda f: f.name)
        old = {b.body: b for f in functions for b in self.uses.current(f)}
        seen = votes(self.part.blocks, functions, list(old.values()), group, found)
        pairs: dict[Block, LiveVariable] = {}
        for block in group:
            places = seen.of(block)
            if len(places) > 1:
                return None
            pairs.update((block, v) for v in found if v.address in places)
        if len({v.address for v in pairs.values()}) < len(pairs):
            return None
        loose = any(b in seen.loose_new or v.address in seen.loose_old for b, v in pairs.items())
        return Pairs(pairs, not loose, *clearly(pairs, seen, group, found))

    def _by_contents(self, group: list[Block], found: list[LiveVariable]) -> dict[Block, LiveVariable]:
        """Pair by initial contents, where each has its own."""
        ours = {b: b.data or bytes(b.size) for b in group if not self.part.blocks.references(b)}
        theirs = {v.address: self._initial(v) for v in found}
        if len(set(ours.values())) < len(group) or len(set(theirs.values())) < len(found) or None in theirs.values():
            return {}
        return {b: v for b, data in ours.items() for v in found if theirs[v.address] == data}

    def _initial(self, variable: LiveVariable) -> bytes | None:
        """Return what the module's file has in the place of a variable."""
        if not self.module.contains(variable.address):
            return None
        return _file_bytes(self.module, variable.address - self.module.bias, variable.size)

    def _by_order(self, group: list[Block], found: list[LiveVariable]) -> dict[Block, LiveVariable] | None:
        """Pair in the order of their declarations, when all are known to be declared on lines of their own."""
        ours = [(d.line, b) for b in group if (d := self.declared(b)) is not None]
        theirs = [(d.line, v) for v in found if (d := self.declaration(v)) is not None]
        lines = {line for line, _ in ours}, {line for line, _ in theirs}
        if not len(group) == len(found) == len(lines[0]) == len(lines[1]):
            return None
        ours.sort(key=lambda o: o[0])
        theirs.sort(key=lambda o: o[0])
        return {b: v for (_, b), (_, v) in zip(ours, theirs, strict=True)}

    def _depth(self, block: Block) -> int | None:
        known = self.declared(block)
        return known.depth if known is not None else None

    def _depth_of(self, variable: LiveVariable) -> int | None:
        known = self.declaration(variable)
        return known.depth if known is not None else None

    # --- guards ---------------------------------------------------------------------------------------------------

    def _guard(self, block: Block) -> Found | None:
        """Return the guard of the variable that a guard's variable is: the two go together."""
        data = self.part.blocks.data_blocks()
        variables = [b for b in data if any(guards(block.name, s.name) for s in b.symbols)]
        if not variables:
            return self._by_evidence(block)
        known = next((v for b in variables if (v := self._live(b)) is not None), None)
        if known is None:
            return None
        wanted = guard_of(known.name)
        candidates = [*self._variables, *self.live.exported_variables(base_name(wanted))]
        found = [v for v in candidates if v.name == wanted and v.born == known.born]
        if found:
            return Found(found[-1])
        raise UnsafeChange(
            f"`{spelling(block.name).source}` of {self.part.source} is initialised by code now, and has been "
            "initialised without it",
            "keep its initial value constant, or give the variable another name",
            code="constructor",
        )

    def _live(self, variable: Block) -> LiveVariable | None:
        """Return the live variable that a static is, by its own name."""
        bound = self.part.delta.bindings.get(self.part.matched(variable) or variable)
        if bound is None:
            found = self._by_evidence(variable)
            return found.variable if found is not None else None
        known = [*self._variables, *self.live.exported_variables(base_name(variable.name))]
        return next((v for v in known if v.address == bound and spelling(v.name).scoped), None)

    # --- moves ----------------------------------------------------------------------------------------------------

    def moved(self, block: Block) -> Found | None:
        """Return the variable of this unit that is declared otherwise now: in a function, or outside of any."""
        said = spelling(block.name)
        if block.kind is not Kind.DATA or said.guard or (said.scoped and self._names_outside(said.source)):
            return None
        found = [v for v in self._declared_otherwise(block, said) if self._same_users(block, v)]
        if len(found) > 1:
            raise _ambiguous(self, block, found, [self.describe(v) for v in found])
        if not found:
            return None
        where = self.function_declaring(found[0])
        return Found(found[0], Fate.MOVED, f"was a static of `{where}`" if where else "was declared elsewhere")

    def _names_outside(self, source: str) -> bool:
        """Tell whether the object still has, or refers to, something of a static's name outside of functions."""
        blocks = self.part.blocks.data_blocks()
        own = any(b.symbols and not is_scoped(b) and _source_of(b.name) == source for b in blocks)
        return own or any(s.undefined and _source_of(s.name) == source for s in self.part.blocks.object.symbols)

    def _declared_otherwise(self, block: Block, said: Spelling) -> list[LiveVariable]:
        """Return the live variables of a name that are in a function when this one is not, or the reverse."""
        known = self._variables
        if said.scoped:
            known = [*known, *(v for v in self._globals(said.source) if self._is_own(v.address))]
        claimed = self._claimed(said.source)
        alike = {
            v.address: v
            for v in known
            if (s := spelling(v.name)).scoped != said.scoped
            and s.source == said.source
            and not s.guard
            and not v.thread_local
        }
        return [v for v in alike.values() if v.address not in claimed and self.same_type(block, v)]

    def _globals(self, name: str) -> list[LiveVariable]:
        return [v for v in self.live.exported_variables(name) if v.name == name]

    def _claimed(self, source: str) -> set[int]:
        """Return the addresses of the variables of a name that the object still has as they were."""
        found = {a for kind, a in self._bound if not kind}
        wanted = Spelling(source, scoped=True)
        for block in self.part.blocks.data_blocks():
            alike = block.kind is Kind.DATA and block.symbols and _alike(spelling(block.name), wanted)
            if alike and not self._matched(block):
                found |= {v.address for v in self._resolved(block).get(block, ())}
        return found

    def _same_users(self, block: Block, variable: LiveVariable) -> bool:
        """Tell whether a function that uses a variable now used the live one before."""
        if any(self.uses.uses(self.uses.current(f), variable) for f in self.uses.users(block)):
            return True
        earlier = (bodies for f in self.uses.users(block) for bodies in self.uses.earlier(f))
        return any(self.uses.uses(bodies, variable) for bodies in earlier)

    # --- from unit to unit ----------------------------------------------------------------------------------------

    def has_new(self, wanted: Block) -> bool:
        """Tell whether the object has a variable that is new as well, and like one of another unit's."""
        source = spelling(wanted.name).source
        data = (b for b in self.part.blocks.data_blocks() if b.kind is Kind.DATA and b.symbols)
        alike = [b for b in data if _source_of(b.name) == source and b.size == wanted.size]
        return any(not self._matched(b) and not is_scoped(b) and self.plain(b) is None for b in alike)

    def left(self, block: Block, other: _Unit) -> list[LiveVariable]:
        """Return the variables of this unit that its object does not have any more, and that another's may be."""
        said = spelling(block.name)
        if block.kind is not Kind.DATA or said.guard:
            return []
        claimed = self._claimed(said.source)
        names = {_source_of(s.name) for b in self.part.blocks.data_blocks() for s in b.symbols if not is_scoped(b)}
        found = {}
        for variable in self._variables:
            was = spelling(variable.name)
            if was.source != said.source or was.guard or was.scoped != said.scoped or variable.address in claimed:
                continue
            if (was.scoped or was.source not in names) and variable.size == block.size:
                found[variable.address] = variable
        return [v for v in found.values() if self._went(v, block, other)]

    def _went(self, variable: LiveVariable, block: Block, other: _Unit) -> bool:
        known, old = other.declared(block), self.type_of(variable)
        if known is not None and known.type and old:
            if known.type != old:
                return False
            if not spelling(block.name).scoped:
                return True
        return any(self.uses.uses(other.uses.current(f), variable) for f in other.uses.users(block))


def _alike(one: Spelling, other: Spelling) -> bool:
    """Tell whether two names may be one static variable's, or one guard's."""
    return one.scoped and other.scoped and one.source == other.source and one.guard == other.guard


def _file_bytes(module: LoadedModule, address: int, size: int) -> bytes | None:
    """Return what a module's file has at a link-time address: zeros where it only reserves room."""
    try:
        with module.file.open("rb") as opened:
            file = t.OpenFile(module.path, opened.fileno())
            for header in t.read_raw(module.path, file).program_headers:
                start = address - int(header["address"])
                if int(header["type"]) == t.PT_LOAD and start >= 0 and start + size <= int(header["memory_size"]):
                    in_file = max(0, min(size, int(header["file_size"]) - start))
                    offset = int(header["offset"]) + start
                    return bytes(file[offset : offset + in_file]).ljust(size, b"\0")
    except (OSError, ObjectError):
        pass
    return None


def _source_of(name: str) -> str:
    return spelling(name).source
