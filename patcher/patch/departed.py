"""DEPARTED: what the journal says of modules that are no longer there.

A library that is unloaded takes its patches with it: loaded again, here or elsewhere, it is as its file is. Decides
which modules have gone since they were patched, and what of the records is void with them. Nothing is erased: records
of such a module do not count until the next generation says for good that those before it do not.

A module that came back to the very same place has none of the detours that it needs. Where none is needed, it is told
by its path, where it stands, and the number and the time of its file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from patcher.patch.journal import GenerationRecord, Instance, Journal, Redirect
from patcher.target import Mapping

Stamp = Callable[[Mapping], int]


def instances(record: GenerationRecord, mappings: Sequence[Mapping], stamp: Stamp) -> tuple[Instance, ...]:
    """Return the modules that a generation has to do with, as they are now; without those that are not there."""
    found = {r.module: (r.module, r.original) for r in record.redirects if not r.born}
    for path in modules_of(record) - set(found):
        found.update((path, (path, m.start)) for m in mappings if m.path == path)
    return tuple(
        Instance(path, address, m.inode, stamp(m))
        for path, address in sorted(found.values())
        for m in mappings
        if address in m and m.path == path
    )


def missing(record: GenerationRecord, mappings: Sequence[Mapping]) -> set[str]:
    """Return the modules that a generation has to do with and that are not where they were when it was made."""
    present = {i.path for i in record.instances if _is_there(i, mappings)}
    return {path for path in modules_of(record) if path.startswith("/")} - present


def _is_there(instance: Instance, mappings: Sequence[Mapping], stamp: Stamp = lambda _: 0) -> bool:
    found = (m for m in mappings if instance.address in m and (m.path, m.inode) == (instance.path, instance.inode))
    return any(not instance.written or stamp(m) in (0, instance.written) for m in found)


def modules_of(record: GenerationRecord) -> set[str]:
    """Return the paths of the modules that a record speaks of."""
    found = {r.module for r in record.redirects} | {p.module for p in record.placed}
    return found | {module for _, module, _ in record.statuses} | {s.module for s in record.storages}


def find_departed(
    journal: Journal,
    live: int,
    mappings: Sequence[Mapping],
    executable: str,
    stamp: Stamp,
    in_place: Callable[[Redirect], bool],
) -> frozenset[str]:
    """Return the modules that are not what they were when they were patched last; the executable never goes.

    `live` is the live generation; `stamp` tells when the file of a mapping was written, `in_place` whether a detour
    stands.
    """
    last = {i.path: i for g in journal.generations.values() for i in g.instances if i.path != executable}
    detoured = {r.module: r for r in journal.redirects if not r.born and r.module in last}
    needed = {r.module for g in journal.lineage(live) for r in g.redirects if not r.born and r.module in last}
    gone = set()
    for path, instance in last.items():
        if path in detoured and in_place(detoured[path]):
            continue  # only one that we patched leads to our memory
        if path in needed or not _is_there(instance, mappings, stamp):
            gone.add(path)
    return frozenset(gone)


def without_departed(journal: Journal, departed: frozenset[str]) -> Journal:
    """Return the journal without what is void: of modules in `departed`, and of those that later records say so of."""
    if not departed and not any(g.departed for g in journal.generations.values()):
        return journal
    gone, kept = set(departed), []
    for number in sorted(journal.generations, reverse=True):
        record = journal.generations[number]
        kept.append((record, frozenset(gone)))
        gone |= set(record.departed)
    found, void = Journal(), set[tuple[int, int]]()
    for record, without in reversed(kept):
        void |= {(r.arena, r.index) for r in record.redirects if r.module in without}
        found.add(_without(record, without, void) if without else record)
    return found


def final(journal: Journal) -> Journal:
    """Return a journal in which nothing is void any more, as one that says so no longer, to be written anew."""
    return Journal({number: replace(g, departed=()) for number, g in journal.generations.items()})


def _without(record: GenerationRecord, gone: frozenset[str], void: set[tuple[int, int]]) -> GenerationRecord:
    names = {n for r in record.redirects if r.module in gone for n in (r.name, *r.names)}
    names |= {name for name, module, _ in record.statuses if module in gone}
    return replace(
        record,
        bodies=tuple(b for b in record.bodies if b[:2] not in void),
        statuses=tuple(s for s in record.statuses if s[1] not in gone),
        placed=tuple(p for p in record.placed if p.module not in gone),
        redirects=tuple(r for r in record.redirects if r.module not in gone),
        quiet=tuple(b for b in record.quiet if b.name not in names),
        quiet_back=tuple(b for b in record.quiet_back if b.name not in names),
        chosen=tuple(c for c in record.chosen if c[0] not in gone),
        rewrites=tuple(r for r in record.rewrites if r.module not in gone),
        storages=tuple(s for s in record.storages if s.module not in gone),
        instances=tuple(i for i in record.instances if i.path not in gone),
    )
