"""Seccomp: whether a thread may make a system call, by the filters that it runs under.

Decides what a filter answers to a call of which some arguments are not known yet. Does not decide what then happens
(`borrow.py`). A call that a filter does not foresee may kill the thread that we borrow for it, and the program with
it, so the filters are read (only root may) and interpreted beforehand. What is not known goes both ways at every
comparison; the harshest answer counts. Specification: seccomp(2); ptrace(2), PTRACE_SECCOMP_GET_FILTER; the
kernel's Documentation/networking/filter.rst (classic BPF).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

RESTART_SYSCALL = 219
NAMES = {
    0: "read",
    3: "close",
    9: "mmap",
    10: "mprotect",
    11: "munmap",
    15: "rt_sigreturn",
    77: "ftruncate",
    RESTART_SYSCALL: "restart_syscall",
    257: "openat",
    262: "newfstatat",
    319: "memfd_create",
}
"""Those that patcher asks for, for messages."""

_ARCHITECTURE = 0xC000003E  # AUDIT_ARCH_X86_64
_WORD = 0xFFFFFFFF
_DATA_SIZE = 64  # of struct seccomp_data
_MOST_STATES = 100_000


class Action(IntEnum):
    """What a filter answers, the harshest first (SECCOMP_RET_ACTION_FULL, signed as the kernel compares it)."""

    KILL_PROCESS = -0x80000000
    KILL_THREAD = 0
    TRAP = 0x30000
    ERRNO = 0x50000
    USER_NOTIF = 0x7FC00000
    TRACE = 0x7FF00000
    LOG = 0x7FFC0000
    ALLOW = 0x7FFF0000

    @property
    def permits(self) -> bool:
        """Whether the call is made."""
        return self in (Action.ALLOW, Action.LOG)

    @property
    def harmless(self) -> bool:
        """Whether the caller gets an answer, be it an error."""
        return self.permits or self in (Action.ERRNO, Action.TRACE)


@dataclass(frozen=True, slots=True)
class _State:
    """Where a run of a filter is, and what its accumulator, index register and memory hold; None is not known."""

    position: int = 0
    a: int | None = 0
    x: int | None = 0
    memory: tuple[int | None, ...] = (0,) * 16


Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, k


def parse(program: bytes) -> tuple[Instruction, ...]:
    """Return the instructions of a filter (struct sock_filter)."""
    return tuple(struct.iter_unpack("<HBBI", program))


def harshest(filters: Sequence[bytes], number: int, arguments: Sequence[int | None] = ()) -> Action:
    """Return what all filters together answer to a system call at worst; an argument that is None, or missing, may
    be anything, and so may the place that the call is made from."""
    data: list[int | None] = [number, _ARCHITECTURE, None, None]
    for argument in (*arguments, *[None] * (6 - len(arguments))):
        data += [None, None] if argument is None else [argument & _WORD, argument >> 32 & _WORD]
    return min((_answer(parse(program), tuple(data)) for program in filters), default=Action.ALLOW)


def _answer(program: Sequence[Instruction], data: tuple[int | None, ...]) -> Action:
    answers: set[Action] = set()
    seen = {_State()}
    waiting = [_State()]
    while waiting:
        state = waiting.pop()
        if len(seen) > _MOST_STATES or not 0 <= state.position < len(program):
            return Action.KILL_PROCESS  # too many ways to follow, or no filter that the kernel would have taken
        for after in _execute(program[state.position], state, data, answers):
            if after not in seen:
                seen.add(after)
                waiting.append(after)
    return min(answers)


def _execute(
    instruction: Instruction, state: _State, data: tuple[int | None, ...], answers: set[Action]
) -> tuple[_State, ...]:
    code, yes, no, k = instruction
    kind, on = code & 7, replace(state, position=state.position + 1)
    if kind == 6:  # BPF_RET
        answers.add(_action(k if code & 0x18 == 0 else state.a))
        return ()
    if kind in (0, 1):  # BPF_LD, BPF_LDX
        value = _loaded(code & 0xE0, k, state, data)
        return (replace(on, a=value) if kind == 0 else replace(on, x=value),)
    if kind in (2, 3):  # BPF_ST, BPF_STX
        kept = list(state.memory)
        kept[k & 15] = state.a if kind == 2 else state.x
        return (replace(on, memory=tuple(kept)),)
    operand = state.x if code & 8 else k
    if kind == 4:  # BPF_ALU
        return (replace(on, a=_computed(code & 0xF0, state.a, operand)),)
    if kind == 5:  # BPF_JMP
        return _jumps(code & 0xF0, state.a, operand, on, (yes, no, k))
    return (replace(on, a=state.x) if code & 0x80 else replace(on, x=state.a),)  # BPF_MISC: TXA, TAX


def _loaded(mode: int, k: int, state: _State, data: tuple[int | None, ...]) -> int | None:
    if mode == 0x20:  # BPF_ABS
        return data[k // 4] if k % 4 == 0 and k < _DATA_SIZE else None
    if mode == 0x60:  # BPF_MEM
        return state.memory[k & 15]
    return {0x00: k, 0x80: _DATA_SIZE}.get(mode)  # BPF_IMM, BPF_LEN


def _computed(operation: int, a: int | None, operand: int | None) -> int | None:
    if operation == 0x50 and 0 in (a, operand):
        return 0
    if a is None or (operand is None and operation != 0x80):
        return None
    if operation == 0x80:  # BPF_NEG
        return -a & _WORD
    assert operand is not None
    if operation == 0x30:  # BPF_DIV
        return a // operand if operand else None
    results = {
        0x00: a + operand,
        0x10: a - operand,
        0x20: a * operand,
        0x40: a | operand,
        0x50: a & operand,
        0x60: a << (operand & 31),
        0x70: a >> (operand & 31),
    }
    found = results.get(operation)
    return None if found is None else found & _WORD


def _jumps(
    operation: int, a: int | None, operand: int | None, on: _State, targets: tuple[int, int, int]
) -> tuple[_State, ...]:
    yes, no, k = targets
    if operation == 0x00:  # BPF_JA
        return (replace(on, position=on.position + k),)
    ways = (replace(on, position=on.position + yes), replace(on, position=on.position + no))
    if a is None or operand is None:
        return ways
    true = {0x10: a == operand, 0x20: a > operand, 0x30: a >= operand, 0x40: bool(a & operand)}.get(operation)
    return ways if true is None else (ways[0] if true else ways[1],)


def _action(value: int | None) -> Action:
    if value is None:
        return Action.KILL_PROCESS
    full = value & 0xFFFF0000
    try:
        return Action(full - (1 << 32) if full >> 31 else full)
    except ValueError:
        return Action.KILL_PROCESS  # so the kernel does with answers that it does not know
