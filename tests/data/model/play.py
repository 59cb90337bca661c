"""One run: a random program is started, edited ten times as it runs, and held against the model after each save."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from project import Running, assert_untouched

import patcher
from data.model.edits import Author, Edit, Impossible
from data.model.expect import AMBIGUOUS, fates, refusals
from data.model.program import MAIN, Program, State, Value, call
from patcher.errors import PatcherError
from patcher.outcome import Generation
from patcher.session import Session

STEPS = 10
COMPILERS = ("gcc", "clang")
LEVELS = ("-O0", "-O2")
SECTIONS = ("-ffunction-sections", "-fdata-sections")
# Where the program is behind the model: edits that are not drawn, words that are not looked at closely, clones that are
# new with every save.
NOT_YET: frozenset[Edit] = frozenset()
# With -g what is not ambiguous is not refused. Without it, all that tells statics of one name and size in one function
# apart is which instructions refer to which, and what they begin with: where an optimiser lays the code out anew, that
# need not be enough, and a refusal is right.
STRICT_WITHOUT_DEBUG = False
SAID = frozenset({"added", "kept"})  # of "added", "found", "moved", "kept"
CLONES_ARE_FOUND = False  # a .constprop that a patch brought is known to the next one
# What changes answers for certain.
VISIBLE = {
    Edit.CODE,
    Edit.CONSTANT,
    Edit.SHARED_CONSTANT,
    Edit.ADD_VARIABLE,
    Edit.ADD_RIVAL,
    Edit.REMOVE_VARIABLE,
    Edit.ADD_USE,
    Edit.REMOVE_USE,
    Edit.ADD_CONSTANT,
    Edit.ADD_FUNCTION,
    Edit.REMOVE_FUNCTION,
}
WEIGHTS: dict[Edit, int] = dict.fromkeys(Edit, 2) | {Edit.TOUCH: 1, Edit.FORM: 1, Edit.REVERT: 3, Edit.RE_APPLY: 3}


@dataclass(frozen=True, slots=True)
class Style:
    """How a program is built."""

    compiler: str
    flags: tuple[str, ...]
    link: tuple[str, ...]

    @classmethod
    def of(cls, seed: int) -> Style:
        random = Random(f"style {seed}")
        compiler, level = COMPILERS[seed % 2], LEVELS[seed // 2 % 2]
        pie = random.random() < 0.7
        flags = [level, "-w", *([] if pie else ["-fno-pie"])]
        flags += random.choice((["-g"], ["-g"], ["-g1"], []))
        flags += random.choice(([], [], list(SECTIONS), ["-fdata-sections"]))
        flags += random.choice(([], ["-fno-common"], ["-fcommon"]))
        return cls(compiler, tuple(flags), () if pie else ("-no-pie",))

    @property
    def debug(self) -> bool:
        return "-g" in self.flags


class Deviation(AssertionError):
    """The process is not what the model says."""


class Wrong(Exception):
    """A generator or model that contradicts itself."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The texts that were saved at a step, for whoever has to look at it."""

    kind: Edit
    texts: dict[str, str]


class Play:
    """A running program, the session that patches it, and what the model says of both."""

    def __init__(self, seed: int, root: Path, weights: dict[Edit, int] | None = None) -> None:
        self.seed = seed
        self.root = root
        self.style = Style.of(seed)
        self.random = Random(seed)
        self.author = Author(self.random, rivals=Edit.ADD_RIVAL not in NOT_YET)
        self.weights = WEIGHTS | dict.fromkeys(NOT_YET, 0) if weights is None else weights
        self.live = self._first()
        self.state: State = {}
        self.programs: dict[int, Program] = {0: self.live}
        self.parents: dict[int, int] = {}
        self.generation = 0
        self.reverted: Program | None = None
        self.addresses: dict[str, int] = {}
        self.steps: list[Snapshot] = []
        self.stale: list[str] = []  # constants that others go on with, which the patch said
        self.anew = False  # a variable that moved is new, which the patch said
        self.refused: list[str] = []
        self._bring(self.live)

    def _first(self) -> Program:
        while True:
            with contextlib.suppress(Impossible):
                return self.author.program()

    # --- files and the process ----------------------------------------------------------------------------------------

    def build(self) -> Path:
        """Write the sources, compile and link them, and return the program."""
        self.root.mkdir(parents=True)
        self._write(self.live)
        self.steps.append(Snapshot(Edit.TOUCH, self.live.texts()))
        commands, objects = [], [str(_main_object(self.root.parent))]
        for source in self.live.texts():
            output = source[:-1] + "o"
            arguments = [self.style.compiler, *self.style.flags, "-c", source, "-o", output]
            subprocess.run(arguments, cwd=self.root, check=True)
            commands.append({"directory": str(self.root), "file": source, "arguments": arguments})
            objects.append(output)
        (self.root / "compile_commands.json").write_text(json.dumps(commands))
        subprocess.run(["gcc", "-o", "program", *objects, *self.style.link], cwd=self.root, check=True)
        return self.root / "program"

    def _write(self, program: Program) -> list[Path]:
        """Write what differs from the sources as they are, and return the paths."""
        changed = []
        for name, text in program.texts().items():
            path = self.root / name
            if not path.exists() or path.read_text() != text:
                path.write_text(text)
                changed.append(path)
        return changed

    def run(self) -> None:
        """Play all steps. Raises `Deviation`."""
        program = self.build()
        running = Running([str(program)])
        try:
            with contextlib.ExitStack() as stack:
                session = self._attach(stack, running.pid)
                self._check(running, "as it was started")
                for _ in range(STEPS):
                    if self.random.random() < 0.1:
                        stack.close()
                        session = self._attach(stack, running.pid)
                    kind = self._step(session)
                    if self.stale or self.anew:
                        break  # the model has one value for all units, and takes a variable that moved for the same
                    self._check(running, f"after: {kind.value}")
            assert_untouched(running.pid)
        finally:
            running.end()

    def _attach(self, stack: contextlib.ExitStack, pid: int) -> Session:
        commands = self.root / "compile_commands.json"
        return stack.enter_context(patcher.attach(pid, compile_commands=commands))

    # --- steps --------------------------------------------------------------------------------------------------------

    def _step(self, session: Session) -> Edit:
        kind, saved = self._draw()
        if kind is Edit.REVERT:
            self.steps.append(Snapshot(kind, saved.texts()))
            self._revert(session)
            return kind
        self.steps.append(Snapshot(kind, saved.texts()))
        self._save(session, kind, saved)
        return kind

    def _draw(self) -> tuple[Edit, Program]:
        kinds = [k for k, w in self.weights.items() if w]
        for _ in range(1000):
            kind = self.random.choices(kinds, [self.weights[k] for k in kinds])[0]
            with contextlib.suppress(Impossible):
                return kind, self._edited(kind)
        raise Wrong(f"seed {self.seed}: nothing can be done to the program")

    def _edited(self, kind: Edit) -> Program:
        if kind is Edit.REVERT:
            if not self.generation:
                raise Impossible
            return self.programs[self.parents[self.generation]]
        if kind is Edit.RE_APPLY:
            if self.reverted is None:
                raise Impossible
            return self.reverted
        if kind is Edit.TOUCH:
            return self.live
        saved = self.author.edit(self.live, kind)
        if kind is not Edit.CODE and self.random.random() < 0.4:
            saved = self.author.edit(saved, Edit.CODE)
        return saved

    def _revert(self, session: Session) -> None:
        parent = self.parents[self.generation]
        number = session.revert()
        if number != parent:
            raise Deviation(f"reverted to {number}, which should be {parent}")
        self.reverted = self.live
        self.generation = number
        self._now(self.programs[number])
        self._write(self.live)

    def _check_visible(self, kind: Edit, saved: Program) -> None:
        """An edit that no answer tells from the old program would prove nothing."""
        if kind in VISIBLE:
            calls = [(f.uid, given) for f in (*self.live.functions, *saved.functions) for given in range(4)]
            state = {v.uid: Value.of(v) for v in saved.variables} | self.state
            if all(call(self.live, dict(state), *c) == call(saved, dict(state), *c) for c in calls):
                raise Wrong(f"no answer shows that somebody did this: {kind.value}")

    def _save(self, session: Session, kind: Edit, saved: Program) -> None:
        self._check_visible(kind, saved)
        files = self._write(saved) or [self.root / "unit0.c"]
        may_refuse = refusals(self.live, saved, self.author.history, debug=self.style.debug)
        try:
            generation = session.apply(*files)
        except PatcherError as error:
            strict = self.style.debug or STRICT_WITHOUT_DEBUG
            if error.code not in may_refuse and (strict or error.code != AMBIGUOUS):
                raise Deviation(f"refused with {error.code}: {error.message}") from None
            self.refused.append(error.code)
            self._write(self.live)
            return
        self._check_generation(generation, kind, saved)
        self.stale = [v.name for v in generation.variables if v.outcome == "stale"]
        if self.stale and kind not in (Edit.CONSTANT, Edit.SHARED_CONSTANT):
            raise Deviation(f"said to be stale: {self.stale}")
        if generation.number != self.generation:
            self.parents[generation.number] = self.generation
        self.generation = generation.number
        self.programs[generation.number] = saved
        self.reverted = None
        self._now(saved)

    def _check_generation(self, generation: Generation, kind: Edit, saved: Program) -> None:
        cloning = not CLONES_ARE_FOUND and self.style.compiler == "gcc" and "-O2" in self.style.flags
        if kind is Edit.TOUCH and not cloning and (generation.functions or generation.number != self.generation):
            raise Deviation(f"nothing was changed, and these functions were: {generation.functions}")
        expected = fates(self.live, saved, self.author.history)
        for word in SAID:
            said = {v.name.rpartition(".")[2] for v in generation.variables if v.outcome == word}
            if word == "added" and not self.style.debug:
                # Which unit has a global is not known: what becomes of it elsewhere may be new, and is said to be.
                self.anew = bool(said - expected.allowed[word] & expected.allowed["moved"])
                said -= expected.allowed["moved"]
            if not expected.required[word] <= said <= expected.allowed[word]:
                raise Deviation(f"said to be {word}: {sorted(said)}, and it is {sorted(expected.required[word])}")

    def _now(self, program: Program) -> None:
        self.live = program
        self._bring(program)

    def _bring(self, program: Program) -> None:
        for variable in program.variables:
            self.state.setdefault(variable.uid, Value.of(variable))
        self.author.history.applied(program)

    # --- answers ------------------------------------------------------------------------------------------------------

    def _check(self, running: Running, when: str) -> None:
        """Call every function that there is, and one that there is not, and compare what the process tells."""
        for unit, functions in self.live.shape():
            for uid in (*functions, 0):
                given = self.random.randint(0, 99)
                expected = call(self.live, self.state, uid, given)
                answer = running.ask(f"{unit} {uid} {given}")
                told = answer.split()
                if told[-1:] != ["."] or not self._agrees(told[:-1], expected):
                    name = next((f.name for f in self.live.functions if f.uid == uid), "none")
                    raise Deviation(f"{when}: {name}({given}) told {answer!r}, expected {' '.join(expected)!r}")

    def _agrees(self, told: Sequence[str], expected: Sequence[str]) -> bool:
        return len(told) == len(expected) and all(self._same(a, b) for a, b in zip(told, expected, strict=True))

    def _same(self, told: str, expected: str) -> bool:
        """Compare two words; an address is the same for a variable for ever, and no other variable has it."""
        value, at, uid = expected.partition("@")
        if not at:
            return told == expected
        remainder, _, address = told.partition("@")
        owner = self.addresses.setdefault(address, int(uid))
        return remainder == value and owner == int(uid) and sum(o == owner for o in self.addresses.values()) == 1


def _main_object(folder: Path) -> Path:
    """Compile what is the same in all programs, once."""
    compiled = folder / "main.o"
    if not compiled.exists():
        (folder / "main.c").write_text(MAIN)
        subprocess.run(["gcc", "-O1", "-w", "-c", "main.c", "-o", "main.o"], cwd=folder, check=True)
    return compiled


def play(seed: int, root: Path, weights: dict[Edit, int] | None = None) -> str:
    """Play one run below `root`, and return what is wrong with it: "", or the texts and the step."""
    run = Play(seed, root / f"seed{seed}", weights)
    try:
        run.run()
    except Exception as error:  # whatever it is, the texts tell of it
        reason = str(error) if isinstance(error, Deviation) else traceback.format_exc()
        return _story(run, reason)
    return ""


def _story(run: Play, reason: str) -> str:
    replay = f"replay: cd tests && ../.venv/bin/python -m data.model.play {run.seed}"
    lines = [f"seed {run.seed}, {run.style.compiler} {' '.join((*run.style.flags, *run.style.link))}", reason, replay]
    lines += [f"step {i}: {step.kind.value}" for i, step in enumerate(run.steps)]
    for step in run.steps[-2:]:
        lines += [f"----- {name}, {step.kind.value}\n{text}" for name, text in step.texts.items()]
    return "\n".join(lines)


def main() -> None:
    """Replay the seeds that are given as arguments, and print what is wrong with each."""
    with tempfile.TemporaryDirectory() as folder:
        for seed in map(int, sys.argv[1:]):
            print(play(seed, Path(folder)) or f"seed {seed}: as the model says")


if __name__ == "__main__":
    main()
