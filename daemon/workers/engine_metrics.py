"""What an engine says of itself on its /metrics page (vLLM, SGLang, llama.cpp), in one form. Pure.

Names change between versions and one page may carry several series of a name, so every value is read in two steps: the
first spelling that is there, then one number out of its series. vLLM has one series per data-parallel engine: counts,
totals and capacities add up, shares are averaged. SGLang has one per rank as well: the ranks of one data-parallel
engine tell the same thing, so the largest counts.

What an engine does not tell stays None; docs/engine-metrics.md has the table of names.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import msgspec
from prometheus_client.parser import text_fd_to_metric_families
from prometheus_client.samples import Sample

from pointsman.daemon.errors import PointsmanError

EngineName = Literal["vllm", "sglang", "llamacpp", "unknown"]

INSTANCE_HEADER = "Process-Start-Time-Unix"
"""llama.cpp's; in spite of its name the microseconds of a monotonic clock: good for comparing only."""
CAPACITY_PATH = "/props"
"""Where llama.cpp, which has no metric for it, tells how many tokens its KV cache holds."""

MAX_WANTED_CHARS = 256 * 1024
MAX_LINE_CHARS = 4 * 1024
MAX_TOKENS = 2**53

_START = ("process_start_time_seconds",)

_VLLM_RUNNING = ("vllm:num_requests_running",)
_VLLM_WAITING = ("vllm:num_requests_waiting",)
_VLLM_KV = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
_VLLM_CPU_KV = ("vllm:cpu_cache_usage_perc",)
_VLLM_CONFIG = ("vllm:cache_config_info",)
_VLLM_QUERIES = (
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_queries",
    "vllm:gpu_prefix_cache_queries_total",
    "vllm:gpu_prefix_cache_queries",
)
_VLLM_HITS = (
    "vllm:prefix_cache_hits_total",
    "vllm:prefix_cache_hits",
    "vllm:gpu_prefix_cache_hits_total",
    "vllm:gpu_prefix_cache_hits",
)

_SGLANG_RUNNING = ("sglang:num_running_reqs",)
_SGLANG_WAITING = ("sglang:num_queue_reqs",)
_SGLANG_KV = ("sglang:token_usage",)
_SGLANG_CAPACITY = ("sglang:max_total_num_tokens",)
_SGLANG_OCCUPANCY = ("sglang:fwd_occupancy",)
_SGLANG_UTILIZATION = ("sglang:utilization",)
_SGLANG_RUNNING_LIMIT = ("sglang:max_running_requests_under_SLO",)
_SGLANG_PROMPT = ("sglang:prompt_tokens_total", "sglang:prompt_tokens")
_SGLANG_CACHED = ("sglang:cached_tokens_total", "sglang:cached_tokens")

_LLAMACPP_RUNNING = ("llamacpp:requests_processing",)
_LLAMACPP_WAITING = ("llamacpp:requests_deferred",)
_LLAMACPP_KV = ("llamacpp:kv_cache_usage_ratio",)
_LLAMACPP_COMPUTED = ("llamacpp:prompt_tokens_total",)
_LLAMACPP_CACHED = ("llamacpp:prompt_tokens_cached_total",)

_NAMES = (
    *(_START + _VLLM_RUNNING + _VLLM_WAITING + _VLLM_KV + _VLLM_CPU_KV + _VLLM_CONFIG + _VLLM_QUERIES + _VLLM_HITS),
    *(_SGLANG_RUNNING + _SGLANG_WAITING + _SGLANG_KV + _SGLANG_CAPACITY + _SGLANG_OCCUPANCY + _SGLANG_UTILIZATION),
    *(_SGLANG_RUNNING_LIMIT + _SGLANG_PROMPT + _SGLANG_CACHED),
    *(_LLAMACPP_RUNNING + _LLAMACPP_WAITING + _LLAMACPP_KV + _LLAMACPP_COMPUTED + _LLAMACPP_CACHED),
)
# prometheus_client reads a page of 1,500 lines in 20 to 40 ms, most of it buckets that nobody here looks at. Choosing
# the lines first costs 0.4 ms, and letting it read those (labels, escapes, numbers) another 0.4 ms at most.
_WANTED = frozenset(_NAMES)


class MetricsUnreadable(PointsmanError):
    """The page, or a line of it that is needed, is not of the Prometheus text format; or it is absurdly large."""


@dataclass(frozen=True, slots=True)
class EngineReport:
    """None = the engine does not tell. Shares are 0..1; totals count since the engine's start."""

    engine: EngineName = "unknown"
    running: float | None = None
    """requests"""
    waiting: float | None = None
    """requests"""
    kv_usage: float | None = None
    cpu_kv_usage: float | None = None
    busy: float | None = None
    """Share of the time that the device computes."""
    utilization: float | None = None
    """How near the engine is to the load that it was told to bear."""
    kv_tokens: int | None = None
    """Tokens that the KV cache holds."""
    prompt_tokens: float | None = None
    """Tokens looked up in the prefix cache."""
    cached_tokens: float | None = None
    """Those of them that were found."""
    started_at: float | None = None
    """Unix seconds."""
    instance: str | None = None
    """Opaque; another value is another process."""


def parse(page: str, instance: str | None = None) -> EngineReport:
    """`instance` is the value of INSTANCE_HEADER, if there was one. Raises MetricsUnreadable and nothing else."""
    series = _Series(_read(_wanted_lines(page)))
    for prefix, read in _READERS.items():
        if series.has_prefix(prefix):
            return read(series, instance)
    return EngineReport(started_at=_started_at(series), instance=instance)


def parse_capacity(body: bytes) -> int | None:
    """The tokens of llama.cpp's KV cache, out of its CAPACITY_PATH answer; None when it does not tell.

    Slots times the context of a slot. Slots that share one cache (--kv-unified) all tell the whole of it: then this
    is too large, never too small.
    """
    try:
        properties = _properties.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return _token_count(properties.total_slots * properties.default_generation_settings.n_ctx)


# --- one engine each


def _vllm(series: _Series, instance: str | None) -> EngineReport:
    return EngineReport(
        engine="vllm",
        running=_total(series.values(_VLLM_RUNNING)),
        waiting=_total(series.values(_VLLM_WAITING)),
        kv_usage=_mean_share(series.values(_VLLM_KV)),
        cpu_kv_usage=_mean_share(series.values(_VLLM_CPU_KV)),
        kv_tokens=_token_count(sum(_vllm_capacity(sample.labels) for sample in series.samples(_VLLM_CONFIG))),
        prompt_tokens=_total(series.values(_VLLM_QUERIES)),
        cached_tokens=_total(series.values(_VLLM_HITS)),
        started_at=_started_at(series),
        instance=instance,
    )


def _vllm_capacity(labels: Mapping[str, str]) -> int:
    """0 when it does not tell: both labels read "None" until the engine has measured its memory."""
    # With layers of several kinds, blocks times block size is not what requests can use: first the engine's own figure.
    told = _natural(labels.get("kv_cache_size_tokens"))
    return told or _natural(labels.get("num_gpu_blocks")) * _natural(labels.get("block_size"))


def _sglang(series: _Series, instance: str | None) -> EngineReport:
    limit = _total(series.of_ranks(_SGLANG_RUNNING_LIMIT))
    occupancy = series.of_ranks(_SGLANG_OCCUPANCY)
    # A series of these two appears with the first request that has something to add to it.
    prompt, cached = (_total(series.values(names)) or 0.0 for names in (_SGLANG_PROMPT, _SGLANG_CACHED))
    return EngineReport(
        engine="sglang",
        running=_total(series.of_ranks(_SGLANG_RUNNING)),
        waiting=_total(series.of_ranks(_SGLANG_WAITING)),
        kv_usage=_mean_share(series.of_ranks(_SGLANG_KV)),
        busy=_mean_share([percent / 100 for percent in occupancy]),
        # Without that limit the gauge stays 0 whatever runs, and a prefill engine writes -1.
        utilization=_mean_share(series.of_ranks(_SGLANG_UTILIZATION)) if limit else None,
        kv_tokens=_token_count(_total(series.of_ranks(_SGLANG_CAPACITY))),
        prompt_tokens=prompt,
        cached_tokens=cached,
        started_at=_started_at(series),
        instance=instance,
    )


def _llamacpp(series: _Series, instance: str | None) -> EngineReport:
    computed, cached = (_total(series.values(names)) for names in (_LLAMACPP_COMPUTED, _LLAMACPP_CACHED))
    return EngineReport(
        engine="llamacpp",
        running=_total(series.values(_LLAMACPP_RUNNING)),
        waiting=_total(series.values(_LLAMACPP_WAITING)),
        kv_usage=_mean_share(series.values(_LLAMACPP_KV)),
        # It counts what it did not find; a build that does not count the rest looks like one with a cold cache.
        prompt_tokens=None if computed is None or cached is None else computed + cached,
        cached_tokens=cached,
        started_at=_started_at(series),
        instance=instance,
    )


_READERS: Mapping[str, Callable[[_Series, str | None], EngineReport]] = {
    "vllm:": _vllm,
    "sglang:": _sglang,
    "llamacpp:": _llamacpp,
}


class _Slot(msgspec.Struct):
    n_ctx: int


class _Properties(msgspec.Struct):
    total_slots: int
    default_generation_settings: _Slot


_properties = msgspec.json.Decoder(_Properties)


# --- lines to series


class _Series:
    """The samples of a page by name; those that are no finite number are left out."""

    __slots__ = ("_by_name",)

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._by_name: dict[str, list[Sample]] = {}
        for sample in samples:
            self._by_name.setdefault(sample.name, []).append(sample)

    def has_prefix(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self._by_name)

    def samples(self, spellings: tuple[str, ...]) -> list[Sample]:
        """Those of the first spelling that is there: a version that renames a metric tells both names for a while."""
        return next((self._by_name[name] for name in spellings if name in self._by_name), [])

    def values(self, spellings: tuple[str, ...]) -> list[float]:
        return [sample.value for sample in self.samples(spellings)]

    def of_ranks(self, spellings: tuple[str, ...]) -> list[float]:
        """SGLang: one value per data-parallel engine."""
        found: dict[tuple[str, ...], float] = {}
        for sample in self.samples(spellings):
            if sample.labels.get("priority"):  # a part of the series whose priority is ""
                continue
            key = tuple(sample.labels.get(name, "") for name in ("model_name", "engine_type", "dp_rank"))
            found[key] = max(sample.value, found.get(key, -math.inf))
        return list(found.values())


def _wanted_lines(page: str) -> list[str]:
    # The parser's time grows with the square of a line's length; an honest line has at most 2,000 characters.
    lines = [
        line
        for line in page.split("\n")
        if line.startswith(_NAMES) and len(line) <= MAX_LINE_CHARS and _name(line) in _WANTED
    ]
    if sum(map(len, lines)) > MAX_WANTED_CHARS:
        raise MetricsUnreadable(f"more than {MAX_WANTED_CHARS // 1024} KiB of series that count")
    return lines


def _name(line: str) -> str:
    return line.split("{", 1)[0].split(None, 1)[0]


def _read(lines: list[str]) -> list[Sample]:
    try:
        samples = [sample for line in lines for sample in _samples(line)]
    except Exception as error:  # noqa: BLE001 - boundary: what the parser raises on broken text is not documented
        # Its words may quote the page, which is nobody else's business.
        raise MetricsUnreadable(f"not of the Prometheus text format ({type(error).__name__})") from None
    return [
        Sample(sample.name, sample.labels, value) for sample in samples if (value := _finite(sample.value)) is not None
    ]


@lru_cache(maxsize=1024)
def _samples(line: str) -> tuple[Sample, ...]:
    """Cached: the longest line of a page never changes, and in those of an idle engine nothing does."""
    return tuple(sample for family in text_fd_to_metric_families(io.StringIO(line)) for sample in family.samples)


def _finite(value: float) -> float | None:
    try:
        number = float(value)
    except OverflowError:  # the parser gives whole numbers of any size
        return None
    return number if math.isfinite(number) else None


# --- series to one number


def _total(values: list[float]) -> float | None:
    found = [value for value in values if value >= 0]
    total = sum(found)
    return total if found and math.isfinite(total) else None


def _mean_share(values: list[float]) -> float | None:
    found = [min(value, 1.0) for value in values if value >= 0]
    return sum(found) / len(found) if found else None


def _token_count(value: float | None) -> int | None:
    return int(value) if value is not None and 0 < value <= MAX_TOKENS else None


def _natural(text: str | None) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) <= 15 else 0


def _started_at(series: _Series) -> float | None:
    return max((value for value in series.values(_START) if value > 0), default=None)
