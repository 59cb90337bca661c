/* Calls `answer` in some threads all the time, and does what a line tells it:
 *   N                 answer(N)
 *   wrong             how many calls of the threads gave what no version gives (every version gives 5 more or 105 more)
 *   exit, crash, exec ends in one of these ways; after "exec" it is cat(1)
 *   fork              makes a child that goes on as it does, with its lines from the pipe ARGV[2], and says its pid
 *   vfork             makes a child by vfork that waits for a byte on descriptor ARGV[1], and is suspended meanwhile
 *   confine N:ACTION  installs a seccomp filter with that action for system call N
 * Options: "churn" threads that come and go, "spawn" a thread that runs programs all the time, "blocked" all signals
 * are blocked, "nobody" another user, "undumpable".
 */
#define _GNU_SOURCE
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

int answer(int n);
extern char **environ;
static volatile long calls, wrong, born, spawned;

static void check(void)
{
    int found = answer(5);
    if (found != 10 && found != 110)
        __atomic_add_fetch(&wrong, 1, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
}

static void *keep_calling(void *unused)
{
    for (;;)
        check();
    return unused;
}

static void *live_shortly(void *unused)
{
    for (int i = 0; i < 100; i++)
        check();
    born++;
    return unused;
}

static void *churn(void *unused)
{
    for (;;) {
        pthread_t threads[4];
        for (int i = 0; i < 4; i++)
            pthread_create(&threads[i], NULL, live_shortly, NULL);
        for (int i = 0; i < 4; i++)
            pthread_join(threads[i], NULL);
        usleep(5000);
    }
    return unused;
}

static void *spawn(void *unused)
{
    char *words[] = {"true", NULL};
    for (;;) {
        pid_t pid;
        if (posix_spawnp(&pid, "true", NULL, NULL, words, environ) == 0)
            waitpid(pid, NULL, 0);
        spawned++;
        usleep(2000);
    }
    return unused;
}

static int confine(unsigned number, unsigned action)
{
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, action),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

static void start(void *(*run)(void *))
{
    pthread_t thread;
    pthread_create(&thread, NULL, run, NULL);
}

int main(int count, char **words)
{
    char line[80], byte;
    sigset_t all;
    setvbuf(stdout, NULL, _IOLBF, 0);
    sigfillset(&all);
    for (int i = 1; i < count; i++) {
        if (!strcmp(words[i], "blocked"))
            sigprocmask(SIG_SETMASK, &all, NULL);
        if (!strcmp(words[i], "nobody") && (setgid(65534) || setuid(65534)))
            return 98;
        if (!strcmp(words[i], "undumpable"))
            prctl(PR_SET_DUMPABLE, 0);
    }
    for (int i = 1; i < count; i++) {
        if (!strcmp(words[i], "threads"))
            start(keep_calling);
        if (!strcmp(words[i], "churn"))
            start(churn);
        if (!strcmp(words[i], "spawn"))
            start(spawn);
    }
    puts("ready");
    while (fgets(line, sizeof line, stdin)) {
        unsigned number, action;
        line[strcspn(line, "\n")] = 0;
        if (!strcmp(line, "wrong"))
            printf("%ld %ld %ld %ld\n", wrong, calls, born, spawned);
        else if (sscanf(line, "confine %u:%x", &number, &action) == 2)
            printf("%d\n", confine(number, action));
        else if (!strcmp(line, "exit"))
            return 7;
        else if (!strcmp(line, "crash"))
            *(volatile int *)8 = 1;
        else if (!strcmp(line, "exec")) {
            puts("executing");
            execlp("cat", "cat", NULL);
        } else if (!strcmp(line, "fork")) {
            pid_t pid = fork();
            if (pid)
                printf("%d\n", pid);
            else
                for (dup2(atoi(words[1]), 0); read(0, &byte, 1) == 1;)
                    printf("%d\n", answer(byte - '0'));
            if (!pid)
                _exit(0);
        } else if (!strcmp(line, "vfork")) {
            puts("waiting");
            if (vfork() == 0) {
                while (read(atoi(words[1]), &byte, 1) < 0) {}
                _exit(0);
            }
            puts("back");
        } else
            printf("%d\n", answer(atoi(line)));
    }
    return 3;
}
