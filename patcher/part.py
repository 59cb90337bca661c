"""A part: one unit's share of a generation, with what was found out about its functions.

Says which of them are wanted, added or kept, and by which object's blocks they are made; what a block means in the
process is `linkage`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property

from patcher.blocks import Block, Blocks, Kind
from patcher.constructors import Starter, starters
from patcher.data.comparison import Comparison
from patcher.data.shapes import Carried
from patcher.image import LoadedModule
from patcher.live import LiveFunction
from patcher.match import Delta, FunctionMatch, Status, is_cold_piece, is_private_piece, parent_of

_MIGRATION = re.compile(r"(?:_ZL?\d+)?patcher_migrate_")
HOOKS = ("patcher_before", "patcher_after")  # functions that patcher calls by name: nothing else has to


def is_migration(name: str) -> bool:
    """Tell whether a function is there to fill new storage, once: it is none of the program's own."""
    return "patcher_migrate_" in name and _MIGRATION.match(name) is not None


class Part:
    """One unit's share of a generation: its verdicts, and the object that new code is taken from.

    That object is the one that was matched, or the same unit compiled with indirect access to external data;
    its blocks then go by the names of the matched one's. A part that is `supplied` is there only for what others
    miss: nothing of it that the process has is replaced.

    `every`: functions that are the same are to be new as well, all but those that `keep` names.
    """

    def __init__(
        self, delta: Delta, source: str, blocks: Blocks | None = None, *, supplied: bool = False, every: bool = False
    ) -> None:
        self.delta = delta
        self.supplied = supplied
        self.source = source
        self.blocks = blocks or delta.blocks
        self.every = every
        self.kept: list[str] = []
        self.layouts: Mapping[str, Comparison] = {}  # of variables, where some are migrated
        self.carried: Mapping[str, Carried] = {}  # variables whose values need no function to be migrated
        self._left: set[Block] = set()
        self._required: set[Block] = set()
        self.unit = delta.unit
        self._verdicts = {f.block: f for f in delta.functions}
        self._named: dict[tuple[Kind, str], Block] = {}
        if self.blocks is not delta.blocks:
            matched = (*delta.blocks.functions, *delta.blocks.data_blocks())
            self._named = {(b.kind, b.name): b for b in matched}

    def compiled_otherwise(self, blocks: Blocks) -> Part:
        """Return the same part with the blocks of another object, made from the same source."""
        return self._with_layouts(Part(self.delta, self.source, blocks, supplied=self.supplied, every=self.every))

    def judged(self, delta: Delta) -> Part:
        """Return the same part with other verdicts."""
        return self._with_layouts(Part(delta, self.source, self.blocks, supplied=self.supplied, every=self.every))

    def _with_layouts(self, part: Part) -> Part:
        part.layouts = self.layouts
        part.carried = self.carried
        return part

    @property
    def module(self) -> LoadedModule:
        return self.unit.module

    @property
    def name(self) -> str:
        """The file that it comes from, for people; `archive(member)` for a member."""
        given = self.delta.blocks.object.name
        return given if given.startswith(self.source) else self.source

    def matched(self, block: Block) -> Block | None:
        """Return the block of the matched object that stands for one of this part's."""
        if self.blocks is self.delta.blocks:
            return block
        return self._named.get((block.kind, block.name))

    def verdict(self, block: Block) -> FunctionMatch | None:
        matched = self.matched(block)
        return self._verdicts.get(matched) if matched is not None else None

    def status(self, block: Block) -> Status:
        verdict = self.verdict(block)
        return verdict.status if verdict is not None else Status.ADDED

    def live(self, block: Block) -> LiveFunction | None:
        verdict = self.verdict(block)
        return verdict.live if verdict is not None else None

    def keep(self, block: Block) -> None:
        """Leave a function that is the same as it is, though every one is to be new, and say so."""
        self.leave(block)
        self.kept.append(block.name)

    def require(self, block: Block) -> None:
        """Have a function new though it is the same, or differs by line numbers only."""
        self._required.add(block)

    def is_required(self, block: Block) -> bool:
        return block in self._required

    def required_doors(self) -> tuple[Block, ...]:
        """Return the functions that are to be new only because others need that."""
        return tuple(b for b in self.blocks.functions if b in self._required and self.is_door(b))

    def leave(self, block: Block) -> None:
        """Leave a function that is the same, with what was split off it, to another unit, which replaces it."""
        self._left.add(block)
        self._left.update(b for b in self.blocks.functions if is_cold_piece(b.name) and parent_of(b.name) == block.name)

    def is_new(self, block: Block) -> bool:
        """Tell whether new code takes the place of a function's code, or there is none yet."""
        if is_migration(block.name) or (block in self._required and block not in self._left):
            return True
        status = self.status(block)
        if status is Status.SAME:
            return (self.every and block not in self._left) or self._is_absent_hook(block)
        return status is not Status.LINE_ONLY

    def is_door(self, block: Block) -> bool:
        return self.is_new(block) and not is_private_piece(block.name) and not is_migration(block.name)

    def wanted(self) -> tuple[Block, ...]:
        """Return the functions that have to be new. Private pieces follow from who uses them."""
        if self.supplied:
            return ()
        started = {s.function for s in self.starters}
        return tuple(
            b
            for b in self.blocks.functions
            if self.is_door(b) and (self.status(b) is not Status.ADDED or b in started or b.name in HOOKS)
        )

    def _is_absent_hook(self, block: Block) -> bool:
        """Tell whether a block is a hook that an earlier patch brought, and that the live generation is without."""
        live = self.live(block) if block.name in HOOKS else None
        if live is None or live.redirect is None or not live.redirect.born:
            return False
        view = self.unit.view
        return (live.redirect.arena, live.redirect.index) not in view.journal.bodies_at(view.generation)

    @cached_property
    def starters(self) -> tuple[Starter, ...]:
        """The functions that a program linked with this unit starts with."""
        # What the process was started with has run, whatever it is.
        return starters(self.blocks, complete=self.unit.born)

    def added(self) -> tuple[Block, ...]:
        """Return the functions that are new to the process and can be called from other units."""
        return tuple(
            b
            for b in self.blocks.functions
            if self.status(b) is Status.ADDED and b.exported and not is_private_piece(b.name)
        )

    def defining(self, name: str) -> Block | None:
        """Return the function or variable that the unit defines for others under a name."""
        for block in (*self.blocks.functions, *self.blocks.data_blocks()):
            if any(s.name == name and not s.local for s in block.symbols):
                return block
        return None

    def cold_pieces(self, block: Block) -> list[LiveFunction]:
        """Return the live pieces that were split off a function, whether the new code has such or not."""
        pieces = (b for b in self.delta.blocks.functions if is_cold_piece(b.name) and parent_of(b.name) == block.name)
        found = {live.body: live for b in pieces if (live := self._verdicts[b].live) is not None}
        whole = self.live(block)
        split = self.unit.pieces_of(whole) if whole is not None else []
        found |= {p.body: p for p in split if whole is not None and parent_of(p.name) == whole.name}
        return list(found.values())
