"""Asks the workers whether they are up, and tells shared memory.

`turn`, called every 100 ms, takes note of what shards found out by themselves and starts the probes that are due. Each
worker is asked by at most one probe at a time. A worker whose name does not resolve yet is "asked" by resolving it.
Models that nobody declared are asked for when a worker comes up and every 30 s from then on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

import msgspec

from pointsman.config.resilience import HealthSection
from pointsman.config.settings import Settings
from pointsman.daemon.shm.layout import STATUS_DOWN, STATUS_DRAINING, STATUS_PENDING, STATUS_UP
from pointsman.daemon.shm.segment import Segment
from pointsman.daemon.telemetry.logs import log
from pointsman.daemon.workers.address import AddressRefused, AddressUnknown, Endpoint
from pointsman.daemon.workers.health import Health, Pace
from pointsman.daemon.workers.probe import ProbeClient, ProbeFailed
from pointsman.daemon.workers.registry import Worker

DISCOVERY_INTERVAL_S = 30.0
START_SPREAD_S = 0.004
"""between the first probes of workers that are declared together"""


@dataclass(slots=True, eq=False)
class Patient:
    worker: Worker
    health: Health
    is_asked: bool = False
    models_asked: float | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    error: str | None = None
    """None: it is well"""
    is_refused: bool = False


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the prober needs of the rest of control."""

    spawn: Callable[[str, Coroutine[Any, Any, None]], object]
    resolve: Callable[[Endpoint], Awaitable[str]]
    """Raises AddressRefused, AddressUnknown."""
    changed: Callable[[], Awaitable[None]]
    """A worker's address or models became known: publish; failures are not the prober's."""


class Companion(Protocol):
    """Who else looks after the workers, and wants to know what the probes find."""

    def track(self, workers: list[Worker]) -> None: ...
    def forget(self, worker: Worker) -> None: ...
    def turn(self) -> None: ...
    def worker_went_down(self, worker: Worker, is_refused: bool) -> None: ...
    def worker_came_up(self, worker: Worker) -> None: ...


class Prober:
    def __init__(
        self,
        settings: Settings,
        segment: Segment,
        client: ProbeClient,
        around: Surroundings,
        companion: Companion | None = None,
        section: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """`section`: `shared.health` of the configuration in force."""
        self._section = section
        self._followed: dict[str, Any] = {}
        self._companion = companion
        self._settings = settings
        self._segment = segment
        self._client = client
        self._around = around
        self._pace = self._pace_of(HealthSection())
        self._patients: dict[str, Patient] = {}
        self._rng = Random()
        self._now = time.monotonic

    def _pace_of(self, section: HealthSection) -> Pace:
        settings = self._settings
        return Pace(
            section.interval_s or settings.health_interval_s,
            section.down_interval_s or settings.health_down_interval_s,
            section.failure_threshold or settings.health_failure_threshold,
            section.success_threshold or settings.health_success_threshold,
        )

    def _follow(self) -> None:
        """New settings count for what is planned and counted from now on."""
        section = self._section()
        if section is self._followed:
            return
        self._followed = section
        self._pace = self._pace_of(msgspec.convert(section, HealthSection))
        for patient in self._patients.values():
            patient.health.follow(self._pace, self._now())

    def health(self, worker: Worker) -> Health | None:
        patient = self._patients.get(worker.id)
        return patient.health if patient else None

    def track(self, workers: list[Worker], delay_s: float = 0.0) -> None:
        """From now on, the first probe after `delay_s`; one that a former control process knew keeps its status.

        A drained worker is asked, too, but the status that everybody goes by stays what it is until `release`.
        """
        for position, worker in enumerate(workers):
            status = known = self._segment.status(worker.slot)
            if status not in (STATUS_UP, STATUS_DOWN):
                status = STATUS_PENDING
            shown = STATUS_DRAINING if worker.is_draining else status
            if shown != known:
                self._segment.set_status(worker.slot, shown)
            first = self._now() + delay_s + position * START_SPREAD_S
            self._patients[worker.id] = Patient(worker, Health(self._pace, status, next_probe=first))
        if self._companion is not None:
            self._companion.track(workers)

    def forget(self, worker: Worker) -> None:
        """Whatever a probe under way finds out, it is not written any more."""
        self._patients.pop(worker.id, None)
        if self._companion is not None:
            self._companion.forget(worker)

    def release(self, worker: Worker) -> None:
        """Its drain is lifted: it is what the probes have found meanwhile."""
        patient = self._patients.get(worker.id)
        status = patient.health.status if patient else STATUS_PENDING
        self._segment.set_status(worker.slot, status, expected=STATUS_DRAINING)

    async def ask_now(self, worker: Worker, timeout_s: float) -> None:
        """The first probe of a tracked worker, models included, as far as `timeout_s` reaches."""
        patient = self._patients.get(worker.id)
        if patient is None or patient.is_asked:  # removed meanwhile, or the turn came first
            return
        patient.is_asked = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._ask(patient)
        except TimeoutError:
            started = self._now() - timeout_s
            patient.health.failed(f"no answer within {timeout_s:g} s", started, self._now(), self._rng)
        finally:
            patient.is_asked = False

    async def ask_all(self, timeout_s: float) -> None:
        """One probe of every tracked worker, all at once: a daemon that says it is ready knows whom it can reach."""
        await asyncio.gather(*(self.ask_now(patient.worker, timeout_s) for patient in list(self._patients.values())))

    def turn(self) -> None:
        self._follow()
        now = self._now()
        for patient in list(self._patients.values()):
            self._heed_shards(patient, now)
            if not patient.is_asked and now >= patient.health.next_probe:
                patient.is_asked = True
                self._around.spawn(f"probe {patient.worker.url}", self._probe(patient))
        if self._companion is not None:
            self._companion.turn()

    def _heed_shards(self, patient: Patient, now: float) -> None:
        health = patient.health
        if health.status == STATUS_UP and self._segment.status(patient.worker.slot) == STATUS_DOWN:
            health.seen_down(now)
            self._went_down(patient, is_refused=True)

    async def _probe(self, patient: Patient) -> None:
        try:
            await self._ask(patient)
        finally:
            patient.is_asked = False

    async def _ask(self, patient: Patient) -> None:
        started = self._now()
        finding = await self._look(patient.worker)
        if finding.error is not None:
            self._conclude(patient, finding, started)
            return
        # A worker of unknown models may be picked for any: ask before it can be picked for the first time.
        if not patient.worker.models:
            await self._discover(patient)
        self._conclude(patient, finding, started)
        await self._discover(patient)

    async def _look(self, worker: Worker) -> Finding:
        try:
            await self._ensure_address(worker)
            await self._client.get(worker, self._settings.health_path)
        except (AddressRefused, AddressUnknown) as error:
            return Finding(str(error))
        except ProbeFailed as error:
            return Finding(str(error), error.is_refused)
        return Finding()

    async def _ensure_address(self, worker: Worker) -> None:
        if worker.address is None:
            worker.address = await self._around.resolve(worker.endpoint)
            await self._around.changed()

    def _conclude(self, patient: Patient, finding: Finding, started: float) -> None:
        """Write a change of status, unless the worker was removed (or taken out by a shard) meanwhile."""
        worker, health = patient.worker, patient.health
        if self._patients.get(worker.id) is not patient:
            return
        before = health.status
        if finding.error is None:
            health.succeeded(started, self._now(), self._rng)
        else:
            health.failed(finding.error, started, self._now(), self._rng, is_refused=finding.is_refused)
        if health.status == before:
            if before == STATUS_PENDING and finding.is_refused and self._companion is not None:
                self._companion.worker_went_down(worker, is_refused=True)  # it may be known from before a restart
            return
        self._segment.set_status(worker.slot, health.status, expected=before)
        if health.status == STATUS_UP:
            log("worker_up", worker=worker.url)
            if self._companion is not None:
                self._companion.worker_came_up(worker)
        else:
            self._went_down(patient, is_refused=finding.is_refused)

    def _went_down(self, patient: Patient, *, is_refused: bool) -> None:
        patient.models_asked = None  # it may come back with others
        if self._companion is not None:
            self._companion.worker_went_down(patient.worker, is_refused)
        log("worker_down", level="warning", worker=patient.worker.url, reason=patient.health.last_error)

    async def _discover(self, patient: Patient) -> None:
        """The engine's models, if nobody declared any and it was not asked of late; failure leaves what is known."""
        worker = patient.worker
        due = patient.models_asked is None or self._now() - patient.models_asked >= DISCOVERY_INTERVAL_S
        if worker.declared.models or not due:
            return
        patient.models_asked = self._now()
        try:
            models = await self._client.models(worker)
        except ProbeFailed as error:
            log("models_unknown", level="debug", worker=worker.url, reason=str(error))
            return
        if models and models != worker.discovered and not worker.is_leaving:
            worker.discovered = models
            log("worker_models", worker=worker.url, models=models)
            await self._around.changed()
