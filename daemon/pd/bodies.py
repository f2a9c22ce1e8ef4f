"""What the two legs of a request are sent, made from the bytes that the client sent.

Members are added behind the last one of the JSON object, and nothing else of it is touched: not a number is written
anew. Only vLLM's prefill leg, which must generate a single token, has members replaced; their neighbours' values stand
as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import orjson
from msgspec import UNSET, Raw, UnsetType

from pointsman.daemon.errors import bad_request

BOOTSTRAP_KEYS = ("bootstrap_host", "bootstrap_port", "bootstrap_room")
TRANSFER_KEY = "kv_transfer_params"
OURS = (*BOOTSTRAP_KEYS, TRANSFER_KEY)
MAX_TRANSFERS = 4096
"""of one request: prompts times answers to each"""

_WHITE = b" \t\r\n"
_decode_raws = msgspec.json.Decoder(list[Raw]).decode
_decode_members = msgspec.json.Decoder(dict[str, Raw]).decode

Member = tuple[str, object]


class _Sampling(msgspec.Struct, gc=False):
    n: object = None


class _Asked(msgspec.Struct, gc=False):
    text: Raw | UnsetType = UNSET
    input_ids: Raw | UnsetType = UNSET
    prompt: Raw | UnsetType = UNSET
    n: object = None
    sampling_params: Raw | UnsetType = UNSET
    return_logprob: object = False
    bootstrap_host: Raw | UnsetType = UNSET
    bootstrap_port: Raw | UnsetType = UNSET
    bootstrap_room: Raw | UnsetType = UNSET
    kv_transfer_params: Raw | UnsetType = UNSET


class Shape(msgspec.Struct, frozen=True):
    """How many sequences a request asks for."""

    transfers: int | None = None
    """None: one prompt, one answer. Otherwise engines expect lists of so many members, one included."""
    answers: int = 1
    """to each prompt (`n`)"""
    wants_input_logprobs: bool = False


_decode_asked = msgspec.json.Decoder(_Asked).decode
_decode_sampling = msgspec.json.Decoder(_Sampling).decode


def shape_of(body: bytes) -> Shape:
    """`body` is a JSON object. Raises RequestError 400 when it has members that are ours to add."""
    asked = _decode_asked(body)
    for name in OURS:
        if getattr(asked, name) is not UNSET:
            message = f"{name} is set by the gateway, which pairs the workers; leave it out"
            raise bad_request(message, code="reserved_member", param=name)
    prompts = next((count for count in map(_list_length, (asked.text, asked.input_ids, asked.prompt)) if count), None)
    answers = _count(asked.n) or _count(_sampling_n(asked.sampling_params)) or 1
    transfers = None if prompts is None and answers == 1 else (prompts or 1) * answers
    if transfers is not None and transfers > MAX_TRANSFERS:
        raise bad_request(f"{transfers} sequences in one request are more than {MAX_TRANSFERS}", code="batch_too_large")
    return Shape(transfers, answers, asked.return_logprob is True)


def _list_length(value: Raw | UnsetType) -> int | None:
    """Of a list of prompts; None: it is one prompt (text, or a list of token ids)."""
    if value is UNSET or memoryview(value)[0] != 0x5B:
        return None
    items = _decode_raws(value)
    is_ids = bool(items) and memoryview(items[0])[0] not in b'["{'
    return None if is_ids or not items else len(items)


def _sampling_n(value: Raw | UnsetType) -> object:
    if value is UNSET:
        return None
    try:
        return _decode_sampling(value).n
    except msgspec.MsgspecError:
        return None  # the engine will say what it thinks of it


def _count(n: object) -> int | None:
    return n if isinstance(n, int) and not isinstance(n, bool) and n > 0 else None


def with_members(body: bytes, members: Iterable[Member]) -> bytes:
    """`body`, a JSON object, with more members; its own bytes stay as they are."""
    end = len(body)
    while body[end - 1] in _WHITE:
        end -= 1
    end -= 1  # the closing brace
    last = end
    while body[last - 1] in _WHITE:
        last -= 1
    added = b",".join(orjson.dumps(name) + b":" + orjson.dumps(value) for name, value in members)
    comma = b"" if body[last - 1] == 0x7B or not added else b","
    return b"".join((body[:last], comma, added, body[last:]))


# --- SGLang


def bootstrap_members(host: str, port: int | None, rooms: Sequence[int], shape: Shape) -> list[Member]:
    """One room for each transfer; `port` None: the prefill worker has no bootstrap server of its own."""
    if shape.transfers is None:
        return list(zip(BOOTSTRAP_KEYS, (host, port, rooms[0]), strict=True))
    lists = ([host] * shape.transfers, [port] * shape.transfers, list(rooms))
    return list(zip(BOOTSTRAP_KEYS, lists, strict=True))


# --- vLLM

NIXL_ASKS: dict[str, object] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
_DROPPED = ("stream_options", "min_tokens", "min_completion_tokens")
_ONE = Raw(b"1")


def mooncake_asks(transfer_id: str) -> dict[str, object]:
    return {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id}


def mooncake_tells(transfer_id: str, engine_id: str | None, address: str) -> dict[str, object]:
    """For decode. `address`: of the prefill worker's bootstrap server, http://host:port."""
    return {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "transfer_id": transfer_id,
        "remote_engine_id": engine_id,
        "remote_bootstrap_addr": address,
    }


def prefill_body(body: bytes, params: dict[str, object]) -> bytes:
    """The request for the prefill leg: the same prompt, one token, no stream."""
    members = _decode_members(body)
    for name in _DROPPED:
        members.pop(name, None)
    members["stream"] = Raw(b"false")
    members["max_tokens"] = _ONE
    for name in ("max_completion_tokens", "max_output_tokens", "n"):
        if name in members:
            members[name] = _ONE
    members[TRANSFER_KEY] = Raw(orjson.dumps(params))
    return msgspec.json.encode(members)


class _Told(msgspec.Struct, gc=False):
    kv_transfer_params: Raw | UnsetType = UNSET


_decode_told = msgspec.json.Decoder(_Told).decode


def told_params(answer: bytes) -> bytes | None:
    """What the prefill leg's answer says for decode, as it stands there; None: nothing."""
    try:
        told = _decode_told(answer).kv_transfer_params
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if told is UNSET or memoryview(told)[0] != 0x7B:
        return None
    return bytes(told)


def decode_body(body: bytes, params: bytes) -> bytes:
    """`params`: a JSON object, passed on as it is."""
    return with_members(body, [(TRANSFER_KEY, orjson.Fragment(params))])


def engine_id(params: bytes | None) -> str | None:
    """The prefill engine's id, where it tells one."""
    if params is None:
        return None
    told: Any = orjson.loads(params)
    found = told.get("remote_engine_id")
    return found if isinstance(found, str) else None
