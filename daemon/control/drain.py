"""Waits for the last requests of workers that drain: says so in the log, and gives the slots of removed ones back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pointsman.config.snapshot import Snapshot
from pointsman.daemon.shm.routing_state import RoutingState
from pointsman.daemon.telemetry.logs import log
from pointsman.daemon.workers.registry import Registry, Worker

TURN_S = 0.1
LOOKS = 2
"""A pick books its worker a few instructions after it has read the status: one empty look may be too early."""


class Drainer:
    def __init__(
        self, state: RoutingState, registry: Registry, current: Callable[[], Snapshot], freed: Callable[[], None]
    ) -> None:
        self._state = state
        self._segment = state.segment
        self._registry = registry
        self._current = current
        self._freed = freed
        self._empty_looks: dict[int, int] = {}
        self._drained: set[str] = set()
        """ids of live workers that were seen empty since they drain"""
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """A worker was removed or drained, or is so no longer."""
        self._wake.set()

    async def run(self) -> None:
        while True:
            if not (self._waiting() or self._draining()):
                await self._wake.wait()
            self._wake.clear()
            await asyncio.sleep(TURN_S)
            self.look()

    def look(self) -> None:
        self._drained &= {worker.id for worker in self._registry.draining()}
        for worker in self._draining():
            if self._segment.is_empty(worker.slot):
                self._drained.add(worker.id)
                log("worker_drained", worker=worker.url)
        in_force = {spec.slot for spec in self._current().workers}
        for slot in self._waiting() - in_force:
            looks = self._empty_looks.get(slot, 0) + 1 if self._segment.is_empty(slot) else 0
            self._empty_looks[slot] = looks
            if looks >= LOOKS:
                self._release(slot)

    def _waiting(self) -> set[int]:
        return {worker.slot for worker in self._registry.leaving()} | self._registry.orphans

    def _draining(self) -> list[Worker]:
        """Live workers that still have, or may have, requests."""
        return [one for one in self._registry.draining() if not one.is_leaving and one.id not in self._drained]

    def _release(self, slot: int) -> None:
        if not self._state.clear_worker(slot):
            return  # a stopped shard holds the mutex: the next look will do
        del self._empty_looks[slot]
        self._segment.clear_worker(slot)
        self._registry.release(slot)
        log("worker_gone", slot=slot)
        self._freed()
