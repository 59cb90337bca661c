"""TOUCHED: which units of a process a saved header touches.

Decides which units are in the process at all: those of a file's name that one of its modules was built from. Another
program's unit of the same name is left out where a database lists all those that debug information has of that name.
Else it may be a unit too many, which shows when it is matched; it is never one too few. What they include is `build`'s
business.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from patcher.build import Commands, CompileCommand, Dependencies, Gathering
from patcher.image import Image
from patcher.options import Options
from patcher.origin import MADE_OF_ALL
from patcher.report import Work, silently
from patcher.texts import Texts
from patcher.units import commands_for


class Touched:
    """The units that headers touch, in one process. Gathers in the background from `start` on."""

    def __init__(
        self,
        image: Image,
        options: Options,
        texts: Texts,
        dependencies: Dependencies,
        say: Callable[[str], None],
        working: Callable[[str], Work] = silently,
    ) -> None:
        self._working = working
        self._image = image
        self._texts = texts
        self._options = options
        self._dependencies = dependencies
        self._say = say
        self._gathering: Gathering | None = None

    def start(self) -> None:
        """Begin to gather what is included, anew if the commands are others now."""
        if self._gathering is not None:
            self._gathering.close()
        # Commands of its own: what is read in the background is not shared.
        commands = commands_for(self._image, self._options)
        self._gathering = Gathering(self._dependencies, partial(_units_in, commands, self._file_counts()))
        self._gathering.start()

    def close(self) -> None:
        """End what is under way."""
        if self._gathering is not None:
            self._gathering.close()

    def left(self) -> int:
        """Return how many units there are of which it is not known what they include."""
        return 0 if self._gathering is None else self._gathering.left()

    def held(self) -> AbstractContextManager[None]:
        """Gather nothing during the block."""
        return nullcontext() if self._gathering is None else self._gathering.held()

    def may_have(self, unit: Path) -> bool:
        """Tell whether the process may have been built from a unit."""
        counts = self._file_counts()
        return not counts or unit.name in counts

    def by(self, headers: Iterable[Path], cancelled: Callable[[], bool]) -> dict[Path, frozenset[Path]]:
        """Return the units that each header touches, of those that are there. Raises BuildCancelled.

        Headers that were not there at the start may hide others of the same name.
        """
        if self._gathering is None:
            self.start()
        assert self._gathering is not None
        with self._working("asking compilers what units include") as work:
            self._gathering.complete(cancelled=cancelled, say=self._tell, progress=work.update)
        includers = self._dependencies.includers
        found = {header: includers(header, new=not self._texts.of(header)) for header in headers}
        return {header: frozenset(unit for unit in units if unit.is_file()) for header, units in found.items()}

    def _tell(self, count: int) -> None:
        what = "one unit" if count == 1 else f"{count} units"
        self._say(f"asking the compiler what {what} of the program include{'s' if count == 1 else ''}")

    def _file_counts(self) -> Counter[str]:
        """Return how many units the process may have of files of each name; empty where nothing tells."""
        tables = [m.module.symbols for m in self._image.modules if len(m.module.symbols)]
        found: Counter[str] = Counter()
        for table in tables:
            for name, count in table.file_counts.items():
                found[Path(name).name] += count
        told = self._image.executable.module.symbols.has_files and all(
            MADE_OF_ALL.isdisjoint(t.file_counts) for t in tables
        )
        return found if told else Counter()


def _units_in(commands: Commands, counts: Counter[str]) -> tuple[CompileCommand, ...]:
    """Return the units that may be in a process; `counts` as of `_file_counts`."""
    units = commands.every_unit()
    if not counts:
        return units
    places: dict[str, list[Path]] = {}
    for file in commands.recorded_files():
        places.setdefault(file.name, []).append(file)
    # Where a program was compiled in another place, or a part of it without debug information, its name has to do: the
    # database has to list what is recorded. A copy that lies where the program was compiled is not what is edited.
    listed = {Path(os.path.realpath(command.file)) for command in commands.known() if command.file.name in places}
    told = {n: set(p) for n, p in places.items() if len(p) >= counts[n] and listed.issuperset(p)}
    return tuple(c for c in units if c.file.name in counts and c.file in told.get(c.file.name, (c.file,)))
