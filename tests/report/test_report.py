"""What people read, and what programs read: each event as lines and as JSON."""

from __future__ import annotations

import io
import json
import os
import pty

import pytest

from patcher.report import (
    Applied,
    BuildFailed,
    Event,
    Exited,
    Function,
    Note,
    OldFrame,
    Ready,
    Refused,
    Reverted,
    Saved,
    Timings,
    Unchanged,
    Variable,
)
from patcher.report.console import ConsoleReport
from patcher.report.events import EventStream, Reporters
from patcher.report.remote import event_of, told

APPLIED = Applied(
    3,
    ("/src/a.c", "/src/b.c"),
    (Function("f", "/bin/p", "changed"), Function("g", "/bin/p", "added")),
    ((11, "main"), (12, "main"), (12, "loop")),
    Timings(1.5, 20.25, 3.0, 0.12345, 24.9),
    line_only=("h",),
    variables=(Variable("cache", "a.c", "added"),),
    supplied=("/usr/lib/libx.a(y.o)",),
    undefined=("z",),
    kept=("tiny",),
    frames=(OldFrame("main", 11, 4096, 0, True), OldFrame("loop", 12, 8192, 2), OldFrame("co", 0, 12288, 0)),
)
EVENTS: list[tuple[Event, dict[str, object]]] = [
    (Ready(5, "/bin/p", ("src",)), {"event": "ready", "pid": 5, "program": "/bin/p", "watching": ["src"]}),
    (Saved(("/a.c",)), {"event": "saved", "files": ["/a.c"]}),
    (
        BuildFailed("/a.c", "a.c:1: error\n", "no"),
        {"event": "build_failed", "file": "/a.c", "diagnostics": "a.c:1: error\n"},
    ),
    (
        Refused("layout", "it grew", "restart", "/a.c"),
        {"event": "refused", "reason": "layout", "message": "it grew", "hint": "restart", "file": "/a.c"},
    ),
    (Unchanged(("/a.c",), ("f",)), {"event": "unchanged", "files": ["/a.c"], "data": []}),
    (
        APPLIED,
        {
            "event": "applied",
            "generation": 3,
            "files": ["/src/a.c", "/src/b.c"],
            "functions": [
                {"name": "f", "module": "/bin/p", "status": "changed"},
                {"name": "g", "module": "/bin/p", "status": "added"},
            ],
            "data": [{"name": "cache", "file": "a.c", "outcome": "added", "note": ""}],
            "supplied": ["/usr/lib/libx.a(y.o)"],
            "undefined": ["z"],
            "kept": ["tiny"],
            "processes": [],
            "active": ["main", "loop"],
            "frames": [
                {"function": "main", "thread": 11, "stack": 4096, "generation": 0, "loops": True},
                {"function": "loop", "thread": 12, "stack": 8192, "generation": 2, "loops": False},
                {"function": "co", "thread": 0, "stack": 12288, "generation": 0, "loops": False},
            ],
            "timings": {"detect": 1.5, "build": 20.25, "link": 3.0, "stop": 0.123, "total": 24.9},
        },
    ),
    (
        Reverted(0, (OldFrame("f", 1, 16, 1),)),
        {
            "event": "reverted",
            "generation": 0,
            "frames": [{"function": "f", "thread": 1, "stack": 16, "generation": 1, "loops": False}],
        },
    ),
    (Exited(status=3), {"event": "exited", "status": 3}),
    (Exited(signal=9), {"event": "exited", "signal": 9}),
]


@pytest.mark.parametrize(("event", "fields"), EVENTS, ids=[type(e).__name__ for e, _ in EVENTS])
def test_events_for_programs(event, fields):
    stream = io.StringIO()
    EventStream(stream).emit(event)
    assert stream.getvalue().count("\n") == 1
    assert json.loads(stream.getvalue()) == {**fields, "time": event.time}


def test_notes_are_for_people_only():
    programs, people = io.StringIO(), io.StringIO()
    Reporters([EventStream(programs), ConsoleReport(people)]).emit(Note("a note"))
    assert programs.getvalue() == ""
    assert people.getvalue() == "patcher: a note\n"


def said(event: Event, **how: bool) -> str:
    stream = io.StringIO()
    ConsoleReport(stream, **how).emit(event)
    return stream.getvalue()


def test_what_was_applied_is_told_with_everything_that_matters():
    text = said(APPLIED)
    assert text.startswith("patcher: a.c, b.c: generation 3 is live\n")
    for part in (
        "changed: f",
        "added: g",
        "new variables: cache",
        "libx.a(y.o)",
        "undefined, a call aborts: z",
        "kept, no room for a jump at their entry: tiny",
        "h",
        "in a loop that does not return: main (thread 11)\n",
        "move the body of the loop into a function",
        "still in old code until it returns: loop (thread 12), co (in a coroutine (stack at 0x3000))\n",
        "stop 0.12",
    ):
        assert part in text
    assert "would be" in said(Applied(1, ("a.c",), APPLIED.functions, (), Timings(), dry_run=True))


def test_refusals_and_failures_are_told_even_to_the_quiet():
    text = said(Refused("layout", "`x` [bold] grew", "restart it", "/a.c"), quiet=True)
    assert text == "patcher: refused: `x` [bold] grew\npatcher:   restart it\n"
    text = said(BuildFailed("/a.c", "a.c:1: error: [-Wall] \x1b[31mno\x1b[0m\n", "/a.c: does not compile"), quiet=True)
    assert text.startswith("a.c:1: error: [-Wall] no\n"), "the compiler's words, without colours off a terminal"


@pytest.mark.parametrize(
    "event", [APPLIED, Ready(1, "p", ()), Unchanged(("a",)), Reverted(1), Exited(signal=9), Note("x")]
)
def test_the_quiet_get_nothing_else(event):
    assert said(event, quiet=True) == ""
    assert said(event) != ""


def test_names_like_markup_are_not_markup():
    function = Function("operator[](int) [red]", "/p", "changed")
    text = said(Applied(1, ("a[b].c",), (function,), (), Timings()))
    assert "operator[](int) [red]" in text
    assert "a[b].c" in text


def test_long_lists_are_cut_and_long_lines_are_not():
    functions = tuple(Function(f"function_number_{n}", "/p", "changed") for n in range(30))
    text = said(Applied(1, ("a.c",), functions, (), Timings()))
    assert "and 22 more" in text
    assert any(len(line) > 100 for line in text.splitlines()), "a line is never broken to the width of a terminal"


def test_colours_on_a_terminal_only():
    assert "\x1b" not in said(APPLIED)
    ours, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stream:
        ConsoleReport(stream).emit(Reverted(0))
        ConsoleReport(stream).emit(Refused("x", "no", "", ""))
        text = os.read(ours, 4096).decode()
        while "no" not in text.rpartition("refused")[2]:
            text += os.read(ours, 4096).decode()
    os.close(ours)
    assert text.count("\r\n") >= 2


class Writes(io.StringIO):
    """A stream that keeps each write by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[str] = []

    def write(self, text: str) -> int:
        self.all.append(text)
        return super().write(text)


@pytest.mark.parametrize(
    "event", [APPLIED, BuildFailed("a.c", "a.c:1:2: error: no\n", "no", "mend it"), Refused("x", "why", "do", "a.c")]
)
def test_an_event_is_one_write_of_whole_lines(event):
    """What else writes to the terminal comes before it or after it."""
    stream = Writes()
    ConsoleReport(stream).emit(event)
    (text,) = filter(None, stream.all)
    assert text.endswith("\n")
    assert len(text.splitlines()) > 1


def test_quiet_hears_what_is_grave():
    stream = io.StringIO()
    report = ConsoleReport(stream, quiet=True)
    report.emit(Note("by the way"))
    report.emit(Note("it runs on without patcher", grave=True))
    assert stream.getvalue() == "patcher: it runs on without patcher\n"


@pytest.mark.parametrize("event", [e for e, _ in EVENTS], ids=[type(e).__name__ for e, _ in EVENTS])
def test_an_event_comes_back_from_its_json(event):
    back = event_of(json.loads(json.dumps(event.as_json())))
    assert type(back) is type(event)
    assert back is not None
    assert {**back.as_json(), "active": 0} == {**event.as_json(), "active": 0}


def test_what_another_patcher_tells_is_told_in_the_same_words():
    assert told(APPLIED.as_json())[:3] == ["a.c, b.c: generation 3 is live", "  changed: f", "  added: g"]
    assert told({"event": "held", "time": 1, "files": ["a.c"]}) == ["saved, and waits, as it is paused: a.c"]
    assert told({"event": "building", "time": 1}) == []
