"""Loan: one thread that is lent for steps: where its state is kept meanwhile, and how it gets it back.

The order of what is done here is what makes this safe against a controller that is killed at any instant, and against
any request that the kernel refuses; see `borrow`, which decides whose thread it is.

Specification: ptrace(2), sigreturn(2).
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from patcher.errors import PatcherError, TargetBusy, TargetGone
from patcher.target.frame import FRAME_SIZE, floating_frame, signal_frame
from patcher.target.maps import Mapping
from patcher.target.memory import Memory
from patcher.target.steps import (
    RT_SIGRETURN,
    SPARE_WORDS,
    SYSTEM_CALL_REGISTERS,
    Step,
    SystemCall,
    assemble,
    end_offset,
    mark_offset,
)
from patcher.target.stop import StoppedThread, is_restarting
from patcher.target.tracing import Halt, Registers, Tracee

CODE_SIZE = 1024

_ALL_BITS = (1 << 64) - 1
_CALL_TIMEOUT = "call-timeout"
_TRACE_REFUSED = "trace-refused"
_RED_ZONE = 128
_ROOM_TO_CALL = 64 * 1024
_RESTART_SYSCALL = 219
_RESTARTED_BY_BLOCK = frozenset({7, 35, 202, 230})  # poll, nanosleep, futex, clock_nanosleep
_DEFAULT_MXCSR = 0x1F80
_FAULTS = frozenset({4, 5, 7, 8, 11, 31})  # SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGSEGV, SIGSYS
_ABORT = 6
_SI_TKILL = -6
_BLOCKED = _ALL_BITS & ~sum(1 << (number - 1) for number in _FAULTS)
# Trap flag, direction flag, alignment check: none of them belongs into code that is not the thread's own.
_FOREIGN_FLAGS = 0x100 | 0x400 | 0x40000


class Unsuitable(Exception):
    """Why a thread cannot be borrowed just now."""


class Confined(Unsuitable):
    """Why a thread cannot be borrowed at all: what it may do is limited."""


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms a thread is borrowed; see Target.inject and Target.call.

    `wait` is how long to look for a thread, `timeout` how long the steps may take, both in seconds. `stack` is
    memory for the steps instead of the thread's own stack, `errno_location` the function that tells where errno is.
    `system_calls` are those that the functions are known to make.
    """

    code: int | None
    wait: float
    timeout: float
    objection: Callable[[StoppedThread], str] | None = None
    stack: tuple[int, int] | None = None
    errno_location: int = 0
    planned: tuple[SystemCall, ...] = ()

    def uses_stack(self, sp: int) -> bool:
        """Whether a stack pointer is inside the memory for the steps."""
        return self.stack is not None and self.stack[0] <= sp < self.stack[1]


@dataclass(frozen=True, slots=True)
class Way:
    """How a single system call reaches rt_sigreturn: where it starts, and the stack words that lead on."""

    start: int
    chain: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where everything lies on the borrowed stack, and the bytes from `bottom` up."""

    bottom: int
    frame: int
    results: int
    blobs: tuple[int, ...]
    image: bytes


class Loan:
    """One thread, standing at an event stop, lent for `steps`. `away` is true while it is not in its own code.

    While it is in the middle of a stub, a word of its own stands in memory, which the stub clears: by that it is known
    whether a thread that was left alone has done its steps, wherever its registers lead meanwhile (a handler of the
    program on a stack of its own, a coroutine).
    """

    def __init__(self, pid: int, memory: Memory, tracee: Tracee, steps: tuple[Step, ...], terms: Terms) -> None:
        self.pid = pid
        self.memory = memory
        self.tracee = tracee
        self.steps = steps
        self.terms = terms
        self.away = False
        self.results = 0
        self.end = 0  # of the stub
        self.frame = 0
        self.mark = os.urandom(8)
        self.own = _copied(tracee.registers)
        self.alone = _as_left_alone(tracee.registers, memory)
        self.mask = tracee.read_signal_mask()
        self.vector_state = tracee.read_vector_state()

    def run_call(self, mappings: Sequence[Mapping], way: Way) -> tuple[int, ...]:
        step = self.steps[0]
        assert isinstance(step, SystemCall)
        layout = self._lay_out(mappings, way.chain, 0)
        away = self._departing(way.start, layout.bottom)
        blobs = iter(layout.blobs)
        for register, argument in zip(SYSTEM_CALL_REGISTERS, step.args, strict=False):
            value = next(blobs) if isinstance(argument, bytes) else argument
            assert isinstance(value, int)
            setattr(away, register, value & _ALL_BITS)
        away.rax = step.number
        self.memory.write(layout.bottom, layout.image)
        last = self._travel(away, layout.frame, layout.bottom)
        return (_signed(last),)

    def run_stub(self, mappings: Sequence[Mapping], code: int) -> tuple[int, ...]:
        layout = self._lay_out(mappings, (), _ROOM_TO_CALL)
        stub = assemble(self.steps, layout.results, layout.frame, layout.blobs, self.terms.errno_location)
        if len(stub) > CODE_SIZE:
            raise ValueError(f"the stub for {len(self.steps)} steps takes {len(stub)} bytes, there are {CODE_SIZE}")
        self.memory.write(layout.bottom, layout.image)
        self.memory.write(code, stub)
        values: list[int] = []

        def collect() -> None:
            values.extend(struct.unpack(f"<{len(self.steps)}Q", self.memory.read(layout.results, 8 * len(self.steps))))

        self.results, self.frame, self.end = layout.results, layout.frame, code + end_offset(stub)
        self._travel(self._departing(code, layout.frame), layout.frame, 0, collect)
        return _interpreted(self.steps, values)

    def is_under_way(self) -> bool:
        """Whether a thread that was sent through a stub has not done its steps yet."""
        return self.memory.read_available(self.results + mark_offset(len(self.steps)), 8) == self.mark

    def _departing(self, pc: int, sp: int) -> Registers:
        away = _copied(self.own)
        away.rip, away.rsp = pc, sp
        away.orig_rax = _ALL_BITS  # -1: no system call, nothing to restart
        away.eflags &= ~_FOREIGN_FLAGS
        return away

    def _lay_out(self, mappings: Sequence[Mapping], chain: tuple[int, ...], room: int) -> _Layout:
        stack = self.terms.stack
        top = self.own.rsp - _RED_ZONE if stack is None else stack[1]
        blobs = [arg for step in self.steps for arg in step.args if isinstance(arg, bytes)]
        addresses, position = [], top
        for blob in blobs:
            position = (position - len(blob)) & ~15
            addresses.append(position)
        results = (position - 8 * (len(self.steps) + SPARE_WORDS)) & ~15
        floating = floating_frame(self.vector_state)
        vectors = (results - len(floating)) & ~63
        frame = (vectors - FRAME_SIZE) & ~15
        bottom = frame - 8 * len(chain)
        if stack is None:
            _check_stack(self.own.rsp, bottom - room, mappings)
        elif bottom - room < stack[0]:
            raise ValueError(f"a stack of {stack[1] - stack[0]} bytes is too small, {top - bottom + room} are needed")
        image = bytearray(top - bottom)
        for address, blob in zip(addresses, blobs, strict=True):
            image[address - bottom : address - bottom + len(blob)] = blob
        struct.pack_into("<Q", image, results + 8 * len(self.steps) - bottom, _DEFAULT_MXCSR)
        mark = results + mark_offset(len(self.steps)) - bottom
        image[mark : mark + 8] = self.mark
        image[vectors - bottom : vectors - bottom + len(floating)] = floating
        image[frame - bottom : frame - bottom + FRAME_SIZE] = signal_frame(self.alone, self.mask, vectors)
        struct.pack_into(f"<{len(chain)}Q", image, 0, *chain)
        return _Layout(bottom, frame, results, tuple(addresses), bytes(image))

    def _travel(self, away: Registers, frame: int, call_sp: int, collect: Callable[[], None] | None = None) -> int:
        """Send the thread away and bring it back; return rax of the last system call seen at `call_sp`."""
        tracee = self.tracee
        deadline = time.monotonic_ns() + int(self.terms.timeout * 1e9)
        try:
            # Registers first: should we die before the mask, the stub runs under the thread's own mask.
            self._still_there(tracee.write_registers(away))
            self.away = True
            self._still_there(tracee.write_signal_mask(_BLOCKED))
            last = self._await_return(frame, call_sp, deadline)
            self._call_off_sigreturn()
            if collect is not None:
                collect()
            self._restore(self.own)
        except PatcherError as error:
            # Left alone it comes back too, but where no stub tells, who goes on would not know when. In the middle of a
            # stub it must be left alone: what one step opened a later one closes.
            if error.code == _TRACE_REFUSED and collect is None and self.away:
                with suppress(PatcherError):
                    self._abandon()
            raise
        return last

    def _await_return(self, frame: int, call_sp: int, deadline: int) -> int:
        tracee, last = self.tracee, 0
        while True:
            self._still_there(tracee.resume(to_syscall=True))
            halt = tracee.wait(deadline)
            if halt is Halt.SYSCALL:
                self._still_there(tracee.read_registers())
                registers = tracee.registers
                if registers.orig_rax == RT_SIGRETURN and registers.rsp == frame:
                    return last
                if registers.rsp == call_sp:
                    last = registers.rax
            elif halt is Halt.SIGNAL:
                if self._is_deadly():
                    self._abandon_crashed()
            elif halt is Halt.LATE:
                self._abandon_late()
            elif halt in (Halt.GONE, Halt.ZOMBIE):
                raise TargetGone(f"process {self.pid} ended during a borrowed call")

    def _is_deadly(self) -> bool:
        code = self.tracee.signal_code()
        if self.tracee.signal == _ABORT:  # abort() unblocks it before it raises it; another's stays blocked
            return code == _SI_TKILL
        return self.tracee.signal in _FAULTS and code > 0

    def _call_off_sigreturn(self) -> None:
        # In one SETREGS, so that the thread would simply make the system call again if we died here.
        registers = self.tracee.registers
        registers.orig_rax = _ALL_BITS
        registers.rax = RT_SIGRETURN
        registers.rip -= 2
        self._still_there(self.tracee.write_registers(registers))
        self._come_to_event_stop()

    def _come_to_event_stop(self) -> None:
        tracee = self.tracee
        deadline = time.monotonic_ns() + int(2e9)
        while True:
            # Asked for anew each time: any other stop in between takes the request away.
            tracee.interrupt()
            if tracee.standing:
                self._still_there(tracee.resume())
            halt = tracee.wait(deadline)
            if halt in (Halt.EVENT, Halt.GROUP):
                return
            if halt in (Halt.GONE, Halt.ZOMBIE):
                raise TargetGone(f"process {self.pid} ended during a borrowed call")
            if halt is Halt.LATE:
                raise TargetBusy(
                    f"thread {tracee.tid} of process {self.pid} does not stop after a borrowed call; "
                    "it restores itself when the call comes back",
                    code=_CALL_TIMEOUT,
                )

    def _restore(self, registers: Registers) -> None:
        # Registers last: until then the thread, left alone, goes through rt_sigreturn, which restores all three.
        tracee = self.tracee
        self._still_there(tracee.write_vector_state(self.vector_state))
        self._still_there(tracee.write_signal_mask(self.mask))
        self._still_there(tracee.write_registers(registers))
        self.away = False
        self._still_there(tracee.read_registers())
        if bytes(tracee.registers) != bytes(registers):
            raise PatcherError(f"the registers of thread {tracee.tid} of process {self.pid} are not what was put back")

    def _abandon(self) -> None:
        self._come_to_event_stop()
        if self.terms.errno_location:
            place, value = struct.unpack("<QQ", self.memory.read(self.results + 8 * len(self.steps) + 8, 16))
            if place:
                self.memory.write(place, struct.pack("<I", value))
        if self.end:
            # First out of the function, in one SETREGS: should the rest not be done, it must not go on with the mask
            # and the vector registers of another.
            out = self._departing(self.end, self.frame)
            out.rbx = self.results
            self._still_there(self.tracee.write_registers(out))
        # The call may have used up the kernel's memory of what to restart: start the thread's own call anew.
        self._restore(self.alone)

    def _abandon_late(self) -> None:
        self._abandon()
        raise TargetBusy(
            f"a call on thread {self.tracee.tid} of process {self.pid} did not come back within "
            f"{self.terms.timeout:g} s; the thread is where it was before",
            "the call may have waited for a lock; try again when the program is idle",
            code=_CALL_TIMEOUT,
        )

    def _abandon_crashed(self) -> None:
        number, pc = self.tracee.signal, self._fault_address()
        self.tracee.signal = 0
        self._abandon()
        raise PatcherError(
            f"a function called on thread {self.tracee.tid} of process {self.pid} faulted with signal {number} at "
            f"{pc:#x}; the thread is where it was before",
            "what the function had locked stays locked: restart the program before it has to be called again",
            code="call-crashed",
        )

    def _fault_address(self) -> int:
        self.tracee.read_registers()
        return int(self.tracee.registers.rip)

    def _still_there(self, answer: bool) -> None:
        if not answer:
            raise TargetGone(f"process {self.pid} ended during a borrowed call")


def _check_stack(sp: int, bottom: int, mappings: Sequence[Mapping]) -> None:
    # Only where the stack is known for one: some programs run threads on small stacks cut from their heap,
    # and what lies below the stack pointer there is somebody else's.
    for position, mapping in enumerate(mappings):
        if sp not in mapping:
            continue
        guard = mappings[position - 1] if position else None
        guarded = guard is not None and guard.end == mapping.start and guard.permissions.startswith("---")
        if not mapping.writable or not (mapping.path.startswith("[stack") or (not mapping.path and guarded)):
            break
        if bottom < mapping.start:
            raise Unsuitable(f"has only {sp - mapping.start} bytes of stack left")
        return
    raise Unsuitable(f"runs on a stack that is not known for one (sp {sp:#x})")


def _as_left_alone(registers: Registers, memory: Memory) -> Registers:
    """The registers with which a thread goes on by itself, a restartable system call being made anew."""
    alone = _copied(registers)
    # The table of EINTR calls has been applied at the stop: they show ERESTARTNOHAND by now.
    if is_restarting(registers):
        alone.rip -= 2
        alone.rax = registers.orig_rax
        if alone.rax == _RESTART_SYSCALL:
            alone.rax = _restarted_call(memory.read_available(alone.rip - 5, 5))
    alone.orig_rax = _ALL_BITS
    return alone


def _restarted_call(before: bytes) -> int:
    # An earlier stop made the kernel go on with a call of its own, restart_syscall, and rt_sigreturn makes it forget
    # what that was to restart: it would report EINTR. The program's own instruction says it: mov $number, %eax.
    number = int.from_bytes(before[1:], "little")
    return number if before[:1] == b"\xb8" and number in _RESTARTED_BY_BLOCK else _RESTART_SYSCALL


def _copied(registers: Registers) -> Registers:
    copy = Registers()
    ctypes.memmove(ctypes.addressof(copy), ctypes.addressof(registers), ctypes.sizeof(copy))
    return copy


def _interpreted(steps: Sequence[Step], values: Sequence[int]) -> tuple[int, ...]:
    results = []
    for step, value in zip(steps, values, strict=True):
        results.append(_signed(value) if isinstance(step, SystemCall) else value)
        if isinstance(step, SystemCall) and -4095 <= results[-1] < 0:
            break
    return tuple(results)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
