"""For each line (moment, pid, files): patch in a child that is killed after its write `moment`; say how it ended."""

from __future__ import annotations

import os
import signal
import sys

import patcher.match
import patcher.patch.active
import patcher.relink
import patcher.session
from patcher.target import Memory


def patch(moment: int, pid: int, files: list[str]) -> None:
    left, write = [moment], Memory.write

    def write_and_die(memory: Memory, address: int, data: bytes) -> None:
        write(memory, address, data)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    Memory.write = write_and_die  # type: ignore[method-assign]
    with patcher.attach(pid) as session:
        if files:
            session.apply(*files)
        else:
            session.revert(0)


for line in sys.stdin:
    first, second, *rest = line.split()
    child = os.fork()
    if not child:
        try:
            patch(int(first), int(second), rest)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
