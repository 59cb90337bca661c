"""Which live variable one is that is declared otherwise than before: static or global, in a function or outside, in
another unit. It is the same one where that is certain; it has moved.
"""

from __future__ import annotations

from patcher.blocks import Block, Kind
from patcher.data.known import Found, Known, ambiguous, is_scoped, source_of
from patcher.data.names import Spelling, spelling
from patcher.data.outcome import Fate
from patcher.data.rivals import paired
from patcher.data.scoped import Scoped, same_static
from patcher.live import LiveVariable


class Moves:
    """The variables of a unit that changed their places in the source."""

    def __init__(self, known: Known, scoped: Scoped) -> None:
        self.known = known
        self.scoped = scoped

    def find(self, block: Block) -> Found | None:
        """Return the variable of this unit that is declared otherwise now: in a function, or outside of any."""
        found = self._candidates(block)
        if len(found) == 1 and not self._is_told_apart(block, found):
            return None
        if len(found) > 1:
            raise ambiguous(self.known, block, found, [self.known.describe(v) for v in found])
        if not found:
            return None
        where = self.known.function_declaring(found[0])
        return Found(found[0], Fate.MOVED, f"was a static of `{where}`" if where else "was declared elsewhere")

    def _candidates(self, block: Block) -> list[LiveVariable]:
        said = spelling(block.name)
        if block.kind is not Kind.DATA or said.guard or (said.scoped and self._names_outside(said.source)):
            return []
        return [v for v in self._declared_otherwise(block, said) if self._same_users(block, v)]

    def _is_told_apart(self, block: Block, found: list[LiveVariable]) -> bool:
        """Tell which of several statics of functions is the one that was declared elsewhere: whether it is this one.

        Raises `UnsafeChange` where that cannot be told.
        """
        rivals = [b for b in self.scoped.unmatched(block) if is_scoped(block) and self._candidates(b) == found]
        if len(rivals) < 2:
            return True
        pairs = paired(self.known, rivals, found)
        if pairs is None:
            raise ambiguous(self.known, block, found, [self.known.describe(v) for v in found])
        return block in pairs

    def _names_outside(self, source: str) -> bool:
        """Tell whether the object still has, or refers to, something of a static's name outside of functions."""
        blocks = self.known.part.blocks.data_blocks()
        own = any(b.symbols and not is_scoped(b) and source_of(b.name) == source for b in blocks)
        return own or any(s.undefined and source_of(s.name) == source for s in self.known.part.blocks.object.symbols)

    def _declared_otherwise(self, block: Block, said: Spelling) -> list[LiveVariable]:
        """Return the live variables of a name that are in a function when this one is not, or the reverse."""
        known = self.known.variables
        if said.scoped:
            known = [*known, *(v for v in self.known.globals(said.source) if self.known.is_own(v.address))]
        claimed = self._claimed(said.source)
        alike = {
            v.address: v
            for v in known
            if (s := spelling(v.name)).scoped != said.scoped
            and s.source == said.source
            and not s.guard
            and not v.thread_local
        }
        return [v for v in alike.values() if v.address not in claimed and self.known.same_type(block, v)]

    def _claimed(self, source: str) -> set[int]:
        """Return the addresses of the variables of a name that the object still has as they were."""
        found = {a for kind, a in self.known.bound if not kind}
        wanted = Spelling(source, scoped=True)
        for block in self.known.part.blocks.data_blocks():
            alike = block.kind is Kind.DATA and block.symbols and same_static(spelling(block.name), wanted)
            if alike and not self.known.is_matched(block):
                found |= {v.address for v in self.scoped.resolved(block).get(block, ())}
        return found

    def _same_users(self, block: Block, variable: LiveVariable) -> bool:
        """Tell whether a function that uses a variable now used the live one before."""
        if any(self.known.uses.uses(self.known.uses.current(f), variable) for f in self.known.uses.users(block)):
            return True
        # A new function is what its callers were just now, not all that they ever were.
        earlier = (bodies for f in self.known.uses.direct(block) for bodies in self.known.uses.earlier(f))
        return any(self.known.uses.uses(bodies, variable) for bodies in earlier)

    # --- from unit to unit ----------------------------------------------------------------------------------------

    def left(self, block: Block, other: Known) -> list[LiveVariable]:
        """Return the variables of this unit that its object does not have any more, and that another's may be."""
        said = spelling(block.name)
        if block.kind is not Kind.DATA or said.guard:
            return []
        claimed = self._claimed(said.source)
        names = {source_of(s.name) for b in self.known.part.blocks.data_blocks() for s in b.symbols if not is_scoped(b)}
        found = {}
        for variable in self.known.variables:
            was = spelling(variable.name)
            if was.source != said.source or was.guard or was.scoped != said.scoped or variable.address in claimed:
                continue
            if (was.scoped or was.source not in names) and variable.size == block.size:
                found[variable.address] = variable
        return [v for v in found.values() if self._went(v, block, other)]

    def _went(self, variable: LiveVariable, block: Block, other: Known) -> bool:
        known, old = other.declared(block), self.known.type_of(variable)
        if known is not None and known.type and old:
            if known.type != old:
                return False
            if not spelling(block.name).scoped:
                return True
        return any(self.known.uses.uses(other.uses.current(f), variable) for f in other.uses.users(block))
