"""Reclaim: generations that nobody goes back to any more are forgotten, and the memory of their code is used again.

The last generations stay recorded (`Policy.keep` of them at least, the live one, and where branches part). When there
are twice as many, the older ones are forgotten: what one of them did becomes a part of the next recorded generation
that goes on from it, which so can be reverted to as before; what belongs to no recorded generation is dropped. The
journal is written anew into the half of its area that is not in use, and one word makes that the journal: killed at
any write, there is the old one or the new one, both whole.

Memory is freed in stretches: all code, or all constants, that a generation got in one piece. Never freed are the
program's variables, nor islands with their slots, and displaced entries, unless their library was unloaded. A stretch
is needed while

    a recorded generation leads a function into it, or brought it,
    it holds a constant that still is what its name stands for, or a constant that was rewritten,
    something that is needed refers to it (the linker knew, and noted it), or
    any word of the process's memory, or a register, looks like an address in it, while all threads stand still.

The last is looked at when the others leave enough to free, with one stop; not with every generation. It is final: a
function's address, as the program can see it, is its entry or its island for life, so only the code of a stretch itself
(by calling), or a copy of a word that is there, makes a word that leads into it. When at one instant there is no
such word, and no thread in it, no later one comes to be: it need not be looked at again, neither when it is noted as
free nor when it is used again. Slots are words too: a function that no recorded generation has may still be called;
but one of a library that was unloaded only by who has the address of its island (`orphans`).

Free memory is noted in the journal, by that same write: what is used again of it are the stretches of later
generations. A generation of which something may run before it is live is placed in fresh memory, since its addresses
may be known should it fail. All threads stand still while memory is looked at, about 1 ms for each MB: a process with
too much of it, for what there is to free, is left alone. It cannot be looked at piece by piece while the program runs:
a word may move from what was not seen yet to what was. The kernel can tell which pages were written to meanwhile, but
has one such note for everybody (soft-dirty; collectors of garbage live by it), or wants a userfaultfd on all of the
program's memory; and a copy made by fork is a child that the program may find.

What the program's variables are in stays, those of an unloaded library too. The address of a variable is the program's
to keep, also where nobody sees it (in the kernel: epoll_ctl, io_uring; coloured, or as a distance), while code that
still runs uses it: no look at memory tells that nobody does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from patcher.errors import PatcherError, TargetGone
from patcher.patch.arena import CODE_SIZE, JOURNAL_SIZE, Arena
from patcher.patch.departed import final
from patcher.patch.journal import FORMER, Allocation, Body, GenerationRecord, Initial, Journal, Placed, Rewrite, Stretch
from patcher.patch.ledger import Ledger
from patcher.patch.orphans import Orphans, with_copies
from patcher.patch.reach import memory_of, reached

_TRAP = b"\xcc"  # int3
_COMFORTABLE = JOURNAL_SIZE // 4  # half of the half that is in use
_PIECE = 16 << 10  # up to which memory that nobody needs is treated as one
_LOOKED_AT = 32  # bytes for each that may be freed
_FEW = 8  # generations that take so much are not written anew with each that follows


@dataclass(frozen=True, slots=True)
class Policy:
    """How many generations stay recorded, and when memory is freed.

    `enough`: the bytes that have to be there for a look at all of the process's memory; `most`: how much of that there
    may be at least; there may be more when more can be freed. `poison`: fill what is freed with traps, which shows who
    still uses it.
    """

    keep: int = 50
    enough: int = CODE_SIZE // 8
    most: int = 64 << 20
    poison: bool = False


def reclaim(ledger: Ledger, policy: Policy) -> None:
    """Forget old generations and free their memory, if there is enough of either. Within a transaction."""
    primary = ledger.primary
    if primary is None or not _is_due(ledger, policy):
        return
    if any(ledger.is_in_place(redirect) for _, redirect in ledger.void()):
        return  # a library that was unloaded, and something put its text back
    forgetting, freed = _freed(ledger, _shortened(ledger, policy.keep), policy)
    contents = _encoded(forgetting, ledger.journal)
    if len(contents) > 2 * _COMFORTABLE:
        return
    primary.replace_journal(ledger.usages[primary.base].journal, contents)
    Orphans(ledger).let_go((s.start, s.end) for s in freed)
    if policy.poison:
        _poison(ledger, freed)
    ledger.refresh()


def _is_due(ledger: Ledger, policy: Policy) -> bool:
    primary = ledger.primary
    assert primary is not None
    used = ledger.usages[primary.base].journal
    count = len(ledger.journal.generations)
    return count > 2 * policy.keep or (used - primary.journal_part(used)[0] > _COMFORTABLE and count > _FEW)


def _shortened(ledger: Ledger, keep: int) -> Journal:
    journal = with_copies(final(ledger.journal), ledger.void())
    found = folded(journal, keep, ledger.generation)
    while len(_encoded(found, ledger.journal)) > _COMFORTABLE and keep > 1:
        keep //= 2
        found = folded(journal, keep, ledger.generation)
    return found


def _encoded(journal: Journal, known: Journal) -> bytes:
    return b"".join(known.frame(record) for record in journal.generations.values())


def _poison(ledger: Ledger, freed: Iterable[Stretch]) -> None:
    for stretch in freed:
        ledger.target.memory.write(stretch.start, _TRAP * (stretch.end - stretch.start))


# --- what is forgotten ----------------------------------------------------------------------------------------


def folded(journal: Journal, keep: int, live: int) -> Journal:
    """Return a journal with the last `keep` generations and the live one, into which the others are merged."""
    generations = journal.generations
    kept = _kept(journal, keep, live)
    needed = _with_ancestors(journal, kept)
    children = {n: [c for c in needed if generations[c].parent == n] for n in needed}
    work, result, pending = dict(generations), Journal(), list[GenerationRecord]()
    for number in sorted(generations):
        if number in kept:
            result.add(_heir(pending, work[number], generations[number]))
            pending = []
            continue
        pending.append(generations[number])
        if number in needed:
            (child,) = children[number]
            work[child] = _descendant(work[number], work[child])
        else:
            own = generations[number]
            left = tuple(replace(p, kind=FORMER) for p in own.placed if p.kind in ("code", FORMER))
            pending[-1] = replace(own, placed=(*_for_ever(own.placed), *left))
    return result


def _kept(journal: Journal, keep: int, live: int) -> set[int]:
    """Return the generations that stay: the last ones, the live one, and where what they came from parts."""
    generations = journal.generations
    kept = set(sorted(generations)[-keep:]) | ({live} & generations.keys())
    needed = _with_ancestors(journal, kept)
    # Storage that only a generation nobody comes from has must be told from what is current.
    kept |= {n for n, g in generations.items() if g.storages and n not in needed}
    needed = _with_ancestors(journal, kept)
    parents = [generations[n].parent for n in needed]
    return kept | {n for n in needed if parents.count(n) > 1}


def _with_ancestors(journal: Journal, numbers: Iterable[int]) -> set[int]:
    return {record.number for number in numbers for record in journal.lineage(number)}


def _for_ever(placed: Iterable[Placed]) -> tuple[Placed, ...]:
    return tuple(p for p in placed if p.kind not in ("code", "read-only", FORMER))


def _heir(pending: Sequence[GenerationRecord], record: GenerationRecord, before: GenerationRecord) -> GenerationRecord:
    """Return a record with what stays of the forgotten ones before it, whoever comes from them.

    `before` is the record without what it got from its ancestors.
    """
    if not pending:
        return record
    every = (*pending, before)
    inherited = record.placed[: len(record.placed) - len(before.placed)]
    dropped = [p for g in pending for p in g.placed if p.kind not in ("code", "read-only") or p.kind == FORMER]
    known = {p.address for p in inherited}
    return replace(
        record,
        placed=(*(p for p in dropped if p.address not in known or p.kind != FORMER), *record.placed),
        redirects=tuple(r for g in every for r in g.redirects),
        allocations=_summed(a for g in every for a in g.allocations),
        chosen=tuple({(m, a): (m, a, b) for g in every for m, a, b in g.chosen}.values()),
        initials=_last(i for g in every for i in g.initials),
        stretches=tuple(s for g in every for s in g.stretches),
        holes=tuple(h for g in every for h in g.holes),
        instances=tuple({i.path: i for g in every for i in g.instances}.values()),
    )


def _descendant(parent: GenerationRecord, child: GenerationRecord) -> GenerationRecord:
    """Return a generation as one that comes from its parent's parent and did the parent's work as well."""
    bodies = {(arena, index): body for arena, index, body in (*parent.bodies, *child.bodies)}
    rewrites: dict[int, Rewrite] = {}
    for rewrite in (*parent.rewrites, *child.rewrites):
        first = rewrites.get(rewrite.address, rewrite)
        rewrites[rewrite.address] = replace(rewrite, old=first.old)
    return replace(
        child,
        parent=parent.parent,
        files=tuple(dict.fromkeys((*parent.files, *child.files))),
        bodies=tuple((*key, body) for key, body in bodies.items()),
        statuses=(),
        placed=(*_inherited(parent, child), *child.placed),
        quiet=tuple(dict.fromkeys((*parent.quiet, *child.quiet))),
        quiet_back=tuple(dict.fromkeys((*parent.quiet_back, *child.quiet_back))),
        rewrites=tuple(rewrites.values()),
        storages=(*parent.storages, *child.storages),
        merged=_ranges((*parent.merged, (parent.number, parent.number), *child.merged)),
    )


def _inherited(parent: GenerationRecord, child: GenerationRecord) -> list[Placed]:
    """Return the code and the constants of a parent, as they are while its child is live."""
    newer = {_key(p) for p in child.placed if p.kind == "read-only"}
    replaced = {(arena, index) for arena, index, _ in child.bodies}
    doors = {body: (arena, index) in replaced for arena, index, body in parent.bodies}
    names = {(p.module, p.unit, p.name): doors[p.address] for p in parent.placed if p.address in doors}
    found = []
    for p in parent.placed:
        if p.kind == FORMER or (p.kind == "read-only" and _key(p) not in newer):
            found.append(p)
        elif p.kind == "code":
            found.append(replace(p, kind=FORMER) if _is_replaced(p, doors, names) else p)
    return found


def _is_replaced(p: Placed, doors: Mapping[int, bool], names: Mapping[tuple[str, str, str], bool]) -> bool:
    """Tell whether a function is replaced, or the one that it was split off."""
    if p.address in doors:
        return doors[p.address]
    owner = p.name
    while "." in owner:
        owner = owner.rpartition(".")[0]
        if (p.module, p.unit, owner) in names:
            return names[p.module, p.unit, owner]
    return False


def _key(p: Placed) -> tuple[str, str, str]:
    return p.module, p.unit if p.local else "", p.name


def _summed(allocations: Iterable[Allocation]) -> tuple[Allocation, ...]:
    found: dict[str, Allocation] = {}
    for a in allocations:
        known = found.get(a.object, Allocation(a.object))
        found[a.object] = known.plus(text=a.text, read_only=a.read_only, data=a.data, cells=a.cells, islands=a.islands)
    return tuple(found.values())


def _last(initials: Iterable[Initial]) -> tuple[Initial, ...]:
    return tuple({(i.address, i.written): i for i in initials}.values())


def _ranges(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if found and low == found[-1][1] + 1:
            found[-1] = found[-1][0], high
        else:
            found.append((low, high))
    return tuple(found)


# --- what is freed --------------------------------------------------------------------------------------------


def _freed(ledger: Ledger, journal: Journal, policy: Policy) -> tuple[Journal, tuple[Stretch, ...]]:
    """Return a journal without the stretches that nothing needs, and these."""
    stretches = sorted((s for g in journal.generations.values() for s in g.stretches), key=lambda s: s.start)
    needed = _closed(stretches, _holding(stretches, _needed_addresses(journal)))
    unneeded = [s for i, s in enumerate(stretches) if i not in needed]
    journal, left = _renamed(journal, unneeded), _coalesced(unneeded)
    freed: tuple[Stretch, ...] = ()
    if left and sum(s.end - s.start for s in left if not s.searched) >= policy.enough:
        used = _holding(left, (a for i in needed for a in stretches[i].uses))
        kept = _reached(ledger, left, used, policy)
        if kept is not None:
            freed = tuple(s for i, s in enumerate(left) if i not in kept)
            left = [replace(s, searched=True) for i, s in enumerate(left) if i in kept]
    return _arranged(journal, set(unneeded), left, freed, ledger.arenas.values()), freed


def _coalesced(stretches: Sequence[Stretch]) -> list[Stretch]:
    """Return stretches that nothing needs, of which small ones that touch have become one."""
    found: list[Stretch] = []
    for s in stretches:
        last = found[-1] if found else s
        if last.end == s.start and s.end - last.start <= _PIECE and last.searched == s.searched:
            uses = tuple(sorted({*last.uses, *s.uses}))
            found[-1] = replace(last, end=s.end, uses=uses, taken=_summed([*last.taken, *s.taken]))
        else:
            found.append(s)
    return found


def _needed_addresses(journal: Journal) -> list[int]:
    """Return what recorded generations need to be where it is, rising."""
    found: set[int] = set()
    for record in journal.generations.values():
        found |= {body for _, _, body in record.bodies} | {chosen for _, _, chosen in record.chosen}
        found |= {rewrite.address for rewrite in record.rewrites}
        found |= {p.address for p in record.placed if p.kind == "read-only"}
        found |= {s.start for s in record.stretches if s.generation in journal.generations}
    return sorted(found)


def _closed(stretches: Sequence[Stretch], needed: Iterable[int]) -> set[int]:
    """Return the numbers of those that are needed, and of all that they use."""
    found = set(needed)
    new = list(found)
    while new:
        more = _holding(stretches, stretches[new.pop()].uses) - found
        found |= more
        new += more
    return found


def _holding(stretches: Sequence[Stretch], addresses: Iterable[int]) -> set[int]:
    """Return the numbers of the stretches, which rise, that some addresses are in."""
    found = set()
    for address in addresses:
        i = bisect_right(stretches, address, key=lambda s: s.start) - 1
        if i >= 0 and address in stretches[i]:
            found.add(i)
    return found


def _renamed(journal: Journal, unneeded: Sequence[Stretch]) -> Journal:
    """Return a journal in which all code is known as former where no generation needs it, and only there."""

    def renamed(p: Placed) -> Placed:
        if p.kind == "code" and _holding(unneeded, (p.address,)):
            return replace(p, kind=FORMER)
        return replace(p, kind="code") if p.kind == FORMER and p.address in used else p

    gone = set(unneeded)
    used = {a for g in journal.generations.values() for s in g.stretches if s not in gone for a in s.uses}
    return Journal(
        {
            number: replace(g, placed=tuple(renamed(p) for p in g.placed)) if g.merged or g.stretches else g
            for number, g in journal.generations.items()
        }
    )


def _reached(ledger: Ledger, left: Sequence[Stretch], used: Iterable[int], policy: Policy) -> set[int] | None:
    """Return the numbers of those `left` that the process can reach, None when that cannot be found out.

    `used` are those that stretches refer to which are needed in any case.
    """
    target, orphans = ledger.target, Orphans(ledger)
    extents = [(s.start, s.end) for s in left]
    ours = [extent for arena in ledger.arenas.values() for extent in arena.without_words]
    ours += orphans.slots
    try:
        worth = _LOOKED_AT * sum(s.end - s.start for s in left)
        if sum(end - start for start, end in memory_of(target, ours)) > max(policy.most, worth):
            return None
        switches = {k: v for b, a in ledger.arenas.items() for k, v in a.switched(ledger.usages[b].slots).items()}
        ranges = sorted([*extents, *orphans.islands, *switches])
        calls, called = orphans.calls(extents), orphans.called_beside(extents)
        with target.stopped() as stopped:
            found = [ranges[i] for i in reached(target, stopped, ranges, ours)]
    except TargetGone:
        raise
    except (PatcherError, OSError):
        return None
    numbers = {extent: i for i, extent in enumerate(extents)}
    islands = called | {start for start, _ in found if start in orphans.bodies}
    next_ones = _holding(left, (body for extent in found for body in switches.get(extent, ())))
    kept = _closed(left, {*used, *next_ones, *(numbers[extent] for extent in found if extent in numbers)})
    while True:
        islands |= {island for i in kept for island in calls[i]}
        more = _closed(left, kept | _holding(left, (orphans.bodies[island] for island in islands)))
        if more == kept:
            return kept
        kept = more


def _arranged(
    journal: Journal, gone: set[Stretch], left: Sequence[Stretch], freed: Sequence[Stretch], arenas: Iterable[Arena]
) -> Journal:
    """Return a journal with `left` and what was freed, in the first record, instead of the stretches `gone`.

    Of the code in them it is known where it is, and no longer what its functions were.
    """
    holes = [*journal.free, *((s.start, s.end) for s in freed)]
    code = [s for s in left if any(a.code_start <= s.start < a.header for a in arenas)]
    former = [Placed(FORMER, (), FORMER, "", "", True, s.start, s.end - s.start) for s in code]
    ordered = sorted([*left, *freed], key=lambda s: s.start)
    taken = {a.object: a for a in _summed(a for s in freed for a in s.taken)}
    result = Journal()
    for record in journal.generations.values():
        placed = [p for p in record.placed if p.kind != FORMER or not _holding(ordered, (p.address,))]
        own = [s for s in record.stretches if s not in gone]
        is_first = not result.generations
        result.add(
            replace(
                record,
                placed=tuple([*former, *placed] if is_first else placed),
                quiet=_still_there(record.quiet, left, freed),
                quiet_back=_still_there(record.quiet_back, left, freed),
                allocations=_less(record.allocations, taken),
                stretches=tuple([*left, *own] if is_first else own),
                holes=tuple(holes) if is_first else (),
            )
        )
    return result


def _still_there(bodies: Iterable[Body], left: Sequence[Stretch], freed: Sequence[Stretch]) -> tuple[Body, ...]:
    found: dict[Body, None] = {}
    for body in bodies:
        if not _holding(freed, (body.start,)):
            inside = [left[i] for i in _holding(left, (body.start,))]
            found[Body(FORMER, inside[0].start, inside[0].end) if inside else body] = None
    return tuple(found)


def _less(allocations: Sequence[Allocation], taken: dict[str, Allocation]) -> tuple[Allocation, ...]:
    """Return what was taken without as much of `taken` as there is, which becomes less by that."""
    found = []
    for a in allocations:
        b = taken.get(a.object, Allocation(a.object))
        text, constants = min(a.text, b.text), min(a.read_only, b.read_only)
        cells, islands = min(a.cells, b.cells), min(a.islands, b.islands)
        less = Allocation(a.object, -text, -constants, 0, -cells, -islands)
        taken[a.object], left = _summed([b, less])[0], _summed([a, less])[0]
        if left.total:
            found.append(left)
    return tuple(found)
