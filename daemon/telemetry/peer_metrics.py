"""Our series under the names of other routers, so that their dashboards and alerts go on working (`metrics_compat`).

One table per peer: its name for something, the family of ours that has the values, and where each of its labels comes
from. Labels of ours that a row does not name are added up; a label of theirs that we cannot tell is left out, which
queries read as empty. Besides the labels of a sample, a row may use `worker_type` (of its worker) and `backend_type`
(`pd` where only pairs serve). What would mean something else here is not in the table: no series is better than a wrong
one. docs/MIGRATING.md has the names that are missing, and what to ask instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus

from prometheus_client.core import Metric

from pointsman.config.snapshot import WorkerSpec

Labels = Mapping[str, str]
Label = Callable[[Labels], str | None]
"""The value of a peer's label by our labels; None: this sample is none of theirs."""
Fold = Callable[[Iterable[float]], float]


def _same(name: str) -> Label:
    return lambda labels: labels[name]


def _count(values: Iterable[float]) -> float:
    return float(sum(1 for _ in values))


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    """the peer's, without the suffix of counters and histograms"""
    source: str
    """our family, likewise"""
    documentation: str
    labels: Mapping[str, Label] = field(default_factory=dict)
    fixed: Mapping[str, str] = field(default_factory=dict)
    """labels with one value for everything"""
    fold: Fold = sum
    """of the samples whose labels become equal"""


# --- sglang-router until 2025, and vllm-router, which began as a copy of it


def _error_word(labels: Labels) -> str | None:
    """As both name the errors of a request; None: it was none."""
    code = int(labels["code"])
    if code < 400:
        return None
    if code in (400, 404, 502, 503, 504):
        return HTTPStatus(code).name.lower()
    return "client_error" if code < 500 else "server_error"


def _only(route: str) -> Label:
    return lambda labels: "" if labels["route"] == route else None


def _of(role: str) -> Label:
    return lambda labels: labels["worker"] if labels["worker_type"] == role else None


_BY_ROUTE = {"route": _same("route")}
_BY_WORKER = {"worker": _same("worker")}
_DROPPED = ""
"""A label that only decides whether the sample counts."""


_OF_PAIRS = (
    ("requests", "pointsman_worker_picks", "Requests sent to the worker."),
    ("errors", "pointsman_worker_failures", "Requests that the worker broke off or did not answer."),
)


def _router(prefix: str) -> tuple[Row, ...]:
    embeddings = {_DROPPED: _only("/v1/embeddings")}
    rows = (
        Row("requests", "pointsman_requests", "Requests by route.", _BY_ROUTE),
        Row("request_duration_seconds", "pointsman_request_duration_seconds", "Duration of requests.", _BY_ROUTE),
        Row("request_errors", "pointsman_requests", "Requests that failed.", _BY_ROUTE | {"error_type": _error_word}),
        Row("retries", "pointsman_retries", "Attempts after the first one."),
        Row("retries_exhausted", "pointsman_retries_exhausted", "Requests that failed after all their attempts."),
        Row("cb_state", "pointsman_worker_breaker_state", "0 closed, 1 open, 2 half-open.", _BY_WORKER),
        Row("active_workers", "pointsman_worker_up", "Workers there are.", fold=_count),
        Row("worker_health", "pointsman_worker_up", "1 while the worker may be picked.", _BY_WORKER),
        Row("worker_load", "pointsman_worker_in_flight", "Requests on the worker.", _BY_WORKER),
        Row("running_requests", "pointsman_worker_in_flight", "Requests on the worker.", _BY_WORKER),
        Row("processed_requests", "pointsman_worker_picks", "Requests sent to the worker.", _BY_WORKER),
        *(
            Row(f"pd_{role}_{name}", source, documentation, {"worker": _of(role)})
            for role in ("prefill", "decode")
            for name, source, documentation in _OF_PAIRS
        ),
        Row("policy_decisions", "pointsman_policy_decisions", "Picks of the worker.", _BY_WORKER),
        Row("cache_hits", "pointsman_cache_hits", "Picks of a worker with a part of the prompt."),
        Row("cache_misses", "pointsman_cache_misses", "Picks of a worker with nothing of the prompt."),
        Row("load_balancing_events", "pointsman_load_balancing_events", "Picks by load, against the cache."),
        Row("tree_size", "pointsman_tree_size", "Characters the worker is believed to hold.", _BY_WORKER),
        Row("max_load", "pointsman_worker_in_flight", "Most requests on a worker.", fold=max),
        Row("min_load", "pointsman_worker_in_flight", "Fewest requests on a worker.", fold=min),
        Row(
            "generate_duration_seconds",
            "pointsman_request_duration_seconds",
            "Duration of /generate.",
            {_DROPPED: _only("/generate")},
        ),
        Row("embeddings", "pointsman_requests", "Requests for embeddings.", embeddings),
        Row("embeddings_duration_seconds", "pointsman_request_duration_seconds", "Duration of embeddings.", embeddings),
        Row(
            "embeddings_errors",
            "pointsman_requests",
            "Requests for embeddings that failed.",
            embeddings | {"error_type": _error_word},
        ),
    )
    return tuple(replace(row, name=f"{prefix}_{row.name}") for row in rows)


# --- SMG, SGLang's gateway since

_ENDPOINTS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/generate": "generate",
    "/v1/responses": "responses",
    "/rerank": "rerank",
    "/v1/rerank": "rerank",
    "/v1/embeddings": "embeddings",
    "/v1/classify": "classify",
}


def _endpoint(labels: Labels) -> str | None:
    return _ENDPOINTS.get(labels["route"])


def _path(labels: Labels) -> str | None:
    route = labels["route"]
    return "/v1/models" if route == "models" else route if route.startswith("/") else None


def _method(labels: Labels) -> str | None:
    return "GET" if labels["route"] == "models" else "POST"


def _error_type(labels: Labels) -> str | None:
    code = int(labels["code"])
    if code < 400:
        return None
    if code < 500:
        return "validation_error"
    return {503: "no_workers", 504: "timeout"}.get(code, "backend_error")


_BY_PATH = {"method": _method, "path": _path}
_BY_ENDPOINT = {"endpoint": _endpoint}
_BY_BACKEND = {"backend_type": _same("backend_type")}
_BY_MODEL = _BY_ENDPOINT | _BY_BACKEND | {"model": _same("model")}
_BY_TYPE = {"worker_type": _same("worker_type")}
_POOL = {"connection_mode": "http"}
_HTTP = {"router_type": "http"}
_ROUTER = _HTTP | _POOL
_SMG = (
    Row("smg_http_requests", "pointsman_requests", "Requests by method and path.", _BY_PATH),
    Row(
        "smg_http_responses",
        "pointsman_requests",
        "Answers by path and status.",
        {"path": _path, "status_code": _same("code")},
    ),
    Row("smg_http_request_duration_seconds", "pointsman_request_duration_seconds", "Duration of requests.", _BY_PATH),
    Row("smg_http_connections_active", "pointsman_connections", "Client connections that are open."),
    Row(
        "smg_http_rate_limit",
        "pointsman_requests_refused",
        "Requests over a limit.",
        {_DROPPED: lambda labels: None if labels["reason"] == "breaker" else ""},
        {"result": "rejected"},
    ),
    Row("smg_admission_inflight", "pointsman_admission_in_use", "Requests admitted and not ended."),
    Row("smg_admission_queue_depth", "pointsman_admission_waiting", "Requests that wait for admission."),
    Row(
        "smg_admission_queue_rejected",
        "pointsman_requests_refused",
        "Requests that were not admitted.",
        {"reason": lambda labels: labels["reason"] if labels["reason"].startswith("queue") else None},
    ),
    Row("smg_router_requests", "pointsman_requests", "Routed requests.", _BY_MODEL, _ROUTER),
    Row(
        "smg_router_request_errors",
        "pointsman_requests",
        "Routed requests that failed.",
        _BY_MODEL | {"error_type": _error_type},
        _ROUTER,
    ),
    Row(
        "smg_router_request_duration_seconds",
        "pointsman_request_duration_seconds",
        "Duration of routed requests.",
        _BY_ENDPOINT | _BY_BACKEND,
        _ROUTER,
    ),
    Row(
        "smg_router_ttft_seconds",
        "pointsman_time_to_first_byte_seconds",
        "From a request's arrival to the first byte of its answer.",
        _BY_ENDPOINT | _BY_BACKEND,
        _HTTP,
    ),
    Row("smg_router_upstream_send_retries", "pointsman_upstream_resends", "Sent again: the connection was closed."),
    Row("smg_worker_pool_size", "pointsman_worker_up", "Workers there are.", _BY_TYPE, _POOL, fold=_count),
    Row("smg_worker_connections_active", "pointsman_upstream_connections", "Connections to workers.", _BY_TYPE, _POOL),
    Row("smg_worker_requests_active", "pointsman_worker_in_flight", "Requests on the worker.", _BY_WORKER),
    Row("smg_worker_health", "pointsman_worker_up", "1 while the worker may be picked.", _BY_WORKER),
    Row("smg_worker_selection", "pointsman_worker_picks", "Picks of workers.", _BY_TYPE, _POOL),
    Row(
        "smg_worker_errors",
        "pointsman_worker_failures",
        "Requests that workers broke off or did not answer.",
        _BY_TYPE,
        _POOL | {"error_type": "backend_error"},
    ),
    Row("smg_worker_cb_state", "pointsman_worker_breaker_state", "0 closed, 1 open, 2 half-open.", _BY_WORKER),
    Row("smg_worker_retries", "pointsman_retries", "Attempts after the first one.", _BY_TYPE),
    Row(
        "smg_worker_retries_exhausted",
        "pointsman_retries_exhausted",
        "Requests that failed after all their attempts.",
        _BY_TYPE,
    ),
    Row(
        "smg_pd_prefill_duration_seconds",
        "pointsman_pair_prefill_seconds",
        "From the sending of a prefill leg to its first token.",
        fixed={"backend_type": "pd"},
    ),
    Row(
        "smg_pd_kv_transfer_duration_seconds",
        "pointsman_pair_transfer_seconds",
        "From prefill's first token to decode's first byte.",
        fixed={"backend_type": "pd"},
    ),
    Row("smg_cache_tree_chars", "pointsman_tree_size", "Characters believed to be cached."),
    Row("smg_engine_running_requests", "pointsman_worker_engine_running", "Requests the engine runs.", _BY_WORKER),
    Row("smg_engine_waiting_requests", "pointsman_worker_engine_waiting", "Requests waiting in it.", _BY_WORKER),
    Row("smg_engine_token_usage", "pointsman_worker_engine_kv_usage_ratio", "Share of its KV cache.", _BY_WORKER),
)

PEERS: Mapping[str, tuple[Row, ...]] = {
    "none": (),
    "sglang": (*_SMG, *_router("sgl_router")),
    "vllm": _router("vllm_router"),
}
"""By value of `metrics_compat`."""


class Fleet:
    """What labels of theirs tell of the workers."""

    def __init__(self, workers: Iterable[WorkerSpec]) -> None:
        self._roles = {worker.url: worker.role for worker in workers}
        roles = set(self._roles.values())
        self.usual: Labels = {
            "backend_type": "pd" if roles and "regular" not in roles else "regular",
            "worker_type": "regular" if roles <= {"regular"} else "",  # of both legs together
        }

    def labels(self, ours: Labels) -> Labels:
        role = self._roles.get(ours.get("worker", ""))
        return {**self.usual, **ours, **({} if role is None else {"worker_type": role})}


def collect(own: Iterable[Metric], compat: str, workers: Iterable[WorkerSpec]) -> Iterator[Metric]:
    """`own`: all our families."""
    families, fleet = {metric.name: metric for metric in own}, Fleet(workers)
    for row in PEERS[compat]:
        yield _translated(row, families[row.source], fleet)


def _translated(row: Row, source: Metric, fleet: Fleet) -> Metric:
    folded: dict[tuple[str, tuple[tuple[str, str], ...]], list[float]] = {}
    for sample in source.samples:
        labels = _labels(row, fleet.labels(sample.labels))
        if labels is not None:
            suffix = sample.name.removeprefix(source.name)
            folded.setdefault((row.name + suffix, tuple(labels.items())), []).append(sample.value)
    metric = Metric(row.name, row.documentation, source.type)
    for (name, pairs), values in folded.items():
        metric.add_sample(name, {**row.fixed, **dict(pairs)}, row.fold(values))
    if not folded and row.labels.keys() <= fleet.usual.keys() and source.type != "histogram":
        # a total over no workers is 0, not unknown
        labels = {name: fleet.usual[name] for name in row.labels}
        metric.add_sample(row.name + ("_total" if source.type == "counter" else ""), {**row.fixed, **labels}, 0.0)
    return metric


def _labels(row: Row, ours: Labels) -> dict[str, str] | None:
    """Without the fixed ones; None: the sample is none of the peer's."""
    theirs: dict[str, str] = {}
    for name, of in row.labels.items():
        value = of(ours)
        if value is None:
            return None
        if name != _DROPPED:
            theirs[name] = value
    return theirs | ({"le": ours["le"]} if "le" in ours else {})
