"""Reads the engines' own metrics, tells shared memory, and notices engines that were restarted.

`turn`, called every 100 ms, asks the workers that are due: those that are up, every second while a request is in
flight on them and every 4.5 s otherwise (a report is used for 5 s, so that of an idle worker does not get stale). Each
worker is asked by at most one question at a time. One without metrics is asked every 15 s, as is one that fails
again and again; whoever comes up is asked at once.

An answer counts only if its question was put after the worker came up for the last time: an old process may have
given it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Protocol

from pointsman.daemon.shm.layout import STATUS_UP
from pointsman.daemon.shm.segment import EngineSignals
from pointsman.daemon.telemetry.logs import log
from pointsman.daemon.workers.engine_metrics import (
    CAPACITY_PATH,
    INSTANCE_HEADER,
    EngineReport,
    MetricsUnreadable,
    parse,
    parse_capacity,
)
from pointsman.daemon.workers.incarnation import Incarnation
from pointsman.daemon.workers.marks import Marks
from pointsman.daemon.workers.probe import ProbeClient, ProbeFailed
from pointsman.daemon.workers.registry import Worker

METRICS_PATH = "/metrics"
NO_METRICS = (404, 405, 501)
"""501 is llama.cpp's word for a server that was started without --metrics"""
SCRAPE_INTERVAL_S = 1.0
IDLE_INTERVAL_S = 4.5
MAX_INTERVAL_S = 15.0
CAPACITY_INTERVAL_S = 30.0
"""between two questions for a capacity that is not known yet"""
START_SPREAD_S = 0.05
"""between the first questions to workers that are declared together"""


class Signals(Protocol):
    """What is used of `daemon.shm.segment.Segment`."""

    def status(self, slot: int) -> int: ...
    def inflight(self, slot: int) -> int: ...
    def report(self, slot: int, report: EngineSignals) -> None: ...


@dataclass(slots=True, eq=False)
class Source:
    """One worker's page. Times are of the monotonic clock."""

    worker: Worker
    asked: float
    valid_from: float
    """Questions from before are of no use."""
    incarnation: Incarnation = field(default_factory=Incarnation)
    report: EngineReport | None = None
    capacity: int | None = None
    capacity_asked: float | None = None
    is_asked: bool = False
    is_urgent: bool = False
    failures: int = 0
    has_metrics: bool = True
    shortening: float = 1.0
    """Of the next interval; a little less than 1: questions to many workers drift apart, none comes late."""


class Scraper:
    def __init__(
        self,
        segment: Signals,
        client: ProbeClient,
        spawn: Callable[[str, Coroutine[Any, Any, None]], object],
        restarted: Callable[[Worker, str], None],
    ) -> None:
        """`restarted(worker, reason)` is called once per restart of an engine that is noticed."""
        self._segment = segment
        self._client = client
        self._spawn = spawn
        self._restarted = restarted
        self._sources: dict[str, Source] = {}
        self._rng = Random()
        self._now = time.monotonic

    def track(self, workers: list[Worker]) -> None:
        """From now on; those that are tracked already begin anew."""
        now = self._now()
        for position, worker in enumerate(workers):
            first = now + (position * START_SPREAD_S) % SCRAPE_INTERVAL_S
            self._sources[worker.id] = Source(worker, asked=first - IDLE_INTERVAL_S, valid_from=now)

    def forget(self, worker: Worker) -> None:
        """Whatever is being asked, the answer is not written any more."""
        self._sources.pop(worker.id, None)

    def report(self, worker: Worker) -> EngineReport | None:
        """The latest, however old; None when there was none."""
        source = self._sources.get(worker.id)
        return source.report if source else None

    def marks(self, worker: Worker) -> tuple[Marks, bool]:
        """To know its engine again by, after a restart; and whether it is certain that it is still the one it was."""
        source = self._sources.get(worker.id)
        return (source.incarnation.marks, source.incarnation.is_certain) if source else (Marks(), False)

    def recall(self, worker: Worker, marks: Marks, *, is_certain: bool, away_s: float) -> bool:
        """What `marks` told `away_s` ago. False: there is no way to find out whether it is still that engine."""
        source = self._sources.get(worker.id)
        return source is not None and source.incarnation.recall(marks, is_certain=is_certain, away_s=away_s)

    async def read_all(self, timeout_s: float) -> None:
        """One question to every worker that is up, all at once, as far as `timeout_s` reaches."""
        due = [source for source in self._sources.values() if not source.is_asked and self._is_up(source)]
        for source in due:
            source.is_asked, source.is_urgent, source.asked = True, False, self._now()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*map(self._scrape, due))

    def worker_went_down(self, worker: Worker, is_refused: bool) -> None:
        """By a probe, or by a shard that met a refused connection."""
        source = self._sources.get(worker.id)
        if source is not None:
            source.incarnation.went_down(is_refused=is_refused)
            source.valid_from = self._now()

    def worker_came_up(self, worker: Worker) -> None:
        """After it was pending or down; its page is asked for at the next turn."""
        source = self._sources.get(worker.id)
        if source is None:
            return
        source.valid_from = self._now()
        source.failures, source.has_metrics, source.is_urgent = 0, True, True
        source.capacity_asked = None
        self._note(source, source.incarnation.came_up())

    def turn(self) -> None:
        now = self._now()
        for source in list(self._sources.values()):
            if not source.is_asked and self._is_due(source, now):
                source.is_asked, source.is_urgent, source.asked = True, False, now
                source.shortening = 0.9 + 0.1 * self._rng.random()
                self._spawn(f"metrics of {source.worker.url}", self._scrape(source))

    def _is_due(self, source: Source, now: float) -> bool:
        if not self._is_up(source):
            return False
        return source.is_urgent or now >= source.asked + self._interval(source) * source.shortening

    def _is_up(self, source: Source) -> bool:
        return source.worker.address is not None and self._segment.status(source.worker.slot) == STATUS_UP

    def _interval(self, source: Source) -> float:
        if not source.has_metrics:
            return MAX_INTERVAL_S
        usual = SCRAPE_INTERVAL_S if self._segment.inflight(source.worker.slot) else IDLE_INTERVAL_S
        return float(min(usual * 2 ** min(source.failures, 8), MAX_INTERVAL_S))

    async def _scrape(self, source: Source) -> None:
        asked = source.asked
        try:
            page = await self._client.page(source.worker, METRICS_PATH)
            report = parse(page.body.decode(errors="replace"), page.headers.get(INSTANCE_HEADER))
        except (ProbeFailed, MetricsUnreadable) as error:
            if self._counts(source, asked):
                self._failed(source, error)
        else:
            if self._counts(source, asked):
                self._read(source, report, asked)
                await self._ask_capacity(source, asked)
        finally:
            source.is_asked = False

    def _counts(self, source: Source, asked: float) -> bool:
        return self._sources.get(source.worker.id) is source and asked >= source.valid_from

    def _read(self, source: Source, report: EngineReport, asked: float) -> None:
        source.failures, source.has_metrics = 0, True
        reason = source.incarnation.observe(report)
        if reason is not None:
            source.capacity = source.capacity_asked = None
        source.report = report if report.kv_tokens is not None else replace(report, kv_tokens=source.capacity)
        self._tell(source, source.report, asked)
        self._note(source, reason)

    def _failed(self, source: Source, error: ProbeFailed | MetricsUnreadable) -> None:
        source.failures += 1
        if isinstance(error, ProbeFailed):
            source.has_metrics = error.status not in NO_METRICS
            if error.is_refused:  # for an engine that restarts between two probes, the only one who sees it
                source.incarnation.went_down(is_refused=True)
                return
        if source.failures == 1:
            log("metrics_unknown", level="debug", worker=source.worker.url, reason=str(error))
        self._note(source, source.incarnation.unreadable())

    async def _ask_capacity(self, source: Source, asked: float) -> None:
        """Only llama.cpp: its page does not tell."""
        report = source.report
        if report is None or report.engine != "llamacpp" or report.kv_tokens is not None:
            return
        if source.capacity_asked is not None and asked < source.capacity_asked + CAPACITY_INTERVAL_S:
            return
        source.capacity_asked = asked
        try:
            page = await self._client.page(source.worker, CAPACITY_PATH)  # a chat template makes it long
        except ProbeFailed:
            return
        capacity = parse_capacity(page.body)
        if capacity is not None and self._counts(source, asked):
            source.capacity = capacity
            source.report = replace(report, kv_tokens=capacity)
            self._tell(source, source.report, asked)

    def _tell(self, source: Source, report: EngineReport, asked: float) -> None:
        if report.engine == "unknown":  # nothing in it that a policy could use: better no report than an empty one
            return
        self._segment.report(
            source.worker.slot,
            EngineSignals(
                at_s=asked,
                running=report.running,
                waiting=report.waiting,
                kv_usage=report.kv_usage,
                cpu_kv_usage=report.cpu_kv_usage,
                busy=report.busy,
                utilization=report.utilization,
                prompt_tokens=report.prompt_tokens,
                cached_tokens=report.cached_tokens,
                kv_tokens=report.kv_tokens,
            ),
        )

    def _note(self, source: Source, reason: str | None) -> None:
        if reason is not None:
            log("engine_restarted", worker=source.worker.url, reason=reason)
            self._restarted(source.worker, reason)
