"""The flags of sglang-router (SMG) that an existing command line may carry, and what becomes of each.

A flag that means the same as one of ours is taken under its own name (`RENAMED`). One whose absence changes nothing
but speed, or that tunes what this version does not have, is taken and warned about (`NO_EFFECT`). One that somebody
relies on for correctness or safety is refused with the reason (`REFUSED`): better no start than a false belief.
Flags with equal name and meaning (`--host`, `--port`, `--policy`, `--max-payload-size`, `--log-level`,
`--health-failure-threshold`, `--health-success-threshold`, `--cache-threshold`, `--balance-abs-threshold`,
`--balance-rel-threshold`, `--max-tree-size`, `--retry-*`, `--disable-retries`, `--cb-*`, `--disable-circuit-breaker`,
`--max-concurrent-requests`, `--queue-size`, `--queue-timeout-secs`) are ours already.
"""

from __future__ import annotations

RENAMED = {
    "--worker-urls": "workers",
    "--request-timeout-secs": "request_timeout_s",
    "--shutdown-grace-period-secs": "shutdown_grace_s",
    "--upstream-pool-idle-timeout-secs": "pool_idle_timeout_s",
    "--stream-body-stall-timeout-secs": "body_timeout_s",
    "--health-check-timeout-secs": "health_timeout_s",
    "--health-check-interval-secs": "health_interval_s",
    "--health-check-endpoint": "health_path",
    "--cache-match-threshold": "cache_threshold",
    "--spill-abs-threshold": "balance_abs_threshold",
    "--spill-rel-threshold": "balance_rel_threshold",
    "--eviction-interval": "eviction_interval_secs",
    "--tls-cert-path": "tls_cert",
    "--tls-key-path": "tls_key",
}
"""Flag → key of ServeConfig, same unit."""

LOG_LEVELS = {"warn": "warning"}
"""Its values of --log-level that are spelled differently here."""

LATER = "has no effect in this version"

_NO_EFFECT_BY_REASON: dict[str, str] = {
    f"{LATER}: cache_aware balances by requests": """
        --balance-token-usage-threshold --overload-token-usage-threshold --overlap-decay --selection-temperature""",
    "has no effect: there is one index for all policies; see --prefix-block-bytes and --prefix-index-mib": """
        --block-size --cache-index --cache-ttl-secs --cache-boundaries --kv-indexer-ttl-secs
        --kv-indexer-max-entries""",
    "has no effect as a flag: see prefix_hash of a profile": """
        --prefix-token-count --prefix-hash-load-factor --prefix-hash-balance-abs-threshold""",
    f"{LATER}: see max_concurrent_requests and queue_size": """
        --worker-overload-protection --worker-overload-token-usage --worker-overload-waiting-requests""",
    "has no effect as a flag: see limits.requests_per_second of a profile": "--rate-limit-tokens-per-second",
    "has no effect as a flag: see --metrics-listen and --metrics-compat": """
        --prometheus-host --prometheus-port --prometheus-duration-buckets""",
    "has no effect: loads are counted by the gateway itself": """
        --load-monitor-interval --disable-load-monitoring --engine-metrics --least-load-kv-pressure-weight
        --least-load-default-throughput --least-load-mean-prefill-tokens --least-load-max-waiting-requests""",
    "has no effect: text is routed without a tokenizer": """
        --model-path --model --tokenizer-path --chat-template --disable-tokenizer-autoload
        --tokenizer-cache-enable-l0 --tokenizer-cache-l0-max-entries --tokenizer-cache-enable-l1
        --tokenizer-cache-l1-max-memory --reasoning-parser --tool-call-parser""",
    "has no effect: workers may start late, they are probed every second until they answer": """
        --worker-startup-timeout-secs --worker-startup-delay --worker-startup-check-interval""",
    "has no effect: several models are always served": "--enable-igw",
    "has no effect: any engine with an OpenAI-compatible or SGLang API is taken as it is": "--backend --runtime",
    "has no effect: logs are JSON lines on stderr": "--log-dir --log-json",
    "has no effect: see --shards": """
        --runtime-worker-threads --job-queue-capacity --job-queue-concurrency""",
    "has no effect: request bodies are always read before they are routed": "--stream-request-bodies-over",
    "has no effect: the id is taken from and sent as x-request-id": "--request-id-headers",
    "has no effect: traceparent is passed on, traces are not exported": "--enable-trace --otlp-traces-endpoint",
    "has no effect: workers are asked in HTTP/1.1": "--upstream-http2",
    "has no effect: a draining worker is removed when its last request ends": "--drain-settle-secs",
    "has no effect: there are no encode workers": "--encode-policy",
}

_REFUSED_BY_REASON: dict[str, str] = {
    "encode workers are not in this version": "--epd-disaggregation --encode",
    "workers are not discovered; name them by --prefill and --decode": "--vllm-discovery-address",
    "a worker is one URL; data-parallel ranks (URL@RANK) are not addressed, the engine spreads over them": """
        --dp-aware --dp-minimum-tokens-scheduler --intra-node-data-parallel-size""",
    "Kubernetes discovery is not supported; use --workers-file": """
        --service-discovery --selector --service-discovery-port --service-discovery-namespace --prefill-selector
        --decode-selector --encode-selector --router-selector --model-id-from --model-alias""",
    "clients' keys have names and are in a file, see --api-key-file; a worker's is its api_key in the workers file": """
        --api-key --tenant-api-key""",
    "the admin API has tokens: see --admin-token-file": """
        --control-plane-api-keys --jwt-issuer --jwt-audience --jwt-jwks-uri""",
    "tenants are not told apart in this version": """
        --trust-tenant-header --tenant-header-name --tenant-rate-limit-enabled --tenant-rate-limit-config
        --priority-scheduler-enabled --priority-scheduler-default-max-class --priority-scheduler-config
        --priority-scheduler-tenant-metric-top-n""",
    "sessions are kept by `sticky` of a profile, not by a flag": """
        --routing-key-override --routing-key-headers --max-idle-secs --assignment-mode""",
    "gateways do not form a mesh": """
        --enable-mesh --mesh-server-name --mesh-host --mesh-advertise-host --mesh-port --mesh-peer-urls""",
    "workers are always probed; see --health-path and --health-failure-threshold": "--disable-health-check",
    "a worker that is down is kept and probed until it is back": "--remove-unhealthy-workers",
    "/health is on the port of the requests and of the admin listeners": "--health-check-port",
    "no CORS headers are sent; put a proxy in front": "--cors-allowed-origins",
    "MCP tools are not run by the gateway": "--mcp-config-path",
    "no conversation is stored": "--history-backend --storage-context-headers",
    "ZeroMQ engines are not supported; use their HTTP port": "--zmq-engine-count",
}


def _by_flag(by_reason: dict[str, str]) -> dict[str, str]:
    return {flag: reason for reason, flags in by_reason.items() for flag in flags.split()}


NO_EFFECT = _by_flag(_NO_EFFECT_BY_REASON)
"""Flag → why it does nothing here."""

REFUSED = _by_flag(_REFUSED_BY_REASON)
"""Flag → why there is no start with it."""

SWITCHES = frozenset(
    [
        "--worker-overload-protection",
        "--disable-load-monitoring",
        "--engine-metrics",
        "--disable-tokenizer-autoload",
        "--tokenizer-cache-enable-l0",
        "--tokenizer-cache-enable-l1",
        "--enable-igw",
        "--log-json",
        "--enable-trace",
        "--upstream-http2",
    ]
)
"""Those of NO_EFFECT that take no value."""

LISTS = frozenset(["--cache-boundaries", "--prometheus-duration-buckets", "--request-id-headers"])
"""Those of NO_EFFECT that take several."""
