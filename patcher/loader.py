"""LOADER: shared libraries brought into the live process, by its own dynamic loader.

Decides which functions of the target do that and with what arguments, and on what memory they run: a stack of our
own, so that a thread with a small one can be borrowed, and a page for the stub, both mapped for the length of a call.
Does not decide where a function may be called (`safepoint`), nor on which thread (`target`).

The C library must be glibc: a static program has no loader unless `dlopen` was linked into it, and musl's is not known
well enough to say which of its functions hold locks.

Specification: dlopen(3); System V ABI, chapter 5, "Initialization and Termination Functions"; glibc passes (argc,
argv, envp) to them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from patcher.elf.tables import read_raw
from patcher.elf.thread_module import NAMES, NUMBER_CELL, OFFSET_CELL, ThreadBlock, names_of, thread_module
from patcher.errors import ObjectError, PatcherError, UnsafeChange
from patcher.image import Image
from patcher.safepoint import SafePoints
from patcher.target import FunctionCall, Result, Stopped, StoppedThread, SystemCall, Target, read_stat

RTLD_NOW, RTLD_GLOBAL = 0x2, 0x100

_RTLD_INTERNAL = 0x80000000  # __libc_dlopen_mode wants it, glibc's __RTLD_DLOPEN
_CLOSE, _MMAP, _MPROTECT, _MUNMAP, _MEMFD_CREATE = 3, 9, 10, 11, 319
# What glibc's loader asks of the kernel: openat, read, pread64, newfstatat, and these.
_LOADING = tuple(SystemCall(number) for number in (257, 0, 17, 262, _CLOSE, _MMAP, _MPROTECT, _MUNMAP))
_CLOEXEC = 1
_OWN_NAME = b"patcher-threads\0"  # no longer than any path of a descriptor
_PT_GNU_STACK = 0x6474E551
_ABANDONED = ("call-timeout", "call-crashed")
_PAGE = 4096
_STACK_SIZE = 1 << 20
_WORKSPACE_SIZE = _PAGE + _STACK_SIZE + _PAGE
_NONE, _READ_WRITE, _READ_EXECUTE = 0, 3, 5
_PRIVATE_ANONYMOUS = 0x4022  # with MAP_NORESERVE
_NO_FD = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Workspace:
    """Memory of ours in the target for calls: a page for the stub, a stack, and room for arguments."""

    code: int
    stack: tuple[int, int]
    room: int = 0


@contextmanager
def workspace(target: Target, room: int = 0) -> Iterator[Workspace]:
    """Map a workspace in the target for the length of the block, with `room` bytes for arguments.

    It stays when a call was abandoned: the thread's own data, such as the loader's list of who catches its errors,
    may point into the stack on which the function ran. It stays too when a thread that was left alone in it does not
    come back in time.
    """
    size = _WORKSPACE_SIZE + (room + _PAGE - 1 & -_PAGE)
    planned = [SystemCall(_MPROTECT, (Result(0), _PAGE, protection)) for protection in (_READ_WRITE, _READ_EXECUTE)]
    mapped = SystemCall(_MMAP, (0, size, _NONE, _PRIVATE_ANONYMOUS, _NO_FD, 0))
    (base,) = target.inject([mapped], planned=[*planned, SystemCall(_MUNMAP, (Result(0), size))])
    if -4095 <= base < 0:
        raise PatcherError(f"process {target.pid} cannot map memory for a call: error {-base}", code="no-memory")
    stack, code = base + _PAGE, base + _PAGE + _STACK_SIZE  # behind a page that catches an overflow
    abandoned = False
    try:
        _protect(target, stack, _STACK_SIZE, _READ_WRITE)
        _protect(target, code, _PAGE, _READ_EXECUTE)
        if room:
            _protect(target, code + _PAGE, size - _WORKSPACE_SIZE, _READ_WRITE)
        yield Workspace(code, (stack, code), code + _PAGE)
    except PatcherError as error:
        abandoned = error.code in _ABANDONED
        raise
    finally:
        if not abandoned:
            with suppress(PatcherError):  # what was called has been done
                if target.has_left(code, stack=(stack, code)):
                    target.inject([SystemCall(_MUNMAP, (base, size))])


def _protect(target: Target, start: int, size: int, protection: int) -> None:
    (result,) = target.inject([SystemCall(_MPROTECT, (start, size, protection))])
    if result:
        raise PatcherError(
            f"process {target.pid} may not have memory of protection {protection}: error {-result}", code="no-memory"
        )


class Caller:
    """Calls functions of one target at safe points.

    `wait` is how long to look for a thread at one, `timeout` how long the functions may take, in seconds.
    """

    def __init__(self, image: Image, *, wait: float = 5.0, timeout: float = 10.0) -> None:
        self.image = image
        self.target = image.target
        self.wait = wait
        self.timeout = timeout
        self._safe_points = SafePoints(image)

    def call(
        self, calls: Sequence[FunctionCall], memory: Workspace | None = None, planned: Sequence[SystemCall] = ()
    ) -> tuple[int, ...]:
        """Call functions one after another on one thread and return rax of each; raises as `Target.call` does."""
        if memory is None:
            with workspace(self.target) as memory:
                return self.call(calls, memory, planned)
        self.image.refresh()
        return self.target.call(
            calls,
            code=memory.code,
            objection=self._safe_points.objection,
            stack=memory.stack,
            errno_location=self._address("__errno_location") or 0,
            planned=planned,
            wait=self.wait,
            timeout=self.timeout,
        )

    def objection(self, thread: StoppedThread) -> str:
        """Say why a stopped thread is at no safe point; "" when it is at one."""
        return self._safe_points.objection(thread)

    def holding(self, thread: StoppedThread) -> str:
        """Say what a stopped thread is in that may hold a lock; "" for nothing."""
        return self._safe_points.holding(thread)

    def call_standing(self, stopped: Stopped, tid: int, calls: Sequence[FunctionCall], memory: Workspace) -> None:
        """Call functions on one of the threads that all stand still; raises as `Target.call_standing` does."""
        self.target.call_standing(
            stopped,
            tid,
            calls,
            code=memory.code,
            stack=memory.stack,
            errno_location=self._address("__errno_location") or 0,
            timeout=self.timeout,
        )

    def load_library(self, path: str, flags: int = RTLD_NOW | RTLD_GLOBAL, memory: Workspace | None = None) -> int:
        """Load a shared library, as the target's own `dlopen` does, and return its handle; refreshes the image.

        `path` is absolute, as the target sees it. Its constructors run on the borrowed thread. Raises UnsafeChange
        "no-loader" in a program without one, "executable-stack" for a library that wants such, "dlopen" with the
        loader's message when it refuses, and as `Target.call` does.
        """
        if not path.startswith("/"):
            raise ValueError(f"{path} is not an absolute path")
        self._refuse_executable_stack(path)
        return self._load(path, flags, memory)

    def load_thread_block(self, block: ThreadBlock) -> int:
        """Give every thread a block, by a module that is nothing else and stays; return where it is.

        That is the block's distance from the thread pointer, or, for one that is not static, the number of the module.
        Raises `UnsafeChange` "dlopen" when there is no room at a fixed distance, and as `load_library` does.
        """
        soname = f"patcher-threads-{os.urandom(8).hex()}"
        with workspace(self.target) as memory, self._file(thread_module(soname, block), memory) as descriptor:
            path = f"/proc/self/fd/{descriptor}"
            while True:
                handle = self._load(path, RTLD_NOW, memory)
                base = self.target.memory.read_u64(handle)  # l_addr of struct link_map
                if self.target.memory.read_available(base + NAMES, len(names_of(soname))) == names_of(soname):
                    break
                path = path.replace("/fd/", "/fd/./", 1)  # the loader knows this spelling from another descriptor
            # The descriptor will be another file's: nobody who asks for the module's name may open that.
            self.target.memory.write(self.target.memory.read_u64(handle + 8), _OWN_NAME)
        cell = OFFSET_CELL if block.static else NUMBER_CELL
        return int.from_bytes(self.target.memory.read(base + cell, 8), "little", signed=True)

    @contextmanager
    def _file(self, contents: bytes, memory: Workspace) -> Iterator[int]:
        """Have a file without a name in the target, open for the length of the block."""
        created = SystemCall(_MEMFD_CREATE, (b"patcher-threads\0", _CLOEXEC))
        (descriptor,) = self.target.inject([created], code=memory.code)
        if descriptor < 0:
            raise UnsafeChange(
                f"process {self.target.pid} cannot make a file in memory: error {-descriptor}",
                "restart the program with the new code",
                code="dlopen",
            )
        try:
            Path(f"/proc/{self.target.pid}/fd/{descriptor}").write_bytes(contents)
            yield descriptor
        finally:
            with suppress(PatcherError):
                # A thread that was left alone in the loader would open by that number what the program opened since.
                if self.target.has_left(memory.code, stack=memory.stack):
                    self.target.inject([SystemCall(_CLOSE, (descriptor,))])

    def _load(self, path: str, flags: int, memory: Workspace | None) -> int:
        name = _as_text(path)
        opening, told = self._opening(flags)
        calls = [FunctionCall(opening[0], (name, opening[1]))]
        if told is not None:
            calls.append(FunctionCall(told))
        handle, *message = self.call(calls, memory, _LOADING)
        self.image.refresh()
        if not handle:
            # The text belongs to the thread that was borrowed and lives until its next call of the loader.
            reason = self._text(message[0]) if message and message[0] else "the loader does not say why"
            raise UnsafeChange(
                f"process {self.target.pid} cannot load {path}: {reason}",
                "the path must be one that the process can open, and its dependencies must be found",
                code="dlopen",
            )
        return handle

    def run_constructors(self, addresses: Sequence[int], memory: Workspace | None = None) -> None:
        """Call functions as entries of .init_array are called: with the program's argc, argv and environment."""
        arguments = self._start_arguments()
        if addresses:
            self.call([FunctionCall(address, arguments) for address in addresses], memory)

    def _opening(self, flags: int) -> tuple[tuple[int, int], int | None]:
        """Return (function, flags) for `dlopen`, and the address of `dlerror`."""
        self._refuse_other_libraries()
        opening = self._address("dlopen")
        if opening is not None:
            return (opening, flags), self._address("dlerror")
        opening = self._address("__libc_dlopen_mode")
        if opening is not None:
            return (opening, flags | _RTLD_INTERNAL), None
        static = not self.image.executable.module.interpreter
        raise UnsafeChange(
            f"process {self.target.pid} ({Path(self.target.program).name}) has no `dlopen`"
            + (": it is linked statically" if static else ""),
            "link the program dynamically, or do without the library",
            code="no-loader",
        )

    def _refuse_other_libraries(self) -> None:
        if self.image.executable.module.interpreter and self._address("gnu_get_libc_version") is None:
            raise UnsafeChange(
                f"process {self.target.pid} runs with another C library than glibc (its loader is "
                f"{self.image.executable.module.interpreter}), in which no safe point for `dlopen` is known",
                "do without the library",
                code="no-loader",
            )

    def _refuse_executable_stack(self, path: str) -> None:
        # The loader would make the stacks of all threads executable for such a library, for ever.
        try:
            data = Path(f"/proc/{self.target.pid}/root{path}").read_bytes()
            headers = read_raw(path, data).program_headers
        except (OSError, ObjectError):
            return  # the loader will say what is wrong with it
        flags = [int(header["flags"]) for header in headers if int(header["type"]) == _PT_GNU_STACK]
        if (flags and not flags[0] & 1) or any(m.path == "[stack]" and m.executable for m in self.target.mappings()):
            return
        raise UnsafeChange(
            f"{path} wants executable stacks, which would change the protection of all of process {self.target.pid}'s",
            "link the library with -z noexecstack",
            code="executable-stack",
        )

    def _start_arguments(self) -> tuple[int, int, int]:
        # proc_pid_stat(5), startstack: the kernel puts argc there, argv and the first environment follow.
        start = read_stat(self.target.pid).start_stack
        if start <= 1:
            raise PatcherError(f"the kernel does not tell where the arguments of process {self.target.pid} are")
        count = self.target.memory.read_u64(start)
        environment = self._address("environ")
        if environment is None:
            return count, start + 8, start + 8 * (count + 2)
        return count, start + 8, self.target.memory.read_u64(environment)

    def _address(self, name: str) -> int | None:
        found = self.image.resolve(name, self.image.executable)
        return None if found is None else found.address

    def _text(self, address: int) -> str:
        return self.target.memory.read_available(address, 1024).partition(b"\0")[0].decode("utf-8", "replace")


def _as_text(path: str) -> bytes:
    name = path.encode("utf-8", "surrogateescape")
    if b"\0" in name:
        raise ValueError(f"{path!r} contains a zero byte")
    return name + b"\0"
