"""Where compilers write: removed at the end, and after a patcher that was killed by the next one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from patcher.build import workplace
from patcher.build.workplace import Workplace

OWNER = """\
import sys
from pathlib import Path
from patcher.build.workplace import Workplace
place = Workplace(Path(sys.argv[1]))
(place.path / "unit.o").write_bytes(b"object")
print(place.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def owner(tmp_path):
    """Another process that has a workplace: the process, and the place."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process, Path(process.stdout.readline().strip())
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


@pytest.fixture
def later(monkeypatch):
    """What a session that starts a minute later finds."""
    monkeypatch.setattr(workplace, "_YOUNG_SECONDS", -1.0)
    workplace._remove_left_behind.cache_clear()
    yield
    workplace._remove_left_behind.cache_clear()


def test_it_is_for_nobody_else_and_goes_when_it_is_closed(tmp_path):
    with Workplace(tmp_path / "new") as place:
        assert place.path.parent == tmp_path / "new"
        assert place.path.stat().st_mode & 0o777 == 0o700
        (place.path / "in").mkdir()
    assert not place.path.exists()
    place.path.mkdir()  # somebody else's by now
    place.close()
    assert place.path.exists()


def test_what_a_killed_patcher_left_is_removed(tmp_path, owner, later):
    process, place = owner
    process.kill()
    process.wait()
    assert (place / "unit.o").exists()
    with Workplace(tmp_path) as own:
        assert os.listdir(tmp_path) == [own.path.name]


def test_what_another_patcher_uses_stays(tmp_path, owner, later):
    _, place = owner
    with Workplace(tmp_path):
        assert (place / "unit.o").exists()


def test_what_is_just_being_made_stays(tmp_path):
    workplace._remove_left_behind.cache_clear()
    made = tmp_path / "patcher-build-abcdefgh"
    made.mkdir(mode=0o700)
    with Workplace(tmp_path):
        assert made.exists()


def test_what_is_not_ours_stays(tmp_path, later):
    """A link, a file, a directory that others may write to, and one of another name."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    parent = tmp_path / "parent"
    parent.mkdir()
    (parent / "patcher-build-linked").symlink_to(elsewhere)
    (parent / "patcher-build-file").write_text("")
    (parent / "patcher-build-open").mkdir()
    (parent / "patcher-build-open").chmod(0o777)
    (parent / "patcher").mkdir(mode=0o700)
    before = set(os.listdir(parent))
    with Workplace(parent) as own:
        assert set(os.listdir(parent)) == before | {own.path.name}
    assert elsewhere.exists()
