"""`patcher spawn`: start a program and, with --watch, keep its code as its sources are."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any

import click

from patcher.cli.options import Common, common, gather
from patcher.errors import PatcherError, TargetGone
from patcher.report import Exited, Note, Ready, Reporter
from patcher.target import JobControl, exit_code, wait_exit
from patcher.target import spawn as start


@click.command()
@click.argument("program")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--aslr/--no-aslr", default=False, help="Leave address randomisation on (default: off).")
@click.option(
    "--restart",
    type=click.Choice(["exit", "refused", "always"]),
    help="Start it again when it exits, or when a change is refused (which takes --build), or both.",
)
@common(watch=True)
def spawn(program: str, arguments: tuple[str, ...], aslr: bool, restart: str | None, **rest: Any) -> int:
    """Start PROGRAM, and apply every save below the watched paths to it.

    \b
    patcher spawn ./prog --watch src/
    patcher spawn --watch src/ -- ./prog -x file
    patcher spawn ./prog --watch src/ --build make --restart always

    What follows -- is the program's own. The exit status is the program's (128+N when signal N killed it).
    """
    asked = gather(rest)
    if restart and not asked.watch:
        raise click.UsageError("--restart: of what sources? give them with --watch")
    if restart in ("refused", "always") and not asked.build:
        raise click.UsageError(f"--restart {restart} needs --build, the command that makes the program anew")
    with asked.reporter() as reporter, JobControl() as jobs:

        def begin() -> int:
            child = start(program, arguments, aslr=aslr, signal_mask=jobs.original_mask)
            jobs.forward_to(child.pid)
            if child.note:
                reporter.emit(Note(child.note))
            return child.pid

        if restart:
            from patcher.restart import Restarts, When

            when = When.named(restart)
            again = Restarts(begin, partial(asked.session, reporter=reporter), jobs, reporter, when, asked.build)
            return exit_code(again.run(asked.watch) or 0)
        pid = begin()
        try:
            _accompany(pid, asked, reporter, jobs)
        except PatcherError as error:
            reporter.emit(Note(f"{error.message}; the program runs on without patcher. {error.hint}".rstrip(" .")))
        return _end(wait_exit(pid), reporter)


def _accompany(pid: int, asked: Common, reporter: Reporter, jobs: JobControl) -> None:
    try:
        with asked.session(pid, reporter) as session:
            if asked.watch:
                session.watch(asked.watch, stop=jobs.ended)
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
