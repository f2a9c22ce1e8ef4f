"""`config-profile: auto`: the profile whose hints fit the shape of a request best.

A hint is one of `promptTokensGte`, `promptTokensLt`, `maxTokensGte`, `maxTokensLt` (under `routingConfig`). A profile
is a candidate if it has at least one and all of them hold; a length that the request does not tell fails a hint on
it. The most specific candidate wins: more hints, then the higher lower bound and the lower upper bound of the prompt,
the same of the answer, then the alphabet. Source: AIBrix `pkg/plugins/gateway/configprofiles` (PR #1944).
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

_NO_BOUND = float("inf")


class Hints(msgspec.Struct, frozen=True):
    """Tokens; lower bounds included, upper ones not. 0 = no such hint: AIBrix's example writes all four as 0."""

    prompt_tokens_gte: int = msgspec.field(default=0, name="promptTokensGte")
    prompt_tokens_lt: int = msgspec.field(default=0, name="promptTokensLt")
    max_tokens_gte: int = msgspec.field(default=0, name="maxTokensGte")
    max_tokens_lt: int = msgspec.field(default=0, name="maxTokensLt")

    def count(self) -> int:
        bounds = (self.prompt_tokens_gte, self.prompt_tokens_lt, self.max_tokens_gte, self.max_tokens_lt)
        return sum(bound > 0 for bound in bounds)

    def hold(self, prompt_tokens: int | None, max_tokens: int | None) -> bool:
        return _within(prompt_tokens, self.prompt_tokens_gte, self.prompt_tokens_lt) and _within(
            max_tokens, self.max_tokens_gte, self.max_tokens_lt
        )


def _within(value: int | None, low: int, high: int) -> bool:
    if value is None:
        return not low and not high
    return value >= low and (not high or value < high)


def pick_profile(hints: Mapping[str, Hints], prompt_tokens: int | None, max_tokens: int | None) -> str | None:
    """The name of the profile that fits best, None when no profile with hints fits (then the default one counts).

    `prompt_tokens` may be an estimate; `max_tokens` is the request's `max_tokens`, else `max_completion_tokens`.
    """
    fitting = [name for name, hint in hints.items() if hint.count() and hint.hold(prompt_tokens, max_tokens)]
    return min(fitting, key=lambda name: _rank(name, hints[name]), default=None)


def _rank(name: str, hints: Hints) -> tuple[float | str, ...]:
    return (
        -hints.count(),
        *_bounds(hints.prompt_tokens_gte, hints.prompt_tokens_lt),
        *_bounds(hints.max_tokens_gte, hints.max_tokens_lt),
        name,
    )


def _bounds(low: int, high: int) -> tuple[float, float]:
    return -low, high or _NO_BOUND
