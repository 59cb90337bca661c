"""A random program in several files, and random edits of it: what its texts are is all that is known here.

Every text compiles unless it is broken on purpose. The program keeps no state, so what it answers depends on its code
alone: that of a patched process and of a cold build of the same texts must be the same.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from random import Random

MAIN = """\
#include <stdio.h>
#include <stdlib.h>
int top(int n);
int main(void)
{
    char line[80];
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    while (fgets(line, sizeof line, stdin))
        printf("%d\\n", top(atoi(line)));
    return 0;
}
"""
KINDS = ("sum", "macro", "inline", "table", "text", "switch", "loop")


@dataclass
class Function:
    name: str
    kind: str
    constant: int
    calls: list[str] = field(default_factory=list)

    def text(self, header: int) -> str:
        c = self.constant
        body = {
            "sum": f"n * {c} + {c % 7}",
            "macro": f"SCALE{header} * n + {c}",
            "inline": f"scaled{header}(n) - {c}",
            "table": f"table[n & 3] + {c}",
            "text": f'(int)strlen("{"x" * (c % 23)}") * n + "{c}abc"[n & 3]',
            "switch": "n",
            "loop": "n",
        }[self.kind]
        lines = [f"int {self.name}(int n)", "{", f"    int found = {body};"]
        if self.kind == "table":
            lines.insert(2, f"    static const int table[] = {{{c}, {c + 1}, {c * 2}, {c % 5}}};")
        elif self.kind == "switch":
            cases = " ".join(f"case {k}: found += {c * (k + 1) % 97}; break;" for k in range(6))
            lines.append(f"    switch (n % 7) {{ {cases} default: found -= {c}; }}")
        elif self.kind == "loop":
            lines.append(f"    for (int i = 0; i < (n & 7); i++) found = found * 3 + {c};")
        lines += [f"    found += {callee}(n + {k});" for k, callee in enumerate(self.calls)]
        return "\n".join([*lines, "    return found;", "}", ""])


@dataclass
class Header:
    scale: int
    added: int
    includes: int | None = None
    padding: int = 0  # lines that say nothing

    def text(self, number: int) -> str:
        inner = f'#include "h{self.includes}.h"\n' if self.includes is not None else ""
        return (
            f"#ifndef H{number}\n#define H{number}\n"
            + inner
            + "/* nothing */\n" * self.padding
            + f"#define SCALE{number} {self.scale}\n"
            f"static inline int scaled{number}(int n) {{ return n * {self.scale + 1} + {self.added}; }}\n#endif\n"
        )


@dataclass
class Unit:
    functions: list[Function]
    header: int
    padding: int = 0


class Program:
    """Units that call those after them, with headers; the first one has `top`."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.headers = [Header(random.randrange(1, 50), random.randrange(50)) for _ in range(3)]
        self.headers[0].includes = 1
        self.units: list[Unit] = []
        self.broken: set[str] = set()
        self._count = 0
        for number in reversed(range(4)):
            callees = [f.name for unit in self.units for f in unit.functions]
            names = ["top"] if number == 0 else []
            functions = [self._function(callees, name) for name in [*names, *[""] * random.randrange(1, 4)]]
            self.units.insert(0, Unit(functions, random.randrange(3)))
        self.units[0].functions[0].calls = [u.functions[0].name for u in self.units[1:]]

    def _function(self, callees: list[str], name: str = "") -> Function:
        self._count += 1
        random = self.random
        calls = random.sample(callees, min(len(callees), random.randrange(3)))
        return Function(name or f"f{self._count}", random.choice(KINDS), random.randrange(1000), calls)

    def texts(self) -> dict[str, str]:
        """Return the text of each file."""
        found = {"main.c": MAIN}
        found |= {f"h{n}.h": header.text(n) for n, header in enumerate(self.headers)}
        declared = "".join(f"int {f.name}(int);\n" for unit in self.units for f in unit.functions)
        for number, unit in enumerate(self.units):
            head = f'#include <string.h>\n#include "h{unit.header}.h"\n' + "// nothing\n" * unit.padding
            called = {c for f in unit.functions for c in f.calls} | {f.name for f in unit.functions}
            needed = "".join(line + "\n" for line in declared.splitlines() if line[4:].split("(")[0] in called)
            found[f"u{number}.c"] = head + needed + "\n".join(f.text(unit.header) for f in unit.functions)
        return {name: text + ("oops(\n" if name in self.broken else "") for name, text in found.items()}

    # --- edits --------------------------------------------------------------------------------------------------

    def edit(self) -> str:
        """Change something at random, and return what."""
        edits = [self._constant] * 4 + [self._kind, self._header, self._header, self._pad, self._add, self._remove]
        edits += [self._include, self._new_header, self._new_unit, self._break, self._mend, self._mend, self._move]
        chosen = self.random.choice(edits)
        chosen()
        return chosen.__name__.strip("_")

    def mend(self) -> None:
        """Mend all that is broken."""
        self.broken.clear()

    def state(self) -> object:
        """Return all that `restore` takes."""
        return copy.deepcopy((self.headers, self.units))

    def restore(self, state: object) -> None:
        """Go back to an earlier state; what is there more now stays, with the callers that it had."""
        headers, units = copy.deepcopy(state)  # type: ignore[misc]
        self.headers[: len(headers)] = headers
        after = [*units, *self.units[len(units) :]]
        names = [f.name for u in after for f in u.functions]
        called = {c for u in after for f in u.functions for c in f.calls}
        if called <= set(names) and len(names) == len(set(names)):  # a function may have moved to a newer unit
            self.units = after

    def _unit(self) -> Unit:
        return self.random.choice(self.units)

    def _constant(self) -> None:
        self.random.choice(self._unit().functions).constant = self.random.randrange(1000)

    def _kind(self) -> None:
        self.random.choice(self._unit().functions).kind = self.random.choice(KINDS)

    def _header(self) -> None:
        header = self.random.choice(self.headers)
        if self.random.random() < 0.5:
            header.scale = self.random.randrange(1, 50)
        else:
            header.added = self.random.randrange(50)

    def _pad(self) -> None:
        self.random.choice([*self.headers, *self.units]).padding += 1

    def _add(self) -> None:
        at = self.random.randrange(len(self.units))
        later = [f.name for unit in self.units[at + 1 :] for f in unit.functions]
        new = self._function(later)
        self.units[at].functions.append(new)
        self.random.choice(self.units[self.random.randrange(at + 1) if at else 0].functions[:1]).calls.append(new.name)
        if new.name in new.calls:
            new.calls.remove(new.name)

    def _remove(self) -> None:
        unit = self._unit()
        gone = self.random.choice(unit.functions)
        if gone.name == "top" or len(unit.functions) == 1:
            return
        unit.functions.remove(gone)
        for other in self.units:
            for function in other.functions:
                function.calls = [c for c in function.calls if c != gone.name]

    def _move(self) -> None:
        """Move a function that calls nothing to another unit."""
        unit, other = self._unit(), self._unit()
        free = [f for f in unit.functions if not f.calls and f.name != "top"]
        if free and unit is not other and len(unit.functions) > 1:
            moved = self.random.choice(free)
            unit.functions.remove(moved)
            other.functions.append(moved)

    def _include(self) -> None:
        self._unit().header = self.random.randrange(len(self.headers))

    def _new_header(self) -> None:
        self.headers.append(Header(self.random.randrange(1, 50), self.random.randrange(50)))
        self._unit().header = len(self.headers) - 1

    def _new_unit(self) -> None:
        self.units.append(Unit([self._function([])], self.random.randrange(len(self.headers))))
        self.random.choice(self.units[0].functions).calls.append(self.units[-1].functions[0].name)

    def _break(self) -> None:
        self.broken.add(self.random.choice([n for n in self.texts() if n != "main.c"]))

    def _mend(self) -> None:
        self.broken.clear()
