"""Archives as a linker reads them: which member defines a symbol, by every kind of index and without one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from patcher.elf import Archive
from patcher.errors import ObjectError

ONE = "int both; int one(void) { return both; } static int own; int *get(void) { return &own; }"
TWO = (
    "int both = 2; __attribute__((weak)) int two(void) { return 2; } extern int away; int *far(void) { return &away; }"
)


@pytest.fixture
def members(tmp_path: Path) -> list[str]:
    names = []
    for name, text in (("one", ONE), ("a_name_of_more_than_sixteen_characters", TWO)):
        (tmp_path / f"{name}.c").write_text(text)
        subprocess.run(["gcc", "-fcommon", "-c", f"{name}.c", "-o", f"{name}.o"], cwd=tmp_path, check=True)
        names.append(f"{name}.o")
    (tmp_path / "note.txt").write_text("no object\n")
    return [*names, "note.txt"]


def made(folder: Path, flags: str, members: list[str]) -> Archive:
    path = folder / "libx.a"
    subprocess.run(["ar", flags, path.name, *members], cwd=folder, check=True)
    return Archive(path, path.read_bytes())


@pytest.mark.parametrize("flags", ["qcs", "qcS", "qcsT", "qcST"])
def test_the_first_member_that_defines_a_symbol_is_found(tmp_path: Path, members: list[str], flags: str) -> None:
    archive = made(tmp_path, flags, members)
    found = {name: archive.defining(name) for name in ("one", "get", "two", "far", "both", "own", "away", "printf")}
    first, second = (f"{archive.path}({name})" for name in members[:2])
    expected = {"one": first, "get": first, "two": second, "far": second, "both": first}
    assert {name: object.name for name, object in found.items() if object is not None} == expected
    assert archive.defining("one") is archive.defining("get"), "a member is read once"


def test_the_index_of_the_c_librarys_archive_agrees_with_nm() -> None:
    said = subprocess.run(["gcc", "-print-file-name=libc.a"], capture_output=True, text=True, check=True)
    path = Path(said.stdout.strip())
    archive = Archive(path, path.read_bytes())
    listed = subprocess.run(["nm", "-s", path], capture_output=True, text=True, check=True).stdout
    index = listed.partition("Archive index:\n")[2].partition("\n\n")[0]
    expected: dict[str, str] = {}
    for line in index.splitlines():
        name, _, member = line.partition(" in ")
        expected.setdefault(name, member)
    assert len(expected) > 1000
    assert {name: archive.contents(offset)[0] for name, offset in archive.symbols.items()} == expected


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (68, (1 << 31).to_bytes(4, "big"), "its symbol index is cut off"),
        (72, (69).to_bytes(4, "big"), "its symbol index does not fit its members"),
        (68 - 12, b"4000000000", "reaches beyond the end"),
        (68 - 12, b"two words ", "a damaged archive member header"),
    ],
)
def test_a_damaged_index_is_said_to_be_one(
    tmp_path: Path, members: list[str], offset: int, data: bytes, message: str
) -> None:
    path = made(tmp_path, "qcs", members).path
    contents = bytearray(path.read_bytes())
    contents[offset : offset + len(data)] = data
    with pytest.raises(ObjectError, match=message):
        _ = Archive(path, bytes(contents)).symbols


def test_every_cut_of_an_archive_is_an_error_or_a_shorter_one(tmp_path: Path, members: list[str]) -> None:
    whole = made(tmp_path, "qcs", members).path
    data = whole.read_bytes()
    outcomes = set()
    for end in range(8, len(data), 7):
        try:
            archive = Archive(whole, data[:end])
            outcomes.add(archive.defining("one") is not None)
        except ObjectError:
            outcomes.add(None)
    assert None in outcomes


def test_a_member_of_a_thin_archive_that_is_gone_is_named(tmp_path: Path, members: list[str]) -> None:
    archive = made(tmp_path, "qcsT", members)
    (tmp_path / members[0]).unlink()
    with pytest.raises(ObjectError, match=r"libx\.a: member one\.o of this thin archive cannot be read"):
        archive.defining("one")
