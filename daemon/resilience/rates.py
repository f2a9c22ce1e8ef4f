"""Rates: requests per second of a profile, requests and tokens per minute of an API key.

Theory of operation. A rate is one word, the *theoretical arrival time* of the generic cell rate algorithm (ITU-T
I.371): the moment at which everything taken so far is paid for at the rate. What lies ahead of `now`, times the
rate, is what is taken of the burst; a time in the past, 0 included, is a full bucket. Equal to a token bucket,
without a timer and without a second word.

* More than the whole burst at once is let pass when the bucket is full, and paid for afterwards: a long prompt
  waits, but does not starve.
* Tokens are known only afterwards: an estimate is taken before, the difference corrected at the end. The rate may
  get into debt, then nothing passes until it is paid.
* What needs several rates takes from all or from none (`KeyRates.take`).
"""

from __future__ import annotations

from dataclasses import dataclass

from pointsman.config.resilience import LimitsSection
from pointsman.daemon.resilience.table import Table
from pointsman.daemon.resilience.words import Words

_ROUNDING_S = 1e-9

WORDS = 1
"""Of a `RequestRate`."""

# of a row of KeyRates, after its key: doubles
REQUESTS_PAID_AT, TOKENS_PAID_AT = range(2)


@dataclass(frozen=True, slots=True)
class Rate:
    """`per_s` units a second, `burst` of them at once; per_s 0 = no limit."""

    per_s: float
    burst: float

    def wait_s(self, paid_at: float, now: float, cost: float) -> float:
        """How long until `cost` can be taken; 0 = now."""
        if not self.per_s:
            return 0.0
        # The earliest moment at which it fits into the burst. What is larger than the burst needs all of it.
        earliest = paid_at - (self.burst - min(cost, self.burst)) / self.per_s
        wait = earliest - now
        return wait if wait > _ROUNDING_S else 0.0

    def take(self, paid_at: float, now: float, cost: float) -> float:
        """The new `paid_at`; a negative cost gives back, at most to a full bucket."""
        if not self.per_s:
            return paid_at
        return max(max(paid_at, now) + cost / self.per_s, 0.0)


@dataclass(frozen=True, slots=True)
class RequestRate:
    """`requests_per_second` of one profile, in one word."""

    section: LimitsSection

    @property
    def rate(self) -> Rate:
        per_s = self.section.requests_per_second
        return Rate(per_s, self.section.requests_burst or max(per_s, 1.0))

    def take(self, words: Words, index: int, now: float) -> float:
        """0: taken. Otherwise seconds for Retry-After, and nothing is taken."""
        rate = self.rate
        paid_at = words.get_real(index)
        wait = rate.wait_s(paid_at, now, 1.0)
        if not wait:
            words.set_real(index, rate.take(paid_at, now, 1.0))
        return wait


@dataclass(frozen=True, slots=True)
class KeyRates:
    """Rates of API keys, in a table. Bursts are what a minute brings."""

    table: Table

    def take(self, words: Words, key: int, limits: LimitsSection, now: float, tokens: float) -> float:
        """Take one request and the estimated tokens; `key` is a 64-bit hash.

        0: taken. Otherwise seconds for Retry-After, and nothing is taken.
        """
        requests, in_tokens = key_rates(limits)
        if not requests.per_s and not in_tokens.per_s:
            return 0.0
        index = self.table.claim(words, key, lambda row: _last_paid_at(words, row))
        requests_paid_at = words.get_real(index + REQUESTS_PAID_AT)
        tokens_paid_at = words.get_real(index + TOKENS_PAID_AT)
        wait = max(requests.wait_s(requests_paid_at, now, 1.0), in_tokens.wait_s(tokens_paid_at, now, tokens))
        if not wait:
            words.set_real(index + REQUESTS_PAID_AT, requests.take(requests_paid_at, now, 1.0))
            words.set_real(index + TOKENS_PAID_AT, in_tokens.take(tokens_paid_at, now, tokens))
        return wait

    def correct(self, words: Words, key: int, limits: LimitsSection, now: float, more_tokens: float) -> None:
        """At the end of a request: real tokens minus the estimate. Nothing happens for a key that was forgotten."""
        _, in_tokens = key_rates(limits)
        index = self.table.find(words, key)
        if index is not None:
            paid_at = words.get_real(index + TOKENS_PAID_AT)
            words.set_real(index + TOKENS_PAID_AT, in_tokens.take(paid_at, now, more_tokens))


def key_rates(limits: LimitsSection) -> tuple[Rate, Rate]:
    """(requests, tokens)"""
    requests, tokens = limits.key_requests_per_minute, limits.key_tokens_per_minute
    return Rate(requests / 60.0, max(requests, 1.0)), Rate(tokens / 60.0, max(tokens, 1.0))


def _last_paid_at(words: Words, row: int) -> float:
    return max(words.get_real(row + REQUESTS_PAID_AT), words.get_real(row + TOKENS_PAID_AT))
