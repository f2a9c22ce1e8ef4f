"""Whose files and batches are whose: by the name of the API key where the gateway knows its keys, else by its hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

KEY_HEADER = "X-Pointsman-Key"
"""name of the API key: as a shard has checked it; to a shard, whose batch a request is of. Never a client's"""
_ANONYMOUS = "anonymous"
_KEY = "key:"


def owner_of(headers: Mapping[str, str]) -> str:
    """`headers` know no case. Of a token that the gateway has no name for, only a hash is kept."""
    if name := headers.get(KEY_HEADER):
        return _KEY + name
    token = headers.get("Authorization") or headers.get("X-Api-Key")
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest() if token else _ANONYMOUS


def key_of(owner: str) -> str | None:
    """The name of the owner's key; None: it has none."""
    return owner.removeprefix(_KEY) if owner.startswith(_KEY) else None
