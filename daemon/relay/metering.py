"""What a request takes of the rates: of its profile's requests, and of its API key's requests and tokens.

Tokens are not known before the answer is there: what is taken of a key is an estimate, put right at the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pointsman.config.resilience import LimitsSection
from pointsman.daemon.errors import rate_limited
from pointsman.daemon.routing.body import Features
from pointsman.daemon.routing.table import Plan
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.native import key_of_bytes

if TYPE_CHECKING:
    from pointsman.daemon.relay.context import ShardContext
    from pointsman.daemon.relay.exchange import Exchange

_GUESSED_OUTPUT_TOKENS = 256
"""of a request that names no max_tokens"""


def estimated_tokens(features: Features, prompt_tokens: int) -> float:
    """Of the prompt and the answer, before there is one."""
    most = features.max_tokens
    return float(prompt_tokens + (_GUESSED_OUTPUT_TOKENS if most is None else most))


def take_request(exchange: Exchange, plan: Plan) -> None:
    """One of the profile's. Raises RequestError 429."""
    context = exchange.context
    wait_s = context.resilience.take_request(plan.profile, plan.limits, context.now())
    if wait_s:
        context.count(at.G_RATE_LIMITED)
        most = plan.limits.requests_per_second
        raise rate_limited(f"the profile {plan.profile!r} allows {most:g} requests a second", wait_s)


class Metered(NamedTuple):
    """What was taken of the rates of an API key."""

    key: int
    limits: LimitsSection
    tokens: float

    @classmethod
    def take(cls, exchange: Exchange, limits: LimitsSection, prompt_tokens: int) -> Metered:
        """A gateway without a key file goes by what the client shows, whatever it is. Raises RequestError 429."""
        context, request = exchange.context, exchange.request
        key = key_of_bytes(request.shown_key) if request.key is None else request.key.id
        metered = cls(key, limits, estimated_tokens(exchange.features, prompt_tokens))
        wait_s = context.resilience.take_for_key(key, limits, context.now(), metered.tokens)
        if wait_s:
            context.count(at.G_RATE_LIMITED)
            raise rate_limited(f"this key has {_allowance(limits)} a minute", wait_s)
        return metered

    def correct(self, context: ShardContext, now: float, tokens: int) -> None:
        """`tokens`: so many it was in the end."""
        context.resilience.correct_for_key(self.key, self.limits, now, tokens - self.tokens)


def _allowance(limits: LimitsSection) -> str:
    rates = {"requests": limits.key_requests_per_minute, "tokens": limits.key_tokens_per_minute}
    return " and ".join(f"{rate:g} {what}" for what, rate in rates.items() if rate)
