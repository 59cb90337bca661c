"""What a project's configuration says: `patcher.toml`, or the section `[tool:patcher]` of `setup.cfg`.

Decides where it lies: in the current directory or the nearest above, no farther than the root of the checkout, the
home directory, or `/`; of the two in one directory, `patcher.toml`. A file of somebody else is refused as compile
commands are, for it names commands that we run. Paths in it are relative to its directory. Which options there
are is `options`' business. Specification: TOML 1.0; configparser.
"""

from __future__ import annotations

import configparser
import difflib
import os
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patcher.build.trust import doubt
from patcher.errors import PatcherError
from patcher.options import TABLE, Kind, Row

TOML = "patcher.toml"
INI = "setup.cfg"
SECTION = "tool:patcher"
_CHECKOUTS = (".git", ".hg", ".jj", ".svn", ".bzr")
_STATES = configparser.ConfigParser.BOOLEAN_STATES


class ConfigurationError(PatcherError):
    """A configuration that cannot mean anything; like wrong usage of the command line."""

    code = "configuration"
    exit_status = 2


@dataclass(frozen=True, slots=True)
class Setting:
    """One option's value in a file, and the line where it stands."""

    row: Row
    value: Any
    file: Path
    line: int

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


def read_configuration(start: Path) -> tuple[Setting, ...]:
    """Return the settings of the nearest configuration; none where there is no file.

    Raises `ConfigurationError`, with file and line, and `PatcherError` (`untrusted`) for a file of somebody else.
    """
    for directory in _upwards(start):
        for name, read in ((TOML, _of_toml), (INI, _of_ini)):
            text = _text(directory / name)
            if text is not None and (name == TOML or f"[{SECTION}]" in text):
                return tuple(_settings(directory / name, text, read(directory / name, text)))
    return ()


def _upwards(start: Path) -> Iterator[Path]:
    home = Path(os.path.expanduser("~"))
    for directory in (start, *start.parents):
        yield directory
        if directory == home or any((directory / name).exists() for name in _CHECKOUTS):
            return


def _text(path: Path) -> str | None:
    """Return what a file says, if it is there and, for a setup.cfg, about us. Refuses one that is not to be trusted."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            status, text = os.fstat(file.fileno()), file.read().decode()
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}", "make it readable, or give --no-config") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path}: is not UTF-8", "save it as UTF-8, or give --no-config") from None
    if path.name == INI and f"[{SECTION}]" not in text:
        return None
    if why := doubt(status):
        raise PatcherError(
            f"{path}: {why}, so what it says is not done",
            "make it again as the user that runs patcher, writable by nobody else, or give --no-config",
            code="untrusted",
        )
    return text


def _of_toml(path: Path, text: str) -> Mapping[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path}: {error}", "correct the file, or give --no-config") from None


def _of_ini(path: Path, text: str) -> Mapping[str, Any]:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(text, source=path.name)
    except configparser.Error as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"{path}: {reason}", "correct the file, or give --no-config") from None
    return parser[SECTION]


def _settings(path: Path, text: str, found: Mapping[str, Any]) -> Iterator[Setting]:
    rows = {row.switch: row for row in TABLE}
    for key, value in found.items():
        line = _line(path, text, key)
        place = f"{path}:{line}"
        row = rows.get(key.replace("_", "-"))
        if row is None:
            raise _unknown(place, key)
        if not row.configured:
            raise ConfigurationError(
                f"{place}: `{key}` is not for a configuration: it answers for one change",
                f"take it out, and give --{row.switch} where it is wanted",
            )
        read = _words if path.name == INI else _value
        yield Setting(row, _placed(row, _checked(row, read(row, value, place), place), path.parent), path, line)


def _unknown(place: str, key: str) -> ConfigurationError:
    known = [row.switch for row in TABLE if row.configured]
    near = difflib.get_close_matches(key.replace("_", "-"), known, 1)
    return ConfigurationError(
        f"{place}: there is no option `{key}`" + (f"; did you mean `{near[0]}`?" if near else ""),
        "correct the name; `patcher config --show --no-config` lists them all",
    )


def _line(path: Path, text: str, key: str) -> int:
    """Return the line in which a key stands: of a file's own part, below its section's header."""
    lines = text.splitlines()
    first = next((n for n, line in enumerate(lines) if line.strip() == f"[{SECTION}]"), 0) if path.name == INI else 0
    wanted = re.compile(rf"""\s*\[?["']?{re.escape(key)}\b["']?\s*[=:.\]]""", re.IGNORECASE)
    return next((n for n, line in enumerate(lines, 1) if n > first and wanted.match(line)), first + 1)


_NOUNS = {
    Kind.FLAG: "true or false",
    Kind.TEXT: "a text",
    Kind.PATH: "a path",
    Kind.TEXTS: "a list of texts",
    Kind.PATHS: "a list of paths",
    Kind.COUNT: "a whole number",
    Kind.SECONDS: "a number of seconds",
}


def _wrong(row: Row, value: object, place: str, what: str = "") -> ConfigurationError:
    return ConfigurationError(f"{place}: `{row.switch}` is {what or _NOUNS[row.kind]}, not {value!r}", row.meaning)


def _value(row: Row, value: Any, place: str) -> Any:
    """Return a value of TOML as its row wants it."""
    if row.kind.repeatable and isinstance(value, str):
        return (value,)
    types: dict[Kind, type | tuple[type, ...]] = {
        Kind.FLAG: bool,
        Kind.COUNT: int,
        Kind.SECONDS: (int, float),
        Kind.TEXTS: list,
        Kind.PATHS: list,
    }
    if not isinstance(value, types.get(row.kind, str)) or (row.kind is not Kind.FLAG and isinstance(value, bool)):
        raise _wrong(row, value, place)
    if isinstance(value, list):
        if not all(isinstance(word, str) for word in value):
            raise _wrong(row, value, place)
        return tuple(value)
    return value


def _words(row: Row, value: str, place: str) -> Any:
    """Return a value of an INI file as its row wants it; lists are words as in a shell, on any number of lines."""
    try:
        match row.kind:
            case Kind.FLAG:
                return _STATES[value.lower()]
            case Kind.COUNT:
                return int(value)
            case Kind.SECONDS:
                return float(value)
            case Kind.TEXTS | Kind.PATHS:
                return tuple(shlex.split(value))
            case _:
                return value
    except (KeyError, ValueError):
        raise _wrong(row, value, place) from None


def _checked(row: Row, value: Any, place: str) -> Any:
    if row.choices and value not in row.choices:
        raise _wrong(row, value, place, f"one of {', '.join(row.choices)}")
    if row.kind in (Kind.COUNT, Kind.SECONDS) and not (value > row.least or (value == row.least and not row.above)):
        raise _wrong(row, value, place, f"{'more than' if row.above else 'at least'} {row.least:g}")
    return value


def _placed(row: Row, value: Any, directory: Path) -> Any:
    """Return a value with its paths as seen from the file's directory."""
    match row.kind:
        case Kind.PATH:
            return directory / os.path.expanduser(value)
        case Kind.PATHS:
            return tuple(directory / os.path.expanduser(word) for word in value)
        case Kind.TEXTS if "PATH" in row.metavar:  # a name as well: only what has a slash is a path
            return tuple(str(directory / word) if "/" in word else word for word in value)
        case Kind.TEXT if row.metavar == "FILE" and value not in ("", "-"):
            return str(directory / value)
        case _:
            return value
