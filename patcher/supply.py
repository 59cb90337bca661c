"""What the process has never had: the objects, archives and libraries that a missing definition comes from.

Asked for one name at a time, and only for what neither the generation's own units nor the process define, in the order

    the other objects of the build      as the compile commands name them
    archives                            those given, those on the program's link line, and for a statically linked
                                        program those of the C library
    shared libraries                    those given, those on the link line; loaded before the generation goes live
    nothing                             a function that aborts when it is called, where that is allowed

An object is brought in as a unit of its own, of which only what is needed is placed. Decides where a definition
comes from and whether its object may join this process; what is placed and where is the linker's business. Reads
nothing before something is missing.

Specification: System V ABI, chapter 7 (archives); ld(1), "--start-group" (an archive is searched until nothing new
comes in; a weak reference pulls in nothing).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from patcher.blocks import Block, Blocks
from patcher.build import (
    Commands,
    CompileCommand,
    Compiler,
    LinkLine,
    find_link_line,
    locate_library,
    object_of,
    program_index,
)
from patcher.elf import Archive, ObjectFile, SymbolType, defined_names, is_archive, read_object
from patcher.elf.module import Module, read_module
from patcher.errors import ObjectError, UnsafeChange
from patcher.image import Image, LoadedModule
from patcher.link.plan import Bound
from patcher.live import UNDEFINED, LiveUnit
from patcher.match import Cause, FunctionMatch, Status, match
from patcher.options import Options
from patcher.origin import born_unit, find_unit
from patcher.part import Part
from patcher.patch.ledger import Ledger
from patcher.relink import Linked
from patcher.undefined import Use, undefined_function

_FAR = 0x7FFE_0000_0000  # where a library that is not loaded yet is thought to be: beyond 2 GiB of everything
_C_ARCHIVES = ("libm.a", "libc.a", "libpthread.a", "librt.a", "libdl.a", "libgcc.a", "libgcc_eh.a")
_GATHERED = re.compile(r"[A-Za-z_]\w*")
_ONLY_AT_EXIT = ("__libc_freeres", "__libc_subfreeres")  # glibc's: what memory checkers have released at the end
_STARTED = (".fini_array", ".preinit_array", ".dtors")

Stamp = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Library:
    """A shared library that is to be loaded, and what it defines."""

    path: Path
    module: Module

    def defines(self, name: str) -> bool:
        found = [s for s in self.module.exports.get(name, ()) if s.defined and s.binding != 0]
        return any(s.default and s.type != SymbolType.TLS for s in found)


class Supplies:
    """The suppliers of one process. `begin` before each generation."""

    def __init__(
        self,
        image: Image,
        ledger: Ledger,
        options: Options,
        commands: Commands,
        compiler: Compiler,
    ) -> None:
        self.image = image
        self.ledger = ledger
        self.options = options
        self.build = BuildObjects(commands, compiler)
        self._commands = commands
        self._archives: dict[Path, tuple[Stamp, Archive]] = {}
        self._libraries: dict[Path, tuple[Stamp, Library]] = {}
        self._blocks: dict[ObjectFile, Blocks] = {}
        self._parts: dict[ObjectFile, Part] = {}
        self._undefined: dict[str, Part] = {}
        self._proven: set[ObjectFile] = set()
        self.to_load: dict[Path, None] = {}  # what the linked generation needs, and the process has not
        self.loaded: list[Path] = []  # into the process, for this generation

    def begin(self) -> None:
        """Forget what belonged to the generation before."""
        self.loaded.clear()
        self.build.begin()
        self._parts.clear()
        self._undefined.clear()
        self.to_load.clear()

    def find(
        self, name: str, module: LoadedModule, uses: Callable[[], tuple[Use, ...]]
    ) -> tuple[Part, Block] | Bound | None:
        """Return where a missing name is defined; see `linkage.Supply`.

        Raises `UnsafeChange` for a definition that cannot join this process, `ObjectError` for a damaged file.
        """
        for source in self._objects_defining(name, module):
            part = self._part(source, module)
            block = part.defining(name)
            if block is not None:
                return part, block
        library = self._library_defining(name)
        if library is not None:
            self.to_load[library.path] = None
            return Bound(_FAR)
        return self._stand_in(name, module, uses()) if self.options.allow_undefined else None

    def defining(self, name: str, module: LoadedModule) -> ObjectFile | None:
        """Return the first object that defines a name."""
        return next(self._objects_defining(name, module), None)

    def part_of(self, source: ObjectFile) -> Part | None:
        """Return the part that has the blocks of an object."""
        return next((p for p in self._parts.values() if p.blocks.object is source), None)

    def replace(self, part: Part, made: Part) -> None:
        """Take another object for a part from now on: the same unit, compiled otherwise."""
        self._parts[part.delta.blocks.object] = made

    def outcome(self, linked: Linked) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return what a generation brings in, objects and libraries; and the functions that it leaves undefined."""
        objects = [p.source for p in linked.supplied if p.unit.key != UNDEFINED]
        undefined = [p.blocks.functions[0].name for p in linked.supplied if p.unit.key == UNDEFINED]
        return (*objects, *map(str, (*self.loaded, *self.to_load))), tuple(undefined)

    def advice(self) -> str:
        """Return what to do about a symbol that is nowhere."""
        archives = [*self._given_archives(), *self._system_archives(self.image.executable)]
        files = [str(a.path) for a in archives] + [str(library.path) for library in self._all_libraries()]
        objects = [f"{self.build.count} objects of the build"] if self.build.count else []
        looked = ", ".join([*objects, *files])
        return "give what defines it with --archive or --library, or define it in a source file that is watched" + (
            f" (looked in the process, {looked})" if looked else ""
        )

    # --- objects ----------------------------------------------------------------------------------------------

    def _objects_defining(self, name: str, module: LoadedModule) -> Iterator[ObjectFile]:
        own = self.build.defining(name)
        if own is not None:
            yield own
        for archive in self._given_archives():
            found = archive.defining(name)
            if found is not None:
                yield found
        for archive in self._system_archives(module):
            found = archive.defining(name)
            if found is not None:
                self._check_same_build(archive, found, module)
                yield found

    def _part(self, source: ObjectFile, module: LoadedModule) -> Part:
        part = self._parts.get(source)
        if part is None:
            blocks = self._blocks_of(source)
            view = self.ledger.view()
            unit = self._linked_unit(blocks, module) or born_unit(self.image, view, blocks, module)
            if unit.born:
                _check_joins(source, unit.module)
            part = Part(match(blocks, unit), source.name, supplied=True)
            self._parts[source] = part
        return part

    def _blocks_of(self, source: ObjectFile) -> Blocks:
        if source not in self._blocks:
            self._blocks[source] = Blocks(source)
        return self._blocks[source]

    def _linked_unit(self, blocks: Blocks, module: LoadedModule) -> LiveUnit | None:
        """Return the unit in a module that was linked from an object, None when the module was linked without it."""
        strong = [s for s in blocks.object.symbols if not (s.local or s.weak or s.undefined or s.common)]
        there = [s.name for s in strong if _has(module, s.name)]
        if not there:
            return None
        unit = find_unit(self.image, self.ledger.view(), blocks, (module,))
        delta = match(blocks, unit) if unit is not None else None
        if delta is None or not delta.with_status(Status.SAME, Status.LINE_ONLY):
            raise UnsafeChange(
                f"{blocks.object.name} defines `{there[0]}`, and so does {module.name}, from something else",
                "give an object that does not define what the program has, or the one that it was linked from",
                code="duplicate-symbol",
            )
        return unit

    def _stand_in(self, name: str, module: LoadedModule, uses: tuple[Use, ...]) -> tuple[Part, Block] | None:
        if not uses or not all(use.call for use in uses):
            return None  # may be a variable
        if name not in self._undefined:
            abort = self.image.resolve("abort", module)
            address = abort.address if abort is not None and abort.function else None
            blocks = Blocks(undefined_function(name, (use.by for use in uses), address))
            unit = LiveUnit(self.image, self.ledger.view(), module, UNDEFINED, None, born=True)
            self._undefined[name] = Part(match(blocks, unit), "", supplied=True)
        part = self._undefined[name]
        return part, part.blocks.functions[0]

    # --- archives ---------------------------------------------------------------------------------------------

    def _given_archives(self) -> Iterator[Archive]:
        line = self.link_line
        given = [file for path in self.options.archives for file in _named(path, self.compiler, static=True)]
        for path in dict.fromkeys((*given, *(line.archives if line is not None else ()))):
            yield self._archive(path)

    def _system_archives(self, module: LoadedModule) -> Iterator[Archive]:
        if module is not self.image.executable or not _is_static(module):
            return
        for name in _C_ARCHIVES:
            for path in locate_library(name, (), self.compiler, static=True):
                yield self._archive(path)

    def _archive(self, path: Path) -> Archive:
        stamp = _stamp(path)
        known = self._archives.get(path)
        if known is None or known[0] != stamp:
            try:
                data = path.read_bytes()
            except OSError as error:
                raise _unreadable(path, error) from None
            if not is_archive(data):
                raise ObjectError(f"{path}: not an archive", "give --archive a file that ar made")
            known = self._archives[path] = stamp, Archive(path, data)
        return known[1]

    def _check_same_build(self, archive: Archive, source: ObjectFile, module: LoadedModule) -> None:
        """Refuse a member whose archive has other code than the process for what the member works with."""
        if source in self._proven:
            return
        for symbol in source.symbols:
            if symbol.undefined and symbol.name and _has(module, symbol.name):
                counterpart = archive.defining(symbol.name)
                if counterpart is not None and counterpart not in self._proven:
                    self._compare(archive, counterpart, module)
                    self._proven.add(counterpart)
        self._proven.add(source)

    def _compare(self, archive: Archive, member: ObjectFile, module: LoadedModule) -> None:
        strong = {s.name for s in member.symbols if not (s.local or s.weak or s.undefined)}
        if not all(_has(module, name) for name in strong):
            return  # the program's own, which the archive's member was not wanted for
        blocks = self._blocks_of(member)
        unit = find_unit(self.image, self.ledger.view(), blocks, (module,))
        if unit is None:
            return
        try:
            delta = match(blocks, unit)
        except UnsafeChange as error:
            raise _another_build(archive, module, error.message) from None
        # Whether it refers to the same statics cannot be told: the C library's objects are without their files' names.
        changed = [f for f in delta.with_status(Status.CHANGED) if f.cause is Cause.CODE and not _is_patched(f)]
        if changed:
            how = f"`{changed[0].name}` of {member.name} is not what runs ({changed[0].reason})"
            raise _another_build(archive, module, how)

    # --- libraries --------------------------------------------------------------------------------------------

    def _library_defining(self, name: str) -> Library | None:
        return next((library for library in self._all_libraries() if library.defines(name)), None)

    def _all_libraries(self) -> Iterator[Library]:
        if _is_static(self.image.executable):
            return
        loaded = {m.path for m in self.image.modules}
        line = self.link_line
        for path in dict.fromkeys((*self._given_libraries, *(line.libraries if line is not None else ()))):
            if str(path) not in loaded:
                yield self._library(path)

    @cached_property
    def _given_libraries(self) -> tuple[Path, ...]:
        found: list[Path] = []
        for name in self.options.libraries:
            files = _library_files(name, self.compiler)
            if not files:
                raise ObjectError(f"--library {name}: there is no such library", "give its path")
            found += files
        return tuple(found)

    def _library(self, path: Path) -> Library:
        stamp = _stamp(path)
        known = self._libraries.get(path)
        if known is None or known[0] != stamp:
            known = self._libraries[path] = stamp, Library(path, read_module(str(path), path))
        return known[1]

    # --- what the build knows ---------------------------------------------------------------------------------

    @cached_property
    def compiler(self) -> str:
        """The compiler that knows where the C library's files are."""
        for command in self._commands.known():
            return command.arguments[program_index(command.arguments)]
        return next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), "cc")

    @cached_property
    def link_line(self) -> LinkLine | None:
        """How the program was linked, where something says so."""
        commands = ((c.directory, c.arguments) for c in self._commands.known())
        return find_link_line(Path(self.image.executable.path), commands, self.compiler)


@dataclass(frozen=True, slots=True)
class _Definition:
    path: Path
    command: CompileCommand
    weak: bool


class BuildObjects:
    """The objects that the build made, by the symbols that they define."""

    def __init__(self, commands: Commands, compiler: Compiler) -> None:
        self._commands = commands
        self._compiler = compiler
        self._names: dict[Path, tuple[Stamp, dict[str, bool]]] = {}
        self._read: dict[Path, tuple[Stamp, ObjectFile]] = {}
        self._index: dict[str, tuple[_Definition, ...]] | None = None
        self.command_of: dict[ObjectFile, CompileCommand] = {}

    @property
    def count(self) -> int:
        return len(self._names)

    def begin(self) -> None:
        """Look at the objects again when something is missing next."""
        self._index = None

    def defining(self, name: str) -> ObjectFile | None:
        """Return the object that defines a name; the unit is compiled when its object is older than its source.

        Raises `UnsafeChange` when several do.
        """
        if self._index is None:
            self._index = self._read_index()
        found = self._index.get(name, ())
        chosen = [d for d in found if not d.weak] or list(found[:1])
        if len(chosen) > 1:
            raise UnsafeChange(
                f"`{name}` is not in the process, and {' and '.join(str(d.path) for d in chosen)} define it",
                "give the object that is meant to `patcher apply`, together with what refers to it",
                code="ambiguous-symbol",
            )
        return self._object(chosen[0]) if chosen else None

    def _read_index(self) -> dict[str, tuple[_Definition, ...]]:
        index: dict[str, tuple[_Definition, ...]] = {}
        made = {path: command for command in self._commands.known() if (path := object_of(command)) is not None}
        for path, command in made.items():
            for name, weak in self._names_of(path).items():
                index[name] = (*index.get(name, ()), _Definition(path, command, weak))
        return index

    def _names_of(self, path: Path) -> dict[str, bool]:
        try:
            stamp = _stamp(path)
        except ObjectError:
            return {}
        known = self._names.get(path)
        if known is None or known[0] != stamp:
            known = self._names[path] = stamp, defined_names(path)
        return known[1]

    def _object(self, definition: _Definition) -> ObjectFile:
        path, command = definition.path, definition.command
        made_at = _stamp(path)
        outdated = command.file.exists() and _stamp(command.file)[0] > made_at[0]
        newest = _stamp(command.file) if outdated else made_at
        known = self._read.get(path)
        if known is None or known[0] != newest:
            made = self._compiled(command) if outdated else read_object(path)
            known = self._read[path] = newest, made
            self.command_of[made] = command
        return known[1]

    def _compiled(self, command: CompileCommand) -> ObjectFile:
        unit = self._compiler.compile(command)
        try:
            return read_object(unit.object)
        finally:
            self._compiler.discard(unit)


def _has(module: LoadedModule, name: str) -> bool:
    return any(not s.local or module.module.demoted(s) for s in module.module.symbols.named(name))


def _another_build(archive: Archive, module: LoadedModule, how: str) -> UnsafeChange:
    return UnsafeChange(
        f"{archive.path} is not the archive that {module.name} was linked with: {how}",
        "install the build of the C library that the program was linked with, or link it again",
        code="mismatch",
    )


def _is_patched(function: FunctionMatch) -> bool:
    return function.live is not None and function.live.redirect is not None


def _is_static(module: LoadedModule) -> bool:
    return not module.module.interpreter and not module.module.needed


def _check_joins(source: ObjectFile, module: LoadedModule) -> None:
    """Refuse an object that the program would have had to be started with."""
    for section in source.sections.values():
        if not section.size:
            continue
        if section.name.startswith(_STARTED):
            raise UnsafeChange(
                f"{source.name} has functions that run when a program starts or ends ({section.name})",
                "restart the program, linked with it",
                code="constructor",
            )
        gathered = _GATHERED.fullmatch(section.name) and not section.name.startswith(_ONLY_AT_EXIT)
        if gathered and any(_has(module, edge + section.name) for edge in ("__start_", "__stop_")):
            raise UnsafeChange(
                f"{source.name} has a share in {section.name}, which {module.name} has in one piece and goes through",
                "restart the program, linked with it",
                code="gathered-section",
            )


def _library_files(name: str, compiler: str) -> tuple[Path, ...]:
    # A file of a library's bare name, such as a program called `m`, is not meant; `libx.so` here is.
    if "/" in name or (".so" in name and Path(name).is_file()):
        path = Path(name).resolve()
        found = _named(path, compiler) if path.is_file() else ()
    else:
        found = locate_library(name.removeprefix("-l"), (), compiler)
    return tuple(path.resolve() for path in found if path.suffix != ".a")


def _named(path: Path, compiler: str, *, static: bool = False) -> tuple[Path, ...]:
    """Return the files that a path stands for: others, where it is a linker script."""
    return locate_library(f":{path.name}", [path.parent], compiler, static=static) or (path,)


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _unreadable(path: Path, error: OSError) -> ObjectError:
    return ObjectError(f"{path}: {(error.strerror or str(error)).lower()}", "check the path")
