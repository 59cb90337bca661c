"""What a generation has to place, and what everything in it refers to.

From the functions that must be new, the references are followed: a block that the process has is bound to
its live address, one that it lacks is placed as well, and an external symbol is resolved. Every symbol is
resolved or refused here, before anything is laid out.

References are followed in waves, each target of a wave once, since a large unit has far more references than
things that they refer to. Decides what is placed and what names mean; where it goes is `place`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from patcher.blocks import Block, Blocks, Doubt, External, Fields, Kind, Linkable, Place, Reference, Target
from patcher.bulk import collector_paused, first_rows
from patcher.elf.object import Column
from patcher.elf.relocations import OFFSET_TABLE
from patcher.errors import LinkError, UnresolvedSymbol, UnsupportedRelocation
from patcher.link.relocations import DYNAMIC_THREAD_LOCAL, RULES, Need, type_name
from patcher.link.threads import to_local_exec

_OF_TABLE = (Need.NOTHING, Need.CELL, Need.ISLAND)  # what may be wanted of its address

FIND_THREAD_LOCAL = External("__tls_get_addr")


@dataclass(frozen=True, slots=True)
class Bound:
    """Something that the process has. `call` is where a call may go, when that differs from its address for life.

    For a thread-local `address` is the offset from the thread pointer; or, when it has no fixed one (the module's
    storage is allocated for each thread when it first asks), the offset in the block of the module `module_id`.
    `size` is what the process knows it by, 0 where it was not asked.
    """

    address: int
    call: int = 0
    thread_local: bool = False
    module_id: int = 0
    size: int = 0


@dataclass(frozen=True, slots=True)
class Unit:
    """One object's part in a generation, as the linker sees it.

    `wanted`: function blocks that must be placed. `resident`: tells where a block of this object already is in the
    process (None: nowhere, place it). `doors`: the functions among its blocks that are entered through an island.
    """

    blocks: Blocks
    wanted: tuple[Block, ...]
    resident: Callable[[Block], Bound | None]
    doors: Callable[[Block], bool]


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Some blocks of one object that are placed, and their references."""

    source: Blocks
    members: tuple[Block, ...]
    fields: Fields


@dataclass(frozen=True)
class Plan:
    """Everything to place, grouped by the memory it needs, and everything that is only referred to.

    `linkables` has the blocks whose bytes are not placed as the object has them; `runs`, by each of their members,
    those that must stay as far apart as they are in the object.
    """

    code: tuple[Block, ...]
    read_only: tuple[Block, ...]
    data: tuple[Block, ...]
    groups: tuple[Group, ...] = field(repr=False)
    linkables: dict[Block, Linkable] = field(repr=False)
    bound: dict[Block, Bound] = field(repr=False)
    externals: dict[tuple[Blocks, str], Bound | Block] = field(repr=False)
    doors: frozenset[Block] = frozenset()
    runs: dict[Block, tuple[Block, ...]] = field(default_factory=dict, repr=False)

    @property
    def placed(self) -> tuple[Block, ...]:
        return self.code + self.read_only + self.data


Resolve = Callable[[Blocks, External], Bound | None]
Provide = Callable[[str], "tuple[Unit, Block] | None"]


def plan(units: Sequence[Unit], resolve: Resolve, provide: Provide | None = None) -> Plan:
    """Work out the closure of what `units` want placed.

    `resolve` says what an external symbol of an object denotes in the process; `provide` finds a definition that
    other objects of the same generation bring along. Raises `UnresolvedSymbol` naming the symbol and who refers
    to it, `UnsupportedRelocation` for a type without a row in the table.
    """
    with collector_paused():
        return _Planner(units, resolve, provide).run()


class _Planner:
    def __init__(self, units: Sequence[Unit], resolve: Resolve, provide: Provide | None) -> None:
        self._units = units
        self._resolve = resolve
        self._provide = provide or (lambda name: None)
        self._placed: dict[Block, Unit] = {}
        self._linkables: dict[Block, Linkable] = {}
        self._bound: dict[Block, Bound] = {}
        self._externals: dict[tuple[Blocks, str], Bound | Block] = {}
        self._groups: list[Group] = []
        self._runs: dict[Block, list[Block]] = {}
        self._asked: dict[Block, Bound | None] = {}
        self._wave: dict[Blocks, list[Block]] = {}
        self._reached: dict[Blocks, npt.NDArray[np.bool_]] = {}  # by block number, whether it is placed or bound

    def run(self) -> Plan:
        for unit in self._units:
            wanted = [b for b in dict.fromkeys(unit.wanted) if b not in self._placed]
            self._placed.update(dict.fromkeys(wanted, unit))
            if wanted:
                self._wave.setdefault(unit.blocks, []).extend(wanted)
        while self._wave:
            wave, self._wave = self._wave, {}
            for blocks in wave.values():
                self._take(self._placed[blocks[0]], blocks)
        return self._plan()

    def _plan(self) -> Plan:
        placed = self._placed
        code, read_only, data = (
            tuple([b for b in placed if b.kind is kind]) for kind in (Kind.CODE, Kind.READ_ONLY, Kind.DATA)
        )
        return Plan(
            code=code,
            read_only=read_only,
            data=data,
            groups=tuple(self._groups),
            linkables=self._linkables,
            bound=self._bound,
            externals=self._externals,
            doors=frozenset([b for b in code if placed[b].doors(b)]),
            runs={block: tuple(sorted(run, key=lambda b: b.start)) for block, run in self._runs.items()},
        )

    def _place(self, block: Block, unit: Unit) -> None:
        if block not in self._placed:
            self._placed[block] = unit
            self._wave.setdefault(unit.blocks, []).append(block)
            if block.kind is Kind.READ_ONLY and not block.symbols:
                self._keep_together(unit, unit.blocks.run(block))

    def _keep_together(self, unit: Unit, blocks: tuple[Block, ...]) -> None:
        """Place some blocks of a section as far apart as they are in it."""
        if len(blocks) < 2 or self._runs.get(blocks[0], blocks) is self._runs.get(blocks[1]):
            return
        members: dict[Block, None] = {}
        for block in blocks:
            members.update(dict.fromkeys(self._runs.get(block, (block,))))
        joined = list(members)
        self._runs.update(dict.fromkeys(joined, joined))
        for block in blocks:
            self._place(block, unit)

    # --- a wave -----------------------------------------------------------------------------------------------

    def _take(self, unit: Unit, blocks: list[Block]) -> None:
        """Follow what some blocks of one unit refer to, and keep it for the linker."""
        stretched = unit.blocks.stretched(blocks)
        plain = _without(blocks, stretched)
        fields = unit.blocks.fields(plain)
        asking = _is_among(fields.type, _DYNAMIC)
        if asking.any():
            stretched += [plain[i] for i in np.unique(fields.owner[asking]).tolist()]
            plain = _without(plain, stretched)
            fields = unit.blocks.fields(plain)
        members = (*plain, *stretched)
        self._marks(unit.blocks)[[b.number for b in members]] = True
        if stretched:
            fields = Fields.joined([fields, self._rewritten(unit, stretched, len(plain))])
        for block in unit.blocks.doubtful(blocks):
            for doubt in unit.blocks.doubts(block):
                self._settle(unit, block, doubt)
        self._follow_all(unit, members, fields)
        self._groups.append(Group(unit.blocks, members, fields))

    def _follow_all(self, unit: Unit, members: Sequence[Block], fields: Fields) -> None:
        """Follow some blocks' references: nearly all lead to blocks, and need nothing to be checked of themselves.

        Such a block is reached once, whatever else is referred to once for each way to do so.
        """
        source = unit.blocks
        home, _ = source.homes(fields.target)
        plain = (home >= 0) & _is_among(fields.type, _PLAIN)
        reached = self._marks(source)
        rows = np.flatnonzero(plain & ~reached[home])
        rows = rows[first_rows(home[rows], source.block_count)]
        if not plain.all():
            others = np.flatnonzero(~plain)
            _, first = np.unique(fields.target[others] << 32 | fields.type[others], return_index=True)
            rows = np.sort(np.concatenate((rows, others[first])))
        numbers = np.where(plain[rows], home[rows], -1)
        for row, number, owner in zip(rows.tolist(), numbers.tolist(), fields.owner[rows].tolist(), strict=True):
            if number < 0:
                self._follow(unit, members[owner], fields.reference(source, row))
            else:
                self._reach(unit, members[owner], source.block(number))
        reached[numbers[numbers >= 0]] = True

    def _marks(self, source: Blocks) -> npt.NDArray[np.bool_]:
        """Return for each block number of an object whether it need not be looked at again."""
        marks = self._reached.get(source)
        if marks is None or len(marks) < source.block_count:
            grown = np.zeros(2 * source.block_count, bool)
            if marks is not None:
                grown[: len(marks)] = marks
            marks = self._reached[source] = grown
        return marks

    def _rewritten(self, unit: Unit, blocks: list[Block], start: int) -> Fields:
        """Return the references of blocks that are not placed as they are; owners count from `start`."""
        rows: list[tuple[int, Reference]] = []
        for i, block in enumerate(blocks, start):
            linkable = unit.blocks.linkable(block)
            if any(r.type in DYNAMIC_THREAD_LOCAL for r in linkable.references):
                linkable = self._without_calls(unit, block, linkable)
            self._linkables[block] = linkable
            rows += [(i, r) for r in linkable.references]
        return unit.blocks.rows(rows)

    def _without_calls(self, unit: Unit, block: Block, linkable: Linkable) -> Linkable:
        def fixed(r: Reference) -> bool:
            self._follow(unit, block, r)
            return not self._bound_of(unit, r.target).module_id

        return to_local_exec(f"{block.object.name}: `{block.name}`", linkable, fixed)

    def _bound_of(self, unit: Unit, target: Target) -> Bound:
        if isinstance(target, Place):
            return self._bound[target.block]
        assert isinstance(target, External)
        found = self._externals[unit.blocks, target.name]
        return self._bound.get(found, Bound(0)) if isinstance(found, Block) else found

    # --- one reference ----------------------------------------------------------------------------------------

    def _follow(self, unit: Unit, block: Block, reference: Reference) -> None:
        rule = RULES.get(reference.type)
        if rule is None:
            raise UnsupportedRelocation(
                f"{where(block, reference)}: {type_name(reference.type)}{_against(reference)} cannot be applied",
                "report it, with the compiler and its flags",
            )
        target = reference.target
        table = isinstance(target, External) and target.name == OFFSET_TABLE and rule.need in _OF_TABLE
        if rule.need is Need.TABLE or table:
            return
        if isinstance(target, Place):
            if (target.block.kind is Kind.THREAD_LOCAL) != rule.need.thread_local:
                raise LinkError(
                    f"{where(block, reference)}: {type_name(reference.type)}{_against(reference)}, which is "
                    f"{target.block.kind.value}",
                    "the object is damaged; compile it again",
                )
            self._reach(unit, block, target.block)
        elif isinstance(target, External):
            self._resolve_external(unit, block, reference, target)
        elif rule.need.thread_local:
            raise LinkError(f"{where(block, reference)}: a thread-local reference without a symbol", "")
        if rule.need.thread_local:
            self._check_thread_local(unit, block, reference, rule.need)

    def _check_thread_local(self, unit: Unit, block: Block, reference: Reference, need: Need) -> None:
        bound = self._bound_of(unit, reference.target)
        if not bound.thread_local:
            raise LinkError(
                f"{where(block, reference)}: {type_name(reference.type)}{_against(reference)}, which is not "
                "thread-local in the process",
                "restart the program: its threads have no storage for it",
                code="thread-local",
            )
        if bound.module_id and need in (Need.THREAD_OFFSET, Need.THREAD_CELL):
            raise LinkError(
                f"{where(block, reference)}:{_against(reference)} has no fixed offset from the thread pointer",
                "compile the unit with -fPIC -ftls-model=global-dynamic",
                code="thread-local",
            )
        if bound.module_id and need is Need.DESCRIPTOR:
            self._resolve_external(unit, block, reference, FIND_THREAD_LOCAL)

    def _reach(self, unit: Unit, user: Block, block: Block) -> None:
        if block in self._placed or block in self._bound:
            return
        resident = unit.resident(block)
        if resident is not None:
            self._bound[block] = resident
        elif block.kind is Kind.THREAD_LOCAL:
            raise LinkError(
                f"`{user.name}` uses the new thread-local variable `{block.name}`",
                "threads that already run have no storage for it; make it a plain variable, or restart the program",
                code="new-thread-local",
            )
        else:
            self._place(block, unit)

    def _settle(self, unit: Unit, user: Block, doubt: Doubt) -> None:
        """See to it that a reference is right whichever of two blocks it is about, or refuse it."""
        _, first, second = doubt
        left, right = self._whereabouts(unit, first), self._whereabouts(unit, second)
        apart = second.start - first.start
        if left is not None and right is not None:
            if right == replace(right, address=left.address + apart, module_id=left.module_id):
                return
        elif left is not None and second.anonymous and second.kind is Kind.DATA:
            self._bound[second] = Bound(left.address + apart)  # padding
            return
        elif right is not None and first.anonymous and first.kind is Kind.DATA:
            self._bound[first] = Bound(right.address - apart)  # an element of the second before its first one
            return
        elif left is right and first.kind is second.kind:
            self._keep_together(unit, (first, second))
            return
        raise LinkError(
            f"{where(user, doubt.reference)}: {type_name(doubt.reference.type)} may be about `{first.name}` or about "
            f"`{second.name}`, which lie side by side in the object and not in the process",
            "compile the unit with -fdata-sections, or give the source file instead of the object",
            code="ambiguous-reference",
        )

    def _whereabouts(self, unit: Unit, block: Block) -> Bound | None:
        """Return where the process has a block; None for one that is placed."""
        if block in self._placed or block in self._bound:
            return self._bound.get(block)
        if block not in self._asked:
            self._asked[block] = unit.resident(block)
        return self._asked[block]

    def _resolve_external(self, unit: Unit, block: Block, reference: Reference, target: External) -> None:
        key = (unit.blocks, target.name)
        if key in self._externals:
            return
        provided = self._provide(target.name)
        if provided is not None:
            owner, definition = provided
            self._reach(owner, block, definition)
            self._externals[key] = definition
            return
        found = self._resolve(unit.blocks, target)
        if found is None and not target.weak:
            raise UnresolvedSymbol(
                f"`{target.name}` is not defined in the process; `{block.name}` refers to it "
                f"({where(block, reference)})",
                "link the program with what defines it, or define it in a source file that is watched",
            )
        self._externals[key] = found if found is not None else Bound(0)


def _marked(kinds: Iterable[int]) -> npt.NDArray[np.bool_]:
    """Return which relocation types are among some, by number; the last stands for all that are greater."""
    marks = np.zeros(256, bool)
    marks[list(kinds)] = True
    return marks


def _is_among(types: Column, marks: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = marks[np.minimum(types, len(marks) - 1)]
    return found


_DYNAMIC = _marked(DYNAMIC_THREAD_LOCAL)
_PLAIN = _marked(kind for kind, rule in RULES.items() if not rule.need.thread_local and rule.need is not Need.TABLE)


def _without(blocks: list[Block], others: list[Block]) -> list[Block]:
    left_out = set(others)
    return [b for b in blocks if b not in left_out] if left_out else blocks


def where(block: Block, reference: Reference) -> str:
    """Return a reference's place for messages: object, section and offset."""
    section = block.object.sections.get(block.section)
    name = section.name if section is not None else "common"
    return f"{block.object.name}: {name}+{block.start + reference.offset:#x} in `{block.name}`"


def _against(reference: Reference) -> str:
    target = reference.target
    if isinstance(target, External):
        return f" against `{target.name}`"
    return f" against `{target.block.name}`" if isinstance(target, Place) else ""
