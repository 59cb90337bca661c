/* Shows what it was started with; then waits for signals or a line and says which came. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/personality.h>
#include <unistd.h>

static void on_signal(int number)
{
    char text[32];
    int length = snprintf(text, sizeof text, "signal %d\n", number);
    if (write(1, text, length) < 0) _exit(99);
}

int main(int argc, char **argv)
{
    char line[64];
    sigset_t blocked;
    struct sigaction action;
    setvbuf(stdout, 0, _IOLBF, 0);
    if (argc > 1 && !strcmp(argv[1], "exit")) return atoi(argv[2]);
    if (argc > 1 && !strcmp(argv[1], "die")) { raise(atoi(argv[2])); return 1; }
    if (argc > 1 && !strcmp(argv[1], "show")) {
        printf("personality %d\n", (personality(0xffffffff) & ADDR_NO_RANDOMIZE) != 0);
        sigprocmask(SIG_BLOCK, 0, &blocked);
        for (int i = 1; i < 32; i++) {
            if (sigismember(&blocked, i)) printf("blocked %d\n", i);
            if (sigaction(i, 0, &action) == 0 && action.sa_handler == SIG_IGN) printf("ignored %d\n", i);
        }
        for (int i = 0; i < 32; i++)
            if (fcntl(i, F_GETFD) >= 0) printf("descriptor %d\n", i);
        for (int i = 0; i < argc; i++) printf("argument %s\n", argv[i]);
        printf("group %d\n", getpgrp() == getpgid(getppid()));
        printf("environment %s\n", getenv("MARK") ? getenv("MARK") : "-");
        return 0;
    }
    for (int i = 1; i < 32; i++)
        if (i != SIGTSTP && i != SIGCONT && i != SIGCHLD) {
            memset(&action, 0, sizeof action);
            action.sa_handler = on_signal;
            action.sa_flags = SA_RESTART;
            sigaction(i, &action, 0);
        }
    puts("ready");
    while (fgets(line, sizeof line, stdin)) printf("got %s", line);
    return 3;
}
