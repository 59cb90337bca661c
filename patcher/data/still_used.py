"""Whether a variable can be given up for new storage: who still refers to the old one is found, and refused by name.

Every reference must be in code that is replaced, or that is out of use already (`give_up`); a word that holds an
address there may be used by anybody (`refuse_words`). Looking is `holders`' business.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

from patcher.data.holders import Extent, Holders, Range
from patcher.errors import UnsafeChange
from patcher.image import Image

if TYPE_CHECKING:
    from patcher.patch.journal import ArenaView
    from patcher.target import Mapping


def give_up(holders: Holders, name: str, low: int, high: int) -> tuple[Extent, ...]:
    """Return the old code that refers to a variable at `low`..`high`: none of it may be running any more.

    Raises `UnsafeChange` naming whoever goes on referring to it.
    """
    ranges = [(low, high)]
    through = holders.users_through(holders.words(holders.mapped(), ranges))
    users = [*chain.from_iterable(chain(holders.users(ranges), through))]
    for user in users:
        if not user.out_of_use:
            raise _still_used(name, f"{user.name}{user.home}")
    return tuple(dict.fromkeys(u.extent for u in users))


def refuse_words(
    image: Image,
    view: ArenaView,
    name: str,
    ranges: Sequence[Range],
    stacks: Sequence[int],
    ends: Sequence[int] = (),
) -> None:
    """Raise `UnsafeChange` when a word of the process holds an address in one of `ranges`, or one of `ends`.

    `ends` are addresses behind variables, where loops end; others may begin there. Not counted are cells, the ranges
    themselves, and the stacks, one of which each address of `stacks` lies in.
    """
    holders = Holders(image, view)
    mappings = [
        m
        for m in image.target.mappings()
        if m.readable and not m.executable and not any(sp in m for sp in stacks) and not m.path.startswith("[v")
    ]
    wanted = [*ranges, *((end, end + 1) for end in ends)]
    for (low, _), words in zip(wanted, holders.words(mappings, wanted), strict=True):
        for at in words.others:
            inside = any(start <= at < end for start, end in ranges)
            spared = _is_slack(image, mappings, at) or (low in ends and _is_of_linker(image, at))
            if not inside and not spared:
                what = "the address behind its end" if low in ends else "its address"
                raise _still_used(name, f"{_word(holders, mappings, at)}, which holds {what}")


def _is_slack(image: Image, mappings: Sequence[Mapping], at: int) -> bool:
    """Tell whether a word is mapped with a module only because it shares a page of its file: debug information, say.

    What is behind data that may be written does not count as such: the loader's allocator takes that.
    """
    module = image.module_at(at)
    if module is None or any(at in m and m.writable for m in mappings):
        return False
    place = at - module.bias
    return not any(s.address <= place < s.address + s.memory_size for s in module.module.segments)


def _is_of_linker(image: Image, at: int) -> bool:
    """Tell whether a word of a module is part of no variable: where sections end, linkers have words of their own."""
    module = image.module_at(at)
    return module is not None and module.module.symbols.covering(at - module.bias) is None


def _word(holders: Holders, mappings: Sequence[Mapping], at: int) -> str:
    home = next((m.path for m in mappings if at in m), "")
    return holders.variable_at(at) or f"a word at {at:#x} of {home or 'anonymous memory'}"


def _still_used(name: str, who: str) -> UnsafeChange:
    return UnsafeChange(
        f"`{name}` has another layout now, and {who} still refers to the old one",
        "save every file that uses it together; what holds its address in memory cannot be told to let go of it",
        code="still-used",
    )
