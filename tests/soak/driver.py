"""Change a busy program at random for a while, kill whoever changes it, and hold every answer against what was asked.

    python -m soak.driver SECONDS [--seed N]

The program checks itself (programs/crowd.c); the driver publishes which version of each function may answer when, and
asks functions from outside after each change. Edits, reverts, which orders are killed and how long after they were
given come from the seed; when exactly a kill strikes does not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from project import statuses

from soak.web import FUNCTIONS, SHAPES, UNITS, Row, Version, Web, table, units_of

PROGRAMS = Path(__file__).parent / "programs"
CONTROLLER = Path(__file__).parent / "controller.py"
WORKERS = 64
ROWS = 4096
WAITERS = 2  # threads in a call that shows EINTR after a stop
PATIENCE = 60.0  # seconds for one order, one answer, one thread to make one round
COMPILE = ("gcc", "-g", "-O2", "-pthread")
OBJECT = ("-ffunction-sections", "-fdata-sections")
BUSY = frozenset({"busy", "active", "entry-busy", "locked"})  # what a change may be refused with: try again
_WORDS = ("started", "finished", "wrong", "unchecked", "sent", "arrived", "twice", "expired", "short_lived",
          "interrupted")  # fmt: skip


class Wrong(Exception):
    """The program, or a controller, did what it must not."""


class Shared:
    """The file that the program and the driver share; see crowd.c."""

    def __init__(self, path: Path) -> None:
        size = 4096 + ROWS * FUNCTIONS * 4
        path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)
        self._words = np.frombuffer(self._map, np.uint64, 512)
        self._rows = np.frombuffer(self._map, np.uint32, ROWS * FUNCTIONS, 4096).reshape(ROWS, FUNCTIONS)

    def __getitem__(self, name: str) -> int:
        return int(self._words[_WORDS.index(name)])

    @property
    def first_wrong(self) -> list[int]:
        return [int(n) for n in self._words[10:16]]

    @property
    def beats(self) -> Any:
        return self._words[16 : 16 + WORKERS].copy()

    def begin(self, row: Row) -> None:
        """Publish what the functions are about to become."""
        epoch = self["started"] + 1
        self.set_row(epoch, row)
        self._words[0] = epoch

    def finish(self) -> None:
        """Publish that what was begun last is all there is from now on."""
        self._words[1] = self._words[0]

    def set_row(self, epoch: int, row: Row) -> None:
        self._rows[epoch % ROWS] = [version.number for version in row]


@dataclass
class Tally:
    """What was done, and how long the program stood still for it, in milliseconds."""

    seed: int
    applied: int = 0
    reverted: int = 0
    killed: int = 0
    killed_before: int = 0  # of them: the old generation went on
    refused: Counter[str] = field(default_factory=Counter)
    functions: int = 0
    asked: int = 0
    without_stop: int = 0
    stops: list[float] = field(default_factory=list)
    used: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    def text(self, seconds: float) -> str:
        c = self.counts
        stops = np.array(self.stops or [0.0])
        p50, p99 = np.percentile(stops, [50, 99])
        return (
            f"seed {self.seed}, {seconds:.0f} s: {self.applied} generations applied ({self.functions} functions), "
            f"{self.reverted} reverts, {self.killed} kills survived ({self.killed_before} before the flip)\n"
            f"refused for now: {dict(self.refused) or 'none'}\n"
            f"stops: {len(self.stops)}, p50 {p50:.2f} ms, p99 {p99:.2f} ms, max {stops.max():.2f} ms; "
            f"{self.without_stop} generations without a stop; {self.used >> 10} KiB of arenas used\n"
            f"visits {c['visits']}, asked from outside {self.asked}, wrong {c['wrong']}, unchecked {c['unchecked']}; "
            f"threads that came and went {c['short_lived']}\n"
            f"queued signals {c['sent']}, arrived {c['arrived']}, twice {c['twice']}; timer signals {c['expired']}, "
            f"missing {c['late']}; calls interrupted {c['interrupted']}; functions that lost counts {c['lost']}"
        )


class Process:
    """A child that answers lines with lines, and is given up when it does not."""

    def __init__(self, name: str, command: Sequence[str | Path]) -> None:
        self._name = name
        self._process = subprocess.Popen([*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._rest = b""
        self.pid = self._process.pid

    def tell(self, text: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(text.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Wrong(self._ended()) from None

    def line(self, seconds: float = PATIENCE) -> str | None:
        """Return the next line; None when none came in time."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            if not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            found = self._process.stdout.read1(1 << 16)  # type: ignore[attr-defined]
            if not found:
                raise Wrong(self._ended())
            self._rest += found
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def answer(self, text: str) -> str:
        self.tell(text)
        return self.awaited()

    def awaited(self) -> str:
        found = self.line()
        if found is None:
            raise Wrong(f"the {self._name} has not answered for {PATIENCE:.0f} s")
        return found

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def end_told(self) -> list[str]:
        """Return how it ended, if it has."""
        return [] if self._process.poll() is None else [self._ended()]

    def _ended(self) -> str:
        status = self._process.wait()
        return f"the {self._name} ended: " + (signal.strsignal(-status) or "?" if status < 0 else f"status {status}")


class Soak:
    """One run: the program, its controllers, and what the functions are to be."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.tally = Tally(seed)
        self.chance = random.Random(seed)
        self.web = Web(seed)
        self.folder = folder
        self.row = self.web.first
        self.rows: dict[int, Row] = {0: self.row}  # generation -> what the functions are in it
        self.recorded: list[int] = []
        self.where: dict[str, int] = {}
        self.history: list[str] = []
        self._next_number = FUNCTIONS + 1
        self._fresh = True  # the controller has done nothing yet: its first order takes longer
        # Seconds that orders took lately, of a fresh controller and of others.
        self._typical = {(kind, fresh): 0.5 for kind in ("apply", "objects", "revert") for fresh in (True, False)}
        self._build()
        self.shared = Shared(folder / "shared")
        self.shared.set_row(0, self.row)
        self.program = Process("program", [folder / "crowd", folder / "shared"])
        self.program.awaited()
        self._beats = self.shared.beats
        self._beats_since = time.monotonic()
        self._controller: Process | None = None

    def _build(self) -> None:
        for path in PROGRAMS.iterdir():
            (self.folder / path.name).write_text(path.read_text())
        (self.folder / "table.c").write_text(table())
        self._write(range(UNITS), self.row)
        names = [*(f"unit{u}" for u in range(UNITS)), "table", "crowd"]
        commands = []
        for name in names:
            arguments = [*COMPILE, "-c", f"{name}.c", "-o", f"{name}.o"]
            subprocess.run(arguments, cwd=self.folder, check=True)
            commands.append({"directory": str(self.folder), "file": f"{name}.c", "arguments": arguments})
        (self.folder / "compile_commands.json").write_text(json.dumps(commands))
        subprocess.run([*COMPILE, "-o", "crowd", *(f"{n}.o" for n in names)], cwd=self.folder, check=True)

    def _write(self, units: Sequence[int], row: Row) -> list[str]:
        """Write the sources of units; return their paths."""
        paths = [self.folder / f"unit{unit}.c" for unit in units]
        for unit, path in zip(units, paths, strict=True):
            path.write_text(self.web.unit(unit, row))
        return [str(path) for path in paths]

    def _objects(self, units: Sequence[int]) -> list[str]:
        for unit in units:
            command = [*COMPILE, *OBJECT, "-c", f"unit{unit}.c", "-o", f"new{unit}.o"]
            subprocess.run(command, cwd=self.folder, check=True)
        return [str(self.folder / f"new{unit}.o") for unit in units]

    # --- orders -----------------------------------------------------------------------------------------------

    @property
    def controller(self) -> Process:
        if self._controller is None:
            commands = self.folder / "compile_commands.json"
            self._controller = Process("controller", [sys.executable, CONTROLLER, str(self.program.pid), commands])
            self._controller.awaited()
        return self._controller

    def step(self) -> None:
        """Do one random thing to the program, and see whether it took it well."""
        if self.recorded and self.chance.random() < 0.25:
            self._revert(self.chance.choice([0, *self.recorded]))
        else:
            self._edit()
        self._look_after()

    def _edit(self) -> None:
        count = round(50 ** self.chance.random())
        near = self.chance.random() < 0.5
        first = self.chance.randrange(FUNCTIONS - count)
        functions = range(first, first + count) if near else self.chance.sample(range(FUNCTIONS), min(count, 12))
        row = list(self.row)
        for n in functions:
            row[n] = Version(self._next_number, self.chance.randrange(len(SHAPES)))
            self._next_number += 1
        new, units = tuple(row), units_of(functions)
        files = self._write(units, new)
        kind = "apply"
        if self.chance.random() < 0.5:
            kind, files = "objects", self._objects(units)
        answer = self._order(kind, {"apply": files}, new, f"{len(functions)} functions of {len(files)} units")
        if answer is None or "refused" in answer:
            self._write(range(UNITS), self.row)
            return
        missing = {f"f{n}" for n in functions} - set(answer.get("functions", ())) if "functions" in answer else ()
        if missing:
            raise Wrong(f"{sorted(missing)} should have changed, only {answer['functions']} did")
        self._ask(functions)

    def _revert(self, generation: int) -> None:
        before = self.row
        answer = self._order("revert", {"revert": generation}, self.rows[generation], f"to {generation}")
        if answer is not None and "refused" not in answer:
            self._write(range(UNITS), self.row)
            self._ask([n for n in range(FUNCTIONS) if before[n] != self.row[n]])

    def _order(self, kind: str, order: dict[str, Any], new: Row, what: str) -> dict[str, Any] | None:
        """Have something done that makes the functions `new`; None when the controller was killed before it was."""
        kills = self.chance.random() < 0.25
        # Half of them anywhere, half near the end, where the change is made live.
        share = self.chance.random() * 1.3 if self.chance.random() < 0.5 else self.chance.gauss(0.95, 0.15)
        after = max(0.0, share) * self._typical[kind, self._fresh]
        self.history.append(f"{kind} {what}" + (f", killed after {after * 1e3:.1f} ms" if kills else ""))
        controller = self.controller
        self.shared.begin(new)
        began = time.monotonic()
        controller.tell(json.dumps(order))
        line = controller.line(after) if kills else controller.awaited()
        if line is None:
            return self._killed(kind, new)
        self._typical[kind, self._fresh] += 0.4 * (time.monotonic() - began - self._typical[kind, self._fresh])
        self._fresh = False
        answer: dict[str, Any] = json.loads(line)
        self._understand(answer, new)
        if "refused" in answer:
            self._refused(answer)
        else:
            self._count(kind, answer)
        return answer

    def _killed(self, kind: str, new: Row) -> dict[str, Any] | None:
        self.close_controller()
        self.tally.killed += 1
        self._await_untraced()
        answer: dict[str, Any] = json.loads(self.controller.answer("{}"))
        if not self._understand(answer, new):
            self.tally.killed_before += 1
            return None
        self._count(kind, answer)
        return answer

    def _understand(self, answer: dict[str, Any], new: Row) -> bool:
        """Publish what the functions are, after an order that should have made them `new`; whether they are."""
        number = answer["generation"]
        came = number not in self.rows or (self.rows[number] == new and "refused" not in answer)
        if came:
            if number not in self.rows and number in self.recorded:
                raise Wrong(f"generation {number} was recorded before it was made")
            self.rows.setdefault(number, new)
            self.row = self.rows[number]
        elif self.rows[number] != self.row:
            raise Wrong(f"generation {number} is live: neither what was ordered nor what was there")
        else:
            self.shared.begin(self.row)
        self.shared.finish()
        self.recorded = [n for n in answer.get("recorded", self.recorded) if n in self.rows]
        self.where = answer.get("where", self.where)
        self.history[-1] += f" -> {answer.get('refused', '')} {number}"
        return came

    def _count(self, kind: str, answer: dict[str, Any]) -> None:
        if kind == "revert":
            self.tally.reverted += 1
            return
        self.tally.applied += 1
        self.tally.functions += len(answer.get("functions", ()))
        self.tally.used = answer["used"]
        if "stop" in answer:
            if answer["stop"]:
                self.tally.stops.append(answer["stop"])
            else:
                self.tally.without_stop += 1

    def _refused(self, answer: dict[str, Any]) -> None:
        if answer["refused"] not in BUSY:
            raise Wrong(f"refused: {answer['refused']}: {answer['message']}")
        self.tally.refused[answer["refused"]] += 1

    # --- looking after ----------------------------------------------------------------------------------------

    def _ask(self, changed: Sequence[int]) -> None:
        some = self.chance.sample(list(changed), min(5, len(changed)))
        for n in [*some, *(self.chance.randrange(FUNCTIONS) for _ in range(3))]:
            found = int(self.program.answer(str(n)))
            self.tally.asked += 1
            if found != self.row[n].number:
                raise Wrong(f"f{n} answers as version {found}, and is {self.row[n].number}")

    def _await_untraced(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while statuses(self.program.pid, "TracerPid") != {"0"} or statuses(self.program.pid, "State") & {"t", "T"}:
            if time.monotonic() > deadline:
                raise Wrong("threads are still traced or stopped, though their controller is dead")
            time.sleep(0.001)

    def _look_after(self) -> None:
        if self.shared["wrong"]:
            names = ("function", "versions", "since", "until", "x", "answer")
            first = dict(zip(names, self.shared.first_wrong, strict=True))
            raise Wrong(f"{self.shared['wrong']} wrong answers, the first: {first}")
        if time.monotonic() - self._beats_since > PATIENCE:
            beats = self.shared.beats
            stuck = np.flatnonzero(beats == self._beats)
            if len(stuck):
                raise Wrong(f"threads made no round for {PATIENCE:.0f} s: {stuck.tolist()}")
            self._beats, self._beats_since = beats, time.monotonic()

    def end(self) -> None:
        """End the program, and count what it lost."""
        late, lost = map(int, self.program.answer("end").split())
        counts = {name: self.shared[name] for name in _WORDS}
        self.tally.counts = {**counts, "late": late, "lost": lost, "visits": int(self.shared.beats.sum()) * 25}
        self._look_after()
        if counts["sent"] != counts["arrived"] or counts["twice"] or abs(late) > 1:
            raise Wrong(f"signals were lost:\n{self.tally.text(0)}")
        # The kernel lets go of what a tracer that dies has just stopped, as it stands: with its EINTR.
        if counts["interrupted"] > WAITERS * self.tally.killed or lost:
            raise Wrong(f"calls were interrupted, or counts lost:\n{self.tally.text(0)}")

    def close_controller(self) -> None:
        """End the controller; the next order has a new one."""
        if self._controller is not None:
            self._controller.kill()
            self._controller, self._fresh = None, True

    def close(self) -> None:
        self.close_controller()
        self.program.kill()


@contextlib.contextmanager
def soaking(folder: Path, seed: int) -> Iterator[Soak]:
    """Run the program for the length of the block; what goes wrong comes with the seed and what was done last."""
    soak = Soak(folder, seed)
    try:
        yield soak
    except Wrong as error:
        last = "\n".join([*soak.program.end_told(), *soak.history[-12:]])
        raise Wrong(f"seed {seed}, after {len(soak.history)} orders: {error}\n{last}") from None
    finally:
        soak.close()


def run(folder: Path, seed: int, seconds: float) -> Tally:
    """Change the program for so long. Raises `Wrong`."""
    with soaking(folder, seed) as soak:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            soak.step()
        soak.end()
        return soak.tally


def main() -> None:
    parser = argparse.ArgumentParser(description="Change a busy program at random, and kill whoever does it.")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--seed", type=int, default=None)
    asked = parser.parse_args()
    seed = asked.seed if asked.seed is not None else random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        try:
            print(run(Path(folder), seed, asked.seconds).text(asked.seconds))
        except Wrong as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
