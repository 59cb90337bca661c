"""ADMISSION: which changes of layout a patch may make, and what the process has from then on.

Remembers what the units of each generation declare: the next change is compared with what the process has by then,
not with the program as it was built. After a revert the reverted generations count last: their variables keep their
storage. A controller that attaches later finds what earlier ones knew (`remembered`); where that is gone, types that
only a generation of theirs may have brought are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from patcher.code.frames import keeps_to_its_frame
from patcher.data import undescribed
from patcher.data.declared import Declared, Variable
from patcher.data.dies import Elsewhere, NotUnderstood
from patcher.data.layouts import Judgement, LayoutVerdict, Program, Standing, declared_by
from patcher.data.prepare import has_types, reading
from patcher.data.remembered import Kept, Memory
from patcher.data.undescribed import Described, Enquiry, Foreign
from patcher.elf import ObjectFile
from patcher.errors import PatcherError, UnsafeChange
from patcher.image import Definition
from patcher.match import Status
from patcher.part import Part
from patcher.patch.journal import Journal, Numbers

if TYPE_CHECKING:
    from patcher.data.dwarf import Layouts

_DAMAGED = (IndexError, KeyError, ValueError, OverflowError)
_SHOWN = 3  # types that a message names


@dataclass(slots=True)
class _Layer:
    """What a unit declares from a generation on."""

    generation: int
    declared: tuple[Declared, ...]


@dataclass(slots=True)
class _Module:
    program: Program
    by_name: Layouts | None = None
    layers: dict[str, list[_Layer]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Checked:
    declared: tuple[Declared, ...]
    alike: bool  # nothing of it differs from what the process has
    unchecked: tuple[str, ...] = ()  # variables of other units whose types nobody told


@dataclass(frozen=True, slots=True)
class _Seen:
    """What is known of variables that a unit uses and does not describe."""

    verdicts: tuple[LayoutVerdict, ...] = ()
    units: tuple[Declared, ...] = ()
    unchecked: tuple[Foreign, ...] = ()


class Admission:
    """What the units of one process declare. `allowed`: types whose layout may change, on the user's word.

    `memory` has what earlier controllers saw.
    """

    def __init__(self, allowed: Sequence[str], memory: Memory) -> None:
        self._allowed = allowed
        self._memory = memory
        self._recalled: dict[str, list[Kept]] | None = None
        self._modules: dict[str, _Module | None] = {}
        self._latest: dict[str, tuple[Declared, ...]] = {}
        self._checked: WeakKeyDictionary[ObjectFile, _Checked] = WeakKeyDictionary()
        self._seen: set[int] = set()  # generations that were applied by this controller

    def open(self, path: str, file: Path) -> bool:
        """Read a module's debug information, once; tell whether it has any. Raises `PatcherError` for damaged ones."""
        if path not in self._modules:
            program = Program.of_file(file)
            self._modules[path] = _Module(program) if program is not None else None
        return self._modules[path] is not None

    def recall(self, journal: Journal) -> None:
        """Find what earlier controllers saw of the generations that the process has."""
        if self._recalled is None:
            self._recalled = {}
            times = {g.number: g.time for g in journal.generations.values()}
            seen, layers = self._memory.read(times) if times else (frozenset(), ())
            self._seen |= seen
            for kept in layers:
                self._recalled.setdefault(kept.module, []).append(kept)
        for path in list(self._recalled):
            if (module := self._modules.get(path)) is not None:
                for kept in self._recalled.pop(path):
                    module.layers.setdefault(kept.unit, []).append(_Layer(kept.generation, kept.declared))

    def by_name(self, path: str) -> Layouts | None:
        """Return the types of a module, which is open, by name; None when it has no debug information."""
        from patcher.data.dwarf import Layouts

        module = self._modules[path]
        if module is not None and module.by_name is None:
            module.by_name = Layouts.of_program(module.program.file)
        return module.by_name if module is not None else None

    def verdicts(
        self,
        part: Part,
        lineage: Container[int],
        enquiry: Enquiry,
        migrated: Sequence[str] = (),
        stored: Sequence[str] = (),
    ) -> tuple[LayoutVerdict, ...] | None:
        """Judge what a part changes in its module, which is open; None when it has no debug information.

        `lineage` are the generations that are live; `migrated` are types and variables that may change, since functions
        fill them, or `stored` variables that an earlier change gave the layout that they have. `enquiry` tells what the
        debug information does not. Raises `PatcherError` when that is damaged.
        """
        module = self._modules[part.module.path]
        data = bytes(part.delta.blocks.object.contents)
        if module is None or not has_types(data, part.source):
            return None
        try:
            declared = declared_by(data, part.source, self._latest.get(part.unit.key, ()))
        except Elsewhere:
            return None
        except PatcherError as error:
            if error.code != "debug-info":
                raise
            declared = ()  # what drgn makes of it decides
        try:
            found = [v for new in declared for v in self._judged(module, part, lineage, new)]
            seen = self._foreign(module, part, lineage, declared, enquiry)
            found += self._forgotten(module, part, declared)
        except (NotUnderstood, *_DAMAGED):  # units that share entries, as link-time optimisation makes them
            declared, found, seen = (), [], _Seen()
        if not declared:
            found = self._by_name(module, data, part.source, None)
        found += seen.verdicts
        allowed = (*self._allowed, *migrated)
        known = [
            (v, _is_allowed(v.type, allowed) or (v.of_variable and v.type in stored)) for v in dict.fromkeys(found)
        ]
        found = [replace(v, allowed=is_allowed) for v, is_allowed in known]
        self._latest[part.unit.key] = declared
        unchecked = tuple(f.variable.name for f in seen.unchecked)
        self._checked[part.delta.blocks.object] = _Checked((*declared, *seen.units), not found, unchecked)
        return tuple(found)

    def _judged(self, module: _Module, part: Part, lineage: Container[int], new: Declared) -> list[LayoutVerdict]:
        judgement = self._judgement(module, part, lineage, new)
        data = bytes(part.delta.blocks.object.contents)
        return [*judgement.verdicts(), *self._by_name(module, data, part.source, judgement.unknown())]

    def _judgement(
        self,
        module: _Module,
        part: Part,
        lineage: Container[int],
        new: Declared,
        definer: Declared | None = None,
    ) -> Judgement:
        """Return the judgement on a unit; `definer` has the variables of others that are all that is to be judged."""
        layers = module.layers.get(part.unit.key, [])
        live = [la for la in reversed(layers) if la.generation in lineage]
        gone = [la for la in reversed(layers) if la.generation not in lineage]
        texts = [*(la.declared for la in live), module.program.units_of(new.file), *(la.declared for la in gone)]
        known = [tuple(d for d in each if d.file == new.file) for each in texts]
        current = [*known[: min(1, len(live))], known[len(live)]]
        if definer is not None:
            known.insert(len(live) + 1, (definer,))
            current = [(definer,)]
        others = [layers for key, layers in module.layers.items() if key != part.unit.key]
        patched = [d for layers in others for layer in layers for d in layer.declared]
        reverted = [d for layer in gone for d in layer.declared]
        return Judgement(known, current, new, module.program, lambda: keeps_values(part), patched, reverted)

    # --- what the debug information does not declare ----------------------------------------------------------

    def _foreign(
        self, module: _Module, part: Part, lineage: Container[int], declared: Sequence[Declared], enquiry: Enquiry
    ) -> _Seen:
        symbols = undescribed.missing(part, declared) if len(declared) == 1 else ()
        found = list(self._foreign_variables(module, symbols, lineage, enquiry))
        if not found:
            return _Seen()
        file = declared[0].file
        seen = undescribed.describe(part, file, found, enquiry)
        if seen is None:
            return _Seen(tuple(undescribed.beyond(part, file, found)), (), tuple(found))
        unchecked = [f for f in found if f not in seen.variables]
        verdicts = [
            v
            for definer in dict.fromkeys(f.unit for f in seen.variables)
            for v in self._of_foreign(module, part, lineage, declared[0], seen, definer)
        ]
        for lost in unchecked:  # of those, the unit has the types by name, if it has them at all
            judgement = self._judgement(module, part, lineage, seen.unit, lost.unit)
            types = undescribed.types_within(lost.unit, [lost.variable.name])
            verdicts += judgement.verdicts_of([n for n in types if n in seen.unit.types], ())
        return _Seen((*verdicts, *undescribed.beyond(part, file, unchecked)), (seen.unit,), tuple(unchecked))

    def _of_foreign(
        self,
        module: _Module,
        part: Part,
        lineage: Container[int],
        own: Declared,
        seen: Described,
        definer: Declared,
    ) -> list[LayoutVerdict]:
        """Judge the variables that one unit defines and another sees, with the types that only these have there."""
        variables = [f.variable.name for f in seen.variables if f.unit is definer]
        types = [name for name in undescribed.types_within(seen.unit, variables) if name not in own.types]
        judgement = self._judgement(module, part, lineage, seen.unit, definer)
        unknown = [name for name in judgement.unknown() if name in types]
        by_name = self._by_name(module, seen.data, part.source, unknown)
        return [*judgement.verdicts_of(types, variables), *by_name]

    def _foreign_variables(
        self, module: _Module, symbols: Sequence[str], lineage: Container[int], enquiry: Enquiry
    ) -> Iterator[Foreign]:
        """Find the variables of the process among some symbols, as far as there is debug information of them."""
        layers = [la for every in module.layers.values() for la in every if la.generation in lineage]
        brought: dict[str, tuple[Declared, Variable]] = {}
        for layer in sorted(layers, key=lambda la: la.generation) if symbols else ():
            brought.update((v.symbol, (unit, v)) for unit in layer.declared for v in _external(unit))
        for symbol in symbols:
            if symbol in brought:
                unit, variable = brought[symbol]
                yield Foreign(symbol, unit, variable, unit.node(variable.type).size)
            elif (definition := enquiry.denoted(symbol)) is not None and (found := self._built(definition)) is not None:
                yield Foreign(symbol, *found, definition.size)

    def _built(self, definition: Definition) -> tuple[Declared, Variable] | None:
        """Return how the debug information of a module, which is open, describes a variable."""
        home = self._modules[definition.module.path]
        if home is None:
            return None
        local = definition.thread_local
        address = definition.address - (0 if local else definition.module.bias)
        unit = home.program.defining(definition.name, address, thread_local=local)
        every = (v for v in _external(unit) if v.symbol == definition.name) if unit is not None else ()
        return next(((unit, v) for v in every if unit is not None), None)

    def _forgotten(self, module: _Module, part: Part, declared: Sequence[Declared]) -> Iterator[LayoutVerdict]:
        """Refuse types that a generation may have brought whose debug information is gone."""
        view = part.unit.view
        unseen = [g for g in view.journal.lineage(view.generation) if g.number not in self._seen]
        unseen = [g for g in unseen if any(p.unit == part.unit.key for p in g.placed)]
        if not unseen:
            return
        layouts = self.by_name(part.module.path)
        layers = module.layers.get(part.unit.key, [])
        known = {n for la in layers for d in la.declared for n in d.types}
        detail = f"generation {unseen[-1].number} may have brought it, and the debug information of that is gone"
        for unit in declared:
            old = known | {n for d in module.program.units_of(unit.file) for n in d.types}
            for name in unit.types:
                if name not in old and (layouts is None or layouts.find(name) is None):
                    yield LayoutVerdict(name, (detail,), Standing.HEAP, file=unit.file)

    def unchecked(self, part: Part) -> tuple[str, ...]:
        """Return the variables of other units, which a part that was judged uses in a layout that nobody told."""
        checked = self._checked.get(part.delta.blocks.object)
        return checked.unchecked if checked is not None else ()

    # ----------------------------------------------------------------------------------------------------------

    def _by_name(self, module: _Module, data: bytes, source: str, names: Collection[str] | None) -> list[LayoutVerdict]:
        if names is not None and not names:
            return []
        from patcher.data.dwarf import Layouts, changed_types

        if module.by_name is None:
            module.by_name = Layouts.of_program(module.program.file)
        if module.by_name is None:
            return []
        with reading(source):
            changes = changed_types(module.by_name, data, source, names)
        return [LayoutVerdict(c.name, c.details, Standing.HEAP) for c in changes]

    def files(self, part: Part) -> tuple[str, ...]:
        """Return the files that the debug information of a part, which was judged, is of."""
        checked = self._checked.get(part.delta.blocks.object)
        return tuple(dict.fromkeys(d.file for d in checked.declared)) if checked is not None else ()

    def knows(self, lineage: Numbers) -> bool:
        """Tell whether what all of these generations declare is known here."""
        return lineage.are_among(self._seen)

    def is_spared(self, verdict: LayoutVerdict) -> bool:
        """Tell whether a change of layout is made on the user's word."""
        return _is_allowed(verdict.type, self._allowed)

    def applied(self, generation: int, time: float, parts: Sequence[Part]) -> None:
        """Remember what a generation's parts, made at a time, declare: the process has it now."""
        self._seen.add(generation)
        kept = []
        for part in parts:
            module, checked = self._modules.get(part.module.path), self._checked.pop(part.delta.blocks.object, None)
            if module is None or checked is None:
                continue
            layers = module.layers.setdefault(part.unit.key, [])
            if layers and checked.alike and _covers(checked.declared, layers[-1].declared):
                layers[-1].declared = checked.declared  # says the same and more, also of the earlier generation
            else:
                layers.append(_Layer(generation, checked.declared))
            kept.append(Kept(part.module.path, part.unit.key, layers[-1].generation, checked.declared))
        self._memory.note(generation, time, kept)


def _external(unit: Declared) -> Iterator[Variable]:
    """Return the variables that a unit defines for others too."""
    return (v for every in unit.variables.values() for v in every if v.defined and v.external)


def check(source: str, verdicts: Sequence[LayoutVerdict]) -> None:
    """Refuse what is not accepted. Raises `UnsafeChange`, which names types, differences, variables and functions."""
    refused = [v for v in verdicts if not v.accepted]
    if not refused:
        return
    names = ", ".join(f"`{v.type}`" for v in refused[:_SHOWN])
    more = f"; and {len(refused) - _SHOWN} more types" if len(refused) > _SHOWN else ""
    said = [v.describe() + (f" ({concerns})" if (concerns := v.concerns()) else "") for v in refused[:_SHOWN]]
    said += dict.fromkeys(v.reason for v in refused[:_SHOWN] if v.obstacles)
    filled = [v.type.rpartition(" ")[2].rpartition("::")[2] for v in refused[:_SHOWN] if v.obstacles]
    functions = ", ".join(dict.fromkeys(f"`void patcher_migrate_{name}(void *, const void *)`" for name in filled))
    raise UnsafeChange(
        f"{source} changes the layout of data that the process has: {'; '.join(said)}{more}",
        (f"write {functions}, which fills the new one; or " if functions else "")
        + f"restart the program; or, if nothing live is {names} any more, "
        + " ".join(f"--allow-layout-change '{v.type}'" for v in refused[:_SHOWN]),
        code="layout",
    )


def keeps_values(part: Part) -> bool:
    """Tell whether the old code of a function that changes may have left values beyond its frame."""
    for function in part.delta.with_status(Status.CHANGED):
        pieces = [function.live, *part.cold_pieces(function.block)]
        if any(p is None or not keeps_to_its_frame(bytes(p.code), p.body) for p in pieces):
            return True
    return False


def _is_allowed(name: str, allowed: Sequence[str]) -> bool:
    return name in allowed or name.partition(" ")[2] in allowed


def _covers(new: tuple[Declared, ...], old: tuple[Declared, ...]) -> bool:
    return all(
        any(
            d.file == o.file and d.types.keys() >= o.types.keys() and d.variables.keys() >= o.variables.keys()
            for d in new
        )
        for o in old
    )
