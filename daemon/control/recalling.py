"""Gives a new daemon back what the one before it had learned, as far as the file can be believed.

Workers are matched by URL, and the engine behind it by what its page told before the doors open
(workers/incarnation.py). What an engine holds that does not answer yet is loaded, too: its page decides when it is up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from pointsman.config.settings import Settings
from pointsman.daemon.dispatch.resilience import SharedResilience
from pointsman.daemon.shm.prefix_dump import IndexLoad
from pointsman.daemon.shm.prefix_index import SLICE_US
from pointsman.daemon.shm.routing_state import RoutingState
from pointsman.daemon.telemetry.logs import log
from pointsman.daemon.workers.registry import Registry
from pointsman.daemon.workers.saved_state import FILE_NAME, Description, SavedState, Unusable, read
from pointsman.daemon.workers.scraper import Scraper


async def read_saved(settings: Settings) -> SavedState | None:
    """None: there is nothing, or nothing to be believed, which is logged."""
    path = Path(settings.state_dir) / FILE_NAME
    if not settings.state_max_age_s:
        return None
    try:
        return await asyncio.to_thread(
            read,
            path,
            block_bytes=settings.prefix_block_bytes,
            max_age_s=settings.state_max_age_s,
            now=time.time(),
        )
    except Unusable as error:
        _ignored(settings, str(error))
        return None


async def recall(
    saved: SavedState, settings: Settings, state: RoutingState, registry: Registry, scraper: Scraper
) -> None:
    """After the engines' pages were read, before any shard serves."""
    started, found = time.monotonic(), saved.description
    if found.seed != state.index.totals()["seed"]:
        _ignored(settings, "its hashes were made with another seed")
        return
    try:
        with state.locked():
            state.bookings.recall_costs(found.costs)
        slot_of = _slots(found, state, registry, scraper)
        blocks = await _load(IndexLoad(state.index, saved.records, slot_of))
    except (ValueError, TimeoutError) as error:  # its checksum is right: somebody wrote it so
        _ignored(settings, str(error))
        return
    known = sum(slot >= 0 for slot in slot_of[:-1])
    log(
        "routing_state_loaded",
        age_s=round(time.time() - found.created_at, 1),
        workers=known,
        workers_left_out=len(found.workers) - known,
        blocks=blocks,
        seconds=round(time.monotonic() - started, 3),
    )


def _slots(found: Description, state: RoutingState, registry: Registry, scraper: Scraper) -> list[int]:
    """Where each slot of the file is here; -1: nowhere, its worker is gone or cannot be known again."""
    resilience = SharedResilience(state, -1)
    slot_of = [-1] * found.slots
    slot_of[-1] = state.ghost
    away_s = max(time.time() - found.created_at, 0.0)
    for one in found.workers:
        worker = registry.at(one.url)
        if worker is None or not 0 <= one.slot < found.slots - 1:
            continue
        with state.locked():
            state.bookings.recall_pace(worker.slot, *one.pace)
        if scraper.recall(worker, one.marks, is_certain=one.is_certain, away_s=away_s):
            slot_of[one.slot] = worker.slot
            if one.breaker is not None:
                resilience.recall(worker.slot, one.breaker, time.monotonic(), away_s)
    return slot_of


async def _load(load: IndexLoad) -> int:
    """Returns the blocks added."""
    await _in_slices(load.add)
    await asyncio.to_thread(load.sort)
    await _in_slices(load.renew)
    return load.added


async def _in_slices(step: Callable[[int], bool]) -> None:
    """This process has other things to do, and to show that it lives."""
    while not step(SLICE_US):  # noqa: ASYNC110 - nothing to wait for: the next slice is the next thing to do
        await asyncio.sleep(0)


def _ignored(settings: Settings, reason: str) -> None:
    path = Path(settings.state_dir) / FILE_NAME
    log("routing_state_ignored", level="warning", file=str(path), reason=reason)
