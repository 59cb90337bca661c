"""From what changed to a generation ready to commit: residents, doors, islands, displaced copies, records.

Joins the verdicts of `match` with the pure linker: says what a unit starts with (`starting`), which functions are
entered through an island (`doors`), which arena new code goes into (`homes`) and what the journal and the flip have to
know (`draft`); `generation` tells it in order. Reads the target (to resolve an IFUNC it may ask the target's own
resolver), and writes nothing.
"""

from patcher.relink.draft import Linked
from patcher.relink.generation import data_of_idle, link_generation

__all__ = ["Linked", "data_of_idle", "link_generation"]
