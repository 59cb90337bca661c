"""From saved files to what they change: compile, match, and refuse what cannot be proven.

A unit is compiled with its own flags and matched against the process. Its verdicts are then sharpened: functions
that differ by line numbers only are told apart by a second compile, a unit most of which is not what runs is
refused unless its earlier text was, and types that changed their layout are refused by name (`agreement`).

Decides which functions are new and whether they may be; linking them is `relink`'s business.
"""

from __future__ import annotations

import enum
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from weakref import WeakKeyDictionary

from patcher.agreement import Agreement
from patcher.blocks import Blocks, Kind
from patcher.build import (
    ASKING,
    INDIRECT,
    LARGE,
    LINE_SHIFT,
    PLAIN,
    SHIFTED,
    Commands,
    CompileCommand,
    Compiler,
    Dependencies,
    Probes,
    Variant,
    is_unit,
    likely_units,
)
from patcher.data.compiled import compiled_from
from patcher.elf import ObjectFile, read_object, read_objects
from patcher.errors import NoCompileCommand, ObjectError, PatcherError, UnsafeChange
from patcher.image import Image, LoadedModule
from patcher.lines import LineNumbers, line_fields, moves_of_lines
from patcher.live import LiveUnit
from patcher.match import Cause, Delta, FunctionMatch, Status, fingerprint, match, past_lines
from patcher.options import Options
from patcher.origin import MADE_OF_ALL, born_unit, find_unit
from patcher.part import Part
from patcher.patch.ledger import Ledger
from patcher.report import Work, silently
from patcher.stamps import NONE as NO_STAMPS
from patcher.stamps import Stamps, stamps_between
from patcher.supply import Supplies
from patcher.texts import Texts

_DRIFT_MINIMUM = 4  # functions that must differ before a unit is thought not to be what runs

_MANY_UNITS = 8  # that are worth a word on how far their compile has come
_WARMED = 4  # units that are made ready before they are saved

_FARTHER = {PLAIN: INDIRECT, INDIRECT: LARGE}

Cancelled = Callable[[], bool]
Progress = Callable[[int, int], None]


class Standing(enum.Enum):
    """What it means that a unit is no part of the process: another program of the same tree has a `main` as well."""

    GIVEN = "given"  # it is refused
    AMONG_OTHERS = "among others"  # it was saved with others, which go without it
    TOUCHED = "touched"  # it only includes what was saved: nobody expects it to be here


_NONE: Mapping[Path, Standing] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Source:
    """An object to apply, the file it stands for, and the command that made it (None: it was given as it is)."""

    object: ObjectFile
    file: Path
    command: CompileCommand | None
    stamps: Stamps = NO_STAMPS
    standing: Standing = Standing.GIVEN

    @property
    def name(self) -> str:
        """What it is known by from one save to the next: an archive has several."""
        return self.object.name if self.command is None else str(self.file)


@dataclass(frozen=True, slots=True)
class Changes:
    """What some files change: the units with new code, those without, and what the process knows nothing of."""

    parts: tuple[Part, ...]
    idle: tuple[Part, ...]
    absent: tuple[str, ...]

    @property
    def line_only(self) -> tuple[str, ...]:
        return tuple(f.name for p in (*self.parts, *self.idle) for f in p.delta.with_status(Status.LINE_ONLY))

    @property
    def uncalled(self) -> tuple[str, ...]:
        """New functions that nothing calls yet."""
        return tuple(b.name for p in self.idle for b in p.added()) + self.absent


class Units:
    """The units of one process. `say` gets sentences for the user; `working` returns work that is told of."""

    def __init__(
        self,
        image: Image,
        ledger: Ledger,
        options: Options,
        texts: Texts,
        dependencies: Dependencies,
        say: Callable[[str], None],
        working: Callable[[str], Work] = silently,
    ) -> None:
        self._working = working
        self.image = image
        self.ledger = ledger
        self.options = options
        self.texts = texts
        self.dependencies = dependencies
        self._say = say
        self.compiler = Compiler(colour=options.colour, progress=self._tell_progress)
        self._progress: Progress | None = None  # of the compile at hand
        self.commands = commands_for(image, options)
        self.supplies = Supplies(image, ledger, options, self.commands, self.compiler)
        self.build_seconds = 0.0  # spent in compilers since it was last set to 0
        self._proven: set[tuple[Path, tuple[str, ...]]] = set()
        self._needed_reach: dict[tuple[Path, tuple[str, ...]], Variant] = {}
        self._reach: WeakKeyDictionary[Blocks, Variant] = WeakKeyDictionary()
        self._line_only: dict[tuple[Path, str], object] = {}
        self._accepted: set[Path] = set()  # units that turned out to be those of the process
        self._names: tuple[object, Counter[str]] | None = None  # how many known units have a name, and when that was
        self._waiting: dict[str, Source] = {}
        self._command_of: dict[ObjectFile, CompileCommand] = {}
        self.agreement = Agreement(image, ledger, options.allowed_layouts, self._probed, say)
        self.probes = Probes(self.compiler)
        self._listings: WeakKeyDictionary[ObjectFile, str] = WeakKeyDictionary()

    def warm(self, paths: Sequence[Path]) -> None:
        """Have those units made ready in the background, at and below some paths, that will be saved most likely."""
        commands = []
        for file in likely_units(paths, _WARMED):
            with suppress(NoCompileCommand):  # it is told of when the file is saved
                commands.append(self.commands.find(file))
        self.compiler.learn(commands)

    def close(self) -> None:
        """Remove what was compiled."""
        self.compiler.close()

    # --- objects ----------------------------------------------------------------------------------------------

    @contextmanager
    def building(self) -> Iterator[None]:
        """Count the time of a block as building: a unit may have to be compiled more than once."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.build_seconds += time.perf_counter() - began

    @contextmanager
    def _told_of(self, units: int) -> Iterator[None]:
        """Tell how far the compile of a block has come, where that is of many units."""
        if units < _MANY_UNITS:
            yield
            return
        with self._working(f"compiling {units} units") as work:
            self._progress = work.update
            try:
                yield
            finally:
                self._progress = None

    def _tell_progress(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(done, total)

    def sources(
        self, files: Sequence[Path], cancelled: Cancelled, standings: Mapping[Path, Standing] = _NONE
    ) -> list[Source]:
        """Read objects and archives, and compile source files in parallel; `standings` are those that are not GIVEN.

        Raises `BuildError` with the compiler's words, `BuildCancelled`, `NoCompileCommand`, `ObjectError`.
        """
        texts = [f for f in files if is_unit(f)]
        found = [Source(o, f, None) for f in files if not is_unit(f) for o in read_objects(f)]
        for text in texts:
            _check_readable(text)
        commands = self.commands.find_each([f.resolve() for f in texts])
        if commands:
            began = time.time()
            with self.building(), self._told_of(len(commands)):
                compiled = self.compiler.compile_all(commands, cancelled=cancelled)
            for unit, command in zip(compiled, commands, strict=True):
                stamps = stamps_between(began, time.time(), command.file.stat().st_mtime)
                standing = standings.get(command.file, Standing.GIVEN)
                found += [Source(o, command.file, command, stamps, standing) for o in read_objects(unit.object)]
                self._listings.update((s.object, unit.listing) for s in found[-1:])
                self.dependencies.learn_listing(command.file, unit.listing, command.directory)
                self.compiler.discard(unit)
        return found

    def _compiled(self, command: CompileCommand, **how: object) -> ObjectFile:
        with self.building():
            unit = self.compiler.compile(command, **how)  # type: ignore[arg-type]
        try:
            return read_object(unit.object)
        finally:
            self.compiler.discard(unit)

    def _probed(self, part: Part, names: tuple[str, ...]) -> tuple[bytes, frozenset[int]] | None:
        """Return an object whose debug information describes some names that a unit's own does not, if it can be had.

        With the places of the names that it has not.
        """
        object_ = part.delta.blocks.object
        command = self._command_of.get(object_) or self.supplies.build.command_of.get(object_)
        if command is None:
            return None
        with self.building():
            found = self.probes.ask(command, names, self._listings.get(object_, ""))
        return (found.object, found.missing) if found is not None else None

    def with_farther_reach(self, part: Part) -> Part | None:
        """Compile a unit that cannot reach some data again, so that it reaches farther, and remember that it must.

        First it goes to external data through cells; where that is not enough, it goes everywhere by full addresses.
        Returns None when that was done already, or nothing says how it is compiled.
        """
        known = self._reach.get(part.blocks, PLAIN)
        reach = _FARTHER.get(known & ~ASKING)
        return self._remade(part, reach | known & ASKING) if reach is not None else None

    def asking_for_thread_locals(self, part: Part) -> Part | None:
        """Compile a unit again so that its code asks where its thread-locals are, and remember that it must.

        Returns None when that was done already, or nothing says how it is compiled.
        """
        known = self._reach.get(part.blocks, PLAIN)
        return self._remade(part, known | ASKING) if not known & ASKING else None

    def _remade(self, part: Part, reach: Variant) -> Part | None:
        command = self._command_of.get(part.delta.blocks.object)
        if command is None:
            return None
        self._needed_reach[command.file, command.arguments] = reach
        return self._judged_anew(part, command, reach)

    def _with_needed_reach(self, part: Part) -> Part:
        """Compile a unit once more that is known to need it, before it is linked in vain.

        What earlier patches brought of it was compiled in that way too, and is compared as such.
        """
        command = self._command_of.get(part.delta.blocks.object)
        reach = self._needed_reach.get((command.file, command.arguments)) if command is not None else None
        if command is None or reach is None or not part.wanted():
            return part
        return self._judged_anew(part, command, reach)

    def _judged_anew(self, part: Part, command: CompileCommand, reach: Variant) -> Part:
        made = self._compiled_to_reach(part, command, reach)
        there = {f.name for f in match(made.blocks, part.unit).with_status(Status.SAME)}
        same = [f for f in part.delta.with_status(Status.CHANGED) if f.name in there]
        return made.judged(part.delta.taken_as(Status.SAME, same))

    def _compiled_to_reach(self, part: Part, command: CompileCommand, reach: Variant) -> Part:
        blocks = Blocks(self._compiled(command, variant=reach))
        self._reach[blocks] = reach
        return part.compiled_otherwise(blocks)

    def supply_again(self, source: ObjectFile | None, make: Callable[[Part], Part | None]) -> bool:
        """Have a unit that was brought in, and cannot reach something, made again; tell whether that was possible."""
        part = self.supplies.part_of(source) if source is not None else None
        command = self.supplies.build.command_of.get(part.delta.blocks.object) if part is not None else None
        if part is None or command is None:
            return False
        self._command_of[part.delta.blocks.object] = command
        made = make(part)
        if made is not None:
            self.supplies.replace(part, made)
        return made is not None

    # --- verdicts ---------------------------------------------------------------------------------------------

    def changes(self, sources: Sequence[Source]) -> Changes:
        """Match objects against the process, and compare types. Raises `UnsafeChange` for what cannot be proven."""
        found = self.matched(sources)
        self.agreement.check(found.parts, found.idle)
        return found

    def matched(self, sources: Sequence[Source]) -> Changes:
        """Do what `changes` does, save that types are not compared."""
        self._command_of = {s.object: s.command for s in sources if s.command is not None}
        _check_code(sources)
        self.agreement.begin()
        view = self.ledger.view()
        parts: list[Part] = []
        absent: list[str] = []
        foreign: list[Source] = []
        known = frozenset(self._waiting)
        together = Counter(file.name for file in {s.file for s in sources})
        for source in sources:
            self._waiting.pop(source.name, None)  # what an earlier text of it had is no more
        for source in sources:
            blocks = Blocks(source.object)
            unit = find_unit(self.image, view, blocks)
            if unit is None and source.standing is not Standing.GIVEN and source.name not in known:
                continue  # it is another program's
            if unit is None:
                self._waiting[source.name] = source
                data = blocks.data_blocks() if source.command is None and not blocks.functions else ()
                absent += [b.name for b in (*blocks.functions, *data)]
                continue
            delta = self._match(source, blocks, unit)
            if self._is_foreign(delta) or not self._is_the_one(source, together):
                if source.standing is Standing.GIVEN:
                    raise self._foreign(source, delta)
                foreign += [source] if source.standing is Standing.AMONG_OTHERS else []
                continue
            self._check_drift(source, delta)
            parts.append(Part(delta, str(source.file), every=self.options.every_function))
            if parts[-1].added() or self._exported_now(parts[-1]):
                self._waiting[source.name] = source
        if foreign:
            names = ", ".join(str(s.file) for s in foreign)
            self._say(f"left out, being no part of what process {self.image.target.pid} runs: {names}")
        if absent and not parts:
            self._refuse_absent(sources, absent)
        parts = [self._with_needed_reach(p) for p in parts]
        changed = tuple(p for p in parts if p.wanted())
        return Changes(changed, tuple(p for p in parts if not p.wanted()), tuple(absent))

    def waiting(self, present: Changes) -> list[Part]:
        """Return the units seen earlier whose new functions nobody called so far."""
        known = {p.delta.blocks.object for p in (*present.parts, *present.idle)}
        view = self.ledger.view()
        parts = []
        for name, source in list(self._waiting.items()):
            if source.object not in known:
                blocks = Blocks(source.object)
                unit = find_unit(self.image, view, blocks)
                unit = unit or born_unit(self.image, view, blocks, self.image.executable)
                parts.append(Part(match(blocks, unit), str(source.file)))
                if not parts[-1].added() and not self._exported_now(parts[-1]):
                    del self._waiting[name]  # all of it is in the process by now
        return parts

    def _exported_now(self, part: Part) -> bool:
        """Tell whether a unit has a variable for others that the process knows as its static only, or not at all."""
        data = (b for b in part.blocks.data_blocks() if b.kind is Kind.DATA)
        names = (s.name for b in data for s in b.symbols if not s.local)
        return any(self.image.resolve(name, part.module, weak=True) is None for name in names)

    def _refuse_absent(self, sources: Sequence[Source], absent: Sequence[str]) -> None:
        module = self.image.executable
        if any(self.texts.of(s.file) and self._is_linked_as_one(s, module) for s in sources):
            raise UnsafeChange(
                f"nothing of {', '.join(str(s.file) for s in sources)} is in process {self.image.target.pid} under its "
                f"name ({', '.join(list(absent)[:3])}): {module.name} was linked with -flto, which makes all units one",
                "build it without -flto while you work on it",
                code="linked-as-one",
            )
        if not module.module.symbols_from:
            raise UnsafeChange(
                f"{module.path} has no symbol table (it was stripped), so nothing in it can be found by name",
                "install its debug symbols, or run a program that was not stripped",
                code="stripped",
            )
        if any(source.command is None for source in sources):
            raise UnsafeChange(
                f"nothing of {', '.join(str(s.file) for s in sources)} is in process "
                f"{self.image.target.pid} ({', '.join(list(absent)[:3])})",
                "give an object that the program was linked with",
                code="not-in-process",
            )

    def _match(self, source: Source, blocks: Blocks, unit: LiveUnit) -> Delta:
        delta = match(blocks, unit, stamps=source.stamps)
        suspects = [f for f in delta.with_status(Status.CHANGED) if f.cause in (Cause.CONSTANT, Cause.DEPENDENT)]
        if not suspects or source.command is None:
            return delta
        if all(self._line_only.get((source.file, f.name)) == fingerprint(blocks, f.block) for f in suspects):
            return delta.taken_as(Status.LINE_ONLY, suspects)
        new, texts = source.file.read_bytes(), self.texts.of(source.file)
        if all(text.count(b"\n") == new.count(b"\n") for text in texts):
            return delta  # no line has moved, or none can be told to have
        shifted = self._compiled(source.command, variant=SHIFTED)
        numbers = LineNumbers(line_fields(source.object, shifted, LINE_SHIFT), moves_of_lines(new, texts))
        delta = past_lines(delta, numbers, source.stamps) if numbers.fields else delta
        self._remember_line_only(source, delta.with_status(Status.LINE_ONLY), blocks)
        return delta

    def _remember_line_only(self, source: Source, functions: Sequence[FunctionMatch], blocks: Blocks) -> None:
        # Proven once for exactly this code; while it stays the same, it need not be compiled twice again.
        for function in functions:
            self._line_only[source.file, function.name] = fingerprint(blocks, function.block)

    def _is_foreign(self, delta: Delta) -> bool:
        """Tell whether a unit shares names with a module, but is not known to be part of it.

        Another program of the same tree has a `main` as well.
        """
        module = delta.unit.module
        known = self.options.force or delta.unit.born or delta.unit.groups
        if known or not module.module.symbols.has_files:
            return False
        return not delta.with_status(Status.SAME, Status.LINE_ONLY) and bool(delta.with_status(Status.CHANGED))

    def _is_linked_as_one(self, source: Source, module: LoadedModule) -> bool:
        """Tell whether a unit was linked with -flto: the module does not know its file's name."""
        lost = not MADE_OF_ALL.isdisjoint(module.module.symbols.file_counts)
        return lost or self.commands.compiled_with(source.file, "-flto")

    def _is_the_one(self, source: Source, together: Counter[str]) -> bool:
        """Tell whether a unit is what runs, and not another file of its name, where there are several.

        A module knows files by their names alone. What was not there at the start cannot be told.
        """
        command = source.command
        if command is None or self.options.force or source.file in self._accepted:
            return True
        if together[source.file.name] > 1 or self._has_namesakes(source.file):
            texts = self.texts.of(source.file)
            if source.standing is Standing.TOUCHED and not texts:
                return False
            if texts and not self._fits(texts[0], command):
                return False
        self._accepted.add(source.file)
        return True

    def _has_namesakes(self, file: Path) -> bool:
        stamp = self.commands.stamp()
        if self._names is None or self._names[0] != stamp:
            files = {os.path.normpath(command.file) for command in self.commands.known()}
            self._names = stamp, Counter(map(os.path.basename, files))
        return self._names[1][file.name] > 1

    def _foreign(self, source: Source, delta: Delta) -> UnsafeChange:
        names = ", ".join(f"`{f.name}`" for f in delta.with_status(Status.CHANGED)[:3])
        return UnsafeChange(
            f"{source.file} is not among the files that {delta.unit.module.name} was built from, and what it has of "
            f"the same name ({names}) is not what process {self.image.target.pid} runs",
            "if the file was renamed since, restart the program; or apply it all the same with --force",
            code="mismatch",
        )

    def _check_drift(self, source: Source, delta: Delta) -> None:
        """Refuse a unit most of which is not what runs, unless the text as it was at the start is."""
        changed = delta.with_status(Status.CHANGED)
        known = len(delta.functions) - len(delta.with_status(Status.ADDED))
        # What fitted once was built with this very command: from then on everything may change.
        proof = (source.file, source.command.arguments) if source.command is not None else None
        few = len(changed) < _DRIFT_MINIMUM or 2 * len(changed) <= known
        if self.options.force or few or proof in self._proven:
            if proof is not None and delta.with_status(Status.SAME):
                self._proven.add(proof)
            return
        texts = self.texts.of(source.file)
        if texts and proof is not None and source.command is not None and self._fits(texts[0], source.command):
            self._proven.add(proof)
            return
        if source.command is None and self._is_recorded(source.object):
            return
        examples = "; ".join(f"{f.name}: {f.reason}" for f in changed[:3])
        raise UnsafeChange(
            f"{len(changed)} of {known} functions of {source.file} are not what process {self.image.target.pid} runs "
            f"({examples})",
            "it was built from other sources or with other flags: give the commands it was built with "
            "(--compile-commands), or apply it all the same with --force",
            code="mismatch",
        )

    def _is_recorded(self, source: ObjectFile) -> bool:
        """Tell whether the process has units of the same files, compiled in the same way, as an object says it has.

        Not where the compiler does not record its switches (clang). An object that was given has no earlier text to be
        compiled: its headers may be others since.
        """
        made = compiled_from(bytes(source.contents), source.name)
        told = bool(made) and all(" -" in producer for _, producer in made)
        return told and all(self.commands.recorded(Path(file), producer) for file, producer in made)

    def _headers_at_first(self, unit: Path) -> dict[Path, bytes]:
        """Return the texts that a unit's headers had at the start, where any of them is another now."""
        known = {f: self.texts.of(f) for f in self.dependencies.of(unit) if f != unit}
        first = {file: texts[0] for file, texts in known.items() if texts}
        return first if any(_differs(file, text) for file, text in first.items()) else {}

    def _fits(self, text: bytes, command: CompileCommand) -> bool:
        """Tell whether most of a unit, compiled from another text, is what runs."""
        try:
            blocks = Blocks(self._compiled(command, text=text, headers=self._headers_at_first(command.file)))
        except PatcherError:
            return False
        live = find_unit(self.image, self.ledger.view(), blocks)
        if live is None:
            return False
        delta = match(blocks, live)
        return 2 * len(delta.with_status(Status.CHANGED)) <= len(delta.functions)


def _differs(file: Path, text: bytes) -> bool:
    try:
        return file.read_bytes() != text
    except OSError:
        return True


def commands_for(image: Image, options: Options) -> Commands:
    """Return where the commands of a process's units are found."""
    known = [m for m in image.modules if m.module.symbols_from]
    return Commands(
        compile_commands=options.compile_commands,
        watched=options.watched,
        programs=[m.file for m in known],
        program_names=[Path(m.path) for m in known],
    )


def _check_code(sources: Sequence[Source]) -> None:
    given = [s for s in sources if s.command is None]
    if given and not any(_has_something(s.object) for s in given):
        names = ", ".join(dict.fromkeys(str(s.file) for s in given))
        raise ObjectError(
            f"{names}: there is neither code nor data in it", "give an object with something that the program has"
        )


def _has_something(source: ObjectFile) -> bool:
    blocks = Blocks(source)
    return bool(blocks.functions) or any(True for _ in blocks.data_blocks())


def _check_readable(path: Path) -> None:
    if path.is_dir():
        raise ObjectError(f"{path}: is a directory", "give an object, an archive or a source file")
    if not path.exists():
        raise ObjectError(f"{path}: no such file or directory", "check the path")
