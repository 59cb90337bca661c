"""What a user may choose: one table of options, which the command line, the configuration and the manual read.

A field of `Options` or `Settings` is a row: its name, type and default are the field's own, the rest stands in its
metadata. The public API spells the fields of `Options` out in its signatures, as callers read those; a test holds them
against the table. Decides what may be chosen and for which command; where a value comes from is others' business.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from patcher.errors import PatcherError

WATCHING = ("spawn", "attach")
CHANGING = (*WATCHING, "apply", "revert", "explain")
LOOKING = (*WATCHING, "doctor")  # commands that have to know what will be watched, and built
SHOWING = "config"  # the command that has all options which may be configured


class Kind(enum.Enum):
    """What the value of an option is."""

    FLAG = "flag"
    TEXT = "text"
    PATH = "path"
    TEXTS = "texts"
    PATHS = "paths"
    COUNT = "count"
    SECONDS = "seconds"

    @property
    def repeatable(self) -> bool:
        return self in (Kind.TEXTS, Kind.PATHS)


@dataclass(frozen=True, slots=True)
class Row:
    """An option: the field that holds it, and what people read and write of it."""

    field: str
    kind: Kind
    default: Any
    switch: str  # without dashes; the key in a configuration as well
    meaning: str  # the first sentence says what it does
    commands: tuple[str, ...]
    metavar: str
    short: str
    choices: tuple[str, ...]
    least: float  # of numbers
    above: bool  # and not `least` itself
    configured: bool  # may stand in a configuration: what one would repeat, not what answers for one change

    @property
    def parameter(self) -> str:
        """The name under which the command line hands it on."""
        return self.switch.replace("-", "_")

    @property
    def negatable(self) -> bool:
        """Whether there is a `--no-` form, so that a flag can win over what is configured."""
        return self.kind is Kind.FLAG and (self.configured or bool(self.default))


def _row(
    switch: str,
    meaning: str,
    *,
    of: tuple[str, ...] = CHANGING,
    metavar: str = "",
    short: str = "",
    choices: tuple[str, ...] = (),
    least: float = 0,
    above: bool = False,
    configured: bool = True,
) -> Mapping[str, Any]:
    return {
        "switch": switch,
        "meaning": meaning,
        "commands": of,
        "metavar": metavar,
        "short": short,
        "choices": choices,
        "least": least,
        "above": above,
        "configured": configured,
    }


@dataclass(frozen=True, slots=True)
class Options:
    """What a session is told; each choice has the default that suits most."""

    watched: tuple[Path, ...] = field(
        default=(), metadata=_row("watch", "Apply saves below PATH.", of=LOOKING, metavar="PATH")
    )
    ignore: tuple[str, ...] = field(
        default=(),
        metadata=_row("ignore", "Leave saves of these alone, written as in .gitignore.", of=WATCHING, metavar="GLOB"),
    )
    gitignore: bool = field(
        default=True, metadata=_row("gitignore", "Leave saves of what git ignores alone.", of=WATCHING)
    )
    build: str = field(
        default="",
        metadata=_row("build", "Build with this; take the objects that it wrote.", of=LOOKING, metavar="COMMAND"),
    )
    compile_commands: Path | None = field(
        default=None,
        metadata=_row(
            "compile-commands", "The compile_commands.json to use.", of=(*CHANGING, "doctor"), metavar="FILE"
        ),
    )
    archives: tuple[Path, ...] = field(
        default=(), metadata=_row("archive", "Take what is missing from this archive.", metavar="FILE")
    )
    libraries: tuple[str, ...] = field(
        default=(),
        metadata=_row(
            "library",
            "Load this shared library (m, libm.so.6, ./libx.so) when it has what is missing.",
            metavar="NAME|PATH",
        ),
    )
    allow_undefined: bool = field(
        default=False, metadata=_row("allow-undefined", "Let calls of functions that are nowhere abort when reached.")
    )
    active: str = field(
        default="run-on",
        metadata=_row(
            "active",
            "Who is in old code goes on there, is waited for, or makes it be refused.",
            choices=("run-on", "drain", "refuse"),
        ),
    )
    consistency: str = field(
        default="function",
        metadata=_row(
            "consistency",
            "Change functions each by itself, or while nobody is in any of them.",
            choices=("function", "generation"),
        ),
    )
    timeout: float = field(
        default=5.0, metadata=_row("timeout", "How long to wait until nobody is in old code.", metavar="SECONDS")
    )
    coroutines: bool = field(
        default=True, metadata=_row("coroutines", "Look for old code on stacks that no thread is on, or not.")
    )
    hook_timeout: float = field(
        default=5.0,
        metadata=_row(
            "hook-timeout", "How long each hook and migration of the program may take.", metavar="SECONDS", above=True
        ),
    )
    keep: int = field(
        default=50, metadata=_row("keep", "How many generations can be gone back to at least.", metavar="N", least=1)
    )
    best_effort: bool = field(
        default=False, metadata=_row("best-effort", "With --tree: change those processes that can be.")
    )
    every_function: bool = field(
        default=False, metadata=_row("every-function", "Replace functions that did not change as well.")
    )
    reinit: tuple[str, ...] = field(
        default=(),
        metadata=_row(
            "reinit", "Write this variable's new initial value, if that changed.", metavar="NAME", configured=False
        ),
    )
    allowed_layouts: tuple[str, ...] = field(
        default=(),
        metadata=_row(
            "allow-layout-change",
            "Take it that nothing live has TYPE's old layout.",
            metavar="TYPE",
            configured=False,
        ),
    )
    force: bool = field(
        default=False,
        metadata=_row("force", "Apply a unit even if most of it is not what runs.", configured=False),
    )
    dry_run: bool = field(
        default=False, metadata=_row("dry-run", "Say what would be done, and do nothing.", configured=False)
    )
    colour: bool = False  # whether compilers shall use it: what we write to decides that
    ignore_from: Path | None = None  # the directory that the globs are relative to; None: the current one
    build_in: Path | None = None  # likewise, where `build` runs

    def __post_init__(self) -> None:
        for row in TABLE:
            found = getattr(self, row.field, row.default)
            if row.choices and found not in row.choices:
                raise PatcherError(f"{row.switch}: {found!r} is none of {', '.join(row.choices)}")


@dataclass(frozen=True, slots=True)
class Settings(Options):
    """What a command is told: the session's choices, and how it is started and what is said of it."""

    aslr: bool = field(default=False, metadata=_row("aslr", "Leave address randomisation on.", of=("spawn",)))
    restart: str = field(
        default="never",
        metadata=_row(
            "restart",
            "Start it again when it exits, or when a change is refused (which takes --build), or both.",
            of=("spawn",),
            choices=("never", "exit", "refused", "always"),
        ),
    )
    tree: bool = field(
        default=False, metadata=_row("tree", "Take the process and its descendants as one.", of=(*CHANGING, "status"))
    )
    events: str = field(
        default="", metadata=_row("events", "Append events, one JSON object a line; - is stderr.", metavar="FILE")
    )
    log: str = field(
        default="", metadata=_row("log", "Append what is said to this file, instead of stderr.", metavar="FILE")
    )
    problems: bool = field(
        default=False,
        metadata=_row(
            "problems",
            "Say what is wrong as FILE:LINE:COLUMN: SEVERITY: MESSAGE, for an editor's problem matcher.",
            of=WATCHING,
        ),
    )
    json: bool = field(
        default=False,
        metadata=_row(
            "json",
            "Print the outcome as JSON on stdout.",
            of=("apply", "revert", "explain", "status", "ctl", "doctor", SHOWING),
            configured=False,
        ),
    )
    config: bool = field(
        default=True,
        metadata=_row(
            "config",
            "Read patcher.toml, or [tool:patcher] of setup.cfg.",
            of=(*CHANGING, "status", "doctor", SHOWING),
            configured=False,
        ),
    )
    quiet: bool = field(default=False, metadata=_row("quiet", "Say nothing but errors.", short="q"))
    verbose: bool = field(default=False, metadata=_row("verbose", "Say more.", short="v", of=(*CHANGING, "status")))


_KINDS = {
    bool: Kind.FLAG,
    str: Kind.TEXT,
    Path | None: Kind.PATH,
    tuple[str, ...]: Kind.TEXTS,
    tuple[Path, ...]: Kind.PATHS,
    int: Kind.COUNT,
    float: Kind.SECONDS,
}


def _table() -> tuple[Row, ...]:
    types = get_type_hints(Settings)
    return tuple(Row(f.name, _KINDS[types[f.name]], f.default, **f.metadata) for f in fields(Settings) if f.metadata)


TABLE = _table()


def rows_of(command: str) -> tuple[Row, ...]:
    """Return the options of a command, in the order in which they are shown."""
    return tuple(r for r in TABLE if command in r.commands or (command == SHOWING and r.configured))
