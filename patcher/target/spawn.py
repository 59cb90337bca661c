"""Spawning: the program started as a shell would start it, at fixed addresses if wanted.

Decides what the new process inherits. Does not trace it, and does not wait for it (`jobcontrol`).
Specification: personality(2), posix_spawn(3), execve(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from patcher.errors import PatcherError
from patcher.target.process import await_program
from patcher.target.tracing import forget_exit

_ADDR_NO_RANDOMIZE = 0x0040000
_QUERY = 0xFFFFFFFF
_COERCED = ("C.UTF-8", "C.utf8", "UTF-8")
# Python ignores these from its start on; a program expects them as a shell leaves them.
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


class NoSuchProgram(PatcherError):
    """The program to start is not there, or is none."""

    code = "no-such-program"


@dataclass(frozen=True, slots=True)
class SpawnedProcess:
    """A program we started: its pid, whether its addresses are random, and a note for the user ("" for none)."""

    pid: int
    randomized: bool
    note: str


def spawn(
    program: str,
    arguments: Sequence[str],
    *,
    aslr: bool = False,
    environment: Mapping[str, str] | None = None,
    signal_mask: Collection[int] | None = None,
) -> SpawnedProcess:
    """Start `program` (searched in PATH if it has no slash) with `arguments` (without argv[0]).

    It keeps our terminal, process group, working directory, inheritable descriptors and environment (unless
    given). `signal_mask` is what it shall have blocked, if not what we have (JobControl.original_mask). Unless
    `aslr`, its addresses are not randomised; where the kernel does not allow that, `note` says so. The program
    is mapped when this returns. Raises NoSuchProgram.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ()) if signal_mask is None else signal_mask
    with _fixed_addresses(not aslr) as fixed:
        try:
            pid = os.posix_spawnp(
                program,
                [program, *arguments],
                _own_environment() if environment is None else environment,
                setsigmask=mask,
                setsigdef=_IGNORED_BY_PYTHON,
            )
        except (OSError, ValueError) as error:
            raise _no_such_program(program, error) from error
    forget_exit(pid)
    await_program(pid, executed=True)
    randomized = _is_randomized(pid, default=not fixed)
    return SpawnedProcess(pid, randomized, _note(program, aslr, fixed, randomized))


def _own_environment() -> dict[str, str]:
    # In the C locale, Python adds an LC_CTYPE that nobody gave it (PEP 538); the program shall not have it either.
    environment = dict(os.environ)
    given = Path("/proc/self/environ").read_bytes().split(b"\0")
    if not any(entry.startswith(b"LC_CTYPE=") for entry in given) and environment.get("LC_CTYPE") in _COERCED:
        del environment["LC_CTYPE"]
    return environment


@contextmanager
def _fixed_addresses(wanted: bool) -> Iterator[bool]:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.personality.argtypes, libc.personality.restype = (ctypes.c_ulong,), ctypes.c_int
    before = libc.personality(_QUERY)
    if not wanted or before == -1:
        yield bool(before != -1 and before & _ADDR_NO_RANDOMIZE)
        return
    fixed = libc.personality(before | _ADDR_NO_RANDOMIZE) != -1
    try:
        yield fixed
    finally:
        libc.personality(before)


def _is_randomized(pid: int, *, default: bool) -> bool:
    # A set-user-ID program takes the personality off again; so ask what it came to.
    try:
        return not int(Path(f"/proc/{pid}/personality").read_text(encoding="ascii"), 16) & _ADDR_NO_RANDOMIZE
    except (OSError, ValueError):
        return default


def _note(program: str, aslr: bool, fixed: bool, randomized: bool) -> str:
    if aslr or not randomized:
        return ""
    why = "the program has privileges of its own" if fixed else "the kernel refused personality(ADDR_NO_RANDOMIZE)"
    return f"{program} runs at random addresses: {why}"


def _is_program(path: Path) -> bool:
    """Tell whether a file is an ELF file or a script, or may not be read: then it is taken for one."""
    try:
        with path.open("rb") as file:
            return file.read(4).startswith((b"\x7fELF", b"#!"))
    except OSError:
        return True


def _no_such_program(program: str, error: OSError | ValueError) -> NoSuchProgram:
    number = error.errno if isinstance(error, OSError) else None
    found = program if "/" in program else shutil.which(program, mode=os.F_OK)
    if not program or "\0" in program or number is None:
        return NoSuchProgram(f"{program!r} cannot be started: {error}", "name a program")
    if found is None:
        return NoSuchProgram(f"there is no program {program} in PATH", f"write ./{program} for one in this directory")
    path = Path(found)
    if path.is_dir():
        return NoSuchProgram(f"{program} is a directory, not a program", "name the program's file")
    if not path.exists():
        return NoSuchProgram(f"there is no program {program}", "build it first, or correct the path")
    if number == errno.ENOENT:
        return NoSuchProgram(f"{program} is there, but the interpreter that it names is not")
    if number in (errno.EACCES, errno.ENOEXEC) and not _is_program(path):
        return NoSuchProgram(f"{program} is not a program", "name what the linker made, and build it first if need be")
    if number == errno.EACCES:
        return NoSuchProgram(f"{program} may not be executed by us", f"chmod +x {program}")
    if number == errno.ENOEXEC:
        return NoSuchProgram(
            f"{program} is not a program that this machine can run", "name a 64-bit x86-64 ELF program"
        )
    return NoSuchProgram(f"{program} cannot be started: {os.strerror(number)}")
