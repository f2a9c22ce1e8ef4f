"""The paths that are routed to workers, in the order of their metric labels. Only ever append within a group."""

from __future__ import annotations

JSON_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/rerank",
    "/rerank",
    "/v2/rerank",
    "/v1/score",
    "/score",
    "/pooling",
    "/generate",
    "/v1/classify",
    "/tokenize",
    "/detokenize",
)
"""The body is a JSON object."""

FORM_PATHS = ("/v1/audio/transcriptions",)
"""The body is a multipart form."""
