"""What the contents of a block of data mean: a digest, the same for the same contents, and a few words for people.

Addresses are not part of a meaning; what they lead to is: a name, or, for what has none (a string), its contents.
"""

from __future__ import annotations

import hashlib

from patcher.blocks import Absolute, Block, Blocks, External, Kind, Reference, Target
from patcher.live import LiveUnit, base_name
from patcher.match.rewritten import width_of

_SHORT = 40
_NUMBERS = {1: 8, 2: 16, 4: 24, 8: 48}
"""Values of so many bytes are shown as numbers when they have at most so many bits: larger ones may be no integers."""


def digest(blocks: Blocks, block: Block) -> str:
    """Return a digest of what a block holds; "" for zeros."""
    if not any(block.data) and not blocks.references(block):
        return ""
    meaning = repr(_meaning(blocks, block, ()))
    return hashlib.blake2b(meaning.encode(), digest_size=8).hexdigest()


def _meaning(blocks: Blocks, block: Block, within: tuple[Block, ...]) -> object:
    contents = bytearray(block.data)
    references = blocks.references(block)
    for r in references:
        contents[r.offset : r.offset + width_of(r)] = bytes(width_of(r))
    around = (*within, block)
    return bytes(contents), tuple((r.offset, r.type, r.addend, _target(blocks, r.target, around)) for r in references)


def _target(blocks: Blocks, target: Target, within: tuple[Block, ...]) -> object:
    if isinstance(target, External):
        return target.name, 0
    if isinstance(target, Absolute):
        return target.value
    block = target.block
    if block.symbols:
        return base_name(block.name), target.offset
    if block in within:
        return within.index(block), target.offset
    if block.string:
        return block.data[target.offset :]
    return block.kind.value, _meaning(blocks, block, within), target.offset


def shown(blocks: Blocks, block: Block) -> str:
    """Return a block's contents in a few words, "" when they are not short."""
    references = blocks.references(block)
    if not references:
        return shown_bytes(block.data or bytes(min(block.size, _SHORT + 1)))
    if len(references) == 1 and block.size == 8:
        return _pointer(references[0])
    return ""


def _pointer(r: Reference) -> str:
    if isinstance(r.target, Absolute) or r.addend:
        return ""
    if isinstance(r.target, External):
        return f"&{r.target.name}"
    block, offset = r.target
    if block.anonymous:
        return _text_at(block.data[offset:])
    if offset:
        return ""
    return base_name(block.name) if block.kind is Kind.CODE else f"&{base_name(block.name)}"


def shown_bytes(data: bytes) -> str:
    """Return plain contents in a few words: a small number, a text; "" for anything else."""
    bits = _NUMBERS.get(len(data))
    if bits is None:
        return "" if any(data.partition(b"\0")[2]) else _text_at(data)
    value = int.from_bytes(data, "little", signed=True)
    return str(value) if abs(value) >> bits == 0 else ""


def shown_pointer(unit: LiveUnit, value: int, to: Block) -> str:
    """Return in a few words what a pointer of the process leads to, which now leads to `to`."""
    if not value:
        return "0"
    if to.anonymous:
        return _text_at(unit.image.target.memory.read_available(value, _SHORT))
    names = sorted(name for name, _ in unit.names_at(value))
    if not names:
        return ""
    return base_name(names[0]) if to.kind is Kind.CODE else f"&{base_name(names[0])}"


def _text_at(data: bytes) -> str:
    text, end, _ = data[:_SHORT].partition(b"\0")
    return f'"{text.decode()}"' if text and end and all(32 <= c < 127 for c in text) else ""
