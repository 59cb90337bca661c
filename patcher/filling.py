"""FILLING: what runs while every thread stands still, so that new storage has what the old one had.

The other threads could go on writing the old storage between the copy and the flip: so the functions that fill run on
one thread while all the others stand still, in the very stop in which the generation goes live. What they wait for
then they get never: so no thread may be in the allocator and its like, and any other wait ends by the time limit.

Decides when that may be, and that nobody is left with an address in the old storage. Which storage, and by what, was
decided when the generation was linked (`data.migrate`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from patcher.data.still_used import refuse_words
from patcher.errors import AttachDenied, PatcherError, TargetGone, UnsafeChange
from patcher.image import Image
from patcher.loader import Caller, Workspace
from patcher.patch.commit import Fill
from patcher.patch.journal import ArenaView
from patcher.patch.transaction import read_stack
from patcher.target import FunctionCall, Stopped, StoppedThread

_LOOP_OFFSET = 2048  # in the page for the stub
_BATCH = 6  # calls in one stub
# loop(function, new, old, count, new step, old step)
_LOOP = bytes.fromhex(
    "53"  # push %rbx
    "55"  # push %rbp
    "4154"  # push %r12
    "4155"  # push %r13
    "4156"  # push %r14
    "4157"  # push %r15
    "4883ec08"  # sub $8, %rsp
    "4889fb"  # mov %rdi, %rbx
    "4889f5"  # mov %rsi, %rbp
    "4989d4"  # mov %rdx, %r12
    "4989cd"  # mov %rcx, %r13
    "4d89c6"  # mov %r8, %r14
    "4d89cf"  # mov %r9, %r15
    "4d85ed"  # again: test %r13, %r13
    "7413"  # je end
    "4889ef"  # mov %rbp, %rdi
    "4c89e6"  # mov %r12, %rsi
    "ffd3"  # call *%rbx
    "4c01f5"  # add %r14, %rbp
    "4d01fc"  # add %r15, %r12
    "49ffcd"  # dec %r13
    "ebe8"  # jmp again
    "4883c408"  # end: add $8, %rsp
    "415f"  # pop %r15
    "415e"  # pop %r14
    "415d"  # pop %r13
    "415c"  # pop %r12
    "5d"  # pop %rbp
    "5b"  # pop %rbx
    "c3"  # ret
)


class Filling:
    """The fills of one generation, to be done in one stop. `memory` is for calls, and None where there are none."""

    def __init__(
        self, image: Image, view: ArenaView, fills: Sequence[Fill], memory: Workspace | None, limit: float
    ) -> None:
        self._image = image
        self._target = image.target
        self._view = view
        self._fills = tuple(fills)
        self._memory = memory
        self._ranges = tuple((f.old, f.old + f.old_size) for f in fills)
        self._caller = Caller(image, timeout=limit)
        if memory is not None:
            self._target.memory.write(memory.code + _LOOP_OFFSET, _LOOP)

    def __call__(self, stopped: Stopped) -> str:
        """Fill, and say why that has to wait if it has. Raises `UnsafeChange` with the old storage as it was."""
        threads = stopped.described()
        reason = self._reason_to_wait(threads)
        if reason:
            return reason
        called = [f for f in self._fills if f.moved is None]
        chosen = next((t for t in threads if not self._caller.objection(t)), None)
        if called and chosen is None:
            return f"thread {threads[0].tid} {self._caller.objection(threads[0])}"
        names = ", ".join(f.name for f in self._fills)
        ends = [end for f in self._fills if f.moved is not None and self._is_inner(end := f.old + f.old_size)]
        refuse_words(self._image, self._view, names, self._ranges, [t.sp for t in threads], ends)
        if called and chosen is not None:
            self._fill(stopped, chosen.tid, called)
        for fill in self._fills:
            if fill.moved is not None:
                self._move(fill, fill.moved)
            self._check_addresses(fill)
        return ""

    def _is_inner(self, address: int) -> bool:
        """Tell whether the place behind a variable is within its module: that one's own end, others know as well."""
        module = self._image.module_at(address)
        return module is not None and address - module.bias not in {s.end for s in module.module.segments}

    def _move(self, fill: Fill, moved: Callable[[bytes], Sequence[tuple[int, bytes]]]) -> None:
        """Copy what is carried over into the new storage, which has its initial value."""
        new = bytearray(self._target.memory.read(fill.new, fill.new_size))
        try:
            for offset, data in moved(self._target.memory.read(fill.old, fill.old_size)):
                new[offset : offset + len(data)] = data
        except OverflowError:
            raise UnsafeChange(
                f"a number in `{fill.name}` of {fill.unit} has a value that its new type has no room for",
                "keep the type, or write a function that fills the new variable: "
                f"`void patcher_migrate_{fill.name}(void *new_object, const void *old_object)`",
                code="migration",
            ) from None
        self._target.memory.write(fill.new, bytes(new))

    def _reason_to_wait(self, threads: Sequence[StoppedThread]) -> str:
        mappings = self._target.mappings()
        for thread in threads:
            held = self._caller.holding(thread) if self._memory is not None else ""
            if held:
                return f"thread {thread.tid} {held}"
            stack = read_stack(self._target, thread.sp, mappings)
            for fill, (low, high) in zip(self._fills, self._ranges, strict=True):
                if any(low <= word < high for word in thread.general):
                    return f"thread {thread.tid} holds the address of `{fill.name}` in a register"
                if np.any((stack >= np.uint64(low)) & (stack < np.uint64(high))):
                    return f"thread {thread.tid} holds the address of `{fill.name}` on its stack"
        return ""

    def _fill(self, stopped: Stopped, tid: int, called: Sequence[Fill]) -> None:
        before = [self._target.memory.read(f.old, f.old_size) for f in self._fills]
        try:
            for i in range(0, len(called), _BATCH):
                self._call(stopped, tid, called[i : i + _BATCH])
            for fill, data in zip(self._fills, before, strict=True):
                self._check_kept(fill, data, called)
        except PatcherError:
            for fill, data in zip(self._fills, before, strict=True):
                self._target.memory.write(fill.old, data)
            raise

    def _call(self, stopped: Stopped, tid: int, fills: Sequence[Fill]) -> None:
        assert self._memory is not None
        loop = self._memory.code + _LOOP_OFFSET
        calls = [FunctionCall(loop, (f.function, f.new, f.old, f.count, f.new_step, f.old_step)) for f in fills]
        try:
            self._caller.call_standing(stopped, tid, calls, self._memory)
        except (TargetGone, AttachDenied):
            raise
        except PatcherError as error:
            if not self._target.left_alone(self._memory.code):  # it goes on by what is there
                self._forget_arguments()
            by = ", ".join(dict.fromkeys(f"`{f.by}`" for f in fills))
            raise UnsafeChange(
                f"{by} of {fills[0].unit} was not run to its end, and so nothing was changed: {error.message}",
                "while it runs, every other thread stands still: it must not wait for any of them",
                code=error.code,
            ) from None

    def _forget_arguments(self) -> None:
        """Clear the addresses that an abandoned call left on our stack: nobody refers to anything by them."""
        assert self._memory is not None
        low, high = self._memory.stack
        words = np.frombuffer(self._target.memory.read(low, high - low), np.uint64).copy()
        for start, end in self._ranges:
            words[(words >= np.uint64(start)) & (words < np.uint64(end))] = 0
        self._target.memory.write(low, words.tobytes())

    def _check_kept(self, fill: Fill, before: bytes, called: Sequence[Fill]) -> None:
        if self._target.memory.read(fill.old, fill.old_size) != before:
            by = fill.by or ", ".join(dict.fromkeys(f.by for f in called))
            raise UnsafeChange(
                f"`{by}` of {fill.unit} wrote to the old `{fill.name}`, which a revert goes back to",
                "let it write to the new object only",
                code="migration",
            )

    def _check_addresses(self, fill: Fill) -> None:
        """Refuse new contents that lead to the old storage of any of the variables."""
        new = self._target.memory.read(fill.new, fill.new_size)
        words = [int.from_bytes(new[i : i + 8], "little") for i in range(0, len(new) - 7, 8)]
        # What is copied may hold the address behind the end as well.
        ends = [high + (fill.moved is not None) for _, high in self._ranges]
        for other, (low, _), end in zip(self._fills, self._ranges, ends, strict=True):
            if not any(low <= word < end for word in words):
                continue
            if fill.moved is None:
                said = f"`{fill.by}` of {fill.unit} left an address in the old `{other.name}` in the new `{fill.name}`"
                hint = "let it compute addresses within the new object"
            else:
                said = f"`{fill.name}` of {fill.unit} holds an address in the old `{other.name}`"
                hint = f"write `void patcher_migrate_{fill.name}(void *new_object, const void *old_object)`"
            raise UnsafeChange(said, hint, code="migration")
