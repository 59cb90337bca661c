"""Storage for thread-local variables that a change brings into a process whose threads run already.

Each generation that brings some gets a module of its own, which the process's own dynamic linker loads: it gives every
thread that there is, and every later one, its copy of the initial values. A module stays for the life of the process.
Small variables lie at a fixed distance from the thread pointer, where code of every model reaches them; of the room
that the C library keeps for that we take a share. The others lie where the dynamic linker puts them for each thread
when it first asks, and only code that asks reaches these.

The variables are placed, and linked, before there is a module, so that nothing is loaded for a change that is refused;
with its numbers the generation is linked again. Decides where a variable goes within its block and with what it
starts; loading is `loader`'s business.

Specification: Drepper, ELF Handling For Thread-Local Storage, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from patcher.blocks import Block, Blocks, Kind, Place
from patcher.elf import ObjectFile
from patcher.elf.relocations import R
from patcher.elf.thread_module import HEAD_SIZE, ThreadBlock, loaded_block
from patcher.errors import LinkError
from patcher.image import Image, LoadedModule
from patcher.link.plan import Bound
from patcher.link.relocations import RULES
from patcher.live import THREAD_LOCAL, base_name, thread_number, thread_place
from patcher.patch.journal import Placed

STATIC_SHARE = 512
"""The bytes at fixed distances that we take of a process, in all generations together; glibc has some 1,600 spare."""
_STATIC_ALIGNMENT = 64  # glibc aligns no thread's static block more
_NOT_LOADED = -(1 << 30)  # distance and number of a block that is still to be loaded: no real one
_NO_MODULE = 1 << 20

_FIXED = frozenset((R.TPOFF32, R.TPOFF64, R.GOTTPOFF))
_FROM_BASE = frozenset((R.TLSLD, R.DTPOFF32, R.DTPOFF64))


@dataclass(frozen=True, slots=True)
class ThreadPlace:
    """Where each thread has a variable: an offset in the block of the module of a number, or, for 0, from the thread
    pointer. `key` stands for the variable in the journal; `image` is where, in memory, the bytes are that threads to
    come start with, and `image_size` how many of them there are: zeros follow."""

    key: int
    offset: int
    module_id: int
    image: int
    image_size: int


class StaticModel(LinkError):
    """Code that reaches a thread-local in a way that does not lead there; `object` is to be compiled to ask for it."""

    code = "new-thread-local"

    def __init__(self, message: str, hint: str = "", *, object: ObjectFile) -> None:
        super().__init__(message, hint)
        self.object = object


class NewBlock:
    """The block of one module that is to be loaded: its variables, their offsets and initial values."""

    def __init__(self, *, static: bool) -> None:
        self.static = static
        self.size = 0
        self._alignment = 1
        self._offsets: dict[Block, int] = {}
        self._contents: dict[Block, bytes] = {}
        self._loaded: ThreadBlock | None = None
        self._where = _NOT_LOADED if static else _NO_MODULE

    @property
    def to_load(self) -> bool:
        return self._loaded is None and bool(self._offsets)

    @property
    def names(self) -> str:
        """Its variables, for messages."""
        return ", ".join(f"`{base_name(block.name)}`" for block in self._offsets)

    def holds(self, block: Block) -> bool:
        return block in self._offsets

    def place(self, block: Block) -> Bound:
        """Return where a variable is, or will be."""
        if block not in self._offsets:
            self._add(block)
        offset = self._offsets[block]
        if self.static:
            return Bound(self._where + offset, thread_local=True)
        return Bound(offset, thread_local=True, module_id=self._where)

    def _add(self, block: Block) -> None:
        if self._loaded is not None:
            raise LinkError(
                f"`{block.name}` turned out to be needed when the storage of {self.names} was loaded", "save it again"
            )
        self._alignment = max(self._alignment, block.alignment)
        self._offsets[block] = -(-self.size // block.alignment) * block.alignment
        self.size = self._offsets[block] + max(block.size, 1)

    def fill(self, block: Block, data: bytes) -> None:
        """Say with what a variable starts; zeros follow."""
        self._contents[block] = data

    def as_linked(self) -> ThreadBlock:
        """Return the block as the last link says it is."""
        image = bytearray(self.size)
        for block, data in self._contents.items():
            start = self._offsets[block]
            image[start : start + len(data)] = data
        return ThreadBlock(self.size, self._alignment, bytes(image).rstrip(b"\0"), self.static)

    def loaded(self, block: ThreadBlock, where: int) -> None:
        """Note that the block is in the process, and its distance from the thread pointer or its module's number."""
        self._loaded, self._where = block, where

    def check(self) -> None:
        """Raise `LinkError` when what was loaded is not what the last link wants."""
        if self._loaded not in (None, self.as_linked()):
            raise LinkError(f"the initial values of {self.names} changed while they were loaded", "save it again")


class NewThreadLocals:
    """The thread-local variables that one generation brings."""

    def __init__(self, placed: Iterable[Placed]) -> None:
        """`placed`: what earlier generations brought."""
        places = ((p, thread_place(p.address)) for p in placed if p.kind == THREAD_LOCAL)
        self._taken = sum(p.size for p, place in places if place is not None and not place[1])
        self._share = STATIC_SHARE
        self.restart()

    def restart(self) -> None:
        """Forget what was placed: the generation is linked from other objects, and nothing is loaded yet."""
        self._static, self._dynamic = NewBlock(static=True), NewBlock(static=False)

    def without_static(self) -> None:
        """Place nothing at fixed distances from now on: the process has no room for that."""
        self._share = 0
        self.restart()

    @property
    def blocks(self) -> tuple[NewBlock, NewBlock]:
        return self._static, self._dynamic

    def to_load(self) -> Iterator[NewBlock]:
        """Yield what the process lacks; none when the last link went out from what it has."""
        return (block for block in self.blocks if block.to_load)

    def place(self, block: Block) -> Bound:
        """Return where a new variable is, or will be."""
        return self._home(block).place(block)

    def fill(self, block: Block, data: bytes) -> None:
        """Say with what a variable starts; zeros follow."""
        self._home(block).fill(block, data)

    def check(self) -> None:
        """Raise `LinkError` when the process has other blocks than the last link wants."""
        for block in self.blocks:
            block.check()

    def _home(self, block: Block) -> NewBlock:
        for home in self.blocks:
            if home.holds(block):
                return home
        end = self._taken + self._static.size + block.alignment + block.size
        return self._static if end <= self._share and block.alignment <= _STATIC_ALIGNMENT else self._dynamic


class Models:
    """In which ways the code of one object refers to thread-locals."""

    def __init__(self, blocks: Blocks) -> None:
        self._source = blocks.object
        self._types: dict[Block | str, set[int]] = {}
        for function in blocks.functions:
            for r in blocks.references(function):
                rule = RULES.get(r.type)
                if rule is not None and rule.need.thread_local:
                    target = r.target.block if isinstance(r.target, Place) else getattr(r.target, "name", "")
                    self._types.setdefault(target, set()).add(r.type)

    def check(self, target: Block | str, bound: Bound, *, fixed_base: bool) -> None:
        """Raise `StaticModel` when code refers to a new thread-local in a way that does not lead to its place.

        `fixed_base`: the block of the unit's own module is at a fixed distance from the thread pointer, or it has none.
        Code that counts from the start of that block reaches nothing but what is there, or likewise fixed.
        """
        types = self._types.get(target, set())
        wrong = types & _FIXED if bound.module_id else set()
        if bound.module_id or not fixed_base:
            wrong |= types & _FROM_BASE
        if wrong:
            name = base_name(target if isinstance(target, str) else target.name)
            raise StaticModel(
                f"{self._source.name}: the thread-local `{name}` is new, and the code reaches it at a fixed distance "
                "from the thread pointer or from its module's other thread-locals, where threads that run have no room",
                "compile the unit with -fPIC -ftls-model=global-dynamic and, if it is static, make it global; or make "
                "it smaller",
                object=self._source,
            )


def initialised_with(blocks: Blocks, guard: Block) -> set[Block]:
    """Return the thread-locals of a unit that are, or may be, initialised when its guard says that they are not.

    There is a function for that, which may have been inlined everywhere and left out; then the zeros with which a
    variable starts, beside a use of the guard, have to tell. A static of a function has a guard of its own.
    """
    named = [f for f in blocks.functions if any(s.name == _INITIALISER for s in f.symbols)]
    functions = named or [f for f in blocks.functions if guard in _referred(blocks, f)]
    found = {b for f in functions for b in _referred(blocks, f)}
    found |= {b for f in found if f.name.startswith(_PART_OF_INITIALISER) for b in _referred(blocks, f)}
    found = {b for b in found if b.kind is Kind.THREAD_LOCAL}
    return {b for b in found if named or (b.zero and not b.name.startswith(_OF_FUNCTION))}


def _referred(blocks: Blocks, function: Block) -> set[Block]:
    return {r.target.block for r in blocks.references(function) if isinstance(r.target, Place)}


_INITIALISER, _PART_OF_INITIALISER = "__tls_init", "__cxx_global_var_init"
_OF_FUNCTION = ("_ZZ", "_ZGVZ")


def place_of(image: Image, module: LoadedModule, bound: Bound, added: Collection[int]) -> ThreadPlace | None:
    """Return where threads have a variable of a module's unit, or one that a patch brought (`added`: their numbers).

    None where it cannot be told what threads to come start with.
    """
    number = thread_number(bound.address, bound.module_id)
    if number in added:
        return _added_place(image, bound, number)
    storage, base = module.module.thread_storage, image.thread_block(module)
    module_id = image.thread_module(module)
    if storage is None or module_id is None or (base is None and not bound.module_id):
        return None
    offset = bound.address if bound.module_id else bound.address - (base or 0)
    left = max(0, storage.file_size - offset)
    start = storage.address + module.bias + offset
    return ThreadPlace(thread_number(offset, module_id), bound.address, bound.module_id, start, left)


def _added_place(image: Image, bound: Bound, number: int) -> ThreadPlace | None:
    for mapping in image.target.mappings():
        if "patcher-threads" not in mapping.path or mapping.offset:
            continue
        block = loaded_block(image.target.memory.read_available(mapping.start, HEAD_SIZE))
        if block is None:
            continue
        offset = bound.address if bound.module_id else bound.address - block.distance
        same = block.number == bound.module_id if bound.module_id else block.distance < 0
        if same and 0 <= offset < block.size:
            left = max(0, block.image_size - offset)
            return ThreadPlace(number, bound.address, bound.module_id, mapping.start + block.image + offset, left)
    return None
