"""What the admin API needs of the daemon, and nothing more: control implements it, tests fake it.

Values that travel are plain frozen structs; every method may raise `errors.RequestError` (its status, code and message
are the answer) and nothing else on purpose.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Literal, Protocol

import msgspec

from pointsman.config.pd import KvConnector
from pointsman.config.snapshot import MAX_TOKENS

DEFAULT_UPGRADE_TIMEOUT_S = 60.0
MAX_UPGRADE_TIMEOUT_S = 600.0
Role = Literal["regular", "prefill", "decode"]
WorkerStatus = Literal["pending", "ready", "not_ready", "draining"]
Source = Literal["api", "file", "flag"]


class WorkerRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A worker as somebody asks for it (admin API, workers file, command line)."""

    url: str
    worker_type: Role = "regular"
    bootstrap_port: int | None = None
    kv_connector: KvConnector | None = None
    """None = as the settings say."""
    models: tuple[str, ...] = ()
    """Declared; empty = ask the worker (GET /v1/models)."""
    weight: float = 1.0
    labels: dict[str, str] = {}
    api_key: str | None = None
    prompt_tokens_min: int = 0
    prompt_tokens_max: int = MAX_TOKENS
    """The prompt lengths that it takes, both ends included."""
    kv_tokens: int | None = None
    """KV capacity; None = as the engine tells."""


class WorkerPatch(msgspec.Struct, frozen=True, kw_only=True):
    """Only what is not UNSET changes."""

    weight: float | msgspec.UnsetType = msgspec.UNSET
    labels: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    models: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    api_key: str | msgspec.UnsetType | None = msgspec.UNSET
    prompt_tokens_min: int | msgspec.UnsetType = msgspec.UNSET
    prompt_tokens_max: int | msgspec.UnsetType = msgspec.UNSET
    kv_tokens: int | msgspec.UnsetType | None = msgspec.UNSET


class BreakerShown(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's circuit breaker, one for all shards."""

    state: Literal["closed", "open", "half_open"]
    since: float | None
    """Unix seconds; None: it never opened."""
    failures_in_a_row: int
    requests: int
    """In its window, like `failures`."""
    failures: int
    openings: int


class AdmissionShown(msgspec.Struct, frozen=True, kw_only=True):
    """Requests over all shards."""

    max_concurrent_requests: int
    """0: no limit"""
    in_use: int
    queue_size: int
    waiting: int


class DrainShown(msgspec.Struct, frozen=True, kw_only=True):
    """No new requests. Times are Unix seconds."""

    since: float
    deadline: float | None
    """None: as long as it takes."""
    then: Literal["close", "keep"]
    """What becomes of those that still run at the deadline."""
    is_removed: bool
    """It is gone for good as soon as the last one has ended."""


class WorkerView(msgspec.Struct, frozen=True, kw_only=True):
    """A worker as it is now. Times are Unix seconds; the API key itself is never shown."""

    id: str
    url: str
    worker_type: Role
    bootstrap_port: int | None
    kv_connector: KvConnector | None
    """As declared."""
    models: tuple[str, ...]
    weight: float
    labels: dict[str, str]
    prompt_tokens_min: int
    prompt_tokens_max: int
    kv_tokens: int | None
    """As declared, not as the engine tells."""
    has_api_key: bool
    source: Source
    source_path: str | None
    """The file that declared it, with `source` "file"."""
    status: WorkerStatus
    is_healthy: bool
    since: float
    in_flight: int
    holds: int
    """Requests whose KV decode has yet to fetch from it."""
    in_flight_bytes: int
    oldest_s: float | None
    """For how long the oldest of those in flight is; None: there is none, or they were routed without a booking."""
    drain: DrainShown | None
    """None: it takes requests, if it is healthy."""
    picks: int
    breaker: BreakerShown
    last_error: str | None
    last_probe: float | None
    next_probe: float | None


class ExplainRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request that is not sent, to see where it would go."""

    request: dict[str, Any]
    """The body as a client would send it."""
    path: str = "/v1/chat/completions"
    headers: dict[str, str] = {}
    profile: str | dict[str, Any] | None = None
    """A profile's name, or a draft as in profiles.json; None: as the request says."""


class HeldView(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is in force in the place of a file, until that file changes."""

    kind: Literal["profiles", "workers"]
    path: str | None
    """The file that it hides; None: none is configured."""
    origin: Literal["rollback", "apply"]
    what: str
    """`generation 12`, or the name of the file that was applied."""
    by: str
    since: float
    confirm_by: float | None
    """From then on (Unix seconds) what was in force before is, unless it is confirmed; None: it stays."""


class HistoryEntryView(msgspec.Struct, frozen=True, kw_only=True):
    """What the files said in a row of generations."""

    generation: int
    """The first one."""
    last: int
    """The last one, so far."""
    at: float
    cause: str
    by: str
    """Empty: a file was edited."""
    is_current: bool


class HistoryView(msgspec.Struct, frozen=True, kw_only=True):
    generations: tuple[HistoryEntryView, ...]
    """The newest first."""


class GenerationView(HistoryEntryView, frozen=True, kw_only=True):
    content: dict[str, Any]
    """Secrets are shown as `hash:…`; what is at its default is left out."""


class DifferenceView(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    before: Any
    """null: it was not there."""
    after: Any


class ConfigDiffView(msgspec.Struct, frozen=True, kw_only=True):
    before: int
    """The generations that are compared."""
    after: int
    changes: tuple[DifferenceView, ...]


class ApplyRequest(msgspec.Struct, frozen=True, kw_only=True):
    kind: Literal["profiles", "workers"]
    name: str
    """Of the file; its ending says what format `content` is in."""
    content: str
    confirm_within_s: float | None = None
    """None: it needs no confirmation."""


class ConfigView(msgspec.Struct, frozen=True, kw_only=True):
    generation: int
    hash: str
    """sha256 over the compiled configuration (without the generation number)."""
    source: dict[str, str | None]
    """file kind ("config", "profiles", "workers") -> path"""
    published_at: float
    last_reload_ok: bool
    last_reload_at: float | None
    errors: tuple[str, ...]
    """Why the last reload was refused, `file:line:column: key: problem` each; empty when it was accepted."""
    warnings: tuple[str, ...]
    pending_restart: tuple[str, ...]
    """Keys of pointsman.toml that changed on disk and need a restart."""
    held: tuple[HeldView, ...] = ()
    """What is in force in the place of a file."""


class ProcessView(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    pid: int
    state: str
    restarts: int
    uptime_s: float
    heartbeat_age_s: float
    generation: int


class StatusView(msgspec.Struct, frozen=True, kw_only=True):
    version: str
    state: Literal["running", "draining"]
    listen: str
    uptime_s: float
    generation: int
    processes: tuple[ProcessView, ...]
    workers_total: int
    workers_healthy: int
    can_serve: bool
    """A regular worker is healthy, or a prefill and a decode worker."""
    draining: tuple[WorkerView, ...]
    """Those that get no new requests; removed ones as long as they have some."""
    in_flight: int
    connections: int
    buffered_bytes: int
    admission: AdmissionShown
    pause: PauseView
    config: ConfigView
    lock_timeouts: int
    lock_recoveries: int


class PauseView(msgspec.Struct, frozen=True, kw_only=True):
    mode: Literal["running", "hold", "reject"]
    reason: str = ""
    for_s: float = 0.0
    """How long it has been paused."""
    held: int = 0
    """Requests that wait for it to end."""


class UpgradeView(msgspec.Struct, frozen=True, kw_only=True):
    """Another daemon has taken over."""

    version: str
    pid: int
    """of its supervisor"""
    previous_version: str
    previous_pid: int
    in_flight: int
    """Requests that the previous one still had to finish."""
    grace_s: float
    """How long it may take for that."""
    took_s: float


class LogView(msgspec.Struct, frozen=True, kw_only=True):
    level: Literal["debug", "info", "warning", "error"]
    access_log: bool
    """False: there are no access lines, whatever is sampled."""
    access_sample: float
    """The share of the requests without an error that get an access line."""


class SavedStateView(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    bytes: int
    seconds: float


class FanoutRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is asked of many workers at once."""

    operation: str
    body: bytes = b""
    """As it came; JSON, or nothing."""
    workers: tuple[str, ...] = ()
    """Ids or URLs; empty = all."""
    model: str | None = None
    """Only workers that serve it."""
    timeout_s: float | None = None
    """Until the last worker has answered, all attempts included; None = as usual for the operation."""
    include_down: bool = False
    """Ask those too whose health probes fail."""


class TargetResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of it at one worker."""

    id: str
    url: str
    outcome: Literal["succeeded", "failed", "unsupported"]
    path: str | None
    """What the engine was asked last, in its own words; None = it was not asked."""
    status: int | None
    """HTTP, of the last answer; None = there was none."""
    attempts: int
    latency_ms: float
    error: str | None
    body: str
    """The begin of the last answer."""


class FanoutView(msgspec.Struct, frozen=True, kw_only=True):
    operation: str
    timeout_s: float
    results: tuple[TargetResult, ...]
    """In declaration order of the workers."""


class LoadView(msgspec.Struct, frozen=True, kw_only=True):
    """As SGLang's gateways show it."""

    worker: str
    """URL"""
    load: int
    """KV tokens in use, -1 = not told."""
    details: Any
    """What the engine answered; None = nothing."""


class LoadsView(msgspec.Struct, frozen=True, kw_only=True):
    fanout: FanoutView
    workers: tuple[LoadView, ...]


class EngineMetricsView(msgspec.Struct, frozen=True, kw_only=True):
    fanout: FanoutView
    page: bytes
    """Prometheus text exposition format 0.0.4."""


class ControlPort(Protocol):
    async def add_worker(self, request: WorkerRequest) -> WorkerView:
        """Register, probe (up to 2 s) and publish; when it returns, all shards may pick it if it is healthy.

        409 `WORKER_ALREADY_EXISTS`, 400 `BAD_REQUEST` for a URL that is not allowed.
        """
        ...

    def list_workers(self, *, state: str | None = None, model: str | None = None) -> list[WorkerView]:
        """Live ones in declaration order; with state "draining" the removed ones whose requests still run."""
        ...

    def get_worker(self, key: str) -> WorkerView:
        """By id or by URL; also one that is draining. 404 `WORKER_NOT_FOUND`."""
        ...

    async def patch_worker(self, key: str, patch: WorkerPatch) -> WorkerView: ...

    async def drain_worker(self, key: str, deadline_s: float | None, then: Literal["close", "keep"]) -> WorkerView:
        """When it returns, no shard picks it any more, until it is undrained. 404 `WORKER_NOT_FOUND`.

        After `deadline_s` what still runs there is ended (`close`) or left alone; 500 `STATE_NOT_SAVED`: not drained.
        """
        ...

    async def undrain_worker(self, key: str) -> WorkerView:
        """409 `WORKER_DRAINING` for one that was removed."""
        ...

    async def remove_worker(self, key: str, deadline_s: float | None = None) -> WorkerView:
        """When it returns, no shard picks it any more. What runs there may end, for `deadline_s` if that is given.

        409 `WORKER_DECLARED_IN_FILE` (names the path) if a file owns it.
        """
        ...

    async def forget_worker(self, key: str) -> WorkerView:
        """When it returns, the worker is believed to hold no prompt. 404 `WORKER_NOT_FOUND`."""
        ...

    def explain(self, asked: ExplainRequest) -> dict[str, Any]:
        """Nothing is booked. 400 for what cannot be read, 404 for a profile or model that does not exist."""
        ...

    def decisions(self, limit: int, key: str | None) -> list[dict[str, Any]]:
        """The newest routed requests, of one worker if `key` names it."""
        ...

    def decision(self, request_id: str) -> dict[str, Any]:
        """404 `DECISION_NOT_FOUND`: never routed, or too long ago."""
        ...

    def why(self, key: str, last_s: float) -> dict[str, Any]:
        """What went to a worker in the last seconds, and why. 404 `WORKER_NOT_FOUND`."""
        ...

    def worker_settings(self, key: str) -> dict[str, Any]:
        """What the admin API can change of a worker, for audit lines; never its key. 404 `WORKER_NOT_FOUND`."""
        ...

    def log_settings(self) -> LogView: ...

    def set_logs(self, level: str | None, access_sample: float | None) -> LogView:
        """In force in all processes from their next line on, until the daemon restarts. None: as it is."""
        ...

    def config(self) -> ConfigView: ...

    async def reload(self) -> ConfigView:
        """Read all files again and publish what changed; the view says whether that was accepted."""
        ...

    def config_history(self) -> HistoryView: ...

    def config_generation(self, generation: int) -> GenerationView:
        """404 `GENERATION_NOT_KEPT`; 409 `WRITTEN_BY_ANOTHER_VERSION`."""
        ...

    def config_diff(self, before: int, after: int | None) -> ConfigDiffView:
        """None: what is in force. Raises as `config_generation`."""
        ...

    async def rollback(self, generation: int, by: str) -> ConfigView:
        """Its profiles and its workers of the workers file are in force when this returns, until those files change.

        As `config_generation`; 409 `SECRET_NOT_KEPT`; 422 `CONFIG_REFUSED`, 503 `NOT_PUBLISHED`.
        """
        ...

    async def apply(self, request: ApplyRequest, by: str) -> ConfigView:
        """In force when this returns, in the place of the file of that kind, until that changes.

        422 `CONFIG_REFUSED`, 409 `CONFIRMATION_PENDING`, 503 `NOT_PUBLISHED`.
        """
        ...

    async def confirm(self, by: str) -> ConfigView:
        """409 `NOTHING_TO_CONFIRM`."""
        ...

    async def release(self, by: str) -> ConfigView:
        """The files are in force again. 409 `NOTHING_HELD`."""
        ...

    def status(self) -> StatusView: ...

    async def upgrade(self, timeout_s: float) -> UpgradeView:
        """Have the installed version take over, with what settings say now.

        409 `UPGRADE_REFUSED`: not now; 500 `UPGRADE_FAILED`: tried, and given up. This daemon then goes on.
        """
        ...

    def metrics(self) -> bytes:
        """Prometheus text exposition format 0.0.4."""
        ...

    async def save_state(self) -> SavedStateView:
        """What routing has learned is on the disk when it returns. 500 `STATE_NOT_SAVED`."""
        ...

    def record(self, seconds: float) -> AsyncGenerator[bytes]:
        """The requests that arrive in that time, as lines of a trace; a summary is the last one.

        409 `RECORDING_RUNS` at the first line. To be closed by whoever leaves early.
        """
        ...

    async def pause(self, mode: str, reason: str) -> PauseView:
        """From the return on no request starts at an engine. 504 `PAUSE_NOT_ACKNOWLEDGED`: paused, but a shard is
        silent."""
        ...

    def resume(self) -> PauseView:
        """409 `NOT_PAUSED`."""
        ...

    def stop_recording(self) -> None:
        """The recording that runs ends as if its time were over. 404 `NO_RECORDING`."""
        ...

    async def fan_out(self, request: FanoutRequest) -> FanoutView:
        """When it returns, nothing is believed any more to be cached at workers that lost their cache by it.

        400 `BAD_REQUEST`, 404 `WORKER_NOT_FOUND`, `MODEL_NOT_FOUND`: nobody was asked.
        """
        ...

    async def engine_loads(self, request: FanoutRequest) -> LoadsView: ...

    async def engine_metrics(self, request: FanoutRequest) -> EngineMetricsView: ...
