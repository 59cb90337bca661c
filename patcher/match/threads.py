"""References to thread-local variables: which variable live code uses, in whatever model it stands there.

A linker that knows where a variable is rewrites code that would ask for it, so that the same object code may stand
there as compiled (cells tell the module and the offset), through a cell with the offset from the thread pointer, or
with that offset in an instruction. Each is read as what it means: a module and an offset in its block.

Specification: AMD64 supplement, section 11.1 (code sequences); Drepper, ELF Handling For Thread-Local Storage,
sections 3-5; Oliva & Araujo, Thread-Local Storage Descriptors for IA32 and AMD64/EM64T.
"""

from __future__ import annotations

from patcher.blocks import External, Place, Reference, Target
from patcher.elf import SymbolType
from patcher.elf.dynamic import TLSDESC, Cell
from patcher.elf.relocations import R
from patcher.live import THREAD_LOCAL, thread_number
from patcher.match.meaning import Meaning
from patcher.match.rewritten import (
    MASK,
    descriptor_immediate,
    descriptor_load,
    general_rewritten,
    local_rewritten,
)
from patcher.match.verdict import Cause, Mismatch

MODULE_BASE = "_TLS_MODULE_BASE_"
"""The name that stands for the start of the module's own block."""


class ThreadReferences:
    """The thread-local references of one unit's functions."""

    def __init__(self, matcher: Meaning) -> None:
        self.matcher = matcher
        self.unit = matcher.unit
        self.image = matcher.unit.image
        self.module = matcher.unit.module
        self._from_pointer: bool | None = None  # what the function's base is, once an access has told

    def start(self) -> None:
        """Begin with another function."""
        self._from_pointer = None

    # --- fields and code --------------------------------------------------------------------------------------

    def check(self, r: Reference, raw: bytes, place: int) -> None:
        """Check a field that stands in code as it was compiled; raises `Mismatch`."""
        value = int.from_bytes(raw, "little", signed=True)
        cell = value + place - r.addend & MASK
        if r.type in (R.TPOFF32, R.TPOFF64):
            self.check_offset(r.target, value - r.addend)
        elif r.type == R.GOTTPOFF:
            self._check_offset_cell(r.target, cell)
        elif r.type == R.TLSGD:
            self._check_index(r.target, cell)
        elif r.type == R.TLSLD:
            self._check_own_index(cell)
        elif r.type == R.GOTPC32_TLSDESC:
            self._check_descriptor(r.target, cell)
        elif r.type == R.TLSDESC_CALL:
            if raw not in (b"\xff\x10", b"\x66\x90"):  # call *(%rax), or xchg %ax, %ax
                raise Mismatch(Cause.CODE, f"other instruction at +{r.offset:#x}")
        else:
            self._check_from_base(r.target, value - r.addend)

    def check_sequence(self, r: Reference, live: bytes, place: int) -> None:
        """Check what a linker made of a whole sequence that asks for `r`; raises `Mismatch`."""
        if r.type == R.TLSLD:
            below = local_rewritten(live)
            if below is None:
                raise Mismatch(Cause.CODE, f"other code to find thread-locals at +{r.offset:#x}")
            self._check_base(-below)
            return
        found = general_rewritten(live)
        if found is None:
            raise Mismatch(Cause.CODE, f"other code to find a thread-local at +{r.offset:#x}")
        through_cell, at = found
        value = int.from_bytes(live[at : at + 4], "little", signed=True)
        if through_cell:
            self._check_offset_cell(r.target, place + at + 4 + value)
        else:
            self.check_offset(r.target, value)

    def check_descriptor_load(self, r: Reference, ours: bytes, theirs: bytes, value: int, place: int) -> None:
        """Check what a linker made of the instruction that takes a descriptor's address; raises `Mismatch`."""
        base = isinstance(r.target, External) and r.target.name == MODULE_BASE
        if descriptor_immediate(ours, theirs):
            if base:
                self._check_base(value)
            else:
                self.check_offset(r.target, value)
        elif descriptor_load(ours, theirs) and not base:
            self._check_offset_cell(r.target, value + place + 4)
        else:
            raise Mismatch(Cause.CODE, f"other instruction at +{r.offset:#x}")

    # --- offsets from the thread pointer ----------------------------------------------------------------------

    def check_offset(self, target: Target, offset: int) -> None:
        """Check an offset from the thread pointer; raises `Mismatch`."""
        if isinstance(target, External):
            definition = self.image.search(target.name, self.module)
            if definition is not None and definition.thread_local and self.image.thread_offset(definition) == offset:
                return
        if self._is_added(target, thread_number(offset)):
            return
        block_start = self.image.thread_block(self.module)
        if block_start is None:
            raise self._other(target)
        self._check_own(target, offset - block_start)

    def _check_offset_cell(self, target: Target, cell: int) -> None:
        value = self.matcher.read_table(cell & MASK)
        known = self.image.cell_at(cell & MASK)
        if known is not None and known.type == R.TPOFF64 and self._named(known, target):
            return
        self.check_offset(target, value - (1 << 64) if value >> 63 else value)

    # --- a module and an offset in its block ------------------------------------------------------------------

    def _check_index(self, target: Target, cell: int) -> None:
        """Check the two cells that are handed to `__tls_get_addr`."""
        number, offset = self.matcher.read_table(cell), self.matcher.read_table(cell + 8 & MASK)
        known = self.image.cell_at(cell)
        if known is not None and known.type == R.DTPMOD64 and self._named(known, target):
            return
        if self._is_own(number, known):
            self._check_own(target, offset)
        else:
            self._check_other(target, number, offset)

    def _check_own_index(self, cell: int) -> None:
        number, offset = self.matcher.read_table(cell), self.matcher.read_table(cell + 8 & MASK)
        if offset or not self._is_own(number, self.image.cell_at(cell)):
            raise Mismatch(Cause.REFERENCE, "uses another module's thread-locals")
        self._expect_base(from_pointer=False)

    def _is_own(self, number: int, known: Cell | None) -> bool:
        if known is not None and known.type == R.DTPMOD64:
            return not known.name or number == self.image.thread_module(self.module)
        return bool(number) and number == self.image.thread_module(self.module)

    def _check_descriptor(self, target: Target, cell: int) -> None:
        argument, known = self.matcher.read_table(cell + 8 & MASK), self.image.cell_at(cell)
        if self.unit.view.contains(cell):
            # One of ours, whose argument are the cells that it hands to `__tls_get_addr`.
            self._check_index(target, argument)
        elif known is None or known.type != TLSDESC:
            raise Mismatch(Cause.REFERENCE, f"reads {cell:#x}, which is no thread-local descriptor")
        elif known.name and not self._named(known, target):
            raise self._other(target)
        elif not known.name:
            self._check_own(target, known.addend)
        if isinstance(target, External) and target.name == MODULE_BASE:
            self._expect_base(from_pointer=False)

    def _named(self, known: Cell, target: Target) -> bool:
        return bool(known.name) and not known.addend and self.matcher.cell_names(target, known.name)

    def _is_added(self, target: Target, place: int) -> bool:
        """Tell whether a target is the thread-local that a patch put at a place."""
        if isinstance(target, Place):
            return self._is_variable(target, place)
        if not isinstance(target, External):
            return False
        found = (p for p in self.unit.view.journal.placed if p.kind == THREAD_LOCAL and p.address == place)
        return any(not p.local and target.name in p.names for p in found)

    def _is_variable(self, target: Place, place: int) -> bool:
        """Tell whether a block of the unit is the variable at a place, and bind it then."""
        block = target.block
        for symbol in block.symbols:
            for variable in self.unit.variables(symbol.name, symbol.local, thread_local=True):
                if variable.address == place - target.offset and variable.size in (0, block.size):
                    self.matcher.record(block, variable.address)
                    return True
        return False

    def _check_other(self, target: Target, number: int, offset: int) -> None:
        if self._is_added(target, thread_number(offset, number)):
            return
        definition = self.image.search(target.name, self.module) if isinstance(target, External) else None
        if (
            definition is None
            or not definition.thread_local
            or definition.address != offset
            or self.image.thread_module(definition.module) != number
        ):
            raise self._other(target)

    # --- the module's own block -------------------------------------------------------------------------------

    def _check_base(self, offset: int) -> None:
        """Check what a linker took for the base of the module's block: the thread pointer, or the block's start."""
        if offset and offset != self.image.thread_block(self.module):
            raise Mismatch(Cause.REFERENCE, "uses another module's thread-locals")
        self._expect_base(from_pointer=not offset)

    def _expect_base(self, *, from_pointer: bool) -> None:
        if self._from_pointer not in (None, from_pointer):
            raise Mismatch(Cause.REFERENCE, "uses offsets of two kinds for its module's thread-locals")
        self._from_pointer = from_pointer

    def _check_from_base(self, target: Target, value: int) -> None:
        # An executable's block ends at the thread pointer: what counts from there is negative.
        if value >= 0:
            self._expect_base(from_pointer=False)
            self._check_own(target, value)
            return
        self._expect_base(from_pointer=True)
        self.check_offset(target, value)

    def _check_own(self, target: Target, offset: int) -> None:
        """Check an offset in the block of the unit's module."""
        if isinstance(target, Place):
            if self._is_variable(target, offset):
                return
        elif isinstance(target, External) and self._is_own_name(target.name, offset):
            return
        raise self._other(target)

    def _is_own_name(self, name: str, offset: int) -> bool:
        if name == MODULE_BASE:
            return offset == 0
        module = self.module.module
        symbols = [s for s in module.symbols.named(name) if s.type == SymbolType.TLS and s.value == offset]
        if any(not s.local or module.demoted(s) for s in symbols):
            return True
        definition = self.image.search(name, self.module)
        if definition is None or not definition.thread_local:
            return False
        return definition.module is self.module and definition.address == offset

    def _other(self, target: Target) -> Mismatch:
        if isinstance(target, Place):
            return Mismatch(Cause.REFERENCE, f"uses another thread-local than `{target.block.name}`")
        if isinstance(target, External):
            return Mismatch(Cause.REFERENCE, f"uses another thread-local than `{target.name}`")
        return Mismatch(Cause.REFERENCE, "uses a nameless thread-local")
