"""How long a prefill takes, learned from the first tokens that pass by.

    seconds(new, context) = base + per_token * new + per_product * new * (context + new / 2)

`new` are the tokens to compute, `context` the cached ones before them: projections cost per token, attention per
pair. Source: the step model of vLLM-like engines (scripts/simulated_engine/timing.py); the two slopes are found by
recursive least squares with forgetting, so they follow another model or GPU within some hundred requests.
"""

from __future__ import annotations

from math import isfinite

_TOKENS = 1e3
_PAIRS = 1e7
"""Scales under which both slopes are of the order of one."""
_FORGETTING = 0.999
_MOST_DOUBT = 1.0
_LEAST_SLOPE = 1e-4
"""Of a thousand tokens: no engine computes ten million tokens in a second."""


class CostModel:
    """Starts at an 8B model on a recent GPU; every guess serves, as it is corrected by what is seen."""

    __slots__ = ("_p00", "_p01", "_p11", "_per_pairs", "_per_tokens", "_slope_pairs", "_slope_tokens", "base_s", "seen")

    def __init__(self, *, base_s: float = 0.001, token_s: float = 50e-6, pair_s: float = 2e-9) -> None:
        self.base_s = base_s
        self.seen = 0
        # What least squares says, and what is believed of it: noise may make a slope negative, time is not.
        self._slope_tokens = self._per_tokens = token_s * _TOKENS
        self._slope_pairs = self._per_pairs = pair_s * _PAIRS
        self._p00, self._p01, self._p11 = 1.0, 0.0, 1.0

    @property
    def token_s(self) -> float:
        return self._per_tokens / _TOKENS

    @property
    def pair_s(self) -> float:
        return self._per_pairs / _PAIRS

    def seconds(self, new: float, context: float) -> float:
        """Predicted seconds of computing `new` tokens after `context` cached ones."""
        pairs = new * (context + new / 2)
        return self.base_s + self._per_tokens * (new / _TOKENS) + self._per_pairs * (pairs / _PAIRS)

    def learn(self, new: float, context: float, seconds: float) -> None:
        """`seconds` went by between the moment this prefill was the first in line and its first token."""
        if not isfinite(seconds) or seconds < 0 or new <= 0:
            return
        x0, x1 = new / _TOKENS, new * (context + new / 2) / _PAIRS
        g0, g1 = self._p00 * x0 + self._p01 * x1, self._p01 * x0 + self._p11 * x1
        scale = _FORGETTING + x0 * g0 + x1 * g1
        k0, k1 = g0 / scale, g1 / scale
        error = seconds - self.base_s - self._slope_tokens * x0 - self._slope_pairs * x1
        self._slope_tokens += k0 * error
        self._slope_pairs += k1 * error
        self._per_tokens = max(self._slope_tokens, _LEAST_SLOPE)
        self._per_pairs = max(self._slope_pairs, 0.0)
        # Without news in one direction, forgetting would let the doubt about it grow for ever.
        forgetting = _FORGETTING if self._p00 + self._p11 < _MOST_DOUBT else 1.0
        self._p00 = (self._p00 - k0 * g0) / forgetting
        self._p01 = (self._p01 - k0 * g1) / forgetting
        self._p11 = (self._p11 - k1 * g1) / forgetting
        self.seen += 1


class Smoothed:
    """A mean that is exact at first and forgets later: weight 1/n, never below `least_weight`."""

    __slots__ = ("_least_weight", "seen", "value")

    def __init__(self, guess: float, least_weight: float = 0.01) -> None:
        self.value = guess
        self.seen = 1
        self._least_weight = least_weight

    def add(self, sample: float) -> None:
        self.seen += 1
        self.value += max(1 / self.seen, self._least_weight) * (sample - self.value)
