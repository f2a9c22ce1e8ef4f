"""Files and batches with an unmodified OpenAI client, through two shards, the runner and simulated engines."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI
from openai.types import Batch

from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.fakes.gateway import Gateway, gateway

MODEL = "sim-model"


def client_of(gate: Gateway, key: str = "sk-one") -> OpenAI:
    return OpenAI(base_url=f"{gate.url}/v1", api_key=key, max_retries=0)


def chat_line(custom_id: str, text: str = "hello", **body: Any) -> dict[str, Any]:
    request = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 4, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": request}


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def until_final(client: OpenAI, batch_id: str, timeout_s: float = 30.0) -> Batch:
    deadline = time.monotonic() + timeout_s
    while True:
        batch = client.batches.retrieve(batch_id)
        if batch.status in ("completed", "failed", "expired", "cancelled"):
            return batch
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)


def content(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(line) for line in client.files.content(file_id).read().splitlines()]


@pytest.fixture(scope="module")
def engines() -> Iterator[list[str]]:
    with launch_engines(2, "--model", MODEL) as running:
        yield [engine.url for engine in running]


@pytest.fixture(scope="module")
def gate(engines: list[str]) -> Iterator[Gateway]:
    with gateway("--batch-store", "sqlite", workers=engines) as running:
        running.wait_log("batches_ready")
        yield running


def test_upload_create_poll_download(gate: Gateway) -> None:
    client = client_of(gate)
    lines = [chat_line(f"line-{n}", f"Count to {n}.") for n in range(20)]
    file = client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
    assert (file.filename, file.bytes, file.purpose) == ("in.jsonl", len(jsonl(lines)), "batch")
    assert client.files.content(file.id).read() == jsonl(lines)
    created = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"job": "nightly"}
    )
    assert created.status in ("validating", "in_progress")
    batch = until_final(client, created.id)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (20, 20, 0)
    assert batch.metadata == {"job": "nightly"}
    assert batch.error_file_id is None
    output = content(client, batch.output_file_id)
    assert [line["custom_id"] for line in output] == [f"line-{n}" for n in range(20)]
    for line in output:
        assert line["error"] is None
        assert line["response"]["status_code"] == 200
        assert line["response"]["body"]["choices"][0]["message"]["content"]
