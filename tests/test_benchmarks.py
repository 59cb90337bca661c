"""The objects that the linker is measured with are such as a linker takes, and small ones are measured."""

from __future__ import annotations

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from living import run

import patcher
from patcher.blocks import Blocks, Place
from patcher.elf import read_object
from patcher.elf.relocations import R

FOLDER = Path(patcher.__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def objects() -> ModuleType:
    spec = spec_from_file_location("objects", FOLDER / "objects.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("functions", [40, 25_000])
@pytest.mark.parametrize("sections", [False, True])
def test_the_objects_are_what_a_linker_takes(
    objects: ModuleType, functions: int, sections: bool, tmp_path: Path
) -> None:
    path = tmp_path / "unit.o"
    path.write_bytes(objects.unit(functions, 4, sections=sections))
    run("ld", "-r", path, "-o", tmp_path / "linked.o")
    blocks = Blocks(read_object(path))
    assert [b.name for b in blocks.functions] == [f"f{i}" for i in range(functions)]
    last = blocks.functions[-10]
    found = blocks.references(last)
    assert [r.type for r in found][-4:] == [R.PLT32, R.PC32, R.PLT32, R.PC32]
    before = Place(blocks.functions[-11], 0)
    assert len(found) == 4 if sections else (found[0].target == before and len(found) == 5), "the hidden call as well"


@pytest.mark.parametrize("sections", [False, True])
def test_a_small_object_is_measured(objects: ModuleType, sections: bool, tmp_path: Path) -> None:
    path = tmp_path / "unit.o"
    path.write_bytes(objects.unit(30, 4, sections=sections))
    answer = run(sys.executable, FOLDER / "link.py", "--measure", path, "--rounds", "2")
    first, second = json.loads(answer)
    assert first.keys() == {"read", "blocks", "plan", "place"}
    assert second.keys() == first.keys() | {"peak"}


SMALL = """\
struct item0 { int first; long list[3]; };
item0 items[3];
int next(int n) { return n + 1; }
int main() { return next(items[0].first); }
"""


def test_a_small_unit_is_checked(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import layouts; from pathlib import Path; "
        f"layouts.text = lambda _: {SMALL!r}; print(*layouts.rows('g++', Path({str(tmp_path)!r}), 1, 1), sep='\\n')"
    )
    lines = run(sys.executable, "-c", code).splitlines()
    rows = ["first", "a constant", "a function", "a new type", "a struct that is had"]
    assert [line.split(",")[1].strip(" '") for line in lines] == rows


def test_a_pause_is_measured() -> None:
    command = (sys.executable, FOLDER / "pause.py", "--dry", "--rounds", "2", "--threads", "3", "--functions", "10")
    text = run(*command)
    first, later = (line.split() for line in text.splitlines() if line.startswith(("first  ", "later  ")))
    assert (first[:3], later[:3]) == (["first", "3", "10"], ["later", "3", "10"])
    assert float(first[3]) > 0, "a first patch stops the program"
    assert {*later[3:7]} == {"0.00"}, "a later one does not"
    assert min(map(float, (*first[7:11], *later[7:11]))) > 0, "a clock that is looked at shows a gap"
    assert "3 threads #" in text
