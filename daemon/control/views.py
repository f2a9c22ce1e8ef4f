"""What the admin API shows, from what control knows. Pure."""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass
from math import isinf
from typing import Any, Literal

from pointsman.admin_api.ports import AdmissionShown, BreakerShown, DrainShown, ProcessView, WorkerStatus, WorkerView
from pointsman.daemon.dispatch.resilience import SharedResilience
from pointsman.daemon.resilience.breaker import BreakerView, State
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.segment import Segment
from pointsman.daemon.workers.health import Health
from pointsman.daemon.workers.registry import Drain, Worker

_STATUS: dict[int, WorkerStatus] = {
    at.STATUS_FREE: "pending",
    at.STATUS_PENDING: "pending",
    at.STATUS_UP: "ready",
    at.STATUS_DOWN: "not_ready",
    at.STATUS_DRAINING: "draining",
}
_BREAKER_STATE: dict[State, Literal["closed", "open", "half_open"]] = {
    State.CLOSED: "closed",
    State.OPEN: "open",
    State.HALF_OPEN: "half_open",
}
_PROCESS_STATE = {
    at.PROCESS_DOWN: "down",
    at.PROCESS_BOOTING: "booting",
    at.PROCESS_READY: "ready",
    at.PROCESS_DRAINING: "draining",
}


@dataclass(frozen=True, slots=True)
class Clock:
    """One moment on both clocks, in seconds."""

    wall: float
    monotonic: float

    def wall_of(self, monotonic: float | None) -> float | None:
        return None if monotonic is None else round(self.wall + monotonic - self.monotonic, 3)


def worker_view(
    worker: Worker,
    segment: Segment,
    breaker: BreakerView,
    health: Health | None,
    oldest_start_s: float,
    workers_file: str | None,
    clock: Clock,
) -> WorkerView:
    """`oldest_start_s`: of its oldest request, in seconds of the monotonic clock; inf = it has none."""
    status = "draining" if worker.is_draining else _STATUS[segment.status(worker.slot)]
    declared = worker.declared
    return WorkerView(
        id=worker.id,
        url=worker.url,
        worker_type=declared.worker_type,
        bootstrap_port=declared.bootstrap_port,
        kv_connector=declared.kv_connector,
        models=worker.models,
        weight=declared.weight,
        labels=declared.labels,
        prompt_tokens_min=declared.prompt_tokens_min,
        prompt_tokens_max=declared.prompt_tokens_max,
        kv_tokens=declared.kv_tokens,
        has_api_key=declared.api_key is not None,
        source=worker.source,
        source_path=workers_file if worker.source == "file" else None,
        status=status,
        is_healthy=status == "ready",
        since=segment.status_since_ms(worker.slot) / 1000,
        in_flight=segment.inflight(worker.slot),
        holds=segment.holds(worker.slot),
        in_flight_bytes=segment.total(worker.slot, at.L_INFLIGHT_BYTES),
        oldest_s=None if isinf(oldest_start_s) else round(max(clock.monotonic - oldest_start_s, 0.0), 3),
        drain=_drain_shown(worker, segment) if worker.is_draining else None,
        picks=segment.total(worker.slot, at.L_PICKS),
        breaker=breaker_shown(breaker, clock),
        last_error=health.last_error if health else None,
        last_probe=clock.wall_of(health.last_probe) if health else None,
        next_probe=clock.wall_of(health.next_probe) if health else None,
    )


_MARK_KEY = secrets.token_bytes(16)


def audited_settings(worker: Worker) -> dict[str, Any]:
    """What the admin API can change. Of its key a mark that only this process can make: enough to see a change."""
    declared = worker.declared
    key = declared.api_key
    return {
        "url": worker.url,
        "source": worker.source,
        "models": declared.models,
        "weight": declared.weight,
        "labels": declared.labels,
        "api_key": None if key is None else hmac.digest(_MARK_KEY, key.encode("utf-8", "replace"), "sha256").hex()[:8],
        "prompt_tokens_min": declared.prompt_tokens_min,
        "prompt_tokens_max": declared.prompt_tokens_max,
        "kv_tokens": declared.kv_tokens,
        "is_draining": worker.is_draining,
        "drain": None if worker.drain is None else {"by": worker.drain.by, "then": worker.drain.then},
    }


def _drain_shown(worker: Worker, segment: Segment) -> DrainShown:
    drain = worker.drain or Drain()
    return DrainShown(
        since=segment.status_since_ms(worker.slot) / 1000,
        deadline=None if drain.by is None else round(drain.by, 3),
        then=drain.then,
        is_removed=worker.is_leaving,
    )


def breaker_shown(view: BreakerView, clock: Clock) -> BreakerShown:
    return BreakerShown(
        state=_BREAKER_STATE[view.state],
        since=clock.wall_of(view.since) if view.since else None,
        failures_in_a_row=view.failures_in_a_row,
        requests=view.requests,
        failures=view.failures,
        openings=view.openings,
    )


def admission_shown(resilience: SharedResilience) -> AdmissionShown:
    usage, section = resilience.usage(), resilience.admission
    return AdmissionShown(
        max_concurrent_requests=section.max_concurrent_requests,
        in_use=usage.in_use,
        queue_size=section.queue_size,
        waiting=usage.waiting,
    )


def process_views(segment: Segment, clock: Clock, *, has_batches: bool) -> tuple[ProcessView, ...]:
    rows = [*range(segment.layout.shards), segment.layout.control]
    if has_batches:
        rows.append(segment.layout.batches)
    return tuple(_process_view(segment, index, clock) for index in rows)


def _process_view(segment: Segment, index: int, clock: Clock) -> ProcessView:
    row = segment.process(index)
    is_running = row.pid != 0
    return ProcessView(
        name={segment.layout.control: "control", segment.layout.batches: "batches"}.get(index, f"shard-{index}"),
        pid=row.pid,
        state=_PROCESS_STATE.get(row.state, str(row.state)),
        restarts=row.restarts,
        uptime_s=_age(row.started_ns, clock) if is_running else 0.0,
        heartbeat_age_s=_age(row.heartbeat_ns, clock) if is_running else 0.0,
        generation=row.loaded_generation,
    )


def _age(moment_ns: int, clock: Clock) -> float:
    return round(max(0.0, clock.monotonic - moment_ns / 1e9), 3) if moment_ns else 0.0
