"""Which call-clobbered registers code overwrites, and which it expects to survive a call.

Callers in the same unit may rely on a function leaving alone registers that the psABI lets it overwrite
(gcc -fipa-ra, on from -O2). Decides what one piece of code does by itself; what its callees do is told to it.

Specification: System V ABI, AMD64 supplement, figure 3.4 (register usage).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from patcher.code.instructions import UndecodableCode, _decoder, decode_lite, lite_target

_FAMILIES = {
    name: family
    for family, names in {
        "rax": "rax eax ax al ah",
        "rcx": "rcx ecx cx cl ch",
        "rdx": "rdx edx dx dl dh",
        "rsi": "rsi esi si sil",
        "rdi": "rdi edi di dil",
    }.items()
    for name in names.split()
}
_FAMILIES |= {f"r{n}{suffix}": f"r{n}" for n in range(8, 12) for suffix in ("", "d", "w", "b")}
_FAMILIES |= {f"{kind}mm{n}": f"xmm{n}" for n in range(32) for kind in "xyz"}
_FAMILIES |= {f"k{n}": f"k{n}" for n in range(8)}

ALL = frozenset(_FAMILIES.values())
"""Everything a function may overwrite that keeps to the psABI: what a call to unknown code costs."""

_ARGUMENTS = frozenset(["rdi", "rsi", "rdx", "rcx", "r8", "r9", "rax", *(f"xmm{n}" for n in range(8))])
_RESULTS = frozenset(["rax", "rdx", "xmm0", "xmm1"])
_PARTIAL = frozenset(["ax", "al", "ah", "cx", "cl", "ch", "dx", "dl", "dh", "si", "sil", "di", "dil"]) | {
    f"r{n}{suffix}" for n in range(8, 12) for suffix in "wb"
}
_ZEROING = ("xor", "sub", "pxor", "xorps", "xorpd", "vpxor", "vxorps", "vxorpd")

CallSites = Mapping[int, frozenset[str]]
"""Offset of a call instruction -> registers."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """Where code goes when it leaves: direct calls and jumps by the offset of the instruction, and whether it may
    go anywhere else."""

    targets: tuple[tuple[int, int], ...]
    anywhere: bool


def outgoing(code: bytes, address: int) -> Outgoing:
    """Find every direct call and jump that leaves `code`, and whether there are indirect calls."""
    targets: list[tuple[int, int]] = []
    anywhere = False
    try:
        listing = decode_lite(code, address)
    except UndecodableCode:
        return Outgoing((), True)
    for offset, _, mnemonic, operands in listing:
        target = lite_target((offset, 0, mnemonic, operands))
        if target is not None:
            if not address <= target < address + len(code):
                targets.append((offset, target))
        elif _goes_anywhere(mnemonic, operands):
            anywhere = True
    return Outgoing(tuple(targets), anywhere)


def _goes_anywhere(mnemonic: str, operands: str) -> bool:
    # An indirect jump without a RIP-relative operand is a jump table's; tail calls through cells have one.
    return mnemonic.endswith(("call", "syscall")) or (mnemonic.endswith("jmp") and "rip" in operands)


def overwritten(code: bytes) -> frozenset[str]:
    """Return the call-clobbered registers that instructions of `code` write, by their widest name; slow (8 us each)."""
    return frozenset(name for step in _steps(code).values() for name in step.touches)


def relies_on(code: bytes, clobbers: CallSites, taken: CallSites) -> bool:
    """Tell whether `code` expects a register that a call is going to take from it.

    `clobbers`: what the callee of each known call is known to overwrite (others: everything). `taken`: what the
    callee of some calls overwrites from now on. A register counts when a value that was put into it before the
    call may be read after it; in doubt it does.
    """
    flow = _Flow(code, clobbers)
    return any(flow.survives(site, name) for site, names in taken.items() for name in names)


@dataclass(frozen=True, slots=True)
class _Step:
    """What one instruction does: registers read, fully written and touched at all, and where control goes next."""

    end: int
    reads: frozenset[str]
    writes: frozenset[str]
    touches: frozenset[str]
    call: bool
    returns: bool
    leaves: bool  # jumps out of the code
    unknown: bool  # jumps through a table
    branch: int | None
    falls: bool


def _steps(code: bytes) -> dict[int, _Step]:
    return {i.address: _step(i, len(code)) for i in _decoder(True).disasm(code, 0)}


def _step(i: Any, size: int) -> _Step:
    read, written = ([i.reg_name(r) for r in group] for group in i.regs_access())
    operands = [o.strip() for o in i.op_str.split(",")]
    zeroing = i.mnemonic in _ZEROING and len(operands) >= 2 and len(set(operands[-2:])) == 1
    reads = frozenset() if zeroing else frozenset(_FAMILIES[n] for n in read if n in _FAMILIES)
    touches = frozenset(_FAMILIES[n] for n in written if n in _FAMILIES)
    writes = frozenset(_FAMILIES[n] for n in written if n in _FAMILIES and n not in _PARTIAL)
    target = lite_target((i.address, i.size, i.mnemonic, i.op_str))
    jump, call = i.mnemonic.endswith("jmp"), i.mnemonic.endswith("call")
    inside = target is not None and not call and 0 <= target < size
    returns = i.mnemonic.endswith("ret")
    return _Step(
        i.address + i.size,
        reads,
        writes,
        touches,
        call,
        returns,
        leaves=target is not None and not inside and not call,
        unknown=jump and target is None,
        branch=target if inside else None,
        falls=not (jump or returns or i.mnemonic in ("ud2", "hlt")),
    )


class _Flow:
    """Where values go between the instructions of one function."""

    def __init__(self, code: bytes, clobbers: CallSites) -> None:
        self._steps = _steps(code)
        self._clobbers = clobbers
        self._before: dict[int, list[int]] = {}
        for at, step in self._steps.items():
            for following in self._after(step):
                self._before.setdefault(following, []).append(at)

    def _after(self, step: _Step) -> list[int]:
        found = [step.end] if step.falls else []
        return found + ([step.branch] if step.branch is not None else [])

    def survives(self, site: int, name: str) -> bool:
        step = self._steps.get(site)
        return step is None or (self._is_set_before(site, name) and self._is_read_after(step, name))

    def _is_set_before(self, site: int, name: str) -> bool:
        seen: set[int] = set()
        work = [site]
        while work:
            at = work.pop()
            if at == 0 and name in _ARGUMENTS:
                return True
            for before in self._before.get(at, ()):
                step = self._steps[before]
                if name in step.touches or step.unknown:
                    return True
                if before in seen or (step.call and name in self._clobbers.get(before, ALL)):
                    continue
                seen.add(before)
                work.append(before)
        return False

    def _is_read_after(self, call: _Step, name: str) -> bool:
        seen: set[int] = set()
        work = self._after(call)
        while work:
            at = work.pop()
            step = self._steps.get(at)
            if at in seen or step is None:
                continue
            seen.add(at)
            if name in step.reads or step.unknown or (step.call and name in _ARGUMENTS):
                return True
            if (step.leaves and name in _ARGUMENTS) or (step.returns and name in _RESULTS):
                return True
            if name in step.writes or (step.call and name in self._clobbers.get(at, ALL)):
                continue
            work += self._after(step)
        return False
