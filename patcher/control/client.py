"""The other end: one connection to a watch, for a command."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from typing import Any

from patcher.control import place
from patcher.control.place import NoControl
from patcher.control.protocol import FAILED, request
from patcher.errors import PatcherError


class Connection:
    """Asks a watch, and hears what it tells. To be used from one thread."""

    def __init__(self, pid: int) -> None:
        """Connect to the watch of a process. Raises `NoControl`."""
        self._socket = _found(pid)
        self._data = b""
        self._asked = 0
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def ask(self, method: str, parameters: object = None) -> int:
        """Send a request, and return the id of its answer."""
        self._asked += 1
        try:
            self._socket.sendall(request(self._asked, method, parameters))
        except OSError:
            raise _ended() from None
        return self._asked

    def call(self, method: str, parameters: object = None) -> Any:
        """Ask for something and return the result. Raises PatcherError with what is answered instead."""
        identity = self.ask(method, parameters)
        for message in self.messages():
            if message.get("method") == "event":
                self._events.append(message["params"])
            elif message.get("id") == identity or "error" in message:
                return result_of(message)
        raise _ended()

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield events, once they are subscribed to, until the watch ends."""
        while self._events:
            yield self._events.pop(0)
        for message in self.messages():
            if message.get("method") == "event":
                yield message["params"]

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield what is said, as it comes, until the watch ends."""
        while True:
            yield from self.ready()
            if not self.receive():
                return

    def receive(self) -> bool:
        """Wait for something to be said; return False at the end."""
        try:
            part = self._socket.recv(1 << 16)
        except ConnectionResetError:
            part = b""
        self._data += part
        return bool(part)

    def ready(self) -> Iterator[dict[str, Any]]:
        """Yield what was said in full, without waiting."""
        while b"\n" in self._data:
            line, _, self._data = self._data.partition(b"\n")
            try:
                yield json.loads(line)
            except ValueError:
                raise NoControl("what listens there speaks something else", "is it a patcher?") from None


def result_of(message: dict[str, Any]) -> Any:
    """Return an answer's result. Raises PatcherError with what is answered instead."""
    if "error" not in message:
        return message["result"]
    error = message["error"]
    data = error.get("data", {})
    code = data.get("reason", "") if error["code"] == FAILED else "protocol"
    raise PatcherError(error["message"], data.get("hint", ""), code=code)


def _ended() -> NoControl:
    return NoControl("the watch ended", "start another one with `patcher attach PID --watch PATH`")


def _found(pid: int) -> socket.socket:
    owners = {os.geteuid(), 0, _owner(pid)}
    for where in [*place.places(os.geteuid()), *place.places(_owner(pid))]:
        try:
            directory = place.opened(where, owners)
        except NoControl:
            continue
        try:
            connection = place.connected(directory, pid)
        except OSError:
            continue
        finally:
            os.close(directory)
        if place.peer(connection) in owners:
            return connection
        connection.close()
    raise NoControl(
        f"nobody watches process {pid}, as far as you can see",
        f"`patcher attach {pid} --watch PATH` does; its user's XDG_RUNTIME_DIR has to be yours",
    )


def _owner(pid: int) -> int:
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return os.geteuid()
