"""The process may die before or after any step: the next one goes on, and every custom_id gets exactly one line."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.daemon.batches.attempts import Answer
from pointsman.daemon.batches.lifecycle import Status
from tests.daemon.batches.harness import Crash, Fate, Gateway, Life, jsonl

PROMPTS = [f"p{n}" for n in range(24)]
MAX_STEPS = 80
"""about as many as a batch of this size takes"""


async def live_and_die(folder: Path, deaths: list[tuple[int, bool]]) -> None:
    gateway = Gateway()
    gateway.answers = {"p3": [Answer(400, "r", b"{}")] * (len(deaths) + 1)}
    life = Life(folder, gateway)
    batch = await life.submit(jsonl(PROMPTS))
    await life.end()
    finished: set[str] = set()
    """prompts whose line was marked before a death: never asked again"""
    done = batch
    for step, is_after in [*deaths, (0, False)]:
        asked_before = dict(gateway.asked)
        fate = Fate()
        fate.at_step, fate.is_after = step or None, is_after
        life = Life(folder, gateway, fate)
        try:
            await life.service.start()
            done = await life.until_final(batch.id)
        except Crash:
            assert step
            rows = await life.look(life.ledger.lines, batch.serial, 0, 100)
            for prompt in finished:
                assert gateway.asked[prompt] == asked_before[prompt]
            finished |= {f"p{row.number - 1}" for row in rows if row.state}
            continue
        finally:
            await life.end()
        for prompt in finished:
            assert gateway.asked[prompt] == asked_before[prompt]
        finished = set(PROMPTS)  # it has ended before it could die
    assert (done.status, done.total, done.completed, done.failed) == (Status.COMPLETED, 24, 23, 1)
    life = Life(folder, gateway)
    output, errors = await life.content(done.output_file), await life.content(done.error_file)
    await life.service.start()

    async def is_clean() -> bool:
        return not await life.look(life.ledger.dropped_files, 10)

    await life.until(is_clean)
    keys = life.stored_keys()
    await life.end()
    assert [line["custom_id"] for line in output] == [f"id-{n}" for n in range(24) if n != 3]
    assert [line["custom_id"] for line in errors] == ["id-3"]
    assert keys == 3, "input, output, errors; nothing is left behind"
    assert max(gateway.asked.values()) <= len(deaths) + 1


DEATHS = st.lists(st.tuples(st.integers(1, MAX_STEPS), st.booleans()), min_size=1, max_size=4)


@settings(max_examples=8, deadline=None)
@given(DEATHS)
def test_one_line_for_every_custom_id(deaths: list[tuple[int, bool]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(live_and_die(Path(folder), deaths))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_line_for_every_custom_id_whatever_the_step() -> None:
    for step in range(1, MAX_STEPS + 1):
        for is_after in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                asyncio.run(live_and_die(Path(folder), [(step, is_after), (step // 2 + 1, not is_after)]))
