"""Files and batches with an unmodified OpenAI client, through two shards, the runner and simulated engines."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, Final

import pytest
from openai import APIStatusError, BadRequestError, ConflictError, InternalServerError, NotFoundError

from pointsman.scripts.simulated_engine.launch import launch_engines
from tests.daemon.stores.servers import mooncake_cluster, needs_mooncake, needs_redis, redis_server
from tests.fakes.batches import MODEL, chat_line, client_of, content, jsonl, submit, until_final
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.processes import resident_bytes
from tests.fakes.traffic import Client

CHAT: Final = "/v1/chat/completions"


@pytest.fixture(scope="module")
def engines() -> Iterator[list[str]]:
    with launch_engines(2, "--model", MODEL) as running:
        yield [engine.url for engine in running]


@pytest.fixture(scope="module")
def gate(engines: list[str]) -> Iterator[Gateway]:
    with gateway("--batch-store", "sqlite", workers=engines) as running:
        running.wait_log("batches_ready")
        yield running


def run_a_batch(gate: Gateway, count: int = 20) -> None:
    client = client_of(gate)
    lines = [chat_line(f"line-{n}", f"Count to {n}.") for n in range(count)]
    file = client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
    assert (file.filename, file.bytes, file.purpose) == ("in.jsonl", len(jsonl(lines)), "batch")
    assert client.files.content(file.id).read() == jsonl(lines)
    created = client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"job": "nightly"}
    )
    assert created.status in ("validating", "in_progress")
    batch = until_final(client, created.id)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (count, count, 0)
    assert batch.metadata == {"job": "nightly"}
    assert batch.error_file_id is None
    output = content(client, batch.output_file_id)
    assert [line["custom_id"] for line in output] == [f"line-{n}" for n in range(count)]
    for line in output:
        assert line["error"] is None
        assert line["response"]["status_code"] == 200
        assert line["response"]["body"]["choices"][0]["message"]["content"]


def cancel_a_batch(gate: Gateway) -> None:
    client = client_of(gate)
    batch = submit(client, [chat_line(f"line-{n}", max_tokens=400) for n in range(200)])
    assert client.batches.cancel(batch.id).status == "cancelling"
    done = until_final(client, batch.id)
    assert done.status == "cancelled"
    lines = content(client, done.output_file_id) + content(client, done.error_file_id)
    assert done.request_counts is not None
    assert len({line["custom_id"] for line in lines}) == len(lines) == done.request_counts.total
    with pytest.raises(ConflictError, match="cannot be cancelled any more"):
        client.batches.cancel(batch.id)


def test_upload_create_poll_download_cancel_on_sqlite(gate: Gateway) -> None:
    run_a_batch(gate)
    cancel_a_batch(gate)


@pytest.mark.parametrize(
    "kind", [pytest.param("redis", marks=needs_redis), pytest.param("mooncake", marks=needs_mooncake)]
)
def test_upload_create_poll_download_cancel_elsewhere(kind: str, engines: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "servers"
    folder.mkdir()
    if kind == "redis":
        with redis_server(folder) as url, gateway("--batch-store", url, workers=engines) as running:
            run_a_batch(running)
            cancel_a_batch(running)
        return
    with mooncake_cluster(folder) as cluster:
        cluster.start_holder()
        with gateway("--batch-store", f"mooncake://{cluster.address}", workers=engines) as running:
            run_a_batch(running)
            cancel_a_batch(running)


def test_every_endpoint_and_what_engines_refuse(gate: Gateway) -> None:
    client = client_of(gate)
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"model": MODEL, "prompt": "hello", "max_tokens": 3},
        "/v1/embeddings": {"model": MODEL, "input": "hello"},
        "/v1/responses": {"model": MODEL, "input": "hello"},
        "/generate": {"text": "hello", "sampling_params": {"max_new_tokens": 3}},
    }
    for endpoint, body in bodies.items():
        good = {"custom_id": "good", "method": "POST", "url": endpoint, "body": body}
        bad = {"custom_id": "bad", "method": "POST", "url": endpoint, "body": {**body, "model": MODEL, "n": "x" * 3}}
        batch = until_final(client, submit(client, [good, bad], endpoint).id)
        assert batch.status == "completed", batch
        lines = content(client, batch.output_file_id) + content(client, batch.error_file_id)
        assert {line["custom_id"] for line in lines} == {"good", "bad"}
        found = {line["custom_id"]: line for line in lines}
        assert found["good"]["response"]["status_code"] == 200, found
        assert (found["bad"]["error"] is None) == (found["bad"]["response"]["status_code"] == 200)


def test_lists_and_pages(gate: Gateway) -> None:
    client = client_of(gate, "sk-pages")
    files = [client.files.create(file=(f"{n}.jsonl", b"x"), purpose="batch") for n in range(5)]
    newest_first = [file.id for file in reversed(files)]
    assert [file.id for file in client.files.list(limit=2)] == newest_first, "the SDK fetches page after page"
    assert [file.id for file in client.files.list(order="asc", limit=3)] == [file.id for file in files]
    page = client.files.list(after=newest_first[1], limit=2)
    assert ([file.id for file in page.data], page.has_more) == (newest_first[2:4], True)
    assert client.files.retrieve(files[0].id) == files[0]
    assert client.files.delete(files[0].id).deleted
    with pytest.raises(NotFoundError):
        client.files.retrieve(files[0].id)
    batches = [submit(client, [chat_line("a")]) for _ in range(3)]
    assert [batch.id for batch in client.batches.list(limit=2)] == [batch.id for batch in reversed(batches)]
    for batch in batches:
        assert until_final(client, batch.id).status == "completed"


def test_what_belongs_to_another_key_does_not_exist(gate: Gateway) -> None:
    owner, other = client_of(gate, "sk-owner"), client_of(gate, "sk-other")
    batch = submit(owner, [chat_line("a")])
    assert until_final(owner, batch.id).status == "completed"
    assert [one.id for one in other.batches.list()] == []
    assert list(other.files.list()) == []
    for ask in (
        lambda: other.batches.retrieve(batch.id),
        lambda: other.batches.cancel(batch.id),
        lambda: other.files.retrieve(batch.input_file_id),
        lambda: other.files.content(batch.input_file_id),
        lambda: other.files.delete(batch.input_file_id),
    ):
        with pytest.raises(NotFoundError):
            ask()
    with pytest.raises(BadRequestError, match="no file"):
        other.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h")


def test_refusals_say_what_is_wrong(gate: Gateway) -> None:
    client = client_of(gate)
    file = client.files.create(file=("in.jsonl", jsonl([chat_line("a")])), purpose="batch")
    with pytest.raises(BadRequestError, match="purpose must be batch"):
        client.files.create(file=b"x", purpose="assistants")
    with pytest.raises(BadRequestError, match="completion_window"):
        client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="soon")  # type: ignore[arg-type]
    with pytest.raises(BadRequestError, match="endpoint must be one of"):
        client.batches.create(input_file_id=file.id, endpoint="/v1/x", completion_window="24h")  # type: ignore[arg-type]
    failed = until_final(client, submit(client, [chat_line("a"), chat_line("a")]).id)
    assert failed.status == "failed"
    assert failed.errors is not None
    assert [(error.code, error.line) for error in failed.errors.data or []] == [("duplicate_custom_id", 2)]


@pytest.mark.parametrize(
    "head",
    [b'Content-Disposition: form-data; name="\x0b"', b"Content-Disposition form-data", b"A" * 9000 + b": x"],
)
def test_an_upload_whose_parts_have_bad_headers_is_a_400(gate: Gateway, head: bytes) -> None:
    body = b"--b\r\n" + head + b"\r\n\r\nx\r\n--b--\r\n"
    lines = "POST /v1/files HTTP/1.1\r\nHost: gateway\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    upload = f"{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with Client((gate.host, gate.port)) as client:
        reply = client.ask(upload)
    assert (reply.status, reply.json["error"]["code"]) == (400, "bad_request")
    assert "the multipart body is malformed" in reply.json["error"]["message"]


def test_who_has_no_key_is_answered_for_files_and_batches_too(engines: list[str], tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": {"a": {"key": "sk-0123456789abcdef"}}}))
    keys.chmod(0o600)
    with gateway("--batch-store", "sqlite", "--api-key-file", str(keys), workers=engines) as gate:
        for line, size in product(("POST /v1/files", "GET /v1/files", "POST /v1/batches"), (0, 5_000_000)):
            with Client((gate.host, gate.port)) as client:
                client.sock.sendall(f"{line} HTTP/1.1\r\nHost: gateway\r\nContent-Length: {size}\r\n\r\n".encode())
                reply = client.read()
            assert (reply.status, reply.json["error"]["code"]) == (401, "invalid_api_key")


def test_a_file_that_a_batch_needs_stays(gate: Gateway) -> None:
    client = client_of(gate)
    batch = submit(client, [chat_line(f"line-{n}", max_tokens=300) for n in range(100)])
    with pytest.raises(ConflictError, match=batch.id):
        client.files.delete(batch.input_file_id)
    client.batches.cancel(batch.id)
    until_final(client, batch.id)
    assert client.files.delete(batch.input_file_id).deleted


def test_a_gateway_without_batches_says_so_and_has_no_runner(engines: list[str]) -> None:
    with gateway(workers=engines) as running:
        with pytest.raises(NotFoundError, match="--batch-store"):
            client_of(running).files.list()
        assert running.pids("batches") == []
        assert not any(name.startswith("pointsman_batch") for name in running.metrics())


def test_metrics_and_the_operators_list(gate: Gateway) -> None:
    before = gate.metrics()
    client = client_of(gate, "sk-metrics")
    batch = submit(client, [chat_line("a"), chat_line("b")])
    until_final(client, batch.id)
    name = 'pointsman_batch_lines_total{result="succeeded"}'
    gate.wait_until("two more lines", lambda: gate.metrics()[name] == before[name] + 2)
    listed = subprocess.run(
        [sys.executable, "-m", "pointsman.daemon.main", "batches", "--limit", "1"],
        env=os.environ | {"RUNTIME_DIRECTORY": str(gate.folder / "run")},
        capture_output=True,
        text=True,
        check=True,
    )
    (row,) = [line for line in listed.stdout.splitlines() if batch.id in line]
    assert "completed" in row
    assert "100 %" in row


def test_while_the_runner_is_down_clients_are_told_to_come_back(gate: Gateway) -> None:
    (pid,) = gate.pids("batches")
    client = client_of(gate)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    refused: list[InternalServerError] = []
    while time.monotonic() < deadline:
        try:
            client.files.list(limit=1)
            break
        except InternalServerError as error:
            refused.append(error)
    else:
        pytest.fail("no runner came back")
    for refusal in refused:
        assert refusal.status_code == 503
        assert refusal.code == "batches_unavailable"
        assert refusal.response.headers["retry-after"] == "2"
    assert gate.pids("batches") != [pid]
    run_a_batch(gate, 5)


# --- streaming


def test_an_upload_never_sits_in_a_shards_memory(gate: Gateway) -> None:
    """192 MB: never in the shards, never whole in the runner, and all there afterwards."""
    shards = gate.pids("shard")
    (runner,) = gate.pids("batches")
    before, runner_before = resident_bytes(shards), resident_bytes([runner])
    most = [0, 0]
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.01):
            most[0] = max(most[0], resident_bytes(shards))
            most[1] = max(most[1], resident_bytes([runner]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    piece = os.urandom(1 << 20)
    boundary = b"--b"
    head = boundary + b'\r\nContent-Disposition: form-data; name="file"; filename="big"\r\n\r\n'
    tail = (
        b"\r\n"
        + boundary
        + b'\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        + boundary
        + b"--\r\n"
    )
    length = len(head) + 192 * len(piece) + len(tail)
    with socket.create_connection((gate.host, gate.port), timeout=60) as sock:
        sock.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-big\r\nExpect: 100-continue\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: %d\r\n\r\n" % length
        )
        assert sock.recv(100).startswith(b"HTTP/1.1 100 ")
        sock.sendall(head)
        for _ in range(192):
            sock.sendall(piece)
        sock.sendall(tail)
        answer = sock.recv(65536)
    is_over.set()
    watcher.join()
    assert answer.startswith(b"HTTP/1.1 200 "), answer
    assert most[0] - before < 16 << 20, f"{(most[0] - before) >> 20} MiB in the shards"
    assert most[1] - runner_before < 64 << 20, f"{(most[1] - runner_before) >> 20} MiB in the runner"
    client = client_of(gate, "sk-big")
    (file,) = client.files.list()
    assert client.files.content(file.id).read() == piece * 192
    client.files.delete(file.id)


def test_too_large_an_upload_is_refused_while_it_comes(engines: list[str]) -> None:
    with gateway("--batch-store", "sqlite", "--batch-max-file-mib", "1", workers=engines) as running:
        running.wait_log("batches_ready")
        with pytest.raises(APIStatusError) as refused:
            client_of(running).files.create(file=("big", b"x" * (5 << 20)), purpose="batch")
        assert (refused.value.status_code, refused.value.code) == (413, "file_too_large")
        assert list(client_of(running).files.list()) == []
