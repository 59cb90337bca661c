"""Built trees of the real programs: each by its own build system, at its own optimisation level.

Decides how each is built, and has a compiler wrapper record how its sources are compiled, for who asks for that: none
but CMake would. A built tree stays in the cache; `restored` puts its sources back to what the program was built from.
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
    """How one program is built: commands run in its tree, `{cc}` being the recording compiler, `{root}` the tree.

    To be built anew in a copy, a tree is freed of the directories `made`, or cleaned by its own means, `clean`: what
    that leaves is not configured again.
    """

    package: str
    program: str
    watched: tuple[str, ...]
    build: tuple[tuple[str, ...], ...]
    configure: tuple[str, ...] | None = None
    folder: str = ""  # of a Python source package that has it among others'
    made: tuple[str, ...] = ()
    clean: tuple[str, ...] = ()


REDIS = Recipe(
    package="redis",
    program="src/redis-server",
    watched=("src", "deps/lua/src"),
    build=(("make", "-j2", "-C", "src", "redis-server", "CC={cc}"),),
    clean=("make", "-C", "src", "clean"),
)
LUA = Recipe(
    package="lua5.4",
    program="src/lua",
    watched=("src",),
    build=(("make", "-j2", "linux", "CC={cc} -std=gnu99"),),
    clean=("make", "clean"),
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
    clean=("make", "clean"),
)
# Apart from its sources, by a compiler that records all of its command line, and used where it was installed: nothing
# but the debug information says how it was made.
TINYPROXY = Recipe(
    package="tinyproxy",
    program="installed/bin/tinyproxy",
    watched=("src",),
    configure=(
        *("sh", "-c", 'mkdir build && cd build && exec ../configure -q --disable-manpage_support "$@"', "configure"),
        *("--prefix={root}/installed", "CC=clang", "CFLAGS=-g -O2 -grecord-command-line"),
    ),
    build=(("make", "-j2", "-C", "build/src"), ("make", "-C", "build", "install")),
    made=("build", "installed"),
)
MOSQUITTO = Recipe(
    package="mosquitto",
    program="build/src/mosquitto",
    watched=("src", "lib", "include"),
    configure=(
        *("cmake", "-S", ".", "-B", "build", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"),
        *(f"-D{part}=OFF" for part in ("WITH_TLS", "WITH_CJSON", "WITH_CLIENTS", "WITH_APPS", "WITH_PLUGINS")),
        "-DDOCUMENTATION=OFF",
    ),
    build=(("make", "-j2", "-C", "build", "mosquitto"),),
    made=("build",),
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
        """What was recorded; not where it would be found without being given."""
        return self.root.with_name(f"{self.root.name}.recorded") / "compile_commands.json"

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
    made_of = json.dumps([recipe.build, recipe.configure, _compiler_version(), str(tree.compile_commands)])
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


def cold(tree: Tree, root: Path) -> Tree:
    """Build a tree's sources anew, as they are now, by its own build in a copy at `root`."""
    shutil.copytree(tree.root, root, symlinks=True, ignore=shutil.ignore_patterns(*tree.recipe.made))
    copy = Tree(root, tree.pristine, tree.recipe)
    if tree.recipe.clean:
        _run(tree.recipe.clean, root, {})
    assert not copy.program.exists(), f"{copy.program} is none of a cold build"
    _make(copy, configured=bool(tree.recipe.clean))
    return copy


def _build(tree: Tree) -> None:
    shutil.rmtree(tree.root, ignore_errors=True)
    shutil.copytree(tree.pristine, tree.root, symlinks=True)
    _make(tree, configured=False)


def _make(tree: Tree, *, configured: bool) -> None:
    calls = tree.compile_commands.with_name("compiler-calls.ndjson")
    calls.parent.mkdir(exist_ok=True)
    calls.write_text("")
    if tree.recipe.configure and not configured:  # with the plain compiler: its trial programs are none of ours
        _run(_filled(tree.recipe.configure, tree.root), tree.root, {})
    for command in tree.recipe.build:
        recording = {"RECORDING_CC": "cc", "RECORDING_CC_LOG": str(calls)}
        _run(_filled(command, tree.root), tree.root, recording)
    entries = [entry for line in calls.read_text().splitlines() if (entry := _compile_command(json.loads(line)))]
    tree.compile_commands.write_text(json.dumps(entries, indent=1))


def _filled(command: tuple[str, ...], root: Path) -> tuple[str, ...]:
    return tuple(part.replace("{cc}", str(RECORDING_CC)).replace("{root}", str(root)) for part in command)


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
