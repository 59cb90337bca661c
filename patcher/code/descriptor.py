"""The function behind a thread-local descriptor of ours.

Code compiled for descriptors (-mtls-dialect=gnu2) calls the first word of a descriptor with the descriptor's
address in %rax, and expects the variable's offset from the thread pointer there; every other register keeps its
value. The dynamic linker has such functions, but exports none; this one asks `__tls_get_addr` and keeps the
registers that an ordinary function may change, the vector registers among them.

    descriptor: this function, address of the index      index: module number, offset, address of __tls_get_addr

Specification: Oliva & Araujo, Thread-Local Storage Descriptors for IA32 and AMD64/EM64T; Intel SDM volume 1,
chapter 13 (XSAVE; its header must be zero where it is not written).
"""

from __future__ import annotations

_SAVED_STATE = 0xE7  # x87, SSE, AVX and AVX-512; a tile's state is no function's to keep
_AREA = 2752  # of these components in the standard format, a multiple of 64

_CLEAR_HEADER = b"".join(
    b"\x48\x89\x8c\x24" + offset.to_bytes(4, "little")  # mov %rcx, offset(%rsp)
    for offset in range(512, 576, 8)
)
_READ_MASK = (
    b"\x31\xc9"  # xor %ecx, %ecx
    b"\x0f\x01\xd0"  # xgetbv
    + b"\x25"  # and $mask, %eax
    + _SAVED_STATE.to_bytes(4, "little")
    + b"\x31\xd2"  # xor %edx, %edx
)

FIND_THROUGH_DESCRIPTOR = (
    b"\x55"  # push %rbp
    b"\x48\x89\xe5"  # mov %rsp, %rbp
    b"\x57\x56\x52\x51"  # push %rdi, %rsi, %rdx, %rcx
    b"\x41\x50\x41\x51\x41\x52\x41\x53"  # push %r8 to %r11
    b"\x48\x8b\x78\x08"  # mov 8(%rax), %rdi
    b"\x48\x83\xe4\xc0"  # and $-64, %rsp
    b"\x48\x81\xec"  # sub $area, %rsp
    + _AREA.to_bytes(4, "little")
    + _READ_MASK
    + _CLEAR_HEADER
    + b"\x48\x0f\xae\x24\x24"  # xsave64 (%rsp)
    b"\xff\x57\x10"  # call *16(%rdi)
    b"\x48\x89\xc7"  # mov %rax, %rdi
     + _READ_MASK + b"\x48\x0f\xae\x2c\x24"  # xrstor64 (%rsp)
    b"\x48\x89\xf8"  # mov %rdi, %rax
    b"\x64\x48\x2b\x04\x25\0\0\0\0"  # sub %fs:0, %rax
    b"\x48\x8d\x65\xc0"  # lea -64(%rbp), %rsp
    b"\x41\x5b\x41\x5a\x41\x59\x41\x58"  # pop %r11 to %r8
    b"\x59\x5a\x5e\x5f"  # pop %rcx, %rdx, %rsi, %rdi
    b"\x5d"  # pop %rbp
    b"\xc3"  # ret
)
"""Machine code that lies anywhere, 16-byte aligned."""
