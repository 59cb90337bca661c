/* Calls every function of entries.S with arguments that take each way through them. */
#include <stdio.h>

typedef unsigned long word;
typedef word function(word, word, word, void *, void *, word, void *);

struct entry { function *call; const char *name; };
extern struct entry __start_entries[], __stop_entries[];

static word stub(word a, word b, word c, void *d, void *e, word f, void *g)
{
    (void)b, (void)c, (void)d, (void)e, (void)f, (void)g;
    return (word)__builtin_return_address(0) + a;
}

void run(void)
{
    static const word values[] = {0, 1, 2, 5, 0x100000000, 0x7fffffffffffffff, 0x8000000000000000, -1ul};
    enum { N = sizeof values / sizeof *values };
    void *callee = (void *)stub, *cell = &callee;
    for (struct entry *e = __start_entries; e < __stop_entries; e++)
        for (int i = 0; i < N * N; i++) {
            word result = e->call(values[i % N], values[i / N], 9, callee, cell, 0, callee);
            printf("%s %lx %lx: %lx\n", e->name, values[i % N], values[i / N], result);
        }
}
