"""The model is held against compiled programs and against what it must not let pass."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from data.model import play
from data.model.edits import Author, Edit, History, Impossible
from data.model.expect import AMBIGUOUS, fates, refusals
from data.model.program import MAIN, Form, Function, Linkage, Program, Type, Use, Value, Variable, call


def program(*variables: Variable, names: tuple[str, ...] = ("work", "other"), form: Form = Form.STATIC) -> Program:
    """Return a program of functions 1, 2 ... that each use the variables that are theirs."""
    functions = [
        Function(i, name, 0, form, 100 + i, tuple(Use(v.uid, 1, 1) for v in variables if v.function in (i, -1)))
        for i, name in enumerate(names, 1)
    ]
    return Program(1, tuple(functions), variables)


def static(uid: int, initial: int, function: int = 1, scope: int = 0, name: str = "count") -> Variable:
    return Variable(uid, name, Type.INT, (initial,), Linkage.LOCAL, 0, function, scope)


def verdict(live: Program, saved: Program, *, debug: bool, gone: Program | None = None) -> frozenset[str]:
    history = History()
    for known in (gone or live, live):
        history.applied(known)
    return refusals(live, saved, history, debug=debug)


A, B, SAME = static(10, 5), static(11, 6, scope=1), static(12, 5, scope=1)


@pytest.mark.parametrize(
    ("live", "saved", "with_debug", "without"),
    [
        pytest.param(program(A), program(replace(A, initial=(9,))), False, False, id="another initialiser"),
        pytest.param(program(A), program(A, names=("named", "other")), False, False, id="its function renamed"),
        pytest.param(program(A, static(13, 5, 2)), program(static(13, 5, 2), A), False, False, id="two functions"),
        pytest.param(program(A, B), program(A, B), False, False, id="two blocks"),
        pytest.param(program(A, SAME), program(A, SAME), False, True, id="two blocks, the same contents"),
        pytest.param(program(A), program(A, B), False, True, id="one more"),
        pytest.param(program(A), program(A, SAME), True, True, id="one more, the same contents"),
        pytest.param(program(A, B), program(B), False, True, id="one less"),
        pytest.param(
            program(A, B), program(A, replace(B, initial=(7,))), False, True, id="two blocks, another initialiser"
        ),
        pytest.param(
            program(B, static(13, 7, scope=2)),
            program(replace(B, scope=2), static(13, 7, scope=1)),
            True,
            False,
            id="blocks swapped",
        ),
        pytest.param(
            program(A, static(13, 5, 2), form=Form.ANY),
            program(static(13, 5, 2), A, form=Form.ANY),
            False,
            True,
            id="two functions that may be inlined, the same contents",
        ),
    ],
)
def test_what_may_be_refused(live: Program, saved: Program, with_debug: bool, without: bool) -> None:
    assert verdict(live, saved, debug=True) == (frozenset({AMBIGUOUS}) if with_debug else frozenset())
    assert verdict(live, saved, debug=False) == (frozenset({AMBIGUOUS}) if without else frozenset())


def test_what_is_gone_matters_when_one_comes_back() -> None:
    both, one = program(A, SAME), program(A)
    assert verdict(one, one, debug=True, gone=both) == frozenset()
    assert verdict(one, both, debug=True, gone=both) == frozenset()
    assert verdict(one, both, debug=False, gone=both) == {AMBIGUOUS}


def test_what_is_said_of_variables() -> None:
    total = Variable(20, "total", Type.INT, (3,), Linkage.GLOBAL, 0)
    live = program(total, A)
    history = History()
    history.applied(program(total, A, static(14, 1, name="seen")))
    history.applied(live)
    moved = replace(total, linkage=Linkage.STATIC)
    saved = program(moved, replace(A, initial=(8,)), static(14, 1, name="seen"), static(15, 2, name="last"))
    required = fates(live, saved, history).required
    assert required == {"added": {"last"}, "found": {"seen"}, "moved": {"total"}, "kept": {"count"}}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(3))
def test_programs_answer_as_the_model_says(seed: int, tmp_path: Path) -> None:
    """Every edit in a row, each compiled and started anew: the model computes as C does, and all edits compile."""
    random = Random(seed)
    author = Author(random)
    text = None
    while text is None:
        try:
            text = author.program()
        except Impossible:
            continue
    done = set()
    for kind in (k for _ in range(2) for k in Edit):
        if kind in (Edit.TOUCH, Edit.REVERT, Edit.RE_APPLY):
            continue
        author.history.applied(text)
        try:
            text = author.edit(text, kind)
        except Impossible:
            continue
        done.add(kind)
        if random.random() < 0.15:
            check_compiled(text, tmp_path)
    check_compiled(text, tmp_path)
    assert len(done) > 15


def check_compiled(text: Program, folder: Path) -> None:
    for name, content in {"main.c": MAIN, **text.texts()}.items():
        (folder / name).write_text(content)
    subprocess.run(["gcc", "-w", "-o", "program", "main.c", *text.texts()], cwd=folder, check=True)
    calls = [(unit, uid, given) for unit, uids in text.shape() for uid in (*uids, *uids) for given in (3, 88)]
    lines = "".join(f"{unit} {uid} {given}\n" for unit, uid, given in calls)
    done = subprocess.run([folder / "program"], input=lines, capture_output=True, text=True, check=True)
    state = {v.uid: Value.of(v) for v in text.variables}
    for (_, uid, given), answer in zip(calls, done.stdout.splitlines()[1:], strict=True):
        told = [word.partition("@")[0] for word in answer.split()]
        expected = [word.partition("@")[0] for word in call(text, state, uid, given)]
        assert told == [*expected, "."]


class Forgetful(play.Play):
    """A model that takes what a save does for something else."""

    forget: str

    def _now(self, program: Program) -> None:
        if self.forget == "values":  # as if all were initialised again
            self.state.clear()
        super()._now(self.live if self.forget == "code" else program)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("forget", ["values", "code"])
def test_a_process_that_does_otherwise_is_found_out(forget: str, tmp_path: Path) -> None:
    run = Forgetful(2, tmp_path / "p", {Edit.CODE: 1})
    run.forget = forget
    with pytest.raises(play.Deviation, match="told"):
        run.run()
