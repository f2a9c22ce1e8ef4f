"""Two reports compared, run by run: what is better, what is worse, and what makes them incomparable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from pointsman.daemon.bench.model import Report, Run

NOISE_Z = 2.0
_LEAST_POINTS = 8


@dataclass(slots=True, frozen=True)
class Change:
    """`before`, `after`: None where a report does not have the figure. `change`: share of `before`, if it can be told.

    `worsening`: the same, positive when it is for the worse. `is_noise`: no larger than what slices of the same run
    differ by.
    """

    run: str
    measure: str
    unit: str
    before: float | None
    after: float | None
    change: float | None
    worsening: float
    is_noise: bool


@dataclass(slots=True, frozen=True)
class _Measure:
    name: str
    unit: str
    of: Callable[[Run], float | None]
    is_better_when_more: bool = False


def _positive(value: float) -> float | None:
    return value or None


_MEASURES = (
    _Measure("success", "", lambda run: run.results.success_rate, is_better_when_more=True),
    _Measure("throughput", "requests/s", lambda run: run.results.throughput_rps, is_better_when_more=True),
    _Measure("output", "tokens/s", lambda run: _positive(run.results.output_tokens_per_s), is_better_when_more=True),
    _Measure("cached share", "", lambda run: run.results.cached_share, is_better_when_more=True),
    _Measure("end to end mean", "ms", lambda run: _positive(run.results.e2e_ms.mean)),
    _Measure("end to end p50", "ms", lambda run: _positive(run.results.e2e_ms.p50)),
    _Measure("end to end p99", "ms", lambda run: _positive(run.results.e2e_ms.p99)),
    _Measure("end to end p99.9", "ms", lambda run: _positive(run.results.e2e_ms.p999)),
    _Measure("first token p50", "ms", lambda run: _positive(run.results.ttft_ms.p50)),
    _Measure("first token p99", "ms", lambda run: _positive(run.results.ttft_ms.p99)),
    _Measure("between tokens p50", "ms", lambda run: _positive(run.results.inter_token_ms.p50)),
    _Measure("between tokens p99", "ms", lambda run: _positive(run.results.inter_token_ms.p99)),
    _Measure("server CPU", "µs/request", lambda run: run.gateway.cpu_us_per_request if run.gateway else None),
    _Measure("server PSS", "MiB", lambda run: run.gateway.pss_mib if run.gateway else None),
)


def compare(before: Report, after: Report) -> list[Change]:
    """Runs are paired by name; a report of a single run is compared with another such, whatever the names."""
    return [change for name, old, new in _pairs(before, after) for change in _changes(name, old, new)]


def differences(before: Report, after: Report) -> list[str]:
    """What was not done alike: options, runs that only one has, machines."""
    found = []
    if before.benchmark_type != after.benchmark_type:
        found.append(f"{before.benchmark_type} against {after.benchmark_type}")
    options = sorted(before.configuration.keys() | after.configuration.keys())
    for option in options:
        old, new = before.configuration.get(option), after.configuration.get(option)
        if old != new:
            found.append(f"{option}: {old} against {new}")
    for what in ("cpu_model", "cpu_count", "pointsman_version", "os"):
        old, new = getattr(before.system_info, what), getattr(after.system_info, what)
        if old != new:
            found.append(f"{what}: {old} against {new}")
    if not _are_single(before, after):
        names = {run.name for run in before.runs} ^ {run.name for run in after.runs}
        found += [f"only one of them has the run {name}" for name in sorted(names)]
    found += [f"{name}: {finding}" for name, one in (("A", before), ("B", after)) for finding in one.findings]
    return found


def _are_single(before: Report, after: Report) -> bool:
    return len(before.runs) == len(after.runs) == 1


def _pairs(before: Report, after: Report) -> list[tuple[str, Run, Run]]:
    if _are_single(before, after):
        return [(after.runs[0].name, before.runs[0], after.runs[0])]
    news = {run.name: run for run in after.runs}
    return [(run.name, run, news[run.name]) for run in before.runs if run.name in news]


def _changes(name: str, before: Run, after: Run) -> list[Change]:
    found = []
    for measure in _MEASURES:
        old, new = measure.of(before), measure.of(after)
        if old is None and new is None:
            continue
        change = (new - old) / old if old and new is not None else None
        worsening = 0.0 if change is None else (-change if measure.is_better_when_more else change)
        is_noise = _is_noise(measure.name, before, after)
        found.append(Change(name, measure.name, measure.unit, old, new, change, worsening, is_noise))
    return found


def _is_noise(measure: str, before: Run, after: Run) -> bool:
    """For the two figures of which the timelines tell how much slices differ."""
    if measure == "throughput":
        return _differ_by_chance(_throughputs(before), _throughputs(after))
    if measure == "end to end p50":
        return _differ_by_chance(_latencies(before), _latencies(after))
    return False


def _throughputs(run: Run) -> list[float]:
    return [point.succeeded_rps for point in run.timeline[:-1]]


def _latencies(run: Run) -> list[float]:
    return [point.e2e_p50_ms for point in run.timeline[:-1] if point.succeeded_rps]


def _differ_by_chance(old: Sequence[float], new: Sequence[float]) -> bool:
    """Welch's t of the slices' means below NOISE_Z; slices follow each other, so this is a guide and no proof."""
    if min(len(old), len(new)) < _LEAST_POINTS:
        return False
    error = math.sqrt(stdev(old) ** 2 / len(old) + stdev(new) ** 2 / len(new))
    return abs(fmean(new) - fmean(old)) <= NOISE_Z * error


def worst(changes: Sequence[Change]) -> Change | None:
    """The one that is most for the worse, noise left out; None when nothing is worse."""
    worse = [change for change in changes if change.worsening > 0 and not change.is_noise]
    return max(worse, key=lambda change: change.worsening, default=None)
