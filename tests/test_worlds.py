"""Processes in other worlds than ours: another root directory, other machines, a kernel that says no."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import patcher

UNIT = """
#include <stdio.h>
__attribute__((noipa)) int answer(void) { return %d; }
int main(void)
{
    char line[100];
    while (fgets(line, sizeof line, stdin)) {
        printf("%%d\\n", answer());
        fflush(stdout);
    }
    return 0;
}
"""
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="chroot(2) takes root")

# execs its arguments where personality(2) can be read but not set
STRICT = """
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
int main(int count, char **words)
{
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_personality, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0xffffffff, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (count < 2 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
        return 99;
    execvp(words[1], words + 1);
    return 98;
}
"""


def build(folder: Path, *flags: str) -> Path:
    (folder / "unit.c").write_text(UNIT % 1)
    command = ["gcc", "-O1", "-c", "unit.c", "-o", "unit.o"]
    subprocess.run(command, cwd=folder, check=True)
    subprocess.run(["gcc", *flags, "-o", "program", "unit.o"], cwd=folder, check=True)
    entry = {"directory": str(folder), "file": "unit.c", "arguments": command}
    (folder / "compile_commands.json").write_text(json.dumps([entry]))
    return folder / "program"


def copy_with_libraries(program: Path, root: Path) -> None:
    root.mkdir()
    shutil.copy2(program, root / "program")
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for library in re.findall(r"(/\S+) \(0x", listed):
        place = root / library.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, place)


def ask(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("?\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@ROOT
def test_a_process_in_another_root_directory_is_patched(tmp_path: Path) -> None:
    program = build(tmp_path)
    copy_with_libraries(program, tmp_path / "root")
    program.unlink()  # by its own path, /program, it must not be looked for here either
    process = subprocess.Popen(
        [sys.executable, "-c", f"import os; os.chroot({str(tmp_path / 'root')!r}); os.execv('/program', ['program'])"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    try:
        assert ask(process) == "1"
        (tmp_path / "unit.c").write_text(UNIT % 2)
        with patcher.attach(process.pid, compile_commands=tmp_path / "compile_commands.json") as session:
            assert [f.name for f in session.apply(tmp_path / "unit.c").functions] == ["answer"]
            assert ask(process) == "2"
            session.revert()
            assert ask(process) == "1"
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("replaced", [False, True], ids=["deleted", "replaced"])
def test_a_program_whose_file_is_gone_is_patched(tmp_path: Path, replaced: bool) -> None:
    program = build(tmp_path)
    process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert ask(process) == "1"
        program.unlink()
        if replaced:
            shutil.copy2("/bin/true", program)
        (tmp_path / "unit.c").write_text(UNIT % 2)
        with patcher.attach(process.pid, compile_commands=tmp_path / "compile_commands.json") as session:
            session.apply(tmp_path / "unit.c")
        assert ask(process) == "2"
    finally:
        process.kill()
        process.communicate()


def test_a_32_bit_process_is_refused_in_one_sentence(tmp_path: Path) -> None:
    text = ".globl _start\n_start: mov $29, %eax\nint $0x80\njmp _start\n"  # pause(2), for ever
    subprocess.run(["as", "--32", "-o", "unit.o"], input=text, text=True, cwd=tmp_path, check=True)
    subprocess.run(["ld", "-m", "elf_i386", "-o", "program", "unit.o"], cwd=tmp_path, check=True)
    try:
        process = subprocess.Popen([tmp_path / "program"])
    except OSError:
        pytest.skip("this kernel runs no 32-bit programs")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "patcher", "status", str(process.pid)], capture_output=True, text=True
        )
        assert done.returncode == 3
        assert "32-bit" in done.stderr
        assert "Traceback" not in done.stderr
    finally:
        process.kill()
        process.wait()


def test_where_personality_is_refused_addresses_are_random_and_patching_works(tmp_path: Path) -> None:
    program = build(tmp_path)
    (tmp_path / "strict.c").write_text(STRICT)
    subprocess.run(["gcc", "-o", "strict", "strict.c"], cwd=tmp_path, check=True)
    events = tmp_path / "events"
    os.mkfifo(events)
    command = [tmp_path / "strict", sys.executable, "-m", "patcher", "spawn", program, "--watch", tmp_path]
    process = subprocess.Popen(
        [*map(str, command), "--events", str(events)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with events.open() as stream:
            assert '"ready"' in stream.readline()
            assert ask(process) == "1"
            (tmp_path / "unit.c").write_text(UNIT % 2)
            assert '"saved"' in stream.readline()
            assert '"applied"' in stream.readline()
            assert ask(process) == "2"
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait() == 0
        assert process.stderr is not None
        assert "random addresses: the kernel refused personality" in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
