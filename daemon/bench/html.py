"""A report as one HTML page that needs nothing else: style and plots are in it, there is no script."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from pointsman.daemon.bench.histogram import Histogram
from pointsman.daemon.bench.model import Report, Run
from pointsman.daemon.bench.svg import Line, bar_plot, line_plot
from pointsman.daemon.bench.tables import Table, headline, tables

_STYLE = """
:root { --ink: #1c2733; --paper: #fff; --faint: #dfe4ea; --soft: #5c6b7a; --bad: #b3261e;
  --s0: #2166ac; --s1: #d6604d; --s2: #1b7837; --s3: #762a83; --s4: #b8860b; --s5: #00838f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ee; --paper: #14191f; --faint: #323c47; --soft: #9aa8b5;
  --bad: #f2b8b5; --s0: #6cb0f0; --s1: #f4a08f; --s2: #7bcf8f; --s3: #c99ad6; --s4: #e0b84c; --s5: #5fcad4; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1100px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } .soft { color: var(--soft); }
.findings { border-left: 4px solid var(--bad); padding-left: 1rem; } .findings li { color: var(--bad); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--faint); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td { max-width: 40rem; overflow: hidden; text-overflow: ellipsis; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(430px, 1fr)); gap: 1.5rem; }
figure { margin: 0; } figcaption { font-weight: 600; } svg { width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--ink); }
.grid { stroke: var(--faint); } .axis { stroke: var(--soft); fill: none; }
.line { fill: none; stroke-width: 2; } pre { overflow-x: auto; background: var(--faint); padding: .7rem; }
.legend { margin: 0; } .legend span { margin-right: 1rem; } .key { display: inline-block; width: .8em; height: .8em;
  margin-right: .3em; }
"""
_COLOURS = "".join(
    f".line.s{n}{{stroke:var(--s{n})}}.dot.s{n},.bar.s{n}{{fill:var(--s{n})}}.key.s{n}{{background:var(--s{n})}}"
    for n in range(6)
)
_SHOWN = 6
"""Distributions drawn into one plot, at most."""


def html(report: Report) -> str:
    title = f"pointsman bench {report.benchmark_type}"
    configuration = json.dumps(report.configuration, indent=1, ensure_ascii=False)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(headline(report))}</p>',
        _findings(report.findings),
        f'<div class="plots">{"".join(_plots(report))}</div>',
        *map(_table, tables(report)),
        f"<h2>Configuration</h2><pre>{escape(configuration)}</pre>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{_COLOURS}</style></head>\n<body>{''.join(body)}</body></html>\n"
    )


def _findings(findings: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(finding)}</li>" for finding in findings)
    return f'<ul class="findings">{items}</ul>' if items else ""


def _table(table: Table) -> str:
    heads = "".join(f"<th>{escape(head)}</th>" for head in table.heads)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return (
        f'<h2>{escape(table.title)}</h2><div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _plots(report: Report) -> list[str]:
    figures = [
        ("Latency distribution, end to end", _distribution(report.runs, "e2e")),
        ("Latency distribution, first token", _distribution(report.runs, "ttft")),
        ("Time between tokens", _distribution(report.runs, "inter_token")),
        ("Throughput over time", _throughput_timeline(report.runs)),
        ("Latency over time", _latency_timeline(report.runs)),
        ("Throughput against concurrency", _throughput_by_clients(report.runs)),
        ("Latency against concurrency", _latency_by_clients(report.runs)),
        *((f"Answers by worker: {run.name}", _shares(run)) for run in _some(report.runs)),
    ]
    return [f"<figure><figcaption>{escape(name)}</figcaption>{plot}</figure>" for name, plot in figures if plot]


def _some(runs: Sequence[Run]) -> list[Run]:
    """Few enough to be told apart; of many levels some from the first to the last."""
    if len(runs) <= _SHOWN:
        return list(runs)
    return [runs[round(number * (len(runs) - 1) / (_SHOWN - 1))] for number in range(_SHOWN)]


def _distribution(runs: Sequence[Run], measure: str) -> str:
    lines = [
        Line(run.name, cumulative(run.distributions[measure].restore()))
        for run in _some(runs)
        if measure in run.distributions
    ]
    return line_plot(lines, x_label="milliseconds", y_label="percent of the samples", is_log_x=True)


def cumulative(histogram: Histogram) -> list[tuple[float, float]]:
    """(milliseconds, percent of the samples that are not above), one point per bucket."""
    points, seen = [], 0
    for index, count in histogram.buckets():
        seen += count
        upper = min(histogram.bounds(index)[1] - 1, histogram.most)
        points.append((upper / 1e6, 100 * seen / histogram.count))
    return points


def _throughput_timeline(runs: Sequence[Run]) -> str:
    lines = [Line(run.name, [(point.at_s, point.succeeded_rps) for point in run.timeline]) for run in _comparable(runs)]
    lines += [
        Line(f"{run.name} failed", [(point.at_s, point.failed_rps) for point in run.timeline])
        for run in _comparable(runs)
        if run.results.failed
    ]
    return line_plot(lines, x_label="seconds", y_label="requests a second")


def _latency_timeline(runs: Sequence[Run]) -> str:
    shown = _comparable(runs)
    lines = [
        Line(f"{run.name} p50", [(p.at_s, p.e2e_p50_ms) for p in run.timeline if p.succeeded_rps]) for run in shown
    ]
    lines += [
        Line(f"{run.name} p99", [(p.at_s, p.e2e_p99_ms) for p in run.timeline if p.succeeded_rps]) for run in shown
    ]
    return line_plot(lines, x_label="seconds", y_label="milliseconds")


def _comparable(runs: Sequence[Run]) -> list[Run]:
    """Levels came one after the other: over each other they would say nothing."""
    return [] if _levels(runs) else list(runs)[:3]


def _levels(runs: Sequence[Run]) -> list[tuple[int, Run]]:
    """By clients, when every run has another number of them; else none."""
    found = sorted(((run.concurrency, run) for run in runs if run.concurrency is not None), key=lambda pair: pair[0])
    return found if len(found) == len(runs) > 1 and len({clients for clients, _ in found}) == len(found) else []


def _throughput_by_clients(runs: Sequence[Run]) -> str:
    points = [(float(clients), run.results.throughput_rps) for clients, run in _levels(runs)]
    return line_plot([Line("requests/s", points, has_dots=True)], x_label="clients", y_label="requests a second")


def _latency_by_clients(runs: Sequence[Run]) -> str:
    levels = _levels(runs)
    lines = [
        Line("p50", [(float(clients), run.results.e2e_ms.p50) for clients, run in levels], has_dots=True),
        Line("p99", [(float(clients), run.results.e2e_ms.p99) for clients, run in levels], has_dots=True),
    ]
    return line_plot(lines, x_label="clients", y_label="milliseconds")


def _shares(run: Run) -> str:
    total = sum(run.workers.values())
    return bar_plot([(name, 100 * count / total) for name, count in run.workers.items()], unit=" %")
