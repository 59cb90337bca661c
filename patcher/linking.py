"""LINKING: a change is linked again and again, until all is there that it turns out to need.

That is memory for an arena, libraries, storage for new thread-locals, and units compiled otherwise: with indirect
access to what is far away, or asking for their thread-locals. What is loaded into the process stays there, whatever
becomes of the change; nothing of the change itself is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from patcher.data.initial import Initials
from patcher.data.threads import NewBlock, NewThreadLocals, StaticModel
from patcher.elf.thread_module import ThreadBlock
from patcher.errors import UnresolvedSymbol, UnsafeChange
from patcher.link.place import FarData
from patcher.linkage import NeedsArena
from patcher.loader import Caller
from patcher.part import Part
from patcher.relink import Linked, link_generation
from patcher.units import Changes, Units

_ROUNDS = 8  # of linking again: for an arena, for libraries, for objects compiled otherwise


class Linking:
    """Links changes to one process."""

    def __init__(self, units: Units) -> None:
        self._image = units.image
        self._ledger = units.ledger
        self._units = units
        self._spare: dict[ThreadBlock, int] = {}  # storage that was loaded for a change which then failed

    def forget_spare(self) -> None:
        """Have storage that is loaded for thread-locals used no more: something may have written to it."""
        self._spare.clear()

    def link(self, changes: Changes, initials: Initials, *, dry_run: bool) -> Linked:
        """Link what changed; `initials` says which variables are to be initialised again.

        With `dry_run` nothing is provided in the process. Raises `LinkError`, `UnsafeChange` and their kin.
        """
        units = self._units
        parts = list(changes.parts)
        waiting = [*changes.idle, *units.waiting(changes)]
        supplies, threads = units.supplies, NewThreadLocals(self._ledger.journal.placed)
        supplies.begin()
        for _ in range(2 * len(parts) + _ROUNDS):
            supplies.to_load.clear()
            try:
                linked = link_generation(self._image, self._ledger, parts, threads, waiting, supplies, initials)
            except NeedsArena:
                self._map_stub_area(dry_run)
            except FarData as error:
                parts, waiting = _made_again(units.with_farther_reach, units, parts, waiting, error)
                threads.restart()
            except StaticModel as error:
                parts, waiting = _made_again(units.asking_for_thread_locals, units, parts, waiting, error)
                threads.restart()
            except UnresolvedSymbol as error:
                raise UnresolvedSymbol(error.message, supplies.advice()) from None
            else:
                threads.check()
                if dry_run or not (self._load(tuple(supplies.to_load)) or self._load_storage(threads)):
                    units.agreement.check_supplied(linked.supplied)
                    return linked
        raise UnsafeChange("the change cannot be linked", "restart the program with the new code")

    def _load(self, libraries: Sequence[Path]) -> bool:
        """Load libraries into the process, and return whether there were any."""
        for path in libraries:
            Caller(self._image).load_library(str(path))
            self._units.supplies.loaded.append(path)
        return bool(libraries)

    def _load_storage(self, threads: NewThreadLocals) -> bool:
        """Have storage for new thread-locals in the process, and return whether there were any to load."""
        blocks = tuple(threads.to_load())
        for block in blocks:
            try:
                self._load_block(block)
            except UnsafeChange as error:
                if error.code == "dlopen" and block.static:
                    threads.without_static()
                    return True
                if error.code not in ("dlopen", "no-loader"):
                    raise
                raise UnsafeChange(
                    f"threads that run have no storage for the new thread-local {block.names}, and the dynamic loader "
                    f"can make none: {error.message}",
                    "make it a plain variable, or restart the program with the new code",
                    code="new-thread-local",
                ) from None
        return bool(blocks)

    def _load_block(self, block: NewBlock) -> None:
        wanted = block.as_linked()
        if wanted not in self._spare:
            self._spare[wanted] = Caller(self._image).load_thread_block(wanted)
        block.loaded(wanted, self._spare[wanted])

    def _map_stub_area(self, dry_run: bool) -> None:
        if dry_run:
            raise UnsafeChange(
                "a library function's implementation has to be asked from the process, which --dry-run forbids",
                "run it without --dry-run",
                code="dry-run",
            )
        self._ledger.realise()
        self._image.stub_area = next(iter(self._ledger.arenas.values())).stub


def _made_again(
    make: Callable[[Part], Part | None],
    units: Units,
    parts: Sequence[Part],
    waiting: Sequence[Part],
    error: FarData | StaticModel,
) -> tuple[list[Part], list[Part]]:
    """Have the unit of the object that `error` is about compiled otherwise; raise it where that is not possible."""

    def made(part: Part) -> Part:
        found = make(part) if part.blocks.object is error.object else part
        if found is None:
            raise error
        return found

    own = any(part.blocks.object is error.object for part in (*parts, *waiting))
    if not own and not units.supply_again(error.object, make):
        raise error
    return [made(p) for p in parts], [made(p) for p in waiting]
