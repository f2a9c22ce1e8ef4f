"""What control writes of what was learned, while things go on, and what it makes of it again."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pointsman.config.load import DeclaredWorker
from pointsman.config.resilience import BreakerSection
from pointsman.config.settings import Settings
from pointsman.config.snapshot import Snapshot
from pointsman.daemon.control import saving
from pointsman.daemon.control.recalling import read_saved, recall
from pointsman.daemon.control.residency import Residency
from pointsman.daemon.control.saving import Pace, StateSaver
from pointsman.daemon.dispatch.resilience import SharedResilience
from pointsman.daemon.resilience.breaker import State, Verdict
from pointsman.daemon.shm.prefix_index import PrefixIndex
from pointsman.daemon.shm.routing_state import IndexSize, RoutingState
from pointsman.daemon.shm.segment import Segment
from pointsman.daemon.telemetry import logs
from pointsman.daemon.workers.address import parse
from pointsman.daemon.workers.engine_metrics import EngineReport
from pointsman.daemon.workers.registry import Candidate, Registry, Worker
from pointsman.daemon.workers.saved_state import FILE_NAME, read_seed
from pointsman.daemon.workers.scraper import Scraper
from tests.daemon.control.harness import until

SLOTS, SEED = 6, 77


def url(number: int) -> str:
    return f"http://10.0.0.{number}:8000"


class Daemon:
    """The parts of one control process that have to do with it."""

    def __init__(self, directory: Path, *workers: int, seed: int = SEED, **fields: Any) -> None:
        settings: dict[str, Any] = {
            "runtime_dir": str(directory),
            "state_dir": str(directory),
            "prefix_block_bytes": 16,
        } | fields
        self.settings = Settings(**settings)
        self.state = RoutingState.create(Segment.create(2, SLOTS), IndexSize(4, 16), 2**26, seed)
        self.registry = Registry(SLOTS, iter("abcdefghij").__next__)
        self.scraper = Scraper(self.state.segment, None, lambda _name, work: work.close(), lambda *_: None)  # type: ignore[arg-type]
        self.residency = Residency(self.state, self.settings, lambda: Snapshot(generation=0))
        self.saver = StateSaver(self.state, self.settings, self.registry, self.scraper, self.residency)
        for number in workers:
            self.add(number)

    @property
    def path(self) -> Path:
        return Path(self.settings.state_dir) / FILE_NAME

    def add(self, number: int, started_at: float | None = 5.0) -> Worker:
        worker = self.registry.add(Candidate(DeclaredWorker(url=url(number)), parse(url(number)), f"10.0.0.{number}"))
        self.scraper.track([worker])
        self.meets(worker, started_at)
        return worker

    def meets(self, worker: Worker, started_at: float | None) -> None:
        """Its page was read."""
        source = self.scraper._sources[worker.id]
        source.incarnation.came_up()
        source.incarnation.observe(EngineReport("vllm", started_at=started_at))

    def slot(self, number: int) -> int:
        worker = self.registry.at(url(number))
        assert worker is not None
        return worker.slot

    def holds(self, number: int, text: bytes) -> None:
        self.state.index.insert(self.slot(number), self.state.index.chain().load(text))

    def matches(self, text: bytes) -> dict[str, int]:
        out = array("Q", bytes(8 * (SLOTS + 1)))
        self.state.index.match(self.state.index.chain().load(text), out)
        return {worker.url: out[worker.slot] for worker in self.registry.live() if out[worker.slot]}

    async def recall(self) -> None:
        saved = await read_saved(self.settings)
        if saved is not None:
            await recall(saved, self.settings, self.state, self.registry, self.scraper)


def files_in(directory: Path) -> list[str]:
    return [file.name for file in directory.iterdir()]


@contextmanager
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    lines: list[dict[str, Any]] = []

    def write(line: bytes) -> bool:
        lines.append(json.loads(line))
        return True

    monkeypatch.setattr(logs, "_write", write)
    yield lines


TEXTS = [bytes([number]) * 400 for number in range(5)]


async def test_another_daemon_with_other_slots_knows_all_of_it(tmp_path: Path) -> None:
    one = Daemon(tmp_path, 1, 2, 3)
    for number, text in enumerate(TEXTS):
        one.holds(number % 3 + 1, text)
    one.state.bookings.lost = 0.3
    one.state.bookings.recall_pace(one.slot(2), 0.05, 9)
    saved = await one.saver.save()
    assert (saved.path, saved.size_bytes) == (one.path, one.path.stat().st_size)
    assert b"\1\1\1\1" not in one.path.read_bytes(), "no text"
    other = Daemon(tmp_path, 4, 3, 2, 1)
    assert other.slot(2) != one.slot(2)
    await other.recall()
    for text in TEXTS:
        assert other.matches(text) == one.matches(text)
    assert other.state.bookings.costs() == one.state.bookings.costs()
    assert other.state.bookings.pace(other.slot(2)) == (0.05, 9)
    assert other.state.index.check() == []


async def test_a_worker_that_is_another_or_gone_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Daemon(tmp_path, 1, 2, 3)
    for number in (1, 2, 3):
        one.holds(number, TEXTS[0])
    await one.saver.save()
    other = Daemon(tmp_path, 1)
    other.add(2, started_at=6.0)
    with logged(monkeypatch) as lines:
        await other.recall()
    assert other.matches(TEXTS[0]) == {url(1): 400}
    assert [(line["event"], line["workers"], line["workers_left_out"]) for line in lines] == [
        ("routing_state_loaded", 1, 2)
    ]


async def test_open_breakers_go_with_engines_that_are_still_there(tmp_path: Path) -> None:
    one = Daemon(tmp_path, 1, 2)
    resilience = SharedResilience(one.state, 0)
    for number in (1, 2):
        for _ in range(BreakerSection().failure_threshold):
            slot = one.slot(number)
            resilience.record(slot, resilience.acquire(slot, 100.0) or 0, Verdict.FAILURE, 100.0)
    await one.saver.save()
    other = Daemon(tmp_path, 1)
    other.add(2, started_at=6.0)
    await other.recall()
    shown = SharedResilience(other.state, 0)
    assert not shown.is_quiet()
    assert shown.view(other.slot(1), 0.0).state is State.OPEN
    assert shown.is_closed(other.slot(2))


@pytest.mark.parametrize("event", ["cache forgotten", "slot of another"])
async def test_what_happens_to_a_worker_during_the_dump_leaves_it_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str
) -> None:
    one = Daemon(tmp_path, 1, 2)
    for number in (1, 2):
        one.holds(number, TEXTS[number])
    slot = one.slot(1)
    dump = StateSaver._dump

    async def interrupted(self: StateSaver, writer: Any, pace: Pace) -> None:
        await dump(self, writer, pace)
        if event == "cache forgotten":
            await one.residency.forget(slot)
        else:
            one.registry.remove(url(1))
            one.registry.release(slot)
            assert one.add(3).slot == slot

    monkeypatch.setattr(StateSaver, "_dump", interrupted)
    await one.saver.save()
    other = Daemon(tmp_path, 1, 2, 3)
    await other.recall()
    assert other.matches(TEXTS[1]) == {}
    assert other.matches(TEXTS[2]) == {url(2): 400}


async def test_a_daemon_with_another_seed_ignores_it_with_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Daemon(tmp_path, 1)
    one.holds(1, TEXTS[0])
    await one.saver.save()
    assert read_seed(one.path) == SEED
    other = Daemon(tmp_path, 1, seed=78)
    with logged(monkeypatch) as lines:
        await other.recall()
    assert [line["event"] for line in lines] == ["routing_state_ignored"]
    assert "another seed" in lines[0]["reason"]
    assert other.state.index.totals()["blocks_used"] == 0


async def test_an_index_whose_lock_is_kept_is_not_saved_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Daemon(tmp_path, 1)
    await one.saver.save()
    before = one.path.read_bytes()
    monkeypatch.setattr(saving, "PATIENCE_S", 0.1)
    with PrefixIndex.attach(one.state.index.fd).locked(), logged(monkeypatch) as lines:
        await one.saver.save_if_possible()
    assert [line["event"] for line in lines] == ["routing_state_not_saved"]
    assert one.path.read_bytes() == before
    assert files_in(tmp_path) == [FILE_NAME]


async def test_one_that_is_cancelled_at_the_disk_does_not_meet_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop cancels the periodic one, and saves for the last time."""
    one = Daemon(tmp_path, 1)
    one.holds(1, TEXTS[0])
    at_disk, go_on, fsync = threading.Event(), threading.Event(), os.fsync

    def slow(fd: int) -> None:
        at_disk.set()
        assert go_on.wait(30)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", slow)
    first = asyncio.create_task(one.saver.save())
    await asyncio.to_thread(at_disk.wait, 10)
    first.cancel()
    last = asyncio.create_task(one.saver.save())
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await first
    await last
    assert files_in(tmp_path) == [FILE_NAME]
    other = Daemon(tmp_path, 1)
    await other.recall()
    assert other.matches(TEXTS[0]) == {url(1): 400}


async def test_two_who_ask_at_once_get_a_file_each(tmp_path: Path) -> None:
    one = Daemon(tmp_path, 1)
    one.holds(1, TEXTS[0])
    _, second = await asyncio.gather(one.saver.save(), one.saver.save())
    assert one.path.stat().st_size == second.size_bytes
    other = Daemon(tmp_path, 1)
    await other.recall()
    assert other.matches(TEXTS[0]) == {url(1): 400}


async def test_a_new_daemon_writes_its_seed_at_once_and_then_only_what_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "TURN_S", 0.01)
    one = Daemon(tmp_path, 1, state_snapshot_interval_s=0.02)
    looks = 0
    fingerprint = one.saver._fingerprint

    def look() -> object:
        nonlocal looks
        looks += 1
        return fingerprint()

    monkeypatch.setattr(one.saver, "_fingerprint", look)
    running = asyncio.create_task(one.saver.run())
    try:
        await until(one.path.exists)
        assert read_seed(one.path) == SEED
        first, seen = one.path.stat().st_mtime_ns, looks
        await until(lambda: looks > seen + 5)
        assert one.path.stat().st_mtime_ns == first, "nothing has changed"
        one.holds(1, TEXTS[0])
        await until(lambda: one.path.stat().st_mtime_ns != first)
    finally:
        running.cancel()
        await asyncio.wait([running])
