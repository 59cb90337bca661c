"""A module of the process: its file, and where it stands.

Decides by which biases a file is mapped as a module, and where its separate debug information may lie. What names
denote is decided by the image, which has all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from patcher.elf.module import Module
from patcher.elf.relocations import OFFSET_TABLE
from patcher.elf.symbols import StaticSymbol
from patcher.target import Mapping

_PAGE = 0xFFF


@dataclass(frozen=True, eq=False)
class LoadedModule:
    """A module and its load bias (live address minus link-time address)."""

    module: Module
    bias: int
    path: str
    file: Path  # by which the mapped file can be read from here

    @property
    def start(self) -> int:
        return self.module.start + self.bias

    @property
    def end(self) -> int:
        return self.module.end + self.bias

    @property
    def text(self) -> tuple[int, int]:
        """Return the live extent of the executable segments."""
        low, high = self.module.text
        return low + self.bias, high + self.bias

    @property
    def name(self) -> str:
        return Path(self.path).name

    def contains(self, address: int) -> bool:
        return self.start <= address < self.end

    def executable_at(self, address: int) -> bool:
        return any(
            s.executable and s.address <= address - self.bias < s.address + s.memory_size for s in self.module.segments
        )

    def constant(self, address: int, size: int) -> bool:
        """Tell whether live bytes lie where the program cannot write once it runs."""
        return self.module.constant(address - self.bias, size)

    @property
    def offset_table(self) -> int | None:
        """Return the address that the module's code takes for its global offset table, if a symbol tells."""
        found = {s.value for s in self.module.symbols.named(OFFSET_TABLE)}
        return found.pop() + self.bias if len(found) == 1 else None

    def in_offset_table(self, cell: int) -> bool:
        """Tell whether a cell lies in the module's global offset table."""
        return self.contains(cell) and self.module.in_offset_table(cell - self.bias)

    def symbols_at(self, address: int) -> tuple[StaticSymbol, ...]:
        """Return the static symbols that start at a live address (values stay link-time)."""
        return self.module.symbols.at(address - self.bias)


def load_biases(module: Module, group: list[Mapping]) -> list[int]:
    """Return the load bias of each copy of a module whose file is mapped so (dlmopen makes several of one file)."""
    if not module.position_independent:
        return [0]
    found: dict[int, None] = {}
    for mapping in sorted(group, key=lambda m: m.start):
        for segment in module.segments:
            low = segment.offset & ~_PAGE
            if not low <= mapping.offset < low + max(segment.file_size, 1) + (segment.offset & _PAGE):
                continue
            bias = mapping.start - ((segment.address & ~_PAGE) + mapping.offset - low)
            if bias >= 0 and bias not in found and _all_mapped(module, bias, group):
                found[bias] = None
    return list(found)


def _all_mapped(module: Module, bias: int, group: list[Mapping]) -> bool:
    for segment in module.segments:
        if not segment.file_size:
            continue
        address = segment.address + bias
        within = [m for m in group if m.start <= address < m.end]
        if not any(m.offset + address - m.start == segment.offset for m in within):
            return False
        if segment.executable and not any(m.executable for m in within):
            return False  # somebody reads the file through a mapping
    return True


def debug_files(path: str, build_id: str, link: str) -> list[Path]:
    """List where separate debug information of a module may lie (gdb's search order)."""
    found = []
    root = Path("/usr/lib/debug")
    if len(build_id) > 2:
        found.append(root / ".build-id" / build_id[:2] / f"{build_id[2:]}.debug")
    if link:
        folder = Path(path).parent
        found += [folder / link, folder / ".debug" / link, root / str(folder).lstrip("/") / link]
    return [p for p in found if p.is_file() and str(p) != path]
