"""One process that starts all patchers that come to harm, and the programs they come to harm on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import patcher
from crash.scene import Case, Mortals, Scene, unit

HEADER = Path(patcher.__file__).parent / "header"
NEW_IFUNC = """\
#include <string.h>
static const char *volatile text = "12";
#define STEP ((int)strlen(text))
"""
NEW_CONSTRUCTOR = """\
static int base;
__attribute__((constructor)) static void start(void)
{
    base = 2;
}
#define STEP base
"""
# One that is in the middle of its work for so long that whoever gives up meanwhile has long taken its memory away.
SLOW_CONSTRUCTOR = """\
#include <unistd.h>
static int base;
__attribute__((constructor)) static void start(void)
{
    for (int i = 0; i < 20; i++)
        usleep(2000);
    base = 2;
}
#define STEP base
"""
NEW_LIBRARY = """\
double cbrt(double);
static volatile double eight = 8;
#define STEP ((int)(cbrt(eight) + 0.5))
"""
ADDED = {
    "with an IFUNC": NEW_IFUNC,
    "with a constructor": NEW_CONSTRUCTOR,
    "with a slow constructor": SLOW_CONSTRUCTOR,
    "with a library": NEW_LIBRARY,
}
# Programs that read what they are made of, in tables of all four functions, or are told of changes.
FLAGS = {
    "with tables": ("-DTABLES=4", f"-I{HEADER}"),
    "with hooks": ("-DHOOKS", f"-I{HEADER}"),
}
# A function that jumps back to its entry, so that it changes only while nobody is in it.
QUIET = """\
#define TEXT(x) #x
#define VALUE(x) TEXT(x)
int quiet(int n);
__asm__(".text\\n.p2align 4\\n.globl quiet\\n.type quiet, @function\\nquiet:\\n"
        "subl $1, %edi\\nnop\\nnop\\nnop\\ntestl %edi, %edi\\n"
        "jns quiet\\n"
        "movl $" VALUE(STEP) ", %eax\\n"
        "ret\\n.size quiet, .-quiet\\n");
"""
# Functions of a program whose entries lie across the border of two pages, with one to four bytes before it.
ACROSS = """\
#define TEXT(x) #x
#define VALUE(x) TEXT(x)
#if STEP == 1
#define PLACE(before) ".p2align 12\\n.skip 4096 - " #before ", 0x90\\n"
#else
#define PLACE(before) ".p2align 4\\n"
#endif
#define ACROSS(before) int across##before(int n); \\
    __asm__(".text\\n" PLACE(before) ".globl across" #before "\\n.type across" #before ", @function\\n" \\
            "across" #before ":\\npushq %rbx\\nmovl %edi, %ebx\\nmovl $" VALUE(STEP) ", %eax\\n" \\
            ".rept 4\\naddl %ebx, %eax\\nsubl %ebx, %eax\\n.endr\\naddl %ebx, %eax\\npopq %rbx\\nret\\n" \\
            ".size across" #before ", . - across" #before "\\n");
ACROSS(1)
ACROSS(2)
ACROSS(3)
ACROSS(4)
"""


@pytest.fixture(scope="session")
def mortals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mortals]:
    found = Mortals(tmp_path_factory.mktemp("meddler"))
    yield found
    found.close()


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Make a case by its name, on a program of its own."""
    made: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in made:
            made[name] = _case(name, tmp_path_factory.mktemp("scene"))
        return made[name]

    return make


def _case(name: str, root: Path) -> Case:
    kind, _, of = name.partition(" ")
    many = of == "of many functions"
    # More slots than there are on a page, which holds 512.
    units = {"a": unit("a", 520), "b": unit("b", 4)} if many else {"a": unit("a"), "b": unit("b", 3)}
    if of == "of many quiet functions":
        units = {"a": unit("a", 520, more=QUIET, asked=["quiet"]), "b": unit("b", 2)}
    if of == "across pages":
        units = {"a": unit("a", more=ACROSS, asked=[f"across{n}" for n in range(1, 5)]), "b": unit("b", 3)}
    shared = ("b.c",) if of == "in two modules" else ()
    scene = Scene(root, units, shared=shared, compile_flags=FLAGS.get(of, ()))
    options = {"force": True, **({"libraries": ["m"]} if of == "with a library" else {})}
    text = ADDED.get(of)
    first = scene.redefined(text) if text else scene.change(2)
    if kind == "first":
        made = Case(scene, [], first, options=options, steps={0: "1", 1: "2"}, final=scene.change(9))
        return replace(made, constructs=of.endswith("constructor"))
    if kind == "later":
        steps = {0: "1", 1: "2", 2: "3"}
        return Case(scene, [first], scene.change(3), options=options, steps=steps, final=scene.change(9))
    earlier = [first, scene.change(3)]
    return Case(scene, earlier, [], int(kind == "back"), options=options, steps={0: "1", 1: "2", 2: "3"})
