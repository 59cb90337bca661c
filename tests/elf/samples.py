"""Objects and modules that compilers, linkers and tools make, for the readers."""

from __future__ import annotations

from pathlib import Path

from living import compile_text

TEXT = r"""
#include <stdio.h>
#include <string.h>
struct item { const char *name; int (*call)(int); };
static int total;
int exported = 4, zeroed[8];
static __thread int mine;
extern __thread int theirs;
static int helper(int n) { return n * 3 + total++; }
static const struct item items[2] = {{"left", helper}, {"right", NULL}};
const double factor = 2.75;
int work(int n)
{
    switch (n) {
    case 0: return helper(1);
    case 1: return puts("one");
    case 2: return exported;
    case 3: return mine++ + theirs;
    case 4: return (int)strlen(items[total & 1].name);
    case 5: return items[total & 1].call(n);
    default: return (int)(n * factor * 1.25);
    }
}
float widen(float *from) { for (int i = 0; i < 64; i++) from[i] = from[i] * 1.5f + 2; return from[3]; }
"""

FLAGS = {
    "gcc": ("gcc", "-O2"),
    "gcc-sections": ("gcc", "-O2", "-ffunction-sections", "-fdata-sections"),
    "gcc-debug": ("gcc", "-O1", "-g"),
    "gcc-fixed": ("gcc", "-O2", "-fno-pie", "-mcmodel=small", "-ffunction-sections"),
    "gcc-pic": ("gcc", "-O2", "-fPIC", "-fno-plt", "-ftls-model=initial-exec"),
    "clang": ("clang", "-O2"),
    "clang-debug": ("clang", "-O0", "-g", "-ffunction-sections", "-fdata-sections"),
    "clang-pic": ("clang", "-O2", "-fPIC", "-ftls-model=initial-exec", "-ffunction-sections"),
}


def sample(folder: Path, which: str) -> Path:
    compiler, *flags = FLAGS[which]
    return compile_text(TEXT, folder / f"{which}.o", *flags, compiler=compiler)
