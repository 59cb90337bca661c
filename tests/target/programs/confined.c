/* Runs under a seccomp filter: ARGV[1...] are NUMBER:ACTION (hexadecimal), the system calls that are not just allowed;
   "nap" sleeps a second in one call meanwhile. Echoes its lines; "thread" makes a thread without a filter first. */
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

static void *idle(void *unused)
{
    pause();
    return unused;
}

int main(int count, char **words)
{
    struct sock_filter filter[100];
    int length = 0, nap = 0;
    char line[64];
    pthread_t thread;
    filter[length++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (int i = 1; i < count; i++) {
        unsigned number, action;
        if (!strcmp(words[i], "thread"))
            pthread_create(&thread, 0, idle, 0);
        else if (!strcmp(words[i], "nap"))
            nap = 1;
        else if (sscanf(words[i], "%x:%x", &number, &action) == 2) {
            filter[length++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1);
            filter[length++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, action);
        }
    }
    filter[length++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog program = {length, filter};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
        return 99;
    puts("ready");
    fflush(stdout);
    if (nap) {
        struct timespec second = {1, 0};
        printf("%d\n", nanosleep(&second, 0));
        fflush(stdout);
    }
    while (fgets(line, sizeof line, stdin)) {
        fputs(line, stdout);
        fflush(stdout);
    }
    return 3;
}
