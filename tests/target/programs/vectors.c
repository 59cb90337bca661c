/* Spins on known values in vector, FPU and general registers and in the red zone; any change is counted.
   Its main thread computes too when ARGV[1] is given, so that the spinning thread is the leader. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <poll.h>
#include <sys/mman.h>

static volatile long rounds, faults;
double identity(double x) { return x; }

long answer(long a, long b, long c, long d, long e, long f) { return a + 2 * b + 3 * c + 4 * d + 5 * e + 6 * f; }
/* Changes all that a function may change, and needs an aligned stack. */
long trample(const char *text)
{
    long length = strlen(text);
    __asm__ volatile("sub $16, %%rsp; and $-16, %%rsp; movaps %%xmm0, (%%rsp); add $16, %%rsp" ::: "memory", "rax");
    __asm__ volatile("fldpi; fldpi; fstp %%st(0); fstp %%st(0); pcmpeqb %%xmm0, %%xmm0; pcmpeqb %%xmm7, %%xmm7;"
                     "vzeroall" ::: "xmm0", "xmm7", "memory");
    return length;
}
long crash(void) { *(volatile int *)8 = 1; return 0; }
long hang(void) { for (;;) {} return 0; }
static volatile long last_alignment;
long alignment(void) { last_alignment = (long)__builtin_frame_address(0) & 15; return last_alignment; }

/* Returns 0 when everything is as it was after about a thousand turns. */
extern long spin_checked(void);
__asm__(".text\n.globl spin_checked\nspin_checked:\n"
        "push %rbx\npush %r12\npush %r15\n"
        "mov $0x1122334455667788, %rbx\nmov $0x99aabbccddeeff00, %r12\nmov $0x0123456789abcdef, %r15\n"
        "vmovq %rbx, %xmm1\nvpbroadcastq %xmm1, %ymm1\nvmovq %r12, %xmm15\nvpbroadcastq %xmm15, %ymm15\n"
        "fld1\nfldpi\n"
        "mov %r15, -8(%rsp)\nmov %rbx, -64(%rsp)\nmov %r12, -128(%rsp)\n"
        "mov $1000, %ecx\n"
        "1: pause\ndec %ecx\njnz 1b\n"
        "xor %eax, %eax\n"
        "cmp %r15, -8(%rsp)\njne 2f\ncmp %rbx, -64(%rsp)\njne 2f\ncmp %r12, -128(%rsp)\njne 2f\n"
        "mov $0x1122334455667788, %rdx\ncmp %rdx, %rbx\njne 2f\n"
        "mov $0x99aabbccddeeff00, %rdx\ncmp %rdx, %r12\njne 2f\n"
        "vmovq %rbx, %xmm2\nvpbroadcastq %xmm2, %ymm2\nvpcmpeqq %ymm1, %ymm2, %ymm2\n"
        "vpmovmskb %ymm2, %edx\ncmp $-1, %edx\njne 2f\n"
        "vmovq %r12, %xmm2\nvpbroadcastq %xmm2, %ymm2\nvpcmpeqq %ymm15, %ymm2, %ymm2\n"
        "vpmovmskb %ymm2, %edx\ncmp $-1, %edx\njne 2f\n"
        "fldpi\nfcomip %st(1), %st\njne 2f\n"
        "jmp 3f\n"
        "2: mov $1, %eax\n"
        "3: fstp %st(0)\nfstp %st(0)\nvzeroupper\npop %r15\npop %r12\npop %rbx\nret\n");

int main(void)
{
    char line[64];
    printf("%p %p %p %p %p\n", (void *)answer, (void *)trample, (void *)crash, (void *)hang, (void *)alignment);
    fflush(stdout);
    for (;;) {
        struct pollfd in = {0, POLLIN, 0};
        faults += spin_checked();
        rounds++;
        if (rounds % 64 || poll(&in, 1, 0) != 1)
            continue;
        if (!fgets(line, sizeof line, stdin))
            return 0;
        printf("%ld %ld\n", rounds, faults);
        fflush(stdout);
    }
}
