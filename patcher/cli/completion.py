"""`patcher completion`: what a shell has to know to complete our command line. Specification: click's own."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> int:
    """Print a script that makes SHELL complete patcher's commands, options and files.

    \b
    eval "$(patcher completion bash)"         in ~/.bashrc (bash 4.4 or later)
    eval "$(patcher completion zsh)"          in ~/.zshrc, after compinit
    patcher completion fish | source          in ~/.config/fish/config.fish
    """
    root = context.find_root()
    kind = get_completion_class(shell)
    assert kind is not None, "click has all of them"
    click.echo(kind(root.command, {}, "patcher", "_PATCHER_COMPLETE").source())
    return 0
