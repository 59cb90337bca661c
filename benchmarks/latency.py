"""How long from a save to the first new answer of the running program, and where the time goes.

Three ways to the same new answer take turns, edit by edit, on the same machine in the same state:

    patcher   the source is saved; `patcher spawn --watch` makes it live in the running program
    compiler  the command that patcher gives the compiler for that save, alone
    rebuild   the source is saved; make compiles and links; the old program is killed, the new one started

For each level of optimisation there are two kinds of edits: of a function that is patched for the first time, for which
the program has to stand still, and of the same function again. Medians; the first edits, which warm up the caches of
the file system and the compiler, are left out. Writes results/latency.json and results/latency.txt beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import unit

from patcher.build import CompileCommand
from patcher.build.command import object_arguments

RESULTS = Path(__file__).parent / "results"
LIMIT_SECONDS = 30.0
BETWEEN_QUESTIONS = 0.0005
WARM_UP = 3
LEVELS = ("-O0", "-O2")
KINDS = ("first", "again")


@dataclass(frozen=True)
class Sample:
    """One edit, in milliseconds: patcher's own timings, and what was measured from outside."""

    answer: float  # from the save to the first new answer of the running program
    detect: float
    build: float
    link: float
    stop: float
    compiler: float  # the same compile alone
    rebuild: float  # from the save to the first new answer of the program that was built and started anew
    functions: int  # how many functions the change replaced; one was edited

    @property
    def other(self) -> float:
        """Everything but the compiler: what patcher adds to the same compile alone."""
        return self.answer - self.compiler


class Program:
    """A program that answers on stdin, started by a command."""

    def __init__(self, command: Sequence[str], directory: Path, *, events: bool = False) -> None:
        self._process = subprocess.Popen(
            command,
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if events else None,
            text=True,
        )
        self._events: SimpleQueue[str] = SimpleQueue()
        if events:
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._events.put(line)

    def await_unchanged(self) -> None:
        """Wait for the word that a save changed nothing."""
        self.event("unchanged")

    def event(self, name: str) -> dict[str, Any]:
        """Return the next event of a name."""
        while True:
            try:
                line = self._events.get(timeout=LIMIT_SECONDS)
            except Empty:
                sys.exit(f"no event {name} came for {LIMIT_SECONDS:.0f} seconds")
            if not line.startswith("{"):
                sys.exit(line)
            event: dict[str, Any] = json.loads(line)
            if event["event"] == name:
                return event
            if event["event"] in ("refused", "build_failed", "unchanged", "exited"):
                sys.exit(f"expected {name}: {line}")

    def edit_of(self, function: int) -> int:
        """Ask for the answer of a function; return which edit of the function gave it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{function}\n")
        self._process.stdin.flush()
        return round(int(self._process.stdout.readline()) / 1000)

    def await_edit(self, function: int, edit: int) -> None:
        """Ask until the answer is the new one."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while self.edit_of(function) != edit:
            if time.monotonic() > deadline:
                sys.exit(f"no new answer of function {function} came for {LIMIT_SECONDS:.0f} seconds")
            time.sleep(BETWEEN_QUESTIONS)

    def end(self) -> None:
        """Close its stdin, at which it ends."""
        self._process.communicate(timeout=LIMIT_SECONDS)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.communicate()


class Tree:
    """A directory with the program's sources and its Makefile."""

    def __init__(self, place: Path, level: str) -> None:
        self.place = place
        self._make = ["make", "-s", f"CC={os.environ.get('CC', 'gcc')}", f"CFLAGS={level} -g"]
        place.mkdir()
        for name, text in (("unit.h", unit.header()), ("table.c", unit.table()), ("main.c", unit.MAIN)):
            (place / name).write_text(text)
        (place / "Makefile").write_text(unit.MAKEFILE)
        self.save({})
        self.make()

    @property
    def source(self) -> Path:
        return self.place / "unit.c"

    def save(self, edits: dict[int, int]) -> float:
        """Write the unit with some functions edited, in place; return when the write began."""
        text = unit.unit(edits)
        began = time.perf_counter()
        self.source.write_text(text)
        return began

    def make(self) -> None:
        subprocess.run(self._make, cwd=self.place, check=True)


class Course:
    """One level of optimisation: the program under patcher, and its twin that is rebuilt and started again."""

    def __init__(self, place: Path, level: str) -> None:
        self._edits: dict[int, int] = {}
        self._patched = Tree(place / "patched", level)
        self._rebuilt = Tree(place / "rebuilt", level)
        arguments = (os.environ.get("CC", "gcc"), level, "-g", "-pthread", "-c", "-o", "unit.o", "unit.c")
        command = CompileCommand(self._patched.place, arguments, self._patched.source.resolve(), "the benchmark")
        self._compile = object_arguments(command, place / "alone.o")
        entry = {"directory": str(self._patched.place), "arguments": arguments, "file": "unit.c"}
        commands = place / "compile_commands.json"
        commands.write_text(json.dumps([entry]))
        watching = ["--watch", "unit.c", "--compile-commands", str(commands), "--events", "-"]
        patcher = [sys.executable, "-m", "patcher", "spawn", "./prog", *watching]
        self._live = Program(patcher, self._patched.place, events=True)
        self._live.event("ready")
        self._old = Program(["./prog"], self._rebuilt.place)

    def edit(self, function: int) -> Sample:
        """Change one function's code, and take all three ways to the new answer."""
        wanted = self._edits[function] = self._edits.get(function, 0) + 1
        began = self._patched.save(self._edits)
        self._live.await_edit(function, wanted)
        answer = _since(began)
        event = self._live.event("applied")
        parts = {name: event["timings"][name] for name in ("detect", "build", "link", "stop")}
        functions = len(event["functions"])
        compiler, rebuild = self._compiler(), self._rebuild(function, wanted)
        return Sample(answer, **parts, compiler=compiler, rebuild=rebuild, functions=functions)

    def _compiler(self) -> float:
        began = time.perf_counter()
        subprocess.run(self._compile, cwd=self._patched.place, check=True)
        return _since(began)

    def _rebuild(self, function: int, wanted: int) -> float:
        began = self._rebuilt.save(self._edits)
        self._rebuilt.make()
        self._old.kill()
        self._old = Program(["./prog"], self._rebuilt.place)
        self._old.await_edit(function, wanted)
        return _since(began)

    def end(self) -> None:
        """End both programs."""
        self._old.kill()
        self._live.end()


def _since(began: float) -> float:
    return (time.perf_counter() - began) * 1e3


def measure(level: str, edits: int) -> dict[str, list[Sample]]:
    """Return the samples of one level: two edits each of as many functions as there are edits wanted."""
    samples: dict[str, list[Sample]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory(prefix="latency-") as place:
        course = Course(Path(place), level)
        try:
            for function in range(edits + WARM_UP):
                for kind in KINDS:
                    samples[kind].append(course.edit(function))
        finally:
            course.end()
    return {kind: found[WARM_UP:] for kind, found in samples.items()}


def medians(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the median of each measure, and of each edit's ratios."""
    found = {name: statistics.median(getattr(s, name) for s in samples) for name in (*asdict(samples[0]), "other")}
    found["answer_per_compiler"] = statistics.median(s.answer / s.compiler for s in samples)
    found["rebuild_per_answer"] = statistics.median(s.rebuild / s.answer for s in samples)
    return {name: round(value, 3) for name, value in found.items()}


_ROWS = (
    ("save to first new answer", "answer"),
    ("  detect", "detect"),
    ("  build", "build"),
    ("  link", "link"),
    ("  stop", "stop"),
    ("the same compile alone", "compiler"),
    ("everything but the compiler", "other"),
    ("rebuild and restart", "rebuild"),
    ("answer / compile alone", "answer_per_compiler"),
    ("rebuild / answer", "rebuild_per_answer"),
    ("functions replaced", "functions"),
)


def table(found: dict[str, dict[str, dict[str, float]]], setting: dict[str, Any]) -> str:
    """Return the medians as text."""
    columns = [(level, kind) for level in found for kind in KINDS]
    lines = [
        f"Medians of {setting['edits']} edits each, in milliseconds. A C unit of {setting['lines']} lines and "
        f"{setting['functions']} functions;",
        f"a program with {setting['threads']} threads; {setting['compiler']}; {setting['processors']} processors.",
        "first: the function was never patched before (the program is stopped); again: it was.",
        "",
        f"{'':28}" + "".join(f"{f'{level} {kind}':>12}" for level, kind in columns),
    ]
    for title, name in _ROWS:
        digits = 2 if name == "stop" or "per" in name else 1
        cells = "".join(f"{found[level][kind][name]:12.{digits}f}" for level, kind in columns)
        lines.append(f"{title:28}{cells}")
    return "\n".join(lines) + "\n"


def setting(edits: int) -> dict[str, Any]:
    """Return what the numbers depend on."""
    version = subprocess.run([os.environ.get("CC", "gcc"), "--version"], capture_output=True, text=True, check=True)
    return {
        "edits": edits,
        "lines": len(unit.unit({}).splitlines()),
        "functions": unit.unit({}).count("\n{\n"),
        "threads": unit.THREADS,
        "compiler": version.stdout.splitlines()[0],
        "processors": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure from the save to the first new answer.")
    parser.add_argument("--edits", type=int, default=20, help="edits of each kind (default: 20)")
    parser.add_argument("--dry", action="store_true", help="print, and write no results")
    asked = parser.parse_args()
    if not 1 <= asked.edits <= unit.ANSWERS - WARM_UP:
        parser.error(f"--edits: from 1 to {unit.ANSWERS - WARM_UP}")
    samples = {level: measure(level, asked.edits) for level in LEVELS}
    found = {level: {kind: medians(samples[level][kind]) for kind in KINDS} for level in LEVELS}
    where = setting(asked.edits)
    text = table(found, where)
    print(text, end="")
    if not asked.dry:
        RESULTS.mkdir(exist_ok=True)
        every = {level: {kind: [asdict(s) for s in samples[level][kind]] for kind in KINDS} for level in LEVELS}
        results = {"setting": where, "milliseconds": found, "samples": every}
        (RESULTS / "latency.json").write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "latency.txt").write_text(text)


if __name__ == "__main__":
    main()
