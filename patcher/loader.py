"""LOADER: shared libraries brought into the live process, by its own dynamic loader.

Specification: dlopen(3).
"""

from __future__ import annotations

from patcher.errors import TargetError, UnsafeChange
from patcher.image import Image
from patcher.target import FunctionCall, StoppedThread

_RTLD_NOW, _RTLD_GLOBAL = 2, 0x100
_SYSCALL = b"\x0f\x05"


class Caller:
    """Calls functions of one target while the thread that is borrowed waits in a system call."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.target = image.target

    def load_library(self, path: str) -> int:
        """Load a shared library, as the target's own `dlopen` does, and return its handle; refreshes the image.

        Raises UnsafeChange when there is no loader or it refuses, `TargetBusy` when no thread could be borrowed.
        """
        opening = self.image.resolve("dlopen", self.image.executable)
        if opening is None or self.image.stub_area is None:
            raise UnsafeChange(
                f"process {self.target.pid} has no `dlopen`, so {path} cannot be loaded",
                "link the program dynamically, or do without the library",
                code="no-loader",
            )
        call = FunctionCall(opening.address, (path.encode() + b"\0", _RTLD_NOW | _RTLD_GLOBAL))
        handle = self.target.inject([call], code=self.image.stub_area, timeout=10.0, accept=self._is_idle)[-1]
        self.image.refresh()
        if not handle:
            raise UnsafeChange(f"process {self.target.pid} cannot load {path}", "see what it depends on", code="dlopen")
        return handle

    def _is_idle(self, thread: StoppedThread) -> bool:
        try:
            return self.target.memory.read(thread.pc - 2, 2) == _SYSCALL
        except TargetError:
            return False
