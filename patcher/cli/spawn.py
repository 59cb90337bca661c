"""`patcher spawn`: start a program and, with --watch, keep its code as its sources are."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from patcher.cli.options import gather, open_reporter, open_session, takes
from patcher.errors import PatcherError, TargetGone
from patcher.options import Settings
from patcher.report import Exited, Note, Ready, Reporter
from patcher.target import JobControl, exit_code, wait_exit
from patcher.target import spawn as start


@click.command()
@click.argument("program")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@takes("spawn")
def spawn(program: str, arguments: tuple[str, ...], **rest: Any) -> int:
    """Start PROGRAM, and apply every save below the watched paths to it.

    \b
    patcher spawn ./prog --watch src/
    patcher spawn --watch src/ -- ./prog -x file

    What follows -- is the program's own. The exit status is the program's (128+N when signal N killed it).
    """
    asked = gather("spawn", rest)
    with open_reporter(asked) as reporter, JobControl() as jobs:
        child = start(program, arguments, aslr=asked.aslr, signal_mask=jobs.original_mask)
        jobs.forward_to(child.pid)
        if child.note:
            reporter.emit(Note(child.note))
        try:
            _accompany(child.pid, program, asked, reporter, jobs)
        except PatcherError as error:
            reporter.emit(Note(f"{error.message}; the program runs on without patcher. {error.hint}".rstrip(" .")))
        return _end(wait_exit(child.pid), reporter)


def _accompany(pid: int, program: str, asked: Settings, reporter: Reporter, jobs: JobControl) -> None:
    try:
        with open_session(asked, pid, reporter) as session:
            if asked.watched:
                session.watch(asked.watched, stop=jobs.ended)
            else:
                reporter.emit(Ready(pid, session.target.program, ()))
                jobs.ended.wait()
    except TargetGone:
        return


def _end(status: int | None, reporter: Reporter) -> int:
    if status is None:
        return 0
    if os.WIFSIGNALED(status):
        reporter.emit(Exited(signal=os.WTERMSIG(status)))
    else:
        reporter.emit(Exited(status=os.WEXITSTATUS(status)))
    sys.stderr.flush()
    return exit_code(status)
