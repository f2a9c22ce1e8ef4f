"""Settings of resilience: what a profile says (`retry`, `timeouts`, `limits`) and what is one for all (`shared`).

Names, defaults and bounds are here and nowhere else. `msgspec.convert(mapping, RetrySection)` checks one section of a
file and raises msgspec.ValidationError, with the path of the key, when it does not fit. Seconds unless the name says
otherwise; 0 switches a limit or a deadline off where its line says so.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

DAY_S = 86_400.0

Seconds = Annotated[float, Meta(ge=0.0, le=7 * DAY_S)]
SomeSeconds = Annotated[float, Meta(gt=0.0, le=7 * DAY_S)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Rate = Annotated[float, Meta(ge=0.0, le=1e9)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
SomeCount = Annotated[int, Meta(ge=1, le=2**31 - 1)]
ErrorStatus = Annotated[int, Meta(ge=400, le=599)]

PRIORITIES = ("system", "interactive", "default", "bulk")
"""Priority classes, first served first; a class is its index."""
Priority = Literal["system", "interactive", "default", "bulk"]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class RetrySection(Section, frozen=True, kw_only=True):
    """`retry` of a profile; names and defaults of SGLang's `--retry-*` flags."""

    max_retries: Annotated[int, Meta(ge=0, le=100)] = 5
    """Attempts of a request, the first included; 0 and 1 mean no retries (`--disable-retries`)."""
    initial_backoff_ms: Annotated[float, Meta(ge=0.0, le=DAY_S * 1000)] = 50.0
    max_backoff_ms: Annotated[float, Meta(ge=0.0, le=DAY_S * 1000)] = 30_000.0
    """The longest pause, jitter included; a longer Retry-After is not waited for."""
    backoff_multiplier: Annotated[float, Meta(ge=1.0, le=10.0)] = 1.5
    jitter_factor: Share = 0.2
    retryable_status: frozenset[ErrorStatus] = frozenset({408, 429, 500, 502, 503, 504})
    """A reset before the head counts as 502, a timeout as 504. Failed connects are retried whatever stands here."""
    deadline_s: Seconds = 0.0
    """From the request's arrival: no attempt begins later. 0 = only `timeouts.total_s` bounds it."""
    respect_retry_after: bool = True
    """Wait as long as the worker asks, when no other worker can take the request."""
    budget_ratio: Annotated[float, Meta(ge=0.0, le=10.0)] = 0.2
    """Retries that each request pays for."""
    budget_min_per_s: Rate = 10.0
    """Retries a second that are allowed however few requests there are."""


class TimeoutsSection(Section, frozen=True, kw_only=True):
    """`timeouts` of a profile; 0 = no such deadline."""

    connect_s: Seconds = 5.0
    """For a connection to a worker."""
    first_token_s: Seconds = 600.0
    """Streams only: from the request being sent to the first byte of the answer's body, per attempt."""
    idle_s: Seconds = 300.0
    """Between two reads of an answer that has begun."""
    total_s: Seconds = 3600.0
    """From the arrival of the request to the end of the answer, all attempts included."""
    client_body_s: Seconds = 30.0
    """Between two reads of the request's body."""
    client_read_s: Seconds = 60.0
    """That a client may leave what is sent to it unread."""
    ping_s: Seconds = 0.0
    """Streams only: a comment goes to the client so often until the first event. The first one begins the answer: from
    then on a failed attempt cannot be followed by another one."""


class LimitsSection(Section, frozen=True, kw_only=True):
    """`limits` of a profile; 0 = no such limit. Over a limit: 429 with Retry-After."""

    requests_per_second: Rate = 0.0
    """Of all requests under the profile; below 1: one in so many seconds. (`requestsPerSecond` in AIBrix.)"""
    requests_burst: Count = 0
    """Requests at once; 0 = what a second brings, at least one."""
    key_requests_per_minute: Rate = 0.0
    """Of one API key, over all profiles."""
    key_tokens_per_minute: Rate = 0.0
    """Of one API key, over all profiles: prompt and output tokens as they turn out."""
    priority: Priority = "default"
    """The class in which requests of the profile wait for admission."""


class BreakerSection(Section, frozen=True, kw_only=True):
    """`shared.breaker`; defaults of SGLang's `--cb-*` flags."""

    enabled: bool = True
    """False: `--disable-circuit-breaker`."""
    failure_threshold: SomeCount = 10
    """Failures in a row that open it."""
    success_threshold: SomeCount = 3
    """Probes in a row that close it."""
    timeout_s: SomeSeconds = 60.0
    """From opening to the first probe (`--cb-timeout-duration-secs`)."""
    window_s: SomeSeconds = 120.0
    """That the failure rate is taken over (`--cb-window-duration-secs`, which here does something)."""
    failure_rate: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.5
    """Share of failures in the window that opens it."""
    min_requests: SomeCount = 20
    """In the window, before its rate says anything."""
    probe_lease_s: SomeSeconds = 120.0
    """After which a probe without a result is given up and the next one may go."""
    max_ejection_ratio: Share = 0.5
    """Of the workers that could take a request, if two or more could: so many may be kept out by their breakers."""


class AdmissionSection(Section, frozen=True, kw_only=True):
    """`shared.admission`."""

    max_concurrent_requests: Count = 0
    """Over all shards, each held until its answer ends; 0 = no limit."""
    queue_size: Count = 100
    """Requests that wait for one of these, over all shards; more get 429."""
    queue_timeout_s: SomeSeconds = 60.0
    queue_timeout_status: Annotated[int, Meta(ge=400, le=599)] = 408
    """What a request gets that waited too long."""
    retry_after_s: Annotated[float, Meta(ge=0.0, le=DAY_S)] = 2.0
    """Retry-After of both answers."""
    ageing_s: Seconds = 10.0
    """Head start of a class over the next, and of a user without recent service over one who had all of it."""
    half_life_s: SomeSeconds = 60.0
    """In which tokens served to a user count half."""


class HealthSection(Section, frozen=True, kw_only=True):
    """`shared.health`: how workers are probed; where it says nothing, the settings `health_*`."""

    interval_s: Annotated[float, Meta(ge=0.1, le=DAY_S)] | None = None
    """Between probes of a worker that is up."""
    down_interval_s: Annotated[float, Meta(ge=0.1, le=DAY_S)] | None = None
    """Between probes of one that is down."""
    failure_threshold: Annotated[int, Meta(ge=1, le=1000)] | None = None
    """Failed probes in a row that take a worker out."""
    success_threshold: Annotated[int, Meta(ge=1, le=1000)] | None = None
    """Good probes in a row that take it back."""
