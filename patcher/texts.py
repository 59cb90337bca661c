"""The source texts that live code may have been compiled from: as they were when a session began, and as applied.

They tell whether a line number still names the same line, and whether a unit was what runs before it was edited.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from patcher.build import is_header, is_unit

_LIMIT = 256 << 20  # bytes that are remembered
_KEPT = 4  # texts of one file, beside the first


class Texts:
    """Texts by file, the oldest first."""

    def __init__(self) -> None:
        self._texts: dict[Path, list[bytes]] = {}
        self._size = 0

    def remember(self, roots: Iterable[Path]) -> None:
        """Keep the sources at and below `roots` as they are now, those that are not known already."""
        for root in dict.fromkeys(roots):
            for path in [root] if root.is_file() else sorted(root.rglob("*")):
                if (is_unit(path) or is_header(path)) and path.is_file() and self._size < _LIMIT:
                    self._keep_first(path.resolve())

    def _keep_first(self, path: Path) -> None:
        if path not in self._texts:
            self._texts[path] = [path.read_bytes()]
            self._size += len(self._texts[path][0])

    def of(self, file: Path) -> list[bytes]:
        """Return what is known of a file."""
        return self._texts.get(file, [])

    def applied(self, file: Path) -> None:
        """Note that live code comes from the text that a file has now."""
        if (is_unit(file) or is_header(file)) and file.is_file():
            texts = self._texts.setdefault(file, [])
            text = file.read_bytes()
            if text not in texts:
                texts[1:] = [*texts[1:], text][-_KEPT:]
