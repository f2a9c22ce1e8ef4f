"""The names of other routers' metrics: which we have, and that they say the same as ours."""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from pointsman.config.snapshot import Snapshot, WorkerSpec
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.routing_state import IndexSize, RoutingState
from pointsman.daemon.shm.segment import EngineSignals, Segment
from pointsman.daemon.telemetry.metrics import DaemonInfo, render
from pointsman.daemon.telemetry.pair_counts import PairCounts
from pointsman.daemon.telemetry.series import ROUTES, Series
from tests.fakes.promlint import problems

INFO = DaemonInfo(version="0.1.0", started_at=1000.5, last_reload_ok=True, last_reload_success_at=2000.25)
CHAT, GENERATE, EMBEDDINGS = map(ROUTES.index, ("/v1/chat/completions", "/generate", "/v1/embeddings"))
MODELS = ROUTES.index("models")

# Both began as one program. A change here breaks somebody's dashboard: CHANGELOG.md, docs/MIGRATING.md, and a reason.
ROUTER = {
    "requests_total": ("counter", "route"),
    "request_duration_seconds": ("histogram", "route"),
    "request_errors_total": ("counter", "error_type route"),
    "retries_total": ("counter", ""),
    "retries_exhausted_total": ("counter", ""),
    "cb_state": ("gauge", "worker"),
    "active_workers": ("gauge", ""),
    "worker_health": ("gauge", "worker"),
    "worker_load": ("gauge", "worker"),
    "running_requests": ("gauge", "worker"),
    "processed_requests_total": ("counter", "worker"),
    "pd_prefill_requests_total": ("counter", ""),
    "pd_prefill_errors_total": ("counter", ""),
    "pd_decode_requests_total": ("counter", ""),
    "pd_decode_errors_total": ("counter", ""),
    "policy_decisions_total": ("counter", "worker"),
    "cache_hits_total": ("counter", ""),
    "cache_misses_total": ("counter", ""),
    "load_balancing_events_total": ("counter", ""),
    "tree_size": ("gauge", "worker"),
    "max_load": ("gauge", ""),
    "min_load": ("gauge", ""),
    "generate_duration_seconds": ("histogram", ""),
    "embeddings_total": ("counter", ""),
    "embeddings_duration_seconds": ("histogram", ""),
    "embeddings_errors_total": ("counter", "error_type"),
}
_ENDPOINT = "backend_type connection_mode endpoint"
SMG = {
    "smg_http_requests_total": ("counter", "method path"),
    "smg_http_responses_total": ("counter", "path status_code"),
    "smg_http_request_duration_seconds": ("histogram", "method path"),
    "smg_http_connections_active": ("gauge", ""),
    "smg_http_rate_limit_total": ("counter", "result"),
    "smg_admission_inflight": ("gauge", ""),
    "smg_admission_queue_depth": ("gauge", ""),
    "smg_admission_queue_rejected_total": ("counter", "reason"),
    "smg_router_requests_total": ("counter", f"{_ENDPOINT} model router_type"),
    "smg_router_request_errors_total": ("counter", f"{_ENDPOINT} error_type model router_type"),
    "smg_router_request_duration_seconds": ("histogram", f"{_ENDPOINT} router_type"),
    "smg_router_ttft_seconds": ("histogram", "backend_type endpoint router_type"),
    "smg_router_upstream_send_retries_total": ("counter", ""),
    "smg_worker_pool_size": ("gauge", "connection_mode worker_type"),
    "smg_worker_connections_active": ("gauge", "connection_mode worker_type"),
    "smg_worker_requests_active": ("gauge", "worker"),
    "smg_worker_health": ("gauge", "worker"),
    "smg_worker_selection_total": ("counter", "connection_mode worker_type"),
    "smg_worker_errors_total": ("counter", "connection_mode error_type worker_type"),
    "smg_worker_cb_state": ("gauge", "worker"),
    "smg_worker_retries_total": ("counter", "worker_type"),
    "smg_worker_retries_exhausted_total": ("counter", "worker_type"),
    "smg_pd_prefill_duration_seconds": ("histogram", "backend_type"),
    "smg_pd_kv_transfer_duration_seconds": ("histogram", "backend_type"),
    "smg_cache_tree_chars": ("gauge", ""),
    "smg_engine_running_requests": ("gauge", "worker"),
    "smg_engine_waiting_requests": ("gauge", "worker"),
    "smg_engine_token_usage": ("gauge", "worker"),
}
NAMES = {
    "vllm": {f"vllm_router_{name}": shape for name, shape in ROUTER.items()},
    "sglang": SMG | {f"sgl_router_{name}": shape for name, shape in ROUTER.items()},
}


def worker(slot: int) -> WorkerSpec:
    return WorkerSpec(id=f"w{slot}", url=f"http://w{slot}", slot=slot, host="x", address="127.0.0.1", port=1)


SNAPSHOT = Snapshot(generation=7, workers=(worker(0), worker(1)), models=("other", "qwen"))


@pytest.fixture
def state() -> RoutingState:
    """Two shards that have served: two answers to chats and one 503, /generate, one 400 of embeddings, the models."""
    made = RoutingState.create(Segment.create(2, 4), IndexSize(1, 512), 2**20)
    segment = made.segment
    for shard, route, code in (
        (0, CHAT, 200),
        (1, CHAT, 200),
        (1, CHAT, 503),
        (0, GENERATE, 200),
        (1, EMBEDDINGS, 400),
    ):
        series = Series(segment, shard)
        series.count(route, 1, code)
        for kind in (at.KIND_DURATION, at.KIND_FIRST_BYTE):
            series.observe(route, kind, 0.3)
    Series(segment, 0).count(MODELS, 0, 200)
    segment.cells[segment.layout.load(0, 0, at.L_REASONS)] = 4
    for shard, slot, bookings in ((0, 0, 3), (1, 0, 2), (1, 1, 1)):
        for _ in range(bookings):
            segment.words.book(shard, slot, 10)
    for shard, slot, failures in ((0, 0, 2), (1, 1, 1)):
        segment.cells[segment.layout.load(shard, slot, at.L_FAILURES)] = failures
    segment.set_status(1, at.STATUS_UP)
    segment.report(1, EngineSignals(1.0, running=3.0, waiting=2.0, kv_usage=0.5))
    for gauge in (at.G_QUEUE_FULL, at.G_RATE_LIMITED, at.G_BREAKER_REFUSED):
        segment.cells[segment.layout.gauge(1, gauge)] = 5
    return made


def page(state: RoutingState, compat: str, snapshot: Snapshot = SNAPSHOT) -> str:
    return render(state, snapshot, INFO, compat).decode()


def families(text: str) -> dict[str, Metric]:
    return {metric.name: metric for metric in text_string_to_metric_families(text)}


def theirs(text: str) -> dict[str, Metric]:
    return {name: metric for name, metric in families(text).items() if not name.startswith("pointsman_")}


def values(metric: Metric) -> dict[str, float]:
    """By the values of the labels, in the order of their names."""
    return {" ".join(value for _, value in sorted(sample.labels.items())): sample.value for sample in metric.samples}


@pytest.mark.parametrize("compat", NAMES)
def test_names_types_and_labels_are_the_peers(state: RoutingState, compat: str) -> None:
    found = {}
    for family in theirs(page(state, compat)).values():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = (family.type, " ".join(sorted(labels)))
    assert found == NAMES[compat]


@pytest.mark.parametrize("compat", NAMES)
def test_the_page_is_as_prometheus_wants_it_and_ours_is_all_there(state: RoutingState, compat: str) -> None:
    text = page(state, compat)
    assert problems(text) == []
    assert families(text).keys() >= families(page(state, "none")).keys()
    assert theirs(page(state, "none")) == {}


def test_what_routers_of_the_first_generation_tell(state: RoutingState) -> None:
    found = {name.removeprefix("vllm_router_"): metric for name, metric in theirs(page(state, "vllm")).items()}
    assert values(found["requests"]) == {
        "/v1/chat/completions": 3,
        "/generate": 1,
        "/v1/embeddings": 1,
        "models": 1,
    }
    assert values(found["request_errors"]) == {
        "service_unavailable /v1/chat/completions": 1,
        "bad_request /v1/embeddings": 1,
    }
    assert values(found["embeddings_errors"]) == {"bad_request": 1}
    assert (values(found["embeddings"]), values(found["active_workers"])) == ({"": 1}, {"": 2})
    assert values(found["worker_health"]) == {"http://w0": 0, "http://w1": 1}
    assert values(found["worker_load"]) == values(found["running_requests"]) == {"http://w0": 5, "http://w1": 1}
    assert (values(found["max_load"]), values(found["min_load"])) == ({"": 5}, {"": 1})
    assert values(found["processed_requests"]) == {"http://w0": 5, "http://w1": 1}
    assert values(found["policy_decisions"]) == {"http://w0": 4}
    generate = {sample.name: sample.value for sample in found["generate_duration_seconds"].samples}
    assert generate["vllm_router_generate_duration_seconds_count"] == 1


def test_what_smg_tells(state: RoutingState) -> None:
    found = {name.removeprefix("smg_"): metric for name, metric in theirs(page(state, "sglang")).items()}
    assert values(found["http_requests"]) == {
        "POST /v1/chat/completions": 3,
        "POST /generate": 1,
        "POST /v1/embeddings": 1,
        "GET /v1/models": 1,
    }
    assert values(found["http_responses"])["/v1/chat/completions 503"] == 1
    assert values(found["router_requests"])["regular http chat qwen http"] == 3
    assert values(found["router_request_errors"]) == {
        "regular http chat no_workers qwen http": 1,
        "regular http embeddings validation_error qwen http": 1,
    }
    assert values(found["http_rate_limit"]) == {"rejected": 10}
    assert values(found["admission_queue_rejected"]) == {"queue_full": 5, "queue_timeout": 0}
    assert values(found["worker_pool_size"]) == {"http regular": 2}
    assert values(found["worker_selection"]) == {"http regular": 6}
    assert values(found["worker_errors"]) == {"http backend_error regular": 3}
    assert values(found["engine_token_usage"]) == {"http://w1": 0.5}


PREFILL, DECODE = replace(worker(0), role="prefill", bootstrap_port=9), replace(worker(1), role="decode")


def test_workers_of_pairs_have_their_own_type(state: RoutingState) -> None:
    pairs = Snapshot(8, workers=(PREFILL, DECODE), models=("other", "qwen"))
    found = {name.removeprefix("smg_"): metric for name, metric in theirs(page(state, "sglang", pairs)).items()}
    assert values(found["worker_pool_size"]) == {"http prefill": 1, "http decode": 1}
    assert values(found["worker_selection"]) == {"http prefill": 5, "http decode": 1}
    assert values(found["worker_errors"]) == {"http backend_error prefill": 2, "http backend_error decode": 1}
    assert values(found["router_requests"])["pd http chat qwen http"] == 3
    assert values(found["worker_retries"]) == {"": 0}, "of both"
    PairCounts(state.segment, 1).observe("prefill", 0.3)
    pages = theirs(page(state, "sglang", pairs))
    seconds = {sample.name: sample.value for sample in pages["smg_pd_prefill_duration_seconds"].samples}
    assert seconds["smg_pd_prefill_duration_seconds_count"] == 1
    assert values(pages["sgl_router_pd_prefill_requests"]) == {"http://w0": 5}
    assert values(pages["sgl_router_pd_decode_requests"]) == {"http://w1": 1}
    assert values(pages["sgl_router_pd_decode_errors"]) == {"http://w1": 1}


def test_a_fleet_of_all_three_roles_is_no_backend_of_pairs(state: RoutingState) -> None:
    mixed = Snapshot(8, workers=(PREFILL, DECODE, worker(2)), models=("other", "qwen"))
    found = theirs(page(state, "sglang", mixed))
    assert values(found["smg_worker_pool_size"]) == {"http prefill": 1, "http decode": 1, "http regular": 1}
    assert values(found["smg_router_requests"])["regular http chat qwen http"] == 3


def test_histograms_stay_cumulative(state: RoutingState) -> None:
    samples = theirs(page(state, "sglang"))["smg_router_ttft_seconds"].samples
    chat = [sample for sample in samples if sample.labels["endpoint"] == "chat" and sample.name.endswith("_bucket")]
    counts = [sample.value for sample in chat]
    assert [sample.labels["le"] for sample in chat] == [str(bound) for bound in at.BUCKETS_S] + ["+Inf"]
    assert counts == sorted(counts)
    assert counts[-1] == 3


@pytest.mark.parametrize("compat", NAMES)
def test_series_of_removed_workers_disappear(state: RoutingState, compat: str) -> None:
    left = page(state, compat, Snapshot(8, workers=(worker(0),), models=("other", "qwen")))
    assert "http://w0" in left
    assert "http://w1" not in left


@pytest.mark.parametrize("compat", NAMES)
def test_totals_over_no_workers_are_zero(state: RoutingState, compat: str) -> None:
    found = theirs(page(state, compat, Snapshot(9, models=("other", "qwen"))))
    for family in found.values():
        labels = NAMES[compat][f"{family.name}_total" if family.type == "counter" else family.name][1]
        if not labels and "_pd_" not in family.name:
            assert family.samples, family.name
    prefix = "vllm_router" if compat == "vllm" else "sgl_router"
    assert values(found[f"{prefix}_active_workers"]) == {"": 0}
