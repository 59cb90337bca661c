/* Threads that call functions which must agree, all the time; every line of input is answered by all of them.
 *
 * Built with UNITS files of functions, each of which defines `void ask_UNIT(struct asked *)`. Transient disagreement
 * is a call before and a call after the change; one that lasts is a mixture of two generations, and aborts.
 * With TABLES it reads in patcher_state as well what it is made of, and with HOOKS it is told of changes.
 *
 *     program [CALL [PROTECTION]]     the kernel answers ENOMEM to that system call (with that third argument)
 */
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <stddef.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
#include "agree.h"

enum { THREADS = 4 };
static atomic_int rounds[THREADS], answers[THREADS];

#if defined TABLES || defined HOOKS
#include <ctype.h>
#include <string.h>
#include "patcher.h"
#define MUST(what) ((what) ? (void)0 : wrong(#what, __LINE__))
static void wrong(const char *what, int line)
{
    fprintf(stderr, "line %d: not %s\n", line, what);
    abort();
}
#endif

#ifdef TABLES
/* What all functions of the live generation's table answer: one table is of one generation, whole, at any time. */
static void look_up(int answer)
{
    uint64_t generation = patcher_generation();
    const struct patcher_table *table = patcher_live();
    int functions = 0, said = 1;
    if (!table) {
        MUST(!generation || generation != patcher_generation());
        return;
    }
    for (uint64_t i = 0; i < table->count; i++) {
        const struct patcher_symbol *symbol = &table->symbols[i];
        MUST(symbol->address && strlen(symbol->name) > 1 && strlen(symbol->file) == 3);
        if (!isdigit(symbol->name[1]))
            continue;
        int found = ((int (*)(int))symbol->address)(0);
        MUST(!functions++ || found == said);
        said = found;
    }
    MUST(functions == TABLES);
    if (answer && table->generation == generation && generation == patcher_generation())
        MUST(said == answer);
}
#else
#define look_up(answer) ((void)0)
#endif

#ifdef HOOKS
static atomic_int announced;
static const char *volatile broken; /* told by the program itself: a hook that ends it is only called off */
#define NOTE(what) ((what) ? (void)0 : (void)(broken = #what))
/* Both take their time, so that who was to wait for them can be gone meanwhile. */
void patcher_before(const struct patcher_event *event)
{
    NOTE(event->size >= sizeof *event && event->generation != event->previous);
    for (uint64_t i = 0; i < event->function_count; i++) {
        usleep(500);
        NOTE(strlen(event->functions[i].name) > 1 && strlen(event->functions[i].outcome) > 1);
    }
    announced++;
}
void patcher_after(const struct patcher_event *event)
{
    NOTE(announced);
    usleep(2000);
    NOTE(event->action <= PATCHER_CANCEL && event->size >= sizeof *event);
    for (uint64_t i = 0; i < event->function_count; i++)
        NOTE(strlen(event->functions[i].name) > 1 && strlen(event->functions[i].file) == 3);
}
#define CHECK_HOOKS() (broken ? wrong(broken, 0) : (void)0)
#else
#define CHECK_HOOKS() ((void)0)
#endif

static long now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec;
}

static int sample(void)
{
    long since = now();
    for (;;) {
        struct asked asked = {0x7fffffff, -1};
        ask(&asked);
        if (asked.least == asked.most)
            return asked.least;
        if (now() > since + 4) {
            fprintf(stderr, "a mixture of %d and %d\n", asked.least, asked.most);
            abort();
        }
    }
}

static void *run(void *number)
{
    int self = (int)(long)number;
    for (;;) {
        answers[self] = sample();
        look_up(0);
        rounds[self]++;
        if (self)
            usleep(200 * self);
        else
            for (volatile int i = 0; i < 20000; i++)
                ;
    }
}

static void forbid(int count, char **values)
{
    unsigned call = atoi(values[0]), argument = count > 1 ? atoi(values[1]) : 0;
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[2])),
        BPF_JUMP(BPF_JMP | (count > 1 ? BPF_JEQ : BPF_JGE) | BPF_K, argument, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOMEM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
        syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program))
        abort();
}

int main(int count, char **arguments)
{
    char line[80];
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (long i = 0; i < THREADS; i++) {
        pthread_t thread;
        pthread_create(&thread, NULL, run, (void *)i);
    }
    puts("ready");
    if (count > 1)
        forbid(count - 1, arguments + 1);
    while (fgets(line, sizeof line, stdin)) {
        int first = sample(), agreed = 1;
        for (int i = 0; i < THREADS; i++) {
            int round = rounds[i];
            while (rounds[i] < round + 2)
                usleep(100);
            agreed &= answers[i] == first;
        }
        look_up(first);
        CHECK_HOOKS();
        printf("%d\n", agreed && sample() == first ? first : -1);
    }
    return 0;
}
