"""`patcher monitor`: what a watch does, live, in a terminal of its own."""

from __future__ import annotations

import os
import select
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager

import click

from patcher.cli.mistakes import pid_argument
from patcher.control import Connection, result_of
from patcher.errors import PatcherError
from patcher.report.monitor import DOWN, ENTER, ESCAPE, UP, Redrawn, View, shown
from patcher.report.remote import told

_TICK_SECONDS = 0.1  # of a build in progress
_KEYS = {b"\x1b[A": UP, b"\x1bOA": UP, b"\x1b[B": DOWN, b"\x1bOB": DOWN, b"\x1b": ESCAPE, b"\r": ENTER, b"\n": ENTER}


@click.command()
@pid_argument
def monitor(pid: int) -> int:
    """Show what the patcher that watches for process PID does: saves, builds, functions, pauses, errors.

    \b
    patcher monitor 4711                   in a second terminal
    patcher monitor 4711 | tee log         without a terminal: plain lines

    Keys: q quits, p pauses and resumes, a applies what waits now, r goes back: to the generation whose number is typed,
    or chosen with the arrows; Enter does it, Esc does not.
    """
    with Connection(pid) as connection:
        if sys.stdin.isatty() and sys.stdout.isatty():
            view = View(pid)
            with _keys_at_once(), shown(view) as screen:
                _accompany(connection, view, screen)
            return 0
        connection.call("subscribe")
        for event in connection.events():
            for line in told(event):
                click.echo(line)
            sys.stdout.flush()
    return 0


@contextmanager
def _keys_at_once() -> Iterator[None]:
    """Get each key as it is pressed, and do not show it."""
    before = termios.tcgetattr(0)
    tty.setcbreak(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _accompany(connection: Connection, view: View, screen: Redrawn) -> None:
    connection.ask("subscribe")
    status = connection.ask("status")  # answered when no build is in progress
    while not view.left:
        screen.draw()
        wanted: list[int | Connection] = [0] if view.ended else [0, connection]
        ready, _, _ = select.select(wanted, [], [], _TICK_SECONDS)
        if connection in ready:
            view.ended = not connection.receive()
            _hear(connection, view, status)
        if 0 in ready:
            _press(os.read(0, 64), connection, view)


def _hear(connection: Connection, view: View, status: int) -> None:
    for message in connection.ready():
        if message.get("method") == "event":
            view.hear(message["params"])
        else:
            try:
                result = result_of(message)
                if message["id"] == status:
                    view.begin(result)
            except PatcherError as error:
                view.answered(error.message)


def _press(typed: bytes, connection: Connection, view: View) -> None:
    if not typed:
        view.left = True
    while typed and not view.left:
        found = next((k for k in sorted(_KEYS, key=len, reverse=True) if typed.startswith(k)), typed[:1])
        typed = typed[len(found) :]
        wish = view.press(_KEYS.get(found, found.decode(errors="replace")))
        if wish is not None and not view.ended:
            connection.ask(wish.method, wish.parameters)
