"""The arena: memory of ours in the target, within reach of a module's text, found again by any later controller.

Four parts, one after another, none ever writable and executable:

    r--   constants and cells            | written from outside, through /proc/<pid>/mem
    r-x   islands, then code, switches   |
    rw-   header, slots, journal, data   | the program's own new variables are in `data`
    r-x   one page for injected stubs

It is a private mapping of a memfd called `patcher`, which shows in maps, is copied on fork and needs no
descriptor; where the kernel refuses a memfd, anonymous memory with the same header. Slot 0 of the first
arena holds the number of the live generation, so that one write flips the functions and says so.

What is read from the header was in the memory of another process: it is checked, never trusted.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from patcher.code.entry import COPY_SIZE, SWITCH_CELLS, SWITCH_SIZE
from patcher.errors import Forbidden, PatcherError, TargetBusy, TargetGone, UnsafeChange
from patcher.link.place import Region, Space
from patcher.target import Mapping, Result, SystemCall, Target, read_stat

MAGIC = b"PATCHER\x01"
_HALF_MADE = b"PATCHER\x00"
PAGE = 4096
ISLAND_SIZE = 16
DOOR_SIZE = ISLAND_SIZE + 8  # an island and its slot

READ_ONLY_SIZE = 16 << 20
CODE_SIZE = 16 << 20
WRITABLE_SIZE = 32 << 20
TOTAL_SIZE = READ_ONLY_SIZE + CODE_SIZE + WRITABLE_SIZE + PAGE


SLOT_COUNT = 8192
_SLOTS_OFFSET = PAGE
_JOURNAL_OFFSET = _SLOTS_OFFSET + 8 * SLOT_COUNT
JOURNAL_SIZE = 8 << 20
_JOURNAL_HALF = JOURNAL_SIZE // 2
_DATA_OFFSET = _JOURNAL_OFFSET + JOURNAL_SIZE
_ISLANDS_SIZE = ISLAND_SIZE * SLOT_COUNT
_SWITCHES_SIZE = SWITCH_SIZE * SLOT_COUNT

# magic, base, primary's header, used r--, used r-x, used rw-, slots in use, journal bytes in use, owner, its start
_HEADER = struct.Struct("<8sQQQQQQQQQ")
_USED = struct.Struct("<QQQQQ")
_USED_OFFSET = 24
_JOURNAL_USED_OFFSET = _USED_OFFSET + 32
_LOCK = struct.Struct("<QQ")
_LOCK_OFFSET = 64
_PAIR = struct.Struct("<QQ")
_COMING_OFFSET = 128

_MMAP, _MUNMAP, _CLOSE, _FTRUNCATE, _MEMFD_CREATE = 9, 11, 3, 77, 319
_READ, _WRITE, _EXEC = 1, 2, 4
_PRIVATE, _FIXED, _ANONYMOUS, _NORESERVE, _FIXED_NOREPLACE = 0x2, 0x10, 0x20, 0x4000, 0x100000
_CLOEXEC = 1
_NO_FD = (1 << 64) - 1

REACH = (1 << 31) - (16 << 20)  # a rel32 reaches 2 GiB; the margin keeps every part of both ends within it


@dataclass(frozen=True, slots=True)
class Usage:
    """How far each part of an arena is in use: addresses, a slot count and journal bytes."""

    read_only: int
    code: int
    data: int
    slots: int
    journal: int


class Arena:
    """One arena. `base` is its lowest address; everything else follows from the layout above."""

    def __init__(self, target: Target, base: int, primary: int) -> None:
        self.target = target
        self.base = base
        self.primary = primary  # base of the arena that holds the journal

    # --- layout -----------------------------------------------------------------------------------------------

    @property
    def code_start(self) -> int:
        return self.base + READ_ONLY_SIZE

    @property
    def header(self) -> int:
        return self.code_start + CODE_SIZE

    @property
    def slots(self) -> int:
        return self.header + _SLOTS_OFFSET

    @property
    def journal(self) -> int:
        return self.header + _JOURNAL_OFFSET

    @property
    def stub(self) -> int:
        """The page of executable memory for injected stubs."""
        return self.header + WRITABLE_SIZE

    @property
    def switches(self) -> int:
        """The end of the code, where every slot has room for a switch."""
        return self.header - _SWITCHES_SIZE

    @property
    def coming(self) -> int:
        """The cell with the number of the generation that switches wait for."""
        return self.header + _COMING_OFFSET

    @property
    def end(self) -> int:
        return self.base + TOTAL_SIZE

    def contains(self, address: int) -> bool:
        return self.base <= address < self.end

    @property
    def without_words(self) -> tuple[tuple[int, int], ...]:
        """What is no memory of the program's: all but slots and data."""
        journal = (self.journal, self.journal + JOURNAL_SIZE)
        return (self.base, self.slots), journal, (self.stub, self.end)

    def island(self, index: int) -> int:
        return self.code_start + ISLAND_SIZE * index

    def slot(self, index: int) -> int:
        return self.slots + 8 * index

    def switch(self, index: int) -> int:
        return self.switches + SWITCH_SIZE * index

    @property
    def live(self) -> int:
        """The cell with the number of the live generation: the first slot of the first arena."""
        return self.primary + (self.slots - self.base)

    def islands(self, count: int) -> Iterator[tuple[int, int]]:
        """Yield (island address, slot index) for the slots in use."""
        return ((self.island(i), i) for i in range(1, count))

    # --- state ------------------------------------------------------------------------------------------------

    def usage(self) -> Usage:
        """Read how far the arena is in use. Raises `UnsafeChange` when the header makes no sense."""
        raw = self.target.memory.read(self.header + _USED_OFFSET, _USED.size)
        usage = Usage(*_USED.unpack(raw))
        sane = (
            self.base <= usage.read_only <= self.code_start
            and self.code_start + _ISLANDS_SIZE <= usage.code <= self.header
            and self.header + _DATA_OFFSET <= usage.data <= self.stub
            and 1 <= usage.slots <= SLOT_COUNT
            and usage.journal <= JOURNAL_SIZE
        )
        if not sane:
            raise UnsafeChange(
                f"the arena at {self.base:#x} has a header that makes no sense",
                "restart the program; its memory was overwritten",
                code="damaged-journal",
            )
        return usage

    def fresh_usage(self) -> Usage:
        """Return the usage of an arena that holds nothing yet."""
        return Usage(self.base, self.code_start + _ISLANDS_SIZE, self.header + _DATA_OFFSET, 1, 0)

    def reaches(self, low: int, high: int) -> bool:
        """Tell whether every part of the arena is within a rel32 of every address in `low`..`high`."""
        return max(self.end - low, high - self.base) < REACH + (16 << 20)

    def set_usage(self, usage: Usage) -> None:
        raw = _USED.pack(usage.read_only, usage.code, usage.data, usage.slots, usage.journal)
        self.target.memory.write(self.header + _USED_OFFSET, raw)

    def space(self, usage: Usage) -> Space:
        """Return the memory that is still free for a generation's blocks.

        What the slots that are left may need for displaced entries is kept back: these must be near their functions,
        and blocks may go to another arena.
        """
        kept_back = (SLOT_COUNT - usage.slots) * COPY_SIZE
        return Space(
            Region(usage.read_only, self.code_start),
            Region(usage.code, max(usage.code, self.switches - kept_back)),
            Region(usage.data, self.stub),
        )

    def has_used(self, start: int, end: int, usage: Usage) -> bool:
        """Tell whether a range lies in the part of the constants or of the code that is in use."""
        code = self.code_start + _ISLANDS_SIZE
        return self.base <= start < end <= usage.read_only or code <= start < end <= usage.code

    def entry_space(self, usage: Usage) -> Region:
        """Return the memory that is still free for displaced entries."""
        return Region(usage.code, max(usage.code, self.switches))

    def bytes_used(self, usage: Usage, free: Iterable[tuple[int, int]] = ()) -> int:
        """Return the bytes of code, constants, data and islands, with their slots, that are in use."""
        return (
            -sum(end - start for start, end in free if self.contains(start))
            + usage.read_only
            - self.base
            + usage.code
            - (self.code_start + _ISLANDS_SIZE)
            + usage.data
            - (self.header + _DATA_OFFSET)
            + (usage.slots - 1) * DOOR_SIZE
        )

    def read_slots(self, count: int) -> list[int]:
        return list(struct.unpack(f"<{count}Q", self.target.memory.read(self.slots, 8 * count)))

    def write_slots(self, slots: Sequence[int]) -> None:
        self.target.memory.write(self.slots, struct.pack(f"<{len(slots)}Q", *slots))

    def led_to(self, slots: Sequence[int]) -> list[int]:
        """Return what slots lead to: where one holds a switch, what that switch chooses."""
        if not any(self.switches <= body < self.header for body in slots):
            return list(slots)
        come = self.target.memory.read_u64(self.live) == self.target.memory.read_u64(self.coming)
        cell = SWITCH_CELLS + 8 * come
        inside = range(self.switches, self.header)
        return [self.target.memory.read_u64(body + cell) if body in inside else body for body in slots]

    def switched(self, count: int) -> dict[tuple[int, int], tuple[int, int]]:
        """Return the switches of so many slots that were ever in use, as extents, and where each leads.

        Who is in one, or comes back to it from a signal handler, has the address from nowhere else.
        """
        data, found = self.target.memory.read(self.switches, SWITCH_SIZE * count), {}
        for index in range(1, count):
            old, new = _PAIR.unpack_from(data, SWITCH_SIZE * index + SWITCH_CELLS)
            if old or new:
                found[self.switch(index), self.switch(index) + SWITCH_SIZE] = (old, new)
        return found

    # --- the journal ------------------------------------------------------------------------------------------

    def journal_part(self, used: int) -> tuple[int, int]:
        """Return where the half of the journal's area begins and ends that `used` bytes reach into: offsets."""
        return (0, _JOURNAL_HALF) if used <= _JOURNAL_HALF else (_JOURNAL_HALF, JOURNAL_SIZE)

    def read_journal(self, used: int) -> bytes:
        start, _ = self.journal_part(used)
        return self.target.memory.read(self.journal + start, used - start)

    def replace_journal(self, used: int, contents: bytes) -> None:
        """Have `contents` for a journal: written into the half that is not in use, which one word then makes it."""
        start = 0 if self.journal_part(used)[0] else _JOURNAL_HALF
        assert 0 < len(contents) <= _JOURNAL_HALF
        self.target.memory.write(self.journal + start, contents)
        end = (start + len(contents)).to_bytes(8, "little")
        self.target.memory.write(self.header + _JOURNAL_USED_OFFSET, end)

    # --- one controller at a time -----------------------------------------------------------------------------

    def lock(self, pid: int, start_time: int) -> None:
        """Take the target for one transaction. Raises `TargetBusy` naming a living owner; a dead one's is taken."""
        self.refuse_owner(pid, start_time)
        self.target.memory.write(self.header + _LOCK_OFFSET, _LOCK.pack(pid, start_time))
        if self.owner() != (pid, start_time):
            raise TargetBusy(f"process {self.target.pid} was taken by another patcher", "try again", code="locked")

    def refuse_owner(self, pid: int, start_time: int) -> None:
        """Raise `TargetBusy` naming the owner of the lock, if it is another process and alive."""
        owner, started = self.owner()
        if owner and (owner, started) != (pid, start_time) and _is_alive(owner, started):
            raise TargetBusy(
                f"process {self.target.pid} is being patched by process {owner}",
                f"wait for it, or stop it with `kill {owner}`",
                code="locked",
            )

    def owner(self) -> tuple[int, int]:
        pid, start = _LOCK.unpack(self.target.memory.read(self.header + _LOCK_OFFSET, _LOCK.size))
        return pid, start

    def unlock(self) -> None:
        self.target.memory.write(self.header + _LOCK_OFFSET, bytes(_LOCK.size))


def _is_alive(pid: int, start_time: int) -> bool:
    try:
        return read_stat(pid).start_time == start_time
    except TargetGone:
        return False


def find_arenas(target: Target) -> tuple[Arena, ...]:
    """Return the arenas of a process, the one with the journal first."""
    found = []
    for mapping in target.mappings():
        if mapping.permissions[:3] == "rw-" and _may_be_arena(mapping):
            arena = _read_header(target, mapping)
            if arena is not None:
                found.append(arena)
    found.sort(key=lambda a: (a.base != a.primary, a.base))
    return tuple(found)


def _may_be_arena(mapping: Mapping) -> bool:
    named = mapping.path.startswith("/memfd:patcher")
    return named or (not mapping.path and mapping.size >= WRITABLE_SIZE)


def _read_header(target: Target, mapping: Mapping) -> Arena | None:
    try:
        raw = target.memory.read(mapping.start, _HEADER.size)
    except TargetGone:
        raise
    except PatcherError:
        return None
    magic, base, primary, *_ = _HEADER.unpack(raw)
    arena = Arena(target, base, primary)
    return arena if magic == MAGIC and arena.header == mapping.start else None


def arena_near(target: Target, low: int, high: int, *, below_2g: bool) -> int:
    """Return where an arena within reach of the text in `low`..`high` can go. Raises `TargetBusy` without a hole."""
    floor, ceiling = high - REACH, low + REACH
    if below_2g:
        ceiling = min(ceiling, (1 << 31) - PAGE)
    for base in _holes(target.mappings(), low, high, (floor, ceiling)):
        return base
    raise TargetBusy(
        f"process {target.pid}: there is no hole of {TOTAL_SIZE >> 20} MiB within 2 GiB of {low:#x}",
        "restart the program with the new code",
        code="no-arena",
    )


def arena_anywhere(target: Target) -> int:
    """Return where an arena can go at all. Raises `TargetBusy` without a hole."""
    for base in _holes(target.mappings(), 1 << 46, 1 << 46, (0, 1 << 47)):
        return base
    raise TargetBusy(
        f"process {target.pid}: its address space has no hole of {TOTAL_SIZE >> 20} MiB", "restart it", code="no-arena"
    )


def create_arena(target: Target, arena: Arena) -> None:
    """Map a planned arena, all of it or nothing. Raises `TargetBusy` when the kernel refuses the mapping."""
    try:
        _map_arena(target, arena)
    except BaseException:
        with suppress(PatcherError, OSError):
            remove_arena(target, arena)
        raise


def remove_arena(target: Target, arena: Arena) -> None:
    """Unmap an arena that nothing refers to, or what there is of it by now; one that a thread still uses stays."""
    if not target.has_left(arena.stub):
        return
    ours = [m for m in target.mappings() if arena.base <= m.start and m.end <= arena.end and m.private]
    if sum(m.size for m in ours) == TOTAL_SIZE:
        target.inject([SystemCall(_MUNMAP, (arena.base, TOTAL_SIZE))])


def half_made_arenas(target: Target) -> list[Arena]:
    """Return the arenas that a controller which died was about to make, in a process that nobody else works on now."""
    found = []
    for m in target.mappings():
        begun = not m.path and m.size == TOTAL_SIZE and m.permissions == "r-xp"
        mapped = m.path.startswith("/memfd:patcher") and m.size == READ_ONLY_SIZE and m.permissions == "r--p"
        arena = Arena(target, m.start, m.start)
        if mapped and _starts_with(target, arena.header, bytes(len(MAGIC))):
            found.append(arena)
        if begun and (_starts_with(target, m.start, _HALF_MADE) or target.is_untouched_reserve(m)):
            found.append(arena)
    return found


def _starts_with(target: Target, address: int, mark: bytes) -> bool:
    return target.memory.read_available(address, len(mark)) == mark


def _map_arena(target: Target, arena: Arena) -> None:
    flags = _PRIVATE | _ANONYMOUS | _FIXED_NOREPLACE | _NORESERVE
    whole = SystemCall(_MMAP, (arena.base, TOTAL_SIZE, _READ | _EXEC, flags, _NO_FD, 0))
    planned = [*_nameless(arena), SystemCall(_MUNMAP, (arena.base, TOTAL_SIZE))]
    (result,) = target.inject([whole], planned=planned)
    if result != arena.base:
        raise TargetBusy(
            f"process {target.pid}: {TOTAL_SIZE >> 20} MiB cannot be mapped at {arena.base:#x}: errno {-result}",
            "try again; if it stays so, raise the process's memory limits (`prlimit --as`)",
            code="no-arena",
        )
    target.memory.write(arena.base, _HALF_MADE)
    _furnish(target, arena)


def _furnish(target: Target, arena: Arena) -> None:
    base = arena.base
    named = [
        SystemCall(_MEMFD_CREATE, (b"patcher\0", _CLOEXEC)),
        SystemCall(_FTRUNCATE, (Result(0), TOTAL_SIZE)),
        *(_map(part, base, _PRIVATE | _FIXED, Result(0)) for part in _parts(arena)),
        SystemCall(_CLOSE, (Result(0),)),
    ]
    try:
        results = target.inject(named, code=arena.stub)
    except Forbidden:
        results = ()  # a filter that may kill for a memfd, where nameless memory is all right
    if len(results) != len(named) or results[-1] < 0:
        if results and results[0] >= 0:
            target.inject([SystemCall(_CLOSE, (results[0],))], code=arena.stub)
        nameless = _nameless(arena)
        results = target.inject(nameless, code=arena.stub)
        if len(results) != len(nameless) or results[-1] < 0:
            raise TargetBusy(
                f"process {target.pid}: an arena cannot be mapped: errno {-results[-1] if results else 0}",
                "raise the process's memory limits (`prlimit --as`), or restart it",
                code="no-arena",
            )
    fresh = arena.fresh_usage()
    used = (fresh.read_only, fresh.code, fresh.data, fresh.slots, fresh.journal)
    target.memory.write(arena.header, _HEADER.pack(MAGIC, base, arena.primary, *used, 0, 0))


def _parts(arena: Arena) -> tuple[tuple[int, int, int], ...]:
    return (
        (arena.base, READ_ONLY_SIZE, _READ),
        (arena.code_start, CODE_SIZE, _READ | _EXEC),
        (arena.header, WRITABLE_SIZE, _READ | _WRITE),
    )


def _nameless(arena: Arena) -> list[SystemCall]:
    return [_map(part, arena.base, _PRIVATE | _FIXED | _ANONYMOUS, None) for part in _parts(arena)]


def _map(part: tuple[int, int, int], base: int, flags: int, descriptor: Result | None) -> SystemCall:
    address, size, protection = part
    if descriptor is None:
        return SystemCall(_MMAP, (address, size, protection, flags, _NO_FD, 0))
    return SystemCall(_MMAP, (address, size, protection, flags, descriptor, address - base))


def _holes(mappings: Iterable[Mapping], low: int, high: int, limits: tuple[int, int]) -> Iterator[int]:
    """Yield base addresses within `limits` at which an arena would fit, the best first.

    Below the module is best: above an executable the heap grows, below the stack the stack does.
    """
    ordered = sorted(mappings, key=lambda m: m.start)
    floor, ceiling = max(1 << 16, limits[0]), min((1 << 47) - PAGE, limits[1])
    below_2g = ceiling < 1 << 31
    gaps = []
    previous = 1 << 16
    for mapping in ordered:
        gaps.append((previous, mapping.start, mapping.path))
        previous = max(previous, mapping.end)
    gaps.append((previous, 1 << 47, ""))
    heap = max((m.end for m in ordered if m.path == "[heap]"), default=0)
    candidates = []
    for start, end, above in gaps:
        if above == "[stack]":
            end -= 256 << 20
        bottom, top = max(start, floor), min(end, ceiling)
        # brk grows upwards from the heap, or from the executable's end when there is none yet.
        growing = start == heap or (not heap and start < 1 << 46 and start >= high)
        if growing and not below_2g:
            bottom = max(bottom, min(start + (1 << 30), top - TOTAL_SIZE))
        base = (top - TOTAL_SIZE) & -PAGE
        if base >= bottom:
            distance = abs(low - base)
            candidates.append((growing and not below_2g, distance, base))
    yield from (base for _, _, base in sorted(candidates))
