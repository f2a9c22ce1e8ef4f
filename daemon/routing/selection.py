"""A profile, compiled: which policy decides for which request, sessions first. Stateless but for compiled policies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pointsman.daemon.routing.eligibility import TARGET_HEADER
from pointsman.daemon.routing.expected_cost import ExpectedCost
from pointsman.daemon.routing.picking import NAMED, STICKY, Explanation, Pick, Policy, Situation
from pointsman.daemon.routing.scorers import session_key
from pointsman.daemon.routing.strategies import RoutingProfile, build, effective_strategy
from pointsman.daemon.routing.views import RequestView

STRATEGY_HEADER = "routing-strategy"
MAX_POLICIES = 256
"""Strategies of clients' headers that are kept compiled."""
STAY_SLACK_S = 0.01


class Selection:
    """Raises RequestError 400 for a strategy that does not exist."""

    def __init__(self, profile: RoutingProfile) -> None:
        self.profile = profile
        self.own: Policy = build(profile, profile.locked or None)
        self.strategy = profile.locked or ("chain" if profile.chain else profile.strategy)
        """As it is shown to clients and in logs."""
        self._asked: dict[str, Policy] = {}
        self._stay_cost = ExpectedCost(profile.expected_cost)

    def asked(self, request: RequestView) -> str:
        """The strategy that the request's header asks for and may have; "" = the profile's."""
        return self.asked_in(request.headers)

    def asked_in(self, headers: Mapping[str, str]) -> str:
        asked = headers.get(STRATEGY_HEADER, "")
        return asked if asked and effective_strategy(self.profile, asked) == asked else ""

    def policy(self, asked: str) -> Policy:
        """Raises RequestError 400 for a strategy that does not exist."""
        if not asked:
            return self.own
        policy = self._asked.get(asked)
        if policy is None:
            policy = build(self.profile, asked)
            if len(self._asked) >= MAX_POLICIES:  # white space and weights make endless variants
                self._asked.clear()
            self._asked[asked] = policy
        return policy

    def session(self, request: RequestView) -> str:
        """The key of the session that the request belongs to; "" = none, or sessions do not count here."""
        return session_key(request.headers) if self.profile.sticky is not None else ""

    def pick(self, policy: Policy, situation: Situation, session: str) -> Pick:
        pick = (self._stay(situation, session) if session else None) or policy.pick(situation)
        return replace(pick, reason=NAMED) if TARGET_HEADER in situation.request.headers else pick

    def explain(self, policy: Policy, situation: Situation, dropped: dict[int, str]) -> Explanation:
        found = policy.explain(situation)
        eligible, loads = situation.eligible, situation.fleet.loads
        return replace(
            found,
            dropped={**dropped, **(found.dropped or {})},
            matched_tokens={worker: situation.cached_tokens(worker) for worker in eligible},
            matched_chars={worker: situation.matched_chars(worker) for worker in eligible},
            ttft_s={worker: loads[worker].wait_s(situation.now) + situation.prefill_s(worker) for worker in eligible},
        )

    def _stay(self, situation: Situation, key: str) -> Pick | None:
        """The session's worker, while it is eligible and not much dearer than the best one."""
        held, sticky = situation.fleet.session(key), self.profile.sticky
        if held is None or sticky is None or held[0] not in situation.eligible:
            return None
        worker, last_s = held
        if situation.now - last_s > sticky.idle_secs:
            return None
        costs = self._stay_cost.costs(situation)
        cost = costs[situation.eligible.index(worker)]
        return Pick(worker, STICKY) if cost <= sticky.factor * min(costs) + STAY_SLACK_S else None
