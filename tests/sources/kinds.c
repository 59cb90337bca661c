/* Functions of many kinds: each refers to the rest of the program in another way. */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct pair {
    long left, right;
};

extern int shared;
extern __thread int outer_thread;
extern int outside(int);
extern void maybe(void) __attribute__((weak));
extern void wait_for_end(void);
extern const int lookup[8];
extern const float factors[8];

int counter = 3;
static int hits;
static long totals[16];
__thread int per_thread = 5;
static __thread long private_thread;
static const int primes[8] = {2, 3, 5, 7, 11, 13, 17, 19};
static const char *const names[4] = {"zero", "one", "two", "three"};

int plain(int a, int b) { return a * 3 + b * 7 - 11; }

int loops(const char *text)
{
    int sum = 0;
    while (*text)
        sum = sum * 31 + *text++;
    return sum;
}

int switches(int n)
{
    switch (n) {
    case 0: return outside(4);
    case 1: return counter;
    case 2: return plain(n, hits);
    case 3: return -9;
    case 4: return shared;
    case 5: return (int)strlen("five");
    case 6: return loops("six");
    default: return 0;
    }
}

const char *strings(int n)
{
    if (n == 1)
        return "first text";
    return n == 2 ? "second text, somewhat longer" : "text";
}

double floats(double x) { return x * 1.5 + 0.3333333; }

void vectors(float *out)
{
    for (int i = 0; i < 8; i++)
        out[i] = out[i] * factors[i] + 0.25f;
}

int tables(int n) { return primes[n & 7] + lookup[n & 7]; }

const char *named(int n) { return names[n & 3]; }

int thread_locals(void)
{
    private_thread += per_thread++;
    return outer_thread + (int)private_thread + errno;
}

static int less(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }

void pointers(int *items, int n) { qsort(items, n, sizeof *items, less); }

static int (*const operations[3])(int, int) = {plain, NULL, plain};

int through_table(int n) { return operations[n & 1] ? operations[n & 1](n, 2) : 0; }

void prints(const char *what, int n)
{
    if (printf("%s: %d\n", what, n) < 0)
        puts("failed");
    fputs("done\n", stderr);
}

int variadic(int n, ...)
{
    va_list list;
    int sum = 0;
    va_start(list, n);
    while (n--)
        sum += va_arg(list, int);
    va_end(list);
    return sum;
}

struct pair copies(const struct pair *from)
{
    struct pair to = *from;
    to.left += totals[3];
    return to;
}

int counts_one(void)
{
    static int n;
    return ++n;
}

int counts_two(void)
{
    static int n = 10;
    return n += 2;
}

int tail(int n) { return outside(n + 1); }

int weakly(void)
{
    if (maybe)
        maybe();
    return maybe != 0;
}

int computed(const unsigned char *code)
{
    static const void *const labels[] = {&&add, &&twice, &&stop};
    int sum = 0;
    goto *labels[*code];
add:
    sum += 1;
    goto *labels[*++code];
twice:
    sum *= 2;
    goto *labels[*++code];
stop:
    return sum;
}

int checked(int n)
{
    hits++;
    if (__builtin_expect(n < 0, 0)) {
        fprintf(stderr, "negative: %d\n", n);
        abort();
    }
    return n;
}

void writes(void)
{
    shared = 12;
    counter += 5;
    hits = -1;
    totals[2] += shared;
}

__attribute__((noinline)) long recursive(long n, long m) { return n ? recursive(m % n, n) + 1 : m; }

__attribute__((weak)) int alias_of(int n) { return n ^ 0x55; }
int alias(int n) __attribute__((alias("alias_of")));

int main(int argc, char **argv)
{
    (void)argv;
    if (argc == 100)
        return switches(argc) + tables(argc) + through_table(argc) + alias(argc) + weakly();
    wait_for_end();
    return 0;
}
