"""TREE: a process and its descendants, changed as one.

What is applied is first rehearsed in every process, so that a refusal in one leaves all as they were; should it fail in
one all the same, the others are taken back. A process that ends meanwhile is no failure. Children that are forked
later inherit the code with the memory; those forked while this goes on are found by looking again until nobody is new.

Decides which processes belong together and what a failure in one means for the others; each of them is changed as any
other process is (`session`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from patcher.errors import PatcherError, TargetGone
from patcher.options import Options
from patcher.outcome import Generation
from patcher.report import Explanation, Member, Outlook, Refusal, Reporter
from patcher.session import Session
from patcher.status import Status
from patcher.target import Target, read_parent

if TYPE_CHECKING:
    from patcher.units import Source

_LOOKS = 20  # for processes that are forked while others are changed
_NOT_CONCERNED = "not-concerned"


def descendants(pid: int) -> list[int]:
    """Return the processes that a process started, and those that they started, parents first."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(TargetGone):
                children.setdefault(read_parent(int(name)), []).append(int(name))
    found, wave = [], [pid]
    while wave:
        wave = sorted(child for parent in wave for child in children.get(parent, ()))
        found += wave
    return found


@dataclass(frozen=True, slots=True)
class _Done:
    """A process that was changed, and the generation that it ran before."""

    session: Session
    before: int


class Tree(Session):
    """Patches a process together with its descendants. With `options.best_effort`, as many of them as will go."""

    def __init__(self, target: Target, options: Options | None = None, reporter: Reporter | None = None) -> None:
        super().__init__(target, options, reporter)
        self._others: dict[int, Session] = {}

    def close(self) -> None:
        """Let go of all the processes, which run on as they are."""
        for session in self._others.values():
            session.close()
        self._others.clear()
        super().close()

    def pids(self) -> list[int]:
        """Return the processes of the tree as they are now, this one's first."""
        return [self.target.pid, *descendants(self.target.pid)]

    def _session(self, pid: int) -> Session:
        """Return the session of one process. Raises `TargetGone` and `AttachDenied`."""
        if pid == self.target.pid:
            return self
        session = self._others.get(pid)
        if session is None or not session.target.alive():
            if session is not None:
                self._others.pop(pid).close()
            session = Session(Target.attach(pid), self.options)
            session.texts = self.texts
            self._others[pid] = session
        return session

    # --- apply ------------------------------------------------------------------------------------------------

    def relink(self, sources: Sequence[Source]) -> Generation:
        """Match, link and commit objects in every process: in all of them, or in none."""
        modules = self.rehearse(sources)
        if not self.options.best_effort:
            self._rehearse_others(sources, modules)
        number = 1 + max(n for n in self._each({}, _last_number).values())
        outcomes: dict[int, Generation] = {}
        done: list[_Done] = []

        def change(session: Session) -> int:
            _check_concerned(session, modules)
            session.ledger.least_number = number
            before = session.ledger.generation
            # Not this class's own: the process by itself.
            outcome = outcomes[session.target.pid] = Session.relink(session, sources)
            done.append(_Done(session, before))
            return outcome.number

        members: dict[int, Member] = {}
        with _all_or_none(done):
            for _ in range(_LOOKS):
                known = len(members)
                self._each(members, change)
                if len(members) == known:
                    break
        return _together(outcomes, tuple(members.values()), self.target.pid)

    def _rehearse_others(self, sources: Sequence[Source], modules: set[str]) -> None:
        def rehearse(session: Session) -> int:
            if session is not self:
                _check_concerned(session, modules)
                session.rehearse(sources)
            return 0

        self._each({}, rehearse)

    def explain(self, *files: str | Path) -> Explanation:
        """Tell what `apply` would do, and whether one of the processes would refuse it. Changes nothing."""
        found = super().explain(*files)
        if found.outlook is not Outlook.LIVE or self.options.best_effort:
            return found
        sources = self.units.sources([Path(f) for f in files], lambda: False)
        try:
            self._rehearse_others(sources, self.rehearse(sources))
        except PatcherError as error:
            refusal = Refusal(error.code, error.message, error.hint)
            return replace(found, outlook=Outlook.REFUSED, refusal=refusal)
        return found

    def _each(self, members: dict[int, Member], action: Callable[[Session], int]) -> dict[int, int]:
        """Do something to every process that is not among `members` yet, and add it; return what came of it.

        A process that ends is left out, and one that has nothing of this. Another failure is raised, naming the
        process, unless as many as will go are to be changed.
        """
        found: dict[int, int] = {}
        root = self.target.pid
        for pid in self.pids():
            if pid in members:
                continue
            try:
                found[pid] = action(self._session(pid))
                members[pid] = Member(pid, found[pid])
            except PatcherError as error:
                spared = isinstance(error, TargetGone) or error.code == _NOT_CONCERNED
                if pid == root or not (spared or self.options.best_effort):
                    raise _named(error, pid, root) from None
                members[pid] = Member(pid, 0, error.message)
        return found

    # --- revert, status ---------------------------------------------------------------------------------------

    def revert(self, generation: int | None = None) -> int:
        """Take every process back to a generation (default: the one before this one's), or to its last one before."""
        number = self.previous() if generation is None else generation
        done: list[_Done] = []

        def back(session: Session) -> int:
            session.ledger.refresh()
            before, recorded = session.ledger.generation, session.ledger.journal.generations
            own = session is self or number in recorded or not number or session.ledger.journal.is_forgotten(number)
            found = number if own else max((n for n in recorded if n < number), default=0)
            Session.revert(session, found)
            done.append(_Done(session, before))
            return found

        with _all_or_none(done):
            self._each({}, back)
        self.frames = tuple(frame for one in done for frame in one.session.frames)
        return number

    def statuses(self) -> list[Status]:
        """Return the status of every process of the tree, this one's first."""
        found = []
        for pid in self.pids():
            with suppress(TargetGone):
                found.append(self._session(pid).status())
        return found


def _check_concerned(session: Session, modules: set[str]) -> None:
    """Leave out a descendant that runs another program, which has none of the modules that change."""
    session.image.refresh()
    if modules and not modules & {m.path for m in session.image.modules}:
        raise PatcherError(f"it runs {session.target.program}, which has nothing of this", code=_NOT_CONCERNED)


def _last_number(session: Session) -> int:
    session.ledger.refresh()
    return session.ledger.journal.next_number - 1


@contextmanager
def _all_or_none(done: list[_Done]) -> Iterator[None]:
    try:
        yield
    except PatcherError:
        for one in reversed(done):
            with suppress(TargetGone):
                one.session.take_back(one.before)
        raise


def _together(outcomes: dict[int, Generation], members: tuple[Member, ...], root: int) -> Generation:
    """Return what is told of all: the root's outcome, or the first other one that changed something."""
    changed = [outcome for outcome in outcomes.values() if outcome.functions]
    first = outcomes[root] if outcomes[root].functions or not changed else changed[0]
    stop = max(outcome.timings.stop for outcome in outcomes.values())
    active = tuple(pair for outcome in outcomes.values() for pair in outcome.active)
    frames = tuple(frame for outcome in outcomes.values() for frame in outcome.frames)
    return replace(first, active=active, frames=frames, timings=replace(first.timings, stop=stop), members=members)


def _named(error: PatcherError, pid: int, root: int) -> PatcherError:
    if pid != root:
        error.message = f"process {pid}, a descendant of {root}: {error.message}"
        error.args = (error.message,)
    return error
