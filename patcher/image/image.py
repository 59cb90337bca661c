"""The image of one process: its modules, found in its memory map, and the names and addresses of all of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from patcher.elf import SymbolBinding, SymbolType
from patcher.elf.dynamic import THREAD_CELLS, TLSDESC
from patcher.elf.module import (
    Cell,
    DynamicSymbol,
    Module,
    read_module,
)
from patcher.elf.relocations import R
from patcher.elf.symbols import StaticSymbol
from patcher.errors import ObjectError, PatcherError, TargetGone, UnsafeChange
from patcher.image.loaded import LoadedModule, debug_files, load_biases
from patcher.linkmap import BLOCK_OFFSET, MODULE_NUMBER, RENDEZVOUS, Layout, ThreadBlock, rendezvous, thread_blocks
from patcher.scopes import Scopes, read_scopes
from patcher.target import Mapping, Target

# Every module has its own of these, and some export theirs.
_LINKER_DEFINED = re.compile(
    r"_(end|edata|etext)$|__bss_start$|__(executable|ehdr)_start$|_DYNAMIC$|_GLOBAL_OFFSET_TABLE_$|__dso_handle$"
    r"|_(init|fini)$|__((pre)?init|fini)_array_(start|end)$|__rela_iplt_(start|end)$|__(start|stop)_\w+$"
)


@dataclass(frozen=True, slots=True)
class Definition:
    """What a name denotes in the process. For a thread-local, `address` is its offset in the module's block."""

    name: str
    address: int
    size: int
    type: int
    module: LoadedModule
    unique: bool = False  # one for all modules of a namespace, whatever their scopes
    weak: bool = False

    @property
    def thread_local(self) -> bool:
        return self.type == SymbolType.TLS

    @property
    def ifunc(self) -> bool:
        return self.type == SymbolType.IFUNC

    @property
    def function(self) -> bool:
        return self.type in (SymbolType.FUNC, SymbolType.IFUNC)


class Image:
    """The loaded modules of one target. `refresh` after the process may have loaded or unloaded some."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._known: dict[tuple[str, int, str, int], Module] = {}
        self._mappings: tuple[Mapping, ...] = ()
        self._written: tuple[int, ...] = ()  # when their files were
        self.modules: tuple[LoadedModule, ...] = ()
        self._scopes: dict[LoadedModule, tuple[LoadedModule, ...]] = {}
        self._lists: Scopes | None = None
        self._scope_offset = 0
        self._by_dynamic: dict[int, LoadedModule] = {}
        self._imports: dict[int, Cell | None] = {}
        self._ifuncs: dict[int, int] = {}
        self.asked: dict[tuple[str, int], int] = {}  # what resolvers chose when asked: module, resolver
        self._blocks: dict[int, ThreadBlock] | None = None
        self._vdso: tuple[int, int] | None = None
        self.refresh()

    def refresh(self) -> None:
        """Read the memory map again; modules that are still there are kept."""
        self._blocks = None  # a block that was nowhere yet may have got its place
        mappings = tuple(m for m in self.target.mappings() if m.inode and m.path.startswith("/") and not _ours(m))
        # A library that is built again may get the number of the file that it replaces.
        written = tuple(self.target.time_written(m) for m in mappings if m.executable)
        if (mappings, written) != (self._mappings, self._written):
            self._read_modules(mappings)
            self._written = written
        self._read_scopes()

    def _read_scopes(self) -> None:
        self._scopes.clear()
        self._by_dynamic = {_dynamic(m): m for m in self.modules if m.module.dynamic_section}
        start = _dynamic(self.executable)
        linker = Path(self.executable.module.interpreter).name
        required = {_dynamic(m) for m in self.modules[1:] if linker not in (m.name, m.module.soname)}
        self._lists = None
        if start in self._by_dynamic:
            self._lists = read_scopes(self.target.memory, start, required, self._scope_offset)
            self._scope_offset = self._lists.offset if self._lists is not None else 0

    def _read_modules(self, mappings: tuple[Mapping, ...]) -> None:
        self._mappings = mappings
        groups: dict[tuple[str, int, str], list[Mapping]] = {}
        for mapping in mappings:
            groups.setdefault((mapping.device, mapping.inode, mapping.path), []).append(mapping)
        loaded = []
        for group in groups.values():
            if any(m.executable for m in group):
                loaded += self._load(group)
        entry = self.target.auxv().get(9, 0)  # AT_ENTRY
        loaded.sort(key=lambda m: not m.contains(entry))
        if not loaded or not loaded[0].contains(entry):
            raise ObjectError(
                f"process {self.target.pid}: its executable {self.target.program} cannot be read",
                "keep the program's file in place, or reinstall the very same build",
            )
        self.modules = tuple(loaded)
        self._imports.clear()
        self._ifuncs.clear()

    def _load(self, group: list[Mapping]) -> list[LoadedModule]:
        path = group[0].path
        key = (group[0].device, group[0].inode, path, self.target.time_written(group[0]))
        try:
            file = self.target.open_image(group[0])
            module = self._known.get(key)
            if module is None:
                module = read_module(path, file, lambda build_id, link: debug_files(path, build_id, link))
                self._known[key] = module
        except PatcherError:
            return []  # something executable that is no module, such as a JIT's file
        return [LoadedModule(module, bias, path, file) for bias in load_biases(module, group)]

    @property
    def executable(self) -> LoadedModule:
        return self.modules[0]

    def module_at(self, address: int) -> LoadedModule | None:
        return next((m for m in self.modules if m.contains(address)), None)

    # --- names ------------------------------------------------------------------------------------------------

    def scope(self, within: LoadedModule | None = None) -> tuple[LoadedModule, ...]:
        """Return the modules in which names of a module (default: the executable) are looked up, in that order."""
        within = within or self.executable
        found = self._scopes.get(within)
        if found is None:
            found = self._scopes[within] = self._known_scope(within) or self._presumed_scope(within)
        return found

    def _known_scope(self, within: LoadedModule) -> tuple[LoadedModule, ...]:
        if self._lists is None:
            return ()
        order = self._lists.order.get(_dynamic(within), ())
        return tuple(m for section in order if (m := self._by_dynamic.get(section)) is not None)

    def _presumed_scope(self, within: LoadedModule) -> tuple[LoadedModule, ...]:
        """Return the order as the specification has it, for what was loaded at the start."""
        preloaded = self.target.environ().get("LD_PRELOAD", "").replace(":", " ").split()
        wanted = {Path(p).name for p in preloaded}
        first = [self.executable]
        first += [m for m in self.modules[1:] if wanted & {m.name, m.module.soname}]
        scope = self._breadth_first(first)
        if within in scope:
            return scope
        return tuple(dict.fromkeys(scope + self._breadth_first([within])))

    def _breadth_first(self, first: Iterable[LoadedModule]) -> tuple[LoadedModule, ...]:
        order = list(first)
        position = 0
        while position < len(order):
            for name in order[position].module.needed:
                found = self._module_named(name)
                if found is not None and found not in order:
                    order.append(found)
            position += 1
        return tuple(order)

    def _module_named(self, name: str) -> LoadedModule | None:
        if "/" in name:  # a library without a soname is needed by the path it was linked by
            name = Path(name).name
        return next((m for m in self.modules if name in (m.module.soname, m.name)), None)

    def resolve(self, name: str, within: LoadedModule, *, weak: bool = False) -> Definition | None:
        """Return what an undefined `name` in a unit of module `within` denotes, or None.

        Raises `UnsafeChange` when only libraries outside the search scope define it, and several do (a weak
        reference is none to them), and when nothing tells which of two definitions the module's code goes to.
        """
        found = self.search(name, within, weak=weak)
        if found is None or found.module is within or found.unique or self._is_open(found, within):
            return found
        raise UnsafeChange(
            f"`{found.name}` is defined by {within.name} and before it by {found.module.name}: nothing tells which of "
            f"them the code of {within.name} means (it may have been linked with -Bsymbolic or -Bsymbolic-functions)",
            "rename one of them",
            code="ambiguous-symbol",
        )

    def search(self, name: str, within: LoadedModule, *, weak: bool = False) -> Definition | None:
        """Return the first definition of a name in the scope of `within`; raises `UnsafeChange` as `resolve` does.

        A library that was linked to use its own need not refer to it: ask `binds`.
        """
        own = self._own(name, within)
        if own is None and within.module.symbolic:
            own = _exported(within, name)
        if own is not None:
            return own
        if _LINKER_DEFINED.match(name) and not _defined(within.module, name):
            return self._linker_defined(name, within)
        if weak and self._was_nowhere(name, within):
            return None
        found = self._first_exported(name, within)
        if found is None:
            return None if weak else self._outside(name, within)
        return self._unique(found, within) if found.unique else found

    def _linker_defined(self, name: str, within: LoadedModule) -> Definition | None:
        """Return what a name of the linker's would be, had the module's own code asked for it when it was linked."""
        if name == "_DYNAMIC" and within.module.dynamic_section:
            return Definition(name, _dynamic(within), 0, SymbolType.NOTYPE, within)
        first = within.module.segments[0]
        if name == "__ehdr_start" and not first.offset:
            return Definition(name, first.address + within.bias, 0, SymbolType.NOTYPE, within)
        return None

    def exported(self, module: LoadedModule, name: str) -> Definition | None:
        """Return what a module itself exports under a name, or under `name@version`."""
        return _exported(module, name)

    def _first_exported(self, name: str, within: LoadedModule) -> Definition | None:
        found = (d for m in self.scope(within) if (d := _exported(m, name)) is not None)
        first = next(found, None)
        if first is None or not first.weak or "LD_DYNAMIC_WEAK" not in self.target.environ():
            return first
        return next((d for d in found if not d.weak), first)  # ld.so(8): strong definitions override weak ones

    def _is_open(self, found: Definition, within: LoadedModule) -> bool:
        """Tell whether a module's own references go to another's definition, if it has one itself as well."""
        module = within.module
        if within is self.executable or not _defined(module, found.name) or module.cells_named(found.name):
            return True
        # A linker that binds names of a library within it (-Bsymbolic-functions) leaves no cell for any of them.
        return any(
            s.function == found.function and module.cells_named(name)
            for name in module.exports
            for s in _defined(module, name)
        )

    def _unique(self, found: Definition, within: LoadedModule) -> Definition:
        """Return the one definition of a name that all of a namespace shares (STB_GNU_UNIQUE).

        It is that of the module that was asked first; whose that was is in every cell for it.
        """
        others = [d for m in self._neighbours(within) if (d := _exported(m, found.name)) is not None and d.unique]
        if len(others) == 1:
            return found
        values = set()
        for module in self._neighbours(within):
            for cell in module.module.cells_named(found.name):
                value = self.target.memory.read_u64(cell + module.bias) - module.module.cells[cell].addend
                values.add(value)
        chosen = [d for d in others if d.address in values]
        if len(chosen) != 1:
            raise UnsafeChange(
                f"`{found.name}` is defined by {', '.join(d.module.name for d in others)}, and nothing tells which of "
                "them the process uses",
                "use it in a function that the program was started with, or restart the program",
                code="ambiguous-symbol",
            )
        return chosen[0]

    def _was_nowhere(self, name: str, within: LoadedModule) -> bool:
        """Tell whether a module's own weak references to a name found nothing when it was loaded."""
        cells = within.module.cells
        return any(
            cells[c].type == R.GLOB_DAT and not self.target.memory.read_u64(c + within.bias)
            for c in within.module.cells_named(name)
        )

    def _outside(self, name: str, within: LoadedModule) -> Definition | None:
        """Return the only definition of a name in libraries that no scope of `within` reaches."""
        others = [d for m in self._neighbours(within) if (d := _exported(m, name)) is not None]
        if len({d.address for d in others}) > 1:
            raise UnsafeChange(
                f"`{name}` is defined by {', '.join(d.module.name for d in others)}, none of which the program "
                "was linked with",
                "link the program with the library that is meant",
                code="ambiguous-symbol",
            )
        return others[0] if others else None

    def _neighbours(self, within: LoadedModule) -> list[LoadedModule]:
        """Return the modules of the same namespace (dlmopen)."""
        spaces = self._lists.namespace if self._lists is not None else {}
        own = spaces.get(_dynamic(within), 0)
        return [m for m in self.modules if spaces.get(_dynamic(m), 0) == own]

    def _own(self, name: str, within: LoadedModule) -> Definition | None:
        module = within.module
        # A symbol table of the dynamic linker may have statics too, for descriptors of thread-locals.
        dynamic = [s for s in module.exports.get(name, ()) if not s.defined or s.binding]
        if within is not self.executable and any(s.defined for s in dynamic):
            exported = _defined(module, name)
            if len(exported) == 1 and exported[0].protected:
                return _exported(within, name)
            return None  # exported by a library: the search order decides, it may be interposed
        found = [s for s in module.symbols.named(name) if not s.local]
        if not found and not dynamic:
            found = [s for s in module.symbols.named(name) if module.demoted(s)]
        values = {s.value for s in found}
        return self._definition(within, found[0]) if len(values) == 1 else None

    def _definition(self, within: LoadedModule, symbol: StaticSymbol) -> Definition:
        bias = 0 if symbol.type == SymbolType.TLS or symbol.absolute else within.bias
        return Definition(symbol.name, symbol.value + bias, symbol.size, symbol.type, within)

    def binds(self, module: LoadedModule, definition: Definition) -> bool:
        """Tell whether a module's own references to a name go to a definition elsewhere.

        Its cells say so; without any (a hidden name, -Bsymbolic) it refers to its own.
        """
        cells = module.module.cells
        for cell in module.module.cells_named(definition.name):
            if cells[cell].type == R.GLOB_DAT:
                return self.target.memory.read_u64(cell + module.bias) == definition.address
            if cells[cell].type == R.JUMP_SLOT or (cells[cell].name and cells[cell].type in THREAD_CELLS):
                return True
        return False

    def canonical_plt(self, name: str) -> int | None:
        """Return the address that stands for an imported function in a fixed-position executable, if there is one.

        Where such an executable takes the address of a library's function, its own PLT entry is that
        address for the whole process (AMD64 supplement, section 5.2, "Function addresses").
        """
        module = self.executable.module
        for symbol in module.exports.get(name, ()):
            if not symbol.defined and symbol.value and symbol.type == SymbolType.FUNC:
                return symbol.value + self.executable.bias
        return None

    # --- cells and stubs --------------------------------------------------------------------------------------

    def cell_at(self, address: int) -> Cell | None:
        """Return what the dynamic linker keeps at a live address, if anything."""
        module = self.module_at(address)
        return module.module.cells.get(address - module.bias) if module is not None else None

    def import_at(self, address: int) -> Cell | None:
        """Return the cell that a PLT stub at this live address jumps through, or None when it is no stub."""
        if address not in self._imports:
            self._imports[address] = self._read_stub(address)
        return self._imports[address]

    def _read_stub(self, address: int) -> Cell | None:
        from patcher.code.instructions import plt_cell

        module = self.module_at(address)
        if module is None or not module.executable_at(address):
            return None
        cell = plt_cell(self.target.memory.read(address, 32), address)
        return None if cell is None else self.cell_at(cell)

    def jump_slots(self, name: str, address: int) -> list[tuple[int, int]]:
        """Return (cell, value) of every bound jump slot for `name` that holds `address`.

        Lazily unbound slots still point into their own module's PLT, and are not among them.
        """
        found = []
        for module in self.modules:
            for cell in module.module.cells_named(name):
                if module.module.cells[cell].type != R.JUMP_SLOT:
                    continue
                value = self.target.memory.read_u64(cell + module.bias)
                if value == address:
                    found.append((cell + module.bias, value))
        return found

    def chosen(self, definition: Definition) -> int | None:
        """Return the implementation that the process already chose for an IFUNC, or None when it never did."""
        if definition.address in self._ifuncs:
            return self._ifuncs[definition.address]
        owner = definition.module
        asked = self.asked.get((owner.path, definition.address), 0)
        if owner.executable_at(asked) or self._in_kernel_code(asked):
            return asked
        for module in self.modules:
            cells = module.module.cells
            wanted = [c for c in module.module.cells_named(definition.name) if cells[c].type in _BOUND]
            if module is owner:
                resolver = definition.address - owner.bias
                wanted += [c for c in module.module.resolver_cells if cells[c].addend == resolver]
            for cell in wanted:
                value = self.target.memory.read_u64(cell + module.bias)
                implemented = owner.executable_at(value) or self._in_kernel_code(value)
                if implemented and value != definition.address and self.import_at(value) is None:
                    self._ifuncs[definition.address] = value
                    return value
        return None

    def choose(self, definition: Definition) -> int:
        """Return the implementation of an IFUNC, asking the target's own resolver where it never did."""
        found = self.chosen(definition)
        if found is None:
            from patcher.target import FunctionCall

            found = self.target.inject([FunctionCall(definition.address, (0, 0))], code=self._stub_area())[-1]
            module = self.module_at(found)
            if not self._in_kernel_code(found) and (module is None or not module.executable_at(found)):
                raise UnsafeChange(f"the resolver of `{definition.name}` gave {found:#x}, which is not code", "")
            self._ifuncs[definition.address] = found
            self.asked[definition.module.path, definition.address] = found
        return found

    def chosen_stub(self, definition: Definition) -> int | None:
        """Return the stub that stands for an IFUNC wherever its module's code takes its address, if there is one.

        It jumps through a cell that nobody names, and is no symbol in what GNU ld, gold and mold link.
        """
        from patcher.code.instructions import plt_cell

        owner, found = definition.module, []
        resolver = definition.address - owner.bias
        cells = {c for c in owner.module.resolver_cells if owner.module.cells[c].addend == resolver}
        for low, high in owner.module.stub_tables if cells else ():
            code = self.target.memory.read(low + owner.bias, high - low)
            found += [low + at for at in range(0, len(code), 8) if plt_cell(code[at : at + 32], low + at) in cells]
        if len(found) > 1:
            raise UnsafeChange(
                f"{owner.name} has {len(found)} stubs for `{definition.name}`", "", code="ambiguous-symbol"
            )
        return found[0] + owner.bias if found else None

    def _in_kernel_code(self, address: int) -> bool:
        """Tell whether an address is in the vDSO, from which libc takes what asks for the time."""
        if self._vdso is None:
            found = (m for m in self.target.mappings() if m.path == "[vdso]")
            self._vdso = next(((m.start, m.end) for m in found), (0, 0))
        return self._vdso[0] <= address < self._vdso[1]

    def _stub_area(self) -> int:
        if self.stub_area is None:
            raise UnsafeChange("an IFUNC has to be resolved before there is an arena", "")
        return self.stub_area

    stub_area: int | None = None  # executable memory of ours in the target, set once an arena exists

    # --- thread-local storage ---------------------------------------------------------------------------------

    def thread_offset(self, definition: Definition) -> int | None:
        """Return a thread-local variable's offset from the thread pointer, or None when it has no fixed one."""
        base = self.thread_block(definition.module)
        return None if base is None else base + definition.address

    def thread_block(self, loaded: LoadedModule) -> int | None:
        """Return the offset of a module's thread-local block from the thread pointer (negative), if it is static."""
        storage = loaded.module.thread_storage
        if storage is None:
            return None
        if loaded is self.executable:
            first = -storage.address & (storage.alignment - 1)
            size = storage.memory_size - first
            return -(((size + storage.alignment - 1) & -storage.alignment) + first)
        known = self._mapped_block(loaded)
        return known.offset if known is not None else self._block_by_cells(loaded)

    def thread_module(self, loaded: LoadedModule) -> int | None:
        """Return the number by which the dynamic linker knows a module's thread-local storage, if it can be told."""
        if loaded.module.thread_storage is None:
            return None
        known = self._mapped_block(loaded)
        if known is not None:
            return known.module_id
        if loaded is self.executable:
            return 1
        return self._number_by_cells(loaded)

    def _mapped_block(self, loaded: LoadedModule) -> ThreadBlock | None:
        if self._blocks is None:
            self._blocks = self._read_blocks()
        return self._blocks.get(loaded.module.dynamic_section + loaded.bias)

    def _read_blocks(self) -> dict[int, ThreadBlock]:
        memory, executable = self.target.memory, self.executable
        descriptions = [self.exported_anywhere(name) for name in (MODULE_NUMBER, BLOCK_OFFSET)]
        if not executable.module.dynamic_section or not all(descriptions):
            return {}
        try:
            layout = Layout.read(memory, *descriptions)
            debug = rendezvous(memory, executable.module.dynamic_section + executable.bias)
            debug = debug or self.exported_anywhere(RENDEZVOUS)  # a dynamic section may be read-only
        except TargetGone:
            raise
        except PatcherError:
            return {}
        return thread_blocks(memory, debug, layout) if layout is not None else {}

    def exported_anywhere(self, name: str) -> int:
        """Return the address of what any module exports under a name, 0 for nothing."""
        found = (definition for m in self.modules if (definition := _exported(m, name)) is not None)
        return next((definition.address for definition in found), 0)

    def _block_by_cells(self, loaded: LoadedModule) -> int | None:
        """Find a static block by a cell that holds the offset of one of its variables from the thread pointer."""
        for module in self.modules:
            cells = module.module.cells
            for address in (*cells.of_type(R.TPOFF64), *cells.of_type(TLSDESC)):
                offset = self._offset_in(loaded, module, cells[address])
                if offset is None:
                    continue
                # A descriptor's second word; a block that is not static has a pointer there, never negative.
                at = address + (8 if cells[address].type == TLSDESC else 0)
                value = self.target.memory.read_u64(at + module.bias)
                if value >> 63:
                    return value - (1 << 64) - offset
        return None

    def _number_by_cells(self, loaded: LoadedModule) -> int | None:
        for module in self.modules:
            cells = module.module.cells
            for address in cells.of_type(R.DTPMOD64):
                if self._offset_in(loaded, module, cells[address]) is not None:
                    number = self.target.memory.read_u64(address + module.bias)
                    if number:
                        return number
        return None

    def _offset_in(self, loaded: LoadedModule, module: LoadedModule, cell: Cell) -> int | None:
        if not cell.name:
            return cell.addend if module is loaded else None
        found = self.resolve(cell.name, module)
        if found is None or found.module is not loaded:
            return None
        return found.address + cell.addend


def _dynamic(loaded: LoadedModule) -> int:
    """Return the address by which the dynamic linker knows a module."""
    return loaded.module.dynamic_section + loaded.bias


def _defined(module: Module, name: str) -> tuple[DynamicSymbol, ...]:
    return tuple(s for s in module.exports.get(name, ()) if s.defined)


def _ours(mapping: Mapping) -> bool:
    return mapping.path.startswith("/memfd:patcher")


_BOUND = (R.JUMP_SLOT, R.GLOB_DAT)


def _exported(loaded: LoadedModule, name: str) -> Definition | None:
    """Return what a module exports under a name (its default version), or under `name@version`."""
    plain, _, version = name.partition("@")
    symbols = [s for s in _defined(loaded.module, plain) if s.binding != SymbolBinding.LOCAL]
    if version:
        symbols = [s for s in symbols if s.version == version.lstrip("@")]
    best: DynamicSymbol | None = next((s for s in symbols if s.default), symbols[0] if len(symbols) == 1 else None)
    if best is None:
        return None
    bias = 0 if best.type == SymbolType.TLS or best.absolute else loaded.bias
    unique, weak = best.binding == SymbolBinding.UNIQUE, best.binding == SymbolBinding.WEAK
    return Definition(plain, best.value + bias, best.size, best.type, loaded, unique, weak)
