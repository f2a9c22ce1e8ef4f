"""The HTTP face of the runner: what is asked in the wrong way, quotas, and who sees what."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.batches import questions
from pointsman.daemon.batches.api import Api, Quota
from pointsman.daemon.errors import RequestError
from pointsman.daemon.stores.results import NoSpace, Transient
from tests.daemon.batches.harness import CHAT, Gateway, Life, jsonl
from tests.daemon.stores.scripted import ScriptedBackend

Connect = Callable[[web.Application], Awaitable[Any]]
QUOTA = Quota(file_bytes=10_000, total_bytes=25_000, running_batches=2, ttl_s=0)


class World:
    def __init__(self, life: Life, backend: ScriptedBackend, client: Any) -> None:
        self.life, self.backend, self.client = life, backend, client

    async def ask(self, method: str, path: str, key: str = "one", **options: Any) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {key}", **options.pop("headers", {})}
        async with self.client.request(method, path, headers=headers, **options) as answer:
            assert answer.content_type == "application/json"
            return answer.status, await answer.json()

    async def upload(self, data: bytes, key: str = "one", purpose: str = "batch", **fields: str) -> tuple[int, Any]:
        form = aiohttp.FormData()
        form.add_field("file", data, filename="in.jsonl")
        form.add_field("purpose", purpose)
        for name, value in fields.items():
            form.add_field(name, value)
        return await self.ask("POST", "/v1/files", key, data=form)

    async def create(self, key: str = "one", **changes: Any) -> tuple[int, Any]:
        if "input_file_id" not in changes:
            changes["input_file_id"] = (await self.upload(jsonl(["a"]), key))[1]["id"]
        body = {"endpoint": CHAT, "completion_window": "24h", **changes}
        return await self.ask("POST", "/v1/batches", key, json=body)


@pytest.fixture
async def world(tmp_path: Path, aiohttp_client: Connect) -> AsyncIterator[World]:
    backend = ScriptedBackend()
    life = Life(tmp_path, Gateway(), backend=backend)
    await life.service.start()
    yield World(life, backend, await aiohttp_client(Api(life.service, QUOTA).app()))
    await life.end()


def code_of(answer: tuple[int, Any]) -> tuple[int, str]:
    status, body = answer
    error = body["error"]
    assert error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    return status, error["code"]


async def test_quotas(world: World) -> None:
    assert code_of(await world.upload(b"x" * 10_001)) == (413, "file_too_large")
    for _ in range(2):
        assert (await world.upload(b"x" * 10_000))[0] == 200
    assert code_of(await world.upload(b"x" * 10_000)) == (413, "quota_exceeded")
    assert (await world.upload(b"x" * 10_000, "another"))[0] == 200, "each key has its own"
    status, files = await world.ask("GET", "/v1/files")
    assert (status, len(files["data"])) == (200, 2), "what was refused is not there"
    assert (await world.ask("DELETE", f"/v1/files/{files['data'][0]['id']}"))[0] == 200
    assert (await world.upload(b"x" * 10_000))[0] == 200, "what is deleted does not count"


async def test_quotas_hold_for_what_comes_at_once(world: World) -> None:
    world.life.gateway.hold = asyncio.Event()
    file = (await world.upload(jsonl(["a"])))[1]["id"]
    answers = await asyncio.gather(*(world.create(input_file_id=file) for _ in range(6)))
    assert sorted(status for status, _ in answers) == [200, 200, 429, 429, 429, 429]
    world.life.gateway.hold.set()
    world.life.ledger.used_bytes = lambda owner: 0  # type: ignore[method-assign] # as each sees it that comes at once
    uploads = [await world.upload(b"x" * 10_000, "another") for _ in range(3)]
    assert [status for status, _ in uploads] == [200, 200, 413]
    assert code_of(uploads[2]) == (413, "quota_exceeded")
    assert len((await world.ask("GET", "/v1/files", "another"))[1]["data"]) == 2


async def test_running_batches_are_bounded(world: World) -> None:
    world.life.gateway.hold = asyncio.Event()
    file = (await world.upload(jsonl(["a"])))[1]["id"]
    for _ in range(2):
        assert (await world.create(input_file_id=file))[0] == 200
    assert code_of(await world.create(input_file_id=file)) == (429, "too_many_batches")
    assert (await world.create("another"))[0] == 200
    world.life.gateway.hold.set()


async def test_a_store_that_refuses_is_told_and_leaves_nothing(world: World) -> None:
    put = world.backend.put_batch
    for failure, expected in ((NoSpace("full"), (507, "storage_full")), (Transient(5), (503, "storage_unavailable"))):
        world.backend.put_batch = lambda keys, *_, failure=failure: [failure] * len(keys)  # type: ignore[method-assign]
        assert code_of(await world.upload(b"x" * 100)) == expected
    world.backend.put_batch = put  # type: ignore[method-assign]
    assert (await world.ask("GET", "/v1/files"))[1]["data"] == []


async def test_content_that_is_lost_is_an_error_not_an_empty_file(world: World) -> None:
    file = (await world.upload(b"x" * 100))[1]["id"]
    world.backend.frames.clear()
    assert code_of(await world.ask("GET", f"/v1/files/{file}/content")) == (500, "content_lost")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"input_file_id": None}, "input_file_id"),
        ({"input_file_id": "file-nothing"}, "input_file_id"),
        ({"endpoint": "/v1/nothing"}, "endpoint"),
        ({"endpoint": ["x"]}, "endpoint"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"completion_window": 24}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": ["a"]}, "metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: ""}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, "output_expires_after.anchor"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after.seconds"),
    ],
)
async def test_what_a_batch_cannot_be_made_of(world: World, changes: dict[str, Any], param: str) -> None:
    status, body = await world.create(**changes)
    assert (status, body["error"]["param"]) == (400, param)


async def test_bodies_that_are_none(world: World) -> None:
    assert code_of(await world.ask("POST", "/v1/batches", data=b"{")) == (400, "invalid_json")
    assert code_of(await world.ask("POST", "/v1/batches", data=io.BytesIO(b"x" * (1 << 21)))) == (
        413,
        "payload_too_large",
    )
    assert code_of(await world.ask("POST", "/v1/files", data=b"{}")) == (400, "bad_request")
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    for data in (b"", b"--b\r\n", b"nonsense", b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n"):
        assert (await world.ask("POST", "/v1/files", data=data, headers=headers))[0] == 400
    assert code_of(await world.upload(b"x", purpose="fine-tune")) == (400, "invalid_value")
    assert (await world.ask("GET", "/v1/files"))[1]["data"] == []


async def test_paths_and_methods(world: World) -> None:
    assert code_of(await world.ask("GET", "/v1/files/file-x/nothing")) == (404, "not_found")
    assert code_of(await world.ask("GET", "/v1/files/file-x")) == (404, "file_not_found")
    assert code_of(await world.ask("GET", "/v1/batches/batch_x")) == (404, "batch_not_found")
    assert code_of(await world.ask("PUT", "/v1/batches")) == (405, "method_not_allowed")
    for query in ("limit=0", "limit=101", "limit=x", "order=up"):
        assert code_of(await world.ask("GET", f"/v1/batches?{query}")) == (400, "invalid_value")


async def test_the_checked_name_of_a_key_wins_over_the_token(world: World) -> None:
    _, file = await world.upload(b"x")
    named = {"X-Pointsman-Key": "team-a"}
    assert (await world.ask("GET", f"/v1/files/{file['id']}", headers=named))[0] == 404
    assert (await world.ask("GET", f"/v1/files/{file['id']}"))[0] == 200


async def test_the_operator_sees_all(world: World) -> None:
    made = [(await world.create(key))[1]["id"] for key in ("one", "two")]
    _, listed = await world.ask("GET", "/operator/batches")
    assert [batch["id"] for batch in listed["data"]] == made[::-1]


async def test_expiry_of_files(world: World) -> None:
    form = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    _, file = await world.upload(b"x", **form)
    assert file["expires_at"] == file["created_at"] + 3600
    form["expires_after[seconds]"] = "soon"
    assert code_of(await world.upload(b"x", **form)) == (400, "invalid_value")
    life = world.life
    assert await life.shelf.do(life.ledger.drop_expired_files, file["expires_at"] - 1) == 0
    assert await life.shelf.do(life.ledger.drop_expired_files, file["expires_at"]) == 1
    assert (await world.ask("GET", f"/v1/files/{file['id']}"))[0] == 404


async def test_output_files_and_batches_expire(world: World) -> None:
    expires = {"anchor": "created_at", "seconds": 7200}
    _, batch = await world.create(output_expires_after=expires)
    done = await world.life.until_final(batch["id"])
    _, output = await world.ask("GET", f"/v1/files/{done.output_file}")
    assert output["expires_at"] == done.completed_at + 7200  # type: ignore[operator]
    assert output["purpose"] == "batch_output"
    life = world.life
    assert await life.shelf.do(life.ledger.forget_batches, done.created_at) == 0
    assert await life.shelf.do(life.ledger.forget_batches, done.created_at + 1) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from(["input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"])


@given(st.dictionaries(FIELDS, JSON) | JSON)
def test_nothing_but_a_refusal_comes_of_nonsense(body: Any) -> None:
    try:
        questions.new_batch(json.dumps(body).encode(), "owner", 0)
    except RequestError:
        return
