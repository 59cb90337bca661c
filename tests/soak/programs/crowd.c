/* Threads that call a web of functions all the time and hold every answer against what the driver published.
 *
 * The shared file tells in row e which version each function has in epoch e. A call that began when `finished` was s
 * and ended when `started` was u may be answered by a version of the epochs s to u, and by no other. Counters go the
 * other way. Orders come on stdin: a number asks that function, "end" ends everything and counts what was lost.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "web.h"

#define WORKERS 64
#define ROWS 4096
#define QUEUED (1u << 23)
#define QUEUE SIGRTMIN + 1
#define TIMER SIGRTMIN + 2
#define PERIOD_NS 5000000

struct shared {
    u64 started, finished;
    u64 wrong, unchecked, sent, arrived, twice, expired, short_lived, interrupted;
    u64 first_wrong[6]; /* function, version at its beginning (upper half) and end, since, until, x, answer */
    u64 beats[WORKERS]; /* checked calls of each worker */
    u64 reserved[512 - 16 - WORKERS];
    u32 rows[ROWS][FUNCTIONS];
};

typedef u64 function(struct visit *, u32);
extern function *const web[FUNCTIONS];
extern u64 *hits_of(u32 function);

static struct shared *shared;
static u64 calls[FUNCTIONS];
static unsigned char seen[QUEUED];
static volatile int ending;
static pthread_t workers[WORKERS];

#define ADD(what, n) __atomic_add_fetch(&(what), n, __ATOMIC_RELAXED)
#define GET(what) __atomic_load_n(&(what), __ATOMIC_ACQUIRE)

static u64 next_random(u64 *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

static void sleep_ns(long ns)
{
    struct timespec rest = {ns / 1000000000, ns % 1000000000};

    while (nanosleep(&rest, &rest) && errno == EINTR)
        ;
}

u64 epoch(void) { return GET(shared->finished); }

void entered(struct visit *v, u32 version)
{
    v->began_as[v->depth++] = version;
    if (v->lingers && next_random(&v->random) % 8192 == 0)
        sleep_ns(1000000 * (1 + next_random(&v->random) % 300));
}

int goes_on(struct visit *v) { return v->depth < DEPTH - 1 && v->fuel && v->fuel--; }

u32 number_in(const char *text)
{
    u32 value = 0;

    while (*text && *text != ' ')
        text++;
    while (*text)
        if (*text++ != ' ')
            value = value * 10 + (u32)(text[-1] - '0');
    return value;
}

static void tell_wrong(u64 function, u64 version, u64 since, u64 until, u64 x, u64 answer)
{
    if (ADD(shared->wrong, 1) == 1) {
        u64 what[] = {function, version, since, until, x, answer};
        memcpy(shared->first_wrong, what, sizeof what);
    }
}

void checked(struct visit *v, u32 function, u32 x, u64 since, u64 answer)
{
    u64 until = GET(shared->started);
    u32 version = (u32)(answer >> 32);
    int known = 0;

    ADD(calls[function], 1);
    if (v->began_as[--v->depth] != version || answer != answered(function, version, x))
        tell_wrong(function, (u64)v->began_as[v->depth] << 32 | version, since, until, x, answer);
    else if (until - since >= ROWS - 2)
        ADD(shared->unchecked, 1);
    else {
        for (u64 e = since; e <= until && !known; e++)
            known = shared->rows[e % ROWS][function] == version;
        if (!known)
            tell_wrong(function, (u64)v->began_as[v->depth] << 32 | version, since, until, x, answer);
    }
}

static u32 visit(u64 *random, u32 fuel, int lingers, u32 which)
{
    struct visit v = {.fuel = fuel, .random = next_random(random), .lingers = lingers};
    u32 x = (u32)next_random(random);
    u64 since = epoch();
    u64 answer = web[which](&v, x);

    checked(&v, which, x, since, answer);
    *random ^= v.random;
    return (u32)(answer >> 32);
}

static void queued(int number, siginfo_t *info, void *context)
{
    int kept = errno;
    u32 value = (u32)info->si_value.sival_int;

    (void)number, (void)context;
    if (value >= QUEUED || __atomic_exchange_n(&seen[value], 1, __ATOMIC_RELAXED))
        ADD(shared->twice, 1);
    ADD(shared->arrived, 1);
    errno = kept;
}

static void expired(int number, siginfo_t *info, void *context)
{
    static u64 state = 88172645463325252;
    u64 random = ADD(state, 0x9e3779b97f4a7c15) | 1;
    int kept = errno;

    (void)number, (void)context;
    ADD(shared->expired, 1 + (u64)info->si_overrun);
    visit(&random, 3, 0, (u32)(random >> 20) % FUNCTIONS);
    errno = kept;
}

static void *work(void *argument)
{
    u64 own = (u64)argument, random = (own + 1) * 0x9e3779b97f4a7c15;

    while (!ending) {
        for (int i = 0; i < 25; i++)
            visit(&random, 12, own % 4 == 0, (u32)(next_random(&random) >> 20) % FUNCTIONS);
        ADD(shared->beats[own], 1);
        if (own)
            sleep_ns(2000000 + (long)(next_random(&random) % 4000000)); /* one of them never rests */
    }
    return NULL;
}

static void *visit_once(void *argument)
{
    u64 random = (u64)argument;

    visit(&random, 12, 0, (u32)(random >> 20) % FUNCTIONS);
    return NULL;
}

static void *churn(void *argument)
{
    u64 random = 1234567;
    pthread_t short_lived;

    while (!ending) {
        if (pthread_create(&short_lived, NULL, visit_once, (void *)(next_random(&random) | 1)) == 0) {
            pthread_join(short_lived, NULL);
            ADD(shared->short_lived, 1);
        }
        sleep_ns(4000000);
    }
    return argument;
}

static void *send(void *argument)
{
    u64 random = 7654321;

    while (!ending && shared->sent < QUEUED) {
        if (shared->sent - GET(shared->arrived) < 500) {
            union sigval value = {.sival_int = (int)shared->sent};
            int to_one = next_random(&random) % 2;
            int failed = to_one ? pthread_sigqueue(workers[random % WORKERS], QUEUE, value)
                                : sigqueue(getpid(), QUEUE, value);
            if (!failed)
                ADD(shared->sent, 1);
        }
        sleep_ns(500000);
    }
    return argument;
}

/* Waits in a call that reports EINTR after a stop, with no signal that could be the reason. */
static void *wait_for_nothing(void *argument)
{
    int waiting = epoll_create1(0);
    struct epoll_event event;

    while (!ending)
        if (epoll_wait(waiting, &event, 1, 50) < 0)
            ADD(shared->interrupted, 1);
    return argument;
}

static timer_t make_timer(void)
{
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = TIMER};
    struct itimerspec every = {{0, PERIOD_NS}, {0, PERIOD_NS}};
    timer_t timer;

    if (timer_create(CLOCK_MONOTONIC, &event, &timer) || timer_settime(timer, 0, &every, NULL))
        abort();
    return timer;
}

static u64 now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (u64)now.tv_sec * 1000000000 + (u64)now.tv_nsec;
}

static void handle(int number, void (*handler)(int, siginfo_t *, void *))
{
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_RESTART};

    if (sigaction(number, &action, NULL))
        abort();
}

/* Lets what is on its way arrive; returns how many expirations of the timer did not. */
static long settle(timer_t timer, u64 began)
{
    struct itimerspec off = {{0, 0}, {0, 0}};
    u64 due = (now_ns() - began) / PERIOD_NS;

    timer_settime(timer, 0, &off, NULL);
    for (int i = 0; i < 2000 && GET(shared->arrived) < shared->sent; i++)
        sleep_ns(1000000);
    sleep_ns(100000000);
    return (long)(due - GET(shared->expired));
}

static void serve(void)
{
    char line[80];
    u64 random = 42;

    while (fgets(line, sizeof line, stdin) && strcmp(line, "end\n"))
        printf("%u\n", visit(&random, 0, 0, (u32)atoi(line) % FUNCTIONS));
}

int main(int count, char **arguments)
{
    pthread_t others[4];
    sigset_t own, before;
    int file = count == 2 ? open(arguments[1], O_RDWR) : -1;
    u64 hits = 0, began;
    timer_t timer;
    long late;

    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (shared == MAP_FAILED || setpriority(PRIO_PROCESS, 0, 10))
        return 2;
    setvbuf(stdout, NULL, _IOLBF, 0);
    handle(QUEUE, queued);
    handle(TIMER, expired);
    for (u64 i = 0; i < WORKERS; i++)
        pthread_create(&workers[i], NULL, work, (void *)i);
    sigfillset(&own);
    pthread_sigmask(SIG_SETMASK, &own, &before);
    pthread_create(&others[0], NULL, send, NULL);
    pthread_create(&others[1], NULL, wait_for_nothing, NULL);
    pthread_create(&others[2], NULL, wait_for_nothing, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_create(&others[3], NULL, churn, NULL);
    began = now_ns();
    timer = make_timer();
    puts("ready");
    serve();
    late = settle(timer, began);
    ending = 1;
    for (int i = 0; i < 4; i++)
        pthread_join(others[i], NULL);
    for (int i = 0; i < WORKERS; i++)
        pthread_join(workers[i], NULL);
    for (u32 i = 0; i < FUNCTIONS; i++)
        hits += *hits_of(i) != calls[i];
    printf("%ld %lu\n", late, hits);
    return 0;
}
