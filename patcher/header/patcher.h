/*
 * patcher.h: what a program can know of the patcher that changes its code while it runs.
 *
 * Nothing has to be linked, and a program that is never patched pays for nothing but the state below. For C99, C++11
 * and later, gcc and clang. `patcher header` prints this file.
 */
#ifndef PATCHER_H
#define PATCHER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/*
 * Hooks. A program may define either, both or none; they are found by name and called with every change, on a thread
 * of the program that holds no lock of the C library, while the other threads run on. What the program locks by itself
 * is its own affair: a hook that waits for a lock of the thread that it was called on waits in vain, until its time is
 * over. Signals are blocked for that thread meanwhile, and for threads that a hook creates.
 *
 * patcher_before: the old code still runs. If it crashes or does not return in time, the change is not made.
 * patcher_after: the new code runs. If it fails the change stays, and a warning says so. It is called with
 * PATCHER_CANCEL when a change was not made after all for which patcher_before was called.
 */
enum patcher_action {
    PATCHER_APPLY = 1,
    PATCHER_REVERT = 2,
    PATCHER_CANCEL = 3
};

/* Something that a change is about. Outcomes of functions: changed, added, relinked, reverted; of variables: added,
   found, moved, kept, reinitialised, migrated, rewritten, stale. */
struct patcher_name {
    const char *name;
    const char *file; /* the source file, without its directory */
    const char *outcome;
};

/* A change. It and what it leads to are gone when the hook returns. */
struct patcher_event {
    uint32_t size;       /* of this structure as the patcher knows it: what lies beyond is not there */
    uint32_t action;     /* enum patcher_action */
    uint64_t generation; /* that is to be live, or is now; 0: the program as it was started */
    uint64_t previous;   /* that was live before; with PATCHER_CANCEL the one that still is */
    uint64_t function_count;
    const struct patcher_name *functions;
    uint64_t variable_count;
    const struct patcher_name *variables;
};

void patcher_before(const struct patcher_event *event);
void patcher_after(const struct patcher_event *event);

/*
 * What is live. The patcher keeps `patcher_state` of every module that has one up to date; its number changes in the
 * same instant as the code does. Tables are never changed, and stay for as long as a word of the process's memory, or a
 * register, points to one, or into it; so do the names in them.
 */
struct patcher_symbol {
    const char *name;
    const char *file;
    const void *address; /* of the code that runs now, or of the variable */
    size_t size;
};

struct patcher_table {
    const struct patcher_table *previous;
    uint64_t generation;
    uint64_t count;
    const struct patcher_symbol *symbols;
};

struct patcher_state {
    uint64_t magic;
    uint32_t version;
    uint32_t size;
    const uint64_t *live;
    const struct patcher_table *newest;
};

#define PATCHER_MAGIC UINT64_C(0x6574617473746170) /* "patstate" */
#define PATCHER_VERSION 1

extern struct patcher_state patcher_state;
__attribute__((weak)) struct patcher_state patcher_state = {
    PATCHER_MAGIC, PATCHER_VERSION, (uint32_t)sizeof(struct patcher_state), NULL, NULL
};

/* The number of the generation that is live; 0: the program as it was started. */
static inline uint64_t patcher_generation(void)
{
    const uint64_t *live = __atomic_load_n(&patcher_state.live, __ATOMIC_ACQUIRE);
    return live ? __atomic_load_n(live, __ATOMIC_ACQUIRE) : 0;
}

/* Everything about the live generation, as of one instant; NULL for the program as it was started. */
static inline const struct patcher_table *patcher_live(void)
{
    for (;;) {
        uint64_t generation = patcher_generation();
        const struct patcher_table *table = __atomic_load_n(&patcher_state.newest, __ATOMIC_ACQUIRE);
        if (!generation)
            return NULL;
        while (table && table->generation != generation)
            table = table->previous;
        if (table || generation == patcher_generation()) /* which may be forgotten by now */
            return table;
    }
}

/* The functions that the live generation has other than the program as it was started, and the variables and constants
   that it has beside it. `count` may not be NULL. */
static inline const struct patcher_symbol *patcher_symbols(size_t *count)
{
    const struct patcher_table *table = patcher_live();
    *count = table ? (size_t)table->count : 0;
    return table ? table->symbols : NULL;
}

/*
 * Migration. A variable whose layout changes gets new storage, initialised as its definition says, and is filled by a
 * function of the new source, before any new code runs and while nothing else does:
 *
 *     void patcher_migrate_NAME(void *new_object, const void *old_object);
 *
 * NAME is the variable's own, or that of its type (struct tag or typedef), for every variable of that type and every
 * element of arrays of it. Such functions must not wait for anything. They may be static if they are marked used.
 */

#ifdef __cplusplus
}
#endif

#endif
