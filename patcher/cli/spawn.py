"""`patcher spawn`: start a program and, with --watch, keep its code as its sources are."""

from __future__ import annotations

import os
import sys
from contextlib import closing
from functools import partial
from typing import Any

import click

from patcher.cli.options import gather, open_reporter, open_session, takes
from patcher.control import Control
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
    patcher spawn ./prog --watch src/ --build make --restart always

    What follows -- is the program's own. The exit status is the program's (128+N when signal N killed it).
    """
    asked = gather("spawn", rest)
    again = asked.restart != "never"
    if again and not asked.watched:
        raise click.UsageError("--restart: of what sources? give them with --watch")
    if asked.restart in ("refused", "always") and not asked.build:
        raise click.UsageError(f"--restart {asked.restart} needs --build, the command that makes the program anew")
    with closing(Control()) as control, open_reporter(asked, control) as reporter, JobControl() as jobs:

        def begin() -> int:
            child = start(program, arguments, aslr=asked.aslr, signal_mask=jobs.original_mask)
            jobs.forward_to(child.pid)
            if child.note:
                reporter.emit(Note(child.note))
            return child.pid

        if again:
            from patcher.restart import Restarts, When

            session_of = partial(open_session, asked, reporter=reporter)
            restarts = Restarts(begin, session_of, jobs, reporter, When.named(asked.restart), asked, control)
            return exit_code(restarts.run(asked.watched) or 0)
        pid = begin()
        try:
            _accompany(pid, asked, reporter, jobs, control)
        except PatcherError as error:
            text = f"{error.message}; the program runs on without patcher. {error.hint}".rstrip(" .")
            reporter.emit(Note(text, grave=True))
        control.away()
        return _end(wait_exit(pid), reporter)


def _accompany(pid: int, asked: Settings, reporter: Reporter, jobs: JobControl, control: Control) -> None:
    try:
        with open_session(asked, pid, reporter) as session:
            if asked.watched:
                from patcher.loop import Loop

                Loop(session, asked.watched, control=control).run(jobs.ended)
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
