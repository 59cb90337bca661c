"""A shell's job on a terminal: the keys and signals that reach the program, each once, with patcher watching."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import shlex
import signal
import struct
import sys
import termios
import time
from collections.abc import Iterator

import pytest
from project import Project, statuses, wait_for_state

from .conftest import ROOT, SECONDS

LONGEST = 3 * SECONDS  # a whole session, and two shells' worth of programs, on a machine that others use as well

PROGRAM = """\
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
int answer(int n);
static volatile int interrupts, terminations, resizes, continuations;
static void on_signal(int number)
{
    if (number == SIGINT)
        interrupts++;
    if (number == SIGTERM)
        terminations++;
    if (number == SIGWINCH)
        resizes++;
    if (number == SIGCONT)
        continuations++;
}
int main(void)
{
    char line[80];
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGWINCH, &action, NULL);
    sigaction(SIGCONT, &action, NULL);
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("program %d\\n", getpid());
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\\n")] = 0;
        if (!strcmp(line, "quit"))
            return 7;
        printf("[%s int=%d term=%d winch=%d cont=%d answer=%d]\\n", line, interrupts, terminations, resizes,
               continuations, answer(1));
    }
    return 9;
}
"""


class Shell:
    """An interactive bash on a terminal of its own."""

    def __init__(self) -> None:
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.execvp("bash", ["bash", "--norc", "--noprofile", "--noediting", "-i"])
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def expect(self, pattern: str) -> re.Match[str]:
        """Return the first match in what was printed since the last one."""
        deadline = time.monotonic() + LONGEST
        while not (found := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self.terminal], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {pattern!r} in {self.seen!r}"
            self.seen += os.read(self.terminal, 1 << 14).decode(errors="replace")
        self.seen = self.seen[found.end() :]
        return found

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGHUP)
        os.close(self.terminal)
        os.waitpid(self.pid, 0)


@pytest.fixture
def shell() -> Iterator[Shell]:
    found = Shell()
    yield found
    found.end()


UNIT = "int count;\nint answer(int n)\n{\n    count++;\n    return n + 1;\n}\n"


@pytest.mark.timeout(180)
def test_a_session_on_a_terminal(tmp_path, shell):
    project = Project(tmp_path / "p", {"main.c": PROGRAM, "unit.c": UNIT})
    quiet = "PS1='$ '; set +m; set -m"
    shell.type(f"cd {shlex.quote(str(project.root))}; export PYTHONPATH={shlex.quote(ROOT)}; {quiet}\n")
    shell.type(f"{sys.executable} -m patcher spawn ./program --watch src\n")
    pid = int(shell.expect(r"program (\d+)\r")[1])
    shell.expect("watching src")
    controller = int(statuses(pid, "PPid").pop())

    shell.type("a\n")
    shell.expect(r"\[a int=0 term=0 winch=0 cont=0 answer=2\]")
    shell.type("\x03")
    shell.expect(r"\^C")
    shell.type("b\n")
    shell.expect(r"\[b int=1 term=0 winch=0 cont=0 answer=2\]")

    project.edit("unit.c", "n + 1", "n + 41")
    shell.expect(r"generation 1 is \S*live")
    shell.type("c\n")
    shell.expect(r"\[c int=1 term=0 winch=0 cont=0 answer=42\]")

    os.kill(controller, signal.SIGTERM)
    terminations = "0"
    while terminations == "0":  # handed on by patcher, in its own time
        shell.type("t\n")
        terminations = shell.expect(r"\[t int=1 term=(\d+)")[1]
    assert terminations == "1"
    shell.type("\x1a")
    shell.expect("Stopped .*patcher spawn")
    wait_for_state(pid, {"T"}, LONGEST)
    shell.type("fg\n")
    shell.expect("patcher spawn")
    wait_for_state(pid, {"S", "R"}, LONGEST)
    shell.type("d\n")
    shell.expect(r"\[d int=1 term=1 winch=0 cont=1 answer=42\]")

    fcntl.ioctl(shell.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 99, 0, 0))
    shell.type("e\n")
    shell.expect(r"\[e int=1 term=1 winch=1 cont=1 answer=42\]")

    project.edit("unit.c", "n + 41", "n + 51")
    shell.expect(r"generation 2 is \S*live")
    shell.type("quit\n")
    shell.type("echo status=$?\n")
    shell.expect("status=7")


def test_lines_of_ours_start_at_the_left_in_raw_mode(tmp_path, shell):
    """A program in raw mode has no newline translation: ours must bring their own carriage returns."""
    project = Project(tmp_path / "p", {"main.c": PROGRAM, "unit.c": UNIT})
    shell.type(f"cd {shlex.quote(str(project.root))}; export PYTHONPATH={shlex.quote(ROOT)}; stty -opost\n")
    shell.type(f"{sys.executable} -m patcher spawn ./program --watch src\n")
    shell.expect("watching src\r\n")
    project.edit("unit.c", "n + 1", "n + 41")
    shell.expect("unit.c: generation 1 is .*live.*\r\n.*changed: answer\r\n")
    shell.type("quit\n")
