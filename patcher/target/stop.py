"""Stopping: all threads of the target, or one, standing still for the length of a block.

Decides how threads are found, stopped, and let go so that the program does not notice. Does not decide what
is done meanwhile. Nothing is attached in the sense of PTRACE_ATTACH: threads are seized (no pause), then
interrupted. What the program could notice, and how it does not:

- a signal that was on its way to a thread is given back in PTRACE_DETACH, with its siginfo;
- a thread in a group stop (Ctrl-Z) falls back into it on detach;
- a few system calls report EINTR after any stop: their result is turned into ERESTARTNOHAND, which makes
  the kernel restart the call, unless a handler of the program is about to run, which sees EINTR as always;
- the kernel goes on with others (nanosleep, poll) by a system call of its own, restart_syscall, which a seccomp
  filter may kill for: then the call is restarted in the same way, with all of its time.

Specification: ptrace(2); signal(7), "Interruption of system calls and library functions by stop signals".
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass

from patcher.errors import AttachDenied, PatcherError, TargetBusy, TargetGone
from patcher.target.confined import may_resume_call
from patcher.target.process import command_name, read_status, tracer_of
from patcher.target.quiet import ahead, uninterrupted
from patcher.target.tracing import Halt, Registers, Tracee, thread_state

STOP_SECONDS = 2.0

_UNSIGNED = 1 << 64
EINTR = _UNSIGNED - 4
ERESTARTSYS = _UNSIGNED - 512
ERESTARTNOINTR = _UNSIGNED - 513
ERESTARTNOHAND = _UNSIGNED - 514
ERESTART_RESTARTBLOCK = _UNSIGNED - 516

_RESTARTED = frozenset({ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK})

# System calls that a mere stop may end with EINTR (x86-64 numbers): epoll_wait, epoll_pwait, epoll_pwait2;
# recvfrom, recvmsg, recvmmsg, sendto, sendmsg, sendmmsg, accept, accept4, connect, read, write, readv, writev
# (sockets with a time-out); rt_sigtimedwait; semop, semtimedop; io_uring_enter.
REPORTS_EINTR = frozenset(
    {232, 281, 441, 45, 47, 299, 44, 46, 307, 43, 288, 42, 0, 1, 19, 20, 128, 65, 220, 426}
)  # fmt: skip

_TRAP = 5


@dataclass(frozen=True, slots=True)
class StoppedThread:
    """A thread that stands still: its number, program counter and stack pointer.

    `general` holds its general registers in DWARF's order (psABI figure 3.36: rax, rdx, rcx, rbx, rsi, rdi, rbp,
    rsp, r8 ... r15, rip), where they were asked for; `waiting` tells whether it is inside a system call that the
    kernel makes anew by itself.
    """

    tid: int
    pc: int
    sp: int
    general: tuple[int, ...] = ()
    waiting: bool = False


class Stopped:
    """All threads of the target while they stand still.

    `duration_ns` is 0 during the block and afterwards the time from the first interruption to the last release.
    """

    def __init__(self, pid: int, tracees: list[Tracee]) -> None:
        self._pid = pid
        self._tracees = {tracee.tid: tracee for tracee in tracees}
        self._threads: tuple[StoppedThread, ...] | None = None
        self.duration_ns = 0

    @property
    def threads(self) -> tuple[StoppedThread, ...]:
        """The threads where they stand now; what has to be quick takes `counters` and `pointers`."""
        if self._threads is None:
            self._threads = tuple(_thread(tracee) for tracee in self._tracees.values())
        return self._threads

    def counters(self) -> list[int]:
        """Return the program counters of `threads`."""
        return [tracee.registers.rip for tracee in self._tracees.values()]

    def pointers(self) -> list[int]:
        """Return the stack pointers of `threads`."""
        return [tracee.registers.rsp for tracee in self._tracees.values()]

    @property
    def a_thread(self) -> int:
        """The number of one of the threads."""
        return next(iter(self._tracees))

    def described(self) -> tuple[StoppedThread, ...]:
        """Return the threads with their general registers."""
        return tuple(described_thread(tracee) for tracee in self._tracees.values())

    def tracee(self, tid: int) -> Tracee:
        """Return what traces one of the threads."""
        return self._tracees[tid]

    def step(self, tid: int, *, seconds: float = 0.1) -> StoppedThread:
        """Let one thread execute one instruction, the others standing still; return where it is now.

        A thread blocked in a system call does not move; one that makes a system call which blocks is stopped
        again after `seconds`. A signal that arrives instead of the step is kept for the thread, which then does
        not move either; the next step enters its handler.
        Raises TargetGone when the thread ended, PatcherError for an unknown one.
        """
        tracee = self._tracees.get(tid)
        if tracee is None:
            raise PatcherError(f"thread {tid} is not one of the stopped threads of process {self._pid}")
        if is_restarting(tracee.registers) and not tracee.signal:
            return _thread(tracee)
        if not tracee.step() or not _await_step(tracee, seconds):
            raise TargetGone(f"thread {tid} of process {self._pid} ended while it was stepped")
        conceal_interruption(tracee)
        self._threads = None
        return _thread(tracee)


class Lingering:
    """Threads that we seized and that neither stopped nor ended in time; let go as soon as they do either.

    The kernel lets a thread go only while it stands still (or when our own thread ends). `held` are the threads
    of the block that is open just now. `same` tells whether the process is still the one that was meant: numbers are
    given anew, and the kernel lets threads be traced by number only.
    """

    def __init__(self, same: Callable[[], bool] = lambda: True) -> None:
        self.same = same
        self.held: Mapping[int, Tracee] = {}
        self._tracees: list[Tracee] = []

    def standing(self) -> Tracee | None:
        """Return a thread that stands still for the open block, if there is one."""
        return next((tracee for tracee in self.held.values() if tracee.standing), None)

    def add(self, tracee: Tracee) -> None:
        """Take over a thread that could not be let go."""
        self._tracees.append(tracee)

    def settle(self) -> None:
        """Let go whoever can be let go by now; never waits."""
        if self._tracees:
            self._tracees = [tracee for tracee in self._tracees if not _settled(tracee, 0.0)]


def conceal_interruption(tracee: Tracee) -> None:
    """Read a stopped thread's registers, and undo at once what the stop did to its system call, if anything."""
    if not tracee.read_registers():
        return
    registers = tracee.registers
    shown = registers.rax == EINTR and registers.orig_rax in REPORTS_EINTR
    if shown or (registers.rax == ERESTART_RESTARTBLOCK and not may_resume_call(tracee)):
        registers.rax = ERESTARTNOHAND
        tracee.write_registers(registers)


def is_restarting(registers: Registers) -> bool:
    """Whether a stopped thread is inside a system call that the kernel will make anew by itself."""
    return registers.rax in _RESTARTED and registers.orig_rax < 1 << 63


@contextmanager
def stopped_process(pid: int, lingering: Lingering, seconds: float = STOP_SECONDS) -> Iterator[Stopped]:
    """Stop every thread of a process for the length of the block, and let go all of them whatever happens.

    Raises TargetGone when it ended, TargetBusy naming the thread and its state when one does not stop within
    `seconds` or someone else traces it, AttachDenied when the kernel does not permit it.
    """
    lingering.settle()
    _await_interruptible(pid, list_threads(pid), seconds)
    with uninterrupted():
        gathering = _Gathering(pid, lingering)
        try:
            stopped = gathering.gather(seconds)
            yield stopped
        finally:
            duration = gathering.release()
        stopped.duration_ns = duration


@contextmanager
def stopped_thread(pid: int, tid: int, lingering: Lingering, seconds: float = STOP_SECONDS) -> Iterator[Tracee]:
    """Stop one thread for the length of the block; raises as `stopped_process` does."""
    lingering.settle()
    _await_interruptible(pid, [tid], seconds)
    with uninterrupted():
        gathering = _Gathering(pid, lingering)
        try:
            tracee = gathering.gather_one(tid, seconds)
            yield tracee
        finally:
            gathering.release()


def list_threads(pid: int) -> list[int]:
    """Return the thread numbers of a process; empty when it is gone."""
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _thread_count(pid: int) -> int:
    try:
        return os.stat(f"/proc/{pid}/task").st_nlink - 2
    except (FileNotFoundError, ProcessLookupError):
        return 0


class _Gathering:
    """The threads seized so far, in the order in which they were found."""

    def __init__(self, pid: int, lingering: Lingering) -> None:
        self.pid = pid
        self.lingering = lingering
        self.tracees: dict[int, Tracee] = {}
        self.refused: dict[int, int] = {}
        self.started = 0
        lingering.held = self.tracees

    def gather(self, seconds: float) -> Stopped:
        for _ in range(4):
            if not self._seize_new():
                break
        self._start()
        deadline = self.started + int(seconds * 1e9)
        self._stop(list(self.tracees.values()), deadline)
        while not self._is_complete():
            if time.monotonic_ns() > deadline:
                raise TargetBusy(f"the threads of process {self.pid} come and go too fast to stop all of them")
            self._stop(self._seize_new(), deadline)
            self._refuse_untraceable()
        standing = [tracee for tracee in self.tracees.values() if tracee.standing]
        if not standing or not self.lingering.same():
            raise TargetGone(f"process {self.pid} has ended")
        return Stopped(self.pid, standing)

    def _stop(self, tracees: list[Tracee], deadline: int) -> None:
        with self._in_haste():
            for tracee in tracees:
                tracee.interrupt()
        for tracee in tracees:
            self._await_stop(tracee, deadline)

    def _is_complete(self) -> bool:
        # While threads end, a directory listing may leave out living ones (the kernel cannot go on from an entry
        # that has vanished). So count: if there are as many threads as we know to be still there, there are no
        # others. A zombie counts if it is there after the counting too.
        listed = list_threads(self.pid)
        count = _thread_count(self.pid)
        if len(listed) != count:
            return False
        if self.tracees.keys() == set(listed) and all(tracee.standing for tracee in self.tracees.values()):
            return True
        if not {tid for tid, tracee in self.tracees.items() if tracee.standing}.issubset(listed):
            raise TargetBusy(f"a thread of process {self.pid} ended, and its number was given away", "try again")
        rest = [tid for tid in listed if tid not in self.tracees or not self.tracees[tid].standing]
        return all(thread_state(self.pid, tid) == "Z" for tid in rest)

    def gather_one(self, tid: int, seconds: float) -> Tracee:
        tracee = Tracee(self.pid, tid)
        if not self._seize(tracee):
            self._refuse_untraceable()
            raise TargetGone(f"thread {tid} of process {self.pid} has ended")
        self._start()
        tracee.interrupt()
        self._await_stop(tracee, self.started + int(seconds * 1e9))
        if not tracee.standing or not self.lingering.same() or not os.path.isdir(f"/proc/{self.pid}/task/{tid}"):
            raise TargetGone(f"thread {tid} of process {self.pid} has ended")
        return tracee

    def release(self) -> int:
        tracees = list(self.tracees.values())
        with self._in_haste():
            left = [t for t in tracees if not (t.standing and (t.detach() or (t.standing and t.detach())))]
            ended = time.monotonic_ns()
        for tracee in left:
            with suppress(PatcherError):  # the request may be what failed
                tracee.interrupt()
            if not _settled(tracee, 0.02):
                self.lingering.add(tracee)
            ended = time.monotonic_ns()
        self.lingering.held = {}
        return ended - self.started if self.started else 0

    def _in_haste(self) -> AbstractContextManager[None]:
        # Each that wakes would take our processor, and the others would stand still for longer.
        return ahead() if len(self.tracees) > 1 else nullcontext()

    def _start(self) -> None:
        self.started = time.monotonic_ns()

    def _seize_new(self) -> list[Tracee]:
        fresh = []
        for tid in list_threads(self.pid):
            if tid not in self.tracees:
                tracee = Tracee(self.pid, tid)
                if self._seize(tracee):
                    fresh.append(tracee)
        return fresh

    def _seize(self, tracee: Tracee) -> bool:
        error = tracee.seize()
        if error:
            self.refused[tracee.tid] = error
            return False
        self.refused.pop(tracee.tid, None)
        self.tracees[tracee.tid] = tracee
        return True

    def _await_stop(self, tracee: Tracee, deadline: int) -> None:
        halt = tracee.wait(deadline)
        if halt is Halt.LATE:
            state = thread_state(self.pid, tracee.tid)
            raise TargetBusy(
                f"thread {tracee.tid} of process {self.pid} does not stop: it is in state {state}"
                + (" (uninterruptible, as while waiting for a disk or for a vfork child)" if state == "D" else ""),
                "try again when it has left that state",
            )
        if tracee.standing:
            conceal_interruption(tracee)
        elif halt is Halt.GONE:
            del self.tracees[tracee.tid]  # Its number may be given to a new thread.

    def _refuse_untraceable(self) -> None:
        for tid, error in self.refused.items():
            if error == errno.EPERM and thread_state(self.pid, tid) not in "ZX":
                raise untraceable(self.pid, tid)


def untraceable(pid: int, tid: int) -> PatcherError:
    """Say why a living thread cannot be seized: someone else traces it, or the kernel does not permit it."""
    tracer = tracer_of(pid, tid)
    if tracer:
        return TargetBusy(
            f"thread {tid} of process {pid} is being traced by process {tracer} ({command_name(tracer)})",
            "a process has one tracer at a time; detach it, then try again",
        )
    return AttachDenied(f"the kernel does not permit to trace thread {tid} of process {pid}")


def _await_interruptible(pid: int, threads: Sequence[int], seconds: float) -> None:
    # A thread that is seized and then does not stop cannot be let go: look before. A thread that leaves the
    # state D once is only busy with its disk and will stop; one that never does waits for something else.
    deadline = time.monotonic() + seconds
    sleeping = [tid for tid in threads if thread_state(pid, tid) == "D"]
    while sleeping:
        if time.monotonic() > deadline:
            raise TargetBusy(
                f"thread {sleeping[0]} of process {pid} cannot be stopped: it is in state D "
                "(uninterruptible, as while waiting for a disk or for a vfork child)",
                "try again when it has left that state",
            )
        time.sleep(0.001)
        sleeping = [tid for tid in sleeping if thread_state(pid, tid) == "D"]


def _await_step(tracee: Tracee, seconds: float) -> bool:
    if tracee.wait(time.monotonic_ns() + int(seconds * 1e9)) is Halt.LATE:
        limit = time.monotonic_ns() + int(STOP_SECONDS * 1e9)
        tracee.interrupt()
        tracee.wait(limit)
        # The step of an interrupted system call is reported after the interruption; left pending, it kills.
        if tracee.standing and is_signal_pending(tracee.pid, tracee.tid, _TRAP) and tracee.resume():
            tracee.wait(limit)
    if tracee.standing and tracee.signal == _TRAP:
        tracee.signal = 0
    return tracee.standing


def is_signal_pending(pid: int, tid: int, number: int) -> bool:
    """Whether a signal waits for this very thread (not for the process as a whole)."""
    return bool(int(read_status(pid, tid).get("SigPnd", "0"), 16) >> (number - 1) & 1)


def described_thread(tracee: Tracee) -> StoppedThread:
    """Return a stopped thread with its general registers."""
    r = tracee.registers
    low = (r.rax, r.rdx, r.rcx, r.rbx, r.rsi, r.rdi, r.rbp, r.rsp)
    general = (*low, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rip)
    return StoppedThread(tracee.tid, r.rip, r.rsp, general, is_restarting(r))


def _thread(tracee: Tracee) -> StoppedThread:
    return StoppedThread(tracee.tid, tracee.registers.rip, tracee.registers.rsp)


def _settled(tracee: Tracee, seconds: float) -> bool:
    halt = Halt.LATE if tracee.standing else tracee.wait(time.monotonic_ns() + int(seconds * 1e9))
    if tracee.standing:
        with suppress(PatcherError):
            conceal_interruption(tracee)
        return tracee.detach()
    return halt is Halt.GONE
