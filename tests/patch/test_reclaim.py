"""Generations without end in a real process: old ones forgotten, their memory used again, and none of it too early."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from project import COMPILE, SECTIONS, Project, Running, assert_untouched
from project import MAIN as ANSWERING

import patcher
from patcher.errors import UnsafeChange
from patcher.patch import reclaim as reclaiming
from patcher.patch.journal import FORMER, GenerationRecord
from patcher.patch.reclaim import Policy, folded

COUNT = int(os.environ.get("GENERATIONS", "1000"))
VERSIONS = 7
THREADS = 4

# Threads that call all the time; and a thread, a coroutine and a pointer that stay with what they had when they came.
MAIN = """\
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>
int value(int n);
int both(int n);
const char *label(void);
int waiting(int fd);
int holding(void);

static volatile long wrong, calls;
static void *call(void *unused)
{
    for (long i = 1;; i++) {
        if (i % 256 == 0)
            usleep(100);
        int n = value(3);
        if (n % 1000 || n < 1000 || n > 7000 || both(5) != 12)
            wrong++;
        __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
    }
    return unused;
}

static ucontext_t here, there;
static char *stack;
static volatile int held;
void park(void) { swapcontext(&there, &here); }
static void coroutine(void) { held = holding(); }

static int ends[2];
static volatile int waited;
static void *wait_inside(void *unused) { waited = waiting(ends[0]); return unused; }

int main(int argc, char **argv)
{
    char line[80];
    const char *kept = "";
    pthread_t thread, waiter;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (pipe(ends))
        return 1;
    for (int i = 0; i < atoi(argv[argc - 1]); i++)
        pthread_create(&thread, NULL, call, NULL);
    puts("ready");
    while (fgets(line, sizeof line, stdin)) {
        switch (*line) {
        case 'v': printf("%d\\n", value(3)); break;
        case 'w': printf("%ld\\n", wrong); break;
        case 'c': { long before = calls; while (calls < before + 1000) usleep(100); puts("1000 more"); break; }
        case 'h': {
            getcontext(&there);
            stack = malloc(65536);
            there.uc_stack.ss_sp = stack;
            there.uc_stack.ss_size = 65536;
            there.uc_link = &here;
            makecontext(&there, coroutine, 0);
            swapcontext(&here, &there);
            puts("held");
            break;
        }
        case 'r': swapcontext(&here, &there); printf("%d\\n", held); break;
        case 't': pthread_create(&waiter, NULL, wait_inside, NULL); puts("waits"); break;
        case 'e': write(ends[1], "x", 1); pthread_join(waiter, NULL); printf("%d\\n", waited); break;
        case 'k': kept = label(); puts("kept"); break;
        case 'p': puts(kept); break;
        case 'l': puts(label()); break;
        }
    }
    return 0;
}
"""
UNIT = """\
#include <unistd.h>
void park(void);
static volatile int version = 1000;
static int (*volatile function)(int);
int value(int n)
{
    switch (n) { /* a jump table */
    case 0: return version;
    case 1: return 1 + version;
    case 2: return 5 * version;
    case 3: return 1000;
    case 4: return 7 * version + 1;
    case 5: return version * version;
    }
    return -1;
}
static int twelve(int n) { return n + 7; }
int both(int n) { function = twelve; return function(n); }
const char *label(void) { return "label 1000"; }
int waiting(int fd)
{
    char byte;
    while (read(fd, &byte, 1) != 1)
        ;
    return 1000;
}
int holding(void) { park(); return 1000; }
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    sources = {"main.c": MAIN, "unit.c": UNIT}
    return Project(tmp_path_factory.mktemp("project") / "p", sources, compile_flags=("-fno-inline",))


def version(project: Project, name: str, text: str) -> Path:
    """Compile a version of the unit, to which a constant is new that stays the same in all of them."""
    text = text.replace("static int twelve", "const int table[3] = {3, 4, 5};\nstatic int twelve")
    text = text.replace("return n + 7", "return n + 2 + table[n % 3]")
    copy = project.root / f"version{name}"
    (copy / "src").mkdir(parents=True)
    (copy / "src" / "unit.c").write_text(text)
    flags = (*COMPILE, *SECTIONS, "-fno-inline", f"-ffile-prefix-map={copy}={project.root}")
    subprocess.run([*flags, "-c", "src/unit.c", "-o", "unit.o"], cwd=copy, check=True)
    return copy / "unit.o"


@pytest.fixture(scope="module")
def objects(project: Project) -> list[Path]:
    """Versions of the unit, which answer 1000, 2000 and so on; every function is another one in each."""
    found = []
    for number in range(1, VERSIONS + 1):
        steps = "version += 0;" * number
        text = UNIT.replace("return 1000", f"return {number}000").replace("label 1000", f"label {number}000")
        for start in ("holding(void) {", "both(int n) {", "char byte;"):
            text = text.replace(start, start + " " + steps)
        found.append(version(project, str(number), text))
    return found


@pytest.fixture(scope="module")
def mixed(project: Project) -> dict[tuple[str, str], Path]:
    """Versions in which some of the functions are the same, by what two of them answer."""
    found = {}
    for value in ("1000", "2000", "3000"):
        for label in ("1000", "2000", "3000"):
            text = UNIT.replace("3: return 1000", f"3: return {value}").replace("label 1000", f"label {label}")
            found[value, label] = version(project, f"{value}-{label}", text)
    return found


def answer(program: Running) -> int:
    return int(program.ask("v")) // 1000


def version_of(generation: int) -> int:
    return (generation - 1) % VERSIONS + 1 if generation else 1


def memory_of(pid: int) -> tuple[int, list[str]]:
    """Return the bytes of a process's own memory that are there, and what is mapped, heaps of threads left out."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
    mapped = [line.split()[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/" in line]
    return resident * 1024, mapped


@pytest.mark.timeout(4 * 3600 if COUNT > 1000 else 240)
def test_generations_without_end(project, objects):
    """Whoever is still in old code, or has an address in it, finds it as it was; all else of it is used again."""
    others = records_in_memory()
    with project.running(str(THREADS)) as program, patcher.attach(program.pid, force=True) as session:
        session.policy = Policy(keep=6, enough=4 << 10, poison=True)
        kept = {}
        for number in range(1, COUNT + 1):
            assert session.apply(objects[version_of(number) - 1]).number == number
            assert answer(program) == version_of(number)
            if number in (20, 22, 24):
                assert program.ask({20: "h", 22: "t", 24: "k"}[number])
                kept[number] = f"{version_of(number)}000"
            if number == 100:
                resident, mapped = memory_of(program.pid)
                code, constants = session.ledger.usages[session.ledger.primary.base].code, session.status().arenas[0]
            if number % 197 == 0:
                check_every_recorded(session, program, number)
        status = session.status()
        program.ask("c")
        assert program.ask("w") == "0", "threads got wrong answers"
        # What the thread, the coroutine and the pointer had is still there, 970 generations later.
        assert [program.ask("r"), program.ask("e"), program.ask("p")] == [kept[20], kept[22], f"label {kept[24]}"]
        usage = session.ledger.usages[session.ledger.primary.base]
        assert (len(status.arenas), len(status.recorded) <= 13) == (1, True)
        assert usage.code - code < 16 << 10
        assert status.arenas[0].used < constants.used + (16 << 10)
        assert sum(o.text + o.read_only + o.data + o.cells + o.islands for o in status.objects) == status.arenas[0].used
        start, _ = session.ledger.primary.journal_part(usage.journal)
        assert usage.journal - start < 64 << 10
        later, still = memory_of(program.pid)
        assert still == mapped
        assert later - resident < 256 << 10
        assert len(session.ledger.journal.free) < 32, "free memory is in small pieces"
        assert records_in_memory() - others < 4 * len(status.recorded) + 16, "records of what is gone are kept"
        assert_untouched(program.pid)


def records_in_memory() -> int:
    gc.collect()
    return sum(isinstance(found, GenerationRecord) for found in gc.get_objects())


def check_every_recorded(session: patcher.Session, program: Running, live: int) -> None:
    for number in (*session.status().recorded, 0, live):
        session.revert(number)
        assert answer(program) == version_of(number)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_history(project, mixed, seed):
    """Every generation on record is what it was, whatever was applied and taken back before and after it."""
    random = Random(seed)
    answers = {0: ("1000", "1000")}
    with project.running("2") as program, patcher.attach(program.pid, force=True) as session:
        session.policy = Policy(keep=3, enough=1, poison=True)
        for _ in range(120):
            if random.random() < 0.3:
                session.revert(random.choice((0, *session.status().recorded)))
            wanted = random.choice(list(mixed))
            number = session.apply(mixed[wanted]).number
            assert answers.setdefault(number, wanted) == wanted
            assert (program.ask("v"), program.ask("l")) == (wanted[0], f"label {wanted[1]}")
            if random.random() < 0.1:
                for each in (*session.status().recorded, number):
                    session.revert(each)
                    assert (program.ask("v"), program.ask("l")) == (answers[each][0], f"label {answers[each][1]}")
        assert program.ask("w") == "0"
        assert len(session.status().recorded) < 20
        assert session.ledger.journal.free, "nothing was freed"


def test_constants_stay_with_the_code_that_uses_them(project, mixed):
    """What a forgotten generation brought is there as long as something of it runs."""
    with project.running("1") as program, patcher.attach(program.pid, force=True) as session:
        session.policy = Policy(keep=2, enough=1, poison=True)
        session.apply(mixed["1000", "2000"])
        session.apply(mixed["1000", "3000"])
        for _ in range(10):
            for value in ("2000", "1000"):
                # Were the string another one by now, the function that returns it would be replaced.
                assert [f.name for f in session.apply(mixed[value, "3000"]).functions] == ["value"]
                assert program.ask("v") == value
        assert program.ask("l") == "label 3000"  # asked only now, lest an address of it is left on a stack
        assert session.status().recorded[0] > 2
        assert session.ledger.journal.free, "nothing was freed"
        assert program.ask("w") == "0"


def test_the_last_ones_stay(project, objects):
    with project.running("0") as program:
        with patcher.attach(program.pid, force=True, keep=4) as session:
            for number in range(1, 10):
                session.apply(objects[version_of(number) - 1])
            assert session.status().recorded == tuple(range(1, 10))
            session.apply(objects[version_of(10) - 1])
            assert session.status().recorded == (6, 7, 8, 9, 10)
            with pytest.raises(UnsafeChange, match="generation 5 is not recorded"):
                session.revert(5)
            assert session.revert(6) == 6
            with pytest.raises(UnsafeChange, match="generation 5 is not recorded"):
                session.revert()
            assert answer(program) == version_of(6)
        with patcher.attach(program.pid, force=True) as session:
            assert session.status().generation == 6
            session.revert(0)
            assert answer(program) == 1
            session.revert(10)
            assert answer(program) == version_of(10)


def test_where_branches_part_and_what_is_live_stay(project, objects):
    with project.running("0") as program, patcher.attach(program.pid, force=True, keep=3) as session:
        for number in range(1, 4):
            session.apply(objects[version_of(number) - 1])
        session.revert(1)
        for number in range(4, 7):
            session.apply(objects[version_of(number) - 1])
        session.revert(3)  # 1 leads to 3, by way of 2, and to 6, by way of 4 and 5
        session.apply(objects[version_of(7) - 1])
        session.revert(3)
        session.apply(objects[version_of(8) - 1])
        # Forgotten are 2 and 4: 3 was live when that was decided, and 1 is where what leads to 3 and to 5 parts.
        assert session.status().recorded == (1, 3, 5, 6, 7, 8)
        for number in (1, 3, 5, 6, 7, 8, 0, 6, 3):
            session.revert(number)
            assert answer(program) == version_of(number)


def test_killed_at_any_write_of_the_journal(project, objects):
    script = Path(__file__).with_name("forgetter.py")
    moment, ends = 1, []
    while not ends or ends[-1] < 0:
        with project.running("1") as program:
            with patcher.attach(program.pid, force=True) as session:
                for number in range(1, 7):
                    session.apply(objects[version_of(number) - 1])
            done = subprocess.run([sys.executable, script, str(program.pid), str(moment)], capture_output=True)
            assert done.returncode in (0, -signal.SIGKILL), done.stderr
            ends.append(done.returncode)
            with patcher.attach(program.pid, force=True) as session:
                recorded = session.status().recorded
                assert recorded in ((1, 2, 3, 4, 5, 6), (5, 6))
                check_every_recorded(session, program, 6)
                for number in (7, 8, 9):
                    assert session.apply(objects[version_of(number) - 1]).number == number
                    assert answer(program) == version_of(number)
                check_every_recorded(session, program, 9)
            assert program.ask("w") == "0"
        moment += 1
    assert moment > 4, "it was never killed between the journal's two writes"


BULKY = "static const char bulk[1 << 20] = {[9] = VERSION};\nint answer(int n) { return n + bulk[n % 1000]; }\n"
MEMORY = 48 << 20


def test_a_process_with_much_memory_has_so_many_arenas_and_no_more(tmp_path, monkeypatch):
    """It stands still for a look only when there is so much to free, which is more than one arena holds."""
    held = f"char *held = malloc({MEMORY});\n    memset(held, 1, {MEMORY});\n    setvbuf"
    main = ANSWERING.replace("setvbuf", held, 1).replace(
        "#include <stdlib.h>", "#include <stdlib.h>\n#include <string.h>"
    )
    project = Project(tmp_path / "p", {"main.c": main, "unit.c": BULKY.replace("VERSION", "1")})
    versions = [project.object("unit.c", ("[9] = 1", f"[9] = {i}")) for i in range(2, 6)]
    monkeypatch.setattr(reclaiming, "_LOOKED_AT", 2)
    looks = []
    reached = reclaiming.reached
    monkeypatch.setattr(reclaiming, "reached", lambda *words: (looks.append(1), reached(*words))[1])
    with project.running() as program, patcher.attach(program.pid, force=True) as session:
        session.policy = Policy(keep=2, enough=1, most=1, poison=True)
        arenas = []
        for number in range(56):
            session.apply(versions[number % 4])
            assert program.ask(9) == str(9 + 2 + number % 4)
            arenas.append(len(session.status().arenas))
        assert 1 < arenas[30] <= 3, "it takes more than one arena until there is so much to free"
        assert arenas[-1] == arenas[30]
        assert 1 < len(looks) < 8
        assert_untouched(program.pid)


def test_forgotten_code_is_known_as_such(project, objects):
    with project.running("0") as program, patcher.attach(program.pid, force=True) as session:
        for number in range(1, 9):
            session.apply(objects[version_of(number) - 1])
        journal = folded(session.ledger.journal, 2, 8)
        bodies = {body for _, _, body in journal.generations[7].bodies}
        code = [p for p in journal.placed if p.kind == "code" and p.name == "value"]
        assert [p.address in bodies for p in code] == [True, False]  # of 7, and of 8
        assert sum(p.kind == FORMER and p.name == "value" for p in journal.placed) == 5  # 1 has the original
        assert journal.generations[7].merged == ((1, 6),)
        assert 6 in journal.numbers_to(8)
        assert 9 not in journal.numbers_to(8)


MANY = 520  # more slots than there are on a page
TABLE = "int (*const table[])(int) = {" + ", ".join(f"f{i}" for i in range(MANY)) + "};\n"
KEEPING = """\
#include <stdio.h>
extern int (*const table[])(int);
unsigned long kept;
int main(void)
{
    char line[9];
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("%lx\\n", (unsigned long)&kept);
    while (fgets(line, sizeof line, stdin))
        printf("%d\\n", table[0](1));
    return 0;
}
"""


def many(first: int, others: int) -> str:
    functions = [
        f"int f{i}(int n)\n{{\n    total++;\n    return n + {others if i else first};\n}}\n" for i in range(MANY)
    ]
    return "static volatile int total;\n" + "".join(functions) + TABLE


@pytest.mark.timeout(240)  # 520 functions eight times
def test_who_comes_back_to_a_switch_finds_what_it_leads_to(tmp_path):
    """A thread that a signal met in a switch goes on there long after; what it has is that address alone."""
    project = Project(tmp_path / "p", {"main.c": KEEPING, "many.c": many(9, 9)})
    wholes = [project.object("many.c", (many(9, 9), many(i, i))) for i in (1, 2)]
    firsts = [project.object("many.c", (many(9, 9), many(i, 2))) for i in (3, 4)]
    with project.running() as program, patcher.attach(program.pid, force=True) as session:
        session.policy = Policy(keep=1, enough=1, poison=True)
        kept, memory = int(program.greeting, 16), session.target.memory
        for whole in wholes:
            session.apply(whole)
        ledger = session.ledger
        assert ledger.primary is not None
        body = {index: body for _, index, body in ledger.journal.generations[1].bodies}[9]
        place = ledger.primary.switch(9) + 20
        memory.write(kept, place.to_bytes(8, "little"))
        for i in range(3):
            session.apply(firsts[i % 2])
        assert 2 not in session.status().recorded
        assert memory.read(body, 1) != b"\xcc"
        memory.write(kept, bytes(8))
        for i in range(3):
            session.apply(firsts[i % 2])
            assert program.ask("") == str((4, 5)[i % 2])
        assert memory.read(body, 1) == b"\xcc"
