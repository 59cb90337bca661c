"""What stands for an undefined function: code that says which one was called, and ends the program.

One small object is made for each such symbol, as if a compiler had made it; from then on it is linked and patched
like any other. Calls alone can be told to want a function: what merely takes an address may want a variable.

Specification: syscall(2), "Architecture calling conventions"; signal(7), abort(3).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from patcher.blocks import Block, Blocks, External, Kind, Reference
from patcher.elf import ObjectFile, Section, Symbol, SymbolBinding, SymbolType, tables
from patcher.elf.relocations import R
from patcher.live import UNDEFINED

_NAMED = 3  # functions that the message names
_TEXT = 1
_CALLS = (b"\xe8", b"\xe9")  # call, jmp
_INDIRECT_CALLS = (b"\xff\x15", b"\xff\x25")  # call *cell(%rip), jmp *cell(%rip)


@dataclass(frozen=True, slots=True)
class Use:
    """One reference to a symbol: the function or variable that has it, and whether it is a call."""

    by: str
    call: bool


def needs(blocks: Blocks, name: str) -> bool:
    """Tell whether an object cannot do without a definition: a weak reference pulls nothing in."""
    found = (s for s in blocks.object.symbols if s.name == name)
    return any((s.undefined and not s.weak) or s.type == SymbolType.IFUNC for s in found)


def uses_of(name: str, units: Iterable[Blocks]) -> tuple[Use, ...]:
    """Return every reference to an external symbol in some objects."""
    found = []
    for blocks in units:
        for block in (*blocks.functions, *blocks.data_blocks()):
            for reference in blocks.references(block):
                if isinstance(reference.target, External) and reference.target.name == name:
                    found.append(Use(block.name, _is_call(block, reference)))
    return tuple(dict.fromkeys(found))


def _is_call(block: Block, reference: Reference) -> bool:
    if block.kind is not Kind.CODE:
        return False
    before = block.data[max(0, reference.offset - 2) : reference.offset]
    if reference.type in (R.PLT32, R.PC32):
        return before[-1:] in _CALLS or (before[:1] == b"\x0f" and before[-1:] != b"" and 0x80 <= before[-1] <= 0x8F)
    return before in _INDIRECT_CALLS


def undefined_function(name: str, users: Iterable[str], abort: int | None) -> ObjectFile:
    """Return an object that defines `name` as a function which says so on stderr and aborts.

    `users` are named in the message. `abort` is the address of the target's own; without one, the process sends
    itself SIGABRT.
    """
    named = list(dict.fromkeys(users))
    listed = ", ".join(f"`{user}`" for user in named[:_NAMED]) + (" and others" if len(named) > _NAMED else "")
    message = f"patcher: call of undefined `{name}`, referred to by {listed}\n".encode()
    code = _say(message, _abort(abort))
    section = Section(_TEXT, f".text.{name}", tables.SHT_PROGBITS, _FLAGS, len(code), 16, 0, code)
    symbols = (
        Symbol(0, "", tables.SHN_UNDEF, 0, 0, SymbolType.NOTYPE, SymbolBinding.LOCAL, 0),
        Symbol(1, UNDEFINED, tables.SHN_ABS - 0x10000, 0, 0, SymbolType.FILE, SymbolBinding.LOCAL, 0),
        Symbol(2, name, _TEXT, 0, len(code), SymbolType.FUNC, SymbolBinding.GLOBAL, 0),
    )
    nothing = tables.RawFile(name, memoryview(b""), tables.ET_REL, _HEADERS, _NO_SEGMENTS, b"")
    return ObjectFile(f"undefined {name}", {_TEXT: section}, symbols, nothing)


_FLAGS = tables.SHF_ALLOC | tables.SHF_EXECINSTR
_HEADERS = np.zeros(_TEXT + 1, tables.SHDR)  # nothing is read through them
_NO_SEGMENTS = np.empty(0, tables.PHDR)


def _say(message: bytes, then: bytes) -> bytes:
    code = b"\xf3\x0f\x1e\xfa"  # endbr64
    code += b"\xb8\x01\0\0\0"  # mov $1, %eax (write)
    code += b"\xbf\x02\0\0\0"  # mov $2, %edi
    rest = b"\xba" + struct.pack("<I", len(message))  # mov $length, %edx
    rest += b"\x0f\x05"  # syscall
    rest += then
    code += b"\x48\x8d\x35" + struct.pack("<i", len(rest))  # lea message(%rip), %rsi
    return code + rest + message


def _abort(address: int | None) -> bytes:
    if address is not None:
        code = b"\x48\x83\xe4\xf0"  # and $-16, %rsp
        code += b"\x48\xb8" + struct.pack("<Q", address)  # movabs $abort, %rax
        return code + b"\xff\xd0\xf4"  # call *%rax; hlt
    code = b"\xb8\x27\0\0\0\x0f\x05"  # mov $39, %eax (getpid); syscall
    code += b"\x89\xc7"  # mov %eax, %edi
    code += b"\xbe\x06\0\0\0"  # mov $6, %esi (SIGABRT)
    code += b"\xb8\x3e\0\0\0\x0f\x05"  # mov $62, %eax (kill); syscall
    code += b"\xbf\x86\0\0\0"  # mov $134, %edi: it is blocked or handled
    return code + b"\xb8\xe7\0\0\0\x0f\x05\xf4"  # mov $231, %eax (exit_group); syscall; hlt
