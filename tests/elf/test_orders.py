"""Looking up by name and by address in large tables agrees with binutils, whichever linker wrote them."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from living import compile_text, run

from patcher.elf import tables as t
from patcher.elf.module import Module, read_module
from patcher.elf.object import SymbolType
from patcher.elf.orders import LARGE, _hash, _hashes, orders
from patcher.elf.symbols import StaticSymbol, SymbolIndex

TYPES = {"NOTYPE": 0, "OBJECT": 1, "FUNC": 2, "SECTION": 3, "FILE": 4, "COMMON": 5, "TLS": 6, "IFUNC": 10}
BINDINGS = {"LOCAL": 0, "GLOBAL": 1, "WEAK": 2, "UNIQUE": 10}
SYMBOL = re.compile(
    r" *\d+: (?P<value>\w+) +(?P<size>\w+) (?P<type>\w+) +(?P<binding>\w+) +(?P<visibility>\w+) +(?:\[.*\] +)?"
    r"(?P<section>\w+)(?: (?P<name>.*))?$"
)
LOCALS = 2_000
GLOBALS = LARGE


def assembly(seed: int, first: int) -> str:
    """Return a unit of many symbols: statics that other units name alike, globals, thread-locals and objects."""
    lines = [f'.file "unit{seed}.c"', ".text"]
    lines += [f".type local{i}, @function\nlocal{i}: ret\n.size local{i}, 1" for i in range(LOCALS)]
    for i in range(first, first + GLOBALS // 2):
        lines.append(f".globl _ZN7service{i % 97}8function{i}Ev\n_ZN7service{i % 97}8function{i}Ev: ret")
    lines += [".data", f".type table{seed}, @object\n.globl table{seed}\ntable{seed}: .quad 1\n.size table{seed}, 8"]
    lines += ['.section .tbss,"awT",@nobits', f".type mine{seed}, @object\nmine{seed}: .zero 4\n.size mine{seed}, 4"]
    return "\n".join([*lines, '.section .note.GNU-stack,"",@progbits', ""])


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("units")
    found = [compile_text("int main(void) { return 0; }\n", folder / "main.o")]
    for seed in range(2):
        (folder / f"unit{seed}.s").write_text(assembly(seed, seed * GLOBALS // 2))
        run("gcc", "-c", "-o", folder / f"unit{seed}.o", folder / f"unit{seed}.s")
        found.append(folder / f"unit{seed}.o")
    return found


@pytest.fixture(params=["bfd", "gold", "lld", "mold"])
def large(request: pytest.FixtureRequest, units: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run("gcc", f"-fuse-ld={request.param}", "-Wl,--build-id", "-o", tmp_path / "program", *units)
    return tmp_path / "program"


def listed(path: Path) -> list[tuple[StaticSymbol, str]]:
    """Return the symbols that readelf lists, with the sections they are in ("ABS", "UND", or a number)."""
    found, group = [], -1
    for line in run("readelf", "-sW", "-U", "invalid", path).partition("'.symtab'")[2].splitlines():
        fields = SYMBOL.match(line)
        if fields is None:
            continue
        kind, binding = TYPES[fields["type"]], BINDINGS[fields["binding"]]
        group += kind == SymbolType.FILE
        name = (fields["name"] or "").partition("@")[0]
        under = group if binding == 0 else -1
        hidden = fields["visibility"] != "DEFAULT"
        value, size, absolute = int(fields["value"], 16), int(fields["size"], 0), fields["section"] == "ABS"
        symbol = StaticSymbol(name, value, size, kind, binding, under, hidden, absolute)
        found.append((symbol, fields["section"]))
    return found


def check(module: Module, path: Path) -> None:
    """Compare all answers, or those to many questions, with what readelf lists."""
    symbols, rows = module.symbols, listed(path)
    assert len(symbols) == len(rows)
    by_name, by_address, files = defaultdict(list), defaultdict(list), defaultdict(list)
    ordinal = 0
    for symbol, section in rows:
        if symbol.type == SymbolType.FILE:
            files[symbol.name].append(ordinal)
            ordinal += 1
        elif section != "UND" and symbol.type != SymbolType.SECTION:
            by_name[symbol.name].append(symbol)
        if section not in ("UND", "ABS") and symbol.type in (0, 1, 2, 10):
            by_address[symbol.value].append(symbol)
    some = random.Random(1)
    for name in some.sample(sorted(by_name), min(2_000, len(by_name))):
        assert symbols.named(name) == by_name[name]
    for address in some.sample(sorted(by_address), min(2_000, len(by_address))):
        assert list(symbols.at(address)) == by_address[address]
    for name in files:
        assert symbols.groups(name) == files[name]
    ordered = sorted(by_address)
    assert [symbols.next_address(a) for a in ordered[:200]] == ordered[1:201]
    assert symbols.next_address(ordered[-1]) is None
    assert symbols.named("no_such_symbol") == symbols.groups("no_such_file.c") == []


def test_a_large_program_by_every_linker(large: Path) -> None:
    for _ in ("made", "reopened"):
        module = read_module("program", large)
        check(module, large)
        groups = module.symbols.groups("unit0.c") + module.symbols.groups("unit1.c")
        assert [s.group for s in module.symbols.named("local7")] == groups
        assert all(f"local{LOCALS - 1}" in {s.name for s in module.symbols.members(g)} for g in groups)


def test_a_static_program_of_the_c_library(tmp_path: Path) -> None:
    unit = compile_text('#include <stdio.h>\nint main(void) { return puts(""); }\n', tmp_path / "main.o")
    run("gcc", "-static", "-o", tmp_path / "program", unit)
    check(read_module("program", tmp_path / "program"), tmp_path / "program")


# --- names ---


@given(st.lists(st.binary(max_size=40), max_size=20), st.integers(0, 50))
def test_a_name_has_the_hash_of_its_entry(names: list[bytes], tail: int) -> None:
    strings = b"\0" + b"\0".join(names) + b"\0"
    starts = np.array([*range(min(tail, len(strings))), len(strings), len(strings) + 100], np.int64)
    expected = [_hash(re.split(rb"[\0@]", strings[start:])[0]) for start in starts.tolist()]
    assert _hashes(strings, starts).tolist() == expected


@pytest.mark.parametrize("length", [4087, 4088, 4095, 4096, 4097, 9000])
def test_names_of_any_length_are_found(length: int) -> None:
    name = b"x" * length
    assert named(name + b"y\0" + name + b"z\0", [0, length + 2], "x" * length + "z") == [1]


def test_names_of_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patcher.elf.orders._FACTOR", np.uint64(0))
    assert named(b"left\0right\0left\0", [0, 5, 11], "left") == [0, 2]
    assert named(b"left\0right\0left\0", [0, 5, 11], "middle") == []


def test_a_name_without_an_end_is_found() -> None:
    assert named(b"\0left\0right", [1, 6], "right") == [1]


def test_names_may_share_their_tails() -> None:
    assert named(b"\0unwind\0", [1, 3, 4], "wind") == [1]


def test_names_that_are_no_utf8_are_found_as_they_are_spelled() -> None:
    assert named(b"caf\xe9\0caf\0", [0, 5], "caf\ufffd") == [0]
    assert named("café\0caf\0".encode(), [0, 6], "café") == [0]
    assert named(b"caf\xe9\0", [0], "caf\udce9") == []


def named(strings: bytes, starts: list[int], name: str) -> list[int]:
    """Return which of the symbols whose names start there have a name."""
    table = np.zeros(len(starts), t.SYM)
    table["name"], table["section"], table["info"] = starts, 1, SymbolType.FUNC
    table["value"] = np.arange(len(starts))
    return [s.value for s in SymbolIndex(table, strings).named(name)]


@given(st.lists(st.sampled_from([0, 1, 8, 1 << 53, (1 << 53) + 1, 1 << 63, (1 << 64) - 1]), max_size=12))
def test_positions_are_exact_for_every_address(values: list[int]) -> None:
    table = np.zeros(len(values), t.SYM)
    table["value"] = values
    every = np.ones(len(values), bool)
    order = orders(table, b"\0", lambda: (every, every), "", "symbols")
    for address in (-1, 0, 7, 1 << 53, (1 << 53) + 1, 1 << 63, (1 << 64) - 1, 1 << 64):
        assert order.starting(address) == [i for i, value in enumerate(values) if value == address]
        assert order.position(address, "right") == sum(value <= address for value in values)
