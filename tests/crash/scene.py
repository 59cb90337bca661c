"""Programs whose functions must agree, the changes made to them, and patchers that somebody meddles with."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from project import Project, Running, assert_untouched, image_bytes

import patcher
from patcher.patch.arena import TOTAL_SIZE

HERE = Path(__file__).parent
INTERRUPTED = 130

# ptrace, pwrite64, wait4, flock, process_vm_writev, kill, tgkill, pidfd_send_signal: all that reaches the target.
REACHING = "101,18,61,73,311,62,234,424"
# pread64, openat, read: what it only looks with.
READING = "17,257,0"


@dataclass(frozen=True)
class Ending:
    """How a meddled patcher ended: its exit status (negative: a signal), and the call that was met, -1 for none."""

    code: int
    met: int
    said: dict[str, str] | None


class Mortals:
    """Starts patchers that come to harm."""

    def __init__(self, folder: Path) -> None:
        self.meddler = folder / "meddler"
        subprocess.run(["gcc", "-O1", "-o", str(self.meddler), str(HERE / "meddler.c")], check=True)
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "mortals.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def patch(
        self,
        pid: int,
        files: Sequence[Path],
        *,
        generation: int | None = None,
        action: str = "kill",
        moment: int = 0,
        calls: str = REACHING,
        options: dict[str, Any] | None = None,
        limits: dict[str, int] | None = None,
        policy: dict[str, Any] | None = None,
        while_stopped: Any = None,
    ) -> Ending:
        """Apply files, or revert without any, with `action` at call number `moment` of those that count; 0: at none."""
        order = {
            "pid": pid,
            "files": [str(f) for f in files],
            "generation": generation,
            "options": options or {},
            "limits": limits or {},
            "policy": policy,
            "meddler": [str(self.meddler), action, str(moment), calls] if moment else [],
        }
        answer = self._ask(order)
        if "stopped" in answer:
            while_stopped()
            answer = self._ask({})
        return Ending(answer["code"], answer["met"], answer["said"])

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate(timeout=20)


def unit(name: str, count: int = 1, *, more: str = "", asked: Sequence[str] = ()) -> str:
    """A unit of `count` functions, each of which answers 1, and one that asks them all, and `asked` of `more`."""
    text = f'#include "agree.h"\n#define STEP 1\nint count_{name};\n{more}'
    for i in range(count):
        text += f"int {name}{i}(int n)\n{{\n    count_{name}++;\n    return n + STEP;\n}}\n"
    table = ", ".join([f"{name}{i}" for i in range(count)] + list(asked))
    text += f"static int (*const table[])(int) = {{{table}}};\nvoid ask_{name}(struct asked *asked)\n{{\n"
    return text + f"    for (int i = 0; i < {count + len(asked)}; i++)\n        note(asked, table[i](0));\n}}\n"


def sources(units: dict[str, str]) -> dict[str, str]:
    """All sources of a program of such units."""
    asking = '#include "agree.h"\n' + "".join(f"void ask_{name}(struct asked *asked);\n" for name in units)
    asking += "void ask(struct asked *asked)\n{\n" + "".join(f"    ask_{name}(asked);\n" for name in units) + "}\n"
    files = {f"{name}.c": text for name, text in units.items()}
    return {"main.c": (HERE / "agree.c").read_text(), "ask.c": asking, **files}


class Scene:
    """A program and its changes. `prepare` are the changes made before, `files` the one that comes to harm."""

    def __init__(self, root: Path, units: dict[str, str], *, shared: Sequence[str] = (), **rest: Any) -> None:
        root.mkdir(parents=True, exist_ok=True)
        flags = (f"-I{HERE}", "-g0", *rest.pop("compile_flags", ()))
        self.project = Project(root / "p", sources(units), compile_flags=flags, shared=shared, link_flags=["-rdynamic"])
        self.units = [f"{name}.c" for name in units]

    def change(self, step: int) -> list[Path]:
        """Objects of all units, whose functions answer `step`."""
        return self.redefined(f"#define STEP {step}\n")

    def redefined(self, text: str) -> list[Path]:
        """Objects of all units with `text` instead of what defines STEP to be 1."""
        return [self.project.object(name, ("#define STEP 1\n", text)) for name in self.units]


def answer(program: Running) -> str:
    """What all threads answer; a change that was on its way may come between."""
    for _ in range(100):
        found = program.ask("v")
        if found != "-1":
            break
    return found


@dataclass
class Case:
    """A change that comes to harm: what was applied before (answer of each generation), and what it does."""

    scene: Scene
    before: list[list[Path]]
    files: list[Path]
    generation: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    steps: dict[int, str] = field(default_factory=dict)  # generation -> what all functions answer then
    settle: str = "9"  # what they answer when `final` is applied
    final: list[Path] = field(default_factory=list)
    constructs: bool = False  # a constructor runs before the change is live, and what it did stays

    @contextlib.contextmanager
    def running(self, *arguments: str) -> Iterator[Running]:
        with self.scene.project.running(*arguments) as program:
            self.prepare(program)
            yield program

    def prepare(self, program: Running) -> None:
        """Do what was done before."""
        if self.before:
            with patcher.attach(program.pid, **self.options) as session:
                for files in self.before:
                    session.apply(*files)

    def harm(self, mortals: Mortals, program: Running, **how: Any) -> Ending:
        return mortals.patch(program.pid, self.files, generation=self.generation, options=self.options, **how)

    def check(
        self, program: Running, before: dict[tuple[str, int, str], str], where: str, *, further: bool = True
    ) -> str:
        """The program gives the answers of one generation, status tells which, and patchers go on from there.

        `further`: with another change on top of the one that came to harm.
        """
        assert program.process.poll() is None, f"{where}: the program died with {program.process.poll()}"
        assert_untouched(program.pid)
        found = answer(program)
        with patcher.attach(program.pid, **self.options) as session:
            live = session.status().generation
            assert self.steps.get(live) == found, f"{where}: answers {found!r} in generation {live}"
            if self.files:
                session.apply(*self.files)
                expected = self.steps[max(self.steps)]
            else:
                session.revert(self.generation)
                expected = self.steps[self.generation or 0]
            assert answer(program) == expected, where
            assert len(session.status().arenas) == _arenas_mapped(program.pid), (
                f"{where}: something is left of an arena"
            )
            if self.final and further:
                session.apply(*self.final)
                assert answer(program) == self.settle, where
            session.revert(0)
            assert answer(program) == self.steps[0], where
        after = image_bytes(program.pid)
        assert {key: after.get(key) for key in before} == before, where
        assert_untouched(program.pid)
        return found


def _arenas_mapped(pid: int) -> int:
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    spans = [[int(n, 16) for n in line.split()[0].split("-")] for line in lines if line.split()[1] == "r-xp"]
    return sum("r--p" in line and "/memfd:patcher" in line for line in lines) + sum(
        end - start == TOTAL_SIZE for start, end in spans
    )


def kill_at_every(
    case: Case, mortals: Mortals, *, stride: int = 1, first: int = 1, calls: str = REACHING, action: str = "kill"
) -> set[str]:
    """Kill a patcher at every `stride`-th call until one survives; return all answers that were found."""
    seen: set[str] = set()
    moment, tries = first, 0
    while True:
        with case.scene.project.running() as program:
            before = image_bytes(program.pid)
            case.prepare(program)
            ended = case.harm(mortals, program, action=action, moment=moment, calls=calls)
            assert ended.code in (0, -signal.SIGKILL, INTERRUPTED), ended
            # What goes on after that does not depend on the call: one in three tells it.
            further = stride == 1 or tries % 3 == 0
            seen.add(case.check(program, before, f"{action} at call {moment} ({ended.met})", further=further))
        if ended.met < 0:
            return seen
        moment, tries = moment + stride, tries + 1
