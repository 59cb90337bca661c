"""Job control: how signals and ends pass between the terminal, us, and the program we started.

Decides which signals we hand on, and how its end is awaited. The program runs in our own process group, so
what the terminal sends (Ctrl-C, Ctrl-\\, hang-up; si_code SI_KERNEL) reaches it without us, and Ctrl-Z stops
both. What is sent to us by kill(1) is handed on. Specification: sigaction(2) "si_code", pidfd_open(2).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time

from patcher.target.tracing import noted_exit

_SI_KERNEL = 0x80
_WAKE = signal.SIGUSR2
_NOTE_SECONDS = 5.0  # a thread may be kept from running for long, where others want the processors
FORWARDED = frozenset(
    {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
)  # fmt: skip
_ENDING = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})


class JobControl:
    """Our side of a shared terminal, for the length of a block.

    Enter it before any other thread is started and before the program is spawned with `original_mask`; then
    `forward_to` it. SIGTSTP, SIGCONT and SIGWINCH stay as they are.
    """

    def __init__(self) -> None:
        self.original_mask: frozenset[int] = frozenset()
        self.ended = threading.Event()  # the child that signals are handed on to has ended
        self.told_at = float("-inf")  # when a signal last came that asks for the end (monotonic)
        self._child = -1
        self._early: list[int] = []
        self._lock = threading.Lock()
        self._leaving = False
        self._forwarder = threading.Thread(target=self._forward, name="patcher-signals", daemon=True)
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> JobControl:
        self.original_mask = frozenset(signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED))
        self._forwarder.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving = True
        if self._forwarder.ident is not None:
            signal.pthread_kill(self._forwarder.ident, _WAKE)
        self._forwarder.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, self.original_mask)
        with self._lock:
            child, self._child = self._child, -1
        if child >= 0 and self._watcher is not None and not self._watcher.is_alive():
            os.close(child)

    def forward_to(self, pid: int) -> None:
        """Hand signals on to this child from now on (and those that came before), and set `ended` when it ends.

        The child before it has ended.
        """
        child = os.pidfd_open(pid)
        self.ended = threading.Event()
        if self._watcher is not None:
            self._watcher.join()
        with self._lock:
            before, self._child = self._child, child
            early, self._early = self._early, []
        if before >= 0:
            os.close(before)
        for number in early:
            self._send(number)
        arguments = (child, self.ended)
        self._watcher = threading.Thread(target=self._watch, args=arguments, name="patcher-child", daemon=True)
        self._watcher.start()

    def _forward(self) -> None:
        while True:
            received = signal.sigwaitinfo(FORWARDED)
            if self._leaving and received.si_pid == os.getpid():
                return
            if received.si_signo in _ENDING:
                self.told_at = time.monotonic()
            if received.si_code != _SI_KERNEL:
                self._send(received.si_signo)

    def _send(self, number: int) -> None:
        # By descriptor, never by number: the number may be somebody else's once the child was waited for.
        with self._lock:
            if self._child < 0:
                self._early.append(number)
                return
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(self._child, number)

    @staticmethod
    def _watch(child: int, ended: threading.Event) -> None:
        _await_end(child, None)
        ended.set()


def wait_exit(pid: int, timeout: float | None = None) -> int | None:
    """Wait until our child has ended and return its raw wait status; None when `timeout` seconds pass before.

    Never takes a ptrace stop away from a thread of ours that is stopping the child, and knows the status even
    if that thread saw the end first. Raises ChildProcessError when it is no child of ours.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return _collect(pid)
    try:
        if not _await_end(descriptor, timeout):
            return None
    finally:
        os.close(descriptor)
    return _collect(pid)


def exit_code(status: int) -> int:
    """Return a raw wait status as a shell would: the exit status, or 128 plus the signal that killed it."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _await_end(descriptor: int, timeout: float | None) -> bool:
    # waitpid would report ptrace stops, to whichever thread asks first; a pidfd speaks only of the end.
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if timeout is None else timeout * 1000))


def _collect(pid: int) -> int:
    # Where a thread of ours was tracing the child, it may be just between its waitpid and its note.
    deadline = time.monotonic() + _NOTE_SECONDS
    while time.monotonic() < deadline:
        noted = noted_exit(pid)
        if noted is not None:
            return noted
        with contextlib.suppress(ChildProcessError):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found and not os.WIFSTOPPED(status):
                return status
        time.sleep(0.001)
    raise ChildProcessError(f"process {pid} is no child of ours, or was waited for already")
