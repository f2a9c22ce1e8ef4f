"""Slices of time, steadiness, and what is counted where."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.daemon.bench import summary
from pointsman.daemon.bench.answer import Answer
from pointsman.daemon.bench.histogram import Histogram
from pointsman.daemon.bench.outcome import OK, Verdict
from pointsman.daemon.bench.steady import judge_steadiness
from pointsman.daemon.bench.tally import Recorder, Tally
from pointsman.daemon.bench.timeline import MOST_SLICES, Timeline

MS = 1_000_000
S = 1000 * MS


@given(st.lists(st.integers(0, 10**9), max_size=300))
def test_a_timeline_keeps_all_and_stays_small(times: list[int]) -> None:
    timeline = Timeline(origin_ns=1000, slice_ns=50)
    for time in times:
        timeline.at(1000 + time).succeeded += 1
    assert sum(one.succeeded for one in timeline.slices) == len(times)
    assert len(timeline.slices) <= MOST_SLICES
    assert not times or len(timeline.slices) == max(times) // timeline.slice_ns + 1


def test_a_time_before_the_origin_is_in_the_first_slice() -> None:
    timeline = Timeline(1000, 50)
    assert timeline.at(10) is timeline.at(1000)


def counts(rate: float, slices: int, seed: int) -> list[float]:
    """Poisson."""
    random, found = Random(seed), []
    for _ in range(slices):
        count, at = 0, random.expovariate(rate)
        while at < 1:
            count, at = count + 1, at + random.expovariate(rate)
        found.append(float(count))
    return found


def test_chance_is_steady() -> None:
    judged = [judge_steadiness("x", counts(30, 20, seed), are_counts=True) for seed in range(40)]
    assert sum(one.is_steady is True for one in judged) >= 36


@pytest.mark.parametrize("sign", [1, -1])
def test_a_drift_is_seen_and_named(sign: int) -> None:
    values = [100 + sign * number + (number % 3) for number in range(20)]
    judged = judge_steadiness("latency", values)
    assert judged.is_steady is False
    assert judged.reason.startswith("latency rises" if sign > 0 else "latency falls")


def test_jumps_are_seen() -> None:
    judged = judge_steadiness("x", [10.0, 100.0] * 10)
    assert judged.is_steady is False
    assert "varies" in judged.reason


def test_few_slices_tell_nothing() -> None:
    assert judge_steadiness("x", [1.0, 100.0, 1.0]).is_steady is None
    assert judge_steadiness("x", [0.0] * 20).is_steady is False


def ended(recorder: Recorder, intended: int, end: int, kind: str = OK, tokens: int | None = None) -> None:
    answer = Answer()
    answer.expect(False, Histogram())
    recorder.add(Verdict(kind, completion_tokens=tokens), answer, intended, end)


def test_warm_up_is_apart_by_the_intended_start() -> None:
    recorder = Recorder(10 * S, MS)
    ended(recorder, 9 * S, 11 * S)
    ended(recorder, 10 * S, 12 * S)
    ended(recorder, 10 * S, 12 * S, "http_500")
    assert (recorder.warm_up.requests, recorder.measured.requests, recorder.measured.failed) == (1, 2, 1)
    assert recorder.measured.e2e.count == 1
    assert recorder.ended_since == 3


def test_throughput_is_what_ended_in_the_window() -> None:
    """Clients that are all busy at its begin and at its end: 10 a second end, whatever began when."""
    recorder = Recorder(10 * S, MS)
    for number in range(200):
        end = 9 * S + number * 100 * MS
        if end > 20 * S:
            recorder.close_window(20 * S)
        ended(recorder, end - S, end, tokens=3)
    succeeded, tokens = summary.throughput([recorder])
    assert succeeded == pytest.approx(10, rel=0.02)
    assert tokens == pytest.approx(30, rel=0.02)


def test_throughput_of_a_short_burst_goes_to_the_last_end() -> None:
    recorder = Recorder(10 * S, MS)
    recorder.close_window(10 * S + MS)
    for _ in range(4):
        ended(recorder, 10 * S, 12 * S)
    assert summary.throughput([recorder])[0] == pytest.approx(2.0)


def test_nothing_measured_is_no_division_by_zero() -> None:
    recorder = Recorder(10 * S, MS)
    assert summary.throughput([recorder]) == (0.0, 0.0)
    assert summary.results(Tally(), 0.0, 0.0).success_rate == 0.0
    assert summary.steadiness(recorder).is_steady is None


def test_latency_counts_from_the_intended_start_and_tpot_from_the_first_token() -> None:
    tally = Tally()
    answer = Answer()
    answer.expect(True, tally.gaps)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    event = b'data: {"choices":[{"text":"x"}]}\n\n'
    answer.feed(head + event, 130 * MS)
    answer.feed(event, 150 * MS)
    answer.feed(event, 170 * MS)
    assert tally.add(Verdict(OK, completion_tokens=5), answer, 100 * MS, 180 * MS) == 5
    assert (tally.e2e.most, tally.ttft.most, tally.tpot.most) == (80 * MS, 30 * MS, 10 * MS)


def test_overhead_is_the_median_of_the_rounds() -> None:
    def histogram(value: int) -> Histogram:
        made = Histogram()
        made.record(value * MS)
        return made

    pairs = [(histogram(5), histogram(1)), (histogram(9), histogram(2)), (histogram(4), histogram(2))]
    pairs.append((Histogram(), histogram(1)))  # a round without an answer
    p50 = summary.overhead("gateway", "direct", "e2e", pairs)[0]
    assert (p50.median_ms, p50.least_ms, p50.most_ms) == pytest.approx((4, 2, 7), rel=0.02)
