"""Requests that end with their prompt: embeddings, scores, rankings, classes."""

import base64
import struct
from hashlib import blake2b
from typing import Any

from aiohttp import web

from pointsman.scripts.simulated_engine.context import ApiError, Call, JsonObject
from pointsman.scripts.simulated_engine.driver import Ticket
from pointsman.scripts.simulated_engine.prompts import plan_prompt_only, read_prompts, render_content
from pointsman.scripts.simulated_engine.surfaces.usage import describe_usage

_DIMENSIONS = 16
_LABELS = ("negative", "neutral", "positive")


async def embed(call: Call) -> web.StreamResponse:
    document = call.json()
    prompts = read_prompts(document.get("input"))
    ticket = await _run(call, prompts)
    as_base64 = document.get("encoding_format") == "base64"
    dimensions = document.get("dimensions") or _DIMENSIONS
    data = [
        {"object": "embedding", "index": i, "embedding": _embed(prompt, dimensions, as_base64)}
        for i, prompt in enumerate(prompts)
    ]
    return await _send(call, document, ticket, "embd", {"object": "list", "data": data})


async def rerank(call: Call) -> web.StreamResponse:
    document = call.json()
    query = render_content(document.get("query"))
    documents = [render_content(item) for item in _read_list(document, "documents")]
    ticket = await _run(call, [f"{query}\n{text}".encode() for text in documents])
    results = [
        {"index": i, "document": {"text": text}, "relevance_score": _score(query, text)}
        for i, text in enumerate(documents)
    ]
    results.sort(key=lambda result: -float(str(result["relevance_score"])))
    top = document.get("top_n") or len(results)
    return await _send(call, document, ticket, "rerank", {"results": results[:top]})


async def score(call: Call) -> web.StreamResponse:
    document = call.json()
    left = _read_texts(document, "text_1", "queries")
    right = _read_texts(document, "text_2", "documents")
    if len(left) == 1:
        left = left * len(right)
    if len(left) != len(right):
        raise ApiError(400, "text_1 and text_2 have to have the same length")
    ticket = await _run(call, [f"{a}\n{b}".encode() for a, b in zip(left, right, strict=True)])
    data = [
        {"index": i, "object": "score", "score": _score(a, b)} for i, (a, b) in enumerate(zip(left, right, strict=True))
    ]
    return await _send(call, document, ticket, "score", {"object": "list", "data": data})


async def pool(call: Call) -> web.StreamResponse:
    document = call.json()
    prompts = read_prompts(document.get("input"))
    ticket = await _run(call, prompts)
    data = [
        {"index": i, "object": "pooling", "data": _embed(prompt, _DIMENSIONS, False)}
        for i, prompt in enumerate(prompts)
    ]
    return await _send(call, document, ticket, "pool", {"object": "list", "data": data})


async def classify(call: Call) -> web.StreamResponse:
    document = call.json()
    prompts = read_prompts(document.get("input") or document.get("text"))
    ticket = await _run(call, prompts)
    data = [_classify(i, prompt) for i, prompt in enumerate(prompts)]
    return await _send(call, document, ticket, "classify", {"object": "list", "data": data})


async def _run(call: Call, prompts: list[bytes]) -> Ticket:
    return await call.run([plan_prompt_only(call, prompt) for prompt in prompts])


async def _send(
    call: Call, document: JsonObject, ticket: Ticket, prefix: str, answer: JsonObject
) -> web.StreamResponse:
    head = {
        "id": f"{prefix}-{call.request_id}",
        "created": call.created_s,
        "model": call.model_name(document),
    }
    return await call.send_json({**head, **answer, "usage": describe_usage(ticket)})


def _read_list(document: JsonObject, key: str) -> list[Any]:
    items = document.get(key)
    if not isinstance(items, list) or not items:
        raise ApiError(400, f"{key} has to be a non-empty list")
    return items


def _read_texts(document: JsonObject, *keys: str) -> list[str]:
    given = next((document[key] for key in keys if key in document), None)
    if given is None:
        raise ApiError(400, f"{keys[0]} is missing")
    return [render_content(item) for item in (given if isinstance(given, list) else [given])]


def _embed(prompt: bytes, dimensions: int, as_base64: bool) -> list[float] | str:
    seed = blake2b(prompt).digest()
    values = [seed[i % len(seed)] / 255 for i in range(dimensions)]
    if not as_base64:
        return values
    return base64.b64encode(struct.pack(f"<{dimensions}f", *values)).decode()


def _score(left: str, right: str) -> float:
    """The share of the words of `right` that `left` has too, plus a little to tell texts apart."""
    words = right.split()
    shared = sum(word in left for word in words) / max(len(words), 1)
    return 0.9 * shared + 0.1 * blake2b(f"{left}\n{right}".encode()).digest()[0] / 255


def _classify(index: int, prompt: bytes) -> JsonObject:
    weights = [value + 1 for value in blake2b(prompt).digest()[: len(_LABELS)]]
    probabilities = [weight / sum(weights) for weight in weights]
    best = max(range(len(_LABELS)), key=probabilities.__getitem__)
    return {
        "index": index,
        "label": _LABELS[best],
        "probs": probabilities,
        "num_classes": len(_LABELS),
    }
