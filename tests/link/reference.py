"""Link objects with another linker, and with ours at the very addresses that it chose.

`Reference` is what the other linker made: where it put each input section (from its map), its symbols, its bytes.
`differences` links the same objects again, each block at the address where the reference has it, and compares.
What is not ours to decide is taken from the reference and checked by meaning: merged strings and constants (their
contents), cells (what they hold), what an IFUNC's references lead to. `.eh_frame` is left out: we make none.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from patcher.blocks import Block, Blocks, External, Kind, Place, Reference
from patcher.elf import SymbolType, read_object
from patcher.elf import tables as t
from patcher.link.place import Layout, Region, Space, link
from patcher.link.plan import Bound, Plan, Unit, plan
from patcher.link.relocations import DYNAMIC_THREAD_LOCAL, RULES, Need, R, is_pc_relative

LINKERS = ("bfd", "gold", "lld", "mold")
_INPUT = re.compile(
    r"^ (?P<section>[.\w]\S*)\s+0x(?P<address>[0-9a-f]+)\s+0x[0-9a-f]+ (?P<file>\S+\.o)$"  # bfd, gold
    r"|^\s*(?:0x)?(?P<address2>[0-9a-f]+)\s.*\s(?P<file2>\S+\.o):\((?P<section2>\S+)\)$",  # lld, mold
    re.MULTILINE,
)
_OF_THE_LINKER = re.compile(r"__(start|stop)_|_?_(end|edata|etext|bss_start|(executable|ehdr)_start)$")
_CELLS, _JUMPS, _NOWHERE = 0x7000_0000, 0x7100_0000, 0x7200_0000
_PC_RELATIVE = (R.PC32, R.PLT32, R.PC64)
_SKIPPED = (".eh_frame", ".note", ".comment", ".gnu")


class LinkerDefect(Exception):
    """The other linker fails on these objects by a defect of its own."""


class NotThere(Exception):
    """Something leads to where nothing is."""


@dataclass(frozen=True)
class Linked:
    """A program that another linker made: bytes by address, symbols by name, input sections by file and name."""

    raw: t.RawFile
    sections: dict[tuple[str, str], int]
    symbols: dict[str, tuple[int, int]]  # value, type
    thread_start: int  # link-time address of the thread-local block
    thread_pointer: int  # and of its end

    @property
    def table(self) -> int:
        """The address of the table of cells."""
        return self.symbols.get("_GLOBAL_OFFSET_TABLE_", (_CELLS, 0))[0]

    def read(self, address: int, size: int) -> bytes:
        return loaded(self.raw, address, size)


def loaded(raw: t.RawFile, address: int, size: int) -> bytes:
    """Return what a program has at an address when it starts."""
    for p in raw.program_headers:
        start = int(p["address"])
        if int(p["type"]) == t.PT_LOAD and start <= address and address + size <= start + int(p["memory_size"]):
            offset = int(p["offset"]) + address - start
            return bytes(raw.data[offset : offset + size][: max(0, start + int(p["file_size"]) - address)]).ljust(
                size, b"\0"
            )
    raise NotThere(f"{address:#x} is not loaded")


def link_with(linker: str, objects: Sequence[Path], folder: Path) -> Linked:
    """Link objects and a stand-in for all that they lack into a program at fixed addresses, nothing relaxed."""
    output, text = folder / f"program.{linker}", folder / f"map.{linker}"
    stub = _stub(objects, folder)
    command = [f"ld.{linker}", "--no-relax", "-static", "-e", "main", "-z", "noexecstack", "-Map", text, "-o", output]
    done = subprocess.run([*map(str, (*command, *objects, stub))], capture_output=True, text=True)
    if "internal error" in done.stderr:
        raise LinkerDefect(done.stderr)
    assert done.returncode == 0, done.stderr
    return read_linked(output.read_bytes(), text.read_text())


def read_linked(program: bytes, text: str) -> Linked:
    """Read what a linker made, and the text of its map."""
    raw = t.read_raw("program", program)
    sections: dict[tuple[str, str], int] = {}
    for found in _INPUT.finditer(text):
        name, address = found["section"] or found["section2"], found["address"] or found["address2"]
        sections.setdefault((found["file"] or found["file2"], name), int(address, 16))
    return Linked(raw, sections, dict(_symbols(raw)), *_thread_block(raw))


def _symbols(raw: t.RawFile) -> Iterator[tuple[str, tuple[int, int]]]:
    for index, header in enumerate(raw.section_headers):
        if int(header["type"]) == t.SHT_SYMTAB:
            strings = bytes(raw.contents(int(header["link"])))
            for symbol in raw.table(index, t.SYM):
                name = t.string_at(strings, int(symbol["name"]))
                # Hidden names are local in a program; a unit's own statics are never asked for by name.
                yield name, (int(symbol["value"]), int(symbol["info"]) & 15)


def _thread_block(raw: t.RawFile) -> tuple[int, int]:
    for p in raw.program_headers:
        if int(p["type"]) == t.PT_TLS:
            start, end = int(p["address"]), int(p["address"]) + int(p["memory_size"])
            return start, end + (-end & (int(p["alignment"]) - 1))
    return 0, 0


def _stub(objects: Sequence[Path], folder: Path) -> Path:
    """Make an object that defines what the others only refer to."""
    symbols = [s for path in objects for s in read_object(path).symbols]
    defined = {s.name for s in symbols if not s.undefined and not s.local}
    wanted = {s.name: s for s in symbols if s.undefined and s.name and not s.weak and s.name not in defined}
    wanted.pop("_GLOBAL_OFFSET_TABLE_", None)
    lines = []
    for name, symbol in sorted(wanted.items()):
        if _OF_THE_LINKER.match(name):
            continue
        thread = symbol.type == SymbolType.TLS
        lines += ['.section .tdata,"awT"' if thread else ".text", f".globl {name}"]
        lines += [f".type {name}, {'@tls_object' if thread else '@function'}", f"{name}: .quad 0, 0"]
    (folder / "stub.s").write_text("\n".join(lines) + "\n")
    subprocess.run(["as", folder / "stub.s", "-o", folder / "stub.o"], check=True)
    return folder / "stub.o"


# --- ours -----------------------------------------------------------------------------------------------------


class _Objects:
    """Objects as blocks, with the address that the reference gave to each."""

    def __init__(self, paths: Sequence[Path], reference: Linked) -> None:
        self.reference = reference
        self.units = {path: Blocks(read_object(path)) for path in paths}
        self.units_of = {blocks.object: blocks for blocks in self.units.values()}
        self.addresses: dict[Block, int] = {}
        self.merged: dict[Block, int] = {}
        self.chosen: dict[str, int] = {}  # IFUNC: where the reference's calls lead
        self.problems: list[str] = []
        for path, blocks in self.units.items():
            for index, section in blocks.object.sections.items():
                if section.size and not section.mergeable and not section.name.startswith(_SKIPPED):
                    start = reference.sections.get((str(path), section.name))
                    assert start, f"{path.name}: {section.name} is not in the map"
                    for block in _blocks_of(blocks, index):
                        self.addresses[block] = start + block.start
        for blocks in self.units.values():
            self._take_merged(blocks)

    def placed(self, blocks: Blocks) -> tuple[Block, ...]:
        """Return what is to be linked: all but thread-locals, and code that needs jumps around it to stand alone."""
        own = (b for b in self.addresses if b.object is blocks.object and b.kind is not Kind.THREAD_LOCAL)
        return tuple(b for b in own if not (b.kind is Kind.CODE and blocks.stretched((b,))))

    def _take_merged(self, blocks: Blocks) -> None:
        for block in self.placed(blocks):
            for r in blocks.references(block):
                if isinstance(r.target, Place) and r.target.block not in self.addresses:
                    self._take(block, r, r.target)
                elif isinstance(r.target, External) and self._is_chosen(r.target.name):
                    self._choose(block, r, r.target.name)

    def _take(self, block: Block, r: Reference, target: Place) -> None:
        """Find where the reference has an entry of a merged section; its contents must be there."""
        other = target.block
        if not other.section or not other.object.sections[other.section].mergeable:
            return  # a common
        address = self._value(block, r) - target.offset
        if self.merged.setdefault(other, address) != address:
            self.problems.append(f"{other.name} has two addresses")
        # An entry with references of its own is not merged; what it holds then depends on where they lead.
        if not self.units_of[other.object].references(other) and self.reference.read(address, other.size) != other.data:
            self.problems.append(f"`{block.name}`+{r.offset:#x}: {other.name} is not at {address:#x}")

    def _value(self, block: Block, r: Reference) -> int:
        """Return S of a field that holds S + A, or S + A - P."""
        rule = RULES[r.type]
        place = self.addresses[block] + r.offset
        value = int.from_bytes(self.reference.read(place, rule.width), "little", signed=True) - r.addend
        if r.type in _PC_RELATIVE:
            return value + place
        if r.type == R.GOTOFF64:
            return value + self.reference.table
        assert r.type in (R.A64, R.A32, R.A32S), f"type {r.type} against a merged section"
        return value

    def _is_chosen(self, name: str) -> bool:
        return self.reference.symbols.get(name, (0, 0))[1] == SymbolType.IFUNC or any(
            s.type == SymbolType.IFUNC and s.name == name for b in self.units.values() for s in b.object.symbols
        )

    def _choose(self, block: Block, r: Reference, name: str) -> None:
        if r.type == R.PLT32:
            self.chosen.setdefault(name, self._value(block, r))

    def plan(self) -> Plan:
        units = [Unit(b, self.placed(b), self._resident(b), lambda _: False) for b in self.units.values()]
        return plan(units, self._resolve)

    def _resident(self, blocks: Blocks):  # type: ignore[no-untyped-def]
        def resident(block: Block) -> Bound | None:
            if block.kind is Kind.THREAD_LOCAL:
                return Bound(self.addresses[block] - self.reference.thread_pointer, thread_local=True)
            if block in self.merged:
                return Bound(self.merged[block])
            if block in self.addresses:
                return Bound(self.addresses[block])
            assert block.section == 0, f"{block.name} is neither placed nor merged"
            return Bound(self.reference.symbols[block.name][0])

        return resident

    def _resolve(self, blocks: Blocks, target: External) -> Bound | None:
        if target.name in self.chosen:
            return Bound(self.chosen[target.name])
        value, kind = self.reference.symbols.get(target.name, (None, 0))
        if value is None or (target.weak and not value):
            return None
        if kind == SymbolType.TLS:  # a TLS symbol's value counts from the block's start
            return Bound(self.reference.thread_start + value - self.reference.thread_pointer, thread_local=True)
        return Bound(value)


def _blocks_of(blocks: Blocks, index: int) -> Iterator[Block]:
    section = blocks.object.sections[index]
    offset = 0
    while offset < section.size:
        block = blocks.at(index, offset).block
        if block.start + block.size <= offset:
            offset += 1  # padding between functions
            continue
        yield block
        offset = block.start + block.size


@dataclass(frozen=True)
class Comparison:
    """What was compared, and what came out otherwise."""

    blocks: int
    bytes: int
    differences: tuple[str, ...]


def compare(paths: Sequence[Path], reference: Linked) -> Comparison:
    """Link objects with ours at the reference's addresses, and compare every byte of every block."""
    objects = _Objects(paths, reference)
    found = objects.plan()
    space = Space(*(Region(start, start + 0x100_0000) for start in (_CELLS, _JUMPS, _NOWHERE)))
    writes = link(found, Layout(objects.addresses, reference.table, space), {}, {}).writes
    problems, size = list(objects.problems), 0
    for blocks in objects.units.values():
        for block in objects.placed(blocks):
            if not block.data:
                continue
            size += block.size
            address = objects.addresses[block]
            ours = bytearray(_written(writes, address, block.size))
            theirs = bytearray(reference.read(address, block.size))
            for r in blocks.references(block):
                problems += _mask(r, block, address, ours, theirs, writes, reference, objects)
            if ours != theirs:
                at = next(i for i in range(block.size) if ours[i] != theirs[i])
                problems.append(
                    f"{block.object.name}: `{block.name}` at {address:#x}: byte {at:#x} of {block.size:#x}: "
                    f"{ours[at - at % 4 : at + 12].hex(' ')} instead of {theirs[at - at % 4 : at + 12].hex(' ')}"
                )
    return Comparison(sum(1 for b in found.placed if b.data), size, tuple(problems))


def _mask(
    r: Reference,
    block: Block,
    address: int,
    ours: bytearray,
    theirs: bytearray,
    writes: Sequence[tuple[int, bytes]],
    reference: Linked,
    objects: _Objects,
) -> Iterator[str]:
    """Compare what stands in cells, which are elsewhere, and take the fields that lead to them out."""
    rule = RULES[r.type]
    chosen = isinstance(r.target, External) and objects._is_chosen(r.target.name)
    if chosen and rule.need is not Need.ISLAND:
        ours[r.offset : r.offset + rule.width] = theirs[r.offset : r.offset + rule.width]
        return
    if r.type in DYNAMIC_THREAD_LOCAL:
        yield from _other_idiom(r, block, ours, theirs, reference)
    if rule.need not in (Need.CELL, Need.THREAD_CELL):
        return
    start, end = r.offset, r.offset + rule.width
    if ours[start - 3 : start] != theirs[start - 3 : start]:
        yield from _relaxed(r, block, address, ours, theirs, writes, reference)
        return
    base = address + r.offset if is_pc_relative(r.type) else reference.table
    cells = [base - r.addend + _signed(code[start:end]) for code in (ours, theirs)]
    left, right = _written(writes, cells[0], 8), reference.read(cells[1], 8)
    if left != right:
        yield f"`{block.name}`+{r.offset:#x}: the cell of {r.target} holds {left.hex()} instead of {right.hex()}"
    ours[start:end] = theirs[start:end] = bytes(rule.width)


def _relaxed(
    r: Reference,
    block: Block,
    address: int,
    ours: bytearray,
    theirs: bytearray,
    writes: Sequence[tuple[int, bytes]],
    reference: Linked,
) -> Iterator[str]:
    """Compare what our cell holds with what the reference put into the instruction instead."""
    start, end = r.offset, r.offset + 4
    cell = _written(writes, address + r.offset - r.addend + _signed(ours[start:end]), 8)
    value = int.from_bytes(cell, "little", signed=True)
    opcode, field = bytes(theirs[start - 2 : start]), _signed(theirs[start:end])
    direct = address + end + field
    if r.type == R.GOTTPOFF or opcode[0] in (0xC7, 0x81, 0xF7):
        same = field == value  # an immediate
    elif opcode == b"\x67\xe8" or opcode[0] == 0x8D:
        same = direct == value  # addr32 call; lea
    elif opcode[0] == 0xE9:
        same = address + end - 1 + _signed(theirs[start - 1 : end - 1]) == value  # jmp; nop
    else:
        same = False
    if not same:
        yield f"`{block.name}`+{r.offset:#x}: {opcode.hex(' ')} {field:#x} does not lead to {value:#x}"
    ours[start - 3 : end] = theirs[start - 3 : end] = bytes(7)


def _other_idiom(r: Reference, block: Block, ours: bytearray, theirs: bytearray, reference: Linked) -> Iterator[str]:
    """Compare mold's own code for thread-locals of known offsets, which is other than the psABI's examples."""
    at, size = r.offset, reference.thread_pointer - reference.thread_start
    if r.type == R.TLSGD and theirs[at + 5 : at + 8] == _ADD:
        theirs[at + 5 : at + 8] = _LEA  # add $x, %rax for lea x(%rax), %rax
    elif r.type == R.TLSLD and theirs[at - 3 : at + 5] == _START_OF_BLOCK:
        if _signed(theirs[at + 5 : at + 9]) != size:
            yield f"`{block.name}`+{at:#x}: the block of thread-locals has {size:#x} bytes"
        end = at + 10 if block.data[at + 4] == 0xFF else at + 9
        ours[at - 3 : end] = theirs[at - 3 : end]
    elif r.type == R.DTPOFF32 and _START_OF_BLOCK in theirs:  # the offset counts from the block's start there
        theirs[at : at + 4] = (_signed(theirs[at : at + 4]) - size).to_bytes(4, "little", signed=True)


_ADD, _LEA = b"\x48\x81\xc0", b"\x48\x8d\x80"
_START_OF_BLOCK = b"\x31\xc0\x64\x48\x8b\x00\x48\x2d"  # xor %eax, %eax; mov %fs:(%rax), %rax; sub $size, %rax


def _signed(field: bytes | bytearray) -> int:
    return int.from_bytes(field, "little", signed=True)


def _written(writes: Sequence[tuple[int, bytes]], address: int, size: int) -> bytes:
    for start, contents in writes:
        if start <= address and address + size <= start + len(contents):
            return contents[address - start : address - start + size]
    raise NotThere(f"nothing is written at {address:#x}")
