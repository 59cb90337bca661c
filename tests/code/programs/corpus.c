/* Computes many kinds of things, mostly by the C library, and prints them. */
#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef unsigned long word;
static word state = 88172645463325252ul;
static int hits;
static jmp_buf again;

static __attribute__((noinline)) word next(void)
{
    state ^= state << 13, state ^= state >> 7;
    return state ^= state << 17;
}

static int by_value(const void *a, const void *b)
{
    word x = *(const word *)a, y = *(const word *)b;
    return x < y ? -1 : x > y;
}

static __attribute__((noinline)) word hash(const char *text)
{
    word h = 5381;
    while (*text)
        h = h * 33 ^ (unsigned char)*text++;
    return h;
}

static __attribute__((noinline)) int ackermann(int m, int n)
{
    hits++;
    return m == 0 ? n + 1 : n == 0 ? ackermann(m - 1, 1) : ackermann(m - 1, ackermann(m, n - 1));
}

static __attribute__((noinline)) const char *day(int n)
{
    switch (n) {
    case 0: return "sunday";
    case 1: return "monday";
    case 2: return "tuesday";
    case 3: return "wednesday";
    case 4: return "thursday";
    case 5: return strerror(EINTR);
    default: return "?";
    }
}

static __attribute__((noinline)) double series(double x, int n)
{
    double sum = 0;
    for (int i = 1; i <= n; i++)
        sum += pow(x, i) / tgamma(i + 1) - sin(x * i) * 0.5 + floor(x * i);
    return sum;
}

static __attribute__((noinline)) long sum(int n, ...)
{
    va_list list;
    long total = 0;
    va_start(list, n);
    while (n-- > 0)
        total += va_arg(list, long);
    va_end(list);
    return total;
}

static void on_signal(int number) { hits += number; }
static __attribute__((noinline)) void leap(int n) { if (n > 3) longjmp(again, n); leap(n + 1); }
static __attribute__((noinline)) int nothing(void) { return 0; }
static __attribute__((noinline)) int find(const char *p, char c) { int n = 0; while (*p++ != c) n++; return n; }

static int run_bytes(const unsigned char *p)
{
    int acc = 0;
    for (;;)
        switch (*p++) {
        case 0: return acc;
        case 1: acc++; break;
        case 2: acc *= 3; break;
        case 3: acc -= 7; break;
        case 4: acc ^= 0x55; break;
        case 5: p++; break;
        default: break;
        }
}

void run(void)
{
    static const unsigned char program[] = {1, 2, 1, 2, 9, 4, 5, 3, 3, 2, 0};
    char text[256], *rest;
    word *numbers = malloc(1000 * sizeof *numbers);
    for (int i = 0; i < 1000; i++)
        numbers[i] = next();
    qsort(numbers, 1000, sizeof *numbers, by_value);
    for (int i = 0; i < 1000; i += 99)
        printf("%d %lx\n", i, numbers[i]);
    numbers = realloc(numbers, 100000);
    free(numbers);
    printf("%d %d %d\n", ackermann(2, 5), hits, nothing());
    for (int i = 0; i < 7; i++)
        printf("%s %lu\n", day(i), hash(day(i)));
    for (int i = 0; i < 5; i++)
        printf("%.12g %a %e\n", series(0.7 * i, 12), sqrt(i + 0.5), exp(-i) * log(i + 1));
    snprintf(text, sizeof text, "%-10s|%05d|%+.3f|%#x|%c|%p", "left", 42, 3.14159, 0xbeef, 'z', (void *)0x1234);
    puts(text);
    long whole = strtol("-0x7fz", &rest, 16);
    printf("%ld %g %d %d\n", whole, strtod("2.5e-3x", NULL), *rest, find(text, 'z'));
    for (char *word = strtok(text, "|"); word; word = strtok(NULL, "|"))
        printf("[%s] %zu %d\n", word, strlen(word), isalpha((unsigned char)*word) != 0);
    memset(text, 'x', 200), memmove(text + 3, text, 100), memcpy(text + 50, "middle", 6), text[120] = 0;
    printf("%s %s %d %d\n", text, strstr(text, "ddl"), strcmp(text, "xy"), memcmp(text, text + 1, 40));
    printf("%ld %d\n", sum(4, 1l, 2l, 3l, 4l), run_bytes(program));
    signal(SIGUSR1, on_signal), raise(SIGUSR1);
    int came = setjmp(again);
    if (came == 0)
        leap(0);
    time_t when = 1000000000;
    struct tm *broken = gmtime(&when);
    strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S %a", broken);
    printf("%d %d %s %s\n", came, hits, text, getenv("NO_SUCH_VARIABLE") ? "set" : "unset");
    unsigned a, b;
    int scanned = sscanf("12 0x1f", "%u %x", &a, &b);
    printf("%d %u %u\n", scanned, a, b);
    div_t parts = div(-17, 5);
    printf("%d %d %ld\n", parts.quot, parts.rem, labs(-5) + (long)getpagesize());
}
