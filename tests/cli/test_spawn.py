"""patcher spawn: the program does not see that it was not started by the shell."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from .conftest import COMMAND, ENVIRONMENT, ROOT, SECONDS, run, sentences


@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 3", 3), ("kill -KILL $$", 137), ("kill -SEGV $$", 139)]
)
def test_the_exit_status_is_the_programs(script, status):
    assert run("spawn", "sh", "--", "-c", script).returncode == status


def test_nothing_of_ours_is_on_stdout():
    done = subprocess.run(
        [*COMMAND, "spawn", "cat"], input=bytes(range(256)) * 500, capture_output=True, timeout=SECONDS, check=True
    )
    assert done.stdout == bytes(range(256)) * 500


ARGUMENTS = ["printf", "%s|", "-x", "--watch", "a b", "--"]


@pytest.mark.parametrize(
    "command",
    [
        ["spawn", "printf", "--", *ARGUMENTS[1:]],
        ["spawn", "--", *ARGUMENTS],
        ["spawn", "printf", "--quiet", "--", *ARGUMENTS[1:]],
        ["spawn", "--quiet", "printf", "--", *ARGUMENTS[1:]],
        ["spawn", "--quiet", "--", *ARGUMENTS],
        ["spawn", "--watch", ".", "--", *ARGUMENTS],
        ["spawn", "printf", "--watch", ".", "--", *ARGUMENTS[1:]],
    ],
    ids=" ".join,
)
def test_what_follows_the_dashes_is_the_programs_own(command, tmp_path):
    done = run(*command, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "-x|--watch|a b|--|")


def without_internal_signals(status):
    """Clear signals 32 and 33 in the mask of ignored ones: glibc's posix_spawn leaves its own two ignored."""
    return re.sub(r"(?<=SigIgn:\t)[0-9a-f]{16}", lambda found: f"{int(found[0], 16) & ~0x180000000:016x}", status)


def test_the_program_inherits_what_a_shell_would_give_it(tmp_path):
    """Environment, descriptors, signal mask and dispositions, directory, group, limits."""
    script = (
        "cat /proc/self/environ | tr '\\0' '\\n' | grep -v ^_= | sort; ls -1 /proc/self/fd; pwd; umask; ulimit -a;"
        " grep -E '^Sig(Blk|Ign|Cgt)' /proc/self/status; cat <&3; echo hello >&4"
    )
    outputs = []
    for prefix in ([], [*COMMAND, "spawn", "--quiet", "--"]):
        (tmp_path / "in").write_text("from descriptor 3\n")
        shell = f'exec {" ".join(prefix)} sh -c "$SCRIPT" 3<in 4>out'
        done = subprocess.run(
            ["sh", "-c", shell],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": ROOT, "SCRIPT": script},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        )
        outputs.append((without_internal_signals(done.stdout), (tmp_path / "out").read_text()))
    assert outputs[0] == outputs[1]
    assert "from descriptor 3" in outputs[0][0]
    assert outputs[0][1] == "hello\n"


def addresses(*options: str) -> str:
    return run("spawn", *options, "--", "cat", "/proc/self/maps").stdout


def test_addresses_are_fixed_unless_asked_for():
    assert addresses() == addresses("--no-aslr") != ""
    assert len({addresses("--aslr") for _ in range(3)}) > 1


@pytest.mark.parametrize(
    ("program", "found"),
    [
        ("./missing", "there is no program ./missing"),
        ("no-such-program-in-path", "there is no program no-such-program-in-path in PATH"),
        ("./", "is a directory"),
        ("./text", "./text is not a program"),
        ("./garbage", "is not a program that this machine can run"),
        ("./lost", "the interpreter"),
    ],
)
def test_a_program_that_cannot_be_started(program, found, tmp_path):
    (tmp_path / "text").write_text("hello\n")
    (tmp_path / "garbage").write_bytes(b"\x7fELF garbage")
    (tmp_path / "garbage").chmod(0o755)
    (tmp_path / "lost").write_text("#!/no/such/interpreter\n")
    (tmp_path / "lost").chmod(0o755)
    done = run("spawn", program, cwd=tmp_path)
    (sentence,) = sentences(done.stderr)
    assert found in sentence
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["spawn", "cat", "--watch", "scr"], "scr: no such file or directory"),
        (["spawn"], "which program?"),
        (["spawn", "cat", "--wacth", "."], "--wacth"),
        (["spawn", "cat", "--compile-commands", "nowhere.json", "--watch", "."], "nowhere.json"),
        (["attach", "x"], "'x' is not a process id"),
        (["apply", "1"], "which files?"),
        (["revert", "1", "-3"], "-3"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_wrong_usage(arguments, found, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert found in done.stderr
    assert "Traceback" not in done.stderr


def test_a_signal_to_patcher_reaches_the_program_once(tmp_path):
    script = "trap 'echo got; exit 5' TERM; echo $$; while :; do read line; done"
    with subprocess.Popen(
        [*COMMAND, "spawn", "sh", "--", "-c", script], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as patcher:
        assert patcher.stdout.readline().strip().isdigit()
        patcher.send_signal(signal.SIGTERM)
        assert patcher.stdout.read() == b"got\n"
        assert patcher.wait(SECONDS) == 5


def test_a_signal_that_kills_the_program_is_its_exit_status():
    with subprocess.Popen(
        [*COMMAND, "spawn", "sh", "--", "-c", "echo $$; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as patcher:
        patcher.stdout.readline()
        patcher.send_signal(signal.SIGTERM)
        assert patcher.wait(SECONDS) == 128 + signal.SIGTERM


def test_the_program_outlives_a_killed_patcher(tmp_path):
    with subprocess.Popen(
        [*COMMAND, "spawn", "sh", "--", "-c", "echo $$; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as patcher:
        pid = int(patcher.stdout.readline())
        patcher.kill()
        patcher.wait(SECONDS)
        patcher.stdin.write(b"still here\n")
        patcher.stdin.flush()
        assert patcher.stdout.readline() == b"still here\n"
        assert Path(f"/proc/{pid}").exists()
        os.kill(pid, signal.SIGKILL)
