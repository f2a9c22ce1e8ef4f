"""/workers: the union of what generations 2 and 3 of SGLang's gateways answer."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
import yarl

from pointsman.admin_api.ports import WorkerPatch, WorkerRequest
from tests.fakes.control_port import FakeControlPort

URL = "http://127.0.0.1:8000"


async def test_add_answers_202_with_the_fields_of_both_generations(client: Any, port: FakeControlPort) -> None:
    response = await client.post("/workers", json={"url": URL})
    body = await response.json()
    worker_id = port.live[0].id
    assert response.status == 202
    assert response.headers["Location"] == body["location"] == f"/workers/{worker_id}"
    assert (body["status"], body["success"], body["worker_id"], body["url"]) == ("accepted", True, worker_id, URL)
    assert body["worker"]["id"] == worker_id
    assert body["warnings"] == []
    assert URL in body["message"]


async def test_add_passes_everything_on(client: Any, port: FakeControlPort) -> None:
    body = {
        "url": URL,
        "worker_type": "prefill",
        "bootstrap_port": 8998,
        "models": ["a", {"id": "b", "aliases": ["c"]}],
        "weight": 2,
        "labels": {"rack": "1"},
        "api_key": "sk-worker",
        "promptLenBucketMinLength": 10,
        "prompt_tokens_max": 8192,
        "kv_tokens": 400000,
    }
    response = await client.post("/workers", json=body)
    assert response.status == 202, await response.text()
    expected = WorkerRequest(
        url=URL,
        worker_type="prefill",
        bootstrap_port=8998,
        models=("a", "b"),
        weight=2.0,
        labels={"rack": "1"},
        api_key="sk-worker",
        prompt_tokens_min=10,
        prompt_tokens_max=8192,
        kv_tokens=400_000,
    )
    assert port.calls == [("add", expected)]
    assert "sk-worker" not in await response.text()
    shown = (await response.json())["worker"]
    assert shown["has_api_key"] is True
    assert (shown["prompt_tokens_min"], shown["prompt_tokens_max"], shown["kv_tokens"]) == (10, 8192, 400_000)


async def test_fields_of_other_gateways_are_taken_and_named(client: Any, port: FakeControlPort) -> None:
    body = {"url": URL, "priority": 10, "cost": 0.5, "runtime": "sglang", "connection_mode": "HTTP", "health": None}
    response = await client.post("/workers", json=body | {"model_id": "m", "dp_size": 1})
    answer = await response.json()
    assert response.status == 202, answer
    assert [warning.split()[0] for warning in answer["warnings"]] == ["priority", "cost", "runtime"]
    assert port.live[0].models == ("m",)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "url: is required"),
        ({"url": URL, "wieght": 2}, "wieght: unknown key (did you mean 'weight'?)"),
        ({"url": URL, "weight": 0}, "weight: expected more than 0"),
        ({"url": URL, "weight": "2"}, "weight: expected a number"),
        ({"url": URL, "worker_type": "encode"}, "worker_type: expected 'regular'"),
        ({"url": URL, "connection_mode": "grpc"}, "connection_mode"),
        ({"url": URL, "dp_size": 8}, "dp_size"),
        ({"url": URL, "dp_rank": 1}, "dp_rank: unknown key"),
        ({"url": URL, "models": [""]}, "models.0: must not be empty"),
        ({"url": URL, "models": [{"name": "x"}]}, "models.0: expected a string"),
        ({"url": URL, "models": "x"}, "models: expected a list"),
        ({"url": URL, "labels": {"a": 1}}, "labels.a: expected a string"),
        ({"url": URL, "bootstrap_port": 70000}, "bootstrap_port: expected at most 65535"),
        ({"url": URL, "api_key": ""}, "api_key"),
        ({"url": URL, "prompt_tokens_min": 9, "prompt_tokens_max": 8}, "prompt_tokens_max: is below the shortest"),
        ({"url": URL, "kv_tokens": 0}, "kv_tokens: expected at least 1"),
        ([URL], "expected a JSON object"),
    ],
)
async def test_a_wrong_body_is_400_and_says_where(client: Any, port: FakeControlPort, body: Any, message: str) -> None:
    response = await client.post("/workers", json=body)
    answer = await response.json()
    assert (response.status, answer["code"]) == (400, "BAD_REQUEST")
    assert message in answer["error"]
    assert port.calls == []


async def test_all_defects_come_at_once(client: Any) -> None:
    response = await client.post("/workers", json={"weight": 0, "colour": "red"})
    text = (await response.json())["error"]
    assert all(word in text for word in ("url:", "weight:", "colour:"))


async def test_an_api_key_of_the_wrong_type_is_not_shown(client: Any) -> None:
    response = await client.post("/workers", json={"url": URL, "api_key": 123456})
    assert response.status == 400
    assert "123456" not in await response.text()


@pytest.mark.parametrize("body", [b"{", b"", b"\xff\xfe", b'{"url": NaN}'])
async def test_what_is_not_json_is_400(client: Any, body: bytes) -> None:
    response = await client.post("/workers", data=body, headers={"Content-Type": "application/json"})
    assert (response.status, (await response.json())["code"]) == (400, "BAD_REQUEST")


async def test_errors_of_the_port_keep_status_and_code(client: Any) -> None:
    await client.post("/workers", json={"url": URL})
    response = await client.post("/workers", json={"url": URL})
    assert response.status == 409
    assert (await response.json())["code"] == "WORKER_ALREADY_EXISTS"


async def test_the_list_has_our_fields_and_theirs(client: Any, port: FakeControlPort) -> None:
    port.declare(URL, models=("qwen",), in_flight=3)
    port.declare("http://127.0.0.1:8001", worker_type="prefill", status="not_ready", is_healthy=False)
    body = await (await client.get("/workers")).json()
    assert body["total"] == 2
    assert body["stats"] == {"prefill_count": 1, "decode_count": 0, "regular_count": 1}
    first = body["workers"][0]
    theirs = {"model_id": "qwen", "load": 3, "connection_mode": "http", "priority": 50, "cost": 1.0}
    assert theirs.items() <= first.items()
    ours = json.loads(msgspec.json.encode(port.live[0]))
    assert {name: first[name] for name in ours} == ours
    assert body["workers"][1]["model_id"] == "unknown"


async def test_the_list_is_filtered_by_the_port(client: Any, port: FakeControlPort) -> None:
    one = port.declare(URL, models=("a",))
    port.declare("http://127.0.0.1:8001", models=("b",))
    port.draining = [msgspec.structs.replace(one, id="gone", url="http://127.0.0.1:8002", status="draining")]

    async def ids(query: str) -> list[str]:
        return [worker["id"] for worker in (await (await client.get(f"/workers{query}")).json())["workers"]]

    assert await ids("?model=a") == [one.id]
    assert await ids("?state=draining") == ["gone"]
    assert await ids("?state=all") == [port.live[0].id, port.live[1].id, "gone"]


@pytest.mark.parametrize("query", ["?state=gone", "?modle=a"])
async def test_a_wrong_filter_is_400_not_everything(client: Any, query: str) -> None:
    assert (await client.get(f"/workers{query}")).status == 400


@pytest.mark.parametrize(
    "key",
    [
        "{id}",
        quote(URL, safe=""),
        quote(URL, safe="/"),
        URL,
        quote(URL + "/", safe=""),
        quote("HTTP://127.0.0.1:8000", safe=""),
    ],
)
async def test_a_worker_is_found_by_id_and_by_url_however_it_is_written(
    client: Any, port: FakeControlPort, key: str
) -> None:
    known = port.declare(URL)
    path = client.make_url("/workers/").human_repr() + key.replace("{id}", known.id)
    response = await client.session.get(yarl.URL(path, encoded=True))
    assert response.status == 200, await response.text()
    assert (await response.json())["id"] == known.id


async def test_a_url_with_a_path_and_escapes_is_decoded_once(client: Any, port: FakeControlPort) -> None:
    url = "http://[::1]:8000/a%2Fb/v1"
    known = port.declare(url)
    response = await client.get(f"/workers/{quote(url, safe='')}", allow_redirects=False)
    assert (await response.json())["id"] == known.id


async def test_who_is_not_there_is_404(client: Any) -> None:
    for method in ("get", "delete"):
        response = await getattr(client, method)("/workers/nobody")
        assert (response.status, (await response.json())["code"]) == (404, "WORKER_NOT_FOUND")


async def test_patch_changes_only_what_it_names(client: Any, port: FakeControlPort) -> None:
    known = port.declare(URL, labels={"rack": "1"})
    response = await client.patch(f"/workers/{known.id}", json={"weight": 3, "api_key": None})
    assert response.status == 202
    assert (await response.json())["worker"]["weight"] == 3
    assert port.calls == [("patch", (known.id, WorkerPatch(weight=3.0, api_key=None)))]
    assert port.live[0].labels == {"rack": "1"}


async def test_patch_of_what_a_worker_takes_and_holds(client: Any, port: FakeControlPort) -> None:
    known = port.declare(URL)
    body = {"promptLenBucketMaxLength": 0, "prompt_tokens_min": 3, "kv_tokens": None}
    assert (await client.patch(f"/workers/{known.id}", json=body)).status == 202
    changes = WorkerPatch(prompt_tokens_min=3, prompt_tokens_max=2**31 - 1, kv_tokens=None)
    assert port.calls == [("patch", (known.id, changes))]


@pytest.mark.parametrize("body", [{"url": URL}, {"worker_type": "decode"}, {"priority": 1}, {}, {"weight": None}])
async def test_patch_of_anything_else_is_400(client: Any, port: FakeControlPort, body: dict[str, Any]) -> None:
    known = port.declare(URL)
    assert (await client.patch(f"/workers/{known.id}", json=body)).status == 400
    assert port.calls == []


async def test_put_sets_what_it_does_not_name_back(client: Any, port: FakeControlPort) -> None:
    known = port.declare(URL, labels={"rack": "1"}, weight=5.0, models=("a",))
    response = await client.put(f"/workers/{known.id}", json={"url": URL + "/", "models": ["b"]})
    assert response.status == 202, await response.text()
    changed = port.live[0]
    assert (changed.weight, changed.labels, changed.models) == (1.0, {}, ("b",))


@pytest.mark.parametrize(
    "change", [{"url": "http://127.0.0.1:9"}, {"worker_type": "decode"}, {"bootstrap_port": 1}, {"url": "ftp://x"}]
)
async def test_put_cannot_make_another_worker_of_it(client: Any, port: FakeControlPort, change: dict[str, Any]) -> None:
    known = port.declare(URL)
    response = await client.put(f"/workers/{known.id}", json={"url": URL} | change)
    assert (response.status, port.live[0]) == (400, known)


async def test_delete_is_202_and_says_what_still_runs(client: Any, port: FakeControlPort) -> None:
    known = port.declare(URL, in_flight=2)
    response = await client.delete(f"/workers/{quote(URL, safe='')}")
    body = await response.json()
    assert response.status == 202
    assert (body["status"], body["success"], body["worker_id"]) == ("accepted", True, known.id)
    assert "2 running requests" in body["message"]
    assert port.live == []


async def test_delete_of_a_worker_that_a_file_owns_is_409_with_the_path(client: Any, port: FakeControlPort) -> None:
    known = port.declare(URL, file="/etc/pointsman/workers.json")
    response = await client.delete(f"/workers/{known.id}")
    body = await response.json()
    assert (response.status, body["code"]) == (409, "WORKER_DECLARED_IN_FILE")
    assert "/etc/pointsman/workers.json" in body["error"]


# --- drain


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        (None, (None, "close")),
        ({}, (None, "close")),
        ({"deadline_s": 60}, (60.0, "close")),
        ({"deadline_s": 0.5, "then": "keep"}, (0.5, "keep")),
        ({"deadline_s": 0, "then": "close"}, (0.0, "close")),
    ],
)
async def test_a_drain_is_202_and_shows_where_it_stands(
    client: Any, port: FakeControlPort, body: Any, asked: tuple[Any, ...]
) -> None:
    worker = port.declare(URL, file="/etc/pointsman/workers.json")
    response = await client.post(f"/workers/{worker.id}/drain", json=body)
    assert response.status == 202
    answer = await response.json()
    assert answer["message"] == f"Worker {URL} gets no new requests"
    assert (answer["worker"]["status"], answer["worker"]["drain"]["is_removed"]) == ("draining", False)
    assert ("drain", (worker.id, *asked)) in port.calls
    listed = (await (await client.get("/status")).json())["draining"]
    assert [one["url"] for one in listed] == [URL]
    response = await client.post(f"/workers/{quote(URL, safe='')}/undrain")
    answer = await response.json()
    assert (response.status, answer["worker"]["drain"]) == (200, None)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "; 3 running requests go on"),
        ({"deadline_s": 60, "then": "keep"}, "; 3 running requests go on"),
        ({"deadline_s": 60}, "; 3 running requests have 60 s"),
        ({"deadline_s": 0}, "; 3 requests are ended"),
    ],
)
async def test_a_drain_says_what_becomes_of_running_requests(
    client: Any, port: FakeControlPort, asked: dict[str, Any], message: str
) -> None:
    port.declare(URL, in_flight=3)
    answer = await (await client.post(f"/workers/{quote(URL, safe='')}/drain", json=asked)).json()
    assert answer["message"] == f"Worker {URL} gets no new requests{message}"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"deadline_s": -1}, "deadline_s"),
        ({"deadline_s": "60"}, "deadline_s"),
        ({"deadline_s": 10**9}, "deadline_s"),
        ({"deadline_s": 1, "then": "kill"}, "then"),
        ({"then": "keep"}, "give deadline_s, too"),
        ({"deadlines": 1}, "deadline_s"),
    ],
)
async def test_a_wrong_drain_is_400_and_nothing_is_drained(
    client: Any, port: FakeControlPort, body: dict[str, Any], message: str
) -> None:
    port.declare(URL)
    response = await client.post(f"/workers/{quote(URL, safe='')}/drain", json=body)
    assert response.status == 400
    assert message in (await response.json())["error"]
    assert port.calls == []


@pytest.mark.parametrize(
    ("query", "deadline_s"),
    [
        ("", None),
        ("?force=0", None),
        ("?deadline_s=90", 90.0),
        ("?force=1", 0.0),
        ("?force", 0.0),
        ("?force=true", 0.0),
    ],
)
async def test_delete_may_set_a_deadline_for_what_runs(
    client: Any, port: FakeControlPort, query: str, deadline_s: float | None
) -> None:
    worker = port.declare(URL)
    assert (await client.delete(f"/workers/{worker.id}{query}")).status == 202
    assert port.calls == [("remove", worker.id if deadline_s is None else (worker.id, deadline_s))]


@pytest.mark.parametrize(
    "query", ["deadline_s=soon", "deadline_s=-1", "deadline_s=nan", "force=2", "force&deadline_s=1", "forced=1"]
)
async def test_delete_with_a_wrong_query_removes_nothing(client: Any, port: FakeControlPort, query: str) -> None:
    worker = port.declare(URL)
    response = await client.delete(f"/workers/{worker.id}?{query}")
    assert response.status == 400, await response.text()
    assert port.calls == []


async def test_saving_what_was_learned(client: Any, port: FakeControlPort) -> None:
    response = await client.post("/state/snapshot")
    assert (response.status, (await response.json())["path"]) == (200, "/var/lib/pointsman/routing.state")
    assert port.calls == [("save_state", None)]
