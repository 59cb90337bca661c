/* A long computation that looks at errno all the time, and functions to be called meanwhile.
   With ARGV[1] the computing thread has a stack of 16 KiB cut from an array; with ARGV[2] there is one that rests. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

static volatile long rounds, faults, handled;
static long calls, spoiled;
static int trapped_at;
static char small_stack[16384] __attribute__((aligned(16)));
static ucontext_t before, inside;

long sum(long a, long b, long c, long d, long e, long f) { errno = 5; calls++; return a + 2 * b + 3 * c + 4 * d + 5 * e + 6 * f; }
long length(const char *text) { errno = 6; return strlen(text); }
long deep(long size) { volatile char room[size]; memset((char *)room, 1, size); return room[size - 1] * size; }
long where(void) { return (long)__builtin_frame_address(0); }
long wait_for(int fd) { char byte; errno = 7; return read(fd, &byte, 1); }
long give_up(void) { errno = 8; abort(); }
long fault(void) { errno = 9; *(volatile int *)8 = 1; return 0; }
/* Keeps a value in a vector register alone for some tenths of a second. */
long hold(long turns)
{
    long held;
    __asm__ volatile("movq %1, %%xmm9\n1: dec %1\nmovq %%xmm9, %0\ncmp %2, %0\njne 2f\ntest %1, %1\njnz 1b\n2:"
                     : "=&r"(held), "+&r"(turns) : "r"(turns) : "xmm9", "cc");
    spoiled += turns != 0;
    return held;
}
/* Waits for a byte, then does what a handler of the program, on a stack of its own, makes good when there is another. */
long trap(int fd)
{
    char byte;
    if (read(fd, &byte, 1) != 1)
        return 0;
    trapped_at = fd;
    __asm__ volatile("ud2");
    return 1;
}
long count_spoiled(void) { return spoiled; }
long count_calls(void) { return calls; }

static void *rest(void *unused)
{
    for (;;)
        pause();
    return unused;
}

static void on_signal(int number) { (void)number; handled++; }

static void on_trap(int number, siginfo_t *info, void *context)
{
    char byte;
    (void)number, (void)info;
    if (read(trapped_at, &byte, 1) == 1)
        ((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP] += 2;
}

static void handle_traps(void)
{
    static char stack[65536];
    stack_t other = {.ss_sp = stack, .ss_size = sizeof stack};
    struct sigaction action = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigaltstack(&other, NULL);
    sigaction(SIGILL, &action, NULL);
}

static int ends[2];
static char *code, *stack;

static void greet(void)
{
    printf("%p %p %p %p %p %p %p %p %p %x %x %p %p %p %p %p %p\n", (void *)__errno_location, (void *)sum, (void *)length, (void *)deep,
           (void *)where, (void *)wait_for, (void *)give_up, (void *)fault, (void *)count_calls, ends[0], ends[1], (void *)code,
           (void *)stack, (void *)_exit, (void *)hold, (void *)trap, (void *)count_spoiled);
    fflush(stdout);
}

/* Greets when it is where it stays. */
static void compute(void)
{
    char line[64];
    greet();
    for (;;) {
        struct pollfd in = {0, POLLIN, 0};
        errno = 1234;
        for (volatile int i = 0; i < 20000; i++)
            faults += errno != 1234;
        rounds++;
        if (poll(&in, 1, 0) != 1)
            continue;
        ssize_t got = read(0, line, sizeof line - 1);
        if (got <= 0)
            _exit(faults != 0);
        printf("%ld %ld %ld\n", faults, handled, rounds);
        fflush(stdout);
    }
}

int main(int count, char **arguments)
{
    (void)arguments;
    if (pipe(ends))
        return 1;
    signal(SIGUSR1, on_signal);
    handle_traps();
    code = mmap(0, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    stack = mmap(0, 256 << 10, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (count > 2) {
        pthread_t other;
        pthread_create(&other, NULL, rest, NULL);
    }
    if (count > 1) {
        getcontext(&inside);
        inside.uc_stack.ss_sp = small_stack;
        inside.uc_stack.ss_size = sizeof small_stack;
        inside.uc_link = &before;
        makecontext(&inside, compute, 0);
        swapcontext(&before, &inside);
    }
    compute();
}
