"""The admin API's port: control's parts behind one face."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from pointsman.admin_api.ports import (
    ApplyRequest,
    ConfigDiffView,
    ConfigView,
    EngineMetricsView,
    ExplainRequest,
    FanoutRequest,
    FanoutView,
    GenerationView,
    HistoryView,
    LoadsView,
    LogView,
    PauseView,
    SavedStateView,
    StatusView,
    UpgradeView,
    WorkerPatch,
    WorkerRequest,
    WorkerView,
)
from pointsman.config.settings import Settings
from pointsman.config.snapshot import WorkerSpec
from pointsman.daemon.control import files
from pointsman.daemon.control.catalog import Catalog
from pointsman.daemon.control.decisions import Decisions
from pointsman.daemon.control.desired import content_hash
from pointsman.daemon.control.explaining import Explainer
from pointsman.daemon.control.fanning import Fanning
from pointsman.daemon.control.historian import Historian
from pointsman.daemon.control.pausing import Pauser
from pointsman.daemon.control.publisher import Publisher
from pointsman.daemon.control.recording import Recorder
from pointsman.daemon.control.reload import Reloader
from pointsman.daemon.control.residency import Residency
from pointsman.daemon.control.saving import StateSaver
from pointsman.daemon.control.upgrading import Upgrader
from pointsman.daemon.control.views import Clock, admission_shown, audited_settings, process_views
from pointsman.daemon.errors import Fault, RequestError
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.log_settings import LogSettings
from pointsman.daemon.shm.routing_state import RoutingState
from pointsman.daemon.shm.segment import Segment
from pointsman.daemon.telemetry import metrics
from pointsman.daemon.telemetry.logs import log
from pointsman.daemon.telemetry.metrics import DaemonInfo
from pointsman.daemon.version import VERSION


@dataclass(frozen=True, slots=True)
class ControlService:
    """Implements `admin_api.ports.ControlPort`."""

    settings: Settings
    routing: RoutingState
    catalog: Catalog
    publisher: Publisher
    reloader: Reloader
    historian: Historian
    recorder: Recorder
    residency: Residency
    explainer: Explainer
    routed: Decisions
    fanning: Fanning
    upgrader: Upgrader
    saver: StateSaver
    pauser: Pauser

    @property
    def segment(self) -> Segment:
        return self.routing.segment

    async def add_worker(self, request: WorkerRequest) -> WorkerView:
        return await self.catalog.add(request)

    def list_workers(self, *, state: str | None = None, model: str | None = None) -> list[WorkerView]:
        return self.catalog.list(state=state, model=model)

    def get_worker(self, key: str) -> WorkerView:
        return self.catalog.get(key)

    async def patch_worker(self, key: str, patch: WorkerPatch) -> WorkerView:
        return await self.catalog.patch(key, patch)

    async def drain_worker(self, key: str, deadline_s: float | None, then: Literal["close", "keep"]) -> WorkerView:
        return await self.catalog.drain(key, deadline_s, then)

    async def undrain_worker(self, key: str) -> WorkerView:
        return await self.catalog.undrain(key)

    async def remove_worker(self, key: str, deadline_s: float | None = None) -> WorkerView:
        return await self.catalog.remove(key, deadline_s)

    async def forget_worker(self, key: str) -> WorkerView:
        worker = self.catalog.find(key)
        held = await self.residency.forget(worker.slot)
        log("cache_forgotten", worker=worker.url, reason="asked", chars=held)
        return self.catalog.view(worker)

    def explain(self, asked: ExplainRequest) -> dict[str, Any]:
        return self.explainer.explain(asked)

    def decisions(self, limit: int, key: str | None) -> list[dict[str, Any]]:
        return self.routed.latest(limit, None if key is None else self._spec(key))

    def decision(self, request_id: str) -> dict[str, Any]:
        return self.routed.one(request_id)

    def why(self, key: str, last_s: float) -> dict[str, Any]:
        return self.routed.why(self._spec(key), last_s)

    def _spec(self, key: str) -> WorkerSpec:
        """Raises RequestError 404, also for a worker that is in no generation yet or any more."""
        worker = self.catalog.find(key)
        for spec in self.publisher.current.workers:
            if spec.id == worker.id:
                return spec
        message = f"worker {worker.url} is not in force: it was removed, or its name does not resolve"
        raise RequestError(404, "WORKER_NOT_FOUND", message, fault=Fault.CLIENT)

    def config(self) -> ConfigView:
        reloader, publisher = self.reloader, self.publisher
        return ConfigView(
            generation=publisher.current.generation,
            hash=content_hash(publisher.current),
            source=files.paths(self.settings),
            published_at=publisher.published_at,
            last_reload_ok=reloader.is_ok,
            last_reload_at=reloader.last_at,
            errors=tuple(map(str, reloader.errors)),
            warnings=reloader.warnings,
            pending_restart=reloader.pending_restart,
            held=self.historian.held(),
        )

    async def reload(self) -> ConfigView:
        await self.reloader.reload()
        return self.config()

    def worker_settings(self, key: str) -> dict[str, Any]:
        return audited_settings(self.catalog.find(key))

    def log_settings(self) -> LogView:
        logs = LogSettings(self.segment)
        return LogView(
            level=logs.current_level(),
            access_log=self.settings.access_log,
            access_sample=logs.access_sample,
        )

    def set_logs(self, level: str | None, access_sample: float | None) -> LogView:
        logs = LogSettings(self.segment)
        logs.put(
            logs.current_level() if level is None else level,
            logs.access_sample if access_sample is None else access_sample,
        )
        return self.log_settings()

    def config_history(self) -> HistoryView:
        return self.historian.history()

    def config_generation(self, generation: int) -> GenerationView:
        return self.historian.generation(generation)

    def config_diff(self, before: int, after: int | None) -> ConfigDiffView:
        return self.historian.diff(before, after)

    async def rollback(self, generation: int, by: str) -> ConfigView:
        await self.historian.rollback(generation, by)
        return self.config()

    async def apply(self, request: ApplyRequest, by: str) -> ConfigView:
        await self.historian.apply(request, by)
        return self.config()

    async def confirm(self, by: str) -> ConfigView:
        await self.historian.confirm(by)
        return self.config()

    async def release(self, by: str) -> ConfigView:
        await self.historian.release(by)
        return self.config()

    def status(self) -> StatusView:
        segment = self.segment
        clock = Clock(time.time(), time.monotonic())
        workers = self.catalog.list(state=None, model=None)
        slots = range(segment.layout.slots)
        return StatusView(
            version=VERSION,
            state="draining" if segment.is_draining else "running",
            listen=_address(self.settings.host, self.settings.port),
            uptime_s=round(clock.wall - segment.words.get(at.H_CREATED_NS) / 1e9, 3),
            generation=segment.generation,
            processes=process_views(segment, clock, has_batches=self.settings.batch_store is not None),
            workers_total=len(workers),
            workers_healthy=sum(worker.is_healthy for worker in workers),
            can_serve=_can_serve(workers),
            draining=tuple(self.catalog.list(state="draining", model=None)),
            in_flight=sum(map(segment.inflight, slots)),
            connections=segment.gauge_total(at.G_CONNECTIONS),
            buffered_bytes=segment.gauge_total(at.G_BUFFERED_BYTES),
            admission=admission_shown(self.catalog.resilience),
            pause=self.pauser.view(),
            config=self.config(),
            lock_timeouts=segment.lock_timeouts,
            lock_recoveries=segment.lock_recoveries,
        )

    async def upgrade(self, timeout_s: float) -> UpgradeView:
        return await self.upgrader.run(timeout_s)

    def metrics(self) -> bytes:
        info = DaemonInfo(
            version=VERSION,
            started_at=self.segment.words.get(at.H_CREATED_NS) / 1e9,
            last_reload_ok=self.reloader.is_ok,
            last_reload_success_at=self.publisher.published_at,
        )
        return metrics.render(self.routing, self.publisher.current, info, self.settings.metrics_compat)

    async def save_state(self) -> SavedStateView:
        try:
            saved = await self.saver.save()
        except (OSError, TimeoutError) as error:
            message = f"what routing has learned cannot be saved in {self.settings.state_dir}: {error}"
            raise RequestError(500, "STATE_NOT_SAVED", message, fault=Fault.OPERATOR, type="server_error") from None
        return SavedStateView(path=str(saved.path), bytes=saved.size_bytes, seconds=saved.seconds)

    async def pause(self, mode: str, reason: str) -> PauseView:
        self.upgrader.check_none()
        return await self.pauser.pause(mode, reason)

    def resume(self) -> PauseView:
        return self.pauser.resume()

    def record(self, seconds: float) -> AsyncGenerator[bytes]:
        return self.recorder.record(seconds)

    def stop_recording(self) -> None:
        self.recorder.stop()

    async def fan_out(self, request: FanoutRequest) -> FanoutView:
        return await self.fanning.run(request)

    async def engine_loads(self, request: FanoutRequest) -> LoadsView:
        return await self.fanning.loads(request)

    async def engine_metrics(self, request: FanoutRequest) -> EngineMetricsView:
        return await self.fanning.metrics(request)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _can_serve(workers: Iterable[WorkerView]) -> bool:
    roles = {worker.worker_type for worker in workers if worker.is_healthy}
    return "regular" in roles or {"prefill", "decode"} <= roles
