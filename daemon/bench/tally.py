"""Adds up what became of requests. Times in nanoseconds of one monotonic clock."""

from __future__ import annotations

from collections import Counter

from pointsman.daemon.bench.answer import Answer
from pointsman.daemon.bench.histogram import Histogram
from pointsman.daemon.bench.outcome import OK, Verdict
from pointsman.daemon.bench.timeline import Timeline


class Tally:
    """Latencies are those of requests that succeeded, from the intended start."""

    def __init__(self) -> None:
        self.succeeded = 0
        self.errors: Counter[str] = Counter()
        self.details: dict[str, str] = {}
        """the first of each class of error"""
        self.e2e = Histogram()
        self.ttft = Histogram()
        self.gaps = Histogram()
        """between the tokens of streams, failed ones too"""
        self.tpot = Histogram()
        self.lag = Histogram()
        """from the intended start to the moment when the request was handed to its connection"""
        self.events = 0
        self.received_bytes = 0
        self.told = 0
        """answers that told their tokens"""
        self.prompt_tokens = self.completion_tokens = self.cached_tokens = 0
        self.workers: Counter[str] = Counter()
        self.last_end_ns = 0

    @property
    def failed(self) -> int:
        return self.errors.total()

    @property
    def requests(self) -> int:
        return self.succeeded + self.failed

    def add(self, verdict: Verdict, answer: Answer, intended_ns: int, end_ns: int) -> int:
        """Returns the tokens of the answer: as told, else one per event with text."""
        self.last_end_ns = max(self.last_end_ns, end_ns)
        self.events += answer.events
        self.received_bytes += answer.received
        if answer.worker is not None:
            self.workers[answer.worker.decode(errors="replace")] += 1
        if verdict.kind != OK:
            self.errors[verdict.kind] += 1
            self.details.setdefault(verdict.kind, verdict.detail)
            return 0
        self.succeeded += 1
        self.e2e.record(end_ns - intended_ns)
        tokens = answer.texts if verdict.completion_tokens is None else verdict.completion_tokens
        self.completion_tokens += tokens
        if verdict.prompt_tokens is not None:
            self.told += 1
            self.prompt_tokens += verdict.prompt_tokens
            self.cached_tokens += verdict.cached_tokens or 0
        if answer.texts:
            self.ttft.record(answer.first_text_ns - intended_ns)
            if tokens > 1:
                self.tpot.record((answer.last_text_ns - answer.first_text_ns) // (tokens - 1))
        return tokens

    def merge(self, other: Tally) -> None:
        self.succeeded += other.succeeded
        self.errors.update(other.errors)
        self.details = other.details | self.details
        for mine, theirs in (
            (self.e2e, other.e2e),
            (self.ttft, other.ttft),
            (self.gaps, other.gaps),
            (self.tpot, other.tpot),
            (self.lag, other.lag),
        ):
            mine.merge(theirs)
        self.events += other.events
        self.received_bytes += other.received_bytes
        self.told += other.told
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.cached_tokens += other.cached_tokens
        self.workers.update(other.workers)
        self.last_end_ns = max(self.last_end_ns, other.last_end_ns)


class Recorder:
    """Of one load: what was to start before `measure_from_ns` is warm-up, the rest is measured.

    The *window* is the time from there until the load began its last request. Throughput is what ended in it, the end
    of warm-up requests included: so neither the filling at the begin nor the emptying at the end counts.
    """

    def __init__(self, measure_from_ns: int, slice_ns: int) -> None:
        self.measure_from_ns = measure_from_ns
        self.warm_up = Tally()
        self.measured = Tally()
        self.timeline = Timeline(measure_from_ns, slice_ns)
        self.window_end_ns: int | None = None
        self.window_succeeded = 0
        self.window_tokens = 0
        self.ended_since = 0
        """requests that ended after `measure_from_ns`, whatever became of them: what the gateway's CPU time went to"""

    def tally_of(self, intended_ns: int) -> Tally:
        return self.measured if intended_ns >= self.measure_from_ns else self.warm_up

    def add(self, verdict: Verdict, answer: Answer, intended_ns: int, end_ns: int) -> None:
        tally = self.tally_of(intended_ns)
        tokens = tally.add(verdict, answer, intended_ns, end_ns)
        if end_ns < self.measure_from_ns:
            return
        self.ended_since += 1
        part = self.timeline.at(end_ns)
        if verdict.kind == OK:
            part.succeeded += 1
            part.tokens += tokens
            part.e2e.record(end_ns - intended_ns)
            if answer.texts:
                part.ttft.record(answer.first_text_ns - intended_ns)
            if self.window_end_ns is None or end_ns <= self.window_end_ns:
                self.window_succeeded += 1
                self.window_tokens += tokens
        else:
            part.failed += 1

    def close_window(self, now_ns: int) -> None:
        """No request begins any more."""
        if self.window_end_ns is None:
            self.window_end_ns = max(now_ns, self.measure_from_ns)
