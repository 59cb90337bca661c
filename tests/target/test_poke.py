"""What is written word by word, where the kernel writes no other way: no jump of five bytes is ever half there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from patcher.target.target import _words_to_poke

PAGE = 4096
OLD, NEW = b"\x90" * 5, b"\xe9\x01\x02\x03\x04"


@given(st.lists(st.integers(13, 60), min_size=1, max_size=80), st.integers(0, 2 * PAGE))
def test_a_jump_is_written_by_one_word(gaps: list[int], first: int) -> None:
    before = bytearray(b"\x90" * 2 * PAGE)
    after = bytearray(before)
    jumps, at = [], first
    for gap in gaps:
        at += gap
        if at + 5 <= len(after) and at % PAGE <= PAGE - 5:
            after[at : at + 5] = NEW
            jumps.append(at)
    written = bytearray(before)
    for word in _words_to_poke(bytes(before), bytes(after)):
        assert word // PAGE == (word + 7) // PAGE
        written[word : word + 8] = after[word : word + 8]
        assert all(written[jump : jump + 5] in (OLD, NEW) for jump in jumps)
    assert written == after


@given(st.binary(min_size=8, max_size=8), st.binary(min_size=8, max_size=8), st.integers(0, 31))
def test_a_cell_is_written_by_one_word(old: bytes, new: bytes, index: int) -> None:
    before, after = bytearray(256), bytearray(256)
    before[8 * index : 8 * index + 8], after[8 * index : 8 * index + 8] = old, new
    assert list(_words_to_poke(bytes(before), bytes(after))) == ([8 * index] if old != new else [])
