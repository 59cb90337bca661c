"""What every error has in common."""

from __future__ import annotations

import subprocess
import sys

import pytest

from patcher.errors import PatcherError

# Nothing more can be opened from here on, not even what is still to be imported.
WITHOUT_FILES = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3)); "


def test_messages_have_no_control_characters() -> None:
    error = PatcherError("`a\x1b[31mb\x07\udcff\x9b`\nis nöwhere", "see \x1b]0;")
    assert error.message == str(error) == "`a\\x1b[31mb\\x07\\udcff\\x9b`\nis nöwhere"
    assert error.hint == "see \\x1b]0;"


def test_what_cannot_even_be_begun_says_why() -> None:
    program = (
        "import patcher; "
        + WITHOUT_FILES
        + """
try:
    patcher.attach(os.getpid())
except patcher.PatcherError as error:
    print(error.code, error.message)
"""
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.startswith("system the system refused what patcher asked of it: Too many open files"), (
        done.stderr
    )


@pytest.mark.parametrize("words", [["status", "1", "--no-config"], ["apply", "1", "unit.c", "--no-config"], ["doctor"]])
def test_a_command_that_cannot_even_be_begun_says_why(words: list[str]) -> None:
    program = "from patcher.cli.main import main; " + WITHOUT_FILES + f"sys.argv[1:] = {words}; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("patcher: ")
    assert "Too many open files" in done.stderr
    assert done.returncode == 1
