"""What references mean, as the special cases of matching ask it of the comparison that they are part of."""

from __future__ import annotations

from typing import Protocol

from patcher.blocks import Block, Target
from patcher.live import LiveUnit


class Meaning(Protocol):
    """What the references of one unit mean in the process."""

    unit: LiveUnit

    def check_target(self, target: Target, address: int) -> None:
        """Check that a live address is what the object means by `target`; raises `Mismatch`."""

    def check_cell(self, target: Target, cell: int) -> None:
        """Check that a live cell of the offset table holds what the object means by `target`; raises `Mismatch`."""

    def read_table(self, cell: int) -> int:
        """Return what a cell of the offset table holds, one of ours included; raises `Mismatch` for anything else."""

    def cell_names(self, target: Target, name: str) -> bool:
        """Tell whether a cell that is relocated against `name` is the one for `target`."""

    def record(self, block: Block, address: int) -> None:
        """Bind a variable, unless that contradicts what is bound."""
