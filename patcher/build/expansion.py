"""What the preprocessor hands on of a unit, as far as it decides about the object.

Two texts with the same `digest` make the same code, and the same debug lines. The macros that are left unused, blocks
that are left out by `#if`, and comments are not in it. Lines and columns count to the line: where a header shifts, it
is another text, unless the header is C and has no code, whose declarations may stand in any line.
Not decided here: what the text names and a compiler reads later (`reads_later`), and macros in debug information.
Specification: cpp(1), "Preprocessor Output".
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

_MARKER = re.compile(rb'^# (\d+) "((?:\\.|[^"\\\n])*)"((?: \d)*)$\n?', re.M)
_SYSTEM = b"3"
_LATER = re.compile(rb"(?i:\.\s*inc(?:bin|lude))|^\s*#\s*embed", re.M)
# A brace behind anything else may be that of a function.
_OF_DATA = re.compile(rb"(?:\b(?:struct|union|enum)(?:\s+\w+)?|=|,)\s*\{")
_ESCAPE = re.compile(rb"\\(?:([0-7]{3})|(.))")


@dataclass(frozen=True, slots=True)
class Expansion:
    """A preprocessed text: what is compared of it, and the files that it comes from, as the compiler names them."""

    digest: bytes
    files: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Chunk:
    marker: bytes
    file: bytes
    flags: bytes
    text: bytes


def expansion_of(text: bytes, *, exact: bool) -> Expansion | None:
    """Read what a preprocessor wrote; None where a compiler reads more than that.

    `exact`: every line counts, also in headers without code.
    """
    if _LATER.search(text):
        return None
    chunks = tuple(_chunks(text))
    main = chunks[0].file if chunks else b""
    shifting = frozenset() if exact else _without_code([c for c in chunks if c.file != main])
    digest = hashlib.blake2b(digest_size=20)
    before = b""
    for chunk in chunks:
        if chunk.file not in shifting:
            digest.update(chunk.marker + chunk.text)
        else:
            digest.update(b"" if chunk.file == before else b"\0" + chunk.file + chunk.flags + b"\0")
            digest.update(b"".join(line.strip() + b"\n" for line in chunk.text.splitlines() if line.strip()))
        before = chunk.file
    files = (_spelled(chunk.file) for chunk in chunks)
    return Expansion(digest.digest(), frozenset(f for f in files if not f.startswith("<") and not f.endswith("//")))


def _chunks(text: bytes) -> Iterator[_Chunk]:
    markers = list(_MARKER.finditer(text))
    for number, marker in enumerate(markers):
        end = markers[number + 1].start() if number + 1 < len(markers) else len(text)
        kind = b"".join(sorted(flag for flag in marker[3].split() if flag not in (b"1", b"2")))
        yield _Chunk(marker[0], marker[2], kind, text[marker.end() : end])


def _without_code(chunks: list[_Chunk]) -> frozenset[bytes]:
    """Return the files of the user's that surely have no code of their own."""
    texts: dict[bytes, list[bytes]] = {}
    for chunk in chunks:
        if _SYSTEM not in chunk.flags:
            texts.setdefault(chunk.file, []).append(chunk.text)
    return frozenset(file for file, parts in texts.items() if _has_no_code(b"".join(parts)))


def _has_no_code(text: bytes) -> bool:
    return b"{" not in _OF_DATA.sub(b"", text) and b'R"' not in text


def _spelled(name: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda m: bytes([int(m[1], 8)]) if m[1] else m[2], name))
