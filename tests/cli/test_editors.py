"""What docs/editors.md gives to editors, tried on the lines that a real watch writes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from project import Project

from patcher.report import BuildFailed, Refused
from patcher.report.problems import problems

from .conftest import ROOT, Session

VALUE = "n + 1000 * calls"
PAGE = (Path(ROOT) / "docs" / "editors.md").read_text("utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return str(found)


@pytest.fixture
def lines(project: Project, watching: Callable[..., Session], tmp_path: Path) -> list[str]:
    """Return what a watch says of a compile error, one in a header, a refusal, and what goes live then."""
    log = tmp_path / "log"
    (project.sources / "bad.h").write_text("#error no\n")
    session = watching(project, "spawn", "./program", "--watch", "src", "--problems", "--log", log)
    project.edit("unit.c", VALUE, "n +")
    session.event("build_failed")
    path = project.sources / "unit.c"
    path.write_text('#include "bad.h"\n' + path.read_text().replace("n +;", "3;"))
    session.event("build_failed")
    path.write_text(
        path.read_text().replace('#include "bad.h"\n', "extern int nowhere(int);\n").replace("3;", "nowhere(n);")
    )
    session.event("refused")
    path.write_text(path.read_text().replace("nowhere(n)", "3"))
    session.event("applied")
    session.finish()
    return log.read_text("utf-8").splitlines()


PLACES = [("unit.c", 5, 15, "error"), ("bad.h", 1, 2, "error"), ("unit.c", 1, 1, "error")]


def placed(project: Project, lines: list[str]) -> list[tuple[str, int, int, str]]:
    regexp = json.loads(block("json"))["tasks"][0]["problemMatcher"]["pattern"]["regexp"]
    found = [re.fullmatch(regexp, line) for line in lines]
    taken = [(m[1], int(m[2]), int(m[3]), m[4]) for m in found if m]
    assert {Path(file).parent for file, *_ in taken} == {project.sources}
    return [(Path(file).name, line, column, severity) for file, line, column, severity in taken]


def test_the_task_of_vs_code_finds_what_is_wrong_and_nothing_else(project, lines):
    (task,) = json.loads(block("json"))["tasks"]
    found = placed(project, lines)
    assert [p for p in found if p[3] == "error"] == PLACES
    assert len(found) == sum(line.startswith("/") for line in lines)
    background = task["problemMatcher"]["background"]
    begun = [bool(re.fullmatch(background["beginsPattern"], line)) for line in lines]
    ended = [bool(re.fullmatch(background["endsPattern"], line)) for line in lines]
    assert begun.count(True) == ended.count(True) == 4
    assert "--problems" in task["command"]
    assert "[unresolved-symbol]" in next(line for line in lines if ":1:1: error:" in line)


@pytest.mark.skipif(
    shutil.which("vim") is None
    or "+quickfix" not in subprocess.run(["vim", "--version"], capture_output=True, text=True).stdout,
    reason="vim with quickfix is not installed",
)
def test_vim_finds_the_same(project, lines, tmp_path):
    (tmp_path / "vimrc").write_text(block("vim"), "utf-8")
    (tmp_path / "lines").write_text("\n".join(lines) + "\n", "utf-8")
    what = 'fnamemodify(bufname(v:val.bufnr), ":p") . ":" . v:val.lnum . ":" . v:val.col . ":" . v:val.type'
    script = f"cgetfile lines | call writefile(map(filter(getqflist(), 'v:val.valid'), '{what}'), 'found')"
    command = ["vim", "-u", "NONE", "-N", "-i", "NONE", "-es", "-S", "vimrc", "-c", script, "-c", "qa!"]
    subprocess.run(command, cwd=tmp_path, check=False, stdin=subprocess.DEVNULL, timeout=20)
    found = [line.rsplit(":", 3) for line in (tmp_path / "found").read_text().splitlines()]
    words = {"e": "error", "w": "warning", "n": "note"}
    assert [(Path(f).name, int(n), int(c), words[t]) for f, n, c, t in found] == placed(project, lines)


EMACS = """
(require 'compile)
(load (expand-file-name "snippet.el"))
(unless (commandp 'patcher-spawn) (error "the snippet defines no command"))
(with-current-buffer (get-buffer-create "*compilation*")
  (insert-file-contents "lines")
  (compilation-mode)
  (setq compilation-skip-threshold 0 next-error-last-buffer (current-buffer)))
(condition-case nil
    (while t
      (next-error)
      (with-selected-window (selected-window)
        (princ (format "%s:%d:%d\\n" (buffer-file-name) (line-number-at-pos) (1+ (current-column))))))
  (user-error nil))
"""


@pytest.mark.skipif(shutil.which("emacs") is None, reason="emacs is not installed")
def test_emacs_goes_there_by_itself(project, lines, tmp_path):
    (tmp_path / "snippet.el").write_text(block("elisp"), "utf-8")
    (tmp_path / "go.el").write_text(EMACS, "utf-8")
    (tmp_path / "lines").write_text("\n".join(lines) + "\n", "utf-8")
    done = subprocess.run(
        ["emacs", "--batch", "-Q", "-l", "go.el"], cwd=tmp_path, capture_output=True, text=True, timeout=30
    )
    found = [line.rsplit(":", 2) for line in done.stdout.splitlines()]
    wanted = [(name, line) for name, line, *_ in placed(project, lines)]
    assert [(Path(f).name, int(n)) for f, n, _ in found] == wanted, done.stderr


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (BuildFailed("/p/a.c", "collect2: error: ld returned 1\n", "ld failed"), ["/p/a.c:1:1: error: ld failed"]),
        (BuildFailed("", "make: *** no rule\n"), [".:1:1: error: make: *** no rule"]),
        (
            BuildFailed("/p/a.c", "\x1b[1ma.c:3:4:\x1b[0m \x1b[31mfatal error: \x1b[mno such\nx.s:9: Error: bad\n"),
            ["a.c:3:4: error: no such", "x.s:9:1: error: bad"],
        ),
        (
            Refused("layout", "`x` has\nanother type", "restart", "/p/a.c, /p/b.c"),
            [f"/p/{n}.c:1:1: error: `x` has another type [layout]; restart" for n in "ab"],
        ),
    ],
)
def test_whatever_is_wrong_has_a_place(event, said):
    assert [str(p) for p in problems(event)] == said
