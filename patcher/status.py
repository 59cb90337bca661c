"""STATUS: which generation is live in a process, where every patched function goes, and what that takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from patcher.patch.ledger import Ledger  # which the command line does not need to say what it got


@dataclass(frozen=True, slots=True)
class PatchedFunction:
    """A function that has been patched: its address for life and the code that it leads to now."""

    name: str
    module: str
    file: str
    original: int
    current: int
    generation: int


@dataclass(frozen=True, slots=True)
class ArenaUse:
    address: int
    size: int
    used: int


@dataclass(frozen=True, slots=True)
class ObjectUse:
    """How many bytes of the arenas an object takes, in all generations together, gaps for alignment included."""

    object: str
    text: int
    read_only: int
    data: int
    cells: int
    islands: int  # with their slots, the entries that they displaced, and jumps to what is far away


@dataclass(frozen=True, slots=True)
class Status:
    """What `status` tells of a process."""

    pid: int
    program: str
    generation: int
    recorded: tuple[int, ...]
    functions: tuple[PatchedFunction, ...]
    arenas: tuple[ArenaUse, ...]
    objects: tuple[ObjectUse, ...]

    def as_json(self) -> dict[str, object]:
        """Return what goes out of it."""
        found = asdict(self)
        found.pop("recorded")
        return found


def status_of(ledger: Ledger) -> Status:
    """Read a process's ledger anew, and tell what it says. Writes nothing."""
    ledger.refresh()
    live = ledger.generation
    placed = {p.address: p for p in ledger.journal.placed}
    current = ledger.view().bodies
    free = ledger.journal.free
    made = {(a, i, body): g.number for g in ledger.journal.generations.values() for a, i, body in g.bodies}
    functions = []
    for redirect in ledger.journal.redirects:
        body = current.get((redirect.arena, redirect.index), redirect.copy)
        number = made.get((redirect.arena, redirect.index, body), 0)
        where = redirect.original if body == redirect.copy and not redirect.born else body
        known = placed.get(body)
        file = redirect.unit.partition("#")[0] if known is None else known.unit.partition("#")[0]
        functions.append(PatchedFunction(redirect.name, redirect.module, file, redirect.original, where, number))
    arenas = tuple(
        ArenaUse(a.base, a.end - a.base, a.bytes_used(ledger.usages[a.base], free)) for a in ledger.arenas.values()
    )
    return Status(
        ledger.target.pid,
        ledger.target.program,
        live,
        tuple(sorted(ledger.journal.generations)),
        tuple(functions),
        arenas,
        tuple(ObjectUse(**asdict(a)) for a in ledger.journal.allocations),
    )
