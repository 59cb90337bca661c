"""AGREEMENT: whether the new code of some units and the process's data agree on the layout of types.

Says what debug information is asked, of which units a change is judged, and what is told where there is none; what
differs, and whether that matters, is decided in `data`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from patcher.build import PROBED, kept_directory
from patcher.data import migrate
from patcher.data.admission import Admission
from patcher.data.admission import check as check_verdicts
from patcher.data.carry import Judged, carried_by, carry_over, may_be_carried
from patcher.data.layouts import LayoutVerdict
from patcher.data.prepare import has_types
from patcher.data.remembered import Memory
from patcher.data.undescribed import Enquiry, is_data
from patcher.image import Definition, Image, LoadedModule
from patcher.live import UNDEFINED
from patcher.match import Status
from patcher.part import Part
from patcher.patch.journal import Numbers
from patcher.patch.ledger import Ledger

Probed = Callable[[Part, tuple[str, ...]], tuple[bytes, frozenset[int]] | None]


class Agreement:
    """The layouts of one process. `verdicts`: of the change that is being judged."""

    def __init__(
        self, image: Image, ledger: Ledger, allowed: Sequence[str], probed: Probed, say: Callable[[str], None]
    ) -> None:
        """`allowed` are types that may change; `probed` has described what a unit's debug information leaves out."""
        self.verdicts: list[LayoutVerdict] = []
        self._image = image
        self._ledger = ledger
        self._admission = Admission(allowed, Memory(kept_directory("types"), image.target.pid))
        self._probed = probed
        self._say = say
        self._unchecked: set[str] = set()
        self._undescribed: set[tuple[str, str]] = set()

    def begin(self) -> None:
        """Forget the verdicts of the change before."""
        self.verdicts = []

    def applied(self, generation: int, time: float, parts: Sequence[Part]) -> None:
        """Remember what the code of a generation, which went live at `time`, takes its data for."""
        self._admission.applied(generation, time, parts)

    def check_supplied(self, parts: Sequence[Part]) -> None:
        """Refuse objects that were brought in and see existing data in another layout."""
        self.check([p for p in parts if p.unit.key != UNDEFINED and _has_types(p)])

    def _compare_variables(self, parts: Sequence[Part]) -> None:
        """Note how the variables of units are laid out, where some have, or get, storage of a new layout."""
        from patcher.data.dwarf import Layouts
        from patcher.data.layout import comparisons

        for part in parts:
            data = bytes(part.delta.blocks.object.contents)
            new = Layouts.of_object(data, part.source) if _has_types(part) else None
            old = self._admission.by_name(part.module.path) if self.know(part.module) else None
            part.layouts = comparisons(part, old, new)

    def check(self, parts: Sequence[Part], idle: Sequence[Part] = ()) -> None:
        """Refuse new code that sees existing data in another layout, unless all of that can be carried over.

        `idle` are the units of the change without new code.
        """
        journal = self._ledger.journal
        if migrate.concerned(parts, self._ledger.view()):
            self._compare_variables(parts)
        lineage = journal.numbers_to(self._ledger.generation)
        migrated = migrate.taken_care_of(parts, journal.storages_at(self._ledger.generation))
        # Code that stays the same sees data as what runs now does.
        new = [p for p in parts if p.supplied or any(p.status(b) is not Status.SAME for b in p.wanted())]
        stored = migrate.stored_variables(parts, journal.storages_at(self._ledger.generation))
        judged = [j for part in new if (j := self._judged(part, lineage, migrated, stored)) is not None]
        if may_be_carried(judged) and not any(p.supplied for p in parts):
            judged = self._carried(parts, idle, judged, lineage)
        self.verdicts += [v for j in judged for v in j.verdicts]
        for one in judged:
            check_verdicts(one.part.source, one.verdicts)
            migrate.check_statics(one.part, [v for v in one.verdicts if not self._admission.is_spared(v)])

    def _judged(
        self, part: Part, lineage: Numbers, migrated: Sequence[str] = (), stored: Sequence[str] = ()
    ) -> Judged | None:
        known = self.know(part.module)
        enquiry = self._enquiry(part)
        self._admission.recall(self._ledger.journal)
        found = self._admission.verdicts(part, lineage, enquiry, migrated, stored) if known else None
        if found is None:
            self._say_unchecked(part, not known)
            return None
        self._say_undescribed(part)
        return Judged(part, self._admission.files(part), found)

    def _carried(
        self, parts: Sequence[Part], idle: Sequence[Part], judged: Sequence[Judged], lineage: Numbers
    ) -> list[Judged]:
        """Have the values of variables carried over whose layout changes, where that is possible.

        Units without new code count as well: they know types, and have variables.
        """
        types = {v.type for j in judged for v in j.verdicts}
        seen = {j.part for j in judged}
        silent = [j for p in (*parts, *idle) if p not in seen and (j := self._judged(p, lineage)) is not None]
        silent = [replace(j, verdicts=tuple(v for v in j.verdicts if v.type in types)) for j in silent]
        known = self._admission.knows(lineage)
        decided = carry_over([*judged, *silent], self._admission.is_spared, history_known=known)
        for one in decided:
            one.part.carried = carried_by(one)
        if any(one.part.carried for one in decided):
            self._compare_variables([one.part for one in decided])
        return list(decided)

    def know(self, module: LoadedModule) -> bool:
        """Read a module's debug information for the checks to come; tell whether it has any."""
        file = Path(module.module.symbols_from)
        file = module.file if str(file) == module.path or not file.is_file() else file
        return self._admission.open(module.path, file)

    def _enquiry(self, part: Part) -> Enquiry:
        def denoted(symbol: str) -> Definition | None:
            found = self._image.resolve(symbol, part.module)
            if found is None or not is_data(found):
                return None
            home = found.module
            # What has its debug information elsewhere is installed: nobody edits it.
            own = home is part.module or home.module.symbols_from == home.path
            return found if own and self.know(home) else None

        return Enquiry(denoted, partial(self._probed, part), PROBED)

    def _say_undescribed(self, part: Part) -> None:
        names = [n for n in self._admission.unchecked(part) if (part.source, n) not in self._undescribed]
        self._undescribed.update((part.source, n) for n in names)
        if names:
            self._say(
                f"{part.source} uses {', '.join(f'`{n}`' for n in names)}, which its debug information does not "
                "declare: whether their layout is what it was is not checked"
            )

    def _say_unchecked(self, part: Part, program: bool) -> None:
        what = part.module.path if program else part.source
        if what not in self._unchecked:
            self._unchecked.add(what)
            self._say(
                f"{what} has no debug information (-g) that can be read: the layouts of its types are not checked"
            )


def _has_types(part: Part) -> bool:
    return has_types(bytes(part.delta.blocks.object.contents), part.source)
