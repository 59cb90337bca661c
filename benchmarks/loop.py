"""How long from a save to the first new answer, against the plain compile of the saved unit alone.

A C unit, and a C++ unit that includes much of the standard library, each compiled by gcc and by clang. For every edit
the source is saved, `patcher spawn --watch` makes it live, and then the command that a plain compile takes is run and
timed: both see the same machine. Comments: a save that changes nothing but a comment, until patcher says so.
Medians, and medians of each edit's ratio. Writes results/loop.json and results/loop.txt beside this file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import unit
from latency import LIMIT_SECONDS, Program, setting

from patcher.build import CompileCommand
from patcher.build.command import object_arguments

RESULTS = Path(__file__).parent / "results"
LEVELS = ("-O0", "-O2")
COMPILERS = {"c": ("gcc", "clang"), "c++": ("g++", "clang++")}
WARM_UP = 2
QUIET_SECONDS = 0.5  # without a compiler, until nothing more is being made ready

_HEADERS = (
    "algorithm array chrono condition_variable deque filesystem fstream functional future iomanip iostream iterator "
    "map memory mutex numeric optional random regex set sstream string string_view thread tuple unordered_map variant "
    "vector"
)
_FUNCTION = """
long answer_{n}(long x)
{{
    static std::map<std::string, long> seen;
    std::vector<long> values(8);

    std::iota(values.begin(), values.end(), x + {n});
    std::sort(values.begin(), values.end(), [](long a, long b) {{ return a % 5 < b % 5; }});
    seen["{n}"] += values.front();
    return long(seen.size()) + 1000 * {edit};
}}
"""
_MAIN = """
long (*const answers[])(long) = {{{names}}};

int main()
{{
    long number;

    while (std::cin >> number)
        std::cout << answers[number % {count}](2) << std::endl;
}}
"""
COUNT = 12


@dataclass(frozen=True)
class Sample:
    """One edit, in milliseconds."""

    answer: float  # from the save to the first new answer of the running program
    build: float  # of that, in compilers
    compiler: float  # the plain compile alone
    comment: float  # from a save of another comment to the word that nothing changed


class Live(Program):
    """The program under patcher."""

    def await_quiet(self) -> None:
        """Wait until patcher runs no compiler any more."""
        deadline, quiet = time.monotonic() + LIMIT_SECONDS, time.monotonic()
        while time.monotonic() < deadline and time.monotonic() < quiet + QUIET_SECONDS:
            if self._compilers():
                quiet = time.monotonic()
            time.sleep(0.02)

    def _compilers(self) -> list[str]:
        found = []
        for listed in Path(f"/proc/{self._process.pid}/task").glob("*/children"):
            found += [_name_of(pid) for pid in listed.read_text().split()]
        return [name for name in found if name not in ("prog", "")]


class Course:
    """One unit, compiler and level."""

    def __init__(self, place: Path, language: str, compiler: str, level: str) -> None:
        self._language, self._place = language, place
        self._edits: dict[int, int] = {}
        self._comments = 0
        self._source = place / ("unit.c" if language == "c" else "unit.cc")
        arguments = (compiler, level, "-g", "-c", "-o", "unit.o", self._source.name)
        place.mkdir()
        self._write_others()
        self._save()
        subprocess.run(arguments, cwd=place, check=True)
        others = ["main.c", "table.c"] if language == "c" else []
        subprocess.run([compiler, level, "-pthread", "-o", "prog", "unit.o", *others], cwd=place, check=True)
        command = CompileCommand(place, arguments, self._source.resolve(), "the benchmark")
        self._compile = object_arguments(command, place / "alone.o")
        commands = place / "compile_commands.json"
        commands.write_text(json.dumps([{"directory": str(place), "arguments": arguments, "file": self._source.name}]))
        watching = ["--watch", self._source.name, "--compile-commands", str(commands), "--events", "-"]
        self._live = Live([sys.executable, "-m", "patcher", "spawn", "./prog", *watching], place, events=True)
        self._live.event("ready")

    def edit(self, function: int) -> Sample:
        """Change one function's code, then a comment."""
        wanted = self._edits[function] = self._edits.get(function, 0) + 1
        self._live.await_quiet()
        began = self._save()
        self._live.await_edit(function, wanted)
        answer = _since(began)
        build = self._live.event("applied")["timings"]["build"]
        self._live.await_quiet()
        began = time.perf_counter()
        subprocess.run(self._compile, cwd=self._place, check=True)
        compiler = _since(began)
        self._comments += 1
        began = self._save()
        self._live.await_unchanged()
        return Sample(answer, build, compiler, _since(began))

    def _save(self) -> float:
        comment = f"\n/* comment {self._comments} */\n"
        text = (unit.unit(self._edits) if self._language == "c" else heavy(self._edits)) + comment
        began = time.perf_counter()
        self._source.write_text(text)
        return began

    def _write_others(self) -> None:
        if self._language == "c":
            for name, text in (("unit.h", unit.header()), ("table.c", unit.table()), ("main.c", unit.MAIN)):
                (self._place / name).write_text(text)

    def end(self) -> None:
        """End the program."""
        self._live.end()


def heavy(edits: dict[int, int]) -> str:
    """Return the C++ unit; the answer of function n is 1,000 higher for each 1 that `edits` gives to n."""
    includes = "".join(f"#include <{name}>\n" for name in _HEADERS.split())
    functions = "".join(_FUNCTION.format(n=n, edit=edits.get(n, 0)) for n in range(COUNT))
    return includes + functions + _MAIN.format(names=", ".join(f"answer_{n}" for n in range(COUNT)), count=COUNT)


def _name_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _since(began: float) -> float:
    return (time.perf_counter() - began) * 1e3


def measure(language: str, compiler: str, level: str, edits: int) -> list[Sample]:
    """Return the samples of one course, without those that warm up."""
    with tempfile.TemporaryDirectory(prefix="loop-") as place:
        course = Course(Path(place) / "tree", language, compiler, level)
        try:
            return [course.edit(n % COUNT) for n in range(edits + WARM_UP)][WARM_UP:]
        finally:
            course.end()


def medians(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the median of each measure, and of each edit's ratio and difference."""
    found = {name: statistics.median(getattr(s, name) for s in samples) for name in asdict(samples[0])}
    found["ratio"] = statistics.median(s.answer / s.compiler for s in samples)
    found["beyond"] = statistics.median(s.answer - s.compiler for s in samples)
    return {name: round(value, 3) for name, value in found.items()}


_ROWS = (
    ("save to first new answer", "answer"),
    ("  build", "build"),
    ("the plain compile alone", "compiler"),
    ("answer - compile alone", "beyond"),
    ("answer / compile alone", "ratio"),
    ("another comment only", "comment"),
)


def table(found: dict[str, dict[str, float]], where: dict[str, object]) -> str:
    """Return the medians as text."""
    lines = [f"Medians of {where['edits']} edits each, in milliseconds; {where['processors']} processors.", ""]
    lines.append(f"{'':26}" + "".join(f"{name:>13}" for name in found))
    for title, name in _ROWS:
        digits = 2 if name == "ratio" else 1
        lines.append(f"{title:26}" + "".join(f"{column[name]:13.{digits}f}" for column in found.values()))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure from the save to the first new answer, with preambles.")
    parser.add_argument("--edits", type=int, default=15, help="edits of each course (default: 15)")
    parser.add_argument("--dry", action="store_true", help="print, and write no results")
    parser.add_argument("--only", default="", help="a compiler and a level: `g++ -O0`")
    asked = parser.parse_args()
    courses = [(lang, cc, level) for lang, names in COMPILERS.items() for cc in names for level in LEVELS]
    courses = [course for course in courses if not asked.only or asked.only.split() == list(course[1:])]
    samples = {f"{cc} {level}": measure(lang, cc, level, asked.edits) for lang, cc, level in courses}
    found = {name: medians(of) for name, of in samples.items()}
    where = setting(asked.edits)
    text = table(found, where)
    print(text, end="")
    if not asked.dry:
        RESULTS.mkdir(exist_ok=True)
        every = {name: [asdict(s) for s in of] for name, of in samples.items()}
        results = {"setting": where, "milliseconds": found, "samples": every}
        (RESULTS / "loop.json").write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "loop.txt").write_text(text)


if __name__ == "__main__":
    main()
