"""A redis client over a Unix socket: RESP2, one command at a time (the redis protocol specification)."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Word = str | bytes | int


class ErrorReply(str):
    """An error that the server answered with; answered, not raised, so that a probe can look at it."""

    __slots__ = ()


Reply = bytes | int | list[Any] | ErrorReply | None


class RedisClient:
    """One connection."""

    def __init__(self, path: Path, *, seconds: float = 20) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(seconds)
        try:
            self.socket.connect(str(path))
        except OSError:
            self.socket.close()
            raise
        self._stream = self.socket.makefile("rb")

    def __enter__(self) -> RedisClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stream.close()
        self.socket.close()

    def __call__(self, *words: Word) -> Reply:
        """Send a command and return its reply."""
        self.send([words])
        return self.reply()

    def send(self, commands: Iterable[tuple[Word, ...]]) -> None:
        """Send commands in one piece, reading no reply."""
        self.socket.sendall(b"".join(encoded(command) for command in commands))

    def line(self) -> bytes:
        """Read one line as it stands on the wire; raises ConnectionError when the server has closed."""
        line = self._stream.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("the server closed the connection")
        return line

    def reply(self) -> Reply:
        """Read one reply."""
        line = self.line()
        kind, rest = line[:1], line[1:-2]
        match kind:
            case b"+":
                return rest
            case b"-":
                return ErrorReply(rest.decode(errors="replace"))
            case b":":
                return int(rest)
            case b"$":
                return None if int(rest) < 0 else self._stream.read(int(rest) + 2)[:-2]
            case b"*":
                return None if int(rest) < 0 else [self.reply() for _ in range(int(rest))]
        raise ConnectionError(f"not RESP2: {line!r}")


def encoded(words: tuple[Word, ...]) -> bytes:
    """Encode a command as RESP does: an array of bulk strings."""
    parts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
