/* What the functions of the web use: how they tell which version they are, and how their callers hold them to it. */
#pragma once

#define FUNCTIONS 200
#define DEPTH 32

typedef unsigned u32;
typedef unsigned long u64;

/* The calls of one visit to the web, one inside the other. */
struct visit {
    u32 fuel;              /* calls that it may still make */
    u32 depth;
    u32 began_as[DEPTH];   /* the version of which each function said to be at its beginning */
    u64 random;
    int lingers;           /* may sleep inside of a function */
};

/* The epoch from which on a call that begins now is answered. Taken before the call. */
u64 epoch(void);
void entered(struct visit *v, u32 version);
int goes_on(struct visit *v);
u32 number_in(const char *text);
void checked(struct visit *v, u32 function, u32 x, u64 since, u64 answer);

/* What a version of a function answers to x: the version in the upper half, and a number that comes of it. */
static inline u64 answered(u32 function, u32 version, u32 x)
{
    return (u64)version << 32 | (u32)(x * 31 + function * 7 + version * 2654435761u);
}

#define CALL(v, function, x)                                      \
    do {                                                          \
        u64 since_ = epoch();                                     \
        checked(v, function, x, since_, f##function(v, x));       \
    } while (0)
