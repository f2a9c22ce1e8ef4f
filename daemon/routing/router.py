"""The routing of pointsman as a library: the same code under the daemon, the replay, the tests, other simulators.

    router = Router([Worker("a", kv_tokens=400_000), Worker("b", kv_tokens=400_000)], "expected_cost", seed=0)
    decision = router.choose(Request(blocks=ids, block_tokens=512, prompt_tokens=9_000), now)
    router.first_token(decision, now)
    router.finish(decision, now, output_tokens)

`now` is seconds of any monotonic clock. The order of calls and the seed determine every decision. This interface
(Router, Worker, Request, Decision) is kept stable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pointsman.daemon.errors import no_worker
from pointsman.daemon.routing.eligibility import narrow
from pointsman.daemon.routing.expected_cost import lost_with
from pointsman.daemon.routing.fleet import GHOST_FACTOR, Booking, Fleet, Signals, Worker
from pointsman.daemon.routing.index import UNLIMITED
from pointsman.daemon.routing.picking import Explanation, Policy, Situation
from pointsman.daemon.routing.prompt import BLOCK_BYTES, CHARS_PER_TOKEN, Chain, Request
from pointsman.daemon.routing.rng import SplitMix
from pointsman.daemon.routing.scorers import MAX_KEY
from pointsman.daemon.routing.selection import Selection
from pointsman.daemon.routing.strategies import RoutingProfile, read_profile

__all__ = ["Decision", "Request", "Router", "Signals", "Worker"]

GHOST_CHARS_OF_UNKNOWN = 2**26


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes. `reason`: a word of picking.py. `matched_tokens`: prompt tokens the worker is believed to
    hold; `predicted_ttft_s`: its line and this prefill; `explanation` only where it was asked for."""

    worker: str
    index: int
    """Position among the router's workers."""
    reason: str
    matched_tokens: int
    predicted_ttft_s: float
    booking: Booking
    explanation: Explanation | None = None


class Router:
    """`profile`: a strategy ("least-request:40,prefix-cache:60"), a mapping as in a profiles file, or a RoutingProfile.

    Raises RequestError 400 for a strategy that does not exist.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        profile: str | dict[str, Any] | RoutingProfile = "expected_cost",
        seed: int = 0,
        *,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        if not workers:
            raise ValueError("a router needs at least one worker")
        self.workers = tuple(workers)
        self.names = tuple(worker.name for worker in workers)
        self.profile = read_profile(profile)
        self._selection = Selection(self.profile)
        self._everyone = tuple(range(len(workers)))
        self._rng = SplitMix(seed)
        self._turn = 0
        self._block_bytes = block_bytes
        self._hash_seed = seed & (2**64 - 1)
        self._interval_s, tree_chars = self.profile.tree_limits()
        self._tree_chars = tree_chars
        self._next_eviction_s: float | None = None
        self.fleet = self._fleet()

    def _fleet(self) -> Fleet:
        if self._tree_chars is not None:
            return Fleet(self.workers, [UNLIMITED] * len(self.workers), 0, follows_engine=False)
        kv = [None if w.kv_tokens is None else w.kv_tokens * CHARS_PER_TOKEN for w in self.workers]
        ghost = GHOST_FACTOR * sum(GHOST_CHARS_OF_UNKNOWN if chars is None else chars for chars in kv)
        return Fleet(self.workers, [UNLIMITED if chars is None else chars for chars in kv], ghost)

    @property
    def policy(self) -> Policy:
        return self._selection.own

    def choose(
        self, request: Request, now: float, *, eligible: Sequence[int] | None = None, explain: bool = False
    ) -> Decision:
        """Picks a worker and books the request on it, in one step.

        `eligible`: positions that may take it (healthy, breaker closed, not draining, serving the model), ascending;
        default all. Raises RequestError 503 when there is none, 400 when the policy refuses the request.
        """
        selection = self._selection
        policy = selection.policy(selection.asked(request))
        situation, chain, dropped = self._situation(request, now, eligible)
        explanation = selection.explain(policy, situation, dropped) if explain else None
        key = selection.session(request)
        pick = selection.pick(policy, situation, key)
        fleet, worker = self.fleet, pick.worker
        if key:
            fleet.stick(key, worker, now)
        cached = situation.cached_tokens(worker)
        wait = fleet.loads[worker].wait_s(now)
        fleet.lost = lost_with(situation)
        booking = fleet.book(
            worker,
            chain,
            situation.prompt_tokens,
            cached,
            now,
            is_pinned=self._tree_chars is None,
            is_blind=not request.is_streamed,
        )
        self._turn += 1
        user = request.headers.get("user", "")[:MAX_KEY]
        if user:
            booking.user = user
            fleet.charge_user(user, 4.0 * situation.prompt_tokens, now)
        return Decision(self.names[worker], worker, pick.reason, cached, wait + booking.prefill_s, booking, explanation)

    def explain(self, request: Request, now: float, *, eligible: Sequence[int] | None = None) -> Explanation:
        """What `choose` would go by; nothing is booked."""
        policy = self._selection.policy(self._selection.asked(request))
        situation, _, dropped = self._situation(request, now, eligible)
        return self._selection.explain(policy, situation, dropped)

    def first_token(self, decision: Decision, now: float) -> None:
        """The first byte of the answer's body came. May be left out where it is not seen."""
        self.fleet.first_token(decision.booking, now)

    def finish(self, decision: Decision, now: float, output_tokens: int | None) -> None:
        """The request is over; None: it failed or was cancelled. Every decision must be finished, once."""
        self.fleet.finish(decision.booking, now, output_tokens)

    def report(self, worker: int, signals: Signals) -> None:
        """What an engine's metrics say, for the policies that go by them."""
        self.fleet.loads[worker].signals = signals

    def _situation(
        self, request: Request, now: float, eligible: Sequence[int] | None
    ) -> tuple[Situation, Chain, dict[int, str]]:
        left, dropped = narrow(request, self.workers, self._everyone if eligible is None else eligible)
        if not left:
            raise no_worker("no worker is eligible for this request")
        self._evict_if_due(now)
        for worker in left:
            self.fleet.ripen(worker, now)
        chain = request.chain(block_bytes=self._block_bytes, seed=self._hash_seed)
        depths = self.fleet.index.match(chain)
        return Situation(request, chain, depths, left, self.fleet, now, self._rng, self._turn), chain, dropped

    def _evict_if_due(self, now: float) -> None:
        if self._tree_chars is None or self._interval_s <= 0:
            return
        if self._next_eviction_s is None:
            self._next_eviction_s = now + self._interval_s
        elif now >= self._next_eviction_s:
            self._next_eviction_s = now + self._interval_s
            for worker in self._everyone:
                self.fleet.index.evict(worker, self._tree_chars)
