"""Fetch source packages with the machine's own package tools: Debian's without its patches, and Python's.

Decides where they are kept and asks apt for them; it names no host: the private source list is made from the
machine's own apt configuration, with `deb-src` in place of `deb` (sources.list(5), apt-get(8), dpkg-source(1)); Python
packages come through pip as it is set up.
Nothing of the packages enters the repository. It builds nothing.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

APT_CONFIGURATION = Path("/etc/apt")


class SourcesUnavailable(Exception):
    """A source package could not be had; the message is what the package tools said."""


def cache_directory() -> Path:
    """Name the directory that outlives a run: PATCHER_REAL_CACHE, else one below the user's cache directory."""
    chosen = os.environ.get("PATCHER_REAL_CACHE")
    if chosen:
        return Path(chosen).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patcher" / "real"


def fetch(package: str, cache_dir: Path) -> Path:
    """Return the unpacked source tree of a Debian source package, upstream's code without Debian's patches.

    The patches lie in its `debian/patches`. What is in `cache_dir` already is not fetched again. The tree is to be
    read, not edited: copy it. Raises SourcesUnavailable.
    """
    tree = cache_dir / "pristine" / package
    if tree.is_dir():
        return tree
    description = _download(package, cache_dir)
    unpacked = tree.with_name(f"{package}.unpacking")
    shutil.rmtree(unpacked, ignore_errors=True)
    unpacked.parent.mkdir(parents=True, exist_ok=True)
    _run(["dpkg-source", "-x", "--skip-patches", str(description), str(unpacked)], unpacked.parent)
    unpacked.rename(tree)  # last, so that an interrupted run leaves no half tree behind that name
    return tree


def fetch_python(package: str, within: str, cache_dir: Path) -> Path:
    """Return one folder of the source distribution of a Python package, given with its version: `name==1.0`.

    Nothing of it is installed. As with `fetch`, the tree is to be read, not edited. Raises SourcesUnavailable.
    """
    tree = cache_dir / "pristine" / package.replace("==", "-")
    if not tree.is_dir():
        directory = cache_dir / "downloads" / tree.name
        directory.mkdir(parents=True, exist_ok=True)
        unpacked = directory / "unpacking"
        shutil.rmtree(unpacked, ignore_errors=True)
        if not list(directory.glob("*.tar.gz")):
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", package]
            _run(pip, directory)
        with tarfile.open(next(directory.glob("*.tar.gz"))) as archive:
            archive.extractall(unpacked, filter="data")
        tree.parent.mkdir(parents=True, exist_ok=True)
        (unpacked / tree.name / within).rename(tree)
        shutil.rmtree(unpacked)
    return tree


def _download(package: str, cache_dir: Path) -> Path:
    directory = cache_dir / "downloads" / package
    directory.mkdir(parents=True, exist_ok=True)
    if not list(directory.glob("*.dsc")):
        options, complaints = _updated_lists(cache_dir)
        try:
            _download_any(package, options, directory)
        except SourcesUnavailable as error:
            raise SourcesUnavailable(f"{error}\napt-get update had said:\n{complaints}") from None
    descriptions = list(directory.glob("*.dsc"))
    if len(descriptions) != 1:
        raise SourcesUnavailable(f"{directory} holds {len(descriptions)} .dsc files, not one; remove it and try again")
    return descriptions[0]


def _download_any(package: str, options: tuple[str, ...], directory: Path) -> None:
    """Download the newest version; or an older one, where a mirror lists what it no longer has."""
    listed = subprocess.run(["apt-cache", *options, "showsrc", package], capture_output=True, text=True, check=False)
    versions = re.findall(r"(?m)^Version: (\S+)$", listed.stdout)
    refused: SourcesUnavailable | None = None
    for name in (package, *(f"{package}={version}" for version in versions)):
        try:
            # apt verifies the checksums against the signed lists.
            return _run(["apt-get", *options, "source", "--download-only", name], directory)
        except SourcesUnavailable as error:
            refused = refused or error
            for partial in directory.iterdir():
                partial.unlink()
    raise refused or SourcesUnavailable(f"apt knows no source package {package}")


@functools.cache
def _updated_lists(cache_dir: Path) -> tuple[tuple[str, ...], str]:
    """Fetch the package lists into a private directory; return the apt options that use them, and apt's complaints."""
    apt = cache_dir / "apt"
    for directory in ("sources", "lists/partial", "cache/archives/partial"):
        (apt / directory).mkdir(parents=True, exist_ok=True)
    if not _write_source_lists(apt / "sources"):
        raise SourcesUnavailable(f"{APT_CONFIGURATION} configures no package source")
    settings = {
        "Dir::Etc::sourcelist": "/dev/null",
        "Dir::Etc::sourceparts": apt / "sources",
        "Dir::State::Lists": apt / "lists",
        "Dir::Cache": apt / "cache",
        "Acquire::Languages": "none",
        "Acquire::Retries": "2",
        "Acquire::http::Timeout": "30",
        "Acquire::https::Timeout": "30",
    }
    options = tuple(part for name, value in settings.items() for part in ("-o", f"{name}={value}"))
    # A repository without sources fails the update as a whole; whether it mattered, the download itself will say.
    update = ["apt-get", *options, "update", "-qq"]
    try:
        done = subprocess.run(update, capture_output=True, text=True, timeout=300, check=False)
    except FileNotFoundError as error:
        raise SourcesUnavailable("apt-get is not installed: the package apt") from error
    return options, done.stderr


def _write_source_lists(directory: Path) -> int:
    shutil.rmtree(directory)
    directory.mkdir()
    parts = APT_CONFIGURATION / "sources.list.d"
    configured = [APT_CONFIGURATION / "sources.list", *sorted(parts.glob("*.list")), *sorted(parts.glob("*.sources"))]
    written = 0
    for file in filter(Path.is_file, configured):
        text = file.read_text()
        if file.suffix == ".sources":
            text = re.sub(r"(?mi)^Types:.*$", "Types: deb-src", text)
        else:
            text = re.sub(r"(?m)^\s*deb\s", "deb-src ", text)
        (directory / file.name).write_text(text)
        written += 1
    return written


def _run(command: list[str], directory: Path) -> None:
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=600, check=False)
    except FileNotFoundError as error:
        raise SourcesUnavailable(f"{command[0]} is not installed: packages apt and dpkg-dev") from error
    if done.returncode != 0:
        raise SourcesUnavailable(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout}{done.stderr}")
