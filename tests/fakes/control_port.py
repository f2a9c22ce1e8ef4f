"""A control process in memory: what the admin API asks of the daemon, answered without one."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from pointsman.admin_api.ports import (
    AdmissionShown,
    ApplyRequest,
    BreakerShown,
    ConfigDiffView,
    ConfigView,
    DifferenceView,
    DrainShown,
    EngineMetricsView,
    ExplainRequest,
    FanoutRequest,
    FanoutView,
    GenerationView,
    HeldView,
    HistoryEntryView,
    HistoryView,
    LoadsView,
    LoadView,
    LogView,
    PauseView,
    ProcessView,
    SavedStateView,
    StatusView,
    TargetResult,
    UpgradeView,
    WorkerPatch,
    WorkerRequest,
    WorkerView,
)
from pointsman.config.worker_urls import canonical_url
from pointsman.daemon.errors import Fault, RequestError

PROCESS = ProcessView(
    name="shard-0", pid=4242, state="ready", restarts=1, uptime_s=65.0, heartbeat_age_s=0.1, generation=3
)
CONFIG = ConfigView(
    generation=3,
    hash="ab" * 32,
    source={"config": None, "profiles": "/etc/pointsman/profiles.json", "workers": None},
    published_at=1_700_000_000.0,
    last_reload_ok=True,
    last_reload_at=1_700_000_000.0,
    errors=(),
    warnings=(),
    pending_restart=(),
)
ENTRY = HistoryEntryView(generation=2, last=3, at=1_700_000_000.0, cause="files", by="", is_current=True)
UPGRADED = UpgradeView(
    version="2.0.0", pid=4343, previous_version="1.9.0", previous_pid=4242, in_flight=3, grace_s=1800.0, took_s=1.25
)
REFUSED_CONFIG = msgspec.structs.replace(
    CONFIG,
    last_reload_ok=False,
    errors=("profiles.json:3:5: profiles.fast.routingStrategy: unknown policy 'fastest'",),
)


def error(status: int, code: str, message: str) -> RequestError:
    return RequestError(status, code, message, fault=Fault.CLIENT)


def _canonical(url: str) -> str:
    try:
        return canonical_url(url)
    except ValueError as problem:
        raise error(400, "BAD_REQUEST", f"url: {problem}") from None


def view(request: WorkerRequest, number: int) -> WorkerView:
    return WorkerView(
        id=f"00000000-0000-4000-8000-{number:012}",
        url=_canonical(request.url),
        worker_type=request.worker_type,
        bootstrap_port=request.bootstrap_port,
        kv_connector=request.kv_connector,
        models=request.models,
        weight=request.weight,
        labels=request.labels,
        prompt_tokens_min=request.prompt_tokens_min,
        prompt_tokens_max=request.prompt_tokens_max,
        kv_tokens=request.kv_tokens,
        has_api_key=request.api_key is not None,
        source="api",
        source_path=None,
        status="ready",
        is_healthy=True,
        since=1_700_000_000.0,
        in_flight=0,
        holds=0,
        in_flight_bytes=0,
        oldest_s=None,
        drain=None,
        picks=0,
        breaker=BreakerShown(state="closed", since=None, failures_in_a_row=0, requests=0, failures=0, openings=0),
        last_error=None,
        last_probe=None,
        next_probe=None,
    )


@dataclass
class FakeControlPort:
    """Implements `ControlPort`; `calls` has what was asked, in order."""

    live: list[WorkerView] = field(default_factory=list)
    draining: list[WorkerView] = field(default_factory=list)
    calls: list[tuple[str, object]] = field(default_factory=list)
    view: ConfigView = CONFIG
    reload_to: ConfigView = CONFIG
    paused: PauseView = field(default_factory=lambda: PauseView(mode="running"))
    logs: LogView = field(default_factory=lambda: LogView(level="info", access_log=True, access_sample=1.0))
    recording: tuple[bytes, ...] = ()
    """lines"""
    told: tuple[TargetResult, ...] = ()
    """by the workers, to whatever is asked of all of them"""
    loads: tuple[LoadView, ...] = ()
    engine_page: bytes = b""
    breaks_with: Exception | None = None
    """raised by whatever is asked next"""

    def declare(self, url: str, *, file: str | None = None, **fields: object) -> WorkerView:
        """A worker that is there without anybody having asked."""
        made = view(WorkerRequest(url=url), len(self.live) + 1)
        if file is not None:
            fields |= {"source": "file", "source_path": file}
        made = msgspec.structs.replace(made, **fields)
        self.live.append(made)
        return made

    def _note(self, name: str, value: object = None) -> None:
        self.calls.append((name, value))
        self._break()

    def _break(self) -> None:
        if self.breaks_with is not None:
            raise self.breaks_with

    def _find(self, key: str) -> WorkerView:
        for known in (*self.live, *self.draining):
            if key in (known.id, known.url):
                return known
        raise error(404, "WORKER_NOT_FOUND", f"no worker {key}")

    async def add_worker(self, request: WorkerRequest) -> WorkerView:
        self._note("add", request)
        made = view(request, len(self.live) + 1)
        if any(known.url == made.url for known in self.live):
            raise error(409, "WORKER_ALREADY_EXISTS", f"worker {made.url} exists already")
        self.live.append(made)
        return made

    def list_workers(self, *, state: str | None = None, model: str | None = None) -> list[WorkerView]:
        self._note("list", (state, model))
        found = self.draining if state == "draining" else self.live
        return [known for known in found if model is None or model in known.models]

    def get_worker(self, key: str) -> WorkerView:
        self._note("get", key)
        return self._find(key)

    async def patch_worker(self, key: str, patch: WorkerPatch) -> WorkerView:
        self._note("patch", (key, patch))
        known = self._find(key)
        changes = {name: value for name, value in msgspec.structs.asdict(patch).items() if value is not msgspec.UNSET}
        if "api_key" in changes:
            changes["has_api_key"] = changes.pop("api_key") is not None
        changed = msgspec.structs.replace(known, **changes)
        self.live[self.live.index(known)] = changed
        return changed

    def explain(self, asked: ExplainRequest) -> dict[str, Any]:
        self._note("explain", asked)
        return {"worker": None, "candidates": []}

    def decisions(self, limit: int, key: str | None) -> list[dict[str, Any]]:
        self._note("decisions", (limit, key))
        return []

    def decision(self, request_id: str) -> dict[str, Any]:
        raise error(404, "DECISION_NOT_FOUND", request_id)

    def why(self, key: str, last_s: float) -> dict[str, Any]:
        return {"worker": self._find(key).url, "asked_s": last_s}

    async def forget_worker(self, key: str) -> WorkerView:
        self._note("forget", key)
        return self._find(key)

    async def drain_worker(self, key: str, deadline_s: float | None, then: Literal["close", "keep"]) -> WorkerView:
        self._note("drain", (key, deadline_s, then))
        by = None if deadline_s is None else 1_700_000_000.0 + deadline_s
        shown = DrainShown(since=1_700_000_000.0, deadline=by, then=then, is_removed=False)
        return self._change(self._find(key), drain=shown, status="draining", is_healthy=False)

    async def undrain_worker(self, key: str) -> WorkerView:
        self._note("undrain", key)
        return self._change(self._find(key), drain=None, status="ready", is_healthy=True)

    def _change(self, known: WorkerView, **fields: object) -> WorkerView:
        changed = msgspec.structs.replace(known, **fields)
        self.live[self.live.index(known)] = changed
        return changed

    async def remove_worker(self, key: str, deadline_s: float | None = None) -> WorkerView:
        self._note("remove", key if deadline_s is None else (key, deadline_s))
        known = self._find(key)
        if known.source == "file":
            raise error(409, "WORKER_DECLARED_IN_FILE", f"{known.url} is declared in {known.source_path}")
        self.live.remove(known)
        return msgspec.structs.replace(known, status="draining", is_healthy=False)

    def config(self) -> ConfigView:
        self._break()
        return self.view

    def worker_settings(self, key: str) -> dict[str, Any]:
        known = self._find(key)
        return {"url": known.url, "weight": known.weight, "is_draining": known.drain is not None}

    def log_settings(self) -> LogView:
        return self.logs

    def set_logs(self, level: str | None, access_sample: float | None) -> LogView:
        self._note("set_logs", (level, access_sample))
        changes: dict[str, Any] = {"level": level, "access_sample": access_sample}
        self.logs = msgspec.structs.replace(self.logs, **{k: v for k, v in changes.items() if v is not None})
        return self.logs

    def config_history(self) -> HistoryView:
        return HistoryView(generations=(ENTRY,))

    def config_generation(self, generation: int) -> GenerationView:
        if generation > self.view.generation:
            raise error(404, "GENERATION_NOT_KEPT", f"generation {generation} is not in the history")
        return GenerationView(**msgspec.structs.asdict(ENTRY), content={"profiles": {"one": {}}})

    def config_diff(self, before: int, after: int | None) -> ConfigDiffView:
        change = DifferenceView(path="profiles.one.strategy", before=None, after="random")
        return ConfigDiffView(before=before, after=after or self.view.generation, changes=(change,))

    async def rollback(self, generation: int, by: str) -> ConfigView:
        self._note("rollback", (generation, by))
        return self._hold("rollback", f"generation {generation}", by)

    async def apply(self, request: ApplyRequest, by: str) -> ConfigView:
        self._note("apply", (request, by))
        return self._hold("apply", request.name, by, request.confirm_within_s)

    async def confirm(self, by: str) -> ConfigView:
        self._note("confirm", by)
        if not self.view.held:
            raise error(409, "NOTHING_TO_CONFIRM", "nothing that was applied waits for a confirmation")
        held = tuple(msgspec.structs.replace(held, confirm_by=None) for held in self.view.held)
        self.view = msgspec.structs.replace(self.view, held=held)
        return self.view

    async def release(self, by: str) -> ConfigView:
        self._note("release", by)
        self.view = msgspec.structs.replace(self.view, held=(), generation=self.view.generation + 1)
        return self.view

    def _hold(
        self, origin: Literal["rollback", "apply"], what: str, by: str, confirm_within_s: float | None = None
    ) -> ConfigView:
        confirm_by = None if confirm_within_s is None else 1_700_000_000.0 + confirm_within_s
        held = HeldView(
            kind="profiles",
            path="/etc/pointsman/profiles.json",
            origin=origin,
            what=what,
            by=by,
            since=1_700_000_000.0,
            confirm_by=confirm_by,
        )
        self.view = msgspec.structs.replace(self.view, held=(held,), generation=self.view.generation + 1)
        return self.view

    async def reload(self) -> ConfigView:
        self._note("reload")
        self.view = self.reload_to
        return self.view

    def status(self) -> StatusView:
        self._break()
        return StatusView(
            version="0.1.0",
            state="running",
            listen="127.0.0.1:8700",
            uptime_s=3725.0,
            generation=self.view.generation,
            processes=(PROCESS,),
            workers_total=len(self.live),
            workers_healthy=sum(known.is_healthy for known in self.live),
            can_serve=True,
            draining=tuple(known for known in self.live if known.drain is not None),
            in_flight=2,
            connections=5,
            buffered_bytes=4608,
            admission=AdmissionShown(max_concurrent_requests=0, in_use=2, queue_size=100, waiting=0),
            pause=self.paused,
            config=self.view,
            lock_timeouts=0,
            lock_recoveries=0,
        )

    async def pause(self, mode: str, reason: str) -> PauseView:
        self._note("pause", (mode, reason))
        self.paused = PauseView(mode="hold" if mode == "hold" else "reject", reason=reason, for_s=0.0, held=3)
        return self.paused

    def resume(self) -> PauseView:
        self._note("resume")
        if self.paused.mode == "running":
            raise error(409, "NOT_PAUSED", "the gateway is not paused")
        self.paused = PauseView(mode="running")
        return self.paused

    async def save_state(self) -> SavedStateView:
        self._note("save_state")
        return SavedStateView(path="/var/lib/pointsman/routing.state", bytes=4096, seconds=0.25)

    async def record(self, seconds: float) -> AsyncGenerator[bytes]:
        self._note("record", seconds)
        for line in self.recording:
            yield line

    def stop_recording(self) -> None:
        self._note("stop_recording")

    async def upgrade(self, timeout_s: float) -> UpgradeView:
        self._note("upgrade", timeout_s)
        return UPGRADED

    def metrics(self) -> bytes:
        self._note("metrics")
        return b"# HELP pointsman_connections Open.\n# TYPE pointsman_connections gauge\npointsman_connections 5.0\n"

    async def fan_out(self, request: FanoutRequest) -> FanoutView:
        self._note("fan_out", request)
        if request.body and not request.body.lstrip().startswith(b"{"):
            raise error(400, "BAD_REQUEST", "expected a JSON object")
        return FanoutView(operation=request.operation, timeout_s=request.timeout_s or 30.0, results=self.told)

    async def engine_loads(self, request: FanoutRequest) -> LoadsView:
        return LoadsView(fanout=await self.fan_out(request), workers=self.loads)

    async def engine_metrics(self, request: FanoutRequest) -> EngineMetricsView:
        return EngineMetricsView(fanout=await self.fan_out(request), page=self.engine_page)
