"""A unit compiled from texts that are not on disk any more: the unit's own, and those of headers.

The texts are written below a directory of ours under their own absolute paths, and every include directory of the
command is preceded by its mirror. What is not among the texts is found where it always was. Decides nothing else about
switches.
Specification: gcc(1), "Options for Directory Search".
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

_DIRECTORY = ("-I", "-iquote", "-isystem", "-idirafter")


def write_texts(mirror: Path, texts: Mapping[Path, bytes]) -> None:
    """Write texts below `mirror`, each at its file's absolute path."""
    for file, text in texts.items():
        place = mirrored(mirror, file)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(text)


def mirrored(mirror: Path, file: Path) -> Path:
    """Return where a file's text is, or would be, below `mirror`."""
    return mirror / os.path.abspath(file).lstrip("/")


def searched_first(groups: Iterable[tuple[str, ...]], mirror: Path, directory: Path) -> Iterator[tuple[str, ...]]:
    """Yield the switches of a command that runs in `directory`, each directory of headers behind its mirror."""
    for group in groups:
        switch = next((s for s in _DIRECTORY if group[0].startswith(s)), "")
        value = group[1] if group[0] == switch and len(group) > 1 else group[0].removeprefix(switch)
        if switch and value:
            yield switch, str(mirrored(mirror, directory / value))
        if group[0] == "-include" and mirrored(mirror, directory / group[-1]).exists():
            yield "-include", str(mirrored(mirror, directory / group[-1]))
        else:
            yield group
