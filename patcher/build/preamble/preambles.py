"""The precompiled preambles of a session: which unit has one, whether it still holds, and when new ones are made.

A unit gets its preamble in the background after a compile; from then on only what stands behind it is compiled, as
long as nothing changes that the preamble was made from. A text that differs in comments only is not compiled at all.
They lie in the session's work directory, take bounded space, and go with it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from patcher.build.background import Background
from patcher.build.command import CompileCommand
from patcher.build.preamble.command import rewriting_of
from patcher.build.preamble.inputs import Stamp, stamp_of
from patcher.build.preamble.making import Made, NotMade, make
from patcher.build.preamble.text import Cut, bare, cut, includes_more
from patcher.build.toolchain import identify, program_stamp
from patcher.errors import PatcherError

_LIMIT = 1 << 30  # bytes of precompiled preambles
_SHARE = 4  # and at most one part in so many of what is free, which may be memory

_Key = tuple[Path, tuple[str, ...], Path]


@dataclass
class _Unit:
    """What is known of one unit."""

    compiler: Stamp | None
    made: Made | NotMade | None = None
    preamble: bytes = b""  # that `made` is about
    place: Path | None = None
    text: bytes | None = None  # behind the preamble, of the object that is kept, without comments
    object: Path | None = None
    numbers: count[int] = field(default_factory=lambda: count(1))


@dataclass(frozen=True, slots=True)
class Ready:
    """A preamble that holds for a unit's text as it is now.

    `kept` is an object of the same text, should there be one; `worth` tells whether to compile behind the preamble.
    """

    made: Made
    cut: Cut
    read: Stamp | None
    kept: Path | None

    @property
    def worth(self) -> bool:
        return self.made.worth

    def arguments(self, place: Path, output: Path) -> tuple[str, ...]:
        """Return the command that compiles what follows the preamble; what it needs is written below `place`."""
        rewriting = self.made.rewriting
        return rewriting.behind(self.made.header, place / "text" / rewriting.command.file.name, self.cut, output)

    @property
    def reads_more(self) -> bool:
        """Whether files are included behind the preamble."""
        return includes_more(self.cut.rest)

    def rule(self, more: Iterable[str] = ()) -> str:
        """Return what a compiler writes of the files that a unit is made from: these, and what else it read."""
        own = (str(self.made.rewriting.command.file), *(path for path, _ in self.made.inputs.files))
        files = dict.fromkeys((*own, *more))
        return "unit:" + "".join(" " + re.sub(r"([ #])", r"\\\1", path.replace("$", "$$")) for path in files) + "\n"

    def still_reads(self) -> bool:
        """Tell whether the file is the one that was looked at."""
        return self.read is not None and stamp_of(self.made.rewriting.command.file) == self.read


class Preambles:
    """Of one session; to be used from one thread, beside which it makes preambles in another."""

    def __init__(self, directory: Path, environment: dict[str, str], background: Background | None = None) -> None:
        """`directory` is made, and removed by `close`, as is what runs in the background; `environment` is that of
        the compilers.
        """
        self._directory = directory
        self._environment = environment
        self._units: dict[_Key, _Unit] = {}  # the one used last comes last
        self._waiting: deque[CompileCommand] = deque()
        self._finished: deque[tuple[_Key, _Unit]] = deque()  # taken over while no compiler reads what they replace
        self._changed = threading.Condition()
        self._background = background or Background()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._numbers = count(1)

    def ready(self, commands: Iterable[CompileCommand]) -> tuple[Ready | None, ...]:
        """Return, for each unit, its preamble, if there is one that was made from what would be read now.

        They hold until this or `learn` is called again.
        """
        while self._finished:
            self._replace(*self._finished.popleft())
        return tuple(map(self._ready, commands))

    def _ready(self, command: CompileCommand) -> Ready | None:
        unit = self._units.get(_key(command))
        if unit is None or not isinstance(unit.made, Made):
            return None
        read = stamp_of(command.file)
        try:
            divided = cut(command.file.read_bytes())
        except OSError:
            return None
        if divided is None or divided.preamble != unit.made.preamble:
            return None
        if _compiler_stamp(command) != unit.compiler or not unit.made.inputs.unchanged():
            return None
        self._units[_key(command)] = self._units.pop(_key(command))
        kept = unit.object if unit.text is not None and unit.text == bare(divided.rest) else None
        return Ready(unit.made, divided, read, kept)

    def remember(self, ready: Ready, made: Path) -> None:
        """Keep the object that was just made of a unit, for a save that changes comments only."""
        unit = self._units.get(_key(ready.made.rewriting.command))
        if unit is None or unit.made is not ready.made or unit.place is None or not ready.still_reads():
            return
        kept = unit.place / f"{next(unit.numbers)}.o"
        with contextlib.suppress(OSError):
            os.link(made, kept)
            self._keep(unit, kept, ready.cut)

    def useless(self, ready: Ready) -> None:
        """Note that a unit compiles without its preamble, but not behind it."""
        unit = self._units.get(_key(ready.made.rewriting.command))
        if unit is not None and unit.made is ready.made and ready.still_reads():
            unit.made = NotMade("it did not compile behind its preamble", lasting=True)

    def learn(self, commands: Iterable[CompileCommand]) -> None:
        """Have preambles made, in the background, of units that have none which holds, as `ready` says."""
        finished = {key for key, _ in self._finished}
        wanted = [c for c in commands if _key(c) not in finished or self.ready((c,)) == (None,)]
        with self._changed:
            self._waiting.extend(command for command in wanted if command not in self._waiting)
            self._changed.notify()
        if wanted and self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._make_all, name="preambles", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop making preambles, and remove them all."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._background.stop()
        if self._thread is not None:
            self._thread.join()
        shutil.rmtree(self._directory, ignore_errors=True)

    def why_not(self, command: CompileCommand) -> str:
        """Return why a unit has no preamble, or nothing."""
        unit = self._units.get(_key(command))
        return unit.made.reason if unit is not None and isinstance(unit.made, NotMade) else ""

    def left(self) -> int:
        """Return how many are still to be made."""
        return len(self._waiting)

    def wait(self) -> None:
        """Wait until nothing is left to be made."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting or self._closed)

    def _make_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                command = self._waiting[0]
            unit = self._made(command)
            with self._changed:
                if unit is not None and isinstance(unit.made, NotMade) and unit.made.again:
                    self._remove(unit)
                    continue
                self._waiting.remove(command)
                if unit is not None:
                    self._finished.append((_key(command), unit))
                self._changed.notify_all()

    def _made(self, command: CompileCommand) -> _Unit | None:
        unit = _Unit(_compiler_stamp(command))
        known = self._units.get(_key(command))
        try:
            divided = cut(command.file.read_bytes())
            unit.preamble = divided.preamble if divided is not None else b""
            if _is_settled(known, unit):
                return None
            rewriting = rewriting_of(command, identify(command.arguments, command.directory))
            if isinstance(rewriting, str):
                unit.made = NotMade(rewriting, lasting=True)
                return unit
            unit.place = self._directory / str(next(self._numbers))
            unit.place.mkdir(mode=0o700, parents=True)
            unit.made = make(rewriting, unit.place, self._background, self._environment)
        except (OSError, ValueError, PatcherError) as error:
            unit.made = NotMade(str(error), lasting=False)
        if isinstance(unit.made, Made):
            self._keep(unit, unit.made.object, unit.made.proven_with)
        return unit

    def _keep(self, unit: _Unit, kept: Path, divided: Cut) -> None:
        before = unit.object
        unit.text = None if includes_more(divided.rest) else bare(divided.rest)
        unit.object = kept
        if before is not None and before != kept:
            before.unlink(missing_ok=True)

    def _replace(self, key: _Key, unit: _Unit) -> None:
        """Take a unit in place of what was known, and let go of the ones that were not used for longest."""
        self._drop(key)
        self._units[key] = unit
        sizes = {key: known.made.size for key, known in self._units.items() if isinstance(known.made, Made)}
        limit = min(_LIMIT, (shutil.disk_usage(self._directory.parent).free + sum(sizes.values())) // _SHARE)
        for oldest in list(sizes)[:-1]:
            if sum(sizes.values()) <= limit:
                return
            self._drop(oldest)
            del sizes[oldest]

    def _drop(self, key: _Key) -> None:
        before = self._units.pop(key, None)
        if before is not None:
            self._remove(before)

    def _remove(self, unit: _Unit) -> None:
        if unit.place is not None:
            shutil.rmtree(unit.place, ignore_errors=True)


def _key(command: CompileCommand) -> _Key:
    return command.directory, command.arguments, command.file


def _compiler_stamp(command: CompileCommand) -> Stamp | None:
    return program_stamp(command.arguments, command.directory)


def _is_settled(known: _Unit | None, unit: _Unit) -> bool:
    """Tell whether it is known for good that a unit gets no preamble."""
    if known is None or not isinstance(known.made, NotMade) or not known.made.lasting:
        return False
    return known.preamble == unit.preamble and known.compiler == unit.compiler
