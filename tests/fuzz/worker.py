"""A process that applies mutants to running programs, dry: `python -m fuzz.worker FOLDER SEED FIRST END PIE FIXED`.

PIE and FIXED are the process numbers of the two programs in FOLDER (`fuzz.corpus`). Prints a line of JSON for each
mutant: what became of it. A mutant that uses up its time ends the process (SIGPROF, with the traceback on stderr), and
so does one that crashes a library; the driver knows by the line that is missing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

from fuzz.corpus import samples
from fuzz.mutate import mutant
from patcher.data.initial import Initials
from patcher.elf import Archive, is_archive
from patcher.errors import PatcherError, TargetError
from patcher.link.place import Region
from patcher.linking import Linking
from patcher.options import Options
from patcher.patch.arena import SLOT_COUNT
from patcher.relink import Linked
from patcher.session import Session
from patcher.target import Target
from patcher.units import Changes

SECONDS = 2.0  # of processor time
MEMORY = 200 << 20  # bytes of address space


class InvalidLink(Exception):
    """Something would be written where it must not be."""


class CheckedLinking(Linking):
    """Linking that looks at what would be written."""

    def link(self, changes: Changes, initials: Initials, *, dry_run: bool) -> Linked:
        linked = super().link(changes, initials, dry_run=dry_run)
        code, others = self._free()
        end = 0
        for address, data in sorted(linked.commit.writes):
            if address < end:
                raise InvalidLink(f"{address:#x} is written twice")
            end = address + len(data)
            if not any(r.start <= address and end <= r.end for r in (*code, *others)):
                raise InvalidLink(f"{address:#x}..{end:#x} lies outside the free memory {code} {others}")
        for arena, index, body in linked.commit.record.bodies:
            led_to = any(r.start <= body < r.end for r in code)
            if not (arena in self._ledger.arenas and 0 < index < SLOT_COUNT and led_to):
                raise InvalidLink(f"slot {index} of {arena:#x} would lead to {body:#x}")
        return linked

    def _free(self) -> tuple[list[Region], list[Region]]:
        """Return the memory of all arenas that is free for code, and for the rest."""
        known = [(arena, self._ledger.usages[base]) for base, arena in self._ledger.arenas.items()]
        spaces = [arena.space(usage) for arena, usage in known]
        code = [arena.entry_space(usage) for arena, usage in known]
        return code, [region for space in spaces for region in (space.read_only, space.data)]


class CheckedSession(Session):
    @cached_property
    def linking(self) -> Linking:
        return CheckedLinking(self.units)


def applied(session: Session, file: Path) -> dict[str, object]:
    """Apply a file within the limits; return what became of it."""
    limit_memory(MEMORY)
    before = peak()
    began = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        outcome = outcome_of(session, file)
    except Exception:
        outcome = {"defect": traceback.format_exc()}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {**outcome, "ms": round((time.process_time() - began) * 1e3, 1), "grown": peak() - before}


def outcome_of(session: Session, file: Path) -> dict[str, object]:
    look_up_members(file)
    try:
        generation = session.apply(file)
    except TargetError:
        raise
    except PatcherError as error:
        if not error.message or not error.message.replace("\n", "").isprintable():
            raise  # a terminal would take it for a command
        return {"outcome": error.code, "message": error.message}
    return {"outcome": "linked" if generation.functions else "no change"}


def look_up_members(file: Path) -> None:
    """Find members by symbols, as is done when new code lacks something."""
    data = file.read_bytes()
    if is_archive(data):
        with contextlib.suppress(PatcherError):
            archive = Archive(file, data)
            for name in archive.symbols:
                archive.defining(name)


def peak() -> int:
    """Return the most memory that this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def limit_memory(more: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, resource.RLIM_INFINITY))


@contextlib.contextmanager
def sessions(pids: Mapping[str, int]) -> Iterator[dict[tuple[str, bool], Session]]:
    """Open dry sessions on the programs: each with and without force."""
    with contextlib.ExitStack() as stack:
        yield {
            (program, force): stack.enter_context(
                CheckedSession(Target.attach(pid), Options(dry_run=True, force=force))
            )
            for program, pid in pids.items()
            for force in (True, False)
        }


def main(folder: Path, seed: int, first: int, end: int, *pids: int) -> None:
    faulthandler.enable()
    faulthandler.register(signal.SIGPROF, chain=True)
    good = samples(folder)
    file = folder / "good" / f"mutant{os.getpid()}.o"  # beside the members of the thin archive
    with sessions(dict(zip(("pie", "fixed"), pids, strict=True))) as opened:
        for (program, _), session in opened.items():
            first_of = next(s for s in good if s.program == program)
            session.apply(folder / "good" / first_of.name)  # what is read once is read before anything is measured
        for index in range(first, end):
            sample, data = mutant(good, seed, index)
            file.write_bytes(data)
            outcome = applied(opened[sample.program, index % 3 > 0], file)
            print(json.dumps({"index": index, "sample": sample.name, **outcome}), flush=True)
    file.unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
