"""Borrowing: raw system calls and functions of the target, run on one of its own threads.

Decides which thread, and when memory of ours that one was sent through may be used again. How a thread is sent and
comes back is `loan`. Does not decide what is called, nor whether a function is safe to call there (`accept` of the
caller does).

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

import random
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from patcher.errors import Forbidden, TargetBusy, TargetGone
from patcher.target.confined import Call, confinement
from patcher.target.loan import CODE_SIZE, Confined, Loan, Terms, Unsuitable, Way
from patcher.target.maps import Mapping
from patcher.target.memory import Memory
from patcher.target.process import read_status
from patcher.target.steps import Step, SystemCall, check_steps
from patcher.target.stop import (
    Lingering,
    conceal_interruption,
    described_thread,
    is_restarting,
    list_threads,
    stopped_thread,
)
from patcher.target.tracing import Halt, Tracee
from patcher.target.ways import Ways

_ALL_BITS = (1 << 64) - 1
_FIRST_PAUSE, _LONGEST_PAUSE = 0.0002, 0.005
_TRIES_IN_A_ROW = 100
_RUN_SECONDS = 0.00005
_SCANNED_STACK = 64 * 1024
_STOP_SECONDS = 0.5


class Borrowing:
    """The borrowed calls of one target."""

    def __init__(self, pid: int, memory: Memory, lingering: Lingering) -> None:
        self._pid = pid
        self._memory = memory
        self._lingering = lingering
        self.trusts_filters = False  # of seccomp, where we cannot read them
        self._unused_code: set[int] = set()
        self._left_alone: dict[int, list[Loan]] = {}
        self._ways = Ways(memory)

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
        if code in self._unused_code:
            return False
        try:
            self._check_code_unused(Terms(code, 0, 0, stack=stack), mappings)
        except Unsuitable:
            return True
        return False

    def left_alone(self, code: int) -> bool:
        """Whether a thread that we left alone in the middle of a stub at `code` has not done its steps yet."""
        under_way = [loan for loan in self._left_alone.pop(code, []) if loan.is_under_way()]
        if under_way:
            self._left_alone[code] = under_way
        return bool(under_way)

    def distrust(self) -> None:
        """Look again whether a thread runs a stub before its memory is used: another patcher may have been here."""
        self._unused_code.clear()

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
            return self._run_stub(Loan(self._pid, self._memory, tracee, steps, terms), mappings, terms.code)
        except Confined as error:
            raise _all_confined(self._pid, f"thread {tracee.tid} {error}") from None
        except Unsuitable as error:
            raise _none_to_borrow(self._pid, [f"thread {tracee.tid} {error}"]) from None

    def _candidates(self) -> list[int]:
        return sorted(list_threads(self._pid), key=lambda tid: tid != self._pid)

    def _run_on(
        self, tid: int, steps: tuple[Step, ...], mappings: Sequence[Mapping], terms: Terms, tries: int
    ) -> tuple[int, ...]:
        way = self._ways.find(mappings) if terms.code is None else None
        with self._standing(tid) as tracee:
            self._bring_to_event_stop(tracee)
            self._check_unconfined(tracee, steps, terms)
            self._await_suitable(tracee, mappings, terms, tries)
            loan = Loan(self._pid, self._memory, tracee, steps, terms)
            if terms.code is not None:
                return self._run_stub(loan, mappings, terms.code)
            if way is not None:
                return loan.run_call(mappings, way)
            with self._ways.written_stub(mappings) as start:
                return loan.run_call(mappings, Way(start, ()))

    def _run_stub(self, loan: Loan, mappings: Sequence[Mapping], code: int) -> tuple[int, ...]:
        try:
            return loan.run_stub(mappings, code)
        finally:
            if loan.away:  # it comes back by itself: until then nobody may write to the stub
                self._unused_code.discard(code)
                self._left_alone.setdefault(code, []).append(loan)

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
        assert terms.code is not None
        if self.left_alone(terms.code):
            raise Unsuitable("must wait: a call that was left to a thread is not done yet")
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
        self._unused_code.add(terms.code)

    def _refuse_confined(self) -> None:
        if "shstk" in read_status(self._pid).get("x86_Thread_features", ""):
            raise Forbidden(
                f"process {self._pid} runs with a shadow stack, which ends it when a borrowed thread returns",
                "start it with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off",
                code="shadow-stack",
            )


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
