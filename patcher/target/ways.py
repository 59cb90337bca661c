"""Ways: how a single system call, made in the target's own code, goes on to rt_sigreturn by itself.

Decides which instructions of the program serve for that, and where they are written for the while of a call if it has
none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from patcher.target.loan import Unsuitable, Way
from patcher.target.maps import Mapping
from patcher.target.memory import Memory
from patcher.target.steps import RT_SIGRETURN

_CALL_RETURN = b"\x0f\x05\xc3"  # syscall; ret
_SIGRETURN = (
    b"\x48\xc7\xc0\x0f\x00\x00\x00\x0f\x05",  # mov $15, %rax; syscall
    b"\xb8\x0f\x00\x00\x00\x0f\x05",  # mov $15, %eax; syscall
)
_POP_RETURN = b"\x58\xc3"  # pop %rax; ret
# syscall; again: mov $15, %eax; syscall; jmp again
_WHOLE_STUB = b"\x0f\x05\xb8\x0f\x00\x00\x00\x0f\x05\xeb\xf7"


class Ways:
    """The ways through the code of one target."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._known: dict[tuple[tuple[int, int, str, int], ...], Way | None] = {}

    def find(self, mappings: Sequence[Mapping]) -> Way | None:
        """Return a way that the program's own code has, if it has one."""
        texts = [mapping for mapping in mappings if _holds_program_text(mapping)]
        texts.sort(key=lambda mapping: mapping.path != "[vdso]")
        key = tuple((m.start, m.end, m.device, m.inode) for m in texts)
        known = self._known.get(key)  # searching all code takes longer than everything else that a call needs
        if known is None or self._memory.read_available(known.start, len(_CALL_RETURN)) != _CALL_RETURN:
            known = self._search(texts)
            self._known = {key: known}
        return known

    def _search(self, texts: Sequence[Mapping]) -> Way | None:
        found: dict[bytes, int] = {}
        for mapping in texts:
            data = self._memory.read(mapping.start, mapping.size)
            for pattern in (_CALL_RETURN, *_SIGRETURN, _POP_RETURN):
                position = data.find(pattern)
                if position >= 0:
                    found.setdefault(pattern, mapping.start + position)
            way = _way(found)
            if way is not None:
                return way
        return None

    @contextmanager
    def written_stub(self, mappings: Sequence[Mapping]) -> Iterator[int]:
        """Have the instructions in padding of the program for the while of the block; yields where."""
        for mapping in mappings:
            if not _holds_program_text(mapping) or mapping.path == "[vdso]":
                continue
            start = mapping.end - 16
            before = self._memory.read(start, 16)
            left_behind = before.startswith(_WHOLE_STUB)
            if any(before) and not left_behind:
                continue
            if not left_behind:
                self._memory.write(start, _WHOLE_STUB)
            yield start
            # Only now, with the thread back in its own code; and never what an earlier patcher left behind,
            # since a thread that it borrowed may still be there. In the padding it is in nobody's way.
            if not left_behind:
                self._memory.write(start, before)
            return
        raise Unsuitable("has no instructions in its program with which a system call could be done")


def _way(found: dict[bytes, int]) -> Way | None:
    call = found.get(_CALL_RETURN)
    if call is None:
        return None
    for pattern in _SIGRETURN:
        if pattern in found:
            return Way(call, (found[pattern],))
    if _POP_RETURN in found:
        return Way(call, (found[_POP_RETURN], RT_SIGRETURN, call))
    return None


def _holds_program_text(mapping: Mapping) -> bool:
    return mapping.executable and mapping.readable and (mapping.inode != 0 or mapping.path == "[vdso]")
