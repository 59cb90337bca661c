"""`patcher attach`: with --watch, keep a running process's code as its sources are."""

from __future__ import annotations

import threading
from contextlib import closing
from typing import Any

import click

from patcher.cli.mistakes import pid_argument
from patcher.cli.options import gather, open_reporter, open_session, takes
from patcher.control import Control
from patcher.errors import TargetGone
from patcher.report import Exited, Note


@click.command()
@pid_argument
@takes("attach")
def attach(pid: int, **rest: Any) -> int:
    """Apply every save below the watched paths to process PID.

    Until the process ends, or Ctrl-C, which leaves it running with the code it has.
    Without --watch (or a configuration that has it), only check that the process can be patched.

    \b
    patcher attach 4711 --watch src/
    patcher attach 4711 --watch src/ --build 'make -s'     with the project's own build
    patcher attach 4711                                    can it be patched
    """
    asked = gather("attach", rest)
    with (
        closing(Control()) as control,
        open_reporter(asked, control, beside=pid) as reporter,
        open_session(asked, pid, reporter) as session,
    ):
        if not asked.watched:
            session.prepare()
            known = sum(1 for m in session.image.modules if m.module.symbols_from)
            reporter.emit(
                Note(f"process {pid} ({session.target.program}) can be patched; {known} of its modules have symbols")
            )
            return 0
        from patcher.loop import Loop

        try:
            Loop(session, asked.watched, control=control).run(threading.Event())
        except TargetGone:
            reporter.emit(Exited(status=None))
        except KeyboardInterrupt:
            reporter.emit(Note(f"process {pid} runs on"))
    return 0
