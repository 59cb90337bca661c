"""A controller that attaches anew judges types as the one before it did; where it cannot, it says so and refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from project import MAIN, Project, assert_untouched

import patcher
from patcher.errors import UnsafeChange
from patcher.session import Session

UNIT = """\
int base = 5;
int answer(int n)
{
    return n + base;
}
"""
MORE = """\
struct extra { int a; int b; };
static struct extra extra = {10, 20};
static struct extra *volatile chosen = &extra;
int base = 5;
int answer(int n)
{
    return n + base + ++chosen->a + chosen->b;
}
"""
SWAPPED = MORE.replace("int a; int b;", "int b; int a;").replace("n + base", "1000 + n + base")
PLAIN = MORE.replace("chosen->", "extra.").replace("static struct extra *volatile chosen = &extra;\n", "")
PLAIN = PLAIN.replace("static struct extra extra", "struct extra extra")
GROWN = PLAIN.replace("int b;", "int b; int c;").replace("n + base", "1000 + n + base")


@pytest.fixture(params=[(c, o) for c in ("gcc", "clang") for o in ("-O0", "-O2")], ids="".join, autouse=True)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("project.COMPILE", (request.param[0], "-g", request.param[1]))
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))


def types_of(root: Path) -> Path:
    return root / "run/patcher/types"


def save(project: Project, text: str) -> Path:
    (project.sources / "unit.c").write_text(text)
    return project.sources / "unit.c"


Change = Callable[[Session], str]


def twice(root: Path, first: str, change: Change, *, again: bool, between: Callable[[], None] = lambda: None) -> str:
    """Apply a text and then a change, in one session or two; return what the change says."""
    project = Project(root, {"main.c": MAIN, "unit.c": PLAIN if first == GROWN else UNIT})
    with project.running() as program:
        session = patcher.attach(program.pid, watched=[project.sources])
        session.apply(save(project, first))
        assert program.ask(1).endswith("37")
        if again:
            session.close()
            between()
            session = patcher.attach(program.pid, watched=[project.sources])
        with session:
            said = change(session)
            said += f"; {program.ask(1)}"
        assert_untouched(program.pid)
    return said.replace(str(root), "")


def saving(root: Path, text: str) -> Change:
    def change(session: Session) -> str:
        (root / "src/unit.c").write_text(text)
        try:
            done = session.apply(root / "src/unit.c")
        except UnsafeChange as error:
            return f"{error.code}: {error.message}"
        return ", ".join(f"{v.outcome} {v.name} {v.note}" for v in done.variables)

    return change


@pytest.mark.parametrize(
    ("first", "text", "expected"),
    [
        (MORE, SWAPPED, "member `a` offset 0 -> 4; member `b` offset 4 -> 0"),
        (PLAIN, GROWN, "migrated extra 8 -> 12 bytes"),
        (GROWN, GROWN.replace("int c;", "int c, d;"), "migrated extra 12 -> 16 bytes"),
        (MORE, MORE.replace("n + base", "100 + n + base"), "; 138"),
    ],
    ids=["refused", "carried", "carried again", "as it was"],
)
def test_the_same_verdict_as_in_one_session(tmp_path: Path, first: str, text: str, expected: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    said = twice(one, first, saving(one, text), again=False)
    assert expected in said
    assert twice(two, first, saving(two, text), again=True) == said


@pytest.mark.parametrize("text", [SWAPPED, MORE.replace("n + base", "100 + n + base")], ids=["swapped", "as it was"])
def test_what_is_gone_is_not_guessed(tmp_path: Path, text: str) -> None:
    said = twice(
        tmp_path / "p",
        MORE,
        saving(tmp_path / "p", text),
        again=True,
        between=lambda: shutil.rmtree(types_of(tmp_path)),
    )
    assert said.startswith("layout: ")
    assert "`struct extra`: generation 1 may have brought it" in said
    assert said.endswith("; 38")


def damage(folder: Path) -> None:
    (file,) = folder.glob("*/0.types")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut_short(folder: Path) -> None:
    (file,) = folder.glob("*/index.json")
    file.write_bytes(file.read_bytes()[:-3])


def of_another(folder: Path) -> None:
    (file,) = folder.glob("*/times")
    assert "\n1 " in file.read_text()
    file.write_text(file.read_text().replace("\n1 ", "\n1 1"))


def torn(folder: Path) -> None:
    (file,) = folder.glob("*/times")
    file.write_bytes(file.read_bytes()[:-3])


@pytest.mark.parametrize("harm", [damage, cut_short, of_another, torn])
def test_what_does_not_fit_is_as_good_as_gone(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    said = twice(
        tmp_path / "p", MORE, saving(tmp_path / "p", SWAPPED), again=True, between=lambda: harm(types_of(tmp_path))
    )
    assert "generation 1 may have brought it" in said


def test_many_generations_take_no_more_room_than_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": UNIT})

    def number(n: int) -> str:
        return MORE.replace("return n + base", "n++;\n    " * (n % 3 + 1) + f"return {n} + base")

    with project.running() as program:
        with patcher.attach(program.pid, watched=[project.sources]) as session:
            session.apply(save(project, number(1)))
            (directory,) = types_of(tmp_path).iterdir()
            monkeypatch.setattr("patcher.data.remembered._LARGEST", 2 * (directory / "0.types").stat().st_size)
            index = (directory / "index.json").stat().st_size
            for n in range(2, 32):
                assert session.apply(save(project, number(n))).number == n
                assert program.ask(1) == str(n + 5 + 10 + n - 1 + 20)
        assert sorted(path.name for path in directory.iterdir()) == ["0.types", "index.json", "times"]
        assert abs((directory / "index.json").stat().st_size - index) < 16
        assert len((directory / "times").read_text().split()) == 2 * 31
        with patcher.attach(program.pid, watched=[project.sources]) as session:
            with pytest.raises(UnsafeChange, match="member `a` offset 0 -> 4"):
                session.apply(save(project, SWAPPED))
            session.apply(save(project, number(32)))
        assert program.ask(1) == str(32 + 5 + 10 + 31 + 20)
        assert_untouched(program.pid)


def test_two_controllers_at_once_forget_nothing_of_each_other(tmp_path: Path) -> None:
    other = "int spare(int n)\n{\n    return n;\n}\n"
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": UNIT, "other.c": other})

    def change(session: Session, steps: int) -> None:
        path = project.sources / "other.c"
        path.write_text(other.replace("return", "n++;\n    " * steps + "return"))
        session.apply(path)

    with project.running() as program:
        with patcher.attach(program.pid, watched=[project.sources]) as one:
            change(one, 1)
            with patcher.attach(program.pid, watched=[project.sources]) as two:
                two.apply(save(project, MORE))
                change(one, 2)
        with patcher.attach(program.pid, watched=[project.sources]) as later:
            with pytest.raises(UnsafeChange, match="member `a` offset 0 -> 4"):
                later.apply(save(project, SWAPPED))
            later.apply(save(project, MORE.replace("n + base", "200 + n + base")))
        assert program.ask(1) == str(200 + 1 + 5 + 11 + 20)
        assert_untouched(program.pid)


def test_directories_of_ended_processes_go(tmp_path: Path) -> None:
    twice(tmp_path / "p", MORE, saving(tmp_path / "p", SWAPPED), again=False)
    (ended,) = types_of(tmp_path).iterdir()
    twice(tmp_path / "q", MORE, saving(tmp_path / "q", SWAPPED), again=False)
    assert not ended.exists()
    assert len(list(types_of(tmp_path).iterdir())) == 1
