"""The tables of a report, as rows of text: what Markdown, HTML and the terminal show alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pointsman.daemon.bench.model import Latency, Report, Run
from pointsman.daemon.bench.svg import number_text

NONE = "-"


@dataclass(slots=True, frozen=True)
class Table:
    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def headline(report: Report) -> str:
    """When, and on what."""
    system = report.system_info
    machine = f"{system.os}, {system.cpu_count} x {system.cpu_model or 'CPU'}"
    times = f"{report.start_time} to {report.end_time} ({report.duration_secs:.1f} s)"
    return f"{times}, pointsman {system.pointsman_version}, {machine}"


def tables(report: Report) -> list[Table]:
    """Those that have rows."""
    found = [
        _outcome(report),
        _latencies(report),
        _overheads(report),
        _costs(report),
        _errors(report),
        _workers(report),
    ]
    return [table for table in found if table.rows]


def _load(run: Run) -> str:
    if run.concurrency is not None:
        return f"{run.concurrency} clients"
    return "as recorded" if run.rate is None else f"{number_text(run.rate)}/s"


def _outcome(report: Report) -> Table:
    heads = ("run", "load", "requests", "success", "requests/s", "tokens/s", "prompt tokens", "cached", "steady")
    rows = [
        (
            run.name,
            _load(run),
            f"{run.results.requests:,}",
            f"{run.results.success_rate:.2%}",
            number_text(run.results.throughput_rps),
            number_text(run.results.output_tokens_per_s),
            f"{run.results.prompt_tokens:,}",
            NONE if run.results.cached_share is None else f"{run.results.cached_share:.1%}",
            {True: "yes", False: "NO", None: NONE}[run.steady.is_steady],
        )
        for run in report.runs
    ]
    return Table("Outcome", heads, rows)


def _latencies(report: Report) -> Table:
    heads = ("run", "ms", "samples", "mean", "p50", "p75", "p90", "p95", "p99", "p99.9", "max")
    rows = []
    for run in report.runs:
        measures = (
            ("end to end", run.results.e2e_ms),
            ("first token", run.results.ttft_ms),
            ("between tokens", run.results.inter_token_ms),
            ("time per output token", run.results.tpot_ms),
        )
        rows += [_latency(run.name, name, latency) for name, latency in measures if latency.count]
    return Table("Latency in milliseconds, from the intended start", heads, rows)


def _latency(run: str, name: str, one: Latency) -> tuple[str, ...]:
    figures = (one.mean, one.p50, one.p75, one.p90, one.p95, one.p99, one.p999, one.max)
    return (run, name, f"{one.count:,}", *map(number_text, figures))


def _overheads(report: Report) -> Table:
    rows = [
        (
            f"{one.name} over {one.baseline}",
            {"e2e": "end to end", "ttft": "first token"}[one.measure],
            one.quantile,
            number_text(one.median_ms),
            f"{number_text(one.least_ms)} … {number_text(one.most_ms)}",
        )
        for one in report.overheads
    ]
    return Table(
        "Overhead in milliseconds: median over the rounds", ("of", "measure", "quantile", "ms", "rounds"), rows
    )


def _costs(report: Report) -> Table:
    heads = ("run", "server CPU µs/request", "µs/event", "cores", "processes", "PSS MiB",
             "generator CPU µs/request", "its cores", "lag p99 ms")  # fmt: skip
    rows = []
    for run in report.runs:
        gateway = run.gateway
        theirs = (NONE,) * 5
        if gateway is not None:
            per_event = NONE if gateway.cpu_us_per_event is None else number_text(gateway.cpu_us_per_event)
            theirs = (
                number_text(gateway.cpu_us_per_request),
                per_event,
                number_text(gateway.cpu_share),
                str(gateway.processes),
                number_text(gateway.pss_mib),
            )
        mine = run.generator
        rows.append((run.name, *theirs, number_text(mine.cpu_us_per_request), number_text(mine.cpu_share),
                     number_text(mine.lag_p99_ms)))  # fmt: skip
    return Table("Cost", heads, rows)


def _errors(report: Report) -> Table:
    rows = [
        (run.name, kind, f"{count:,}", run.results.error_details.get(kind, ""))
        for run in report.runs
        for kind, count in run.results.errors.items()
    ]
    return Table("Errors", ("run", "class", "requests", "the first one"), rows)


def _workers(report: Report) -> Table:
    rows = []
    for run in report.runs:
        total = sum(run.workers.values()) or 1
        rows += [(run.name, name, f"{count:,}", f"{count / total:.1%}") for name, count in run.workers.items()]
    return Table("Answers by worker", ("run", "worker", "answers", "share"), rows)
