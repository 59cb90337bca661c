"""A C program as values: its functions and variables, its text, and what it answers when a function of it is called.

A variable is what it is by its number (`uid`), whatever it is called and wherever it is declared: the state of a
process is a value for each number, and a text only says which of them its names are. All arithmetic is unsigned. Every
function changes each variable that it uses and tells its value, so that none is folded away and each call shows the
whole state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

MAIN = """\
#include <stdio.h>
void unit0(unsigned which, unsigned input);
__attribute__((weak)) void unit1(unsigned which, unsigned input);
void told(unsigned long value) { printf("%lu ", value); }
void shown(unsigned long value, const void *address) { printf("%lu@%p ", value, address); }
void text(const char *s) { printf("'%s ", s); }
int main(void)
{
    char line[80];
    unsigned unit, which, input;
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin) && sscanf(line, "%u %u %u", &unit, &which, &input) == 3) {
        (unit ? unit1 : unit0)(which, input);
        puts(".");
        fflush(stdout);
    }
    return 0;
}
"""
HEADER = """\
void told(unsigned long value);
void shown(unsigned long value, const void *address);
void text(const char *s);
"""
LARGE = 1 << 18


class Type(Enum):
    """The types of variables: what C calls them, the bits of an element, how many elements (0: no array)."""

    BYTE = "unsigned char", 8, 0
    SHORT = "unsigned short", 16, 0
    INT = "unsigned", 32, 0
    LONG = "unsigned long", 64, 0
    INTS = "unsigned", 32, 3
    BYTES = "unsigned char", 8, 4
    LARGE = "unsigned", 32, LARGE
    TEXT = "const char *", 0, 0

    @property
    def mask(self) -> int:
        return (1 << self.value[1]) - 1

    @property
    def count(self) -> int:
        return self.value[2]

    @property
    def size(self) -> int:
        return max(1, self.count) * self.value[1] // 8 or 8

    def declare(self, name: str) -> str:
        return f"{self.value[0]} {name}" + (f"[{self.count}]" if self.count else "")


class Linkage(Enum):
    """Where a variable is declared."""

    GLOBAL = "global"
    STATIC = "static of a file"
    LOCAL = "static of a function"


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable. `initial` are the values that its text gives to the first elements, or a string."""

    uid: int
    name: str
    type: Type
    initial: tuple[int, ...] | str
    linkage: Linkage
    unit: int
    function: int = -1  # whose static it is
    scope: int = 0  # 0: the function's own block; others: blocks inside it, in their order
    aligned: int = 0
    shows: bool = False  # its address is told as well

    @property
    def contents(self) -> bytes | str:
        """Return what stands in the object's file for it."""
        if isinstance(self.initial, str):
            return self.initial
        width = self.type.value[1] // 8
        return b"".join(n.to_bytes(width, "little") for n in self.initial)

    def definition(self) -> str:
        word = "" if self.linkage is Linkage.GLOBAL else "static "
        aligned = f" __attribute__((aligned({self.aligned})))" if self.aligned else ""
        return f"{word}{self.type.declare(self.name)}{aligned}{self._initialiser()};"

    def _initialiser(self) -> str:
        if isinstance(self.initial, str):
            return f' = "{self.initial}"'
        if not any(self.initial):
            return ""
        if self.type.count:
            return " = {" + ", ".join(map(str, self.initial)) + "}"
        return f" = {self.initial[0]}"


@dataclass(frozen=True, slots=True)
class Use:
    """A function changes a variable, `v * factor + input + term`, and tells it."""

    variable: int
    factor: int
    term: int


@dataclass(frozen=True, slots=True)
class Table:
    """A constant array of four numbers."""

    uid: int
    name: str
    values: tuple[int, int, int, int]
    unit: int
    exported: bool = False

    def definition(self) -> str:
        word = "" if self.exported else "static "
        return f"{word}const unsigned {self.name}[4] = {{{', '.join(map(str, self.values))}}};"


class Form(Enum):
    """How a function is declared."""

    GLOBAL = "__attribute__((noinline)) void"
    STATIC = "static __attribute__((noinline)) void"
    ANY = "static void"  # a compiler may inline it
    INLINE = "static inline __attribute__((always_inline)) void"

    @property
    def inlined(self) -> bool:
        return self in (Form.ANY, Form.INLINE)


@dataclass(frozen=True, slots=True)
class Function:
    """A function of a unit. One with `called` false is only called by others: a helper."""

    uid: int
    name: str
    unit: int
    form: Form
    constant: int
    uses: tuple[Use, ...] = ()
    calls: tuple[int, ...] = ()
    tables: tuple[int, ...] = ()
    words: str = ""
    called: bool = True


@dataclass(frozen=True)
class Program:
    """The text of a program; functions, variables and tables stand in the order of their definitions."""

    units: int
    functions: tuple[Function, ...]
    variables: tuple[Variable, ...]
    tables: tuple[Table, ...] = ()
    _by_uid: dict[int, Variable] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._by_uid.update({v.uid: v for v in self.variables})

    def variable(self, uid: int) -> Variable:
        return self._by_uid[uid]

    def has(self, uid: int) -> bool:
        return uid in self._by_uid

    def function(self, uid: int) -> Function:
        return next(f for f in self.functions if f.uid == uid)

    def table(self, uid: int) -> Table:
        return next(t for t in self.tables if t.uid == uid)

    def callers(self, uid: int) -> tuple[Function, ...]:
        return tuple(f for f in self.functions if uid in f.calls)

    def locals_of(self, function: int) -> tuple[Variable, ...]:
        return tuple(v for v in self.variables if v.function == function)

    def users(self, variable: int) -> tuple[Function, ...]:
        return tuple(f for f in self.functions if any(u.variable == variable for u in f.uses))

    # --- text ---------------------------------------------------------------------------------------------------------

    def texts(self) -> dict[str, str]:
        """Return the source files."""
        return {f"unit{unit}.c": self.unit_text(unit) for unit in range(self.units)}

    def unit_text(self, unit: int) -> str:
        own = [f for f in self.functions if f.unit == unit]
        lines = [HEADER]
        lines += [f"extern {v.type.declare(v.name)};" for v in self._others(unit)]
        used = {t for f in own for t in f.tables}
        lines += [f"extern const unsigned {t.name}[4];" for t in self.tables if t.uid in used and t.unit != unit]
        file_level = [v for v in self.variables if v.unit == unit and v.linkage is not Linkage.LOCAL]
        lines += [v.definition() for v in file_level]
        lines += [f"extern const unsigned {t.name}[4];" for t in self.tables if t.unit == unit and t.exported]
        lines += [t.definition() for t in self.tables if t.unit == unit]
        lines += [f"{f.form.value} {f.name}(unsigned input);" for f in own]
        for function in sorted(own, key=lambda f: f.form is not Form.INLINE):
            lines += self._function_text(function)
        lines += [f"void unit{unit}(unsigned which, unsigned input)", "{", "    switch (which) {"]
        lines += [f"    case {f.uid}: {f.name}(input); break;" for f in sorted(own, key=lambda f: f.uid) if f.called]
        lines += ['    default: text("none");', "    }", "}"]
        return "\n".join(lines) + "\n"

    def _others(self, unit: int) -> list[Variable]:
        used = {u.variable for f in self.functions if f.unit == unit for u in f.uses}
        return [v for v in self.variables if v.uid in used and v.unit != unit and v.linkage is Linkage.GLOBAL]

    def _function_text(self, function: Function) -> Iterator[str]:
        own = self.locals_of(function.uid)
        yield from (f"{function.form.value} {function.name}(unsigned input)", "{")
        yield from (f"    {v.definition()}" for v in own if not v.scope)
        yield f"    told({function.constant});"
        for use, variable in self._ordered_uses(function):
            if not variable.scope or variable.function != function.uid:
                yield from (f"    {line}" for line in _change(use, variable))
        for scope in sorted({v.scope for v in own if v.scope}):
            yield "    {"
            yield from (f"        {v.definition()}" for v in own if v.scope == scope)
            for use, variable in self._ordered_uses(function):
                if variable.function == function.uid and variable.scope == scope:
                    yield from (f"        {line}" for line in _change(use, variable))
            yield "    }"
        yield from (f"    told({self.table(t).name}[input & 3]);" for t in function.tables)
        if function.words:
            yield f'    text("{function.words}");'
        yield from (f"    {self.function(c).name}(input + 1);" for c in function.calls)
        yield "}"

    def _ordered_uses(self, function: Function) -> list[tuple[Use, Variable]]:
        return [(use, self.variable(use.variable)) for use in function.uses]

    def shape(self) -> list[tuple[int, list[int]]]:
        """Return which functions may be called, by unit."""
        return [(unit, [f.uid for f in self.functions if f.unit == unit and f.called]) for unit in range(self.units)]


def _change(use: Use, variable: Variable) -> Iterator[str]:
    name, kind = variable.name, variable.type
    if kind is Type.TEXT:
        yield f"{name} += *{name} != 0;"
        yield f"text({name});"
    elif kind.count:
        index = f"input * 977u % {kind.count}u"
        yield f"{name}[{index}] = {name}[{index}] * {use.factor}u + {use.term}u;"
        yield from (f"told({name}[{i}]);" for i in _told(kind))
        if kind is Type.LARGE:
            yield f"told({name}[{index}]);"
    else:
        yield f"{name} = {name} * {use.factor}u + input + {use.term}u;"
        yield f"told({name});"
    if variable.shows:
        yield f"shown({f'(unsigned long)&{name} % {variable.aligned}' if variable.aligned else 0}, &{name});"


def _told(kind: Type) -> range:
    return range(1 if kind is Type.LARGE else kind.count)


# --- what it answers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Value:
    """The value of a variable: its elements that are not zero, or a string and how far the variable is in it."""

    elements: tuple[tuple[int, int], ...] = ()
    text: str = ""

    @classmethod
    def of(cls, variable: Variable) -> Value:
        """Return the value that a variable starts with."""
        if isinstance(variable.initial, str):
            return cls(text=variable.initial)
        return cls(tuple(enumerate(variable.initial)))


State = dict[int, Value]


def call(program: Program, state: State, uid: int, given: int) -> list[str]:
    """Run a function on a state, which it changes, and return what it tells; `value@uid` for an address."""
    told: list[str] = []
    function = next((f for f in program.functions if f.uid == uid), None)
    if function is None or not function.called:
        return ["'none"]
    _run(program, state, function, given, told)
    return told


def _run(program: Program, state: State, function: Function, given: int, told: list[str]) -> None:
    told.append(str(function.constant))
    uses = [(use, program.variable(use.variable)) for use in function.uses]
    for use, variable in sorted(uses, key=lambda pair: pair[1].scope if pair[1].function == function.uid else 0):
        value, words = _changed(use, variable, state[variable.uid], given)
        state[variable.uid] = value
        told += words
        if variable.shows:
            told.append(f"0@{variable.uid}")
    told += [str(program.table(t).values[given & 3]) for t in function.tables]
    if function.words:
        told.append("'" + function.words)
    for callee in function.calls:
        _run(program, state, program.function(callee), given + 1, told)


def _changed(use: Use, variable: Variable, value: Value, given: int) -> tuple[Value, list[str]]:
    kind = variable.type
    if kind is Type.TEXT:
        rest = value.text[1:]
        return Value(text=rest), ["'" + rest]
    elements = dict(value.elements)
    if not kind.count:
        number = (elements.get(0, 0) * use.factor + given + use.term) & kind.mask
        return Value(((0, number),)), [str(number)]
    index = given * 977 % kind.count
    elements[index] = (elements.get(index, 0) * use.factor + use.term) & kind.mask
    words = [str(elements.get(i, 0)) for i in _told(kind)]
    words += [str(elements[index])] * (kind is Type.LARGE)
    return Value(tuple(sorted(elements.items()))), words
