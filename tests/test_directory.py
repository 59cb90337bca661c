"""What a program reads of its own generations through patcher.h: right, whole, and of the same instant as the code."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from project import MAIN, Project, assert_untouched

import patcher
from patcher.cli import header
from patcher.errors import PatcherError
from patcher.patch import transaction
from patcher.patch.reclaim import Policy

HEADER = (Path(header.__file__).parent.parent / "header" / "patcher.h").read_text()
UNIT = """\
volatile int zero;
int answer(int n) { return n + 10 + zero; }
"""
# Answers: the generation, what readers found wrong, and with s the symbols by name, file and size.
READER = """\
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include "patcher.h"
int answer(int n);
int sign(void);
static volatile unsigned long rounds, wrong;
static void *read_on(void *unused)
{
    for (;; rounds++) {
        const struct patcher_table *t = patcher_live();
        if (!t)
            continue;
        for (size_t i = 0; i < t->count; i++)
            wrong += !t->symbols[i].name[0] || strlen(t->symbols[i].file) != 6 || !t->symbols[i].size;
        uint64_t before = patcher_generation();
        int code = sign();
        wrong += before == patcher_generation() && code != (int)before;
    }
    return unused;
}
const char *state(const char *line)
{
    static char text[1000];
    static pthread_t thread;
    size_t count = 0;
    const struct patcher_symbol *s = patcher_symbols(&count);
    if (*line == 'r')
        for (int i = 0; i < 2; i++)
            pthread_create(&thread, NULL, read_on, NULL);
    if (*line == 'w')
        for (unsigned long from = rounds; rounds < from + 1000;)
            ;
    char *end = text + sprintf(text, "%d %lu", (int)patcher_generation(), wrong);
    for (size_t i = 0; *line == 's' && i < count; i++)
        end += sprintf(end, " %s:%s:%d", s[i].name, s[i].file, (int)s[i].size);
    return text;
}
"""
SIGN = "#include <stddef.h>\nvolatile int nothing;\nint sign(void) { return 0 + nothing; }\n"
ASKING = MAIN.replace("int answer(int n);", "int answer(int n); const char *state(const char *);").replace(
    'printf("%d\\n", answer(atoi(line)));', "*line > '9' ? puts(state(line)) : printf(\"%d\\n\", answer(atoi(line)));"
)


def make(root: Path, more: Mapping[str, str] = {}, **options: object) -> Project:
    sources = {"main.c": ASKING, "unit.c": UNIT, "read.c": READER, "sign.c": SIGN, "patcher.h": HEADER} | dict(more)
    return Project(root / "p", sources, **options)


@pytest.mark.parametrize("flags", [("-O0",), ("-O2",), ("-O2", "-fPIC", "-fvisibility=hidden")], ids=" ".join)
def test_a_program_knows_its_generation_and_symbols(tmp_path, flags):
    project = make(tmp_path, compile_flags=flags)
    with project.running() as program, patcher.attach(program.pid) as session:
        assert program.ask("s") == "0 0"
        session.apply(project.object("unit.c", ("10", "20")))
        one = program.ask("s")
        assert one.startswith("1 0 answer:unit.c:")
        calls = "volatile int zero; static int calls; int answer(int n) { return n + zero + 0 * ++calls; }"
        session.apply(project.object("unit.c", (UNIT.strip(), calls)))
        two = program.ask("s").split()
        assert [word.rpartition(":")[0] for word in two[2:]] == ["answer:unit.c", "calls:unit.c"]
        assert two[-1] == "calls:unit.c:4"
        assert session.revert() == 1
        assert program.ask("s") == one
        session.revert(0)
        assert program.ask("s") == "0 0"
        session.revert(2)
        assert program.ask("s").split() == two
        assert_untouched(program.pid)


def test_sizes_and_addresses_are_those_of_the_code_that_runs(tmp_path):
    look = READER.replace(
        '" %s:%s:%d", s[i].name, s[i].file, (int)s[i].size', '" %p %d", (void *)s[i].address, (int)s[i].size'
    )
    project = make(tmp_path, {"read.c": look})
    with project.running() as program, patcher.attach(program.pid) as session:
        for number in ("20", "30"):
            session.apply(project.object("unit.c", ("10", number)))
            (known,) = session.status().functions
            address, size = program.ask("s").split()[2:]
            assert int(address, 16) == known.current
            code = session.target.memory.read(known.current, int(size))
            assert code.endswith(b"\xc3")
            assert bytes([int(number)]) in code


def test_readers_never_see_a_torn_table_or_another_generation_s_code(tmp_path):
    project = make(tmp_path)
    with project.running() as program, patcher.attach(program.pid) as session:
        program.ask("r")
        for number in range(1, 13):
            session.apply(project.object("sign.c", ("0 +", f"{number} +")))
            if number % 5 == 0:
                assert session.revert() == number - 1
                session.revert(number)
            assert program.ask("w") == f"{number} 0"
        session.revert(0)
        assert program.ask("w") == "0 0"
        assert_untouched(program.pid)


def test_a_library_and_a_patch_have_their_own_state(tmp_path):
    library = '#include "patcher.h"\nint library(void) { return (int)patcher_generation(); }\n'
    project = make(
        tmp_path,
        {
            "library.c": library,
            "unit.c": UNIT + "int library(void); int other(void) { return library(); }",
            "read.c": "const char *state(const char *line) { return line; }",
        },
        shared=["library.c"],
    )
    bring = f'#include "patcher.h"\n{UNIT}'.replace("10", "1000 * (int)patcher_generation() + 100 * library()")
    bring += "int library(void); int other(void) { return library(); }"
    (project.sources / "unit.c").write_text(
        bring.replace("volatile int zero;", "volatile int zero; int library(void);")
    )
    with project.running() as program, patcher.attach(program.pid) as session:
        assert program.ask(1) == "11"
        flags = ("-ffunction-sections", "-fdata-sections", f"-I{project.sources}")
        session.apply(project.object("unit.c", flags=flags))
        assert program.ask(1) == "1101"
        session.apply(project.object("unit.c", ("n + ", "n + 5 + "), flags=flags))
        assert program.ask(1) == "2206"
        assert session.revert() == 1
        assert program.ask(1) == "1101"
        session.revert(0)
        assert program.ask(1) == "11"


def test_another_variable_of_that_name_is_left_alone(tmp_path):
    own = "long patcher_state[4] = {1, 2, 3, 4};\n"
    own += 'const char *state(const char *l) { return patcher_state[2] == 3 && patcher_state[3] == 4 ? "same" : l; }'
    project = make(tmp_path, {"read.c": own})
    with project.running() as program, patcher.attach(program.pid) as session:
        session.apply(project.object("unit.c", ("10", "20")))
        assert (program.ask("s"), program.ask(1)) == ("same", "21")


# Keeps what it was told of a generation, and compares it with what it copied of that then.
KEEPING = """\
const char *state(const char *line)
{
    static const struct patcher_symbol *kept;
    static char name[100];
    if (*line == 'k') {
        size_t count;
        kept = patcher_symbols(&count);
        strcpy(name, kept->name);
    }
    if (*line == 'o')
        return kept && !strcmp(name, kept->name) ? kept->file : "lost";
"""
TABLES = READER.replace("wrong += before == patcher_generation() && code != (int)before;", "(void)before, (void)code;")
COUNT = int(os.environ.get("GENERATIONS", "1000")) // 8


@pytest.mark.timeout(3600 if COUNT > 125 else 120)
def test_tables_of_forgotten_generations_are_freed_and_one_that_is_in_use_is_not(tmp_path):
    text = TABLES.replace("const char *state(const char *line)\n{\n", KEEPING)
    project = make(tmp_path, {"read.c": text})
    versions = [project.object("sign.c", ("0 + nothing", f"{i} + nothing")) for i in range(1, 6)]
    with project.running() as program, patcher.attach(program.pid, force=True) as session:
        session.policy = Policy(keep=4, enough=1, poison=True)
        program.ask("r")
        for number in range(1, COUNT + 1):
            session.apply(versions[number % 5])
            if number == 30:
                assert program.ask("k")
            if number == 60:
                assert session.ledger.primary is not None
                before = session.ledger.usages[session.ledger.primary.base].read_only
        assert session.ledger.usages[session.ledger.primary.base].read_only - before < 4 << 10
        assert program.ask("o") == "sign.c"
        assert program.ask("w") == f"{COUNT} 0"
        for number in (*session.status().recorded, COUNT):
            session.revert(number)
            assert program.ask("s").split()[2].startswith("sign:sign.c:"), f"generation {number} has no table"
        for i in range(30):  # to the table of an old generation the way is past those of many that were forgotten
            session.revert(COUNT)
            assert program.ask("s").split()[2].startswith("sign:sign.c:")
            session.apply(versions[1 + i % 3])
        assert_untouched(program.pid)


def test_what_was_shown_and_did_not_become_live_is_not_used_again(tmp_path, monkeypatch):
    """A slot cannot be written, when the program has been led to a table that is in memory that was free."""
    project = make(tmp_path, {"read.c": TABLES})
    versions = [project.object("sign.c", ("0 + nothing", f"{i} + nothing")) for i in range(1, 6)]
    with project.running() as program, patcher.attach(program.pid, force=True) as session:
        session.policy = Policy(keep=2, enough=1, poison=True)
        taken, free = 0, []

        def fail(writes: transaction._Writes) -> None:
            free[:] = session.ledger.journal.free
            writes._change.publish()
            raise OSError(errno.EIO, "no")

        for number in range(1, 25):
            session.apply(versions[number % 5])
            monkeypatch.setattr(transaction._Writes, "write", fail)
            with pytest.raises(PatcherError):
                session.apply(versions[(number + 1) % 5])
            monkeypatch.undo()
            assert session.status().generation == number
            taken += session.ledger.journal.free != free
        assert taken, "it was never led into memory that was free"
        program.ask("r")
        for number in range(25, 50):
            assert session.apply(versions[number % 5]).number == number
            assert program.ask("w") == f"{number} 0"
        assert_untouched(program.pid)
