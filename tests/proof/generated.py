"""Random C programs for linking and for being patched while they run: several units, one checksum line a round.

A program is a function of its seed. Every operation is unsigned, every shift, index and loop is bounded, and a supply
of `fuel` bounds all calls, so that nothing is undefined and everything ends. What random expressions do not bring is in
the shapes below: jump tables, computed gotos, string pools, tables with relocations, thread-locals, aliases, weak and
hidden names, callbacks from the C library, constructors, cold paths, structures by value, varargs, floating constants.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

HEADER = """\
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <wchar.h>
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef u32 (*function)(u32, u32);
struct pair { u32 a, b; };
struct wide { u64 a[4]; u32 b; };
struct entry { const char *name; function call; const u32 *number; };
struct bits { u32 a : 3, b : 13, c : 16; };
extern u32 fuel;
extern __thread u32 depth;
static inline u32 turn(u32 x, u32 n) { return x << (n & 15) | x >> (31 - (n & 15)); }
static inline u32 text_sum(const char *text) { u32 s = 7; while (*text) s = s * 33 + (u8)*text++; return s; }
static __attribute__((noinline, unused)) u32 mix(u32 a, u32 b) { return turn(a * 2654435761u ^ b, b) + (a >> 3); }
u32 sum_of(int count, ...);
"""
MAIN = """\
#include "program.h"
#include <pthread.h>
u32 fuel;
__thread u32 depth = 5;
u32 sum_of(int count, ...)
{
    va_list list;
    u32 s = 1;
    va_start(list, count);
    for (int i = 0; i < count; i++)
        s = s * 31 + va_arg(list, u32);
    va_end(list);
    return s;
}
static u32 answers[%(count)d];
static void work(u32 x)
{
%(calls)s
}
static void *in_thread(void *x) { work(*(u32 *)x); return NULL; }
static __attribute__((noinline)) void round_of(u32 x)
{
    pthread_t thread;
    if (x %% 3 || pthread_create(&thread, NULL, in_thread, &x))
        work(x);
    else
        pthread_join(thread, NULL);
}
static __attribute__((noinline)) void answer(const char *line)
{
    round_of((u32)strtoul(line, NULL, 10));
    for (int i = 0; i < %(count)d; i++)
        printf("%%08x ", answers[i]);
    puts("");
    fflush(stdout);
}
int main(void)
{
    char line[80];
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin))
        answer(line);
    return 0;
}
"""
_OPERATORS = ("+", "-", "*", "^", "&", "|")
_WORDS = ("north", "northern", "ern", "a longer text with words", "%u:%s", "", "x", "the same text everywhere", "tail")


@dataclass(frozen=True, slots=True)
class Program:
    """The files of one program, by name; `main.c` among them."""

    seed: int
    files: dict[str, str]

    @property
    def units(self) -> tuple[str, ...]:
        return tuple(name for name in self.files if name.endswith(".c"))


@dataclass(frozen=True, slots=True)
class _Variable:
    name: str
    unit: int
    size: int  # elements; 0: no array
    static: bool
    constant: bool = False

    def at(self, index: str) -> str:
        return f"(u32){self.name}[({index}) & {self.size - 1}]" if self.size else f"(u32){self.name}"


@dataclass(frozen=True, slots=True)
class _Function:
    name: str
    unit: int
    static: bool


class _Unit:
    """The text of one unit while it is made."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.declarations: list[str] = []
        self.data: list[str] = []
        self.functions: list[str] = []

    def text(self) -> str:
        parts = ['#include "program.h"', *self.declarations, *self.data, *self.functions]
        return "\n".join(parts) + "\n"


class _Maker:
    def __init__(self, seed: int, units: int, functions: int, tails: bool) -> None:
        self.random = Random(seed)
        self.tails = tails
        self.seed = seed
        self.units = [_Unit(n) for n in range(units)]
        self.header = [HEADER]
        self.variables: list[_Variable] = []
        self.functions: list[_Function] = []
        self.count = functions
        self.number = 0

    def program(self) -> Program:
        for unit in self.units:
            for _ in range(self.random.randint(6, 10)):
                self.variable(unit)
        names = [(unit, self.named(unit)) for unit in self.units for _ in range(self.count)]
        shapes: list[Callable[[_Unit, _Function], None]] = []
        for unit, function in names:
            # Every shape once in a while, in an order of its own for each program.
            shapes = shapes or self.random.sample(_SHAPES, len(_SHAPES))
            shapes.pop()(self, unit, function)
        for unit in self.units:
            self.state(unit)
        files = {f"unit{u.number}.c": u.text() for u in self.units}
        files["main.c"] = self.main()
        files["program.h"] = "\n".join(self.header) + "\n"
        return Program(self.seed, files)

    def fresh(self, word: str) -> str:
        self.number += 1
        return f"{word}{self.number}"

    def chance(self, one_in: int) -> bool:
        return self.random.randrange(one_in) == 0

    # --- names ------------------------------------------------------------------------------------------------

    def variable(self, unit: _Unit) -> None:
        r = self.random
        name, size = self.fresh("v"), r.choice((0, 0, 0, 4, 16, 64))
        kind = r.choice(("u8", "u16", "u32", "u32", "u64"))
        shape = f"{kind} {name}" + (f"[{size}]" if size else "")
        value = f"{r.randrange(200)}u"
        initial = " = {" + ", ".join(f"{r.randrange(200)}u" for _ in range(size)) + "}" if size else f" = {value}"
        form = r.choice(("static", "static", "zero", "global", "weak", "hidden", "common", "thread", "static thread",
                         "constant", "static constant", "aligned", "section", "protected"))  # fmt: skip
        prefix = {
            "static": "static ", "zero": "static ", "global": "", "weak": "__attribute__((weak)) ",
            "hidden": '__attribute__((visibility("hidden"))) ', "common": "__attribute__((common)) ",
            "thread": "__thread ", "static thread": "static __thread ", "constant": "const ",
            "static constant": "static const ", "aligned": "static __attribute__((aligned(64))) ",
            "section": '__attribute__((section("marked"))) ',
            "protected": '__attribute__((visibility("protected"))) ',
        }[form]  # fmt: skip
        static, constant = prefix.startswith("static"), "constant" in form
        if form in ("zero", "common"):
            initial = ""
        unit.data.append(f"{prefix}{shape}{initial};")
        if not static:
            kept = {"thread": "__thread ", "constant": "const ", "hidden": prefix}.get(form, "")
            self.header.append(f"extern {kept}{shape};")
        self.variables.append(_Variable(name, unit.number, size, static, constant))

    def named(self, unit: _Unit) -> _Function:
        function = _Function(self.fresh("f"), unit.number, self.chance(2))
        form = "static " if function.static else ""
        attribute = self.random.choice(("", "", "", "__attribute__((noinline)) ", "__attribute__((hot)) "))
        if not function.static:
            attribute += self.random.choice(
                ("", "", "__attribute__((weak)) ", '__attribute__((visibility("hidden"))) ')
            )
        declared = f"{form}{attribute}u32 {function.name}(u32 a, u32 b);"
        (unit.declarations if function.static else self.header).append(declared)
        self.functions.append(function)
        return function

    def callable(self, unit: _Unit) -> str:
        found = [f for f in self.functions if f.unit == unit.number or not f.static]
        return self.random.choice(found).name

    def readable(self, unit: _Unit, *, writable: bool = False) -> _Variable:
        found = [v for v in self.variables if v.unit == unit.number or not v.static]
        return self.random.choice([v for v in found if not (writable and v.constant)])

    # --- expressions and statements ---------------------------------------------------------------------------

    def expression(self, unit: _Unit, deep: int, calls: bool = True) -> str:
        r = self.random
        if deep == 0 or self.chance(6):
            leaf = r.randrange(8)
            if leaf < 3:
                return "ab"[r.randrange(2)]
            if leaf < 4:
                return f"{r.choice((1, 3, 7, 255, 65537, 4294967291, r.randrange(1 << 32)))}u"
            return self.readable(unit).at("a" if self.chance(2) else "b + 1")
        form = r.randrange(12)
        left = self.expression(unit, deep - 1, calls)
        right = self.expression(unit, deep - 1, calls)
        if form < 6:
            return f"({left} {r.choice(_OPERATORS)} {right})"
        if form == 6:
            return f"({left} {r.choice(('/', '%'))} ({right} | 1))"
        if form == 7:
            return f"({left} {r.choice(('<<', '>>'))} ({right} & 31))"
        if form == 8:
            return f"({left} {r.choice(('<', '==', '>=', '!='))} {right} ? a : {left})"
        if form == 9:
            return f"{r.choice(('turn', 'mix'))}({left}, {right})"
        return f"{self.callable(unit)}({left}, {right})" if calls else f"({left} + ~{right})"

    def statements(self, unit: _Unit, count: int, calls: bool = True) -> str:
        made = []
        for _ in range(count):
            value = self.expression(unit, 2, calls)
            form = self.random.randrange(5)
            if form == 0:
                v = self.readable(unit, writable=True)
                made.append(f"    {v.at('b').removeprefix('(u32)')} = {value};")
            elif form == 1:
                made.append(f"    for (u32 i = 0; i < (b & 7) + 2; i++)\n        a = a * 3 + ({value} ^ i);")
            elif form == 2:
                made.append(f"    if ({value} & {1 << self.random.randrange(8)})\n        b ^= {value};")
            else:
                made.append(f"    a = {value};")
        return "\n".join(made)

    def define(self, unit: _Unit, f: _Function, body: str, calls: bool = True) -> None:
        guard = "    if (!fuel)\n        return a ^ b;\n    fuel--;\n" if calls else ""
        prefix = "static " if f.static else ""
        unit.functions.append(f"{prefix}u32 {f.name}(u32 a, u32 b)\n{{\n{guard}{body}\n}}")

    # --- shapes of functions ----------------------------------------------------------------------------------

    def plain(self, unit: _Unit, f: _Function) -> None:
        end = self.expression(unit, 3)
        self.define(unit, f, f"{self.statements(unit, self.random.randint(1, 6))}\n    return {end};")

    def leaf(self, unit: _Unit, f: _Function) -> None:
        body = self.statements(unit, self.random.randint(0, 3), calls=False)
        self.define(unit, f, f"{body}\n    return {self.expression(unit, 2, calls=False)};", calls=False)

    def cases(self, unit: _Unit, f: _Function) -> None:
        lines = [f"    switch (a % {self.random.randint(5, 20)}) {{"]
        for n in range(self.random.randint(5, 18)):
            lines.append(f"    case {n}: {'b = ' if self.chance(3) else 'return '}{self.expression(unit, 2)};")
        lines += ["    default: b++;", "    }", f"    return {self.expression(unit, 1)} + b;"]
        self.define(unit, f, "\n".join(lines))

    def names(self, unit: _Unit, f: _Function) -> None:
        words = self.random.sample(_WORDS, 6)
        lines = ["    const char *name;", "    switch (a & 7) {"]
        lines += [f'    case {n}: name = "{word}"; break;' for n, word in enumerate(words)]
        lines += [f'    default: name = "{f.name} other";', "    }"]
        self.define(unit, f, "\n".join([*lines, "    return text_sum(name) + b;"]), calls=False)

    def computed_goto(self, unit: _Unit, f: _Function) -> None:
        code = ", ".join(str(self.random.randrange(4)) for _ in range(15))
        body = f"""\
    static const void *const labels[] = {{&&add, &&twist, &&call, &&half, &&end}};
    static const u8 code[] = {{{code}, 4}};
    u32 n = b & 7;
    goto *labels[code[n]];
add: a += b + 17; goto *labels[code[++n]];
twist: a = turn(a, 3) ^ {self.expression(unit, 1, calls=False)}; goto *labels[code[++n]];
call: b = {self.expression(unit, 2)}; goto *labels[code[++n]];
half: a -= b >> 1; goto *labels[code[++n]];
end:
    return a;"""
        self.define(unit, f, body)

    def variable_arguments(self, unit: _Unit, f: _Function) -> None:
        count = self.random.randint(1, 9)
        values = ", ".join(self.expression(unit, 1) for _ in range(count))
        self.define(unit, f, f"    return sum_of({count}, {values}) ^ b;")

    def structures(self, unit: _Unit, f: _Function) -> None:
        make, wide = self.fresh("make"), self.fresh("wide")
        unit.functions.append(
            f"static __attribute__((noinline)) struct pair {make}(u32 a, u32 b)\n"
            f"{{ return (struct pair){{{self.expression(unit, 2, calls=False)}, b}}; }}\n"
            f"static __attribute__((noinline)) struct wide {wide}(struct pair p, u64 n)\n"
            f"{{ return (struct wide){{{{p.a, n, p.b * n, 9}}, p.a ^ p.b}}; }}"
        )
        body = (
            f"    struct wide w = {wide}({make}(a, b), a & 255);\n    struct bits s = {{a & 7, b & 8191, a >> 16}};\n"
        )
        self.define(unit, f, body + "    return (u32)(w.a[b & 3] + w.b) + s.a * s.b + s.c;", calls=False)

    def floating(self, unit: _Unit, f: _Function) -> None:
        numbers = [self.random.randrange(1, 4000) / 8 for _ in range(6)]
        body = f"""\
    static const double table[4] = {{{", ".join(map(str, numbers[:4]))}}};
    double x = (a & 0xffff) * {numbers[4]} + table[b & 3];
    float y = (float)(b & 255) * {numbers[5]}f;
    long double z = (long double)(a & 1023) * 1.25L;
    for (u32 i = 0; i < (b & 7); i++)
        x = x * 0.5 + table[i & 3];
    return (u32)x ^ (u32)y ^ (u32)z;"""
        self.define(unit, f, body, calls=False)

    def table(self, unit: _Unit, f: _Function) -> None:
        entries, constant = [], "const " if self.chance(2) else ""
        numbers = self.fresh("n")
        for _ in range(4):
            call = self.callable(unit)
            word = self.random.choice(_WORDS)
            start = self.random.randint(0, min(2, len(word)))
            tail = f'"{word}" + {start if self.tails else 0}'
            entries.append(f"{{{tail}, {call}, &{numbers}[{len(entries)}]}}")
        name = self.fresh("t")
        unit.functions.append(f"static {constant}u32 {numbers}[4] = {{1, 20, 300, 4000}};")
        unit.functions.append(f"static {constant}struct entry {name}[4] = {{{', '.join(entries)}}};")
        body = f"    {'const ' if constant else ''}struct entry *e = &{name}[b & 3];\n"
        change = "" if constant else f"    {name}[a & 3].call = {self.callable(unit)};\n"
        self.define(unit, f, body + change + "    return e->call(a, *e->number) + text_sum(e->name) * b;")

    def pointers(self, unit: _Unit, f: _Function) -> None:
        pointer, seen = self.fresh("p"), self.callable(unit)
        form = self.random.choice(("static", "", "const"))
        shown = {"static": "static function ", "": "function ", "const": "static const function "}[form]
        unit.functions.append(f"{shown}{pointer} = {seen};")
        change = "" if form == "const" else f"    if (a & 64)\n        {pointer} = {self.callable(unit)};\n"
        others = " + ".join(f"({pointer} == {self.callable(unit)}) * {n}" for n in (2, 4, 8))
        self.define(unit, f, f"{change}    return ({pointer} == {seen}) + {others} + {pointer}(a >> 1, b);")

    def library(self, unit: _Unit, f: _Function) -> None:
        one, other = (word.replace("%", "") for word in self.random.sample(_WORDS, 2))
        body = f"""\
    char text[80];
    u8 room[64];
    memset(room, (int)(a & 255), sizeof room);
    snprintf(text, sizeof text, "%u {one[:5]} %s", a, b & 1 ? "{other}" : "{f.name}");
    memcpy(room + (b & 15), text, 16);
    a += (u32)strlen(text) + (strcmp(text, "5 north") > 0) + (u32)strtoul(text, NULL, 10);
    return a + room[b & 63] + (memcmp(room, text, 8) == 0) + {self.expression(unit, 2)};"""
        self.define(unit, f, body)

    def wide_text(self, unit: _Unit, f: _Function) -> None:
        body = f"""\
    const wchar_t *text = a & 1 ? L"wide {self.random.choice(_WORDS)}" : L"{f.name} wide";
    static const wchar_t *const more[] = {{L"one", L"three", L"two and more"}};
    for (const wchar_t *c = text; *c; c++)
        b = b * 5 + (u32)*c;
    return b + (u32)wcslen(more[a % 3]);"""
        self.define(unit, f, body, calls=False)

    def sorting(self, unit: _Unit, f: _Function) -> None:
        compare = self.fresh("compare")
        unit.functions.append(
            f"static int {compare}(const void *x, const void *y)\n"
            "{ u32 a = *(const u32 *)x, b = *(const u32 *)y; return a < b ? -1 : a > b; }"
        )
        body = f"""\
    u32 all[8];
    for (u32 i = 0; i < 8; i++)
        all[i] = mix(a + i, b);
    qsort(all, 8, sizeof *all, {compare});
    return all[b & 7] ^ all[0];"""
        self.define(unit, f, body, calls=False)

    def loops(self, unit: _Unit, f: _Function) -> None:
        one, other = self.fresh("x"), self.fresh("y")
        unit.functions.append(f"static u32 {one}[64], {other}[64] = {{5, 6, 7}};")
        body = f"""\
    for (u32 i = 0; i < 64; i++)
        {one}[i] = {other}[i] * 5 + {one}[i] + a;
    for (u32 i = 0; i < 64; i++)
        {other}[i] ^= {one}[63 - i] >> 3;
    for (u32 i = 0; i < 64; i++)
        b += {other}[i];
    return b;"""
        self.define(unit, f, body, calls=False)

    def recursion(self, unit: _Unit, f: _Function) -> None:
        other = f"{self.callable(unit)}(b, a)"
        body = f"    depth++;\n    if (a < 5)\n        return b + {other};\n"
        self.define(unit, f, body + f"    return {f.name}(a >> 1, b * 3 + (a & 1) + depth);")

    def cold_path(self, unit: _Unit, f: _Function) -> None:
        cold = self.fresh("cold")
        unit.functions.append(
            f"static __attribute__((cold, noinline)) u32 {cold}(u32 a, u32 b)\n"
            f"{{\n{self.statements(unit, 2, calls=False)}\n    return a + b;\n}}"
        )
        body = f"""\
    if (__builtin_expect((a & 15) == {self.random.randrange(16)}, 0)) {{
        b = {cold}(a, b) * 3 + {self.expression(unit, 2, calls=False)};
        a = {cold}(b, {self.readable(unit).at("a")});
    }}
{self.statements(unit, 3)}
    return a - b;"""
        self.define(unit, f, body)

    def counting(self, unit: _Unit, f: _Function) -> None:
        body = f"""\
    static u32 n = {self.random.randrange(3)}, calls[4], unused_now = 3;
    n += a & 3;
    calls[n & 3]++;
    {{ static u32 n = 8; n ^= b; a += n; }}
    return n * unused_now + calls[b & 3] + {self.expression(unit, 2)};"""
        self.define(unit, f, body)

    def aliased(self, unit: _Unit, f: _Function) -> None:
        real = self.fresh("real")
        weak = "weak, " if self.chance(2) else ""
        unit.functions.append(
            f"u32 {real}(u32 a, u32 b) {{ return a * 9 + {self.expression(unit, 2, calls=False)}; }}\n"
            f'u32 {f.name}(u32 a, u32 b) __attribute__(({weak}alias("{real}")));'
            if not f.static
            else f"u32 {real}(u32 a, u32 b) {{ return a ^ {self.expression(unit, 2, calls=False)}; }}\n"
            f'static u32 {f.name}(u32 a, u32 b) __attribute__((alias("{real}"), unused));'
        )

    def weakly(self, unit: _Unit, f: _Function) -> None:
        absent, number = self.fresh("absent"), self.fresh("absent")
        unit.functions.append(
            f"extern u32 {absent}(u32, u32) __attribute__((weak));\nextern u32 {number} __attribute__((weak));"
        )
        body = f"    if ({absent})\n        a = {absent}(a, b);\n    if (&{number})\n        b += {number};\n"
        self.define(unit, f, body + f"    return {self.expression(unit, 2)};")

    def long_numbers(self, unit: _Unit, f: _Function) -> None:
        body = "    unsigned __int128 n = (unsigned __int128)a << 64 | b;\n    n = n * (a | 1) / ((u64)b * 77 + 1);\n"
        self.define(unit, f, body + "    return (u32)n ^ (u32)(n >> 70);", calls=False)

    def long_jump(self, unit: _Unit, f: _Function) -> None:
        jump = self.fresh("jump")
        unit.functions.append(
            f"static jmp_buf env_{jump};\nstatic __attribute__((noinline)) void {jump}(u32 a)\n"
            f"{{ if (a & 1) longjmp(env_{jump}, (int)(a & 7) + 1); }}"
        )
        body = (
            f"    volatile u32 kept = a;\n    int n = setjmp(env_{jump});\n    if (n)\n        return kept * (u32)n;\n"
        )
        self.define(unit, f, body + f"    {jump}(b);\n    return kept + 1;", calls=False)

    def constructor(self, unit: _Unit, f: _Function) -> None:
        state, start = self.fresh("s"), self.fresh("start")
        unit.functions.append(
            f"static u32 {state};\nstatic __attribute__((constructor)) void {start}(void) {{ {state} = 77; }}"
        )
        self.define(unit, f, f"    {state} = {state} * 3 + a;\n    return {state} ^ {self.expression(unit, 2)};")

    def big_frame(self, unit: _Unit, f: _Function) -> None:
        body = f"""\
    u32 all[(a & 15) + 900];
    memset(all, 1, sizeof all);
    all[b & 511] = {self.expression(unit, 2)};
    return all[a & 511] + all[b & 511];"""
        self.define(unit, f, body)

    def chosen_at_start(self, unit: _Unit, f: _Function) -> None:
        one, other, choose, chosen = (self.fresh(word) for word in ("one", "other", "choose", "chosen"))
        unit.functions.append(
            f"static u32 {one}(u32 a, u32 b) {{ return a * 5 + b; }}\n"
            f"static u32 {other}(u32 a, u32 b) {{ return a ^ b; }}\n"
            f"static function {choose}(void) {{ return sizeof(long) == 8 ? {one} : {other}; }}\n"
            f'u32 {chosen}(u32 a, u32 b) __attribute__((ifunc("{choose}")));'
        )
        self.define(unit, f, f"    return {chosen}(a, b) + {chosen}(b, {self.expression(unit, 2)});")

    def elsewhere(self, unit: _Unit, f: _Function) -> None:
        name = self.fresh("g")
        unit.functions.append(
            f'static __attribute__((section(".text.marked"), noinline)) u32 {name}(u32 a, u32 b)\n'
            f"{{\n{self.statements(unit, 1)}\n    return b - a;\n}}"
        )
        self.define(unit, f, f"    return {name}(a, b) ^ {name}(b, a);")

    def state(self, unit: _Unit) -> None:
        """Add a function that sums up the unit's variables."""
        own = [v for v in self.variables if v.unit == unit.number]
        lines = []
        for v in own:
            if v.size:
                lines.append(f"    for (u32 i = 0; i < {v.size}; i++)\n        s = s * 31 + (u32){v.name}[i];")
            else:
                lines.append(f"    s = s * 31 + (u32){v.name};")
        body = "\n".join(lines)
        self.header.append(f"u32 state{unit.number}(void);")
        unit.functions.append(f"u32 state{unit.number}(void)\n{{\n    u32 s = 1;\n{body}\n    return s;\n}}")

    def main(self) -> str:
        called = [f.name for f in self.functions if not f.static]
        lines = []
        for n, name in enumerate(called):
            lines.append(f"    fuel = 300;\n    answers[{n}] = {name}(x + {self.random.randrange(50)}, x ^ {n}u);")
        for unit in self.units:
            lines.append(f"    answers[{len(lines)}] = state{unit.number}();")
        return MAIN % {"count": len(lines), "calls": "\n".join(lines)}


_SHAPES: list[Callable[[_Maker, _Unit, _Function], None]] = [
    _Maker.plain, _Maker.leaf, _Maker.cases, _Maker.names, _Maker.computed_goto, _Maker.variable_arguments,
    _Maker.structures, _Maker.floating, _Maker.table, _Maker.pointers, _Maker.library, _Maker.wide_text,
    _Maker.sorting, _Maker.loops, _Maker.recursion, _Maker.cold_path, _Maker.counting, _Maker.aliased,
    _Maker.weakly, _Maker.long_numbers, _Maker.long_jump, _Maker.constructor, _Maker.big_frame, _Maker.plain,
    _Maker.chosen_at_start, _Maker.elsewhere,
]  # fmt: skip


def generate(seed: int, *, units: int = 3, functions: int = 9, tails: bool = True) -> Program:
    """Return the program of a seed: `units` units of about `functions` functions each, and `main.c`.

    `tails`: with pointers into the middle of strings.
    """
    return _Maker(seed, units, functions, tails).program()
