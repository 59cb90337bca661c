/* Timers of every kind, whose expirations the kernel counts: each must be seen, none twice. The main thread answers
 * lines; "report" gives, for each timer, expirations seen and how many there were to see by the clock, and for alarm(2)
 * how often it came. With each answer of `answer` errno is looked at: "errno" gives how often it was not as before.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

int answer(int n);
enum { PERIOD = 2000000 };
static volatile long signalled, read_off, alarms, strange;
static timer_t timer;
static struct timespec began;
static int descriptor;

static void on_timer(int number, siginfo_t *info, void *context)
{
    (void)number, (void)context;
    signalled += 1 + info->si_overrun;
}

static void on_alarm(int number) { (void)number, alarms++; }

static long periods(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return ((now.tv_sec - began.tv_sec) * 1000000000L + now.tv_nsec - began.tv_nsec) / PERIOD;
}

static void *keep_reading(void *unused)
{
    uint64_t count;
    while (read(descriptor, &count, sizeof count) == sizeof count)
        read_off += count;
    return unused;
}

static void *keep_asking(void *unused)
{
    for (;;) {
        errno = 1234;
        answer(5);
        strange += errno != 1234;
    }
    return unused;
}

int main(void)
{
    char line[80];
    pthread_t thread;
    sigset_t set;
    setvbuf(stdout, NULL, _IOLBF, 0);
    struct sigaction action = {.sa_sigaction = on_timer, .sa_flags = SA_SIGINFO | SA_RESTART};
    sigaction(SIGRTMIN, &action, NULL);
    signal(SIGALRM, on_alarm);
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN};
    descriptor = timerfd_create(CLOCK_MONOTONIC, 0);
    timer_create(CLOCK_MONOTONIC, &event, &timer);
    clock_gettime(CLOCK_MONOTONIC, &began);
    struct itimerspec every = {{0, PERIOD}, began};
    every.it_value.tv_nsec += PERIOD;
    if (every.it_value.tv_nsec >= 1000000000)
        every.it_value.tv_sec++, every.it_value.tv_nsec -= 1000000000;
    timer_settime(timer, TIMER_ABSTIME, &every, NULL);
    timerfd_settime(descriptor, TFD_TIMER_ABSTIME, &every, NULL);
    struct itimerval once = {{0, 0}, {0, 300000}};
    setitimer(ITIMER_REAL, &once, NULL);
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN);
    sigaddset(&set, SIGALRM);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    pthread_create(&thread, NULL, keep_reading, NULL);
    pthread_create(&thread, NULL, keep_asking, NULL);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    puts("ready");
    while (fgets(line, sizeof line, stdin)) {
        if (!strcmp(line, "report\n")) {
            long before = periods(), seen[2];
            nanosleep(&(struct timespec){0, 20 * PERIOD}, NULL); /* what was due by `before` has come by now */
            seen[0] = signalled, seen[1] = read_off;
            printf("%ld %ld %ld %ld %ld\n", before, seen[0], seen[1], periods(), alarms);
        } else if (!strcmp(line, "errno\n"))
            printf("%ld\n", strange);
        else
            printf("%d\n", answer(atoi(line)));
    }
    return 7;
}
