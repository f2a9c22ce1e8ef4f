"""What is fixed for the life of the daemon, in the light form that supervisor and shards load.

`config.models.ServeConfig` (pydantic) reads it from flags, environment and pointsman.toml, documents every key, and
turns into this; a test keeps the two in step.
"""

from __future__ import annotations

import msgspec


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    # listening
    host: str = "127.0.0.1"
    port: int = 8700
    shards: int = 1
    admin_listen: tuple[str, ...] = ()
    """`unix:PATH` or `HOST:PORT`; resolved, never empty."""
    admin_auth: bool = True
    admin_token_file: str | None = None
    admin_on_data_port: bool = False
    """fan-outs are answered on the data port, too"""
    admin_networks: tuple[str, ...] = ()
    """whose clients need no admin token for that"""
    metrics_listen: tuple[str, ...] = ()
    """`HOST:PORT`; metrics and probes for whoever connects, no admin API"""
    metrics_compat: str = "none"
    """whose names /metrics has beside ours: "sglang", "vllm", "none" """
    backlog: int = 2048
    tls_cert: str | None = None
    """PEM file with the certificate of the data port and its chain; None: plain HTTP"""
    tls_key: str | None = None
    tls_client_ca: str | None = None
    """PEM file with the authorities of clients' certificates; None: clients need none"""

    # files
    runtime_dir: str
    state_dir: str
    config_file: str | None = None
    profiles_file: str | None = None
    workers_file: str | None = None
    state_snapshot_interval_s: float = 60.0
    """between two writes of the learned routing state, if it changed; 0 = at the stop only"""
    state_max_age_s: float = 3600.0
    """how old it may be for a start to load it; 0 = neither written nor loaded"""
    api_key_file: str | None = None
    """None: whoever reaches the data port may ask"""
    worker_ca_file: str | None = None
    """PEM file with the authorities of https workers' certificates, instead of the system's"""

    # routing
    workers: tuple[str, ...] = ()
    """Worker URLs of the command line or toml; not kept over a restart."""
    policy: str = "expected_cost"
    prefill: tuple[str, ...] = ()
    """Prefill workers: URL, or URL#PORT with the port of its bootstrap server; kept no longer than `workers`."""
    decode: tuple[str, ...] = ()
    """Decode workers: URLs."""
    kv_connector: str = "sglang"
    """How prefill and decode workers hand KV over, unless they declare it: "sglang", "nixl", "mooncake"."""
    prefill_policy: str = "expected_cost"
    decode_policy: str = "kv_headroom"
    kv_lease_s: float = 30.0
    """how long a prefill worker keeps what decode has not fetched"""
    pd_min_uncached_tokens: int = 0
    """a prompt with fewer tokens that decode has to compute goes to decode alone; 0 = none does"""
    pd_decode_without_prefill: bool = True
    """decode computes prompts itself when no prefill worker is left to"""
    pd_headroom_wait_s: float = 5.0
    """how long a request waits for a decode worker with memory for it"""
    cache_threshold: float = 0.3
    """share of a prompt that must be cached, for the policy cache_aware to follow it"""
    balance_abs_threshold: int = 64
    """requests that the busiest worker has more than the idlest, above which cache_aware balances"""
    balance_rel_threshold: float = 1.5
    """and times that it has as many"""
    prefix_index_mib: int = 256
    """memory of the prefix index, shared by all shards; about 6,000 blocks a MiB"""
    prefix_block_bytes: int = 512
    """of prompt text per block of the prefix index"""
    eviction_interval_secs: float = 120.0
    """between evictions of the prefix index to `max_tree_size`; 0 = never"""
    max_tree_size: int = 2**26
    """characters per worker that the prefix index keeps where the engine does not tell its KV capacity"""
    target_pod_header: bool = True
    """answer `target-pod: HOST:PORT` of the worker, as AIBrix does"""
    routing_header_networks: tuple[str, ...] = ("0.0.0.0/0", "::/0")
    """whose clients may steer their requests by headers, unless their key says otherwise"""
    routing_headers_denied: str = "ignore"
    """what becomes of such headers of others: "ignore" or "refuse" """
    routed_worker_header: bool = True
    """answer `x-smg-routed-worker-id: URL` of the worker, as SGLang's gateway does"""
    explain_header: str = "local"
    """who gets `x-pointsman-decision` for `x-pointsman-explain: 1`: "all", "local" (loopback clients), "none" """
    decision_sample_interval_s: float = 1.0
    """per shard, at most one decision per interval is explained and kept for GET /decisions; 0 = none"""
    strict_models: bool = False
    extra_paths: tuple[str, ...] = ()
    worker_networks: tuple[str, ...] = (
        "127.0.0.0/8",
        "::1/128",
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "fc00::/7",
    )

    # limits
    max_payload_size: int = 64 * 1024 * 1024
    """bytes of one request body"""
    buffer_mib: int = 512
    """MiB of request bodies held at once by all shards together"""
    buffer_wait_s: float = 5.0
    """how long a body may wait for buffer space before 503"""
    max_connections: int = 0
    """client connections over all shards; 0 = bounded by the file descriptor limit alone"""
    max_workers: int = 255
    max_header_bytes: int = 65536
    max_headers: int = 100

    # timeouts, seconds
    header_timeout_s: float = 15.0
    body_timeout_s: float = 30.0
    """longest pause between two reads of a request body"""
    keep_alive_timeout_s: float = 75.0
    connect_timeout_s: float = 5.0
    request_timeout_s: float = 3600.0
    """from the request's arrival to the end of its answer, unless its profile says otherwise"""
    pool_idle_timeout_s: float = 4.0
    """below the 5 s after which uvicorn (vLLM, SGLang) closes an idle connection"""
    pool_max_idle: int = 512
    """idle connections kept per worker and shard"""
    stream_coalesce_us: int = 1000
    """how long events of streams wait for each other while a shard has many of them; 0: none waits"""

    # resilience, where profiles.json says nothing else (config.resilience); names of SGLang's flags
    retry_max_retries: int = 5
    retry_initial_backoff_ms: float = 50.0
    retry_max_backoff_ms: float = 30_000.0
    retry_backoff_multiplier: float = 1.5
    retry_jitter_factor: float = 0.2
    disable_retries: bool = False
    cb_failure_threshold: int = 10
    cb_success_threshold: int = 3
    cb_timeout_duration_secs: float = 60.0
    cb_window_duration_secs: float = 120.0
    disable_circuit_breaker: bool = False
    max_concurrent_requests: int = 0
    queue_size: int = 100
    queue_timeout_secs: float = 60.0

    # offline batches
    batch_store: str | None = None
    """URL of the store of their payloads, resolved; None = no batches"""
    batch_concurrency: int = 64
    """requests of batches at the data port at once, at most"""
    batch_line_attempts: int = 4
    """of a request whose failure may be its own fault"""
    batch_max_lines: int = 50_000
    batch_max_file_mib: int = 200
    batch_quota_mib: int = 10_240
    """files of one API key together; 0 = no limit"""
    batch_max_running: int = 100
    """batches of one API key that are not final; 0 = no limit"""
    batch_ttl_s: float = 30 * 86400.0
    """batches and files are kept so long; 0 = for ever"""

    # stopping
    drain_delay_s: float = 0.0
    shutdown_grace_s: float = 30.0
    upgrade_grace_s: float = 1800.0
    """nobody waits for the old daemon after an upgrade, so its streams have as long as a request may take"""

    # health probes
    health_path: str = "/health"
    health_interval_s: float = 5.0
    health_down_interval_s: float = 1.0
    health_timeout_s: float = 2.0
    health_failure_threshold: int = 3
    health_success_threshold: int = 1

    # logs
    access_log: bool = True
    access_log_format: str = "json"
    """"json" or "text": one line per request either way"""
    access_log_sample: float = 1.0
    """the share of the requests without an error that get a line; PUT /log-level changes it"""
    log_level: str = "info"


def encode(settings: Settings) -> bytes:
    return msgspec.json.encode(settings)


def decode(data: bytes) -> Settings:
    return msgspec.json.decode(data, type=Settings)
