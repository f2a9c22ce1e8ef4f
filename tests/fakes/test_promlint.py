"""The rules find what they are for."""

from __future__ import annotations

import pytest

from tests.fakes.promlint import problems


def test_a_clean_page() -> None:
    page = (
        '# HELP a_requests_total R.\n# TYPE a_requests_total counter\na_requests_total{code="200"} 1\n'
        "# HELP a_size_bytes S.\n# TYPE a_size_bytes gauge\na_size_bytes 1\n"
        '# HELP a_wait_seconds W.\n# TYPE a_wait_seconds histogram\na_wait_seconds_bucket{le="+Inf"} 1\n'
        "a_wait_seconds_count 1\na_wait_seconds_sum 1\n"
    )
    assert problems(page) == []


@pytest.mark.parametrize(
    ("kind", "name", "labels", "problem"),
    [
        ("gauge", "a_total", "", "a_total: counters, and only they, end in _total"),
        ("gauge", "a_count", "", "a_count: has a suffix of histograms"),
        ("gauge", "a", '{le="1"}', "a: has a label of histograms"),
        ("gauge", "a:b", "", "a:b: colons are for recording rules"),
        ("gauge", "aB", "", "aB: is not in snake_case"),
        ("gauge", "a", '{oneTwo="1"}', "a: is not in snake_case"),
        ("gauge", "a_milliseconds", "", "a_milliseconds: contains the unit milliseconds, which is no base unit"),
        ("gauge", "a_ms", "", "a_ms: contains the abbreviated unit ms"),
        ("gauge", "a_gauge", "", "a_gauge: contains its type, gauge"),
        ("gauge", "a_seconds_left", "", "a_seconds_left: the unit comes last"),
    ],
)
def test_a_bad_name(kind: str, name: str, labels: str, problem: str) -> None:
    assert problem in problems(f"# HELP {name} H.\n# TYPE {name} {kind}\n{name}{labels} 1\n")


def test_duplicates_and_missing_descriptions() -> None:
    assert "a: no help text" in problems("# TYPE a gauge\na 1\n")
    assert "a: has no type" in problems("# HELP a H.\na 1\n")
    assert any("not unique" in problem for problem in problems("# HELP a H.\n# TYPE a gauge\na 1\na 2\n"))
