"""A whole batch on real files: what it ends with, whatever is in its way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pointsman.daemon.batches import attempts
from pointsman.daemon.batches.attempts import Answer, Unreachable
from pointsman.daemon.batches.lifecycle import Event, NotPossible, Status
from pointsman.daemon.batches.recorder import result_key
from pointsman.daemon.batches.rows import BatchRow
from pointsman.daemon.stores.results import NoSpace
from tests.daemon.batches.harness import OWNER, Gateway, Life, jsonl
from tests.daemon.stores.scripted import ScriptedBackend

Begin = Callable[..., Life]


@pytest.fixture
async def begin(tmp_path: Path) -> AsyncIterator[Begin]:
    lives: list[Life] = []

    def start(gateway: Gateway | None = None, **options: Any) -> Life:
        life = Life(tmp_path, gateway or Gateway(), **options)
        lives.append(life)
        return life

    yield start
    for life in lives:
        await life.end()


async def results(life: Life, batch: BatchRow) -> tuple[dict[str, Any], dict[str, Any]]:
    """(lines of the output, lines of the error file) by custom_id, each once."""
    files = [await life.content(batch.output_file), await life.content(batch.error_file)]
    found = [{line["custom_id"]: line for line in lines} for lines in files]
    assert [len(one) for one in found] == [len(lines) for lines in files], "no custom_id twice"
    assert not found[0].keys() & found[1].keys()
    return found[0], found[1]


async def test_every_line_has_its_answer_in_the_order_of_the_input(begin: Begin) -> None:
    life = begin()
    await life.service.start()
    prompts = [f"p{n}" for n in range(50)]
    batch = await life.until_final((await life.submit(jsonl(prompts))).id)
    assert (batch.status, batch.total, batch.completed, batch.failed) == (Status.COMPLETED, 50, 50, 0)
    lines = await life.content(batch.output_file)
    assert [line["custom_id"] for line in lines] == [f"id-{n}" for n in range(50)]
    answers = [line["response"]["body"]["choices"][0]["message"]["content"] for line in lines]
    assert answers == prompts
    assert set(life.gateway.asked.values()) == {1}
    assert life.gateway.most_at_once <= 8
    assert life.stored_keys() == 2, "input and output, a chunk each; the results are gone"


async def test_lines_that_share_a_prefix_are_asked_one_after_the_other(begin: Begin) -> None:
    life = begin()
    await life.service.start()
    prompts = [f"{'ABCD'[n % 4] * 300} {n}" for n in range(40)]
    await life.until_final((await life.submit(jsonl(prompts))).id)
    heads = [prompt[0] for prompt in life.gateway.order]
    assert sum(a != b for a, b in pairwise(heads)) < 3 * 4


async def test_failures_have_their_cause_and_retries_their_end(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "FIRST_PAUSE_S", 0.01)
    gateway = Gateway()
    broken = Answer(500, "r", b'{"error":{"message":"boom","code":"oops"}}')
    refused = Answer(400, "r", b'{"error":{"message":"too long","code":"context"}}')
    gateway.answers = {
        "flaky": [broken, Unreachable("gone"), Answer(503, "r", b"{}"), broken],
        "broken": [broken] * 3,
        "bad": [refused],
    }
    life = begin(gateway)
    await life.service.start()
    batch = await life.until_final((await life.submit(jsonl(["good", "flaky", "broken", "bad"]))).id)
    assert (batch.status, batch.completed, batch.failed) == (Status.COMPLETED, 2, 2)
    done, failed = await results(life, batch)
    assert set(done) == {"id-0", "id-1"}
    assert failed["id-2"]["error"] == {"code": "oops", "message": "boom"}
    assert failed["id-2"]["response"]["status_code"] == 500
    assert failed["id-3"]["error"] == {"code": "context", "message": "too long"}
    assert dict(gateway.asked) == {"good": 1, "flaky": 5, "broken": 3, "bad": 1}


async def test_what_is_wrong_with_the_input_is_told_by_line_and_nothing_is_run(begin: Begin) -> None:
    life = begin()
    await life.service.start()
    lines = jsonl(["a", "b", "c"]).splitlines(keepends=True)
    data = lines[0] + b"\n" + b"{nonsense\n" + lines[1] + lines[0] + lines[2].replace(b"POST", b"PUT")
    batch = await life.until_final((await life.submit(data)).id)
    assert batch.status is Status.FAILED
    assert [(error["line"], error["code"]) for error in batch.errors or []] == [
        (3, "invalid_json_line"),
        (5, "duplicate_custom_id"),
        (6, "invalid_method"),
    ]
    assert not life.gateway.asked
    assert batch.output_file is None


@pytest.mark.parametrize(
    ("data", "code"), [(b"", "empty_file"), (b"\n \n", "empty_file"), (jsonl(["x"] * 1001), "too_many_requests")]
)
async def test_inputs_that_are_no_batch(begin: Begin, data: bytes, code: str) -> None:
    life = begin()
    await life.service.start()
    batch = await life.until_final((await life.submit(data)).id)
    assert batch.status is Status.FAILED
    assert [error["code"] for error in batch.errors or []] == [code]


async def test_a_line_longer_than_allowed_is_named(begin: Begin) -> None:
    life = begin()
    await life.service.start()
    batch = await life.until_final((await life.submit(jsonl(["a", "x" * 100_001, "b"]))).id)
    assert [(error["line"], error["code"]) for error in batch.errors or []] == [(2, "line_too_long")]


async def test_cancelling_keeps_what_is_done_and_accounts_for_the_rest(begin: Begin) -> None:
    gateway = Gateway()
    life = begin(gateway)
    await life.service.start()
    batch = await life.submit(jsonl([f"p{n}" for n in range(30)]))

    async def some_are_done() -> bool:
        found: BatchRow = await life.look(life.ledger.batch, batch.id)
        if found.completed >= 5:
            gateway.hold = asyncio.Event()  # the rest stands still
            return True
        return False

    await life.until(some_are_done)
    assert (await life.service.cancel(batch.id)).status is Status.CANCELLING
    done = await life.until_final(batch.id)
    assert done.status is Status.CANCELLED
    assert done.cancelled_at is not None
    good, failed = await results(life, done)
    assert len(good) == done.completed >= 5
    assert len(good) + len(failed) == done.total == done.completed + done.failed == 30
    assert {line["error"]["code"] for line in failed.values()} <= {"batch_cancelled"}


async def test_a_batch_that_is_cancelled_before_its_input_is_read_has_no_lines(begin: Begin) -> None:
    life = begin()
    batch = await life.submit(jsonl(["a", "b"]))  # before the service has its tasks
    await life.service.cancel(batch.id)
    await life.service.start()
    done = await life.until_final(batch.id)
    assert (done.status, done.total, done.output_file, done.error_file) == (Status.CANCELLED, 0, None, None)


async def test_a_window_that_is_over_ends_the_batch_with_what_is_done(begin: Begin) -> None:
    gateway = Gateway()
    gateway.answers = {"slow": [Answer(503, "r", b"{}")] * 1000}
    life = begin(gateway)
    await life.service.start()
    done = await life.until_final((await life.submit(jsonl(["quick", "slow"]), window_s=1)).id)
    assert (done.status, done.completed, done.failed) == (Status.EXPIRED, 1, 1)
    good, failed = await results(life, done)
    assert set(good) == {"id-0"}
    assert failed["id-1"]["error"]["code"] == "batch_expired"


async def test_lost_results_are_run_again_and_reported(begin: Begin) -> None:
    backend = ScriptedBackend()
    life = begin(backend=backend)
    await life.service.start()
    gateway = life.gateway
    gateway.answers = {"last": [Answer(503, "r", b"{}")]}
    batch = await life.submit(jsonl(["a", "b", "last"]))

    async def two_are_done() -> bool:
        found: BatchRow = await life.look(life.ledger.batch, batch.id)
        return found.completed == 2

    await life.until(two_are_done)
    del backend.frames[result_key(batch.id, 1)]
    done = await life.until_final(batch.id)
    assert (done.status, done.completed, done.failed, done.lost) == (Status.COMPLETED, 3, 0, 1)
    assert dict(gateway.asked) == {"a": 2, "b": 1, "last": 2}
    assert len((await results(life, done))[0]) == 3


async def test_a_store_of_results_that_loses_everything_costs_work_and_no_answer(begin: Begin) -> None:
    results_alone = ScriptedBackend()
    life = begin(results=results_alone)
    await life.service.start()
    life.gateway.answers = {"p9": [Answer(503, "r", b"{}")]}
    batch = await life.submit(jsonl([f"p{n}" for n in range(10)]))

    async def most_are_done() -> bool:
        found: BatchRow = await life.look(life.ledger.batch, batch.id)
        return found.completed == 9

    await life.until(most_are_done)
    assert len(results_alone.frames) == 9
    results_alone.frames.clear()
    done = await life.until_final(batch.id)
    assert (done.status, done.completed, done.failed, done.lost) == (Status.COMPLETED, 10, 0, 9)
    assert len((await results(life, done))[0]) == 10
    assert results_alone.frames == {}, "no file is there, and the results are gone"
    assert life.stored_keys() == 2


async def test_results_that_are_lost_again_and_again_become_errors(begin: Begin) -> None:
    backend = ScriptedBackend()
    life = begin(backend=backend)
    await life.service.start()
    keep = backend.get_batch

    def lose(keys: Any, timeout_s: float) -> Any:
        for key in keys:
            if key.endswith("/1"):
                backend.frames.pop(key, None)
        return keep(keys, timeout_s)

    backend.get_batch = lose  # type: ignore[method-assign]
    done = await life.until_final((await life.submit(jsonl(["a", "b"]))).id)
    assert (done.status, done.completed, done.failed, done.lost) == (Status.COMPLETED, 1, 1, 3)
    good, failed = await results(life, done)
    assert set(good) == {"id-1"}
    assert failed["id-0"]["error"]["code"] == "result_lost"


async def test_a_full_store_pauses_and_loses_nothing(begin: Begin) -> None:
    backend = ScriptedBackend()
    life = begin(backend=backend)
    await life.service.start()
    put = backend.put_batch
    is_full = False

    def refuse(keys: Any, frames: Any, ttl_s: Any, timeout_s: float) -> Any:
        return [NoSpace("full")] * len(keys) if is_full else put(keys, frames, ttl_s, timeout_s)

    backend.put_batch = refuse  # type: ignore[method-assign]
    file_is_in = asyncio.Event()
    life.gateway.hold = file_is_in
    batch = await life.submit(jsonl([f"p{n}" for n in range(60)]))
    is_full = True
    file_is_in.set()

    async def is_paused() -> bool:
        return life.service.trouble(batch.id) == "no_space"

    await life.until(is_paused)
    asked = sum(life.gateway.asked.values())
    assert asked <= 16, "no more than the open lines"
    is_full = False
    done = await life.until_final(batch.id)
    assert (done.status, done.completed) == (Status.COMPLETED, 60)
    assert set(life.gateway.asked.values()) == {1}, "what was answered while the store was full was kept"
    assert life.service.trouble(batch.id) == ""


async def test_a_result_that_the_store_never_takes_is_an_error_line(begin: Begin) -> None:
    backend = ScriptedBackend()
    backend.max_value_bytes = 3000
    gateway = Gateway()
    gateway.answers = {"big": [Answer(200, "r", json.dumps("x" * 4000).encode())]}
    life = begin(gateway, backend=backend)
    await life.service.start()
    done = await life.until_final((await life.submit(jsonl(["big", "small"]))).id)
    assert (done.completed, done.failed) == (1, 1)
    assert (await results(life, done))[1]["id-0"]["error"]["code"] == "result_too_large"


async def test_an_input_that_the_store_has_lost_fails_the_batch(begin: Begin) -> None:
    backend = ScriptedBackend()
    life = begin(backend=backend)
    batch = await life.submit(jsonl(["a"]))
    backend.frames.clear()
    await life.service.start()
    done = await life.until_final(batch.id)
    assert done.status is Status.FAILED
    assert [error["code"] for error in done.errors or []] == ["input_lost"]


async def test_unfinished_uploads_and_dropped_files_are_removed(begin: Begin) -> None:
    life = begin()
    file = await life.upload(b"x" * 1000)
    await life.shelf.do(life.ledger.begin_file, "file-unfinished", OWNER, "f", "batch", 1)
    await life.shelf.do(life.ledger.extend_file, "file-unfinished", 3, 10)
    await life.shelf.do(life.ledger.drop_file, file.id)
    await life.service.start()

    async def is_clean() -> bool:
        return not await life.look(life.ledger.dropped_files, 10)

    await life.until(is_clean)
    assert life.stored_keys() == 0


async def test_the_store_is_tidied_now_and_then(begin: Begin) -> None:
    backend = ScriptedBackend()
    life = begin(backend=backend)
    await life.service.start()

    async def is_tidied() -> bool:
        return backend.tidied > 0

    await life.until(is_tidied)


async def test_two_batches_share_the_allowance(begin: Begin) -> None:
    life = begin()
    await life.service.start()
    first = await life.submit(jsonl([f"a{n}" for n in range(40)]))
    second = await life.submit(jsonl([f"b{n}" for n in range(40)]))
    for batch in (first, second):
        assert (await life.until_final(batch.id)).completed == 40
    heads = [prompt[0] for prompt in life.gateway.order]
    assert "b" in heads[: heads.index("a") + 60], "nobody waits for the end of the other"
    assert life.gateway.most_at_once <= 8


async def test_events_that_have_no_place_change_nothing(begin: Begin) -> None:
    life = begin()
    batch = await life.submit(jsonl(["a"]))
    with pytest.raises(NotPossible):
        await life.shelf.do(life.ledger.advance, batch.id, Event.WRITTEN, 1)
    found: BatchRow = await life.look(life.ledger.batch, batch.id)
    assert found == batch
