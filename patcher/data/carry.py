"""CARRYING OVER: which changes of layout need nobody's help.

A type that only variables with static storage have may change when the values of all these can be taken along
(`shapes`), and all units that know the type, or one of the variables, are part of the change. The variables then get
new storage (`migrate`), and whoever still refers to the old one is found where it is given up (`still_used`). Why that
is not possible is said of every type of which it would be enough.

Not seen is what goes around the types: bytes of a variable that were copied to memory of no type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from patcher.data.layouts import LayoutVerdict, Restructured, Standing
from patcher.data.shapes import Carried, Form, Move, Obstacle, Shape, copy_plan
from patcher.part import Part


@dataclass(frozen=True, slots=True)
class Judged:
    """What a unit changes: the files that its debug information is of, and the verdicts."""

    part: Part
    files: tuple[str, ...]
    verdicts: tuple[LayoutVerdict, ...]


def may_be_carried(judged: Iterable[Judged]) -> bool:
    """Tell whether there is a type that only variables have."""
    return any(v.kind is Standing.STATIC for j in judged for v in j.verdicts)


def carry_over(
    judged: Sequence[Judged], spared: Callable[[LayoutVerdict], bool], *, history_known: bool
) -> tuple[Judged, ...]:
    """Decide what is carried over, and return the verdicts with that in them; those that are `spared` stay as they are.

    `history_known`: what all units of the live generations declare has been seen.
    """
    found = []
    for one in judged:
        others = [j for j in judged if j.part.module is one.part.module]
        verdicts = (v if spared(v) else _decided(v, others, history_known) for v in one.verdicts)
        found.append(replace(one, verdicts=tuple(verdicts)))
    return tuple(found)


def _decided(verdict: LayoutVerdict, judged: Sequence[Judged], history_known: bool) -> LayoutVerdict:
    if verdict.kind is not Standing.STATIC:
        return verdict
    group = [v for j in judged for v in j.verdicts if v.type == verdict.type]
    files = {f for j in judged for f in j.files}
    defined = {r.name for j in judged for v in j.verdicts for r in v.variables if r.defined}
    obstacles = tuple(dict.fromkeys(o for v in group for o in _obstacles(v, files, defined, history_known)))
    return replace(verdict, carried=not obstacles, obstacles=obstacles)


def _obstacles(v: LayoutVerdict, files: set[str], defined: set[str], history_known: bool) -> Iterator[str]:
    if v.kind is Standing.DEAD:
        return
    if v.kind is Standing.HEAP:
        yield f"in {v.file}, {v.kind.value}"
        return
    if v.elsewhere is None:
        yield "which other units know it cannot be told"
    unsaved = [f for f in v.elsewhere or () if f not in files]
    yield from (f"{file} knows it and is not part of the change" for file in unsaved)
    yield from (f"`{name}` is gone" for name in v.lost)
    if v.past:
        yield "it is of a change that was taken back"
    if not history_known and not v.fresh:
        yield "an earlier change was made by another controller"
    names = [variable.name for variable in v.variables]
    yield from (f"there are several `{name}`" for name in dict.fromkeys(names) if names.count(name) > 1)
    for variable in v.variables:
        if not variable.defined and variable.name not in defined and not unsaved:
            yield f"the file that defines `{variable.name}` is not part of the change"
        yield from _of_variable(variable)


def _of_variable(variable: Restructured) -> Iterator[str]:
    if variable.constant:
        yield f"`{variable.name}` is constant"
    elif _is_virtual(variable.old) or _is_virtual(variable.new):
        yield f"`{variable.name}` has virtual functions or base classes"
    else:
        plan = copy_plan(variable.old, variable.new)
        yield from (f"`{variable.name}{o.path}`: {o.reason}" for o in plan if isinstance(o, Obstacle))


def _is_virtual(shape: Shape) -> bool:
    """Tell whether the class of a value, or of a part of it, counts when it runs: a copy would keep the old one."""
    if shape.element is not None:
        return _is_virtual(shape.element)
    dynamic = shape.form is Form.OTHER and shape.text.startswith(("struct ", "class "))
    return dynamic or any(p.name.startswith("_vptr") or _is_virtual(p.shape) for p in shape.parts)


def carried_by(judged: Judged) -> dict[str, Carried]:
    """Return the variables that a unit defines and whose values are carried over, by qualified name."""
    found: dict[str, Carried] = {}
    for verdict in judged.verdicts:
        for variable in verdict.variables if verdict.carried else ():
            moves = tuple(m for m in copy_plan(variable.old, variable.new) if isinstance(m, Move))
            if variable.defined:
                found[variable.name] = Carried(variable.name, variable.old, variable.new, moves, variable.scoped)
    return found


def symbols_of(name: str) -> frozenset[str]:
    """Return the symbols that a variable outside of functions may have, by its qualified name."""
    *outer, own = name.replace("(anonymous namespace)", "_GLOBAL__N_1").split("::")
    last = f"{len(own)}{own}"
    if not outer:
        return frozenset((own, f"_ZL{last}"))
    prefix = "".join(f"{len(part)}{part}" for part in outer)
    return frozenset((f"_ZN{prefix}{last}E", f"_ZN{prefix}L{last}E"))


def is_function(symbol: str, name: str) -> bool:
    """Tell whether a symbol may be that of a function with a qualified name; of which of its overloads is not said."""
    *outer, own = name.replace("(anonymous namespace)", "_GLOBAL__N_1").split("::")
    last = f"{len(own)}{own}"
    if not outer:
        return symbol == own or re.match(f"_ZL?{re.escape(last)}", symbol) is not None
    prefix = "".join(f"{len(part)}{part}" for part in outer)
    return re.match(f"_ZN[rVK]*{re.escape(prefix)}L?{re.escape(last)}E", symbol) is not None
