/* One thread in each kind of blocking call; "report" names the calls that came back early. */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static int pipe_ends[2], epoll, listener, pair[2], semaphores;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
static atomic_int started;

static int in_epoll(void) { struct epoll_event e; return epoll_wait(epoll, &e, 1, -1); }
static int in_poll(void) { struct pollfd p = {pipe_ends[0], POLLIN, 0}; return poll(&p, 1, 600000); }
static int in_read(void) { char c; return read(pipe_ends[0], &c, 1); }
static int in_nanosleep(void) { struct timespec t = {600, 0}; return nanosleep(&t, 0); }
static int in_futex(void) { pthread_mutex_lock(&mutex); int r = pthread_cond_wait(&condition, &mutex); pthread_mutex_unlock(&mutex); return r; }
static int in_accept(void) { return accept(listener, 0, 0); }
static int in_sigtimedwait(void) { sigset_t s; struct timespec t = {600, 0}; sigemptyset(&s); sigaddset(&s, SIGUSR2); return sigtimedwait(&s, 0, &t); }
static int in_recv(void) { char c; return recv(pair[0], &c, 1, 0); }
static int in_semop(void) { struct sembuf b = {0, -1, 0}; return semop(semaphores, &b, 1); }
static int in_pause(void) { return pause(); }

static struct call { const char *name; int (*wait)(void); atomic_int early, error; } calls[] = {
    {"epoll_wait", in_epoll}, {"poll", in_poll}, {"read", in_read}, {"nanosleep", in_nanosleep},
    {"futex", in_futex}, {"accept", in_accept}, {"sigtimedwait", in_sigtimedwait}, {"recv", in_recv},
    {"semop", in_semop}, {"pause", in_pause},
};
#define COUNT (sizeof calls / sizeof *calls)

static void *blocked(void *argument)
{
    struct call *call = argument;
    atomic_fetch_add(&started, 1);
    for (;;) {
        call->wait();
        call->error = errno;
        call->early++;
    }
    return 0;
}

static atomic_int naps, short_naps, long_naps;
static void *napping(void *unused)
{
    (void)unused;
    atomic_fetch_add(&started, 1);
    for (;;) {
        struct timespec before, after, nap = {0, 30000000};
        clock_gettime(CLOCK_MONOTONIC, &before);
        int result = nanosleep(&nap, 0);
        clock_gettime(CLOCK_MONOTONIC, &after);
        long spent = (after.tv_sec - before.tv_sec) * 1000 + (after.tv_nsec - before.tv_nsec) / 1000000;
        naps++;
        if (result || spent < 30) short_naps++;
        if (spent > 500) long_naps++;
    }
    return 0;
}

int main(void)
{
    char line[64];
    sigset_t set;
    pthread_t thread;
    struct timeval limit = {600, 0};
    struct epoll_event event = {EPOLLIN, {0}};
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    pthread_sigmask(SIG_BLOCK, &set, 0);
    if (pipe(pipe_ends) || socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
        return 1;
    epoll = epoll_create1(0);
    epoll_ctl(epoll, EPOLL_CTL_ADD, pipe_ends[0], &event);
    listener = socket(AF_INET, SOCK_STREAM, 0);
    listen(listener, 1);
    setsockopt(listener, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    semaphores = semget(IPC_PRIVATE, 1, 0600);
    for (unsigned i = 0; i < COUNT; i++)
        pthread_create(&thread, 0, blocked, &calls[i]);
    pthread_create(&thread, 0, napping, 0);
    while (started < (int)COUNT + 1) {}
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        if (!strcmp(line, "naps\n"))
            printf("%d %d %d", naps, short_naps, long_naps);
        else
            for (unsigned i = 0; i < COUNT; i++)
                if (calls[i].early)
                    printf("%s(%d,%s) ", calls[i].name, calls[i].early, strerrorname_np(calls[i].error));
        puts("");
        fflush(stdout);
    }
    semctl(semaphores, 0, IPC_RMID);
    return 0;
}
