"""Which live constant one of an object is, where its name does not say it.

A file's own names last, and a name that others use is theirs. What only a function's code can name (its static
constants, the tables that a compiler makes of a `switch`) is numbered anew by every compile, so that it goes by the
functions that use it: one that uses the new one must use the old one now, what is said of the function that declares
them must agree, and no other may come into question on either side. Who cannot be told is new.

That two are one is certain only where the declaring function and the type are known of both: code alone does not say
whether a table was a function's own, or that of another one which was inlined there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from patcher.blocks import Block, Kind
from patcher.data.names import spelling
from patcher.data.uses import Uses
from patcher.live import LiveVariable

# Of gcc: CSWTCH.N, C.N.M; of clang: switch.table.F, __const.F.N and others. Those with underscores are the language's.
_MADE = re.compile(r"((CSWTCH|C|switch\.table|reltable|__const|str|cst)\.|(\w+\.)?__(func|FUNCTION|PRETTY_FUNCTION)__)")


@dataclass(frozen=True, slots=True)
class Counterpart:
    """The live constant that one of an object is. `certain`: it may be written where it stands."""

    constant: LiveVariable
    certain: bool = True


class Unit(Protocol):
    """What is known of a unit's static variables."""

    @property
    def uses(self) -> Uses: ...

    def function_of(self, block: Block) -> str: ...

    def function_declaring(self, variable: LiveVariable) -> str: ...

    def same_type(self, block: Block, variable: LiveVariable) -> bool: ...


def is_made(name: str) -> bool:
    """Tell whether a constant is one that compilers make, and no source declares."""
    return _MADE.match(name) is not None


def goes_by_use(block: Block) -> bool:
    """Tell whether a constant is one that only a function's code can name."""
    return spelling(block.name).scoped or is_made(block.name)


def counterpart(unit: Unit, block: Block, known: Sequence[LiveVariable]) -> Counterpart | None:
    """Return which of some live constants of its name a function's own is; None when that cannot be told."""
    bound = unit.uses.part.delta.bindings
    taken = {address for other, address in bound.items() if other.kind is Kind.READ_ONLY}
    known = [v for v in known if v.address not in taken]
    found = _candidates(unit, block, known)
    if len(found) != 1:
        return None
    rivals = (b for b in _named_alike(unit, block) if b is not block and unit.uses.part.matched(b) not in bound)
    if any(found[0] in _candidates(unit, b, known) for b in rivals):
        return None
    return Counterpart(found[0], _is_certain(unit, block, found[0]))


def _named_alike(unit: Unit, block: Block) -> list[Block]:
    wanted = spelling(block.name).source
    data = unit.uses.part.blocks.data_blocks()
    return [b for b in data if b.kind is Kind.READ_ONLY and goes_by_use(b) and spelling(b.name).source == wanted]


def _candidates(unit: Unit, block: Block, known: Sequence[LiveVariable]) -> list[LiveVariable]:
    users = unit.uses.users(block)
    return [
        v for v in known if _may_declare(unit, block, v) and any(unit.uses.uses(unit.uses.current(f), v) for f in users)
    ]


def _may_declare(unit: Unit, block: Block, variable: LiveVariable) -> bool:
    if is_made(block.name):
        return True
    before, now = unit.function_declaring(variable), unit.function_of(block)
    return not before or not now or before == now


def _is_certain(unit: Unit, block: Block, variable: LiveVariable) -> bool:
    if is_made(block.name) or not unit.function_of(block) or not unit.function_declaring(variable):
        return False
    return unit.same_type(block, variable)
