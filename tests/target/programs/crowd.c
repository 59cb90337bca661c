/* ARGV[1] threads that come and go (each starts its successor), and a main thread on stdin. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static atomic_long born;
static atomic_int ending, living;
static int churning;

static void *life(void *unused)
{
    (void)unused;
    atomic_fetch_add(&born, 1);
    if (!churning)
        while (!ending)
            for (volatile int i = 0; i < 1000; i++) {}
    for (volatile int i = 0; i < 20000; i++) {}
    pthread_t next;
    if (!ending && pthread_create(&next, 0, life, 0) == 0)
        pthread_detach(next);
    else
        atomic_fetch_sub(&living, 1);
    return 0;
}

int main(int argc, char **argv)
{
    char line[64];
    int count = atoi(argv[1]);
    churning = argc > 2;
    for (int i = 0; i < count; i++) {
        pthread_t thread;
        atomic_fetch_add(&living, 1);
        pthread_create(&thread, 0, life, 0);
        pthread_detach(thread);
    }
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        printf("%ld\n", born);
        fflush(stdout);
        if (!strcmp(line, "end\n"))
            break;
    }
    ending = 1;
    while (living) {}
    return 7;
}
