"""Workers by the admin API of a real control process."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pointsman.daemon.shm.layout import STATUS_DOWN, STATUS_DRAINING, STATUS_FREE, STATUS_UP
from tests.daemon.control.harness import Supervisor, engine, supervisor, until, write


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Supervisor]:
    async with supervisor(tmp_path) as daemon:
        await daemon.start()
        yield daemon


async def test_a_healthy_worker_is_pickable_when_the_answer_comes(daemon: Supervisor) -> None:
    async with engine(models=["qwen", "llama"]) as worker:
        view = await daemon.add(worker.url, weight=2, labels={"gpu": "a100"}, api_key="sk-secret")
        assert (view["status"], view["is_healthy"]) == ("ready", True)
        (spec,) = daemon.current.workers
        assert (spec.id, spec.url, spec.address) == (view["id"], worker.url, "127.0.0.1")
        assert (spec.models, spec.weight, spec.api_key) == (("qwen", "llama"), 2.0, "sk-secret")
        assert daemon.segment.status(spec.slot) == STATUS_UP
        assert daemon.current.models == ("other", "qwen", "llama")
        assert "sk-secret" not in daemon.log_path.read_text()
        assert daemon.current.generation == daemon.segment.generation == (await daemon.get("/config"))["generation"]


async def test_a_worker_that_is_not_there_yet_is_pending_and_becomes_ready(daemon: Supervisor) -> None:
    async with engine() as worker:
        await worker.stop()
        view = await daemon.add(worker.url)
        assert (view["status"], view["is_healthy"], view["last_error"]) == ("pending", False, "connection refused")
        assert view["next_probe"] is not None
        await worker.start()
        (view,) = await daemon.workers_become(lambda workers: workers[0]["is_healthy"])
        assert (view["status"], view["last_error"]) == ("ready", None)


async def test_adds_do_not_wait_for_each_others_probes(daemon: Supervisor) -> None:
    async with engine(is_silent=True) as slow, engine(is_silent=True) as slower, engine() as quick:
        adds = [asyncio.create_task(daemon.add(worker.url)) for worker in (slow, slower)]
        await until(lambda: slow.requests and slower.requests)
        assert (await daemon.add(quick.url))["status"] == "ready"
        assert not any(add.done() for add in adds)
        started = time.monotonic()
        views = await asyncio.gather(*adds)
        assert time.monotonic() - started < 2.5
        assert [view["status"] for view in views] == ["pending", "pending"]


async def test_models_that_an_engine_announces_later_make_a_generation(daemon: Supervisor) -> None:
    async with engine(models=None) as worker:
        await daemon.add(worker.url)
        assert daemon.current.workers[0].models == ()
        await worker.stop()
        await daemon.workers_become(lambda workers: not workers[0]["is_healthy"])
        worker.models = ["new"]
        await worker.start()
        await until(lambda: daemon.current.workers[0].models == ("new",))


async def test_declared_models_are_not_asked_for(daemon: Supervisor) -> None:
    async with engine(models=["announced"]) as worker:
        await daemon.add(worker.url, models=["declared"])
        assert daemon.current.workers[0].models == ("declared",)
        assert "/v1/models" not in worker.requests


async def test_a_removed_worker_drains_and_its_slot_is_kept_until_the_last_request_ends(daemon: Supervisor) -> None:
    async with engine() as worker:
        view = await daemon.add(worker.url)
        slot = daemon.current.workers[0].slot
        daemon.segment.words.book(1, slot, 100)
        status, _ = await daemon.call("DELETE", f"/workers/{view['id']}")
        assert status == 202
        assert daemon.segment.status(slot) == STATUS_DRAINING
        assert [spec.url for spec in daemon.current.workers] == []
        assert await daemon.workers() == []
        (draining,) = await daemon.workers("draining")
        assert (draining["id"], draining["status"]) == (view["id"], "draining")
        again = await daemon.add(worker.url)
        assert again["id"] != view["id"]
        assert daemon.current.workers[0].slot != slot
        assert daemon.segment.status(slot) == STATUS_DRAINING
        daemon.segment.words.release(1, slot, 100)
        await daemon.workers_become(lambda workers: not workers, "draining")
        assert daemon.segment.status(slot) == STATUS_FREE
        assert (await daemon.call("GET", f"/workers/{view['id']}"))[0] == 404


async def test_a_worker_that_refuses_is_out_at_once_and_comes_back(daemon: Supervisor) -> None:
    async with engine() as worker:
        await daemon.add(worker.url)
        await worker.stop()
        (view,) = await daemon.workers_become(lambda workers: not workers[0]["is_healthy"])
        assert (view["status"], view["last_error"]) == ("not_ready", "connection refused")
        await worker.start()
        await daemon.workers_become(lambda workers: workers[0]["is_healthy"])


async def test_what_a_shard_finds_out_is_shown_and_looked_into(tmp_path: Path) -> None:
    async with supervisor(tmp_path, health_interval_s=60.0) as daemon, engine() as worker:
        await daemon.start()
        await daemon.add(worker.url)
        slot = daemon.current.workers[0].slot
        worker.is_silent = True
        assert daemon.segment.set_status(slot, STATUS_DOWN, expected=STATUS_UP)
        (view,) = await daemon.workers_become(lambda workers: bool(workers[0]["last_error"]))
        assert (view["status"], view["last_error"]) == ("not_ready", "connection refused (seen by a shard)")
        worker.is_silent = False
        await until(lambda: daemon.segment.status(slot) == STATUS_UP)


async def test_an_unhealthy_answer_counts_by_threshold(daemon: Supervisor) -> None:
    async with engine() as worker:
        await daemon.add(worker.url)
        before = len(worker.requests)
        worker.health_status = 500
        (view,) = await daemon.workers_become(lambda workers: not workers[0]["is_healthy"])
        assert view["last_error"] == "HTTP 500"
        assert len(worker.requests) - before >= 3


@pytest.mark.parametrize(
    "url",
    ["http://169.254.169.254", "http://8.8.8.8:8000", "http://127.0.0.1:1", "ftp://x", "http://no-such-name.invalid:1"],
)
async def test_urls_that_are_not_allowed(daemon: Supervisor, url: str) -> None:
    status, body = await daemon.call("POST", "/workers", {"url": url})
    assert (status, body["code"]) == (400, "BAD_REQUEST")
    assert daemon.current.workers == ()


async def test_a_url_is_added_once(daemon: Supervisor) -> None:
    async with engine() as worker:
        answers = await asyncio.gather(*(daemon.call("POST", "/workers", {"url": worker.url}) for _ in range(5)))
        assert sorted(status for status, _ in answers) == [202, 409, 409, 409, 409]
        status, body = await daemon.call("POST", "/workers", {"url": worker.url + "/"})
        assert (status, body["code"]) == (409, "WORKER_ALREADY_EXISTS")


async def test_a_worker_that_is_removed_while_it_is_added_leaves_no_trace(daemon: Supervisor) -> None:
    async with engine(is_silent=True) as worker, engine() as other:
        add = asyncio.create_task(daemon.call("POST", "/workers", {"url": worker.url}))
        await until(lambda: worker.requests)
        (view,) = await daemon.workers()
        assert (await daemon.call("DELETE", f"/workers/{view['id']}"))[0] == 202
        await daemon.workers_become(lambda workers: not workers, "draining")
        assert (await daemon.add(other.url))["status"] == "ready"  # in the same slot
        worker.is_silent = False
        assert (await add)[0] == 409
        assert daemon.segment.status(daemon.current.workers[0].slot) == STATUS_UP
        assert [one["url"] for one in await daemon.workers()] == [other.url]


async def test_a_patch_is_published(daemon: Supervisor) -> None:
    async with engine() as worker:
        view = await daemon.add(worker.url, labels={"a": "b"}, promptLenBucketMinLength=3)
        body = {"weight": 4, "prompt_tokens_max": 100, "kv_tokens": 5000}
        status, _ = await daemon.call("PATCH", f"/workers/{view['id']}", body)
        assert status == 202
        (spec,) = daemon.current.workers
        assert (spec.weight, spec.labels, spec.id) == (4.0, {"a": "b"}, view["id"])
        assert (spec.prompt_tokens_min, spec.prompt_tokens_max, spec.kv_tokens) == (3, 100, 5000)
        (shown,) = await daemon.workers()
        assert (shown["prompt_tokens_min"], shown["prompt_tokens_max"], shown["kv_tokens"]) == (3, 100, 5000)
        status, answer = await daemon.call("PATCH", f"/workers/{view['id']}", {"prompt_tokens_max": 2})
        assert (status, answer["code"]) == (400, "BAD_REQUEST")
        assert daemon.current.workers == (spec,)


async def test_there_are_as_many_workers_as_slots(tmp_path: Path) -> None:
    async with supervisor(tmp_path, max_workers=1) as daemon, engine() as one, engine() as two:
        await daemon.start()
        view = await daemon.add(one.url)
        status, body = await daemon.call("POST", "/workers", {"url": two.url})
        assert (status, body["code"]) == (503, "WORKER_LIMIT")
        await daemon.call("DELETE", f"/workers/{view['id']}")
        await daemon.workers_become(lambda workers: not workers, "draining")
        await daemon.add(two.url)


async def test_a_worker_that_the_shards_refuse_is_not_kept(daemon: Supervisor) -> None:
    async with engine() as worker:
        daemon.refusal = "cannot load"
        status, body = await daemon.call("POST", "/workers", {"url": worker.url})
        assert (status, body["code"]) == (503, "NOT_PUBLISHED")
        assert await daemon.workers() == []
        daemon.refusal = None
        assert (await daemon.add(worker.url))["status"] == "ready"


async def test_a_state_directory_that_cannot_be_written_refuses_the_change(daemon: Supervisor) -> None:
    async with engine() as worker:
        state = Path(daemon.settings.state_dir)
        (state / "workers.state.tmp").mkdir()
        status, body = await daemon.call("POST", "/workers", {"url": worker.url})
        assert (status, body["code"]) == (500, "STATE_NOT_SAVED")
        assert await daemon.workers() == []


async def test_a_file_owns_what_it_declares(tmp_path: Path) -> None:
    async with engine() as declared, engine() as both:
        file = write(tmp_path / "workers.json", {"workers": [{"url": declared.url, "weight": 3}]})
        async with supervisor(tmp_path, workers_file=str(file)) as daemon:
            await daemon.start()
            (view,) = await daemon.workers()
            assert (view["source"], view["source_path"], view["weight"]) == ("file", str(file), 3)
            for method, body in (("DELETE", None), ("PATCH", {"weight": 1})):
                status, answer = await daemon.call(method, f"/workers/{view['id']}", body)
                assert (status, answer["code"]) == (409, "WORKER_DECLARED_IN_FILE")
                assert str(file) in answer["error"]
            api = await daemon.add(both.url, weight=5)
            write(file, {"workers": [{"url": both.url, "weight": 7}]})
            (view,) = await daemon.workers_become(lambda workers: len(workers) == 1)
            assert (view["id"], view["source"], view["weight"]) == (api["id"], "file", 7)
            write(file, {"workers": []})
            (view,) = await daemon.workers_become(lambda workers: workers[0]["source"] == "api")
            assert (view["id"], view["weight"]) == (api["id"], 5)
