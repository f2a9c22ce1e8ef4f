"""Sections as files give them: defaults as documented, bounds, unknown keys."""

import math

import msgspec
import pytest

from pointsman.config.resilience import (
    AdmissionSection,
    BreakerSection,
    LimitsSection,
    RetrySection,
    TimeoutsSection,
)


def test_defaults_are_sglangs() -> None:
    retry = RetrySection()
    assert (retry.max_retries, retry.initial_backoff_ms, retry.max_backoff_ms) == (5, 50, 30_000)
    assert (retry.backoff_multiplier, retry.jitter_factor) == (1.5, 0.2)
    assert retry.retryable_status == {408, 429, 500, 502, 503, 504}
    assert (retry.budget_ratio, retry.budget_min_per_s) == (0.2, 10)
    assert TimeoutsSection().total_s == 3600
    breaker = BreakerSection()
    assert (breaker.failure_threshold, breaker.success_threshold, breaker.timeout_s, breaker.window_s) == (
        10,
        3,
        60,
        120,
    )
    admission = AdmissionSection()
    assert (admission.max_concurrent_requests, admission.queue_size, admission.queue_timeout_s) == (0, 100, 60)
    assert admission.queue_timeout_status == 408


def test_a_section_of_a_file() -> None:
    retry = msgspec.convert({"max_retries": 3, "retryable_status": [503, 529], "deadline_s": 10}, RetrySection)
    assert retry == RetrySection(max_retries=3, retryable_status=frozenset({503, 529}), deadline_s=10.0)


def test_a_snapshot_carries_them() -> None:
    retry = RetrySection(retryable_status=frozenset({503}))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(retry), type=RetrySection) == retry


@pytest.mark.parametrize(
    ("section", "mapping"),
    [
        (RetrySection, {"max_retries": -1}),
        (RetrySection, {"max_retries": 101}),
        (RetrySection, {"max_retries": "5"}),
        (RetrySection, {"max_retries": 2.5}),
        (RetrySection, {"backoff_multiplier": 0.5}),
        (RetrySection, {"jitter_factor": 1.5}),
        (RetrySection, {"retryable_status": [200]}),
        (RetrySection, {"retries": 5}),
        (RetrySection, {"budget_ratio": math.nan}),
        (RetrySection, {"initial_backoff_ms": math.inf}),
        (TimeoutsSection, {"total_s": -1}),
        (TimeoutsSection, {"idle_s": math.nan}),
        (LimitsSection, {"priority": "first"}),
        (LimitsSection, {"requests_per_second": -0.1}),
        (BreakerSection, {"failure_threshold": 0}),
        (BreakerSection, {"timeout_s": 0}),
        (BreakerSection, {"failure_rate": 0}),
        (BreakerSection, {"max_ejection_ratio": 1.01}),
        (AdmissionSection, {"queue_timeout_status": 200}),
        (AdmissionSection, {"queue_size": -1}),
        (AdmissionSection, {"ageing_s": math.inf}),
    ],
)
def test_what_does_not_fit_is_named(section: type[msgspec.Struct], mapping: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(mapping, section)


def test_the_path_of_the_key_is_in_the_message() -> None:
    with pytest.raises(msgspec.ValidationError, match=r"\$\.failure_threshold"):
        msgspec.convert({"failure_threshold": 0}, BreakerSection)
