"""After any series of edits the patched process answers as a cold build of the same sources does.

A short form runs with the other tests; `make parity` has PATCHER_PARITY=200 series, from PATCHER_PARITY_SEED on.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from project import Running

from patcher.edits import State
from patcher.loop import Loop
from patcher.options import Options
from patcher.report import Applied, BuildFailed, Event, Note, Refused, Saved, Unchanged
from patcher.session import Session
from patcher.target import Target

from .model import Program

SERIES = int(os.environ.get("PATCHER_PARITY", "10"))
FIRST = int(os.environ.get("PATCHER_PARITY_SEED", "1"))
EDITS = 5
QUESTIONS = range(-3, 9)
FLAGS = ("-g", "-O1")


class Cold:
    """Builds of texts, their objects kept by what went into them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._objects: dict[str, Path] = {}

    def program(self, texts: dict[str, str]) -> Path:
        """Return the program that the texts make."""
        headers = "".join(f"{name}\0{text}\0" for name, text in sorted(texts.items()) if name.endswith(".h"))
        objects = [self._object(name, headers, texts) for name in sorted(texts) if name.endswith(".c")]
        program = self._root / hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:16]
        if not program.exists():
            subprocess.run(["gcc", "-o", program, *objects, "-Wl,-z,now"], check=True)
        return program

    def _object(self, name: str, headers: str, texts: dict[str, str]) -> Path:
        key = hashlib.sha256(f"{name}\0{headers}\0{texts[name]}".encode()).hexdigest()[:16]
        if key not in self._objects:
            place = self._root / f"o{key}"
            place.mkdir()
            for each, text in texts.items():
                if each == name or each.endswith(".h"):
                    (place / each).write_text(text)
            subprocess.run(["gcc", *FLAGS, "-c", name, "-o", "unit.o"], cwd=place, check=True)
            self._objects[key] = place / "unit.o"
        return self._objects[key]


class Series:
    """A process, a loop that watches over it, and the texts that should be live."""

    def __init__(self, seed: int, root: Path, cold: Cold) -> None:
        self.cold = cold
        self.random = Random(seed)
        self.program = Program(self.random)
        self.sources = root / "src"
        self.sources.mkdir(parents=True)
        self.live = self.program.texts()
        self.told: list[str] = []
        self.events: list[Event] = []
        self.write(self.live)
        self.running = Running([str(cold.program(self.live))])

    def write(self, texts: dict[str, str]) -> set[Path]:
        """Write the texts that are others, with compile commands for all, and return their files."""
        changed = set()
        for name, text in texts.items():
            path = self.sources / name
            if not path.exists() or path.read_text() != text:
                path.write_text(text)
                changed.add(path)
        entries = [
            {"directory": str(self.sources), "file": name, "arguments": ["gcc", *FLAGS, "-c", name]}
            for name in texts
            if name.endswith(".c")
        ]
        (self.sources / "compile_commands.json").write_text(json.dumps(entries))
        return changed

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def save(self, loop: Loop, touched: set[Path]) -> None:
        """Save what the program's texts are now, and see that what is live is what is said."""
        texts = self.program.texts()
        files = self.write(texts) | touched
        if not files:
            return
        self.events.clear()
        loop.round(frozenset(files), lambda: False)
        for event in self.events:
            if isinstance(event, Applied | Unchanged):
                self.live |= {Path(f).name: texts[Path(f).name] for f in event.files}
            elif not isinstance(event, BuildFailed | Refused | Note | Saved):
                raise AssertionError(event)
        # A header that nobody includes is live as soon as it is there.
        pending = {f.name for f in loop.edits.pending()}
        self.live |= {f.name: texts[f.name] for f in files if f.suffix == ".h" and f.name not in pending}
        self.told += [f"{type(e).__name__} {getattr(e, 'message', '')}" for e in self.events]

    def check(self, what: str, loop: Loop) -> None:
        """Compare what the process answers with what a cold build of what is live does."""
        try:
            program = self.cold.program(self.live)
        except subprocess.CalledProcessError:
            # A function that another needs is brought in from a file of which the rest is refused: no texts say that.
            assert loop.edits.pending(), "\n".join([what, *self.told])
            self.told.append("Passed over")
            return
        cold = Running([str(program)])
        try:
            expected = [cold.ask(n) for n in QUESTIONS]
        finally:
            cold.end()
        assert [self.running.ask(n) for n in QUESTIONS] == expected, "\n".join([what, *self.told])


def play(seed: int, root: Path, cold: Cold, check_each: Callable[[int], bool]) -> Series:
    """Play one series of edits, some saved together, some back to what was before."""
    series = Series(seed, root, cold)
    try:
        options = Options(watched=(series.sources,))
        with Session(Target.attach(series.running.pid), options, series) as session:
            session.remember_texts([series.sources])
            loop = Loop(session, [series.sources])
            states = [series.program.state()]
            for number in range(EDITS):
                if series.random.random() < 0.15:
                    series.program.restore(series.random.choice(states))
                    done = ["back"]
                else:
                    done = [series.program.edit() for _ in range(series.random.choice((1, 1, 1, 2, 5)))]
                    states.append(series.program.state())
                touch = {series.sources / "u1.c"} if series.random.random() < 0.1 else set()
                series.told.append(f"{number}: {done}")
                series.save(loop, touch)
                if check_each(number):
                    series.check(f"seed {seed}, edit {number}", loop)
            series.program.mend()
            series.save(loop, {series.sources / "u0.c"})
            series.check(f"seed {seed}, at the end", loop)
            assert not [f for f in loop.edits.core() if loop.edits.state(f) is not State.REFUSED], series.told
    finally:
        series.running.end()
    return series


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Cold:
    return Cold(tmp_path_factory.mktemp("cold"))


@pytest.mark.timeout(60 + 20 * SERIES)
def test_a_patched_process_answers_as_a_cold_build_does(tmp_path: Path, cold: Cold) -> None:
    """Several series in one test: what most of them apply shows that it is not all refused."""
    applied, passed_over, refused = 0, 0, []
    for seed in range(FIRST, FIRST + SERIES):
        series = play(seed, tmp_path / str(seed), cold, lambda number: SERIES > 10 or number % 3 == 2)
        applied += sum(line.startswith("Applied") for line in series.told)
        passed_over += series.told.count("Passed over")
        refused += [line for line in series.told if line.startswith("Refused")]
    print(f"{SERIES} series: {applied} generations, {len(refused)} refused, {passed_over} passed over")
    print("\n".join(refused))
    assert applied > 2 * SERIES
    assert passed_over < SERIES / 4
