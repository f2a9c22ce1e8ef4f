"""Reports come back from their file, show everything, and let nothing that a server answered out of its place."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.bench import diff
from pointsman.daemon.bench.files import write_report
from pointsman.daemon.bench.histogram import Histogram
from pointsman.daemon.bench.html import cumulative, html
from pointsman.daemon.bench.markdown import markdown
from pointsman.daemon.bench.model import (
    Distribution,
    GatewayCost,
    GeneratorCost,
    NoReport,
    Overhead,
    Point,
    Report,
    Run,
    Steady,
    System,
    WarmUp,
    read_report,
)
from pointsman.daemon.bench.summary import distributions, findings, results
from pointsman.daemon.bench.svg import HEIGHT, WIDTH, Line, bar_plot, line_plot, number_text
from pointsman.daemon.bench.tally import Tally

HOSTILE = '<script>alert("x")</script> | \x1b[31m\n'


def tally(latency_ms: float, count: int = 100, errors: int = 0) -> Tally:
    made = Tally()
    for number in range(count):
        made.e2e.record(int((latency_ms + number / 100) * 1e6))
        made.ttft.record(int(latency_ms * 5e5))
    made.succeeded = count
    if errors:
        made.errors["http_503"] = errors
        made.details["http_503"] = HOSTILE
    made.workers.update({"http://w:1": count - 1, HOSTILE: 1})
    return made


def run(name: str = "basic", *, latency_ms: float = 10.0, rps: float = 100.0, errors: int = 0, **fields: Any) -> Run:
    one = tally(latency_ms, errors=errors)
    defaults: dict[str, Any] = {
        "name": name,
        "url": "http://x:1",
        "concurrency": 4,
        "rate": None,
        "start_time": "2026-01-31T12:34:56.000+00:00",
        "end_time": "2026-01-31T12:34:58.000+00:00",
        "duration_secs": 2.0,
        "warm_up": WarmUp(10, 0, 1.0),
        "results": results(one, rps, 3 * rps),
        "steady": Steady(True, []),
        "workers": dict(one.workers),
        "connections": 4,
        "generator": GeneratorCost(20.0, None, 0.1, 0.01, 0.02, 0.05),
        "gateway": GatewayCost(1, 3, 90.0, None, 0.4, 80.0),
        "timeline": [Point(number / 10, rps + number % 3, 0.0, 0.0, latency_ms, 12.0, 5.0) for number in range(20)],
        "distributions": distributions(one),
    }
    return Run(**(defaults | fields))


def report(*runs: Run, **fields: Any) -> Report:
    defaults: dict[str, Any] = {
        "format": 1,
        "benchmark_type": "basic",
        "start_time": "2026-01-31T12:34:56.000+00:00",
        "end_time": "2026-01-31T12:34:59.000+00:00",
        "duration_secs": 3.0,
        "is_interrupted": False,
        "configuration": {"concurrency": 4, "model": HOSTILE},
        "runs": list(runs) or [run()],
        "overheads": [Overhead("gateway", "direct", "e2e", "p50", 1.5, 1.0, 2.0)],
        "findings": [],
        "system_info": System("Linux", "3.11", "1.0", 2, "cpu"),
    }
    return Report(**(defaults | fields))


def test_a_report_comes_back_from_its_file(tmp_path: Path) -> None:
    made = report(run(errors=3))
    paths = write_report(made, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == [f"basic_20260131_123456.{kind}" for kind in ("json", "md", "html")]
    assert read_report(paths[0]) == made
    assert not list(paths[0].parent.glob("*.part"))


def test_a_second_report_replaces_nothing(tmp_path: Path) -> None:
    first, *_ = write_report(report(), tmp_path)
    (second,) = write_report(report(), tmp_path, json_only=True)
    assert (first.name, second.name) == ("basic_20260131_123456.json", "basic_20260131_123456_2.json")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": 1}'])
def test_other_files_are_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(NoReport, match=r"x\.json"):
        read_report(path)
    with pytest.raises(NoReport, match="No such file"):
        read_report(tmp_path / "none.json")


def test_a_report_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(msgspec.json.encode(report(format=99)))
    with pytest.raises(NoReport, match="format 99"):
        read_report(path)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action")]


def test_the_page_is_whole_without_anything_else_and_lets_nothing_through() -> None:
    text = html(report(run(errors=3), findings=[HOSTILE]))
    page = _Page()
    page.feed(text)
    assert "script" not in page.tags
    assert page.links == []
    assert "@import" not in text and "url(" not in text
    assert page.tags.count("svg") == 5  # two distributions, two timelines, workers
    assert "<script>" not in text


def test_levels_are_drawn_against_their_clients() -> None:
    levels = [run(f"c={clients}", concurrency=clients, rps=clients * 10.0) for clients in (4, 8, 12)]
    text = html(report(*levels))
    assert "Throughput against concurrency" in text
    assert "Throughput over time" not in text
    assert "Throughput against concurrency" not in html(report(run("direct"), run("gateway")))


def test_markdown_tables_hold_together() -> None:
    text = markdown(report(run(errors=3)))
    assert "\x1b" not in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(columns) == 1, block
    assert "| basic | http_503 | 3 |" in text


@given(
    st.lists(st.tuples(st.floats(allow_nan=True, allow_infinity=True), st.floats(0, 1e12)), max_size=20), st.booleans()
)
def test_lines_stay_within_their_plot(points: list[tuple[float, float]], is_log_x: bool) -> None:
    points = [(x, y) for x, y in points if not abs(x) > 1e12]
    text = line_plot([Line("x", sorted(points), has_dots=True)], x_label="x", y_label="y", is_log_x=is_log_x)
    for x, y in re.findall(r'cx="([^"]*)" cy="([^"]*)"', text):
        assert -1 <= float(x) <= WIDTH + 1
        assert -1 <= float(y) <= HEIGHT + 1


def test_bars() -> None:
    assert bar_plot([]) == ""
    assert bar_plot([("<w>", 0.0)]).count("&lt;w&gt;") == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.5, "1,234"), (12.345, "12.3"), (0.00123, "0.00123"), (10.0, "10"), (-0.5, "-0.5")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number_text(value) == text


def test_the_distribution_rises_to_all() -> None:
    histogram = Histogram()
    for value in (1_000_000, 2_000_000, 50_000_000):
        histogram.record(value)
    points = cumulative(histogram)
    assert points == sorted(points)
    assert points[-1] == (50.0, 100.0)


def test_what_to_know_is_said() -> None:
    said = findings(
        run(
            steady=Steady(False, ["throughput falls"]),
            generator=GeneratorCost(20.0, None, 0.97, 0.0, 30.0, 40.0),
            warm_up=WarmUp(10, 2, 1.0),
        )
    )
    assert len(said) == 4
    assert findings(run()) == []


def test_diff_tells_better_from_worse() -> None:
    changes = diff.compare(report(run(latency_ms=10, rps=100)), report(run(latency_ms=20, rps=150)))
    found = {change.measure: change for change in changes}
    assert found["throughput"].worsening == pytest.approx(-0.5)
    assert found["end to end p50"].worsening > 0.5
    worst = diff.worst(changes)
    assert worst is not None
    assert worst.measure.startswith(("end to end", "first token"))
    assert diff.worst(diff.compare(report(), report())) is None


def test_diff_takes_noise_for_noise() -> None:
    """Slices of 100 to 102 requests a second: 100.5 against 100 is nothing."""
    changes = diff.compare(report(run(rps=100)), report(run(rps=100.2)))
    assert next(change for change in changes if change.measure == "throughput").is_noise
    changes = diff.compare(report(run(rps=100)), report(run(rps=90)))
    assert not next(change for change in changes if change.measure == "throughput").is_noise


def test_diff_names_what_was_not_alike() -> None:
    other = report(run("c=8"), run("c=4"), configuration={"concurrency": 8}, benchmark_type="progressive")
    said = diff.differences(report(), other)
    assert "basic against progressive" in said
    assert "concurrency: 4 against 8" in said
    assert "only one of them has the run c=8" in said
    assert diff.compare(report(), other) == []


def test_diff_pairs_runs_by_name() -> None:
    before = report(run("direct", rps=10), run("gateway", rps=20))
    after = report(run("gateway", rps=40), run("direct", rps=10))
    ratios = {change.run: change.change for change in diff.compare(before, after) if change.measure == "throughput"}
    assert ratios == {"direct": 0.0, "gateway": 1.0}


def test_a_distribution_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="bucket"):
        Distribution(7, 1, 1, 1, [(1 << 30, 1)]).restore()
