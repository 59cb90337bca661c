"""Steps: what can be asked of a borrowed thread, and the stub that does it.

Decides how steps become instructions. Pure: bytes and numbers in, bytes out. Specification: syscall(2)
"Architecture calling conventions"; psABI section 3.2.3 (arguments), 3.2.2 (stack alignment).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

RT_SIGRETURN = 15
SPARE_WORDS = 4  # behind the results: the default of mxcsr, where errno is, what it was, and the mark
_MARK_SIZE, _END_SIZE = 11, 19  # of the instructions that clear the mark, and of those behind


@dataclass(frozen=True, slots=True)
class Result:
    """The value of an earlier step, by its number from 0."""

    index: int


Argument = int | Result | bytes


@dataclass(frozen=True, slots=True)
class SystemCall:
    """A raw system call; `bytes` arguments are put on the stack and passed by address."""

    number: int
    args: tuple[Argument, ...] = ()


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A call of a function of the target, with integer and pointer arguments."""

    address: int | Result
    args: tuple[Argument, ...] = ()


Step = SystemCall | FunctionCall

_MOV_IMMEDIATE = {
    "rdi": b"\x48\xbf",
    "rsi": b"\x48\xbe",
    "rdx": b"\x48\xba",
    "rcx": b"\x48\xb9",
    "r8": b"\x49\xb8",
    "r9": b"\x49\xb9",
    "r10": b"\x49\xba",
    "r11": b"\x49\xbb",
}
# mov disp32(%rbx), %reg
_MOV_RESULT = {
    "rdi": b"\x48\x8b\xbb",
    "rsi": b"\x48\x8b\xb3",
    "rdx": b"\x48\x8b\x93",
    "rcx": b"\x48\x8b\x8b",
    "r8": b"\x4c\x8b\x83",
    "r9": b"\x4c\x8b\x8b",
    "r10": b"\x4c\x8b\x93",
    "r11": b"\x4c\x8b\x9b",
}
SYSTEM_CALL_REGISTERS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
_FUNCTION_REGISTERS = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
_ALL_BITS = (1 << 64) - 1


def check_steps(steps: Sequence[Step]) -> None:
    """Raise ValueError for steps that no stub can do: too many arguments, a result that is not there yet."""
    for position, step in enumerate(steps):
        if len(step.args) > 6:
            raise ValueError(f"step {position} has {len(step.args)} arguments, six fit in registers")
        values = (*step.args, step.address) if isinstance(step, FunctionCall) else step.args
        for value in values:
            if isinstance(value, Result) and not 0 <= value.index < position:
                raise ValueError(f"step {position} uses the result of step {value.index}, which is not done yet")


def assemble(steps: Sequence[Step], results: int, frame: int, blobs: Sequence[int], errno_location: int = 0) -> bytes:
    """Return the code that does `steps` and then restores the thread from the signal frame at `frame`.

    `results` is the address of 8 bytes a step followed by SPARE_WORDS words, the first of which is 0x1f80 (mxcsr's
    default), and the last the mark: it is cleared when all steps are done (and only the code itself is still in use).
    `blobs` holds the addresses of the `bytes` arguments in their order. With the address of the function that tells
    where errno is, errno is what it was afterwards. The code is position-independent.
    """
    addresses = iter(blobs)
    code = bytearray()
    code += b"\x48\xbb" + _u64(results)  # movabs $results, %rbx
    code += b"\xfc"  # cld
    if errno_location:
        code += _save_errno(errno_location, len(steps))
    failures: list[int] = []
    for position, step in enumerate(steps):
        registers = SYSTEM_CALL_REGISTERS if isinstance(step, SystemCall) else _FUNCTION_REGISTERS
        for register, argument in zip(registers, step.args, strict=False):
            value = next(addresses) if isinstance(argument, bytes) else argument
            code += _load(register, value)
        code += _system_call(step) if isinstance(step, SystemCall) else _function_call(step, len(steps))
        code += b"\x48\x89\x83" + struct.pack("<i", 8 * position)  # mov %rax, 8*position(%rbx)
        if isinstance(step, SystemCall):
            code += b"\x48\x3d\x01\xf0\xff\xff"  # cmp $-4095, %rax
            code += b"\x0f\x83" + bytes(4)  # jae end
            failures.append(len(code))
    end = len(code)
    for after in failures:
        struct.pack_into("<i", code, after - 4, end - after)
    if errno_location:
        code += _RESTORE_ERRNO
    code += b"\x48\xc7\x83" + struct.pack("<ii", mark_offset(len(steps)), 0)  # movq $0, mark(%rbx)
    code += b"\x48\xbc" + _u64(frame)  # movabs $frame, %rsp
    code += b"\xb8\x0f\x00\x00\x00"  # mov $15, %eax
    code += b"\x0f\x05"  # syscall (rt_sigreturn)
    code += b"\xeb\xf7"  # jmp to the mov: only reached when a controller called the system call off
    return bytes(code)


def mark_offset(count: int) -> int:
    """Return where the mark is of so many steps, from `results` on."""
    return 8 * (count + SPARE_WORDS - 1)


def end_offset(stub: bytes) -> int:
    """Return where in a stub a thread that has `results` in %rbx clears the mark and then restores itself."""
    return len(stub) - _END_SIZE - _MARK_SIZE


# The return address must not stay behind: it would look as if the stub were still in use.
_FORGET_RETURN = b"\x48\xc7\x44\x24\xf8\x00\x00\x00\x00"  # movq $0, -8(%rsp)
_RESTORE_ERRNO = b"\x45\x89\x2c\x24"  # mov %r13d, (%r12)


def _save_errno(location: int, count: int) -> bytes:
    code = _load("r11", location) + b"\x41\xff\xd3"  # call *%r11
    code += b"\x49\x89\xc4"  # mov %rax, %r12
    code += b"\x44\x8b\x28"  # mov (%rax), %r13d
    code += b"\x4c\x89\xab" + struct.pack("<i", 8 * count + 16)  # mov %r13, 8*count+16(%rbx)
    code += b"\x4c\x89\xa3" + struct.pack("<i", 8 * count + 8)  # mov %r12, 8*count+8(%rbx)
    return code + _FORGET_RETURN


def _system_call(step: SystemCall) -> bytes:
    return b"\xb8" + struct.pack("<I", step.number) + b"\x0f\x05"  # mov $number, %eax; syscall


def _function_call(step: FunctionCall, count: int) -> bytes:
    clean = b"\xdb\xe3"  # fninit: the psABI wants the x87 stack empty at a call
    clean += b"\x0f\xae\x93" + struct.pack("<i", 8 * count)  # ldmxcsr 8*count(%rbx)
    call = b"\x31\xc0"  # xor %eax, %eax: no vector arguments
    call += b"\x41\xff\xd3"  # call *%r11
    return clean + _load("r11", step.address) + call + _FORGET_RETURN


def _load(register: str, value: int | Result) -> bytes:
    if isinstance(value, Result):
        return _MOV_RESULT[register] + struct.pack("<i", 8 * value.index)
    return _MOV_IMMEDIATE[register] + _u64(value)


def _u64(value: int) -> bytes:
    return struct.pack("<Q", value & _ALL_BITS)
