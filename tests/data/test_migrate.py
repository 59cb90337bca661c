"""Variables whose layout changes: filled by a function of the new source, once, or refused with all as it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from project import MAIN, Project, assert_untouched

import patcher
from patcher.errors import PatcherError, TargetBusy, UnsafeChange
from patcher.report import Variable

OLD = """\
#include <string.h>
struct config { int count; char name[12]; };
static struct config settings = {5, "old"};
int answer(int n)
{
    if (n == 9) return settings.name[0];
    settings.count += n;
    return settings.count;
}
"""
NEW = """\
#include <string.h>
struct config { char name[20]; long count; int extra; };
static struct config settings = {"new", 1, 70000};
struct before { int count; char name[12]; };
void patcher_migrate_settings(void *new_object, const void *old_object)
{
    struct config *to = new_object;
    const struct before *from = old_object;
    to->count = from->count;
    memcpy(to->name, from->name, sizeof from->name);
}
int answer(int n)
{
    if (n == 9) return settings.name[0];
    settings.count += n;
    return (int)settings.count + settings.extra;
}
"""
BY_TYPE = NEW.replace("patcher_migrate_settings", "patcher_migrate_config")
COMPILERS = [(c, o) for c in ("gcc", "clang") for o in ("-O0", "-O2")]


def rewrite(project: Project, text: str, name: str = "unit.c") -> Path:
    (project.sources / name).write_text(text)
    return project.sources / name


@pytest.fixture(params=COMPILERS, ids=lambda p: "".join(p))
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Sequence[str]:
    compiler, level = request.param
    monkeypatch.setattr("project.COMPILE", (compiler, "-g", level))
    return (compiler, level)


@pytest.mark.parametrize("text", [NEW, BY_TYPE], ids=["variable", "type"])
def test_filled_once_and_reverted(tmp_path, compiled, text):
    old = OLD
    if compiled == ("clang", "-O2"):  # takes static structures apart
        old, text = (t.replace("static struct config", "struct config") for t in (old, text))
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": old})
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        assert program.ask(1) == "6"
        done = session.apply(rewrite(project, text))
        by = "patcher_migrate_settings" if "migrate_settings" in text else "patcher_migrate_config"
        source = str(project.sources / "unit.c")
        assert Variable("settings", source, "migrated", f"16 -> 40 bytes, by {by}") in done.variables
        assert not {f.name for f in done.functions} & {by}
        assert program.ask(1) == "70007"
        assert program.ask(9) == str(ord("o"))
        again = session.apply(rewrite(project, text.replace("settings.extra;", "settings.extra + 100000;")))
        assert [v for v in again.variables if v.outcome == "migrated"] == []
        assert program.ask(1) == "170008"
        assert session.revert() == 1
        assert program.ask(1) == "70009"
        session.revert(0)
        assert program.ask(1) == "7", "the old storage, as it was before the first change"
        done = session.apply(rewrite(project, text))
        assert [v.name for v in done.variables if v.outcome == "migrated"] == ["settings"]
        assert program.ask(1) == "70008", "filled again, from the old storage"
        assert_untouched(program.pid)


def test_another_session_knows_what_was_migrated(tmp_path):
    text = NEW
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": OLD})
    rewrite(project, NEW)
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        session.apply(project.sources / "unit.c")
        with patcher.attach(program.pid, watched=[project.sources]) as other:
            without = text.replace("+ settings.extra", "+ 2 * settings.extra")
            start = without.index("struct before")
            other.apply(rewrite(project, without[:start] + without[without.index("int answer") :]))
            assert program.ask(1) == "140006", "without the function, since nothing has to be filled"


HERE = """\
int answer(int n) { settings.count += n; return settings.count; }
"""
OTHER = """\
struct config { int count; char name[12]; };
extern struct config settings;
int answer(int n);
int other(int n) { return settings.count + answer(n); }
int (*keep)(int) = other;
"""


def shared(root: Path, more: str = "") -> Project:
    """A variable that two files use."""
    old = OLD.replace("static struct", "struct")
    return Project(root / "p", {"main.c": MAIN, "unit.c": old, "other.c": OTHER + more})


def test_a_file_that_uses_it_too_has_to_be_saved_as_well(tmp_path):
    project = shared(tmp_path)
    new = rewrite(project, NEW.replace("static struct", "struct"))
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        assert program.ask(1) == "6"
        with pytest.raises(
            UnsafeChange, match="`settings` has another layout now, and `other` of program still"
        ) as caught:
            session.apply(new)
        assert caught.value.code == "still-used"
        assert program.ask(1) == "7"
        layout = "struct config { char name[20]; long count; int extra; };"
        text = OTHER.replace(OTHER.splitlines()[0], layout).replace("settings.count + a", "(int)settings.count + a")
        session.apply(new, rewrite(project, text, "other.c"))
        assert program.ask(1) == "70008"
        session.revert()
        assert program.ask(1) == "8"
        assert_untouched(program.pid)


def test_a_file_whose_code_is_the_same_is_linked_again_with_it(tmp_path):
    last = OTHER.replace("count; char name[12];", "count, unused; char name[12];")
    main = MAIN.replace("int answer(int n);", "int other(int n);").replace("answer(", "other(")
    old = OLD.replace("static struct", "struct").replace("int count;", "int count, unused;").replace("{5,", "{5, 0,")
    project = Project(tmp_path / "p", {"main.c": main, "unit.c": old, "other.c": last})
    grown = "count, unused; char name[99];"
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        program.ask(1)
        function = "void patcher_migrate_config(void *to, const void *from) { memcpy(to, from, 20); }\nint answer"
        text = old.replace("count, unused; char name[12];", grown).replace("int answer", function)
        text = text.replace("settings.name[0]", "settings.name[0] + 1").replace(
            "return settings.count;", "return settings.count + 100;"
        )
        done = session.apply(
            rewrite(project, text), rewrite(project, last.replace("count, unused; char name[12];", grown), "other.c")
        )
        assert {f.name: f.status for f in done.functions} == {"answer": "changed", "other": "relinked"}
        assert program.ask(0) == "112"
        session.revert()
        assert program.ask(0) == "12"


@pytest.mark.parametrize(
    ("holder", "named"),
    [
        ("void *current = &settings;", "`current`, which holds"),
        ("#include <stdlib.h>\nvoid **p; __attribute__((constructor)) void f(void) "
         "{ p = malloc(64); p[1] = settings.name; }", "\\[heap\\]"),
    ],
    ids=["variable", "heap"],
)  # fmt: skip
def test_a_pointer_to_the_old_storage_is_found(tmp_path, holder, named):
    other = OTHER[: OTHER.index("int answer")] + holder
    project = Project(
        tmp_path / "p", {"main.c": MAIN, "unit.c": OLD.replace("static struct", "struct"), "other.c": other}
    )
    new = rewrite(project, NEW.replace("static struct", "struct"))
    layout = "struct config { char name[20]; long count; int extra; };"
    changed = rewrite(project, other.replace(OTHER.splitlines()[0], layout).replace("p[1]", "p[2]"), "other.c")
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        with pytest.raises(UnsafeChange, match=named) as caught:
            session.apply(new, changed)
        assert caught.value.code == "still-used"
        assert program.ask(1) == "6"
        assert_untouched(program.pid)


CRASH = "*(volatile int *)8 = 1;"
HANG = 'for (;;) __asm__ volatile ("");'
LOCK = "pthread_mutex_lock(&lock); pthread_mutex_lock(&lock);"
WRITES = "((struct before *)old_object)->count = 99;"
POINTS = "to->count = (long)from; if (0)"


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (CRASH, "call-crashed"),
        ("abort();", "call-crashed"),
        (HANG, "call-timeout"),
        (LOCK, "call-timeout"),
        (WRITES, "migration"),
        (POINTS, "migration"),
    ],
    ids=["crash", "abort", "hang", "lock", "writes", "points"],
)
def test_a_function_that_fails_changes_nothing(tmp_path, failure, code):
    old = "#include <pthread.h>\n#include <stdlib.h>\npthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;\n" + OLD
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": old}, link_flags=["-pthread"])
    head = "#include <pthread.h>\n#include <stdlib.h>\nextern pthread_mutex_t lock;\n"
    bad = head + NEW.replace("to->count = from->count;", f"{failure} to->count = from->count;")
    with (
        project.running() as program,
        patcher.attach(program.pid, watched=[project.sources], hook_timeout=0.3) as session,
    ):
        assert program.ask(1) == "6"
        for _ in range(2):
            with pytest.raises(UnsafeChange) as caught:
                session.apply(rewrite(project, bad))
            assert caught.value.code == code
            assert program.ask(1) == "7"
            assert_untouched(program.pid)
            rewrite(project, old)
            session.target.check_alive()
            assert session.status().generation == 0
            assert program.ask(-1) == "6"
        session.apply(rewrite(project, head + NEW))
        assert program.ask(1) == "70007"


THREADS = """\
#include <pthread.h>
struct tally { int count; int unused; };
struct tally tally;
pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
long made[4];
void step(int i) { pthread_mutex_lock(&lock); tally.count++; made[i]++; pthread_mutex_unlock(&lock); }
"""
MORE_THREADS = """\
#include <pthread.h>
struct tally { long unused, more; long count; };
struct tally tally;
void patcher_migrate_tally(void *to, const void *from) { ((struct tally *)to)->count = *(const int *)from; }
extern pthread_mutex_t lock;
extern long made[4];
void step(int i) { pthread_mutex_lock(&lock); tally.count++; made[i]++; pthread_mutex_unlock(&lock); }
"""
ASK_THREADS = """\
#include <pthread.h>
%s
extern struct tally tally;
extern pthread_mutex_t lock;
extern long made[4];
void step(int i);
static void *run(void *i) { for (;;) { step((int)(long)i); for (volatile int j = 0; j < 300; j++); } return i; }
__attribute__((constructor)) static void start(void)
{
    pthread_t t;
    for (long i = 0; i < 4; i++) pthread_create(&t, 0, run, (void *)i);
}
int answer(int n)
{
    pthread_mutex_lock(&lock);
    long off = tally.count - made[0] - made[1] - made[2] - made[3];
    pthread_mutex_unlock(&lock);
    return (int)off + n;
}
"""


def test_no_write_of_another_thread_is_lost(tmp_path):
    """Every thread counts in the migrated variable and in one that stays: the two never differ."""
    old, new = (t.splitlines()[1] for t in (THREADS, MORE_THREADS))
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": THREADS, "ask.c": ASK_THREADS % old})
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        assert program.ask(3) == "3"
        session.apply(rewrite(project, MORE_THREADS), rewrite(project, ASK_THREADS % new, "ask.c"))
        assert program.ask(3) == "3"
        more = MORE_THREADS.replace(new, new.replace("long count;", "long most[5]; long count;"))
        more = more.replace("*(const int *)from", "((const long *)from)[2]")
        asking = ASK_THREADS % new.replace("long count;", "long most[5]; long count;")
        done = session.apply(rewrite(project, more), rewrite(project, asking, "ask.c"))
        assert [v.note for v in done.variables] == ["24 -> 64 bytes, by patcher_migrate_tally"]
        assert program.ask(4) == "4"
        assert program.ask(5) == "5"
        assert_untouched(program.pid)


MANY = """\
struct item { short key; char tag; };
static struct item items[300];
struct item one = {7, 'o'};
static struct item pair[2][2] = {{{1, 'a'}, {2, 'b'}}, {{3, 'c'}, {4, 'd'}}};
struct item *at(int i) { return &items[i]; }
int answer(int n)
{
    if (n < 300) return at(n)->key += n;
    if (n == 300) return one.key++;
    return pair[0][0].key++ * 0 + pair[(n - 301) / 2][(n - 301) % 2].tag;
}
"""


@pytest.mark.parametrize("flags", [(), ("-fPIC",), ("-no-pie", "-fno-pie")], ids=" ".join)
def test_arrays_and_every_variable_of_a_type(tmp_path, flags, compiled):
    linking = [f for f in flags if f == "-no-pie"]
    flags = [f for f in flags if f != "-no-pie"]
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": MANY}, compile_flags=flags, link_flags=linking)
    new = MANY.replace("short key; char tag;", "char tag; long key; void *more;")
    function = """\
struct before { short key; char tag; };
void patcher_migrate_item(void *to, const void *from)
{
    ((struct item *)to)->key = ((const struct before *)from)->key + 1000;
    ((struct item *)to)->tag = ((const struct before *)from)->tag;
}
"""
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        assert [program.ask(n) for n in (5, 299, 300, 304)] == ["5", "299", "7", str(ord("d"))]
        done = session.apply(rewrite(project, new.replace("int answer", function + "int answer")))
        assert {v.name: v.outcome for v in done.variables} == dict.fromkeys(("items", "one", "pair"), "migrated")
        assert [program.ask(n) for n in (5, 299, 300, 304)] == ["1010", "1598", "1008", str(ord("d"))]
        session.revert()
        assert [program.ask(n) for n in (5, 299, 300, 304)] == ["10", "598", "8", str(ord("d"))]
        assert_untouched(program.pid)


def test_functions_that_are_the_same_are_linked_again(tmp_path):
    """`first` has the same machine code with either layout, and refers to the variable."""
    old = OLD.replace("int answer", "int *first(void) { return (int *)&settings; }\nint answer")
    old = old.replace("return settings.count;", "return *first() * 0 + settings.count;")
    new = NEW.replace("int answer", "int *first(void) { return (int *)&settings; }\nint answer")
    new = new.replace(
        "return (int)settings.count +", "return (*first() == 'o' + ('l' << 8) + ('d' << 16)) + (int)settings.count +"
    )
    flags = ["-fno-inline", "-fno-ipa-icf"]
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": old}, compile_flags=flags)
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        assert program.ask(1) == "6"
        done = session.apply(rewrite(project, new))
        assert "first" in {f.name for f in done.functions}
        assert program.ask(1) == "70008"
        session.revert()
        assert program.ask(1) == "7"
        session.apply(rewrite(project, new))
        assert program.ask(1) == "70009"


def test_a_loop_in_the_old_code_prevents_it(tmp_path):
    main = MAIN.replace(
        "int answer(int n);", "struct config { int count; char name[12]; }; struct config settings = {5};"
    )
    main = main.replace("answer(atoi(line))", "settings.count += atoi(line)")
    project = Project(tmp_path / "p", {"main.c": main})
    new = main.replace("char name[12]; };", "char name[30]; };").replace("int main(", """
void patcher_migrate_config(void *to, const void *from) { *(int *)to = *(const int *)from; }
int main(""")  # fmt: skip
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        assert program.ask(1) == "6"
        with pytest.raises(TargetBusy, match="a thread stays inside `main`") as caught:
            session.apply(rewrite(project, new, "main.c"))
        assert caught.value.code == "active"
        assert program.ask(1) == "7"
        assert_untouched(program.pid)


def test_a_pointer_on_a_stack_prevents_it(tmp_path):
    main = MAIN.replace("int answer(int n);", "int *get(void); int answer(int n);")
    main = main.replace('puts("ready");', 'int *volatile held = get(); puts("ready");')
    main = main.replace("answer(atoi(line))", "answer(atoi(line)) + *held * 0")
    old = OLD.replace("int answer", "int *get(void) { return &settings.count; }\nint answer")
    new = NEW.replace("int answer", "int *get(void) { return &settings.extra; }\nint answer")
    project = Project(tmp_path / "p", {"main.c": main, "unit.c": old})
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        assert program.ask(1) == "6"
        with pytest.raises(TargetBusy, match="holds the address of `settings`"):
            session.apply(rewrite(project, new))
        assert program.ask(1) == "7"
        assert_untouched(program.pid)


def test_refused_by_name_without_a_function_or_with_two(tmp_path):
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": OLD})
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        other = NEW.replace("patcher_migrate_settings", "patcher_migrate_nothing").replace("long count", "float count")
        with pytest.raises(PatcherError, match=r"settings|config") as caught:
            session.apply(rewrite(project, other))
        assert caught.value.code == "layout"
        session.apply(rewrite(project, NEW))
        assert program.ask(1) == "70006"
        third = NEW.replace("int extra; };", "float extra; int further; };")
        third = third.replace("settings.extra;", "settings.further;")
        start = third.index("struct before")
        with pytest.raises(UnsafeChange, match=r"`settings` of .*unit.c has another layout") as caught:
            session.apply(rewrite(project, third[:start] + third[third.index("int answer") :]))
        assert caught.value.code == "layout"
        assert program.ask(1) == "70007"


def test_without_debug_information_by_the_variable_s_name(tmp_path):
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": OLD}, compile_flags=["-g0"])
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        assert program.ask(1) == "6"
        session.apply(rewrite(project, NEW))
        assert program.ask(1) == "70007"
        session.apply(rewrite(project, NEW.replace("settings.extra;", "2 * settings.extra;")))
        assert program.ask(1) == "140008"
        session.revert(0)
        assert program.ask(1) == "7"
        with pytest.raises(UnsafeChange) as caught:
            session.apply(rewrite(project, BY_TYPE))
        assert caught.value.code == "layout"


@pytest.mark.parametrize("model", ["medium", "large"])
def test_code_of_the_large_models_that_refers_to_it_is_found(tmp_path, monkeypatch, model):
    monkeypatch.setattr("project.COMPILE", ("clang", "-g", "-O1", "-fPIE", f"-mcmodel={model}"))
    old = OLD.replace("static struct", "struct")
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": old, "other.c": OTHER})
    new = rewrite(project, NEW.replace("static struct", "struct"))
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        with pytest.raises(UnsafeChange, match=r"`other`.* still refers"):
            session.apply(new)
        assert program.ask(1) == "6"


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_c_plus_plus_functions_need_no_c_linkage(tmp_path, monkeypatch, compiler):
    monkeypatch.setattr("project.COMPILE", (compiler, "-x", "c++", "-g", "-O1"))
    old, new = (t.replace("static struct config settings", "config settings") for t in (OLD, BY_TYPE))
    new = new.replace("to = new_object", "to = (config *)new_object")
    new = new.replace("from = old_object", "from = (const before *)old_object")
    project = Project(tmp_path / "p", {"main.c": MAIN, "unit.c": old})
    with project.running() as program, patcher.attach(program.pid, watched=[project.sources]) as session:
        assert program.ask(1) == "6"
        for number in (70000, 80000):
            done = session.apply(rewrite(project, new.replace("70000", str(number))))
            assert [v.outcome for v in done.variables] == ["migrated"]
            assert program.ask(1) == str(number + 7)
            session.revert()
            assert program.ask(0) == "6"
