"""Every scenario of fixtures/scenarios, built in several ways, patched while it runs.

Each scenario is played as gcc -O2 makes it (or as near as its own limits allow) and in some of the ways below, which
are dealt out evenly, so that every compiler, optimisation, linker and kind of file meets many scenarios.
PATCHER_SCENARIO_VARIANTS=all plays each scenario in all ways.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import zlib
from pathlib import Path

import pytest
from scenario import SCENARIOS, Ask, Scenario, Snapshot, Variant, check_restored, play, read_scenario

BASE = Variant()
WAYS = (
    Variant("clang", "-O2", linker="lld"),
    Variant("gcc", "-O0", pie=False, linker="gold", sections=True),
    Variant("clang", "-O1", kind="library"),
    Variant("gcc", "-O3", linker="mold", sections=True),
    Variant("clang", "-Os", pie=False, linker="lld"),
    Variant("gcc", "-Os", linker="gold", kind="library"),
    Variant("clang", "-O0", linker="mold"),
    Variant("gcc", "-O1", pie=False, linker="lld"),
    Variant("clang", "-O3", pie=False, linker="gold", sections=True),
    Variant("gcc", "-O2", linker="mold", kind="library", sections=True),
    Variant("clang", "-O2", pie=False, linker="bfd"),
    Variant("gcc", "-O3", pie=False, linker="bfd"),
    Variant("clang", "-Os", linker="mold", kind="library"),
    Variant("gcc", "-O0", linker="lld", kind="library"),
)
WAYS_EACH = 2
ALL = [read_scenario(p.parent) for p in sorted(SCENARIOS.glob("*/scenario.toml"))]


def variants(scenario: Scenario) -> list[Variant]:
    """Return the ways in which a scenario is built; the first is the base, or the nearest to it.

    They are dealt out by its name, so that a new scenario changes those of no other.
    """
    ways = [way for way in (BASE, *WAYS) if scenario.fits(way)]
    if not ways:
        ways = [_nearest(scenario)]
    flagged = next((way for way in ways if way.compiler == BASE.compiler), ways[0])
    if os.environ.get("PATCHER_SCENARIO_VARIANTS") != "all":
        rest = ways[1:]
        start = zlib.crc32(scenario.name.encode())
        ways = ways[:1] + [rest[(start + i) % len(rest)] for i in range(min(WAYS_EACH, len(rest)))]
    ways += [way for way in WAYS if way.name in scenario.also and way not in ways]
    ways += [dataclasses.replace(flagged, flags=flags) for flags in scenario.flags_each]
    return ways


def _nearest(scenario: Scenario) -> Variant:
    def first(allowed: tuple[str, ...], usual: str) -> str:
        return usual if not allowed or usual in allowed else allowed[0]

    return Variant(
        first(scenario.compilers, BASE.compiler),
        first(scenario.optimise, BASE.optimise),
        BASE.pie if not scenario.pie else scenario.pie[0],
        first(scenario.linkers, BASE.linker),
        first(scenario.kinds, BASE.kind),
    )


def parameters() -> list[object]:
    found = []
    for scenario in ALL:
        for variant in variants(scenario):
            defect = scenario.known_defect(variant)
            marks = [pytest.mark.xfail(reason=defect, strict=True, raises=AssertionError)] if defect else []
            found.append(pytest.param(scenario, variant, id=f"{scenario.name}-{variant.name}", marks=marks))
    return found


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


def need_tools(variant: Variant) -> None:
    for tool in (variant.compiler, f"ld.{variant.linker}"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


@pytest.mark.parametrize(("scenario", "variant"), parameters())
def test_scenario(scenario: Scenario, variant: Variant, tmp_path: Path, shared: Path) -> None:
    need_tools(variant)
    play(scenario, variant, tmp_path, shared)


@pytest.mark.parametrize("scenario", [pytest.param(s, id=s.name) for s in ALL if s.watch])
def test_saved_under_watch(scenario: Scenario, tmp_path: Path, shared: Path) -> None:
    play(scenario, BASE, tmp_path, shared, watch=True)


def test_every_value_of_every_axis_is_met() -> None:
    met = [v for scenario in ALL for v in variants(scenario)]
    for axis in ("compiler", "optimise", "pie", "linker", "kind", "sections"):
        values = [getattr(v, axis) for v in (BASE, *WAYS)]
        for value in set(values):
            assert sum(getattr(v, axis) == value for v in met) >= 5, f"{axis} {value} is hardly ever met"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"asks": (Ask("3", "11"),)}, "gives '10'"),
        ({"asks": (Ask("3", "10", "8"),)}, "rejects what never was"),
        ({"same": ("area",)}, "step 1"),
        ({"changed": ("volume",)}, "step 1"),
        ({"refused": "layout"}, "was to be refused"),
        ({"unchanged": True}, "step 1"),
    ],
)
def test_what_is_not_as_it_must_be_is_noticed(
    wrong: dict[str, object], message: str, tmp_path: Path, shared: Path
) -> None:
    scenario = read_scenario(SCENARIOS / "changed-arithmetic")
    step = dataclasses.replace(scenario.steps[0], **wrong)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match=message):
        play(dataclasses.replace(scenario, steps=(step,)), BASE, tmp_path, shared)


def test_code_that_is_not_taken_back_is_noticed() -> None:
    before = Snapshot({("program", 1): "one"}, {8: 16}, frozenset())
    with pytest.raises(AssertionError, match="executable memory"):
        check_restored(before, dataclasses.replace(before, text={("program", 1): "two"}))
    with pytest.raises(AssertionError, match="0x8"):
        check_restored(before, dataclasses.replace(before, cells={8: 32}))
