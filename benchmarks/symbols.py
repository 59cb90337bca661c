"""How long it takes to open programs of 10^3 to 10^6 symbols, and to look symbols up in them.

For each number of symbols a shared library is written, directly as an ELF file: a .symtab of so many symbols, a fifth
of them exported, and as many dynamic relocations. Each measurement is a process of its own, with a cache of its own:

    first      the module is read, and a name, an address and an exported name with its cells are looked up
    reopened   the same, when the orders of the tables are cached
    of it read reading the module, without the look-ups
    CPU        the processor's time of the same, which a busy machine changes less
    name, address   one look-up more, of what was not asked for before

Medians in milliseconds; the peak of the process's memory, without what the interpreter and numpy take by themselves, in
MiB. The files stand in the kernel's page cache. Results are printed, nothing is asserted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from patcher.elf import tables as t
from patcher.elf.module import read_module

COUNTS = (1_000, 10_000, 100_000, 1_000_000)
LOOK_UPS = 1_000
PAGE = 0x1000
EXPORTED = 5  # one symbol of so many is exported
FUNCTION, OBJECT = 2, 1
DYNAMIC_TAGS = {"strtab": 5, "symtab": 6, "rela": 7, "relasz": 8, "relaent": 9, "strsz": 10, "syment": 11}


def symbol_name(number: int) -> str:
    """Return a name of the length that names in large C++ programs have."""
    return f"_ZN7service{number % 997}9transport8internal{number:07}Ev"


def write_library(path: Path, count: int) -> None:
    """Write a shared library of so many symbols, each of 16 bytes of code."""
    text = 0x100_0000_0000
    symbols, strings = _table(count, text)
    exported, exported_strings = _exported(symbols, count)
    relocations = np.zeros(count, t.RELA)
    relocations["offset"] = text + (1 << 32) + 8 * np.arange(count)
    relocations["type"] = np.where(np.arange(count) % EXPORTED, 8, 1)  # R_X86_64_RELATIVE, R_X86_64_64
    relocations["symbol"] = np.where(np.arange(count) % EXPORTED, 0, np.arange(count) % len(exported))
    build_id = hashlib.sha1(str(count).encode()).digest()
    note = (4).to_bytes(4, "little") + (20).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"GNU\0" + build_id
    mapped = {"note": note, "symtab": exported.tobytes(), "strtab": exported_strings, "rela": relocations.tobytes()}
    offsets, position = {}, PAGE
    rest = {"dynamic": bytes(16 * 8), "static": symbols.tobytes(), "names": strings}
    for name, data in {**mapped, **rest}.items():
        offsets[name] = position
        position += -(-len(data) // 16) * 16
    values = dict(offsets, strsz=len(exported_strings), relasz=relocations.nbytes, syment=24, relaent=24)
    dynamic = b"".join(
        tag.to_bytes(8, "little") + values[name].to_bytes(8, "little") for name, tag in DYNAMIC_TAGS.items()
    ).ljust(16 * 8, b"\0")
    contents = {**mapped, **rest, "dynamic": dynamic}
    segments = [
        (1, 4, 0, 0, offsets["static"]),  # PT_LOAD, readable
        (1, 5, 0, text, 0),  # PT_LOAD, executable
        (2, 6, offsets["dynamic"], offsets["dynamic"], len(dynamic)),  # PT_DYNAMIC
        (4, 4, offsets["note"], offsets["note"], len(note)),  # PT_NOTE
    ]
    _write(path, contents, offsets, position, segments, 16 * count)


def _names(numbers: range) -> tuple[t.Table, bytes]:
    """Return the offsets of the symbols' names, and the string table."""
    names = [symbol_name(i).encode() for i in numbers]
    return np.cumsum([1, *(len(name) + 1 for name in names[:-1])]), b"\0" + b"\0".join(names) + b"\0"


def _exported(symbols: t.Table, count: int) -> tuple[t.Table, bytes]:
    exported = np.concatenate([symbols[:1], symbols[1::EXPORTED]])
    exported["name"][1:], strings = _names(range(0, count, EXPORTED))
    return exported, strings


def _table(count: int, text: int) -> tuple[t.Table, bytes]:
    symbols = np.zeros(count + 1, t.SYM)
    symbols["name"][1:], strings = _names(range(count))
    symbols["info"][1:] = np.where(np.arange(count) % 10, 1 << 4 | FUNCTION, 1 << 4 | OBJECT)
    symbols["section"][1:] = 1
    # Linkers write the symbols as units and their hash tables come, not by address.
    symbols["value"][1:] = text + 16 * np.random.default_rng(count).permutation(count)
    symbols["size"][1:] = 16
    return symbols, strings


def _write(
    path: Path,
    contents: dict[str, bytes],
    offsets: dict[str, int],
    end: int,
    segments: list[tuple[int, ...]],
    code: int,
) -> None:
    programs = np.zeros(len(segments), t.PHDR)
    for row, (kind, flags, offset, address, size) in zip(programs, segments, strict=True):
        row["type"], row["flags"], row["offset"], row["address"] = kind, flags, offset, address
        row["file_size"], row["memory_size"] = size, size or code
    sections = np.zeros(6, t.SHDR)
    kinds = {"static": (t.SHT_SYMTAB, 2), "names": (t.SHT_STRTAB, 0), "symtab": (t.SHT_DYNSYM, 4), "strtab": (3, 0)}
    kinds["rela"] = (t.SHT_RELA, 3)
    for row, (name, (kind, link)) in zip(sections[1:], kinds.items(), strict=True):
        row["type"], row["link"], row["offset"], row["size"] = kind, link, offsets[name], len(contents[name])
        row["address"] = 0 if name in ("static", "names") else offsets[name]
    header = np.zeros(1, t.EHDR)
    header["ident"] = np.void(t.ELF_MAGIC + b"\x02\x01\x01".ljust(12, b"\0"))
    header["type"], header["machine"], header["version"], header["ehsize"] = t.ET_DYN, t.EM_X86_64, 1, 64
    header["phoff"], header["phentsize"], header["phnum"] = 64, t.PHDR.itemsize, len(programs)
    header["shoff"], header["shentsize"], header["shnum"] = end, t.SHDR.itemsize, len(sections)
    with path.open("wb") as file:
        file.write(header.tobytes() + programs.tobytes())
        for name, data in contents.items():
            file.seek(offsets[name])
            file.write(data)
        file.seek(end)
        file.write(sections.tobytes())


def measure(path: Path, count: int) -> dict[str, float]:
    """Open the library in this process; return milliseconds and MiB."""
    before = _peak()
    start, cpu = time.perf_counter(), time.process_time()
    module = read_module(path.name, path)
    read = time.perf_counter()
    (symbol,) = module.symbols.named(symbol_name(count // 2))
    assert symbol in module.symbols.at(symbol.value)
    exported = symbol_name(count // 2 // EXPORTED * EXPORTED)
    assert module.exports[exported]
    assert [module.cells[cell].name for cell in module.cells_named(exported)] == [exported]
    opened, cpu = time.perf_counter(), time.process_time() - cpu
    numbers = np.random.default_rng(1).integers(0, count, LOOK_UPS).tolist()
    names = [symbol_name(i) for i in numbers]
    named = time.perf_counter()
    found = [module.symbols.named(name)[0] for name in names]
    after_names = time.perf_counter()
    text, _ = module.text
    for number in numbers:
        module.symbols.at(text + 16 * (count - 1 - number))
    after_addresses = time.perf_counter()
    assert [s.name for s in found] == names
    return {
        "read": 1e3 * (read - start),
        "open": 1e3 * (opened - start),
        "cpu": 1e3 * cpu,
        "name": 1e3 * (after_names - named) / LOOK_UPS,
        "address": 1e3 * (after_addresses - after_names) / LOOK_UPS,
        "memory": _peak() - before,
    }


def _peak() -> float:
    # The peak that getrusage tells includes that of the process which started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _apart(path: Path, count: int, cache: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", str(path), str(count)]
    done = subprocess.run(command, env={**os.environ, "XDG_CACHE_HOME": str(cache)}, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="numbers of symbols")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each kind")
    parser.add_argument("--measure", nargs=2, metavar=("FILE", "COUNT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure[0]), int(arguments.measure[1]))))
        return
    columns = (
        "symbols",
        "file MiB",
        "first",
        "reopened",
        "of it read",
        "CPU",
        "name",
        "address",
        "first MiB",
        "reopened MiB",
    )
    print("".join(f"{column:>14}" for column in columns))
    for count in arguments.counts:
        with tempfile.TemporaryDirectory() as folder:
            row(Path(folder), count, arguments.rounds)


def row(folder: Path, count: int, rounds: int) -> None:
    """Measure for one number of symbols, and print it."""
    path = folder / f"lib{count}.so"
    write_library(path, count)
    first = [_apart(path, count, folder / f"cache{i}") for i in range(rounds)]
    again = [_apart(path, count, folder / "cache0") for _ in range(rounds)]

    def median(measured: list[dict[str, float]], what: str) -> float:
        return statistics.median(m[what] for m in measured)

    times = (median(first, "open"), median(again, "open"), median(again, "read"), median(again, "cpu"))
    look_ups = (median(again, "name"), median(again, "address"))
    memory = (median(first, "memory"), median(again, "memory"))
    cells = [f"{count:>14,}", f"{path.stat().st_size / 2**20:>14.1f}", *(f"{v:>14.1f}" for v in times)]
    print("".join([*cells, *(f"{v:>14.4f}" for v in look_ups), *(f"{v:>14.0f}" for v in memory)]), flush=True)


if __name__ == "__main__":
    main()
