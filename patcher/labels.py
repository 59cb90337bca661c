"""LABELS: tables of addresses in the middle of functions (`&&label`), which lead into one body and into no other.

A constant table changes with its function. One in a live variable leads into the old code for good, so that its
function keeps that code, or is refused when it has to change.
"""

from __future__ import annotations

from patcher.blocks import Block, Kind, Place
from patcher.errors import UnsafeChange
from patcher.live import base_name
from patcher.match import Status
from patcher.part import Part


class Kept(Exception):
    """Functions that are the same turned out not to be replaceable: they keep their code, link again."""


def labels_of_new_code(part: Part, block: Block) -> list[Block]:
    """Return the functions that are to be new and that a table's addresses lead into the middle of (`&&label`)."""
    found = (r.target for r in part.blocks.references(block))
    inside = (t.block for t in found if isinstance(t, Place) and t.block.kind is Kind.CODE and t.offset)
    return [b for b in dict.fromkeys(inside) if part.is_new(b)]


def check_labels(part: Part, block: Block) -> None:
    """Refuse new code for a function whose labels stand in a live variable: these lead into the old code."""
    functions = labels_of_new_code(part, block)
    if not functions:
        return
    if all(part.status(f) is Status.SAME for f in functions):
        for function in functions:
            part.keep(function)
        raise Kept
    raise UnsafeChange(
        f"`{base_name(block.name)}` of {part.source} is a variable and holds addresses of labels in "
        f"{', '.join(f'`{f.name}`' for f in functions)}, where they lead into the old code",
        "restart the program; a table of labels that is declared const changes with its function",
        code="label-table",
    )
