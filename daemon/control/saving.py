"""Writes what routing has learned to the state directory: from time to time, when asked, and at the stop.

The index is dumped in slices; what a slice told is hashed and written by a thread while others have the mutex. The
file is written while everything goes on, so a worker may go and another get its slot, or an engine lose its cache, when
half of what it held is written already: such slots are left out of the description, which is written last. Marks are
read first: those of an engine that restarts meanwhile do not fit it any more when they are compared.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from pointsman.config.settings import Settings
from pointsman.daemon.control.residency import Residency
from pointsman.daemon.dispatch.resilience import SharedResilience
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm import prefix_layout
from pointsman.daemon.shm.prefix_dump import IndexDump
from pointsman.daemon.shm.routing_state import RoutingState
from pointsman.daemon.telemetry.logs import log
from pointsman.daemon.workers.registry import Registry, Worker
from pointsman.daemon.workers.saved_state import FILE_NAME, Description, SavedWorker, Writer, machine, read_seed
from pointsman.daemon.workers.scraper import Scraper

PATIENCE_S = 5.0
"""for a mutex whose holder is stopped; the supervisor will have replaced it by then"""
TURN_S = 1.0


P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pace:
    slice_us: int
    """for which a slice of the dump holds the index' mutex"""
    pause_s: float
    """between two slices: shards that wait for the mutex come first"""


BESIDE_SHARDS = Pace(100, 0.001)
ALONE = Pace(5000, 0.0)


@dataclass(frozen=True, slots=True)
class Saved:
    path: Path
    size_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Tenant:
    """One worker as it was when the dump began."""

    slot: int
    worker: SavedWorker
    times_forgotten: int


class StateSaver:
    def __init__(
        self, state: RoutingState, settings: Settings, registry: Registry, scraper: Scraper, residency: Residency
    ) -> None:
        self._state = state
        self._resilience = SharedResilience(state, -1)
        self._settings = settings
        self._registry = registry
        self._scraper = scraper
        self._residency = residency
        self._path = Path(settings.state_dir) / FILE_NAME
        self._busy = asyncio.Lock()
        self._last_at = time.monotonic()
        self._last: object = self._fingerprint()

    async def run(self) -> None:
        """For good: save what changed every `state_snapshot_interval_s`, and in time what did not."""
        interval_s, max_age_s = self._settings.state_snapshot_interval_s, self._settings.state_max_age_s
        if max_age_s and await asyncio.to_thread(read_seed, self._path) != self._state.index.totals()["seed"]:
            await self.save_if_possible()  # an upgrade's new daemon needs the seed before this one saves its last
        while interval_s and max_age_s:
            waited_s = time.monotonic() - self._last_at
            has_changed = self._fingerprint() != self._last
            if waited_s >= (interval_s if has_changed else max(max_age_s / 2, interval_s)):
                await self.save_if_possible()
            await asyncio.sleep(min(TURN_S, interval_s))

    async def save_last(self, pace: Pace) -> None:
        """At the stop, or when another daemon takes over."""
        if self._settings.state_max_age_s:
            await self.save_if_possible(pace)

    async def save_if_possible(self, pace: Pace = BESIDE_SHARDS) -> None:
        self._last_at = time.monotonic()  # also if it fails: not again at once
        try:
            saved = await self.save(pace)
        except (OSError, TimeoutError) as error:
            log("routing_state_not_saved", level="error", file=str(self._path), reason=str(error))
        else:
            log("routing_state_saved", level="debug", bytes=saved.size_bytes, seconds=saved.seconds)

    async def save(self, pace: Pace = BESIDE_SHARDS) -> Saved:
        """On the disk when it returns. Raises OSError, TimeoutError; the file of before is then still there."""
        async with self._busy:
            started = time.monotonic()
            fingerprint, tenants = self._fingerprint(), self._tenants()
            writer = await _in_thread(Writer, self._path)
            try:
                await self._dump(writer, pace)
                size = await _in_thread(writer.finish, self._description(tenants))
            except BaseException:
                writer.discard()
                raise
            self._last_at, self._last = time.monotonic(), fingerprint
            return Saved(self._path, size, round(self._last_at - started, 3))

    async def _dump(self, writer: Writer, pace: Pace) -> None:
        dump = IndexDump(self._state.index)
        deadline = time.monotonic() + PATIENCE_S
        while not dump.is_done:
            try:
                records = dump.more(pace.slice_us)
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise
            else:
                deadline = time.monotonic() + PATIENCE_S
                if records:
                    await _in_thread(writer.add, records)
            await asyncio.sleep(pace.pause_s)

    def _fingerprint(self) -> object:
        """Differs when there is something new to save."""
        breakers = self._state.segment.cells[at.H_BREAKERS]
        return self._state.index.totals()["clock"], self._residency.forgotten.total(), breakers

    def _tenants(self) -> list[_Tenant]:
        return [_Tenant(worker.slot, self._saved(worker), self._times_forgotten(worker)) for worker in self._workers()]

    def _workers(self) -> Sequence[Worker]:
        return self._registry.live()

    def _times_forgotten(self, worker: Worker) -> int:
        return self._residency.forgotten[worker.slot]

    def _saved(self, worker: Worker) -> SavedWorker:
        marks, is_certain = self._scraper.marks(worker)
        slot = worker.slot
        breaker = self._resilience.saved(slot, time.monotonic())
        return SavedWorker(slot, worker.url, marks, is_certain, self._state.bookings.pace(slot), breaker)

    def _description(self, tenants: Sequence[_Tenant]) -> Description:
        totals = self._state.index.totals()
        still = {(worker.slot, worker.url, self._times_forgotten(worker)) for worker in self._workers()}
        return Description(
            created_at=time.time(),
            machine=machine(),
            index_version=prefix_layout.VERSION,
            seed=totals["seed"],
            block_bytes=totals["block_bytes"],
            slots=totals["slots"],
            workers=tuple(one.worker for one in tenants if (one.slot, one.worker.url, one.times_forgotten) in still),
            costs=self._state.bookings.costs(),
        )


async def _in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Over when it returns, also when it is cancelled: two that write must not meet in one file."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
