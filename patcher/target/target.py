"""Target: the live process, by one object.

Decides what the rest of patcher can ask of a process and do to it. The work is done by the modules beside
this one: `process` (whether we may), `stop` (stopping), `borrow` (calls), `memory`, `maps`, `image`.
Between the blocks the process is not traced.
"""

from __future__ import annotations

import os
import select
import struct
import time
import types
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Mapping as MappingOf
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from patcher.errors import PatcherError, TargetBusy, TargetGone, named_shortages
from patcher.target.borrow import Borrowing
from patcher.target.image import find_image, time_written
from patcher.target.loan import Terms
from patcher.target.maps import Mapping, read_mappings
from patcher.target.memory import Memory
from patcher.target.process import await_program, check_attachable, command_name, permission_denied, read_stat
from patcher.target.steps import FunctionCall, Step, SystemCall
from patcher.target.stop import (
    Lingering,
    Stopped,
    StoppedThread,
    described_thread,
    list_threads,
    stopped_process,
    stopped_thread,
)
from patcher.target.tracing import Tracee, forget_exit, noted_exit, thread_state

if TYPE_CHECKING:
    from patcher.target.pages import Pages

_LEAVING_SECONDS = 1.0
_BITE = 512  # bytes poked while one thread stands still: some 0.1 ms
_PAGE, _JUMP = 4096, 5


class Target:
    """A process that patcher works on.

    Every block and every `inject` must be used from one thread at a time; the thread that enters a block does
    all of its tracing. Close it, or use it as a context manager; closing leaves the process as it is.
    """

    def __init__(self, pid: int, pidfd: int, start_time: int, program: str, memory: int) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.start_time = start_time
        self.program = program
        self._lingering = Lingering(lambda: not _has_ended(self.pidfd))
        self.memory = Memory(pid, memory, self._poke)
        self._borrowing = Borrowing(pid, self.memory, self._lingering)

    def trust_filters(self) -> None:
        """Borrow threads under seccomp filters that we may not read as well: at worst these kill the process."""
        self._borrowing.trusts_filters = True

    @classmethod
    @named_shortages()
    def attach(cls, pid: int) -> Target:
        """Open a process without stopping or tracing it; who traces it, if anybody, is no obstacle yet.

        Raises TargetGone when there is none (or a zombie), AttachDenied when it is none that we can or may
        work on; the message says why, with the numbers.
        """
        if pid <= 0:
            raise TargetGone(f"there is no process {pid}", "process numbers are positive")
        # Held from the first look on: were the number given to another process meanwhile, this one would have ended.
        pidfd = _open_process(pid)
        try:
            check_attachable(pid)
            await_program(pid)
            forget_exit(pid)
            start_time = read_stat(pid).start_time
            program = os.readlink(f"/proc/{pid}/exe")
            memory = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
            if _has_ended(pidfd):
                os.close(memory)
                raise TargetGone(f"process {pid} has ended")
        except PermissionError as error:
            os.close(pidfd)
            raise permission_denied(pid, command_name(pid)) from error
        except (FileNotFoundError, ProcessLookupError) as error:
            os.close(pidfd)
            raise TargetGone(f"process {pid} has ended") from error
        except BaseException:
            os.close(pidfd)
            raise
        return cls(pid, pidfd, start_time, program, memory)

    def mappings(self) -> tuple[Mapping, ...]:
        """Return what is mapped now, in ascending order; raises TargetGone."""
        with self._proc("maps") as path, path.open(encoding="utf-8", errors="surrogateescape") as file:
            found = read_mappings(file)
        if not found:
            raise self._gone()
        return found

    def is_untouched_reserve(self, mapping: Mapping) -> bool:
        """Whether memory was mapped with MAP_NORESERVE and no page of it was ever used; raises TargetGone."""
        with self._proc("smaps") as path:
            text = path.read_text(encoding="utf-8", errors="surrogateescape")
        found = text.partition(f"{mapping.start:08x}-{mapping.end:08x} ")[2].partition("VmFlags:")
        return "\nRss:                   0 kB\n" in found[0] and "nr" in found[2].partition("\n")[0].split()

    def pages(self) -> Pages:
        """Return who tells the pages that the process has, to be closed; raises TargetGone."""
        from patcher.target.pages import Pages  # and numpy, which starts threads

        with self._proc("pagemap"):
            return Pages(self.pid)

    def open_image(self, mapping: Mapping) -> Path:
        """Return a path of ours by which the very file behind `mapping` can be read; raises ObjectError."""
        return find_image(self.pid, mapping)

    def time_written(self, mapping: Mapping) -> int:
        """Return when the very file behind `mapping` was written last (st_mtime in ns), 0 when that is not known."""
        return time_written(self.pid, mapping)

    def auxv(self) -> MappingOf[int, int]:
        """Return the auxiliary vector, AT_ number -> value (getauxval(3)); raises TargetGone."""
        with self._proc("auxv") as path:
            data = path.read_bytes()
        return types.MappingProxyType({key: value for key, value in struct.iter_unpack("<QQ", data) if key})

    def threads(self) -> tuple[int, ...]:
        """Return the numbers of the threads there are now; empty when the process is gone."""
        return tuple(list_threads(self.pid)) if self.alive() else ()

    def environ(self) -> dict[str, str]:
        """Return the environment the program was started with; raises TargetGone."""
        with self._proc("environ") as path:
            entries = os.fsdecode(path.read_bytes()).split("\0")
        return dict(entry.split("=", 1) for entry in entries if "=" in entry)

    def alive(self) -> bool:
        """Whether it is still the same process (number and start time) and has not ended."""
        self._lingering.settle()
        try:
            stat = read_stat(self.pid)
        except TargetGone:
            return False
        if stat.start_time != self.start_time or _has_ended(self.pidfd):
            return False
        # A leader that called pthread_exit is a zombie while the other threads live on.
        return stat.state not in "ZX" or any(
            thread_state(self.pid, tid) not in "ZX" for tid in list_threads(self.pid) if tid != self.pid
        )

    def check_alive(self) -> None:
        """Raise TargetGone unless `alive`."""
        if not self.alive():
            raise self._gone()

    @property
    def exit_status(self) -> int | None:
        """The raw wait status, if the process ended while we traced it (then nobody else can wait for it)."""
        return noted_exit(self.pid)

    @contextmanager
    def stopped(self) -> Iterator[Stopped]:
        """Stop all threads for the length of the block; see `stop.stopped_process` for what it raises."""
        self.check_alive()
        with stopped_process(self.pid, self._lingering) as stopped:
            yield stopped

    @contextmanager
    def sampled(self, tid: int) -> Iterator[StoppedThread]:
        """Stop one thread for the length of the block, the others running on; raises as `stopped` does."""
        self.check_alive()
        with stopped_thread(self.pid, tid, self._lingering) as tracee:
            yield described_thread(tracee)

    def thread_registers(self, tid: int) -> tuple[int, int]:
        """Return the program counter and stack pointer of a thread, stopping it for a moment."""
        with self.sampled(tid) as thread:
            return thread.pc, thread.sp

    def inject(
        self,
        steps: Sequence[Step],
        *,
        code: int | None = None,
        timeout: float = 2.0,
        accept: Callable[[StoppedThread], bool] | None = None,
        planned: Sequence[SystemCall] = (),
    ) -> tuple[int, ...]:
        """Run system calls and functions of the target on one of its threads, the others running on.

        Without `code` a single SystemCall, done with instructions the process has already. With `code`, the
        address of at least 1 KiB of r-x memory that is ours, any steps; they end at the first system call
        that fails. `accept` is asked, while a thread stands still, whether it may be borrowed: the caller's
        proof that a function called there finds no lock held. `timeout` is in seconds. `planned` are system calls
        that are asked for later: no thread is borrowed whose seccomp filters may kill it for one of them, or for these.

        Returns the results of the steps done: a system call's as a signed number (negative errno), a
        function's rax unsigned. Raises TargetBusy when no thread could be borrowed or a call did not come
        back (the thread is then where it was before), TargetGone, AttachDenied, WriteRefused for `code`, and
        PatcherError "call-crashed" when a function faulted.
        """
        self.check_alive()
        objection = None if accept is None else lambda thread: "" if accept(thread) else "is not at a safe point"
        terms = Terms(code, timeout, timeout, objection, planned=tuple(planned))
        return self._borrowing.run(tuple(steps), self.mappings(), terms)

    def has_left(self, code: int, *, stack: tuple[int, int] | None = None) -> bool:
        """Wait until no thread runs steps that were put at `code`, or is on `stack`; say whether that came true.

        A thread that was left alone in the middle of them comes back by itself. Raises as `inject`.
        """
        self.check_alive()
        deadline = time.monotonic() + _LEAVING_SECONDS
        while self._borrowing.uses(code, stack, self.mappings()):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def left_alone(self, code: int) -> bool:
        """Whether a thread that was left alone in steps at `code` is not done with them. Asks without stopping any."""
        return self._borrowing.left_alone(code)

    def expect_others(self) -> None:
        """Take it that another patcher may have been here, and may have left threads in memory for steps."""
        self._borrowing.distrust()

    def call(
        self,
        calls: Sequence[FunctionCall],
        *,
        code: int,
        objection: Callable[[StoppedThread], str],
        stack: tuple[int, int] | None = None,
        errno_location: int = 0,
        planned: Sequence[SystemCall] = (),
        wait: float = 5.0,
        timeout: float = 10.0,
    ) -> tuple[int, ...]:
        """Call functions of the target, one after another, on a thread at a safe point; return rax of each.

        The other threads run on. `objection` is asked, while a thread stands still, why it is at no safe point ("is
        in malloc"; "" when it is at one); threads are looked at again and again for `wait` seconds. `code` is as for
        `inject`; `stack` is writable memory of ours, (low, high), to run on instead of the thread's own stack. With
        `errno_location`, the address of the target's `__errno_location`, the thread's errno is kept. `planned` are
        system calls that the functions make, with such arguments as are known: no thread is borrowed whose seccomp
        filters may kill it for one of them.

        All but faults is blocked meanwhile for the thread, and delivered afterwards; a thread that a function
        creates inherits that mask. Should we be killed, the functions are called to their end and the thread goes
        back to its own work by itself.

        Raises TargetBusy "target-busy" when no thread came to a safe point, TargetBusy "call-timeout" when the
        functions take longer than `timeout`, PatcherError "call-crashed" when one faults or aborts: the thread is
        then where it was before, but whatever the function had locked or begun stays so for ever. Further TargetGone,
        AttachDenied, and ValueError for calls that do not fit the stub or the stack.
        """
        self.check_alive()
        terms = Terms(code, wait, timeout, objection, stack, errno_location, tuple(planned))
        return self._borrowing.run(tuple(calls), self.mappings(), terms)

    def call_standing(
        self,
        stopped: Stopped,
        tid: int,
        calls: Sequence[FunctionCall],
        *,
        code: int,
        stack: tuple[int, int],
        errno_location: int = 0,
        timeout: float = 10.0,
    ) -> tuple[int, ...]:
        """Call functions of the target on one thread, while all the others stand still; return rax of each.

        `code` and `stack` are memory of ours, mapped for this; the rest is as for `call`, and what it raises too. The
        caller knows that the functions want nothing that a thread which stands still may hold: they would wait until
        `timeout`. The thread stands still again afterwards.
        """
        terms = Terms(code, 0.0, timeout, None, stack, errno_location)
        return self._borrowing.run_standing(stopped.tracee(tid), tuple(calls), self.mappings(), terms)

    def _poke(self, address: int, data: bytes) -> bool:
        """Write through a thread that stands still: one of the open block's, or one that is stopped for it."""
        tracee = self._lingering.standing()
        if tracee is not None:
            return self._poke_words(tracee, address, data)
        # In small bites, so that no thread stands still for long however much there is to write.
        return all(self._poke_bite(address + i, data[i : i + _BITE]) for i in range(0, len(data), _BITE))

    def _poke_bite(self, address: int, data: bytes) -> bool:
        for tid in list_threads(self.pid):
            try:
                with stopped_thread(self.pid, tid, self._lingering) as tracee:
                    return self._poke_words(tracee, address, data)
            except (TargetGone, TargetBusy):
                continue
        return False

    def _poke_words(self, tracee: Tracee, address: int, data: bytes) -> bool:
        start, end = address & -_PAGE, (address + len(data) + _PAGE - 1) & -_PAGE
        try:
            before = self.memory.read(start, end - start)
        except PatcherError:
            return False
        after = before[: address - start] + data + before[address - start + len(data) :]
        return all(tracee.poke(start + at, after[at : at + 8]) for at in _words_to_poke(before, after))

    def close(self) -> None:
        """Close our descriptors; the process goes on."""
        self._lingering.settle()
        self.memory.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _proc(self, name: str) -> AbstractContextManager[Path]:
        return _present(Path(f"/proc/{self.pid}/{name}"), self._gone)

    def _gone(self) -> TargetGone:
        return TargetGone(f"process {self.pid} ({self.program}) has ended")


def _words_to_poke(before: bytes, after: bytes) -> Iterator[int]:
    """Yield where eight bytes have to be written, of whole pages.

    A word that is aligned is written at once; so is a jump of five bytes that lies in two of them, but on one page.
    """
    position = 0
    while position < len(after):
        if before[position] == after[position]:
            position += 1
            continue
        at = position & -8
        few = before[position + _JUMP : position + 8] == after[position + _JUMP : position + 8]
        if few and before[at + 8 : position + _JUMP] != after[at + 8 : position + _JUMP]:
            at = min(position, (position & -_PAGE) + _PAGE - 8)
        yield at
        position = at + 8


def _open_process(pid: int) -> int:
    """Return a descriptor that stands for the process and no other (pidfd_open(2)). Raises as `Target.attach` does."""
    try:
        return os.pidfd_open(pid)
    except (OSError, OverflowError) as error:
        check_attachable(pid)  # says what it is instead, such as one of several threads
        raise TargetGone(f"there is no process {pid}") from error


def _has_ended(pidfd: int) -> bool:
    """Tell whether a process is gone with all of its threads."""
    looking = select.poll()
    looking.register(pidfd, select.POLLIN)
    return bool(looking.poll(0))


@contextmanager
def _present(path: Path, gone: Callable[[], TargetGone]) -> Iterator[Path]:
    try:
        yield path
    except (FileNotFoundError, ProcessLookupError) as error:
        raise gone() from error
