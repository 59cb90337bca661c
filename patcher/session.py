"""The story of one save: build, match, link, commit, report.

    files -> objects -> deltas -> linked generation -> flip -> event

A session belongs to one process and one thread (the kernel lets only the thread that seized a process trace
it). It keeps nothing that it could not read again from the process: journal and slots are read anew before
every transaction, so several sessions, and one that died, get along.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING

from patcher.errors import BuildError, NoCompileCommand, ObjectError, PatcherError, TargetError, UnsafeChange
from patcher.report import (
    Applied,
    BuildFailed,
    Event,
    Function,
    Note,
    Ready,
    Refused,
    Reporter,
    Reverted,
    Saved,
    Timings,
    Unchanged,
)
from patcher.target import Target

if TYPE_CHECKING:
    from patcher.blocks import Block, Blocks
    from patcher.build import BuildCommand, Commands, CompileCommand, Compiler
    from patcher.dwarf import Layouts
    from patcher.elf import ObjectFile
    from patcher.image import Image, LoadedModule
    from patcher.lines import Fields
    from patcher.live import LiveUnit
    from patcher.match import Delta
    from patcher.patch.ledger import Ledger
    from patcher.relink import Linked, Part

_DRIFT_MINIMUM = 4  # functions that must differ before a unit is thought not to be what runs
_BASELINE_LIMIT = 256 << 20

_OBJECTS = (".o", ".a", ".obj", ".lo")


@dataclass(frozen=True, slots=True)
class Options:
    """What a user may choose for a session."""

    compile_commands: Path | None = None
    watched: tuple[Path, ...] = ()
    build: str = ""
    force: bool = False
    dry_run: bool = False
    colour: bool = False
    allowed_layouts: tuple[str, ...] = ()  # types whose layout may change, on the user's responsibility


@dataclass(frozen=True, slots=True)
class Generation:
    """The outcome of `apply`: the live generation, and what it changed (nothing, when the process had the code)."""

    number: int
    functions: tuple[Function, ...]
    active: tuple[tuple[int, str], ...]
    timings: Timings
    line_only: tuple[str, ...] = ()
    new_variables: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()


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
class Status:
    """What `status` tells of a process."""

    pid: int
    program: str
    generation: int
    recorded: tuple[int, ...]
    functions: tuple[PatchedFunction, ...]
    arenas: tuple[ArenaUse, ...]


@dataclass(frozen=True, slots=True)
class _Source:
    """An object to apply, the file it stands for, and the command that made it (None: it was given as it is)."""

    object: ObjectFile
    file: Path
    command: CompileCommand | None


class Session:
    """Patches one process. Use as a context manager; leaving it leaves the process running."""

    def __init__(self, target: Target, options: Options | None = None, reporter: Reporter | None = None) -> None:
        self.target = target
        self.options = options or Options()
        self._reporter = reporter
        self._image: Image | None = None
        self._ledger: Ledger | None = None
        self._compiler: Compiler | None = None
        self._commands: Commands | None = None
        self._baseline: dict[Path, bytes] = {}
        self._waiting: dict[Path, _Source] = {}
        self._indirect: set[Path] = set()
        self._line_only: dict[tuple[Path, str], object] = {}
        self._pending: set[Path] = set()
        self._proven: set[tuple[Path, tuple[str, ...]]] = set()
        self._build_seconds = 0.0
        self._layouts: dict[str, Layouts | None] = {}
        self._unchecked: set[str] = set()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the process, which runs on as it is."""
        if self._compiler is not None:
            self._compiler.close()
            self._compiler = None
        self.target.close()

    # --- what it knows ----------------------------------------------------------------------------------------

    @property
    def image(self) -> Image:
        if self._image is None:
            from patcher.image import Image

            self._image = Image(self.target)
        return self._image

    @property
    def ledger(self) -> Ledger:
        if self._ledger is None:
            from patcher.patch.ledger import Ledger

            self._ledger = Ledger(self.target)
        return self._ledger

    @property
    def compiler(self) -> Compiler:
        if self._compiler is None:
            from patcher.build import Compiler

            self._compiler = Compiler(colour=self.options.colour)
        return self._compiler

    @property
    def commands(self) -> Commands:
        if self._commands is None:
            from patcher.build import Commands

            self._commands = Commands(
                compile_commands=self.options.compile_commands,
                watched=self.options.watched,
                programs=[m.file for m in self.image.modules if m.module.symbols_from],
                program_names=[Path(m.path) for m in self.image.modules if m.module.symbols_from],
            )
        return self._commands

    def emit(self, event: Event) -> None:
        if self._reporter is not None:
            self._reporter.emit(event)

    # --- apply ------------------------------------------------------------------------------------------------

    def apply(self, *files: str | Path) -> Generation:
        """Make the code of objects, archives or source files live, all of them as one generation.

        Raises `BuildError` with the compiler's words, `PatcherError` and its kin with what was refused and why;
        the process is then as it was.
        """
        return self._apply([Path(f) for f in files], time.perf_counter(), 0.0)

    def _apply(self, files: Sequence[Path], began: float, detect: float, cancelled: _Cancelled = None) -> Generation:
        self.target.check_alive()
        self._build_seconds = 0.0
        started = time.perf_counter()
        sources = self._sources(files, cancelled)
        outcome = self._relink(sources)
        now = time.perf_counter()
        build = self._build_seconds * 1e3
        timings = Timings(
            detect=detect,
            build=build,
            link=(now - started) * 1e3 - build - outcome.timings.stop,
            stop=outcome.timings.stop,
            total=detect + (now - began) * 1e3,
        )
        return Generation(
            outcome.number,
            outcome.functions,
            outcome.active,
            timings,
            outcome.line_only,
            outcome.new_variables,
            outcome.waiting,
        )

    @contextmanager
    def _building(self) -> Iterator[None]:
        """Count the time of a block as building: a unit may have to be compiled more than once."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._build_seconds += time.perf_counter() - began

    def _sources(self, files: Sequence[Path], cancelled: _Cancelled) -> list[_Source]:
        from patcher.elf import read_objects

        objects = [f for f in files if not _is_source(f)]
        texts = [f for f in files if _is_source(f)]
        found = [_Source(o, f, None) for f in objects for o in read_objects(f)]
        if texts:
            for text in texts:
                _check_readable(text)
            commands = [self.commands.find(f.resolve()) for f in texts]
            with self._building():
                compiled = self.compiler.compile_all(commands, cancelled=cancelled or _never)
            for unit, command in zip(compiled, commands, strict=True):
                found += [_Source(o, command.file, command) for o in read_objects(unit.object)]
                self.compiler.discard(unit)
        return found

    def _relink(self, sources: Sequence[_Source]) -> Generation:
        from patcher.match import Status as Verdict

        self.image.refresh()
        with self.ledger.transaction():
            self.ledger.refresh()
            parts, absent = self._parts(sources)
            line_only = tuple(f.name for p in parts for f in p.delta.with_status(Verdict.LINE_ONLY))
            active_parts = [p for p in parts if p.wanted()]
            idle = [p for p in parts if not p.wanted()]
            if not active_parts:
                waiting = tuple(b.name for p in idle for b in p.added()) + absent
                return Generation(self.ledger.generation, (), (), Timings(), line_only, (), waiting)
            return self._commit(active_parts, idle, line_only)

    def _commit(self, parts: list[Part], idle: list[Part], line_only: tuple[str, ...]) -> Generation:
        from patcher.patch.active import find_active

        self._check_layouts(parts)
        waiting = idle + self._waiting_parts({p.source for p in (*parts, *idle)})
        try:
            linked = self._link(parts, waiting)
            functions = tuple(Function(*status) for status in linked.commit.record.statuses)
            number = linked.commit.record.number
            if self.options.dry_run:
                return Generation(number, functions, (), Timings(), line_only, linked.new_variables)
            self.ledger.realise()
            result = self.ledger.commit(linked.commit)
        finally:
            self.ledger.forget_plans()
        bodies = [(r.name, r.extents) for r in linked.replaced]
        active = find_active(self.target, bodies, result.threads)
        return Generation(
            number,
            functions,
            tuple((a.thread, a.function) for a in active),
            Timings(stop=result.stop_ns / 1e6),
            line_only,
            linked.new_variables,
        )

    def _link(self, parts: list[Part], waiting: list[Part]) -> Linked:
        from patcher.link.place import FarData
        from patcher.link.plan import DynamicThreadLocal
        from patcher.relink import NeedsArena, link_generation

        for _ in range(len(parts) + 2):
            try:
                return link_generation(self.image, self.ledger, parts, waiting)
            except NeedsArena:
                self._map_stub_area(parts)
            except (FarData, DynamicThreadLocal) as error:
                self._make_indirect(parts, error)
        raise UnsafeChange("the change cannot be linked", "restart the program with the new code")

    def _map_stub_area(self, parts: list[Part]) -> None:
        if self.options.dry_run:
            raise UnsafeChange(
                "a library function's implementation has to be asked from the process, which --dry-run forbids",
                "run it without --dry-run",
            )
        self.ledger.realise()
        self.image.stub_area = next(iter(self.ledger.arenas.values())).stub

    def _make_indirect(self, parts: list[Part], error: Exception) -> None:
        """Compile the unit that cannot reach some data again, with access through cells, thread-locals included."""
        from patcher.blocks import Blocks
        from patcher.build import INDIRECT
        from patcher.elf import read_object
        from patcher.relink import Part

        guilty = getattr(error, "object", None)
        for position, part in enumerate(parts):
            command = self._command_of.get(id(part.delta))
            if part.blocks.object is guilty and part.blocks is part.delta.blocks and command is not None:
                with self._building():
                    unit = self.compiler.compile(command, variant=INDIRECT, options=("-ftls-model=initial-exec",))
                blocks = Blocks(read_object(unit.object))
                self.compiler.discard(unit)
                self._command_of.pop(id(part.delta))
                parts[position] = Part(part.delta, part.source, blocks)
                return
        raise error

    # --- matching ---------------------------------------------------------------------------------------------

    _command_of: dict[int, CompileCommand]

    def _parts(self, sources: Sequence[_Source]) -> tuple[list[Part], tuple[str, ...]]:
        """Match every object; also return the functions of units that the process knows nothing of."""
        from patcher.blocks import Blocks
        from patcher.live import find_unit
        from patcher.relink import Part

        self._command_of = {}
        view = self.ledger.view()
        if self.ledger.primary is not None:
            self.image.stub_area = self.ledger.primary.stub
        parts: list[Part] = []
        absent: list[str] = []
        for source in sources:
            blocks = Blocks(source.object)
            unit = find_unit(self.image, view, blocks)
            if unit is None:
                self._waiting[source.file] = source
                absent += [b.name for b in blocks.functions]
                continue
            delta = self._match(source, blocks, unit)
            self._check_drift(source, delta)
            parts.append(Part(delta, str(source.file)))
            if source.command is not None:
                self._command_of[id(delta)] = source.command
            if parts[-1].added():
                self._waiting[source.file] = source
        if absent and not parts:
            self._refuse_absent(sources, absent)
        return parts, tuple(absent)

    def _refuse_absent(self, sources: Sequence[_Source], absent: Sequence[str]) -> None:
        module = self.image.executable
        if not module.module.symbols_from:
            raise UnsafeChange(
                f"{module.path} has no symbol table (it was stripped), so nothing in it can be found by name",
                "install its debug symbols, or run a program that was not stripped",
                code="stripped",
            )
        if any(source.command is None for source in sources):
            raise UnsafeChange(
                f"none of the functions of {', '.join(str(s.file) for s in sources)} is in process {self.target.pid} "
                f"({', '.join(list(absent)[:3]) or 'it has no functions'})",
                "give an object that the program was linked with",
                code="not-in-process",
            )

    def _match(self, source: _Source, blocks: Blocks, unit: LiveUnit) -> Delta:
        from patcher.match import Cause, match
        from patcher.match import Status as Verdict

        delta = match(blocks, unit)
        suspects = [f for f in delta.with_status(Verdict.CHANGED) if f.cause in (Cause.CONSTANT, Cause.DEPENDENT)]
        if not suspects or source.command is None:
            return delta
        fields = self._line_fields(source, source.command)
        return match(blocks, unit, fields) if fields else delta

    def _line_fields(self, source: _Source, command: CompileCommand) -> Fields:
        from patcher.build import LINE_SHIFT, SHIFTED
        from patcher.elf import read_object
        from patcher.lines import line_fields

        with self._building():
            unit = self.compiler.compile(command, variant=SHIFTED)
        try:
            return line_fields(source.object, read_object(unit.object), LINE_SHIFT)
        finally:
            self.compiler.discard(unit)

    def _check_drift(self, source: _Source, delta: Delta) -> None:
        """Refuse a unit most of which is not what runs, unless the text as it was at the start is."""
        from patcher.match import Status as Verdict

        changed = delta.with_status(Verdict.CHANGED)
        known = len(delta.functions) - len(delta.with_status(Verdict.ADDED))
        # What fitted once was built with this very command: from then on everything may change.
        proof = (source.file, source.command.arguments) if source.command is not None else None
        few = len(changed) < _DRIFT_MINIMUM or 2 * len(changed) <= known
        if self.options.force or few or proof in self._proven:
            if proof is not None and delta.with_status(Verdict.SAME):
                self._proven.add(proof)
            return
        baseline = self._baseline.get(source.file)
        if baseline is not None and source.command is not None and self._fits(baseline, source.command):
            return
        examples = "; ".join(f"{f.name}: {f.reason}" for f in changed[:3])
        raise UnsafeChange(
            f"{len(changed)} of {known} functions of {source.file} are not what process {self.target.pid} runs "
            f"({examples})",
            "it was built from other sources or with other flags: give the commands it was built with "
            "(--compile-commands), or apply it all the same with --force",
            code="mismatch",
        )

    def _check_layouts(self, parts: Sequence[Part]) -> None:
        """Refuse new code that sees existing data in another layout."""
        for part in parts:
            layouts = self._layouts_of(part.module)
            data = bytes(part.delta.blocks.object.contents)
            if layouts is None or not dwarf().has_types(data):
                self._say_unchecked(part, layouts is None)
                continue
            changes = dwarf().changed_types(layouts, data)
            changes = tuple(c for c in changes if not _allowed(c.name, self.options.allowed_layouts))
            if changes:
                names = ", ".join(f"`{c.name}`" for c in changes[:3])
                raise UnsafeChange(
                    f"{part.source} changes the layout of data that the process has: "
                    + "; ".join(c.describe() for c in changes[:3]),
                    f"restart the program; or, if nothing live is {names} any more, "
                    f"--allow-layout-change '{changes[0].name}'",
                    code="layout",
                )

    def _layouts_of(self, module: LoadedModule) -> Layouts | None:
        if module.path not in self._layouts:
            file = Path(module.module.symbols_from)
            file = module.file if str(file) == module.path or not file.is_file() else file
            self._layouts[module.path] = dwarf().Layouts.of_program(file)
        return self._layouts[module.path]

    def _say_unchecked(self, part: Part, program: bool) -> None:
        what = part.module.path if program else part.source
        if what not in self._unchecked:
            self._unchecked.add(what)
            self.emit(Note(f"{what} has no debug information (-g): the layouts of its types are not checked"))

    def _fits(self, text: bytes, command: CompileCommand) -> bool:
        from patcher.blocks import Blocks
        from patcher.elf import read_object
        from patcher.live import find_unit
        from patcher.match import Status as Verdict
        from patcher.match import match

        try:
            with self._building():
                unit = self.compiler.compile(command, text=text)
        except PatcherError:
            return False
        try:
            blocks = Blocks(read_object(unit.object))
        finally:
            self.compiler.discard(unit)
        live = find_unit(self.image, self.ledger.view(), blocks)
        if live is None:
            return False
        delta = match(blocks, live)
        return 2 * len(delta.with_status(Verdict.CHANGED)) <= len(delta.functions)

    def _waiting_parts(self, present: set[str]) -> list[Part]:
        from patcher.blocks import Blocks
        from patcher.live import LiveUnit, find_unit
        from patcher.match import match
        from patcher.relink import Part

        parts = []
        view = self.ledger.view()
        for file, source in self._waiting.items():
            if str(file) in present:
                continue
            blocks = Blocks(source.object)
            module = self.image.executable
            unit = find_unit(self.image, view, blocks) or LiveUnit(self.image, view, module, file.name, None)
            parts.append(Part(match(blocks, unit), str(file)))
        return parts

    # --- revert, status ---------------------------------------------------------------------------------------

    def revert(self, generation: int | None = None) -> int:
        """Go back to an earlier generation (default: the one before the live one; 0: the program as it was started).

        Returns its number. Raises `UnsafeChange` when it is not recorded, or nothing has been patched.
        """
        self.target.check_alive()
        with self.ledger.transaction():
            self.ledger.refresh()
            live = self.ledger.generation
            if generation is None:
                generation = self.ledger.journal.lineage(live)[-1].parent if live else 0
                if not live:
                    raise UnsafeChange(
                        f"process {self.target.pid} runs the program as it was started, there is nothing to revert",
                        "",
                        code="nothing-to-revert",
                    )
            if generation != live:
                self.ledger.journal.lineage(generation)
                self.ledger.revert(generation)
        return generation

    def status(self) -> Status:
        """Tell which generation is live and where every patched function goes. Writes nothing."""
        self.target.check_alive()
        ledger = self.ledger
        ledger.refresh()
        live = ledger.generation
        placed = {p.address: p for p in ledger.journal.placed}
        current = ledger.view().bodies
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
            ArenaUse(a.base, a.end - a.base, a.bytes_used(ledger.usages[a.base])) for a in ledger.arenas.values()
        )
        return Status(
            self.target.pid,
            self.target.program,
            live,
            tuple(sorted(ledger.journal.generations)),
            tuple(functions),
            arenas,
        )

    # --- watching ---------------------------------------------------------------------------------------------

    def watch(self, paths: Sequence[str | Path], *, stop: threading.Event | None = None) -> None:
        """Apply every save below `paths`, until `stop` is set or the process ends (`TargetGone`).

        What is refused or does not compile is reported and tried again with the next save.
        """
        from patcher.watch import Watcher

        stop = stop or threading.Event()
        roots = [Path(p).resolve() for p in paths]
        with Watcher([Path(p) for p in paths], stop=stop) as watcher:
            self._remember_texts(roots)
            self.prepare()
            self.emit(Ready(self.target.pid, self.target.program, tuple(str(p) for p in paths)))
            builder = self._builder(roots)
            while not stop.is_set():
                saved = watcher.next(0.5)
                if saved is None:
                    return
                if not saved:
                    self.target.check_alive()
                    continue
                self.save(saved, watcher.pending, builder)

    def prepare(self) -> None:
        """Load what the first save needs, so that it is as quick as the later ones."""
        import patcher.code.entry
        import patcher.code.split
        import patcher.relink  # noqa: F401

        self._await_loaded()
        self.image.executable.module.symbols.named("main")
        self._layouts_of(self.image.executable)
        self.ledger.refresh()

    def _await_loaded(self) -> None:
        # A program that was started a moment ago is still being put together by its dynamic linker.
        deadline = time.monotonic() + 2.0
        needed = self.image.executable.module.needed
        while time.monotonic() < deadline:
            self.image.refresh()
            if len(self.image.scope()) > len(needed) or not needed:
                return
            time.sleep(0.005)

    def _builder(self, roots: Sequence[Path]) -> BuildCommand | None:
        if not self.options.build:
            return None
        from patcher.build import BuildCommand

        return BuildCommand(self.options.build, directory=Path.cwd(), objects_in=roots)

    def _remember_texts(self, roots: Sequence[Path]) -> None:
        from patcher.build import is_unit

        total = 0
        for root in roots:
            for path in [root] if root.is_file() else sorted(root.rglob("*")):
                if is_unit(path) and path.is_file():
                    text = path.read_bytes()
                    total += len(text)
                    if total > _BASELINE_LIMIT:
                        return
                    self._baseline[path.resolve()] = text

    def save(
        self, saved: Iterable[Path], pending: Callable[[], bool] = lambda: False, builder: BuildCommand | None = None
    ) -> None:
        """Handle one round of saves: everything that is saved or still pending becomes one generation, or is reported.

        Raises `TargetError` only: without a target there is nothing to go on with.
        """
        from patcher.build import BuildCancelled, is_unit

        began = time.perf_counter()
        detect = _since_save(saved)
        files = {p for p in saved if p.exists()}
        self.emit(Saved(tuple(sorted(str(p) for p in saved))))
        units = files if builder is not None else {p for p in files if is_unit(p)}
        if not units:
            return
        together = units | {p for p in self._pending if p.exists()}
        try:
            attempts = [together, units] if together != units else [units]
            for attempt in attempts:
                if self._try(sorted(attempt), began, detect, pending, builder, last=attempt is attempts[-1]):
                    self._pending -= attempt
                    return
            self._pending |= units
        except BuildCancelled:
            self._pending |= units  # saved again while it was compiled: the next round has everything

    def _try(
        self,
        files: Sequence[Path],
        began: float,
        detect: float,
        pending: Callable[[], bool],
        builder: BuildCommand | None,
        *,
        last: bool,
    ) -> bool:
        from patcher.build import BuildCancelled

        try:
            inputs: Sequence[Path] = builder.run(files, cancelled=pending) if builder is not None else files
            outcome = self._apply(inputs, began, detect, pending)
        except (BuildCancelled, TargetError):
            raise
        except PatcherError as error:
            if last:
                self.report_error(error, files)
            return False
        self._report(outcome, files)
        return True

    def report_error(self, error: PatcherError, files: Sequence[Path]) -> None:
        """Tell of a failed build or a refusal."""
        named = ", ".join(str(f) for f in files)
        if isinstance(error, BuildError):
            self.emit(BuildFailed(error.file or named, error.diagnostics, error.message, error.hint))
        else:
            self.emit(Refused(error.code, error.message, error.hint, named))

    def _report(self, outcome: Generation, files: Sequence[Path]) -> None:
        names = tuple(str(f) for f in files)
        if not outcome.functions:
            self.emit(Unchanged(names, outcome.line_only, outcome.waiting))
            return
        self.emit(
            Applied(
                outcome.number,
                names,
                outcome.functions,
                outcome.active,
                outcome.timings,
                outcome.line_only,
                outcome.new_variables,
                self.options.dry_run,
            )
        )


def dwarf() -> ModuleType:
    """Return the room of types, which is slow to import (drgn) and not always needed."""
    import patcher.dwarf

    return patcher.dwarf


def _allowed(name: str, allowed: Sequence[str]) -> bool:
    return name in allowed or name.partition(" ")[2] in allowed


_Cancelled = Callable[[], bool] | None


def _never() -> bool:
    return False


def _since_save(files: Iterable[Path]) -> float:
    """Return the milliseconds since the last of some files was written."""
    written = 0.0
    for file in files:
        try:
            stat = file.stat()
        except OSError:
            continue
        # A rename keeps the time of writing, but changes the inode.
        written = max(written, stat.st_mtime, min(stat.st_ctime, time.time()))
    return max(0.0, (time.time() - written) * 1e3) if written else 0.0


def _is_source(path: Path) -> bool:
    from patcher.build import is_unit

    return is_unit(path)


def _check_readable(path: Path) -> None:
    if path.is_dir():
        raise ObjectError(f"{path}: is a directory", "give an object, an archive or a source file")
    if not path.exists():
        raise ObjectError(f"{path}: no such file or directory", "check the path")


def apply_report(outcome: Generation, files: Sequence[Path], dry_run: bool) -> Event:
    """Return the event that tells of an `apply`."""
    names = tuple(str(f) for f in files)
    if not outcome.functions:
        return Unchanged(names, outcome.line_only, outcome.waiting)
    return Applied(
        outcome.number,
        names,
        outcome.functions,
        outcome.active,
        outcome.timings,
        outcome.line_only,
        outcome.new_variables,
        dry_run,
    )


__all__ = [
    "ArenaUse",
    "Block",
    "Generation",
    "NoCompileCommand",
    "Note",
    "Options",
    "PatchedFunction",
    "Reverted",
    "Session",
    "Status",
    "apply_report",
]
