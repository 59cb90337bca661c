"""Texts that new code is without: who keeps their addresses is told, and nobody is told of who does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from project import MAIN, Project

import patcher
from patcher.data import strings

UNIT = """\
#include <stdlib.h>
#include <wchar.h>
const char *other(void);
struct item { struct item *next; const char *text; } *list;
const char *middle;
static const wchar_t *wide;
__attribute__((noinline)) static const char *title(int n) { return n < 9 ? "my shared text" : "?"; }
__attribute__((noinline)) static const wchar_t *broad(int n) { return n < 9 ? L"wide" : L"?"; }
int answer(int n)
{
    if (!list) {
        list = malloc(sizeof *list);
        list->text = title(n);
        wide = broad(n);
        middle = title(n) + 3;
        other();
    }
    return list->text[0] + title(n)[0] + wide[0];
}
"""
OTHER = """\
static const char *text;
static const char *const fixed = "my shared text";
const char *volatile mode = "my shared text";
const char *other(void)
{
    if (!text)
        text = "my shared text";
    return fixed[0] == 'm' ? text : mode;
}
"""


def fates(outcome: patcher.Generation) -> dict[str, str]:
    return {v.name: f"{v.outcome} {v.note}" for v in outcome.variables}


def project(root: Path, other: str = OTHER) -> Project:
    return Project(root, {"main.c": MAIN, "unit.c": UNIT, "other.c": other})


@pytest.mark.parametrize("flags", [("gcc", "-g", "-O2"), ("clang", "-g", "-O2"), ("gcc", "-g", "-O1", "-fno-pie")])
def test_an_equal_text_of_another_unit_is_said_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    monkeypatch.setattr("project.COMPILE", flags)
    made = Project(
        tmp_path,
        {"main.c": MAIN, "unit.c": UNIT, "other.c": OTHER},
        link_flags=("-no-pie",) if "-fno-pie" in flags else (),
    )
    with made.running() as program, patcher.attach(program.pid) as session:
        before = program.ask(1)
        source = made.edit("unit.c", '"my shared text"', '"new text"')
        told = fates(session.apply(source))
        assert list(told) == ['"my shared text"']
        kept, _, equal = told['"my shared text"'].partition("; or an equal text of ")
        kept = kept.removeprefix("stale ")
        assert sorted(place.partition("0x")[0] for place in kept.split(", ")) == ["stored at ", "stored in `text`"]
        assert equal == "`other`, `mode`"
        assert program.ask(1) == str(int(before) + ord("n") - ord("m"))
        assert fates(session.apply(made.edit("unit.c", '"new text"', '"old text"'))) == {}


def test_a_tail_of_another_text_and_a_text_that_stays_are_not_told(tmp_path: Path) -> None:
    made = project(tmp_path, 'const char *other(void) { return "fine"; }\n')
    with made.running() as program, patcher.attach(program.pid) as session:
        program.ask(1)
        # `middle` keeps the address of what would be a text of its own, had anybody "shared text".
        source = made.edit("unit.c", 'n < 9 ? "my shared text"', 'n < 8 ? "my shared text"')
        assert fates(session.apply(source)) == {}
        made.edit("unit.c", 'n < 8 ? "my shared text"', 'n < 8 ? "text"')
        told = fates(session.apply(source))
        assert list(told) == ['"my shared text"']
        assert told['"my shared text"'].startswith("stale stored at 0x")
        assert "middle" not in told['"my shared text"']


COLD = """\
const char *kept;
int count;
__attribute__((cold, noinline)) void keep(const char *text) { kept = text; }
__attribute__((noinline)) int work(int n)
{
    if (n > 900) {
        keep("a rare text");
        count += 5;
    }
    return n + count;
}
int answer(int n) { return work(n); }
"""


def test_a_text_that_only_a_part_split_off_has_is_told(tmp_path: Path) -> None:
    made = Project(tmp_path, {"main.c": MAIN, "unit.c": COLD})
    with made.running() as program, patcher.attach(program.pid) as session:
        assert program.ask(901) == "906"
        (live,) = session.image.executable.module.symbols.named("work.cold")
        assert live.size
        source = made.edit("unit.c", 'keep("a rare text")', "keep(0)")
        assert fates(session.apply(source)) == {'"a rare text"': "stale stored in `kept`"}
        session.revert(0)
        made.edit("unit.c", "        keep(0);\n        count += 5;\n", "        count += 6;\n")  # nothing is split off
        assert fates(session.apply(source)) == {'"a rare text"': "stale stored in `kept`"}
        assert program.ask(901) == "912"


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_a_text_with_a_name_is_a_constant_and_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    monkeypatch.setattr("project.COMPILE", (compiler, "-g", "-O2"))
    unit = UNIT.replace("__attribute__", 'const char label[] = "a label";\n__attribute__', 1)
    unit = unit.replace("title(n) + 3", "n < 9 ? label : 0").replace("title(n)[0]", "title(n)[0] + label[0]")
    made = Project(tmp_path, {"main.c": MAIN, "unit.c": unit, "other.c": OTHER})
    with made.running() as program, patcher.attach(program.pid) as session:
        program.ask(1)
        source = made.edit("unit.c", '"a label"', '"A Label"')
        assert fates(session.apply(source)) == {"label": "rewritten stored in `middle`"}
        # The text has a name from now on, and new code still has it.
        made.edit("unit.c", "const char label", 'static const char named[] = "my shared text";\nconst char label')
        made.edit("unit.c", 'n < 9 ? "my shared text"', "n < 8 ? named")
        assert '"my shared text"' not in fates(session.apply(source))


def test_nothing_is_searched_while_no_text_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = project(tmp_path)

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"searched with {arguments}")

    monkeypatch.setattr(strings, "Holders", refuse)
    monkeypatch.setattr(strings, "_takes", refuse)
    with made.running() as program, patcher.attach(program.pid) as session:
        program.ask(1)
        session.apply(made.edit("unit.c", 'n < 9 ? "my shared text"', 'n < 7 ? "my shared text"'))
        with pytest.raises(AssertionError, match="searched"):
            session.apply(made.edit("unit.c", 'n < 7 ? "my shared text"', 'n < 7 ? "changed"'))
