"""SCOPES: in which modules, and in which order, the dynamic linker looks for the names of each module.

Read from the dynamic linker's own list: what RTLD_LOCAL, RTLD_GLOBAL, RTLD_DEEPBIND, DT_SYMBOLIC, LD_PRELOAD and
dlmopen made of it stands nowhere else. Modules go by the addresses of their dynamic sections.

`struct r_debug` and the first five members of `struct link_map` are public (<link.h>); the scope, a null-ended array
of search lists, is behind them, at an offset that differs between versions of glibc. It is found by what it must be:
one offset at which every module has an array of lists of modules. Where there is none (another C library), the
answer is None, not a guess.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Container, Mapping
from dataclasses import dataclass

from patcher.errors import PatcherError, TargetBusy, TargetGone
from patcher.linkmap import namespaces, rendezvous, section_of
from patcher.target.memory import Memory

_PUBLIC_SIZE = 40  # of `struct link_map`
_SIZE = 2048  # at most: 1,160 bytes in glibc 2.36
_MOST_LISTS = 64
_TRIES = 500  # a second


@dataclass(frozen=True, slots=True)
class Scopes:
    """For each module the modules in search order, and the number of the namespace that it was loaded into."""

    order: Mapping[int, tuple[int, ...]]
    namespace: Mapping[int, int]
    offset: int  # of the scope in a link map, which stays the same for the life of the process


def read_scopes(memory: Memory, dynamic: int, required: Container[int], offset: int = 0) -> Scopes | None:
    """Read the scopes of all modules; `dynamic` is the address of the executable's dynamic section.

    `required`: the dynamic sections of modules that must have one (the dynamic linker itself need not). `offset` is
    what an earlier answer had, which saves the search for it; 0 for none.
    Raises `TargetBusy` when the program does nothing but load and unload libraries.
    """
    debug = _debug(memory, dynamic)
    for _ in range(_TRIES if debug else 0):
        if _consistent(memory, debug):
            found = _read_if_sound(memory, debug, required, offset)
            if _consistent(memory, debug):
                return found
        time.sleep(0.002)
    if debug:
        raise TargetBusy("the program is loading or unloading libraries all the time", "try again")
    return None


def _debug(memory: Memory, dynamic: int) -> int:
    """Return the address of the process's `r_debug`; 0 where there is none, or nothing in it yet."""
    try:
        debug = rendezvous(memory, dynamic)
        return debug if debug and memory.read_u64(debug + 8) else 0
    except TargetGone:
        raise
    except PatcherError:
        return 0


def _consistent(memory: Memory, debug: int) -> bool:
    return memory.read(debug + 24, 4) == b"\0\0\0\0"  # r_state == RT_CONSISTENT


def _read_if_sound(memory: Memory, debug: int, required: Container[int], known: int) -> Scopes | None:
    try:
        return _read(memory, debug, required, known)
    except TargetGone:
        raise
    except PatcherError:
        return None


def _read(memory: Memory, debug: int, required: Container[int], known: int) -> Scopes | None:
    sections: dict[int, int] = {}  # link map -> dynamic section
    namespace: dict[int, int] = {}
    for number, entries in enumerate(namespaces(memory, debug)):
        for entry in entries:
            sections[entry] = section_of(memory, entry)
            namespace.setdefault(sections[entry], number)  # the dynamic linker itself is in all of them
    lists = _Lists(memory, sections, required)
    offset = known if known and lists.is_scope(known) else lists.offset()
    if offset is None:
        return None
    order: dict[int, tuple[int, ...]] = {}
    for at, section in sections.items():
        scope = lists.scope(at, offset)
        if scope is not None:
            order.setdefault(section, scope)
    return Scopes(order, namespace, offset)


class _Lists:
    """The search lists of the dynamic linker. `sections`: link map -> dynamic section.

    `required`: the sections of modules that names are looked up for, all of which have a scope.
    """

    def __init__(self, memory: Memory, sections: Mapping[int, int], required: Container[int]) -> None:
        self._memory = memory
        self._sections = sections
        self._required = required
        self._known: dict[int, tuple[int, ...] | None] = {}

    def offset(self) -> int | None:
        """Return where in a link map the scope is, or None when that cannot be told."""
        found = [at for at in range(_PUBLIC_SIZE, _SIZE, 8) if self.is_scope(at)]
        return found[0] if len(found) == 1 else None

    def is_scope(self, at: int) -> bool:
        """Tell whether every module has a scope at an offset of its link map, the executable its own first."""
        executable, *others = self._sections
        scope = self.scope(executable, at)
        if scope is None or scope[0] != self._sections[executable]:
            return False
        return all(self.scope(m, at) for m in others if self._sections[m] in self._required)

    def scope(self, link_map: int, offset: int) -> tuple[int, ...] | None:
        """Return the modules in the order of the scope that stands at an offset of a link map."""
        found: dict[int, None] = {}
        try:
            array = self._memory.read_u64(link_map + offset)
            for i in range(_MOST_LISTS):
                element = self._memory.read_u64(array + 8 * i)
                if not element:
                    return tuple(found) or None
                members = self._list(element)
                if members is None:
                    return None
                found.update(dict.fromkeys(members))
        except PatcherError:
            return None
        return None

    def _list(self, element: int) -> tuple[int, ...] | None:
        """Read a `struct r_scope_elem`: r_list, an array of link maps, and r_nlist, their count."""
        if element not in self._known:
            self._known[element] = self._read_list(element)
        return self._known[element]

    def _read_list(self, element: int) -> tuple[int, ...] | None:
        try:
            array, count = struct.unpack("<QI", self._memory.read(element, 12))
            if not 0 < count <= len(self._sections):
                return None
            members = struct.unpack(f"<{count}Q", self._memory.read(array, 8 * count))
        except PatcherError:
            return None
        return tuple(self._sections[m] for m in members) if all(m in self._sections for m in members) else None
