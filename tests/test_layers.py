"""The rooms of the package import each other in one direction, and each heavy library has one importer.

Every import counts, those inside functions too; an import for types only does as well, save that `session`'s
users may name its types.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

import patcher

ROOT = Path(patcher.__file__).parent

READING = {"errors", "elf"}
MATCHING = READING | {"blocks", "image", "live", "lines", "link", "code", "target"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "bulk": set(),
    "elf": {"errors", "bulk"},
    "code": {"errors"},
    "target": {"errors"},
    "build": {"errors"},
    "watch": {"errors"},
    # Blocks cut code at the references that an assembler resolved: that takes decoding.
    "blocks": READING | {"code", "bulk"},
    # The linker is pure: blocks in, bytes out; the only code it makes is a far jump.
    "link": READING | {"blocks", "code", "bulk"},
    "linkmap": {"errors", "target"},
    "scopes": {"errors", "target", "linkmap"},
    "image": READING | {"code", "target", "linkmap", "scopes"},
    # Functions of the target are called where its frames show that nothing is locked.
    "unwind": {"code.border", "errors", "elf.tables", "image", "target"},
    "safepoint": {"elf", "image", "target", "unwind"},
    "loader": {"errors", "elf.tables", "elf.thread_module", "image", "safepoint", "target"},
    # What earlier generations placed has names too: the journal's records say so.
    "live": READING | {"blocks", "image", "code", "patch.journal"},
    "lines": READING,
    "stamps": set(),
    # The relocation table says how wide a field is, and which are relative.
    "match": READING | {"blocks", "live", "lines", "stamps", "link.relocations", "code"},
    # Units of one name are told apart by matching each.
    "origin": READING | {"blocks", "image", "live", "match", "patch.journal"},
    # The arena's free memory is what the linker lays out.
    "patch": {"errors", "target", "code", "link.place"},
    "report": {"errors", "data.outcome"},
    "convention": MATCHING | {"match"},
    # One unit's share of a generation: its verdicts, and the object that new code is taken from.
    "part": MATCHING | {"match", "constructors", "data.comparison", "data.shapes"},
    # What becomes of variables; the types are read from a copy of the object, in which relocations are mended.
    "data": MATCHING | {"match", "part", "patch.journal", "constructors"},
    # Tables of labels go with their functions.
    "labels": {"blocks", "errors", "live", "match", "part"},
    # What the names and blocks of parts mean in the process.
    "linkage": MATCHING | {"match", "part", "labels", "patch", "data", "undefined"},
    # Joins verdicts, linker and arena to a generation that is ready to be written.
    "relink": MATCHING | {"match", "part", "labels", "linkage", "patch", "convention", "constructors", "data"},
    # What a program starts with: lists of functions in an object.
    "constructors": READING | {"blocks"},
    # An object that nobody compiled: it has the tables of one, and its unit has a name of its own.
    "undefined": READING | {"blocks", "live"},
    # Where a definition comes from that the process has never had: brought in as units that are matched like others.
    "supply": MATCHING | {"match", "part", "linkage", "patch", "relink", "undefined", "options", "origin", "build"},
    # What the program itself can read of its generations, and which of its functions are told of them.
    "directory": {"image", "link.place", "patch"},
    # What fills new storage runs while all stand still, when nobody refers to the old any more.
    "filling": {"data.still_used", "errors", "image", "loader", "patch", "target"},
    # What each thread has of its own is found, and written, while all stand still.
    "thread_values": {"errors", "image", "linkmap", "patch", "target", "unwind"},
    # Who is in old code, and whether it may go out of use all the same.
    "activity": {"code", "errors", "image", "patch", "report", "target", "unwind"},
    "policy": {"activity", "errors", "options", "patch", "report", "target"},
    "hooks": {"errors", "image", "live", "loader", "part", "patch", "target"},
    "options": {"errors"},
    "ignored": {"errors"},
    # Whose word is taken is decided in one place, for compile commands and for this.
    "configuration": {"build", "errors", "options"},
    "texts": {"errors", "build"},
    # Whether new code and live data agree on types.
    "agreement": {"build", "data", "image", "live", "match", "part", "patch"},
    # A unit's share in a save: compiled, read, matched, and its types compared.
    "units": MATCHING
    | {"agreement", "match", "origin", "part", "patch", "report", "supply", "options", "texts", "stamps", "build"}
    | {"data.compiled"},
    # What becomes of each saved file; knows no process.
    "edits": set(),
    "touched": {"build", "image", "options", "origin", "report", "texts", "units"},
    "explain": {"data", "errors", "match", "part", "relink", "units", "report"},
    # Who is in the code that a change takes out of use.
    "occupants": {"activity", "errors", "image", "options", "patch", "policy", "relink", "report"},
    # A change is linked until all is there that it needs.
    "linking": {"data", "elf", "errors", "link", "linkage", "loader", "part", "relink", "units"},
    # What the program itself has a hand in when a generation goes live or is gone back from.
    "committing": {
        *("data.outcome", "directory", "errors", "filling", "hooks", "image", "loader", "occupants", "options"),
        *("patch", "policy", "relink", "thread_values"),
    },
    # One change, in one transaction.
    "applying": {
        *("committing", "data", "errors", "explain", "linking", "occupants", "outcome", "patch", "relink", "report"),
        "units",
    },
    "outcome": {"report"},
    "status": {"patch"},
    "session": {
        *("applying", "committing", "linking", "occupants", "outcome", "status"),
        *("build", "data", "errors", "image", "loop", "options", "patch", "report", "target", "texts", "touched"),
        "units",
    },
    # Several sessions as one.
    "tree": {"errors", "options", "outcome", "report", "session", "status", "target", "units"},
    # The watch loop drives a session, which starts it.
    "loop": {
        "errors",
        "control",
        "edits",
        "outcome",
        "session",
        "build",
        "watch",
        "report",
        "ignored",
        "options",
        "units",
    },
    # One watch over one process of a program after another.
    "restart": {"build", "errors", "ignored", "loop", "options", "report", "session", "target", "watch", "control"},
    # Talks to clients; what is asked is done by the loop, in its own thread.
    "control": {"errors", "report"},
    # Looks at files and at a process of its own, before there is a target.
    "doctor": {"build", "code", "elf", "errors", "image", "target"},
    "cli": {
        "doctor",
        "errors",
        "options",
        "report",
        "restart",
        "session",
        "status",
        "target",
        "tree",
        "build",
        "configuration",
        "control",
        "loop",
        "",
    },
    "": {
        "errors",
        "options",
        "outcome",
        "session",
        "status",
        "target",
        "tree",
        "report",
    },  # the package itself: the public API
    "__main__": {"cli"},
}
ONE_IMPORTER = {
    "ptrace": "target",
    "capstone": "code",
    "drgn": "data",
    "elftools": "build",
    "watchfiles": "watch",
    "rich": "report",
    "click": "cli",
    "pathspec": "ignored",
}


def room(module: str) -> str:
    """Return the room of a dotted module name below the package."""
    return module.split(".")[0]


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield name, ast.parse(path.read_text())


def imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in line {node.lineno}"
            assert node.module is not None
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def is_allowed(name: str, imported: str) -> bool:
    """Whether module `name` may import `imported`, dotted below the package."""
    own = room(name)
    if room(imported) == own and own:
        return True
    return any(imported == edge or imported.startswith(f"{edge}.") or edge == room(imported) for edge in ALLOWED[own])


def package_name(imported: str) -> str:
    """Return what is imported from the package, dotted below it: "" for the package itself."""
    below = imported.removeprefix("patcher").removeprefix(".")
    parts = below.split(".")
    known = ROOT / parts[0]
    return below if known.is_dir() or known.with_suffix(".py").is_file() else ""


@pytest.mark.parametrize(("name", "tree"), [pytest.param(n, t, id=n or "patcher") for n, t in sources()])
def test_imports_go_one_way(name: str, tree: ast.Module) -> None:
    assert room(name) in ALLOWED, f"patcher.{name} belongs to no room of the table"
    own = [(package_name(i), line) for i, line in imports(tree) if i.split(".")[0] == "patcher"]
    assert [(imported, line) for imported, line in own if not is_allowed(name, imported)] == []


def test_no_module_needs_itself() -> None:
    """Not for types either; only that a session can start the loop that drives it is told of here."""
    trees = dict(sources())
    needs = {}
    for name, tree in trees.items():
        own = (package_name(i) for i, _ in imports(tree) if i.split(".")[0] == "patcher")
        needs[name] = {module_of(i, trees) for i in own} - {name, ""}
    needs["session"].discard("loop")
    done: set[str] = set()
    while left := [name for name in needs if name not in done]:
        ready = [name for name in left if needs[name] <= done]
        assert ready, f"each of these needs another of them: {sorted(innermost(left, needs))}"
        done.update(ready)


def module_of(imported: str, known: Collection[str]) -> str:
    """Return the module that a dotted name is, or is something of."""
    while imported and imported not in known:
        imported = imported.rpartition(".")[0]
    return imported


def innermost(left: list[str], needs: dict[str, set[str]]) -> list[str]:
    """Leave out the modules that nobody of the rest needs: they only use the circle."""
    while len(kept := [n for n in left if any(n in needs[m] for m in left)]) < len(left):
        left = kept
    return left


@pytest.mark.parametrize("library", ONE_IMPORTER)
def test_a_heavy_library_has_one_importer(library: str) -> None:
    found = {room(name) for name, tree in sources() for i, _ in imports(tree) if i.split(".")[0] == library}
    assert found == {ONE_IMPORTER[library]}


def test_the_table_says_what_the_house_rules_say() -> None:
    reach = {name: closure(name) for name in ALLOWED}
    assert not any("cli" in reach[name] for name in ALLOWED if name not in ("cli", "__main__"))
    assert not reach["link"] & {"target", "patch", "session", "image", "live", "match", "build"}
    assert reach["target"] == reach["code"] == reach["build"] == reach["watch"] == {"errors"}
    assert "session" not in reach["report"] | reach["patch"] | reach["match"] | reach["relink"]


def closure(name: str) -> set[str]:
    found: set[str] = set()
    work = [name]
    while work:
        for edge in ALLOWED[work.pop()] if work else ():
            if room(edge) not in found:
                found.add(room(edge))
                work.append(room(edge))
    return found


def test_every_edge_of_the_table_is_used() -> None:
    used = {(room(n), package_name(i)) for n, t in sources() for i, _ in imports(t) if i.split(".")[0] == "patcher"}
    for name in ("blocks", "link", "live", "match", "patch"):
        for edge in ALLOWED[name]:
            assert any(n == name and (i == edge or i.startswith(f"{edge}.")) for n, i in used), f"{name} -> {edge}"


def test_starting_up_imports_nothing_heavy() -> None:
    heavy = sorted(set(ONE_IMPORTER) - {"click"})
    text = f"import sys, patcher.cli.main; print(*[m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"ptrace"}


def test_starting_up_starts_no_thread() -> None:
    """Signals are taken by a thread of ours alone only if those before it are none: numpy's would take them too."""
    text = "import os, patcher.cli.main; print(len(os.listdir('/proc/self/task')))"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
