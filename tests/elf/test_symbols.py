"""Look-ups in a module's symbol table: by name, by address, by the file that a local one stands under."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from living import compile_text, run

from patcher.elf import SymbolType
from patcher.elf import tables as t
from patcher.elf.module import Module, read_module
from patcher.elf.symbols import SymbolIndex

LEFT = """
static int n = 1; int helper(void);
static __thread int mine;
static __attribute__((noinline)) int local(void) { return mine++ + n++; }
int left(void) { return local() + helper(); }
"""
RIGHT = """
static int n = 2;
static __attribute__((noinline)) int local(void) { return n--; }
__attribute__((visibility("hidden"))) int helper(void) { return local(); }
int right(void) { return helper(); }
extern int again(void) __attribute__((alias("right")));
int left(void);
int main(void) { return left() + right(); }
"""


@pytest.fixture(scope="module", params=["bfd", "gold", "lld", "mold"])
def module(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Module:
    folder = tmp_path_factory.mktemp("symbols")
    units = [compile_text(text, folder / f"part{i}.o", "-O1", name="unit.c") for i, text in enumerate((LEFT, RIGHT))]
    run("gcc", f"-fuse-ld={request.param}", "-o", folder / "program", *units)
    return read_module("program", folder / "program")


def test_locals_of_one_name_stand_under_their_own_files(module: Module) -> None:
    symbols = module.symbols
    groups = symbols.groups("unit.c")
    assert len(groups) == 2
    assert sorted(s.group for s in symbols.named("local")) == groups
    assert sorted(s.group for s in symbols.named("n")) == groups
    left, right = ({s.name for s in symbols.members(g)} for g in groups)
    assert {"local", "n", "mine"} <= left
    assert {"local", "n"} <= right
    assert "mine" not in right
    assert [symbols.group_name(g) for g in groups] == ["unit.c", "unit.c"]
    assert symbols.groups("nothing.c") == []


def test_a_hidden_symbol_is_no_static(module: Module) -> None:
    (helper,) = module.symbols.named("helper")
    assert module.demoted(helper) or not helper.local
    if not module.demotes:
        assert not any(module.demoted(s) for s in module.symbols.named("local"))


def test_addresses_lead_to_all_names(module: Module) -> None:
    (right,) = module.symbols.named("right")
    assert {"right", "again"} <= {s.name for s in module.symbols.at(right.value)}
    assert module.symbols.at(right.value + 1) == ()
    assert module.symbols.at(-8) == module.symbols.at(1 << 64) == ()


def test_an_address_inside_is_covered_by_its_symbol(module: Module) -> None:
    symbols = module.symbols
    (left,) = symbols.named("left")
    assert symbols.covering(left.value + left.size - 1) == left
    following = symbols.next_address(left.value)
    assert following is not None
    assert following >= left.value + left.size
    assert symbols.next_address((1 << 63) - 1) is None
    gap = symbols.covering(following)
    assert gap is None or gap.value == following


def test_thread_locals_have_offsets_and_no_addresses(module: Module) -> None:
    (mine,) = module.symbols.named("mine")
    assert mine.type == SymbolType.TLS
    assert all(s.name != "mine" for s in module.symbols.at(mine.value))


def test_versioned_names_are_found_without_their_version(tmp_path: Path) -> None:
    text = 'int old(void) { return 1; }\n__asm__(".symver old, call@V1");\n'
    (tmp_path / "versions").write_text("V1 { };\n")
    unit = compile_text(text, tmp_path / "unit.o", "-fPIC")
    run("gcc", "-shared", f"-Wl,--version-script={tmp_path / 'versions'}", "-o", tmp_path / "lib.so", unit)
    symbols = read_module("lib.so", tmp_path / "lib.so").symbols
    assert [s.name for s in symbols.named("call")] == ["call"]


def test_an_empty_table_knows_nothing() -> None:
    empty = SymbolIndex.empty()
    assert len(empty) == 0
    assert empty.named("main") == []
    assert empty.at(0x1000) == ()
    assert empty.covering(0x1000) is None
    assert empty.next_address(0) is None
    assert empty.groups("") == []


def test_names_outside_the_string_table_are_empty() -> None:
    table = np.zeros(3, t.SYM)
    table["name"] = 1_000_000
    table["info"] = SymbolType.FUNC
    table["section"] = 1
    table["value"] = [8, 16, 24]
    symbols = SymbolIndex(table, b"\0")
    assert [s.name for s in symbols.at(16)] == [""]
    assert symbols.named("main") == []
