"""What the legs are sent: the client's own bytes and the added members."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.errors import RequestError
from pointsman.daemon.pd.bodies import (
    NIXL_ASKS,
    OURS,
    Shape,
    bootstrap_members,
    decode_body,
    engine_id,
    mooncake_asks,
    mooncake_tells,
    prefill_body,
    shape_of,
    told_params,
    with_members,
)

WHITE = st.text(" \t\r\n", max_size=3)
VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text().filter(lambda name: name not in OURS), VALUES, max_size=5)


@given(OBJECTS, WHITE, WHITE, WHITE, st.sampled_from([None, 1, "\t"]))
def test_only_members_are_added(document: dict[str, Any], before: str, inside: str, after: str, indent: Any) -> None:
    inner = json.dumps(document, indent=indent, ensure_ascii=False)
    body = f"{before}{inner[:-1]}{inside}}}{after}".encode("utf-8", "surrogatepass")
    added = bootstrap_members("10.0.0.1", None, [7], Shape())
    found = with_members(body, added)
    assert json.loads(found) == {**document, **dict(added)}
    more = len(found) - len(body)
    assert any(
        found[:i] + found[i + more :] == body and found[i : i + more].lstrip(b",").startswith(b'"bootstrap_host":')
        for i in range(len(body))
    )


def test_the_exact_bytes() -> None:
    body = b' {"text": "a\\u00e9",  "x": 1.50 ,"y":1e3 }\n'
    rooms = bootstrap_members("::1", 8998, [2**63 - 1], Shape())
    assert with_members(body, rooms) == (
        b' {"text": "a\\u00e9",  "x": 1.50 ,"y":1e3,'
        b'"bootstrap_host":"::1","bootstrap_port":8998,"bootstrap_room":9223372036854775807 }\n'
    )
    assert with_members(b"{ }", [("a", 1)]) == b'{"a":1 }'
    assert with_members(b"{}", []) == b"{}"


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ({"text": "a"}, Shape()),
        ({"text": ["a"]}, Shape(1)),
        ({"text": ["a", "b", "c"]}, Shape(3)),
        ({"input_ids": [1, 2, 3]}, Shape()),
        ({"input_ids": [[1, 2], [3]]}, Shape(2)),
        ({"prompt": ["a", "b"]}, Shape(2)),
        ({"prompt": [5, 6]}, Shape()),
        ({"prompt": "a", "n": 1}, Shape()),
        ({"messages": [{"content": "a"}], "n": 4}, Shape(4, 4)),
        ({"prompt": ["a", "b"], "n": 2}, Shape(4, 2)),
        ({"text": "a", "sampling_params": {"n": 3}}, Shape(3, 3)),
        ({"text": ["a", "b"], "sampling_params": [{"n": 3}, {}]}, Shape(2)),
        ({"text": "a", "return_logprob": True}, Shape(None, 1, True)),
        ({"n": True}, Shape()),
        ({"n": "2"}, Shape()),
        ({"n": 0, "text": []}, Shape()),
    ],
)
def test_how_many_sequences(body: dict[str, Any], shape: Shape) -> None:
    assert shape_of(json.dumps(body).encode()) == shape


def test_a_batch_has_lists() -> None:
    members = dict(bootstrap_members("h", 5, [1, 2], Shape(2)))
    assert members == {"bootstrap_host": ["h", "h"], "bootstrap_port": [5, 5], "bootstrap_room": [1, 2]}
    assert dict(bootstrap_members("h", 5, [1], Shape(1)))["bootstrap_room"] == [1]


@pytest.mark.parametrize("name", OURS)
def test_members_of_ours_are_refused(name: str) -> None:
    """A client that could name the host would have decode connect to it."""
    with pytest.raises(RequestError) as refused:
        shape_of(json.dumps({"text": "a", name: None}).encode())
    assert refused.value.status == 400
    assert refused.value.param == name


def test_too_many_sequences() -> None:
    with pytest.raises(RequestError, match="more than 4096"):
        shape_of(json.dumps({"prompt": ["a"] * 1000, "n": 5}).encode())


def test_prefill_generates_one_token() -> None:
    body = (
        b'{"model":"m","stream":true,"stream_options":{"include_usage":true},"max_completion_tokens":50,"n":1,"x":1.50}'
    )
    found = prefill_body(body, NIXL_ASKS)
    assert b'"x":1.50' in found
    assert json.loads(found) == {
        "model": "m",
        "stream": False,
        "max_tokens": 1,
        "max_completion_tokens": 1,
        "n": 1,
        "x": 1.5,
        "kv_transfer_params": NIXL_ASKS,
    }
    assert "min_tokens" not in json.loads(prefill_body(b'{"min_tokens":5}', mooncake_asks("xfer-1")))


def test_parameters_pass_as_they_stand() -> None:
    told = told_params(b'{"id":"1","kv_transfer_params": {"remote_block_ids": [[5, 6]],"x":1.50} }')
    assert told == b'{"remote_block_ids": [[5, 6]],"x":1.50}'
    assert decode_body(b'{"a":1}', told) == (b'{"a":1,"kv_transfer_params":{"remote_block_ids": [[5, 6]],"x":1.50}}')


@pytest.mark.parametrize(
    "answer", [b"", b"{", b"{}", b'{"kv_transfer_params":null}', b'{"kv_transfer_params":[1]}', b"\xff"]
)
def test_an_answer_without_parameters(answer: bytes) -> None:
    assert told_params(answer) is None


def test_mooncake() -> None:
    assert engine_id(b'{"remote_engine_id":"e"}') == "e"
    assert engine_id(b"{}") is None
    assert engine_id(None) is None
    tells = mooncake_tells("xfer-1", "e", "http://h:5")
    assert tells["transfer_id"] == mooncake_asks("xfer-1")["transfer_id"]
    assert tells["remote_bootstrap_addr"] == "http://h:5"
