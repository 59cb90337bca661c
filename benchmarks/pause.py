"""How long the program stands still for a patch, by threads and by functions, seen from inside and from outside.

    outside   what patcher reports: from the first interruption to the last release
    inside    the longest gap between two looks at the clock, in a thread of the program that does nothing else and
              calls what is patched; beside it the longest gap in as long a time without a patch: the machine's own

`first`: the functions were never patched before; each sample has a program of its own. `later`: they were. The other
threads wait in a system call, as most threads do; with --busy each of them wakes a thousand times a second instead.
Writes results/pause.txt beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
THREADS = (1, 4, 16, 64, 256, 1024)
FUNCTIONS = (1, 10, 100, 1000)
KINDS = ("first", "later")
COMPILE = ("gcc", "-O2", "-g", "-ffunction-sections", "-fdata-sections")
MAIN = """\
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

long f0(long x);
static volatile struct { long reset, longest, end, ready, busy, sum; } *shared;

static long now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000 + t.tv_nsec;
}

static void *rest(void *unused)
{
    struct timespec moment = {0, 1000000};
    while (shared->busy) {
        shared->sum += f0(1);
        nanosleep(&moment, NULL);
    }
    pause();
    return unused;
}

int main(int count, char **arguments)
{
    pthread_attr_t small;
    int file = count == 4 ? open(arguments[1], O_RDWR) : -1;
    shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (shared == MAP_FAILED)
        return 1;
    shared->busy = atoi(arguments[3]);
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 1 << 18);
    for (int i = atoi(arguments[2]); i > 1; i--) {
        pthread_t thread;
        if (pthread_create(&thread, &small, rest, NULL))
            return 2;
    }
    shared->ready = 1;
    for (long before = now(); !shared->end; ) {
        shared->sum += f0(before);
        long after = now();
        if (shared->reset) {
            shared->reset = 0;
            shared->longest = 0;
        } else if (after - before > shared->longest)
            shared->longest = after - before;
        before = after;
    }
    return 0;
}
"""


def unit(version: int, changed: int) -> str:
    """Return the text of a unit whose first functions are of a version, and the others as they were at first."""
    versions = (version if n < changed else 0 for n in range(max(FUNCTIONS)))
    return "".join(
        f"__attribute__((noinline)) long f{n}(long x)\n{{\n    return (x ^ {n + 7}) * {3 + v} + {v};\n}}\n"
        for n, v in enumerate(versions)
    )


@dataclass
class Cell:
    """The samples of one number of threads and functions, in milliseconds."""

    outside: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)
    without: list[float] = field(default_factory=list)


class Program:
    """The program that is measured, and the page that it shares with us."""

    def __init__(self, folder: Path, threads: int, busy: bool) -> None:
        self._page = folder / "page"
        self._page.write_bytes(bytes(4096))
        self._process = subprocess.Popen([folder / "program", self._page, str(threads), str(int(busy))])
        self.pid = self._process.pid
        self._file = os.open(self._page, os.O_RDWR)
        while not self._word(3):
            if self._process.poll() is not None:
                sys.exit(f"the program ended with status {self._process.returncode}: too many threads?")
            time.sleep(0.001)

    def _word(self, index: int) -> int:
        return int(struct.unpack("<q", os.pread(self._file, 8, 8 * index))[0])

    def _set(self, index: int) -> None:
        os.pwrite(self._file, struct.pack("<q", 1), 8 * index)

    def gap(self, during: Callable[[], None]) -> float:
        """Return the longest gap while something is done, in milliseconds."""
        self._set(0)
        while self._word(0):
            time.sleep(0.0002)
        during()
        return self._word(1) / 1e6

    def end(self) -> None:
        self._set(2)
        self._process.kill()
        self._process.wait()
        os.close(self._file)


class Controller:
    """A process that applies objects; we ourselves only start programs."""

    def __init__(self) -> None:
        command = [sys.executable, __file__, "--controller"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def apply(self, pid: int, path: Path) -> float:
        """Apply an object to a process; return how long that stood still, in milliseconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([pid, str(path)]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            sys.exit("the controller ended")
        return float(line)

    def end(self) -> None:
        self._process.communicate()


def control() -> None:
    """Apply what stdin says: a line of JSON with a pid and an object each."""
    import patcher

    pid, session = 0, None
    for line in sys.stdin:
        wanted, path = json.loads(line)
        if session is None or wanted != pid:
            if session is not None:
                session.close()
            pid, session = wanted, patcher.attach(wanted, force=True)  # all of a unit may change
        print(session.apply(path).timings.stop, flush=True)


class Bench:
    """The program and its objects, built once."""

    def __init__(self, folder: Path, functions: Sequence[int], busy: bool) -> None:
        self._folder = folder
        self._busy = busy
        self._controller = Controller()
        (folder / "main.c").write_text(MAIN)
        self._object(0, 0)
        subprocess.run(["gcc", "-O2", "-pthread", "main.c", "v0-0.o", "-o", "program"], cwd=folder, check=True)
        self._objects = {(v, k): self._object(v, k) for k in functions for v in (1, 2)}

    def _object(self, version: int, changed: int) -> Path:
        output = self._folder / f"v{version}-{changed}.o"
        (self._folder / "unit.c").write_text(unit(version, changed))
        subprocess.run([*COMPILE, "-c", "unit.c", "-o", output], cwd=self._folder, check=True)
        return output

    def cell(self, kind: str, threads: int, functions: int, rounds: int) -> Cell:
        cell = Cell()
        program = Program(self._folder, threads, self._busy)
        try:
            if kind == "later":
                self._sample(Cell(), program, functions, 1)
            for i in range(rounds):
                self._sample(cell, program, functions, 1 if kind == "first" else 2 - i % 2)
                if kind == "first":
                    program.end()
                    program = Program(self._folder, threads, self._busy)
        finally:
            program.end()
        return cell

    def _sample(self, cell: Cell, program: Program, functions: int, version: int) -> None:
        took = 0.0

        def patch() -> None:
            nonlocal took
            began = time.perf_counter()
            cell.outside.append(self._controller.apply(program.pid, self._objects[version, functions]))
            took = time.perf_counter() - began

        inside = program.gap(patch)
        cell.inside.append(inside)
        cell.without.append(program.gap(lambda: time.sleep(took)))

    def end(self) -> None:
        self._controller.end()


def percentile(samples: Sequence[float], share: float) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def wanted(threads: int) -> float:
    """Return what a first patch of up to 100 functions is to take, in milliseconds."""
    return 0.15 + 0.02 * threads


Cells = dict[tuple[str, int, int], Cell]


def table(cells: Cells) -> str:
    """Return the percentiles as text."""
    lines = [
        f"{'':24}{'outside':>32}{'inside':>32}{'no patch':>10}{'wanted':>9}",
        f"{'':6}{'threads':>8}{'functions':>10}" + 2 * f"{'p50':>8}{'p90':>8}{'p99':>8}{'max':>8}" + f"{'p50':>10}",
    ]
    for (kind, threads, functions), cell in cells.items():
        row = f"{kind:6}{threads:8}{functions:10}"
        for samples in (cell.outside, cell.inside):
            row += "".join(f"{percentile(samples, share):8.2f}" for share in (0.5, 0.9, 0.99, 1))
        aim = wanted(threads) if kind == "first" else 0.0
        missed = percentile(cell.outside, 0.5) > aim and functions <= 100
        lines.append(row + f"{percentile(cell.without, 0.5):10.2f}{aim:9.2f}" + (" missed" if missed else ""))
    return "\n".join(lines) + "\n"


def plot(cells: Cells, functions: int) -> str:
    """Return the medians of first patches as bars; a step of ten characters is a factor of ten. `|`: what is wanted."""
    lines = [f"first patch of {functions} functions, p50 in ms (log scale from 0.01; `|` is what is wanted)"]
    for (kind, threads, count), cell in cells.items():
        if kind != "first" or count != functions:
            continue
        value, aim = percentile(cell.outside, 0.5), wanted(threads)
        bar = list("#" * _steps(value)).copy()
        bar += " " * (_steps(aim) + 1 - len(bar))
        bar[_steps(aim)] = "|"
        lines.append(f"{threads:6} threads {''.join(bar):50} {value:8.2f}")
    return "\n".join(lines) + "\n"


def _steps(milliseconds: float) -> int:
    return max(0, round(10 * math.log10(max(milliseconds, 0.01) / 0.01)))


def measure(threads: Sequence[int], functions: Sequence[int], rounds: int, busy: bool) -> Cells:
    """Return the samples of every combination."""
    cells: Cells = {}
    with tempfile.TemporaryDirectory(prefix="pause-") as folder:
        bench = Bench(Path(folder), functions, busy)
        bench.cell("first", 2, functions[0], 2)  # what is imported and cached with the first patch of all
        for kind in KINDS:
            for t in threads:
                for f in functions:
                    cells[kind, t, f] = bench.cell(kind, t, f, rounds)
                    print(table({(kind, t, f): cells[kind, t, f]}).splitlines()[-1], file=sys.stderr)
        bench.end()
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how long a program stands still for a patch.")
    parser.add_argument("--rounds", type=int, default=20, help="samples of each (default: 20)")
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS)
    parser.add_argument("--functions", type=int, nargs="+", default=FUNCTIONS, choices=FUNCTIONS)
    parser.add_argument("--busy", action="store_true", help="the other threads wake a thousand times a second")
    parser.add_argument("--dry", action="store_true", help="print, and write no results")
    parser.add_argument("--controller", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.controller:
        control()
        return
    cells = measure(asked.threads, asked.functions, asked.rounds, asked.busy)
    head = (
        f"How long the program stood still, in milliseconds; {asked.rounds} samples each; Linux {platform.release()}, "
        f"{os.cpu_count()} processors, Python {platform.python_version()}.\n"
        "outside: as patcher reports it; inside: the longest gap in a thread that looks at the clock all the time;\n"
        "no patch: the longest gap there in as long a time without a patch; wanted: 0.15 + 0.02 a thread, up to\n"
        "100 functions, and no stop later. The other threads "
        f"{'wake a thousand times a second' if asked.busy else 'wait in a system call'}.\n\n"
    )
    plots = "\n".join(plot(cells, f) for f in asked.functions)
    text = f"{head}{table(cells)}\n{plots}"
    print(text, end="")
    if not asked.dry:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "pause.txt").write_text(text)


if __name__ == "__main__":
    main()
