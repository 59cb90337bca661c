"""A worker as `fuzz.worker`, whose every mutant goes wrong in a way that the driver has to notice."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from fuzz import worker
from patcher.errors import ObjectError, TargetGone
from patcher.outcome import Generation


def refused() -> Generation:
    raise ObjectError("it is damaged", "")


def fine() -> Generation:
    return Generation(0)


def traceback() -> Generation:
    return Generation({}["missing"])


def lost() -> Generation:
    raise TargetGone("it ended")


def memory() -> Generation:
    return Generation(len(bytearray(2 * worker.MEMORY)))


def crash() -> Generation:
    return Generation(len(ctypes.string_at(0)))


def hang() -> Generation:
    return Generation(sum(range(1 << 60)))  # no bytecode is run in between


FAULTS: dict[Callable[[], Generation], str] = {
    refused: "",
    traceback: "KeyError",
    lost: "TargetGone",
    memory: "MemoryError",
    crash: "Segmentation fault",
    fine: "",
    hang: "Current thread",
}
"""What goes wrong with each index, and the word of its defect."""


def main(first: int, end: int) -> None:
    faulthandler.enable()
    faulthandler.register(signal.SIGPROF, chain=True)
    for index, fault in list(enumerate(FAULTS))[first:end]:
        session = SimpleNamespace(apply=lambda file, fault=fault: fault())
        print(
            json.dumps({"index": index, "sample": fault.__name__, **worker.applied(session, Path(__file__))}),
            flush=True,
        )


if __name__ == "__main__":
    main(int(sys.argv[3]), int(sys.argv[4]))
