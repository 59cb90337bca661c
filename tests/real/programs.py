"""Start the real programs and end them, each by its own process id."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

Result = TypeVar("Result")
POLL_SECONDS = 0.01


@contextlib.contextmanager
def running(command: Sequence[object], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program for the length of the block, with its output in `log`."""
    arguments = [str(part) for part in command]
    with log.open("wb") as sink:
        process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def until(attempt: Callable[[], Result | None], seconds: float, what: str) -> Result:
    """Repeat `attempt` until it returns something other than None; an OSError counts as None."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            result = attempt()
            if result is not None:
                return result
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(POLL_SECONDS)


class Load(Protocol):
    """A connection that makes requests without pause."""

    requests: int
    failures: list[str]


def await_more(loads: Sequence[Load], requests: int) -> None:
    """Wait until every connection of the load has made more requests, or one has failed."""
    targets = [load.requests + requests for load in loads]

    def reached() -> bool | None:
        past = all(load.requests > target for load, target in zip(loads, targets, strict=True))
        return past or any(load.failures for load in loads) or None

    until(reached, 30, f"{requests} more requests of every connection")
