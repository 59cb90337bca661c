"""What a save must lead to: which refusals are right, and what has to be said of variables.

A static of a function is known by the function that refers to it, by type, by its initial contents, and by its block
where debug information is there. Two of one name and type in one function are told apart by what tells them apart; if
nothing does, a refusal is right, and so is the truth. Everything else has to be applied.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from data.model.edits import History
from data.model.program import Function, Linkage, Program, Type, Variable

Key = tuple[str, Type | int, int]  # name, type or size, function
OUTCOMES = ("added", "found", "moved", "kept")
AMBIGUOUS = "ambiguous-variable"


@dataclass(frozen=True, slots=True)
class Fates:
    """The names of variables of which something must be said, and of those of which it may be, by what is said."""

    required: dict[str, frozenset[str]]
    allowed: dict[str, frozenset[str]]


def fates(live: Program, saved: Program, history: History) -> Fates:
    """Return what is to be said of variables when a program is saved and another one is live."""
    required: dict[str, set[str]] = defaultdict(set)
    for variable in saved.variables:
        if variable.uid not in history.variables:
            required["added"].add(variable.name)
        elif not live.has(variable.uid):
            required["found"].add(variable.name)
        else:
            if _home(live.variable(variable.uid)) != _home(variable):
                required["moved"].add(variable.name)
            if variable.initial not in history.initials[variable.uid]:
                required["kept"].add(variable.name)
    allowed = {word: set(names) for word, names in required.items()}
    # An initial value that there was before may be told again, and what came back may have another one.
    several = {v.name for v in saved.variables if history.initials.get(v.uid, set()) - {v.initial}}
    allowed["kept"] = allowed.get("kept", set()) | several
    allowed["added"] = allowed.get("added", set()) | {t.name for t in saved.tables}
    return Fates(_frozen(required), _frozen(allowed))


def _frozen(names: dict[str, set[str]]) -> dict[str, frozenset[str]]:
    return {word: frozenset(names.get(word, ())) for word in OUTCOMES}


def _home(variable: Variable) -> tuple[Linkage, int, int]:
    return variable.linkage, variable.unit, variable.function


def refusals(live: Program, saved: Program, history: History, *, debug: bool) -> frozenset[str]:
    """Return the codes with which a save may be refused."""
    gone = [variable for variable, _ in history.gone(live)]
    groups = _Groups(live, saved, gone, debug)
    codes = {AMBIGUOUS} if any(_is_doubtful(*groups.of(key), debug) for key in groups.names()) else set()
    if any(_hides(live.variable(v.uid), v) for v in saved.variables if live.has(v.uid)):
        # The global may be another unit's; debug information knows only whose it was at the start.
        codes |= {"ambiguous-symbol"} if debug else {AMBIGUOUS, "ambiguous-symbol"}
    if debug and any(_takes_a_name(v, [*gone, *live.variables]) for v in saved.variables):
        codes.add("layout")  # code that still runs may use what had the name
    return frozenset(codes)


def _takes_a_name(new: Variable, old: Iterable[Variable]) -> bool:
    """Tell whether a variable has the name of another one, which is of another type."""
    return any(o.name == new.name and o.uid != new.uid and o.type != new.type for o in old)


def _hides(old: Variable, new: Variable) -> bool:
    return old.linkage is Linkage.GLOBAL and new.linkage is not Linkage.GLOBAL


class _Groups:
    """The statics of functions that share a name and a type (or size), by the functions whose code refers to them."""

    def __init__(self, live: Program, saved: Program, gone: Iterable[Variable], debug: bool) -> None:
        self._joined: dict[int, int] = {}
        if not debug:  # the code of what is inlined is its callers' code
            for program in (live, saved):
                for function in program.functions:
                    if function.form.inlined:
                        for caller in _into(program, function):
                            self._join(function.uid, caller)
        for variable in saved.variables:
            if live.has(variable.uid) and live.variable(variable.uid).function != variable.function:
                self._join(live.variable(variable.uid).function, variable.function)
        self._old: dict[Key, list[Variable]] = defaultdict(list)
        self._new: dict[Key, list[Variable]] = defaultdict(list)
        self._gone: dict[Key, list[Variable]] = defaultdict(list)
        for found, variables in ((self._old, live.variables), (self._new, saved.variables), (self._gone, gone)):
            for v in variables:
                if v.linkage is Linkage.LOCAL:
                    kind = v.type if debug else v.type.size
                    found[v.name, kind, self._root(v.function)].append(v)

    def names(self) -> Iterable[Key]:
        return tuple(self._new)

    def of(self, key: Key) -> tuple[list[Variable], list[Variable], list[Variable]]:
        return self._old.get(key, []), self._gone.get(key, []), self._new[key]

    def _root(self, function: int) -> int:
        while function in self._joined:
            function = self._joined[function]
        return function

    def _join(self, a: int, b: int) -> None:
        a, b = self._root(a), self._root(b)
        if a != b:
            self._joined[a] = b


def _into(program: Program, function: Function) -> list[int]:
    """Return what stands for the functions that a function may be inlined into; the one that dispatches has no uid."""
    callers = [caller.uid for caller in program.callers(function.uid)]
    return [*callers, -2 - function.unit] if function.called else callers


def _is_doubtful(old: list[Variable], gone: list[Variable], new: list[Variable], debug: bool) -> bool:
    """Tell whether statics of one name and type cannot be told apart, or one sign contradicts another."""
    before, after = {v.uid: v for v in old}, {v.uid: v for v in new}
    if not after.keys() <= before.keys():  # one that comes may be any that was there
        before |= {v.uid: v for v in gone}
    if len(before) <= 1 and len(after) <= 1:
        return False
    stay = before.keys() & after.keys()
    placed = all(_place(before[uid], old) == _place(after[uid], new) for uid in stay & {v.uid for v in old})
    if debug and placed and after.keys() == before.keys():
        return False
    contents = {v.uid: v.contents for v in (*before.values(), *after.values())}
    told_apart = len(set(contents.values())) == len(contents)
    told_apart = told_apart and all(before[uid].initial == after[uid].initial for uid in stay)
    if debug:
        return not (told_apart and placed)
    return not (told_apart and after.keys() == before.keys())


def _place(variable: Variable, group: list[Variable]) -> tuple[int, int, int]:
    """Return in which block of its function, of those that matter, a variable is."""
    blocks = sorted({v.scope for v in group if v.scope and v.function == variable.function})
    return variable.function, bool(variable.scope), blocks.index(variable.scope) if variable.scope else 0
