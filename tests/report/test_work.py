"""Work that takes its time: when it is told of, and what is made of that on a terminal, in a file, and with --quiet."""

from __future__ import annotations

import io
import threading

import pytest

from patcher.report import Applied, Event, Note, Timings, Work, Working
from patcher.report.console import ConsoleReport
from patcher.report.events import EventStream

ERASE = "\r\x1b[K"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def working(seconds: float, *, done: int = 0, total: int = 0, ended: bool = False) -> Working:
    return Working("gathering", False, done, total, seconds, ended)


def test_work_is_told_of_while_it_lasts_and_when_it_is_done() -> None:
    told: list[Event] = []
    twice = threading.Event()

    def emit(event: Event) -> None:
        told.append(event)
        if len(told) == 2:
            twice.set()

    with Work("gathering", emit) as work:
        work.update(3, 7)
        assert twice.wait(30)
    found = [e for e in told if isinstance(e, Working)]
    assert found == told
    assert [(e.text, e.done, e.total) for e in found] == [("gathering", 3, 7)] * len(found)
    assert [e.ended for e in found] == [False] * (len(found) - 1) + [True]
    assert 0.5 <= found[0].seconds <= found[1].seconds <= found[-1].seconds


def test_of_short_work_nothing_is_told() -> None:
    told: list[Event] = []
    with Work(
        "gathering",
        told.append,
    ):
        pass
    assert told == []


def test_work_that_fails_is_over() -> None:
    told: list[Event] = []
    some = threading.Event()

    def emit(event: Event) -> None:
        told.append(event)
        some.set()

    def fail() -> None:
        with Work("gathering", emit):
            some.wait(30)
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    last = told[-1]
    assert isinstance(last, Working)
    assert last.ended


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_where_others_write_it_is_a_line_after_two_seconds_and_one_when_it_is_done(stream: type[io.StringIO]) -> None:
    file = stream()
    report = ConsoleReport(file)
    for event in (working(0.5), working(1.9), working(2.1), working(2.4), working(9, ended=True)):
        report.emit(event)
    assert file.getvalue().replace("\r", "") == "patcher: gathering ...\npatcher: gathering: done, 9 s\n"
    report.emit(working(0.5))
    report.emit(working(0.9, ended=True))
    assert file.getvalue().count("\n") == 2


def test_on_a_terminal_of_ours_it_is_a_line_that_moves_and_goes() -> None:
    file = Terminal()
    report = ConsoleReport(file, in_place=True)
    report.emit(working(0.5, done=1, total=4))
    drawn = file.getvalue()
    assert drawn.startswith(ERASE)
    assert "\n" not in drawn
    assert "1/4" in drawn
    assert drawn.count("━") == 20
    report.emit(Note("a word"))
    assert file.getvalue()[len(drawn) :].startswith(f"{ERASE}patcher: a word\r\n")
    report.emit(Note("another"))
    assert file.getvalue().endswith("\npatcher: another\r\n")
    report.emit(working(0.75, done=4, total=4))
    report.emit(working(0.8, done=4, total=4, ended=True))
    assert file.getvalue().endswith(ERASE)


@pytest.mark.parametrize("in_place", [False, True])
def test_who_wants_it_quiet_hears_nothing_of_it(in_place: bool) -> None:
    file = Terminal()
    report = ConsoleReport(file, quiet=True, in_place=in_place)
    for event in (working(0.5), working(3), working(4, ended=True)):
        report.emit(event)
    assert file.getvalue() == ""


def test_it_is_no_event_of_a_session() -> None:
    file = io.StringIO()
    EventStream(file).emit(working(3))
    assert file.getvalue() == ""
    EventStream(file).emit(Applied(1, (), (), (), Timings()))
    assert file.getvalue() != ""
