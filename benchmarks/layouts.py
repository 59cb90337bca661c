"""How long the check of layouts takes: an object of 5 MB, C++ with the heavy headers, against its program.

Warm: the program's types are remembered, and so are those of the object before. Each row is an edit: a constant
(the types are those of the object before, byte for byte), a function, a type that is new to the unit, and a struct
that variables have: what is refused takes longer, since it is looked for who has it.
All times are processor time, in which other work on the machine counts little. Writes results/layouts.txt beside
this file.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from patcher.data.declared import Declared
from patcher.data.layouts import Judgement, Program, declared_by
from patcher.data.prepare import has_types

RESULTS = Path(__file__).parent / "results"
ROUNDS = 15
LIMIT = 60.0  # milliseconds, for the median of every warm row
COMPILERS = ("g++", "clang++")
HEADERS = """algorithm deque filesystem functional future iostream list map memory optional regex set sstream string
thread unordered_map variant vector"""
REFUSED = "a struct that is had"
EDITS = {
    "a constant": ("return n + 1;", "return n + 2;"),
    "a function": ("return n + 1;", "static int calls_so_far; return n + ++calls_so_far;"),
    "a new type": ("struct item0 {", "struct fresh { int a; }; inline fresh made; struct item0 {"),
    REFUSED: ("int first;", "int first; int second;"),
}


def text(kinds: int) -> str:
    """Return a unit that puts so many types of its own into the library's containers."""
    lines = [f"#include <{name}>" for name in HEADERS.split()]
    for i in range(kinds):
        lines += [
            f"struct item{i} {{ int first; std::string name; std::vector<long> list; }};".replace(
                "first", "first" if not i else "other"
            ),
            f"std::map<std::string, item{i}> items{i};",
            f"std::unordered_map<std::string, std::vector<item{i}>> lists{i};",
            f"int sorted{i}() {{ std::deque<item{i}> all; for (auto &[k, v] : items{i}) all.push_back(v);",
            "std::sort(all.begin(), all.end(), [](auto &a, auto &b) { return a.name < b.name; });",
            f'lists{i}["x"].assign(all.begin(), all.end()); return (int)lists{i}.size(); }}',
        ]
    lines += [
        "int next(int n) { return n + 1; }",
        'bool known(const std::string &s) { std::smatch m; return std::regex_match(s, m, std::regex("a+")); }',
        "int later() { return std::async([] { return 1; }).get(); }",
        "std::variant<int, std::string> either; std::optional<item0> maybe; std::function<int(int)> called = next;",
        "int main() { return next(known(std::filesystem::current_path().string())) + later(); }",
    ]
    return "\n".join(lines) + "\n"


def compiled(compiler: str, folder: Path, source: str, output: str) -> bytes:
    """Compile a text with -g, always under one name."""
    (folder / "unit.cc").write_text(source)
    command = [compiler, "-std=c++17", "-g", "-c", "-o", output, "unit.cc"]
    subprocess.run(command, cwd=folder, check=True)
    return (folder / output).read_bytes()


Before = tuple[Declared, ...]


def check(program: Program, data: bytes, before: Before) -> int:
    """Check an object as a patch does after another one; return how many types and variables differ."""
    assert has_types(data, "unit.o")
    found = 0
    for new in declared_by(data, "unit.o", before):
        judgement = Judgement(*[[program.units_of(new.file)]] * 2, new, program, lambda: True)
        found += len(judgement.verdicts())
        judgement.unknown()
    return found


def timed(program: Program, data: bytes, before: Before) -> float:
    start = time.process_time()
    check(program, data, before)
    return 1e3 * (time.process_time() - start)


def rows(compiler: str, folder: Path, kinds: int, rounds: int) -> list[tuple[str, float, float, float]]:
    """Measure one compiler: row, megabytes of the object, median milliseconds and those of the slowest round."""
    source = text(kinds)
    data = compiled(compiler, folder, source, "unit.o")
    subprocess.run([compiler, "-o", "program", "unit.o", "-pthread"], cwd=folder, check=True)
    program = Program.of_file(folder / "program")
    assert program is not None
    found = [(f"{compiler}, first", len(data) / 1e6, first := timed(program, data, ()), first)]
    before = declared_by(data, "unit.o")
    for name, (old, new) in EDITS.items():
        assert source.count(old) == 1, old
        data = compiled(compiler, folder, source.replace(old, new), "edited.o")
        assert bool(check(program, data, before)) is (name == REFUSED), name
        times = [timed(program, data, before) for _ in range(rounds)]
        found.append((f"{compiler}, {name}", len(data) / 1e6, statistics.median(times), max(times)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", type=int, default=2, help="types of the unit's own")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--no-results", action="store_true", help="write nothing")
    given = parser.parse_args()
    lines = [
        f"The check of layouts, in processor time; Python {platform.python_version()}, {platform.machine()}.",
        f"Medians and slowest of {given.rounds} rounds; the limit for what is warm is {LIMIT:.0f} ms.",
        "",
        f"{'':34}{'MB':>8}{'median ms':>12}{'slowest':>10}",
    ]
    late = False
    with tempfile.TemporaryDirectory() as place:
        for compiler in COMPILERS:
            for name, size, median, slowest in rows(compiler, Path(place), given.kinds, given.rounds):
                lines.append(f"{name:34}{size:8.1f}{median:12.1f}{slowest:10.1f}")
                late = late or (not name.endswith("first") and median > LIMIT)
    report = "\n".join(lines) + "\n"
    print(report)
    if not given.no_results:
        (RESULTS / "layouts.txt").write_text(report)
    if late:
        sys.exit(f"slower than {LIMIT:.0f} ms")


if __name__ == "__main__":
    main()
