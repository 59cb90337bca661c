"""`ar` archives: the System V / GNU format, with long names, and thin archives.

The linker's symbol index (`/`) is skipped: members are few and are read anyway.
"""

from __future__ import annotations

from pathlib import Path

from patcher.errors import ObjectError

_MAGIC = b"!<arch>\n"
_THIN_MAGIC = b"!<thin>\n"
_HEADER_SIZE = 60


def is_archive(data: bytes) -> bool:
    """Tell whether a file starts as an archive does."""
    return data[:8] in (_MAGIC, _THIN_MAGIC)


def read_archive(path: Path, data: bytes) -> tuple[tuple[str, bytes], ...]:
    """Return the (name, contents) of each member, in order. Thin archives' members are read beside the archive."""
    thin = data[:8] == _THIN_MAGIC
    members: list[tuple[str, bytes]] = []
    long_names = b""
    position = 8
    while position + _HEADER_SIZE <= len(data):
        header = data[position : position + _HEADER_SIZE]
        position += _HEADER_SIZE
        raw_name, size = header[:16].rstrip(), _size(path, header)
        special = raw_name in (b"/", b"//", b"/SYM64/")
        stored = size if special or not thin else 0
        if position + stored > len(data):
            raise ObjectError(
                f"{path}: member at {position - _HEADER_SIZE:#x} reaches beyond the end of the file",
                "the archive is truncated; build it again",
            )
        body = data[position : position + stored]
        position += stored + (stored & 1)
        if raw_name == b"//":
            long_names = body
        if special:
            continue
        name = _member_name(raw_name, long_names)
        members.append((name, _thin_member(path, name) if thin else body))
    return tuple(members)


def _size(path: Path, header: bytes) -> int:
    digits = header[48:58].strip()
    if header[58:60] != b"`\n" or not digits.isdigit():
        raise ObjectError(f"{path}: a damaged archive member header", "build the archive again")
    return int(digits)


def _member_name(raw: bytes, long_names: bytes) -> str:
    if raw[:1] == b"/" and raw[1:].isdigit():
        start = int(raw[1:])
        end = long_names.find(b"\n", start)
        raw = long_names[start : end if end >= 0 else len(long_names)]
    return raw.removesuffix(b"/").decode("utf-8", "replace")


def _thin_member(archive: Path, name: str) -> bytes:
    try:
        return (archive.parent / name).read_bytes()
    except OSError as error:
        raise ObjectError(
            f"{archive}: member {name} of this thin archive cannot be read: {error.strerror}", "build it again"
        ) from None
