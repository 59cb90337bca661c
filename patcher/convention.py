"""What old frames expect of registers: whether a function may be replaced under its active callers.

From -O2 on, gcc lets a caller keep a value in a register that the ABI calls clobbered, when it sees that the
callee of the same unit does not touch it (-fipa-ra). The new callee may touch it. A caller that relied on that
has changed as well, so every new call is right; but a frame of the old caller which is still running would
find its register overwritten. Such a caller has to be quiet, without a frame on any stack, when its callee
changes; and the new caller when the change is taken back.

Registers are followed through the unit's own functions; code outside the unit may overwrite everything, and
no caller relies on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from patcher.blocks import Block, Blocks, Kind, Place
from patcher.code.registers import ALL, outgoing, overwritten, relies_on
from patcher.live import LiveFunction

Node = LiveFunction | Block


@dataclass(frozen=True, slots=True)
class Callers:
    """The functions that must have no frame: `old` bodies when the change is made, `new` ones when it is undone."""

    old: tuple[LiveFunction, ...]
    new: tuple[Block, ...]


class Registers:
    """The functions of one unit, before and after a change."""

    def __init__(
        self,
        blocks: Blocks,
        live: Callable[[Block], LiveFunction | None],
        is_door: Callable[[Block], bool],
    ) -> None:
        self._blocks = blocks
        self._live = live
        self._is_door = is_door
        self._by_address: dict[int, Block] = {}
        for block in blocks.functions:
            found = live(block)
            if found is not None:
                self._by_address[found.address] = block
                self._by_address[found.body] = block
                if found.redirect is not None:
                    self._by_address[found.redirect.original] = block
        self._own: dict[Node, frozenset[str]] = {}
        self._calls: dict[Node, tuple[tuple[tuple[int, Block], ...], bool]] = {}

    def callers_at_risk(self, changed: Iterable[Block]) -> Callers:
        """Return which of the changed functions may be relied on to be quiet, before and after."""
        old, new = [], []
        for block in changed:
            live = self._live(block)
            if live is not None and self._relies(live, after=True):
                old.append(live)
            if self._relies(block, after=False):
                new.append(block)
        return Callers(tuple(old), tuple(new))

    def _relies(self, caller: Node, *, after: bool) -> bool:
        calls, _ = self._outgoing(caller)
        clobbers = {site: self._reached(callee, not after) for site, callee in calls}
        taken = {site: self._reached(callee, after) - clobbers[site] for site, callee in calls}
        taken = {site: names for site, names in taken.items() if names}
        return bool(taken) and relies_on(_code(caller), clobbers, taken)

    def _reached(self, block: Block, after: bool) -> frozenset[str]:
        """Return what a call to a function of the unit overwrites, with the change made or not."""
        found: set[str] = set()
        seen: set[Node] = set()
        work = [self._node(block, after)]
        while work:
            node = work.pop()
            if node in seen:
                continue
            seen.add(node)
            calls, anywhere = self._outgoing(node)
            if anywhere:
                return ALL
            found |= self._overwritten(node)
            work += [self._node(callee, after) for _, callee in calls]
        return frozenset(found)

    def _node(self, block: Block, after: bool) -> Node:
        live = self._live(block)
        if live is None or (after and self._is_door(block)):
            return block
        return live

    def _outgoing(self, node: Node) -> tuple[tuple[tuple[int, Block], ...], bool]:
        """Return a function's calls of the unit's own functions, by offset, and whether it goes anywhere else."""
        if node not in self._calls:
            self._calls[node] = self._of_block(node) if isinstance(node, Block) else self._of_live(node)
        return self._calls[node]

    def _of_block(self, block: Block) -> tuple[tuple[tuple[int, Block], ...], bool]:
        calls = []
        anywhere = outgoing(block.data, 0).anywhere
        for reference in self._blocks.references(block):
            if not _is_branch(block, reference.offset):
                continue
            target = reference.target
            if isinstance(target, Place) and target.block.kind is Kind.CODE:
                calls.append((reference.offset - 1, target.block))
            else:
                anywhere = True
        return tuple(calls), anywhere

    def _of_live(self, live: LiveFunction) -> tuple[tuple[tuple[int, Block], ...], bool]:
        found = outgoing(live.code, live.body)
        calls = tuple((offset, self._by_address[t]) for offset, t in found.targets if t in self._by_address)
        return calls, found.anywhere or len(calls) < len(found.targets)

    def _overwritten(self, node: Node) -> frozenset[str]:
        if node not in self._own:
            self._own[node] = overwritten(_code(node))
        return self._own[node]


def _code(node: Node) -> bytes:
    return node.data if isinstance(node, Block) else node.code


def _is_branch(block: Block, offset: int) -> bool:
    before = block.data[max(0, offset - 2) : offset]
    return before[-1:] in (b"\xe8", b"\xe9") or before in (b"\xff\x15", b"\xff\x25") or before[:1] == b"\x0f"
