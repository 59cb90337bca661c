"""Attaching: what is read of a process, and the sentences for those that cannot be attached to."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from project import statuses

from patcher.errors import AttachDenied, ObjectError, PatcherError, TargetBusy, TargetGone
from patcher.target import Mapping, SystemCall, Target, WriteRefused, stop
from patcher.target.maps import read_mappings
from patcher.target.process import tracer_of

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")


def denied_as_another_user(pid: int, uid: int) -> str:
    """What Target.attach says in a process of another user."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            Target.attach(pid)
            os.write(writing, b"attached")
        except PatcherError as error:
            os.write(writing, f"{type(error).__name__} {error.exit_status}: {error.message} | {error.hint}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as answers:
        answer = answers.read()
    os.waitpid(child, 0)
    return answer


def test_what_is_read_of_a_process(start, attach):
    program = start("signals")
    target = attach(program.pid)
    assert target.pid == program.pid
    assert Path(target.program).name.startswith("signals")
    assert target.start_time > 0
    assert target.threads() == (program.pid,)
    assert target.alive()
    assert target.environ()["PATH"] == os.environ["PATH"]
    entry = target.auxv()[9]
    text = next(mapping for mapping in target.mappings() if entry in mapping)
    assert text.executable
    assert text.private
    assert text.readable
    assert not text.writable
    assert target.memory.read(target.auxv()[33], 4) == b"\x7fELF"
    assert statuses(program.pid, "TracerPid") == {"0"}
    assert program.finish() == 0
    assert not target.alive()
    with pytest.raises(TargetGone, match=f"process {program.pid} .* has ended"):
        target.check_alive()
    for gone in (target.mappings, target.auxv, target.environ, lambda: target.memory.read(entry, 4)):
        with pytest.raises(TargetGone):
            gone()
    assert target.threads() == ()


def test_memory_in_bulk(start, attach):
    program = start("signals")
    target = attach(program.pid)
    (page,) = target.inject([SystemCall(9, (0, 3 * 4096, 5, 0x22, -1, 0))])
    data = os.urandom(2 * 4096)
    target.memory.write(page + 100, data)
    assert target.memory.read(page + 100, len(data)) == data
    target.memory.write(page, (0x1122334455667788).to_bytes(8, "little") + b"text\0")
    assert target.memory.read_u64(page) == 0x1122334455667788
    assert target.memory.read(page + 8, 5) == b"text\0"
    target.memory.write(page + 4090, b"across pages\0")
    assert target.memory.read(page + 4090, 13) == b"across pages\0"
    with pytest.raises(PatcherError, match="0x1000") as caught:
        target.memory.read(0x1000, 8)
    assert caught.value.code == "bad-address"
    with pytest.raises(WriteRefused, match="0x1000"):
        target.memory.write(0x1000, b"x")
    target.inject([SystemCall(11, (page + 2 * 4096, 4096))])
    with pytest.raises(WriteRefused, match="took 4096"):
        target.memory.write(page + 4096, bytes(8192))
    assert program.ask("report") == "0 0 0"


def test_memory_of_a_program_that_was_replaced_is_gone(attach):
    command = ["sh", "-c", "read line; exec cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as shell:
        target = attach(shell.pid)
        entry = target.auxv()[9]
        assert len(target.memory.read(entry, 16)) == 16
        shell.stdin.write(b"go\nhello\n")
        shell.stdin.flush()
        assert shell.stdout.readline() == b"hello\n"
        with pytest.raises(TargetGone, match="replaced its program"):
            target.memory.read(entry, 16)
        shell.stdin.close()


def test_lines_of_maps():
    lines = [
        "7f00-7f10 r-xp 00001000 fd:01 42                         /tmp/a b\\012c (deleted)\n",
        "8000-9000 rw-p 00000000 00:00 0 \n",
        "9000-a000 rw-s 00000000 00:01 7                          /memfd:patcher (deleted)\n",
        "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n",
    ]
    first, anonymous, shared, kernel = read_mappings(lines)
    assert first == Mapping(0x7F00, 0x7F10, "r-xp", 0x1000, "fd:01", 42, "/tmp/a b\nc", True)
    assert first.size == 16
    assert (anonymous.path, anonymous.writable, anonymous.executable) == ("", True, False)
    assert (shared.path, shared.deleted, shared.private) == ("/memfd:patcher", True, False)
    assert (kernel.path, kernel.readable) == ("[vsyscall]", False)


def test_the_very_file_that_is_mapped(build, tmp_path, attach):
    program = tmp_path / "program"
    shutil.copy(build("signals"), program)
    original = program.read_bytes()
    with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        target = attach(process.pid)
        program.unlink()
        program.write_bytes(b"another file of the same name")
        mapping = next(m for m in target.mappings() if m.inode)
        assert mapping.deleted
        assert mapping.path == str(program)
        assert target.open_image(mapping).read_bytes() == original
        vdso = next(m for m in target.mappings() if m.path == "[vdso]")
        with pytest.raises(ObjectError, match=r"\[vdso\]"):
            target.open_image(vdso)
        process.stdin.close()


@ROOT
def test_an_ordinary_user_finds_files_by_name_only_if_they_are_the_same(build, tmp_path):
    # Without the privilege for map_files: by path while the file is the same, by exe when it was replaced.
    shared = Path("/tmp") / f"patcher-image-{os.getpid()}"
    shutil.copy(build("signals"), shared)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            with subprocess.Popen([shared], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
                process.stdout.readline()
                with Target.attach(process.pid) as target:
                    first = next(m for m in target.mappings() if m.inode)
                    os.write(writing, f"{target.open_image(first)}\n".encode())
                    libc = next(m for m in target.mappings() if "libc.so" in m.path)
                    os.write(writing, f"{target.open_image(libc)}\n".encode())
                    os.write(writing, f"{target.inject([SystemCall(39)]) == (process.pid,)}\n".encode())
                process.stdin.close()
        except BaseException as error:
            os.write(writing, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as answers:
        program, libc, injected = answers.read().splitlines()
    os.waitpid(child, 0)
    shared.unlink()
    assert program.endswith(f"/root{shared}")
    assert "/root/" in libc
    assert injected == "True"


def test_no_such_process():
    with pytest.raises(TargetGone, match="no process 4194303"):
        Target.attach(4194303)
    with pytest.raises(TargetGone, match="no process -1"):
        Target.attach(-1)
    assert TargetGone.exit_status == AttachDenied.exit_status == 3


def test_a_zombie():
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(TargetGone, match=f"zombie that its parent {os.getpid()}"):
        Target.attach(process.pid)
    process.wait()


def test_a_kernel_thread():
    if not Path("/proc/2/status").exists() or "Kthread:\t1" not in Path("/proc/2/status").read_text():
        pytest.skip("no kernel threads in this pid namespace")
    with pytest.raises(AttachDenied, match="thread of the kernel"):
        Target.attach(2)


def test_ourselves_and_threads(start):
    with pytest.raises(AttachDenied, match="patcher itself"):
        Target.attach(os.getpid())
    program = start("signals", "spinning")
    other = next(int(tid) for tid in os.listdir(f"/proc/{program.pid}/task") if int(tid) != program.pid)
    with pytest.raises(AttachDenied, match=f"{other} is a thread of process {program.pid}"):
        Target.attach(other)


def test_a_32_bit_program(tmp_path):
    source = tmp_path / "narrow.c"
    source.write_text("int main(void) { for (;;) {} }\n")
    binary = tmp_path / "narrow"
    if subprocess.run(["gcc", "-m32", "-static", "-o", binary, source], capture_output=True).returncode:
        source.write_text("void _start(void) { for (;;) {} }\n")
        if subprocess.run(
            ["gcc", "-m32", "-nostdlib", "-static", "-o", binary, source], capture_output=True
        ).returncode:
            pytest.skip("the compiler builds no 32-bit programs")
    try:
        process = subprocess.Popen([binary])
    except OSError as error:
        pytest.skip(f"32-bit programs do not run here: {error}")
    try:
        with pytest.raises(AttachDenied, match="32-bit x86"):
            Target.attach(process.pid)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("tracer", ["strace", "gdb"])
def test_a_traced_process_can_be_looked_at_and_written_to_and_names_its_tracer(start, attach, tracer):
    if shutil.which(tracer) is None:
        pytest.skip(f"no {tracer} here")
    program = start("signals")
    target = attach(program.pid)
    pid = str(program.pid)
    command = {"strace": ["strace", "-q", "-p", pid], "gdb": ["gdb", "-q", "-nx", "-batch-silent", "-p", pid]}[tracer]
    if tracer == "gdb":
        command += ["-ex", "continue"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while statuses(program.pid, "TracerPid") == {"0"}:
            time.sleep(0.005)
        for each in (target, attach(program.pid)):
            text = next(m for m in each.mappings() if m.executable)
            each.memory.write(text.end - 1, each.memory.read(text.end - 1, 1))
            with pytest.raises(TargetBusy, match=rf"traced by process {process.pid} \({tracer}\)"), each.stopped():
                pass
            with pytest.raises(TargetBusy, match=rf"traced by process {process.pid} \({tracer}\)"):
                each.inject([SystemCall(39)], timeout=0.1)
    finally:
        process.send_signal(signal.SIGINT if tracer == "gdb" else signal.SIGTERM)
        process.terminate()
        process.wait()
    while statuses(program.pid, "TracerPid") != {"0"}:
        time.sleep(0.005)


@ROOT
def test_processes_that_we_may_not_trace(start):
    program = start("signals")
    answer = denied_as_another_user(program.pid, 65534)
    assert answer.startswith(f"AttachDenied 3: not permitted to trace process {program.pid}")
    assert "belongs to user 0, we are user 65534 without CAP_SYS_PTRACE" in answer
    assert "not permitted to trace process 1 " in denied_as_another_user(1, 65534)


@ROOT
def test_a_process_that_is_not_dumpable(tmp_path):
    script = (
        "import ctypes, os, sys; os.setuid(65534); ctypes.CDLL(None).prctl(4, 0); print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        answer = denied_as_another_user(process.pid, 65534)
        process.stdin.close()
    assert "it is not dumpable" in answer
    assert "run patcher as root" in answer


@ROOT
@pytest.mark.parametrize("gives_up", [False, True], ids=["it keeps what it got", "it gives it up"])
def test_a_setuid_program_is_not_for_who_started_it(gives_up):
    """Whoever may start it must not have it do something else; root may."""
    source = f"""
    #define _GNU_SOURCE
    #include <stdio.h>
    #include <unistd.h>
    int main(void)
    {{
        if (geteuid() || ({int(gives_up)} && setresuid(65534, 65534, 65534)))
            return 1;
        puts("ready");
        fflush(stdout);
        return getchar() > 0;
    }}
    """
    with tempfile.TemporaryDirectory() as place:  # where everybody may go, unlike in the directories of tests
        program = Path(place) / "program"
        os.chmod(place, 0o755)
        subprocess.run(["gcc", "-x", "c", "-o", program, "-"], input=source, text=True, check=True)
        program.chmod(0o4755)
        options = {"user": 65534, "group": 65534, "extra_groups": []}
        with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options) as process:
            if process.stdout.readline() != b"ready\n":
                pytest.skip("programs do not become setuid here")
            answer = denied_as_another_user(process.pid, 65534)
            with Target.attach(process.pid) as target:
                assert target.mappings()
            process.stdin.close()
    assert answer.startswith("AttachDenied 3: not permitted to trace process")
    assert "a set-user-ID program" in answer


LAST_PID = Path("/proc/sys/kernel/ns_last_pid")


def start_as(pid: int) -> subprocess.Popen[bytes]:
    """Start a program that gets a certain process number, which is free."""
    for _ in range(1000):
        try:
            LAST_PID.write_text(str(pid - 1))
        except OSError as error:
            pytest.skip(f"process numbers cannot be chosen here: {error}")
        started = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
        if started.pid == pid:
            return started
        started.communicate()
    pytest.skip("other programs on this machine took the number each time")


def test_a_number_that_was_given_away_is_not_the_process(start, attach):
    program = start("child")
    target = attach(program.pid)
    program.process.kill()
    program.process.wait(10)
    with start_as(target.pid) as stranger:
        try:
            assert not target.alive()
            # Also when it happens behind the first check, where only the number is left to go by.
            for block in (
                stop.stopped_process(target.pid, target._lingering),
                stop.stopped_thread(target.pid, target.pid, target._lingering),
            ):
                with pytest.raises(TargetGone), block:
                    pass
                assert tracer_of(stranger.pid) == 0
            with pytest.raises(TargetGone):
                target.memory.write(target.auxv()[3], b"\0")
        finally:
            stranger.communicate()
