"""The fan-outs over a fake daemon: what may be asked, and how the outcome of many becomes one answer."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
from aiohttp import ClientConnectionResetError

from pointsman.admin_api.handlers.fanout import OPERATIONS
from pointsman.admin_api.ports import FanoutRequest, LoadView, TargetResult
from pointsman.daemon.workers import fanout
from tests.fakes.control_port import FakeControlPort, error


def told(number: int, outcome: Any = "succeeded", **fields: Any) -> TargetResult:
    usual: dict[str, Any] = {
        "id": f"id-{number}",
        "url": f"http://10.0.0.{number}:8000",
        "outcome": outcome,
        "path": "/flush_cache",
        "status": 200,
        "attempts": 1,
        "latency_ms": 1.5,
        "error": None if outcome == "succeeded" else "connection refused",
        "body": "Cache flushed.\n",
    }
    return TargetResult(**usual | fields)


def asked(port: FakeControlPort) -> FanoutRequest:
    ((_, request),) = port.calls
    assert isinstance(request, FanoutRequest)
    return request


def test_every_operation_has_its_path() -> None:
    assert set(OPERATIONS) == set(fanout.OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_a_body_passes_unchanged(client: Any, port: FakeControlPort, operation: str) -> None:
    body = b' {"rid" : "a"}\n'
    response = await client.post(f"/{operation}", data=body, headers={"Content-Type": "application/json"})
    assert response.status == 200
    assert asked(port) == FanoutRequest(operation=operation, body=body)


async def test_the_query_narrows(client: Any, port: FakeControlPort) -> None:
    query = "worker=id-1&worker=http://10.0.0.2:8000&model=m&timeout_s=2.5&include_down=1"
    assert (await client.post(f"/flush_cache?{query}")).status == 200
    assert asked(port) == FanoutRequest(
        operation="flush_cache",
        workers=("id-1", "http://10.0.0.2:8000"),
        model="m",
        timeout_s=2.5,
        include_down=True,
    )


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ("workers=a", "worker"),
        ("worker=", "expected an id"),
        ("timeout_s=0", "timeout_s"),
        ("timeout_s=inf", "timeout_s"),
        ("timeout_s=nan", "timeout_s"),
        ("timeout_s=soon", "timeout_s"),
        ("timeout_s=1&timeout_s=2", "more than once"),
        ("include_down=maybe", "include_down"),
        ("&".join(["worker=a"] * 256), "at most 255"),
    ],
)
async def test_a_bad_query_is_400_and_nobody_is_asked(
    client: Any, port: FakeControlPort, query: str, complaint: str
) -> None:
    for response in (await client.post(f"/flush_cache?{query}"), await client.get(f"/get_loads?{query}")):
        assert response.status == 400
        assert complaint in (await response.json())["error"]
    assert port.calls == []


async def test_all_did_it(client: Any, port: FakeControlPort) -> None:
    port.told = (told(1), told(2))
    response = await client.post("/flush_cache")
    answer = await response.json()
    assert response.status == 200
    assert (answer["status"], answer["message"]) == ("success", "flush_cache: 2 of 2 workers did it")
    assert answer["succeeded"] == answer["successful"] == ["http://10.0.0.1:8000", "http://10.0.0.2:8000"]
    assert (answer["failed"], answer["unsupported"], answer["workers_flushed"]) == ([], [], 2)


async def test_some_did_it(client: Any, port: FakeControlPort) -> None:
    port.told = (told(1), told(2, "failed", status=None, body=""), told(3, "unsupported", status=404))
    response = await client.post("/pause_generation", json={"mode": "in_place"})
    answer = await response.json()
    assert response.status == 206
    assert answer["status"] == "partial_success"
    assert answer["succeeded"] == ["http://10.0.0.1:8000"]
    assert answer["failed"] == [{"worker": "http://10.0.0.2:8000", "error": "connection refused"}]
    assert answer["unsupported"] == ["http://10.0.0.3:8000"]
    assert "1 of 3 workers did it; 1 failed, 1 have no such operation" in answer["message"]
    assert answer["results"][0] == {
        "id": "id-1",
        "url": "http://10.0.0.1:8000",
        "outcome": "succeeded",
        "path": "/flush_cache",
        "status": 200,
        "attempts": 1,
        "latency_ms": 1.5,
        "error": None,
        "body": "Cache flushed.\n",
    }


@pytest.mark.parametrize("outcome", ["failed", "unsupported"])
async def test_nobody_did_it(client: Any, port: FakeControlPort, outcome: str) -> None:
    port.told = (told(1, outcome),)
    response = await client.post("/start_profile")
    assert (response.status, (await response.json())["status"]) == (502, "failure")


async def test_without_workers_there_is_nothing_to_fail(client: Any) -> None:
    response = await client.post("/flush_cache")
    answer = await response.json()
    assert (response.status, answer["workers_flushed"], answer["total_workers"]) == (200, 0, 0)


async def test_a_worker_that_nobody_knows_is_404(client: Any, port: FakeControlPort) -> None:
    port.breaks_with = error(404, "WORKER_NOT_FOUND", "no worker x")
    response = await client.post("/flush_cache?worker=x")
    assert (response.status, (await response.json())["code"]) == (404, "WORKER_NOT_FOUND")


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_looking_changes_nothing(client: Any, port: FakeControlPort, operation: str) -> None:
    """A token or a log that tells readers from writers goes by the method."""
    assert (await client.get(f"/{operation}")).status == 405
    assert port.calls == []


async def test_loads_have_the_shape_of_sglangs_gateways(client: Any, port: FakeControlPort) -> None:
    port.told = (told(1), told(2, "failed"))
    details = {"loads": [{"num_used_tokens": 7}]}
    port.loads = (
        LoadView(worker="http://10.0.0.1:8000", load=7, details=details),
        LoadView(worker="http://10.0.0.2:8000", load=-1, details=None),
    )
    response = await client.get("/get_loads")
    answer = await response.json()
    assert response.status == 206
    assert answer["workers"] == [
        {"worker": "http://10.0.0.1:8000", "load": 7, "details": details},
        {"worker": "http://10.0.0.2:8000", "load": -1, "details": None},
    ]
    assert len(answer["failed"]) == 1


@pytest.mark.parametrize("others", [(), (told(2, "failed"),)])
async def test_metrics_are_200_with_the_first_page(
    client: Any, port: FakeControlPort, others: tuple[TargetResult, ...]
) -> None:
    port.told, port.engine_page = (told(1), *others), b"x 1\n"
    response = await client.get("/engine_metrics")
    assert (response.status, await response.read()) == (200, b"x 1\n")
    assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")


async def test_no_metrics_at_all_are_502(client: Any, port: FakeControlPort) -> None:
    port.told = (told(1, "failed"),)
    response = await client.get("/engine_metrics")
    assert (response.status, (await response.json())["status"]) == (502, "failure")


JSON = {"Content-Type": "application/json"}


def sent(body: bytes, *, is_announced: bool) -> io.BytesIO | AsyncIterator[bytes]:
    """Without a length it goes out in chunks."""

    async def chunks() -> AsyncIterator[bytes]:
        yield body

    return io.BytesIO(body) if is_announced else chunks()


@pytest.mark.parametrize("is_announced", [True, False])
async def test_handles_of_tensors_may_be_long(client: Any, port: FakeControlPort, is_announced: bool) -> None:
    body = b'{"x":"' + b"x" * (8 << 20) + b'"}'
    data = sent(body, is_announced=is_announced)
    assert (await client.post("/update_weights_from_tensor", data=data, headers=JSON)).status == 200
    assert asked(port).body == body


@pytest.mark.parametrize("is_announced", [True, False])
@pytest.mark.parametrize(
    ("operation", "limit"), [("update_weights_from_disk", 1 << 20), ("update_weights_from_tensor", 64 << 20)]
)
async def test_a_body_beyond_the_bound_is_413(
    client: Any, port: FakeControlPort, operation: str, limit: int, is_announced: bool
) -> None:
    data = sent(b" " * (limit + 1), is_announced=is_announced)
    with suppress(ClientConnectionResetError):  # it may be answered, and closed, before all of it was sent
        async with client.post(f"/{operation}", data=data, headers=JSON) as answer:
            assert answer.status == 413
    assert port.calls == []
