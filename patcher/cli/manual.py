"""The manual: one page for each command, and patcher(1), written from the commands themselves.

`python -m patcher.cli.manual DIRECTORY` writes them; what they say of options is what the table of options says, and
their words and examples are those of --help. Specification: man(7), groff_man(7).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from patcher import __version__
from patcher.cli.main import cli
from patcher.configuration import INI, SECTION, TOML
from patcher.options import TABLE

_AS_IS = "\b"  # click's mark of a paragraph that is not to be filled
_STATUS = (
    ("0", "Done."),
    ("1", "Refused or failed; the process is as it was."),
    ("2", "Wrong usage, or a configuration that means nothing."),
    ("3", "No such process, not permitted, or it is gone."),
)


def pages() -> dict[str, str]:
    """Return the text of each page by the name of its file."""
    found = {"patcher.1": _overview()}
    for name, command in sorted(cli.commands.items()):
        found[f"patcher-{name}.1"] = _page(name, command)
    return found


def main(arguments: list[str]) -> int:
    """Write the pages into a directory."""
    (directory,) = map(Path, arguments)
    directory.mkdir(exist_ok=True)
    for name, text in pages().items():
        (directory / name).write_text(text, "utf-8")
    return 0


def _overview() -> str:
    lines = [*_title("patcher"), *_name("patcher", cli), ".SH SYNOPSIS", ".B patcher", r"\fICOMMAND\fR [\fIOPTIONS\fR]"]
    lines += _described(cli)
    lines.append(".SH COMMANDS")
    for name, command in sorted(cli.commands.items()):
        lines += [".TP", rf"\fBpatcher\-{_text(name)}\fR(1)", _text(_sentence(command))]
    lines += [".SH CONFIGURATION", *_configuration()]
    return "\n".join([*lines, *_exit_status(), *_see_also([f"patcher-{name}" for name in sorted(cli.commands)]), ""])


def _page(name: str, command: click.Command) -> str:
    lines = [*_title(f"patcher-{name}"), *_name(f"patcher-{name}", command), ".SH SYNOPSIS"]
    pieces = command.collect_usage_pieces(click.Context(command))
    lines += [rf"\fBpatcher {_text(name)}\fR {_text(' '.join(pieces))}", *_described(command)]
    options = [p for p in command.params if isinstance(p, click.Option)]
    if options:
        lines.append(".SH OPTIONS")
    for option in options:
        lines += [".TP", rf"\fB{_text(_spelled(option))}\fR", _text(option.help or "")]
    return "\n".join([*lines, *_exit_status(), *_see_also(["patcher"]), ""])


def _spelled(option: click.Option) -> str:
    """Write how an option is given; not as click does, whose releases differ in it."""
    names = ", ".join([*sorted(option.opts, key=len), *option.secondary_opts])
    value = option.metavar or ("|".join(option.type.choices) if isinstance(option.type, click.Choice) else "")
    return f"{names} {value}".rstrip()


def _title(page: str) -> list[str]:
    return [f'.TH {_text(page.upper())} 1 "" "patcher {__version__}" "patcher"']


def _name(page: str, command: click.Command) -> list[str]:
    return [".SH NAME", rf"{_text(page)} \- {_text(_sentence(command)[:-1])}"]


def _paragraphs(command: click.Command) -> list[str]:
    return inspect.cleandoc(command.help or "").split("\n\n")


def _sentence(command: click.Command) -> str:
    """Return the first sentence of a command's help."""
    first = " ".join(_paragraphs(command)[0].split())
    return first.partition(". ")[0].rstrip(".") + "."


def _described(command: click.Command) -> Iterator[str]:
    """Yield the paragraphs of a command's help; those that are to stay as they are are its examples."""
    paragraphs = _paragraphs(command)
    yield ".SH DESCRIPTION"
    for paragraph in paragraphs:
        if not paragraph.startswith(_AS_IS):
            yield from (".PP", _text(" ".join(paragraph.split())))
    yield ".SH EXAMPLES"
    for paragraph in paragraphs:
        if paragraph.startswith(_AS_IS):
            lines = paragraph.removeprefix(_AS_IS).strip("\n").splitlines()
            yield from (".PP", ".nf", ".RS 4", *map(_text, lines), ".RE", ".fi")


def _configuration() -> Iterator[str]:
    yield _text(
        f"What one would repeat may stand in {TOML}, or in the section [{SECTION}] of {INI}, in the current "
        "directory or the nearest above, as far as the root of the checkout or the home directory. Paths in it are "
        "relative to its directory. What is given on the command line wins. A file that somebody else owns or can "
        "write is refused."
    )
    yield from (".PP", ".nf", ".RS 4")
    yield from map(_text, ('watch = ["src"]', 'ignore = ["*.gen.c"]', 'build = "make -s"', 'active = "drain"'))
    yield from (".RE", ".fi", ".PP", "The keys are the names of options:")
    for row in TABLE:
        if row.configured:
            yield from (".TP", rf"\fB{_text(row.switch)}\fR", _text(row.meaning))


def _exit_status() -> Iterator[str]:
    yield ".SH EXIT STATUS"
    for number, meaning in _STATUS:
        yield from (".TP", rf"\fB{number}\fR", _text(meaning))
    yield from (".PP", _text("patcher spawn ends with the program's own: 128+N when signal N killed it."))


def _see_also(names: list[str]) -> Iterator[str]:
    yield from (".SH SEE ALSO", ", ".join(rf"\fB{_text(name)}\fR(1)" for name in names))


def _text(text: str) -> str:
    """Write text so that groff takes none of it for a request or a typographic sign."""
    escaped = text.replace("\\", r"\e").replace("-", r"\-").replace("~", r"\(ti").replace("^", r"\(ha")
    escaped = escaped.replace("'", r"\(aq").replace("`", r"\(ga").replace('"', r"\(dq")
    return rf"\&{escaped}" if escaped.startswith((".", "\\(aq")) else escaped


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
