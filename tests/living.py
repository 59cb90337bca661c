"""Programs built for a test, running and blocked in a read, and an object matched against one of them."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from patcher.blocks import Blocks
from patcher.elf import read_object
from patcher.image import Image
from patcher.lines import NONE, LineNumbers
from patcher.live import LiveUnit
from patcher.match import Delta, match
from patcher.origin import find_unit
from patcher.patch.journal import ArenaView, Journal
from patcher.target import Target

SOURCES = Path(__file__).parent / "sources"
UNIT = ("-ffunction-sections", "-fdata-sections")

WAIT = """
#include <unistd.h>
void wait_for_end(void)
{
    char byte;
    if (write(1, "r", 1) != 1)
        _exit(1);
    while (read(0, &byte, 1) > 0)
        ;
}
"""


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a tool that must succeed; returns what it printed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr}"
    return done.stdout


def compile_object(source: Path, output: Path, *flags: str, compiler: str = "gcc") -> Path:
    """Compile one source file to an object."""
    run(compiler, "-c", *flags, "-o", output, source)
    return output


def compile_text(text: str, output: Path, *flags: str, compiler: str = "gcc", name: str = "unit.c") -> Path:
    """Compile a text as the file `name`, which is what its STT_FILE symbol says, to an object."""
    source = output.with_suffix(".d") / name
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(text)
    return compile_object(source, output, *flags, compiler=compiler)


def build(
    folder: Path, *flags: str, compiler: str = "gcc", link: tuple[str, ...] = (), shared: bool = False
) -> tuple[Path, Path]:
    """Build sources/kinds.c as the program's own and as patcher compiles it: (program, object to match)."""
    flags = (*flags, "-fPIC") if shared else flags
    kinds = compile_object(SOURCES / "kinds.c", folder / "kinds.o", *flags, compiler=compiler)
    other = compile_object(SOURCES / "other.c", folder / "other.o", *flags, compiler=compiler)
    unit = compile_object(SOURCES / "kinds.c", folder / "unit.o", *flags, *UNIT, compiler=compiler)
    program = folder / "program"
    if not shared:
        run(compiler, *link, "-o", program, kinds, other, waiting_object(folder))
        return program, unit
    library = folder / "libkinds.so"
    run(compiler, "-shared", *link, "-o", library, kinds, other)
    entry = compile_text("int kinds_main(int, char **);\nint main(int c, char **v) { return kinds_main(c, v); }\n",
                         folder / "main.o")  # fmt: skip
    run(compiler, "-rdynamic", "-o", program, entry, waiting_object(folder), library, f"-Wl,-rpath,{folder}")
    return program, unit


def waiting_object(folder: Path) -> Path:
    """Return the object that has `wait_for_end`: says that it is ready, and blocks until its input ends."""
    found = folder / "wait.o"
    return found if found.exists() else compile_text(WAIT, found, "-O1", "-fPIC", name="wait.c")


@contextlib.contextmanager
def running(program: Path, *arguments: str, environment: dict[str, str] | None = None) -> Iterator[Target]:
    """Start a program that calls `wait_for_end`; it is blocked there when the block is entered, and ends after it."""
    with subprocess.Popen(
        [str(program), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(1) == b"r"
            with Target.attach(process.pid) as target:
                yield target
        finally:
            process.kill()


def await_sleep(pid: int, tid: int = 0) -> None:
    """Return once a thread (the first by default) sleeps in one system call and stays there."""
    seen: list[str] = []
    while len(seen) < 20 or len(set(seen[-20:])) > 1 or seen[-1].startswith("running"):
        seen.append(Path(f"/proc/{pid}/task/{tid or pid}/syscall").read_text())


def live_unit(target: Target, blocks: Blocks, image: Image | None = None) -> LiveUnit:
    found = find_unit(image or Image(target), ArenaView(Journal(), {}, {}), blocks)
    assert found is not None
    return found


def matched(target: Target, unit: Path, lines: LineNumbers = NONE, image: Image | None = None) -> Delta:
    """Match an object against a process that nothing has patched yet."""
    blocks = Blocks(read_object(unit))
    return match(blocks, live_unit(target, blocks, image), lines)


def verdicts(delta: Delta) -> dict[str, str]:
    """Return function -> verdict in a word."""
    return {f.name: f.status.value for f in delta.functions}


def unequal(delta: Delta) -> list[str]:
    """Return a line for each function that is not the same, for a test's message."""
    return [f"{f.name}: {f.status.value}, {f.reason}" for f in delta.functions if f.status.value != "same"]
