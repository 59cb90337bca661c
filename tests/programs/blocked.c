/* Threads in system calls that block, each counting when its call comes back though nothing happened; a parent that
 * counts every change of state of its child; signals with values that must all arrive, in order.
 *
 * The child is what is patched: its first line is its pid. It answers lines:
 *   report   the calls that came back early: name, times and errno of each
 *   queued   values received so far, and how many were out of order
 *   real     for each call with a handler of its own: signals handled, EINTRs seen, and the thread
 *   answers  wrong answers of `answer`, called all the time by one thread
 *   end      the child exits with 7
 * When the child has ended, the parent writes: stops and continuations it saw, SIGCHLDs, and the exit status.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

int answer(int n);

static const struct timespec hour = {3600, 0};
static volatile int ending;

/* --- calls that block for an hour ---------------------------------------------------------------------------- */

static int epoll_fd, empty_pipe[2], listening, sockets[2], semaphores, queue, futex_word;
static sem_t semaphore;
static pid_t sleeper;
static sigset_t nothing_sent;

static long in_epoll_wait(void) { struct epoll_event e; return epoll_wait(epoll_fd, &e, 1, 3600 * 1000); }
static long in_epoll_pwait(void) { struct epoll_event e; sigset_t s; sigfillset(&s); return epoll_pwait(epoll_fd, &e, 1, 3600 * 1000, &s); }
static long in_poll(void) { struct pollfd p = {empty_pipe[0], POLLIN, 0}; return poll(&p, 1, 3600 * 1000); }
static long in_ppoll(void) { struct pollfd p = {empty_pipe[0], POLLIN, 0}; return ppoll(&p, 1, &hour, NULL); }
static long in_select(void) { fd_set s; FD_ZERO(&s); FD_SET(empty_pipe[0], &s); struct timeval t = {3600, 0}; return select(empty_pipe[0] + 1, &s, NULL, NULL, &t); }
static long in_read(void) { char c; return read(empty_pipe[0], &c, 1); }
static long in_nanosleep(void) { return nanosleep(&hour, NULL); }
static long in_futex(void) { return syscall(SYS_futex, &futex_word, FUTEX_WAIT, 0, &hour, NULL, 0); }
static long in_sem_wait(void) { struct timespec t; clock_gettime(CLOCK_REALTIME, &t); t.tv_sec += 3600; return sem_timedwait(&semaphore, &t); }
static long in_accept(void) { return accept(listening, NULL, NULL); }
static long in_recv(void) { char c; return recv(sockets[0], &c, 1, 0); }
static long in_recvmsg(void) { char c; struct iovec v = {&c, 1}; struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1}; return recvmsg(sockets[0], &m, 0); }
static long in_sigtimedwait(void) { siginfo_t i; return sigtimedwait(&nothing_sent, &i, &hour); }
static long in_semtimedop(void) { struct sembuf b = {0, -1, 0}; return semtimedop(semaphores, &b, 1, &hour); }
static long in_msgrcv(void) { struct { long type; char text[8]; } m; return msgrcv(queue, &m, 8, 0, 0); }
static long in_waitpid(void) { return waitpid(sleeper, NULL, 0); }
static long in_pause(void) { return pause(); }

struct blocked {
    const char *name;
    long (*call)(void);
    volatile int returns, error;
    volatile long result;
};

static struct blocked calls[] = {
    {"epoll_wait", in_epoll_wait}, {"epoll_pwait", in_epoll_pwait}, {"poll", in_poll},
    {"ppoll", in_ppoll},           {"select", in_select},           {"read", in_read},
    {"nanosleep", in_nanosleep},   {"futex", in_futex},             {"sem_wait", in_sem_wait},
    {"accept", in_accept},         {"recv", in_recv},               {"recvmsg", in_recvmsg},
    {"sigtimedwait", in_sigtimedwait}, {"semtimedop", in_semtimedop}, {"msgrcv", in_msgrcv},
    {"waitpid", in_waitpid},       {"pause", in_pause},
};
enum { CALLS = sizeof calls / sizeof *calls };

static void *stay_blocked(void *argument)
{
    struct blocked *me = argument;
    while (!ending) {
        long result = me->call();
        me->error = result < 0 ? errno : 0;
        me->result = result;
        me->returns++;
        usleep(1000);
    }
    return NULL;
}

/* --- calls that time out after a short while, never before ----------------------------------------------------- */

static volatile int naps, short_naps, failed_naps;

static void *nap(void *poll_instead)
{
    while (!ending) {
        struct timespec begin, now, five = {0, 5000000};
        clock_gettime(CLOCK_MONOTONIC, &begin);
        struct epoll_event e;
        long result = poll_instead ? epoll_wait(epoll_fd, &e, 1, 5) : nanosleep(&five, NULL);
        clock_gettime(CLOCK_MONOTONIC, &now);
        __atomic_add_fetch(&naps, 1, __ATOMIC_SEQ_CST);
        if (result != 0)
            __atomic_add_fetch(&failed_naps, 1, __ATOMIC_SEQ_CST);
        if ((now.tv_sec - begin.tv_sec) * 1000000000L + now.tv_nsec - begin.tv_nsec < five.tv_nsec)
            __atomic_add_fetch(&short_naps, 1, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

/* --- signals --------------------------------------------------------------------------------------------------- */

static volatile int queued, disordered;
static volatile long wrong_answers, answered;

static void on_queued(int number, siginfo_t *info, void *context)
{
    (void)number, (void)context;
    if (info->si_value.sival_int != queued + 1)
        disordered++;
    queued++;
}

static void unblock(int number)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, number);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
}

static void *keep_asking(void *unused)
{
    unblock(SIGRTMIN);
    while (!ending) {
        int found = answer(5);
        wrong_answers += found != 6 && found != 105;
        answered++;
    }
    return unused;
}

struct interrupted {
    const char *name;
    long (*call)(void);
    volatile int handled, interruptions;
    volatile pid_t thread;
};

static struct interrupted real[] = {
    {"read", in_read}, {"epoll_wait", in_epoll_wait}, {"nanosleep", in_nanosleep}, {"recv", in_recv}, {"accept", in_accept},
};
enum { REAL = sizeof real / sizeof *real };

static void on_real(int number) { real[number - SIGRTMIN - 1].handled++; }

static void *be_interrupted(void *argument)
{
    struct interrupted *me = argument;
    me->thread = gettid();
    unblock(SIGRTMIN + 1 + (me - real));
    while (!ending)
        if (me->call() == -1 && errno == EINTR)
            me->interruptions++;
    return NULL;
}

/* --- the child --------------------------------------------------------------------------------------------------- */

static void prepare(void)
{
    struct timeval patience = {3600, 0};
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    epoll_fd = epoll_create1(0);
    if (pipe(empty_pipe) || socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) || sem_init(&semaphore, 0, 0))
        exit(1);
    listening = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listening, (struct sockaddr *)&any, sizeof any) || listen(listening, 1))
        exit(1);
    setsockopt(listening, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(sockets[0], SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    semaphores = semget(IPC_PRIVATE, 1, 0600);
    queue = msgget(IPC_PRIVATE, 0600);
    if (semaphores < 0 || queue < 0)
        exit(1);
    sigemptyset(&nothing_sent);
    sigaddset(&nothing_sent, SIGRTMIN + 20);
    if (!(sleeper = fork())) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        pause();
        _exit(0);
    }
}

static void start_threads(void)
{
    sigset_t all;
    pthread_t thread;
    pthread_attr_t small;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, NULL);
    struct sigaction action = {.sa_sigaction = on_queued, .sa_flags = SA_SIGINFO | SA_RESTART};
    sigaction(SIGRTMIN, &action, NULL);
    action = (struct sigaction){.sa_handler = on_real};
    pthread_attr_init(&small);
    for (int i = 0; i < CALLS; i++)
        pthread_create(&thread, &small, stay_blocked, &calls[i]);
    for (int i = 0; i < REAL; i++) {
        sigaction(SIGRTMIN + 1 + i, &action, NULL);
        pthread_create(&thread, &small, be_interrupted, &real[i]);
    }
    pthread_create(&thread, &small, nap, NULL);
    pthread_create(&thread, &small, nap, calls);
    pthread_create(&thread, &small, keep_asking, NULL);
}

static void report(void)
{
    for (int i = 0; i < CALLS; i++)
        if (calls[i].returns)
            printf("%s:%d:%ld:%d ", calls[i].name, calls[i].returns, calls[i].result, calls[i].error);
    printf("naps:%d:%d:%d\n", naps, short_naps, failed_naps);
}

static int child(void)
{
    char line[80];
    prepare();
    start_threads();
    printf("%d\n", getpid());
    while (fgets(line, sizeof line, stdin) && strcmp(line, "end\n")) {
        if (!strcmp(line, "report\n"))
            report();
        else if (!strcmp(line, "queued\n"))
            printf("%d %d\n", queued, disordered);
        else if (!strcmp(line, "answers\n"))
            printf("%ld %ld\n", answered, wrong_answers);
        else {
            for (int i = 0; i < REAL; i++)
                printf("%s:%d:%d:%d ", real[i].name, real[i].handled, real[i].interruptions, real[i].thread);
            printf("\n");
        }
    }
    kill(sleeper, SIGKILL);
    semctl(semaphores, 0, IPC_RMID);
    msgctl(queue, IPC_RMID, NULL);
    return 7;
}

/* --- the parent -------------------------------------------------------------------------------------------------- */

static volatile int children_signals;
static void on_child(int number) { (void)number, children_signals++; }

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    struct sigaction action = {.sa_handler = on_child, .sa_flags = SA_RESTART};
    sigaction(SIGCHLD, &action, NULL);
    pid_t pid = fork();
    if (!pid)
        _exit(child());
    int stops = 0, continuations = 0;
    for (;;) {
        siginfo_t info;
        if (waitid(P_PID, pid, &info, WSTOPPED | WCONTINUED | WEXITED))
            continue;
        if (info.si_code == CLD_EXITED || info.si_code == CLD_KILLED || info.si_code == CLD_DUMPED) {
            printf("%d %d %d %d\n", stops, continuations, children_signals, info.si_status);
            return 0;
        }
        stops += info.si_code == CLD_STOPPED || info.si_code == CLD_TRAPPED;
        continuations += info.si_code == CLD_CONTINUED;
    }
}
