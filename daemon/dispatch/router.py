"""Choose and book on the shared state: what a shard does for every request, and control for an explanation.

The default policy without special headers, length buckets or sessions takes the short way, which is native
(`short_way`; equal to `expected_cost.ExpectedCost` by a differential test). Everything else goes by the policies of
`routing` over `SharedFleet`. Both run under the routing mutex, from the match to the booking, so two shards that pick
at the same moment see each other. When a mutex cannot be had in time (its holder is stopped) the choice is made by
what can be read without it, and that is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pointsman.config.snapshot import WorkerSpec
from pointsman.daemon.dispatch.fleet import SharedChain, SharedFleet
from pointsman.daemon.dispatch.short_way import ShortWay
from pointsman.daemon.routing.eligibility import narrow
from pointsman.daemon.routing.expected_cost import lost_with
from pointsman.daemon.routing.picking import IMBALANCE, REASONS, STALE, Explanation, Pick, Situation
from pointsman.daemon.routing.policies import Rng, least_request
from pointsman.daemon.routing.prompt import Request as Description
from pointsman.daemon.routing.request import Features
from pointsman.daemon.routing.scorers import MAX_KEY
from pointsman.daemon.routing.table import Plan, Pool, RoutingTable
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.choosing import Booked, Chooser
from pointsman.daemon.shm.prefix import HashChain
from pointsman.daemon.shm.routing_state import RoutingState

GROUP_CHARS = 1024
"""Prompts that share so much are one group in statistics."""
_IMBALANCE, _STALE = REASONS.index(IMBALANCE), REASONS.index(STALE)


@dataclass(slots=True)
class Ask:
    """One request as it is to be routed. `headers`: those that routing goes by, None when there are none of them."""

    features: Features
    body_bytes: int
    headers: Mapping[str, str] | None = None
    wants_explanation: bool = False
    is_retry: bool = False
    """Pays nothing into the retry budget."""
    is_fetched: bool = False
    """The worker computes nothing of the prompt: another one hands its KV over."""


class LiveRouter:
    """One process' way to choose. `shard` -1: it only explains (control)."""

    def __init__(self, state: RoutingState, shard: int, rng: Rng) -> None:
        self._state = state
        self._words = state.words
        self._cells = state.segment.cells
        self._bookings = state.bookings
        self._index = self.index = state.index
        self._shard = shard
        self._rng = rng
        self._chain = state.index.chain()
        self._fleet: SharedFleet | None = None
        self._fleets: dict[str, SharedFleet] = {}
        self._fleet_of: RoutingTable | None = None
        self._gauges = state.segment.layout.gauge(max(shard, 0), 0)
        self.chooser = Chooser(
            state.words,
            state.bookings,
            state.index,
            self._chain,
            shard,
            state.ghost,
            self._gauges,
            state.segment.layout.decision_ring(max(shard, 0)),
            GROUP_CHARS,
            state.segment.layout.budget,
            state.segment.layout.breakers,
        )
        self.short_way = short_way = ShortWay(
            self.chooser, self._chain, rng, self._unlocked_least_cost, self._charge_user
        )
        self.read_prompt = short_way.read_prompt
        self.choose_least_cost = short_way.choose
        """`choose` by the short way: for a plan with `expected_cost`, a pool without buckets, no routing headers"""
        self.finish = short_way.finish
        self.first_token = self.chooser.first_token
        self.settle = self.chooser.settle

    def watch_breakers(self, width_s: float) -> None:
        """`SharedResilience.breaker_width_s`."""
        self.chooser.breaker_width_s = width_s

    # --- the prompt

    def cached_tokens(self, slots: Iterable[int], prompt_tokens: int) -> int:
        """After `read_prompt`: how much of the prompt the one of these workers that holds most of it holds."""
        if not self.chooser.lock_index():
            return 0
        try:
            self._index.match(self._chain, self._state.matched)
        finally:
            self._index.unlock()
        most = max((self._state.matched[slot] for slot in slots), default=0)
        total = self._chain.total_chars
        return min(int(prompt_tokens * most / total), prompt_tokens - 1) if total else 0

    @property
    def chain(self) -> HashChain:
        return self._chain

    # --- choose and book

    def choose(self, ask: Ask, table: RoutingTable, pool: Pool, plan: Plan, prompt_tokens: int, now: float) -> Booked:
        """After `read_prompt`. Raises RequestError 503 when no worker of the pool is up, 400 as the policy says."""
        is_special = pool.has_buckets or ask.wants_explanation or ask.is_fetched
        if plan.expected_cost is not None and ask.headers is None and not is_special:
            is_retry = ask.is_retry
            return self.choose_least_cost(
                ask.features, ask.body_bytes, pool, plan, prompt_tokens, now, is_retry=is_retry
            )
        return self._choose_by_policy(ask, table, pool, plan, prompt_tokens, now)

    def _choose_by_policy(
        self, ask: Ask, table: RoutingTable, pool: Pool, plan: Plan, prompt_tokens: int, now: float
    ) -> Booked:
        request = _description(ask, prompt_tokens)
        selection = plan.selection
        policy = selection.policy(selection.asked(request))  # may be refused: before anything is locked
        fleet, session = self._fleet_for(table, pool.role), selection.session(request)
        if not self.chooser.lock(now):
            return self._choose_unlocked(ask, pool, prompt_tokens)
        try:
            left, dropped = self._eligible(pool, fleet, request)
            has_index = self.chooser.lock_index()
            try:
                turn = self._turn(pool.role)
                situation = self._situation(request, fleet, left, now, turn, has_index=has_index)
                pick = selection.pick(policy, situation, session)
                booked = _booked(table.fleet(pool.role).workers[pick.worker], ask, prompt_tokens)
                booked.reason = REASONS.index(pick.reason)
                booked.matched_chars = situation.matched_chars(pick.worker)
                booked.cached_tokens = situation.cached_tokens(pick.worker)
                if ask.is_fetched:
                    booked.cached_tokens = prompt_tokens
                booked.predicted_s = fleet.loads[pick.worker].wait_s(now) + situation.prefill_s(pick.worker)
                if ask.wants_explanation:
                    booked.explanation = selection.explain(policy, situation, dropped)
                self._bookings.lost = lost_with(situation)
                self._note_identities(booked, request, fleet, session, pick.worker, now)
                self.chooser.book(booked, now, has_index)
                if not ask.is_retry:
                    self.chooser.deposit(plan.retry.budget_ratio, plan.retry.budget_min_per_s, now)
                self._count(booked.reason)
            finally:
                if has_index:
                    self._index.unlock()
        finally:
            self._words.unlock()
        return booked

    def _unlocked_least_cost(self, features: Features, body_bytes: int, pool: Pool, prompt_tokens: int) -> Booked:
        return self._choose_unlocked(Ask(features, body_bytes), pool, prompt_tokens)

    def _choose_unlocked(self, ask: Ask, pool: Pool, prompt_tokens: int) -> Booked:
        """The mutex' holder is stopped: fewest requests by the lock-free counters, and no booking."""
        loads = self._words.survey(pool.slots)
        if not loads or max(loads) < 0:
            raise pool.nobody()
        position = least_request(loads, pool.weights, self._words.next_cursor, self._rng)
        worker = pool.workers[position]
        booked = _booked(worker, ask, prompt_tokens)
        self._words.book(self._shard, worker.slot, ask.body_bytes)
        self._cells[self._gauges + at.G_UNLOCKED] += 1
        return booked

    def choose_any(self, pool: Pool) -> Booked:
        """Any worker that is up, in turn, for questions that cost nothing. Raises RequestError 503."""
        loads = self._words.survey(pool.slots)
        up = [position for position, load in enumerate(loads) if load >= 0]
        if not up:
            raise pool.nobody()
        worker = pool.workers[up[self._words.next_cursor() % len(up)]]
        booked = Booked(worker, worker.slot, 0, 0, True)
        self._words.book(self._shard, booked.slot, 0)
        return booked

    def _count(self, reason: int) -> None:
        if reason == _IMBALANCE:
            self._cells[self._gauges + at.G_LOAD_BALANCING] += 1
        elif reason == _STALE:
            self._cells[self._gauges + at.G_DEGRADED] += 1

    def _eligible(self, pool: Pool, fleet: SharedFleet, request: Description) -> tuple[Sequence[int], dict[int, str]]:
        """Positions in the fleet that are up and fit, and why the others do not."""
        loads = self._words.survey(pool.slots)
        up = [position for position, load in zip(pool.positions, loads, strict=True) if load >= 0]
        if not up:
            raise pool.nobody()
        left, dropped = narrow(request, fleet.workers, up)
        if not left:
            raise pool.nobody("; ".join(sorted({*dropped.values()}))[:500])
        return left, dropped

    def _situation(
        self, request: Description, fleet: SharedFleet, left: Sequence[int], now: float, turn: int, *, has_index: bool
    ) -> Situation:
        if has_index:
            self._index.match(self._chain, self._state.matched)
        fleet.ripen(left, now)
        return Situation(request, SharedChain(self._chain), fleet.depths(), left, fleet, now, self._rng, turn)

    def _turn(self, role: str) -> int:
        """Of those that take turns. A pair is two picks: with one cursor for both, each side would skip every other."""
        if role != "decode":
            return self._words.next_cursor()
        turn = self._cells[at.H_DECODE_CURSOR]
        self._cells[at.H_DECODE_CURSOR] = turn + 1
        return turn

    def _note_identities(
        self, booked: Booked, request: Description, fleet: SharedFleet, session: str, worker: int, now: float
    ) -> None:
        if session:
            fleet.stick(session, worker, now)
        user = request.headers.get("user", "")[:MAX_KEY]
        if user:
            booked.user_key = fleet.user_key(user)
            fleet.charge_user(booked.user_key, 4.0 * booked.prompt_tokens, now)

    def _fleet_for(self, table: RoutingTable, role: str = "regular") -> SharedFleet:
        if self._fleet_of is not table:
            self._fleets = {}
            self._fleet_of = table
        fleet = self._fleets.get(role)
        if fleet is None:
            fleet = self._fleets[role] = SharedFleet(self._state, table.fleet(role).workers)
        self._fleet = fleet
        return fleet

    def _charge_user(self, booked: Booked, now: float, output_tokens: int) -> None:
        """Its request is over: the prompt and the answer instead of what was guessed."""
        if self._fleet is not None and self.chooser.lock(now):
            try:
                self._fleet.charge_user(booked.user_key, 2.0 * output_tokens - 3.0 * booked.prompt_tokens, now)
            finally:
                self._words.unlock()

    # --- explaining

    def refusals(self, ask: Ask, table: RoutingTable, pool: Pool, prompt_tokens: int) -> dict[int, str]:
        """Why workers that are up may not take the request, by position in the fleet."""
        loads = self._words.survey(pool.slots)
        up = [position for position, load in zip(pool.positions, loads, strict=True) if load >= 0]
        return narrow(_description(ask, prompt_tokens), self._fleet_for(table, pool.role).workers, up)[1]

    def explain(
        self, ask: Ask, table: RoutingTable, pool: Pool, plan: Plan, prompt_tokens: int, now: float
    ) -> tuple[Explanation, Pick]:
        """What `choose` would go by after `read_prompt`, and whom it would pick (ties by this process' own dice).

        Nothing is booked. Raises RequestError as `choose` does, 503 also when a mutex is not to be had.
        """
        request = _description(ask, prompt_tokens)
        selection = plan.selection
        policy = selection.policy(selection.asked(request))
        fleet = self._fleet_for(table, pool.role)
        with self._state.locked() as held:
            left, dropped = self._eligible(pool, fleet, request)
            has_index = held and self.chooser.lock_index()
            try:
                situation = self._situation(request, fleet, left, now, 0, has_index=has_index)
                pick = selection.pick(policy, situation, selection.session(request))
                return selection.explain(policy, situation, dropped), pick
            finally:
                if has_index:
                    self._index.unlock()


def _booked(worker: WorkerSpec, ask: Ask, prompt_tokens: int) -> Booked:
    return Booked(worker, worker.slot, ask.body_bytes, prompt_tokens, not ask.features.is_stream)


def _description(ask: Ask, prompt_tokens: int) -> Description:
    features = ask.features
    return Description(
        prompt_tokens=prompt_tokens,
        max_tokens=features.max_tokens,
        model=features.model,
        lora=features.lora,
        headers=ask.headers or {},
        is_streamed=features.is_stream,
    )
