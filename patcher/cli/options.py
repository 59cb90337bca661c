"""Options that several commands share, and the reporters they ask for."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from patcher.errors import PatcherError
from patcher.options import CHOICES, Options
from patcher.report.console import ConsoleReport
from patcher.report.events import EventStream, Reporter, Reporters
from patcher.session import Offer, Session
from patcher.target import Target
from patcher.tree import Tree

F = TypeVar("F", bound=Callable[..., Any])

_PATH = click.Path(path_type=Path)


@dataclass(frozen=True, slots=True)
class Common:
    """The options that every command which changes something has."""

    watch: tuple[Path, ...]
    compile_commands: Path | None
    build: str
    events: str
    quiet: bool
    verbose: bool
    dry_run: bool
    force: bool
    every_function: bool
    allow_layout_change: tuple[str, ...]
    archive: tuple[Path, ...]
    library: tuple[str, ...]
    allow_undefined: bool
    tree: bool
    best_effort: bool
    reinit: tuple[str, ...]
    hook_timeout: float
    keep: int
    active: str
    consistency: str
    timeout: float
    coroutines: bool

    def options(self) -> Options:
        return Options(
            compile_commands=self.compile_commands,
            watched=self.watch,
            build=self.build,
            force=self.force,
            every_function=self.every_function,
            dry_run=self.dry_run,
            colour=sys.stderr.isatty(),
            allowed_layouts=self.allow_layout_change,
            archives=self.archive,
            libraries=self.library,
            allow_undefined=self.allow_undefined,
            best_effort=self.best_effort,
            reinit=self.reinit,
            hook_timeout=self.hook_timeout,
            keep=self.keep,
            active=self.active,
            consistency=self.consistency,
            timeout=self.timeout,
            coroutines=self.coroutines,
        )

    def session(self, pid: int, reporter: Reporter, offer: Offer | None = None) -> Session:
        """Open a session on a process, or on it and its descendants, where nobody is asked."""
        if self.tree:
            return Tree(Target.attach(pid), self.options(), reporter)
        return Session(Target.attach(pid), self.options(), reporter, offer)

    @contextlib.contextmanager
    def reporter(self) -> Iterator[Reporter]:
        """Yield what events go to: the console, and the stream or file of --events."""
        reporters: list[Reporter] = []
        with contextlib.ExitStack() as stack:
            if self.events == "-":
                reporters.append(EventStream(sys.stderr))
            else:
                reporters.append(ConsoleReport(sys.stderr, quiet=self.quiet, verbose=self.verbose))
            if self.events not in ("", "-"):
                try:
                    stream = stack.enter_context(open(self.events, "a", encoding="utf-8"))
                except OSError as error:
                    raise PatcherError(f"{self.events}: {error.strerror}", "give another file to --events") from None
                reporters.append(EventStream(stream))
            yield Reporters(reporters)


def common(watch: bool) -> Callable[[F], F]:
    """Add the common options to a command, which gets them as one `common` argument."""

    def decorate(function: F) -> F:
        options = [
            click.option("--force", is_flag=True, help="Apply a unit even if most of it is not what runs."),
            click.option(
                "--allow-layout-change",
                multiple=True,
                metavar="TYPE",
                help="Take it that nothing live has TYPE's old layout. Repeatable.",
            ),
            click.option(
                "--reinit",
                multiple=True,
                metavar="NAME",
                help="Write this variable's new initial value, if that changed. Repeatable.",
            ),
            click.option(
                "--allow-undefined", is_flag=True, help="Let calls of functions that are nowhere abort when reached."
            ),
            click.option(
                "--library",
                multiple=True,
                metavar="NAME|PATH",
                help="Load this shared library (m, libm.so.6, ./libx.so) when it has what is missing. Repeatable.",
            ),
            click.option(
                "--archive",
                type=_PATH,
                multiple=True,
                metavar="FILE",
                help="Take what is missing from this archive. Repeatable.",
            ),
            click.option(
                "--hook-timeout",
                type=click.FloatRange(min=0, min_open=True),
                default=Options().hook_timeout,
                metavar="SECONDS",
                help="How long each hook and migration of the program may take (default: 5).",
            ),
            click.option(
                "--keep",
                type=click.IntRange(min=1),
                default=Options().keep,
                metavar="N",
                help="How many generations can be gone back to at least (default: 50).",
            ),
            click.option(
                "--coroutines/--no-coroutines",
                default=True,
                help="Look for old code on stacks that no thread is on (default), or not.",
            ),
            click.option(
                "--timeout",
                type=click.FloatRange(min=0),
                default=Options().timeout,
                metavar="SECONDS",
                help="How long to wait until nobody is in old code (default: 5).",
            ),
            click.option(
                "--consistency",
                type=click.Choice(CHOICES["consistency"]),
                default=Options().consistency,
                help="Change functions each by itself, or while nobody is in any of them.",
            ),
            click.option(
                "--active",
                type=click.Choice(CHOICES["active"]),
                default=Options().active,
                help="Who is in old code goes on there, is waited for, or makes it be refused.",
            ),
            click.option("--every-function", is_flag=True, help="Replace functions that did not change as well."),
            click.option("--best-effort", is_flag=True, help="With --tree: change those processes that can be."),
            click.option("--tree", is_flag=True, help="Take the process and its descendants as one."),
            click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing."),
            click.option("-v", "--verbose", is_flag=True, help="Say more."),
            click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors."),
            click.option(
                "--events", default="", metavar="FILE", help="Append events, one JSON object a line; - is stderr."
            ),
            click.option("--compile-commands", type=_PATH, metavar="FILE", help="The compile_commands.json to use."),
        ]
        if watch:
            options += [
                click.option("--build", default="", metavar="COMMAND", help="Build with this; take what it rebuilt."),
                click.option(
                    "--watch", type=_PATH, multiple=True, metavar="PATH", help="Apply saves below PATH. Repeatable."
                ),
            ]
        for option in options:
            function = option(function)
        return function

    return decorate


def gather(arguments: dict[str, Any]) -> Common:
    """Take the common options out of a command's arguments."""
    for path in arguments.get("watch", ()):
        if not path.exists():
            raise click.UsageError(f"--watch {path}: no such file or directory")
    database = arguments["compile_commands"]
    if database is not None and not database.exists():
        raise click.UsageError(f"--compile-commands {database}: no such file or directory")
    for archive in arguments["archive"]:
        if not archive.is_file():
            raise click.UsageError(f"--archive {archive}: no such file")
    return Common(
        watch=tuple(arguments.get("watch", ())),
        compile_commands=arguments["compile_commands"],
        build=arguments.get("build", ""),
        events=arguments["events"],
        quiet=arguments["quiet"],
        verbose=arguments["verbose"],
        dry_run=arguments["dry_run"],
        force=arguments["force"],
        every_function=arguments["every_function"],
        allow_layout_change=tuple(arguments["allow_layout_change"]),
        archive=tuple(arguments["archive"]),
        library=tuple(arguments["library"]),
        allow_undefined=arguments["allow_undefined"],
        tree=arguments["tree"],
        best_effort=arguments["best_effort"],
        reinit=tuple(arguments["reinit"]),
        hook_timeout=arguments["hook_timeout"],
        keep=arguments["keep"],
        active=arguments["active"],
        consistency=arguments["consistency"],
        timeout=arguments["timeout"],
        coroutines=arguments["coroutines"],
    )
