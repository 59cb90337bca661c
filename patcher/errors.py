"""Everything patcher refuses or fails at, one class per cause.

Every error carries three things: a message (what, and where), a hint (what to do next) and
a code (short and stable: the `reason` of a `refused` event). The session prints one and waits
for the next save; only `TargetGone` ends it. Any other exception is a defect of patcher.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class PatcherError(Exception):
    """The root: a sentence for the user, with a hint and a stable reason code."""

    code = "failed"
    exit_status = 1

    def __init__(self, message: str, hint: str = "", *, code: str | None = None) -> None:
        self.message = _printable(message)
        self.hint = _printable(hint)
        super().__init__(self.message)
        if code is not None:
            self.code = code


def _printable(text: str) -> str:
    # Names come from files that anybody may have made, and a terminal obeys control characters.
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class TargetError(PatcherError):
    """The process itself cannot be reached."""

    code = "target"
    exit_status = 3


class TargetGone(TargetError):
    """The process ended, or never was."""

    code = "target-gone"


class AttachDenied(TargetError):
    """The process is there, and we may not or cannot trace it."""

    code = "attach-denied"


class Forbidden(PatcherError):
    """The process runs under something of its own that forbids what the change takes: seccomp, a shadow stack."""

    code = "seccomp"


class TargetBusy(PatcherError):
    """The process is in a state in which nothing can be done just now; trying again may help."""

    code = "target-busy"


class BuildError(PatcherError):
    """A compiler or build command failed on `files`, `file` the first; `diagnostics` is its output, verbatim."""

    code = "build-failed"

    def __init__(
        self, message: str, hint: str = "", *, file: str = "", diagnostics: str = "", files: Sequence[str] = ()
    ) -> None:
        super().__init__(message, hint)
        self.file = file
        self.files = tuple(files) or (file,)
        self.diagnostics = diagnostics


class NoCompileCommand(PatcherError):
    """Nothing says how a source file is compiled."""

    code = "no-compile-command"


class ObjectError(PatcherError):
    """A file is not an object we can link: not ELF, another machine, LTO bytecode, truncated."""

    code = "bad-object"


class UnsafeChange(PatcherError):
    """The change cannot be proven safe: layout, ambiguity, or a source that is not what runs."""

    code = "unsafe-change"


class LinkError(PatcherError):
    """The changed code cannot be linked into the process."""

    code = "link"


class UnresolvedSymbol(LinkError):
    """A symbol that is defined nowhere."""

    code = "unresolved-symbol"


class RelocationOverflow(LinkError):
    """A relocated value does not fit its field."""

    code = "relocation-overflow"


class UnsupportedRelocation(LinkError):
    """A relocation type that has no row in the table."""

    code = "unsupported-relocation"


@contextmanager
def named_shortages() -> Iterator[None]:
    """Turn what the system does not give us (memory, descriptors, a file) into an error that names it."""
    try:
        yield
    except BrokenPipeError:
        raise
    except MemoryError:
        raise PatcherError(
            "patcher is out of memory", "give it more (`ulimit -v`), or change fewer files at once", code="no-memory"
        ) from None
    except OSError as error:
        what = os.strerror(error.errno) if error.errno else str(error)
        name = f" ({os.fsdecode(error.filename)})" if isinstance(error.filename, str | bytes) else ""
        raise PatcherError(f"the system refused what patcher asked of it: {what}{name}", code="system") from error
