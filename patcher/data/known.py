"""What is known of one unit's variables: of those in its object, and of those that the process has of it.

Joins debug information (`located`), records of earlier changes, and the code that uses them (`uses`). Which is which
is decided elsewhere: `statics`, `scoped`, `rivals`, `moves`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

from patcher.blocks import Block, Blocks, Kind
from patcher.data.holders import Holders
from patcher.data.initial import initially_same
from patcher.data.located import NONE, Declarations, Declared, declared_in_object, declared_in_program, place
from patcher.data.names import spelling
from patcher.data.outcome import Fate
from patcher.data.uses import Uses, owner
from patcher.errors import UnsafeChange
from patcher.live import LiveVariable
from patcher.part import Part

_declared: WeakKeyDictionary[Blocks, Declarations] = WeakKeyDictionary()  # an object may be linked more than once
_HINT = "give the function's static variables different names, one save at a time"


@dataclass(frozen=True, slots=True)
class Found:
    """A live variable that one of an object is; `fate` is what became of it, when that is worth telling.

    `shifted`: it has another place in its function than what is recorded, which is to be recorded.
    """

    variable: LiveVariable
    fate: Fate | None = None
    note: str = ""
    shifted: bool = False


class Position(NamedTuple):
    """Where in a function a static is declared: within how many blocks, and as which of those of its name."""

    depth: int
    order: int


@dataclass(frozen=True, slots=True)
class Description:
    """What debug information says of a variable: "" and None where it says nothing."""

    type: str = ""
    function: str = ""
    position: Position | None = None


def is_scoped(block: Block) -> bool:
    """Tell whether a block is a variable that only a function's code can name."""
    return bool(block.symbols) and spelling(block.name).scoped


def source_of(name: str) -> str:
    """Return what the source calls a symbol of a variable."""
    return spelling(name).source


class Known:
    """One unit's variables, in the object and in the process."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.live = part.unit
        self.module = part.unit.module
        self.uses = Uses(part)

    @cached_property
    def bound(self) -> set[tuple[bool, int]]:
        bindings = self.part.delta.bindings
        return {(b.kind is Kind.THREAD_LOCAL, a) for b, a in bindings.items() if b.kind is not Kind.READ_ONLY}

    @cached_property
    def variables(self) -> list[LiveVariable]:
        return self.live.own_variables()

    @cached_property
    def in_object(self) -> Declarations:
        blocks = self.part.blocks
        found = _declared.get(blocks)
        if found is None:
            found = _declared[blocks] = declared_in_object(bytes(blocks.object.contents), blocks.object.name)
        return found

    @cached_property
    def in_program(self) -> Declarations:
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
        found = self.in_object.at(place(block.section, block.start), thread_local=kind)
        # Thread-locals are told by their offset in the unit's own block, which the linker lays out anew.
        return None if kind else found

    def declaration(self, variable: LiveVariable) -> Declared | None:
        """Return what the program's debug information says of one of its variables."""
        if not self.module.contains(variable.address):
            return None
        return self.in_program.at(variable.address - self.module.bias)

    def function_of(self, block: Block) -> str:
        known = self.declared(block)
        return spelling(block.name).function or (known.function if known is not None else "")

    def description(self, block: Block) -> Description:
        """Return what debug information says of a variable of the object."""
        known = self.declared(block)
        return Description(known.type if known else "", self.function_of(block), self.position_of(block))

    def position_of(self, block: Block) -> Position | None:
        """Return where a static of the object is declared in its function, None if that is not known."""
        known = self.declared(block)
        return _position(known, self.in_object) if known is not None else None

    def position(self, variable: LiveVariable) -> Position | None:
        """Return where a live variable was last known to be declared in its function."""
        recorded = self.live.position_of(variable.address)
        if recorded is not None:
            return Position(*recorded)
        known = self.declaration(variable)
        return _position(known, self.in_program) if known is not None else None

    def function_now(self, variable: LiveVariable) -> str:
        """Return the function that a live variable was last known to be declared in."""
        return self.live.scope_of(variable.address) or self.function_declaring(variable)

    def function_declaring(self, variable: LiveVariable) -> str:
        """Return the function that a live variable was declared in, "" where that is not known, or none."""
        known = self.declaration(variable)
        said = spelling(variable.name).function or (known.function if known is not None else "")
        return said or variable.scope

    def homes(self, variable: LiveVariable) -> set[str]:
        """Return the functions that a variable has been declared in, as far as that is known."""
        records = (v for v in self.variables if v.address == variable.address and v.born)
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

    def is_own(self, address: int) -> bool:
        """Tell whether a global is known to be defined by this unit."""
        known = self.in_program.at(address - self.module.bias)
        if known is not None:
            return known.external and not known.function
        return False

    def is_used(self, variable: LiveVariable) -> bool:
        """Tell whether code of the unit that runs now refers to a variable."""
        if (False, variable.address) in self.bound:
            return True
        bodies = (self.uses.current(f) for f in self.part.blocks.functions)
        return any(self.uses.uses(b, variable) for b in bodies)

    def found_again(self, block: Block, variable: LiveVariable) -> Found:
        """Return a variable as found, and say so if it was gone in between."""
        users = self.uses.users(block)
        if not (variable.local or variable.born) or self.live.became_global(variable.address):
            return Found(variable)  # other units may have used it all the time
        if any(self.uses.uses(self.uses.current(f), variable) for f in users) or self.is_used(variable):
            return Found(variable)
        return Found(variable, Fate.FOUND, "was gone, and has its value again")

    def other_type(self, block: Block, variable: LiveVariable) -> str:
        known, old = self.declared(block), self.type_of(variable)
        return f" ({known.type} instead of {old})" if known is not None and known.type and old else ""

    def is_matched(self, block: Block) -> bool:
        matched = self.part.matched(block)
        return matched is not None and matched in self.part.delta.bindings

    def has_function(self, name: str) -> bool:
        return name in self.uses.functions or name in self.in_object.functions

    def had_function(self, name: str) -> bool:
        blocks = (b for b in self.part.blocks.functions if any(owner(s.name) == name for s in b.symbols))
        return any(self.part.live(b) is not None for b in blocks) or name in self.in_program.functions

    def is_pointed_to(self, function: str) -> bool:
        """Tell whether a word of the program's data holds the address of one of its functions."""
        symbols = (s for s in self.module.module.symbols.named(function) if s.function)
        ranges = [(s.value + self.module.bias, s.value + self.module.bias + 1) for s in symbols]
        holders = Holders(self.live.image, self.live.view)
        return bool(ranges) and any(found.cells or found.others for found in holders.words(holders.mapped(), ranges))

    def starts_as(self, block: Block, variable: LiveVariable) -> bool | None:
        """Tell whether a live variable has, or has been told to have, the initial value of one of an object."""
        return initially_same(self.part, block, variable.address)

    def globals(self, name: str) -> list[LiveVariable]:
        return [v for v in self.live.exported_variables(name) if v.name == name]


def _position(known: Declared, every: Declarations) -> Position | None:
    """Return the place of a variable among those of its name in its function; None where two are on one line."""
    if not known.function:
        return None
    alike = (v for v in every.variables.values() if (v.name, v.function) == (known.name, known.function))
    lines = sorted(v.line for v in alike if not v.thread_local)
    return Position(known.depth, lines.index(known.line)) if known.line and lines.count(known.line) == 1 else None


def ambiguous(
    known: Known, block: Block, variables: Sequence[LiveVariable], scopes: Sequence[str] = ()
) -> UnsafeChange:
    """Return the refusal of a variable that may be one of several, or is one and may be so of another one's."""
    said = [*scopes, *("" for _ in variables)]
    places = " or ".join(
        f"`{v.name}` at {v.address:#x}" + (f" ({scope})" if scope else "")
        for v, scope in zip(variables, said, strict=False)
    )
    where = f" of `{function}`" if (function := known.function_of(block)) else ""
    return UnsafeChange(
        f"whether the static `{spelling(block.name).source}`{where} of {known.part.source} is {places} cannot be told",
        _HINT,
        code="ambiguous-variable",
    )
