"""The signal frame: a thread's own state, laid out so that rt_sigreturn puts all of it back.

Decides the bytes of the frame and what may go into it. Pure. A thread that runs our stub needs nobody to be
restored: the stub ends in rt_sigreturn on this frame, controller or not. Specification: the kernel's
arch/x86/include/uapi/asm/{sigcontext,ucontext}.h; sigreturn(2).
"""

from __future__ import annotations

import struct
from typing import Protocol

FRAME_SIZE = 304

_UC_FP_XSTATE, _UC_SIGCONTEXT_SS, _UC_STRICT_RESTORE_SS = 1, 2, 4
_FLAGS = _UC_FP_XSTATE | _UC_SIGCONTEXT_SS | _UC_STRICT_RESTORE_SS
# No such mode exists, so the kernel leaves the thread's alternate signal stack, which we cannot read, alone.
_KEEP_ALTERNATE_STACK = 3
_MAGIC1, _MAGIC2 = 0x46505853, 0x46505845
_SOFTWARE_RESERVED = 464
_HEADER = 512
_SMALLEST = 576
# With AMX in the machine, a thread that never used tile data has no room for it in its frames.
_TILE_DATA_FEATURE = 1 << 18
_WITHOUT_TILE_DATA = 2816


class GeneralRegisters(Protocol):
    """The fields of struct user_regs_struct that go into a frame."""

    r8: int
    r9: int
    r10: int
    r11: int
    r12: int
    r13: int
    r14: int
    r15: int
    rdi: int
    rsi: int
    rbp: int
    rbx: int
    rdx: int
    rax: int
    rcx: int
    rsp: int
    rip: int
    eflags: int
    cs: int
    ss: int


def signal_frame(registers: GeneralRegisters, mask: int, vector_state: int) -> bytes:
    """Return a struct ucontext holding `registers`, blocked signals and the address of `floating_frame`'s bytes.

    rt_sigreturn takes it from where the stack pointer points to.
    """
    r = registers
    head = struct.pack("<QQQIIQ", _FLAGS, 0, 0, _KEEP_ALTERNATE_STACK, 0, 0)
    general = struct.pack(
        "<18Q",
        *(r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rdi, r.rsi, r.rbp, r.rbx, r.rdx, r.rax, r.rcx),
        *(r.rsp, r.rip, r.eflags),
    )
    selectors = struct.pack("<4H", r.cs, 0, 0, r.ss)
    tail = struct.pack("<4QQ", 0, 0, 0, 0, vector_state) + bytes(64)
    return head + general + selectors + tail + struct.pack("<Q", mask)


def floating_frame(image: bytes) -> bytes:
    """Return an xsave image (standard format, as ptrace gives it) with the marks that rt_sigreturn looks for.

    It must be placed at a multiple of 64. Raises ValueError for an image without the xsave header.
    """
    if len(image) < _SMALLEST:
        raise ValueError(f"an xsave image has at least {_SMALLEST} bytes, this one {len(image)}")
    (features,) = struct.unpack_from("<Q", image, _HEADER)
    (supported,) = struct.unpack_from("<Q", image, _SOFTWARE_RESERVED)
    size = len(image)
    if size > _WITHOUT_TILE_DATA and not features & _TILE_DATA_FEATURE:
        size, supported = _WITHOUT_TILE_DATA, supported & ~_TILE_DATA_FEATURE
    marked = bytearray(image[:size])
    struct.pack_into("<IIQI", marked, _SOFTWARE_RESERVED, _MAGIC1, size + 4, supported | 3, size)
    marked[_SOFTWARE_RESERVED + 20 : _HEADER] = bytes(_HEADER - _SOFTWARE_RESERVED - 20)
    return bytes(marked) + struct.pack("<I", _MAGIC2)
