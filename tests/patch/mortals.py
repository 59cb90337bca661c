"""For each line (moment, pid, files): patch in a child that is killed after its write `moment`.

Says how it ended: its exit status, or minus a signal's number, and how often it wrote if it came to its end.
"""

from __future__ import annotations

import os
import signal
import sys

import patcher.activity
import patcher.match
import patcher.relink
import patcher.session
import patcher.target.pages
from patcher.target import Memory


def patch(moment: int, pid: int, files: list[str]) -> int:
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
    return moment - left[0]


for line in sys.stdin:
    first, second, *rest = line.split()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writing, str(patch(int(first), int(second), rest)).encode())
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as count:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), count.read() or 0, flush=True)
