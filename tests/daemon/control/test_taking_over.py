"""Two control processes in an upgrade: which of them writes, and what the second knows of the first."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from pointsman.daemon.errors import EXIT_BOOT_FAILED, EXIT_OK
from pointsman.daemon.workers.state import FILE_NAME, StateError, WorkerState
from tests.daemon.control.harness import Engine, Supervisor, engine, reboot, supervisor, until


@pytest.fixture
async def workers() -> AsyncIterator[list[Engine]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(engine(models=["m"])) for _ in range(2)]


def is_locked(state_dir: str) -> bool:
    state = WorkerState(Path(state_dir))
    try:
        state.lock(wait_s=0)
    except StateError:
        return True
    state.unlock()
    return False


async def standing_by(old: Supervisor, directory: Path, stack: AsyncExitStack) -> Supervisor:
    directory.mkdir()  # noqa: ASYNC240
    new = await stack.enter_async_context(supervisor(directory, **reboot(old)))
    new.stands_by = True
    new.published.append(old.current)
    new.segment.make_current(old.current.generation)
    new.spawn()
    await until(lambda: "standing_by" in new.heard or new.process is None)
    return new


async def test_the_second_waits_for_the_first_and_finds_what_it_did_meanwhile(
    tmp_path: Path, workers: list[Engine]
) -> None:
    async with AsyncExitStack() as stack:
        old = await stack.enter_async_context(supervisor(tmp_path, workers=(workers[0].url,)))
        await old.start()
        await old.workers_become(lambda found: found[0]["is_healthy"])
        new = await standing_by(old, tmp_path / "new", stack)
        assert new.current == old.current, "nothing has changed, so no generation is made"
        assert not new.is_ready
        assert [new.segment.status(spec.slot) for spec in new.current.workers] == [
            old.segment.status(spec.slot) for spec in old.current.workers
        ], "it has looked at the workers itself"

        late = await old.add(workers[1].url)
        old.say("yield")
        await until(lambda: "yielded" in old.heard)
        assert not is_locked(old.settings.state_dir)

        new.say("go", floor=old.current.generation)
        await until(lambda: new.is_ready)
        assert is_locked(new.settings.state_dir)
        assert late["id"] in [worker["id"] for worker in await new.workers()]
        assert new.current.generation > old.current.generation, "clients have seen that number elsewhere"

        old.say("upgraded", pid=1, version="2")
        assert await old.ended() == EXIT_OK


async def test_who_has_yielded_ends_when_the_upgrade_fails_and_another_one_goes_on(
    tmp_path: Path, workers: list[Engine]
) -> None:
    async with supervisor(tmp_path, workers=(workers[0].url,)) as daemon:
        await daemon.start()
        added = await daemon.add(workers[1].url)
        daemon.say("yield")
        await until(lambda: "yielded" in daemon.heard)
        daemon.say("upgrade_failed", reason="it was not to be")
        assert await daemon.ended() == EXIT_OK
        await daemon.start()
        assert added["id"] in [worker["id"] for worker in await daemon.workers()]


async def test_an_upgrade_that_fails_early_leaves_the_process_alone(tmp_path: Path, workers: list[Engine]) -> None:
    async with supervisor(tmp_path, workers=(workers[0].url,)) as daemon:
        await daemon.start()
        daemon.say("upgrade_failed", reason="it was not to be")
        await daemon.add(workers[1].url)
        assert daemon.process is not None
        assert daemon.process.poll() is None


async def test_a_state_file_that_this_version_cannot_read_is_left_to_the_other_one(
    tmp_path: Path, workers: list[Engine]
) -> None:
    async with AsyncExitStack() as stack:
        old = await stack.enter_async_context(supervisor(tmp_path, workers=(workers[0].url,)))
        await old.start()
        file = Path(old.settings.state_dir) / FILE_NAME
        content = json.dumps({"version": 99, "workers": []})
        file.write_text(content)
        (tmp_path / "new").mkdir()
        new = await stack.enter_async_context(supervisor(tmp_path / "new", **reboot(old)))
        new.stands_by = True
        new.spawn()
        assert await new.ended() == EXIT_BOOT_FAILED
        assert "cannot be read by this version: version 99" in new.log_path.read_text()
        assert file.read_text() == content
        assert [path.name for path in file.parent.glob(f"{FILE_NAME}*")] == [FILE_NAME]


async def test_no_upgrade_while_paused_and_no_pause_during_an_upgrade(tmp_path: Path, workers: list[Engine]) -> None:
    """The next daemon would not be paused, and what the old one holds would never be sent."""
    async with supervisor(tmp_path, workers=(workers[0].url,)) as daemon:
        await daemon.start()
        status, _ = await daemon.call("POST", "/pause", {"mode": "hold"})
        assert status == 504, "it is in force, though there are no shards to say so"
        status, answer = await daemon.call("POST", "/upgrade")
        assert (status, answer["code"]) == (409, "UPGRADE_REFUSED")
        assert "resume it first" in answer["error"]
        assert (await daemon.call("POST", "/resume"))[0] == 200

        upgrading = asyncio.create_task(daemon.call("POST", "/upgrade"))
        await until(lambda: "upgrade" in daemon.heard)
        status, answer = await daemon.call("POST", "/pause", {"mode": "hold"})
        assert (status, answer["code"]) == (409, "UPGRADE_RUNS")
        daemon.say("upgrade_failed", reason="it was not to be")
        status, answer = await upgrading
        assert (status, answer["code"]) == (500, "UPGRADE_FAILED")
        assert "it was not to be" in answer["error"]
        assert daemon.heard.count("upgrade") == 1
