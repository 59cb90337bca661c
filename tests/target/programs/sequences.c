/* Counts in restartable sequences (rseq(2)), as per-CPU counters are made: a thread that is moved or preempted in the
   middle has to begin anew, or counts get lost. The main thread does so too; another one answers lines with the number
   of counts made, their sum, and how often one was begun anew. First line: "ready", or "none" without rseq. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/rseq.h>
#include <unistd.h>

struct counter { volatile long value; long padding[7]; };
static struct counter counters[1024];
static volatile long made[4], anew[4];

static struct rseq *own(void) { return (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset); }

/* Adds one to the counter of this CPU, after some time in between; returns 0 when it has to be done anew. */
static int count(struct rseq *area)
{
    __asm__ goto(
        ".pushsection __rseq_cs, \"aw\"\n.balign 32\n"
        "3: .long 0, 0\n.quad 1f, 2f - 1f, 4f\n.popsection\n"
        "leaq 3b(%%rip), %%rax\n"
        "movq %%rax, 8(%[area])\n"
        "1:\n"
        "movl 4(%[area]), %%eax\n"   /* cpu_id */
        "shlq $6, %%rax\n"
        "addq %[counters], %%rax\n"
        "movq (%%rax), %%rcx\n"
        "movl $400, %%edx\n"
        "5: pause\ndecl %%edx\njnz 5b\n"
        "incq %%rcx\n"
        "movq %%rcx, (%%rax)\n"      /* commit */
        "2:\n"
        ".pushsection __rseq_failure, \"ax\"\n"
        ".byte 0x0f, 0xb9, 0x3d\n.long 0x53053053\n"
        "4: jmp %l[again]\n.popsection\n"
        : : [area] "r"(area), [counters] "r"(counters) : "rax", "rcx", "rdx", "memory", "cc" : again);
    return 1;
again:
    return 0;
}

static void *keep_counting(void *number)
{
    struct rseq *area = own();
    for (;;) {
        (count(area) ? made : anew)[(long)number]++;
        for (int i = 0; i < 400; i++)
            __builtin_ia32_pause(); /* now and then it must be outside */
    }
    return NULL;
}

static void *answer(void *unused)
{
    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        long all = 0, again = 0, sum = 0;
        for (int i = 0; i < 4; i++)
            all += made[i], again += anew[i];
        for (int i = 0; i < 1024; i++)
            sum += counters[i].value;
        printf("%ld %ld %ld\n", all, sum, again);
        fflush(stdout);
    }
    _exit(0);
    return unused;
}

int main(void)
{
    pthread_t thread;
    int there = __rseq_size && (int)own()->cpu_id >= 0;
    pthread_create(&thread, NULL, answer, NULL);
    for (long i = 1; there && i < 3; i++)
        pthread_create(&thread, NULL, keep_counting, (void *)i);
    puts(there ? "ready" : "none");
    fflush(stdout);
    if (there)
        keep_counting(0);
    pthread_join(thread, NULL);
    return 0;
}
