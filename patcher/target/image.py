"""Images: by which path the very file that is mapped can be read.

Decides which of the kernel's views of a mapped file we may use. Never returns a file that merely has the same
name: a program rebuilt while it runs is another file. Specification: proc_pid_map_files(5), proc_pid_exe(5).
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from patcher.errors import ObjectError
from patcher.target.maps import Mapping, read_mappings


def find_image(pid: int, mapping: Mapping) -> Path:
    """Return a path, in our namespace, by which the file behind `mapping` can be opened.

    Raises ObjectError when the mapping has no file or when there is no way to it left.
    """
    if not mapping.inode or not mapping.path:
        raise ObjectError(f"{mapping.path or 'anonymous memory'} at {mapping.start:#x} is not mapped from a file")
    # The kernel opens the mapped file itself here; inode numbers need no comparison (and on some file systems
    # stat and maps disagree about them).
    direct = Path(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}")
    if _openable(direct):
        return direct
    for candidate in (Path(f"/proc/{pid}/root{mapping.path}"), Path(f"/proc/{pid}/exe")):
        if _openable(candidate) and _is_file_of(candidate, mapping):
            return candidate
    raise ObjectError(
        f"the file mapped at {mapping.start:#x} in process {pid}, {mapping.path}, can no longer be read"
        + (": it was deleted" if mapping.deleted else ": another file has its name, or we may not read it"),
        "restart the program, or run patcher as root, which may read replaced files through /proc/<pid>/map_files",
    )


def time_written(pid: int, mapping: Mapping) -> int:
    """Return when the very file behind a mapping was written last (st_mtime in ns), 0 where that is not to be known.

    A file's number may be given to another one as soon as it is gone, as with a library that is built again.
    """
    try:
        return os.stat(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}").st_mtime_ns
    except OSError:
        pass
    try:
        found = os.stat(f"/proc/{pid}/root{mapping.path}")
    except OSError:
        return 0
    return found.st_mtime_ns if found.st_ino == mapping.inode else 0


def _openable(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def _is_file_of(path: Path, mapping: Mapping) -> bool:
    # Comparing with stat is wrong on btrfs and overlayfs, whose maps show other numbers; so the candidate is
    # mapped here and our own maps are compared with the target's.
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 1, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE),
            open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps,
        ):
            return any((m.device, m.inode) == (mapping.device, mapping.inode) for m in read_mappings(maps))
    except (OSError, ValueError):
        return False
