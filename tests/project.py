"""A small project for a test: sources, the program built of them, objects made of edited sources, the running program.

The program answers a line for each line it is told, so a test never waits for luck.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from patcher.target import Target

MAIN = """\
#include <stdio.h>
#include <stdlib.h>
int answer(int n);
int main(void)
{
    char line[80];
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    while (fgets(line, sizeof line, stdin))
        printf("%d\\n", answer(atoi(line)));
    return 7;
}
"""
UNIT = """\
static int calls;
int answer(int n)
{
    calls++;
    return n + 1000 * calls;
}
"""
COMPILE = ("gcc", "-g", "-O2")
SECTIONS = ("-ffunction-sections", "-fdata-sections")


class Project:
    """Sources below `root`/src, each compiled by its own command, and linked to `root`/program."""

    def __init__(
        self,
        root: Path,
        sources: Mapping[str, str] | None = None,
        *,
        compile_flags: Sequence[str] = (),
        link_flags: Sequence[str] = (),
        shared: Sequence[str] = (),
    ) -> None:
        """`shared` names the sources that make up a shared library instead of the program."""
        self.root = root
        self.sources = root / "src"
        self.program = root / "program"
        self._compile = (*COMPILE, *compile_flags)
        self._link = tuple(link_flags)
        self._shared = tuple(shared)
        self._objects = 0
        self.sources.mkdir(parents=True)
        for name, text in (sources or {"main.c": MAIN, "unit.c": UNIT}).items():
            (self.sources / name).write_text(text)
        self.build()

    def build(self) -> None:
        """Compile and link everything, and write compile_commands.json."""
        commands, objects, library = [], [], []
        for source in sorted(self.sources.glob("*.c")):
            output = self.root / f"{source.stem}.o"
            arguments = [*self._flags(source.name), "-c", f"src/{source.name}", "-o", output.name]
            subprocess.run(arguments, cwd=self.root, check=True)
            (library if source.name in self._shared else objects).append(output.name)
            commands.append({"directory": str(self.root), "file": f"src/{source.name}", "arguments": arguments})
        (self.root / "compile_commands.json").write_text(json.dumps(commands))
        if library:
            subprocess.run(["gcc", "-shared", "-o", "libpart.so", *library], cwd=self.root, check=True)
            objects += ["libpart.so", "-Wl,-rpath,$ORIGIN"]
        link = ["gcc", "-o", "program", *objects, "-pthread", "-Wl,-z,now", *self._link]
        subprocess.run(link, cwd=self.root, check=True)

    def _flags(self, name: str) -> tuple[str, ...]:
        return (*self._compile, "-fPIC") if name in self._shared else self._compile

    def edit(self, name: str, old: str, new: str) -> Path:
        """Replace a part of a source, which must be there once; return its path."""
        path = self.sources / name
        text = path.read_text()
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {name}"
        path.write_text(text.replace(old, new))
        return path

    def object(self, name: str, *edits: tuple[str, str], flags: Sequence[str] = SECTIONS) -> Path:
        """Compile an edited copy of a source as the program was, and return the object."""
        self._objects += 1
        text = (self.sources / name).read_text()
        for old, new in edits:
            assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {name}"
            text = text.replace(old, new)
        place = self.root / f"edited{self._objects}"
        (place / "src").mkdir(parents=True)
        (place / "src" / name).write_text(text)
        output = place / f"{Path(name).stem}.o"
        command = [*self._flags(name), *flags, f"-ffile-prefix-map={place}={self.root}", "-c", f"src/{name}"]
        subprocess.run([*command, "-o", str(output)], cwd=place, check=True)
        return output

    @contextlib.contextmanager
    def running(self, *arguments: str) -> Iterator[Running]:
        """Start the program; it is ended after the block if it still runs."""
        program = Running([str(self.program), *arguments])
        try:
            yield program
        finally:
            program.end()


class Running:
    """A program that said its first line, and answers a line for each line."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self.process.pid
        self.greeting = self.line()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, text: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{text}\n")
        self.process.stdin.flush()

    def ask(self, text: object) -> str:
        self.tell(text)
        return self.line()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        self.process.wait(10)


def image_bytes(pid: int) -> dict[tuple[str, int, str], str]:
    """Return a hash of everything mapped from files that the program cannot write: text, constants, bound GOT cells."""
    found = {}
    with Target.attach(pid) as target:
        for m in target.mappings():
            if m.inode and not m.writable and "memfd:patcher" not in m.path:
                found[m.path, m.offset, m.permissions] = hashlib.sha256(target.memory.read(m.start, m.size)).hexdigest()
    return found


def statuses(pid: int, name: str) -> set[str]:
    """Return one field of the status of all threads."""
    found = set()
    for tid in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for line in Path(f"/proc/{pid}/task/{tid}/status").read_text().splitlines():
                if line.startswith(name + ":"):
                    found.add(line.split(":", 1)[1].split()[0])
    return found


def wait_for_state(pid: int, states: set[str], seconds: float = 10) -> None:
    """Wait until all threads are in one of some states."""
    deadline = time.monotonic() + seconds
    while statuses(pid, "State") - states:
        assert time.monotonic() < deadline, statuses(pid, "State")
        time.sleep(0.001)


def assert_untouched(pid: int) -> None:
    """The process lives, nobody traces it and no thread of it stands still."""
    assert statuses(pid, "TracerPid") == {"0"}
    assert statuses(pid, "State")
    assert not statuses(pid, "State") & {"t", "T", "Z", "X"}
