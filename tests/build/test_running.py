"""Running programs: what the terminal does meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STOPS = 40
LONGEST = 30.0
STARTING = {
    "compilers": """
from patcher.build.running import Job, run_all
def start(): run_all([Job(("true",), here, here / "output")], environment={})
""",
    "in the background": """
from patcher.build.background import Background
background = Background()
def start(): background.run(("true",), here, here / "output", {})
""",
    "questions": """
from patcher.build.running import asked
def start(): asked(("true",), 20)
""",
}


def is_stopped(pid: int) -> bool:
    """Wait until a child of ours is stopped; False when it is not within a limit."""
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WUNTRACED | os.WNOHANG)
        if found:
            return os.WIFSTOPPED(status)
        time.sleep(0.001)
    return False


@pytest.mark.timeout(120)
@pytest.mark.parametrize("what", STARTING)
def test_whoever_starts_programs_can_be_stopped_at_any_time(what: str, tmp_path: Path) -> None:
    """As Ctrl-Z does: between vfork and exec, the child would be stopped, and we with it for ever."""
    head = f"from pathlib import Path\nhere = Path({str(tmp_path)!r})\n"
    script = f"{head}{STARTING[what]}\nprint('ready', flush=True)\nwhile True: start()\n"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, process_group=0, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as program:
        try:
            assert program.stdout is not None
            assert program.stdout.readline() == b"ready\n"
            for number in range(STOPS):
                time.sleep(number * 0.0003)  # at another point each time
                os.killpg(program.pid, signal.SIGTSTP)
                assert is_stopped(program.pid)
                os.killpg(program.pid, signal.SIGCONT)
        finally:
            os.killpg(program.pid, signal.SIGKILL)
