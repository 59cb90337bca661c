/* Counts real-time signals by their value; "report" says how many came once, and how many otherwise. */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

#define VALUES 4096
static volatile int seen[VALUES];
static volatile long total;
static volatile int interrupted;

static void on_signal(int number, siginfo_t *info, void *context)
{
    (void)number; (void)context;
    if (info->si_code == SI_QUEUE && info->si_value.sival_int < VALUES)
        __atomic_fetch_add(&seen[info->si_value.sival_int], 1, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&total, 1, __ATOMIC_SEQ_CST);
}

static void *spin(void *unused)
{
    (void)unused;
    for (;;) {}
    return 0;
}

int main(int argc, char **argv)
{
    (void)argv;
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
    char line[64];
    pthread_t thread;
    sigaction(SIGRTMIN, &action, 0);
    if (argc > 1)
        pthread_create(&thread, 0, spin, 0);
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        int once = 0, otherwise = 0;
        for (int i = 0; i < VALUES; i++) {
            once += seen[i] == 1;
            otherwise += seen[i] > 1;
        }
        printf("%d %d %ld\n", once, otherwise, total);
        fflush(stdout);
    }
    return 0;
}
