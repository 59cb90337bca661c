"""patcher config, and what a configuration does to the other commands."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from .conftest import run, sentences


def shown(*arguments, cwd):
    done = run("config", "--show", "--json", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return {entry.pop("option"): entry for entry in json.loads(done.stdout)}


def test_each_value_is_told_with_where_it_comes_from(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "patcher.toml").write_text('watch = ["src"]\nkeep = 7\nactive = "drain"\n')
    file = str(tmp_path / "patcher.toml")
    found = shown("--active", "refuse", cwd=tmp_path / "src")
    assert found["watch"] == {"value": [str(tmp_path / "src")], "from": "file", "file": file, "line": 1}
    assert found["keep"] == {"value": 7, "from": "file", "file": file, "line": 2}
    assert found["active"] == {"value": "refuse", "from": "flag", "file": None, "line": None}
    assert found["timeout"] == {"value": 5.0, "from": "default", "file": None, "line": None}
    assert shown("--no-config", cwd=tmp_path)["keep"]["value"] == 50
    lines = run("config", "--show", "--quiet", cwd=tmp_path).stdout.splitlines()
    assert [" ".join(line.split()) for line in lines if line.split()[0] in ("watch", "keep", "quiet", "build")] == [
        f'watch ["{tmp_path}/src"] {file}:1',
        "build - default",
        f"keep 7 {file}:2",
        "quiet true flag",
    ]


def test_a_negative_flag_wins_over_a_configured_one(tmp_path):
    (tmp_path / "setup.cfg").write_text("[tool:patcher]\nquiet = yes\n")
    assert shown(cwd=tmp_path)["quiet"]["value"] is True
    assert shown("--no-quiet", cwd=tmp_path)["quiet"] == {"value": False, "from": "flag", "file": None, "line": None}


@pytest.mark.parametrize("command", [["spawn", "true"], ["attach", "1"], ["apply", "1", "x.o"], ["status", "1"]])
def test_a_mistake_in_it_stops_every_command(command, tmp_path):
    (tmp_path / "patcher.toml").write_text("\nwacth = 'src'\n")
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 2
    assert sentences(done.stderr) == [
        f"patcher: {tmp_path}/patcher.toml:2: there is no option `wacth`; did you mean `watch`?"
    ]


def test_a_configured_path_that_is_not_there_is_named_with_its_line(tmp_path):
    (tmp_path / "patcher.toml").write_text("watch = 'gone'\n")
    done = run("spawn", "true", cwd=tmp_path)
    assert done.returncode == 2
    assert sentences(done.stderr) == [
        f"patcher: {tmp_path}/patcher.toml:1: watch {tmp_path}/gone: no such file or directory"
    ]
    assert run("spawn", "true", "--watch", ".", cwd=tmp_path).returncode == 0
    assert run("spawn", "true", "--no-config", cwd=tmp_path).returncode == 0


def test_what_others_can_write_is_not_done(tmp_path):
    (tmp_path / "patcher.toml").write_text("build = 'touch done'\n")
    os.chmod(tmp_path / "patcher.toml", 0o666)
    done = run("spawn", "true", cwd=tmp_path)
    assert done.returncode == 1
    assert "everybody may write it" in sentences(done.stderr)[0]


def test_configured_paths_are_watched_and_ignored_ones_left_alone(project, watching):
    subprocess.run(["git", "init", "-q", str(project.root)], check=True)
    (project.root / ".gitignore").write_text("made.c\n")
    (project.root / "patcher.toml").write_text('watch = ["src"]\nignore = ["/src/notes.c"]\n')
    session = watching(project, "spawn", "./program")
    (project.sources / "made.c").write_text("int made;\n")
    (project.sources / "notes.c").write_text("int notes;\n")
    project.edit("unit.c", "n + 1000 * calls", "n + 3")
    assert session.event("saved")["files"] == [str(project.sources / "unit.c")]
    session.event("applied")
    assert session.ask(5) == "8"
    assert session.finish() == 7
    told = [line for line in session.errors().splitlines() if "left alone" in line]
    assert len(told) == 1
    assert f"made.c: left alone, as {project.root}/.gitignore ignores it" in told[0]


def test_a_configured_build_runs_where_the_file_is(project, watching):
    (project.root / "patcher.toml").write_text(
        'watch = ["src"]\nbuild = "pwd >place; gcc -g -O2 -c src/unit.c -o unit.o"\n'
    )
    (project.root / "below").mkdir()
    session = watching(project, "spawn", "./program")
    project.edit("unit.c", "n + 1000 * calls", "n + 3")
    session.event("applied")
    assert session.ask(5) == "8"
    assert (project.root / "place").read_text().strip() == str(project.root)
    assert session.finish() == 7
