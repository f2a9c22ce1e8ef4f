"""The report of a benchmark, as it is in the JSON file. Times have their unit in their name; shares are 0 … 1.

The names of the upper level and of `results` are those of the seed's reports where it had them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from pointsman.daemon.bench.histogram import Histogram

FORMAT = 1


class Latency(msgspec.Struct, frozen=True):
    """Milliseconds, of `count` samples; all 0 when there is none."""

    count: int = 0
    mean: float = 0.0
    min: float = 0.0
    p50: float = 0.0
    p75: float = 0.0
    p90: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    p999: float = 0.0
    max: float = 0.0


class Distribution(msgspec.Struct, frozen=True):
    """A histogram in nanoseconds; `buckets` as (index, count) of `Histogram`."""

    sub_bits: int
    total: int
    least: int
    most: int
    buckets: list[tuple[int, int]]

    def restore(self) -> Histogram:
        """Raises ValueError for what cannot be."""
        return Histogram.restore(self.sub_bits, self.buckets, self.total, self.least, self.most)


class Results(msgspec.Struct, frozen=True):
    requests: int
    successful: int
    failed: int
    success_rate: float
    errors: dict[str, int]
    error_details: dict[str, str]
    throughput_rps: float
    """successful requests a second"""
    output_tokens_per_s: float
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cached_share: float | None
    """of the prompt tokens; None: no answer told"""
    events: int
    e2e_ms: Latency
    ttft_ms: Latency
    inter_token_ms: Latency
    tpot_ms: Latency


class Point(msgspec.Struct, frozen=True):
    """A slice of time: seconds from the begin of the measurement to its middle, and what ended in it."""

    at_s: float
    succeeded_rps: float
    failed_rps: float
    tokens_per_s: float
    e2e_p50_ms: float
    e2e_p99_ms: float
    ttft_p50_ms: float


class Steady(msgspec.Struct, frozen=True):
    is_steady: bool | None
    """None: too short to tell"""
    reasons: list[str]


class GatewayCost(msgspec.Struct, frozen=True):
    """Of the process tree that serves the URL."""

    pid: int
    processes: int
    cpu_us_per_request: float
    cpu_us_per_event: float | None
    cpu_share: float
    """of one core, on average"""
    pss_mib: float
    """the largest that was seen"""


class GeneratorCost(msgspec.Struct, frozen=True):
    """Of this program itself: what it costs, and how late it was."""

    cpu_us_per_request: float
    cpu_us_per_event: float | None
    cpu_share: float
    lag_p50_ms: float
    lag_p99_ms: float
    lag_max_ms: float


class WarmUp(msgspec.Struct, frozen=True):
    requests: int
    failed: int
    seconds: float


class Run(msgspec.Struct, frozen=True):
    """One load against one URL."""

    name: str
    url: str
    concurrency: int | None
    """clients of a closed loop; None: an open loop"""
    rate: float | None
    """requests a second of an open loop; None: a closed loop, or as recorded"""
    start_time: str
    end_time: str
    duration_secs: float
    warm_up: WarmUp
    results: Results
    steady: Steady
    workers: dict[str, int]
    """answers by worker, as far as they named one"""
    connections: int
    generator: GeneratorCost
    gateway: GatewayCost | None
    timeline: list[Point]
    distributions: dict[str, Distribution]
    """e2e, ttft, inter_token, tpot: those that have samples"""


class Overhead(msgspec.Struct, frozen=True):
    """Of a URL over the baseline, milliseconds: median over the rounds, and the rounds' least and most."""

    name: str
    baseline: str
    measure: str
    quantile: str
    median_ms: float
    least_ms: float
    most_ms: float


class System(msgspec.Struct, frozen=True):
    os: str
    python_version: str
    pointsman_version: str
    cpu_count: int
    cpu_model: str


class Report(msgspec.Struct, frozen=True):
    format: int
    benchmark_type: str
    start_time: str
    end_time: str
    duration_secs: float
    is_interrupted: bool
    configuration: dict[str, Any]
    runs: list[Run]
    overheads: list[Overhead]
    findings: list[str]
    """what to know before believing the figures"""
    system_info: System


class NoReport(Exception):
    """A file that is none of ours; says why."""


def encode(report: Report) -> bytes:
    return msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"


def read_report(path: Path) -> Report:
    """Raises NoReport."""
    try:
        report = msgspec.json.decode(path.read_bytes(), type=Report)
    except OSError as error:
        raise NoReport(f"{path}: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise NoReport(f"{path}: no report of pointsman bench: {error}") from None
    if report.format != FORMAT:
        raise NoReport(f"{path}: format {report.format}, this version reads {FORMAT}")
    return report
