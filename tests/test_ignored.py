"""Which saves are left alone: held against git itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from patcher.errors import PatcherError
from patcher.ignored import IGNORE, Ignored
from patcher.watch import source_filter

RULES = {
    ".gitignore": "build*/\n*.gen.c\n!kept.gen.c\n/only-here.c\nsub/deep/\n# note\n\n\\#odd.c\nspace\\ .c\n[x\n",
    "src/.gitignore": "*.tmp.c\n!/only-here.c\n!b.gen.c\n",
    "src/sub/.gitignore": "/*\n!in.c\n",
}
FILES = [
    "a.c",
    "only-here.c",
    "src/only-here.c",
    "src/a.gen.c",
    "src/b.gen.c",
    "src/kept.gen.c",
    "src/x.tmp.c",
    "src/sub/in.c",
    "src/sub/out.c",
    "src/sub/sub/deep/x.c",
    "build/a.c",
    "build-release/kept.gen.c",
    "src/build/a.c",
    "src/builder.c",
    "#odd.c",
    "space .c",
    "x.c",
]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    for name, text in {**RULES, **dict.fromkeys(FILES, "")}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_what_git_ignores_is_left_alone(name, checkout):
    said = subprocess.run(["git", "check-ignore", "-q", "--no-index", name], cwd=checkout, check=False).returncode
    wanted = Ignored([checkout], source_filter(), globs_from=checkout)
    assert wanted(checkout / name) is (said == 1)
    assert Ignored([checkout], source_filter(), globs_from=checkout, git=False)(checkout / name)


def test_what_was_asked_for_is_watched_though_git_ignores_it(checkout):
    assert Ignored([checkout / "build"], source_filter(), globs_from=checkout)(checkout / "build/a.c")
    assert Ignored([checkout / "src/a.gen.c"], source_filter(), globs_from=checkout)(checkout / "src/a.gen.c")
    assert not Ignored([checkout / "build"], source_filter(), globs_from=checkout)(checkout / "build/a.gen.c")


def test_without_a_checkout_a_gitignore_says_nothing(tmp_path):
    (tmp_path / ".gitignore").write_text("*\n")
    assert Ignored([tmp_path], source_filter(), globs_from=tmp_path)(tmp_path / "a.c")


def test_globs_that_were_given_count_from_their_directory(tmp_path):
    watched = [tmp_path / "a", tmp_path / "b"]
    for place in watched:
        place.mkdir()
    wanted = Ignored(watched, source_filter(), globs=["/a/x.c", "*.y.c", "!kept.y.c"], globs_from=tmp_path)
    found = {name for name in ("a/x.c", "b/x.c", "b/1.y.c", "b/kept.y.c", "b/no") if wanted(tmp_path / name)}
    assert found == {"b/x.c", "b/kept.y.c"}
    assert wanted.left_out == {IGNORE: tmp_path / "a/x.c"}


def test_a_gitignore_that_changes_counts_from_then_on(checkout):
    wanted = Ignored([checkout], source_filter(), globs_from=checkout)
    assert wanted(checkout / "a.c")
    (checkout / ".gitignore").write_text("a.c\n")
    assert not wanted(checkout / "a.c")
    assert wanted.left_out == {str(checkout / ".gitignore"): checkout / "a.c"}


def test_a_glob_that_is_none_is_refused(tmp_path):
    with pytest.raises(PatcherError, match="--ignore"):
        Ignored([tmp_path], source_filter(), globs=["!"], globs_from=tmp_path)
