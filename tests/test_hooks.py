"""Hooks of real programs: called by name before and after a change, told what it is about, and never in its way."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from project import MAIN, Project, assert_untouched

import patcher
from patcher.cli import header
from patcher.errors import PatcherError, UnsafeChange
from patcher.report import Event, Note

HEADER = (Path(header.__file__).parent.parent / "header" / "patcher.h").read_text()

UNIT = """\
volatile int zero;
int answer(int n) { return n + 10 + zero; }
"""
# What the program was told, and which code it had meanwhile: answer(0), by a call as any other.
HOOKS = """\
#include <stdio.h>
#include <string.h>
#include "patcher.h"
int answer(int n);
static char told[4000];
static void tell(const char *when, const struct patcher_event *e)
{
    char *end = told + strlen(told);
    end += sprintf(end, "%s %d %d %d->%d %d[", when, e->size == sizeof *e, (int)e->action, (int)e->previous,
                   (int)e->generation, answer(0));
    for (uint64_t i = 0; i < e->function_count; i++)
        end += sprintf(end, "%s %s %s;", e->functions[i].name, e->functions[i].file, e->functions[i].outcome);
    for (uint64_t i = 0; i < e->variable_count; i++)
        end += sprintf(end, "%s %s %s;", e->variables[i].name, e->variables[i].file, e->variables[i].outcome);
    strcpy(end, "]");
}
void patcher_before(const struct patcher_event *e) { tell("before", e); }
void patcher_after(const struct patcher_event *e) { tell("after", e); }
const char *take(void) { static char text[4000]; strcpy(text, told); told[0] = 0; return text; }
"""
TELLING = MAIN.replace("int answer(int n);", "int answer(int n); const char *take(void);").replace(
    'printf("%d\\n", answer(atoi(line)));', "*line == 't' ? puts(take()) : printf(\"%d\\n\", answer(atoi(line)));"
)


class Notes:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, Note):
            self.texts.append(event.text)


def make(root: Path, hooks: str = HOOKS, flags: Sequence[str] = (), main: str = TELLING, unit: str = UNIT) -> Project:
    sources = {"main.c": main, "unit.c": unit, "hooks.c": hooks, "patcher.h": HEADER}
    return Project(root / "p", sources, compile_flags=flags)


@pytest.mark.parametrize("flags", [("-O0",), ("-O2", "-fPIE"), ("-O2", "-fvisibility=hidden")], ids=" ".join)
def test_told_of_each_change_before_and_after_it(tmp_path, flags):
    project = make(tmp_path, flags=flags)
    with project.running() as program, patcher.attach(program.pid) as session:
        assert program.ask("t") == ""
        session.apply(project.object("unit.c", ("10", "20")))
        changed = "answer unit.c changed;"
        assert program.ask("t") == f"before 1 1 0->1 10[{changed}]after 1 1 0->1 20[{changed}]"
        more = "volatile int zero; static int calls; int answer(int n) { return n + 30 + 0 * ++calls + zero; }"
        session.apply(project.object("unit.c", (UNIT.strip(), more)))
        changed += "calls unit.c added;"
        assert program.ask("t") == f"before 1 1 1->2 20[{changed}]after 1 1 1->2 30[{changed}]"
        assert session.revert() == 1
        assert (
            program.ask("t") == "before 1 2 2->1 30[answer unit.c reverted;]after 1 2 2->1 20[answer unit.c reverted;]"
        )
        session.revert(0)
        assert (
            program.ask("t") == "before 1 2 1->0 20[answer unit.c reverted;]after 1 2 1->0 10[answer unit.c reverted;]"
        )
        session.apply(project.object("unit.c", ("10", "40")))
        assert program.ask("t").startswith("before 1 1 0->3 10[")
        assert_untouched(program.pid)


@pytest.mark.parametrize("compiler", ["gcc -O0", "clang -O2", "g++ -O0", "g++ -O2", "clang++ -O0", "clang++ -O2"])
def test_hooks_of_every_language_and_compiler(tmp_path, monkeypatch, compiler):
    name, optimise = compiler.split()
    language = ("-x", "c++") if name.endswith("++") else ()
    monkeypatch.setattr("project.COMPILE", (name, *language, "-g", optimise))
    project = make(tmp_path)
    answer = "_Z6answeri" if language else "answer"
    with project.running() as program, patcher.attach(program.pid) as session:
        for number, new in ((1, "20"), (2, "30")):
            session.apply(project.object("unit.c", ("10", new)))
            change, told = f"1 1 {number - 1}->{number}", f"[{answer} unit.c changed;]"
            assert program.ask("t") == f"before {change} {10 * number}{told}after {change} {new}{told}"
        assert session.revert() == 1
        told = f"[{answer} unit.c reverted;]"
        assert program.ask("t") == f"before 1 2 2->1 30{told}after 1 2 2->1 20{told}"
        session.revert(0)
        assert_untouched(program.pid)


def test_nothing_is_told_when_nothing_changes_or_all_is_tried_only(tmp_path):
    project = make(tmp_path)
    with project.running() as program:
        with patcher.attach(program.pid) as session:
            assert not session.apply(project.object("unit.c")).functions
        with patcher.attach(program.pid, dry_run=True) as session:
            assert session.apply(project.object("unit.c", ("10", "20"))).functions
        assert program.ask("t") == ""


def test_static_hooks_and_a_hook_that_changes(tmp_path):
    hooks = """\
#include <stdio.h>
struct patcher_event;
static int seen;
__attribute__((used)) static void patcher_before(const struct patcher_event *e) { seen += e != 0; }
__attribute__((used)) static void patcher_after(const struct patcher_event *e) { seen += 10 * (e != 0); }
const char *take(void) { static char text[20]; sprintf(text, "%d", seen); return text; }
"""
    project = make(tmp_path, hooks)
    with project.running() as program, patcher.attach(program.pid) as session:
        session.apply(project.object("unit.c", ("10", "20")))
        assert program.ask("t") == "11"
        session.apply(project.object("hooks.c", ("seen += e != 0", "seen += 100"), ("10 *", "1000 *")))
        assert program.ask("t") == "1012"  # the old one before, the new one after
        session.revert()
        assert program.ask("t") == "1122"


def test_two_hooks_of_one_name_are_refused(tmp_path):
    one = "__attribute__((used)) static void patcher_before(const void *e) { (void)e; }\n"
    project = make(tmp_path, one + "const char *take(void) { return 0; }\n", main=TELLING + one)
    with project.running() as program, patcher.attach(program.pid) as session:
        with pytest.raises(UnsafeChange, match="2 functions `patcher_before`") as caught:
            session.apply(project.object("unit.c", ("10", "20")))
        assert caught.value.code == "ambiguous-symbol"
        assert program.ask(1) == "11"


def test_hooks_that_a_patch_brings(tmp_path):
    project = make(tmp_path, 'const char *take(void) { return ""; }\n')
    bring = """\
#include "patcher.h"
int before, after;
volatile int zero;
void patcher_before(const struct patcher_event *e) { before += (int)e->action; }
void patcher_after(const struct patcher_event *e) { after += (int)e->action; }
int answer(int n) { return n + 100 * before + 1000 * after + zero; }
"""
    (project.sources / "unit.c").write_text(bring)
    with project.running() as program, patcher.attach(program.pid) as session:
        added = session.apply(project.object("unit.c", flags=("-ffunction-sections", f"-I{project.sources}")))
        assert {f.name for f in added.functions} == {"answer", "patcher_before", "patcher_after"}
        assert program.ask(1) == "1001", "after, by the new code; nobody was there to be told before"
        session.apply(project.object("main.c", ("return 7", "return 8")))
        assert program.ask(1) == "2101"
        session.revert(1)
        assert program.ask(1) == "4301"
        session.revert(0)  # told before; afterwards there is no such hook any more
        assert program.ask(1) == "11"
        session.apply(project.object("unit.c", ("1000 * after", "2000 * after"), flags=(f"-I{project.sources}",)))
        assert program.ask(1) == "10501"


CRASH = "*(volatile int *)8 = 1;"
HANG = 'for (;;) __asm__ volatile ("");'
LOCK = "pthread_mutex_lock(&lock); pthread_mutex_lock(&lock);"
FAILING = """\
#include <pthread.h>
#include <stdlib.h>
pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
int fails, calls;
struct patcher_event {{ unsigned size, action; }};
void patcher_{0}(const struct patcher_event *e) {{ calls++; if (fails) {{ {1} }} }}
const char *take(void) {{ fails = !fails; return ""; }}
"""


@pytest.mark.parametrize(
    ("failure", "code"),
    [(CRASH, "call-crashed"), ("abort();", "call-crashed"), (HANG, "call-timeout"), (LOCK, "call-timeout")],
    ids=["crash", "abort", "hang", "lock"],
)
def test_a_hook_that_fails_before_a_change_prevents_it(tmp_path, failure, code):
    project = make(tmp_path, FAILING.format("before", failure))
    with project.running() as program, patcher.attach(program.pid, hook_timeout=0.3) as session:
        session.apply(project.object("unit.c", ("10", "15")))
        program.ask("t")
        with pytest.raises(UnsafeChange, match="`patcher_before` was not run to its end, and so nothing") as caught:
            session.apply(project.object("unit.c", ("10", "20")))
        assert caught.value.code == code
        assert program.ask(1) == "16"
        with pytest.raises(PatcherError, match="patcher_before"):
            session.revert()
        assert program.ask(1) == "16"
        assert session.status().generation == 1
        program.ask("t")
        session.apply(project.object("unit.c", ("10", "30")))
        assert program.ask(1) == "31"
        assert session.revert(0) == 0
        assert program.ask(1) == "11"
        assert_untouched(program.pid)


@pytest.mark.parametrize("failure", [CRASH, HANG], ids=["crash", "hang"])
def test_a_hook_that_fails_after_a_change_is_told_of(tmp_path, failure):
    project = make(tmp_path, FAILING.format("after", failure))
    with project.running() as program, patcher.attach(program.pid, hook_timeout=0.3) as session:
        session._reporter = notes = Notes()
        session.apply(project.object("unit.c", ("10", "15")))
        program.ask("t")
        assert not notes.texts
        assert session.apply(project.object("unit.c", ("10", "20"))).number == 2
        assert program.ask(1) == "21"
        assert session.revert() == 1
        assert program.ask(1) == "16"
        assert [t.partition(":")[0] for t in notes.texts] == [
            "`patcher_after` was not run to its end, after the change"
        ] * 2
        assert_untouched(program.pid)


def test_a_change_that_is_not_made_after_all_is_called_off(tmp_path):
    project = make(tmp_path)
    crash = "__attribute__((constructor)) static void start(void) { *(volatile int *)8 = 1; }\n"
    added = f"{crash}int added(void) {{ return 3; }}\n"
    (project.sources / "added.c").write_text(added)
    with project.running() as program, patcher.attach(program.pid) as session:
        with pytest.raises(UnsafeChange, match="initialises what is new"):
            session.apply(
                project.object("added.c"), project.object("unit.c", ("{ r", "{ int added(void); r"), ("10", "added()"))
            )
        told = program.ask("t")
        assert told.startswith("before 1 1 0->1 10[")
        assert "]after 1 3 0->0 10[" in told
        session.apply(project.object("unit.c", ("10", "20")))
        assert "after 1 1 0->1 20[" in program.ask("t")


# A thread that waits in `answer`, which so cannot change.
INSIDE = """#include <pthread.h>
#include <unistd.h>
extern volatile int inside;
static void *enter(void *unused) { answer(7); return unused; }
__attribute__((constructor)) static void start(void) { pthread_t t; pthread_create(&t, NULL, enter, NULL); }
"""
UNIT_INSIDE = """#include <unistd.h>
volatile int inside;
int answer(int n)
{
    while (n == 7) {
        inside = 1;
        usleep(1000);
    }
    return n + 10;
}
"""


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"active": "refuse"}, UnsafeChange),
        ({"active": "drain", "timeout": 0.1}, UnsafeChange),
        ({"consistency": "generation", "timeout": 0.1}, UnsafeChange),
        ({"active": "drain", "timeout": 60}, KeyboardInterrupt),
    ],
    ids=["refuse", "drain", "generation", "interrupted"],
)
def test_a_change_that_may_not_be_made_is_called_off(tmp_path, options, error):
    """Whoever was told before a change hears of it again, and that it was not made: also where the user gives it up."""
    main = TELLING.replace("const char *take(void);", "const char *take(void);\n" + INSIDE).replace(
        'puts("ready");', 'while (!inside); puts("ready");'
    )
    project = make(tmp_path, main=main, unit=UNIT_INSIDE)
    with project.running() as program, patcher.attach(program.pid, **options) as session:
        change = project.object("unit.c", ("n + 10", "n + 20"))
        if error is KeyboardInterrupt:
            looks = session.occupants.lookout.standing

            def interrupted(*arguments):
                assert looks(*arguments)
                signal.raise_signal(signal.SIGINT)
                return looks(*arguments)

            session.occupants.lookout.standing = interrupted
        with pytest.raises(error):
            session.apply(change)
        told = program.ask("t")
        assert told.startswith("before 1 1 0->1 10[")
        assert told.count("after") == 1
        assert "]after 1 3 0->0 10[" in told
        assert session.status().generation == 0
        assert_untouched(program.pid)


def test_hooks_in_a_program_that_is_busy_with_threads(tmp_path):
    busy = """\
#include <pthread.h>
#include <stdlib.h>
static void *work(void *unused) { for (;;) free(malloc(100)); return unused; }
__attribute__((constructor)) static void start(void)
{
    pthread_t t;
    for (int i = 0; i < 2; i++) pthread_create(&t, NULL, work, NULL);
}
"""
    allocating = HOOKS.replace('{ tell("before", e); }', '{ free(malloc(200)); tell("before", e); }')
    project = make(tmp_path, "#include <stdlib.h>\n" + allocating, main=busy + TELLING)
    with project.running() as program, patcher.attach(program.pid) as session:
        for i, number in enumerate((20, 30, 40)):
            session.apply(project.object("unit.c", ("10", str(number))))
            assert program.ask("t").count(f"1 1 {i}->{i + 1}") == 2
        assert_untouched(program.pid)
