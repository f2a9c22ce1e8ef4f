"""What clients may ask of files and batches: every value checked, every refusal says which and why. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from secrets import token_hex
from typing import Any

import msgspec

from pointsman.daemon.batches.input_lines import ENDPOINTS
from pointsman.daemon.batches.rows import NewBatch, Page
from pointsman.daemon.errors import RequestError, bad_request

PURPOSE = "batch"
MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512
MAX_FILES_PAGE, MAX_BATCHES_PAGE = 10_000, 100
MIN_TTL_S, MAX_TTL_S = 3600, 30 * 86400
MAX_WINDOW_S = 30 * 86400
_WINDOW = re.compile(r"([1-9][0-9]{0,6})([smhd])")
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class _Batch(msgspec.Struct):
    input_file_id: object = None
    endpoint: object = None
    completion_window: object = None
    metadata: object = None
    output_expires_after: object = None


def new_batch(body: bytes, owner: str, default_ttl_s: int) -> NewBatch:
    """Raises RequestError. `default_ttl_s`: of its output files; 0 = for ever."""
    try:
        asked = msgspec.json.decode(body, type=_Batch)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise bad_request("the request body must be a JSON object", code="invalid_json") from None
    if not isinstance(asked.input_file_id, str) or not asked.input_file_id:
        raise _wrong("input_file_id", "is required: the id of a file that was uploaded with purpose=batch")
    if asked.endpoint not in ENDPOINTS:
        raise _wrong("endpoint", f"must be one of {', '.join(ENDPOINTS)}, not {_shown(asked.endpoint)}")
    window = asked.completion_window
    ttl_s = _expiry(asked.output_expires_after, "output_expires_after")
    return NewBatch(
        id=f"batch_{token_hex(12)}",
        owner=owner,
        input_file=asked.input_file_id,
        endpoint=str(asked.endpoint),
        completion_window=str(window),
        window_s=_window_s(window),
        metadata=_metadata(asked.metadata),
        output_ttl_s=ttl_s or default_ttl_s or None,
    )


def page(query: Mapping[str, str], most: int, default: int) -> Page:
    """Raises RequestError."""
    limit = query.get("limit", str(default))
    if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit) <= most:
        raise _wrong("limit", f"must be a whole number from 1 to {most}, not {limit[:40]!r}")
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise _wrong("order", f"must be asc or desc, not {order[:40]!r}")
    return Page(int(limit), query.get("after") or None, order == "asc")


def file_ttl_s(fields: Mapping[str, str]) -> int | None:
    """`expires_after[anchor]` and `expires_after[seconds]` of an upload. Raises RequestError."""
    prefix = "expires_after["
    given = {name[len(prefix) : -1]: value for name, value in fields.items() if name.startswith(prefix)}
    if not given:
        return None
    seconds = given.get("seconds", "")
    return _expiry(
        {
            "anchor": given.get("anchor"),
            "seconds": int(seconds) if seconds.isascii() and seconds.isdigit() else seconds,
        },
        "expires_after",
    )


def _expiry(value: object, name: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, dict) or value.get("anchor") != "created_at":
        raise _wrong(f"{name}.anchor", "must be created_at")
    seconds = value.get("seconds")
    if not isinstance(seconds, int) or not MIN_TTL_S <= seconds <= MAX_TTL_S:
        raise _wrong(f"{name}.seconds", f"must be from {MIN_TTL_S} to {MAX_TTL_S}, not {_shown(seconds)}")
    return seconds


def _window_s(text: object) -> int:
    found = _WINDOW.fullmatch(text) if isinstance(text, str) else None
    seconds = int(found[1]) * _UNITS_S[found[2]] if found else 0
    if not 0 < seconds <= MAX_WINDOW_S:
        raise _wrong("completion_window", f"must be a number with s, m, h or d, at most 30d, not {_shown(text)}")
    return seconds


def _metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _wrong("metadata", "must be an object whose values are strings")
    if len(value) > MAX_METADATA:
        raise _wrong("metadata", f"has more than {MAX_METADATA} pairs")
    for key, text in value.items():
        if len(key) > MAX_METADATA_KEY or len(text) > MAX_METADATA_VALUE:
            most = f"{MAX_METADATA_KEY} characters, of a value {MAX_METADATA_VALUE}"
            raise _wrong("metadata", f"{key[:80]!r} is too long: of a key at most {most}")
    return value


def _wrong(param: str, problem: str) -> RequestError:
    return bad_request(f"{param} {problem}", code="invalid_value", param=param)


def _shown(value: object) -> str:
    return "nothing" if value is None else repr(value)[:80]
