"""Which saves are left alone: by globs that were given, and by what git ignores.

A path counts as ignored when it, or a directory between it and what is watched, is: what was asked to be watched is
watched, though git may ignore it. Whether a file is tracked makes no difference here, and neither global nor
`info/exclude` files are read. Specification: gitignore(5), as the library pathspec has it. The only importer of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from pathspec import GitIgnoreSpec

from patcher.errors import PatcherError

IGNORE = "--ignore"  # the rule of globs that were given
_NAME = ".gitignore"
_NOTHING = GitIgnoreSpec.from_lines(())


class Ignored:
    """Tells which source files are wanted: the filter of a watcher. Remembers the last that was left out."""

    def __init__(
        self,
        watched: Sequence[Path],
        is_source: Callable[[Path], bool],
        *,
        globs: Sequence[str] = (),
        globs_from: Path,
        git: bool = True,
    ) -> None:
        """`globs` are relative to a directory, as if they stood in a .gitignore there. Raises PatcherError."""
        self._is_source = is_source
        self._roots = sorted({p.resolve() for p in watched if p.is_dir()}, key=lambda p: len(p.parts), reverse=True)
        self._globs = _spec(globs)
        self._globs_from = globs_from.resolve()
        self._git = git
        self._read: dict[Path, tuple[int, GitIgnoreSpec]] = {}
        self.left_out: dict[str, Path] = {}  # by whose rule, the first file that would have been a save

    def __call__(self, path: Path) -> bool:
        """Tell whether a changed file is one to take in."""
        if not self._is_source(path):
            return False
        rule = self.rule(path)
        if rule:
            self.left_out.setdefault(rule, path)
        return not rule

    def rule(self, path: Path) -> str:
        """Return what ignores a file: a .gitignore, or `--ignore`; "" when nothing does."""
        root = next((r for r in self._roots if path.is_relative_to(r)), None)
        if root is None:
            return ""  # a file that was asked for by name
        below = path.relative_to(root).parts
        for depth in range(1, len(below) + 1):
            rule = self._rule(root.joinpath(*below[:depth]), directory=depth < len(below))
            if rule:
                return rule
        return ""

    def _rule(self, path: Path, *, directory: bool) -> str:
        if path.is_relative_to(self._globs_from):
            if _says(self._globs, path.relative_to(self._globs_from), directory):
                return IGNORE
        elif _says(self._globs, Path(path.name), directory):
            return IGNORE
        return self._rule_of_git(path, directory) if self._git else ""

    def _rule_of_git(self, path: Path, directory: bool) -> str:
        """Ask the .gitignore files from the nearest to the checkout's root: the first that says anything decides."""
        if not any((place / ".git").exists() for place in path.parents):
            return ""
        for place in path.parents:
            said = _says(self._spec_in(place), path.relative_to(place), directory)
            if said is not None:
                return str(place / _NAME) if said else ""
            if (place / ".git").exists():
                break
        return ""

    def _spec_in(self, place: Path) -> GitIgnoreSpec:
        file = place / _NAME
        try:
            written = file.stat().st_mtime_ns
            known = self._read.get(place)
            if known is None or known[0] != written:
                known = (written, _lenient(file.read_text("utf-8", "replace").splitlines()))
                self._read[place] = known
            return known[1]
        except OSError:
            return _NOTHING


def _spec(lines: Iterable[str]) -> GitIgnoreSpec:
    try:
        return GitIgnoreSpec.from_lines(lines)
    except ValueError as error:
        raise PatcherError(f"{IGNORE}: {error}", "correct the pattern; gitignore(5) says what there is") from None


def _lenient(lines: Iterable[str]) -> GitIgnoreSpec:
    """Read a .gitignore as git does: a pattern that is none matches nothing."""
    found = GitIgnoreSpec.from_lines(())
    for line in lines:
        with suppress(ValueError):
            found += GitIgnoreSpec.from_lines([line])
    return found


def _says(spec: GitIgnoreSpec, path: Path, directory: bool) -> bool | None:
    """Return whether a path is ignored, None when nothing is said about it."""
    name, above = f"{path}/" if directory else str(path), f"{path.parent}/" if path.parent.name else ""
    for pattern in reversed(tuple(spec.patterns)):
        # what matches the directory above as well says something about that one
        if pattern.include is not None and pattern.match_file(name) and not pattern.match_file(above):
            return pattern.include
    return None
