"""Live matching: proving that a function of an object is what runs in the process, or finding where it differs.

Object code and live code are walked side by side. Bytes that encode no reference must be equal; every
reference is checked by what it means, never by its number: functions, variables and imports by symbol,
strings, constants and jump tables by contents. (Known from Ksplice as run-pre matching.)

Two walks give the same verdict. The first compares whole bodies with the reference fields masked, and
settles nearly every unchanged function. Where lengths or bytes differ, the second goes instruction by
instruction, since an assembler may have made a tail call within a section a short jump, a linker may have
rewritten a GOT load, and padding differs; it keeps a map of object offsets to live offsets.

What matches also tells where the unit's renumbered and ambiguous variables are: each matched reference
binds its block to a live address (`Delta.bindings`).

Decides same or changed, and why. What to do about it is `link`'s and `session`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from patcher.blocks import Absolute, Block, Blocks, External, Kind, Place, Reference, Target
from patcher.errors import PatcherError
from patcher.image import R_X86_64_IRELATIVE
from patcher.lines import Fields
from patcher.link.relocations import RULES, R, type_name
from patcher.live import LiveFunction, LiveUnit, base_name


class Status(Enum):
    SAME = "same"
    CHANGED = "changed"
    LINE_ONLY = "line-only"
    ADDED = "added"


class Cause(Enum):
    """What kind of difference came first; only some can come from a moved line."""

    NONE = "none"
    CODE = "code"
    CONSTANT = "constant"
    REFERENCE = "reference"
    DEPENDENT = "dependent"


@dataclass(frozen=True, slots=True)
class FunctionMatch:
    """The verdict on one function block. `live` is None for an added one."""

    block: Block
    status: Status
    live: LiveFunction | None
    cause: Cause = Cause.NONE
    reason: str = ""

    @property
    def name(self) -> str:
        return self.block.name


@dataclass(frozen=True, slots=True)
class Delta:
    """What a unit's object changes against what runs."""

    blocks: Blocks
    unit: LiveUnit
    functions: tuple[FunctionMatch, ...]
    bindings: dict[Block, int] = field(repr=False)

    def with_status(self, *statuses: Status) -> tuple[FunctionMatch, ...]:
        return tuple(f for f in self.functions if f.status in statuses)


_PRIVATE = re.compile(r"\.(cold|part|isra|constprop)(\.\d+)*$|\.(part|isra|constprop)\.")
_COLD = re.compile(r"\.cold(\.\d+)?$")


def is_private_piece(name: str) -> bool:
    """Tell whether a function is a piece the compiler split off, callable by its own unit's code only.

    Such pieces may have a calling convention of their own, so that new code must never be reached by a
    caller that was compiled with the old piece, nor the reverse: they live and die with their callers.
    """
    return bool(_PRIVATE.search(name))


def is_cold_piece(name: str) -> bool:
    return bool(_COLD.search(name))


class _Mismatch(Exception):
    def __init__(self, cause: Cause, reason: str) -> None:
        super().__init__(reason)
        self.cause = cause
        self.reason = reason


@dataclass(frozen=True, slots=True)
class _Pending:
    """A reference into the middle of a function: right when that function's map sends `offset` to `address`."""

    owner: Block
    target: Block
    offset: int
    address: int


def match(blocks: Blocks, unit: LiveUnit, line_numbers: Fields | None = None) -> Delta:
    """Compare every function of a unit's object with what runs. Raises `UnsafeChange` for ambiguous names.

    `line_numbers`: the fields that are known to hold line numbers (`lines.line_fields`). A function that is the
    same but for these is `LINE_ONLY`.
    """
    delta = _Matcher(blocks, unit, {}).delta()
    if not line_numbers:
        return delta
    tolerant = _Matcher(blocks, unit, line_numbers).delta()
    functions = tuple(
        FunctionMatch(loose.block, Status.LINE_ONLY, loose.live)
        if strict.status is Status.CHANGED and loose.status is Status.SAME
        else strict
        for strict, loose in zip(delta.functions, tolerant.functions, strict=True)
    )
    return Delta(blocks, unit, functions, tolerant.bindings)


class _Matcher:
    def __init__(self, blocks: Blocks, unit: LiveUnit, line_numbers: Fields) -> None:
        self.blocks = blocks
        self._line_numbers = line_numbers
        self.unit = unit
        self.memory = unit.image.target.memory
        self.bindings: dict[Block, int] = {}
        self._trial: dict[Block, int] = {}
        self.live: dict[Block, LiveFunction | None] = {}
        self.maps: dict[Block, dict[int, int] | None] = {}  # None: the identity
        self.pending: list[_Pending] = []
        self._contents: dict[tuple[Block, int, int], bool] = {}
        self._current: Block | None = None

    def delta(self) -> Delta:
        results: dict[Block, FunctionMatch] = {}
        # Cold pieces last: they refer into the middle of their parents.
        for block in sorted(self.blocks.functions, key=lambda b: is_cold_piece(b.name)):
            results[block] = self._function(block)
        self._settle_pending(results)
        self._spread(results)
        ordered = tuple(results[b] for b in self.blocks.functions)
        return Delta(self.blocks, self.unit, ordered, self.bindings)

    # --- verdicts ---------------------------------------------------------------------------------------------

    def _function(self, block: Block) -> FunctionMatch:
        live = self.unit.function(block)
        self.live[block] = live
        if live is None:
            return FunctionMatch(block, Status.ADDED, None)
        self._current, self._trial = block, {}
        pending = len(self.pending)
        try:
            self.maps[block] = self._compare(block, live)
        except _Mismatch as mismatch:
            del self.pending[pending:]
            return FunctionMatch(block, Status.CHANGED, live, mismatch.cause, mismatch.reason)
        self.bindings.update(self._trial)
        return FunctionMatch(block, Status.SAME, live)

    def _settle_pending(self, results: dict[Block, FunctionMatch]) -> None:
        for p in self.pending:
            live = self.live.get(p.target)
            known = p.target in self.maps and live is not None
            offset = self._live_offset(p.target, p.offset) if known else None
            if live is None or offset is None or live.body + offset != p.address:
                old = results[p.owner]
                if old.status is Status.SAME:
                    reason = f"refers to {p.target.name}+{p.offset:#x}, which stands elsewhere"
                    results[p.owner] = FunctionMatch(p.owner, Status.CHANGED, old.live, Cause.DEPENDENT, reason)

    def _live_offset(self, block: Block, offset: int) -> int | None:
        known = self.maps[block]
        return offset if known is None else known.get(offset)

    def _spread(self, results: dict[Block, FunctionMatch]) -> None:
        # Who refers to a changed private piece has to be relinked to the new one, and so on.
        users: dict[Block, list[Block]] = {}
        for block in results:
            for target in self._function_targets(block):
                users.setdefault(target, []).append(block)
        work = [b for b, m in results.items() if m.status is not Status.SAME]
        while work:
            piece = work.pop()
            if not is_private_piece(piece.name):
                continue
            for user in users.get(piece, ()):
                if results[user].status is Status.SAME:
                    reason = f"uses {piece.name}, which changed"
                    results[user] = FunctionMatch(user, Status.CHANGED, results[user].live, Cause.DEPENDENT, reason)
                    work.append(user)
            # A cold piece and its parent jump into each other: when one goes, so does the other.
            if is_cold_piece(piece.name):
                parent = _COLD.sub("", piece.name)
                work.extend(self._mark(results, parent, piece))

    def _mark(self, results: dict[Block, FunctionMatch], name: str, piece: Block) -> Iterable[Block]:
        for block, result in results.items():
            if block.name == name and result.status is Status.SAME:
                reason = f"its part {piece.name} changed"
                results[block] = FunctionMatch(block, Status.CHANGED, result.live, Cause.DEPENDENT, reason)
                yield block

    def _function_targets(self, block: Block) -> set[Block]:
        return {
            r.target.block
            for r in self.blocks.references(block)
            if isinstance(r.target, Place) and r.target.block.kind is Kind.CODE and r.target.block is not block
        }

    # --- bodies -----------------------------------------------------------------------------------------------

    def _compare(self, block: Block, live: LiveFunction) -> dict[int, int] | None:
        references = self.blocks.references(block)
        code = live.code
        if len(code) < block.size:
            # Symbol sizes are sometimes absent or short (assembly); what follows may be read as far as needed.
            code = self.unit.read_ahead(live, block.size) if live.size == 0 else code
        if len(code) == block.size and self._masked_equal(block, code, references):
            for reference in references:
                self._check_in_place(reference, code, live.body)
            return None
        return _Walk(self, block, code, live.body, references).run()

    def _masked_equal(self, block: Block, code: bytes, references: tuple[Reference, ...]) -> bool:
        ours, theirs = bytearray(block.data), bytearray(code)
        for r in references:
            low, high = _field(r)
            zeros = bytes(high - low)
            ours[low:high] = zeros
            theirs[low:high] = zeros
        for offset in self.ignored(block):
            ours[offset : offset + 4] = theirs[offset : offset + 4] = bytes(4)
        return ours == theirs

    def ignored(self, block: Block) -> list[int]:
        """Return the offsets of the line numbers in a block, if they are to be passed over."""
        fields = self._line_numbers.get(block.section)
        if not fields:
            return []
        return [f - block.start for f in fields if block.start <= f <= block.start + block.size - 4]

    def _check_in_place(self, r: Reference, code: bytes, body: int) -> None:
        if r.type in _REWRITTEN:
            self.check_rewritten(r, code, r.offset, body)
        else:
            self.check(r, code[r.offset : r.offset + _width(r)], body + r.offset)

    # --- references -------------------------------------------------------------------------------------------

    def check(self, r: Reference, raw: bytes, place: int) -> None:
        """Check a field that holds the relocation as it stands; raises `_Mismatch`."""
        rule = RULES.get(r.type)
        if rule is None:
            self._check_dynamic_tls(r, raw, place)
            return
        value = int.from_bytes(raw, "little", signed=True)
        if r.type in (R.TPOFF32, R.TPOFF64):
            self._check_thread_offset(r.target, value - r.addend)
        elif r.type in (R.A64, R.A32, R.A32S, R.A16, R.A8):
            if r.type == R.A32:
                value &= 0xFFFFFFFF
            self.check_target(r.target, value - r.addend & _MASK)
        elif r.type in (R.GOTPCREL, R.GOTPCRELX, R.REX_GOTPCRELX):
            self._check_cell(r.target, value + place - r.addend & _MASK)
        elif r.type == R.GOTTPOFF:
            offset = self._read_cell(value + place - r.addend & _MASK)
            self._check_thread_offset(r.target, offset - (1 << 64) if offset >> 63 else offset)
        else:
            self.check_target(r.target, value + place - r.addend & _MASK)

    def check_rewritten(self, r: Reference, code: bytes, field_offset: int, body: int) -> None:
        """Check a GOT reference that the linker may have made direct (AMD64 supplement, appendix B)."""
        own = _opcode_bytes(r)
        ours = self._block().data[max(0, r.offset - own) : r.offset]
        theirs = code[max(0, field_offset - own) : field_offset]
        raw = code[field_offset : field_offset + 4]
        value = int.from_bytes(raw, "little", signed=True)
        place = body + field_offset
        if ours == theirs:
            self.check(r, raw, place)
            return
        opcode, live_opcode = ours[-2:], theirs[-2:]
        same_before = ours[:-2] == theirs[:-2]  # a REX prefix, or nothing
        direct = value + place + 4 & _MASK
        if r.type == R.GOTTPOFF:
            if _thread_immediate(ours, theirs):
                self._check_thread_offset(r.target, value)
                return
        elif opcode == b"\xff\x15" and same_before and live_opcode in (b"\x67\xe8", b"\x40\xe8"):
            self.check_target(r.target, direct)
            return
        elif opcode == b"\xff\x25" and same_before and live_opcode[:1] == b"\xe9":
            # jmp *foo@GOTPCREL(%rip) becomes jmp foo; nop: the field moves one byte forward
            moved = code[field_offset - 1 : field_offset + 3]
            self.check_target(r.target, int.from_bytes(moved, "little", signed=True) + place + 3 & _MASK)
            return
        elif ours[-2:-1] == b"\x8b" and theirs[-2:-1] == b"\x8d" and ours[-1:] == theirs[-1:] and same_before:
            self.check_target(r.target, direct)  # mov foo@GOTPCREL(%rip), %reg becomes lea foo(%rip), %reg
            return
        elif _absolute_immediate(ours, theirs):
            self.check_target(r.target, value & _MASK)
            return
        raise _Mismatch(Cause.CODE, f"other instruction at +{r.offset:#x}")

    def _block(self) -> Block:
        assert self._current is not None
        return self._current

    def _check_cell(self, target: Target, cell: int) -> None:
        known = self.unit.image.cell_at(cell)
        if known is not None and known.name and self._cell_names(target, known.name):
            return
        if known is not None and known.type == R_X86_64_IRELATIVE:
            module = self.unit.module
            self.check_target(target, known.addend + module.bias)
            return
        self.check_target(target, self._read_cell(cell))

    def _cell_names(self, target: Target, name: str) -> bool:
        if isinstance(target, External):
            return target.name == name
        return isinstance(target, Place) and any(s.name == name and not s.local for s in target.block.symbols)

    def _read_cell(self, cell: int) -> int:
        try:
            return self.memory.read_u64(cell)
        except PatcherError:
            raise _Mismatch(Cause.REFERENCE, f"reads a cell at {cell:#x}, which is not mapped") from None

    def check_target(self, target: Target, address: int) -> None:
        """Check that a live address is what the object means by `target`."""
        if isinstance(target, Absolute):
            if address != target.value:
                raise _Mismatch(Cause.CONSTANT, f"{address:#x} instead of {target.value:#x}")
        elif isinstance(target, External):
            self._check_external(target, address)
        else:
            self._check_place(target, address)

    def _check_external(self, target: External, address: int) -> None:
        if self.unit.denotes(address, (target.name,), local=False):
            return
        if target.weak and address in (0, self.unit.module.bias):
            return
        if self._chosen(target.name) == address:
            return
        raise _Mismatch(Cause.REFERENCE, f"refers to `{target.name}` instead of {self._describe(address)}")

    def _chosen(self, name: str) -> int | None:
        definition = self.unit.image.resolve(name, self.unit.module)
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
            raise _Mismatch(Cause.REFERENCE, f"takes the address of the thread-local `{block.name}`")

    def _check_function(self, target: Place, address: int) -> None:
        block = target.block
        if target.offset or is_cold_piece(block.name):
            self.pending.append(_Pending(self._block(), block, target.offset, address))
            return
        names = tuple(s.name for s in block.symbols)
        if not self.unit.denotes(address, names, all(s.local for s in block.symbols)):
            raise _Mismatch(Cause.REFERENCE, f"refers to `{block.name}` instead of {self._describe(address)}")

    def _bind(self, block: Block, address: int) -> None:
        known = self.bindings.get(block, self._trial.get(block))
        if known is not None:
            if known != address:
                raise _Mismatch(Cause.REFERENCE, f"uses another `{base_name(block.name)}` than other functions do")
            return
        if block.anonymous:
            raise _Mismatch(Cause.REFERENCE, f"refers to nameless data ({block.name})")
        for symbol in block.symbols:
            sizes = self.unit.sizes_at(address, symbol.name)
            if sizes and block.size not in sizes and 0 not in sizes:
                raise _Mismatch(
                    Cause.REFERENCE, f"`{base_name(symbol.name)}` has {block.size} bytes instead of {sizes[0]}"
                )
            if sizes or (not symbol.local and self.unit.denotes(address, (symbol.name,), local=False)):
                self._trial[block] = address
                return
        raise _Mismatch(Cause.REFERENCE, f"refers to `{block.name}` instead of {self._describe(address)}")

    def _check_read_only(self, block: Block, offset: int, address: int) -> None:
        if block.exported and not self.unit.denotes(
            address - offset, tuple(s.name for s in block.symbols), local=False
        ):
            raise _Mismatch(Cause.REFERENCE, f"refers to `{block.name}` instead of {self._describe(address)}")
        if not self._same_contents(block, offset, address):
            what = f"the string {_excerpt(block.data[offset:])}" if block.string else f"`{block.name}`"
            raise _Mismatch(Cause.CONSTANT, f"the contents of {what} differ")
        if block.symbols:
            self._trial.setdefault(block, address - offset)

    def _same_contents(self, block: Block, offset: int, address: int) -> bool:
        key = (block, offset, address)
        if key not in self._contents:
            self._contents[key] = True  # a table that refers to itself is the same if all else is
            self._contents[key] = self._compare_contents(block, offset, address)
        return self._contents[key]

    def _compare_contents(self, block: Block, offset: int, address: int) -> bool:
        start = 0 if not block.string else offset  # within a pool only the tail from here on is known to be there
        base = address - offset
        try:
            theirs = bytearray(self.memory.read(base + start, block.size - start))
        except PatcherError:
            return False
        if not block.data:
            return not any(theirs)
        ours = bytearray(block.data[start:])
        references = [r for r in self.blocks.references(block) if r.offset >= start]
        raw = bytes(theirs)
        for r in references:
            low, high = r.offset - start, r.offset - start + _width(r)
            ours[low:high] = theirs[low:high] = bytes(high - low)
        for offset in self.ignored(block):
            if offset >= start:
                ours[offset - start : offset - start + 4] = theirs[offset - start : offset - start + 4] = bytes(4)
        if ours != theirs:
            return False
        try:
            for r in references:
                low = r.offset - start
                self.check(r, raw[low : low + _width(r)], base + r.offset)
        except _Mismatch:
            return False
        return True

    # --- thread-local variables -------------------------------------------------------------------------------

    def _check_thread_offset(self, target: Target, offset: int) -> None:
        image, module = self.unit.image, self.unit.module
        if isinstance(target, External):
            definition = image.resolve(target.name, module)
            expected = image.thread_offset(definition) if definition is not None else None
            if expected != offset:
                raise _Mismatch(Cause.REFERENCE, f"uses another thread-local than `{target.name}`")
            return
        if not isinstance(target, Place):
            raise _Mismatch(Cause.REFERENCE, "uses a nameless thread-local")
        block_start = image.thread_block(module)
        start = offset - target.offset
        for symbol in target.block.symbols:
            for variable in self.unit.variables(symbol.name, symbol.local):
                if block_start is not None and block_start + variable.address == start:
                    self._trial[target.block] = variable.address
                    return
        raise _Mismatch(Cause.REFERENCE, f"uses another thread-local than `{target.block.name}`")

    def _check_dynamic_tls(self, r: Reference, raw: bytes, place: int) -> None:
        value = int.from_bytes(raw, "little", signed=True)
        if r.type == R.TLSGD:
            cell = value + place - r.addend & _MASK
            known = self.unit.image.cell_at(cell)
            if known is not None and known.name and self._cell_names(r.target, known.name):
                return
            self._check_block_offset(r.target, self._read_cell(cell + 8))
        elif r.type == R.TLSLD:
            known = self.unit.image.cell_at(value + place - r.addend & _MASK)
            if known is None or known.name:
                raise _Mismatch(Cause.REFERENCE, "uses another module's thread-locals")
        elif r.type == R.DTPOFF32:
            self._check_block_offset(r.target, value - r.addend & _MASK)
        else:
            raise _Mismatch(Cause.CODE, f"uses {type_name(r.type)}, which is not matched")

    def _check_block_offset(self, target: Target, offset: int) -> None:
        if isinstance(target, Place):
            for symbol in target.block.symbols:
                for variable in self.unit.variables(symbol.name, symbol.local):
                    if variable.address == offset - target.offset:
                        self._trial[target.block] = variable.address
                        return
        raise _Mismatch(Cause.REFERENCE, "uses another thread-local")

    def _describe(self, address: int) -> str:
        names = sorted(n for n, _ in self.unit.names_at(address))
        return f"`{names[0]}`" if names else f"{address:#x}"


_MASK = (1 << 64) - 1
_REWRITTEN = (R.GOTPCRELX, R.REX_GOTPCRELX, R.GOTTPOFF, R.GOTPCREL)


def _width(r: Reference) -> int:
    rule = RULES.get(r.type)
    if rule is not None:
        return rule.width
    return 8 if r.type in (R.DTPOFF64, R.DTPMOD64) else 4


def _field(r: Reference) -> tuple[int, int]:
    """Return the bytes that are checked by meaning: for what a linker may rewrite, the opcode too."""
    return max(0, r.offset - _opcode_bytes(r)), r.offset + _width(r)


def _opcode_bytes(r: Reference) -> int:
    """Return how many bytes before the field belong to the instruction for certain, where a linker may rewrite it."""
    if r.type not in _REWRITTEN:
        return 0
    return 3 if r.type in (R.REX_GOTPCRELX, R.GOTTPOFF) else 2


def _absolute_immediate(ours: bytes, theirs: bytes) -> bool:
    """Tell whether a GOT load became an instruction with the address as immediate (position-dependent code).

    Register numbers move from ModRM.reg to ModRM.rm and from REX.R to REX.B.
    """
    if len(ours) < 2 or len(ours) != len(theirs):
        return False
    opcode, modrm = ours[-2:]
    live_opcode, live_modrm = theirs[-2:]
    register = modrm >> 3 & 7
    if len(ours) == 3 and theirs[0] != (ours[0] & ~5 | (ours[0] >> 2 & 1)):
        return False
    if opcode == 0x8B:
        return live_opcode == 0xC7 and live_modrm == 0xC0 | register
    if opcode == 0x85:
        return live_opcode == 0xF7 and live_modrm == 0xC0 | register
    operation = opcode >> 3 & 7
    return opcode & 0xC7 == 0x03 and live_opcode == 0x81 and live_modrm == 0xC0 | operation << 3 | register


def _thread_immediate(ours: bytes, theirs: bytes) -> bool:
    """Tell whether an initial-exec access became local-exec (ELF Handling For TLS, section 5, IE to LE)."""
    if len(ours) < 3 or len(theirs) < 3:
        return False
    rex, opcode, modrm = ours
    register = modrm >> 3 & 7
    moved_rex = rex & ~5 | (rex >> 2 & 1)
    if opcode == 0x8B:
        return theirs == bytes((moved_rex, 0xC7, 0xC0 | register))
    if opcode == 0x03:
        lea_rex = rex & ~5 | (5 if rex & 4 else 0)
        return theirs in (
            bytes((moved_rex, 0x81, 0xC0 | register)),
            bytes((lea_rex, 0x8D, 0x80 | register << 3 | register)),
        )
    return False


def _excerpt(data: bytes) -> str:
    text = data.rstrip(b"\0").decode("utf-8", "replace")
    return repr(text if len(text) <= 40 else text[:37] + "...")


_Lite = tuple[int, int, str, str]
_NOPS = ("nop", "data16", "xchg")


class _Walk:
    """One function, instruction by instruction."""

    def __init__(
        self, matcher: _Matcher, block: Block, code: bytes, body: int, references: tuple[Reference, ...]
    ) -> None:
        from patcher.code.instructions import decode_lite, is_padding

        self.matcher = matcher
        self.block = block
        self.code = code
        self.body = body
        self.references = references
        self._padding = is_padding
        try:
            self.ours = decode_lite(block.data, 0)
            self.theirs = decode_lite(code, 0)
        except PatcherError as error:
            raise _Mismatch(Cause.CODE, f"cannot be decoded: {error}") from None
        self.map: dict[int, int] = {}
        self.inner: list[tuple[int, int]] = []
        self._next = 0
        self._ignored = matcher.ignored(block)

    def run(self) -> dict[int, int]:
        i = j = 0
        ours, theirs = self.ours, self.theirs
        while True:
            while i < len(ours) and self._nop(self.block.data, ours[i]):
                self.map[ours[i][0]] = theirs[j][0] if j < len(theirs) else len(self.code)
                self._skip_references(ours[i])
                i += 1
            while j < len(theirs) and self._nop(self.code, theirs[j]):
                j += 1
            if i >= len(ours) or j >= len(theirs):
                break
            self.map[ours[i][0]] = theirs[j][0]
            self._pair(ours[i], theirs[j])
            i, j = i + 1, j + 1
        if i < len(ours) or j < len(theirs):
            raise _Mismatch(Cause.CODE, "is longer" if i < len(ours) else "is shorter")
        self.map[self.block.size] = len(self.code)
        for source, destination in self.inner:
            if self.map.get(source) != destination:
                raise _Mismatch(Cause.CODE, f"branches elsewhere (to +{source:#x})")
        return self.map

    def _nop(self, data: bytes, instruction: _Lite) -> bool:
        offset, size, mnemonic, _ = instruction
        return mnemonic.startswith(_NOPS) and self._padding(data[offset : offset + size])

    def _skip_references(self, instruction: _Lite) -> None:
        while self._next < len(self.references) and self.references[self._next].offset < sum(instruction[:2]):
            self._next += 1

    def _pair(self, ours: _Lite, theirs: _Lite) -> None:
        start, size = ours[0], ours[1]
        found = []
        while self._next < len(self.references) and self.references[self._next].offset < start + size:
            found.append(self.references[self._next])
            self._next += 1
        mine = self.block.data[start : start + size]
        other = self.code[theirs[0] : theirs[0] + theirs[1]]
        branch = _relative_branch(mine)
        if branch is not None and not (found and found[0].type in _REWRITTEN):
            self._branch(branch, other, ours, theirs, found)
            return
        if size != theirs[1]:
            raise _Mismatch(Cause.CODE, f"other instruction at +{start:#x}: {ours[2]} instead of {theirs[2]}")
        self._plain(ours, theirs, mine, other, found)

    def _plain(self, ours: _Lite, theirs: _Lite, mine: bytes, other: bytes, found: list[Reference]) -> None:
        left, right = bytearray(mine), bytearray(other)
        for r in found:
            low, high = (max(0, b - ours[0]) for b in _field(r))
            left[low:high] = right[low:high] = bytes(high - low)
        for offset in self._ignored:
            if ours[0] <= offset < ours[0] + ours[1]:
                left[offset - ours[0] : offset - ours[0] + 4] = right[offset - ours[0] : offset - ours[0] + 4] = bytes(
                    4
                )
        if left != right:
            same_operation = ours[2] == theirs[2] and ours[1] == theirs[1]
            cause = Cause.CONSTANT if same_operation else Cause.CODE
            raise _Mismatch(cause, f"{ours[2]} {ours[3]} instead of {theirs[2]} {theirs[3]} at +{ours[0]:#x}")
        for r in found:
            offset = theirs[0] + r.offset - ours[0]
            if r.type in _REWRITTEN:
                self.matcher.check_rewritten(r, self.code, offset, self.body)
            else:
                self.matcher.check(r, self.code[offset : offset + _width(r)], self.body + offset)

    def _branch(
        self, branch: tuple[str, int], other: bytes, ours: _Lite, theirs: _Lite, found: list[Reference]
    ) -> None:
        live = _relative_branch(other)
        if live is None or live[0] != branch[0]:
            raise _Mismatch(Cause.CODE, f"{ours[2]} {ours[3]} instead of {theirs[2]} {theirs[3]} at +{ours[0]:#x}")
        destination = theirs[0] + theirs[1] + live[1]
        if not found:
            self.inner.append((ours[0] + ours[1] + branch[1], destination))
            return
        reference = found[0]
        if reference.type not in (R.PC32, R.PLT32, R.PC8):
            raise _Mismatch(Cause.CODE, f"{type_name(reference.type)} in a branch at +{ours[0]:#x}")
        width = _width(reference)
        self.matcher.check_target(reference.target, self.body + destination - reference.addend - width & _MASK)


def _relative_branch(raw: bytes) -> tuple[str, int] | None:
    """Return (operation, displacement) of a relative branch, the same operation for its short and long forms."""
    i = 0
    while i < len(raw) and raw[i] in (0x66, 0x67, 0xF2, 0xF3, 0x2E, 0x3E, 0x48, 0x40):
        i += 1
    if i >= len(raw):
        return None
    opcode, rest = raw[i], raw[i + 1 :]
    if opcode == 0xE8 and len(rest) == 4:
        return "call", int.from_bytes(rest, "little", signed=True)
    if opcode in (0xE9, 0xEB) and len(rest) in (1, 4):
        return "jmp", int.from_bytes(rest, "little", signed=True)
    if opcode & 0xF0 == 0x70 and len(rest) == 1:
        return f"j{opcode & 15:x}", int.from_bytes(rest, "little", signed=True)
    if opcode == 0x0F and len(rest) == 5 and rest[0] & 0xF0 == 0x80:
        return f"j{rest[0] & 15:x}", int.from_bytes(rest[1:], "little", signed=True)
    if 0xE0 <= opcode <= 0xE3 and len(rest) == 1:
        return f"loop{opcode & 3}", int.from_bytes(rest, "little", signed=True)
    return None
