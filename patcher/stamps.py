"""Build stamps: the texts that `__DATE__`, `__TIME__` and `__TIMESTAMP__` made of the moment of a compile.

They differ with every compile, and a function that shows one would be new with every save. A text is taken for a
stamp only if it names the very second (or day) in which the unit was compiled; what looks like a date and is not
that one is a constant like any other. Specification: C17, 6.10.8.1; asctime(3).
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

_MONTHS = b"Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec"
_DATE = re.compile(rb"(?:%s) [ \d]\d \d{4}" % _MONTHS)
_TIME = re.compile(rb"\d\d:\d\d:\d\d")
_TIMESTAMP = re.compile(rb"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) (?:%s) [ \d]\d \d\d:\d\d:\d\d \d{4}" % _MONTHS)


@dataclass(frozen=True, slots=True)
class Stamps:
    """The stamps that one compile may have written."""

    texts: frozenset[bytes] = frozenset()

    def same_but_for(self, ours: bytes, theirs: bytes) -> bool:
        """Tell whether two constants are equal but for stamps: those of this compile in `ours`, any in `theirs`."""
        if len(ours) != len(theirs) or not self.texts:
            return False
        masked_ours, masked_theirs = bytearray(ours), bytearray(theirs)
        for pattern in (_TIMESTAMP, _DATE, _TIME):
            for found in pattern.finditer(bytes(masked_ours)):
                low, high = found.span()
                if found.group() in self.texts and pattern.fullmatch(bytes(masked_theirs[low:high])):
                    masked_ours[low:high] = masked_theirs[low:high] = bytes(high - low)
        return masked_ours == masked_theirs


NONE = Stamps()


def stamps_between(began: float, ended: float, written: float) -> Stamps:
    """Return the stamps of a compile that ran from `began` to `ended`, of a file last written at `written`.

    All are in seconds since the epoch.
    """
    texts = {_asctime(written)}
    for second in range(int(began), int(ended) + 1):
        text = _asctime(second)
        texts |= {text[11:19], text[4:11] + text[20:]}  # "Sun Sep 16 01:03:52 1973"
    return Stamps(frozenset(texts))


def _asctime(moment: float) -> bytes:
    return time.asctime(time.localtime(moment)).encode()
