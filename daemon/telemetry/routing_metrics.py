"""What routing has to tell a scrape: cache hits, picks by reason, the prefix index, predictions, engines' signals."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pointsman.config.snapshot import WorkerSpec
from pointsman.daemon.routing.picking import REASONS
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.routing_state import RoutingState

_COUNTERS = (
    (at.G_CACHE_HITS, "pointsman_cache_hits", "Picks of a worker that is believed to hold a part of the prompt."),
    (at.G_CACHE_MISSES, "pointsman_cache_misses", "Picks of a worker that is believed to hold nothing of the prompt."),
    (at.G_LOAD_BALANCING, "pointsman_load_balancing_events", "Picks by load because the workers were out of balance."),
    (at.G_DEGRADED, "pointsman_degraded_choices", "Picks by our own counts for want of a recent engine metric."),
    (at.G_UNLOCKED, "pointsman_unlocked_choices", "Picks by lock-free counters: the routing lock's holder is stopped."),
    (at.G_UNINDEXED, "pointsman_unindexed_choices", "Picks without the prefix index: its lock's holder is stopped."),
    (at.G_UNBOOKED, "pointsman_unbooked_requests", "Requests without a booking: the table of the shard is full."),
)
_INDEX_COUNTERS = (
    ("evictions", "pointsman_prefix_index_evictions", "Blocks that a worker was no longer believed to hold."),
    ("memory_evictions", "pointsman_prefix_index_memory_evictions", "Those of them for want of memory."),
    ("recoveries", "pointsman_prefix_index_lock_recoveries", "Times the holder of the index' lock had died."),
    ("lock_timeouts", "pointsman_prefix_index_lock_timeouts", "Times the index' lock was not to be had in time."),
    ("resets", "pointsman_prefix_index_resets", "Times the index was emptied because it was damaged."),
)
_PER_WORKER = (
    (at.L_PROMPT_TOKENS, 1.0, "pointsman_worker_prompt_tokens", "Prompt tokens sent, estimated by text length."),
    (at.L_BELIEVED_TOKENS, 1.0, "pointsman_worker_matched_tokens", "Those of them believed to be cached there."),
    (
        at.L_USAGE_PROMPT_TOKENS,
        1.0,
        "pointsman_worker_engine_prompt_tokens",
        "Prompt tokens by the engine's count, of answers that told their cached tokens.",
    ),
    (at.L_USAGE_CACHED_TOKENS, 1.0, "pointsman_worker_engine_cached_tokens", "Those of them that were cached."),
    (at.L_PREDICTIONS, 1.0, "pointsman_worker_predictions", "Streamed answers whose first byte had been predicted."),
    (at.L_PREDICTED_US, 1e-6, "pointsman_worker_predicted_ttft_seconds", "Sum of the predictions."),
    (at.L_REAL_US, 1e-6, "pointsman_worker_ttft_seconds", "Sum of what it really took."),
    (at.L_ERROR_US, 1e-6, "pointsman_worker_ttft_error_seconds", "Sum of the differences, without their sign."),
)


def collect(state: RoutingState, workers: Sequence[WorkerSpec]) -> Iterator[Metric]:
    segment = state.segment
    for word, name, documentation in _COUNTERS:
        yield CounterMetricFamily(name, documentation, value=segment.gauge_total(word))
    loads = [max(segment.inflight(worker.slot), 0) for worker in workers]
    spread = max(loads) - min(loads) if loads else 0
    yield GaugeMetricFamily("pointsman_load_range", "Most less fewest requests in flight on a worker.", value=spread)
    yield from _by_worker(state, workers)
    yield from _index(state)
    yield from _costs(state)


def _by_worker(state: RoutingState, workers: Sequence[WorkerSpec]) -> Iterator[Metric]:
    segment = state.segment
    picks = CounterMetricFamily(
        "pointsman_policy_decisions", "Picks of the worker, by reason.", labels=("worker", "reason")
    )
    for worker in workers:
        for position, reason in enumerate(REASONS):
            count = segment.total(worker.slot, at.L_REASONS + position)
            if count:
                picks.add_metric((worker.url, reason), count)
    yield picks
    for word, scale, name, documentation in _PER_WORKER:
        counter = CounterMetricFamily(name, documentation, labels=("worker",))
        for worker in workers:
            counter.add_metric((worker.url,), segment.total(worker.slot, word) * scale)
        yield counter
    yield from _gauges(state, workers)


def _gauges(state: RoutingState, workers: Sequence[WorkerSpec]) -> Iterator[Metric]:
    index, bookings, labels = state.index, state.bookings, ("worker",)
    now = time.monotonic()
    size = GaugeMetricFamily("pointsman_tree_size", "Characters the worker is believed to hold.", labels=labels)
    blocks = GaugeMetricFamily("pointsman_tree_blocks", "Blocks of the prefix index that it holds.", labels=labels)
    pinned = GaugeMetricFamily("pointsman_tree_pinned", "Characters that requests in flight hold there.", labels=labels)
    capacity = GaugeMetricFamily("pointsman_worker_kv_tokens", "KV capacity, where it is known.", labels=labels)
    wait = GaugeMetricFamily("pointsman_worker_wait_seconds", "Predicted time in its line of prefills.", labels=labels)
    age = GaugeMetricFamily("pointsman_worker_signal_age_seconds", "Since its metrics were read.", labels=labels)
    running = GaugeMetricFamily("pointsman_worker_engine_running", "Requests that its engine runs.", labels=labels)
    waiting = GaugeMetricFamily("pointsman_worker_engine_waiting", "Requests that wait in it.", labels=labels)
    usage = GaugeMetricFamily("pointsman_worker_engine_kv_usage_ratio", "Share of its KV cache in use.", labels=labels)
    for worker in workers:
        label, slot = (worker.url,), worker.slot
        size.add_metric(label, index.size(slot))
        blocks.add_metric(label, index.blocks(slot))
        pinned.add_metric(label, index.pinned(slot))
        wait.add_metric(label, bookings.wait_s(slot, now))
        if tokens := state.kv_tokens(slot):
            capacity.add_metric(label, tokens)
        if told := state.segment.signals(slot):
            age.add_metric(label, max(now - told.at_s, 0.0))
            for family, figure in ((running, told.running), (waiting, told.waiting), (usage, told.kv_usage)):
                if figure is not None:
                    family.add_metric(label, figure)
    yield from (size, blocks, pinned, capacity, wait, age, running, waiting, usage)


def _index(state: RoutingState) -> Iterator[Metric]:
    totals = state.index.totals()
    used = GaugeMetricFamily("pointsman_prefix_index_blocks", "Entries in use.", value=totals["blocks_used"])
    room = GaugeMetricFamily(
        "pointsman_prefix_index_capacity_blocks", "Entries there are.", value=totals["block_count"]
    )
    yield from (used, room)
    for key, name, documentation in _INDEX_COUNTERS:
        yield CounterMetricFamily(name, documentation, value=totals[key])


def _costs(state: RoutingState) -> Iterator[Metric]:
    bookings = state.bookings
    yield GaugeMetricFamily(
        "pointsman_lost_prefix_share",
        "Share of prompts seen lately that no worker holds any more.",
        value=bookings.lost,
    )
    for tokens in (1000, 10_000):
        yield GaugeMetricFamily(
            f"pointsman_predicted_prefill_{tokens}_seconds",
            f"What {tokens} uncached prompt tokens are predicted to take.",
            value=bookings.seconds(tokens, 0),
        )
    yield GaugeMetricFamily("pointsman_output_tokens_mean", "Smoothed length of answers.", value=bookings.output_mean)
    yield CounterMetricFamily(
        "pointsman_prefills_learned", "First tokens that taught the cost model.", value=bookings.prefills_seen
    )
