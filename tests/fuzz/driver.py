"""Apply many mutants of good objects to running programs, in processes that may crash or hang.

    python -m fuzz.driver COUNT [--seed N] [--first INDEX] [--save FOLDER]

A mutant passes when it is refused by one of patcher's own errors or links to something valid, within two seconds of
processor time and 200 MB. The programs must be as they were at the end: all of their memory, their maps, where
their threads stand, and what they answer.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz.corpus import PROGRAMS, build, samples
from fuzz.mutate import mutant

TESTS = Path(__file__).resolve().parent.parent
BATCH = 500  # mutants that one process looks at
PATIENCE = 60  # seconds until a worker that says nothing is taken for one that waits for ever
WORKERS = 2
PATCH = "good/fixed-gcc_fixed.o"


@dataclass
class Report:
    """What became of the mutants: outcome -> how many; and the defects, index -> what went wrong."""

    outcomes: Counter[str] = field(default_factory=Counter)
    defects: dict[int, str] = field(default_factory=dict)
    slowest: float = 0.0  # milliseconds of processor time
    largest: int = 0  # bytes that a worker's memory grew by, at most

    @property
    def count(self) -> int:
        return sum(self.outcomes.values())

    def add(self, line: dict[str, Any]) -> None:
        self.outcomes[line.get("outcome", "DEFECT")] += 1
        self.slowest = max(self.slowest, line.get("ms", 0.0))
        self.largest = max(self.largest, line.get("grown", 0))
        if "defect" in line:
            self.defects[line["index"]] = f"{line['sample']}: {line['defect']}"


class Program:
    """A running program that waits for a line."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen([str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self.process.pid
        self.ask()

    def remember(self) -> None:
        """Note how it is now."""
        self.before = self.state()

    def ask(self) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("5\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        while not Path(f"/proc/{self.pid}/syscall").read_text().startswith("0 0x0 "):  # read(0, ...)
            os.sched_yield()
        return answer

    def state(self) -> dict[str, str]:
        """Return everything of it that could be changed from outside, as hashes."""
        folder = Path(f"/proc/{self.pid}")
        found = {name: (folder / name).read_text() for name in ("maps", "syscall")}
        status = (folder / "status").read_text()
        found["status"] = "".join(re.findall(r"(?:TracerPid|State|Threads|ShdPnd|Sig(?:Pnd|Blk|Ign|Cgt)):.*\n", status))
        with (folder / "mem").open("rb", buffering=0) as memory:
            for line in found["maps"].splitlines():
                start, end = (int(text, 16) for text in line.split()[0].split("-"))
                if line.split()[1].startswith("r") and "[v" not in line:  # the kernel's clock pages change
                    memory.seek(start)
                    found[line] = hashlib.sha256(memory.read(end - start)).hexdigest()
        return found

    def check(self) -> None:
        """Raise when it is not as it was, or does not go on from there."""
        after = self.state()
        changed = [name for name in self.before if after.get(name) != self.before[name]]
        assert not changed, f"process {self.pid} is not as it was: {changed}"
        assert self.ask().strip().lstrip("-").isdigit()
        self.remember()

    def end(self) -> None:
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        self.process.wait()


@contextlib.contextmanager
def programs(folder: Path) -> Iterator[list[Program]]:
    """Start the programs of a folder that `fuzz.corpus.build` filled; one of them has a patch already."""
    started: list[Program] = []
    try:
        for name in PROGRAMS:
            started.append(Program(folder / name))
        command = [sys.executable, "-m", "patcher", "apply", "--quiet", str(started[-1].pid), str(folder / PATCH)]
        subprocess.run(command, cwd=TESTS.parent, check=True)
        for program in started:
            program.remember()
        yield started
    finally:
        for program in started:
            program.end()


def lines_of(process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """Yield what a worker says. One that says nothing for too long is ended."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        rest = b""
        while ready.select(PATIENCE):
            text = os.read(process.stdout.fileno(), 1 << 16)
            if not text:
                return
            *whole, rest = (rest + text).split(b"\n")
            yield from map(json.loads, whole)
    process.kill()


def work(
    folder: Path, running: Sequence[Program], seed: int, first: int, end: int, worker: str = "fuzz.worker"
) -> Iterator[dict[str, Any]]:
    """Yield what became of each mutant of a range. A worker that ends early is followed by another."""
    while first < end:
        numbers = (seed, first, end, *(p.pid for p in running))
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen(
                [sys.executable, "-W", "error", "-m", worker, str(folder), *map(str, numbers)],
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=TESTS,
                env={**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "OMP_NUM_THREADS": "1"},
            ) as process,
        ):
            for line in lines_of(process):
                first = line["index"] + 1
                yield line
            status = process.wait()
            errors.seek(0)
            said = errors.read().decode("utf-8", "replace")[-4000:]
        if first < end:
            yield {"index": first, "sample": "a crash", "defect": f"the worker ended with status {status}: {said}"}
            first += 1
        elif status:
            raise AssertionError(f"a worker ended with status {status}: {said}")


def run(
    folder: Path,
    seed: int,
    first: int,
    count: int,
    workers: int = 1,
    tell: Callable[[Report, dict[str, Any]], None] = lambda report, line: None,
) -> Report:
    """Try a range of mutants on programs of their own for each worker; return what became of them.

    `tell` is called with every outcome, by one thread at a time.
    """
    report, lock, failures = Report(), threading.Lock(), list[BaseException]()
    batches = iter(range(first, first + count, BATCH))

    def next_batch() -> int | None:
        with lock:
            return None if failures else next(batches, None)

    def take_batches() -> None:
        try:
            with programs(folder) as running:
                while (start := next_batch()) is not None:
                    for line in work(folder, running, seed, start, min(start + BATCH, first + count)):
                        with lock:
                            report.add(line)
                            tell(report, line)
                    for program in running:
                        program.check()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=take_batches) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt as error:  # the batches that are under way are brought to their end
        failures.append(error)
    if failures:
        raise failures[0]
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description="Apply mutants of good objects to running programs.")
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="index of the first mutant")
    parser.add_argument("--save", type=Path, help="write every mutant that found a defect into this folder")
    asked = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        build(folder)

        def tell(report: Report, line: dict[str, Any]) -> None:
            if "defect" in line:
                kept = _save(asked.save, folder, asked.seed, line["index"])
                print(f"\r--- mutant {line['index']} of seed {asked.seed}{kept}: {line['sample']}: {line['defect']}")
            if report.count % 100 == 0:
                print(f"\r{report.count} of {asked.count}", end="", file=sys.stderr, flush=True)

        report = run(folder, asked.seed, asked.first, asked.count, WORKERS, tell)
    print(f"\r{report.count} mutants of seed {asked.seed} in {time.monotonic() - began:.0f} s; the slowest took "
          f"{report.slowest:.0f} ms, memory grew by {report.largest / 1e6:.0f} MB at most")  # fmt: skip
    for outcome, number in report.outcomes.most_common():
        print(f"  {number:7} {outcome}")
    return 1 if report.defects else 0


def _save(place: Path | None, folder: Path, seed: int, index: int) -> str:
    """Write a mutant to a file, if a place is given; return what to say of it."""
    if place is None:
        return ""
    place.mkdir(parents=True, exist_ok=True)
    file = place / f"{seed}-{index}.o"
    file.write_bytes(mutant(samples(folder), seed, index)[1])
    return f", {file}"


if __name__ == "__main__":
    sys.exit(main())
