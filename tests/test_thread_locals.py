"""Matching code that uses thread-locals, as compilers write it and as each linker rewrites it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from living import UNIT, compile_text, live_unit, run, running, unequal, waiting_object

from patcher.blocks import Blocks
from patcher.elf import read_object
from patcher.match import Delta, FunctionMatch, Status, match
from patcher.target import Target

TEXT = r"""
#define HIDDEN __attribute__((visibility("hidden")))
extern __thread int imported, imported_too;
extern HIDDEN __thread int hidden, hidden_too;
__thread int before;
__thread int own = 1, own_too = 2, numbers[4] = {1, 2, 3, 4};
static __thread int one = 3, two = 4, empty, empty_too;
int reads_own(void) { return own; }
int *points_to_own(void) { return &own; }
int element(int n) { return numbers[n] + numbers[2]; }
int reads_hidden(void) { return hidden; }
int reads_imported(void) { return imported; }
int adds_imported(int n) { return n * imported - n; }
int *points_to_imported(void) { return &imported; }
int statics(int n)
{
    for (; n > 0; n--)
        one += two--;
    return one * two;
}
int zeroed(int n) { empty += n; return empty; }
int function_static(int n) { static __thread int sum = 5; return sum += n; }
int several(int n) { return own + one + imported * hidden + n; }
"""
CHANGES = {
    "own": ("return own;", "return own_too;", {"reads_own"}),
    "address of own": ("return &own;", "return &own_too;", {"points_to_own"}),
    "element": ("numbers[2]", "numbers[3]", {"element"}),
    "hidden": ("return hidden;", "return hidden_too;", {"reads_hidden"}),
    "imported": ("return imported;", "return imported_too;", {"reads_imported"}),
    "imported in a sum": ("n * imported - n", "n * imported_too - n", {"adds_imported"}),
    "address of imported": ("return &imported;", "return &imported_too;", {"points_to_imported"}),
    "static": ("one += two--", "one += empty--", {"statics"}),
    "one static of a pair": ("return one * two", "return one * empty", {"statics"}),
    "zeroed": ("empty += n; return empty;", "empty_too += n; return empty_too;", {"zeroed"}),
    "one of several": ("own + one", "own + two", {"several"}),
    "own for imported": ("own + one + imported", "own + one + own_too", {"several"}),
}
HIDDEN = "static __thread int one = 7;\nint other_one(void) { return one++; }\n"  # of the same name as the unit's
HIDDEN += '__attribute__((visibility("hidden"))) __thread int hidden_too = 8, hidden = 9;\n'
IMPORTED = "__thread int imported_too = 10, imported = 11;\n"
MAIN = "extern void wait_for_end(void);\nint reads_own(void);\nint main(void) { wait_for_end(); return reads_own(); }\n"

BUILDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "gcc": ("gcc", ("-O2", "-fPIC")),
    "gcc-no-plt": ("gcc", ("-Os", "-fPIC", "-fno-plt")),
    "gcc-descriptors": ("gcc", ("-O2", "-fPIC", "-mtls-dialect=gnu2")),
    "gcc-descriptors-O0": ("gcc", ("-O0", "-fPIC", "-mtls-dialect=gnu2")),
    "gcc-initial-exec": ("gcc", ("-O1", "-fPIC", "-ftls-model=initial-exec")),
    "clang": ("clang", ("-O2", "-fPIC")),
    "clang-no-plt": ("clang", ("-O0", "-fPIC", "-fno-plt")),
}
LINKS = (
    ("bfd", "program"),
    ("gold", "program"),
    ("lld", "program"),
    ("mold", "program"),
    ("lld", "fixed"),
    ("mold", "unrelaxed"),
    ("bfd", "library"),
    ("mold", "library"),
)


class Objects:
    """The objects of one build: the unit as linked, and as patcher compiles it before and after each change."""

    def __init__(self, folder: Path, compiler: str, flags: tuple[str, ...]) -> None:
        def compiled(text: str, name: str, *more: str) -> Path:
            return compile_text(text, folder / f"{name}.o", *flags, *more, compiler=compiler)

        self.linked = compiled(TEXT, "linked")
        self.hidden = compile_text(HIDDEN, folder / "hidden.o", *flags, compiler=compiler, name="hidden.c")
        self.same = compiled(TEXT, "same", *UNIT)
        self.changed: dict[str, Path] = {}
        for number, (change, (old, new, _)) in enumerate(CHANGES.items()):
            assert old in TEXT
            self.changed[change] = compiled(TEXT.replace(old, new), f"changed{number}", *UNIT)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the library whose thread-locals the unit uses."""
    folder = tmp_path_factory.mktemp("imported")
    unit = compile_text(IMPORTED, folder / "imported.o", "-fPIC", name="imported.c")
    run("gcc", "-shared", "-o", folder / "libimported.so", unit)
    return folder / "libimported.so"


@pytest.fixture(scope="module", params=BUILDS)
def objects(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Objects:
    return Objects(tmp_path_factory.mktemp("objects"), *BUILDS[request.param])


def link(folder: Path, unit: Path, hidden: Path, imported: Path, linker: str, kind: str) -> Path:
    main = compile_text(MAIN, folder / "main.o", "-fPIE", name="main.c")
    library = (imported, f"-Wl,-rpath,{imported.parent}")
    parts: tuple[str | Path, ...] = (unit, hidden)
    if kind == "library":
        run("gcc", f"-fuse-ld={linker}", "-shared", "-o", folder / "libunit.so", *parts, *library)
        parts = (folder / "libunit.so", f"-Wl,-rpath,{folder}")
    mode = ("-no-pie" if kind == "fixed" else "-pie", *(["-Wl,--no-relax"] if kind == "unrelaxed" else []))
    last = () if kind == "library" else library
    # What is loaded may be built by any linker; the executable around a library is not what this is about.
    around = "bfd" if kind == "library" else linker
    program = folder / "program"
    run("gcc", f"-fuse-ld={around}", *mode, "-o", program, main, waiting_object(folder), *parts, *last)
    return program


def deltas(target: Target, *units: Path) -> Iterator[Delta]:
    for unit in units:
        blocks = Blocks(read_object(unit))
        yield match(blocks, live_unit(target, blocks))


@pytest.mark.parametrize(("linker", "kind"), LINKS)
def test_what_uses_the_same_is_the_same_and_what_uses_another_is_not(
    tmp_path: Path, objects: Objects, imported: Path, linker: str, kind: str
) -> None:
    with running(link(tmp_path, objects.linked, objects.hidden, imported, linker, kind)) as target:
        same, *changed = deltas(target, objects.same, *objects.changed.values())
    assert unequal(same) == []
    assert len(same.functions) == 11
    for change, delta in zip(CHANGES, changed, strict=True):
        assert {f.name for f in delta.functions if f.status is Status.CHANGED} == CHANGES[change][2], change


@pytest.mark.parametrize("build", ["gcc", "clang", "gcc-descriptors"])
def test_code_of_a_static_program_is_matched(tmp_path: Path, build: str) -> None:
    compiler, flags = BUILDS[build]
    objects = Objects(tmp_path, compiler, flags)
    unit = compile_text(IMPORTED, tmp_path / "imported.o", "-fPIC", name="imported.c")
    main = compile_text(MAIN, tmp_path / "main.o", name="main.c")
    parts = (objects.linked, objects.hidden, unit, main, waiting_object(tmp_path))
    run("gcc", "-static", "-o", tmp_path / "program", *parts)
    with running(tmp_path / "program") as target:
        same, *changed = deltas(target, objects.same, *objects.changed.values())
    assert unequal(same) == []
    for change, delta in zip(CHANGES, changed, strict=True):
        assert {f.name for f in delta.functions if f.status is Status.CHANGED} == CHANGES[change][2], change


# --- every bit counts ---

CONTROLS = (("gcc", "bfd", "program"), ("gcc-descriptors", "mold", "program"), ("clang-no-plt", "mold", "program"),
            ("gcc", "gold", "library"), ("gcc-descriptors", "lld", "library"))  # fmt: skip


@pytest.mark.parametrize(("build", "linker", "kind"), CONTROLS)
def test_every_bit_of_code_that_uses_thread_locals_counts(
    tmp_path: Path, imported: Path, build: str, linker: str, kind: str
) -> None:
    compiler, flags = BUILDS[build]
    unit = compile_text(TEXT, tmp_path / "linked.o", *flags, compiler=compiler)
    hidden = compile_text(HIDDEN, tmp_path / "hidden.o", *flags, compiler=compiler, name="hidden.c")
    program = link(tmp_path, unit, hidden, imported, linker, kind)
    with running(program) as target:
        (delta,) = deltas(target, compile_text(TEXT, tmp_path / "same.o", *flags, *UNIT, compiler=compiler))
        assert unequal(delta) == []
        bodies = {f.name: f.live for f in delta.functions if f.live is not None}
        missed = []
        for bit in range(8 * max(live.size for live in bodies.values())):
            here = {name: live.address + bit // 8 for name, live in bodies.items() if bit // 8 < live.size}
            found = flipped(target, here.values(), 1 << bit % 8, delta)
            missed += [(name, bit // 8, bit % 8) for name in here if found[name].status is Status.SAME]
    assert missed == []


def flipped(target: Target, places: Iterable[int], mask: int, delta: Delta) -> dict[str, FunctionMatch]:
    """Match with a bit of some bytes of the process flipped, and put them back."""
    before = {address: target.memory.read(address, 1) for address in places}
    try:
        for address, byte in before.items():
            target.memory.write(address, bytes([byte[0] ^ mask]))
        return {f.name: f for f in match(delta.blocks, delta.unit).functions}
    finally:
        for address, byte in before.items():
            target.memory.write(address, byte)
