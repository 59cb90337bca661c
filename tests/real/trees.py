"""Built trees of the real programs: each by its own build system, at its own optimisation level.

Decides how each is built and writes its compile_commands.json, recorded by a compiler wrapper, since none of the three
makes one. A built tree stays in the cache; `restored` puts its sources back to what the program was built from.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .sources import fetch, fetch_python

RECORDING_CC = Path(__file__).parents[2] / "fixtures" / "real" / "recording-cc"
SOURCE_SUFFIXES = (".c", ".cc", ".cpp", ".cxx")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one program is built: commands run in its tree, `{cc}` being the recording compiler."""

    package: str
    program: str
    watched: tuple[str, ...]
    build: tuple[tuple[str, ...], ...]
    configure: tuple[str, ...] | None = None
    folder: str = ""  # of a Python source package that has it among others'


REDIS = Recipe(
    package="redis",
    program="src/redis-server",
    watched=("src", "deps/lua/src"),
    build=(("make", "-j2", "-C", "src", "redis-server", "CC={cc}"),),
)
LUA = Recipe(
    package="lua5.4",
    program="src/lua",
    watched=("src",),
    build=(("make", "-j2", "linux", "CC={cc} -std=gnu99"),),
)
# The same interpreter, as its authors have it: with their own tests, which Debian leaves out.
LUA_WITH_TESTS = Recipe(
    package="lupa==2.8",
    folder="third-party/lua54",
    program="lua",
    watched=(".",),
    build=(("make", "-j2", "CC={cc}", "MYCFLAGS=-std=c99 -DLUA_USE_LINUX", "MYLIBS=-ldl"),),
)
NGINX = Recipe(
    package="nginx",
    program="objs/nginx",
    watched=("src",),
    configure=("./configure", "--without-http_rewrite_module", "--without-http_gzip_module"),
    build=(("make", "-j2", "CC={cc}"),),
)
MEMCACHED = Recipe(
    package="memcached",
    program="memcached",
    watched=(".",),
    configure=("./configure", "-q", "--disable-docs"),
    build=(("make", "-j2", "memcached", "CC={cc}"),),
)


@dataclass(frozen=True, slots=True)
class Tree:
    """A built program: its sources, which a test may edit, and what it was built from."""

    root: Path
    pristine: Path
    recipe: Recipe

    @property
    def program(self) -> Path:
        return self.root / self.recipe.program

    @property
    def watched(self) -> tuple[Path, ...]:
        return tuple(self.root / path for path in self.recipe.watched)

    @property
    def compile_commands(self) -> Path:
        return self.root / "compile_commands.json"

    @property
    def patches(self) -> Path:
        return self.pristine / "debian" / "patches"

    def edit(self, file: str, old: str, new: str) -> None:
        """Replace the one occurrence of `old`, saved as an editor does: a new file, renamed over the old one."""
        path = self.root / file
        text = path.read_text()
        assert text.count(old) == 1, f"{path} has {text.count(old)} times, not once: {old!r}"
        written = path.with_name(f".{path.name}.saving")
        written.write_text(text.replace(old, new))
        written.replace(path)


def built(recipe: Recipe, cache_dir: Path) -> Tree:
    """Return the built tree of a program with pristine sources, building it if the cache has none."""
    if recipe.folder:
        pristine = fetch_python(recipe.package, recipe.folder, cache_dir)
    else:
        pristine = fetch(recipe.package, cache_dir)
    tree = Tree(cache_dir / "built" / recipe.package, pristine, recipe)
    stamp = tree.root.with_name(f"{recipe.package}.complete")
    made_of = json.dumps([recipe.build, recipe.configure, _compiler_version(), str(tree.root)])
    if not stamp.is_file() or stamp.read_text() != made_of or not tree.program.is_file():
        stamp.unlink(missing_ok=True)
        _build(tree)
        stamp.write_text(made_of)
    return restored(tree)


def restored(tree: Tree) -> Tree:
    """Put back, with its time, every source file that an earlier test edited."""
    for original in tree.pristine.rglob("*.[ch]"):
        copy = tree.root / original.relative_to(tree.pristine)
        if not _same_file_state(original, copy):
            shutil.copy2(original, copy)
    return tree


def _same_file_state(one: Path, other: Path) -> bool:
    if not other.exists():
        return False
    first, second = one.stat(), other.stat()
    return (first.st_size, first.st_mtime_ns) == (second.st_size, second.st_mtime_ns)


def _build(tree: Tree) -> None:
    shutil.rmtree(tree.root, ignore_errors=True)
    shutil.copytree(tree.pristine, tree.root, symlinks=True)
    calls = tree.root / "compiler-calls.ndjson"
    if tree.recipe.configure:  # with the plain compiler: its trial programs are none of ours
        _run(tree.recipe.configure, tree.root, {})
    for command in tree.recipe.build:
        arguments = tuple(part.format(cc=RECORDING_CC) for part in command)
        _run(arguments, tree.root, {"RECORDING_CC": "cc", "RECORDING_CC_LOG": str(calls)})
    entries = [entry for line in calls.read_text().splitlines() if (entry := _compile_command(json.loads(line)))]
    tree.compile_commands.write_text(json.dumps(entries, indent=1))


def _compile_command(call: dict[str, object]) -> dict[str, object] | None:
    """Make an entry of compile_commands.json of one compiler call; None for links and a configure script's trials."""
    arguments = [str(argument) for argument in call["arguments"]]  # type: ignore[attr-defined]
    sources = [argument for argument in arguments[1:] if argument.endswith(SOURCE_SUFFIXES)]
    if "-c" not in arguments or len(sources) != 1:
        return None
    file = (Path(str(call["directory"])) / sources[0]).resolve()
    return {**call, "file": str(file)} if file.is_file() else None


def _compiler_version() -> str:
    return subprocess.run(["cc", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _run(command: tuple[str, ...], directory: Path, environment: Mapping[str, str]) -> None:
    outer = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(
        command,
        cwd=directory,
        env={**outer, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)} in {directory} failed:\n{done.stdout[-4000:]}"
