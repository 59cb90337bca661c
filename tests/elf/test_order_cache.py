"""What is kept on disk is used when it is right, and never believed when it is not."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
from living import run

from patcher.elf import order_cache
from patcher.elf import tables as t
from patcher.elf.module import read_module
from patcher.elf.object import SymbolType
from patcher.elf.orders import LARGE
from patcher.elf.symbols import SymbolIndex

COUNT = LARGE + 1
BUILD_ID = "0123456789abcdef"
NAMES = [f"function{i:06}" for i in range(COUNT)]
STRINGS = b"\0" + b"\0".join(name.encode() for name in NAMES) + b"\0"


def table() -> t.Table:
    symbols = np.zeros(COUNT, t.SYM)
    symbols["name"] = 1 + 15 * np.arange(COUNT)
    symbols["info"], symbols["section"], symbols["size"] = SymbolType.FUNC, 1, 8
    symbols["value"] = 0x1000 + 16 * np.arange(COUNT)[::-1]
    return symbols


def check(build_id: str = BUILD_ID, strings: bytes = STRINGS) -> SymbolIndex:
    """Open the table anew and ask it."""
    symbols = SymbolIndex(table(), strings, build_id)
    for number in (0, 7, COUNT // 2, COUNT - 1):
        value = 0x1000 + 16 * (COUNT - 1 - number)
        assert [s.value for s in symbols.named(NAMES[number])] == [value]
        assert [s.name for s in symbols.at(value)] == [NAMES[number]]
    assert symbols.named("function") == []
    assert symbols.at(0x1001) == ()
    return symbols


def source() -> order_cache.Source:
    return order_cache.Source.of(BUILD_ID, "symbols", table(), STRINGS)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def entry(root: Path) -> Path:
    check()
    (path,) = (root / "patcher").iterdir()
    os.utime(path, (1, 1))
    return path


def is_used(path: Path) -> bool:
    """Open the table anew; tell whether this took the entry as it is: using it is noted in its time."""
    before = path.lstat()
    check()
    after = path.lstat()
    return after.st_ino == before.st_ino and after.st_mtime_ns != before.st_mtime_ns


def test_what_was_made_once_is_used_again(entry: Path) -> None:
    assert is_used(entry)
    assert entry.name == f"{BUILD_ID}-symbols.orders"
    assert (entry.stat().st_mode & 0o777, entry.parent.stat().st_mode & 0o777) == (0o600, 0o700)


@pytest.mark.parametrize("offset", [0, 8, 12, 20, 140, 160, 164, 176, 180, 188, 196, 1000, -1])
def test_a_damaged_entry_is_made_anew(entry: Path, offset: int) -> None:
    data = bytearray(entry.read_bytes())
    data[offset] ^= 1
    entry.write_bytes(data)
    os.utime(entry, (1, 1))
    assert not is_used(entry)
    assert is_used(entry)


@pytest.mark.parametrize("size", [0, 1, 199, 200, 4096, -1])
def test_a_truncated_entry_is_made_anew(entry: Path, size: int) -> None:
    data = entry.read_bytes()
    entry.write_bytes(data[:size])
    os.utime(entry, (1, 1))
    assert not is_used(entry)
    assert entry.read_bytes() == data


def test_an_entry_that_grew_is_made_anew(entry: Path) -> None:
    entry.write_bytes(entry.read_bytes() + b"\0")
    assert not is_used(entry)


@pytest.mark.parametrize("what", ["names beyond", "addresses beyond", "names unordered", "addresses unordered"])
def test_orders_that_cannot_be_right_are_made_anew(entry: Path, what: str) -> None:
    kept = order_cache.load(source())
    assert kept is not None
    names, addresses = (array.copy() for array in kept)
    array = names if what.startswith("names") else addresses
    if what.endswith("beyond"):
        array[5] |= 0xFFFFFFFF
    else:
        array[:] = array[::-1].copy()
    order_cache.store(source(), names, addresses)
    os.utime(entry, (1, 1))
    wrong = entry.read_bytes()
    check()
    assert entry.read_bytes() != wrong


def test_no_hash_gives_a_wrong_name(entry: Path) -> None:
    kept = order_cache.load(source())
    assert kept is not None
    names, addresses = kept
    other = np.sort((names & ~np.uint64(0xFFFFFFFF)) | (names & np.uint64(0xFFFFFFFF))[::-1])
    order_cache.store(source(), other, addresses)
    symbols = SymbolIndex(table(), STRINGS, BUILD_ID)
    assert all(s.name == name for name in NAMES[:500] for s in symbols.named(name))


def test_an_entry_counts_for_the_table_that_it_was_made_from(entry: Path) -> None:
    renamed = STRINGS.replace(b"function000009", b"funktion000009")
    symbols = check(strings=renamed)
    assert [s.name for s in symbols.named("funktion000009")] == ["funktion000009"]
    assert symbols.named("function000009") == []


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_an_entry_that_others_can_write_is_not_believed(entry: Path, mode: int) -> None:
    entry.chmod(mode)
    assert order_cache.load(source()) is None
    check()
    assert entry.stat().st_mode & 0o777 == 0o600
    assert is_used(entry)


def test_an_entry_of_another_user_is_not_believed(entry: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(entry, 1, 1)
    assert order_cache.load(source()) is None


def test_nothing_is_read_from_or_written_to_a_folder_that_others_can_write(entry: Path) -> None:
    entry.parent.chmod(0o770)
    assert order_cache.load(source()) is None
    entry.unlink()
    check()
    assert list(entry.parent.iterdir()) == []


def test_a_link_or_a_pipe_is_no_entry(entry: Path, tmp_path: Path) -> None:
    entry.rename(tmp_path / "elsewhere")
    entry.symlink_to(tmp_path / "elsewhere")
    assert order_cache.load(source()) is None
    entry.unlink()
    os.mkfifo(entry)
    assert order_cache.load(source()) is None
    check()
    assert is_used(entry)
    assert entry.is_file()


def test_a_folder_that_is_a_link_is_left_alone(root: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    root.mkdir()
    (root / "patcher").symlink_to(tmp_path / "elsewhere")
    check()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    check()
    check()


def test_a_disk_that_is_full_leaves_nothing_behind(root: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        check()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list((root / "patcher").iterdir()) == []


def test_a_home_of_another_user_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 1, 1)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(home))
    check()
    assert list(home.iterdir()) == []


def test_the_default_is_the_cache_of_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    check()
    assert [p.name for p in (tmp_path / ".cache" / "patcher").iterdir()] == [f"{BUILD_ID}-symbols.orders"]
    assert not (tmp_path / "not").exists()


def test_without_a_build_id_nothing_is_kept(root: Path) -> None:
    check(build_id="")
    assert not root.exists()


def test_small_tables_are_not_kept(root: Path) -> None:
    symbols = SymbolIndex(table()[:LARGE], STRINGS, BUILD_ID)
    assert symbols.named(NAMES[5])
    assert not root.exists()


def test_the_entries_least_in_use_go(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_cache, "_MOST_ENTRIES", 3)
    for age, name in enumerate(("aa", "bb", "cc")):
        (entry.parent / f"{name}-symbols.orders").write_bytes(b"")
        os.utime(entry.parent / f"{name}-symbols.orders", (100 + age, 100 + age))
    (entry.parent / "dd-symbols-1.partial").write_bytes(b"")
    os.utime(entry.parent / "dd-symbols-1.partial", (1, 1))
    (entry.parent / "ee-symbols-1.partial").write_bytes(b"")  # being written
    (entry.parent / "notes").write_text("not ours")
    os.utime(entry, (1000, 1000))
    check(build_id="ff")
    left = {p.name.partition("-")[0] for p in entry.parent.iterdir()}
    assert left == {"ff", BUILD_ID, "cc", "ee", "notes"}


def test_entries_take_no_more_room_than_they_may(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_cache, "_MOST_BYTES", int(entry.stat().st_size * 1.5))
    check(build_id="ff")
    assert [p.name for p in entry.parent.iterdir()] == ["ff-symbols.orders"]


def test_a_program_that_was_changed_behind_its_build_id_is_read_as_it_is(tmp_path: Path, root: Path) -> None:
    lines = [f".globl function{i}\nfunction{i}: ret" for i in range(COUNT)]
    (tmp_path / "unit.s").write_text("\n".join([*lines, '.section .note.GNU-stack,"",@progbits', ""]))
    run("gcc", "-shared", "-nostdlib", "-Wl,--build-id", "-o", tmp_path / "lib.so", tmp_path / "unit.s")
    before = read_module("lib.so", tmp_path / "lib.so")
    assert before.symbols.named("function77")
    assert before.exports["function77"]
    entries = {p.name for p in (root / "patcher").iterdir()}
    assert entries == {f"{before.build_id}-{what}.orders" for what in ("symbols", "exports")}
    run("objcopy", "--redefine-sym", "function77=funktion77", tmp_path / "lib.so")
    after = read_module("lib.so", tmp_path / "lib.so")
    assert after.build_id == before.build_id
    assert after.symbols.named("function77") == []
    assert [s.value for s in after.symbols.named("funktion77")] == [before.symbols.named("function77")[0].value]
