"""The process: what /proc says about it, and whether we may work on it.

Decides which processes are refused, and with which sentence. Does not stop or trace anything. Specification:
proc_pid_stat(5), proc_pid_status(5), ptrace(2) "Ptrace access mode checking".
"""

from __future__ import annotations

import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from patcher.errors import AttachDenied, TargetGone

_PF_KTHREAD = 0x00200000
_PF_FORKNOEXEC = 0x00000040
_ELF_64, _EM_X86_64 = 2, 62
_CAP_SYS_PTRACE = 19
_YAMA = "/proc/sys/kernel/yama/ptrace_scope"
_MACHINES = {3: "32-bit x86", 40: "32-bit ARM", 183: "64-bit ARM", 243: "RISC-V"}


@dataclass(frozen=True, slots=True)
class Stat:
    """Some fields of /proc/<pid>/stat: state letter, kernel flags, start time in clock ticks since boot.

    `start_stack` is where the kernel put argc at the start; 0 or 1 when it does not tell.
    """

    state: str
    flags: int
    start_time: int
    start_stack: int = 0


def read_stat(pid: int) -> Stat:
    """Read a process's stat; raises TargetGone when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name in parentheses may hold anything, parentheses too: the last one ends it.
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise TargetGone(f"there is no process {pid}") from error
    return Stat(chr(fields[0][0]), int(fields[6]), int(fields[19]), int(fields[25]))


def read_parent(pid: int) -> int:
    """Return the process that a process was started by, or was handed to; raises TargetGone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError) as error:
        raise TargetGone(f"there is no process {pid}") from error


def read_status(pid: int, tid: int | None = None) -> dict[str, str]:
    """Read /proc/<pid>/status (of one thread, if given) as name -> text; empty when it is gone."""
    path = f"/proc/{pid}/status" if tid is None else f"/proc/{pid}/task/{tid}/status"
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}
    except (FileNotFoundError, ProcessLookupError):
        return {}


def tracer_of(pid: int, tid: int | None = None) -> int:
    """Return the pid of the process that traces a thread (default: the leader), 0 for none."""
    return int(read_status(pid, tid).get("TracerPid", "0"))


def command_name(pid: int) -> str:
    """Return the short name of a process, "?" when it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return "?"


def check_attachable(pid: int) -> None:
    """Raise TargetGone or AttachDenied, saying why, unless `pid` is a process that patcher can work on."""
    stat = read_stat(pid)
    _refuse_ourselves(pid)
    name = command_name(pid)
    if stat.flags & _PF_KTHREAD:
        raise AttachDenied(
            f"process {pid} ({name}) is a thread of the kernel, it runs no program", "name a user process"
        )
    if stat.state in "ZX" and len(os.listdir(f"/proc/{pid}/task")) < 2:
        parent = read_status(pid).get("PPid", "?")
        raise TargetGone(
            f"process {pid} ({name}) has ended already: it is a zombie that its parent {parent} has not collected"
        )
    if stat.state in "ZX":
        raise AttachDenied(
            f"the main thread of process {pid} ({name}) has ended while others run on; the kernel then no longer "
            "shows its program",
            "attach before the main thread calls pthread_exit",
        )
    _refuse_thread(pid)
    program = _program_or_denied(pid, name)
    _refuse_machine(pid, program)


def await_program(pid: int, *, executed: bool = False, seconds: float = 1.0) -> None:
    """Wait until a process that is just replacing its program has the new one in memory, or has ended.

    `executed` says that it is known to be forked in order to execute a program: until it has, its memory may
    be that of its parent, ours. What fork leaves to a child that never executes one is not waited for.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            stat = read_stat(pid)
            # The kernel fills in the auxiliary vector last, when all of the program is mapped.
            loaded = any(Path(f"/proc/{pid}/auxv").read_bytes()[:8])
        except (TargetGone, OSError):
            return
        if stat.state in "ZX" or (loaded and not (executed and stat.flags & _PF_FORKNOEXEC)):
            return
        time.sleep(0.0002)


def permission_denied(pid: int, name: str) -> AttachDenied:
    """Say which of the kernel's rules keeps us from a process: Yama, its owner, or its not being dumpable."""
    status = read_status(pid)
    ours, theirs = os.geteuid(), int(status.get("Uid", "-1").split()[0])
    scope = yama_scope()
    what = f"not permitted to trace process {pid} ({name})"
    if ours != theirs and not has_trace_capability():
        return AttachDenied(
            f"{what}: it belongs to user {theirs}, we are user {ours} without CAP_SYS_PTRACE",
            f"run patcher as user {theirs} or as root",
        )
    if scope == 3:
        return AttachDenied(
            f"{what}: kernel.yama.ptrace_scope is 3, no process may be traced until the next boot",
            "boot with another setting of kernel.yama.ptrace_scope",
        )
    if scope == 2 and not has_trace_capability():
        return AttachDenied(
            f"{what}: kernel.yama.ptrace_scope is 2, tracing needs CAP_SYS_PTRACE", "run patcher as root"
        )
    if scope == 1 and not has_trace_capability():
        return AttachDenied(
            f"{what}: kernel.yama.ptrace_scope is 1, only descendants may be traced",
            "start it with `patcher spawn`, or run `sysctl kernel.yama.ptrace_scope=0`, or run patcher as root",
        )
    if ours == theirs:
        return AttachDenied(
            f"{what}: it is not dumpable, or holds privileges that we lack "
            f"(its capabilities {status.get('CapPrm', '?')}, ours {read_status(os.getpid()).get('CapPrm', '?')})",
            "run patcher as root; a set-user-ID program or one that called prctl(PR_SET_DUMPABLE, 0) needs that",
        )
    return AttachDenied(
        f"{what}: the kernel refuses, though we have CAP_SYS_PTRACE (pid namespace or security module?)",
        "run patcher inside the same container as the process, with CAP_SYS_PTRACE",
    )


def _refuse_ourselves(pid: int) -> None:
    if pid == os.getpid():
        raise AttachDenied(f"process {pid} is patcher itself, it cannot patch itself", "name another process")


def _refuse_thread(pid: int) -> None:
    group = int(read_status(pid).get("Tgid", str(pid)))
    if group == pid:
        return
    owner = "patcher itself" if group == os.getpid() else f"process {group} ({command_name(group)})"
    raise AttachDenied(f"{pid} is a thread of {owner}, not a process", f"name the process: {group}")


def _program_or_denied(pid: int, name: str) -> str:
    try:
        program = os.readlink(f"/proc/{pid}/exe")
        os.close(os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC))
        os.close(os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC))
    except PermissionError as error:
        raise permission_denied(pid, name) from error
    except (FileNotFoundError, ProcessLookupError) as error:
        raise TargetGone(f"process {pid} ({name}) has ended") from error
    return program


def _refuse_machine(pid: int, program: str) -> None:
    try:
        with open(f"/proc/{pid}/exe", "rb") as file:
            header = file.read(20)
    except PermissionError:
        return  # A program that may be run but not read: the mapped header is checked by whoever reads it.
    except (FileNotFoundError, ProcessLookupError) as error:
        raise TargetGone(f"process {pid} has ended") from error
    if header[:4] != b"\x7fELF" or len(header) < 20:
        raise AttachDenied(f"the program of process {pid}, {program}, is not an ELF file")
    (machine,) = struct.unpack_from("<H", header, 18)
    if header[4] != _ELF_64 or machine != _EM_X86_64:
        kind = _MACHINES.get(machine, f"ELF machine {machine}")
        raise AttachDenied(
            f"process {pid} runs {program}, a program for {kind} (class {header[4]}, machine {machine})",
            "patcher works on 64-bit x86-64 programs",
        )


def yama_scope() -> int | None:
    """Return kernel.yama.ptrace_scope; None where the kernel has no Yama."""
    try:
        return int(Path(_YAMA).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def has_trace_capability() -> bool:
    """Tell whether we may trace whom we like (CAP_SYS_PTRACE)."""
    effective = int(read_status(os.getpid()).get("CapEff", "0"), 16)
    return bool(effective >> _CAP_SYS_PTRACE & 1)
