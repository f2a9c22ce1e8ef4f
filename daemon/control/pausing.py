"""POST /pause: the barrier over all shards, and what the admin API tells of it."""

from __future__ import annotations

import asyncio
import time

from pointsman.admin_api.ports import PauseView
from pointsman.daemon.errors import Fault, RequestError
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.pause import Mode, Pause
from pointsman.daemon.shm.segment import Segment
from pointsman.daemon.telemetry.logs import log

ACKNOWLEDGE_S = 2.0
"""after which a silent shard is replaced anyway"""
LOOK_S = 0.01


class Pauser:
    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._pause = Pause(segment)

    async def pause(self, mode: str, reason: str) -> PauseView:
        """Returns when no request starts at an engine any more. Raises RequestError 504 when a shard stays silent.

        The pause is in force then, too: the shard will be found paused, or replaced by one that is.
        """
        serial = self._pause.begin(Mode[mode.upper()], reason, time.monotonic())
        log("paused", mode=mode, reason=reason)
        silent = await self._acknowledged(serial)
        if silent:
            names = ", ".join(f"shard-{shard}" for shard in silent)
            message = f"paused, but {names} did not say so within {ACKNOWLEDGE_S:g} s; ask again, or POST /resume"
            raise RequestError(504, "PAUSE_NOT_ACKNOWLEDGED", message, fault=Fault.GATEWAY, type="server_error")
        return self.view()

    def resume(self) -> PauseView:
        """Raises RequestError 409 when nothing is paused."""
        if self._pause.mode is Mode.RUNNING:
            raise RequestError(409, "NOT_PAUSED", "the gateway is not paused", fault=Fault.CLIENT)
        now = time.monotonic()
        lasted_s = now - self._pause.since
        self._pause.end(now)
        log("resumed", after_s=round(lasted_s, 3))
        return self.view()

    def view(self) -> PauseView:
        mode = self._pause.mode
        if mode is Mode.RUNNING:
            return PauseView(mode="running", held=self._held())
        return PauseView(
            mode="hold" if mode is Mode.HOLD else "reject",
            reason=self._pause.reason,
            for_s=round(time.monotonic() - self._pause.since, 3),
            held=self._held(),
        )

    def _held(self) -> int:
        return self._segment.gauge_total(at.G_HELD)

    async def _acknowledged(self, serial: int) -> list[int]:
        """Shards that did not, in time."""
        deadline = time.monotonic() + ACKNOWLEDGE_S
        while True:
            shards = range(self._segment.layout.shards)
            silent = [shard for shard in shards if not self._pause.has_acknowledged(shard, serial)]
            if not silent or time.monotonic() > deadline:
                return silent
            await asyncio.sleep(LOOK_S)
