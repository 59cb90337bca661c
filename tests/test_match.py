"""Live matching against real processes: what is the same is found the same, and whatever differs is seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from living import UNIT, build, compile_text, matched, run, running, unequal, verdicts, waiting_object

from patcher.blocks import Block, Blocks, Kind, Place
from patcher.elf import read_object
from patcher.errors import UnsafeChange
from patcher.lines import LineNumbers, line_fields, moved_lines
from patcher.link.relocations import R
from patcher.live import LiveUnit
from patcher.match import Cause, Delta, FunctionMatch, Status, match
from patcher.target import Target

# --- every bit counts ---
#
# No exceptions. What could pass, and be right, is a reference that the flip sends to equal bytes elsewhere among the
# constants; sources/kinds.c has no constant twice.

CONTROLS = {
    "gcc": ("gcc", ("-O2",), ()),
    "clang-no-plt": ("clang", ("-O2", "-fno-plt"), ()),
    "gcc-fixed-static": ("gcc", ("-O1", "-fno-pie"), ("-no-pie", "-static")),
}


@pytest.fixture(scope="module", params=CONTROLS)
def control(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Target, Delta]]:
    compiler, flags, link = CONTROLS[request.param]
    program, unit = build(tmp_path_factory.mktemp("control"), *flags, compiler=compiler, link=link)
    with running(program) as target:
        delta = matched(target, unit)
        assert unequal(delta) == []
        yield target, delta


def seen(verdict: FunctionMatch) -> bool:
    """Whether a function's own bytes gave it away, and not another function's."""
    own = verdict.cause is not Cause.DEPENDENT or verdict.reason.startswith(f"refers to {verdict.name}+")
    return verdict.status is Status.CHANGED and own


def flipped(target: Target, places: dict[int, int], unit: LiveUnit, blocks: Blocks) -> dict[str, FunctionMatch]:
    """Match with some bits of the process flipped (address -> mask), and put them back."""
    before = {address: target.memory.read(address, 1) for address in places}
    try:
        for address, mask in places.items():
            target.memory.write(address, bytes([before[address][0] ^ mask]))
        return {f.name: f for f in match(blocks, unit).functions}
    finally:
        for address, byte in before.items():
            target.memory.write(address, byte)


def test_every_bit_of_every_function_counts(control: tuple[Target, Delta]) -> None:
    target, delta = control
    bodies = {f.name: f.live for f in delta.functions if f.live is not None}
    assert len(bodies) >= 25
    missed = []
    for bit in range(8 * max(live.size for live in bodies.values())):
        here = {name: live.address + bit // 8 for name, live in bodies.items() if bit // 8 < live.size}
        found = flipped(target, dict.fromkeys(here.values(), 1 << bit % 8), delta.unit, delta.blocks)
        missed += [(name, bit // 8, bit % 8) for name in here if not seen(found[name])]
    assert missed == []


def constants(delta: Delta, target: Target) -> Iterator[tuple[str, Block, int, int]]:
    """Yield (function, block, offset, live address of the block) of the constants that code refers to directly."""
    for verdict in delta.functions:
        assert verdict.live is not None
        for r in delta.blocks.references(verdict.block):
            if not isinstance(r.target, Place) or r.target.block.kind is not Kind.READ_ONLY:
                continue
            field = verdict.live.code[r.offset : r.offset + 4]
            value = int.from_bytes(field, "little", signed=True) - r.addend - r.target.offset
            if r.type == R.PC32:
                yield verdict.name, r.target.block, r.target.offset, value + verdict.live.body + r.offset
            elif r.type in (R.A32, R.A32S):
                yield verdict.name, r.target.block, r.target.offset, value


def test_every_bit_of_every_constant_counts(control: tuple[Target, Delta]) -> None:
    target, delta = control
    found = list(constants(delta, target))
    assert len({block for _, block, _, _ in found}) >= 8
    missed = []
    for bit in range(8 * max(len(block.data) for _, block, _, _ in found)):
        users = {
            (name, block.name): address + bit // 8
            for name, block, offset, address in found
            if bit // 8 < len(block.data) and (not block.string or bit // 8 >= offset)
        }
        flips = dict.fromkeys(users.values(), 1 << bit % 8)
        verdict = flipped(target, flips, delta.unit, delta.blocks)
        missed += [(*user, bit) for user in users if verdict[user[0]].status is not Status.CHANGED]
    assert missed == []


def test_the_control_leaves_the_process_as_it_was(control: tuple[Target, Delta]) -> None:
    _, delta = control
    assert unequal(match(delta.blocks, delta.unit)) == []


# --- what is the same ---

BUILDS = [
    ("gcc", "-O0", "pie", "bfd"),
    ("gcc", "-O1", "no-plt", "gold"),
    ("gcc", "-O2", "fixed", "lld"),
    ("gcc", "-O3", "library", "mold"),
    ("gcc", "-Os", "static", "bfd"),
    ("gcc", "-O2", "sections", "gold"),
    ("gcc", "-O2", "static-pie", "lld"),
    ("gcc", "-O0", "library", "bfd"),
    ("gcc", "-O1", "static", "mold"),
    ("clang", "-O0", "fixed", "gold"),
    ("clang", "-O1", "library", "lld"),
    ("clang", "-O2", "pie", "mold"),
    ("clang", "-O3", "no-plt", "bfd"),
    ("clang", "-Os", "sections", "lld"),
    ("clang", "-O2", "static", "gold"),
    ("clang", "-O2", "folded", "lld"),
    ("gcc", "-O2", "folded", "gold"),
]
STYLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "pie": (("-fPIE",), ("-pie",)),
    "fixed": (("-fno-pie",), ("-no-pie",)),
    "no-plt": (("-fno-plt", "-fPIE"), ("-pie", "-Wl,-z,now")),
    "static": (("-fno-pie",), ("-no-pie", "-static")),
    "static-pie": (("-fPIE",), ("-static-pie",)),
    "library": (("-Dmain=kinds_main",), ()),
    "sections": (("-fPIE", *UNIT), ("-pie", "-Wl,--gc-sections", "-rdynamic")),
    "folded": (("-fPIE", "-ffunction-sections"), ("-pie", "-Wl,--icf=safe")),
}
rates: list[tuple[int, int]] = []


@pytest.mark.parametrize(("compiler", "level", "style", "linker"), BUILDS)
def test_what_nobody_touched_is_the_same(tmp_path: Path, compiler: str, level: str, style: str, linker: str) -> None:
    flags, link = STYLES[style]
    link = (f"-fuse-ld={linker}", *link)
    program, unit = build(tmp_path, level, *flags, compiler=compiler, link=link, shared=style == "library")
    with running(program) as target:
        delta = matched(target, unit)
    present = [f for f in delta.functions if f.status is not Status.ADDED]
    rates.append((len(present), sum(f.status is Status.SAME for f in present)))
    assert unequal(delta) == []
    assert len(present) >= 25


def test_the_rate_of_false_changes(capsys: pytest.CaptureFixture[str]) -> None:
    total, same = (sum(column) for column in zip((0, 0), *rates, strict=True))
    with capsys.disabled():
        print(f" [{same} of {total} untouched functions of {len(rates)} builds found the same]", end="")
    assert total - same <= total // 50


# --- what changed ---

BASE = r"""
#include <stdio.h>
#include <string.h>
static const int table[4] = {1, 2, 3, 4};
const int shared_table[4] = {5, 6, 7, 8};
static const char *const words[3] = {"ada", "bea", "cyd"};
struct shape { const int *numbers; const char *name; };
static const struct shape shapes[2] = {{table, "round"}, {shared_table, "square"}};
int first = 1, second = 2;
static int hidden_first, hidden_second;
__attribute__((noinline)) int callee_one(int n) { return n * 3 + 1; }
__attribute__((noinline)) int callee_two(int n) { return n * 5 + 2; }
static int inlined(int n) { return n * 77 + 5; }
int constant(int n) { return n + 1000; }
const char *string(void) { return "a string of the program"; }
const char *word(int n) { return words[n]; }
int tables(int n) { return table[n]; }
int shared_tables(int n) { return shared_table[n]; }
int indirect(int n) { return shapes[n & 1].numbers[n] + shapes[n & 1].name[0]; }
int calls(int n) { return callee_one(n) + 4; }
int variable(void) { return first; }
int hidden(void) { return ++hidden_first; }
int hides(void) { return --hidden_second; }
int import(const char *text) { return puts(text) + 1; }
int compare(int n) { return n < 10 ? callee_one(n) : 3; }
double fraction(double x) { return x * 2.5; }
int inlines(int n) { return inlined(n) ^ 3; }
int cases(int n)
{
    switch (n) {
    case 0: return callee_one(1);
    case 1: return callee_two(2);
    case 2: return callee_one(3);
    case 3: return callee_two(9);
    case 4: return callee_one(12);
    case 5: return first;
    default: return 0;
    }
}
void aligned(int n) { while (n--) callee_one(n); }
extern int maybe(void) __attribute__((weak));
int optional(void) { return maybe ? 1 : 2; }
extern void wait_for_end(void);
int main(void) { wait_for_end(); return 0; }
"""

CHANGES: dict[str, tuple[str, str, set[str]]] = {
    "constant": ("n + 1000", "n + 1001", {"constant"}),
    "string": ("a string of", "a strong of", {"string"}),
    "shorter string": ("a string of the program", "a string of the progra", {"string"}),
    "string in a table": ('"bea"', '"bee"', {"word"}),
    "callee": ("callee_one(n) + 4", "callee_two(n) + 4", {"calls"}),
    "variable": ("return first; }", "return second; }", {"variable"}),
    "import of the same shape": ("puts(text)", "remove(text)", {"import"}),
    "condition": ("n < 10", "n <= 10", {"compare"}),
    "unsigned condition": ("n < 10", "(unsigned)n < 10", {"compare"}),
    "float": ("x * 2.5", "x * 2.25", {"fraction"}),
    "array": ("table[4] = {1, 2, 3, 4}", "table[4] = {1, 2, 3, 5}", {"tables", "indirect"}),
    "exported array": ("{5, 6, 7, 8}", "{5, 6, 9, 8}", {"shared_tables", "indirect"}),
    "table through a pointer": ('"square"', '"squart"', {"indirect"}),
    "pointer in a table": ('{table, "round"}', '{table + 1, "round"}', {"indirect"}),
    "inlined function": ("n * 77 + 5", "n * 77 + 6", {"inlines"}),
    "case": ("case 3: return callee_two(9)", "case 3: return callee_one(9)", {"cases"}),
    "cases swapped": ("case 0: return callee_one(1);\n    case 1: return callee_two(2)",
                      "case 0: return callee_two(2);\n    case 1: return callee_one(1)", {"cases"}),
    "variables of one shape": ("++hidden_first", "++hidden_second", {"hidden"}),
    "weak symbol": ("maybe ? 1 : 2", "maybe ? 2 : 1", {"optional"}),
    "array grew": ("table[4] = {1, 2, 3, 4}", "table[5] = {1, 2, 3, 4, 5}", {"tables", "indirect"}),
}  # fmt: skip


@pytest.fixture(scope="module", params=["gcc", "clang"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Target, str]]:
    folder = tmp_path_factory.mktemp("base")
    program = link_program(folder, BASE, compiler=request.param)
    with running(program) as target:
        yield target, request.param


def link_program(folder: Path, text: str, *flags: str, compiler: str = "gcc", link: tuple[str, ...] = ()) -> Path:
    unit = compile_text(text, folder / "program.o", "-O2", *flags, compiler=compiler)
    run(compiler, *link, "-o", folder / "program", unit, waiting_object(folder))
    return folder / "program"


def unit_object(folder: Path, text: str, *flags: str, compiler: str = "gcc", output: str = "new.o") -> Path:
    return compile_text(text, folder / output, "-O2", *flags, *UNIT, compiler=compiler)


def replaced(text: str, *edits: tuple[str, str]) -> str:
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_where_it_is_and_nowhere_else(base: tuple[Target, str], tmp_path: Path, change: str) -> None:
    target, compiler = base
    old, new, expected = CHANGES[change]
    delta = matched(target, unit_object(tmp_path, replaced(BASE, (old, new)), compiler=compiler))
    assert {f.name for f in delta.functions if f.status is Status.CHANGED} == expected
    assert {f.name for f in delta.functions if f.status is Status.ADDED} == set()


@pytest.mark.parametrize("flags", [("-falign-loops=64",), ("-falign-functions=128",), ("-falign-jumps=32",)])
def test_alignment_alone_is_no_change(base: tuple[Target, str], tmp_path: Path, flags: tuple[str, ...]) -> None:
    target, compiler = base
    if compiler == "clang" and flags == ("-falign-jumps=32",):
        pytest.skip("clang 14 has no -falign-jumps")
    delta = matched(target, unit_object(tmp_path, BASE, *flags, compiler=compiler))
    assert unequal(delta) == []


def test_a_function_that_became_static_is_the_same(base: tuple[Target, str], tmp_path: Path) -> None:
    target, compiler = base
    text = replaced(
        BASE, ("__attribute__((noinline)) int callee_one", "__attribute__((noinline, used)) static int callee_one")
    )
    found = verdicts(matched(target, unit_object(tmp_path, text, compiler=compiler)))
    assert found["callee_one"] == "same"


def test_a_new_function_is_added(base: tuple[Target, str], tmp_path: Path) -> None:
    target, compiler = base
    delta = matched(target, unit_object(tmp_path, BASE + "int born(int n) { return n - 4; }\n", compiler=compiler))
    assert [f.name for f in delta.functions if f.status is not Status.SAME] == ["born"]


def test_a_constant_that_became_a_variable_changes_who_uses_it(base: tuple[Target, str], tmp_path: Path) -> None:
    target, compiler = base
    text = (
        replaced(BASE, ("static const int table[4]", "static int table[4]")) + "void writes(int n) { table[n] = n; }\n"
    )
    found = verdicts(matched(target, unit_object(tmp_path, text, compiler=compiler)))
    assert found["tables"] == found["indirect"] == "changed"


def test_a_cold_part_changes_with_its_function(tmp_path: Path) -> None:
    text = r"""
    #include <stdio.h>
    #include <stdlib.h>
    extern void wait_for_end(void);
    int state;
    __attribute__((cold, noinline)) void report(const char *what) { fputs(what, stderr); }
    int hot(int n)
    {
        if (__builtin_expect(n < 0, 0)) { report("below"); state = n * 3; }
        return n * 2 + state;
    }
    int main(void) { wait_for_end(); return hot(0); }
    """
    with running(link_program(tmp_path, text)) as target:
        plain = matched(target, unit_object(tmp_path, text))
        assert unequal(plain) == []
        assert "hot.cold" in verdicts(plain)
        found = verdicts(matched(target, unit_object(tmp_path, replaced(text, ('"below"', '"under"')))))
        assert found["hot.cold"] == found["hot"] == "changed"
        found = verdicts(matched(target, unit_object(tmp_path, replaced(text, ("n * 2 +", "n * 4 +")))))
        assert found["hot.cold"] == found["hot"] == "changed", "the cold part goes on in the middle of its function"


# --- variables ---

STATICS = r"""
extern void wait_for_end(void);
int one(void) { static int n; return n += 1; }
int two(void) { static int n; return n += 2; }
static __thread int per_thread, other_thread;
int three(void) { per_thread += 3; return other_thread; }
int main(void) { wait_for_end(); return 0; }
"""


def bound(delta: Delta, function: str) -> dict[str, int]:
    """Return variable -> live address, of what a function refers to."""
    block = next(f.block for f in delta.functions if f.name == function)
    targets = [r.target.block for r in delta.blocks.references(block) if isinstance(r.target, Place)]
    return {b.name: delta.bindings[b] for b in targets if b in delta.bindings}


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_renumbered_statics_are_bound_by_who_uses_them(tmp_path: Path, compiler: str) -> None:
    one, two = STATICS.splitlines()[2:4]
    reordered = "int zero(void) { static int n; return n += 9; }\n" + replaced(
        STATICS, (f"{one}\n{two}", f"{two}\n{one}")
    )
    with running(link_program(tmp_path, STATICS, compiler=compiler)) as target:
        before = matched(target, unit_object(tmp_path, STATICS, compiler=compiler))
        after = matched(target, unit_object(tmp_path, reordered, compiler=compiler))
    assert verdicts(after) == {"zero": "added", "one": "same", "two": "same", "three": "same", "main": "same"}
    for function in ("one", "two", "three"):
        assert list(bound(before, function).values()) == list(bound(after, function).values())
    if compiler == "gcc":  # clang names them after their functions
        assert list(bound(before, "one")) != list(bound(after, "one")), "they were renumbered"


def test_one_variable_does_not_stand_for_two(tmp_path: Path) -> None:
    text = "extern void wait_for_end(void);\nstatic int n;\nint one(void) { return n += 1; }\n"
    text += "int two(void) { return n += 2; }\nint main(void) { wait_for_end(); return 0; }\n"
    split = replaced(text, ("static int n;\n", ""), ("{ return n", "{ static int n; return n"))
    with running(link_program(tmp_path, text)) as target:
        found = verdicts(matched(target, unit_object(tmp_path, split)))
    assert "changed" in (found["one"], found["two"])


def test_two_variables_do_not_become_one(tmp_path: Path) -> None:
    joined = replaced(
        STATICS, ("int one(void) { static int n;", "static int n;\nint one(void) {"), ("{ static int n;", "{")
    )
    with running(link_program(tmp_path, STATICS)) as target:
        found = verdicts(matched(target, unit_object(tmp_path, joined)))
    assert "changed" in (found["one"], found["two"])


def test_thread_locals_do_not_change_places(tmp_path: Path) -> None:
    swapped = replaced(STATICS, ("per_thread += 3; return other_thread", "other_thread += 3; return per_thread"))
    with running(link_program(tmp_path, STATICS)) as target:
        assert verdicts(matched(target, unit_object(tmp_path, swapped)))["three"] == "changed"


# --- lines ---

LINES = r"""
#include <stdio.h>
extern void wait_for_end(void);
struct where { const char *file; int line; };
int fails(int n) { return n ? printf("%d", __LINE__) : 0; }
const struct where *place(void) { static const struct where here = {"unit.c", __LINE__}; return &here; }
int sums(void) { return printf("%d", __LINE__ + 1000); }
int other(int n) { return n + 1005; }
int main(void) { wait_for_end(); return 0; }
"""


def test_a_moved_line_is_told_from_a_change(tmp_path: Path) -> None:
    moved = "\n" + replaced(LINES, ("n + 1005", "n + 1006"))
    with running(link_program(tmp_path, LINES)) as target:
        new = unit_object(tmp_path, moved)
        plain = matched(target, new)
        changed = dict.fromkeys(("fails", "place", "sums", "other"), "changed")
        assert verdicts(plain) == {**changed, "main": "same"}
        shifted = unit_object(tmp_path, "#line 100001\n" + moved, output="shifted.o")
        fields = line_fields(read_object(new), read_object(shifted), 100_000)
        moves = moved_lines(LINES.encode(), moved.encode())
        found = verdicts(matched(target, new, LineNumbers(fields, (moves,))))
    # A sum with a line number moves as a line does, and cannot be told from another constant.
    assert found == {**changed, "main": "same", "fails": "line-only", "place": "line-only"}


# --- what cannot be told ---


MAIN = "void wait_for_end(void);\nint main(void) { wait_for_end(); return 0; }\n"


def link_units(folder: Path, *texts: str) -> Path:
    """Link several files, all called unit.c, to a program."""
    units = [compile_text(text, folder / f"part{i}.o", "-O1", "-fcommon") for i, text in enumerate(texts)]
    main = compile_text(MAIN, folder / "main.o", name="main.c")
    run("gcc", "-o", folder / "program", main, *units, waiting_object(folder))
    return folder / "program"


def test_units_that_cannot_be_told_apart_are_refused_by_name(tmp_path: Path) -> None:
    text = "static int n;\nstatic __attribute__((constructor)) void start(void) { n++; }\n"
    unit = compile_text(text, tmp_path / "unit.o", "-O1", *UNIT)
    program = link_units(tmp_path, text, text)
    with running(program) as target, pytest.raises(UnsafeChange, match=r"2 units called unit\.c") as caught:
        matched(target, unit)
    assert caught.value.code == "ambiguous-unit"


@pytest.mark.parametrize("statics", ["left right", "same same"])
def test_units_of_one_name_are_told_apart_by_their_statics_or_by_their_code(tmp_path: Path, statics: str) -> None:
    text = "static int n;\nstatic __attribute__((noinline)) int %s(void) { return ++n; }\n"
    text += "int from_%s(void) { return %s(); }\n"
    texts = [text % (static, name, static) for static, name in zip(statics.split(), ("left", "right"), strict=True)]
    found = []
    with running(link_units(tmp_path, *texts)) as target:
        for text in texts:
            delta = matched(target, compile_text(text, tmp_path / "unit.o", "-O1", *UNIT))
            assert unequal(delta) == []
            found += [address for block, address in delta.bindings.items() if block.name == "n"]
    assert len(set(found)) == 2


SHADOWED = """
int helper(int n) { return n + 4; }
int level = 3;
"""
USER = """
extern int helper(int), level;
int uses(int n) { return helper(n) * 2; }
int reads(void) { return level; }
"""


def test_a_new_static_function_is_not_another_units_global(tmp_path: Path) -> None:
    shadow = replaced(
        USER,
        ("int helper(int), level;", "int level;\nstatic __attribute__((noinline)) int helper(int n) { return n ^ 9; }"),
    )
    with running(link_units(tmp_path, USER, SHADOWED)) as target:
        assert unequal(matched(target, compile_text(USER, tmp_path / "unit.o", "-O1", *UNIT))) == []
        with pytest.raises(UnsafeChange, match=r"`helper` of unit\.c.* is static now") as caught:
            matched(target, compile_text(shadow, tmp_path / "unit.o", "-O1", *UNIT))
    assert caught.value.code == "ambiguous-symbol"


def test_a_new_static_variable_is_not_another_units_global(tmp_path: Path) -> None:
    shadow = replaced(USER, (", level;", ";\nstatic volatile int level;"))
    with running(link_units(tmp_path, USER, SHADOWED)) as target:
        delta = matched(target, compile_text(shadow, tmp_path / "unit.o", "-O1", *UNIT))
        assert verdicts(delta) == {"uses": "same", "reads": "changed"}
        with pytest.raises(UnsafeChange, match=r"`level` of unit\.c.* is static now"):
            delta.unit.variables("level", local=True)


def test_a_static_that_went_is_not_the_new_global_of_that_name(tmp_path: Path) -> None:
    own = replaced(
        USER,
        ("int helper(int), level;", "int level;\nstatic __attribute__((noinline)) int helper(int n) { return n ^ 9; }"),
    )
    with running(link_units(tmp_path, own, SHADOWED)) as target:
        delta = matched(target, compile_text(USER, tmp_path / "unit.o", "-O1", *UNIT))
    assert verdicts(delta)["uses"] == "changed"


@pytest.mark.parametrize("linker", ["gold", "lld"])
def test_a_folded_function_is_refused_by_name_once_it_changes(tmp_path: Path, linker: str) -> None:
    text = "void wait_for_end(void);\nint twin(int n) { return n * 3 + 8; }\nint other(int n) { return n * 3 + 8; }\n"
    text += "int main(void) { wait_for_end(); return twin(1) + other(2); }\n"
    program = link_program(
        tmp_path,
        text,
        "-fno-inline",
        "-fno-ipa-icf",
        "-ffunction-sections",
        link=(f"-fuse-ld={linker}", "-Wl,--icf=all"),
    )
    flags = ("-fno-inline", "-fno-ipa-icf")
    with running(program) as target:
        assert unequal(matched(target, unit_object(tmp_path, text, *flags))) == []
        changed = unit_object(
            tmp_path,
            replaced(text, ("int twin(int n) { return n * 3 + 8", "int twin(int n) { return n * 3 + 9")),
            *flags,
        )
        with pytest.raises(UnsafeChange, match="`twin` shares its code with `other`") as caught:
            matched(target, changed)
    assert caught.value.code == "folded-function"


def test_two_libraries_with_the_same_functions_are_refused(tmp_path: Path) -> None:
    text = "int same(void) { return 3; }\n"
    unit = compile_text(text, tmp_path / "unit.o", "-O1", "-fPIC")
    libraries = [tmp_path / "libleft.so", tmp_path / "libright.so"]
    for library in libraries:
        run("gcc", "-shared", "-o", library, unit)
    main = compile_text(MAIN, tmp_path / "main.o", name="main.c")
    run(
        "gcc",
        "-o",
        tmp_path / "program",
        main,
        waiting_object(tmp_path),
        "-Wl,--no-as-needed",
        *libraries,
        f"-Wl,-rpath,{tmp_path}",
    )
    with running(tmp_path / "program") as target, pytest.raises(UnsafeChange, match=r"libleft\.so") as caught:
        matched(target, unit)
    assert caught.value.code == "ambiguous-module"
    assert "libright.so" in str(caught.value)
