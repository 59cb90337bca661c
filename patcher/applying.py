"""APPLYING: one change to one process, matched, linked, asked about, committed and remembered, in one transaction.

    objects -> changes -> linked generation -> flip -> outcome

Keeps nothing that it could not read again from the process: journal and slots are read anew before every transaction,
so several controllers, and one that died, get along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from patcher.committing import Committing
from patcher.data.initial import Changed, Initials
from patcher.data.outcome import Fate
from patcher.errors import UnsafeChange
from patcher.explain import explain
from patcher.linking import Linking
from patcher.occupants import Occupants
from patcher.outcome import Generation
from patcher.patch.reclaim import Policy, reclaim
from patcher.relink import Linked, data_of_idle
from patcher.report import Explanation, Function, Timings, Variable, told_of
from patcher.units import Changes, Source, Units


class Offered(Exception):
    """Initialisers changed, and the user has not been asked yet whether the new values are wanted."""

    def __init__(self, variables: tuple[Variable, ...]) -> None:
        super().__init__()
        self.variables = variables


class Applying:
    """Makes changes live in one process; `found`: the generation that was live before the last one."""

    def __init__(
        self,
        units: Units,
        linking: Linking,
        committing: Committing,
        occupants: Occupants,
        say: Callable[[str], None],
    ) -> None:
        self.found = 0
        self._image = units.image
        self._ledger = units.ledger
        self._options = units.options
        self._units = units
        self._occupants = occupants
        self._linking = linking
        self._committing = committing
        self._say = say
        self._departed: frozenset[str] = frozenset()  # modules that were unloaded, as was told already

    def apply(self, sources: Sequence[Source], initials: Initials, policy: Policy, *, ask: bool) -> Generation:
        """Match objects against the process, and link and commit what is new, as one generation.

        `initials` says what the user wants of changed initialisers; with `ask`, `Offered` is raised when that has to be
        asked first. `policy` says what becomes of old generations.
        """
        units = self._units
        with self._transaction():
            self.found = self._ledger.generation
            if not self._options.dry_run:
                reclaim(self._ledger, policy)
            changes = units.changes(sources)
            changes, kept = self._with_data(initials, changes)
            if not changes.parts:
                return self._untouched(changes, kept, initials, ask=ask)
            try:
                linked = self._linking.link(changes, initials, dry_run=self._options.dry_run)
                self._ask(linked.told, initials, ask=ask)
                supplied, undefined = units.supplies.outcome(linked)
                outcome = replace(
                    self._commit(linked), line_only=changes.line_only, supplied=supplied, undefined=undefined
                )
                with suppress(OSError):  # it is live
                    self._note(changes, linked, outcome, initials)
                return outcome
            finally:
                self._ledger.forget_plans()

    def rehearse(self, sources: Sequence[Source], initials: Initials) -> set[str]:
        """Match and link objects as far as that goes without any effect; returns the modules that they are part of.

        Raises what `apply` would raise.
        """
        with self._transaction():
            changes = self._units.changes(sources)
            try:
                if changes.parts:
                    self._occupants.check(self._linking.link(changes, initials, dry_run=True))
            except UnsafeChange as error:
                if error.code != "dry-run":
                    raise
            finally:
                self._ledger.forget_plans()
            return {part.module.path for part in (*changes.parts, *changes.idle)}

    def explain(self, sources: Sequence[Source], initials: Initials) -> Explanation:
        """Tell what `apply` would do, and whether it would be refused. Changes nothing."""
        with self._transaction():
            try:
                link = partial(self._linking.link, initials=initials, dry_run=True)
                return explain(self._units, sources, partial(self._with_data, initials), link, self._occupants.standing)
            finally:
                self._ledger.forget_plans()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Read the process and its ledger anew, and keep other controllers away."""
        self._image.refresh()
        with self._ledger.transaction():
            self._tell_departed()
            self._image.asked |= self._ledger.journal.chosen
            self._image.stub_area = None if self._ledger.primary is None else self._ledger.primary.stub
            yield

    def _tell_departed(self) -> None:
        for path in sorted(self._ledger.departed - self._departed):
            self._say(f"{path} was unloaded since it was patched, and its patches went with it")
        self._departed = self._ledger.departed

    def _with_data(self, initials: Initials, changes: Changes) -> tuple[Changes, tuple[Changed, ...]]:
        """Have the units of a change without new code linked if their data has to be written, or told of.

        Otherwise return the variables as well whose initialisers changed, and which keep their values.
        """
        if changes.parts:
            return changes, ()
        idle = data_of_idle(self._image, self._ledger, changes.idle, initials)
        return (replace(changes, parts=changes.idle, idle=()), ()) if idle.matters else (changes, idle.kept)

    def _untouched(self, changes: Changes, kept: Sequence[Changed], initials: Initials, *, ask: bool) -> Generation:
        self._ask(kept, initials, ask=ask)
        news = initials.news(kept, self._ledger.journal)
        if not self._options.dry_run:
            initials.remember(kept)
        told = told_of([c.datum(Fate.KEPT) for c in news])
        return Generation(
            self._ledger.generation, line_only=changes.line_only, waiting=changes.uncalled, variables=told
        )

    def _ask(self, kept: Sequence[Changed], initials: Initials, *, ask: bool) -> None:
        news = initials.news(kept, self._ledger.journal) if ask else []
        if news:
            raise Offered(told_of([c.datum(Fate.KEPT) for c in news]))

    def _commit(self, linked: Linked) -> Generation:
        record = linked.commit.record
        functions = tuple(Function(*status) for status in record.statuses)
        variables = told_of(linked.data)
        if linked.commit.does_nothing:
            return Generation(self._ledger.generation, kept=linked.kept, variables=variables)
        outcome = Generation(record.number, functions, variables=variables, kept=linked.kept, data_only=not functions)
        if self._options.dry_run:
            self._occupants.check(linked)
            return outcome
        if linked.commit.constructors:
            self._linking.forget_spare()  # they may write to it
        result = self._committing.commit(linked)
        self._linking.forget_spare()
        frames = self._occupants.look_around(result)
        return replace(
            outcome,
            active=tuple((f.thread, f.function) for f in frames),
            frames=frames,
            timings=Timings(stop=result.stop_ns / 1e6),
        )

    def _note(self, changes: Changes, linked: Linked, outcome: Generation, initials: Initials) -> None:
        """Remember what a change that is live means for the next ones."""
        if not self._options.dry_run:
            time = linked.commit.record.time
            self._units.agreement.applied(outcome.number, time, (*changes.parts, *linked.supplied))
        for part in changes.parts:
            self._units.texts.applied(Path(part.source))
        if not self._options.dry_run:
            initials.remember(linked.told)
