"""COMMITTING: a generation goes live or is gone back from, with all that the program itself has a hand in.

Its hooks are called before and after; its constructors run, its own functions fill new storage, and every thread's
values are written, before anybody is in the new code. What is written, and in which order, is the ledger's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from patcher.data.outcome import Datum, Fate
from patcher.errors import AttachDenied, ObjectError, PatcherError, TargetGone, UnsafeChange
from patcher.hooks import Happening, Hooks, Named, applying, reverting
from patcher.image import Image
from patcher.loader import Caller, workspace
from patcher.occupants import Occupants
from patcher.options import Options
from patcher.patch.commit import Commit, Constructor
from patcher.patch.ledger import Ledger
from patcher.patch.transaction import FlipResult
from patcher.policy import Condition

if TYPE_CHECKING:
    from patcher.relink import Linked  # which going back does without: it takes long to load


class Committing:
    """Takes one process from generation to generation."""

    def __init__(
        self, image: Image, ledger: Ledger, options: Options, occupants: Occupants, say: Callable[[str], None]
    ) -> None:
        self._image = image
        self._ledger = ledger
        self._options = options
        self._occupants = occupants
        self._say = say

    def commit(self, linked: Linked) -> FlipResult:
        """Make a linked generation live.

        Raises `UnsafeChange` when a function of the program did not run to its end, and what `Ledger.commit` raises.
        """
        from patcher.directory import published

        self._announce(linked.data)
        commit = published(self._image, self._ledger, linked.commit)
        named = tuple(Named(d.name, Path(d.file).name, d.fate.value) for d in linked.data)
        self._ledger.realise()
        with self._with_hooks(applying(linked.commit.record, named)):
            return self._made_live(commit)

    def revert(self, live: int, generation: int, idle: Condition | None) -> FlipResult:
        """Go from the live generation to an earlier one."""
        try:
            self._image.refresh()
        except ObjectError as error:
            # Going back needs no file of the program; its hooks cannot be found without.
            self._say(f"hooks are not called: {error.message}")
            return self._ledger.revert(generation, idle)
        with self._with_hooks(reverting(self._ledger.journal, live, generation)):
            return self._ledger.revert(generation, idle)

    def _announce(self, variables: Sequence[Datum]) -> None:
        """Say which values are about to be carried over: afterwards it is too late to think of a mistake."""
        migrated = [v for v in variables if v.fate is Fate.MIGRATED]
        if migrated:
            self._say("about to migrate: " + ", ".join(f"{v.name} ({v.note})" for v in migrated))

    def _made_live(self, commit: Commit) -> FlipResult:
        idle = self._occupants.condition(self._ledger.unused_by(commit.record))
        if not commit.fills and not commit.threads:
            return self._ledger.commit(commit, self._construct, idle=idle)
        from patcher.filling import Filling
        from patcher.thread_values import ThreadValues

        values = ThreadValues(self._image, commit.threads)
        if not commit.fills:
            return self._ledger.commit(commit, self._construct, values, idle, values.writes)
        calls = any(f.moved is None for f in commit.fills)
        with workspace(self._image.target) if calls else nullcontext() as memory:
            filling = Filling(self._image, self._ledger.view(), commit.fills, memory, self._options.hook_timeout)
            inside = (lambda stopped: values(stopped) or filling(stopped)) if commit.threads else filling
            return self._ledger.commit(commit, self._construct, inside, idle, values.writes)

    @contextmanager
    def _with_hooks(self, happening: Happening) -> Iterator[None]:
        """Have the program's hooks called before and after the block."""
        warnings: list[str] = []
        with Hooks(self._image, self._ledger, self._options.hook_timeout).around(happening, warnings):
            yield
        for text in warnings:
            self._say(text)

    def _construct(self, constructors: Iterable[Constructor]) -> None:
        """Run constructors on a thread of the target that is at a safe point, one after another."""
        caller = Caller(self._image)
        with workspace(self._image.target) as memory:
            for constructor in constructors:
                try:
                    caller.run_constructors([constructor.address], memory)
                except (TargetGone, AttachDenied):
                    raise
                except PatcherError as error:
                    raise UnsafeChange(
                        f"`{constructor.name}` of {constructor.unit} initialises what is new, and could not be run to "
                        f"its end: {error.message}",
                        error.hint,
                        code=error.code,
                    ) from None
