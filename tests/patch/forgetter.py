"""Have a process forget all but two generations, and be killed after the write `moment` to its memory, if it comes.

Arguments: pid, moment. Prints how often it wrote when it comes to its end.
"""

from __future__ import annotations

import os
import signal
import sys

from patcher.patch.ledger import Ledger
from patcher.patch.reclaim import Policy, reclaim
from patcher.target import Memory, Target

pid, moment = map(int, sys.argv[1:])
written, write = [0], Memory.write


def write_and_die(memory: Memory, address: int, data: bytes) -> None:
    write(memory, address, data)
    written[0] += 1
    if written[0] == moment:
        os.kill(os.getpid(), signal.SIGKILL)


Memory.write = write_and_die  # type: ignore[method-assign]
with Target.attach(pid) as target:
    ledger = Ledger(target)
    with ledger.transaction():
        reclaim(ledger, Policy(keep=2, enough=1, poison=True))
print(written[0])
