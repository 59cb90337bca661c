"""Whether this machine lets us trace and write to a process: tried on one of our own, for settings do not tell it all.

Decides what a container, Yama or the kernel forbids. Specification: ptrace(2), personality(2), inotify(7), and the
kernel's Documentation/admin-guide/LSM/Yama.rst.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from patcher.build import Family, identify
from patcher.doctor.finding import Finding, bad, good, note
from patcher.errors import PatcherError
from patcher.target import Target, has_trace_capability, read_status, spawn, yama_scope

_COMPILERS = ("gcc", "g++", "clang", "clang++")
_WATCHES = Path("/proc/sys/fs/inotify/max_user_watches")
_FEW_WATCHES = 8192  # directories; what kernels allowed before 5.11


def examine_machine() -> tuple[Finding, ...]:
    """Look at kernel, Python, permissions and compilers. Starts a process, and ends it."""
    return (_system(), good("python", platform.python_version()), *_trial(), *_permissions(), _watches(), _compilers())


def _system() -> Finding:
    found = f"{platform.system()} {platform.release()} on {platform.machine()}"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return bad("system", found, "patcher changes x86-64 programs on Linux, from there")
    return good("system", found)


def _trial() -> Iterator[Finding]:
    """Start a process, stop it, and write to its code what is there already."""
    try:
        child = spawn("sleep", ["60"])
    except PatcherError as error:
        yield bad("tracing", f"no process could be started to try it on: {error.message}", error.hint)
        return
    try:
        yield from _try_on(child.pid)
        if child.note:
            yield note("addresses", child.note, "nothing needs to be done; in a container, its seccomp profile decides")
        else:
            yield good("addresses", "spawned programs get fixed addresses (personality)")
    finally:
        os.kill(child.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(child.pid, 0)


def _try_on(pid: int) -> Iterator[Finding]:
    try:
        with Target.attach(pid) as target:
            with target.stopped():
                code = next(m for m in target.mappings() if m.executable and m.path.startswith("/"))
                text = target.memory.read(code.start, 16)
            target.memory.write(code.start, text)
            yield good("tracing", "a process was stopped, and its code written to")
    except PatcherError as error:
        yield bad(
            "tracing",
            f"a process of our own could not be changed: {error.message}",
            error.hint or "in a container, run it with --cap-add=SYS_PTRACE --security-opt seccomp=unconfined",
        )


def _permissions() -> Iterator[Finding]:
    scope, mighty = yama_scope(), has_trace_capability()
    if mighty:
        yield good("attaching", "with CAP_SYS_PTRACE, to any process")
    elif scope in (None, 0):
        yield good("attaching", "to processes of the same user")
    else:
        what = {1: "to descendants only: `patcher spawn` works, `patcher attach` does not", 2: "to no process"}
        yield (note if scope == 1 else bad)(
            "attaching",
            f"kernel.yama.ptrace_scope is {scope}: {what.get(scope or 0, 'to no process until the next boot')}",
            "run `sysctl kernel.yama.ptrace_scope=0`, or patcher as root"
            if scope != 3
            else "boot with another setting of kernel.yama.ptrace_scope",
        )
    if read_status(os.getpid()).get("Seccomp", "0") != "0":
        yield note(
            "seccomp",
            "we run under a seccomp filter (a container?), and so do programs that are started here",
            "where a system call is refused, run the container with --security-opt seccomp=unconfined",
        )


def _watches() -> Finding:
    try:
        limit = int(_WATCHES.read_text("ascii"))
    except (OSError, ValueError):
        return note("watching", "no telling how many directories may be watched")
    if limit < _FEW_WATCHES:
        return note(
            "watching",
            f"no more than {limit} directories may be watched",
            "for larger trees, run `sysctl fs.inotify.max_user_watches=524288`",
        )
    return good("watching", f"up to {limit} directories (inotify)")


def _compilers() -> Finding:
    found = []
    for name in _COMPILERS:
        if shutil.which(name):
            compiler = identify((name,), Path.cwd())
            found.append(f"{name} {compiler.major}" if compiler.family is not Family.OTHER else name)
    if not found:
        return note("compilers", f"none of {', '.join(_COMPILERS)}", "install the one that the program is built with")
    return good("compilers", ", ".join(found))
