"""How long the linker takes: an object read, cut into blocks, planned and placed, without compiler or process.

Three tables: a unit of ordinary size, as the first thing that a process links and again; the largest, with its peak
of memory, in a process of its own; and how the time depends on how much of a unit changed. All times are processor
time, in which other work on the machine counts little. Writes results/link.txt beside this file.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import objects

from patcher.blocks import Block, Blocks
from patcher.elf import read_object
from patcher.link.place import Region, Space, place
from patcher.link.plan import Bound, Unit, plan

RESULTS = Path(__file__).parent / "results"
STEPS = ("read", "blocks", "plan", "place")
ROUNDS = 15
LARGE = 200_000
CHANGED = (1, 10, 100, 1000)
SPACE = Space(Region(0x10000000, 0x1FFF0000), Region(0x20000000, 0x3FFF0000), Region(0x40000000, 0x4FFF0000))


class Clock:
    """Milliseconds of processor time, by step."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.spent[name] = 1e3 * (time.process_time() - start)


def link_all(path: Path) -> dict[str, float]:
    """Link everything in an object; return the milliseconds of each step."""
    clock = Clock()
    with clock.step("read"):
        source = read_object(path)
    with clock.step("blocks"):
        blocks = Blocks(source)
    with clock.step("plan"):
        found = plan([Unit(blocks, blocks.functions, lambda _: None, lambda _: False)], lambda *_: None)
    with clock.step("place"):
        place(found, SPACE, {}, {})
    return clock.spent


def link_changed(blocks: Blocks, count: int) -> float:
    """Link some functions of a unit, of which the process has all the others; return milliseconds."""
    changed = blocks.functions[:: len(blocks.functions) // count][:count]
    wanted, clock = set(changed), Clock()

    def resident(block: Block) -> Bound | None:
        return None if block in wanted else Bound(0x30000000)

    with clock.step("link"):
        found = plan([Unit(blocks, changed, resident, lambda _: False)], lambda *_: None)
        place(found, SPACE, {}, {})
    return clock.spent["link"]


def measure(path: Path, rounds: int) -> list[dict[str, float]]:
    """Link an object several times in a process of its own; the peak of memory, in MB, is among the numbers."""
    command = [sys.executable, __file__, "--measure", str(path), "--rounds", str(rounds)]
    answer: list[dict[str, float]] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return answer


def print_measured(path: Path, rounds: int) -> None:
    """Answer `measure`."""
    found = [link_all(path) for _ in range(rounds)]
    found[-1]["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))


def medians(samples: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(s[name] for s in samples) for name in STEPS}


def ordinary(folder: Path) -> list[str]:
    """Measure a unit of 1,000 functions and 20,000 relocations."""
    lines = ["1,000 functions, 20,000 relocations: milliseconds", "", f"{'':24}" + _heads((*STEPS, "together"))]
    for name, sections in (("one .text", False), ("-ffunction-sections", True)):
        path = folder / "ordinary.o"
        path.write_bytes(objects.unit(1000, 20, sections=sections))
        cold = [measure(path, 1)[0] for _ in range(5)]
        warm = measure(path, ROUNDS)[2:]
        for state, samples in (("cold", cold), ("warm", warm)):
            found = medians(samples)
            lines.append(f"{name + ', ' + state:24}" + _numbers([*found.values(), sum(found.values())], 1))
    return lines


def large(folder: Path, functions: int) -> list[str]:
    """Measure the largest unit."""
    title = f"{functions:,} functions, {3 * functions:,} relocations: seconds, and peak MB"
    lines = [title, "", f"{'':24}" + _heads(("MB", *STEPS, "together", "peak"))]
    for name, sections in (("one .text", False), ("-ffunction-sections", True)):
        path = folder / "large.o"
        path.write_bytes(objects.unit(functions, 3, sections=sections))
        (found,) = measure(path, 1)
        seconds = [found[step] / 1e3 for step in STEPS]
        size = path.stat().st_size / 1e6
        lines.append(f"{name:24}{size:10.0f}{_numbers([*seconds, sum(seconds)], 2)}{found['peak']:10.0f}")
    return lines


def changed(folder: Path) -> list[str]:
    """Measure how the time to plan and place depends on how many functions changed, and of how many."""
    lines = ["changed functions, of 20 relocations each: milliseconds to plan and place", ""]
    lines.append(f"{'':34}" + _heads([f"{n:,}" for n in CHANGED]))
    for functions in (1000, 20_000):
        for name, sections in (("one .text", False), ("-ffunction-sections", True)):
            path = folder / "unit.o"
            path.write_bytes(objects.unit(functions, 20, sections=sections))
            blocks = Blocks(read_object(path))
            link_changed(blocks, 1)  # reads the relocations, which matching has done before
            found = [statistics.median(link_changed(blocks, n) for _ in range(ROUNDS)) for n in CHANGED]
            lines.append(f"{f'of {functions:,}, {name}':34}" + _numbers(found, 2))
    return lines


def _heads(names: Sequence[str]) -> str:
    return "".join(f"{name:>10}" for name in names)


def _numbers(values: Sequence[float], digits: int) -> str:
    return "".join(f"{value:10.{digits}f}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", type=int, default=LARGE, metavar="N", help="functions of the largest unit")
    parser.add_argument("--measure", type=Path, metavar="OBJECT", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print_measured(arguments.measure, arguments.rounds)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tables = [ordinary(folder), large(folder, arguments.large), changed(folder)]
    machine = f"Medians, in processor time; Python {platform.python_version()}, {platform.machine()}."
    text = "\n\n\n".join("\n".join(lines) for lines in [[machine], *tables]) + "\n"
    print(text, end="")
    if arguments.large == LARGE:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "link.txt").write_text(text)


if __name__ == "__main__":
    main()
