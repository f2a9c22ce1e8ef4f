"""Configuration, status and what holds for every answer."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pointsman.admin_api.app import build_app
from pointsman.admin_api.auth import Trusting
from pointsman.admin_api.handlers.fanout import OPERATIONS
from pointsman.admin_api.handlers.status import INDEX
from tests.admin_api.raw import request, send
from tests.fakes.admin_server import admin_server
from tests.fakes.control_port import CONFIG, REFUSED_CONFIG, FakeControlPort


async def test_config_is_the_ports_view(client: Any) -> None:
    response = await client.get("/config")
    assert (response.status, await response.json()) == (200, json.loads(msgspec.json.encode(CONFIG)))


async def test_an_accepted_reload_is_200(client: Any, port: FakeControlPort) -> None:
    response = await client.post("/config/reload")
    assert (response.status, (await response.json())["generation"]) == (200, 3)
    assert port.calls == [("reload", None)]


async def test_a_refused_reload_is_422_with_the_errors(client: Any, port: FakeControlPort) -> None:
    port.reload_to = REFUSED_CONFIG
    response = await client.post("/config/reload")
    body = await response.json()
    assert response.status == 422
    assert body["errors"] == list(REFUSED_CONFIG.errors)
    assert body["generation"] == 3


async def test_status_is_the_ports_view(client: Any) -> None:
    body = await (await client.get("/status")).json()
    assert body["processes"][0]["name"] == "shard-0"
    assert body["config"]["hash"] == CONFIG.hash


async def test_metrics_are_what_prometheus_takes(client: Any) -> None:
    response = await client.get("/metrics")
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = list(text_string_to_metric_families(await response.text()))
    assert families[0].samples[0].value == 5


async def test_health_and_index(client: Any) -> None:
    assert await (await client.get("/health")).text() == "OK"
    index = await (await client.get("/")).text()
    assert all(path in index for path in ("/workers", "/config/reload", "/status", "/metrics", "/add_worker"))
    assert all(operation in index for operation in OPERATIONS)
    assert (await client.head("/health")).status == 200


def test_the_index_has_every_path(port: FakeControlPort) -> None:
    routes = build_app(port, auth=Trusting()).router.routes()
    paths = {route.resource.canonical for route in routes if route.resource is not None} - {"/"}
    spelt = {"{key}": "ID", "{id}": "REQUEST-ID", "{operation}": "OPERATION", "{generation}": "G"}
    words = {word.partition("?")[0] for word in INDEX.split()}
    assert {re.sub(r"\{.*\}", lambda found: spelt[found[0]], path) for path in paths} <= words


async def test_no_such_path_and_method_are_json(client: Any) -> None:
    nowhere = await client.get("/nowhere")
    assert (nowhere.status, (await nowhere.json())["code"]) == (404, "NOT_FOUND")
    wrong = await client.delete("/workers")
    assert (wrong.status, (await wrong.json())["code"]) == (405, "METHOD_NOT_ALLOWED")
    assert "POST" in wrong.headers["Allow"]


async def test_a_defect_of_ours_is_500_without_its_traceback_and_logged_once(
    client: Any, port: FakeControlPort, capfd: pytest.CaptureFixture[str]
) -> None:
    port.breaks_with = ZeroDivisionError("a detail of ours")
    response = await client.get("/status")
    text = await response.text()
    assert (response.status, json.loads(text)["code"]) == (500, "INTERNAL")
    assert "detail" not in text
    assert "Traceback" not in text
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["reason"] for line in lines] == ["ZeroDivisionError: a detail of ours"]
    assert "control_port.py" in lines[0]["frames"][-1]
    port.breaks_with = None
    assert (await client.get("/status")).status == 200


def test_a_change_over_the_unix_socket_is_logged_with_the_user(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with admin_server(tmp_path) as server:
        assert send(server.unix, request("POST", "/config/reload")).status == 200
    assert f"uid={os.getuid()} pid={os.getpid()}" in capfd.readouterr().err


@pytest.mark.parametrize("path", ["/health", "/workers", "/nowhere", "/metrics"])
async def test_no_answer_names_its_software_or_may_be_cached(client: Any, path: str) -> None:
    headers = (await client.get(path)).headers
    assert "Server" not in headers
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"


async def test_changes_are_logged_with_who_and_what_came_of_it(
    client: Any, port: FakeControlPort, capfd: pytest.CaptureFixture[str]
) -> None:
    known = port.declare("http://127.0.0.1:8000")
    await client.get("/workers")
    await client.delete(f"/workers/{known.id}")
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [(line["event"], line["who"], line["method"], line["status"], line["peer"]) for line in lines] == [
        ("audit", "anyone", "DELETE", 202, "127.0.0.1")
    ]
    assert lines[0]["before"] == {"url": "http://127.0.0.1:8000", "weight": 1.0, "is_draining": False}
    assert lines[0]["after"] is None
