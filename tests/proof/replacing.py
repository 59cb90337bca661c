"""Replace every function of a running program by its own relinked copy, and hold it against one that nobody patches.

Twice, the second copy over the first; then all is taken back. While the copies run, the original bodies are filled with
traps: who still enters old code dies of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from project import Running

import patcher
from patcher.code.entry import DETOUR_SIZE
from patcher.session import Session

TRAP = b"\xcc"  # int3


class Rounds:
    """What the program must answer, round by round: what another process of it answers, which nobody patches."""

    def __init__(self, program: Running, model: Running, each: int) -> None:
        self._program = program
        self._model = model
        self._each = each
        self._next = 0

    def play(self, when: str) -> None:
        for _ in range(self._each):
            expected = self._model.ask(self._next)
            assert expected
            assert self._program.ask(self._next) == expected, f"round {self._next}, {when}"
            self._next += 1


@contextlib.contextmanager
def trapped(session: Session, active: Sequence[str]) -> Iterator[int]:
    """Fill the original bodies of what was replaced with traps for a while; yields how many."""
    memory = session.target.memory
    session.ledger.refresh()
    redirects = [r for r in session.ledger.journal.redirects if not r.born and r.name not in active]
    saved = []
    for r in redirects:
        taken = max(DETOUR_SIZE, len(bytes.fromhex(r.entry)))  # a detour across a page's border has parts further on
        start, size = r.original + taken, r.size - taken
        if size > 0:
            saved.append((start, memory.read(start, size)))
            memory.write(start, TRAP * size)
    try:
        yield len(saved)
    finally:
        for start, data in reversed(saved):
            memory.write(start, data)


def prove(program: Path, objects: Sequence[Path], *, rounds: int, functions: Sequence[str], mistaken: int) -> None:
    """Replace all functions of a program; it must answer as before, round by round.

    `functions`: some that must be among them. `mistaken`: how many may be taken for changed, though they are the same.
    """
    with contextlib.ExitStack() as stack:
        model, running = (Running([str(program)]) for _ in range(2))
        stack.callback(model.end)
        stack.callback(running.end)
        session = stack.enter_context(patcher.attach(running.pid, every_function=True))
        play = Rounds(running, model, rounds).play
        play("as it was started")
        bodies: set[int] = set()
        for number in (1, 2):
            generation = session.apply(*objects)
            names = {f.name for f in generation.functions}
            assert generation.number == number
            assert set(functions) <= names | set(generation.kept)
            assert len(names) > 10 * len(generation.kept)
            changed = [f.name for f in generation.functions if f.status != "relinked"]
            assert len(changed) <= mistaken, changed
            live = session.status().functions
            assert all(f.generation == number and f.current != f.original for f in live)
            assert not bodies & {f.current for f in live}, "a second copy, not the first one again"
            bodies |= {f.current for f in live}
            with trapped(session, ["main", *(name for _, name in generation.active)]) as count:
                assert count >= len(live) / 2 - 1
                play(f"in generation {number}")
            play(f"in generation {number}, untrapped")
        assert session.revert(0) == 0
        play("after all was taken back")
        assert all(f.current == f.original for f in session.status().functions)
        assert running.process.stdin is not None
        running.process.stdin.close()
        assert running.process.wait(10) == 0
