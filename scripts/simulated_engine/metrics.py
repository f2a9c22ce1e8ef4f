"""The engine's /metrics, under the names that vLLM, SGLang or llama.cpp use."""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from pointsman.scripts.simulated_engine.model import Engine, EngineSequence
from pointsman.scripts.simulated_engine.settings import EngineSettings, Flavor

_SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
)
_SECONDS_LONG = (*_SECONDS, 20.0, 40.0, 80.0, 160.0, 640.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_THROUGHPUT_WINDOW_S = 1.0


class BucketCounts:
    """A histogram without a name: the flavor gives it one."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, name: str, labels: Mapping[str, str]) -> HistogramMetricFamily:
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), total))
        family = HistogramMetricFamily(name, name, labels=list(labels))
        family.add_metric(list(labels.values()), buckets, self._sum)
        return family


class EngineMetrics:
    """Observes sequences in model time, which is wall time multiplied by the engine's speed."""

    def __init__(self, engine: Engine, settings: EngineSettings) -> None:
        self.started_unix_s = time.time()
        self.finished: Counter[str] = Counter()
        self.time_to_first_token = BucketCounts(_SECONDS)
        self.time_per_output_token = BucketCounts(_SECONDS)
        self.end_to_end = BucketCounts(_SECONDS_LONG)
        self.queue_time = BucketCounts(_SECONDS_LONG)
        self.prompt_tokens = BucketCounts(_TOKENS)
        self.output_tokens = BucketCounts(_TOKENS)
        self._engine = engine
        self._settings = settings
        self._throughput = 0.0
        self._sampled_tokens = 0
        self._sampled_s = time.monotonic()
        self._registry = CollectorRegistry()
        self._registry.register(_FlavoredCollector(self))

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def settings(self) -> EngineSettings:
        return self._settings

    def observe_first_token(self, sequence: EngineSequence) -> None:
        if sequence.first_token_s is not None and sequence.admitted_s is not None:
            self.time_to_first_token.observe(sequence.first_token_s - sequence.arrived_s)
            self.queue_time.observe(sequence.admitted_s - sequence.arrived_s)

    def observe_end(self, sequence: EngineSequence, finish_reason: str) -> None:
        self.finished[finish_reason] += 1
        if finish_reason == "abort" or sequence.finished_s is None:
            return
        self.end_to_end.observe(sequence.finished_s - sequence.arrived_s)
        self.prompt_tokens.observe(sequence.request.prompt_tokens)
        self.output_tokens.observe(sequence.generated_tokens)
        if sequence.first_token_s is not None and sequence.generated_tokens > 1:
            decoding_s = sequence.finished_s - sequence.first_token_s
            self.time_per_output_token.observe(decoding_s / (sequence.generated_tokens - 1))

    def read_throughput(self, now: float) -> float:
        """Generated tokens per second of wall time between the last two reads a second or more apart."""
        tokens = self._engine.totals.generated_tokens
        elapsed_s = now - self._sampled_s
        if elapsed_s >= _THROUGHPUT_WINDOW_S:
            self._throughput = (tokens - self._sampled_tokens) / elapsed_s
            self._sampled_s, self._sampled_tokens = now, tokens
        return self._throughput

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _FlavoredCollector(Collector):
    def __init__(self, metrics: EngineMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield _gauge("process_start_time_seconds", self._metrics.started_unix_s, {})
        yield from _COLLECTORS[self._metrics.settings.flavor](self._metrics)


def _gauge(name: str, value: float, labels: Mapping[str, str]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, name, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _counter(name: str, value: float, labels: Mapping[str, str]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, name, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _collect_vllm(metrics: EngineMetrics) -> Iterator[Metric]:
    labels = {"engine": "0", "model_name": metrics.settings.model}
    gauges, totals = metrics.engine.gauges(), metrics.engine.totals
    yield _gauge("vllm:num_requests_running", gauges.running, labels)
    yield _gauge("vllm:num_requests_waiting", gauges.waiting, labels)
    yield _gauge("vllm:kv_cache_usage_perc", gauges.kv_usage, labels)
    yield _gauge("vllm:engine_sleep_state", 0, {**labels, "sleep_state": "awake"})
    yield _cache_config(metrics, labels)
    yield _counter("vllm:prefix_cache_queries", totals.prompt_tokens, labels)
    yield _counter("vllm:prefix_cache_hits", totals.cached_tokens, labels)
    yield _counter("vllm:prompt_tokens", totals.prompt_tokens, labels)
    yield _counter("vllm:prompt_tokens_cached", totals.cached_tokens, labels)
    yield _counter("vllm:generation_tokens", totals.generated_tokens, labels)
    yield _counter("vllm:num_preemptions", 0, labels)
    finished = CounterMetricFamily("vllm:request_success", "Finished requests.", labels=[*labels, "finished_reason"])
    for reason in ("stop", "length", "abort", "error", "repetition"):
        # The engine itself does not count aborted requests here either.
        count = 0 if reason == "abort" else metrics.finished[reason]
        finished.add_metric([*labels.values(), reason], count)
    yield finished
    yield metrics.time_to_first_token.family("vllm:time_to_first_token_seconds", labels)
    yield metrics.time_per_output_token.family("vllm:request_time_per_output_token_seconds", labels)
    yield metrics.end_to_end.family("vllm:e2e_request_latency_seconds", labels)
    yield metrics.queue_time.family("vllm:request_queue_time_seconds", labels)
    yield metrics.prompt_tokens.family("vllm:request_prompt_tokens", labels)
    yield metrics.output_tokens.family("vllm:request_generation_tokens", labels)


def _cache_config(metrics: EngineMetrics, labels: Mapping[str, str]) -> GaugeMetricFamily:
    limits = metrics.settings.limits
    config = {
        "block_size": str(limits.block_tokens),
        "enable_prefix_caching": "True",
        "kv_cache_size_tokens": str(metrics.engine.cache.capacity_blocks * limits.block_tokens),
        "num_gpu_blocks": str(metrics.engine.cache.capacity_blocks),
    }
    return _gauge("vllm:cache_config_info", 1, {**labels, **config})


def _collect_sglang(metrics: EngineMetrics) -> Iterator[Metric]:
    labels = {
        "model_name": metrics.settings.model,
        "engine_type": "unified",
        "tp_rank": "0",
        "pp_rank": "0",
    }
    gauges, totals = metrics.engine.gauges(), metrics.engine.totals
    limits = metrics.settings.limits
    hit_rate = totals.cached_tokens / totals.prompt_tokens if totals.prompt_tokens else 0.0
    yield _gauge("sglang:num_running_reqs", gauges.running, labels)
    yield _gauge("sglang:num_queue_reqs", gauges.waiting, labels)
    yield _gauge("sglang:num_used_tokens", gauges.kv_blocks_used * limits.block_tokens, labels)
    yield _gauge("sglang:token_usage", gauges.kv_usage, labels)
    yield _gauge("sglang:full_token_usage", gauges.kv_usage, labels)
    yield _gauge("sglang:max_total_num_tokens", limits.kv_tokens, labels)
    yield _gauge("sglang:max_running_requests_under_SLO", limits.max_sequences, labels)
    yield _gauge("sglang:utilization", max(gauges.running / limits.max_sequences, gauges.kv_usage / 0.9), labels)
    yield _gauge("sglang:fwd_occupancy", 100.0 if gauges.running else 0.0, labels)
    yield _gauge("sglang:cache_hit_rate", hit_rate, labels)
    yield _gauge("sglang:gen_throughput", metrics.read_throughput(time.monotonic()), labels)
    yield _counter("sglang:prompt_tokens", totals.prompt_tokens, labels)
    yield _counter("sglang:generation_tokens", totals.generated_tokens, labels)
    if totals.cached_tokens:  # as there, the series begins with the first hit
        yield _counter("sglang:cached_tokens", totals.cached_tokens, {**labels, "cache_source": "device"})
    yield _counter("sglang:num_requests", totals.finished + totals.aborted, labels)
    yield _counter("sglang:num_aborted_requests", totals.aborted, labels)
    yield metrics.time_to_first_token.family("sglang:time_to_first_token_seconds", labels)
    yield metrics.time_per_output_token.family("sglang:inter_token_latency_seconds", labels)
    yield metrics.end_to_end.family("sglang:e2e_request_latency_seconds", labels)
    yield metrics.queue_time.family("sglang:queue_time_seconds", labels)


def _collect_llamacpp(metrics: EngineMetrics) -> Iterator[Metric]:
    gauges, totals = metrics.engine.gauges(), metrics.engine.totals
    busy = totals.generated_tokens / totals.steps if totals.steps else 0.0
    computed = totals.prompt_tokens - totals.cached_tokens
    yield _gauge("llamacpp:requests_processing", gauges.running, {})
    yield _gauge("llamacpp:requests_deferred", gauges.waiting, {})
    yield _counter("llamacpp:prompt_tokens", computed, {})
    yield _counter("llamacpp:prompt_tokens_cached", totals.cached_tokens, {})
    yield _counter("llamacpp:tokens_predicted", totals.generated_tokens, {})
    yield _counter("llamacpp:n_decode", totals.steps, {})
    yield _gauge("llamacpp:n_busy_slots_per_decode", busy, {})


_COLLECTORS: Mapping[Flavor, Callable[[EngineMetrics], Iterator[Metric]]] = MappingProxyType(
    {"vllm": _collect_vllm, "sglang": _collect_sglang, "llamacpp": _collect_llamacpp}
)
