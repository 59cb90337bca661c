"""Which live variable a static variable of a function is.

Its symbol says nothing from one compile to the next, so this goes by evidence, in this order: what matching could bind;
who uses it; the function that debug information declares it in, and its type; where several of one function are left,
what tells these apart (`rivals`). Whoever is left without any is new; what cannot be told is refused.
"""

from __future__ import annotations

from dataclasses import replace

from patcher.blocks import Block, Kind
from patcher.data.known import Found, Known, ambiguous
from patcher.data.names import Spelling, guard_of, guards, spelling
from patcher.data.outcome import Fate
from patcher.data.rivals import paired
from patcher.data.sites import same_code, votes
from patcher.data.uses import Bodies, owner
from patcher.errors import UnsafeChange
from patcher.live import LiveVariable, base_name

Options = dict[Block, list[LiveVariable]]
"""What each static of a name may be."""


class Scoped:
    """The static variables of a unit's functions."""

    def __init__(self, known: Known) -> None:
        self.known = known
        self._options: dict[tuple[Kind, str, bool], Options] = {}

    def find(self, block: Block) -> Found | None:
        """Return the variable that a function's static variable is."""
        return self._guard(block) if spelling(block.name).guard else self._by_evidence(block)

    def outgrown(self, block: Block) -> LiveVariable | None:
        """Return the live variable that a static is, of whatever type. Raises `UnsafeChange` if two would do."""
        matched = self.known.part.matched(block)
        bound = self.known.part.delta.bindings.get(matched) if matched is not None else None
        if bound is not None:
            return next((v for v in self.known.variables if v.address == bound), None)
        found = [v for v in self._named_alike(block) if self._agrees(block, v, certainly=True)]
        rivals = [b for b in self.unmatched(block) if self.known.function_of(b) == self.known.function_of(block)]
        if len(found) > 1 or len(rivals) > 1:
            raise ambiguous(self.known, block, found, [self.known.describe(v) for v in found])
        return found[0] if found else None

    def _by_evidence(self, block: Block) -> Found | None:
        options = self.resolved(block)
        found = options.get(block, [])
        doubtful = found or self._unclaimed(block, options)
        if len(doubtful) > len(found) or len(found) > 1 or self._is_shared(options, found):
            raise ambiguous(self.known, block, doubtful, [self.known.describe(v) for v in doubtful])
        if not found:
            self._check_size(block, options)
            return None
        if block.kind is Kind.THREAD_LOCAL:
            return Found(found[0])
        before = self.known.homes(found[0])
        shifted = self._is_shifted(block, found[0])
        if before and self.known.function_of(block) not in {"", *before}:
            return Found(found[0], Fate.MOVED, f"was in `{min(before)}`", shifted)
        return replace(self.known.found_again(block, found[0]), shifted=shifted)

    def _is_shifted(self, block: Block, variable: LiveVariable) -> bool:
        """Tell whether a static is declared elsewhere in its function, or in another one, than was last known."""
        position = self.known.position_of(block)
        if block.exported or position is None:
            return False
        now = self.known.position(variable), self.known.function_now(variable)
        return now != (position, self.known.function_of(block))

    def _check_size(self, block: Block, options: Options) -> None:
        """Refuse a variable that the functions which use it have, in another size or of another type."""
        claimed = {v.address for found in options.values() for v in found}
        for variable in self._named_alike(block):
            used = any(self.known.uses.uses(self.known.uses.current(f), variable) for f in self.known.uses.users(block))
            if used and variable.address not in claimed and self._agrees(block, variable):
                raise UnsafeChange(
                    f"`{spelling(block.name).source}` has {block.size} bytes in {self.known.part.source}, but "
                    f"{variable.size} in the process{self.known.other_type(block, variable)}",
                    "its type changed, and the program's data has the old one: restart the program, or keep the type",
                    code="layout",
                )

    @staticmethod
    def _is_shared(options: Options, found: list[LiveVariable]) -> bool:
        return bool(found) and sum(found == o for o in options.values()) > 1

    def resolved(self, block: Block) -> Options:
        """Return what each static of a name may be, as far as that can be told."""
        name = spelling(block.name)
        key = block.kind, name.source, name.guard
        if key not in self._options:
            self._options[key] = self._resolve(block)
        return self._options[key]

    def unmatched(self, block: Block) -> list[Block]:
        """Return the static variables of functions that share a name and that matching did not bind."""
        name = spelling(block.name)
        data = (b for b in self.known.part.blocks.data_blocks() if b.kind is block.kind and b.symbols)
        return [b for b in data if same_static(spelling(b.name), name) and not self.known.is_matched(b)]

    def _resolve(self, block: Block) -> Options:
        options = {b: self._evident(b) for b in self.unmatched(block)}
        self._exclude(options)
        for variable in [found[0] for found in options.values() if len(found) == 1]:
            self._prefer_same_users(options, variable)
        self._tell_apart(options)
        self._exclude(options)
        self._bring_back(options)
        return options

    @staticmethod
    def _exclude(options: Options) -> None:
        for _ in options:  # what is certain for one is out of the question for the others
            certain = [found[0] for found in options.values() if len(found) == 1]
            for block, found in options.items():
                if len(found) > 1:
                    options[block] = [v for v in found if v not in certain]

    def free(self, block: Block) -> list[LiveVariable]:
        """Return the live variables that a scoped one may be, and that nothing is bound to."""
        return [v for v in self._named_alike(block) if self.known.same_type(block, v)]

    def _named_alike(self, block: Block) -> list[LiveVariable]:
        name, kind = spelling(block.name), block.kind is Kind.THREAD_LOCAL
        found: dict[int, LiveVariable] = {}
        exported = block.symbols[0].name if block.exported else ""
        known = self.known.live.exported_variables(base_name(exported)) if exported else []
        for variable in (*self.known.variables, *known):
            if same_static(spelling(variable.name), name) and variable.thread_local == kind:
                found.setdefault(variable.address, variable)
        return [v for v in found.values() if (kind, v.address) not in self.known.bound]

    def _evident(self, block: Block) -> list[LiveVariable]:
        """Return the live variables that the functions which use one have used, or that it is declared to be."""
        free = self.free(block)
        users = self.known.uses.users(block)
        used = self._used(block, free, [b for f in users if (b := self.known.uses.current(f))])
        if not used:
            used = self._used_before(block, free, users)
        found = used or [v for v in free if self._agrees(block, v, certainly=True)]
        same = [v for v in found if self._agrees(block, v, certainly=True)]
        if not same:
            found = [v for v in found if self._agrees(block, v) and self._carries_over(block, v)]
            same = [v for v in found if self._is_renamed(block, v)] if len(found) > 1 else []
        return same or found

    def _used(self, block: Block, free: list[LiveVariable], old: list[Bodies]) -> list[LiveVariable]:
        kind = block.kind is Kind.THREAD_LOCAL
        used = [v for v in free if any(self.known.uses.uses(bodies, v, thread_local=kind) for bodies in old)]
        # A caller that a function is inlined into uses its own variables as well; the function does not.
        return [v for v in used if all(self.known.uses.uses(bodies, v, thread_local=kind) for bodies in old)] or used

    def _used_before(self, block: Block, free: list[LiveVariable], users: set[Block]) -> list[LiveVariable]:
        """Return what the functions that use a variable used in other generations."""
        if block.kind is Kind.THREAD_LOCAL:
            return []
        for function in users:
            for bodies in self.known.uses.earlier(function):
                found = self._used(block, free, [bodies])
                if found:
                    return found
        return []

    def _agrees(self, block: Block, variable: LiveVariable, *, certainly: bool = False) -> bool:
        """Tell whether a variable may be declared where a live one is, or is said to be."""
        ours, theirs = self.known.function_of(block), self.known.homes(variable)
        if not ours or not theirs:
            return not certainly
        if ours in theirs:
            return True
        if certainly:
            return False
        # Of two functions that are both still there, each has its own.
        return not (any(map(self.known.has_function, theirs)) and self.known.had_function(ours))

    def _carries_over(self, block: Block, variable: LiveVariable) -> bool:
        """Tell whether a new function that stands for one that is gone is that function, renamed."""
        ours, theirs = self.known.function_of(block), self.known.function_declaring(variable)
        direct = self.known.uses.direct(block)
        if any(self.known.part.live(f) is not None for f in direct):
            return True
        callers = self.known.uses.users(block) - direct
        own = [b for f in callers for b in self.known.uses.current(f) if owner(b.name) == owner(f.name)]
        if self.known.uses.uses(own, variable):
            return True  # it was part of the caller, and has become a function of its own
        if ours and theirs and self.known.has_function(theirs):
            return False
        old = self._owners(variable)
        if {owner(b.name) for b in old} & {owner(f.name) for f in direct}:
            return True  # it is the same function, in another clone of it
        seen = votes(self.known.part.blocks, direct, old, [block], [variable])
        return seen.of(block) == {variable.address} and block not in seen.loose_new

    def _is_renamed(self, block: Block, variable: LiveVariable) -> bool:
        """Tell whether a variable's function is one that is gone, in all but its name."""
        old = self._owners(variable)
        return any(same_code(self.known.part.blocks, f, b) for f in self.known.uses.direct(block) for b in old)

    def _owners(self, variable: LiveVariable) -> Bodies:
        """Return the bodies of functions that are gone and that refer to a variable."""
        bodies = {b.body: b for f in self.known.part.blocks.functions for b in self.known.uses.current(f)[1:]}
        return tuple(b for b in bodies.values() if self.known.uses.uses((b,), variable))

    def _prefer_same_users(self, options: Options, variable: LiveVariable) -> None:
        """Of several that one would do for, take the only one that is used by the very functions that used it."""
        rivals = [block for block, found in options.items() if found == [variable]]
        if len(rivals) < 2:
            return
        kind = rivals[0].kind is Kind.THREAD_LOCAL
        functions = self.known.part.blocks.functions
        before = {f for f in functions if self.known.uses.uses(self.known.uses.current(f), variable, thread_local=kind)}
        same = [block for block in rivals if self.known.uses.direct(block) == before]
        if len(same) == 1:
            options.update({block: [] for block in rivals if block is not same[0]})

    def _unclaimed(self, block: Block, options: Options) -> list[LiveVariable]:
        """Return the program's own variables that a block might be and no other one is."""
        own = [v for v in self._left_over(block, options) if not v.born and self._agrees(block, v)]
        return [v for v in own if self._agrees(block, v, certainly=True) or not self._was_gone(block, v)]

    def _left_over(self, block: Block, options: Options) -> list[LiveVariable]:
        claimed = {v.address for found in options.values() for v in found}
        return [v for v in self.free(block) if v.address not in claimed]

    def _was_gone(self, block: Block, variable: LiveVariable) -> bool:
        """Tell whether a variable's function was gone before this change: a new one is not that one, renamed."""
        homes = self.known.homes(variable)
        if not homes or not self.known.function_of(block) or any(map(self.known.has_function, homes)):
            return False
        return not self.known.is_used(variable) and not any(map(self.known.is_pointed_to, homes))

    def _bring_back(self, options: Options) -> None:
        """Have a static that is no other one be what its function had once, in the same depth, where that is one."""
        for block, found in options.items():
            position = self.known.position_of(block)
            if found or position is None or block.kind is Kind.THREAD_LOCAL:
                continue
            gone = [v for v in self._left_over(block, options) if self._agrees(block, v, certainly=True)]
            same = [v for v in gone if (known := self.known.position(v)) and known.depth == position.depth]
            rivals = [b for b, other in options.items() if not other and self.known.position_of(b) is not None]
            if len(gone) == len(same) == len(rivals) == 1 and not self.known.is_used(same[0]):
                options[block] = same

    def _tell_apart(self, options: Options) -> None:
        """Settle which is which where several variables of one function have one name."""
        for block in list(options):
            found = options[block]
            group = [b for b, other in options.items() if other == found]
            if (len(found) > 1 or len(group) > 1) and found and block.kind is not Kind.THREAD_LOCAL:
                pairs = paired(self.known, group, found)
                options.update({b: [pairs[b]] if b in pairs else [] for b in group} if pairs is not None else {})

    # --- guards ---------------------------------------------------------------------------------------------------

    def _guard(self, block: Block) -> Found | None:
        """Return the guard of the variable that a guard's variable is: the two go together."""
        data = self.known.part.blocks.data_blocks()
        variables = [b for b in data if any(guards(block.name, s.name) for s in b.symbols)]
        if not variables:
            return self._by_evidence(block)
        known = next((v for b in variables if (v := self._live(b)) is not None), None)
        if known is None:
            return None
        first = self.known.live.before_migrations(known.address)
        known = next((v for v in (*self.known.live.every_variable(), known) if v.address == first), known)
        wanted = guard_of(known.name)
        candidates = [*self.known.variables, *self.known.live.exported_variables(base_name(wanted))]
        found = [v for v in candidates if v.name == wanted and v.born == known.born]
        if found:
            return Found(found[-1])
        raise UnsafeChange(
            f"`{spelling(block.name).source}` of {self.known.part.source} is initialised by code now, and has been "
            "initialised without it",
            "keep its initial value constant, or give the variable another name",
            code="constructor",
        )

    def _live(self, variable: Block) -> LiveVariable | None:
        """Return the live variable that a static is, by its own name."""
        bound = self.known.part.delta.bindings.get(self.known.part.matched(variable) or variable)
        if bound is None:
            alike = self._named_alike(variable)
            if alike and not any(self.known.same_type(variable, v) for v in alike):
                return self.outgrown(variable)  # carried over, or refused by itself
            found = self._by_evidence(variable)
            return found.variable if found is not None else None
        known = [*self.known.variables, *self.known.live.exported_variables(base_name(variable.name))]
        return next((v for v in known if v.address == bound and spelling(v.name).scoped), None)


def same_static(one: Spelling, other: Spelling) -> bool:
    """Tell whether two names may be one static variable's, or one guard's."""
    return one.scoped and other.scoped and one.source == other.source and one.guard == other.guard
