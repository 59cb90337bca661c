"""Making objects by the hundred thousand.

Python's cyclic garbage collector looks at all objects again and again while many are made: at a unit of 200,000
functions that took a third of the time, and nothing made there is garbage.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the cyclic garbage collector from running; may be nested."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
