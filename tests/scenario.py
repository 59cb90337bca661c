"""A scenario: a small program that answers lines, edits of its sources, and what it must answer after each.

A directory below fixtures/scenarios with C sources and a scenario.toml is a test; fixtures/scenarios/README.md
has the keys. This module reads them, builds the program as a variant says (compiler, optimisation, position
independence, linker), starts it, and plays the steps against it through the Python API or `patcher attach`.

After every step the process must be alive, untraced and not stopped, and its function pointers must be what they
were; at the end every byte of its executable memory and every cell of its GOTs must be as before the first patch.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import patcher
from patcher.image import Image
from patcher.target import Target

REPOSITORY = Path(__file__).parents[1]
SCENARIOS = REPOSITORY / "fixtures" / "scenarios"
LOOP = SCENARIOS / "loop.c"
SHARED = SCENARIOS / "shared"
# What the dynamic linker writes once and nobody else: GLOB_DAT, JUMP_SLOT, DTPMOD64, DTPOFF64, TPOFF64, IRELATIVE
GOT_RELOCATIONS = (6, 7, 16, 17, 18, 37)
R_X86_64_JUMP_SLOT = 7
SECONDS = 20.0  # never waited for when the code is right


# --- what a scenario says ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Variant:
    """How a program is built. `kind`: whether the scenario's units make the executable or a shared library."""

    compiler: str = "gcc"
    optimise: str = "-O2"
    pie: bool = True
    linker: str = "bfd"
    kind: str = "executable"
    sections: bool = False
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        words = [self.compiler, self.optimise[1:], "pie" if self.pie else "nopie", self.linker]
        words += ["library"] * (self.kind == "library") + ["sections"] * self.sections
        return "-".join(words) + "".join(self.flags)


@dataclass(frozen=True, slots=True)
class Ask:
    """A line, its answer, and (if given) the old answer that must not come any more."""

    line: str
    expect: str
    reject: str = ""


@dataclass(frozen=True, slots=True)
class Edit:
    """Changes of one file: texts and their replacements. Without any, the file is only saved again."""

    file: str
    replace: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One change and what it must lead to. Without edits and without `apply` it only asks."""

    edits: tuple[Edit, ...] = ()
    apply: tuple[str, ...] = ()
    given: str = "source"  # or "object", "archive": built with the user's command and `flags`
    flags: tuple[str, ...] = ()
    force: bool = False
    attach_again: bool = False
    allow: tuple[str, ...] = ()
    revert: int | None = None
    refused: str = ""
    names: tuple[str, ...] = ()
    may_refuse: bool = False
    unchanged: bool = False
    changed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    same: tuple[str, ...] = ()
    line_only: tuple[str, ...] = ()
    active: tuple[str, ...] = ()
    data: tuple[str, ...] | None = None  # what must become of variables: "kept limit 5 -> 7"; nothing else may
    reinit: tuple[str, ...] = ()
    asks: tuple[Ask, ...] = ()


@dataclass(frozen=True, slots=True)
class Library:
    """A shared library of its own, `lib<name>.so` beside the program.

    `needed`: the program is linked with it. `late`: made when the program has been linked already, perhaps in
    place of one of the same name that it was linked with.
    """

    name: str
    sources: tuple[str, ...]
    flags: tuple[str, ...] = ()
    link: tuple[str, ...] = ()
    needed: bool = True
    late: bool = False


@dataclass(frozen=True, slots=True)
class Scenario:
    """A directory below fixtures/scenarios."""

    directory: Path
    about: str
    sources: tuple[str, ...]
    asks: tuple[Ask, ...]
    steps: tuple[Step, ...]
    final: tuple[Ask, ...]
    constant: tuple[str, ...] = ()
    library: tuple[str, ...] = ()
    late: bool = False  # the program opens the library itself
    beside: tuple[str, ...] = ()  # sources that are compiled, and not linked
    libraries: tuple[str, ...] = ()
    allow_undefined: bool = False
    loop: bool = True
    static: bool = False
    watch: bool = False
    rebuild: bool = False  # build once more after each edit, over the files of the running program
    flags: tuple[str, ...] = ()
    link: tuple[str, ...] = ()
    compilers: tuple[str, ...] = ()
    optimise: tuple[str, ...] = ()
    linkers: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    pie: tuple[bool, ...] = ()
    also: tuple[str, ...] = ()  # names of variants that are never left out
    flags_each: tuple[tuple[str, ...], ...] = ()
    xfail: tuple[tuple[str, str], ...] = ()  # (pattern of variant names, why)
    modules: tuple[Library, ...] = ()
    shared: tuple[str, ...] = ()  # files of `SHARED` that are there beside the scenario's own
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return self.directory.name

    def fits(self, variant: Variant) -> bool:
        """Tell whether a variant is among those that the scenario is meant for."""
        pairs = (
            (self.compilers, variant.compiler),
            (self.optimise, variant.optimise),
            (self.linkers, variant.linker),
            (self.kinds, variant.kind),
            (self.pie, variant.pie),
        )
        return all(not allowed or value in allowed for allowed, value in pairs)

    def known_defect(self, variant: Variant) -> str:
        """Return why a variant is known to fail, or ""."""
        return next((reason for pattern, reason in self.xfail if fnmatch.fnmatch(variant.name, pattern)), "")


def read_scenario(directory: Path) -> Scenario:
    """Read a scenario.toml; a key that is not known is an error."""
    with (directory / "scenario.toml").open("rb") as file:
        read = tomllib.load(file)
    asks = _asks(read.pop("asks", ()))
    final = _asks(read.pop("final", ())) or asks
    steps = tuple(_step(s) for s in read.pop("step"))
    found = [str(p.relative_to(directory)) for p in directory.rglob("*") if p.suffix in _UNITS]
    sources = tuple(read.pop("sources", ())) or tuple(sorted([*found, *read.get("shared", ())]))
    each = tuple(tuple(f) for f in read.pop("flags_each", ()))
    defects = tuple(read.pop("xfail", {}).items())
    modules = tuple(_library(b) for b in read.pop("modules", ()))
    environment = tuple(read.pop("environment", {}).items())
    fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in read.items()}
    if fields.get("library") or fields.get("static"):
        fields["kinds"] = ("library",) if fields.get("library") else ("executable",)
    return Scenario(
        directory,
        sources=sources,
        asks=asks,
        final=final,
        steps=steps,
        flags_each=each,
        xfail=defects,
        modules=modules,
        environment=environment,
        **fields,
    )


_UNITS = (".c", ".cc")


def _library(read: dict[str, Any]) -> Library:
    return Library(**{key: tuple(v) if isinstance(v, list) else v for key, v in read.items()})


def _step(read: dict[str, Any]) -> Step:
    read = dict(read)
    edits = read.pop("edit", [])
    found = tuple(
        Edit(e["file"], tuple((old, new) for old, new in e.get("replace", ())))
        for e in (edits if isinstance(edits, list) else [edits])
    )
    asks = _asks(read.pop("asks", ()))
    fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in read.items()}
    return Step(found, asks=asks, **fields)


def _asks(read: Sequence[Sequence[str]]) -> tuple[Ask, ...]:
    return tuple(Ask(*words) for words in read)


# --- building ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Built:
    """A program that was built, with the sources it was built from and their commands."""

    program: Path
    sources: Path
    database: Path
    commands: Mapping[str, tuple[str, ...]]  # source -> compile command without its -o
    rebuild: Callable[[], object]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of `patcher.attach`


_loops: dict[tuple[str, ...], Path] = {}


def build(scenario: Scenario, variant: Variant, directory: Path, shared: Path) -> Built:
    """Build a scenario's program in `directory`; what scenarios share is kept in `shared`."""
    sources = directory / "src"
    if not sources.exists():
        shutil.copytree(scenario.directory, sources, ignore=shutil.ignore_patterns("scenario.toml"))
        for name in scenario.shared:
            shutil.copy(SHARED / name, sources)
    flags = [variant.optimise, "-g", "-I", str(SCENARIOS), *scenario.flags, *variant.flags]
    flags += ["-ffunction-sections", "-fdata-sections"] * variant.sections
    own = tuple(s for s in scenario.sources if s not in scenario.beside)
    library = (scenario.library or own) if variant.kind == "library" else ()
    code = "-fPIE" if variant.pie else "-fno-pie"
    commands: dict[str, tuple[str, ...]] = {}
    for source in scenario.sources:
        module = next((m for m in scenario.modules if source in m.sources), None)
        mode = "-fPIC" if source in library or module is not None else code
        compiler = _driver(variant, (source,))
        commands[source] = (compiler, mode, *flags, *(module.flags if module else ()), "-c", str(sources / source))
    entries = []
    for source, command in commands.items():
        output = _object_of(directory, source)
        arguments = [*command, "-o", str(output)]
        _run(arguments, sources)
        entries.append({"directory": str(sources), "file": source, "arguments": arguments})
    database = directory / "compile_commands.json"
    database.write_text(json.dumps(entries))
    program = directory / scenario.name
    _link(scenario, variant, directory, library, shared)
    options = {"libraries": scenario.libraries, "allow_undefined": scenario.allow_undefined}
    return Built(program, sources, database, commands, lambda: build(scenario, variant, directory, shared), options)


def _object_of(directory: Path, source: str) -> Path:
    return directory / (source.replace("/", "-").rpartition(".")[0] + ".o")


def _driver(variant: Variant, sources: Sequence[str]) -> str:
    if not any(s.endswith(".cc") for s in sources):
        return variant.compiler
    return {"gcc": "g++", "clang": "clang++"}[variant.compiler]


def _link(scenario: Scenario, variant: Variant, directory: Path, library: Sequence[str], shared: Path) -> None:
    compiler = _driver(variant, scenario.sources)
    driver = [compiler, *variant.flags, f"-fuse-ld={variant.linker}"]
    driver += ["-Wl,--no-as-needed"] * bool(scenario.modules)
    elsewhere = {s for b in scenario.modules for s in b.sources}.union(library, scenario.beside)
    objects = [str(_object_of(directory, s)) for s in scenario.sources if s not in elsewhere]
    for made in scenario.modules:
        if not made.late:
            objects += _shared(driver, made, directory)
    if library:
        own = Library(scenario.name, tuple(library), link=scenario.link, needed=not scenario.late)
        objects += _shared(driver, own, directory)
    if scenario.loop:
        objects.insert(0, str(_loop(variant, shared)))
    if scenario.static:
        mode = ["-static-pie"] if variant.pie else ["-static", "-no-pie"]
    else:
        mode = ["-pie"] if variant.pie else ["-no-pie"]
    link = [w.replace("SOURCES", str(directory / "src")) for w in scenario.link]
    _run([*driver, *mode, "-o", str(directory / scenario.name), *objects, *link], directory)
    for made in scenario.modules:
        if made.late:
            _shared(driver, made, directory)


def _shared(driver: Sequence[str], library: Library, directory: Path) -> list[str]:
    """Make a shared library; return what the program is linked with."""
    parts = [str(_object_of(directory, s)) for s in library.sources]
    path = directory / f"lib{library.name}.so"
    found = f"-Wl,-rpath,{directory}"
    link = [w.replace("SOURCES", str(directory / "src")) for w in library.link]
    command = [*driver, "-shared", f"-Wl,-soname,{path.name}", "-o", str(path), *parts, f"-L{directory}", found, *link]
    _run(command, directory)
    return [found, *([str(path)] if library.needed else [])]


def _loop(variant: Variant, shared: Path) -> Path:
    key = (variant.compiler, variant.optimise, "-fPIE" if variant.pie else "-fno-pie")
    if key not in _loops:
        path = shared / f"loop{len(_loops)}.o"
        _run([*key, "-c", str(LOOP), "-o", str(path)], shared)
        _loops[key] = path
    return _loops[key]


def _run(command: Sequence[str], directory: Path) -> None:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def given_files(built: Built, step: Step, files: Sequence[str]) -> list[Path]:
    """Return what a step gives to `apply`: the sources, or the objects or the archive made of them."""
    if step.given == "source":
        return [built.sources / f for f in files]
    directory = built.sources.parent / "given"
    directory.mkdir(exist_ok=True)
    objects = []
    for file in files:
        output = _object_of(directory, file)
        _run([*built.commands[file], *step.flags, "-o", str(output)], built.sources)
        objects.append(output)
    if step.given == "object":
        return objects
    archive = directory / "libgiven.a"
    _run(["ar", "rcs", str(archive), *map(str, objects)], directory)
    return [archive]


# --- the process ------------------------------------------------------------------------------------------------------


class Program:
    """The process that a scenario is about."""

    def __init__(self, path: Path, environment: Sequence[tuple[str, str]] = ()) -> None:
        added = {name: value.replace("DIRECTORY", str(path.parent)) for name, value in environment}
        self.process = subprocess.Popen(
            [path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **added}
        )
        self.pid = self.process.pid

    def ask(self, line: str) -> str:
        """Say a line and return the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().rstrip("\n")

    def check_untouched(self) -> None:
        """Fail unless the process is alive, not stopped and not traced."""
        assert self.process.poll() is None, f"the program ended with {self.process.returncode}"
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            status = (task / "status").read_text()
            assert re.search(r"^TracerPid:\t0$", status, re.M), f"{task.name} is traced"
            assert re.search(r"^State:\t[^tT]", status, re.M), f"{task.name} is stopped"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()
        self.process.wait(SECONDS)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What must come back: the executable memory, by mapping, and the GOT cells of every module."""

    text: Mapping[tuple[str, int], str]
    cells: Mapping[int, int]
    lazy: frozenset[int]  # cells that the dynamic linker had not bound yet
    bound: frozenset[int] = frozenset()  # cells that lead to code of a module


def snapshot(pid: int) -> Snapshot:
    """Read what the process executes, and every cell that the dynamic linker filled in."""
    text: dict[tuple[str, int], str] = {}
    cells: dict[int, int] = {}
    lazy: set[int] = set()
    bound: set[int] = set()
    with Target.attach(pid) as target, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for mapping in target.mappings():
            if mapping.executable and mapping.path.startswith("/") and not mapping.path.startswith("/memfd:patcher"):
                data = os.pread(memory.fileno(), mapping.end - mapping.start, mapping.start)
                text[mapping.path, mapping.start] = hashlib.sha256(data).hexdigest()
        image = Image(target)
        for loaded in image.modules:
            for place, cell in loaded.module.cells.items():
                if cell.type not in GOT_RELOCATIONS:
                    continue
                address = place + loaded.bias
                value = int.from_bytes(os.pread(memory.fileno(), 8, address), "little")
                cells[address] = value
                if cell.type == R_X86_64_JUMP_SLOT and loaded.executable_at(value):
                    lazy.add(address)
                if (module := image.module_at(value)) is not None and module.executable_at(value):
                    bound.add(address)
    return Snapshot(text, cells, frozenset(lazy), frozenset(bound))


def check_restored(before: Snapshot, after: Snapshot) -> None:
    """Fail unless everything is as it was; a cell may have been bound by the dynamic linker meanwhile."""
    assert after.text == before.text, "executable memory differs after revert 0"
    differing = {a for a, value in before.cells.items() if after.cells.get(a) != value}
    wrong = sorted(differing - (before.lazy & after.bound))
    assert not wrong, f"GOT cells differ after revert 0: {[hex(a) for a in wrong]}"


# --- the two ways to patch --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one change, however it was asked for."""

    functions: Mapping[str, str] = dataclasses.field(default_factory=dict)  # name without compiler suffixes -> status
    active: tuple[str, ...] = ()
    line_only: tuple[str, ...] | None = None
    data: frozenset[str] = frozenset()
    generation: bool = True
    refused: str = ""
    message: str = ""


class Controller(Protocol):
    """Applies steps to one process."""

    def apply(self, step: Step, files: Sequence[str]) -> Outcome: ...

    def revert(self, generation: int) -> None: ...


class Api:
    """Patches through `patcher.attach`."""

    def __init__(self, built: Built, pid: int) -> None:
        self.built = built
        self.pid = pid
        self.session = self._attach(Step())

    def _attach(self, step: Step) -> patcher.session.Session:
        own = {"force": step.force, "allowed_layouts": step.allow, "reinit": step.reinit}
        return patcher.attach(self.pid, compile_commands=self.built.database, **{**self.built.options, **own})

    def apply(self, step: Step, files: Sequence[str]) -> Outcome:
        if step.attach_again or step.force or step.allow or step.reinit or self.session.options.reinit:
            self.session.close()
            self.session = self._attach(step)
        try:
            done = self.session.apply(*given_files(self.built, step, files))
        except patcher.PatcherError as error:
            return Outcome(refused=error.code, message=f"{error.message} | {error.hint}")
        functions = {plain(f.name): f.status for f in done.functions}
        return Outcome(
            functions,
            tuple(name for _, name in done.active),
            tuple(plain(f) for f in done.line_only),
            frozenset(f"{v.outcome} {v.name} {v.note}".rstrip() for v in done.variables),
            bool(done.functions) or done.data_only,
        )

    def revert(self, generation: int) -> None:
        self.session.revert(generation)
        assert self.session.status().generation == generation

    def close(self) -> None:
        self.session.close()


class Watch:
    """Patches by saving files under `patcher attach --watch`, and takes back by `patcher revert`."""

    def __init__(self, built: Built, pid: int) -> None:
        self.built = built
        self.pid = pid
        self.events = built.sources.parent / "events.ndjson"
        self.stderr = (built.sources.parent / "stderr").open("wb")
        command = [*_PATCHER, "attach", str(pid), "--watch", str(built.sources), "--events", str(self.events)]
        command += ["--compile-commands", str(built.database)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=self.stderr, cwd=REPOSITORY)
        self._seen = 0
        self._next("ready")

    def apply(self, step: Step, files: Sequence[str]) -> Outcome:
        wanted = set(step.changed) | set(step.added)
        while True:
            event = self._next("applied", "unchanged", "refused", "build_failed")
            if event["event"] == "refused":
                if step.refused:
                    return Outcome(refused=event["reason"], message=f"{event['message']} | {event['hint']}")
                continue  # the first of several files; the round with the others follows
            functions = {plain(f["name"]): f["status"] for f in event.get("functions", ())}
            if wanted <= set(functions):
                data = frozenset(f"{v['outcome']} {v['name']} {v['note']}".rstrip() for v in event["data"])
                applied = event["event"] == "applied"
                return Outcome(functions, tuple(event.get("active", ())), data=data, generation=applied)

    def _next(self, *names: str) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while True:
            lines = self.events.read_text().splitlines(keepends=True) if self.events.exists() else []
            while self._seen < len(lines) and lines[self._seen].endswith("\n"):
                event = json.loads(lines[self._seen])
                self._seen += 1
                if event["event"] in names:
                    return dict(event)
            said = Path(self.stderr.name)
            assert self.process.poll() is None, f"patcher ended: {said.read_text()}"
            assert time.monotonic() < deadline, f"no {' or '.join(names)} came: {lines}\n{said.read_text()}"
            time.sleep(0.005)

    def revert(self, generation: int) -> None:
        _run([*_PATCHER, "revert", str(self.pid), str(generation)], REPOSITORY)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        self.stderr.close()
        self.process.wait(SECONDS)


_PATCHER = (sys.executable, "-m", "patcher")
_SUFFIX = re.compile(r"\.(cold|part|isra|constprop|lto_priv).*$")


def plain(name: str) -> str:
    """Return a function's name without what the compiler appended."""
    return _SUFFIX.sub("", name)


# --- playing ----------------------------------------------------------------------------------------------------------


@contextmanager
def _controller(kind: type[Api] | type[Watch], built: Built, pid: int) -> Iterator[Api | Watch]:
    controller = kind(built, pid)
    try:
        yield controller
    finally:
        controller.close()


def play(scenario: Scenario, variant: Variant, directory: Path, shared: Path, *, watch: bool = False) -> None:
    """Build, start, and play every step; raises AssertionError where anything is not as it must be."""
    built = build(scenario, variant, directory, shared)
    with Program(built.program, scenario.environment) as program:
        player = _Player(scenario, built, program)
        player.check_answers(scenario.asks)
        before = snapshot(program.pid)
        player.constants = [program.ask(line) for line in scenario.constant]
        with _controller(Watch if watch else Api, built, program.pid) as controller:
            for number, step in enumerate(scenario.steps, 1):
                player.step(f"step {number}", step, controller)
            if player.generation:
                controller.revert(0)
            player.check("in the end", scenario.final)
            after = snapshot(program.pid)
            if scenario.libraries:  # what was loaded stays
                after = dataclasses.replace(after, text={k: v for k, v in after.text.items() if k in before.text})
            check_restored(before, after)


def _fits(expected: Sequence[str], data: Iterable[str]) -> bool:
    """Tell whether there is what is expected, and nothing else; an expected text may leave out the end."""
    found = list(data)
    return all(any(d.startswith(e) for d in found) for e in expected) and all(
        d.startswith(tuple(expected)) for d in found
    )


class _Player:
    def __init__(self, scenario: Scenario, built: Built, program: Program) -> None:
        self.scenario = scenario
        self.built = built
        self.program = program
        self.generation = 0
        self.constants: list[str] = []
        self._answers: dict[str, str] = {}
        self._latest = 0

    def step(self, where: str, step: Step, controller: Controller) -> None:
        if step.revert is not None:
            controller.revert(step.revert)
            self.generation = step.revert
        for edit in step.edits:
            self._edit(edit)
        if self.scenario.rebuild:
            self.built.rebuild()
        files = step.apply or tuple(dict.fromkeys(e.file for e in step.edits if e.file.endswith(_UNITS)))
        refused = False
        if files:
            outcome = controller.apply(step, files)
            refused = bool(outcome.refused)
            self._check_outcome(where, step, outcome)
        if refused and step.may_refuse:
            self.check(where, tuple(Ask(a.line, self._answers.get(a.line, "")) for a in step.asks))
        else:
            self.check(where, step.asks)

    def _edit(self, edit: Edit) -> None:
        path = self.built.sources / edit.file
        text = path.read_text()
        for old, new in edit.replace:
            assert old in text, f"{edit.file} does not contain {old!r}"
            text = text.replace(old, new)
        saved = path.with_name(path.name + ".saved")
        saved.write_text(text)
        saved.rename(path)

    def _check_outcome(self, where: str, step: Step, outcome: Outcome) -> None:
        said = f"{where}: {outcome}"
        if step.refused or (step.may_refuse and outcome.refused):
            assert outcome.refused, f"{said}: applied, where it was to be refused"
            assert step.may_refuse or outcome.refused == step.refused, said
            assert all(name in outcome.message for name in step.names), said
            return
        assert not outcome.refused, said
        assert bool(outcome.functions) != step.unchanged, said
        assert step.data is None or _fits(step.data, outcome.data), said
        if outcome.generation:
            self._latest += 1
            self.generation = self._latest
        assert set(step.changed) <= {n for n, status in outcome.functions.items() if status == "changed"}, said
        assert set(step.added) <= {n for n, status in outcome.functions.items() if status == "added"}, said
        assert not set(step.same) & set(outcome.functions), said
        assert set(step.active) <= set(outcome.active), said
        assert outcome.line_only is None or set(step.line_only) <= set(outcome.line_only), said

    def check(self, where: str, asks: Sequence[Ask]) -> None:
        self.program.check_untouched()
        self.check_answers(asks, where)
        now = [self.program.ask(line) for line in self.scenario.constant]
        assert now == self.constants, f"{where}: what has to stay the same differs"

    def check_answers(self, asks: Sequence[Ask], where: str = "before any patch") -> None:
        for ask in asks:
            if ask.reject:
                assert ask.reject == self._answers.get(ask.line), f"{where}: {ask} rejects what never was"
                assert ask.reject != ask.expect
            got = self.program.ask(ask.line)
            assert got == ask.expect, f"{where}: {ask.line!r} gives {got!r} instead of {ask.expect!r}"
            self._answers[ask.line] = got
