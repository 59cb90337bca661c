"""The command line's entry: the commands, and what an error looks like from outside.

0 done, 1 refused or failed with the target untouched, 2 usage, 3 no such target or not permitted
"""

from __future__ import annotations

import sys

import click

from patcher import __version__
from patcher.cli.attach import attach
from patcher.cli.change import apply, revert
from patcher.cli.completion import completion
from patcher.cli.configured import config
from patcher.cli.ctl import ctl
from patcher.cli.doctor import doctor
from patcher.cli.explain import explain
from patcher.cli.header import header
from patcher.cli.mistakes import explained
from patcher.cli.monitor import monitor
from patcher.cli.spawn import spawn
from patcher.cli.status import status
from patcher.errors import BuildError, PatcherError, named_shortages


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="patcher")
def cli() -> None:
    """Change the code of a native program while it runs.

    \b
    patcher spawn ./prog --watch src/     edit, save: the running program has the new code
    patcher attach 4711 --watch src/      the same for a process that is already there
    patcher apply 4711 physics.o          one object, archive or source, no watching
    patcher revert 4711                   back by one generation
    patcher explain 4711 physics.c        what a save would do
    """


for command in (spawn, attach, apply, revert, status, explain, ctl, monitor, doctor, config, completion, header):
    cli.add_command(command)


def main() -> None:
    """Run the command line, and end with the exit status that is promised."""
    try:
        with named_shortages():
            sys.exit(cli.main(prog_name="patcher", standalone_mode=False) or 0)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        print_error(PatcherError(*explained(error)))
        sys.exit(error.exit_code)
    except PatcherError as error:
        print_error(error)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)


def print_error(error: PatcherError) -> None:
    """Write an error for people: what, and what to do next."""
    if isinstance(error, BuildError) and error.diagnostics:
        click.echo(error.diagnostics.rstrip("\n"), err=True)
    click.echo(f"patcher: {error.message}", err=True)
    if error.hint:
        click.echo(f"patcher:   {error.hint}", err=True)
