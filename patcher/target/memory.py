"""Memory: reading and writing the target's memory in bulk.

Decides how /proc/<pid>/mem is used and what its errors mean. Does not decide what may be written, and does
not change protections: where the kernel does not force writes to read-only pages, whoever opened the memory lends
a way to `poke` (ptrace always may). The descriptor keeps the address space it was opened on: once the process has
ended or replaced its program, it reads nothing, and never another process's memory. Specification: proc_pid_mem(5).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from patcher.errors import PatcherError, TargetBusy, TargetGone
from patcher.target.maps import read_mappings

_PAGE = 4096
_MOST_AT_ONCE = 1024  # IOV_MAX
_REFUSALS = frozenset({errno.EIO, errno.EFAULT, errno.EPERM, errno.EACCES, errno.ENOMEM, errno.EAGAIN})
_read_at_once = ctypes.CDLL(None).process_vm_readv
_read_at_once.argtypes = (ctypes.c_int, *(ctypes.c_void_p, ctypes.c_ulong) * 2, ctypes.c_ulong)
_read_at_once.restype = ctypes.c_ssize_t


class WriteRefused(PatcherError):
    """The kernel did not let us write there: unmapped, or forced writes are switched off."""

    code = "write-refused"


class Memory:
    """The memory of one process, through one open /proc/<pid>/mem.

    `poke` writes what the kernel refuses to write here, and tells whether it could. With `forced_writes` false, the
    protection of pages is respected even where the kernel would not (proc_mem.force_override=never does that).
    """

    __slots__ = ("_descriptor", "_pid", "_poke", "forced_writes")

    def __init__(
        self,
        pid: int,
        descriptor: int,
        poke: Callable[[int, bytes], bool] | None = None,
        *,
        forced_writes: bool = True,
    ) -> None:
        self._pid = pid
        self._descriptor = descriptor
        self._poke = poke
        self.forced_writes = forced_writes

    def read(self, address: int, size: int) -> bytes:
        """Return exactly `size` bytes from `address`, whatever their protection.

        Raises TargetGone when the address space is no more, PatcherError "bad-address" when any of the bytes
        is not mapped.
        """
        parts: list[bytes] = []
        position, left = address, size
        while left:
            try:
                part = os.pread(self._descriptor, left, position)
            except (OSError, OverflowError) as error:
                raise self._unreadable(position, address, size) from error
            if not part:
                raise self._gone()
            parts.append(part)
            position += len(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_available(self, address: int, size: int) -> bytes:
        """Return what can be read of `size` bytes at `address`: less where unmapped memory begins, b"" for none."""
        try:
            return os.pread(self._descriptor, size, address)
        except (OSError, OverflowError):
            return b""

    def read_into(self, address: int, buffer: memoryview) -> int:
        """Read into a buffer; return how much could be read, as `read_available` does."""
        try:
            return os.preadv(self._descriptor, [buffer], address)
        except (OSError, OverflowError):
            return 0

    def read_together(self, tid: int, extents: bytes, buffer: memoryview) -> bool:
        """Read many extents (struct iovec), one after another into a buffer of their size; tell whether all could be.

        `tid` is a thread that stands still for us. For the stacks of a thousand threads it takes a third of the time.
        """
        place = (ctypes.c_char * len(buffer)).from_buffer(buffer)
        done = 0
        for first in range(0, len(extents), 16 * _MOST_AT_ONCE):
            remote = extents[first : first + 16 * _MOST_AT_ONCE]
            local = struct.pack("<QQ", ctypes.addressof(place) + done, len(buffer) - done)
            wanted = sum(struct.unpack(f"<{len(remote) // 8}Q", remote)[1::2])
            if _read_at_once(tid, local, 1, remote, len(remote) // 16, 0) != wanted:
                return False
            done += wanted
        return True

    def read_u64(self, address: int) -> int:
        """Return the little-endian 8-byte word at `address`; raises as `read` does."""
        return int.from_bytes(self.read(address, 8), "little")

    def write(self, address: int, data: bytes) -> None:
        """Write all of `data` at `address`, into r-x pages too where the kernel forces such writes.

        One call to the kernel, so a page is never split by a signal; only where the kernel says no, word by word
        through `poke`. Raises WriteRefused when that is refused too (naming how much the kernel took, if any),
        TargetGone when the address space is no more.
        """
        if not data:
            return
        written = self._write(address, data)
        if written == len(data):
            return
        if self._poke is None or not self._poke(address + written, data[written:]):
            raise self._refused(address, len(data), written)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep every other patcher of this machine from claiming the process, for the length of the block.

        Raises TargetBusy at once when one has it. The claim ends with whoever holds it, however that ends.
        """
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TargetBusy(
                f"process {self._pid} is being patched by another patcher", "try again when it is done", code="locked"
            ) from None
        try:
            yield
        finally:
            if self._descriptor >= 0:
                with suppress(OSError):
                    fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _write(self, address: int, data: bytes) -> int:
        if not self.forced_writes and not self._may_write(address, address + len(data)):
            return 0
        try:
            written = os.pwrite(self._descriptor, data, address)
        except (OSError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno not in _REFUSALS:
                raise
            return 0
        if written == 0:
            raise self._gone()
        return written

    def _may_write(self, start: int, end: int) -> bool:
        with open(f"/proc/{self._pid}/maps", encoding="utf-8", errors="surrogateescape") as maps:
            for mapping in read_mappings(maps):
                if start in mapping and mapping.writable:
                    start = mapping.end
        return start >= end

    def close(self) -> None:
        """Close the descriptor; the object is of no use afterwards."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _unreadable(self, position: int, address: int, size: int) -> PatcherError:
        return PatcherError(
            f"process {self._pid} has no readable memory at {position:#x} (reading {size} bytes from {address:#x})",
            code="bad-address",
        )

    def _refused(self, address: int, size: int, written: int) -> WriteRefused:
        took = f" (it took {written} of them)" if written else ""
        return WriteRefused(
            f"the kernel refused to write {size} bytes at {address:#x} in process {self._pid}{took}",
            "the memory is unmapped, or this kernel does not force writes to read-only pages (proc_mem.force_override)",
        )

    def _gone(self) -> TargetGone:
        return TargetGone(f"process {self._pid} has ended or replaced its program, its memory is gone")
