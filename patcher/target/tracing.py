"""Tracing: single ptrace requests on single threads, and what waitpid says about them.

Decides how a request is spelled and how a wait status is understood. Does not decide when to stop whom
(`stop.py`, `borrow.py`, `loan.py`). All requests on a thread must come from the thread of ours that seized it.
Specification: ptrace(2); PTRACE_SEIZE semantics throughout, never PTRACE_ATTACH.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
import time
from enum import Enum, auto

from ptrace.binding.linux_struct import iovec_struct, user_regs_struct

from patcher.errors import PatcherError

# The binding's own function turns every answer over in Python: half as long again for a thousand threads that stand.
ptrace = ctypes.CDLL(None, use_errno=True).ptrace
ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_ulong, ctypes.c_ulong)
ptrace.restype = ctypes.c_long


class Registers(user_regs_struct):  # type: ignore[misc]
    """The general registers of a thread: struct user_regs_struct."""


_POKEDATA, _GETREGS, _SETREGS, _SINGLESTEP, _CONT, _DETACH, _SYSCALL = 5, 12, 13, 9, 7, 17, 24
_GETSIGINFO, _GETREGSET, _SETREGSET = 0x4202, 0x4204, 0x4205
_SEIZE, _INTERRUPT = 0x4206, 0x4207
_GETSIGMASK, _SETSIGMASK, _SECCOMP_GET_FILTER, _GET_RSEQ = 0x420A, 0x420B, 0x420C, 0x420F
_TRACESYSGOOD = 1
_EVENT_STOP = 128
_NT_X86_XSTATE = 0x202
_WALL = 0x40000000
_WAIT_FLAGS = _WALL | os.WNOHANG
_GONE_ERRORS = frozenset({errno.ESRCH, errno.EIO})
_JOB_STOPS = frozenset({signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})
_YIELDS = 400
_STATE_EVERY = 64
_INTERRUPTED = _EVENT_STOP << 16 | signal.SIGTRAP << 8 | 0x7F  # the status of a thread that stands where we asked it to


class Halt(Enum):
    """Why a traced thread stands still, or why it does not."""

    EVENT = auto()
    GROUP = auto()
    SIGNAL = auto()
    SYSCALL = auto()
    GONE = auto()
    ZOMBIE = auto()
    LATE = auto()


class Tracee:
    """One thread of the target while we trace it.

    `signal` is the signal that a signal-delivery-stop took from the thread and that must go back to it;
    `grouped` tells that it stands still because its job is stopped; `exit_status` is its raw wait status if it
    ended under our hands.
    """

    __slots__ = ("exit_status", "grouped", "pid", "registers", "registers_address", "signal", "standing", "tid")

    def __init__(self, pid: int, tid: int) -> None:
        self.pid = pid
        self.tid = tid
        self.registers = Registers()
        self.registers_address = ctypes.addressof(self.registers)
        self.signal = 0
        self.standing = False
        self.grouped = False
        self.exit_status: int | None = None

    def seize(self) -> int:
        """Begin to trace without stopping; return 0 or the errno of the kernel."""
        return 0 if ptrace(_SEIZE, self.tid, 0, _TRACESYSGOOD) != -1 else ctypes.get_errno()

    def interrupt(self) -> None:
        """Ask for a stop; a thread that has just ended is no error (the wait will tell)."""
        _unless_gone(_INTERRUPT, self.tid, 0, 0)

    def resume(self, *, to_syscall: bool = False) -> bool:
        """Let the thread run on with the signal it is owed; false when it is gone."""
        return self._run(_SYSCALL if to_syscall else _CONT)

    def step(self) -> bool:
        """Let the thread execute one instruction; false when it is gone."""
        return self._run(_SINGLESTEP)

    def detach(self) -> bool:
        """End tracing, handing the thread the signal it is owed; false when it is gone, or still ours (`standing`)."""
        try:
            detached = _unless_gone(_DETACH, self.tid, 0, self.signal)
        except PatcherError:
            return False
        self.standing = False
        return detached

    def wait(self, deadline: int) -> Halt:
        """Wait until the thread stops or ends, at most until `deadline` (time.monotonic_ns)."""
        rounds = 0
        while True:
            try:
                found, status = os.waitpid(self.tid, _WAIT_FLAGS)
            except ChildProcessError:
                return Halt.GONE
            if found:
                return self._understand(status)
            rounds += 1
            if rounds < _YIELDS:
                os.sched_yield()
                continue
            # A leader that called pthread_exit is reported only with its last thread: never wait for it.
            if rounds % _STATE_EVERY == 0 and thread_state(self.pid, self.tid) in "ZX":
                return Halt.ZOMBIE
            if time.monotonic_ns() > deadline:
                return Halt.LATE
            time.sleep(0.0001)

    def read_registers(self) -> bool:
        """Fill `registers`; false when the thread is gone."""
        return _unless_gone(_GETREGS, self.tid, 0, self.registers_address)

    def write_registers(self, registers: Registers) -> bool:
        """Set all general registers; false when the thread is gone."""
        return _unless_gone(_SETREGS, self.tid, 0, ctypes.addressof(registers))

    def poke(self, address: int, word: bytes) -> bool:
        """Write 8 bytes whatever the protection of their page; false when they are not mapped or the thread is gone."""
        return _unless_gone(_POKEDATA, self.tid, address, int.from_bytes(word, "little"))

    def read_vector_state(self) -> bytes:
        """Return the xsave image (standard format) of the thread's FPU and vector registers."""
        buffer = ctypes.create_string_buffer(16384)
        vector = iovec_struct()
        vector.buf, vector.len = ctypes.addressof(buffer), len(buffer)
        _ask(_GETREGSET, self.tid, _NT_X86_XSTATE, ctypes.addressof(vector))
        return buffer.raw[: vector.len]

    def write_vector_state(self, image: bytes) -> bool:
        """Set the FPU and vector registers from an image of `read_vector_state`; false when it is gone."""
        buffer = ctypes.create_string_buffer(image, len(image))
        vector = iovec_struct()
        vector.buf, vector.len = ctypes.addressof(buffer), len(buffer)
        return _unless_gone(_SETREGSET, self.tid, _NT_X86_XSTATE, ctypes.addressof(vector))

    def read_signal_mask(self) -> int:
        """Return the blocked signals, bit N-1 for signal N (the program's own, not a temporary mask)."""
        mask = ctypes.c_uint64()
        _ask(_GETSIGMASK, self.tid, 8, ctypes.addressof(mask))
        return mask.value

    def write_signal_mask(self, blocked: int) -> bool:
        """Set the blocked signals; false when the thread is gone."""
        mask = ctypes.c_uint64(blocked)
        return _unless_gone(_SETSIGMASK, self.tid, 8, ctypes.addressof(mask))

    def signal_code(self) -> int:
        """Return si_code of the signal of a signal-delivery-stop: positive when the kernel raised it."""
        info = (ctypes.c_int32 * 32)()
        _ask(_GETSIGINFO, self.tid, 0, ctypes.addressof(info))
        return int(info[2])

    def restartable_sequence(self) -> int:
        """Return the address of the thread's struct rseq, 0 if it registered none or the kernel is too old."""
        configuration = (ctypes.c_uint64 * 3)()
        size = ctypes.sizeof(configuration)
        return int(configuration[0]) if ptrace(_GET_RSEQ, self.tid, size, ctypes.addressof(configuration)) != -1 else 0

    def _run(self, request: int) -> bool:
        running = _unless_gone(request, self.tid, 0, self.signal)
        self.signal, self.standing = 0, False
        return running

    def seccomp_filters(self) -> tuple[bytes, ...]:
        """Return the seccomp filters of the thread (struct sock_filter), the oldest first.

        None either where it has none, or where we cannot read them all: that takes CAP_SYS_ADMIN.
        """
        found: list[bytes] = []
        while (count := ptrace(_SECCOMP_GET_FILTER, self.tid, len(found), 0)) != -1:
            program = ctypes.create_string_buffer(8 * count)
            if ptrace(_SECCOMP_GET_FILTER, self.tid, len(found), ctypes.addressof(program)) == -1:
                break
            found.append(program.raw)
        return tuple(found) if ctypes.get_errno() == errno.ENOENT else ()

    def _understand(self, status: int) -> Halt:
        if status == _INTERRUPTED:
            self.standing, self.grouped = True, False
            return Halt.EVENT
        if not os.WIFSTOPPED(status):
            self.exit_status = status
            if self.tid == self.pid:
                note_exit(self.pid, status)
            return Halt.GONE
        self.standing = True
        number = os.WSTOPSIG(status)
        if status >> 16 == _EVENT_STOP:
            self.grouped = number in _JOB_STOPS
            return Halt.GROUP if self.grouped else Halt.EVENT
        if number == signal.SIGTRAP | 0x80:
            return Halt.SYSCALL
        self.signal = number
        return Halt.SIGNAL


def thread_state(pid: int, tid: int) -> str:
    """Return the state letter of a thread as in /proc (R, S, D, t, Z ...), "X" when there is no such thread."""
    try:
        with open(f"/proc/{pid}/task/{tid}/stat", "rb") as stat:
            return chr(stat.read().rpartition(b")")[2].split()[0][0])
    except (FileNotFoundError, ProcessLookupError):
        return "X"


_exits: dict[int, int] = {}
_exits_lock = threading.Lock()


def note_exit(pid: int, status: int) -> None:
    """Keep the raw wait status of a process that ended while we traced it: nobody can wait for it again."""
    with _exits_lock:
        _exits[pid] = status


def noted_exit(pid: int) -> int | None:
    """Return what `note_exit` kept for a process, or None."""
    with _exits_lock:
        return _exits.get(pid)


def forget_exit(pid: int) -> None:
    """Forget an older process of this number, before a new one is waited for."""
    with _exits_lock:
        _exits.pop(pid, None)


def _unless_gone(request: int, tid: int, first: int, second: int) -> bool:
    if ptrace(request, tid, first, second) != -1:
        return True
    number = ctypes.get_errno()
    if number in _GONE_ERRORS:
        return False
    raise _refused(tid, number)


def _ask(request: int, tid: int, first: int, second: int) -> None:
    if ptrace(request, tid, first, second) == -1:
        raise _refused(tid, ctypes.get_errno())


def _refused(tid: int, number: int) -> PatcherError:
    return PatcherError(
        f"the kernel refused to let thread {tid} be traced any further: {os.strerror(number)}",
        "try again",
        code="trace-refused",
    )
