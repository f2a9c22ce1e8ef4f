"""What routing needs to know of a request body, without building the rest of it.

Nearly every body is understood by the native scan (`body.scan`). What that is not certain of is decoded here, and the
scan must find what is found here. Unknown fields are skipped by the decoder, not materialised: a 64 MiB body costs no
Python objects. The prompt is found as spans of the body: the tokens of its strings are handed to the prefix index as
they stand (`HashChain.load_json` resolves their escapes, so the text counts and not how a client wrote it). The body is
forwarded byte for byte.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable

import msgspec
from msgspec import UNSET, Raw, UnsetType

from pointsman.daemon.errors import bad_request
from pointsman.daemon.routing.body import Features, scan

__all__ = ["NO_FEATURES", "Features", "decoded_features", "form_features", "form_models", "id_bytes", "json_features"]

MAX_MODEL_NAME = 512


class _Part(msgspec.Struct, gc=False):
    text: Raw | UnsetType = UNSET


class _Message(msgspec.Struct, gc=False):
    content: Raw | UnsetType = UNSET
    tool_calls: Raw | UnsetType = UNSET


class _Fields(msgspec.Struct, gc=False):
    model: object = ""
    stream: object = False
    prompt: Raw | UnsetType = UNSET
    text: Raw | UnsetType = UNSET
    input_ids: Raw | UnsetType = UNSET
    input: Raw | UnsetType = UNSET
    instructions: Raw | UnsetType = UNSET
    system: Raw | UnsetType = UNSET
    lora_path: object = ""
    rid: Raw | UnsetType = UNSET
    max_tokens: object = None
    max_completion_tokens: object = None
    sampling_params: Raw | UnsetType = UNSET


class _Body(_Fields, gc=False):
    messages: list[_Message] | UnsetType | None = UNSET


class _LooseBody(_Fields, gc=False):
    """For messages that are not a list of objects: the worker will say what it thinks of them."""

    messages: Raw | UnsetType = UNSET


class _Sampling(msgspec.Struct, gc=False):
    max_new_tokens: object = None


_decode = msgspec.json.Decoder(_Body).decode
_decode_loosely = msgspec.json.Decoder(_LooseBody).decode
_decode_raws = msgspec.json.Decoder(list[Raw]).decode
_decode_ids = msgspec.json.Decoder(list[int]).decode
_decode_part = msgspec.json.Decoder(_Part).decode
_decode_message = msgspec.json.Decoder(_Message).decode
_decode_sampling = msgspec.json.Decoder(_Sampling).decode
NO_FEATURES = Features()


def json_features(body: bytes) -> Features:
    """Raises RequestError 400 when `body` is not a JSON object."""
    return scan(body) or decoded_features(body)


def decoded_features(body: bytes) -> Features:
    """`json_features` of any body, by a parser."""
    parsed = _parse(body)
    model, lora = parsed.model, parsed.lora_path
    features = Features(
        model[:MAX_MODEL_NAME] if isinstance(model, str) else "",
        parsed.stream is True,
        lora[:MAX_MODEL_NAME] if isinstance(lora, str) else "",
    )
    most = parsed.max_tokens if parsed.max_completion_tokens is None else parsed.max_completion_tokens
    if most is None and parsed.sampling_params is not UNSET:
        most = _max_new_tokens(parsed.sampling_params)
    if isinstance(most, int) and most >= 0:
        features.max_tokens = most
    if parsed.rid is not UNSET and (rid := bytes(parsed.rid))[:1] == b'"':
        features.rid = rid
    try:
        _find_prompt(parsed, features)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return features  # the worker will say what it thinks of it; it is routed like a request without a prompt
    return features


def _parse(body: bytes) -> _Body | _LooseBody:
    try:
        try:
            return _decode(body)
        except msgspec.ValidationError:
            return _decode_loosely(body)
    except msgspec.ValidationError:
        raise bad_request("the request body must be a JSON object", code="invalid_body") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(f"the request body is not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise bad_request("the request body is nested too deeply", code="invalid_json") from None


def _max_new_tokens(sampling: Raw) -> object:
    try:
        return _decode_sampling(sampling).max_new_tokens
    except msgspec.MsgspecError:
        return None


def _find_prompt(parsed: _Body | _LooseBody, features: Features) -> None:
    spans: list[Raw | bytes] = []
    if parsed.system is not UNSET:
        _add_content(parsed.system, spans)
    if parsed.instructions is not UNSET:
        _add_content(parsed.instructions, spans)
    if isinstance(parsed, _LooseBody):
        if parsed.messages is not UNSET:
            spans.append(parsed.messages)
    elif isinstance(parsed.messages, list):
        for message in parsed.messages:
            _add_message(message, spans)
    elif parsed.prompt is not UNSET:
        _add_prompt(parsed.prompt, spans, features)
    elif parsed.text is not UNSET:
        _add_prompt(parsed.text, spans, features)
    elif parsed.input_ids is not UNSET:
        _add_prompt(parsed.input_ids, spans, features)
    elif parsed.input is not UNSET:
        _add_prompt(parsed.input, spans, features)
    features.prompt = tuple(spans)


def _add_message(message: _Message, spans: list[Raw | bytes]) -> None:
    if message.content is not UNSET:
        _add_content(message.content, spans)
    if message.tool_calls is not UNSET:
        spans.append(message.tool_calls)


def _first(raw: Raw) -> int:
    """The first byte of a JSON value: msgspec's spans begin at it."""
    return memoryview(raw)[0]


_QUOTE, _BRACKET, _BRACE, _NULL = b'"[{n'


def _add_content(content: Raw, spans: list[Raw | bytes]) -> None:
    """A string, or parts: the text of those that have one, the others (images, audio) as they stand."""
    kind = _first(content)
    if kind == _BRACKET:
        for part in _decode_raws(content):
            text = _text_of(part) if _first(part) == _BRACE else None
            spans.append(part if text is None else text)
    elif kind != _NULL:
        spans.append(content)


def _text_of(part: Raw) -> Raw | None:
    text = _decode_part(part).text
    return None if text is UNSET else text


def _add_prompt(prompt: Raw, spans: list[Raw | bytes], features: Features) -> None:
    """A string, token ids, or a list of either, or items of the Responses API (messages)."""
    if _first(prompt) != _BRACKET:
        _add_content(prompt, spans)
        return
    for item in _decode_raws(prompt):
        kind = _first(item)
        if kind == _BRACE:
            _add_item(item, spans)
        elif kind == _QUOTE:
            spans.append(item)
        elif kind == _BRACKET:
            _add_ids(item, spans, features)
        else:  # numbers: the list itself is the ids
            _add_ids(prompt, spans, features)
            return


def _add_item(item: Raw, spans: list[Raw | bytes]) -> None:
    try:
        message = _decode_message(item)
    except msgspec.MsgspecError:
        message = _Message()
    if message.content is UNSET and message.tool_calls is UNSET:
        spans.append(item)
    else:
        _add_message(message, spans)


def _add_ids(ids: Raw, spans: list[Raw | bytes], features: Features) -> None:
    try:
        spans.append(id_bytes(_decode_ids(ids)))
        features.has_ids = True
    except (msgspec.MsgspecError, OverflowError):
        spans.append(ids)


def id_bytes(ids: Iterable[int]) -> bytes:
    """Token ids as the prefix index sees them: four bytes a token, like text. Raises OverflowError beyond 32 bits."""
    return array("i", ids).tobytes()


_FORM_MODEL = re.compile(
    rb'content-disposition:[^\r\n]*;[ \t]*name="?model"?[ \t]*(?:;[^\r\n]*)?\r\n'
    rb"(?:[^\r\n]+\r\n)*\r\n"
    rb"([^\r\n]{1,512})\r\n",
    re.IGNORECASE,
)


def form_features(body: bytes) -> Features:
    """The `model` field of a multipart form (audio); a form without one is routed like a request without a model."""
    found = _FORM_MODEL.search(body)
    return Features(found[1].decode("utf-8", "replace").strip()) if found else NO_FEATURES


def form_models(body: bytes) -> list[str]:
    """Every `model` field of a multipart form: which of them counts, engines do not agree on."""
    return [name.decode("utf-8", "replace").strip() for name in _FORM_MODEL.findall(body)]
