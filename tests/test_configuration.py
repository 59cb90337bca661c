"""Configuration files: where they are looked for, what their values mean, and what is refused, by file and line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from patcher.configuration import ConfigurationError, read_configuration
from patcher.errors import PatcherError


def values(start: Path) -> dict[str, object]:
    return {s.row.switch: s.value for s in read_configuration(start)}


def test_a_toml_file_says_what_one_would_repeat(tmp_path):
    (tmp_path / "patcher.toml").write_text(
        '# ours\nwatch = ["src", "/usr/include"]\n\nbuild = "make -s"\nlibrary = ["m", "./libx.so"]\n'
        'active = "drain"\ntimeout = 2\nkeep = 7\ncoroutines = false\nevents = "log"\n"compile-commands" = "b/c.json"\n'
    )
    found = read_configuration(tmp_path)
    assert {s.row.switch: (s.value, s.line) for s in found} == {
        "watch": ((tmp_path / "src", Path("/usr/include")), 2),
        "build": ("make -s", 4),
        "library": (("m", str(tmp_path / "libx.so")), 5),
        "active": ("drain", 6),
        "timeout": (2, 7),
        "keep": (7, 8),
        "coroutines": (False, 9),
        "events": (str(tmp_path / "log"), 10),
        "compile-commands": (tmp_path / "b/c.json", 11),
    }


def test_a_section_of_setup_cfg_says_the_same(tmp_path):
    (tmp_path / "setup.cfg").write_text(
        "[metadata]\nwatch = nothing\n\n[tool:patcher]\nwatch =\n    src\n    'two words'\n"
        "build = make CFLAGS=-O%d -s\ncompile_commands = b/c.json\ntimeout = 2.5\nkeep = 7\n"
        "coroutines = off\nevents = -\n"
    )
    found = read_configuration(tmp_path)
    assert {s.row.switch: (s.value, s.line) for s in found} == {
        "watch": ((tmp_path / "src", tmp_path / "two words"), 5),
        "build": ("make CFLAGS=-O%d -s", 8),
        "compile-commands": (tmp_path / "b/c.json", 9),
        "timeout": (2.5, 10),
        "keep": (7, 11),
        "coroutines": (False, 12),
        "events": ("-", 13),
    }


@pytest.mark.parametrize("below", [".", "a", "a/b"])
def test_it_is_found_from_below(below, tmp_path):
    (tmp_path / "patcher.toml").write_text("keep = 3\n")
    (tmp_path / below).mkdir(parents=True, exist_ok=True)
    assert values((tmp_path / below).resolve()) == {"keep": 3}


def test_the_nearest_counts_alone_and_patcher_toml_before_setup_cfg(tmp_path):
    (tmp_path / "patcher.toml").write_text("keep = 3\ntimeout = 1\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/setup.cfg").write_text("[tool:patcher]\nkeep = 4\n")
    assert values(tmp_path / "a") == {"keep": 4}
    (tmp_path / "a/patcher.toml").write_text("keep = 5\n")
    assert values(tmp_path / "a") == {"keep": 5}


def test_a_setup_cfg_that_says_nothing_of_us_is_passed_over(tmp_path):
    (tmp_path / "patcher.toml").write_text("keep = 3\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/setup.cfg").write_text("[metadata\nthis is no configuration\n")
    os.chmod(tmp_path / "a/setup.cfg", 0o666)
    assert values(tmp_path / "a") == {"keep": 3}


@pytest.mark.parametrize("root", [".git", ".hg", ".jj"])
def test_the_search_ends_at_the_root_of_the_checkout(root, tmp_path):
    (tmp_path / "patcher.toml").write_text("keep = 3\n")
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a" / root).mkdir()
    assert values(tmp_path / "a/b") == {}
    (tmp_path / "a/patcher.toml").write_text("keep = 4\n")
    assert values(tmp_path / "a/b") == {"keep": 4}


def test_the_search_ends_at_the_home_directory(tmp_path, monkeypatch):
    (tmp_path / "patcher.toml").write_text("keep = 3\n")
    (tmp_path / "home/b").mkdir(parents=True)
    assert values(tmp_path / "home/b") == {"keep": 3}
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert values(tmp_path / "home/b") == {}


@pytest.mark.parametrize("name", ["patcher.toml", "setup.cfg"])
def test_a_file_that_others_can_write_is_refused(name, tmp_path):
    (tmp_path / name).write_text('[tool:patcher]\nbuild = "make"\n' if name == "setup.cfg" else 'build = "make"\n')
    os.chmod(tmp_path / name, 0o666)
    with pytest.raises(PatcherError, match=f"{name}: everybody may write it") as caught:
        read_configuration(tmp_path)
    assert (caught.value.code, caught.value.exit_status) == ("untrusted", 1)
    os.chmod(tmp_path / name, 0o644)
    assert "build" in values(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_file_of_another_user_is_refused(tmp_path):
    (tmp_path / "patcher.toml").write_text("keep = 3\n")
    os.chown(tmp_path / "patcher.toml", 12345, -1)
    with pytest.raises(PatcherError, match="belongs to user 12345"):
        read_configuration(tmp_path)


WRONG = {
    "wacth = 'src'": ":2: there is no option `wacth`; did you mean `watch`?",
    "libraries = ['m']": ":2: there is no option `libraries`; did you mean `library`?",
    "zzz = 1": ":2: there is no option `zzz`",
    "force = true": ":2: `force` is not for a configuration",
    "keep = 'x'": ":2: `keep` is a whole number, not 'x'",
    "keep = true": ":2: `keep` is a whole number, not True",
    "keep = 0": ":2: `keep` is at least 1, not 0",
    "hook-timeout = 0": ":2: `hook-timeout` is more than 0, not 0",
    "timeout = nan": ":2: `timeout` is at least 0, not nan",
    "coroutines = 1": ":2: `coroutines` is true or false, not 1",
    "watch = [1]": ":2: `watch` is a list of paths, not [1]",
    "build = ['make']": ":2: `build` is a text, not ['make']",
    "active = 'never'": ":2: `active` is one of run-on, drain, refuse, not 'never'",
    "[watch]": ":2: `watch` is a list of paths, not {}",
    "keep 3": "(at line 2, column 6)",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_means_nothing_is_named_with_its_place(line, tmp_path):
    (tmp_path / "patcher.toml").write_text(f"# first\n{line}\n")
    with pytest.raises(ConfigurationError) as caught:
        read_configuration(tmp_path)
    assert caught.value.message.startswith(str(tmp_path / "patcher.toml"))
    assert WRONG[line] in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_status == 2


WRONG_INI = {
    "wacth = src": ":2: there is no option `wacth`; did you mean `watch`?",
    "keep = x": ":2: `keep` is a whole number, not 'x'",
    "keep = 0": ":2: `keep` is at least 1, not 0",
    "coroutines = maybe": ":2: `coroutines` is true or false, not 'maybe'",
    "watch = 'src": ':2: `watch` is a list of paths, not "\'src"',
    "keep": "keep",
    "keep = 1\nkeep = 2": "option 'keep' in section 'tool:patcher' already exists",
}


@pytest.mark.parametrize("line", WRONG_INI)
def test_what_means_nothing_in_setup_cfg_is_named_with_its_place(line, tmp_path):
    (tmp_path / "setup.cfg").write_text(f"[tool:patcher]\n{line}\n")
    with pytest.raises(ConfigurationError) as caught:
        read_configuration(tmp_path)
    assert caught.value.message.startswith(str(tmp_path / "setup.cfg"))
    assert WRONG_INI[line] in caught.value.message


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "patcher.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="not UTF-8"):
        read_configuration(tmp_path)
