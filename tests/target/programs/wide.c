/* Spins on known values in all 512-bit and mask registers, with unusual floating-point modes; any change is counted.
   Says where a function is that changes all of it. */
#include <immintrin.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static volatile long rounds, faults;
static unsigned char expected[32 * 64] __attribute__((aligned(64))), found[32 * 64] __attribute__((aligned(64)));
static unsigned long masks[8], found_masks[8];

/* 0 when the modes are those that the ABI wants at a call. */
long trample(void)
{
    unsigned short control;
    __asm__ volatile("fnstcw %0" : "=m"(control));
    long strange = (_mm_getcsr() & ~0x3f) != 0x1f80 || control != 0x37f;
    __asm__ volatile("fninit; fldpi; kxnorq %%k0, %%k0, %%k1; kmovq %%k1, %%k7; vpternlogd $255, %%zmm0, %%zmm0, %%zmm0;"
                     "vmovdqa64 %%zmm0, %%zmm15; vmovdqa64 %%zmm0, %%zmm16; vmovdqa64 %%zmm0, %%zmm31; fninit"
                     ::: "xmm0", "xmm15", "k1", "k7");
    return strange;
}

#define EACH(x) x(0) x(1) x(2) x(3) x(4) x(5) x(6) x(7) x(8) x(9) x(10) x(11) x(12) x(13) x(14) x(15) x(16) x(17) x(18) \
    x(19) x(20) x(21) x(22) x(23) x(24) x(25) x(26) x(27) x(28) x(29) x(30) x(31)
#define LOAD(n) "vmovdqa64 " #n "*64(%[from]), %%zmm" #n "\n"
#define SAVE(n) "vmovdqa64 %%zmm" #n ", " #n "*64(%[to])\n"
#define EACH_MASK(x) x(0) x(1) x(2) x(3) x(4) x(5) x(6) x(7)
#define LOAD_MASK(n) "kmovq " #n "*8(%[masks]), %%k" #n "\n"
#define SAVE_MASK(n) "kmovq %%k" #n ", " #n "*8(%[found_masks])\n"

static void check(void)
{
    unsigned mode = 0xffc0, got;              /* everything masked, towards zero, denormals flushed */
    unsigned short control = 0xc7f, got_control; /* towards zero, single... extended precision bits as they are */
    __asm__ volatile("fninit\nfldcw %[control]\nldmxcsr %[mode]\n" EACH(LOAD) EACH_MASK(LOAD_MASK)
                     "mov $3000, %%ecx\n1: pause\ndec %%ecx\njnz 1b\n" EACH(SAVE) EACH_MASK(SAVE_MASK)
                     "stmxcsr %[got]\nfnstcw %[got_control]\nfninit\nvzeroall\n"
                     : [got] "=m"(got), [got_control] "=m"(got_control)
                     : [from] "r"(expected), [to] "r"(found), [masks] "r"(masks), [found_masks] "r"(found_masks),
                       [mode] "m"(mode), [control] "m"(control)
                     : "ecx", "memory", "cc");
    _mm_setcsr(0x1f80);
    rounds++;
    faults += memcmp(expected, found, sizeof found) || memcmp(masks, found_masks, sizeof masks) || got != mode ||
              got_control != control;
}

int main(void)
{
    char line[64];
    for (unsigned i = 0; i < sizeof expected; i++)
        expected[i] = 7 * i + i / 64;
    for (int i = 0; i < 8; i++)
        masks[i] = 0x0123456789abcdefUL * (2 * i + 1);
    printf("%p\n", (void *)trample);
    fflush(stdout);
    for (;;) {
        struct pollfd in = {0, POLLIN, 0};
        check();
        if (rounds % 16 || poll(&in, 1, 0) != 1)
            continue;
        if (!fgets(line, sizeof line, stdin))
            return faults != 0;
        printf("%ld %ld\n", rounds, faults);
        fflush(stdout);
    }
}
