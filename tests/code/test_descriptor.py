"""The function behind thread-local descriptors, run by a real program: it finds, and every register is kept."""

from __future__ import annotations

import subprocess
from pathlib import Path

from patcher.code.descriptor import FIND_THROUGH_DESCRIPTOR

PROGRAM = r"""
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
struct index { unsigned long module, offset; void *(*find)(struct index *); };
struct descriptor { void *function; struct index *index; };
struct state { unsigned long general[15]; unsigned char vectors[16][16]; };
static struct state before, after;
static unsigned long answer;
static char storage[64];
static int aligned;
__attribute__((noinline)) static void *find(struct index *index)
{
    char local[16] __attribute__((aligned(16)));
    aligned = (unsigned long)local % 16 == 0;
    __asm__ volatile("pxor %%xmm0, %%xmm0; pxor %%xmm7, %%xmm7; pxor %%xmm15, %%xmm15; movdqu %%xmm0, %0;"
                     "mov $-1, %%rcx; mov %%rcx, %%rdx; mov %%rcx, %%rsi; mov %%rcx, %%r8; mov %%rcx, %%r9;"
                     "mov %%rcx, %%r10; mov %%rcx, %%r11"
                     : "=m"(local) : : "rcx", "rdx", "rsi", "r8", "r9", "r10", "r11", "xmm0", "xmm7", "xmm15");
    return storage + index->offset + (index->module == 7 ? 0 : 1000);
}
void call(struct descriptor *, struct state *, struct state *);
__asm__("call:\n push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n push %rdx\n mov %rdi, %rax\n"
        " mov 8(%rsi), %rbx\n mov 16(%rsi), %rcx\n mov 24(%rsi), %rdx\n mov 32(%rsi), %rdi\n mov 40(%rsi), %rbp\n"
        " mov 48(%rsi), %r8\n mov 56(%rsi), %r9\n mov 64(%rsi), %r10\n mov 72(%rsi), %r11\n mov 80(%rsi), %r12\n"
        " mov 88(%rsi), %r13\n mov 96(%rsi), %r14\n mov 104(%rsi), %r15\n"
        " movdqu 120(%rsi), %xmm0\n movdqu 232(%rsi), %xmm7\n movdqu 360(%rsi), %xmm15\n mov 112(%rsi), %rsi\n"
        " call *(%rax)\n"
        " push %rsi\n mov 8(%rsp), %rsi\n mov %rax, (%rsi)\n mov %rbx, 8(%rsi)\n mov %rcx, 16(%rsi)\n"
        " mov %rdx, 24(%rsi)\n mov %rdi, 32(%rsi)\n mov %rbp, 40(%rsi)\n mov %r8, 48(%rsi)\n mov %r9, 56(%rsi)\n"
        " mov %r10, 64(%rsi)\n mov %r11, 72(%rsi)\n mov %r12, 80(%rsi)\n mov %r13, 88(%rsi)\n mov %r14, 96(%rsi)\n"
        " mov %r15, 104(%rsi)\n pop 112(%rsi)\n movdqu %xmm0, 120(%rsi)\n movdqu %xmm7, 232(%rsi)\n"
        " movdqu %xmm15, 360(%rsi)\n pop %rdx\n pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n"
        " ret\n");
int main(void)
{
    static unsigned char code[4096];
    unsigned char *memory = mmap(0, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(memory, code, fread(code, 1, sizeof code, stdin));
    struct index index = {7, 24, find};
    struct descriptor descriptor = {memory, &index};
    memset(&before, 0, sizeof before);
    for (int i = 1; i < 15; i++) before.general[i] = 0x1111111111111111ul * i;
    for (int i = 0; i < 16; i += i == 7 ? 8 : 7) memset(before.vectors[i], 0xA0 + i, 16);
    call(&descriptor, &before, &after);
    unsigned long pointer;
    __asm__("mov %%fs:0, %0" : "=r"(pointer));
    answer = after.general[0] + pointer;
    after.general[0] = 0;
    printf("%d %d %d\n", answer == (unsigned long)storage + 24, !memcmp(&before, &after, sizeof before), aligned);
}
"""


def test_it_finds_the_variable_and_keeps_every_register(tmp_path: Path) -> None:
    (tmp_path / "program.c").write_text(PROGRAM)
    program = tmp_path / "program"
    subprocess.run(["gcc", "-O1", "-o", program, tmp_path / "program.c"], check=True)
    found = subprocess.run([program], input=FIND_THROUGH_DESCRIPTOR, capture_output=True, check=True)
    assert found.stdout == b"1 1 1\n"
