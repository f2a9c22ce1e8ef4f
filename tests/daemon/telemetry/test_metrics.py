"""GET /metrics: the names are public, the text is what Prometheus reads, the figures are those of the segment."""

from __future__ import annotations

import time

import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from pointsman.config.snapshot import KeySpec, Snapshot, WorkerSpec
from pointsman.daemon.batches.tally import Tally
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.routing_state import IndexSize, RoutingState
from pointsman.daemon.shm.segment import EngineSignals, Segment
from pointsman.daemon.stores.counters import Totals
from pointsman.daemon.telemetry.key_counts import KeyCounts
from pointsman.daemon.telemetry.metrics import DaemonInfo, render
from pointsman.daemon.telemetry.series import ROUTES, Series
from tests.fakes.promlint import problems

INFO = DaemonInfo(version="0.1.0", started_at=1000.5, last_reload_ok=True, last_reload_success_at=2000.25)
CHAT = ROUTES.index("/v1/chat/completions")

# A change here is a change that users notice: CHANGELOG.md, and a reason.
NAMES = {
    "pointsman_requests_total": ("counter", "code model route"),
    "pointsman_request_duration_seconds": ("histogram", "route"),
    "pointsman_time_to_first_byte_seconds": ("histogram", "route"),
    "pointsman_key_requests_total": ("counter", "class key"),
    "pointsman_key_tokens_total": ("counter", "key kind"),
    "pointsman_worker_up": ("gauge", "worker"),
    "pointsman_worker_weight": ("gauge", "worker"),
    "pointsman_worker_in_flight": ("gauge", "worker"),
    "pointsman_worker_in_flight_bytes": ("gauge", "worker"),
    "pointsman_worker_picks_total": ("counter", "worker"),
    "pointsman_worker_connect_failures_total": ("counter", "worker"),
    "pointsman_worker_failures_total": ("counter", "worker"),
    "pointsman_worker_breaker_state": ("gauge", "worker"),
    "pointsman_worker_breaker_openings_total": ("counter", "worker"),
    "pointsman_worker_holds": ("gauge", ""),
    "pointsman_pair_requests_total": ("counter", "leg"),
    "pointsman_pair_errors_total": ("counter", "cause leg"),
    "pointsman_pair_events_total": ("counter", "event"),
    "pointsman_pair_prefill_seconds": ("histogram", ""),
    "pointsman_pair_transfer_seconds": ("histogram", ""),
    "pointsman_retries_total": ("counter", ""),
    "pointsman_continued_streams_total": ("counter", ""),
    "pointsman_retries_exhausted_total": ("counter", ""),
    "pointsman_retry_budget_exhausted_total": ("counter", ""),
    "pointsman_retry_budget": ("gauge", ""),
    "pointsman_requests_refused_total": ("counter", "reason"),
    "pointsman_timeouts_total": ("counter", "deadline"),
    "pointsman_admission_in_use": ("gauge", ""),
    "pointsman_paused": ("gauge", ""),
    "pointsman_paused_requests": ("gauge", ""),
    "pointsman_admission_waiting": ("gauge", ""),
    "pointsman_admission_limit": ("gauge", ""),
    "pointsman_shard_up": ("gauge", "shard"),
    "pointsman_shard_restarts_total": ("counter", "shard"),
    "pointsman_connections": ("gauge", ""),
    "pointsman_requests_in_flight": ("gauge", ""),
    "pointsman_buffered_bytes": ("gauge", ""),
    "pointsman_upstream_connections": ("gauge", ""),
    "pointsman_access_log_dropped_total": ("counter", ""),
    "pointsman_client_disconnects_total": ("counter", ""),
    "pointsman_upstream_resends_total": ("counter", ""),
    "pointsman_profile_fallbacks_total": ("counter", ""),
    "pointsman_series_full_total": ("counter", ""),
    "pointsman_stream_rounds_total": ("counter", ""),
    "pointsman_lock_waits_total": ("counter", ""),
    "pointsman_lock_timeouts_total": ("counter", ""),
    "pointsman_lock_recoveries_total": ("counter", ""),
    "pointsman_cache_hits_total": ("counter", ""),
    "pointsman_cache_misses_total": ("counter", ""),
    "pointsman_load_balancing_events_total": ("counter", ""),
    "pointsman_degraded_choices_total": ("counter", ""),
    "pointsman_unlocked_choices_total": ("counter", ""),
    "pointsman_unindexed_choices_total": ("counter", ""),
    "pointsman_unbooked_requests_total": ("counter", ""),
    "pointsman_prefix_index_evictions_total": ("counter", ""),
    "pointsman_prefix_index_memory_evictions_total": ("counter", ""),
    "pointsman_prefix_index_lock_recoveries_total": ("counter", ""),
    "pointsman_prefix_index_lock_timeouts_total": ("counter", ""),
    "pointsman_prefix_index_resets_total": ("counter", ""),
    "pointsman_prefills_learned_total": ("counter", ""),
    "pointsman_load_range": ("gauge", ""),
    "pointsman_prefix_index_blocks": ("gauge", ""),
    "pointsman_prefix_index_capacity_blocks": ("gauge", ""),
    "pointsman_lost_prefix_share": ("gauge", ""),
    "pointsman_predicted_prefill_1000_seconds": ("gauge", ""),
    "pointsman_predicted_prefill_10000_seconds": ("gauge", ""),
    "pointsman_output_tokens_mean": ("gauge", ""),
    "pointsman_policy_decisions_total": ("counter", "reason worker"),
    "pointsman_worker_prompt_tokens_total": ("counter", "worker"),
    "pointsman_worker_matched_tokens_total": ("counter", "worker"),
    "pointsman_worker_engine_prompt_tokens_total": ("counter", "worker"),
    "pointsman_worker_engine_cached_tokens_total": ("counter", "worker"),
    "pointsman_worker_predictions_total": ("counter", "worker"),
    "pointsman_worker_predicted_ttft_seconds_total": ("counter", "worker"),
    "pointsman_worker_ttft_seconds_total": ("counter", "worker"),
    "pointsman_worker_ttft_error_seconds_total": ("counter", "worker"),
    "pointsman_tree_size": ("gauge", "worker"),
    "pointsman_tree_blocks": ("gauge", "worker"),
    "pointsman_tree_pinned": ("gauge", "worker"),
    "pointsman_worker_kv_tokens": ("gauge", "worker"),
    "pointsman_worker_wait_seconds": ("gauge", "worker"),
    "pointsman_worker_engine_running": ("gauge", "worker"),
    "pointsman_worker_engine_waiting": ("gauge", "worker"),
    "pointsman_worker_engine_kv_usage_ratio": ("gauge", "worker"),
    "pointsman_worker_signal_age_seconds": ("gauge", "worker"),
    "pointsman_config_generation": ("gauge", ""),
    "pointsman_config_last_reload_successful": ("gauge", ""),
    "pointsman_config_last_reload_success_timestamp_seconds": ("gauge", ""),
    "pointsman_start_time_seconds": ("gauge", ""),
    "pointsman_build_info": ("gauge", "version"),
}


def worker(slot: int, **fields: object) -> WorkerSpec:
    known: dict[str, object] = {"id": f"w{slot}", "url": f"http://h{slot}:8000", "slot": slot, "host": f"h{slot}"}
    return WorkerSpec(**(known | {"address": "127.0.0.1", "port": 8000} | fields))  # type: ignore[arg-type]


SNAPSHOT = Snapshot(
    generation=7,
    workers=(worker(0), worker(2, weight=2.5)),
    models=("other", "qwen"),
    keys=(KeySpec("team-a", b"1"), KeySpec("late", b"2")),
    key_names=("", "gone", "team-a"),
)


@pytest.fixture
def segment() -> Segment:
    made = Segment.create(2, 4)
    made.make_current(7)
    return made


def state_of(segment: Segment) -> RoutingState:
    state = RoutingState.create(segment, IndexSize(1, 512), 2**20)
    for slot in range(segment.layout.slots):
        state.set_kv_tokens(slot, segment.kv_tokens(slot))
    return state


def scrape(segment: Segment, snapshot: Snapshot = SNAPSHOT, info: DaemonInfo = INFO) -> dict[str, Metric]:
    text = render(state_of(segment), snapshot, info).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def values(segment: Segment, family: str, snapshot: Snapshot = SNAPSHOT) -> dict[tuple[str, ...], float]:
    """Label values in the order of their names -> value, of a counter or gauge."""
    samples = scrape(segment, snapshot)[family].samples
    return {tuple(value for _, value in sorted(sample.labels.items())): sample.value for sample in samples}


def value(segment: Segment, family: str) -> float:
    return values(segment, family)[()]


def test_the_names_types_and_labels_are_the_public_ones(segment: Segment) -> None:
    shard = Series(segment, 0)
    shard.count(CHAT, 1, 200)
    for kind in (at.KIND_DURATION, at.KIND_FIRST_BYTE):
        shard.observe(CHAT, kind, 0.1)
    segment.cells[segment.layout.load(0, 0, at.L_REASONS)] = 1
    segment.report(0, EngineSignals(1.0, kv_tokens=1000, running=1.0, waiting=0.0, kv_usage=0.5))
    found = {}
    for family in scrape(segment).values():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = (family.type, " ".join(sorted(labels)))
    assert found == NAMES


def test_the_page_is_as_prometheus_wants_it(segment: Segment) -> None:
    Series(segment, 0).count(CHAT, 1, 200)
    Series(segment, 0).observe(CHAT, at.KIND_DURATION, 0.1)
    assert problems(render(state_of(segment), SNAPSHOT, INFO).decode()) == []


def test_every_family_has_help_and_type_once_and_before_its_samples(segment: Segment) -> None:
    lines = render(state_of(segment), SNAPSHOT, INFO).decode().splitlines()
    helped = [line.split()[2] for line in lines if line.startswith("# HELP")]
    typed = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert helped == typed == list(dict.fromkeys(helped))
    assert set(helped) == set(NAMES)
    current = ""
    for line in lines:
        if line.startswith("#"):
            current = line.split()[2]
        else:
            assert line.startswith(current)


def test_requests_are_named_by_route_model_and_code(segment: Segment) -> None:
    Series(segment, 0).count(CHAT, 1, 200)
    Series(segment, 1).count(CHAT, 1, 200)
    Series(segment, 1).count(0, 0, 404)
    assert values(segment, "pointsman_requests") == {
        ("200", "qwen", "/v1/chat/completions"): 2,
        ("404", "other", "other"): 1,
    }


def test_a_model_that_has_no_name_yet_is_added_to_other(segment: Segment) -> None:
    shard = Series(segment, 0)
    shard.count(CHAT, 0, 200)
    shard.count(CHAT, 99, 200)
    assert values(segment, "pointsman_requests") == {("200", "other", "/v1/chat/completions"): 2}


def test_requests_and_tokens_are_named_by_key(segment: Segment) -> None:
    """Of the keys that there are: those that were deleted end, those without a label of their own are one series."""
    KeyCounts(segment, 0).count(2, 200, prompt_tokens=10, output_tokens=3)
    KeyCounts(segment, 1).count(2, 200, prompt_tokens=1)
    KeyCounts(segment, 1).count(2, 499)
    KeyCounts(segment, 1).count(2, 502)
    KeyCounts(segment, 1).count(1, 200)
    team = {("ok", "team-a"): 2.0, ("4xx", "team-a"): 1.0, ("5xx", "team-a"): 1.0}
    assert values(segment, "pointsman_key_requests") == team
    assert values(segment, "pointsman_key_tokens") == {("team-a", "prompt"): 11, ("team-a", "output"): 3}
    KeyCounts(segment, 0).count(0, 200)
    others = {("ok", "other"): 1.0, ("4xx", "other"): 0.0, ("5xx", "other"): 0.0}
    assert values(segment, "pointsman_key_requests") == team | others


def test_without_a_key_file_nothing_is_said_of_keys(segment: Segment) -> None:
    assert "pointsman_key_requests" not in scrape(segment, Snapshot(generation=7))


def test_histograms_are_cumulative_and_in_seconds(segment: Segment) -> None:
    for shard, seconds in ((0, 0.02), (1, 0.3), (1, 9000.0)):
        Series(segment, shard).observe(CHAT, at.KIND_FIRST_BYTE, seconds)
    samples = scrape(segment)["pointsman_time_to_first_byte_seconds"].samples
    buckets = {sample.labels["le"]: sample.value for sample in samples if sample.name.endswith("_bucket")}
    assert list(buckets) == [str(bound) for bound in at.BUCKETS_S] + ["+Inf"]
    assert (buckets["0.01"], buckets["0.025"], buckets["0.5"], buckets["7200.0"], buckets["+Inf"]) == (0, 1, 2, 2, 3)
    rest = {sample.name.rpartition("_")[2]: sample.value for sample in samples if "le" not in sample.labels}
    assert rest == {"count": 3, "sum": pytest.approx(9000.32)}


def test_a_half_written_observation_keeps_count_and_buckets_equal(segment: Segment) -> None:
    Series(segment, 0).observe(CHAT, at.KIND_DURATION, 0.02)
    segment.cells[segment.layout.histogram(0, CHAT, at.KIND_DURATION)] += 1
    samples = {sample.name: sample.value for sample in scrape(segment)["pointsman_request_duration_seconds"].samples}
    assert (
        samples["pointsman_request_duration_seconds_count"] == samples["pointsman_request_duration_seconds_bucket"] == 2
    )


def test_workers_are_shown_by_url_over_all_shards(segment: Segment) -> None:
    segment.set_status(2, at.STATUS_UP)
    segment.words.book(0, 2, 100)
    segment.words.book(1, 2, 50)
    segment.words.book(1, 2, 50)
    segment.words.release(1, 2, 50)
    segment.words.add(segment.layout.load(1, 2, at.L_CONNECT_FAILURES), 4)
    segment.words.add(segment.layout.load(0, 2, at.L_FAILURES), 1)
    one, other = ("http://h0:8000",), ("http://h2:8000",)
    assert values(segment, "pointsman_worker_up") == {one: 0, other: 1}
    assert values(segment, "pointsman_worker_weight") == {one: 1, other: 2.5}
    assert values(segment, "pointsman_worker_in_flight") == {one: 0, other: 2}
    assert values(segment, "pointsman_worker_in_flight_bytes") == {one: 0, other: 150}
    assert values(segment, "pointsman_worker_picks") == {one: 0, other: 3}
    assert values(segment, "pointsman_worker_connect_failures") == {one: 0, other: 4}
    assert values(segment, "pointsman_worker_failures") == {one: 0, other: 1}


def test_series_of_removed_workers_disappear(segment: Segment) -> None:
    text = render(state_of(segment), Snapshot(generation=8, workers=(worker(0),)), INFO).decode()
    assert "h0:8000" in text
    assert "h2:8000" not in text


def test_a_url_is_escaped(segment: Segment) -> None:
    odd = Snapshot(generation=8, workers=(worker(0, url='http://h/"\\\n'),))
    assert values(segment, "pointsman_worker_up", odd) == {('http://h/"\\\n',): 0}


def test_a_shard_is_up_while_it_serves_and_beats(segment: Segment) -> None:
    for shard in (0, 1):
        segment.set_process(shard, at.P_STATE, at.PROCESS_READY)
        segment.beat(shard)
    stale = time.monotonic_ns() - 3_000_000_000
    segment.set_process(1, at.P_HEARTBEAT_NS, stale)
    segment.set_process(1, at.P_RESTARTS, 2)
    assert values(segment, "pointsman_shard_up") == {("0",): 1, ("1",): 0}
    assert values(segment, "pointsman_shard_restarts") == {("0",): 0, ("1",): 2}
    segment.set_process(0, at.P_STATE, at.PROCESS_BOOTING)
    assert values(segment, "pointsman_shard_up")["0",] == 0


@pytest.mark.parametrize(
    ("word", "family"),
    [
        (at.G_CONNECTIONS, "connections"),
        (at.G_REQUESTS, "requests_in_flight"),
        (at.G_BUFFERED_BYTES, "buffered_bytes"),
        (at.G_UPSTREAM_CONNECTIONS, "upstream_connections"),
        (at.G_LOG_DROPPED, "access_log_dropped"),
        (at.G_CLIENT_DISCONNECTS, "client_disconnects"),
        (at.G_UPSTREAM_RESENDS, "upstream_resends"),
        (at.G_PROFILE_FALLBACKS, "profile_fallbacks"),
        (at.G_STREAM_ROUNDS, "stream_rounds"),
        (at.G_SERIES_FULL, "series_full"),
    ],
)
def test_gauges_of_shards_add_up(segment: Segment, word: int, family: str) -> None:
    for shard, amount in ((0, 3), (1, 4)):
        segment.words.put(segment.layout.gauge(shard, word), amount)
    assert value(segment, f"pointsman_{family}") == 7


def test_the_daemons_own_figures(segment: Segment) -> None:
    segment.words.put(at.H_LOCK_WAITS, 5)
    segment.words.put(at.H_LOCK_TIMEOUTS, 2)
    segment.words.put(at.H_LOCK_RECOVERIES, 1)
    assert value(segment, "pointsman_lock_waits") == 5
    assert value(segment, "pointsman_lock_timeouts") == 2
    assert value(segment, "pointsman_lock_recoveries") == 1
    assert value(segment, "pointsman_config_generation") == 7
    assert value(segment, "pointsman_config_last_reload_successful") == 1
    assert value(segment, "pointsman_config_last_reload_success_timestamp_seconds") == 2000.25
    assert value(segment, "pointsman_start_time_seconds") == 1000.5
    assert values(segment, "pointsman_build_info") == {("0.1.0",): 1}


def test_a_refused_reload_shows(segment: Segment) -> None:
    refused = DaemonInfo(version="0.1.0", started_at=0.0, last_reload_ok=False, last_reload_success_at=5.0)
    assert scrape(segment, info=refused)["pointsman_config_last_reload_successful"].samples[0].value == 0


def test_routing_is_told_by_worker_and_reason(segment: Segment) -> None:
    for shard in range(2):
        row = segment.layout.load(shard, 2, 0)
        for word, count in ((at.L_REASONS + 1, 3), (at.L_ERROR_US, 250_000), (at.L_BELIEVED_TOKENS, 40)):
            segment.cells[row + word] = count
    for gauge in (at.G_CACHE_HITS, at.G_DEGRADED):
        segment.cells[segment.layout.gauge(1, gauge)] = 5
    assert values(segment, "pointsman_policy_decisions") == {("spill", "http://h2:8000"): 6}
    assert values(segment, "pointsman_worker_ttft_error_seconds")[("http://h2:8000",)] == 0.5
    assert values(segment, "pointsman_worker_matched_tokens")[("http://h2:8000",)] == 80
    assert (value(segment, "pointsman_cache_hits"), value(segment, "pointsman_degraded_choices")) == (5, 5)
    assert value(segment, "pointsman_predicted_prefill_1000_seconds") == pytest.approx(0.052, rel=0.01)


def test_batches_are_counted_where_there_is_a_runner(segment: Segment) -> None:
    segment.set_process(segment.layout.batches, at.P_STARTED_NS, 1)
    tally = Tally(segment)
    tally.show(batches=2, in_flight=7, limit=8, is_paused=True)
    for has_succeeded in (True, True, False):
        tally.done(has_succeeded=has_succeeded)
    tally.unrun(4)
    tally.lost(1)
    tally.retried()
    found = scrape(segment)
    shown = {
        sample.name + str(sample.labels.get("result", "")): sample.value
        for name, family in found.items()
        if name.startswith("pointsman_batch")
        for sample in family.samples
    }
    assert shown == {
        "pointsman_batches_running": 2,
        "pointsman_batch_lines_in_flight": 7,
        "pointsman_batch_concurrency_limit": 8,
        "pointsman_batches_paused": 1,
        "pointsman_batch_lines_totalsucceeded": 2,
        "pointsman_batch_lines_totalfailed": 1,
        "pointsman_batch_lines_totalunrun": 4,
        "pointsman_batch_retries_total": 1,
        "pointsman_batch_results_lost_total": 1,
    }
    tally.transferred(Totals({"put": 9}, 4, 3, 1, {("put", -800): 4, ("stat", -800): 1, ("stat", "missing"): 2}))
    transfers = {
        name: values(segment, f"pointsman_store_keys_{name}")[()] for name in ("retried", "recovered", "exhausted")
    }
    assert transfers == {"retried": 4, "recovered": 3, "exhausted": 1}
    assert values(segment, "pointsman_store_failures") == {("-800",): 5}
    Tally(segment)  # of the next runner: it counts on, and nothing is under way
    assert values(segment, "pointsman_batch_lines")[("succeeded",)] == 2
    assert values(segment, "pointsman_batch_lines_in_flight")[()] == 0
