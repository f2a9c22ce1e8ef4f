"""What routing needs to know of a request body, without building the rest of it.

Unknown fields are skipped by the decoder, not materialised: a 64 MiB body costs no Python objects. The body itself is
forwarded byte for byte.
"""

from __future__ import annotations

import re

import msgspec

from pointsman.daemon.errors import bad_request

MAX_MODEL_NAME = 512


class Features(msgspec.Struct):
    """`model` is "" when the request names none (or not by a string: the worker will say what it thinks of that)."""

    model: str = ""
    is_stream: bool = False


class _Body(msgspec.Struct):
    model: object = ""
    stream: object = False


_decode = msgspec.json.Decoder(_Body).decode
NO_FEATURES = Features()


def json_features(body: bytes) -> Features:
    """Raises RequestError 400 when `body` is not a JSON object."""
    try:
        parsed = _decode(body)
    except msgspec.ValidationError:
        raise bad_request("the request body must be a JSON object", code="invalid_body") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(f"the request body is not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise bad_request("the request body is nested too deeply", code="invalid_json") from None
    model = parsed.model
    return Features(model[:MAX_MODEL_NAME] if isinstance(model, str) else "", parsed.stream is True)


_FORM_MODEL = re.compile(
    rb'content-disposition:[^\r\n]*;\s*name="?model"?\s*(?:;[^\r\n]*)?\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]{1,512})\r\n',
    re.IGNORECASE,
)


def form_features(body: bytes) -> Features:
    """The `model` field of a multipart form (audio); a form without one is routed like a request without a model."""
    found = _FORM_MODEL.search(body)
    return Features(found[1].decode("utf-8", "replace").strip()) if found else NO_FEATURES
