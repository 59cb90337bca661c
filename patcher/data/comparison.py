"""COMPARISON: the layout of a variable's type as values, and how two of them differ.

A `Layout` is what debug information says of a type, reduced to what JSON can hold: the journal keeps it, so that a
later controller can compare with it. Whether a difference matters, and what becomes of the variable, is decided by
`migrate`; `layout` reads them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

Spec = list[Any]  # of JSON: a kind, and what its layout is made of


@dataclass(frozen=True, slots=True)
class Layout:
    """The type of a variable: the names of its elements' type, how many there are, how each is laid out.

    `types` names every structure that it contains.
    """

    names: tuple[str, ...]
    count: int
    spec: Spec
    types: tuple[str, ...]

    @property
    def element_size(self) -> int:
        return int(self.spec[1]) if self.spec[0] != "array" else 0

    def as_text(self) -> str:
        return json.dumps([self.names, self.count, self.spec, self.types], separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> Layout | None:
        """Read back what `as_text` gave; None for anything else."""
        try:
            names, count, spec, types = json.loads(text)
            return cls(tuple(names), int(count), list(spec), tuple(types))
        except (ValueError, TypeError):
            return None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A variable's layout as the process has it and as the new code has it, where known."""

    old: Layout | None
    new: Layout | None

    @property
    def differs(self) -> bool:
        if self.old is None or self.new is None:
            return False
        return self.old.count != self.new.count or not same(self.old.spec, self.new.spec)

    @property
    def is_same(self) -> bool:
        return self.old is not None and self.new is not None and not self.differs

    @property
    def elements_differ(self) -> bool:
        return self.old is not None and self.new is not None and not same(self.old.spec, self.new.spec)


def same(old: Spec | None, new: Spec | None) -> bool:
    """Tell whether two types are laid out alike: a member may have another name, and not another's place."""
    if old is None or new is None:
        return old is new
    if old[0] != new[0] or old[1] != new[1]:
        return False
    if old[0] == "array":
        return same(old[2], new[2])
    if old[0] != "record":
        return True
    if len(old[2]) != len(new[2]):
        return False
    places = {name: offset for name, offset, _, _ in old[2] if name}
    if any(places.get(name, offset) != offset for name, offset, _, _ in new[2]):
        return False
    return all(a[1:3] == b[1:3] and same(a[3], b[3]) for a, b in zip(old[2], new[2], strict=True))
