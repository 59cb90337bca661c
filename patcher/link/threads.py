"""Code that asks the dynamic linker where a thread-local variable is, made to know it: to the local-exec model.

Compilers write the asking code in fixed sequences, so that a linker that knows better can replace them whole.
Decides what a sequence becomes; whether a variable's offset from the thread pointer is fixed is the caller's to say.

Pure: bytes and references in, bytes and references out.
Specification: AMD64 supplement, section 11.1 (code sequences) and tables 11.4-11.8; Drepper, ELF Handling For
Thread-Local Storage, section 5.
"""

from __future__ import annotations

from collections.abc import Callable

from patcher.blocks import Linkable, Reference
from patcher.errors import LinkError
from patcher.link.relocations import DYNAMIC_THREAD_LOCAL, R, type_name

_LOAD_POINTER = b"\x64\x48\x8b\x04\x25\0\0\0\0"  # mov %fs:0, %rax
_ADD_OFFSET = b"\x48\x8d\x80\0\0\0\0"  # lea offset(%rax), %rax
_NOP_6 = b"\x66\x0f\x1f\x44\x00\x00"
_NOP_13 = b"\x66\x66\x66\x66\x2e\x0f\x1f\x84\0\0\0\0\0"
_CALL_THROUGH_TABLE = (b"\x48\x01\xd8\xff\xd0", b"\x4c\x01\xf8\xff\xd0")  # add %rbx or %r15, %rax; call *%rax

_GENERAL_CALLS = (b"\x66\x66\x48\xe8", b"\x66\x48\xff\x15")  # padded: call f, call *cell(%rip)


def to_local_exec(what: str, linkable: Linkable, fixed: Callable[[Reference], bool]) -> Linkable:
    """Return a block in which what asks for thread-locals with a `fixed` offset asks no more.

    Raises `LinkError` naming the block as `what`, for code that is in none of the specified sequences.
    """
    code = bytearray(linkable.data)
    references: list[Reference] = []
    dropped: set[int] = set()
    for r in linkable.references:
        if r.offset in dropped:
            continue  # the call of __tls_get_addr
        if r.type not in DYNAMIC_THREAD_LOCAL or not fixed(r):
            references.append(r)
            continue
        at = linkable.lead + r.offset
        if not _is_known(r.type, code, at):
            raise LinkError(
                f"{what}: {type_name(r.type)} at {r.offset:#x} stands in none of the psABI's code sequences for it",
                "compile the unit with -ftls-model=initial-exec",
                code="thread-local",
            )
        if r.type == R.TLSGD:
            moved, call = _general(code, at)
            references.append(Reference(r.offset + moved, R.TPOFF32, r.target, r.addend + 4))
            dropped.add(r.offset + call)
        elif r.type == R.TLSLD:
            dropped.add(r.offset + _local(code, at))
        elif r.type == R.GOTPC32_TLSDESC:
            _descriptor(code, at)
            references.append(Reference(r.offset, R.TPOFF32, r.target, r.addend + 4))
        elif r.type == R.TLSDESC_CALL:
            code[at : at + 2] = b"\x66\x90"
        else:
            kind = R.TPOFF64 if r.type == R.DTPOFF64 else R.TPOFF32
            references.append(Reference(r.offset, kind, r.target, r.addend))
    return Linkable(linkable.lead, bytes(code), tuple(references))


def _is_known(kind: int, code: bytearray, at: int) -> bool:
    before, behind = bytes(code[max(at - 4, 0) : at]), bytes(code[at : at + 23])
    if kind == R.TLSGD:
        general = before == b"\x66\x48\x8d\x3d" and behind[4:].startswith(_GENERAL_CALLS)
        return general or (before[-3:] == b"\x48\x8d\x3d" and _is_large(behind))
    if kind == R.TLSLD:
        local = behind[4:].startswith((b"\xe8", b"\xff\x15"))
        return before[-3:] == b"\x48\x8d\x3d" and (local or _is_large(behind))
    if kind == R.GOTPC32_TLSDESC:
        return len(before) >= 3 and before[-3] & 0xFB == 0x48 and before[-2] == 0x8D and before[-1] & 0xC7 == 5
    return kind != R.TLSDESC_CALL or behind[:2] == b"\xff\x10"


def _is_large(behind: bytes) -> bool:
    return behind[4:6] == b"\x48\xb8" and behind[14:19] in _CALL_THROUGH_TABLE


def _general(code: bytearray, at: int) -> tuple[int, int]:
    """Replace a general-dynamic sequence; return the distance from its field to the new one, and to the call's."""
    if _is_large(bytes(code[at : at + 23])):
        code[at - 3 : at + 19] = _LOAD_POINTER + _ADD_OFFSET + _NOP_6
        return 9, 6
    code[at - 4 : at + 12] = _LOAD_POINTER + _ADD_OFFSET
    return 8, 8


def _local(code: bytearray, at: int) -> int:
    """Replace a local-dynamic sequence; return the distance from its field to the call's."""
    if _is_large(bytes(code[at : at + 23])):
        code[at - 3 : at + 19] = _NOP_13 + _LOAD_POINTER
        return 6
    if code[at + 4] == 0xE8:
        code[at - 3 : at + 9] = b"\x66" * 3 + _LOAD_POINTER
        return 5
    code[at - 3 : at + 10] = b"\x66" * 4 + _LOAD_POINTER
    return 6


def _descriptor(code: bytearray, at: int) -> None:
    # lea x@tlsdesc(%rip), %reg becomes mov $offset, %reg: the register moves from ModRM.reg to ModRM.rm.
    prefix, _, modrm = code[at - 3 : at]
    code[at - 3 : at] = bytes((0x48 | prefix >> 2 & 1, 0xC7, 0xC0 | modrm >> 3 & 7))
