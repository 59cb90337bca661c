"""Borrowing: raw system calls and functions of the target, run on one of its own threads.

Decides which thread, where its state is kept meanwhile, and how it gets it back. Does not decide what is
called, nor whether a function is safe to call there (`accept` of the caller does).

The order of the steps is what makes this safe against a controller that is killed at any instant. The thread's
state goes, as a signal frame, onto its own stack, below the red zone; the instructions that it then executes
end in rt_sigreturn on that frame. So from the one SETREGS that sends it away until the one SETREGS that brings
it back, it needs nobody. We stop it at the entry of that rt_sigreturn, call the system call off, and put the
registers back by hand, because only that way does a restarted nanosleep or poll keep its remaining time.

Signals are blocked for the thread meanwhile and stay pending: a handler that ran on top of the stub would turn
"interrupted by a handler" into "restarted" for the call the thread was in. A function that creates threads
therefore hands them a blocked mask.

A function that does not come back is abandoned: the thread gets its registers back and goes on where it was.
What the function held by then (a lock, a half-changed list) it holds for ever; that is for the caller to know.

Specification: ptrace(2), sigreturn(2), rseq(2).
"""

from __future__ import annotations

import ctypes
import random
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from patcher.errors import Forbidden, PatcherError, TargetBusy, TargetGone
from patcher.target.confined import Call, confinement
from patcher.target.frame import FRAME_SIZE, floating_frame, signal_frame
from patcher.target.maps import Mapping
from patcher.target.memory import Memory
from patcher.target.process import read_status
from patcher.target.steps import (
    RT_SIGRETURN,
    SPARE_WORDS,
    SYSTEM_CALL_REGISTERS,
    Step,
    SystemCall,
    assemble,
    check_steps,
)
from patcher.target.stop import (
    Lingering,
    StoppedThread,
    conceal_interruption,
    described_thread,
    is_restarting,
    list_threads,
    stopped_thread,
)
from patcher.target.tracing import Halt, Registers, Tracee

CODE_SIZE = 1024

_ALL_BITS = (1 << 64) - 1
_CALL_TIMEOUT = "call-timeout"
_TRACE_REFUSED = "trace-refused"
_FIRST_PAUSE, _LONGEST_PAUSE = 0.0002, 0.005
_TRIES_IN_A_ROW = 100
_RUN_SECONDS = 0.00005
_RED_ZONE = 128
_ROOM_TO_CALL = 64 * 1024
_SCANNED_STACK = 64 * 1024
_STOP_SECONDS = 0.5
_RESTART_SYSCALL = 219
_RESTARTED_BY_BLOCK = frozenset({7, 35, 202, 230})  # poll, nanosleep, futex, clock_nanosleep
_DEFAULT_MXCSR = 0x1F80
_FAULTS = frozenset({4, 5, 7, 8, 11, 31})  # SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGSEGV, SIGSYS
_ABORT = 6
_SI_TKILL = -6
_BLOCKED = _ALL_BITS & ~sum(1 << (number - 1) for number in _FAULTS)
# Trap flag, direction flag, alignment check: none of them belongs into code that is not the thread's own.
_FOREIGN_FLAGS = 0x100 | 0x400 | 0x40000

_CALL_RETURN = b"\x0f\x05\xc3"  # syscall; ret
_SIGRETURN = (
    b"\x48\xc7\xc0\x0f\x00\x00\x00\x0f\x05",  # mov $15, %rax; syscall
    b"\xb8\x0f\x00\x00\x00\x0f\x05",  # mov $15, %eax; syscall
)
_POP_RETURN = b"\x58\xc3"  # pop %rax; ret
# syscall; again: mov $15, %eax; syscall; jmp again
_WHOLE_STUB = b"\x0f\x05\xb8\x0f\x00\x00\x00\x0f\x05\xeb\xf7"


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
class _Way:
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


class Borrowing:
    """The borrowed calls of one target."""

    def __init__(self, pid: int, memory: Memory, lingering: Lingering) -> None:
        self._pid = pid
        self._memory = memory
        self._lingering = lingering
        self.trusts_filters = False  # of seccomp, where we cannot read them
        self._unused_code: set[int] = set()
        self._ways: dict[tuple[tuple[int, int, str, int], ...], _Way | None] = {}

    def run(self, steps: tuple[Step, ...], mappings: Sequence[Mapping], terms: Terms) -> tuple[int, ...]:
        """Do `steps` on some thread; see Target.inject."""
        check_steps(steps)
        if not steps:
            return ()
        if terms.code is None and (len(steps) != 1 or not isinstance(steps[0], SystemCall)):
            raise ValueError("without memory for a stub, only one system call can be done")
        self._refuse_confined()
        deadline = time.monotonic() + terms.wait
        pause, tries = _FIRST_PAUSE, 1
        while True:
            reasons, confined = [], []
            for tid in self._candidates():
                try:
                    if terms.code is not None and terms.code not in self._unused_code:
                        self._check_code_unused(terms, mappings)
                    return self._run_on(tid, steps, mappings, terms, tries)
                except Unsuitable as error:
                    reasons.append(f"thread {tid} {error}")
                    confined += [reasons[-1]] if isinstance(error, Confined) else []
            if confined and len(confined) == len(reasons):
                raise _all_confined(self._pid, confined[0])
            if not reasons:
                raise TargetGone(f"process {self._pid} has ended")
            if time.monotonic() > deadline:
                raise _none_to_borrow(self._pid, reasons)
            # Never in step with what the program does.
            time.sleep(pause * (0.5 + random.random()))
            pause, tries = min(1.5 * pause, _LONGEST_PAUSE), _TRIES_IN_A_ROW

    def uses(self, code: int, stack: tuple[int, int] | None, mappings: Sequence[Mapping]) -> bool:
        """Whether some thread still runs a stub at `code` or is on `stack`, or may (it cannot be looked at)."""
        try:
            self._check_code_unused(Terms(code, 0, 0, stack=stack), mappings)
        except Unsuitable:
            return True
        return False

    def run_standing(
        self, tracee: Tracee, steps: tuple[Step, ...], mappings: Sequence[Mapping], terms: Terms
    ) -> tuple[int, ...]:
        """Do `steps` on a thread that stands still, with all others, and goes on standing; see Target.call_standing."""
        check_steps(steps)
        assert terms.code is not None
        try:
            if tracee.signal or not tracee.standing:
                raise Unsuitable("is about to handle a signal")
            self._check_unconfined(tracee, steps, terms)
            self._check_suitable(tracee, mappings, terms)
            return self._run_stub(_Loan(self._pid, self._memory, tracee, steps, terms), mappings, terms.code)
        except Confined as error:
            raise _all_confined(self._pid, f"thread {tracee.tid} {error}") from None
        except Unsuitable as error:
            raise _none_to_borrow(self._pid, [f"thread {tracee.tid} {error}"]) from None

    def _candidates(self) -> list[int]:
        return sorted(list_threads(self._pid), key=lambda tid: tid != self._pid)

    def _run_on(
        self, tid: int, steps: tuple[Step, ...], mappings: Sequence[Mapping], terms: Terms, tries: int
    ) -> tuple[int, ...]:
        way = self._find_way(mappings) if terms.code is None else None
        with self._standing(tid) as tracee:
            self._bring_to_event_stop(tracee)
            self._check_unconfined(tracee, steps, terms)
            self._await_suitable(tracee, mappings, terms, tries)
            loan = _Loan(self._pid, self._memory, tracee, steps, terms)
            if terms.code is not None:
                return self._run_stub(loan, mappings, terms.code)
            if way is not None:
                return loan.run_call(mappings, way)
            with self._written_stub(mappings) as start:
                return loan.run_call(mappings, _Way(start, ()))

    def _run_stub(self, loan: _Loan, mappings: Sequence[Mapping], code: int) -> tuple[int, ...]:
        try:
            return loan.run_stub(mappings, code)
        finally:
            if loan.away:  # it comes back by itself: until then nobody may write to the stub
                self._unused_code.discard(code)

    @contextmanager
    def _standing(self, tid: int) -> Iterator[Tracee]:
        with ExitStack() as stack:
            try:
                tracee = stack.enter_context(stopped_thread(self._pid, tid, self._lingering, _STOP_SECONDS))
            except TargetBusy as error:
                raise Unsuitable(f"cannot be stopped ({error.message})") from error
            except TargetGone as error:
                raise Unsuitable("has ended") from error
            yield tracee

    def _bring_to_event_stop(self, tracee: Tracee) -> None:
        # Registers may only be replaced where the kernel will still decide about restarting the call. A signal
        # that was on its way is delivered first: the thread then stands at the start of its handler.
        deadline = time.monotonic_ns() + int(_STOP_SECONDS * 1e9)
        while tracee.signal:
            tracee.interrupt()
            tracee.resume()
            if tracee.wait(deadline) in (Halt.GONE, Halt.ZOMBIE):
                raise Unsuitable("has ended")
            conceal_interruption(tracee)
        if not tracee.standing:
            raise Unsuitable("does not stop")

    def _await_suitable(self, tracee: Tracee, mappings: Sequence[Mapping], terms: Terms, tries: int) -> None:
        # A thread that is busy in the allocator leaves it every other microsecond: far too quick to be met between
        # two calls by one stop every few milliseconds.
        while True:
            try:
                self._check_suitable(tracee, mappings, terms)
                return
            except Unsuitable:
                tries -= 1
                if not tries or terms.objection is None or tracee.grouped or is_restarting(tracee.registers):
                    raise
            self._let_run(tracee)

    def _let_run(self, tracee: Tracee) -> None:
        until = time.perf_counter() + random.random() * _RUN_SECONDS
        tracee.resume()
        while time.perf_counter() < until:
            pass
        tracee.interrupt()
        if tracee.wait(time.monotonic_ns() + int(_STOP_SECONDS * 1e9)) in (Halt.GONE, Halt.ZOMBIE):
            raise Unsuitable("has ended")
        conceal_interruption(tracee)
        self._bring_to_event_stop(tracee)

    def _check_suitable(self, tracee: Tracee, mappings: Sequence[Mapping], terms: Terms) -> None:
        registers = tracee.registers
        if registers.cs != 0x33:
            raise Unsuitable("runs 32-bit code just now")
        if self._in_restartable_sequence(tracee):
            raise Unsuitable("is inside a restartable sequence")
        if self._is_lent(registers.rip, registers.rsp, terms, mappings):
            raise Unsuitable("still runs the stub of an earlier call")
        if terms.errno_location and not self._has_control_block(registers.fs_base):
            raise Unsuitable("has no thread-local storage")
        objection = terms.objection(described_thread(tracee)) if terms.objection is not None else ""
        if objection:
            raise Unsuitable(objection)

    def _check_unconfined(self, tracee: Tracee, steps: Sequence[Step], terms: Terms) -> None:
        calls = [_as_call(step) for step in (*steps, *terms.planned) if isinstance(step, SystemCall)]
        reason = confinement(tracee, calls, trusted=self.trusts_filters)
        if reason:
            raise Confined(reason)

    def _has_control_block(self, base: int) -> bool:
        # The ABI's word at %fs:0 points to itself; a thread made by a raw clone may have none.
        return self._memory.read_available(base, 8) == struct.pack("<Q", base)

    def _is_lent(self, pc: int, sp: int, terms: Terms, mappings: Sequence[Mapping]) -> bool:
        return terms.uses_stack(sp) or (terms.code is not None and self._uses_code(pc, sp, terms.code, mappings))

    def _in_restartable_sequence(self, tracee: Tracee) -> bool:
        area = tracee.restartable_sequence()
        if not area:
            return False
        sequence = self._memory.read_u64(area + 8)
        if not sequence:
            return False
        start, length = struct.unpack("<QQ", self._memory.read(sequence + 8, 16))
        return bool(start <= tracee.registers.rip < start + length)

    def _uses_code(self, pc: int, sp: int, code: int, mappings: Sequence[Mapping]) -> bool:
        if code <= pc < code + CODE_SIZE:
            return True
        stack = next((mapping for mapping in mappings if sp in mapping), None)
        if stack is None or not stack.readable:
            return False
        begin = sp & ~7
        data = self._memory.read(begin, min(stack.end - begin, _SCANNED_STACK) & ~7)
        return any(code < word < code + CODE_SIZE for (word,) in struct.iter_unpack("<Q", data))

    def _check_code_unused(self, terms: Terms, mappings: Sequence[Mapping]) -> None:
        # A stub of a controller that died may still be running on some thread; later ones are only ours.
        for tid in list_threads(self._pid):
            try:
                with stopped_thread(self._pid, tid, self._lingering, _STOP_SECONDS) as tracee:
                    used = self._is_lent(tracee.registers.rip, tracee.registers.rsp, terms, mappings)
            except TargetGone:
                continue
            except TargetBusy as error:
                raise Unsuitable(f"cannot be stopped ({error.message})") from error
            if used:
                raise Unsuitable(f"must wait: thread {tid} still runs a call that an earlier patcher left to it")
        assert terms.code is not None
        self._unused_code.add(terms.code)

    def _refuse_confined(self) -> None:
        if "shstk" in read_status(self._pid).get("x86_Thread_features", ""):
            raise Forbidden(
                f"process {self._pid} runs with a shadow stack, which ends it when a borrowed thread returns",
                "start it with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off",
                code="shadow-stack",
            )

    def _find_way(self, mappings: Sequence[Mapping]) -> _Way | None:
        texts = [mapping for mapping in mappings if _holds_program_text(mapping)]
        texts.sort(key=lambda mapping: mapping.path != "[vdso]")
        key = tuple((m.start, m.end, m.device, m.inode) for m in texts)
        known = self._ways.get(key)  # searching all code takes longer than everything else that a call needs
        if known is None or self._memory.read_available(known.start, len(_CALL_RETURN)) != _CALL_RETURN:
            known = self._search_way(texts)
            self._ways = {key: known}
        return known

    def _search_way(self, texts: Sequence[Mapping]) -> _Way | None:
        found: dict[bytes, int] = {}
        for mapping in texts:
            data = self._memory.read(mapping.start, mapping.size)
            for pattern in (_CALL_RETURN, *_SIGRETURN, _POP_RETURN):
                position = data.find(pattern)
                if position >= 0:
                    found.setdefault(pattern, mapping.start + position)
            way = _way(found)
            if way is not None:
                return way
        return None

    @contextmanager
    def _written_stub(self, mappings: Sequence[Mapping]) -> Iterator[int]:
        for mapping in mappings:
            if not _holds_program_text(mapping) or mapping.path == "[vdso]":
                continue
            start = mapping.end - 16
            before = self._memory.read(start, 16)
            left_behind = before.startswith(_WHOLE_STUB)
            if any(before) and not left_behind:
                continue
            if not left_behind:
                self._memory.write(start, _WHOLE_STUB)
            yield start
            # Only now, with the thread back in its own code; and never what an earlier patcher left behind,
            # since a thread that it borrowed may still be there. In the padding it is in nobody's way.
            if not left_behind:
                self._memory.write(start, before)
            return
        raise Unsuitable("has no instructions in its program with which a system call could be done")


class _Loan:
    """One thread, standing at an event stop, lent for `steps`. `away` is true while it is not in its own code."""

    def __init__(self, pid: int, memory: Memory, tracee: Tracee, steps: tuple[Step, ...], terms: Terms) -> None:
        self.pid = pid
        self.memory = memory
        self.tracee = tracee
        self.steps = steps
        self.terms = terms
        self.away = False
        self.results = 0
        self.own = _copied(tracee.registers)
        self.alone = _as_left_alone(tracee.registers, memory)
        self.mask = tracee.read_signal_mask()
        self.vector_state = tracee.read_vector_state()

    def run_call(self, mappings: Sequence[Mapping], way: _Way) -> tuple[int, ...]:
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

        self.results = layout.results
        self._travel(self._departing(code, layout.frame), layout.frame, 0, collect)
        return _interpreted(self.steps, values)

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
        image[vectors - bottom : vectors - bottom + len(floating)] = floating
        image[frame - bottom : frame - bottom + FRAME_SIZE] = signal_frame(self.alone, self.mask, vectors)
        struct.pack_into(f"<{len(chain)}Q", image, 0, *chain)
        return _Layout(bottom, frame, results, tuple(addresses), bytes(image))

    def _travel(self, away: Registers, frame: int, call_sp: int, collect: Callable[[], None] | None = None) -> int:
        """Send the thread away and bring it back; return rax of the last system call seen at `call_sp`."""
        tracee = self.tracee
        deadline = time.monotonic_ns() + int(self.terms.timeout * 1e9)
        # Registers first: should we die before the mask, the stub runs under the thread's own mask.
        self.away = True
        try:
            self._still_there(tracee.write_registers(away))
            self._still_there(tracee.write_signal_mask(_BLOCKED))
            last = self._await_return(frame, call_sp, deadline)
            self._call_off_sigreturn()
            if collect is not None:
                collect()
            self._restore(self.own)
        except PatcherError as error:
            # Left alone it comes back too, but where no stub tells, who goes on would not know when. In the middle of a
            # stub it must be left alone: what one step opened a later one closes.
            if error.code == _TRACE_REFUSED and collect is None:
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
        self._still_there(tracee.read_registers())
        self.away = False
        if bytes(tracee.registers) != bytes(registers):
            raise PatcherError(f"the registers of thread {tracee.tid} of process {self.pid} are not what was put back")

    def _abandon(self) -> None:
        self._come_to_event_stop()
        if self.terms.errno_location:
            place, value = struct.unpack("<QQ", self.memory.read(self.results + 8 * len(self.steps) + 8, 16))
            if place:
                self.memory.write(place, struct.pack("<I", value))
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


def _as_call(step: SystemCall) -> Call:
    return step.number, tuple(argument & _ALL_BITS if isinstance(argument, int) else None for argument in step.args)


def _all_confined(pid: int, reason: str) -> Forbidden:
    return Forbidden(
        f"process {pid} cannot be made to do what is needed: {reason}",
        "run patcher as root, who may read the filters; or try it all the same with --force"
        if "may not read" in reason
        else "let its filters allow that, or restart it with the new code",
    )


def _none_to_borrow(pid: int, reasons: Sequence[str]) -> TargetBusy:
    more = f" (and {len(reasons) - 3} more)" if len(reasons) > 3 else ""
    return TargetBusy(
        f"no thread of process {pid} can be borrowed for a call: {'; '.join(reasons[:3])}{more}",
        "try again when the program is idle",
    )


def _way(found: dict[bytes, int]) -> _Way | None:
    call = found.get(_CALL_RETURN)
    if call is None:
        return None
    for pattern in _SIGRETURN:
        if pattern in found:
            return _Way(call, (found[pattern],))
    if _POP_RETURN in found:
        return _Way(call, (found[_POP_RETURN], RT_SIGRETURN, call))
    return None


def _holds_program_text(mapping: Mapping) -> bool:
    return mapping.executable and mapping.readable and (mapping.inode != 0 or mapping.path == "[vdso]")


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
