"""Memory: reading and writing the target's memory in bulk.

Decides how /proc/<pid>/mem is used and what its errors mean. Does not decide what may be written, and does
not change protections. The descriptor keeps the address space it was opened on: once the process has ended
or replaced its program, it reads nothing, and never another process's memory. Specification: proc_pid_mem(5).
"""

from __future__ import annotations

import errno
import os

from patcher.errors import PatcherError, TargetGone

_PAGE = 4096


class WriteRefused(PatcherError):
    """The kernel did not let us write there: unmapped, or forced writes are switched off."""

    code = "write-refused"


class Memory:
    """The memory of one process, through one open /proc/<pid>/mem."""

    __slots__ = ("_descriptor", "_pid")

    def __init__(self, pid: int, descriptor: int) -> None:
        self._pid = pid
        self._descriptor = descriptor

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

    def read_u64(self, address: int) -> int:
        """Return the little-endian 8-byte word at `address`; raises as `read` does."""
        return int.from_bytes(self.read(address, 8), "little")

    def read_cstring(self, address: int, limit: int = 4096) -> bytes:
        """Return the bytes before the first NUL, at most `limit` of them; raises as `read` does.

        Raises PatcherError "bad-address" too when there is no NUL within the limit.
        """
        found = b""
        while len(found) < limit:
            position = address + len(found)
            chunk = self.read(position, min(_PAGE - position % _PAGE, limit - len(found)))
            end = chunk.find(0)
            if end >= 0:
                return found + chunk[:end]
            found += chunk
        raise PatcherError(
            f"no end of a string within {limit} bytes at {address:#x} in process {self._pid}", code="bad-address"
        )

    def write(self, address: int, data: bytes) -> None:
        """Write all of `data` at `address`, into r-x pages too where the kernel forces such writes.

        One call to the kernel, so a page is never split by a signal. Raises WriteRefused when the kernel says
        no (naming how much it took, if any), TargetGone when the address space is no more.
        """
        if not data:
            return
        try:
            written = os.pwrite(self._descriptor, data, address)
        except (OSError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.EIO, errno.EFAULT, errno.EPERM, errno.EACCES):
                raise
            raise self._refused(address, len(data), 0) from error
        if written == 0:
            raise self._gone()
        if written != len(data):
            raise self._refused(address, len(data), written)

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
