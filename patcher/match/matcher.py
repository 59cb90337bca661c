"""The comparison of one unit: whole bodies first, then what every reference means."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from patcher.blocks import Absolute, Block, Blocks, External, Kind, Place, Reference, Target
from patcher.elf import Relocation
from patcher.errors import PatcherError, UnsafeChange
from patcher.lines import NONE as NO_LINES
from patcher.lines import LineNumbers
from patcher.link.relocations import RULES, Need, R, type_name
from patcher.live import LiveFunction, LiveUnit, Scope, base_name
from patcher.match.rewritten import (
    DIRECT,
    MASK,
    REWRITTEN,
    absolute_immediate,
    field_of,
    jump_and_nop,
    made_direct,
    opcode_bytes,
    thread_immediate,
    width_of,
)
from patcher.match.tables import TableReferences, is_table_relative
from patcher.match.threads import ThreadReferences
from patcher.match.verdict import (
    Cause,
    Delta,
    FunctionMatch,
    Mismatch,
    Status,
    is_cold_piece,
    is_private_piece,
    parent_of,
)
from patcher.match.walk import Walk
from patcher.stamps import NONE as NO_STAMPS
from patcher.stamps import Stamps

_WINDOW = 1 << 14
_NAMED_CELLS = (R.GLOB_DAT, R.JUMP_SLOT)


@dataclass(frozen=True, slots=True)
class _Pending:
    """A reference into the middle of a function: right when that function's map sends `offset` to `address`."""

    owner: Block
    target: Block
    offset: int
    address: int


def match(blocks: Blocks, unit: LiveUnit, line_numbers: LineNumbers = NO_LINES, stamps: Stamps = NO_STAMPS) -> Delta:
    """Compare every function of a unit's object with what runs.

    Raises `UnsafeChange` for ambiguous names, and for a changed function whose code the linker made another's too.

    `line_numbers`: the fields that are known to hold line numbers; a function that is the same but for these is
    `LINE_ONLY`. `stamps`: what this compile wrote of its own moment, which makes no difference at all.
    """
    delta = Matcher(blocks, unit, NO_LINES, stamps).delta()
    if line_numbers.fields:
        delta = past_lines(delta, line_numbers, stamps)
    _refuse_folded(unit, delta.functions)
    return delta


def past_lines(delta: Delta, line_numbers: LineNumbers, stamps: Stamps = NO_STAMPS) -> Delta:
    """Tell apart the functions of a delta that are the same but for line numbers."""
    tolerant = Matcher(delta.blocks, delta.unit, line_numbers, stamps).delta()
    functions = tuple(
        FunctionMatch(loose.block, Status.LINE_ONLY, loose.live)
        if strict.status is Status.CHANGED and loose.status is Status.SAME
        else strict
        for strict, loose in zip(delta.functions, tolerant.functions, strict=True)
    )
    return Delta(delta.blocks, delta.unit, functions, tolerant.bindings, stamps)


def _refuse_folded(unit: LiveUnit, functions: Iterable[FunctionMatch]) -> None:
    for verdict in functions:
        if verdict.status is Status.CHANGED and verdict.live is not None and not is_private_piece(verdict.name):
            others = unit.folded_with(verdict.live, verdict.block)
            if others:
                raise UnsafeChange(
                    f"`{verdict.name}` shares its code with {', '.join(f'`{n}`' for n in others)}: "
                    f"the linker of {unit.module.name} folded identical functions, and a change would meet them all",
                    "link the program without --icf",
                    code="folded-function",
                )


@dataclass(frozen=True, slots=True)
class _Contents:
    """What a comparison of contents found: the verdict, and what has to hold besides for it."""

    same: bool
    bindings: tuple[tuple[Block, int], ...] = ()
    pending: tuple[_Pending, ...] = ()


class Matcher:
    def __init__(self, blocks: Blocks, unit: LiveUnit, line_numbers: LineNumbers, stamps: Stamps) -> None:
        self.blocks = blocks
        self._line_numbers = line_numbers
        self._stamps = stamps
        self.unit = unit
        self.memory = unit.image.target.memory
        self.bindings: dict[Block, int] = {}
        self._trial: dict[Block, int] = {}
        self._found: dict[Block, dict[Block, int]] = {}  # function -> what it bound
        self._variables: dict[tuple[bool, int], Block] = {}  # (thread-local, address) -> the block bound to it
        self.live: dict[Block, LiveFunction | None] = {}
        self.maps: dict[Block, dict[int, int] | None] = {}  # None: the identity
        self.pending: list[_Pending] = []
        self._named: set[tuple[Target, int]] = set()  # functions and externals that were found where they should be
        self._proven: set[tuple[int, int]] = set()  # the same, by symbol number
        self._contents: dict[tuple[Block, int, int], _Contents] = {}
        self._assumed: set[tuple[Block, int, int]] = set()  # contents that are being compared
        self._needed: list[tuple[Block, int]] | None = None  # what these bind
        self._windows: dict[int, bytes] = {}
        self._current: Block | None = None
        self.threads = ThreadReferences(self)
        self.tables = TableReferences(self)

    def delta(self) -> Delta:
        results: dict[Block, FunctionMatch] = {}
        # Cold pieces last: they refer into the middle of their parents.
        for block in sorted(self.blocks.functions, key=lambda b: is_cold_piece(b.name)):
            results[block] = self._function(block)
        unproven = self._settle_pending(results)
        self._spread(results)
        ordered = tuple(results[b] for b in self.blocks.functions)
        return Delta(self.blocks, self.unit, ordered, self._without(unproven), self._stamps)

    # --- verdicts ---------------------------------------------------------------------------------------------

    def _function(self, block: Block) -> FunctionMatch:
        live = self.unit.function(block)
        self.live[block] = live
        if live is None:
            return FunctionMatch(block, Status.ADDED, None)
        if self.unit.overridden(block):
            return FunctionMatch(block, Status.SAME, live)  # what the unit has of it is not what anybody calls
        self._current, self._trial = block, {}
        self.threads.start()
        self.tables.start()
        pending = len(self.pending)
        try:
            self.maps[block] = self._compare(block, live)
            self.tables.finish()
        except Mismatch as mismatch:
            self.unit.refuse_elsewhere(live, block)
            del self.pending[pending:]
            return FunctionMatch(block, Status.CHANGED, live, mismatch.cause, mismatch.reason)
        self._found[block] = self._trial
        self.bindings.update(self._trial)
        for variable, address in self._trial.items():
            if variable.kind is not Kind.READ_ONLY:
                self._variables[variable.kind is Kind.THREAD_LOCAL, address] = variable
        return FunctionMatch(block, Status.SAME, live)

    def _settle_pending(self, results: dict[Block, FunctionMatch]) -> set[Block]:
        """Return the functions that turned out changed."""
        failed = set()
        for p in self.pending:
            live = self.live.get(p.target)
            known = p.target in self.maps and live is not None
            offset = self._live_offset(p.target, p.offset) if known else None
            places = (p.address, self.unit.beyond_jump(p.address)) if not p.offset else (p.address,)
            if live is None or offset is None or live.body + offset not in places:
                old = results[p.owner]
                if old.status is Status.SAME:
                    reason = f"refers to {p.target.name}+{p.offset:#x}, which stands elsewhere"
                    results[p.owner] = FunctionMatch(p.owner, Status.CHANGED, old.live, Cause.DEPENDENT, reason)
                    failed.add(p.owner)
        return failed

    def _live_offset(self, block: Block, offset: int) -> int | None:
        known = self.maps[block]
        return offset if known is None else known.get(offset)

    def _without(self, unproven: set[Block]) -> dict[Block, int]:
        """Return the bindings, less those that only functions gave that did not match after all."""
        if not unproven:
            return self.bindings
        kept = [bound for function, bound in self._found.items() if function not in unproven]
        return {variable: address for bound in kept for variable, address in bound.items()}

    def _spread(self, results: dict[Block, FunctionMatch]) -> None:
        """Mark as changed what cannot stay because something else changed.

        Who refers to a changed private piece has to be relinked to the new one; who goes on in the middle of a
        function (its cold piece) cannot serve both the old and the new one.
        """
        inside: dict[Block, list[Block]] = {}
        for p in self.pending:
            inside.setdefault(p.target, []).append(p.owner)
        work = [b for b, m in results.items() if m.status is not Status.SAME]
        if not work:
            return
        users: dict[Block, list[Block]] = {}
        if any(is_private_piece(block.name) for block in results):
            for block in results:
                for target in self._private_targets(block):
                    users.setdefault(target, []).append(block)
        while work:
            piece = work.pop()
            affected = inside.get(piece, []) + users.get(piece, [])
            if is_cold_piece(piece.name):
                parent = parent_of(piece.name)
                affected += [b for b in results if b.name == parent]
            for user in affected:
                if results[user].status is Status.SAME:
                    reason = f"uses {piece.name}, which changed"
                    results[user] = FunctionMatch(user, Status.CHANGED, results[user].live, Cause.DEPENDENT, reason)
                    work.append(user)

    def _private_targets(self, block: Block) -> set[Block]:
        found = {r.target.block for r in self.blocks.references(block) if isinstance(r.target, Place)}
        return {b for b in found if b.kind is Kind.CODE and b is not block and is_private_piece(b.name)}

    # --- bodies -----------------------------------------------------------------------------------------------

    def _compare(self, block: Block, live: LiveFunction) -> dict[int, int] | None:
        code = live.code
        if len(code) < block.size:
            # Symbol sizes are sometimes absent or short (assembly); what follows may be read as far as needed.
            code = self.unit.read_ahead(live, block.size) if live.size == 0 else code
        relocations = self.blocks.relocations(block)
        if relocations is None or len(code) != block.size or not self._equal_code(block, code, relocations):
            return Walk(self, block, code, live.body, self.blocks.references(block)).run()
        proven, base = self._proven, live.body - block.start
        for r in relocations:
            offset, kind, symbol, addend = r
            if kind in DIRECT:
                at = offset - block.start
                address = int.from_bytes(code[at : at + 4], "little", signed=True) + base + offset - addend & MASK
                if (symbol, address) in proven:
                    continue
                target = self.blocks.named_target(symbol)
                if target is not None:
                    self.check_target(target, address)
                    if (target, address) in self._named:
                        proven.add((symbol, address))
                    continue
            self.check_at(self.blocks.reference(block, r), code, offset - block.start, live.body)
        return None

    def _equal_code(self, block: Block, code: bytes, relocations: list[Relocation]) -> bool:
        """Compare what encodes no reference."""
        ours = bytearray(block.data)
        for offset, kind, _, _ in relocations:
            at = offset - block.start
            low, high = (at, at + 4) if kind in DIRECT else field_of(kind, at)
            ours[low:high] = code[low:high]
        for at in self.lines(block):
            self.pass_over(ours, code, at, at)
        return ours == code

    def lines(self, block: Block) -> list[int]:
        """Return the offsets of the line numbers in a block."""
        fields = self._line_numbers.in_section(block.section)
        return [f - block.start for f in fields if block.start <= f <= block.start + block.size - 4]

    def pass_over(self, ours: bytearray, theirs: bytes | bytearray, at: int, live: int) -> None:
        """Make a line number of ours equal to the live one, if both name the same line."""
        old = bytes(theirs[live : live + 4])
        if len(old) == 4 and at >= 0 and self._line_numbers.says_the_same(old, bytes(ours[at : at + 4])):
            ours[at : at + 4] = old

    # --- references -------------------------------------------------------------------------------------------

    def check_at(self, r: Reference, code: bytes, offset: int, body: int) -> None:
        """Check the field at `offset` of a live body, which stands for `r`; raises `Mismatch`."""
        if r.type in DIRECT:
            value = int.from_bytes(code[offset : offset + 4], "little", signed=True)
            self.check_target(r.target, value + body + offset - r.addend & MASK)
        elif r.type in REWRITTEN:
            self.check_rewritten(r, code, offset, body)
        else:
            self.check(r, code[offset : offset + width_of(r)], body + offset)

    def check(self, r: Reference, raw: bytes, place: int) -> None:
        """Check a field that holds the relocation as it stands; raises `Mismatch`."""
        rule = RULES.get(r.type)
        if rule is None:
            raise Mismatch(Cause.CODE, f"uses {type_name(r.type)}, which is not matched")
        if rule.need.thread_local:
            self.threads.check(r, raw, place)
            return
        value = int.from_bytes(raw, "little", signed=True)
        if is_table_relative(r):
            self.tables.check(r, value, place)
        elif rule.need is Need.SIZE:
            self._check_size(r.target, value - r.addend & MASK)
        elif r.type in (R.A64, R.A32, R.A32S, R.A16, R.A8):
            if r.type == R.A32:
                value &= 0xFFFFFFFF
            self.check_target(r.target, value - r.addend & MASK)
        elif r.type in (R.GOTPCREL, R.GOTPCRELX, R.REX_GOTPCRELX, R.GOTPCREL64):
            self.check_cell(r.target, value + place - r.addend & MASK)
        else:
            self.check_target(r.target, value + place - r.addend & MASK)

    def check_rewritten(self, r: Reference, code: bytes, field_offset: int, body: int) -> None:
        """Check a GOT reference that the linker may have made direct (AMD64 supplement, appendix B)."""
        own = opcode_bytes(r.type)
        ours = self._block().data[max(0, r.offset - own) : r.offset]
        theirs = code[max(0, field_offset - own) : field_offset]
        value = int.from_bytes(code[field_offset : field_offset + 4], "little", signed=True)
        place = body + field_offset
        if ours == theirs:
            self.check(r, code[field_offset : field_offset + 4], place)
        elif r.type == R.GOTTPOFF:
            if not thread_immediate(ours, theirs):
                raise Mismatch(Cause.CODE, f"other instruction at +{r.offset:#x}")
            self.threads.check_offset(r.target, value)
        elif r.type == R.GOTPC32_TLSDESC:
            self.threads.check_descriptor_load(r, ours, theirs, value, place)
        elif made_direct(ours, theirs):
            self.check_target(r.target, value + place + 4 & MASK)
        elif ours[-2:] == b"\xff\x25" and ours[:-2] == theirs[:-2] and jump_and_nop(code, field_offset - 2):
            # The field moves one byte forward.
            moved = int.from_bytes(code[field_offset - 1 : field_offset + 3], "little", signed=True)
            self.check_target(r.target, moved + place + 3 & MASK)
        elif absolute_immediate(ours, theirs):
            self.check_target(r.target, value & MASK)
        else:
            raise Mismatch(Cause.CODE, f"other instruction at +{r.offset:#x}")

    def _block(self) -> Block:
        assert self._current is not None
        return self._current

    def _check_size(self, target: Target, size: int) -> None:
        known = target.value if isinstance(target, Absolute) else None
        if isinstance(target, External):
            definition = self.unit.image.resolve(target.name, self.unit.module)
            known = definition.size if definition is not None else 0
        if size != known:
            raise Mismatch(Cause.CONSTANT, f"a size of {size} instead of {known}")

    def check_cell(self, target: Target, cell: int) -> None:
        """Check that a live cell of the offset table holds what the object means by `target`; raises `Mismatch`."""
        module = self.unit.module
        value = self.read_table(cell)
        known = self.unit.image.cell_at(cell)
        if known is not None and known.name and known.type in _NAMED_CELLS and self.cell_names(target, known.name):
            return
        if known is not None and known.type == R.IRELATIVE:
            self.check_target(target, known.addend + module.bias)
            return
        if known is not None and known.name and not value:
            raise Mismatch(Cause.REFERENCE, f"uses the cell of `{known.name}`")
        self.check_target(target, value)

    def cell_names(self, target: Target, name: str) -> bool:
        """Tell whether a cell that is relocated against `name` is the one for `target`."""
        if isinstance(target, External):
            return self.unit.module.module.asks_for(name, target.name)
        return isinstance(target, Place) and any(s.name == name and not s.local for s in target.block.symbols)

    def read_table(self, cell: int) -> int:
        """Return what a cell of the offset table holds, one of ours included; raises `Mismatch` for anything else."""
        if cell & 7 or not (self.unit.module.in_offset_table(cell) or self.unit.view.contains(cell)):
            raise Mismatch(Cause.REFERENCE, f"reads {cell:#x}, which is no cell of the offset table")
        return self._read_cell(cell)

    def _read_cell(self, cell: int) -> int:
        try:
            return self.memory.read_u64(cell)
        except PatcherError:
            raise Mismatch(Cause.REFERENCE, f"reads a cell at {cell:#x}, which is not mapped") from None

    def check_target(self, target: Target, address: int) -> None:
        """Check that a live address is what the object means by `target`; raises `Mismatch`."""
        if (target, address) in self._named:
            return
        if isinstance(target, Place):
            self._check_place(target, address)
        elif isinstance(target, External):
            self._check_external(target, address)
        elif address != target.value:
            raise Mismatch(Cause.CONSTANT, f"{address:#x} instead of {target.value:#x}")

    def _check_external(self, target: External, address: int) -> None:
        weakly_absent = target.weak and (address in (0, self.unit.module.bias) or self.unit.beyond_jump(address) == 0)
        if weakly_absent or self.unit.denotes_external(address, target.name) or self._chosen(target.name) == address:
            self._named.add((target, address))
            return
        raise Mismatch(Cause.REFERENCE, f"refers to `{target.name}` instead of {self._describe(address)}")

    def _chosen(self, name: str) -> int | None:
        definition = self.unit.image.search(name, self.unit.module)
        if definition is None:
            return None
        return self.unit.image.chosen(definition) if definition.ifunc else definition.address

    def _check_place(self, target: Place, address: int) -> None:
        block, start = target.block, address - target.offset
        if block.kind is Kind.CODE:
            self._check_function(target, address)
        elif block.kind is Kind.READ_ONLY:
            self._check_read_only(block, target.offset, address)
        elif block.kind is Kind.DATA:
            self._bind(block, start)
        else:
            raise Mismatch(Cause.REFERENCE, f"takes the address of the thread-local `{block.name}`")

    def _check_function(self, target: Place, address: int) -> None:
        block = target.block
        if target.offset or is_private_piece(block.name):
            # Two generations may have pieces of one name: the piece that was compared must be the one that is used.
            self.pending.append(_Pending(self._block(), block, target.offset, address))
            return
        names = tuple(s.name for s in block.symbols)
        if not self.unit.denotes(address, names, all(s.local for s in block.symbols)) or not self._same_unit(
            block, address
        ):
            raise Mismatch(Cause.REFERENCE, f"refers to `{block.name}` instead of {self._describe(address)}")
        self._named.add((target, address))

    def _same_unit(self, block: Block, address: int) -> bool:
        """Tell a function that became static from another unit's of the same name."""
        if block.exported:
            return True
        here = self.unit.names_at(address)
        if any((s.name, Scope.UNIT) in here for s in block.symbols):
            return True
        live = self.unit.function(block)
        return live is not None and address in (live.address, live.body)

    # --- variables --------------------------------------------------------------------------------------------

    def _bind(self, block: Block, address: int) -> None:
        if self._needed is None and (self.bindings.get(block) == address or self._trial.get(block) == address):
            return
        if block.anonymous:
            raise Mismatch(Cause.REFERENCE, f"refers to nameless data ({block.name})")
        if self.unit.module.constant(address, block.size) and block.size:
            raise Mismatch(Cause.REFERENCE, f"`{base_name(block.name)}` was a constant")
        for symbol in block.symbols:
            sizes = self.unit.sizes_at(address, symbol.name, symbol.local)
            if sizes and block.size not in sizes and 0 not in sizes:
                raise Mismatch(
                    Cause.REFERENCE, f"`{base_name(symbol.name)}` has {block.size} bytes instead of {sizes[0]}"
                )
            if sizes or (not symbol.local and self.unit.denotes(address, (symbol.name,), local=False)):
                self.record(block, address)
                return
        raise Mismatch(Cause.REFERENCE, f"refers to `{block.name}` instead of {self._describe(address)}")

    def record(self, block: Block, address: int) -> None:
        """Bind a variable, unless that contradicts what is bound: one address each, and one variable an address."""
        if self._needed is not None:
            self._needed.append((block, address))
        known = self.bindings.get(block, self._trial.get(block))
        if block.kind is Kind.READ_ONLY:
            self._trial.setdefault(block, address if known is None else known)
        elif known is None:
            other = self._bound_at(block.kind is Kind.THREAD_LOCAL, address)
            if other is not None and other is not block and other.size and block.size:
                raise Mismatch(
                    Cause.REFERENCE, f"uses `{base_name(block.name)}` where others use `{base_name(other.name)}`"
                )
            self._trial[block] = address
        elif known != address:
            raise Mismatch(Cause.REFERENCE, f"uses another `{base_name(block.name)}` than other functions do")

    def _bound_at(self, thread_local: bool, address: int) -> Block | None:
        for block, bound in self._trial.items():
            if (
                bound == address
                and block.kind is not Kind.READ_ONLY
                and (block.kind is Kind.THREAD_LOCAL) == thread_local
            ):
                return block
        return self._variables.get((thread_local, address))

    # --- constants --------------------------------------------------------------------------------------------

    def _check_read_only(self, block: Block, offset: int, address: int) -> None:
        if block.exported and not self.unit.denotes(
            address - offset, tuple(s.name for s in block.symbols), local=False
        ):
            raise Mismatch(Cause.REFERENCE, f"refers to `{block.name}` instead of {self._describe(address)}")
        if not self._same_contents(block, offset, address):
            what = f"the string {_excerpt(block.data[offset:])}" if block.string else f"`{block.name}`"
            raise Mismatch(Cause.CONSTANT, f"the contents of {what} differ")
        if block.symbols:
            self.record(block, address - offset)

    def _same_contents(self, block: Block, offset: int, address: int) -> bool:
        key = (block, offset, address)
        known = self._contents.get(key)
        if known is None:
            if key in self._assumed:
                return True  # a table that refers to itself is the same if all else is
            outermost = self._needed is None
            if outermost:
                self._needed = []
            pending = len(self.pending)
            self._assumed.add(key)
            try:
                same = self._compare_contents(block, offset, address)
                if not outermost:
                    return same
                known = _Contents(same, tuple(self._needed or ()), tuple(self.pending[pending:]))
                del self.pending[pending:]
                self._contents[key] = known
            finally:
                if outermost:
                    self._needed = None
                    self._assumed.clear()
        # What a table refers to binds whoever uses the table.
        for variable, bound in known.bindings:
            self.record(variable, bound)
        self.pending += (_Pending(self._block(), p.target, p.offset, p.address) for p in known.pending)
        return known.same

    def _compare_contents(self, block: Block, offset: int, address: int) -> bool:
        start = 0 if not block.string else offset  # within a pool only the tail from here on is known to be there
        base, size = address - offset, block.size - start
        if not self._constant(block, base + start, size):
            return False
        try:
            theirs = self._read_constant(base + start, size)
        except PatcherError:
            return False
        if not block.data:
            return not any(theirs)
        references = [r for r in self.blocks.references(block) if r.offset >= start]
        if not self._equal_but_for(block, start, theirs, references):
            return False
        try:
            for r in references:
                low = r.offset - start
                self.check(r, theirs[low : low + width_of(r)], base + r.offset)
        except Mismatch:
            return False
        return True

    def holds(self, block: Block, address: int, contents: bytes) -> bool:
        """Tell whether what stands, or stood at first, at an address means the same as a block of data."""
        self._current, self._trial = block, {}
        references = list(self.blocks.references(block))
        if len(contents) != block.size:
            return False
        if not block.data:
            return not any(contents)
        if not self._equal_but_for(block, 0, contents, references):
            return False
        try:
            for r in references:
                self.check(r, contents[r.offset : r.offset + width_of(r)], address + r.offset)
        except Mismatch:
            return False
        return True

    def _read_constant(self, address: int, size: int) -> bytes:
        """Read what does not change, through windows: a unit's constants lie close together."""
        start = address & -_WINDOW
        window = self._windows.get(start)
        if window is None:
            try:
                window = self.memory.read(start, _WINDOW)
            except PatcherError:
                window = b""  # the window reaches beyond what is mapped
            self._windows[start] = window
        found = window[address - start : address - start + size]
        return found if len(found) == size else self.memory.read(address, size)

    def _equal_but_for(self, block: Block, start: int, theirs: bytes, references: list[Reference]) -> bool:
        lines = self.lines(block)
        if not references and not lines:
            return block.data[start:] == theirs or self._stamps.same_but_for(block.data[start:], theirs)
        left, right = bytearray(block.data[start:]), bytearray(theirs)
        for r in references:
            low, high = r.offset - start, r.offset - start + width_of(r)
            left[low:high] = right[low:high] = bytes(high - low)
        for offset in lines:
            if offset >= start:
                self.pass_over(left, right, offset - start, offset - start)
        return left == right

    def _constant(self, block: Block, address: int, size: int) -> bool:
        """Tell whether live bytes may be a constant's: the same contents in a variable would not stay the same."""
        if block.exported or self.unit.view.contains(address):
            return True
        if self.blocks.object.sections[block.section].writable:
            return self.unit.module.contains(address)
        return self.unit.module.constant(address, size)

    def _describe(self, address: int) -> str:
        names = sorted(n for n, _ in self.unit.names_at(address))
        return f"`{names[0]}`" if names else f"{address:#x}"


def _excerpt(data: bytes) -> str:
    text = data.rstrip(b"\0").decode("utf-8", "replace")
    return repr(text if len(text) <= 40 else text[:37] + "...")
