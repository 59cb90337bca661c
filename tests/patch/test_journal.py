"""The journal's form in memory: what is written comes back, and no bytes whatever do harm."""

from __future__ import annotations

import json
import random
import resource
import struct
import zlib
from dataclasses import asdict, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patcher.errors import UnsafeChange
from patcher.patch.journal import Allocation, Body, GenerationRecord, Journal, Placed, Redirect, decode, encode


def record(number: int, parent: int, name: str = "answer") -> GenerationRecord:
    return GenerationRecord(
        number=number,
        parent=parent,
        time=1700000000.25,
        files=("src/unit.c", "src/für.c"),
        bodies=((0x7FFF00000000, 1, 0x7FFF01000000 + number),),
        statuses=((name, "/bin/program", "changed"),),
        placed=(Placed(name, (name,), "code", "/bin/program", "unit.c#1", False, 0x7FFF01000000 + number, 20),),
        redirects=(
            Redirect(
                name, (name, "alias"), "/bin/program", "unit.c#1", False, 0x401000, 20, 0x7FFF00000000, number, 0x40,
                "f30f1efa90", ((0x404018, 0x401000, 0x7FFF00000010),),
            ),
        ),
        quiet=(Body("loop", 1, 2),),
        quiet_back=(),
        allocations=(Allocation("src/unit.c", 20, 3, 8, 16, 24), Allocation(f"lib{number}.a(ä.o)", 1)),
    )  # fmt: skip


RECORDS = [record(1, 0), record(2, 1, "ärger"), record(3, 1)]
BYTES = b"".join(map(encode, RECORDS))


def framed(body: bytes) -> bytes:
    return struct.pack("<II", len(body), zlib.crc32(body)) + body


def damage(data: bytes, changes: list[tuple[int, int]], cut: int) -> bytes:
    changed = bytearray(data)
    for position, value in changes:
        changed[position % len(changed)] = value
    return bytes(changed[: len(changed) - cut % len(changed)])


def read_or_refuse(data: bytes) -> Journal | None:
    try:
        return decode(data)
    except UnsafeChange as error:
        refusal = error
    assert refusal.code == "damaged-journal"
    assert refusal.hint
    return None


def test_what_was_written_comes_back():
    journal = decode(BYTES)
    assert list(journal.generations.values()) == RECORDS
    assert journal.next_number == 4
    assert [r.number for r in journal.lineage(3)] == [1, 3]
    assert decode(BYTES + bytes(100)).generations == journal.generations
    assert decode(b"").generations == {}


def test_what_each_object_took_is_added_up():
    found = {a.object: a for a in decode(BYTES).allocations}
    assert found.pop("src/unit.c") == Allocation("src/unit.c", 60, 9, 24, 48, 72)
    assert {name: a.total for name, a in found.items()} == {f"lib{n}.a(ä.o)": 1 for n in (1, 2, 3)}


def test_a_record_of_an_older_version_has_no_allocations():
    fields = asdict(record(1, 0))
    del fields["allocations"]
    assert decode(framed(zlib.compress(json.dumps(fields).encode()))).generations[1].allocations == ()


def test_a_record_of_an_older_version_says_less_of_variables():
    placed = Placed("n", ("n",), "data", "/bin/program", "unit.c", True, 16, 4, "integer (4)", "f", True, 1, 0)
    fields = asdict(replace(record(1, 0), placed=(placed,)))
    assert decode(framed(zlib.compress(json.dumps(fields).encode()))).placed == [placed]
    for name in ("type", "scope", "moved", "depth", "order"):
        del fields["placed"][0][name]
    found = decode(framed(zlib.compress(json.dumps(fields).encode()))).placed
    assert found == [replace(placed, type="", scope="", moved=False, depth=-1, order=-1)]


def test_a_circle_of_parents_is_refused():
    journal = decode(encode(record(1, 2)) + encode(record(2, 1)))
    with pytest.raises(UnsafeChange):
        journal.lineage(2)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=6), st.integers(0, 1 << 12))
def test_damaged_bytes_are_refused_or_read_and_nothing_else(changes, cut):
    data = damage(BYTES, changes, cut)
    journal = read_or_refuse(data)
    if journal is not None:  # what the checksums let through is whole records, from the first on
        assert list(journal.generations.values()) == RECORDS[: len(journal.generations)]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_records_with_a_right_checksum_and_hostile_fields(data):
    body = BYTES[8 : 8 + struct.unpack_from("<I", BYTES)[0]]
    fields = json.loads(zlib.decompress(body))
    place = fields
    for _ in range(data.draw(st.integers(0, 2))):
        inner = [v for v in (place.values() if isinstance(place, dict) else place) if isinstance(v, (dict, list)) and v]
        if not inner:
            break
        place = data.draw(st.sampled_from(inner))
    key = data.draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
    place[key] = data.draw(VALUES)
    journal = read_or_refuse(framed(zlib.compress(json.dumps(fields).encode())))
    if journal is not None:
        assert all(0 <= r.original < 1 << 64 and r.index >= 0 for r in journal.redirects)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b"1" * 100_000,
        b"null",
        b"{}",
        b"[]",
        b"\xff\xfe",
        json.dumps({"number": 1e400}).encode(),
    ],
)
def test_texts_that_are_no_record(text):
    assert read_or_refuse(framed(zlib.compress(text))) is None


def test_bytes_that_are_not_compressed():
    assert read_or_refuse(framed(random.Random(1).randbytes(500))) is None
    assert read_or_refuse(framed(zlib.compress(b"{}")[:-3])) is None


def test_a_small_record_cannot_fill_our_memory():
    packed = zlib.compressobj()
    bomb = b"".join(packed.compress(bytes(1 << 20)) for _ in range(512)) + packed.flush()
    assert len(bomb) < 1 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_or_refuse(framed(bomb)) is None
    assert read_or_refuse(framed(zlib.compress(b" " * (40 << 20) + b"{}")) * 3) is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10, "KiB"
