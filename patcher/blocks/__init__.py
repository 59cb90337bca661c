"""An object cut into blocks: the pieces that live or die as one, and what each refers to.

A block is a function, a variable, a constant, a string or a jump table. Compilers called with
-ffunction-sections -fdata-sections give most of them a section of their own; what shares a section is
cut at its symbols, at the offsets that code refers to, or, for mergeable pools, at the entries.

A reference is a relocation as seen from its block, with its target made exact. For a section symbol
the addend mixes the place in the section with the distance from the field to the end of the
instruction (-4, or -5 before a one-byte immediate); here the two are told apart, so that `target` is
what the code means and `addend` what the formula needs.

Pure: knows neither process nor file system.
"""

from patcher.blocks.block import Absolute, Block, Doubt, External, Kind, Linkable, Place, Reference, Target
from patcher.blocks.object import Blocks, Fields, unit_of

__all__ = [
    "Absolute",
    "Block",
    "Blocks",
    "Doubt",
    "External",
    "Fields",
    "Kind",
    "Linkable",
    "Place",
    "Reference",
    "Target",
    "unit_of",
]
