"""The web as values: which version each function has, how that version is written, and the text of its units.

Versions of a function differ in a number that they answer, and in how they come to it: the number is an immediate, an
entry of a table, a part of a string, a floating-point constant or a sum. Each function calls three others; which ones,
the program's seed decides. What its function counts is in a static variable of the unit and stays.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

FUNCTIONS = 200
UNITS = 10
PER_UNIT = FUNCTIONS // UNITS


@dataclass(frozen=True, slots=True)
class Version:
    """One way a function can be: the number that it answers, and how it is written."""

    number: int
    shape: int = 0


Row = tuple[Version, ...]  # a version for each function: what a generation consists of

_IMMEDIATE = "    u32 found = {n}u;"
_TABLE = """\
    static const u32 table[8] = {{{n}u, {n}u ^ 1, {n}u ^ 2, {n}u ^ 3, {n}u ^ 4, {n}u ^ 5, {n}u ^ 6, {n}u ^ 7}};
    u32 found = table[x & 7] ^ (x & 7);"""
_STRING = '    u32 found = number_in("version {n}");'
_FLOATING = """\
    volatile double half = {n} / 2.0;
    u32 found = (u32)(half * 2.0);"""
_SUM = """\
    volatile u32 parts[300];
    u32 found = 0;
    for (u32 i = 0; i < 300; i++)
        parts[i] = i ? i : {n}u - 44850u;
    for (u32 i = 0; i < 300; i++)
        found += parts[i];"""
_CASES = """\
    u32 found;
    switch (x % 6) {{
    case 0: found = {n}u * 3; break;
    case 1: found = {n}u * 5 + function; break;
    case 2: found = {n}u * 7 ^ x; break;
    case 3: found = {n}u - x; break;
    case 4: found = {n}u + x * 9; break;
    default: found = ~{n}u; break;
    }}
    switch (x % 6) {{
    case 0: found /= 3; break;
    case 1: found = (found - function) / 5; break;
    case 2: found = (found ^ x) / 7; break;
    case 3: found += x; break;
    case 4: found -= x * 9; break;
    default: found = ~found; break;
    }}"""
SHAPES = (_IMMEDIATE, _TABLE, _STRING, _FLOATING, _SUM, _CASES)


class Web:
    """The functions of a seed, and who calls whom."""

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        self._callees = [chance.sample(range(FUNCTIONS), 3) for _ in range(FUNCTIONS)]
        self.first: Row = tuple(Version(1 + n, chance.randrange(len(SHAPES))) for n in range(FUNCTIONS))

    def unit(self, number: int, row: Row) -> str:
        """Return the text of a unit."""
        own = range(number * PER_UNIT, (number + 1) * PER_UNIT)
        lines = ['#include "web.h"', *(f"u64 f{n}(struct visit *, u32);" for n in range(FUNCTIONS))]
        lines += [self._function(n, row[n]) for n in own]
        hits = ", ".join(f"&hits_{n}" for n in own)
        lines.append(f"u64 *hits_in_{number}[{PER_UNIT}] = {{{hits}}};")
        return "\n".join(lines) + "\n"

    def _function(self, n: int, version: Version) -> str:
        calls = "\n".join(
            f"    if (goes_on(v))\n        CALL(v, {callee}, x + {i});" for i, callee in enumerate(self._callees[n])
        )
        return f"""
static u64 hits_{n};
u64 f{n}(struct visit *v, u32 x)
{{
    const u32 function = {n};
    entered(v, {version.number}u);
    __atomic_add_fetch(&hits_{n}, 1, __ATOMIC_RELAXED);
{SHAPES[version.shape].format(n=version.number)}
{calls}
    return answered(function, found, x);
}}"""


def table() -> str:
    """Return the text of the unit that lists the functions and where they count."""
    web = ", ".join(f"f{n}" for n in range(FUNCTIONS))
    hits = ", ".join(f"hits_in_{u}" for u in range(UNITS))
    return (
        '#include "web.h"\n'
        + "".join(f"u64 f{n}(struct visit *, u32);\n" for n in range(FUNCTIONS))
        + f"u64 (*const web[FUNCTIONS])(struct visit *, u32) = {{{web}}};\n"
        + "".join(f"extern u64 *hits_in_{u}[{PER_UNIT}];\n" for u in range(UNITS))
        + f"static u64 **const hits[] = {{{hits}}};\n"
        + f"u64 *hits_of(u32 n) {{ return hits[n / {PER_UNIT}][n % {PER_UNIT}]; }}\n"
    )


def units_of(functions: Iterable[int]) -> list[int]:
    """Return the units that functions are in."""
    return sorted({n // PER_UNIT for n in functions})
