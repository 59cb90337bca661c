/* Follows the system calls of one thread and meddles with the N-th that counts: kills its process there, stops it,
 * interrupts it, or has the call fail.
 *
 *     meddler PID ACTION N CALLS      ACTION: kill, cut, stop, interrupt, fail:ERRNO; CALLS: numbers with commas
 *
 * Calls count between two calls of getsid. Waiting by asking again and again (wait4, sched_yield, nanosleep) counts
 * once. A process that was to be killed or to see calls fail has a seccomp filter that shows only the calls that count
 * (and getsid): it stands still at no others, which takes a tenth of the time. Says "ready" when it follows, and at the end the number of the call it met (or -1).
 * With "cut" only writes across the border of a page count: the call gets no further than that border, and the process
 * is killed then, as by a signal that comes while the kernel goes from one page to the next.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>

static char counts[1024];

static int counted(long number, long before)
{
    if (number == SYS_sched_yield || number == SYS_clock_nanosleep || number == SYS_nanosleep)
        return 0;
    if (number == SYS_wait4 && before == SYS_wait4)
        return 0;
    return number >= 0 && number < 1024 && counts[number];
}

/* How much of a pwrite64 lies on its first page. */
static unsigned long border(const struct user_regs_struct *registers)
{
    return 4096 - (registers->r10 & 4095);
}

/* Lets it run to its next call, or to the end of the one that it is in; without a filter to either. */
static int next_stop(pid_t pid, int request)
{
    int status, signal = 0;
    for (;;) {
        if (ptrace(request, pid, 0, (long)signal) || waitpid(pid, &status, __WALL) != pid)
            return 0;
        if (!WIFSTOPPED(status))
            return 0;
        if (status >> 16 == PTRACE_EVENT_SECCOMP)
            return 1;
        if (WSTOPSIG(status) == (SIGTRAP | 0x80) && request == PTRACE_SYSCALL)
            return 1;
        signal = status >> 16 ? 0 : WSTOPSIG(status);
    }
}

int main(int argc, char **argv)
{
    pid_t pid = atoi(argv[1]);
    const char *action = argv[2];
    long wanted = atol(argv[3]), count = 0, before = -1, met = -1;
    int filtered = strcmp(argv[2], "stop") && strcmp(argv[2], "interrupt");
    int inside = 0, status, request = filtered ? PTRACE_CONT : PTRACE_SYSCALL;
    struct user_regs_struct registers;

    if (argc != 5)
        return 2;
    for (char *word = strtok(argv[4], ","); word; word = strtok(NULL, ","))
        counts[atoi(word) & 1023] = 1;
    if (ptrace(PTRACE_SEIZE, pid, 0, PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACESECCOMP) || ptrace(PTRACE_INTERRUPT, pid, 0, 0) ||
        waitpid(pid, &status, __WALL) != pid)
        return 1;
    puts("ready");
    fflush(stdout);
    /* The first stop is the interruption of the call that it waits in. */
    while (next_stop(pid, request)) {
        ptrace(PTRACE_GETREGS, pid, 0, &registers);
        if (!filtered && registers.rax != (unsigned long)-ENOSYS)
            continue; /* the end of a call that was under way */
        long number = registers.orig_rax;
        if (number == SYS_getsid) {
            if (inside)
                break;
            inside = 1;
        } else if (inside && counted(number, before) && (strcmp(action, "cut") || registers.rdx > border(&registers)) &&
                   ++count == wanted) {
            met = number;
            if (!strcmp(action, "kill")) {
                kill(pid, SIGKILL);
                waitpid(pid, &status, __WALL);
                break;
            }
            if (!strcmp(action, "stop") || !strcmp(action, "interrupt")) {
                kill(pid, *action == 's' ? SIGSTOP : SIGINT);
                ptrace(PTRACE_DETACH, pid, 0, 0);
                break;
            }
            if (!strcmp(action, "cut")) {
                registers.rdx = border(&registers);
                ptrace(PTRACE_SETREGS, pid, 0, &registers);
                if (next_stop(pid, PTRACE_SYSCALL))
                    kill(pid, SIGKILL);
                waitpid(pid, &status, __WALL);
                break;
            } else {
                registers.orig_rax = -1;
                registers.rax = -atol(action + 5);
                ptrace(PTRACE_SETREGS, pid, 0, &registers);
                before = number;
                continue;
            }
        }
        before = number == SYS_sched_yield || number == SYS_clock_nanosleep ? before : number;
        if (!filtered && !next_stop(pid, PTRACE_SYSCALL))
            break;
    }
    printf("%ld\n", met);
    return 0;
}
