"""STARTING: what a unit's initialisers have to do in a program that has started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patcher.blocks import Block
from patcher.constructors import Starter, belonging, touched
from patcher.elf import SymbolBinding
from patcher.errors import UnsafeChange
from patcher.linkage import Linkage
from patcher.live import base_name
from patcher.match import Status
from patcher.part import Part


@dataclass(frozen=True, slots=True)
class Start:
    """What becomes of the functions that a unit has the program start with: those to run, those left as they are."""

    run: tuple[Block, ...] = ()
    left: frozenset[Block] = frozenset()


def start_of(part: Part, linkage: Linkage) -> Start:
    """Decide what a unit's initialisers have to do in a program that has started.

    Those that are new run. Those that changed have run: to run them again would initialise again what lives, so they
    are left as they are, and refused where they initialise something new.
    """
    run: list[Block] = []
    left: set[Block] = set()
    functions = [s.function for s in part.starters]
    if all(part.status(f) is Status.ADDED for f in functions) and (part.unit.born or not functions):
        return Start(tuple(functions))
    belongs = belonging(part.blocks, functions)
    for starter in part.starters:
        function, own = starter.function, belongs[starter.function]
        is_added = part.status(function) is Status.ADDED
        if all(part.status(f) in (Status.SAME, Status.LINE_ONLY) for f in own):
            continue
        variables = touched(part.blocks, own)
        living = [v for v in variables if linkage.lives(part, v)]
        # A compiler names what it makes after something else in the unit: a new name may be an old initialiser.
        again = not is_added or (starter.made and any(not _is_shared(v) for v in living))
        new = [v for v in variables if v not in living]
        if again and new:
            raise _initialised_together(part, starter, new, living)
        if again:
            left |= {f for f in own if not f.exported}
        else:
            run.append(function)
    return Start(tuple(run), frozenset(left))


def _is_shared(variable: Block) -> bool:
    """Tell whether other units may define a variable as well: its initialiser asks whether it is initialised."""
    return all(s.binding not in (SymbolBinding.LOCAL, SymbolBinding.GLOBAL) for s in variable.symbols)


def _initialised_together(part: Part, starter: Starter, new: Sequence[Block], living: Sequence[Block]) -> UnsafeChange:
    others = ", ".join(f"`{base_name(v.name)}`" for v in living[:3])
    return UnsafeChange(
        f"{', '.join(f'`{base_name(v.name)}`' for v in new[:3])} of {part.source} is new and initialised when the "
        f"program starts, in `{starter.function.name}`"
        + (f" together with {others}, which would be initialised again" if others else ", which has run already"),
        "move it to a new source file, or make it a static variable of a function",
        code="constructor",
    )
