"""A thread-local's new initial value reaches every thread, those included that are being made just then."""

from __future__ import annotations

from pathlib import Path

from project import Project

import patcher

MAIN = """\
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
int differs(void);
static atomic_long started, wrong;
static atomic_int stop;
static void *look(void *data)
{
    wrong += differs();
    return data;
}
static void *start(void *data)
{
    while (!stop) {
        pthread_t thread;
        started++;
        if (pthread_create(&thread, 0, look, data) == 0)
            pthread_join(thread, 0);
    }
    return 0;
}
int main(void)
{
    pthread_t starters[2];
    char line[80];
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    for (int i = 0; i < 2; i++)
        pthread_create(&starters[i], 0, start, 0);
    while (fgets(line, sizeof line, stdin)) {
        long from = started;
        while (started < from + 20)
            ;
        printf("%ld\\n", (long)wrong);
    }
    stop = 1;
    for (int i = 0; i < 2; i++)
        pthread_join(starters[i], 0);
    return 0;
}
"""
UNIT = """\
static int marker = 4;
static __thread int value = 4;
int differs(void)
{
    int one = *(volatile int *)&marker, two = *(volatile int *)&value;
    marker += one < 0;
    value += one < 0;
    return one == 5 && two != 5;
}
"""
PAD = (
    "__thread char pad[1 << 20] = {1};\nchar *behind(void) { return pad; }\n"  # copied after the value: takes its time
)
ROUNDS = 8


def test_threads_that_are_made_meanwhile_do_not_get_the_old_value(tmp_path: Path) -> None:
    project = Project(tmp_path, {"main.c": MAIN, "unit.c": UNIT, "zpad.c": PAD})
    with project.running() as program:
        assert program.ask("") == "0"
        for _ in range(ROUNDS):
            for old, new in ((4, 5), (5, 4)):
                project.edit("unit.c", f"value = {old}", f"value = {new}")
                source = project.edit("unit.c", f"marker = {old}", f"marker = {new}")
                with patcher.attach(program.pid, reinit=("value", "marker")) as session:
                    session.apply(source)
            assert program.ask("") == "0"
