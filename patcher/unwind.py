"""Unwinding: the calls that a stopped thread is in, by the call frame information of the modules.

Decides which functions a thread is inside of, exactly: a scan of the stack would take what lies in a buffer that
nobody has written yet for a frame. What has no call frame information ends the walk, which then is not complete.
Does not decide what the frames mean, and never guesses one.

Specification: DWARF 5, section 6.4 (call frame information) and 2.5 (expressions); LSB, "Exception Frames"
(.eh_frame, .eh_frame_hdr); psABI figure 3.36 (register numbers).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from patcher.code.border import FURTHEST, PAGE, is_across, led_to
from patcher.elf import tables as t
from patcher.errors import PatcherError, TargetGone
from patcher.image import Image, LoadedModule
from patcher.target import Memory, StoppedThread

_ALL_BITS = (1 << 64) - 1
_SP, _PC = 7, 16
_REGISTERS = 17
_KEPT_BY_CALLS = frozenset({3, 6, 12, 13, 14, 15})  # rbx, rbp, r12 ... r15
_MOST_FRAMES = 1000
_MOST_ROWS = 20_000
_PT_GNU_EH_FRAME = 0x6474E550
# .eh_frame_hdr as every linker writes it: pointer pcrel sdata4, count udata4, table datarel sdata4.
_PCREL_SDATA4 = 0x1B
_KNOWN_TABLE = b"\x01\x1b\x03\x3b"

Registers = tuple[int | None, ...]  # by DWARF number; None for what is not known any more


class Words(Protocol):
    """Memory, as far as a stack is concerned."""

    def read_u64(self, address: int, /) -> int: ...


class _Unknown(Exception):
    """The call frame information does not tell."""


@dataclass(frozen=True, slots=True)
class Backtrace:
    """The functions a thread is in, innermost first: an address inside each, that of the call and not behind it.

    `complete` when the outermost was reached: what there is, is all there is. `pointers`: the stack pointer in each.
    """

    addresses: tuple[int, ...]
    complete: bool
    pointers: tuple[int, ...] = ()


class Unwinder:
    """Walks the stacks of one target; what it reads of the modules' tables it keeps."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._memory = image.target.memory
        self._tables: dict[int, _Table | None] = {}
        self._frames: dict[int, _Frame | None] = {}
        self._rows: dict[int, tuple[_Frame, _Row]] = {}
        self._modules = image.modules

    def backtrace(self, thread: StoppedThread, stack: Words | None = None) -> Backtrace:
        """Return the calls that a thread, stopped with its general registers, is in; raises TargetGone.

        `stack` is what the thread's stack held at a moment, where it does not stand still any more; it may be known
        by its program counter and stack pointer only, then: where others are needed, the walk ends.
        """
        if self._modules is not self._image.modules:
            self._modules = self._image.modules
            self._tables.clear()
            self._frames.clear()
            self._rows.clear()
        registers: Registers = tuple(thread.general)
        if not registers and stack is not None:
            registers = tuple({_SP: thread.sp, _PC: thread.pc}.get(number) for number in range(_REGISTERS))
        words = stack if stack is not None else self._memory
        addresses: list[int] = []
        pointers: list[int] = []
        interrupted = True  # the address is that of the next instruction to be executed, not one behind a call
        while len(addresses) < _MOST_FRAMES and len(registers) == _REGISTERS:
            pc = registers[_PC]
            if pc is None:
                return Backtrace(tuple(addresses), True, tuple(pointers))
            address = self._entered(pc) if interrupted else pc - 1
            addresses.append(address)
            pointers.append(registers[_SP] or 0)
            try:
                frame, row = self._description(address)
                registers, interrupted = _caller(frame, row, registers, words), frame.signal
            except TargetGone:
                raise
            except (_Unknown, PatcherError, struct.error, LookupError, ValueError):
                break
        return Backtrace(tuple(addresses), False, tuple(pointers))

    def function_start(self, address: int) -> int | None:
        """Return where the function that holds a live address starts, or None when its module does not tell."""
        try:
            return self._description(address)[0].start
        except (_Unknown, PatcherError, struct.error, LookupError, ValueError):
            return None

    def _entered(self, pc: int) -> int:
        """Return the entry for a thread that was led from there to the landing of a detour, and else where it is."""
        if not 0 < pc % PAGE < FURTHEST:
            return pc
        start = self.function_start(pc)
        if start is None or not is_across(start):
            return pc
        return start if led_to(start, self._memory.read_available(start, 2)) == pc else pc

    def _description(self, address: int) -> tuple[_Frame, _Row]:
        found = self._rows.get(address)
        if found is None:
            module = self._image.module_at(address)
            if module is None:
                return self._unlisted(address)
            if len(self._rows) > _MOST_ROWS:
                self._rows.clear()
            frame = self._frame(self._table(module), address)
            found = self._rows[address] = frame, _row(frame, address)
        return found

    def _frame(self, table: _Table | None, address: int) -> _Frame:
        if table is None:
            raise _Unknown
        description = table.description(address)
        if description not in self._frames:
            self._frames[description] = _read_frame(self._memory, description)
        return _holding(self._frames[description], address)

    def _table(self, module: LoadedModule) -> _Table | None:
        if module.start not in self._tables:
            found = _read_table(self._memory, module.start, module.bias)
            self._tables[module.start] = found or _listed_table(self._memory, module)
        return self._tables[module.start]

    def _unlisted(self, address: int) -> tuple[_Frame, _Row]:
        # The kernel's own module, or one of ours, whose table grows: nothing of it is kept.
        mappings = self._image.target.mappings()
        here = next((m for m in mappings if address in m), None)
        if here is None or not (here.inode or here.path == "[vdso]"):
            raise _Unknown
        beginnings = [m.start for m in mappings if (m.path, m.inode, m.offset) == (here.path, here.inode, 0)]
        first = max((start for start in beginnings if start <= address), default=0)
        table = _read_table(self._memory, first, first)
        if table is None:
            raise _Unknown
        frame = _holding(_read_frame(self._memory, table.description(address)), address)
        return frame, _row(frame, address)


# --- where a function's description is ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Table:
    """The binary search table of one module: functions' starts and descriptions, relative to `base`."""

    base: int
    starts: npt.NDArray[np.int32]
    descriptions: npt.NDArray[np.int32]

    def description(self, address: int) -> int:
        position = int(np.searchsorted(self.starts, address - self.base, "right")) - 1
        if position < 0:
            raise _Unknown
        return self.base + int(self.descriptions[position])


def _read_table(memory: Memory, start: int, bias: int) -> _Table | None:
    header = memory.read_available(start, 64)
    if not header.startswith(b"\x7fELF") or len(header) < 64:
        return None
    (offset,) = struct.unpack_from("<Q", header, 32)
    size, count = struct.unpack_from("<HH", header, 54)
    programs = memory.read_available(start + offset, size * count)
    for position in range(0, len(programs) - 55, size):
        kind, _, _, address = struct.unpack_from("<IIQQ", programs, position)
        if kind == _PT_GNU_EH_FRAME:
            return _search_table(memory, address + bias)
    return None


def _search_table(memory: Memory, base: int) -> _Table | None:
    header = memory.read_available(base, 12)
    if header[:4] != _KNOWN_TABLE or len(header) < 12:
        return None
    (count,) = struct.unpack_from("<I", header, 8)
    rows = np.frombuffer(memory.read(base + 12, 8 * count), np.int32).reshape(-1, 2)
    return _Table(base, rows[:, 0], rows[:, 1])


def _listed_table(memory: Memory, module: LoadedModule) -> _Table | None:
    """Make the table for a module, as static executables are, that has call frame information but no table."""
    raw = t.read_raw(module.path, module.file.read_bytes())
    for index, header in enumerate(raw.section_headers):
        if raw.section_name(index) == ".eh_frame" and int(header["address"]):
            base = int(header["address"]) + module.bias
            section = memory.read(base, int(header["size"]))
            rows = sorted(_listed(section))
            columns = np.array(rows, np.int32).reshape(-1, 2)
            return _Table(base, columns[:, 0], columns[:, 1])
    return None


def _listed(section: bytes) -> Iterator[tuple[int, int]]:
    """Yield (start of the function, description) of a section's entries, relative to the section."""
    encodings: dict[int, int] = {}
    position = 0
    while position + 12 <= len(section):
        length, back = struct.unpack_from("<II", section, position)
        if not 4 < length < 1 << 20:
            return
        if back:
            common = position + 4 - back
            if common not in encodings:
                encodings[common] = _encoding_at(section, common)
            if encodings[common] == _PCREL_SDATA4:
                (start,) = struct.unpack_from("<i", section, position + 8)
                yield position + 8 + start, position
        position += 4 + length


def _encoding_at(section: bytes, position: int) -> int:
    common = _Reader(section, position + 8)
    version, augmentation = common.fixed(1), common.text()
    if augmentation[:1] != b"z":
        return 0
    common.unsigned(), common.signed()
    common.fixed(1) if version == 1 else common.unsigned()
    return _pointer_encoding(augmentation, common.block())


def _holding(frame: _Frame | None, address: int) -> _Frame:
    if frame is None or not frame.start <= address < frame.end:
        raise _Unknown
    return frame


# --- what a description says --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Frame:
    """One function's description (FDE) with what it shares with others (CIE)."""

    start: int
    end: int
    code_factor: int
    data_factor: int
    return_column: int
    initial: bytes
    instructions: bytes
    signal: bool


class _Reader:
    """Reads numbers from bytes, one after another."""

    __slots__ = ("data", "position")

    def __init__(self, data: bytes, position: int = 0) -> None:
        self.data = data
        self.position = position

    def __bool__(self) -> bool:
        return self.position < len(self.data)

    def take(self, count: int) -> bytes:
        found = self.data[self.position : self.position + count]
        if len(found) != count:
            raise _Unknown
        self.position += count
        return found

    def fixed(self, size: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def unsigned(self) -> int:
        value, shift = 0, 0
        while True:
            byte = self.fixed(1)
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return value

    def signed(self) -> int:
        begin = self.position
        value = self.unsigned()
        bits = 7 * (self.position - begin)
        return value - (1 << bits) if value >> (bits - 1) else value

    def block(self) -> bytes:
        return self.take(self.unsigned())

    def text(self) -> bytes:
        end = self.data.index(b"\0", self.position)
        found, self.position = self.data[self.position : end], end + 1
        return found


def _read_frame(memory: Memory, address: int) -> _Frame | None:
    body = _entry(memory, address)
    (back,) = struct.unpack_from("<I", body)
    common = _Reader(_entry(memory, address + 4 - back), 4)
    version, augmentation = common.fixed(1), common.text()
    if version not in (1, 3) or augmentation[:1] not in (b"", b"z"):
        return None
    code_factor, data_factor = common.unsigned(), common.signed()
    return_column = common.fixed(1) if version == 1 else common.unsigned()
    encoding = _pointer_encoding(augmentation, common.block()) if augmentation else 0
    reader = _Reader(body, 4)
    start, size = _extent(encoding, reader, address + 8)
    if augmentation:
        reader.block()
    initial, instructions = common.data[common.position :], body[reader.position :]
    signal = b"S" in augmentation
    return _Frame(start, start + size, code_factor, data_factor, return_column, initial, instructions, signal)


def _entry(memory: Memory, address: int) -> bytes:
    (length,) = struct.unpack("<I", memory.read(address, 4))
    if not 4 < length < 1 << 20:  # the end of the section, or an entry of the 64-bit form
        raise _Unknown
    return memory.read(address + 4, length)


def _pointer_encoding(augmentation: bytes, data: bytes) -> int:
    reader = _Reader(data)
    encoding = 0
    for letter in augmentation[1:].decode("ascii"):
        if letter == "R":
            encoding = reader.fixed(1)
        elif letter == "P":
            reader.take({0: 8, 2: 2, 3: 4, 4: 8}[reader.fixed(1) & 7])
        elif letter == "L":
            reader.fixed(1)
        elif letter not in "SB":
            raise _Unknown
    return encoding


def _extent(encoding: int, reader: _Reader, place: int) -> tuple[int, int]:
    size, signed, relative = {
        0x00: (8, False, False),  # absptr
        0x0B: (4, True, False),  # sdata4
        0x03: (4, False, False),  # udata4
        0x1B: (4, True, True),  # pcrel sdata4
        0x1C: (8, True, True),  # pcrel sdata8
        0x10: (8, False, True),  # pcrel
    }.get(encoding, (0, False, False))
    if not size:
        raise _Unknown
    start = reader.fixed(size, signed=signed)
    return ((start + place) & _ALL_BITS if relative else start), reader.fixed(size)


# --- one frame further out ----------------------------------------------------------------------------------------


class _Rule(NamedTuple):
    """Where the caller's register is: a DW_CFA_ name in one word, with its number or expression."""

    kind: str
    value: int = 0
    expression: bytes = b""


@dataclass(frozen=True, slots=True)
class _Row:
    """The rules at one address: `register` + `offset`, or `expression`, is the canonical frame address."""

    register: int = _SP
    offset: int = 0
    expression: bytes = b""
    rules: tuple[tuple[int, _Rule], ...] = ()

    def with_rule(self, register: int, rule: _Rule | None) -> _Row:
        rest = tuple(pair for pair in self.rules if pair[0] != register)
        return replace(self, rules=rest if rule is None else (*rest, (register, rule)))


def _caller(frame: _Frame, row: _Row, registers: Registers, memory: Words) -> Registers:
    if row.expression:
        cfa = _evaluate(row.expression, registers, memory, [])
    else:
        cfa = (_known(registers, row.register) + row.offset) & _ALL_BITS
    rules = dict(row.rules)
    if frame.return_column != _PC or _PC not in rules:
        raise _Unknown
    before = [value if number in _KEPT_BY_CALLS else None for number, value in enumerate(registers)]
    before[_SP] = cfa
    for register, rule in rules.items():
        if register < _REGISTERS:
            before[register] = _recover(rule, register, registers, cfa, memory)
    return tuple(before)


def _recover(rule: _Rule, register: int, registers: Registers, cfa: int, memory: Words) -> int | None:
    match rule.kind:
        case "undefined":
            return None
        case "same":
            return registers[register]
        case "offset":
            return memory.read_u64((cfa + rule.value) & _ALL_BITS)
        case "value":
            return (cfa + rule.value) & _ALL_BITS
        case "register":
            return _known(registers, rule.value)
        case "expression":
            return memory.read_u64(_evaluate(rule.expression, registers, memory, [cfa]))
    return _evaluate(rule.expression, registers, memory, [cfa])


def _known(registers: Registers, register: int) -> int:
    value = registers[register] if register < _REGISTERS else None
    if value is None:
        raise _Unknown
    return value


def _row(frame: _Frame, address: int) -> _Row:
    *_, initial = _rows(frame, frame.initial, _Row(), _Row())
    found = initial[1]
    for place, row in _rows(frame, frame.instructions, found, found):
        if place > address:
            break
        found = row
    return found


def _rows(frame: _Frame, instructions: bytes, row: _Row, initial: _Row) -> Iterator[tuple[int, _Row]]:
    """Yield (address from which it holds, row) after every instruction."""
    place, remembered = frame.start, list[_Row]()
    reader = _Reader(instructions)
    yield place, row
    while reader:
        opcode = reader.fixed(1)
        advance = _advance(opcode, reader)
        if advance is not None:
            place += advance * frame.code_factor
        elif opcode == 0x0A:  # remember_state
            remembered.append(row)
        elif opcode == 0x0B:  # restore_state
            row = remembered.pop()
        else:
            row = _changed(row, opcode, reader, frame.data_factor, dict(initial.rules))
        yield place, row


def _advance(opcode: int, reader: _Reader) -> int | None:
    if opcode >> 6 == 1:  # advance_loc
        return opcode & 0x3F
    size = {0x02: 1, 0x03: 2, 0x04: 4}.get(opcode)  # advance_loc1, 2, 4
    return None if size is None else reader.fixed(size)


def _changed(row: _Row, opcode: int, reader: _Reader, factor: int, initial: dict[int, _Rule]) -> _Row:
    if opcode >> 6 == 2:  # offset
        return row.with_rule(opcode & 0x3F, _Rule("offset", reader.unsigned() * factor))
    if opcode >> 6 == 3:  # restore
        return row.with_rule(opcode & 0x3F, initial.get(opcode & 0x3F))
    if opcode in (0x00, 0x2E):  # nop, GNU_args_size
        if opcode:
            reader.unsigned()
        return row
    if opcode == 0x0E:  # def_cfa_offset
        return replace(row, offset=reader.unsigned())
    if opcode == 0x13:  # def_cfa_offset_sf
        return replace(row, offset=reader.signed() * factor)
    if opcode == 0x0F:  # def_cfa_expression
        return replace(row, expression=reader.block())
    register = reader.unsigned()
    match opcode:
        case 0x0C:  # def_cfa
            return replace(row, register=register, offset=reader.unsigned(), expression=b"")
        case 0x12:  # def_cfa_sf
            return replace(row, register=register, offset=reader.signed() * factor, expression=b"")
        case 0x0D:  # def_cfa_register
            return replace(row, register=register, expression=b"")
        case 0x06:  # restore_extended
            return row.with_rule(register, initial.get(register))
    return row.with_rule(register, _rule(opcode, reader, factor))


def _rule(opcode: int, reader: _Reader, factor: int) -> _Rule:
    match opcode:
        case 0x05:  # offset_extended
            return _Rule("offset", reader.unsigned() * factor)
        case 0x11:  # offset_extended_sf
            return _Rule("offset", reader.signed() * factor)
        case 0x07:
            return _Rule("undefined")
        case 0x08:  # same_value
            return _Rule("same")
        case 0x09:
            return _Rule("register", reader.unsigned())
        case 0x10:
            return _Rule("expression", 0, reader.block())
        case 0x14:  # val_offset
            return _Rule("value", reader.unsigned() * factor)
        case 0x15:  # val_offset_sf
            return _Rule("value", reader.signed() * factor)
        case 0x16:
            return _Rule("val_expression", 0, reader.block())
    raise _Unknown


# --- expressions --------------------------------------------------------------------------------------------------


def _evaluate(expression: bytes, registers: Registers, memory: Words, stack: list[int]) -> int:
    reader = _Reader(expression)
    while reader:
        _operate(reader.fixed(1), reader, registers, memory, stack)
    return stack.pop() & _ALL_BITS


def _operate(opcode: int, reader: _Reader, registers: Registers, memory: Words, stack: list[int]) -> None:
    if 0x70 <= opcode <= 0x8F:  # breg0 ... breg31
        stack.append(_known(registers, opcode - 0x70) + reader.signed())
    elif 0x30 <= opcode <= 0x4F:  # lit0 ... lit31
        stack.append(opcode - 0x30)
    elif opcode == 0x06:  # deref
        stack.append(memory.read_u64(stack.pop() & _ALL_BITS))
    elif opcode == 0x23:  # plus_uconst
        stack.append(stack.pop() + reader.unsigned())
    elif opcode in _CONSTANTS:
        size, signed = _CONSTANTS[opcode]
        stack.append(reader.fixed(size, signed=signed))
    else:
        second, first = stack.pop(), stack.pop()
        stack.append(_combined(opcode, first, second))


def _combined(opcode: int, first: int, second: int) -> int:
    match opcode:
        case 0x1A:  # and
            return first & second
        case 0x1C:  # minus
            return first - second
        case 0x22:  # plus
            return first + second
        case 0x24:  # shl
            return first << (second & 63)
        case 0x2A:  # ge
            return int(first >= second)
    raise _Unknown


_CONSTANTS = {0x08: (1, False), 0x09: (1, True), 0x0A: (2, False), 0x0B: (2, True), 0x0C: (4, False), 0x0D: (4, True)}
