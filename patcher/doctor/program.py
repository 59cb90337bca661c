"""Whether the program in a file can be changed once it runs: its symbols, debug information, commands and functions.

Decides what stands in the way before there is a process; what a change would meet besides, `explain` tells of one.
Specification: System V ABI AMD64; DWARF 5, section 3.1 (DW_AT_producer as gcc and clang write it).
"""

from __future__ import annotations

import bisect
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from patcher.build import Commands, CompileCommand, DebugInformation, Family, Recorded, identify
from patcher.doctor.finding import Finding, State, bad, good, note
from patcher.doctor.functions import Entry, Refused, entries_of
from patcher.elf.module import Module, read_module
from patcher.errors import NoCompileCommand, ObjectError
from patcher.image import debug_files

_PRODUCER = re.compile(r"(GNU|clang)\b.*?\b(\d+)\.\d+")
_HARDENING = (
    "-fcf-protection",
    "-fstack-protector",
    "-fstack-clash-protection",
    "-fhardened",
    "-ftrivial-auto-var-init",
)
_SHOWN = 3  # names in a sentence


@dataclass(frozen=True, slots=True)
class UnitReport:
    """One translation unit: its source, where its command comes from ("" if nowhere), and its functions.

    `reason` says why it cannot be compiled as it was.
    """

    file: str
    command: str
    derived: bool  # put together from what gcc records: switches, without macros
    reason: str
    hint: str
    compiler: str  # what the debug information names
    found: str  # what its command runs
    functions: int
    refused: tuple[Refused, ...]

    @property
    def mismatched(self) -> bool:
        return bool(self.compiler and self.found and self.compiler != self.found)


@dataclass(frozen=True, slots=True)
class Examination:
    """What was found out about a program."""

    program: str
    findings: tuple[Finding, ...]
    units: tuple[UnitReport, ...] = ()

    @property
    def hopeless(self) -> bool:
        return any(f.state is State.BAD for f in self.findings)


def examine_program(
    program: str, *, compile_commands: Path | None = None, watched: Sequence[Path] = (), build: str = ""
) -> Examination:
    """Look at a program's file (searched in PATH if its name has no slash), and at how its units would be compiled."""
    path = Path(program if "/" in program else shutil.which(program) or program)
    if not path.exists() and "/" not in program:
        return Examination(program, (bad("file", f"{program}: no such program in PATH", "write ./ before its name"),))
    try:
        module = _module(path)
    except ObjectError as error:
        return Examination(program, (bad("file", error.message, error.hint or "name what the linker made"),))
    debug = DebugInformation(_debug_file(module, path))
    recorded = sorted(debug.recorded(), key=lambda unit: unit.path)
    commands = Commands(compile_commands=compile_commands, watched=watched, programs=[path])
    units = tuple(_unit_reports(module, path, debug, recorded, commands))
    findings = [
        *_kind(module),
        *_symbols(module),
        *_debug_information(recorded),
        *_link_time(module, recorded),
        *_compilers(units),
        *(_commands(units, build) if recorded else _listed(commands, build)),
        *_sources(path, units),
        *(_functions(units) if recorded else ()),
    ]
    return Examination(program, tuple(findings), units)


def _module(path: Path) -> Module:
    if path.is_dir():
        raise ObjectError(f"{path}: is a directory", "name the program in it")
    if not path.exists():
        raise ObjectError(f"{path}: no such file", "check the path; build the program first")
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"#!"):
        interpreter = start.splitlines()[0][2:].decode("utf-8", "replace").strip()
        raise ObjectError(f"{path}: a script for {interpreter}, no native program", "name the program that it starts")
    if not start.startswith(b"\x7fELF"):
        raise ObjectError(f"{path}: not a program (no ELF file)", "name what the linker made")
    return read_module(str(path), path, lambda build_id, link: debug_files(str(path), build_id, link))


def _debug_file(module: Module, path: Path) -> Path:
    separate = Path(module.symbols_from)
    return separate if module.symbols_from and separate.is_file() else path


def _kind(module: Module) -> Iterator[Finding]:
    if module.dynamic_section and module.interpreter:
        kind = "position-independent" if module.position_independent else "at fixed addresses"
        yield good("file", f"a dynamically linked program, {kind}")
    elif module.dynamic_section and not module.needed and not module.exports:
        yield _static("a static program, position-independent")
    elif module.dynamic_section:
        yield good("file", "a shared library, or a static program that is position-independent")
    else:
        yield _static("a static program, at fixed addresses")


def _static(kind: str) -> Finding:
    return note(
        "file",
        f"{kind}: new code cannot bring in shared libraries, and library functions that were not linked in come "
        "from archives only",
        "give what is missing with --archive, or link dynamically while you work on it",
    )


def _symbols(module: Module) -> Iterator[Finding]:
    if module.symbols_from:
        yield good("symbols", f"{len(module.symbols.functions())} functions are known by name")
    else:
        yield bad(
            "symbols",
            "stripped: no symbol table, here or in a separate debug file, so no function is known by name",
            "link without -s and do not strip it, or install its debug file (-dbgsym, -debuginfo)",
        )


def _debug_information(recorded: Sequence[Recorded]) -> Iterator[Finding]:
    if not recorded:
        yield note(
            "debug information",
            "none: the layouts of types are not checked, and commands and units are not known from the program",
            "compile with -g",
        )
        return
    compilers = ", ".join(sorted({_compiler(unit) or unit.producer for unit in recorded}))
    yield good("debug information", f"{_count(recorded, 'unit')} compiled by {compilers}")
    switches = {
        word.split("=")[0] for unit in recorded for word in unit.producer.split() if word.startswith(_HARDENING)
    }
    if switches:
        yield good("hardening", f"{', '.join(sorted(switches))}: new code is compiled with the same")
    sanitizers = {word for unit in recorded for word in unit.producer.split() if word.startswith("-fsanitize=")}
    if sanitizers:
        yield note(
            "sanitizers",
            f"{', '.join(sorted(sanitizers))}: new variables are not registered with it, and it may report them",
            "use a program without it where that disturbs",
        )


def _compiler(unit: Recorded) -> str:
    """Return `gcc 12` or `clang 14` for what compiled a unit; "" when it is neither."""
    found = _PRODUCER.search(unit.producer)
    return f"{'gcc' if found[1] == 'GNU' else 'clang'} {found[2]}" if found else ""


def _link_time(module: Module, recorded: Sequence[Recorded]) -> Iterator[Finding]:
    # clang's producer does not tell; what both leave behind are the names that they gave to locals.
    names = [s.name for s in module.symbols.functions() if ".lto_priv." in s.name or ".llvm." in s.name]
    units = [u for u in recorded if "GIMPLE" in u.producer or "-flto" in u.producer.split()]
    if names or units:
        what = _some([Path(u.path).name for u in units] or names)
        yield bad(
            "link-time optimisation",
            f"linked with -flto ({what}): functions were changed across units, and no object matches what runs",
            "link without -flto (-fno-lto) while you work on it",
        )


def _compilers(units: Sequence[UnitReport]) -> Iterator[Finding]:
    for recorded, found in sorted({(u.compiler, u.found) for u in units if u.mismatched}):
        files = [Path(u.file).name for u in units if (u.compiler, u.found) == (recorded, found)]
        name, _, major = recorded.partition(" ")
        yield bad(
            "compiler",
            f"{_some(files)}: compiled by {recorded}, and would be compiled again by {found}: other code comes of it",
            f"install {name}-{major} and name it in the compile commands, or build the program with {found}",
        )


def _commands(units: Sequence[UnitReport], build: str) -> Iterator[Finding]:
    for origin in sorted({u.command for u in units if u.command}):
        files = [Path(u.file).name for u in units if u.command == origin]
        if any(u.derived for u in units if u.command == origin):
            macros = (
                "macros of the command line (-D) are not recorded there: give a compile_commands.json if there are any"
            )
            yield note("commands", f"{_some(files)}: from {origin}", macros)
        else:
            yield good("commands", f"{_some(files)}: from {origin}")
    lost = [u for u in units if u.reason]
    if build:
        yield good("commands", f"--build: {build}")
    elif lost:
        say = bad if len(lost) == len(units) else note
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        yield say("commands", lost[0].reason + more, lost[0].hint)


def _listed(commands: Commands, build: str) -> Iterator[Finding]:
    """Look for commands where the program does not tell what it was compiled of."""
    if build:
        yield good("commands", f"--build: {build}")
    elif found := commands.every_unit():
        yield good("commands", f"{_some([c.file.name for c in found])}: from {found[0].origin}")
    else:
        yield bad(
            "commands",
            "nothing says how its sources are compiled: there is no debug information and no compile_commands.json",
            "compile with -g, give --watch or --compile-commands, or --build with the command that builds it",
        )


def _sources(path: Path, units: Sequence[UnitReport]) -> Iterator[Finding]:
    built = path.stat().st_mtime
    newer = [Path(u.file).name for u in units if Path(u.file).exists() and Path(u.file).stat().st_mtime > built]
    if newer:
        yield note(
            "sources",
            f"{_some(newer)}: changed since the program was built, so what runs will be another text",
            "build it again before it is started",
        )


def _functions(units: Sequence[UnitReport]) -> Iterator[Finding]:
    count = sum(u.functions for u in units)
    refused = [r for u in units for r in u.refused]
    if not count:
        return
    message = f"{count - len(refused)} of {count} in {_count(units, 'unit')} can be changed"
    if count > len(refused):
        yield good("functions", message)
    else:
        yield bad("functions", message, "compile with -falign-functions=16, which leaves room behind short ones")
    for one in refused[:_SHOWN]:
        yield note(
            "functions",
            f"{one.name}: {one.reason}",
            "a change of it would be refused; -falign-functions=16 makes room behind short ones",
        )
    if len(refused) > _SHOWN:
        yield note("functions", f"and {len(refused) - _SHOWN} more; --json tells them all")


def _unit_reports(
    module: Module, path: Path, debug: DebugInformation, recorded: Sequence[Recorded], commands: Commands
) -> Iterator[UnitReport]:
    unit_at = _UnitOf(debug.extents() if recorded else {})
    entries: dict[int | None, list[Entry]] = {}
    for entry in entries_of(module, path, lambda address: unit_at(address) is not None):
        entries.setdefault(unit_at(entry.address), []).append(entry)
    commands.foresee(path for unit in recorded if (path := Path(unit.path)).exists())
    for unit in recorded:
        own = entries.get(unit.offset, [])
        command, reason, hint = _command(commands, Path(unit.path))
        toolchain = identify(command.arguments, command.directory) if command else None
        yield UnitReport(
            file=unit.path,
            command=command.origin if command else "",
            derived=command is not None and command.derived,
            reason=reason,
            hint=hint,
            compiler=_compiler(unit),
            found=f"{toolchain.family.value} {toolchain.major}"
            if toolchain is not None and toolchain.family is not Family.OTHER
            else "",
            functions=len(own),
            refused=tuple(Refused(e.name, e.reason) for e in own if e.reason),
        )


class _UnitOf:
    """Tells in which unit an address is."""

    def __init__(self, extents: Mapping[int, Sequence[tuple[int, int]]]) -> None:
        self._ranges = sorted((low, high, unit) for unit, ranges in extents.items() for low, high in ranges)
        self._starts = [low for low, _, _ in self._ranges]

    def __call__(self, address: int) -> int | None:
        position = bisect.bisect_right(self._starts, address) - 1
        if position < 0 or address >= self._ranges[position][1]:
            return None
        return self._ranges[position][2]


def _command(commands: Commands, source: Path) -> tuple[CompileCommand | None, str, str]:
    if not source.exists():
        return None, f"{source}: the source is not there", "build the program here, where its sources are"
    try:
        return commands.find(source), "", ""
    except NoCompileCommand as error:
        return None, error.message, error.hint


def _some(names: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(names))
    more = f" and {len(distinct) - _SHOWN} more" if len(distinct) > _SHOWN else ""
    return ", ".join(distinct[:_SHOWN]) + more


def _count(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"
