"""PURE: what is said on the control socket: JSON-RPC 2.0, a message a line.

Decides what a line means, which methods there are and what they take, and how answers are written; does nothing of it.
Specification: JSON-RPC 2.0 (batches, notifications, error codes); a line is at most `LINE_LIMIT` bytes long.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patcher.errors import PatcherError

LINE_LIMIT = 1 << 16  # bytes
BATCH_LIMIT = 64  # messages

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
FAILED = -32000  # a method of ours was refused, or failed: `data` has its reason and hint


class Method(enum.Enum):
    """What can be asked of a watch."""

    APPLY = "apply"
    PAUSE = "pause"
    RESUME = "resume"
    REVERT = "revert"
    STATUS = "status"
    SUBSCRIBE = "subscribe"


# The parameters of each, in their order: none is required.
PARAMETERS: dict[Method, dict[str, str]] = {
    Method.APPLY: {"files": "a list of paths"},
    Method.PAUSE: {},
    Method.RESUME: {},
    Method.REVERT: {"generation": "a number from 0"},
    Method.STATUS: {},
    Method.SUBSCRIBE: {"events": "a list of names of events"},
}


@dataclass(frozen=True, slots=True)
class Identity:
    """The `id` of a request: whose answer it is."""

    value: str | int | float | None


@dataclass(frozen=True, slots=True)
class Call:
    """A method to be called; without an identity it is a notification, which is not answered."""

    method: Method
    parameters: Mapping[str, Any]
    identity: Identity | None


@dataclass(frozen=True, slots=True)
class Fault:
    """What is answered in place of a result."""

    code: int
    message: str
    data: Mapping[str, Any] | None = None
    identity: Identity | None = Identity(None)

    @classmethod
    def of(cls, error: PatcherError, **more: object) -> Fault:
        """Return what is answered when a method raised an error."""
        return cls(FAILED, error.message, {"reason": error.code, "hint": error.hint, **more})


@dataclass(frozen=True, slots=True)
class Message:
    """What a line says: calls, and the faults of what is none, in their order."""

    parts: tuple[Call | Fault, ...]
    batch: bool = False


def read(line: bytes) -> Message:
    """Return what a line says; whatever it is, this raises nothing."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Message((Fault(PARSE_ERROR, f"no JSON: {_brief(error)}"),))
    if not isinstance(found, list):
        return Message((_call(found),))
    if not found or len(found) > BATCH_LIMIT:
        return Message((Fault(INVALID_REQUEST, f"a batch has 1 to {BATCH_LIMIT} messages, not {len(found)}"),))
    return Message(tuple(_call(one) for one in found), batch=True)


def too_long() -> Message:
    """Return what is made of a line that does not end."""
    return Message((Fault(PARSE_ERROR, f"a line has at most {LINE_LIMIT} bytes"),))


def answer(part: Call | Fault, outcome: Any) -> dict[str, Any] | None:
    """Return the answer to a part of a message; None where there is none. `outcome` may be a Fault."""
    identity = part.identity
    if identity is None:
        return None
    start = {"jsonrpc": "2.0", "id": identity.value}
    if not isinstance(outcome, Fault):
        return {**start, "result": outcome}
    error: dict[str, Any] = {"code": outcome.code, "message": outcome.message}
    if outcome.data is not None:
        error["data"] = dict(outcome.data)
    return {**start, "error": error}


def written(answers: Sequence[Mapping[str, Any] | None], batch: bool) -> bytes:
    """Return the line that answers a message; nothing where all of it were notifications."""
    said = [one for one in answers if one is not None]
    if not said:
        return b""
    return line_of(said if batch else said[0])


def notification(method: str, parameters: Mapping[str, Any]) -> bytes:
    """Return the line that tells of an event."""
    return line_of({"jsonrpc": "2.0", "method": method, "params": parameters})


def request(identity: int, method: str, parameters: object) -> bytes:
    """Return the line that asks for something."""
    asked: dict[str, Any] = {"jsonrpc": "2.0", "id": identity, "method": method}
    return line_of({**asked, "params": parameters} if parameters else asked)


def line_of(message: object) -> bytes:
    """Return a message as a line."""
    return json.dumps(message).encode() + b"\n"


def _brief(error: Exception) -> str:
    return "too deeply nested" if isinstance(error, RecursionError) else str(error)[:200]


def _call(found: object) -> Call | Fault:
    if not isinstance(found, dict):
        return Fault(INVALID_REQUEST, "a message is an object")
    value = found.get("id")
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        return Fault(INVALID_REQUEST, "`id` is a string, a number or null")
    identity = Identity(value) if "id" in found else None
    if found.get("jsonrpc") != "2.0" or not isinstance(found.get("method"), str):
        return Fault(INVALID_REQUEST, '`jsonrpc` is "2.0", and `method` a string', identity=Identity(value))
    parameters = found.get("params", {})
    if not isinstance(parameters, dict | list):
        return Fault(INVALID_REQUEST, "`params` is an object or an array", identity=Identity(value))
    try:
        method = Method(found["method"])
    except ValueError:
        known = ", ".join(m.value for m in Method)
        return Fault(METHOD_NOT_FOUND, f"no method {found['method'][:80]!r}; there are {known}", identity=identity)
    wrong, named = _named(method, parameters)
    return Fault(INVALID_PARAMS, wrong, identity=identity) if wrong else Call(method, named, identity)


def _named(method: Method, given: dict[str, Any] | list[Any]) -> tuple[str, dict[str, Any]]:
    """Return what is wrong with parameters, and them by their names."""
    known = PARAMETERS[method]
    if isinstance(given, list):
        if len(given) > len(known):
            return f"{method.value} takes {len(known)} parameters, not {len(given)}", {}
        given = dict(zip(known, given, strict=False))
    for name, value in given.items():
        if name not in known:
            return f"{method.value} has no parameter {name[:80]!r}", {}
        if value is not None and not _VALID[known[name]](value):
            return f"`{name}` is {known[name]}", {}
    return "", {name: value for name, value in given.items() if value is not None}


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) and one and "\0" not in one for one in value)


def _is_generation(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


_VALID = {
    "a list of paths": _is_texts,
    "a list of names of events": _is_texts,
    "a number from 0": _is_generation,
}
