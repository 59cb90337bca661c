"""JSON-RPC 2.0 by line: what a line means, and what is answered. The examples are the specification's."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patcher.control.protocol import BATCH_LIMIT, Call, Fault, Identity, Method, answer, read, too_long, written


def replied(line: str | bytes) -> Any:
    """Return what is answered when every method answers with its parameters."""
    message = read(line if isinstance(line, bytes) else line.encode())
    answers = [answer(p, p if isinstance(p, Fault) else dict(p.parameters)) for p in message.parts]
    said = written(answers, message.batch)
    assert said == b"" or (said.endswith(b"\n") and said.count(b"\n") == 1)
    return json.loads(said) if said else None


def call(method: str, **more: object) -> str:
    return json.dumps({"jsonrpc": "2.0", "method": method, **more})


def code(reply: dict[str, Any]) -> tuple[int, object]:
    assert reply.keys() == {"jsonrpc", "error", "id"}
    assert reply["jsonrpc"] == "2.0"
    return reply["error"]["code"], reply["id"]


@pytest.mark.parametrize("identity", [0, 7, "seven", 1.5, None])
def test_a_request_is_answered_with_its_id(identity):
    assert replied(call("status", id=identity)) == {"jsonrpc": "2.0", "id": identity, "result": {}}


def test_a_notification_is_not_answered_whatever_is_wrong_with_it():
    assert replied(call("pause")) is None
    assert replied(call("no such method")) is None
    assert replied(call("revert", params=["x"])) is None
    (part,) = read(call("pause").encode()).parts
    assert part == Call(Method.PAUSE, {}, None)


@pytest.mark.parametrize(
    "line",
    ["{", "", "nonsense", '{"jsonrpc": "2.0", "method": "status", "params": [', "[" * 60000, "9" * 60000, b"\xff"],
)
def test_what_is_no_json(line):
    assert code(replied(line)) == (-32700, None)


@pytest.mark.parametrize(
    ("line", "identity"),
    [
        ("1", None),
        ('"status"', None),
        ("[]", None),
        ('{"jsonrpc": "2.0", "method": 1, "params": "bar"}', None),
        ('{"method": "status", "id": 4}', 4),
        ('{"jsonrpc": "1.0", "method": "status", "id": 4}', 4),
        ('{"jsonrpc": "2.0", "method": "status", "params": "bar", "id": 4}', 4),
        ('{"jsonrpc": "2.0", "method": "status", "id": {}}', None),
        ('{"jsonrpc": "2.0", "method": "status", "id": true}', None),
        ('{"jsonrpc": "2.0", "id": 5}', 5),
    ],
)
def test_what_is_no_request(line, identity):
    assert code(replied(line)) == (-32600, identity)


def test_a_method_that_is_not_there():
    assert code(replied(call("foobar", id="1"))) == (-32601, "1")


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("revert", {"generation": -1}),
        ("revert", {"generation": "1"}),
        ("revert", {"generation": True}),
        ("revert", {"generation": 1 << 31}),
        ("revert", [1, 2]),
        ("apply", {"files": "a.c"}),
        ("apply", {"files": [1]}),
        ("apply", {"files": ["a\0b"]}),
        ("apply", {"file": ["a.c"]}),
        ("subscribe", {"events": [""]}),
        ("pause", [1]),
    ],
)
def test_parameters_that_a_method_does_not_take(method, params):
    assert code(replied(call(method, params=params, id=1))) == (-32602, 1)


@pytest.mark.parametrize("params", [[2], {"generation": 2}])
def test_parameters_are_given_by_place_or_by_name(params):
    assert replied(call("revert", params=params, id=1))["result"] == {"generation": 2}


def test_a_batch_is_answered_as_one_without_its_notifications():
    batch = f'[{call("status", id=1)}, {call("pause")}, 1, {call("foobar", id=5)}, {{"foo": "boo"}}]'
    answers = replied(batch)
    assert [a["id"] for a in answers] == [1, None, 5, None]
    assert [a.get("error", {}).get("code") for a in answers] == [None, -32600, -32601, -32600]
    assert replied("[1]") == [
        {"jsonrpc": "2.0", "id": None, "error": {"code": -32600, "message": "a message is an object"}}
    ]
    assert replied(f"[{call('pause')}, {call('resume')}]") is None
    assert code(replied("[" + ",".join(["1"] * (BATCH_LIMIT + 1)) + "]")) == (-32600, None)


def test_a_fault_of_a_method_has_its_data():
    part = Call(Method.APPLY, {}, Identity(3))
    assert answer(part, Fault(-32000, "no", {"reason": "layout"})) == {
        "jsonrpc": "2.0",
        "id": 3,
        "error": {"code": -32000, "message": "no", "data": {"reason": "layout"}},
    }
    assert [p.code for p in too_long().parts if isinstance(p, Fault)] == [-32700]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
MESSAGES = st.fixed_dictionaries(
    {"jsonrpc": st.sampled_from(["2.0", "1", 2])},
    optional={"method": st.sampled_from([m.value for m in Method]) | JSON, "params": JSON, "id": JSON},
)


@given(
    st.binary() | JSON.map(lambda v: json.dumps(v).encode()) | st.lists(MESSAGES).map(lambda v: json.dumps(v).encode())
)
def test_any_line_has_a_meaning(line):
    for part in read(line).parts:
        reply = answer(part, None)
        assert reply is None or reply.keys() & {"result", "error"}
