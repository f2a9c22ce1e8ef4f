"""`pointsman serve`: every setting that is fixed for the life of the daemon, with its unit, default and bounds.

One name everywhere: the key of pointsman.toml (flat, no tables), the environment variable `POINTSMAN_<KEY>` and the
flag `--<key>` with dashes. Precedence: flag, environment, file, default (`serve_sources`). Defaults are those of
`config.settings.Settings`, which this turns into.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from pydantic import AfterValidator, Field
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from pointsman.config import cores, listen, places
from pointsman.config.pd import KvConnector
from pointsman.config.policy_names import canonical_name
from pointsman.config.settings import Settings
from pointsman.config.worker_urls import canonical_url

DAY_S = 86400.0

_defaults: dict[str, Any] = {
    field.name: field.default for field in msgspec.structs.fields(Settings) if field.default is not msgspec.NODEFAULT
}


def _key(name: str, description: str, **bounds: Any) -> Any:
    return Field(default=_defaults[name], description=description, **bounds)


def _seconds(name: str, description: str, *, least: float = 0.0) -> Any:
    return _key(name, f"{description} (seconds)", ge=least, le=7 * DAY_S)


def _each(check: Callable[[str], str]) -> AfterValidator:
    def run(items: tuple[str, ...]) -> tuple[str, ...]:
        checked = tuple(map(check, items))
        for item in checked:
            if checked.count(item) > 1:
                raise ValueError(f"{item} occurs twice")
        return checked

    return AfterValidator(run)


def _network(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text))
    except ValueError as error:
        raise ValueError(f"expected networks like 10.0.0.0/8: {error}") from None


def _request_path(text: str) -> str:
    if not text.startswith("/") or not text.isascii() or not text.isprintable() or set(text) & set(" ?#*"):
        raise ValueError(f"expected a path like /v1/custom, got {text[:60]!r}")
    return text


def _worker_url(text: str) -> str:
    try:
        return canonical_url(text)
    except ValueError as error:
        raise ValueError(f"{text[:60]!r}: {error}") from None


def _prefill_url(text: str) -> str:
    url, separator, port = text.partition("#")
    if separator and port != "none" and not (port.isdecimal() and port.isascii() and 1 <= int(port[:6]) <= 65535):
        raise ValueError(f"{text[:60]!r}: expected URL#PORT or URL#none with the port of the bootstrap server")
    return _worker_url(url) + ("" if port in ("", "none") else f"#{int(port)}")


# The list itself may be any sequence (TOML's arrays, several arguments of a flag); its items are strictly strings.
_Strings = Annotated[tuple[str, ...], Field(strict=False), NoDecode]


class ServeConfig(BaseSettings):
    model_config = SettingsConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        env_prefix="POINTSMAN_",
        env_ignore_empty=True,
    )

    host: Annotated[str, AfterValidator(listen.host)] = _key("host", "address or name that clients connect to")
    port: int = _key("port", "port that clients connect to; 0 = any free one", ge=0, le=65535)
    shards: int | None = Field(
        default=None, ge=1, le=64, description="data-plane processes; default: min(4, usable cores)"
    )
    admin_listen: Annotated[_Strings, _each(listen.admin_address)] = _key(
        "admin_listen",
        "where the admin API listens: unix:PATH or HOST:PORT; default: unix:RUNTIME_DIR/admin.sock and 127.0.0.1:8701",
        max_length=16,
    )
    admin_auth: bool = _key("admin_auth", "ask for a bearer token on TCP admin listeners; off for loopback only")
    admin_token_file: str | None = _key(
        "admin_token_file", "file with the admin token; default: generated", min_length=1
    )
    admin_on_data_port: bool = _key(
        "admin_on_data_port", "fan-outs (/flush_cache, …) on the data port, too, by admin token or admin_networks"
    )
    admin_networks: Annotated[_Strings, _each(_network)] = _key(
        "admin_networks", "networks of clients that need no admin token for fan-outs on the data port"
    )
    metrics_listen: Annotated[_Strings, _each(listen.tcp_address)] = _key(
        "metrics_listen", "HOST:PORT for /metrics, /health and /readiness alone, without a token", max_length=16
    )
    metrics_compat: Literal["none", "sglang", "vllm"] = _key(
        "metrics_compat", "/metrics also under the names of sglang-router's (and SMG's) or vllm-router's metrics"
    )
    backlog: int = _key("backlog", "connections that wait for accept, per shard", ge=1, le=65535)
    tls_cert: str | None = _key("tls_cert", "PEM file: certificate and chain of the data port, read live", min_length=1)
    tls_key: str | None = _key("tls_key", "PEM file: private key of the certificate, read live", min_length=1)
    tls_client_ca: str | None = _key(
        "tls_client_ca", "PEM file: authorities of the certificates that clients must show, read live", min_length=1
    )

    runtime_dir: str | None = Field(
        default=None,
        min_length=1,
        description="sockets and generated token; default: $RUNTIME_DIRECTORY, $XDG_RUNTIME_DIR/pointsman, temporary",
    )
    state_dir: str | None = Field(
        default=None,
        min_length=1,
        description="what survives a restart; default: $STATE_DIRECTORY, $XDG_STATE_HOME/pointsman",
    )
    profiles_file: str | None = _key("profiles_file", "profiles (.json, .yaml, .toml), read live", min_length=1)
    workers_file: str | None = _key("workers_file", "declared workers (.json, .yaml, .toml), read live", min_length=1)
    state_snapshot_interval_s: float = _seconds(
        "state_snapshot_interval_s", "between two writes of what routing has learned to state_dir; 0 = at the stop only"
    )
    state_max_age_s: float = _seconds(
        "state_max_age_s", "how old what was written may be for a start to load it; 0 = neither write nor load it"
    )
    api_key_file: str | None = _key(
        "api_key_file", "keys that clients must show (.json, .yaml, .toml), read live", min_length=1
    )
    worker_ca_file: str | None = _key(
        "worker_ca_file", "PEM file: authorities of https workers, instead of the system's, read live", min_length=1
    )

    workers: Annotated[_Strings, _each(_worker_url)] = _key("workers", "URLs of workers; none is a valid start")
    policy: Annotated[str, AfterValidator(canonical_name)] = _key(
        "policy", "strategy of requests whose profile names none"
    )
    prefill: Annotated[_Strings, _each(_prefill_url)] = _key(
        "prefill", "prefill workers: URL, or URL#PORT with the port of its bootstrap server (flag: URL [PORT|none])"
    )
    decode: Annotated[_Strings, _each(_worker_url)] = _key("decode", "URLs of decode workers")
    kv_connector: KvConnector = _key(
        "kv_connector", "how prefill and decode workers hand KV over, unless they declare it themselves"
    )
    prefill_policy: Annotated[str, AfterValidator(canonical_name)] = _key(
        "prefill_policy", "how prefill workers are picked, unless the profile says"
    )
    decode_policy: Annotated[str, AfterValidator(canonical_name)] = _key(
        "decode_policy", "how decode workers are picked, unless the profile says"
    )
    kv_lease_s: float = _seconds("kv_lease_s", "a prefill worker keeps what decode has not fetched", least=0.1)
    pd_min_uncached_tokens: int = _key(
        "pd_min_uncached_tokens", "shorter rests of prompts go to decode alone (vLLM; tokens); 0 = none", ge=0, le=2**31
    )
    pd_decode_without_prefill: bool = _key(
        "pd_decode_without_prefill", "decode computes prompts itself when no prefill worker is left to (vLLM)"
    )
    pd_headroom_wait_s: float = _seconds("pd_headroom_wait_s", "a request waits for a decode worker with memory for it")
    cache_threshold: float = _key(
        "cache_threshold", "cache_aware: share of a prompt that must be cached to follow it", ge=0, le=1
    )
    balance_abs_threshold: int = _key(
        "balance_abs_threshold", "cache_aware: more requests at the busiest worker than at the idlest", ge=0, le=2**31
    )
    balance_rel_threshold: float = _key(
        "balance_rel_threshold", "cache_aware: times as many, too: then load decides", ge=0, le=1e9
    )
    prefix_index_mib: int = _key("prefix_index_mib", "memory of the shared prefix index (MiB)", ge=1, le=2**20)
    prefix_block_bytes: int = _key(
        "prefix_block_bytes", "prompt text per block of the prefix index (bytes)", ge=16, le=2**20
    )
    eviction_interval_secs: float = _seconds(
        "eviction_interval_secs", "between evictions of the prefix index to max_tree_size; 0 = never"
    )
    max_tree_size: int = _key(
        "max_tree_size", "prefix index per worker whose engine tells no KV capacity (characters)", ge=1024, le=2**50
    )
    target_pod_header: bool = _key("target_pod_header", "answer target-pod: HOST:PORT of the worker, as AIBrix does")
    routing_header_networks: Annotated[_Strings, _each(_network)] = _key(
        "routing_header_networks", "networks of clients that may use routing headers; a key may say otherwise"
    )
    routing_headers_denied: Literal["ignore", "refuse"] = _key(
        "routing_headers_denied", "what becomes of routing headers that are not allowed; refuse = 403"
    )
    routed_worker_header: bool = _key(
        "routed_worker_header", "answer x-smg-routed-worker-id: URL of the worker, as SGLang's gateway does"
    )
    explain_header: Literal["all", "local", "none"] = _key(
        "explain_header", "whose x-pointsman-explain: 1 is answered with the decision; local = loopback clients"
    )
    decision_sample_interval_s: float = _seconds(
        "decision_sample_interval_s", "per shard, one decision per interval is explained and kept; 0 = none"
    )
    strict_models: bool = _key("strict_models", "answer 404 for a model that no worker announces")
    extra_paths: Annotated[_Strings, _each(_request_path)] = _key("extra_paths", "further paths to route to workers")
    worker_networks: Annotated[_Strings, _each(_network)] = _key(
        "worker_networks", "networks that workers may be in; default: loopback and private ones", min_length=1
    )

    max_payload_size: int = _key("max_payload_size", "largest request body (bytes)", ge=1024, le=2**40)
    buffer_mib: int = _key("buffer_mib", "request bodies held at once by all shards (MiB)", ge=1, le=2**20)
    buffer_wait_s: float = _seconds("buffer_wait_s", "how long a body may wait for buffer space")
    max_connections: int = _key("max_connections", "client connections of all shards; 0 = no limit", ge=0, le=2**24)
    max_workers: int = _key("max_workers", "slots for workers in shared memory", ge=1, le=255)
    max_header_bytes: int = _key("max_header_bytes", "largest request head (bytes)", ge=1024, le=2**20)
    max_headers: int = _key("max_headers", "most header fields of a request", ge=8, le=10_000)

    header_timeout_s: float = _seconds("header_timeout_s", "for a request head to arrive", least=0.001)
    body_timeout_s: float = _seconds("body_timeout_s", "longest pause within a request body", least=0.001)
    keep_alive_timeout_s: float = _seconds("keep_alive_timeout_s", "for the next request on a connection")
    connect_timeout_s: float = _seconds("connect_timeout_s", "for a connection to a worker", least=0.001)
    request_timeout_s: float = _seconds("request_timeout_s", "from a request to the end of its answer", least=0.001)
    pool_idle_timeout_s: float = _seconds("pool_idle_timeout_s", "an idle connection to a worker is kept")
    pool_max_idle: int = _key("pool_max_idle", "idle connections kept per worker and shard", ge=0, le=65535)
    stream_coalesce_us: int = _key(
        "stream_coalesce_us",
        "how long events of streams wait for each other while a shard has many of them (microseconds; 0: none waits)",
        ge=0,
        le=20_000,
    )

    retry_max_retries: int = _key("retry_max_retries", "attempts of a request, the first included", ge=0, le=100)
    retry_initial_backoff_ms: float = _key(
        "retry_initial_backoff_ms", "pause before the second attempt (milliseconds)", ge=0, le=DAY_S * 1000
    )
    retry_max_backoff_ms: float = _key(
        "retry_max_backoff_ms", "longest pause before an attempt (milliseconds)", ge=0, le=DAY_S * 1000
    )
    retry_backoff_multiplier: float = _key("retry_backoff_multiplier", "growth of the pauses", ge=1, le=10)
    retry_jitter_factor: float = _key("retry_jitter_factor", "share by which pauses vary at random", ge=0, le=1)
    disable_retries: bool = _key("disable_retries", "one attempt per request")
    cb_failure_threshold: int = _key("cb_failure_threshold", "failures in a row that open a breaker", ge=1, le=2**31)
    cb_success_threshold: int = _key("cb_success_threshold", "good probes in a row that close it", ge=1, le=2**31)
    cb_timeout_duration_secs: float = _seconds(
        "cb_timeout_duration_secs", "from a breaker's opening to its first probe", least=0.001
    )
    cb_window_duration_secs: float = _seconds(
        "cb_window_duration_secs", "that a breaker's failure rate is taken over", least=0.001
    )
    disable_circuit_breaker: bool = _key("disable_circuit_breaker", "no breaker; health probes alone take workers out")
    max_concurrent_requests: int = _key(
        "max_concurrent_requests", "requests at workers at once, over all shards; 0 or -1 = no limit", ge=-1, le=2**31
    )
    queue_size: int = _key("queue_size", "requests that may wait for one of these", ge=0, le=2**31)
    queue_timeout_secs: float = _seconds("queue_timeout_secs", "that a request may wait there", least=0.001)

    batch_store: str | None = _key(
        "batch_store",
        "turns offline batches on, and keeps their payloads: sqlite (in the state directory), sqlite:PATH, "
        "redis://HOST or mooncake://HOST:PORT",
        min_length=1,
    )
    batch_concurrency: int = _key("batch_concurrency", "requests of batches under way at once, at most", ge=1, le=4096)
    batch_line_attempts: int = _key(
        "batch_line_attempts", "attempts of a request of a batch whose failure may be its own fault", ge=1, le=100
    )
    batch_max_lines: int = _key("batch_max_lines", "requests of one batch", ge=1, le=10_000_000)
    batch_max_file_mib: int = _key("batch_max_file_mib", "largest upload (MiB)", ge=1, le=2**20)
    batch_quota_mib: int = _key("batch_quota_mib", "files of one API key together (MiB); 0 = no limit", ge=0, le=2**30)
    batch_max_running: int = _key(
        "batch_max_running", "batches of one API key that are not done; 0 = no limit", ge=0, le=1_000_000
    )
    batch_ttl_s: float = _key(
        "batch_ttl_s", "batches and files are kept (seconds); 0 = for ever", ge=0, le=3650 * DAY_S
    )

    drain_delay_s: float = _seconds("drain_delay_s", "keep accepting after SIGTERM, readiness already 503")
    shutdown_grace_s: float = _seconds("shutdown_grace_s", "for running requests to end after SIGTERM")
    upgrade_grace_s: float = _seconds("upgrade_grace_s", "for running requests of the old daemon after an upgrade")

    health_path: Annotated[str, AfterValidator(_request_path)] = _key("health_path", "path of a worker's health probe")
    health_interval_s: float = _seconds("health_interval_s", "between probes of a healthy worker", least=0.1)
    health_down_interval_s: float = _seconds("health_down_interval_s", "between probes of one that is down", least=0.1)
    health_timeout_s: float = _seconds("health_timeout_s", "for a probe's answer", least=0.01)
    health_failure_threshold: int = _key("health_failure_threshold", "failed probes in a row = down", ge=1, le=1000)
    health_success_threshold: int = _key("health_success_threshold", "good probes in a row = up", ge=1, le=1000)

    access_log: bool = _key("access_log", "one line per request")
    access_log_format: Literal["json", "text"] = _key("access_log_format", "how that line is written")
    access_log_sample: float = _key(
        "access_log_sample", "share of the requests without an error that get a line (0 to 1)", ge=0, le=1
    )
    log_level: Literal["debug", "info", "warning", "error"] = _key("log_level", "least level that is logged")

    def to_settings(self, *, config_file: Path | None = None) -> Settings:
        """Everything resolved: paths absolute, counts and directories known."""
        runtime_dir = _absolute(self.runtime_dir) or str(places.runtime_dir())
        state_dir = _absolute(self.state_dir) or str(places.state_dir())
        resolved: dict[str, object] = {
            "shards": self.shards or cores.default_shards(),
            "runtime_dir": runtime_dir,
            "state_dir": state_dir,
            "admin_listen": self.admin_listen or default_admin_listen(runtime_dir),
            "config_file": _absolute(str(config_file)) if config_file else None,
            "batch_store": places.batch_store(self.batch_store, state_dir),
        }
        for key in PATH_KEYS - resolved.keys():
            resolved[key] = _absolute(getattr(self, key))
        plain: Mapping[str, object] = self.model_dump()
        return Settings(**{**plain, **resolved})  # type: ignore[arg-type]  # a test keeps the two in step


PATH_KEYS = frozenset(
    {"admin_token_file", "api_key_file", "profiles_file", "runtime_dir", "state_dir", "workers_file"}
    | {"tls_cert", "tls_client_ca", "tls_key", "worker_ca_file"}
)


def default_admin_listen(runtime_dir: str) -> tuple[str, ...]:
    return (f"unix:{runtime_dir}/{places.ADMIN_SOCKET}", "127.0.0.1:8701")


def _absolute(path: str | None) -> str | None:
    return str(Path(path).expanduser().absolute()) if path else None
