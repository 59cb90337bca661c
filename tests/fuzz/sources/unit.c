/* A little of everything that C compilers make. PREFIX keeps the variants of it apart, EDIT is the change. */
#include <stdio.h>
#include <string.h>

#define JOIN(a, b) a##b
#define NAME(a, b) JOIN(a, b)
#define N(x) NAME(PREFIX, _##x)

enum shade { DARK, LIGHT = 5 };
struct inner {
    char flag : 3;
    unsigned rest : 5;
    double weight;
};
struct item {
    const char *name;
    int (*call)(int);
    struct inner inner[2];
    enum shade shade;
    union {
        long number;
        struct item *next;
    };
};
typedef struct item item_t;

static int total;
int N(exported) = 4, N(zeroed)[8];
int N(common);
static __thread int mine = 3;
__thread int N(thread_number) = 8;
extern __thread int shared_number;
extern int __attribute__((weak)) N(nowhere)(int);

static __attribute__((noinline)) int helper(int n)
{
    static int calls;
    return n * 3 + total++ + ++calls;
}

static item_t items[2] = {{"left", helper, {{1, 2, 0.5}}, DARK, {4}}, {"right", NULL, {{0}}, LIGHT, {0}}};
static const char *const words[] = {"zero", "one", "two"};
const double N(factor) = 2.75;

#ifdef EDIT
int N(born)[3] = {1, 2, 3};
static int also_born;
__attribute__((noinline)) int N(added)(int n)
{
    return n + N(born)[n & 1] + also_born++;
}
#endif

int N(work)(int n)
{
    switch (n) {
    case 0:
        return helper(1);
    case 1:
        return (int)strlen(words[n]);
    case 2:
        return N(exported);
    case 3:
        return mine++ + shared_number + N(thread_number);
    case 4:
        return (int)strlen(items[total & 1].name);
    case 5:
        return items[0].call(n);
    case 6:
        return N(nowhere) ? N(nowhere)(n) : N(common);
#ifdef EDIT
    case 7:
        return N(added)(n) + snprintf(NULL, 0, "edited %d", n);
#endif
    default:
        return (int)(n * N(factor) * 1.25);
    }
}

void N(widen)(float *from)
{
#ifdef EDIT
    from[0] = 3.5f;
#endif
    for (int i = 0; i < 8; i++)
        from[i] = from[i] * 1.5f + 2;
}

int N(compare)(const void *a, const void *b)
{
    const item_t *left = a, *right = b;
    if (!left->name || !right->name) {
        fputs("no name\n", stderr);
        return 0;
    }
    return strcmp(left->name, right->name);
}
