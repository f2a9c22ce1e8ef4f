"""Batches as a client makes them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

from openai import OpenAI
from openai.types import Batch

from tests.fakes.gateway import Gateway
from tests.fakes.leeway import leeway

MODEL = "sim-model"
FINAL = ("completed", "failed", "expired", "cancelled")
_Endpoint = Literal["/v1/chat/completions"]


_clients: WeakKeyDictionary[Gateway, dict[tuple[str, int], OpenAI]] = WeakKeyDictionary()


def client_of(gate: Gateway, key: str = "sk-one", *, max_retries: int = 0) -> OpenAI:
    """The same one for the same key, closed with the gateway: to make one takes longer than most requests."""
    made = _clients.setdefault(gate, {})
    if (key, max_retries) not in made:
        client = OpenAI(base_url=f"{gate.url}/v1", api_key=key, max_retries=max_retries)
        gate.at_close.callback(client.close)
        made[key, max_retries] = client
    return made[key, max_retries]


def chat_line(custom_id: str, text: str = "hello", **body: Any) -> dict[str, Any]:
    request = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 4, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": request}


def jsonl(lines: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def submit(client: OpenAI, lines: Sequence[dict[str, Any]], endpoint: str = "/v1/chat/completions") -> Batch:
    """Uploads and creates."""
    file = client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=cast("_Endpoint", endpoint), completion_window="24h")


def until_final(client: OpenAI, batch_id: str, timeout_s: float = 30.0) -> Batch:
    deadline = time.monotonic() + timeout_s * leeway()
    waiting = threading.Event()
    while True:
        batch = client.batches.retrieve(batch_id)
        if batch.status in FINAL:
            return batch
        assert time.monotonic() < deadline, batch
        waiting.wait(0.05)


def content(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(line) for line in client.files.content(file_id).read().splitlines()]


def done(gate: Gateway, batch_id: str) -> int:
    """Lines of a batch of the usual key that are."""
    counts = client_of(gate).batches.retrieve(batch_id).request_counts
    return 0 if counts is None else counts.completed + counts.failed


def paused(gate: Gateway, batch_id: str) -> str | None:
    """Why nothing goes on with it; None: it does."""
    extra = client_of(gate).batches.retrieve(batch_id).model_extra or {}
    reason: str | None = extra["pointsman"]["paused"]
    return reason
