"""Programs that nobody waits for: one at a time, at the lowest priority, so that a save is not delayed.

Decides how they are run and ended. It does not know what they are for.
Specification: setpriority(2), wait4(2), kill(2).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from patcher.build.running import unstopped


class Background:
    """Runs programs until it is stopped; of several threads that ask, one after the other."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def run(self, arguments: Sequence[str], directory: Path, output: Path, environment: dict[str, str]) -> float | None:
        """Run a program to its end; return the processor seconds it took, None when it failed or was stopped."""
        with self._turn:
            program = self._start(arguments, directory, output, environment)
            if program is None:
                return None
            _, status, usage = os.wait4(program.pid, 0)
            with self._lock:
                program.returncode = os.waitstatus_to_exitcode(status)
                self._running = None
            return usage.ru_utime + usage.ru_stime if program.returncode == 0 else None

    def stop(self) -> None:
        """End what runs, and start nothing more."""
        with self._lock:
            self._stopped = True
            if self._running is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._running.pid, signal.SIGKILL)

    def _start(
        self, arguments: Sequence[str], directory: Path, output: Path, environment: dict[str, str]
    ) -> subprocess.Popen[bytes] | None:
        with output.open("wb") as said, self._lock, unstopped():
            if self._stopped:
                return None
            try:
                program = self._running = subprocess.Popen(
                    arguments,
                    cwd=directory,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                )
            except OSError:
                return None
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PGRP, program.pid, 19)
            return program
