"""OUTLINE: the part of a unit's text that decides about types and declarations outside of functions.

That is all of it but the bodies of functions. Only what is surely such a body is left out: what may be anything else
(a class, an initialiser, a function that others may be evaluated with as they are compiled, a macro's doing) stays,
and so does a body with directives in it. Counted for nothing is what only line numbers and `__COUNTER__` change.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_TOKEN = re.compile(
    rb"""
      //(?:\\\r?\n|[^\n])*
    | /\*.*?\*/
    | ^[ \t]*\#(?:\\\r?\n|/\*.*?\*/|[^\n])*
    | (?:u8|[uUL])?R"(?P<fence>[^ ()\\\t\v\f\n]{0,16})\(.*?\)(?P=fence)"
    | "(?:\\.|[^"\\])*"
    | \b\d[\w.']*
    | '(?:\\.|[^'\\\n])*'
    | \w+
    | [^\s\w]
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
# A body behind one of these decides about types, or is none.
_OTHER = re.compile(
    rb"""\b(?:struct|class|union|enum|auto|constexpr|consteval|constinit|decltype|concept|requires|template|typedef
    |using|operator|if|else|for|while|do|switch|try|catch|asm|__asm__|__extension__|[A-Z][A-Z0-9_]+)\b|[=\[#]""",
    re.VERBOSE,
)
_OUTER = re.compile(rb"""(?:inline\s+)?namespace\b[^()]*|extern\s*"C(?:\+\+)?"\s*""")
_BEHIND = re.compile(rb"\s*(?:(?:const|volatile|noexcept|override|final|&)\s*)*(?:(?:- >|:).*)?", re.DOTALL)
_COMMENT = (b"//", b"/*")
_DIRECTIVE = re.compile(rb"#|\bpragma\b|_Pragma|__pragma")


def outline(text: bytes) -> bytes:
    """Return a text without comments and without the bodies of functions."""
    found: list[bytes] = []
    tokens = (m.group() for m in _TOKEN.finditer(text))
    _outer((t for t in tokens if not t.startswith(_COMMENT)), found)
    return b" ".join(found)


def _outer(tokens: Iterator[bytes], found: list[bytes]) -> None:
    start = len(found)  # of the declaration that is being read
    for token in tokens:
        found.append(token)
        if token in (b";", b"}") or (token.lstrip().startswith(b"#") and start == len(found) - 1):
            start = len(found)
        elif token == b"{":
            head = b" ".join(found[start:-1])
            if not _OUTER.fullmatch(head):
                body = _balanced(tokens)
                if not _is_body(head) or _DIRECTIVE.search(b" ".join(body)):
                    found += body
            start = len(found)


def _is_body(head: bytes) -> bool:
    _, closed, behind = head.rpartition(b")")
    return bool(closed) and _BEHIND.fullmatch(behind) is not None and not _OTHER.search(head)


def _balanced(tokens: Iterator[bytes]) -> list[bytes]:
    """Return what follows an opening brace, up to the one that closes it."""
    found: list[bytes] = []
    depth = 1
    for token in tokens:
        found.append(token)
        depth += (token == b"{") - (token == b"}")
        if not depth:
            break
    return found
