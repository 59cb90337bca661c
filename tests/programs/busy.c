/* Allocates, frees and prints all the time, in ARGV[1] further threads and, with 0 or with ARGV[2], in the first one.
   Checks all of it.
   Answers each line with the number of rounds and of faults; ends with its input, 0 if there was no fault. */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static volatile int stop;
static volatile long rounds, faults;
enum { BLOCKS = 64 };

struct state { unsigned random; unsigned char *blocks[BLOCKS]; size_t sizes[BLOCKS]; FILE *out; long lines; };

static void turn(struct state *s)
{
    s->random = s->random * 1103515245 + 12345;
    int i = (s->random >> 16) % BLOCKS;
    for (size_t k = 0; s->blocks[i] && k < s->sizes[i]; k++)
        faults += s->blocks[i][k] != (unsigned char)i;
    free(s->blocks[i]);
    s->sizes[i] = (s->random >> 8) & 255;
    s->blocks[i] = malloc(s->sizes[i]);
    memset(s->blocks[i], i, s->sizes[i]);
    fprintf(s->out, "line %ld\n", s->lines++);
    if (s->lines % 4096 == 0) {
        long n = 0, found;
        rewind(s->out);
        while (fscanf(s->out, "line %ld\n", &found) == 1)
            faults += found != n++;
        faults += n != s->lines;
        rewind(s->out);
        faults += ftruncate(fileno(s->out), 0) != 0;
        s->lines = 0;
    }
    rounds++;
}

static void *work(void *argument)
{
    struct state s = {.random = (unsigned)(size_t)argument, .out = tmpfile()};
    while (!stop)
        turn(&s);
    return 0;
}

static int answered(int timeout)
{
    char text[64];
    struct pollfd in = {0, POLLIN, 0};
    if (poll(&in, 1, timeout) != 1)
        return 1;
    if (read(0, text, sizeof text) <= 0)
        return 0;
    dprintf(1, "%ld %ld\n", rounds, faults);
    return 1;
}

int main(int count, char **arguments)
{
    int threads = count > 1 ? atoi(arguments[1]) : 0;
    int idle = threads && count < 3;
    pthread_t ids[16];
    for (int i = 0; i < threads; i++)
        pthread_create(&ids[i], 0, work, (void *)(size_t)(i + 1));
    struct state s = {.random = 7, .out = tmpfile()};
    if (write(1, "r", 1) != 1)
        return 1;
    while (answered(idle ? -1 : 0)) {
        errno = 77;
        if (!idle)
            turn(&s);
        faults += errno != 77 && errno != 0;
    }
    stop = 1;
    for (int i = 0; i < threads; i++)
        pthread_join(ids[i], 0);
    return faults != 0;
}
