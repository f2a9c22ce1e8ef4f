"""Lines with the same beginning of the prompt next to each other, so that engines find it in their caches.

A line's key is a chain of hashes of ever longer beginnings: sorted by it, lines that share 64 KiB stand together within
those that share 16 KiB, and so on. What is hashed is what routing goes by: model, LoRA and prompt text.
"""

from __future__ import annotations

from hashlib import blake2b

from pointsman.daemon.routing.request import Features

BEGINNINGS = (256, 1024, 4096, 16384, 65536)
"""bytes of prompt"""
_DIGEST_BYTES = 5


def group_key(features: Features) -> bytes:
    """25 bytes."""
    text = _beginning(features, BEGINNINGS[-1])
    digest = blake2b(features.salt, digest_size=_DIGEST_BYTES)
    key: list[bytes] = []
    done = 0
    for length in BEGINNINGS:
        digest.update(text[done:length])
        done = length
        key.append(digest.digest())
    return b"".join(key)


def _beginning(features: Features, most: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    for part in features.prompt:
        piece = bytes(memoryview(part)[: most - size])
        parts.append(piece)
        size += len(piece)
        if size >= most:
            break
    return b"".join(parts)
