"""The names that compilers give the static variables of functions, and what the programmer called them.

gcc numbers them in C (`hits.3`), clang puts the function before them (`count.hits`, a second one `count.hits.1`), and
C++ mangles both, with a number where one function has several (`_ZZ5countvE4hits`, `_ZZ5countvE4hits_0`), beside a
guard (`_ZGVZ5countvE4hits`). Numbers follow the order in the source and say nothing from one compile to the next.

Specification: Itanium C++ ABI, section 5.1.6 (scope encoding, discriminators).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from patcher.live import base_name

_ENTITY = re.compile(r"E(\d+)(?=[A-Za-z_])")
_PIECE = re.compile(r"\.\d+$")
_LOCAL, _GUARD = "_ZZ", "_ZGVZ"


@dataclass(frozen=True, slots=True)
class Spelling:
    """What a symbol's name says: the variable as the source calls it, and the function it is in, when that is said.

    `scoped`: it is not a name of the file's own, so that the compiler may have changed it.
    """

    source: str
    function: str = ""
    scoped: bool = False
    guard: bool = False


def spelling(name: str) -> Spelling:
    """Read a variable's symbol name."""
    if name.startswith((_LOCAL, _GUARD)):
        return _mangled(name)
    plain = base_name(name)
    function, dot, source = plain.rpartition(".")
    if dot and function and source:
        return Spelling(source, function, scoped=True)
    return Spelling(plain, scoped=plain != name)


def guards(guard: str, variable: str) -> bool:
    """Tell by their names whether a guard is that of a variable, or of a piece that a compiler made of one."""
    return guard == guard_of(variable)


def guard_of(variable: str) -> str:
    """Return the name of a C++ static variable's guard."""
    return "_ZGV" + _PIECE.sub("", variable).removeprefix("_Z")


def _mangled(name: str) -> Spelling:
    guard = name.startswith(_GUARD)
    plain = base_name(name)
    body = plain.removeprefix(_GUARD if guard else _LOCAL)
    for found in reversed(list(_ENTITY.finditer(body))):
        end = found.end() + int(found[1])
        if end == len(body):
            return Spelling(body[found.end() : end], "_Z" + body[: found.start()], scoped=True, guard=guard)
    return Spelling(body, "", scoped=True, guard=guard)
