"""Compiling units into objects of our own.

Decides where objects go (a private directory, removed at the end) and how a failure is told. The switches are the
user's (`command`), the running is `running`'s. Nothing of the user's is written.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

from patcher.build.background import Background
from patcher.build.command import (
    CompileCommand,
    Variant,
    input_argument,
    is_cpp,
    listing_switches,
    object_arguments,
    text_of,
)
from patcher.build.database import GET_A_DATABASE
from patcher.build.dependencies import named_files, read_listing
from patcher.build.expansions import Compiled, Expansions, Found, now
from patcher.build.mirror import mirrored, write_texts
from patcher.build.preamble import Preambles, Ready
from patcher.build.running import Job, Outcome, never, run_all
from patcher.build.toolchain import identify
from patcher.build.workplace import Workplace
from patcher.errors import BuildError

# gcc writes dependencies where these say, whatever the switches are
_WRITES_ELSEWHERE = ("DEPENDENCIES_OUTPUT", "SUNPRO_DEPENDENCIES")


@dataclass(frozen=True, slots=True)
class CompiledUnit:
    """An object made from a source file, with the command that made it and the compiler's warnings, verbatim."""

    source: Path
    object: Path
    command: tuple[str, ...]
    milliseconds: float
    diagnostics: str
    listing: str = ""  # what the compile read, as a dependency file, where the compiler is one that says so


@dataclass(frozen=True, slots=True)
class _Task:
    command: CompileCommand
    job: Job
    object: Path
    ready: Ready | None = None  # the preamble that it is compiled behind

    @property
    def listing(self) -> Path:
        return self.object.with_suffix(".d")


class _Learning:
    """What is done in the background so that later compiles are shorter, or none."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self._background = Background()
        self.preambles = Preambles(directory / "preambles", environment, self._background)
        self.expansions = Expansions(directory / "expansions", environment, self._background)

    def close(self) -> None:
        self._background.stop()
        self.preambles.close()
        self.expansions.close()


class Compiler:
    """Compiles units into a directory of its own, which `close` removes with all objects."""

    def __init__(
        self,
        directory: Path | None = None,
        *,
        colour: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """`directory` is where our own is made; by default the user's runtime directory, or that of temporary files.

        `progress` is told how many units of how many have been compiled.
        """
        self._progress = progress
        self._workplace = Workplace(directory)
        self.directory = self._workplace.path
        self._colour = colour
        self._numbers = count(1)
        self._learning: _Learning | None = None

    def learn(self, commands: Sequence[CompileCommand]) -> None:
        """From now on have the preambles of units precompiled in the background: of these, and of what is compiled.

        What is compiled is kept as well, for when a header is saved that makes no difference to it.
        """
        if self._learning is None:
            self._learning = _Learning(self.directory, self._environment())
        preambles = self._learning.preambles
        found = preambles.ready(commands)
        preambles.learn([command for command, ready in zip(commands, found, strict=True) if ready is None])

    def left(self) -> int:
        """Return how many preambles are still to be precompiled."""
        return self._learning.preambles.left() if self._learning is not None else 0

    def await_learnt(self) -> None:
        """Wait until nothing is left to be done in the background."""
        if self._learning is not None:
            self._learning.preambles.wait()
            self._learning.expansions.wait()

    def compile(
        self,
        command: CompileCommand,
        *,
        variant: Variant = Variant.PLAIN,
        text: bytes | None = None,
        options: Sequence[str] = (),
        headers: Mapping[Path, bytes] | None = None,
        cancelled: Callable[[], bool] = never,
    ) -> CompiledUnit:
        """Compile one unit; `text` stands for the file's contents, `options` are added to the command.

        With a text, `headers` stand for the contents of other files.

        Raises BuildError with the compiler's diagnostics, BuildCancelled, or NoCompileCommand (no input file named).
        """
        task = self._task(command, variant, text, tuple(options), headers)
        return self._finish((task,), cancelled)[0]

    def compile_all(
        self,
        commands: Sequence[CompileCommand],
        *,
        variant: Variant = Variant.PLAIN,
        options: Sequence[str] = (),
        cancelled: Callable[[], bool] = never,
    ) -> tuple[CompiledUnit, ...]:
        """Compile units in parallel. All run to their end; BuildError has the diagnostics of each that failed.

        `cancelled` is asked every 5 ms, in this thread; once it says so, every compiler is ended with its whole process
        group and BuildCancelled is raised.
        """
        if self._learning is not None and variant is Variant.PLAIN and not options:
            return self._compile_behind(self._learning, commands, cancelled)
        tasks = tuple(self._task(command, variant, None, tuple(options)) for command in commands)
        return self._finish(tasks, cancelled)

    def discard(self, unit: CompiledUnit) -> None:
        """Delete an object that is not needed any more."""
        shutil.rmtree(unit.object.parent, ignore_errors=True)

    def close(self) -> None:
        """Remove the directory and all objects in it."""
        if self._learning is not None:
            self._learning.close()
        self._workplace.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _task(
        self,
        command: CompileCommand,
        variant: Variant,
        text: bytes | None,
        options: tuple[str, ...],
        headers: Mapping[Path, bytes] | None = None,
    ) -> _Task:
        if not command.directory.is_dir():
            raise BuildError(
                f"{command.file}: {command.directory}, named by {command.origin}, is not there to compile in",
                f"configure the build again, or {GET_A_DATABASE}",
                file=str(command.file),
            )
        place = self._place()
        written: Path | None = None
        mirror = place / "text" if headers else None
        if text is not None and mirror is not None:
            written = mirrored(mirror, command.file)
            write_texts(mirror, {**(headers or {}), command.file: text_of(command, text, variant)})
        elif text is not None or variant & Variant.SHIFTED:
            written = _write_text(place, command, text, variant)
        output = place / f"{command.file.name}.o"
        needs_identity = written is not None or variant is not Variant.PLAIN or is_cpp(command)
        toolchain = identify(command.arguments, command.directory) if needs_identity else None
        arguments = object_arguments(
            command,
            output,
            toolchain=toolchain,
            variant=variant,
            text=written,
            colour=self._colour,
            options=options,
            listing=output.with_suffix(".d"),
            mirror=mirror,
        )
        return _Task(command, Job(arguments, command.directory, place / "output"), output)

    def _compile_behind(
        self, learning: _Learning, commands: Sequence[CompileCommand], cancelled: Callable[[], bool]
    ) -> tuple[CompiledUnit, ...]:
        """Compile units behind their preambles, where they have some; what does not go that way, plainly."""
        began = now()
        preambles = learning.preambles
        found = preambles.ready(commands)
        kept = [self._kept(ready) if ready is not None else None for ready in found]
        fresh = self._unchanged(learning.expansions, commands, found, cancelled)
        kept = [unit or fresh.get(number) for number, unit in enumerate(kept)]
        tasks = [
            self._task_behind(command, ready) if ready is not None and ready.worth else self._plain_task(command)
            for command, ready, unit in zip(commands, found, kept, strict=True)
            if unit is None
        ]
        outcomes = self._run_behind(tasks, preambles, cancelled)
        made = self._units_of(tasks, outcomes)
        for task, unit in zip(tasks, made, strict=True):
            done = Compiled(task.command, unit.object, unit.listing, began, unit.milliseconds)
            if not cancelled():  # else it may have read what was written since
                learning.expansions.learn(done, plain=task.ready is None)
        rest = iter(made)
        units = tuple(unit or next(rest) for unit in kept)
        for ready, unit in zip(found, units, strict=True):
            if ready is not None:
                preambles.remember(ready, unit.object)
        preambles.learn([command for command, ready in zip(commands, found, strict=True) if ready is None])
        return units

    def _run_behind(self, tasks: list[_Task], preambles: Preambles, cancelled: Callable[[], bool]) -> list[Outcome]:
        """Run tasks; those that fail behind a preamble are replaced by plain ones."""
        outcomes = self._run(tasks, cancelled)
        again = [n for n, task in enumerate(tasks) if task.ready is not None and not _is_good(task, outcomes[n])]
        plain = [self._plain_task(tasks[number].command) for number in again]
        for number, task, outcome in zip(again, plain, self._run(plain, cancelled), strict=True):
            ready = tasks[number].ready
            if ready is not None and outcome.status == 0:
                preambles.useless(ready)
            tasks[number], outcomes[number] = task, outcome
        return outcomes

    def _unchanged(
        self,
        expansions: Expansions,
        commands: Sequence[CompileCommand],
        found: Sequence[Ready | None],
        cancelled: Callable[[], bool],
    ) -> dict[int, CompiledUnit]:
        """Return the units without a preamble that holds, and without a change, by their places among `commands`."""
        places = [number for number, ready in enumerate(found) if ready is None]
        objects = expansions.find([commands[number] for number in places], cancelled)
        units = {places[n]: self._linked(commands[places[n]], one) for n, one in objects.items()}
        return {number: unit for number, unit in units.items() if unit is not None}

    def _plain_task(self, command: CompileCommand) -> _Task:
        return self._task(command, Variant.PLAIN, None, ())

    def _task_behind(self, command: CompileCommand, ready: Ready) -> _Task:
        place = self._place()
        output = place / f"{command.file.name}.o"
        words = (*ready.arguments(place, output), *listing_switches(output.with_suffix(".d")))
        return _Task(command, Job(words, command.directory, place / "output"), output, ready)

    def _kept(self, ready: Ready) -> CompiledUnit | None:
        """Return the object of an earlier text that differs in comments only."""
        if ready.kept is None:
            return None
        rewriting = ready.made.rewriting
        return self._linked(rewriting.command, Found(ready.kept, ready.rule(), rewriting.words))

    def _linked(self, command: CompileCommand, found: Found) -> CompiledUnit | None:
        output = self._place() / f"{command.file.name}.o"
        try:
            os.link(found.object, output)
        except OSError:
            return None
        return CompiledUnit(command.file, output, found.words, 0.0, "", found.listing)

    def _place(self) -> Path:
        place = self.directory / str(next(self._numbers))
        place.mkdir()
        return place

    def _environment(self) -> dict[str, str]:
        environment = {key: value for key, value in os.environ.items() if key not in _WRITES_ELSEWHERE}
        environment["TMPDIR"] = str(self.directory)  # what a killed compiler leaves behind goes with the directory
        return environment

    def _finish(self, tasks: tuple[_Task, ...], cancelled: Callable[[], bool]) -> tuple[CompiledUnit, ...]:
        return self._units_of(tasks, self._run(tasks, cancelled))

    def _run(self, tasks: Sequence[_Task], cancelled: Callable[[], bool]) -> list[Outcome]:
        try:
            jobs = [task.job for task in tasks]
            environment = self._environment()
            return list(run_all(jobs, environment=environment, cancelled=cancelled, progress=self._progress))
        except OSError as error:
            raise _not_started(error, tasks) from None

    def _units_of(self, tasks: Sequence[_Task], outcomes: Sequence[Outcome]) -> tuple[CompiledUnit, ...]:
        pairs = tuple(zip(tasks, outcomes, strict=True))
        failed = [(task, outcome) for task, outcome in pairs if outcome.status != 0 or not task.object.exists()]
        if failed:
            raise _failure(failed)
        return tuple(
            CompiledUnit(
                task.command.file,
                task.object,
                task.job.arguments,
                outcome.milliseconds,
                outcome.output,
                self._listing(task),
            )
            for task, outcome in pairs
        )

    def _listing(self, task: _Task) -> str:
        listed = read_listing(task.listing)
        if task.ready is None:
            return listed
        # A compiler behind a preamble lists what is ours, and perhaps not what the preamble was made from.
        more = [file for file in named_files(listed) if not Path(file).is_relative_to(self.directory)]
        return task.ready.rule(more)


def _is_good(task: _Task, outcome: Outcome) -> bool:
    """Tell whether a task behind a preamble made the object of the text that the preamble was chosen for."""
    still = task.ready is None or task.ready.still_reads()
    return outcome.status == 0 and task.object.exists() and still


def _write_text(place: Path, command: CompileCommand, text: bytes | None, variant: Variant) -> Path:
    """Write what is compiled instead of the file, under the same name, where nothing else can be included from."""
    contents = command.file.read_bytes() if text is None else text
    path = place / "text" / os.path.basename(input_argument(command))
    path.parent.mkdir()
    path.write_bytes(text_of(command, contents, variant))
    return path


def _not_started(error: OSError, tasks: Sequence[_Task]) -> BuildError:
    name = str(error.filename)
    task = next((task for task in tasks if name == task.job.arguments[0]), tasks[0])
    return BuildError(
        f"{task.command.file}: {task.job.arguments[0]}, the compiler named by {task.command.origin}, cannot be run: "
        f"{error.strerror}",
        f"install it, or {GET_A_DATABASE}",
        file=str(task.command.file),
    )


def _failure(failed: Sequence[tuple[_Task, Outcome]]) -> BuildError:
    names = ", ".join(str(task.command.file) for task, _ in failed)
    first, outcome = failed[0]
    hints = ["fix what the compiler says and save again"]
    if any(task.command.derived for task, _ in failed):
        hints.append(
            f"the command was put together from the {first.command.origin}, which does not record -D switches; "
            f"where those are missing, {GET_A_DATABASE}"
        )
    return BuildError(
        f"{names}: {_how(outcome)} ({shlex.join(first.job.arguments)})",
        "; or, ".join(hints),
        file=str(first.command.file),
        files=[str(task.command.file) for task, _ in failed],
        diagnostics="".join(outcome.output for _, outcome in failed),
    )


def _how(outcome: Outcome) -> str:
    if outcome.status < 0:
        return f"the compiler was killed by signal {-outcome.status}"
    return "does not compile" if outcome.status else "the compiler made no object"
