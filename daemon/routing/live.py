"""Choose and book on the shared state: what a shard does for every request, and control for an explanation.

The default policy without special headers, length buckets or sessions takes the short way: one native call picks
(`Bookings.choose`, equal to `expected_cost.ExpectedCost` by a differential test). Everything else goes by the policies
of this package over `SharedFleet`. Both run under the routing mutex, from the match to the booking, so two shards that
pick at the same moment see each other. When a mutex cannot be had in time (its holder is stopped) the choice is made
by what can be read without it, and that is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pointsman.config.snapshot import WorkerSpec
from pointsman.daemon.routing.eligibility import narrow
from pointsman.daemon.routing.expected_cost import lost_with
from pointsman.daemon.routing.picking import IMBALANCE, REASONS, STALE, Explanation, Situation
from pointsman.daemon.routing.policies import Rng, least_request
from pointsman.daemon.routing.prompt import CHARS_PER_TOKEN
from pointsman.daemon.routing.prompt import Request as Description
from pointsman.daemon.routing.request import Features
from pointsman.daemon.routing.scorers import MAX_KEY
from pointsman.daemon.routing.shared import SharedChain, SharedFleet
from pointsman.daemon.routing.table import Plan, Pool, RoutingTable
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.bookings import NONE
from pointsman.daemon.shm.prefix import HashChain
from pointsman.daemon.shm.routing_state import RoutingState

GROUP_CHARS = 1024
"""Prompts that share so much are one group in statistics."""
UNLOCKED = -1
_IMBALANCE, _STALE = REASONS.index(IMBALANCE), REASONS.index(STALE)
MAX_DEFERRED = 100_000


class Booked:
    """What one pick charged. `reason`: a position in REASONS, UNLOCKED = picked without the routing state."""

    __slots__ = (
        "cached_tokens",
        "explanation",
        "group",
        "is_blind",
        "matched_chars",
        "number",
        "pin",
        "predicted_s",
        "prompt_bytes",
        "prompt_tokens",
        "reason",
        "slot",
        "user_key",
        "worker",
    )

    def __init__(self, worker: WorkerSpec, prompt_bytes: int, prompt_tokens: int, *, is_blind: bool) -> None:
        self.worker = worker
        self.slot = worker.slot
        self.prompt_bytes = prompt_bytes
        self.prompt_tokens = prompt_tokens
        self.is_blind = is_blind
        self.number = NONE
        self.pin = 0
        self.reason = UNLOCKED
        self.matched_chars = 0
        self.cached_tokens = 0
        self.predicted_s = 0.0
        self.group = 0
        self.user_key = 0
        self.explanation: Explanation | None = None


@dataclass(slots=True)
class Ask:
    """One request as it is to be routed. `headers`: those that routing goes by, None when there are none of them."""

    features: Features
    body_bytes: int
    headers: Mapping[str, str] | None = None
    wants_explanation: bool = False


class Counters:
    """Where this shard counts: segment cells, one writer."""

    def __init__(self, state: RoutingState, shard: int) -> None:
        self._cells = state.segment.cells
        self._layout = state.segment.layout
        self._shard = shard
        self._gauges = state.segment.layout.gauge(shard, 0)

    def add(self, word: int) -> None:
        self._cells[self._gauges + word] += 1

    def picked(self, booked: Booked) -> None:
        cells = self._cells
        row = self._layout.load(self._shard, booked.slot, 0)
        cells[row + at.L_PROMPT_TOKENS] += booked.prompt_tokens
        cells[row + at.L_BELIEVED_TOKENS] += booked.cached_tokens
        cells[row + at.L_REASONS + booked.reason] += 1
        cells[self._gauges + (at.G_CACHE_HITS if booked.matched_chars else at.G_CACHE_MISSES)] += 1
        if booked.reason == _IMBALANCE:
            self.add(at.G_LOAD_BALANCING)
        elif booked.reason == _STALE:
            self.add(at.G_DEGRADED)

    def answered(self, booked: Booked, first_byte_us: int, usage: tuple[int, int] | None) -> None:
        """`first_byte_us` -1: not seen; `usage`: the engine's (prompt tokens, cached tokens)."""
        cells = self._cells
        row = self._layout.load(self._shard, booked.slot, 0)
        if first_byte_us >= 0 and booked.reason != UNLOCKED:
            predicted = int(booked.predicted_s * 1e6)
            cells[row + at.L_PREDICTIONS] += 1
            cells[row + at.L_PREDICTED_US] += predicted
            cells[row + at.L_REAL_US] += first_byte_us
            cells[row + at.L_ERROR_US] += abs(predicted - first_byte_us)
        if usage is not None:
            cells[row + at.L_USAGE_PROMPT_TOKENS] += usage[0]
            cells[row + at.L_USAGE_CACHED_TOKENS] += usage[1]


class LiveRouter:
    """One process' way to choose. `shard` -1: it only explains (control)."""

    def __init__(self, state: RoutingState, shard: int, rng: Rng) -> None:
        self._state = state
        self._words = state.words
        self._cells = state.segment.cells
        self._bookings = state.bookings
        self._index = state.index
        self._shard = shard
        self._rng = rng
        self._chain = state.index.chain()
        self._fleet: SharedFleet | None = None
        self._fleet_of: RoutingTable | None = None
        self._late: list[tuple[int, float, int]] = []
        """bookings that ended while the mutex was not to be had"""
        self.counters = Counters(state, max(shard, 0))

    # --- the prompt

    def read_prompt(self, features: Features) -> int:
        """Hashes the prompt of the request that is routed next; returns its tokens, about, at least 1."""
        chain = self._chain
        if features.has_ids:
            chain.load_spans(features.prompt, features.salt)
        else:
            chain.load_json(features.prompt, features.salt)
        return max(-(-chain.total_chars // CHARS_PER_TOKEN), 1)

    @property
    def chain(self) -> HashChain:
        return self._chain

    # --- choose and book

    def choose(self, ask: Ask, table: RoutingTable, pool: Pool, plan: Plan, prompt_tokens: int, now: float) -> Booked:
        """After `read_prompt`. Raises RequestError 503 when no worker of the pool is up, 400 as the policy says."""
        if plan.expected_cost is not None and ask.headers is None and not (pool.has_buckets or ask.wants_explanation):
            return self._choose_least_cost(ask, pool, plan, prompt_tokens, now)
        return self._choose_by_policy(ask, table, pool, plan, prompt_tokens, now)

    def _choose_least_cost(self, ask: Ask, pool: Pool, plan: Plan, prompt_tokens: int, now: float) -> Booked:
        words, bookings, state = self._words, self._bookings, self._state
        parameters = plan.expected_cost
        assert parameters is not None
        if not words.lock():
            return self._choose_unlocked(ask, pool, prompt_tokens)
        try:
            bookings.recover(self._cells[at.H_LOCK_RECOVERIES], now)
            if self._late:
                self._finish_late()
            loads = words.survey(pool.slots)
            if not loads or max(loads) < 0:
                raise pool.nobody()
            has_index = self._lock_index()
            try:
                if has_index:
                    self._index.match(self._chain, state.matched)
                    self._index.pinned_sizes(state.pinned)
                position, cached, reason, wait_s, prefill_s = bookings.choose(
                    pool.slots,
                    loads,
                    prompt_tokens,
                    self._chain.total_chars,
                    now,
                    parameters.theta,
                    parameters.theta_gain,
                    parameters.gamma,
                    parameters.kappa_s,
                    self._rng.random(),
                )
                booked = Booked(
                    pool.workers[position], ask.body_bytes, prompt_tokens, is_blind=not ask.features.is_stream
                )
                booked.reason = reason
                booked.matched_chars = state.matched[booked.slot]
                booked.cached_tokens = cached
                booked.predicted_s = wait_s + prefill_s
                self._book(booked, now, has_index=has_index)
            finally:
                if has_index:
                    self._index.unlock()
        finally:
            words.unlock()
        return booked

    def _choose_by_policy(
        self, ask: Ask, table: RoutingTable, pool: Pool, plan: Plan, prompt_tokens: int, now: float
    ) -> Booked:
        request = _description(ask, prompt_tokens)
        selection = plan.selection
        policy = selection.policy(selection.asked(request))  # may be refused: before anything is locked
        fleet, session = self._fleet_for(table), selection.session(request)
        if not self._words.lock():
            return self._choose_unlocked(ask, pool, prompt_tokens)
        try:
            self._bookings.recover(self._cells[at.H_LOCK_RECOVERIES], now)
            if self._late:
                self._finish_late()
            left, dropped = self._eligible(pool, fleet, request)
            has_index = self._lock_index()
            try:
                situation = self._situation(request, fleet, left, now, has_index=has_index)
                pick = selection.pick(policy, situation, session)
                booked = Booked(
                    table.everyone.workers[pick.worker],
                    ask.body_bytes,
                    prompt_tokens,
                    is_blind=not ask.features.is_stream,
                )
                booked.reason = REASONS.index(pick.reason)
                booked.matched_chars = situation.matched_chars(pick.worker)
                booked.cached_tokens = situation.cached_tokens(pick.worker)
                booked.predicted_s = fleet.loads[pick.worker].wait_s(now) + situation.prefill_s(pick.worker)
                if ask.wants_explanation:
                    booked.explanation = selection.explain(policy, situation, dropped)
                self._bookings.lost = lost_with(situation)
                self._note_identities(booked, request, fleet, session, pick.worker, now)
                self._book(booked, now, has_index=has_index)
            finally:
                if has_index:
                    self._index.unlock()
        finally:
            self._words.unlock()
        return booked

    def _choose_unlocked(self, ask: Ask, pool: Pool, prompt_tokens: int) -> Booked:
        """The mutex' holder is stopped: fewest requests by the lock-free counters, and no booking."""
        loads = self._words.survey(pool.slots)
        if not loads or max(loads) < 0:
            raise pool.nobody()
        position = least_request(loads, pool.weights, self._words.next_cursor, self._rng)
        worker = pool.workers[position]
        booked = Booked(worker, ask.body_bytes, prompt_tokens, is_blind=not ask.features.is_stream)
        self._words.book(self._shard, worker.slot, ask.body_bytes)
        self.counters.add(at.G_UNLOCKED)
        return booked

    def choose_any(self, pool: Pool) -> Booked:
        """Any worker that is up, in turn, for questions that cost nothing. Raises RequestError 503."""
        loads = self._words.survey(pool.slots)
        up = [position for position, load in enumerate(loads) if load >= 0]
        if not up:
            raise pool.nobody()
        booked = Booked(pool.workers[up[self._words.next_cursor() % len(up)]], 0, 0, is_blind=True)
        self._words.book(self._shard, booked.slot, 0)
        return booked

    def _book(self, booked: Booked, now: float, *, has_index: bool) -> None:
        """Everything that the pick charges; the mutexes are held."""
        bookings, index, chain, slot = self._bookings, self._index, self._chain, booked.slot
        self._words.book(self._shard, slot, booked.prompt_bytes)
        reserved = int(bookings.output_mean) * CHARS_PER_TOKEN
        booked.number = bookings.book(
            self._shard,
            slot,
            now,
            booked.prompt_tokens - booked.cached_tokens,
            booked.cached_tokens,
            reserved,
            booked.is_blind,
        )
        if booked.number == NONE:
            self.counters.add(at.G_UNBOOKED)
        if has_index:
            self._fit(slot)
            if chain.total_chars:
                booked.group = chain.head(GROUP_CHARS)
                booked.pin = index.pin(slot, chain, self._shard, True)
                index.insert(self._state.ghost, chain)
        self.counters.picked(booked)

    def _fit(self, slot: int) -> None:
        """Requests in flight take room away from the engine's cache."""
        kv_chars = self._bookings.kv_chars(slot)
        if kv_chars:
            self._index.put_capacity(slot, max(kv_chars - self._bookings.reserved(slot), 1))

    def _lock_index(self) -> bool:
        if self._index.lock():
            return True
        matched = self._state.matched
        matched[:] = type(matched)("Q", bytes(8 * len(matched)))
        self.counters.add(at.G_UNINDEXED)
        return False

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
        self, request: Description, fleet: SharedFleet, left: Sequence[int], now: float, *, has_index: bool
    ) -> Situation:
        if has_index:
            self._index.match(self._chain, self._state.matched)
        fleet.ripen(left, now)
        turn = self._words.next_cursor() if self._shard >= 0 else 0
        return Situation(request, SharedChain(self._chain), fleet.depths(), left, fleet, now, self._rng, turn)

    def _note_identities(
        self, booked: Booked, request: Description, fleet: SharedFleet, session: str, worker: int, now: float
    ) -> None:
        if session:
            fleet.stick(session, worker, now)
        user = request.headers.get("user", "")[:MAX_KEY]
        if user:
            booked.user_key = fleet.user_key(user)
            fleet.charge_user(booked.user_key, 4.0 * booked.prompt_tokens, now)

    def _fleet_for(self, table: RoutingTable) -> SharedFleet:
        fleet = self._fleet
        if fleet is None or self._fleet_of is not table:
            fleet = self._fleet = SharedFleet(self._state, table.everyone.workers)
            self._fleet_of = table
        return fleet

    # --- what became of it

    def first_token(self, booked: Booked, now: float) -> None:
        """The first data of a streamed answer came. Where the mutex is not to be had, the booking waits for its end."""
        if booked.number == NONE or booked.is_blind or not self._words.lock():
            return
        try:
            self._bookings.recover(self._cells[at.H_LOCK_RECOVERIES], now)
            self._bookings.first_token(booked.number, now)
        finally:
            self._words.unlock()

    def finish(self, booked: Booked, now: float, output_tokens: int | None) -> None:
        """The request is over; None: it failed or was cancelled. Once for everything that was booked."""
        self._words.release(self._shard, booked.slot, booked.prompt_bytes)
        if booked.number == NONE:
            if booked.pin:
                self._index.unpin(booked.pin)
            return
        output = NONE if output_tokens is None else output_tokens
        if not self._words.lock():
            self._late.append((booked.number, now, output))
            self._index.unpin(booked.pin)
            return
        try:
            self._bookings.recover(self._cells[at.H_LOCK_RECOVERIES], now)
            self._bookings.finish(booked.number, now, output)
            if self._late:
                self._finish_late()
            if booked.user_key and self._fleet is not None:
                charge = 2.0 * (output_tokens or 0) - 3.0 * booked.prompt_tokens
                self._fleet.charge_user(booked.user_key, charge, now)
        finally:
            self._words.unlock()
        self._fit(booked.slot)
        if booked.pin:
            self._index.unpin(booked.pin)

    def settle(self, now: float) -> None:
        """From time to time: end what could not be ended, though no request may come to do it."""
        if self._late and self._words.lock():
            try:
                self._bookings.recover(self._cells[at.H_LOCK_RECOVERIES], now)
                self._finish_late()
            finally:
                self._words.unlock()

    def _finish_late(self) -> None:
        for number, ended, output in self._late:
            self._bookings.finish(number, ended, output)
        self._late.clear()

    # --- explaining

    def explain(
        self, ask: Ask, table: RoutingTable, pool: Pool, plan: Plan, prompt_tokens: int, now: float
    ) -> tuple[Explanation, int]:
        """What `choose` would go by after `read_prompt`, and whom it would pick (ties by this process' own dice).

        Nothing is booked. Raises RequestError as `choose` does, 503 also when a mutex is not to be had.
        """
        request = _description(ask, prompt_tokens)
        selection = plan.selection
        policy = selection.policy(selection.asked(request))
        fleet = self._fleet_for(table)
        with self._state.locked() as held:
            left, dropped = self._eligible(pool, fleet, request)
            has_index = held and self._lock_index()
            try:
                situation = self._situation(request, fleet, left, now, has_index=has_index)
                pick = selection.pick(policy, situation, selection.session(request))
                return selection.explain(policy, situation, dropped), pick.worker
            finally:
                if has_index:
                    self._index.unlock()


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
