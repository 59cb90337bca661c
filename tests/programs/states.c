/* Gets into the state that ARGV[1] names and stays there, asleep or busy; what it sleeps on never comes.
   Says "r" before, or in the signal handler. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int ends[2];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
static sem_t semaphore;

#define NOINLINE __attribute__((noinline, noclone))
NOINLINE void sleep_for_ever(void) { char byte; if (read(ends[0], &byte, 1)) abort(); }
static NOINLINE int compare(const void *a, const void *b) { sleep_for_ever(); return a < b; }
static int visit(struct dl_phdr_info *info, size_t size, void *data) { (void)info; (void)size; (void)data; sleep_for_ever(); return 0; }
static void on_signal(int number) { (void)number; if (write(1, "r", 1) == 1) sleep_for_ever(); }
static FILE *input(void) { return fdopen(ends[0], "r"); }

static void in_read(void) { sleep_for_ever(); }
static void in_poll(void) { struct pollfd p = {ends[0], POLLIN, 0}; poll(&p, 1, -1); }
static void in_select(void) { fd_set set; FD_ZERO(&set); FD_SET(ends[0], &set); select(ends[0] + 1, &set, 0, 0, 0); }
static void in_epoll(void) { struct epoll_event e; epoll_wait(epoll_create1(0), &e, 1, -1); }
static void in_nanosleep(void) { struct timespec t = {600, 0}; nanosleep(&t, 0); }
static void in_sleep(void) { sleep(600); }
static void in_pause(void) { pause(); }
static void in_condition(void) { pthread_mutex_lock(&mutex); pthread_cond_wait(&condition, &mutex); }
static void in_mutex(void) { pthread_mutex_lock(&mutex); pthread_mutex_lock(&mutex); }
static void in_semaphore(void) { sem_init(&semaphore, 0, 0); sem_wait(&semaphore); }
static void *sleeper(void *unused) { sleep_for_ever(); return unused; }
static void in_join(void) { pthread_t t; pthread_create(&t, 0, sleeper, 0); pthread_join(t, 0); }
/* The child ends with the test's program. */
static void in_wait(void) { if (!fork()) { prctl(PR_SET_PDEATHSIG, SIGKILL); sleep_for_ever(); } wait(0); }
static void in_fgets(void) { char line[80]; if (!fgets(line, sizeof line, input())) abort(); }
static void in_getline(void) { char *line = 0; size_t size = 0; if (getline(&line, &size, input()) < 0) abort(); }
static void in_scanf(void) { int n; if (fscanf(input(), "%d", &n) != 1) abort(); }
static void in_qsort(void) { int a[9] = {0}; qsort(a, 9, sizeof *a, compare); }
static void in_handler(void) { signal(SIGALRM, on_signal); ualarm(1000, 0); for (;;) pause(); }
static NOINLINE void in_buffer(void) { volatile char big[200000]; big[0] = 1; sleep_for_ever(); big[1] = 2; }
static NOINLINE void deeply(void) { char path[150000]; path[0] = 'x'; path[1] = 0; dlopen(path, RTLD_NOW); __asm__ volatile("" ::"r"(path) : "memory"); }
static void in_stale_buffer(void) { deeply(); in_buffer(); }

/* Has no call frame information. */
void no_frames(void (*)(void));
__asm__(".text\n.globl no_frames\n.type no_frames, @function\nno_frames:\nsub $40, %rsp\ncall *%rdi\nadd $40, %rsp\nret\n"
        ".size no_frames, . - no_frames\n");
static void in_unknown(void) { no_frames(sleep_for_ever); }
static void in_unknown_holding(void) { dl_iterate_phdr(visit, 0); }
static int unknown_visit(struct dl_phdr_info *i, size_t s, void *d) { (void)i; (void)s; (void)d; no_frames(sleep_for_ever); return 0; }
static void in_unknown_visit(void) { dl_iterate_phdr(unknown_visit, 0); }

static void in_puts(void)
{
    FILE *out = fdopen(ends[1], "w");
    for (;;)
        fputs("the pipe is full at some time, and nobody empties it\n", out);
}
static void in_exit(void) { atexit(sleep_for_ever); exit(0); }
static void in_fork(void) { pthread_atfork(sleep_for_ever, 0, 0); fork(); }
static volatile long spins;
static NOINLINE void in_loop(void) { for (;;) spins++; }
static void in_unknown_loop(void) { no_frames(in_loop); }
static char text[1 << 20];
static void in_strlen(void) { memset(text, 'x', sizeof text - 1); for (;;) spins += strlen(text); }

static const struct { const char *name; void (*enter)(void); } states[] = {
    {"read", in_read}, {"poll", in_poll}, {"select", in_select}, {"epoll", in_epoll}, {"nanosleep", in_nanosleep},
    {"sleep", in_sleep}, {"pause", in_pause}, {"condition", in_condition}, {"mutex", in_mutex},
    {"semaphore", in_semaphore}, {"join", in_join}, {"wait", in_wait}, {"fgets", in_fgets}, {"getline", in_getline},
    {"scanf", in_scanf}, {"qsort", in_qsort}, {"handler", in_handler}, {"buffer", in_buffer},
    {"stale buffer", in_stale_buffer}, {"unknown", in_unknown}, {"unknown visit", in_unknown_visit},
    {"iterate", in_unknown_holding}, {"puts", in_puts}, {"exit", in_exit}, {"fork", in_fork}, {"loop", in_loop},
    {"unknown loop", in_unknown_loop}, {"strlen", in_strlen},
};

static void *enter(void *number) { states[(size_t)number].enter(); return number; }

int main(int count, char **arguments)
{
    if (pipe(ends))
        return 1;
    for (size_t i = 0; i < sizeof states / sizeof *states; i++) {
        if (count < 2 || strcmp(states[i].name, arguments[1]))
            continue;
        if (states[i].enter != in_handler && write(1, "r", 1) != 1)
            return 1;
        pthread_t thread;
        if (count == 2)
            enter((void *)i);
        pthread_create(&thread, 0, enter, (void *)i);
        pthread_join(thread, 0);
    }
    return 1;
}
