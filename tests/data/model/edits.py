"""Random programs, and what people do to them between two saves.

An edit says by the numbers of its variables what they are: one that was renamed is another one, one that was moved or
whose initialiser changed is the same, one that comes back under its old name is what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from random import Random
from typing import TypeVar

from data.model.program import Form, Function, Linkage, Program, Table, Type, Use, Variable

_T = TypeVar("_T")
LOCAL_NAMES = ("count", "last", "seen", "sum")
WORDS = ("north", "northern", "ern", "words", "longer", "x", "tail")
SCALARS = (Type.BYTE, Type.SHORT, Type.INT, Type.INT, Type.LONG, Type.INTS, Type.BYTES)


class Edit(Enum):
    """What happens between two saves."""

    CODE = "change code"
    ADD_VARIABLE = "add a variable"
    ADD_RIVAL = "add a static of a name that the function has in another block"
    REMOVE_VARIABLE = "remove a variable"
    BRING_BACK = "bring a variable back"
    ADD_USE = "use a variable in one more function"
    REMOVE_USE = "remove one of the uses of a variable"
    REORDER = "reorder definitions"
    RENAME_FUNCTION = "rename a function"
    RENAME_VARIABLE = "rename a variable"
    SWAP = "swap two statics of a function"
    TO_GLOBAL = "make a static global"
    TO_STATIC = "make a global static"
    INTO_FUNCTION = "move a variable of a file into the function that uses it"
    OUT_OF_FUNCTION = "move a static of a function out of it"
    OTHER_UNIT = "move a global to another unit"
    INITIALISER = "change an initialiser"
    CONSTANT = "change a constant"
    SHARED_CONSTANT = "change a constant that another unit uses"
    ADD_CONSTANT = "add a constant"
    ADD_SHARED_CONSTANT = "add a constant that another unit uses"
    FORM = "let a function be inlined, or not any more, or make it global"
    INTO_HELPER = "move a static into a new inline helper"
    ADD_FUNCTION = "add a function"
    REMOVE_FUNCTION = "remove a function"
    RESTORE_FUNCTION = "bring a function back"
    TOUCH = "save without a change"
    REVERT = "revert to the generation before"
    RE_APPLY = "apply again what was reverted"


class Impossible(Exception):
    """A program has nothing that an edit could be done to."""


@dataclass
class History:
    """What has been live: the variables with the programs that had them last, and the functions that are gone."""

    uid: int = 0
    variables: dict[int, tuple[Variable, Program]] = field(default_factory=dict)
    functions: dict[int, tuple[Function, Program]] = field(default_factory=dict)

    def fresh(self) -> int:
        self.uid += 1
        return self.uid

    initials: dict[int, set[tuple[int, ...] | str]] = field(default_factory=dict)
    homes: dict[int, set[int]] = field(default_factory=dict)  # the functions that a variable has been in

    def applied(self, program: Program) -> None:
        for variable in program.variables:
            self.homes.setdefault(variable.uid, set()).add(variable.function)
            self.initials.setdefault(variable.uid, set()).add(variable.initial)
        self.variables.update({v.uid: (v, program) for v in program.variables})
        self.functions.update({f.uid: (f, program) for f in program.functions})

    def gone(self, program: Program) -> list[tuple[Variable, Program]]:
        return [known for uid, known in self.variables.items() if not program.has(uid)]


class Author:
    """Writes programs and edits them, by one random source."""

    def __init__(self, random: Random, *, rivals: bool = True) -> None:
        """`rivals`: whether a function may have two statics of one name, in different blocks."""
        self.random = random
        self.rivals = rivals
        self.history = History()

    # --- a program ----------------------------------------------------------------------------------------------------

    def program(self) -> Program:
        units = self.random.choice((1, 2))
        program = Program(units, (), ())
        for unit in range(units):
            for _ in range(self.random.randint(1, 2)):
                program = self._with_file_variable(program, unit)
            for _ in range(self.random.randint(2, 3)):
                program = self._with_function(program, unit)
        if self.random.random() < 0.7:
            program = self._with_table(program, exported=units == 2 and self.random.random() < 0.6)
        if units == 2 and self.random.random() < 0.5:
            program = self._with_statics_of_one_name(program)
        return program

    def _with_statics_of_one_name(self, program: Program) -> Program:
        for unit in range(2):
            variable = Variable(self.history.fresh(), "state", Type.INT, (self._number(),), Linkage.STATIC, unit)
            program = self._used(with_variable(program, variable), variable)
        return program

    def _number(self) -> int:
        return self.random.randint(1, 250) if self.random.random() < 0.75 else 0

    def _initial(self, kind: Type) -> tuple[int, ...] | str:
        if kind is Type.TEXT:
            return self.random.choice(WORDS) + str(self.random.randint(0, 99))
        if kind is Type.LARGE:
            return (0,)
        return tuple(self._number() for _ in range(max(1, kind.count)))

    def _kind(self) -> Type:
        chance = self.random.random()
        return Type.TEXT if chance < 0.1 else Type.LARGE if chance < 0.13 else self.random.choice(SCALARS)

    def _variable(self, name: str, linkage: Linkage, unit: int, function: int = -1, scope: int = 0) -> Variable:
        kind = self._kind()
        shows = self.random.random() < 0.4
        aligned = self.random.choice((64, 4096)) if shows and self.random.random() < 0.2 else 0
        return Variable(
            self.history.fresh(), name, kind, self._initial(kind), linkage, unit, function, scope, aligned, shows
        )

    def _use(self, variable: Variable) -> Use:
        return Use(variable.uid, self.random.choice((1, 3, 5, 7)), self.random.randint(1, 90))

    def _with_file_variable(self, program: Program, unit: int) -> Program:
        linkage = self.random.choice((Linkage.GLOBAL, Linkage.STATIC, Linkage.STATIC))
        variable = self._variable(f"value{self.history.fresh()}", linkage, unit)
        program = with_variable(program, variable)
        return self._used(program, variable) if self._near(program, variable) else program

    def _near(self, program: Program, variable: Variable) -> list[Function]:
        """Return the functions that may use a variable of a file."""
        anywhere = variable.linkage is Linkage.GLOBAL
        return [f for f in program.functions if anywhere or f.unit == variable.unit]

    def _used(self, program: Program, variable: Variable) -> Program:
        function = self._one(f for f in self._near(program, variable) if not _uses(f, variable.uid))
        return with_function(program, replace(function, uses=(*function.uses, self._use(variable))))

    def _with_function(self, program: Program, unit: int) -> Program:
        form = self.random.choice((Form.GLOBAL, Form.STATIC, Form.STATIC, Form.ANY))
        uid = self.history.fresh()
        name = f"{self.random.choice(('work', 'step', 'turn'))}{uid}"
        words = self.random.choice(WORDS) + str(uid) if self.random.random() < 0.3 else ""
        function = Function(uid, name, unit, form, self.random.randint(1, 10**6), words=words)
        mine: list[Variable] = []
        for _ in range(self.random.randint(0, 3)):
            scope = self.random.choice((0, 0, 0, 1, 2))
            free = [n for n in LOCAL_NAMES if all(v.name != n or (self.rivals and v.scope != scope) for v in mine)]
            mine.append(self._variable(self.random.choice(free), Linkage.LOCAL, unit, uid, scope))
        unused = [v for v in program.variables if v.linkage is not Linkage.LOCAL and not program.users(v.uid)]
        used = [v for v in unused if v.unit == unit]
        used += [v for v in program.variables if v.linkage is Linkage.GLOBAL and self.random.random() < 0.3]
        uses = tuple(self._use(v) for v in dict.fromkeys((*used, *mine)))
        variables = (*program.variables, *mine)
        return replace(program, functions=(*program.functions, replace(function, uses=uses)), variables=variables)

    def _with_table(self, program: Program, *, exported: bool) -> Program:
        function = self._one(program.functions)
        table = Table(
            self.history.fresh(), f"table{self.history.fresh()}", self._table_values(), function.unit, exported
        )
        program = replace(program, tables=(*program.tables, table))
        users = [function]
        if exported:
            users += [f for f in program.functions if f.unit != function.unit][:1]
        for user in users:
            program = with_function(program, replace(user, tables=(*user.tables, table.uid)))
        return program

    def _table_values(self) -> tuple[int, int, int, int]:
        numbers = self.random.sample(range(1, 10**6), 4)
        return numbers[0], numbers[1], numbers[2], numbers[3]

    def _one(self, choices: Iterable[_T]) -> _T:
        found = list(choices)
        if not found:
            raise Impossible
        return self.random.choice(found)

    # --- edits --------------------------------------------------------------------------------------------------------

    def edit(self, program: Program, kind: Edit) -> Program:
        """Return the program after an edit. Raises `Impossible`."""
        edited = _EDITS[kind](self, program)
        if any(_hidden(edited, function) for function in edited.functions):
            raise Impossible
        return edited

    def change_code(self, program: Program) -> Program:
        function = self._one(program.functions)
        numbers = [u for u in function.uses if program.variable(u.variable).type is not Type.TEXT]
        if numbers and self.random.random() < 0.5:
            changed = self._one(numbers)
            uses = tuple(replace(u, term=u.term + 1) if u is changed else u for u in function.uses)
            return with_function(program, replace(function, uses=uses))
        return with_function(program, replace(function, constant=function.constant + 1))

    def add_variable(self, program: Program) -> Program:
        if self.random.random() < 0.4:
            return self._with_new_file_variable(program)
        function = self._one(program.functions)
        taken = {v.name for v in program.locals_of(function.uid)} | self._former_names(program, function)
        name = self._one(n for n in LOCAL_NAMES if n not in taken)
        return self._with_local(program, function, name, self.random.choice((0, 0, 1, 2)))

    def add_rival(self, program: Program) -> Program:
        function = self._one(f for f in program.functions if program.locals_of(f.uid))
        own = program.locals_of(function.uid)
        former = self._former_names(program, function)
        rival = self._one(v for v in own if v.name not in former and v.type is not Type.LARGE)
        taken = {v.scope for v in own if v.name == rival.name}
        scope = self._one(s for s in range(4) if s not in taken)
        variable = self._variable(rival.name, Linkage.LOCAL, function.unit, function.uid, scope)
        if self.random.random() < 0.7:
            initial = rival.initial if self.random.random() < 0.3 else self._initial(rival.type)
            variable = replace(variable, type=rival.type, initial=initial)
        return self._with_use(with_variable(program, variable), function, variable)

    def _former_names(self, program: Program, function: Function) -> set[str]:
        """Return the names of what a function had once: a static of such a name would be that one."""
        return {v.name for v, _ in self.history.gone(program) if function.uid in self.history.homes[v.uid]}

    def _with_new_file_variable(self, program: Program) -> Program:
        linkage = self.random.choice((Linkage.GLOBAL, Linkage.STATIC))
        variable = self._variable(f"value{self.history.fresh()}", linkage, self.random.randrange(program.units))
        return self._used(with_variable(program, variable), variable)

    def _with_local(self, program: Program, function: Function, name: str, scope: int) -> Program:
        variable = self._variable(name, Linkage.LOCAL, function.unit, function.uid, scope)
        return self._with_use(with_variable(program, variable), function, variable)

    def _with_use(self, program: Program, function: Function, variable: Variable) -> Program:
        place = self.random.randint(0, len(function.uses))
        uses = (*function.uses[:place], self._use(variable), *function.uses[place:])
        return with_function(program, replace(function, uses=uses))

    def remove_variable(self, program: Program) -> Program:
        return without_variable(program, self._one(program.variables).uid)

    def bring_back(self, program: Program) -> Program:
        candidates = [v for v, had in self.history.gone(program) if self._may_return(program, v, had)]
        variable = self._one(candidates)
        if variable.linkage is not Linkage.LOCAL:
            return self._used(with_variable(program, variable), variable)
        return self._with_use(with_variable(program, variable), program.function(variable.function), variable)

    def _may_return(self, program: Program, variable: Variable, had: Program) -> bool:
        if variable.linkage is not Linkage.LOCAL:
            same = [v for v in program.variables if v.name == variable.name and v.linkage is not Linkage.LOCAL]
            return not any(v.unit == variable.unit or v.linkage is variable.linkage is Linkage.GLOBAL for v in same)
        here = next((f for f in program.functions if f.uid == variable.function), None)
        if here is None or here.name != had.function(variable.function).name:
            return False
        # Two of one name and type would both be that one.
        others = [v for v, _ in self.history.gone(program) if v.function == here.uid and v is not variable]
        others += program.locals_of(here.uid)
        return all(v.name != variable.name for v in others)

    def add_use(self, program: Program) -> Program:
        return self._used(program, self._one(v for v in program.variables if v.linkage is not Linkage.LOCAL))

    def remove_use(self, program: Program) -> Program:
        variable = self._one(v for v in program.variables if len(program.users(v.uid)) > 1)
        function = self._one(program.users(variable.uid))
        return with_function(program, _without_use(function, variable.uid))

    def reorder(self, program: Program) -> Program:
        return replace(
            program,
            functions=self._shuffled(program.functions),
            variables=self._shuffled(program.variables),
            tables=self._shuffled(program.tables),
        )

    def _shuffled(self, values: Sequence[_T]) -> tuple[_T, ...]:
        return tuple(self.random.sample(values, len(values)))

    def rename_function(self, program: Program) -> Program:
        function = self._one(f for f in program.functions if program.locals_of(f.uid))
        return with_function(program, replace(function, name=f"named{self.history.fresh()}"))

    def rename_variable(self, program: Program) -> Program:
        old = self._one(program.variables)
        uid = self.history.fresh()
        name = f"value{uid}"
        if old.linkage is Linkage.LOCAL:
            function = program.function(old.function)
            taken = {v.name for v in program.locals_of(function.uid)} | self._former_names(program, function)
            name = self._one(n for n in LOCAL_NAMES if n not in taken)
        new = replace(old, uid=uid, name=name)
        variables = tuple(new if v is old else v for v in program.variables)
        functions = tuple(
            replace(f, uses=tuple(replace(u, variable=uid) if u.variable == old.uid else u for u in f.uses))
            for f in program.functions
        )
        return replace(program, functions=functions, variables=variables)

    def swap(self, program: Program) -> Program:
        function = self._one(f for f in program.functions if len(program.locals_of(f.uid)) > 1)
        a, b = self.random.sample(program.locals_of(function.uid), 2)
        if a.scope and b.scope and a.scope != b.scope:
            scopes = {a.scope: b.scope, b.scope: a.scope}
            moved = {v: replace(v, scope=scopes.get(v.scope, v.scope)) for v in program.locals_of(function.uid)}
        else:
            moved = {a: b, b: a}
        return replace(program, variables=tuple(moved.get(v, v) for v in program.variables))

    def to_global(self, program: Program) -> Program:
        files = [v for v in program.variables if v.linkage is not Linkage.LOCAL]
        statics = [v for v in files if v.linkage is Linkage.STATIC]
        variable = self._one(v for v in statics if sum(v.name == other.name for other in files) == 1)
        return with_changed(program, replace(variable, linkage=Linkage.GLOBAL))

    def to_static(self, program: Program) -> Program:
        variable = self._one(
            v
            for v in program.variables
            if v.linkage is Linkage.GLOBAL and all(f.unit == v.unit for f in program.users(v.uid))
        )
        return with_changed(program, replace(variable, linkage=Linkage.STATIC))

    def into_function(self, program: Program) -> Program:
        variable, function = self._one(
            (v, users[0])
            for v in program.variables
            if v.linkage is not Linkage.LOCAL and len(users := program.users(v.uid)) == 1 and users[0].unit == v.unit
        )
        return with_changed(program, replace(variable, linkage=Linkage.LOCAL, function=function.uid, scope=0))

    def out_of_function(self, program: Program) -> Program:
        files = {v.name for v in program.variables if v.linkage is not Linkage.LOCAL}
        files |= {v.name for v, _ in self.history.gone(program) if v.linkage is not Linkage.LOCAL}
        variable = self._one(
            v
            for v in program.variables
            if v.linkage is Linkage.LOCAL and v.name not in files and not _rivals(program, v)
        )
        return with_changed(program, replace(variable, linkage=Linkage.STATIC, function=-1, scope=0))

    def other_unit(self, program: Program) -> Program:
        variable = self._one(v for v in program.variables if v.linkage is Linkage.GLOBAL and program.units == 2)
        return with_changed(program, replace(variable, unit=1 - variable.unit))

    def initialiser(self, program: Program) -> Program:
        variable = self._one(v for v in program.variables if v.type is not Type.LARGE)
        initial = self._initial(variable.type)
        if initial == variable.initial:
            raise Impossible
        return with_changed(program, replace(variable, initial=initial))

    def constant(self, program: Program) -> Program:
        function = self._one(f for f in program.functions if f.words or self._own_tables(program, f))
        tables = self._own_tables(program, function)
        if tables and (not function.words or self.random.random() < 0.5):
            return self._with_values(program, self._one(tables))
        return with_function(program, replace(function, words=self.random.choice(WORDS) + str(self.history.fresh())))

    def shared_constant(self, program: Program) -> Program:
        return self._with_values(program, self._one(t for t in program.tables if t.exported))

    def _own_tables(self, program: Program, function: Function) -> list[Table]:
        return [t for t in map(program.table, function.tables) if not t.exported]

    def _with_values(self, program: Program, table: Table) -> Program:
        new = replace(table, values=self._table_values())
        return replace(program, tables=tuple(new if t is table else t for t in program.tables))

    def add_constant(self, program: Program) -> Program:
        return self._with_table(program, exported=False)

    def add_shared_constant(self, program: Program) -> Program:
        if program.units < 2:
            raise Impossible
        return self._with_table(program, exported=True)

    def form(self, program: Program) -> Program:
        function = self._one(program.functions)
        forms = [f for f in Form if f is not function.form and (f is not Form.INLINE or not function.called)]
        # A static function that was global is refused: it may be another unit's that is meant.
        form = self._one(f for f in forms if function.form is not Form.GLOBAL or f is Form.GLOBAL)
        return with_function(program, replace(function, form=form))

    def into_helper(self, program: Program) -> Program:
        variable = self._one(v for v in program.variables if v.linkage is Linkage.LOCAL)
        function = program.function(variable.function)
        uid = self.history.fresh()
        use = next(u for u in function.uses if u.variable == variable.uid)
        helper = Function(uid, f"helper{uid}", function.unit, Form.INLINE, 1, (use,), called=False)
        caller = replace(_without_use(function, variable.uid), calls=(*function.calls, uid))
        program = with_function(replace(program, functions=(*program.functions, helper)), caller)
        program = with_changed(program, replace(variable, function=uid, scope=0))
        second = [f for f in program.functions if f.unit == function.unit and f.called and f.uid != function.uid]
        if second and self.random.random() < 0.3:  # inlined twice
            other = self.random.choice(second)
            program = with_function(program, replace(other, calls=(*other.calls, uid)))
        return program

    def add_function(self, program: Program) -> Program:
        return self._with_function(program, self.random.randrange(program.units))

    def remove_function(self, program: Program) -> Program:
        function = self._one(f for f in program.functions if f.called and not program.callers(f.uid))
        if sum(f.unit == function.unit for f in program.functions) < 3:
            raise Impossible
        return _tidied(replace(program, functions=tuple(f for f in program.functions if f is not function)))

    def restore_function(self, program: Program) -> Program:
        there = {f.uid for f in program.functions}
        function, had = self._one(k for uid, k in self.history.functions.items() if uid not in there and k[0].called)
        own = had.locals_of(function.uid)
        again = {v.uid for v in own} | {v.uid for v in program.variables if v.linkage is not Linkage.LOCAL}
        if any(program.has(v.uid) for v in own):
            raise Impossible  # moved out of it meanwhile
        near = {v.uid for v in program.variables if v.linkage is Linkage.GLOBAL or v.unit == function.unit} | {
            v.uid for v in own
        }
        back = replace(
            function,
            uses=tuple(u for u in function.uses if u.variable in again & near),
            calls=tuple(c for c in function.calls if c in there),
            tables=(),
        )
        return replace(program, functions=(*program.functions, back), variables=(*program.variables, *own))


def with_variable(program: Program, variable: Variable) -> Program:
    return replace(program, variables=(*program.variables, variable))


def with_changed(program: Program, variable: Variable) -> Program:
    return replace(program, variables=tuple(variable if v.uid == variable.uid else v for v in program.variables))


def with_function(program: Program, function: Function) -> Program:
    return replace(program, functions=tuple(function if f.uid == function.uid else f for f in program.functions))


def without_variable(program: Program, uid: int) -> Program:
    functions = tuple(_without_use(f, uid) for f in program.functions)
    return replace(program, functions=functions, variables=tuple(v for v in program.variables if v.uid != uid))


def _without_use(function: Function, uid: int) -> Function:
    return replace(function, uses=tuple(u for u in function.uses if u.variable != uid))


def _uses(function: Function, uid: int) -> bool:
    return any(u.variable == uid for u in function.uses)


def _hidden(program: Program, function: Function) -> bool:
    """Tell whether a function has a static of the name of a variable outside that it uses."""
    used = [program.variable(u.variable) for u in function.uses]
    own = {v.name for v in program.locals_of(function.uid)}
    return any(v.linkage is not Linkage.LOCAL and v.name in own for v in used)


def _rivals(program: Program, variable: Variable) -> list[Variable]:
    own = program.locals_of(variable.function)
    return [v for v in own if v.name == variable.name and v is not variable]


def _tidied(program: Program) -> Program:
    """Leave out helpers that nobody calls and variables that nobody uses."""
    while True:
        functions = tuple(f for f in program.functions if f.called or program.callers(f.uid))
        if functions == program.functions:
            break
        program = replace(program, functions=functions)
    used = {u.variable for f in program.functions for u in f.uses}
    tables = {t for f in program.functions for t in f.tables}
    return replace(
        program,
        variables=tuple(v for v in program.variables if v.uid in used),
        tables=tuple(t for t in program.tables if t.uid in tables),
    )


_EDITS: dict[Edit, Callable[[Author, Program], Program]] = {
    Edit.CODE: Author.change_code,
    Edit.ADD_VARIABLE: Author.add_variable,
    Edit.ADD_RIVAL: Author.add_rival,
    Edit.REMOVE_VARIABLE: Author.remove_variable,
    Edit.BRING_BACK: Author.bring_back,
    Edit.ADD_USE: Author.add_use,
    Edit.REMOVE_USE: Author.remove_use,
    Edit.REORDER: Author.reorder,
    Edit.RENAME_FUNCTION: Author.rename_function,
    Edit.RENAME_VARIABLE: Author.rename_variable,
    Edit.SWAP: Author.swap,
    Edit.TO_GLOBAL: Author.to_global,
    Edit.TO_STATIC: Author.to_static,
    Edit.INTO_FUNCTION: Author.into_function,
    Edit.OUT_OF_FUNCTION: Author.out_of_function,
    Edit.OTHER_UNIT: Author.other_unit,
    Edit.INITIALISER: Author.initialiser,
    Edit.CONSTANT: Author.constant,
    Edit.SHARED_CONSTANT: Author.shared_constant,
    Edit.ADD_CONSTANT: Author.add_constant,
    Edit.ADD_SHARED_CONSTANT: Author.add_shared_constant,
    Edit.FORM: Author.form,
    Edit.INTO_HELPER: Author.into_helper,
    Edit.ADD_FUNCTION: Author.add_function,
    Edit.REMOVE_FUNCTION: Author.remove_function,
    Edit.RESTORE_FUNCTION: Author.restore_function,
}
