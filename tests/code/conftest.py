"""Real machine code: compiled programs, and the functions of ELF files."""

from __future__ import annotations

import ctypes.util
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

PROGRAMS = Path(__file__).parent / "programs"
Build = Callable[..., Path]


@dataclass(frozen=True, slots=True)
class Function:
    """A function as a file has it: `following` are the bytes up to the next function."""

    name: str
    address: int
    code: bytes
    following: bytes
    siblings: tuple[tuple[int, bytes], ...] = ()

    def contains(self, address: int) -> bool:
        return self.address <= address < self.address + len(self.code)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compile sources of programs/ (or text, by a file name it is written to) and return the output."""
    directory = tmp_path_factory.mktemp("built")

    def compiled(output: str, sources: Sequence[str | Path], *flags: str, compiler: str = "gcc") -> Path:
        paths = [str(PROGRAMS / source) for source in sources]
        command = [compiler, *flags, "-o", str(directory / output), *paths, *([] if "-c" in flags else ["-lm"])]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return directory / output

    return compiled


@pytest.fixture(scope="session")
def libc() -> Path:
    """The C library this interpreter runs with."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return next(Path(line.split()[-1]) for line in lines if line.endswith(ctypes.util.find_library("c") or "libc.so.6"))


@pytest.fixture(scope="session")
def libc_functions(libc: Path) -> tuple[Function, ...]:
    """The exported functions of the C library."""
    return tuple(named_functions(libc))


@pytest.fixture(scope="session")
def unwound_functions(libc: Path) -> tuple[Function, ...]:
    """Pieces of code that unwind tables describe: all of the C library's, and some of large programs."""
    large = [Path(path) for path in (shutil.which("bash"), shutil.which("gdb")) if path]
    found = [*unwind_pieces(libc)]
    for path in large:
        found += list(unwind_pieces(path))[::20]
    return tuple(found)


def named_functions(path: Path) -> Iterator[Function]:
    """Yield the functions of a symbol table, one for each address, with their `.cold` pieces."""
    with path.open("rb") as file:
        elf = ELFFile(file)
        symbols = elf.get_section_by_name(".symtab") or elf.get_section_by_name(".dynsym")
        texts = _texts(elf)
        sizes: dict[int, tuple[str, int]] = {}
        for symbol in symbols.iter_symbols():
            if symbol["st_info"]["type"] in ("STT_FUNC", "STT_LOOS") and symbol["st_size"]:
                sizes.setdefault(symbol["st_value"], (symbol.name, symbol["st_size"]))
    ordered = sorted(address for address in sizes if _bytes(texts, address, 1))
    cold = {name: (a, _bytes(texts, a, size)) for a, (name, size) in sizes.items() if name.endswith(".cold")}
    for address, after in zip(ordered, [*ordered[1:], None], strict=True):
        name, size = sizes[address]
        end = address + size
        following = _bytes(texts, end, max(0, min(after - end, 64)) if after else 0)
        if not name.endswith(".cold"):
            siblings = (cold[f"{name}.cold"],) if f"{name}.cold" in cold else ()
            yield Function(name, address, _bytes(texts, address, size), following, siblings)


def unwind_pieces(path: Path) -> Iterator[Function]:
    """Yield what each entry of `.eh_frame_hdr` describes (LSB core specification 10.6.2, its usual encodings)."""
    with path.open("rb") as file:
        elf = ELFFile(file)
        header, frames = elf.get_section_by_name(".eh_frame_hdr"), elf.get_section_by_name(".eh_frame")
        table, base = header.data(), header["sh_addr"]
        data, start = frames.data(), frames["sh_addr"]
        texts = _texts(elf)
    assert table[:4] == b"\x01\x1b\x03\x3b"
    for code_offset, entry_offset in struct.iter_unpack(
        "<ii", table[12 : 12 + 8 * int.from_bytes(table[8:12], "little")]
    ):
        address, entry = base + code_offset, base + entry_offset - start
        size = int.from_bytes(data[entry + 12 : entry + 16], "little")
        if code := _bytes(texts, address, size):
            yield Function(f"at_{address:x}", address, code, b"")


def _texts(elf: ELFFile) -> list[tuple[int, bytes]]:
    sections = [s for s in elf.iter_sections("SHT_PROGBITS") if s["sh_flags"] & 4 and ".plt" not in s.name]
    return [(section["sh_addr"], section.data()) for section in sections]


def _bytes(texts: list[tuple[int, bytes]], address: int, size: int) -> bytes:
    for start, data in texts:
        if start <= address < start + len(data):
            return data[address - start : address - start + size]
    return b""
