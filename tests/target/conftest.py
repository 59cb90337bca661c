"""Real programs for the tests of the target: built once a session, ended by pid after each test."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from patcher.target import Target

PROGRAMS = Path(__file__).parent / "programs"
FLAGS = {"bare": ("-static", "-nostdlib"), "vectors": ("-mavx2",), "wide": ("-mavx512f", "-mavx512bw")}


class Program:
    """A running test program that answers one line for each line it is told."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self.process.pid
        self.greeting = self.line()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, text: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        return self.line()

    def finish(self) -> int:
        """Close its input and return its exit status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(10)

    def end(self) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, 9)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self.process.wait(10)

    @property
    def addresses(self) -> list[int]:
        return [int(word, 16) for word in self.greeting.split()]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Compile programs/NAME.c with extra flags, once each."""
    directory = tmp_path_factory.mktemp("programs")
    built: dict[tuple[str, ...], str] = {}

    def compile_program(name: str, *flags: str) -> str:
        key = (name, *flags)
        if key not in built:
            output = str(directory / f"{name}{len(built)}")
            source = str(PROGRAMS / f"{name}.c")
            command = ["gcc", "-O1", "-g", *FLAGS.get(name, ()), *flags, "-o", output, source, "-pthread"]
            subprocess.run(command, check=True)
            built[key] = output
        return built[key]

    return compile_program


@pytest.fixture
def start(build: Callable[..., str]) -> Iterator[Callable[..., Program]]:
    """Start programs/NAME.c with arguments; it has said its first line when this returns."""
    running: list[Program] = []

    def start_program(name: str, *arguments: str, flags: tuple[str, ...] = ()) -> Program:
        program = Program([build(name, *flags), *arguments])
        running.append(program)
        return program

    yield start_program
    for program in running:
        program.end()


@pytest.fixture
def attach() -> Iterator[Callable[[int], Target]]:
    """Attach to processes, closing the targets at the end."""
    targets: list[Target] = []

    def attach_to(pid: int) -> Target:
        targets.append(Target.attach(pid))
        return targets[-1]

    yield attach_to
    for target in targets:
        target.close()
