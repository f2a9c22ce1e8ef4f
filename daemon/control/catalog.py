"""Workers as the admin API handles them: checked, registered, kept on disk, probed, published, removed."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from pointsman.admin_api.ports import WorkerPatch, WorkerRequest, WorkerView
from pointsman.config.load import DeclaredWorker
from pointsman.daemon.control.publisher import Publisher
from pointsman.daemon.control.views import Clock, worker_view
from pointsman.daemon.dispatch.resilience import SharedResilience
from pointsman.daemon.errors import Fault, RequestError
from pointsman.daemon.shm.layout import STATUS_DRAINING
from pointsman.daemon.shm.routing_state import RoutingState
from pointsman.daemon.telemetry.logs import log
from pointsman.daemon.workers.address import AddressRefused, parse
from pointsman.daemon.workers.locate import Locator, Wanted
from pointsman.daemon.workers.prober import Prober
from pointsman.daemon.workers.registry import Changes, Drain, Registry, Worker
from pointsman.daemon.workers.state import VERSION, Stored, StoredWorker, WorkerState

FIRST_PROBE_S = 2.0
MAX_WEIGHT = 1_000_000
STATES = ("pending", "ready", "not_ready", "draining")


class Catalog:
    def __init__(
        self,
        routing: RoutingState,
        registry: Registry,
        locator: Locator,
        prober: Prober,
        publisher: Publisher,
        state: WorkerState,
        workers_file: str | None,
        changed: Callable[[], None],
    ) -> None:
        self._routing = routing
        self._segment = routing.segment
        self._resilience = SharedResilience(routing, -1)
        self._registry = registry
        self._locator = locator
        self._prober = prober
        self._publisher = publisher
        self._state = state
        self._workers_file = workers_file
        self._drains_changed = changed
        self._disk = asyncio.Lock()

    # --- the admin API

    async def add(self, request: WorkerRequest) -> WorkerView:
        """Adds at the same time do not wait for each other's probes."""
        declared = _declared(request)
        _check_settings(declared.weight, declared.api_key)
        located = await self._locator.locate([Wanted(declared)])
        for _, reason in located.refused:
            raise _bad_request(reason)
        (candidate,) = located.candidates
        if candidate.address is None:
            raise _bad_request(f"{candidate.endpoint.host} cannot be resolved")
        worker = self._registry.add(candidate)
        self._prober.track([worker], delay_s=FIRST_PROBE_S)
        try:
            await self._save()
            await self._prober.ask_now(worker, FIRST_PROBE_S)
            await self._publisher.publish()
        except RequestError:
            await self._take_back(worker)
            raise
        if worker.is_leaving:
            raise RequestError(409, "WORKER_DRAINING", f"worker {worker.url} was removed meanwhile", fault=Fault.CLIENT)
        log("worker_added", worker=worker.url, id=worker.id, slot=worker.slot)
        return self.view(worker)

    async def patch(self, key: str, patch: WorkerPatch) -> WorkerView:
        _check_settings(patch.weight, patch.api_key)
        worker = self._registry.find(self._key(key))
        before = worker.declared
        self._registry.patch(
            worker.id,
            weight=patch.weight,
            labels=patch.labels,
            models=patch.models,
            api_key=patch.api_key,
            prompt_tokens_min=patch.prompt_tokens_min,
            prompt_tokens_max=patch.prompt_tokens_max,
            kv_tokens=patch.kv_tokens,
        )
        try:
            await self._save()
            await self._publisher.publish()
        except RequestError:
            if not worker.is_leaving:
                self._registry.patch(
                    worker.id,
                    weight=before.weight,
                    labels=before.labels,
                    models=before.models,
                    api_key=before.api_key,
                    prompt_tokens_min=before.prompt_tokens_min,
                    prompt_tokens_max=before.prompt_tokens_max,
                    kv_tokens=before.kv_tokens,
                )
            raise
        return self.view(worker)

    async def remove(self, key: str, deadline_s: float | None) -> WorkerView:
        worker = self._registry.remove(self._key(key))
        self._let_go([worker])
        if deadline_s is not None:
            worker.drain = _drain(deadline_s, "close")
        self.enforce_drains([worker])
        try:
            await self._save()
        finally:
            await self._publisher.publish()
        log("worker_removed", worker=worker.url, id=worker.id, slot=worker.slot)
        return self.view(worker)

    async def drain(self, key: str, deadline_s: float | None, then: Literal["close", "keep"]) -> WorkerView:
        """From here on no pick on any shard takes the worker. What it is told now replaces what it was told before."""
        worker = self.find(key)
        before = worker.drain
        self._registry.drain(worker.id, _drain(deadline_s, then))
        await self._enforce_and_save(worker, before)
        log("worker_drains", worker=worker.url, deadline_s=deadline_s, then=then)
        return self.view(worker)

    async def undrain(self, key: str) -> WorkerView:
        worker = self.find(key)
        before = worker.drain
        self._registry.undrain(worker.id)
        await self._enforce_and_save(worker, before)
        log("worker_undrained", worker=worker.url)
        return self.view(worker)

    def list(self, *, state: str | None, model: str | None) -> list[WorkerView]:
        if state is not None and state not in STATES:
            raise _bad_request(f"state is one of {', '.join(STATES)}")
        workers = self._registry.draining() if state == "draining" else self._registry.live()
        views = self._views(workers)
        return [view for view in views if state in (None, view.status) and (model is None or model in view.models)]

    def find(self, key: str) -> Worker:
        """By id or URL. Raises RequestError 404."""
        return self._registry.find(self._key(key))

    def get(self, key: str) -> WorkerView:
        return self.view(self.find(key))

    @property
    def resilience(self) -> SharedResilience:
        """Under the configuration in force."""
        return self._resilience.follow(self._publisher.current.shared)

    def view(self, worker: Worker) -> WorkerView:
        return self._views([worker])[0]

    def _views(self, workers: Iterable[Worker]) -> Sequence[WorkerView]:
        clock = Clock(time.time(), time.monotonic())
        resilience, oldest = self.resilience, self._routing.oldest_starts()
        return [
            worker_view(
                worker,
                self._segment,
                resilience.view(worker.slot, clock.monotonic),
                self._prober.health(worker),
                oldest[worker.slot],
                self._workers_file,
                clock,
            )
            for worker in workers
        ]

    # --- reloads

    async def settle(self, changes: Changes) -> None:
        """Bring probes, shared memory and shards in step with a changed registry. Raises RequestError 503."""
        self._prober.track(changes.added)
        self._let_go(changes.removed)
        await self._publisher.publish()

    def enforce_drains(self, workers: Iterable[Worker]) -> None:
        """What the registry says of their drains goes into shared memory, where shards see it, and its end, alone."""
        now_wall, now = time.time(), time.monotonic()
        for worker in workers:
            drain = worker.drain or Drain()
            if worker.is_draining:
                self._segment.set_status(worker.slot, STATUS_DRAINING)
            close_by = drain.by if drain.then == "close" else None
            self._segment.set_close_at(worker.slot, None if close_by is None else now + close_by - now_wall)
            if not worker.is_draining:
                self._prober.release(worker)
            self._drains_changed()

    # --- parts

    async def _enforce_and_save(self, worker: Worker, before: Drain | None) -> None:
        """Raises RequestError 500 when it cannot be kept; it is then taken back."""
        self.enforce_drains([worker])
        try:
            await self._save()
        except RequestError:
            worker.drain = before
            if self._registry.has(worker):  # else its slot may be another's by now
                self.enforce_drains([worker])
            raise

    def _let_go(self, workers: Iterable[Worker]) -> None:
        """From here on no pick on any shard takes them, even before the next generation leaves them out."""
        for worker in workers:
            self._prober.forget(worker)
            self._segment.set_status(worker.slot, STATUS_DRAINING)
            self._drains_changed()

    async def _take_back(self, worker: Worker) -> None:
        if not worker.is_leaving:
            self._registry.remove(worker.id)
            self._let_go([worker])
            await self._save()

    async def _save(self) -> None:
        """The latest state of all workers of the API, whoever asks. Raises RequestError 500."""
        async with self._disk:
            workers = tuple(
                StoredWorker(worker.id, worker.address, declared) for worker, declared in self._registry.held_by("api")
            )
            stored = Stored(VERSION, workers, self._registry.drains())
            try:
                await asyncio.to_thread(self._state.save, stored)
            except OSError as error:
                log("state_not_saved", level="error", file=str(self._state.path), reason=error.strerror)
                message = f"{self._state.path} cannot be written: {error.strerror}"
                raise RequestError(500, "STATE_NOT_SAVED", message, fault=Fault.OPERATOR, type="server_error") from None

    def _key(self, key: str) -> str:
        """An id as it is; a URL in its canonical spelling."""
        try:
            return parse(key).url
        except AddressRefused:
            return key


def _drain(deadline_s: float | None, then: Literal["close", "keep"]) -> Drain:
    return Drain() if deadline_s is None else Drain(time.time() + deadline_s, then)


def _declared(request: WorkerRequest) -> DeclaredWorker:
    return DeclaredWorker(
        url=request.url,
        worker_type=request.worker_type,
        bootstrap_port=request.bootstrap_port,
        kv_connector=request.kv_connector,
        models=request.models,
        weight=request.weight,
        labels=request.labels,
        api_key=request.api_key,
        prompt_tokens_min=request.prompt_tokens_min,
        prompt_tokens_max=request.prompt_tokens_max,
        kv_tokens=request.kv_tokens,
    )


def _check_settings(weight: object, api_key: object) -> None:
    if isinstance(weight, int | float) and not (math.isfinite(weight) and 0 < weight <= MAX_WEIGHT):
        raise _bad_request(f"weight must be above 0 and at most {MAX_WEIGHT}")
    if isinstance(api_key, str) and not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
        raise _bad_request("api_key must be printable ASCII")  # it becomes a header line


def _bad_request(message: str) -> RequestError:
    return RequestError(400, "BAD_REQUEST", message, fault=Fault.CLIENT)
