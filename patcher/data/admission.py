"""ADMISSION: which changes of layout a patch may make, and what the process has from then on.

Remembers what the units of each generation declare: the next change is compared with what the process has by then,
not with the program as it was built. After a revert the reverted generations count last: their variables keep their
storage. What a controller that attaches later cannot know is what earlier ones applied.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from patcher.code.frames import keeps_to_its_frame
from patcher.data.declared import Declared
from patcher.data.dies import Elsewhere, NotUnderstood
from patcher.data.layouts import Judgement, LayoutVerdict, Program, Standing, declared_by
from patcher.data.prepare import has_types, reading
from patcher.elf import ObjectFile
from patcher.errors import PatcherError, UnsafeChange
from patcher.match import Status
from patcher.part import Part
from patcher.patch.journal import Numbers

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


class Admission:
    """What the units of one process declare. `allowed`: types whose layout may change, on the user's word."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = allowed
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

    def by_name(self, path: str) -> Layouts | None:
        """Return the types of a module, which is open, by name; None when it has no debug information."""
        from patcher.data.dwarf import Layouts

        module = self._modules[path]
        if module is not None and module.by_name is None:
            module.by_name = Layouts.of_program(module.program.file)
        return module.by_name if module is not None else None

    def verdicts(
        self, part: Part, lineage: Container[int], migrated: Sequence[str] = (), stored: Sequence[str] = ()
    ) -> tuple[LayoutVerdict, ...] | None:
        """Judge what a part changes in its module, which is open; None when it has no debug information.

        `lineage` are the generations that are live; `migrated` are types and variables that may change, since functions
        fill them, or `stored` variables that an earlier change gave the layout that they have. Raises `PatcherError`
        when the debug information is damaged.
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
        except (NotUnderstood, *_DAMAGED):  # units that share entries, as link-time optimisation makes them
            declared, found = (), []
        if not declared:
            found = self._by_name(module, part, None)
        allowed = (*self._allowed, *migrated)
        known = [
            (v, _is_allowed(v.type, allowed) or (v.of_variable and v.type in stored)) for v in dict.fromkeys(found)
        ]
        found = [replace(v, allowed=is_allowed) for v, is_allowed in known]
        self._latest[part.unit.key] = declared
        self._checked[part.delta.blocks.object] = _Checked(declared, not found)
        return tuple(found)

    def _judged(self, module: _Module, part: Part, lineage: Container[int], new: Declared) -> list[LayoutVerdict]:
        layers = module.layers.get(part.unit.key, [])
        live = [la for la in reversed(layers) if la.generation in lineage]
        gone = [la for la in reversed(layers) if la.generation not in lineage]
        texts = [*(la.declared for la in live), module.program.units_of(new.file), *(la.declared for la in gone)]
        known = [tuple(d for d in each if d.file == new.file) for each in texts]
        current = [*known[: min(1, len(live))], known[len(live)]]
        others = [layers for key, layers in module.layers.items() if key != part.unit.key]
        patched = [d for layers in others for layer in layers for d in layer.declared]
        reverted = [d for layer in gone for d in layer.declared]
        judgement = Judgement(known, current, new, module.program, lambda: keeps_values(part), patched, reverted)
        return [*judgement.verdicts(), *self._by_name(module, part, judgement.unknown())]

    def _by_name(self, module: _Module, part: Part, names: Collection[str] | None) -> list[LayoutVerdict]:
        if names is not None and not names:
            return []
        from patcher.data.dwarf import changed_types

        layouts = self.by_name(part.module.path)
        if layouts is None:
            return []
        data = bytes(part.delta.blocks.object.contents)
        with reading(part.source):
            changes = changed_types(layouts, data, part.source, names)
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

    def applied(self, generation: int, parts: Sequence[Part]) -> None:
        """Remember what a generation's parts declare: the process has it now."""
        self._seen.add(generation)
        for part in parts:
            module, checked = self._modules.get(part.module.path), self._checked.pop(part.delta.blocks.object, None)
            if module is None or checked is None:
                continue
            layers = module.layers.setdefault(part.unit.key, [])
            if layers and checked.alike and _covers(checked.declared, layers[-1].declared):
                layers[-1].declared = checked.declared  # says the same and more, also of the earlier generation
            else:
                layers.append(_Layer(generation, checked.declared))


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
