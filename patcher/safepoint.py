"""Safe points: where a thread may be made to call a function of the target.

Decides whether a stopped thread holds, or may hold, a lock of the allocator, the dynamic loader, the unwinder or
stdio, or stands in the middle of their data. The other threads run on meanwhile and give back what they hold; so
only the thread itself counts. It is at a safe point when it is either

- in code of the program, called from nothing but code of the program, or
- asleep in a system call that the kernel makes anew by itself, which it reached through a function of the C library
  that is known to hold nothing while it waits (`read`, `poll`, `pthread_cond_wait`, `fgets` ...).

A function that waits for input holds the lock of the stream it reads: that is not counted, since a program that waits
for its commands would never be at a safe point. What a function of the program locks by itself is not known here.

Where the frames of a thread cannot be told, every word of its stack is taken for one, and it must be asleep. In a
program that contains its C library, names of its symbol table tell the two apart, and it must be asleep too.

Does not decide what is called, nor find threads (`target`).
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
import numpy.typing as npt

from patcher.elf import SymbolType
from patcher.elf.module import Module
from patcher.image import Image, LoadedModule
from patcher.target import StoppedThread
from patcher.unwind import Unwinder

Extents = tuple[tuple[int, int], ...]
_Frames = list[tuple[int, "_Code | None"]]

_SIGNAL_RETURN = b"\x48\xc7\xc0\x0f\x00\x00\x00\x0f\x05"  # mov $15, %rax; syscall
_MOST_BOTTOM_FRAMES = 4  # clone3, start_thread and C++'s own start; _start, __libc_start_main and what it calls


class Kind(Enum):
    """What the code of a module is to the question.

    FORBIDDEN: nobody is at a safe point in it. LIBRARY: the C library. RUNTIME: C++'s, safe asleep only.
    MIXED: a program that contains an allocator, safe asleep only. PROGRAM: everything else.
    """

    FORBIDDEN = auto()
    LIBRARY = auto()
    RUNTIME = auto()
    MIXED = auto()
    PROGRAM = auto()


_FORBIDDEN = re.compile(
    r"ld-(linux|musl)|ld64|ld\.so|libdl[.-]|libgcc_s|libunwind|libjemalloc|libtcmalloc|libmimalloc|libhoard"
    r"|lib[almtu]+san[.-]|libclang_rt|libc_malloc_debug|libmemusage"
)
_LIBRARY = re.compile(r"lib(c|pthread|rt|resolv|nsl|nss_\w+|anl|util)([.-]\d[\d.]*)?\.so")
_RUNTIME = re.compile(r"libstdc\+\+|libc\+\+|libsupc\+\+")

# In the C library: what holds a lock while it waits, by name without leading underscores and `_chk`.
_HOLDS = re.compile(
    r"(libc_)?(malloc\w*|calloc|realloc|reallocarray|free|cfree|memalign|aligned_alloc|posix_memalign|p?valloc)"
    r"|mallinfo2?|mallopt|mtrace|muntrace|mcheck\w*|libc_(mallinfo|mallopt|freeres)|int_(malloc|free|realloc|memalign)"
    r"|mid_memalign|sysmalloc\w*|systrim\w*|arena_get2\w*|tcache_init\w*|lll_lock_wait_private"
    r"|dl(m?open|close|v?sym|info|addr1?|error|_iterate_phdr)|libc_dl\w+|dl_\w+|tls_get_addr|backtrace\w*"
    r"|IO_\w*(write|printf|put[cs]|overflow|sputn|padn|flush|sync|open|close|setv?buf|lock|seek|tell|cleanup)\w*"
    r"|(f|d|v|vf|vd|w|fw|vw|vfw)printf(_internal|_unlocked)?|f?put(s|c|char|ws|wc|wchar)(_unlocked)?|w?overflow"
    r"|fwrite(_unlocked)?|fflush(_unlocked)?|flushlbf|f(re)?open(64)?|fdopen|fclose|fcloseall|perror"
    r"|f?(seek|tell)(o|o64)?|rewind|f?setv?buf|setbuffer|setlinebuf|flockfile"
    r"|v?fork|Fork|libc_fork|exit|quick_exit|run_exit_handlers|run_exit_handlers_internal|at_quick_exit|on_exit|abort"
    r"|cxa_(finalize|atexit|at_quick_exit|thread_atexit_impl|throw|rethrow)|call_tls_dtors|libc_fatal|assert\w*"
    r"|popen|pclose|IO_proc_\w+|v?syslog|openlog|closelog"
    r"|pthread_(create|exit|cancel|atfork|getattr_np|unwind\w*)|pthread_create\w*|register_atfork"
    r"|Unwind_\w+|(de)?register_frame\w*|gcc_personality\w*|gxx_personality\w*"
)
# In the C library: what is called by the program, waits, and holds nothing but the stream it reads.
_WAITS = re.compile(
    r"p?(read|write)v?\d*(64)?(v2)?|poll|ppoll|p?select|epoll_p?wait2?"
    r"|nanosleep|clock_nanosleep|u?sleep|thrd_sleep|pause|sigpause|xpg_sigpause|sigsuspend|sigwait|sigwaitinfo|sigtimedwait"
    r"|wait|waitpid|wait3|wait4|waitid|accept4?|connect|(recv|send)(from|to|msg|mmsg)?"
    r"|open(at)?(64)?(_2)?|creat(64)?|fcntl(64)?|flock|lockf(64)?|ioctl|tcdrain|splice|tee|vmsplice|sendfile(64)?"
    r"|copy_file_range|syscall|msg(rcv|snd)|libc_msg(rcv|snd)|mq_(timed)?(receive|send)|sem(timed)?op|getrandom"
    r"|pthread_(cond_(timed|clock)?wait|mutex_(timed|clock)?lock|rwlock_(timed|clock)?(rd|wr)lock|barrier_wait)"
    r"|pthread_(timed|clock)?join(_np)?|sem_(timed|clock)?wait|cnd_(timed)?wait|mtx_(timed)?lock|thrd_join"
    r"|(IO_)?f?get(s|c|char|ws|wc|wchar)(_unlocked)?|(IO_)?fread(_unlocked)?|get(line|delim)|IO_get(line|delim)|w?u(nder)?flow"
    r"|(isoc\d\d_)?v?f?w?scanf|qsort(_r)?|bsearch"
)
# In a program that contains an allocator: the allocator's own functions.
_ALLOCATES = re.compile(r"(je|mi|tc|rp)_\w+|ZN8tcmalloc\w*|Zn[wa]\w*|Zd[la]\w*|sdallocx|[mxr]allocx|dallocx")
# In a module that contains the unwinder: its entries.
_UNWINDS = frozenset(
    {
        *("Unwind_RaiseException", "Unwind_Resume", "Unwind_Resume_or_Rethrow", "Unwind_ForcedUnwind"),
        *("Unwind_Backtrace", "Unwind_Find_FDE", "register_frame", "register_frame_info", "deregister_frame"),
        *("deregister_frame_info", "register_frame_info_bases", "register_frame_table"),
    }
)
# jmp and jcc with four bytes of distance
_FAR_JUMP = re.compile(rb"\xe9(?=(....))|\x0f[\x80-\x8f](?=(....))", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Function:
    """A named function's link-time extent."""

    name: str
    start: int
    end: int


def kind_of(name: str, *, executable: bool, allocates: bool) -> Kind:
    """Tell what a module is, by its soname or file name, and whether it contains an allocator."""
    if _FORBIDDEN.match(name):
        return Kind.FORBIDDEN
    if executable:
        return Kind.MIXED if allocates else Kind.PROGRAM
    if _LIBRARY.match(name):
        return Kind.LIBRARY
    if _RUNTIME.match(name):
        return Kind.RUNTIME
    return Kind.FORBIDDEN if allocates else Kind.PROGRAM


def unsafe_extents(kind: Kind, text: tuple[int, int], functions: Iterable[Function]) -> Extents:
    """Return the sorted link-time extents of a module in which no thread is at a safe point, asleep or not."""
    if kind is Kind.FORBIDDEN:
        return (text,)
    merged: list[tuple[int, int]] = []
    for low, high in sorted({(f.start, f.end) for f in functions if _is_unsafe(_plain(f.name), kind)}):
        if merged and low <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(high, merged[-1][1])
        else:
            merged.append((low, high))
    return tuple(merged)


def _is_unsafe(name: str, kind: Kind) -> bool:
    if kind in (Kind.PROGRAM, Kind.RUNTIME):
        return name in _UNWINDS
    return bool(_HOLDS.fullmatch(name) or (kind is Kind.MIXED and _ALLOCATES.fullmatch(name)))


def _plain(name: str) -> str:
    return name.lstrip("_").removesuffix("_chk")


class SafePoints:
    """The safe points of one target; what it learns of the modules it keeps."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._unwinder = Unwinder(image)
        self._known: dict[tuple[Module, int], _Code] = {}
        self._jumps: dict[_Code, frozenset[int]] = {}

    def objection(self, thread: StoppedThread) -> str:
        """Say why a thread, stopped with its general registers, is at no safe point; "" when it is at one."""
        innermost = self._code_at(thread.pc)
        if innermost is not None and not thread.waiting and innermost.kind is not Kind.PROGRAM:
            return f"runs {innermost.describe(thread.pc)}"
        trace = self._unwinder.backtrace(thread)
        if not trace.complete:
            return self._objection_to_words(thread)
        frames = [(address, self._code_at(address)) for address in trace.addresses]
        for address, code in frames:
            if code is not None and code.is_unsafe(address):
                return f"is in {code.describe(address)}"
        frames = _without_bottom(frames)
        if all(code is None or code.kind is Kind.PROGRAM for _, code in frames):
            return "" if frames else "begins or ends just now"
        if not thread.waiting:
            address, code = next((a, c) for a, c in frames if c is not None and c.kind is not Kind.PROGRAM)
            return f"runs {code.describe(address)}" if code is not None else ""
        return self._objection_to_calls(frames)

    def holding(self, thread: StoppedThread) -> str:
        """Say what a stopped thread is in that may hold a lock of the C library or the like; "" for nothing."""
        trace = self._unwinder.backtrace(thread)
        if not trace.complete:
            return self._objection_to_words(thread)
        for address in trace.addresses:
            code = self._code_at(address)
            if code is not None and code.is_unsafe(address):
                return f"is in {code.describe(address)}"
        return ""

    def _code_at(self, address: int) -> _Code | None:
        module = self._image.module_at(address)
        if module is None:
            return None
        key = module.module, module.bias
        if key not in self._known:
            self._known[key] = _read_code(module, executable=module is self._image.executable)
        return self._known[key]

    def _objection_to_calls(self, frames: _Frames) -> str:
        # A function of the C library that the program called speaks for those that it calls in turn: those that
        # hold something have been asked for already.
        for (address, code), caller in zip(frames, [*frames[1:], (0, None)], strict=True):
            if code is None or code.kind is not Kind.LIBRARY:
                continue
            if caller[1] is not None and caller[1].kind is Kind.LIBRARY:
                continue
            names = code.names(address)
            if any(_WAITS.fullmatch(_plain(name)) for name in names):
                continue
            if names or self._unwinder.function_start(address) not in self._continuations(code):
                return f"waits in {code.describe(address)}"
        return ""

    def _continuations(self, code: _Code) -> frozenset[int]:
        """Return the live addresses to which functions that hold nothing jump as their last act."""
        if code not in self._jumps:
            found: dict[bool, set[int]] = {True: set(), False: set()}
            for function in code.functions:
                name = _plain(function.name)
                harmless = _WAITS.fullmatch(name) is not None
                if harmless or _HOLDS.fullmatch(name):
                    found[harmless] |= self._jump_targets(code.module, function)
            self._jumps[code] = frozenset(found[True] - found[False])
        return self._jumps[code]

    def _jump_targets(self, module: LoadedModule, function: Function) -> set[int]:
        start = function.start + module.bias
        text = self._image.target.memory.read_available(start, function.end - function.start)
        found = set()
        for match in _FAR_JUMP.finditer(text):
            distance = struct.unpack("<i", match[1] or match[2])[0]
            found.add(start + match.end() + 4 + distance)
        return {target for target in found if not start <= target < start + len(text)}

    def _objection_to_words(self, thread: StoppedThread) -> str:
        if not thread.waiting:
            return "runs code whose frames cannot be told"
        words = self._stack_words(thread)
        if words is None:
            return f"runs on a stack that is not mapped (sp {thread.sp:#x})"
        for module in self._image.modules:
            code = self._code_at(module.start)
            assert code is not None
            inside = code.unsafe_words(words)
            if len(inside):
                return f"may be in {code.describe(int(inside[0]))}"
            if code.kind is Kind.LIBRARY and len(np.intersect1d(words, self._signal_returns(module))):
                return "may be in a signal handler"
        return ""

    def _stack_words(self, thread: StoppedThread) -> npt.NDArray[np.uint64] | None:
        low = thread.sp & ~7
        stack = next((m for m in self._image.target.mappings() if thread.sp in m and m.readable), None)
        if stack is None:
            return None
        data = self._image.target.memory.read(low, stack.end - low)
        return np.append(np.frombuffer(data, np.uint64), np.uint64(thread.pc))

    def _signal_returns(self, module: LoadedModule) -> npt.NDArray[np.uint64]:
        low, high = module.text
        data = self._image.target.memory.read_available(low, high - low)
        return np.array([low + m.start() for m in re.finditer(re.escape(_SIGNAL_RETURN), data)], np.uint64)


class _Code:
    """The code of one module: its kind, what is unsafe in it, and the names it has for the outside."""

    def __init__(self, module: LoadedModule, kind: Kind, functions: Sequence[Function]) -> None:
        self.module = module
        self.kind = kind
        self.functions = functions
        extents = unsafe_extents(kind, module.module.text, functions)
        self._lows = np.array([low for low, _ in extents], np.uint64)
        self._highs = np.array([high for _, high in extents], np.uint64)
        self._named: dict[int, list[Function]] = {}
        for function in functions:
            self._named.setdefault(function.start, []).append(function)
        self._starts = sorted(self._named)

    def is_unsafe(self, address: int) -> bool:
        """Whether a live address lies in what is unsafe."""
        return bool(len(self.unsafe_words(np.array([address], np.uint64), behind=0)))

    def unsafe_words(self, words: npt.NDArray[np.uint64], behind: int = 1) -> npt.NDArray[np.uint64]:
        """Return those words that are addresses of what is unsafe, or just behind it as a return address may be."""
        if not len(self._lows):
            return words[:0]
        offsets = words - np.uint64(self.module.bias)
        position = np.searchsorted(self._lows, offsets, "right").astype(np.int64) - 1
        return words[(position >= 0) & (offsets < self._highs[np.maximum(position, 0)] + np.uint64(behind))]

    def names(self, address: int) -> list[str]:
        """Return the names of the functions that hold a live address."""
        offset = address - self.module.bias
        position = bisect_right(self._starts, offset) - 1
        nearest = self._named[self._starts[position]] if position >= 0 else []
        return [f.name for f in nearest if offset < f.end]

    def describe(self, address: int) -> str:
        """Name the function at a live address for a message."""
        names = self.names(address)
        return f"{min(names, key=len)} ({self.module.name})" if names else self.module.name


def _read_code(module: LoadedModule, *, executable: bool) -> _Code:
    name = module.module.soname or module.name
    symbols = module.module.symbols
    allocates = any(s.defined for s in module.module.exports.get("malloc", ()))
    allocates = allocates or any(s.function for s in symbols.named("malloc"))
    contained = executable and not module.module.interpreter  # a static program has its C library in itself
    kind = kind_of(name, executable=executable, allocates=allocates or contained)
    if kind is Kind.MIXED and not len(symbols):
        kind = Kind.FORBIDDEN  # without names, allocator and program cannot be told apart
    return _Code(module, kind, tuple(_functions(module, kind)))


def _functions(module: LoadedModule, kind: Kind) -> Iterator[Function]:
    """Yield the functions whose names matter in a module of that kind."""
    symbols = module.module.symbols
    if kind is Kind.MIXED:
        named = symbols.functions()
    else:
        named = tuple(s for name in _UNWINDS for s in symbols.named(f"_{name}") + symbols.named(f"__{name}"))
    yield from (Function(s.name, s.value, s.value + s.size) for s in named if s.function)
    if kind is Kind.LIBRARY:
        for exported in module.module.exports.values():
            for s in exported:
                if s.defined and s.size and s.type in (SymbolType.FUNC, SymbolType.IFUNC):
                    yield Function(s.name, s.value, s.value + s.size)


def _without_bottom(frames: _Frames) -> _Frames:
    """Leave out what started the thread: the C library's frames and `_start`."""
    end = len(frames)
    lowest = max(end - _MOST_BOTTOM_FRAMES, 0)
    if end > 1 and _is_starting(frames[end - 2]) and not _is_starting(frames[end - 1]):
        end -= 1  # _start, in the program
    while end > lowest and _is_starting(frames[end - 1]):
        end -= 1
    return frames[:end]


def _is_starting(frame: tuple[int, _Code | None]) -> bool:
    return frame[1] is not None and frame[1].kind in (Kind.LIBRARY, Kind.RUNTIME)


__all__ = ["Extents", "Function", "Kind", "SafePoints", "kind_of", "unsafe_extents"]
