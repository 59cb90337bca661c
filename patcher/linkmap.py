"""LINK MAP: what the target's dynamic linker itself keeps about the thread-local storage of its modules.

The list of loaded modules is public (`r_debug`, `struct link_map`). What says where a module's thread-local block
is lies in glibc's private part of each entry; where in it, glibc describes for debuggers, in objects that its
thread library exports (`_thread_db_link_map_l_tls_modid` and its like: bits, count, offset).

Decides what these numbers are at this moment. What to do where they are missing (another C library, a static
program) is `image`'s business. Never writes to the process.

Specification: gdb's "Rendezvous structure" (link.h); glibc, nptl_db/structs.def and elf/dl-tls.c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

from patcher.errors import PatcherError, TargetGone
from patcher.target.memory import Memory

MODULE_NUMBER = "_thread_db_link_map_l_tls_modid"
"""The exported object that describes where a link map has its module's number."""

BLOCK_OFFSET = "_thread_db_link_map_l_tls_offset"
"""The exported object that describes where a link map has its block's distance below the thread pointer."""

RENDEZVOUS = "_r_debug"
"""The process's `r_debug`, as the dynamic linker exports it."""

_DT_DEBUG = 21
_MANY = 1 << 14  # more modules, or dynamic entries, than any process has: a list that does not end
_GREATEST = 1 << 31


@dataclass(frozen=True, slots=True)
class ThreadBlock:
    """Where a module's thread-local block is. `offset` counts from the thread pointer (negative).

    `offset` is None for a block that each thread gets when it first asks the dynamic linker for it, or may get so.
    """

    module_id: int
    offset: int | None


@dataclass(frozen=True, slots=True)
class Layout:
    """Where glibc's link map has the two numbers: offsets within it, as the exported objects describe them."""

    module_number: int
    block_offset: int

    @classmethod
    def read(cls, memory: Memory, module_number: int, block_offset: int) -> Layout | None:
        """Read the two descriptions at these addresses; None when they are of another form than known."""
        found = (_described(memory, module_number), _described(memory, block_offset))
        return None if found[0] is None or found[1] is None else cls(found[0], found[1])


def _described(memory: Memory, address: int) -> int | None:
    words = memory.read(address, 12)
    bits, count, offset = (int.from_bytes(words[i : i + 4], "little") for i in (0, 4, 8))
    return offset if (bits, count) == (64, 1) and 40 <= offset < 1 << 16 and not offset & 7 else None


def rendezvous(memory: Memory, dynamic: int) -> int:
    """Return the address of the process's `r_debug`, from an executable's live dynamic section; 0 for none."""
    for i in range(_MANY):
        entry = memory.read(dynamic + 16 * i, 16)
        tag = int.from_bytes(entry[:8], "little")
        if tag == _DT_DEBUG:
            return int.from_bytes(entry[8:], "little")
        if tag == 0:
            return 0
    return 0


def thread_blocks(memory: Memory, debug: int, layout: Layout) -> dict[int, ThreadBlock]:
    """Return the thread-local blocks of the modules in the link map, by the address of their dynamic section.

    `debug` is the process's `r_debug`. The process may be changing the list just now: what cannot be read is left out.
    """
    found = {}
    try:
        for entry in chain.from_iterable(namespaces(memory, debug)):
            block = _block(memory, entry, layout)
            if block is not None:
                found[section_of(memory, entry)] = block
    except TargetGone:
        raise
    except PatcherError:
        pass
    return found


def namespaces(memory: Memory, debug: int) -> Iterator[Iterator[int]]:
    """Yield the link maps of each namespace: the program's, then those of others (dlmopen)."""
    for _ in range(_MANY):
        if not debug:
            return
        version = int.from_bytes(memory.read(debug, 4), "little")
        yield _following(memory, memory.read_u64(debug + 8))  # r_map
        debug = memory.read_u64(debug + 40) if version >= 2 else 0  # r_next


def _following(memory: Memory, entry: int) -> Iterator[int]:
    for _ in range(_MANY):
        if not entry:
            return
        yield entry
        entry = memory.read_u64(entry + 24)  # l_next


def section_of(memory: Memory, entry: int) -> int:
    """Return the address of the dynamic section of a link map's module."""
    return memory.read_u64(entry + 16)  # l_ld


def _block(memory: Memory, entry: int, layout: Layout) -> ThreadBlock | None:
    number = memory.read_u64(entry + layout.module_number)
    distance = memory.read_u64(entry + layout.block_offset)
    if not 0 < number < _GREATEST:
        return None
    # 0: not decided yet; -1: decided that it is never static (FORCED_DYNAMIC_TLS_OFFSET).
    return ThreadBlock(number, -distance if 0 < distance < _GREATEST else None)


_GENERATIONS = "_thread_db_rtld_global__dl_tls_dtv_slotinfo_list"
_LINKER_STATE = "_rtld_global"
_LENGTH, _NEXT, _SLOTS, _GENERATION = (
    f"_thread_db_dtv_slotinfo{part}" for part in ("_list_len", "_list_next", "_list_slotinfo", "_gen")
)
_SLOT_SIZE = "_thread_db_sizeof_dtv_slotinfo"
GENERATION_NAMES = (_GENERATIONS, _LENGTH, _NEXT, _SLOTS, _GENERATION, _LINKER_STATE, _SLOT_SIZE)
"""What `generations` asks for."""


def generations(memory: Memory, exported: Callable[[str], int]) -> dict[int, int] | None:
    """Return since when each module's number stands for the module that has it now; None where nobody says so.

    A thread whose own table is older has nothing of that module yet, whatever its table says. `exported` gives the
    address of what the C library exports, 0 for nothing.
    """
    names = (_GENERATIONS, _LENGTH, _NEXT, _SLOTS, _GENERATION)
    described = [exported(name) for name in names]
    state, size_at = exported(_LINKER_STATE), exported(_SLOT_SIZE)
    if not all(described) or not state or not size_at:
        return None
    start, length, following, slots, generation = (
        int.from_bytes(memory.read(address + 8, 4), "little") for address in described
    )
    size = int.from_bytes(memory.read(size_at, 4), "little")
    entry, found = memory.read_u64(state + start), dict[int, int]()
    for _ in range(_MANY):
        if not entry:
            return found
        count = memory.read_u64(entry + length)
        if count > _MANY or not 0 < size <= 64:
            return None
        for i in range(count):
            found[len(found)] = memory.read_u64(entry + slots + size * i + generation)
        entry = memory.read_u64(entry + following)
    return None
