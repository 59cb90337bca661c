"""HOOKS: functions of the program that are told of a change, before it and after it.

Decides which functions they are, what they are told and what becomes of a change when they fail. They are called at a
safe point, while the other threads run (`loader`); when that is in the course of a change is the session's business.

The layouts are those of `header/patcher.h`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import IntEnum

from patcher.errors import AttachDenied, PatcherError, TargetGone, UnsafeChange
from patcher.image import Image, LoadedModule
from patcher.live import base_name
from patcher.loader import Caller, workspace
from patcher.part import HOOKS
from patcher.patch.journal import GenerationRecord, Journal
from patcher.patch.ledger import Ledger
from patcher.target import FunctionCall

BEFORE, AFTER = HOOKS
_EVENT = struct.Struct("<IIQQQQQQ")
_NAME = struct.Struct("<QQQ")


class Action(IntEnum):
    """What happens to the program."""

    APPLY = 1
    REVERT = 2
    CANCEL = 3  # a change that was announced was not made


@dataclass(frozen=True, slots=True)
class Named:
    """A function or variable that a change is about, its file, and what becomes of it."""

    name: str
    file: str
    outcome: str


@dataclass(frozen=True, slots=True)
class Happening:
    """What a hook is told."""

    action: Action
    generation: int
    previous: int
    functions: tuple[Named, ...] = ()
    variables: tuple[Named, ...] = ()

    def encoded(self, start: int) -> bytes:
        """Return it as it stands in the program's memory from `start` on."""
        names = (*self.functions, *self.variables)
        first = start + _EVENT.size
        texts = first + _NAME.size * len(names)
        places, pool = [], bytearray()
        for text in (t for n in names for t in (n.name, n.file, n.outcome)):
            places.append(texts + len(pool))
            pool += text.encode("utf-8", "surrogateescape") + b"\0"
        rows = b"".join(_NAME.pack(*places[i : i + 3]) for i in range(0, len(places), 3))
        counts = (len(self.functions), first, len(self.variables), first + _NAME.size * len(self.functions))
        event = _EVENT.pack(_EVENT.size, self.action, self.generation, self.previous, *counts)
        return event + rows + bytes(pool)


def applying(record: GenerationRecord, variables: tuple[Named, ...]) -> Happening:
    """Return what hooks are told of a new generation."""
    placed = {p.address: p for p in record.placed}
    outcomes = {(name, module): outcome for name, module, outcome in record.statuses}
    bodies = [placed[body] for _, _, body in record.bodies if body in placed]
    functions = [Named(p.name, _file(p.unit), outcomes.get((p.name, p.module), "added")) for p in bodies]
    # Reports name the file that was given, which may be an object.
    files = {base_name(p.name): _file(p.unit) for p in record.placed}
    known = tuple(replace(v, file=files.get(v.name, v.file)) for v in variables)
    return Happening(Action.APPLY, record.number, record.parent, tuple(functions), known)


def reverting(journal: Journal, live: int, number: int) -> Happening:
    """Return what hooks are told when the process goes from one recorded generation to another."""
    before, after = journal.bodies_at(live), journal.bodies_at(number)
    changed = (r for r in journal.redirects if before.get((r.arena, r.index)) != after.get((r.arena, r.index)))
    functions = tuple(Named(r.name, _file(r.unit), "reverted") for r in changed)
    return Happening(Action.REVERT, number, live, functions)


def _file(unit: str) -> str:
    return unit.partition("#")[0]


class Hooks:
    """The hooks of one process. `limit`: how long each may take, in seconds."""

    def __init__(self, image: Image, ledger: Ledger, limit: float) -> None:
        self._image = image
        self._ledger = ledger
        self._caller = Caller(image, timeout=limit)

    @contextmanager
    def around(self, happening: Happening, warn: list[str]) -> Iterator[None]:
        """Call the hooks before and after the block, in which the change is made; add to `warn` what went wrong then.

        Raises `UnsafeChange` before the block when the first hook did not run to its end.
        """
        told = self._before(happening)
        try:
            yield
        except TargetGone:
            raise
        except BaseException as error:
            if told and self._is_live(happening.generation):
                with suppress(PatcherError):
                    self._call(AFTER, happening.generation, happening)
            elif told:
                self._call_off(happening, error)
            raise
        try:
            self._call(AFTER, happening.generation, happening)
        except (TargetGone, AttachDenied):
            raise
        except PatcherError as error:
            warn.append(f"`{AFTER}` was not run to its end, after the change: {error.message}")

    def _is_live(self, number: int) -> bool:
        """Tell whether a change was made after all: an interruption may come when that is done."""
        with suppress(PatcherError):
            self._ledger.refresh()
        return self._ledger.generation == number

    def _call_off(self, happening: Happening, error: BaseException) -> None:
        """Tell the program that a change which was announced was not made; add to `error` if it cannot be told."""
        live = replace(happening, action=Action.CANCEL, generation=happening.previous)
        try:
            self._call(AFTER, happening.previous, live)
        except PatcherError as failure:
            if isinstance(error, PatcherError):
                untold = f"`{BEFORE}` was called, and `{AFTER}` could not be, to call it off: {failure.message}"
                error.hint = f"{error.hint}; {untold}" if error.hint else untold

    def _before(self, happening: Happening) -> bool:
        try:
            return self._call(BEFORE, happening.previous, happening)
        except (TargetGone, AttachDenied):
            raise
        except PatcherError as error:
            raise UnsafeChange(
                f"`{BEFORE}` was not run to its end, and so nothing was changed: {error.message}",
                error.hint,
                code=error.code,
            ) from None

    def _call(self, name: str, live: int, happening: Happening) -> bool:
        """Call a hook of the generation that is live, and tell whether there is one."""
        address = self.find(name, live)
        if address is None:
            return False
        size = len(happening.encoded(0))
        with workspace(self._image.target, room=size) as memory:
            self._image.target.memory.write(memory.room, happening.encoded(memory.room))
            self._caller.call([FunctionCall(address, (memory.room,))], memory)
        return True

    def find(self, name: str, live: int) -> int | None:
        """Return a hook's address for life, None when the process has none in that generation.

        The executable is asked first. Raises `UnsafeChange` when one module has several.
        """
        for module in self._image.modules:
            found = self._of_module(module, name, live)
            if len(found) > 1:
                raise UnsafeChange(
                    f"{module.name} has {len(found)} functions `{name}`, at "
                    f"{', '.join(f'{address:#x}' for address in sorted(found))}",
                    "give all but one of them another name",
                    code="ambiguous-symbol",
                )
            if found:
                return found.pop()
        return None

    def _of_module(self, module: LoadedModule, name: str, live: int) -> set[int]:
        symbols = [s for s in module.module.symbols.named(name) if s.function and s.value]
        shared = [s for s in symbols if not s.local] or symbols
        found = {s.value + module.bias for s in shared}
        found |= {s.value + module.bias for s in module.module.exports.get(name, ()) if s.defined}
        here = self._ledger.journal.bodies_at(live)
        born = (r for r in self._ledger.journal.redirects if r.born and name in r.names and r.module == module.path)
        return found | {r.original for r in born if (r.arena, r.index) in here}
