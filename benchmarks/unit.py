"""The program that is measured: a C unit of about 1,000 lines, and a main program with four threads that asks it.

The unit is the same in every run. It has what ordinary C has: structures, static tables, strings, a hash table, switch
statements that become jump tables, loops, static functions that are inlined and ones that are not.
"""

from __future__ import annotations

import random

ANSWERS = 60
THREADS = 4

_HEAD = """\
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "unit.h"

struct item {
    char name[24];
    unsigned key;
    long amount;
    double weight;
    struct item *next;
};

struct account {
    long balance;
    unsigned changes;
    short grade;
    struct item *items;
};

static struct item *buckets[64];
static struct account accounts[16];
static unsigned long total_changes;

static unsigned hash(const char *text)
{
    unsigned value = 2166136261u;

    while (*text != '\\0')
        value = (value ^ (unsigned char)*text++) * 16777619u;
    return value;
}

static long clamp(long value, long low, long high)
{
    if (value < low)
        return low;
    return value > high ? high : value;
}
"""

_KINDS = (
    """
static const char *const words_{n}[] = {{"{a}", "{b}", "{c}", "{d}"}};

long answer_{n}(long x)
{{
    const char *word = words_{n}[(unsigned long)x % 4];
    unsigned key = hash(word) % 64;
    long sum = 0;

    for (struct item *item = buckets[key]; item != NULL; item = item->next) {{
        if (strcmp(item->name, word) == 0)
            sum += item->amount;
        else if (item->weight > {small}.5)
            sum -= (long)(item->weight * {small});
    }}
    return sum + (long)strlen(word) + x + 1000 * {edit};
}}
""",
    """
static long step_{n}(struct account *account, long by)
{{
    account->balance = clamp(account->balance + by, -{large}, {large});
    account->changes++;
    total_changes++;
    return account->balance;
}}

long answer_{n}(long x)
{{
    struct account *account = &accounts[(unsigned long)x % 16];
    long before = account->balance;
    long after = step_{n}(account, x * {small});

    step_{n}(account, before - after);
    return after - before + 1000 * {edit};
}}
""",
    """
long answer_{n}(long x)
{{
    switch ((unsigned long)x % 6) {{
    case 0:
        return x + {small} + 1000 * {edit};
    case 1:
        return (x ^ {large}) + 1000 * {edit};
    case 2:
        return clamp(x, -{small}, {small}) + 1000 * {edit};
    case 3:
        return (long)(hash("{a}") % 97) + 1000 * {edit};
    case 4:
        return x * x - {small} + 1000 * {edit};
    default:
        return -x + 1000 * {edit};
    }}
}}
""",
    """
long answer_{n}(long x)
{{
    static unsigned calls;
    char text[64];
    double mean = calls++ * 0.0;

    for (int i = 1; i <= {small}; i++)
        mean += ((double)x + {small}.25 * i) / {small};
    snprintf(text, sizeof text, "{a} %ld {b} %.1f", x, mean);
    if (strchr(text, '{letter}') == NULL)
        return (long)strlen(text) + 1000 * {edit};
    return (long)hash(text) % 97 + 1000 * {edit};
}}
""",
)

_TAIL = """
void unit_start(void)
{
    static const char *const names[] = {"pine", "oak", "elm", "ash", "fir", "yew"};

    for (unsigned i = 0; i < sizeof names / sizeof names[0]; i++) {
        struct item *item = calloc(1, sizeof *item);

        if (item == NULL)
            abort();
        snprintf(item->name, sizeof item->name, "%s", names[i]);
        item->key = hash(names[i]);
        item->amount = (long)i * 7;
        item->weight = i * 1.5;
        item->next = buckets[item->key % 64];
        buckets[item->key % 64] = item;
    }
}
"""

_WORDS = ("pine", "oak", "elm", "ash", "fir", "yew", "beech", "maple", "birch", "larch", "holly", "rowan")

MAIN = f"""\
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "unit.h"

static void *work(void *argument)
{{
    const struct timespec pause = {{0, 1000 * 1000}};
    unsigned turn = (unsigned)(unsigned long)argument;

    for (;;) {{
        answers[turn++ % {ANSWERS}](3);
        nanosleep(&pause, NULL);
    }}
    return NULL;
}}

int main(void)
{{
    char line[64];

    unit_start();
    for (unsigned long i = 1; i < {THREADS}; i++) {{
        pthread_t thread;

        if (pthread_create(&thread, NULL, work, (void *)(i * 7)) != 0)
            abort();
    }}
    while (fgets(line, sizeof line, stdin) != NULL) {{
        printf("%ld\\n", answers[atoi(line) % {ANSWERS}](2));
        fflush(stdout);
    }}
    return 0;
}}
"""

MAKEFILE = """\
prog: main.o unit.o table.o
\t$(CC) -pthread -o $@ main.o unit.o table.o
%.o: %.c unit.h
\t$(CC) $(CFLAGS) -pthread -c -o $@ $<
"""


def header() -> str:
    """Return unit.h."""
    functions = "\n".join(f"long answer_{n}(long x);" for n in range(ANSWERS))
    return f"void unit_start(void);\nextern long (*const answers[{ANSWERS}])(long);\n{functions}\n"


def table() -> str:
    """Return table.c, through which main asks for an answer by its number."""
    functions = ", ".join(f"answer_{n}" for n in range(ANSWERS))
    return f'#include "unit.h"\n\nlong (*const answers[{ANSWERS}])(long) = {{{functions}}};\n'


def unit(edits: dict[int, int]) -> str:
    """Return unit.c; the answer of function n is 1,000 higher for each 1 that `edits` gives to n."""
    chance = random.Random(4711)
    functions = []
    for n in range(ANSWERS):
        a, b, c, d = chance.sample(_WORDS, 4)
        values = {"a": a, "b": b, "c": c, "d": d, "small": chance.randint(3, 9), "large": chance.randint(1000, 9000)}
        functions.append(_KINDS[n % 4].format(n=n, edit=edits.get(n, 0), letter=a[0], **values))
    return _HEAD + "".join(functions) + _TAIL
