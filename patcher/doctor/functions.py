"""Which functions of a program's file have an entry that takes the jump; decided by `code.entry`, as for a process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from patcher.elf.module import Module
from patcher.elf.symbols import StaticSymbol

_BEHIND = 16  # bytes of padding that may matter


@dataclass(frozen=True, slots=True)
class Refused:
    """A function that cannot be changed, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A function's entry, and why it takes no jump ("" when it does)."""

    name: str
    address: int
    reason: str


def entries_of(module: Module, path: Path, is_wanted: Callable[[int], bool]) -> tuple[Entry, ...]:
    """Plan the entries of the functions at wanted addresses, each address once. Parts such as .cold are none."""
    image = _Image(module, path)
    found = {
        symbol.value: symbol
        for symbol in module.symbols.functions()
        if "." not in symbol.name and is_wanted(symbol.value)
    }
    return tuple(_entry(module, image, symbol) for _, symbol in sorted(found.items()))


class _Image:
    """The bytes of a module's file by link-time address."""

    def __init__(self, module: Module, path: Path) -> None:
        self._segments = module.segments
        self._bytes = path.read_bytes()

    def read(self, address: int, size: int) -> bytes:
        for segment in self._segments:
            if segment.address <= address < segment.address + segment.file_size:
                start = segment.offset + address - segment.address
                return self._bytes[start : min(start + size, segment.offset + segment.file_size)]
        return b""


def _entry(module: Module, image: _Image, symbol: StaticSymbol) -> Entry:
    from patcher.code.entry import NotDetourable, behind_function, plan_entry  # 60 ms

    end = symbol.value + symbol.size
    following = module.symbols.next_address(symbol.value) or end + _BEHIND
    behind = behind_function(image.read(end, max(0, min(following - end, _BEHIND))), following)
    cold = [(s.value, image.read(s.value, s.size)) for s in module.symbols.named(f"{symbol.name}.cold")]
    try:
        plan_entry(symbol.name, image.read(symbol.value, symbol.size), symbol.value, symbol.size, behind, cold)
    except NotDetourable as error:
        return Entry(symbol.name, symbol.value, error.message.partition("jump: ")[2] or error.message)
    return Entry(symbol.name, symbol.value, "")
