"""The arena: where it lies, what its header must look like, and who may change it."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from project import MAIN, Project, Running, image_bytes

import patcher
from patcher.errors import PatcherError, TargetBusy, UnsafeChange
from patcher.patch.arena import Arena, find_arenas
from patcher.patch.journal import encode
from patcher.target import Target

LIBRARY = "int count;\nint shared(int n)\n{\n    count++;\n    return n + 1;\n}\n"
UNIT = "int shared(int);\nint answer(int n)\n{\n    return shared(n) + 1;\n}\n"


def make(place: Path, *, compile_flags: tuple[str, ...] = (), link_flags: tuple[str, ...] = ()) -> Project:
    sources = {"main.c": MAIN, "unit.c": UNIT, "lib.c": LIBRARY}
    return Project(place, sources, compile_flags=compile_flags, link_flags=link_flags, shared=("lib.c",))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make(tmp_path_factory.mktemp("arena") / "p")


@pytest.fixture(scope="module")
def change(project: Project) -> Path:
    return project.object("unit.c", ("shared(n) + 1", "shared(n) + 10"))


@pytest.fixture
def program(project: Project) -> Iterator[Running]:
    with project.running() as program:
        yield program


def text_of(pid: int, name: str) -> tuple[int, int]:
    with Target.attach(pid) as target:
        found = [m for m in target.mappings() if m.executable and m.path.endswith(name)]
    return found[0].start, found[-1].end


def arenas_of(pid: int) -> list[tuple[int, int]]:
    with Target.attach(pid) as target:
        return [(a.base, a.end) for a in find_arenas(target)]


def reaches(arena: tuple[int, int], text: tuple[int, int]) -> bool:
    return max(arena[1] - text[0], text[1] - arena[0]) < 1 << 31


def test_near_a_position_independent_program(program, change):
    assert arenas_of(program.pid) == []
    with patcher.attach(program.pid) as session:
        session.apply(change)
    (arena,) = arenas_of(program.pid)
    assert reaches(arena, text_of(program.pid, "/program"))
    assert program.ask(1) == "12"


def test_below_two_gigabytes_for_a_program_at_fixed_addresses(tmp_path):
    project = make(tmp_path / "p", compile_flags=("-fno-pie",), link_flags=("-no-pie",))
    change = project.object("unit.c", ("shared(n) + 1", "shared(n) + 10"))
    with project.running() as program:
        assert text_of(program.pid, "/program")[0] < 1 << 31
        with patcher.attach(program.pid) as session:
            session.apply(change)
        (arena,) = arenas_of(program.pid)
        assert arena[1] <= 1 << 31
        assert program.ask(1) == "12"


def test_a_library_out_of_reach_gets_its_own(project, program, change):
    library = project.object("lib.c", ("n + 1", "n + 20"))
    with patcher.attach(program.pid) as session:
        session.apply(change)
        session.apply(library)
        assert len(session.status().arenas) == 2
    first, second = arenas_of(program.pid)
    assert reaches(first, text_of(program.pid, "/program"))
    assert reaches(second, text_of(program.pid, "/libpart.so"))
    assert program.ask(1) == "31"


def test_it_is_named_private_and_never_writable_and_executable(program, change):
    descriptors = set(os.listdir(f"/proc/{program.pid}/fd"))
    with patcher.attach(program.pid) as session:
        session.apply(change)
        parts = [m for m in session.target.mappings() if "memfd:patcher" in m.path]
    assert [m.permissions for m in parts] == ["r--p", "r-xp", "rw-p"]
    assert set(os.listdir(f"/proc/{program.pid}/fd")) == descriptors


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (24, 0),  # r-- in use
        (24, (1 << 64) - 1),
        (32, 1 << 47),  # r-x in use
        (40, 7),  # rw- in use
        (48, 0),  # slots
        (48, 1 << 20),
        (56, 1 << 40),  # journal
    ],
)
def test_a_header_that_makes_no_sense_is_refused(program, change, offset, value):
    with patcher.attach(program.pid) as session:
        session.apply(change)
        header = session.ledger.primary.header
        session.target.memory.write(header + offset, struct.pack("<Q", value))
    before = image_bytes(program.pid)
    with patcher.attach(program.pid) as session:
        for action in (session.status, session.revert, lambda: session.apply(change)):
            with pytest.raises(UnsafeChange, match="makes no sense") as caught:
                action()
            assert caught.value.hint
    assert image_bytes(program.pid) == before
    assert program.ask(1) == "12"


@pytest.mark.parametrize("offset", [0, 8])
def test_memory_with_another_magic_or_base_is_no_arena(program, change, offset):
    with patcher.attach(program.pid) as session:
        session.apply(change)
        header = session.ledger.primary.header
        session.target.memory.write(header + offset, b"Patcher\0")
    assert arenas_of(program.pid) == []


def test_a_damaged_journal_is_refused_and_the_program_runs_on(program, change):
    with patcher.attach(program.pid) as session:
        session.apply(change)
        session.target.memory.write(session.ledger.primary.journal + 20, b"damage")
    with patcher.attach(program.pid) as session, pytest.raises(UnsafeChange) as caught:
        session.revert()
    assert caught.value.code == "damaged-journal"
    assert program.ask(1) == "12"


@pytest.mark.parametrize("body", [(0xDEAD000, 1, 5), (None, 500, 5)], ids=["arena", "slot"])
def test_a_journal_that_names_what_is_not_there_is_refused(program, change, body):
    with patcher.attach(program.pid) as session:
        session.apply(change)
        arena = primary(session)
        record = session.ledger.journal.generations[1]
        hostile = encode(replace(record, bodies=((body[0] or arena.base, *body[1:]),)))
        session.target.memory.write(arena.journal, hostile)
        arena.set_usage(replace(arena.usage(), journal=len(hostile)))
    with patcher.attach(program.pid) as session:
        for action in (session.status, session.revert, lambda: session.apply(change)):
            with pytest.raises(UnsafeChange, match="which is not there") as caught:
                action()
            assert caught.value.code == "damaged-journal"
    assert program.ask(1) == "12"


# --- one controller at a time ---


def primary(session: patcher.Session) -> Arena:
    arena = session.ledger.primary
    assert arena is not None
    return arena


def start_time(pid: int) -> int:
    with open(f"/proc/{pid}/stat", "rb") as stat:
        return int(stat.read().rpartition(b")")[2].split()[19])


def test_a_living_owner_is_refused_by_name(program, change):
    with patcher.attach(program.pid) as session, subprocess.Popen(["cat"], stdin=subprocess.PIPE) as owner:
        session.apply(change)
        primary(session).lock(owner.pid, start_time(owner.pid))
        for action in (session.revert, lambda: session.apply(change)):
            with pytest.raises(TargetBusy, match=f"is being patched by process {owner.pid}") as caught:
                action()
            assert caught.value.code == "locked"
            assert str(owner.pid) in caught.value.hint
        assert session.status().generation == 1, "to look is always allowed"
        owner.communicate()
        assert session.revert() == 0, "a dead owner's lock is taken over"
        assert primary(session).owner() == (0, 0)


def test_a_reused_process_number_is_no_owner(program, change):
    with patcher.attach(program.pid) as session, subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:
        session.apply(change)
        primary(session).lock(other.pid, start_time(other.pid) - 1)
        assert session.revert() == 0
        other.communicate()


HOLD = """
import sys
from patcher.session import Session
from patcher.target import Target
with Session(Target.attach(int(sys.argv[1]))) as session, session.ledger.transaction():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("patched", [False, True], ids=["never patched", "patched"])
def test_two_patchers_cannot_be_in_a_transaction_at_once(program, change, patched):
    with patcher.attach(program.pid) as session:
        if patched:
            session.apply(change)
        command = [sys.executable, "-c", HOLD, str(program.pid)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(PatcherError) as caught:
                session.apply(change)
            assert caught.value.code == "locked"
            assert (str(holder.pid) in caught.value.message) == patched
            holder.kill()
        assert session.apply(change).number == 1, "a dead owner's lock counts for nothing"
