"""The owner of background work."""

import asyncio

import pytest

from pointsman.daemon.control import tasks as module
from pointsman.daemon.control.tasks import Tasks


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESTART_PAUSE_S", 0)


async def test_work_that_fails_is_started_again() -> None:
    tasks, runs, third = Tasks(), 0, asyncio.Event()

    async def work() -> None:
        nonlocal runs
        runs += 1
        if runs < 3:
            raise ValueError("once more")
        third.set()
        await asyncio.Event().wait()

    tasks.keep("work", work)
    await third.wait()
    assert not tasks.gave_up.done()
    await tasks.stop()


async def test_work_that_fails_again_and_again_is_given_up() -> None:
    tasks = Tasks()

    async def work() -> None:
        raise ValueError("never")

    tasks.keep("broken", work)
    assert await tasks.gave_up == "broken"
    await tasks.stop()


async def test_a_failed_errand_ends_alone(capfd: pytest.CaptureFixture[str]) -> None:
    tasks, done = Tasks(), asyncio.Event()

    async def fail() -> None:
        raise ValueError("bad errand")

    async def succeed() -> None:
        done.set()

    tasks.spawn("fail", fail())
    tasks.spawn("succeed", succeed())
    await done.wait()
    await tasks.stop()
    assert "bad errand" in capfd.readouterr().err


async def test_stop_ends_everything_and_lets_nothing_new_begin() -> None:
    tasks, cancelled = Tasks(), asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    tasks.keep("work", work)
    await asyncio.sleep(0)
    await tasks.stop()
    assert cancelled.is_set()
    tasks.spawn("late", work())
    await tasks.stop()
    assert asyncio.all_tasks() == {asyncio.current_task()}
