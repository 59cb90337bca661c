"""Where control sockets are: a directory that is the user's alone, PID.sock for the process PID.

`$XDG_RUNTIME_DIR/patcher`; where that is not set `/run/user/UID/patcher`, and where there is none `/tmp/patcher-UID`.
Names are used through the directory's descriptor: the address of a socket has room for 107 bytes (unix(7)).
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from patcher.errors import PatcherError

_BACKLOG = 128  # connections that are not accepted yet; a client that does not wait is turned away beyond
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class NoControl(PatcherError):
    """There is no control socket, or it is not to be trusted."""

    code = "no-control"


def places(uid: int) -> Iterator[Path]:
    """Yield where the sockets of a user may be, best first."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/"):
        yield Path(runtime) / "patcher"
    if Path(f"/run/user/{uid}").is_dir():
        yield Path(f"/run/user/{uid}/patcher")
    yield Path(f"/tmp/patcher-{uid}")


def made(place: Path) -> int:
    """Open our own directory for sockets, made where it is not there, and return its descriptor."""
    try:
        place.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise NoControl(f"{place}: {error.strerror}", "set XDG_RUNTIME_DIR to a directory of yours") from None
    directory = opened(place, {os.geteuid()})
    os.fchmod(directory, 0o700)
    return directory


def opened(place: Path, owners: set[int]) -> int:
    """Open a directory for sockets, which one of `owners` has to own."""
    try:
        directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise NoControl(f"{place}: {error.strerror}", "set XDG_RUNTIME_DIR to a directory of yours") from None
    status = os.fstat(directory)
    if status.st_uid not in owners or stat.S_IMODE(status.st_mode) & 0o022:
        os.close(directory)
        raise NoControl(f"{place}: others can write to it", "remove it, or set XDG_RUNTIME_DIR to a directory of yours")
    return directory


def connected(directory: int, pid: int) -> socket.socket:
    """Connect to the socket for a process. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.connect(_address(directory, pid))
    except OSError:
        connection.close()
        raise
    return connection


def listening(directory: int, pid: int) -> socket.socket:
    """Listen for a process, in place of a watch that is gone. Raises NoControl where another watch is there."""
    try:
        connected(directory, pid).close()
    except FileNotFoundError:
        pass
    except OSError:  # nobody listens there any more
        removed(directory, pid)
    else:
        raise NoControl(f"process {pid} is watched by another patcher as well", "ask that one")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    os.fchmod(listener.fileno(), 0o600)  # before it has a name: bind keeps to it
    listener.bind(_address(directory, pid))
    os.chmod(f"{pid}.sock", 0o600, dir_fd=directory)
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


def removed(directory: int, pid: int) -> None:
    """Remove the socket for a process."""
    try:
        os.unlink(f"{pid}.sock", dir_fd=directory)
    except FileNotFoundError:
        return


def peer(connection: socket.socket) -> int:
    """Return the user at the other end."""
    _, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(uid)


def _address(directory: int, pid: int) -> str:
    return f"/proc/self/fd/{directory}/{pid}.sock"
