"""CPU time of a gateway on this machine and of this program while a load is measured."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic_ns, process_time_ns

from pointsman.daemon.bench import processes
from pointsman.daemon.bench.model import GatewayCost

MEMORY_EVERY_S = 2.0
"""Reading the memory of a process holds it up for a moment."""


class Meter:
    """Adds up over several measurements, from `run_from` to `stop` each. `pid`: of the gateway, if that is known."""

    def __init__(self, pid: int | None, count_events: Callable[[], int]) -> None:
        """`count_events`: of all streams so far."""
        self.pid = pid
        self.events = 0
        """read while it ran"""
        self._count_events = count_events
        self._events_before = 0
        self.own_cpu_ns = 0
        self.wall_ns = 0
        self._gateway_cpu_ns = 0
        self._most_pss_bytes = 0
        self._processes = 0
        self._is_lost = False
        self._task: asyncio.Task[None] | None = None
        self._own_begin_ns = 0
        self._begin_ns = 0
        self._before: processes.Cost | None = None

    def run_from(self, begin_ns: int) -> None:
        """Begin at that time of `monotonic_ns`."""
        self._begin_ns = 0
        self._task = asyncio.create_task(self._watch(begin_ns))

    async def _watch(self, begin_ns: int) -> None:
        await asyncio.sleep(max(0.0, (begin_ns - monotonic_ns()) / 1e9))
        self._before = self._look()
        self._events_before = self._count_events()
        self._own_begin_ns, self._begin_ns = process_time_ns(), monotonic_ns()
        while True:
            await asyncio.sleep(MEMORY_EVERY_S)
            self._look()

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if not self._begin_ns:  # ended before it began
            return
        self.own_cpu_ns += process_time_ns() - self._own_begin_ns
        self.wall_ns += monotonic_ns() - self._begin_ns
        self.events += self._count_events() - self._events_before
        after = self._look()
        if self._before is None or after is None or not set(self._before.pids) <= set(after.pids):
            self._is_lost = True  # what a process had used is gone with it
        else:
            self._gateway_cpu_ns += after.cpu_ns - self._before.cpu_ns

    def gateway_cost(self, requests: int) -> GatewayCost | None:
        """`requests`: that ended meanwhile. None when it is not known."""
        if self.pid is None or self._is_lost or not self.wall_ns:
            return None
        return GatewayCost(
            pid=self.pid,
            processes=self._processes,
            cpu_us_per_request=round(self._gateway_cpu_ns / 1e3 / max(requests, 1), 2),
            cpu_us_per_event=round(self._gateway_cpu_ns / 1e3 / self.events, 2) if self.events else None,
            cpu_share=round(self._gateway_cpu_ns / self.wall_ns, 4),
            pss_mib=round(self._most_pss_bytes / 2**20, 1),
        )

    @property
    def is_lost(self) -> bool:
        """A process of the gateway ended meanwhile."""
        return self._is_lost

    def _look(self) -> processes.Cost | None:
        if self.pid is None:
            return None
        cost = processes.measure(self.pid)
        if cost is not None:
            self._most_pss_bytes = max(self._most_pss_bytes, cost.pss_bytes)
            self._processes = len(cost.pids)
        return cost
