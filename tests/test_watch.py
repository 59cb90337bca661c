"""Saves as editors make them, on real files, and how soon they arrive."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from patcher.errors import PatcherError
from patcher.watch import Watcher, gathered, git_lock, saves, source_filter

SOON = 5.0  # seconds: never waited for when the code is right
QUIET = 0.15  # seconds in which nothing must come


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory with two sources and a sub-directory."""
    root = tmp_path / "src"
    (root / "deep").mkdir(parents=True)
    for name in ("a.c", "b.c", "deep/c.h"):
        (root / name).write_text("int x;\n")
    return root


@pytest.fixture
def watcher(tree: Path) -> Iterator[Watcher]:
    with Watcher([tree]) as watcher:
        yield watcher


def replace(path: Path, text: str) -> None:
    """Save as careful editors do: write beside, rename over."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text)
    beside.rename(path)


def saved_until(watcher: Watcher, wanted: set[Path]) -> set[Path]:
    """Collect deliveries until all wanted files came (several saves may come in several)."""
    got: set[Path] = set()
    deadline = time.monotonic() + SOON
    while not wanted <= got and time.monotonic() < deadline:
        got |= watcher.next(timeout=0.5) or set()
    return got


def test_write_in_place(watcher: Watcher, tree: Path) -> None:
    (tree / "a.c").write_text("int y;\n")
    assert watcher.next(SOON) == {tree / "a.c"}


def test_rename_over(watcher: Watcher, tree: Path) -> None:
    replace(tree / "a.c", "int y;\n")
    assert watcher.next(SOON) == {tree / "a.c"}


def test_rename_over_again_and_again(watcher: Watcher, tree: Path) -> None:
    for number in range(5):
        replace(tree / "a.c", f"int y{number};\n")
        assert watcher.next(SOON) == {tree / "a.c"}


@pytest.mark.skipif(shutil.which("vim") is None, reason="vim is not installed")
@pytest.mark.parametrize("backup", ["yes", "no", "auto"])
def test_vim(watcher: Watcher, tree: Path, backup: str) -> None:
    command = ["vim", "-u", "NONE", "-es", "-c", f"set backup backupcopy={backup}", "-c", "%s/x/y/", "-c", "wq"]
    subprocess.run([*command, str(tree / "a.c")], check=True, stdin=subprocess.DEVNULL)
    assert watcher.next(SOON) == {tree / "a.c"}
    assert (tree / "a.c").read_text() == "int y;\n"
    assert watcher.next(QUIET) == frozenset(), "one save was delivered twice"


def test_several_files_at_once(watcher: Watcher, tree: Path) -> None:
    wanted = {tree / "a.c", tree / "b.c", tree / "deep/c.h"}
    for path in wanted:
        replace(path, "int z;\n")
    assert saved_until(watcher, wanted) == wanted


def test_saved_again_while_something_else_runs(watcher: Watcher, tree: Path) -> None:
    assert not watcher.pending()
    (tree / "a.c").write_text("int y;\n")
    assert watcher.next(SOON) == {tree / "a.c"}
    assert not watcher.pending()
    (tree / "a.c").write_text("int z;\n")
    deadline = time.monotonic() + SOON
    while not watcher.pending():
        assert time.monotonic() < deadline
    assert watcher.pending(), "looking must not take it away"
    assert watcher.next(SOON) == {tree / "a.c"}
    assert not watcher.pending()


def test_same_contents_saved_again_count(watcher: Watcher, tree: Path) -> None:
    os.utime(tree / "a.c")
    assert watcher.next(SOON) == {tree / "a.c"}


def test_changed_permissions_after_a_save_do_not_count(watcher: Watcher, tree: Path) -> None:
    (tree / "a.c").write_text("int y;\n")
    assert watcher.next(SOON) == {tree / "a.c"}
    (tree / "a.c").chmod(0o600)
    assert watcher.next(QUIET) == frozenset()


def test_deleted_and_made_again(watcher: Watcher, tree: Path) -> None:
    (tree / "a.c").unlink()
    assert watcher.next(QUIET) == frozenset()
    (tree / "a.c").write_text("int x;\n")
    assert watcher.next(SOON) == {tree / "a.c"}


def test_new_files_in_new_directories(watcher: Watcher, tree: Path) -> None:
    for number in range(5):
        path = tree / f"new{number}/below/d.cpp"
        path.parent.mkdir(parents=True)
        path.write_text("int d;\n")
        assert watcher.next(SOON) == {path}


def test_file_in_a_new_directory_is_seen_when_saved_later(watcher: Watcher, tree: Path) -> None:
    path = tree / "new/d.c"
    path.parent.mkdir()
    path.write_text("int d;\n")
    assert watcher.next(SOON) == {path}
    replace(path, "int e;\n")
    assert watcher.next(SOON) == {path}


def test_renamed_into_place_with_its_directory(watcher: Watcher, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/e.c").write_text("int e;\n")
    (tmp_path / "elsewhere").rename(tree / "moved")
    assert watcher.next(SOON) == {tree / "moved/e.c"}


@pytest.mark.parametrize("how", [Path.write_text, replace])
def test_single_file(tree: Path, how: object) -> None:
    with Watcher([tree / "a.c"]) as watcher:
        for number in range(3):
            (tree / "b.c").write_text(f"int other{number};\n")
            how(tree / "a.c", f"int y{number};\n")  # type: ignore[operator]
            assert watcher.next(SOON) == {tree / "a.c"}


def test_single_file_with_any_suffix(tree: Path) -> None:
    (tree / "table.def").write_text("X\n")
    with Watcher([tree / "table.def", tree / "deep"]) as watcher:
        replace(tree / "table.def", "Y\n")
        assert watcher.next(SOON) == {tree / "table.def"}
        replace(tree / "deep/c.h", "Y\n")
        assert watcher.next(SOON) == {tree / "deep/c.h"}


def test_relative_paths(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    with Watcher([Path("deep"), Path("a.c")]) as watcher:
        Path("a.c").write_text("int y;\n")
        assert watcher.next(SOON) == {tree / "a.c"}
        Path("deep/c.h").write_text("int y;\n")
        assert watcher.next(SOON) == {tree / "deep/c.h"}


def test_links_lead_to_the_file(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "away").mkdir()
    real = tmp_path / "away/real.c"
    real.write_text("int r;\n")
    (tree / "link.c").symlink_to(real)
    (tmp_path / "linked").symlink_to(tree)
    with Watcher([tmp_path / "linked"]) as watcher:
        real.write_text("int s;\n")
        assert watcher.next(SOON) == {real}
        replace(real, "int t;\n")
        assert watcher.next(SOON) == {real}
        (tmp_path / "linked/a.c").write_text("int y;\n")
        assert watcher.next(SOON) == {tree / "a.c"}
    with Watcher([tree / "link.c"]) as watcher:
        (tree / "link.c").write_text("int u;\n")
        assert watcher.next(SOON) == {real}


DROPPINGS = [".a.c.swp", "4913", "a.c~", ".#a.c", "#a.c#", "a.o", "a.d", "deep/c.h.orig", ".git/x.c", "libx.a", "a.cx"]


@pytest.mark.parametrize("name", DROPPINGS)
def test_droppings_are_no_sources(watcher: Watcher, tree: Path, name: str) -> None:
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / name).write_text("int y;\n")
    (tree / "b.c").write_text("int last;\n")
    assert saved_until(watcher, {tree / "b.c"}) == {tree / "b.c"}


def test_further_extensions(tree: Path) -> None:
    with Watcher([tree], is_source=source_filter(["y", ".l"])) as watcher:
        (tree / "g.y").write_text("x\n")
        assert watcher.next(SOON) == {tree / "g.y"}


@pytest.mark.parametrize(
    "name", ["Makefile", "deep/CMakeLists.txt", "rules.mk", "compile_commands.json", "build.ninja"]
)
def test_what_says_how_files_are_built_counts(watcher: Watcher, tree: Path, name: str) -> None:
    (tree / name).write_text("all:\n")
    assert watcher.next(SOON) == {tree / name}


def test_many_files_are_waited_for_until_they_are_all_there(watcher: Watcher, tree: Path) -> None:
    names = [tree / f"f{number}.c" for number in range(12)]
    for path in names[:10]:
        path.write_text("int f;\n")
    first = frozenset(saved_until(watcher, set(names[:10])))
    for path in names[10:]:
        path.write_text("int f;\n")
    assert gathered(watcher, first, lambda: False) == set(names)


def test_few_files_wait_for_nobody_unless_git_is_at_work(watcher: Watcher, tree: Path) -> None:
    repository = tree.parent / ".git"
    repository.mkdir()
    lock = git_lock([tree / "deep"])
    two = frozenset({tree / "a.c", tree / "b.c"})
    (tree / "deep/c.h").write_text("int later;\n")
    while not watcher.pending():
        continue
    assert gathered(watcher, frozenset({tree / "a.c"}), lock) == {tree / "a.c"}
    assert gathered(watcher, two, lock) == two
    (repository / "index.lock").touch()
    assert gathered(watcher, frozenset({tree / "a.c"}), lock) == {tree / "a.c"}, "one file is an editor's save"
    assert gathered(watcher, two, lock) == two | {tree / "deep/c.h"}


def test_half_written_file_waits_for_its_close(watcher: Watcher, tree: Path) -> None:
    with (tree / "a.c").open("w") as file:
        file.write("int half")
        file.flush()
        assert watcher.next(QUIET) == frozenset()
        assert watcher.pending()
        (tree / "b.c").write_text("int other;\n")
        assert watcher.next(SOON) == {tree / "b.c"}, "a complete file must not wait for another"
        file.write("_done;\n")
    began = time.perf_counter()
    assert watcher.next(SOON) == {tree / "a.c"}
    assert time.perf_counter() - began < 0.05


def test_file_that_is_never_closed_comes_at_last(watcher: Watcher, tree: Path) -> None:
    with (tree / "a.c").open("w") as file:
        began = time.monotonic()
        file.write("int whole;\n")
        file.flush()
        assert watcher.next(SOON) == {tree / "a.c"}
        assert 1.9 < time.monotonic() - began < 3


def test_write_by_another_process_is_not_disturbed(watcher: Watcher, tree: Path) -> None:
    """Opening for writing while we ask breaks our lease, by a signal to us: neither side may suffer."""
    script = "import sys\nfor n in range(1000):\n    open(sys.argv[1], 'w').write(f'int n{n};')"
    writer = subprocess.Popen([sys.executable, "-c", script, str(tree / "a.c")])
    while writer.poll() is None:
        watcher.next(0.01)
    assert writer.returncode == 0
    last = (tree / "a.c").read_text()
    assert last == "int n999;"


def test_no_save_is_lost(watcher: Watcher, tree: Path) -> None:
    names = [tree / f"f{number}.c" for number in range(300)]
    for path in names:
        path.write_text("int f;\n")
    assert saved_until(watcher, set(names)) == set(names)


def test_latency(watcher: Watcher, tree: Path) -> None:
    taken = []
    for number in range(60):
        (replace if number % 2 else Path.write_text)(tree / "a.c", f"int y{number};\n")
        began = time.perf_counter()
        assert watcher.next(SOON) == {tree / "a.c"}
        taken.append(time.perf_counter() - began)
    assert statistics.median(taken) < 0.010


def test_idle_is_cheap(watcher: Watcher) -> None:
    """How often it wakes is what it costs (1 % of a processor), and is the same on a busy machine."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    assert watcher.next(1.0) == frozenset()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before < 500  # 320 measured


def test_stop_ends_it_at_once(tree: Path) -> None:
    stop = threading.Event()
    ended: list[float] = []

    def run() -> None:
        assert list(saves([tree], stop=stop)) == []
        ended.append(time.perf_counter())

    with Watcher([tree], stop=stop) as watcher:
        thread = threading.Thread(target=run)
        thread.start()
        began = time.perf_counter()
        timer = threading.Timer(0.1, stop.set)
        timer.start()
        assert watcher.next() is None
        assert time.perf_counter() - began < 0.1 + 0.05
        thread.join()
        timer.join()
    assert ended[0] - began < 0.1 + 0.05


def test_iterator_yields_each_save(tree: Path) -> None:
    stop = threading.Event()
    seen = []
    with Watcher([tree]):  # two may watch the same
        for number, saved in enumerate(_saves_after_a_first_one(tree, stop)):
            seen.append(saved)
            if number == 2:
                stop.set()
            else:
                replace(tree / "b.c", f"int b{number};\n")
    assert seen == [{tree / "a.c"}, {tree / "b.c"}, {tree / "b.c"}]


def _saves_after_a_first_one(tree: Path, stop: threading.Event) -> Iterator[frozenset[Path]]:
    timer = threading.Timer(0.1, (tree / "a.c").write_text, ["int first;\n"])
    timer.start()
    yield from saves([tree], stop=stop)
    timer.join()


def test_interrupt_ends_the_wait(tree: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from patcher.watch import Watcher\n"
        "with Watcher([Path(sys.argv[1])]) as watcher:\n"
        "    try:\n"
        "        print('ready', flush=True)\n"
        "        watcher.next()\n"
        "    except KeyboardInterrupt: print('interrupted', flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tree)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        began = time.perf_counter()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        assert time.perf_counter() - began < 0.2
        assert process.wait(SOON) == 0


def test_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PatcherError, match="nowhere") as caught:
        Watcher([tmp_path / "nowhere"])
    assert caught.value.code == "watch"
    assert caught.value.hint
