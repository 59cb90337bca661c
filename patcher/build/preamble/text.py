"""What of a source text is its preamble, and what the rest may not say when the preamble was compiled before.

The preamble is what stands before the first declaration: comments and directives, up to the end of the last top-level
`#include` among them. Decided from the text alone, and for the worse where it is odd: no preamble is always right.
Specification: ISO C11 5.1.1.2 (phases of translation), 6.10 (directives); cpp(1), "Pragmas".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_BLANK = re.compile(rb"(?:[ \t\r\n\f\v]|//(?:\\\r?\n|[^\n])*|/\*.*?\*/)*", re.S)
_DIRECTIVE = re.compile(
    rb"[ \t]*#[ \t]*([A-Za-z_]*)"
    rb"((?:\\\r?\n|/\*.*?\*/|//(?:\\\r?\n|[^\n])*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'|[^\n])*)\n",
    re.S,
)
_OPENING = (b"if", b"ifdef", b"ifndef")
_NEUTRAL = (b"", b"define", b"undef", b"elif", b"elifdef", b"elifndef", b"else")
# a trigraph, a splice with blanks behind it, a byte order mark, a NUL: rare, and read differently by compilers
_ODD = re.compile(rb"\?\?|\\[ \t\f\v\r]+\n|\\\r[^\n]|\xef\xbb\xbf|\0")
# what means something else in a text that is compiled for the file, or in two steps
_SPOILS = re.compile(
    rb"__BASE_FILE__|__TIME__|__DATE__|__TIMESTAMP__|include_next|#\s*include\s+__FILE__|#\s*import"
    rb"|pragma\s+(?:GCC\s+)?(?:implementation|interface|pch_preprocess)"
    rb"|(?i:incbin)|\"\s*\.include"
)
_READING = re.compile(rb"#\s*(?:include|embed)|%:|\?\?=|__has_")
_SPLICE = re.compile(rb"\\\r?\n")
# where the end of a literal cannot be told by the patterns below
_EXACT = re.compile(rb"R\"|[0-9A-Za-z]'[0-9A-Za-z]|\?\?|\\[ \t\f\v\r]+\n")
_COMMENT_OR_LITERAL = re.compile(rb"//(?:\\\r?\n|[^\n])*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", re.S)
_PRAGMA = re.compile(rb"^[ \t]*#[ \t]*pragma[ \t]+(.*)$", re.M)
_HARMLESS = re.compile(
    r"(?:once|message|weak|region|endregion|mark|unroll|GCC (?:ivdep|unroll)|clang loop)\b"
    r"|(?:GCC|clang) (?:diagnostic|system_header|poison|warning|error)\b"
)
_PUSH_OR_POP = re.compile(
    r"(?:(?:GCC|clang) )?(pack|visibility|attribute|push_macro|pop_macro|push_options|pop_options)\b"
    r"(?: \w+\.push| \w+\.pop)?[ (]*(push|pop)?"
)
_WITHIN_OPTIONS = re.compile(r"GCC (?:optimize|target)\b")


@dataclass(frozen=True, slots=True)
class Cut:
    """A text in two: the preamble, which ends with a line, and the rest, with the number of its first line."""

    preamble: bytes
    rest: bytes
    line: int


def cut(text: bytes) -> Cut | None:
    """Divide a source text behind its preamble; None where there is none that could be compiled by itself."""
    end = _preamble_end(text)
    preamble, rest = text[:end], text[end:]
    if not end or _ODD.search(preamble) or spoils(text):
        return None
    return Cut(preamble, rest, preamble.count(b"\n") + 1)


def spoils(text: bytes) -> bool:
    """Tell whether a text has words whose meaning depends on when, or as which file, it is compiled."""
    return _SPOILS.search(text) is not None


def includes_more(rest: bytes) -> bool:
    """Tell whether what follows the preamble may read further files."""
    return _READING.search(_SPLICE.sub(b"", bare(rest))) is not None


def bare(text: bytes) -> bytes:
    """Return a text with blanks for comments: of equal ones, every token stands in the same line and column.

    Where literals cannot be told from comments with certainty, the text comes back as it is.
    """
    if _EXACT.search(text):
        return text
    blanked = _COMMENT_OR_LITERAL.sub(_blanked, text)
    return re.sub(rb"[ \t\r]+(?=\n)", b"", blanked).rstrip()


def leaves_state(preprocessed: bytes) -> str:
    """Return the pragma that still has effect at the end of a preprocessed preamble, or nothing.

    Measured: gcc 12 forgets packing, visibility, targets and storage order behind a precompiled header, clang 14
    visibility, pushed macros and renamed symbols; so none of them may be left changed.
    """
    pushed: dict[str, list[str]] = {}
    packed = ""
    for match in _PRAGMA.finditer(preprocessed):
        words = " ".join(match[1].decode("utf-8", "replace").split())
        family, direction = _family(words)
        if direction == "push":
            pushed.setdefault(family, []).append(words)
        elif direction == "pop" and pushed.get(family):
            pushed[family].pop()
        elif family == "pack" and not direction:
            if not pushed.get("pack"):
                packed = "" if words.replace(" ", "") == "pack()" else words
        elif not _HARMLESS.match(words) and not (_WITHIN_OPTIONS.match(words) and pushed.get("options")):
            return words
    return packed or next((words[-1] for words in pushed.values() if words), "")


def _preamble_end(text: bytes) -> int:
    position = end = depth = 0
    waiting = False  # there was an #include inside a condition that is still open
    while True:
        blank = _BLANK.match(text, position)
        start = blank.end() if blank else position
        directive = _DIRECTIVE.match(text, start)
        if directive is None:
            return end
        name = directive[1]
        if name == b"include":
            waiting = True
        elif name in _OPENING:
            depth += 1
        elif name == b"endif":
            depth -= 1
        elif name not in _NEUTRAL:
            return end
        position = directive.end()
        if waiting and depth == 0:
            end, waiting = position, False


def _blanked(match: re.Match[bytes]) -> bytes:
    found = match[0]
    return re.sub(rb"[^\n]", b" ", found) if found.startswith(b"/") else found


def _family(words: str) -> tuple[str, str]:
    """Return what a pragma is about, and whether it is a push or a pop."""
    match = _PUSH_OR_POP.match(words)
    if match is None:
        return "", ""
    first, _, second = match[1].rpartition("_")
    return (second, first) if first else (match[1], match[2] or "")
