/* Local functions that call, tail-call, jump to and take the address of one another: no relocations among them. */
#include <stdio.h>

#define LOCAL static __attribute__((noinline))

/* Not static: the moved functions find them by name. */
long trace, apart;
const long weights[] = {3, 1, 4, 1, 5, 9, 2, 6};
long *volatile shared = &trace;
int counter;
const char line[] = "%ld %ld %ld\n", end[] = "%lx %d\n";

LOCAL long weigh(long n) { trace = trace * 31 + n; return weights[n & 7] + n; }
LOCAL long twice(long n) { return weigh(n * 2); }
LOCAL long odd(long n);
LOCAL long even(long n) { counter++; return n == 0 ? 1 : odd(n - 1); }
LOCAL long odd(long n) { return n == 0 ? 0 : even(n - 1); }
LOCAL long choose(long n) { if (n > 5) return twice(n); if (n > 3) return weigh(n); return even(n); }
LOCAL long apply(long (*f)(long), long n) { apart = 5; return f(n) + *shared % 7 + apart; }
LOCAL long pick(long n) { return apply(n & 1 ? twice : choose, n); }
LOCAL long last(long n) { return n < 2 ? choose(n) : n < 4 ? pick(n + 1) : weigh(n - 1) + pick(n); }

void run(void)
{
    for (long n = 0; n < 12; n++)
        printf(line, last(n), pick(n), choose(n) + odd(n));
    printf(end, (unsigned long)trace, counter);
}
