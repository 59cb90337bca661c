"""Rounds of saves: what is told of a file that does not compile, and of one that is no source."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from patcher.errors import AttachDenied, Forbidden, PatcherError, TargetGone
from patcher.loop import Loop
from patcher.options import Options
from patcher.report import Applied, BuildFailed, Event, Note, Refused, Saved, Working
from patcher.session import Session
from patcher.target import Target

TEXT = """
#include <stdio.h>
__attribute__((noipa)) int answer(void) { return 1; }
int main(void)
{
    while (getchar() != EOF) {
        printf("%d", answer());
        fflush(stdout);
    }
    return 0;
}
"""


class Seen:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def take(self) -> list[Event]:
        found, self.events = self.events, []
        return found


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[tuple[Loop, Seen, Path]]:
    source = tmp_path / "unit.c"
    source.write_text(TEXT)
    command = ["gcc", "-O1", "-c", "unit.c", "-o", "unit.o"]
    subprocess.run(command, cwd=tmp_path, check=True)
    subprocess.run(["gcc", "-o", "program", "unit.o"], cwd=tmp_path, check=True)
    database = tmp_path / "compile_commands.json"
    database.write_text(json.dumps([{"directory": str(tmp_path), "file": "unit.c", "arguments": command}]))
    with looped(tmp_path, Options(compile_commands=database, watched=(tmp_path,))) as (loop, seen):
        yield loop, seen, source


@contextlib.contextmanager
def looped(root: Path, options: Options) -> Iterator[tuple[Loop, Seen]]:
    process = subprocess.Popen([root / "program"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    seen = Seen()
    try:
        with Session(Target.attach(process.pid), options, seen) as session:
            yield Loop(session, [root]), seen
    finally:
        process.kill()
        process.communicate()


def save(loop: Loop, file: Path, text: str) -> None:
    file.write_text(text)
    loop.round({file}, lambda: False)


def test_a_checkout_that_takes_its_time_is_told_of(loop: tuple[Loop, Seen, Path]) -> None:
    watching, seen, source = loop
    repository = source.parent / ".git"
    repository.mkdir()
    (repository / "index.lock").touch()
    deadline = time.monotonic() + 20

    def is_told(*, ended: bool) -> bool:
        assert time.monotonic() < deadline
        told = [event for event in seen.events if isinstance(event, Working) and event.ended == ended]
        return "waiting until all files are saved" in {event.text for event in told}

    stop = threading.Event()
    thread = threading.Thread(target=watching.run, args=(stop,))
    thread.start()
    try:
        number = 0
        while not is_told(ended=False):
            number += 1
            for name in ("one.h", "two.h"):
                (source.parent / name).write_text(f"/* {number} */\n")
            time.sleep(0.02)
        (repository / "index.lock").unlink()
        while not is_told(ended=True):
            time.sleep(0.02)
    finally:
        stop.set()
        thread.join()


def test_advice_on_commands_ends_once_a_file_has_compiled(loop: tuple[Loop, Seen, Path]) -> None:
    watching, seen, source = loop
    save(watching, source, TEXT.replace("return 1", "return one"))
    (_, first) = seen.take()
    assert isinstance(first, BuildFailed)
    assert first.hint
    assert "one" in first.diagnostics
    save(watching, source, TEXT.replace("return 1", "return 2"))
    assert [type(e) for e in seen.take() if not isinstance(e, Note)] == [Saved, Applied]
    save(watching, source, TEXT.replace("return 1", "return two"))
    (_, second) = seen.take()
    assert isinstance(second, BuildFailed)
    assert second.hint == ""
    assert "two" in second.diagnostics


def test_a_saved_header_is_told_to_touch_nothing(loop: tuple[Loop, Seen, Path]) -> None:
    watching, seen, source = loop
    save(watching, source.with_name("unit.h"), "int answer(void);\n")
    (saved, *_, note) = seen.take()
    assert isinstance(saved, Saved)
    assert isinstance(note, Note)
    assert "unit.h: nothing that the process was built from includes it" in note.text


def test_a_busy_process_ends_no_watch(loop: tuple[Loop, Seen, Path]) -> None:
    watching, seen, source = loop
    with Target.attach(watching.session.target.pid) as other, other.memory.claimed():
        save(watching, source, TEXT.replace("return 1", "return 2"))
    (_, refused) = seen.take()
    assert isinstance(refused, Refused)
    assert refused.reason == "locked"
    save(watching, source, TEXT.replace("return 1", "return 3"))
    assert Applied in [type(e) for e in seen.take()]


def test_only_an_end_of_the_process_ends_a_watch(
    loop: tuple[Loop, Seen, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that may not be traced just now may be later."""
    watching, seen, source = loop

    def fail(error: PatcherError) -> None:
        def change(*words: object, **more: object) -> None:
            raise error

        monkeypatch.setattr(watching.session, "make_live", change)

    for error in (AttachDenied("not permitted"), Forbidden("confined")):
        fail(error)
        save(watching, source, TEXT.replace("return 1", "return 2"))
        (_, refused) = seen.take()
        assert isinstance(refused, Refused)
        assert refused.reason == error.code
    fail(TargetGone("ended"))
    with pytest.raises(TargetGone):
        save(watching, source, TEXT.replace("return 1", "return 3"))


MAKE = """
X := $(shell rm -f trial.c)
program: unit.o
	gcc -o $@ $^
unit.o: unit.c
	gcc -O1 -c unit.c
"""


@pytest.mark.parametrize("alone", [True, False])
def test_a_file_that_is_gone_before_it_is_compiled_is_let_go(tmp_path: Path, alone: bool) -> None:
    """As makefiles write and remove one to try the compiler, whenever they are asked for a command."""
    source, trial = tmp_path / "unit.c", tmp_path / "trial.c"
    source.write_text(TEXT)
    (tmp_path / "Makefile").write_text(MAKE)
    subprocess.run(["make", "-s"], cwd=tmp_path, check=True)
    with looped(tmp_path, Options(watched=(tmp_path,))) as (watching, seen):
        trial.write_text("int trial;\n")
        source.write_text(TEXT.replace("return 1", "return 2"))
        watching.round({trial} if alone else {source, trial}, lambda: False)
        told = [type(e) for e in seen.take() if not isinstance(e, Note)]
        assert told == ([Saved] if alone else [Saved, Applied])
        assert not trial.exists()
        assert not watching.edits.pending()


def test_a_file_that_is_gone_while_it_is_compiled_is_let_go(tmp_path: Path) -> None:
    source, trial = tmp_path / "unit.c", tmp_path / "trial.c"
    source.write_text(TEXT)
    subprocess.run(["gcc", "-O1", "unit.c", "-o", "program"], cwd=tmp_path, check=True)
    (tmp_path / "gcc").write_text('#!/bin/sh\ncase "$*" in *" -c "*) rm -f trial.c ;; esac\nexec gcc "$@"\n')
    (tmp_path / "gcc").chmod(0o755)
    entries = [
        {"directory": str(tmp_path), "file": file.name, "arguments": [compiler, "-O1", "-c", file.name]}
        for file, compiler in ((source, "gcc"), (trial, str(tmp_path / "gcc")))
    ]
    (tmp_path / "compile_commands.json").write_text(json.dumps(entries))
    with looped(tmp_path, Options(watched=(tmp_path,))) as (watching, seen):
        trial.write_text("int trial;\n")
        source.write_text(TEXT.replace("return 1", "return 2"))
        watching.round({source, trial}, lambda: False)
        assert [type(e) for e in seen.take() if not isinstance(e, Note)] == [Saved, Applied]
        assert not trial.exists()
