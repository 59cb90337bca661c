"""Spawning: what the program is started with, and how signals and its end are passed on."""

from __future__ import annotations

import ctypes
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from project import wait_for_state

from patcher.target import JobControl, NoSuchProgram, Target, exit_code, spawn, wait_exit

DRIVER = """
import sys
from patcher.target import JobControl, exit_code, spawn, wait_exit
with JobControl() as jobs:
    child = spawn(sys.argv[1], sys.argv[2:], signal_mask=jobs.original_mask)
    jobs.forward_to(child.pid)
    print("child", child.pid, file=sys.stderr, flush=True)
    jobs.ended.wait()
    status = wait_exit(child.pid)
sys.exit(exit_code(status))
"""


def run(*arguments, **options):
    """What a spawned program printed."""
    reading, writing = os.pipe()
    saved = os.dup(1)
    os.dup2(writing, 1)
    os.close(writing)
    try:
        child = spawn(*arguments, **options)
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    with open(reading, encoding="utf-8") as output:
        text = output.read()
    return child, wait_exit(child.pid), text.splitlines()


def test_addresses_are_fixed_unless_wanted_otherwise(build):
    child, _, lines = run(build("child"), ["show"])
    assert lines[0] == "personality 1"
    assert (child.randomized, child.note) == (False, "")
    child, _, lines = run(build("child"), ["show"], aslr=True)
    assert lines[0] == "personality 0"
    assert (child.randomized, child.note) == (True, "")
    assert not ctypes.CDLL(None).personality(0xFFFFFFFF) & 0x0040000


def test_what_the_program_inherits(build):
    reading, writing = os.pipe()
    os.set_inheritable(reading, True)
    try:
        _, _, lines = run(build("child"), ["show", "a b", ""], environment={"MARK": "x y"})
    finally:
        os.close(reading)
        os.close(writing)
    assert f"descriptor {reading}" in lines
    assert f"descriptor {writing}" not in lines
    assert [line for line in lines if line.startswith("argument")][1:] == ["argument show", "argument a b", "argument "]
    assert "environment x y" in lines
    assert "group 1" in lines
    assert not [line for line in lines if line.startswith(("blocked", "ignored"))]


def test_the_mask_is_the_one_from_before(build):
    with JobControl() as jobs:
        _, _, lines = run(build("child"), ["show"], signal_mask=jobs.original_mask)
        assert not [line for line in lines if line.startswith("blocked")]
        _, _, lines = run(build("child"), ["show"])
        assert f"blocked {int(signal.SIGTERM)}" in lines
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.parametrize(("arguments", "code"), [(["exit", "0"], 0), (["exit", "42"], 42), (["die", "9"], 137)])
def test_exit_codes(build, arguments, code):
    _, status, _ = run(build("child"), arguments)
    assert exit_code(status) == code


def test_programs_that_cannot_be_started(tmp_path, build):
    text = tmp_path / "text"
    text.write_text("hello")
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    for name, message in [
        ("./no-such-program", "there is no program ./no-such-program"),
        ("no-such-program-in-path", "in PATH"),
        (str(tmp_path), "is a directory"),
        (str(text), "is not a program"),
        (str(script), "may not be executed"),
        ("", "cannot be started"),
    ]:
        with pytest.raises(NoSuchProgram, match=message) as caught:
            spawn(name, [])
        assert (caught.value.code, caught.value.exit_status) == ("no-such-program", 1)
    text.chmod(0o755)
    with pytest.raises(NoSuchProgram, match=r"is not a program$"):
        spawn(str(text), [])
    text.write_bytes(b"\x7fELF")
    with pytest.raises(NoSuchProgram, match="not a program that this machine can run"):
        spawn(str(text), [])
    text.write_text("#!/no/such/interpreter\n")
    with pytest.raises(NoSuchProgram, match="interpreter"):
        spawn(str(text), [])


def test_the_program_is_there_when_spawn_returns():
    for _ in range(30):
        child = spawn("sleep", ["60"])
        with Target.attach(child.pid) as target:
            try:
                assert target.program == os.path.realpath(shutil.which("sleep"))
                assert any(target.auxv()[9] in mapping for mapping in target.mappings())
                assert target.memory.read(target.auxv()[9], 16)
                with target.stopped() as stopped:
                    assert len(stopped.threads) == 1
            finally:
                os.kill(child.pid, signal.SIGKILL)
                assert exit_code(wait_exit(child.pid)) == 137


def test_waiting_does_not_take_the_stops_of_a_tracer(build):
    child = spawn("sleep", ["60"])
    statuses = []
    waiter = threading.Thread(target=lambda: statuses.append(wait_exit(child.pid)))
    waiter.start()
    with Target.attach(child.pid) as target:
        for _ in range(100):
            with target.stopped() as stopped:
                assert len(stopped.threads) == 1
        assert wait_exit(child.pid, timeout=0) is None
        with target.stopped():
            os.kill(child.pid, signal.SIGKILL)
        waiter.join()
    assert [exit_code(status) for status in statuses] == [137]
    with pytest.raises(ChildProcessError):
        wait_exit(2**22 - 1)


@pytest.fixture
def driven(build):
    """The driver and its child, with pipes instead of a terminal."""
    command = [sys.executable, "-c", DRIVER, build("child")]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    child = int(process.stderr.readline().split()[1])
    assert process.stdout.readline() == "ready\n"
    yield process, child
    process.stdin.close()
    process.wait(10)
    process.stdout.close()
    process.stderr.close()


def test_signals_from_kill_are_handed_on(driven):
    process, _ = driven
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(process.pid, number)
        assert process.stdout.readline() == f"signal {int(number)}\n"
    process.stdin.close()
    assert process.wait(10) == 3


def read_until(terminal, text):
    seen = ""
    deadline = time.monotonic() + 10
    while text not in seen:
        assert time.monotonic() < deadline, f"no {text!r} in {seen!r}"
        if select.select([terminal], [], [], 0.2)[0]:
            seen += os.read(terminal, 1024).decode()
    return seen


def only_child_of(pid):
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def test_a_terminal_reaches_the_program_once_and_stops_both(build, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    shell, terminal = pty.fork()
    if shell == 0:
        os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
    try:
        command = f"{sys.executable} {driver} {build('child')}"
        os.write(terminal, f"PYTHONPATH={os.getcwd()} {command}\n".encode())
        read_until(terminal, "ready")
        os.write(terminal, b"\x03")
        read_until(terminal, "signal 2")
        child = only_child_of(only_child_of(shell))
        os.write(terminal, b"one\n")
        assert "signal" not in read_until(terminal, "got one")
        os.write(terminal, b"\x1a")
        read_until(terminal, "Stopped")
        # The shell speaks when the driver is stopped; what is typed before the program is, the program may still read.
        wait_for_state(child, {"T"})
        os.write(terminal, b"fg\n")
        wait_for_state(child, {"S", "R"})
        os.write(terminal, b"two\n")
        read_until(terminal, "got two")
        os.write(terminal, b"\x04")
        os.write(terminal, b"echo status=$?; exit\n")
        read_until(terminal, "status=3")
    finally:
        os.kill(shell, signal.SIGHUP)
        os.waitpid(shell, 0)
        os.close(terminal)
