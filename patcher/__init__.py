"""patcher: change the code of a native Linux program while it runs, from outside, like a debugger.

    import patcher

    with patcher.attach(4711) as session:
        generation = session.apply("physics.o")
        print([f.name for f in generation.functions], generation.timings.stop)
        session.revert()

Everything raised on purpose is a `PatcherError`, with a `message`, a `hint` and a stable `code`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from patcher.errors import (
    AttachDenied,
    BuildError,
    Forbidden,
    LinkError,
    NoCompileCommand,
    ObjectError,
    PatcherError,
    RelocationOverflow,
    TargetBusy,
    TargetError,
    TargetGone,
    UnresolvedSymbol,
    UnsafeChange,
    UnsupportedRelocation,
    named_shortages,
)

if TYPE_CHECKING:
    from patcher.outcome import Generation
    from patcher.session import Session
    from patcher.status import Status

__version__ = "0.1.0"


@named_shortages()
def attach(
    pid: int,
    *,
    compile_commands: str | Path | None = None,
    watched: Sequence[str | Path] = (),
    force: bool = False,
    every_function: bool = False,
    dry_run: bool = False,
    archives: Sequence[str | Path] = (),
    libraries: Sequence[str] = (),
    allow_undefined: bool = False,
    tree: bool = False,
    best_effort: bool = False,
    allowed_layouts: Sequence[str] = (),
    reinit: Sequence[str] = (),
    hook_timeout: float = 5.0,
    keep: int = 50,
    active: str = "run-on",
    consistency: str = "function",
    timeout: float = 5.0,
    coroutines: bool = True,
) -> Session:
    """Open a session on a running process. Nothing is stopped or written before `apply`.

    `compile_commands` and `watched` say where commands for source files are to be found; the sources that they
    name are read now, as what the process was built from. `every_function` replaces functions that did not change as
    well. `archives` and `libraries` are where to find what the process lacks; with `allow_undefined`, a call of what
    is nowhere aborts when it is reached. With `tree`, its descendants are changed with it: all or none, unless
    `best_effort`. `allowed_layouts` are types that may change, since nothing live has their old layout or the caller
    sees to it. `hook_timeout` is how long each function that the program has for patcher to call may take, in seconds;
    `keep`, how many generations can be gone back to at least.
    `active` says what becomes of threads and coroutines that are in the code which a change replaces: they go on in it
    ("run-on"), are waited for ("drain"), or make the change be refused ("refuse"); with `consistency` "generation"
    they are waited for as well. `timeout` is how long, in seconds; then the change is given up.
    Without `coroutines`, stacks that no thread is on are left out.
    Raises `TargetGone` or `AttachDenied`, with what to do about it.
    """
    from patcher.options import Options
    from patcher.session import Session
    from patcher.target import Target
    from patcher.tree import Tree

    options = Options(
        compile_commands=Path(compile_commands) if compile_commands is not None else None,
        watched=tuple(Path(w) for w in watched),
        force=force,
        every_function=every_function,
        dry_run=dry_run,
        archives=tuple(Path(a) for a in archives),
        libraries=tuple(libraries),
        allow_undefined=allow_undefined,
        best_effort=best_effort,
        allowed_layouts=tuple(allowed_layouts),
        reinit=tuple(reinit),
        hook_timeout=hook_timeout,
        keep=keep,
        active=active,
        consistency=consistency,
        timeout=timeout,
        coroutines=coroutines,
    )
    session = (Tree if tree else Session)(Target.attach(pid), options)
    session.remember_texts()
    return session


def spawn(
    program: str | Path,
    arguments: Sequence[str] = (),
    *,
    aslr: bool = False,
    compile_commands: str | Path | None = None,
    watched: Sequence[str | Path] = (),
    force: bool = False,
    archives: Sequence[str | Path] = (),
    libraries: Sequence[str] = (),
    allow_undefined: bool = False,
    allowed_layouts: Sequence[str] = (),
    reinit: Sequence[str] = (),
    hook_timeout: float = 5.0,
    keep: int = 50,
    active: str = "run-on",
    consistency: str = "function",
    timeout: float = 5.0,
    coroutines: bool = True,
) -> Session:
    """Start a program and open a session on it. The caller is its parent, and waits for it.

    Its pid is `session.target.pid`. Raises `PatcherError` when it cannot be started.
    """
    from patcher.target import spawn as start

    child = start(str(program), list(arguments), aslr=aslr)
    return attach(
        child.pid,
        compile_commands=compile_commands,
        watched=watched,
        force=force,
        archives=archives,
        libraries=libraries,
        allow_undefined=allow_undefined,
        allowed_layouts=allowed_layouts,
        reinit=tuple(reinit),
        hook_timeout=hook_timeout,
        keep=keep,
        active=active,
        consistency=consistency,
        timeout=timeout,
        coroutines=coroutines,
    )


__all__ = [
    "AttachDenied",
    "BuildError",
    "Forbidden",
    "Generation",
    "LinkError",
    "NoCompileCommand",
    "ObjectError",
    "PatcherError",
    "RelocationOverflow",
    "Session",
    "Status",
    "TargetBusy",
    "TargetError",
    "TargetGone",
    "UnresolvedSymbol",
    "UnsafeChange",
    "UnsupportedRelocation",
    "attach",
    "spawn",
]
