"""From tallies to the figures of a report."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from pointsman.daemon.bench.histogram import Histogram
from pointsman.daemon.bench.model import Distribution, GeneratorCost, Latency, Overhead, Point, Results, Run, Steady
from pointsman.daemon.bench.steady import judge_steadiness
from pointsman.daemon.bench.tally import Recorder, Tally
from pointsman.daemon.bench.timeline import Slice, Timeline

NS_PER_MS = 1e6
NS_PER_S = 1e9
STEADY_SLICES = 20
LEAST_IN_SLICE = 25
"""Answers, or its median would be chance."""
LEAST_WINDOW = 3.0
"""A window of fewer mean latencies says nothing of the throughput: the time until the last end does then."""
MOST_GENERATOR_SHARE = 0.85
MOST_LAG_SHARE = 0.05
LEAST_LAG_MS = 1.0


def latency(histogram: Histogram) -> Latency:
    def at(share: float) -> float:
        return round(histogram.quantile(share) / NS_PER_MS, 4)

    return Latency(
        count=histogram.count,
        mean=round(histogram.mean / NS_PER_MS, 4),
        min=round(histogram.least / NS_PER_MS, 4),
        p50=at(0.5),
        p75=at(0.75),
        p90=at(0.9),
        p95=at(0.95),
        p99=at(0.99),
        p999=at(0.999),
        max=round(histogram.most / NS_PER_MS, 4),
    )


def results(tally: Tally, succeeded_per_s: float, tokens_per_s: float) -> Results:
    return Results(
        requests=tally.requests,
        successful=tally.succeeded,
        failed=tally.failed,
        success_rate=tally.succeeded / tally.requests if tally.requests else 0.0,
        errors=dict(tally.errors.most_common()),
        error_details={kind: detail for kind, detail in tally.details.items() if detail},
        throughput_rps=round(succeeded_per_s, 3),
        output_tokens_per_s=round(tokens_per_s, 3),
        prompt_tokens=tally.prompt_tokens,
        completion_tokens=tally.completion_tokens,
        cached_tokens=tally.cached_tokens,
        cached_share=tally.cached_tokens / tally.prompt_tokens if tally.prompt_tokens else None,
        events=tally.events,
        e2e_ms=latency(tally.e2e),
        ttft_ms=latency(tally.ttft),
        inter_token_ms=latency(tally.gaps),
        tpot_ms=latency(tally.tpot),
    )


def throughput(recorders: Sequence[Recorder]) -> tuple[float, float]:
    """(successful requests, tokens) a second over all of them, each in its window."""
    succeeded = tokens = 0
    seconds = 0.0
    for recorder in recorders:
        measured = recorder.measured
        window_s = ((recorder.window_end_ns or 0) - recorder.measure_from_ns) / NS_PER_S
        if window_s >= LEAST_WINDOW * measured.e2e.mean / NS_PER_S and recorder.window_succeeded:
            succeeded += recorder.window_succeeded
            tokens += recorder.window_tokens
            seconds += window_s
        elif measured.last_end_ns > recorder.measure_from_ns:
            succeeded += measured.succeeded
            tokens += measured.completion_tokens
            seconds += (measured.last_end_ns - recorder.measure_from_ns) / NS_PER_S
    return (succeeded / seconds, tokens / seconds) if seconds > 0 else (0.0, 0.0)


def distributions(tally: Tally) -> dict[str, Distribution]:
    named = {"e2e": tally.e2e, "ttft": tally.ttft, "inter_token": tally.gaps, "tpot": tally.tpot}
    return {
        name: Distribution(one.sub_bits, one.total, one.least, one.most, one.buckets())
        for name, one in named.items()
        if one.count
    }


def points(timeline: Timeline, offset_s: float = 0.0) -> list[Point]:
    """`offset_s`: from the begin of the measurement to the timeline's."""
    slice_s = timeline.slice_ns / NS_PER_S
    return [
        Point(
            at_s=round(offset_s + (number + 0.5) * slice_s, 3),
            succeeded_rps=round(one.succeeded / slice_s, 3),
            failed_rps=round(one.failed / slice_s, 3),
            tokens_per_s=round(one.tokens / slice_s, 3),
            e2e_p50_ms=round(one.e2e.quantile(0.5) / NS_PER_MS, 4),
            e2e_p99_ms=round(one.e2e.quantile(0.99) / NS_PER_MS, 4),
            ttft_p50_ms=round(one.ttft.quantile(0.5) / NS_PER_MS, 4),
        )
        for number, one in enumerate(timeline.slices)
    ]


def steadiness(recorder: Recorder) -> Steady:
    """Of throughput and of median latency within the window."""
    groups = _groups(recorder)
    judged = (
        judge_steadiness("throughput", [one.succeeded + one.failed for one in groups], are_counts=True),
        judge_steadiness("latency", [one.e2e.quantile(0.5) for one in groups if one.succeeded]),
    )
    reasons = [one.reason for one in judged if one.reason]
    if any(one.is_steady is False for one in judged):
        return Steady(False, reasons)
    return Steady(None if any(one.is_steady is None for one in judged) else True, reasons)


def _groups(recorder: Recorder) -> list[Slice]:
    """The slices that are whole and in the window, put together to at most STEADY_SLICES that hold enough."""
    timeline = recorder.timeline
    window_ns = (recorder.window_end_ns or 0) - recorder.measure_from_ns
    whole = timeline.slices[: max(window_ns // timeline.slice_ns, 0)]
    wanted = min(STEADY_SLICES, sum(one.succeeded for one in whole) // LEAST_IN_SLICE)
    size = max(1, -(-len(whole) // max(wanted, 1)))
    groups = []
    for begin in range(0, len(whole) - size + 1, size):
        group = Slice()
        for one in whole[begin : begin + size]:
            group.absorb(one)
        groups.append(group)
    return groups


def generator_cost(tally: Tally, cpu_ns: int, wall_ns: int, ended: int, events: int) -> GeneratorCost:
    """`ended`, `events`: what the CPU time went to."""
    return GeneratorCost(
        cpu_us_per_request=round(cpu_ns / 1e3 / max(ended, 1), 2),
        cpu_us_per_event=round(cpu_ns / 1e3 / events, 2) if events else None,
        cpu_share=round(cpu_ns / max(wall_ns, 1), 4),
        lag_p50_ms=round(tally.lag.quantile(0.5) / NS_PER_MS, 4),
        lag_p99_ms=round(tally.lag.quantile(0.99) / NS_PER_MS, 4),
        lag_max_ms=round(tally.lag.most / NS_PER_MS, 4),
    )


def overhead(name: str, baseline: str, measure: str, pairs: Sequence[tuple[Histogram, Histogram]]) -> list[Overhead]:
    """`pairs`: of each round the samples of `name` and of the baseline; rounds without samples do not count."""
    found = []
    usable = [(mine, theirs) for mine, theirs in pairs if mine.count and theirs.count]
    for quantile, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        differences = [(mine.quantile(share) - theirs.quantile(share)) / NS_PER_MS for mine, theirs in usable]
        if differences:
            figures = (median(differences), min(differences), max(differences))
            found.append(Overhead(name, baseline, measure, quantile, *(round(one, 4) for one in figures)))
    return found


def findings(run: Run) -> list[str]:
    """What to know before believing the figures of a run."""
    found = []
    if run.results.requests == 0:
        found.append(f"{run.name}: nothing was measured")
    if run.steady.is_steady is False:
        found.append(f"{run.name}: not in a steady state: {'; '.join(run.steady.reasons)}")
    if run.generator.cpu_share > MOST_GENERATOR_SHARE:
        share = f"{run.generator.cpu_share:.0%}"
        found.append(f"{run.name}: this program used {share} of a core and may itself have been the bottleneck")
    lag_ms, typical_ms = run.generator.lag_p99_ms, run.results.e2e_ms.p50
    if lag_ms > max(LEAST_LAG_MS, MOST_LAG_SHARE * typical_ms):
        found.append(f"{run.name}: one request of a hundred was sent {lag_ms:.1f} ms late or more (counted as latency)")
    if run.warm_up.failed:
        found.append(f"{run.name}: {run.warm_up.failed} of {run.warm_up.requests} requests of the warm-up failed")
    return found
