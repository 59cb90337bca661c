"""What a generation has to place, and what everything in it refers to.

From the functions that must be new, the references are followed: a block that the process has is bound to
its live address, one that it lacks is placed as well, and an external symbol is resolved. Every symbol is
resolved or refused here, before anything is laid out.

Decides what is placed and what names mean; where it goes is `place`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from patcher.blocks import Absolute, Block, Blocks, External, Kind, Linkable, Place, Reference
from patcher.elf import ObjectFile
from patcher.errors import LinkError, UnresolvedSymbol, UnsupportedRelocation
from patcher.link.relocations import RULES, Need, R, type_name


class DynamicThreadLocal(UnsupportedRelocation):
    """A thread-local reached by a call of the dynamic linker; the initial-exec model would do without.

    `object` is the object that has to be compiled with that model.
    """

    object: ObjectFile | None = None


@dataclass(frozen=True, slots=True)
class Bound:
    """Something that the process has. `call` is where a call may go, when that differs from its address for life.

    For a thread-local `address` is the offset from the thread pointer; or, when it has no fixed one (the module's
    storage is allocated for each thread when it first asks), the offset in the block of the module `module_id`.
    """

    address: int
    call: int = 0
    thread_local: bool = False
    module_id: int = 0


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


@dataclass(frozen=True)
class Plan:
    """Everything to place, grouped by the memory it needs, and everything that is only referred to."""

    code: tuple[Block, ...]
    read_only: tuple[Block, ...]
    data: tuple[Block, ...]
    linkables: dict[Block, Linkable] = field(repr=False)
    bound: dict[Block, Bound] = field(repr=False)
    externals: dict[tuple[Blocks, str], Bound | Block] = field(repr=False)
    owners: dict[Block, Blocks] = field(repr=False)
    doors: frozenset[Block] = frozenset()

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
        self._work: list[Block] = []

    def run(self) -> Plan:
        for unit in self._units:
            for block in unit.wanted:
                self._place(block, unit)
        while self._work:
            block = self._work.pop()
            unit = self._placed[block]
            linkable = unit.blocks.linkable(block)
            self._linkables[block] = linkable
            for reference in linkable.references:
                self._follow(unit, block, reference)
        return self._plan()

    def _plan(self) -> Plan:
        kinds: dict[Kind, list[Block]] = {kind: [] for kind in Kind}
        for block in self._placed:
            kinds[block.kind].append(block)
        return Plan(
            code=tuple(kinds[Kind.CODE]),
            read_only=tuple(kinds[Kind.READ_ONLY]),
            data=tuple(kinds[Kind.DATA]),
            linkables=self._linkables,
            bound=self._bound,
            externals=self._externals,
            owners={block: unit.blocks for block, unit in self._placed.items()},
            doors=frozenset(b for b, unit in self._placed.items() if b.kind is Kind.CODE and unit.doors(b)),
        )

    def _place(self, block: Block, unit: Unit) -> None:
        if block not in self._placed:
            self._placed[block] = unit
            self._work.append(block)

    def _follow(self, unit: Unit, block: Block, reference: Reference) -> None:
        rule = RULES.get(reference.type)
        if rule is None:
            kind = DynamicThreadLocal if reference.type in _DYNAMIC_THREAD_LOCAL else UnsupportedRelocation
            error = kind(
                f"{where(block, reference)}: {type_name(reference.type)}{_against(reference)} cannot be applied",
                _ADVICE.get(reference.type, "report it, with the compiler and its flags"),
            )
            if isinstance(error, DynamicThreadLocal):
                error.object = block.object
            raise error
        target = reference.target
        thread_local = rule.need in (Need.THREAD_OFFSET, Need.THREAD_CELL)
        if isinstance(target, Place):
            if (target.block.kind is Kind.THREAD_LOCAL) != thread_local:
                raise LinkError(
                    f"{where(block, reference)}: {type_name(reference.type)}{_against(reference)}, which is "
                    f"{target.block.kind.value}",
                    "the object is damaged; compile it again",
                )
            self._reach(unit, block, target)
        elif isinstance(target, External):
            self._resolve_external(unit, block, reference, target)
        if thread_local and isinstance(target, Absolute):
            raise LinkError(f"{where(block, reference)}: a thread-local reference without a symbol", "")

    def _reach(self, unit: Unit, user: Block, target: Place) -> None:
        block = target.block
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

    def _resolve_external(self, unit: Unit, block: Block, reference: Reference, target: External) -> None:
        key = (unit.blocks, target.name)
        if key in self._externals:
            return
        provided = self._provide(target.name)
        if provided is not None:
            owner, definition = provided
            self._reach(owner, block, Place(definition, 0))
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


_DYNAMIC_THREAD_LOCAL = (R.TLSGD, R.TLSLD, R.GOTPC32_TLSDESC)
_ADVICE: dict[int, str] = {
    R.TLSGD: "compile the unit with -ftls-model=initial-exec",
    R.TLSLD: "compile the unit with -ftls-model=initial-exec",
    R.GOTPC32_TLSDESC: "compile the unit with -mtls-dialect=gnu -ftls-model=initial-exec",
}
