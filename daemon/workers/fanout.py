"""What is asked of many engines at once: the operations, how each engine spells them, what an answer means. Pure.

Names and bodies are SGLang's. Nobody has to say which engine a worker is: it is asked in SGLang's words, and by vLLM's
where it does not know those (404, 405, 501); an engine that knows neither does not have the operation, which is no
failure. A spelling is left out where its meaning would be another one: an operation on which two engines disagree in
silence is worse than one that is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal
from urllib.parse import urlencode

import orjson

from pointsman.daemon.errors import RequestError, bad_request

Outcome = Literal["succeeded", "failed", "unsupported"]

EXCERPT_CHARS = 512
UNKNOWN_LOAD = -1
FIRST_PAUSE_S = 0.1
"""before a target is asked for the second time; twice that before the third"""
_NOT_THERE = frozenset({404, 405, 501})
_TRANSIENT = frozenset({408, 425, 429})


@dataclass(frozen=True, slots=True)
class Call:
    """One request as one engine understands it."""

    method: Literal["GET", "POST"]
    path: str
    """with its query"""
    body: bytes = b""
    empties_cache: bool = False
    """After it the engine holds no prefix that it held before."""


Spell = Callable[[bytes, Mapping[str, Any]], tuple[Call, ...]]
"""The spellings of a body (as it came, and decoded), in the order in which an engine is asked. Raises RequestError."""


@dataclass(frozen=True, slots=True)
class Operation:
    name: str
    timeout_s: float
    """From the request to the answer, all attempts included, unless the request says otherwise."""
    attempts: int
    """Per target; 1 for what must not be done twice."""
    spell: Spell
    at_once: int = 64
    """targets asked at the same time"""
    answer_bytes: int = 64 * 1024
    """A longer answer is cut off."""
    is_refused_while_busy: bool = False
    """400 means: not now."""


@dataclass(frozen=True, slots=True)
class Verdict:
    outcome: Outcome
    error: str | None = None
    is_final: bool = True
    """Asking again would not change it."""


SUCCEEDED = Verdict("succeeded")
UNSUPPORTED = Verdict("unsupported", "the engine has no such operation")


# --- bodies


def document_of(body: bytes) -> Mapping[str, Any]:
    """Raises RequestError 400 for what is no JSON object; an empty body is an empty one."""
    if not body.strip():
        return {}
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _bad(f"the body is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise _bad("expected a JSON object")
    return document


def _required(body: bytes) -> bytes:
    if not body.strip():
        raise _bad("expected a JSON object, got an empty body")
    return body


def _or_object(body: bytes) -> bytes:
    """SGLang wants an object even where all of its fields have defaults."""
    return body if body.strip() else b"{}"


def _bad(message: str) -> RequestError:
    return bad_request(message, code="BAD_REQUEST")


# --- spellings


def _flush(body: bytes, _: Mapping[str, Any]) -> tuple[Call, ...]:
    return (
        Call("POST", "/flush_cache", body, empties_cache=True),
        Call("POST", "/reset_prefix_cache", empties_cache=True),
    )


def _loads(_body: bytes, _: Mapping[str, Any]) -> tuple[Call, ...]:
    return Call("GET", "/v1/loads"), Call("GET", "/get_load"), Call("GET", "/load")


def _abort(body: bytes, document: Mapping[str, Any]) -> tuple[Call, ...]:
    rid, is_all = document.get("rid"), document.get("abort_all") is True
    if not is_all and not (isinstance(rid, str) and rid):
        raise _bad('expected {"rid": "…"} or {"abort_all": true}')
    sglang = Call("POST", "/abort_request", body)
    if is_all:
        return sglang, Call("POST", "/abort_requests", b"{}")
    named = orjson.dumps({"request_ids": [rid]})
    return sglang, Call("POST", "/inference/v1/abort_requests", named), Call("POST", "/abort_requests", named)


_PAUSE_MODES: Mapping[object, str] = MappingProxyType({"abort": "abort", "in_place": "keep"})


def _pause(body: bytes, document: Mapping[str, Any]) -> tuple[Call, ...]:
    sglang = Call("POST", "/pause_generation", _or_object(body))
    mode = document.get("mode", "abort")
    vllm = _PAUSE_MODES.get(mode) if isinstance(mode, str) else None
    if vllm is None:  # "retract": vLLM cannot go on with requests whose KV is computed anew
        return (sglang,)
    # vLLM clears its caches together with what runs.
    return sglang, Call("POST", f"/pause?mode={vllm}", empties_cache=vllm == "abort")


def _continue(body: bytes, _: Mapping[str, Any]) -> tuple[Call, ...]:
    return Call("POST", "/continue_generation", _or_object(body)), Call("POST", "/resume")


def _update_weights(source: str) -> Spell:
    """Only SGLang's: vLLM's way of new weights has other steps and other bodies."""

    def spell(body: bytes, _: Mapping[str, Any]) -> tuple[Call, ...]:
        return (Call("POST", f"/update_weights_from_{source}", _required(body), empties_cache=True),)

    return spell


_MEMORY_TAGS = frozenset({"weights", "kv_cache"})


def _tags(document: Mapping[str, Any]) -> frozenset[str] | None:
    """What a request about memory names, everything if it names nothing; None if vLLM does not know a part of it."""
    tags = document.get("tags")
    if not tags:
        return _MEMORY_TAGS
    known = isinstance(tags, list) and all(isinstance(tag, str) and tag in _MEMORY_TAGS for tag in tags)
    return frozenset(tags) if known else None


def _release(body: bytes, document: Mapping[str, Any]) -> tuple[Call, ...]:
    sglang = Call("POST", "/release_memory_occupation", _or_object(body), empties_cache=True)
    if _tags(document) != _MEMORY_TAGS:  # vLLM sleeps as a whole
        return (sglang,)
    return sglang, Call("POST", "/sleep?level=1", empties_cache=True)


def _resume(body: bytes, document: Mapping[str, Any]) -> tuple[Call, ...]:
    sglang = Call("POST", "/resume_memory_occupation", _or_object(body))
    tags = _tags(document)
    if tags is None:
        return (sglang,)
    query = "" if tags == _MEMORY_TAGS else f"?{urlencode([('tags', tag) for tag in sorted(tags)])}"
    return sglang, Call("POST", f"/wake_up{query}")


def _same(method: Literal["GET", "POST"], path: str) -> Spell:
    """All engines that have it spell it alike."""

    def spell(body: bytes, _: Mapping[str, Any]) -> tuple[Call, ...]:
        return (Call(method, path, body),)

    return spell


# --- operations

METRICS = Operation(
    "engine_metrics", 5.0, attempts=2, spell=_same("GET", "/metrics"), at_once=16, answer_bytes=4 * 1024 * 1024
)
LOADS = Operation("get_loads", 5.0, attempts=2, spell=_loads)
EVERYBODY = 255
"""As many workers as there can be. Trainers send new weights to all engines in one collective call: an engine that had
to wait for its turn would keep the others waiting for good."""

OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {
        operation.name: operation
        for operation in (
            Operation("flush_cache", 30.0, attempts=3, spell=_flush, is_refused_while_busy=True),
            Operation("abort_request", 10.0, attempts=3, spell=_abort),
            Operation("pause_generation", 60.0, attempts=3, spell=_pause),
            Operation("continue_generation", 60.0, attempts=3, spell=_continue),
            Operation("update_weights_from_disk", 600.0, attempts=3, spell=_update_weights("disk"), at_once=EVERYBODY),
            # The sender takes part once.
            Operation(
                "update_weights_from_distributed",
                600.0,
                attempts=1,
                spell=_update_weights("distributed"),
                at_once=EVERYBODY,
            ),
            # Handles of tensors may be opened once.
            Operation(
                "update_weights_from_tensor", 600.0, attempts=1, spell=_update_weights("tensor"), at_once=EVERYBODY
            ),
            # SGLang's scheduler does not survive the second of two releases, nor of two resumptions.
            Operation("release_memory_occupation", 120.0, attempts=1, spell=_release),
            Operation("resume_memory_occupation", 120.0, attempts=1, spell=_resume),
            # One that runs is not started again, and ending it twice may lose what it wrote.
            Operation("start_profile", 30.0, attempts=1, spell=_same("POST", "/start_profile")),
            Operation("stop_profile", 300.0, attempts=1, spell=_same("POST", "/stop_profile")),
        )
    }
)
"""What changes something at the engines."""


# --- answers


def judge(operation: Operation, status: int, body: bytes) -> Verdict:
    if status in _NOT_THERE:
        return UNSUPPORTED
    if 200 <= status < 300:
        return _judge_body(body)
    if 300 <= status < 400:
        return Verdict("failed", f"HTTP {status} (redirects are not followed)")
    may_pass = status >= 500 or status in _TRANSIENT or (status == 400 and operation.is_refused_while_busy)
    return Verdict("failed", f"HTTP {status}", is_final=not may_pass)


def _judge_body(body: bytes) -> Verdict:
    """vLLM answers 200 to a reset that it did not do."""
    document = decoded(body)
    if isinstance(document, dict) and document.get("success") is False:
        return Verdict("failed", "the engine says that it did not do it", is_final=False)
    return SUCCEEDED


def pause_s(attempts: int) -> float:
    """How long to wait after that many attempts."""
    return FIRST_PAUSE_S * 2.0 ** (attempts - 1)


def excerpt(body: bytes, secret: str | None = None) -> str:
    """The begin of an answer; should it quote our key, without it."""
    text = body[: EXCERPT_CHARS * 4].decode(errors="replace")
    if secret:
        text = text.replace(secret, "***")
    return text if len(text) <= EXCERPT_CHARS else text[: EXCERPT_CHARS - 1] + "…"


def decoded(body: bytes) -> Any:
    """None for what is no JSON."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


def tokens_in_use(document: Any) -> int:
    """Out of an answer to `get_loads`, over all ranks: KV tokens in use, UNKNOWN_LOAD where the engine does not tell.

    SGLang: a list of ranks with `num_tokens`, or an object whose `loads` have `num_used_tokens`. vLLM tells requests.
    """
    ranks = document.get("loads") if isinstance(document, dict) else document
    if not isinstance(ranks, list) or not ranks:
        return UNKNOWN_LOAD
    found = [_first_number(rank, ("num_used_tokens", "num_tokens")) for rank in ranks]
    return sum(found) if UNKNOWN_LOAD not in found else UNKNOWN_LOAD


def _first_number(rank: Any, names: tuple[str, ...]) -> int:
    values = [rank.get(name) for name in names] if isinstance(rank, dict) else []
    found = (value for value in values if isinstance(value, int) and not isinstance(value, bool) and value >= 0)
    return next(found, UNKNOWN_LOAD)
