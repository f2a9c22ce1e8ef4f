"""Choose and book both workers of a prefill/decode pair on the shared state.

First those who may be paired at all: up, let in by their breakers, taking a prompt of this length, compatible with each
other, not banned as a pair, not failed by this request as long as there are others. Of them the prefill worker is
picked by its policy, among its partners the decode worker by the other one. Each pick is one step with its booking, as
for any request; that another shard may pick between the two does no harm.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain

from pointsman.config.snapshot import WorkerSpec
from pointsman.daemon.dispatch.resilience import LOCK_DEADLINE_US, SharedResilience
from pointsman.daemon.dispatch.router import Ask, LiveRouter
from pointsman.daemon.dispatch.verdicts import VERDICTS
from pointsman.daemon.errors import RequestError
from pointsman.daemon.pd.ledger import Charge, Failed, Ledger, partners
from pointsman.daemon.resilience.breaker import UNCOUNTED
from pointsman.daemon.resilience.table import Table
from pointsman.daemon.resilience.words import MemoryWords
from pointsman.daemon.routing.pairs import SGLANG, is_same_host
from pointsman.daemon.routing.prompt import CHARS_PER_TOKEN
from pointsman.daemon.routing.request import Features
from pointsman.daemon.routing.table import PairPools, Plan, Pool, RoutingTable
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.choosing import NEUTRAL, Booked
from pointsman.daemon.shm.native import key_of_bytes
from pointsman.daemon.shm.routing_state import RoutingState

BAN_AFTER = 3
BAN_S = 30.0
NEAR_SLACK = 4
"""Requests that a decode worker on the prefill worker's host may have more than the idlest one."""
IDLE_S, BUSY_S = 0.25, 1.0
"""Seconds of waiting: a combined worker below the first helps when a worker of pairs is above the second."""
MAX_TURNS = 8
"""Picks that a race for breakers' probes may spoil."""
NOBODY = -1
"""In place of a prefill worker's slot: none is left."""


@dataclass(slots=True)
class Side:
    """One worker of a pair, booked."""

    booked: Booked
    is_probe: bool = False

    @property
    def worker(self) -> WorkerSpec:
        worker: WorkerSpec = self.booked.worker
        return worker


@dataclass(slots=True)
class Paired:
    prefill: Side
    decode: Side
    key: int
    """of the pair, in the ledger"""


@dataclass(slots=True)
class Alone:
    """One worker does it all: decode, or a combined one."""

    side: Side


@dataclass(frozen=True, slots=True)
class PairAsk:
    ask: Ask
    """as for a plain request; its headers are for the prefill worker"""
    is_alone: bool = False
    """decode is to do it all"""


class PairRouter:
    def __init__(self, state: RoutingState, router: LiveRouter, resilience: SharedResilience) -> None:
        segment, first = state.segment, state.segment.layout.pair_ledger
        end = first + at.PAIR_LEDGER_ROWS * at.RATE_WORDS
        self._state = state
        self._router = router
        self._resilience = resilience
        self._words = MemoryWords(segment.cells[first:end], segment.reals[first:end])
        self._ledger = Ledger(Table(0, at.PAIR_LEDGER_ROWS), BAN_AFTER, BAN_S)
        self._ids: dict[int, str] = {}

    # --- choosing

    def choose(
        self,
        asked: PairAsk,
        table: RoutingTable,
        pools: PairPools,
        plan: Plan,
        prompt_tokens: int,
        now: float,
        failed: Collection[int],
    ) -> Paired | Alone | None:
        """After `read_prompt`. None: no decode worker has memory for it now. Raises RequestError 503 as `Pool.nobody`.

        `failed`: slots of the workers that failed the request.
        """
        refused: set[int] = set(failed)
        for _ in range(MAX_TURNS):
            try:
                candidates, overruled = self._candidates(pools, prompt_tokens, refused, now)
            except RequestError:
                if pools.combined.workers:
                    return self._choose_combined(asked, table, pools, plan, prompt_tokens, now, refused)
                found_alone = self._without_prefill(pools, plan, prompt_tokens, refused, now)
                if found_alone is None:
                    raise
                candidates, overruled = found_alone
            if (
                asked.is_alone
                or self._is_short(pools, plan, candidates, prompt_tokens)
                or self._is_left_alone(pools, plan, candidates, refused)
            ):
                side = self._choose_alone(asked, table, pools.decode, candidates, plan, prompt_tokens, now)
                found: Paired | Alone = Alone(side)
            else:
                with_room = self._with_room(candidates, asked, prompt_tokens, now)
                idle = self._idle_combined(pools, candidates, prompt_tokens, refused, now, is_due=not with_room)
                if idle is not None:
                    return self._choose_combined(asked, table, idle, plan, prompt_tokens, now, refused)
                if not with_room:
                    return None
                found = self._choose_both(asked, table, pools, with_room, plan, prompt_tokens, now)
            sides = [found.side] if isinstance(found, Alone) else [found.prefill, found.decode]
            spoiled = next((side for side in sides if not self._enter(side, overruled, now)), None)
            if spoiled is None:
                return found
            for side in sides:
                self.finish(side, now, NEUTRAL, was_computed=False)
            refused.add(spoiled.booked.slot)
        raise pools.prefill.nobody("their breakers wait for the results of probes")

    def _candidates(
        self, pools: PairPools, prompt_tokens: int, failed: Collection[int], now: float
    ) -> tuple[list[tuple[int, int]], frozenset[int]]:
        """(pairs of slots, slots that are let in against their breakers)"""
        prefill = self._resilience.fit(pools.prefill, (), now)
        decode = self._resilience.fit(pools.decode, (), now)
        takes = [
            {worker.slot for worker in fit.pool.workers if _takes(worker, prompt_tokens)} for fit in (prefill, decode)
        ]
        fits = [(p, d) for p, d in pools.compatible if p in takes[0] and d in takes[1]]
        if not fits:
            if not takes[0] or not takes[1]:
                raise (prefill if not takes[0] else decode).pool.nobody(f"a prompt of {prompt_tokens} tokens")
            raise pools.prefill.nobody("no healthy decode worker has their kv_connector, pd_group and model")
        kept = [pair for pair in fits if pair[0] not in failed and pair[1] not in failed]
        kept = kept or [pair for pair in fits if pair[0] not in failed or pair[1] not in failed] or fits
        banned = self._banned(pools, kept, now)
        return partners(kept, banned) if banned else kept, prefill.overruled | decode.overruled

    def _without_prefill(
        self, pools: PairPools, plan: Plan, prompt_tokens: int, failed: Collection[int], now: float
    ) -> tuple[list[tuple[int, int]], frozenset[int]] | None:
        """As `_candidates`: decode workers whose partners for such a prompt are all down. None: there is none.

        One that never had a partner for it is none of them: that is how it was configured.
        """
        if not _does_without_prefill(pools, plan):
            return None
        fit = self._resilience.fit(pools.decode, failed, now)
        prefills = {worker.slot for worker in pools.prefill.workers if _takes(worker, prompt_tokens)}
        partnered = {decode for prefill, decode in pools.compatible if prefill in prefills}
        alone = [
            (NOBODY, worker.slot)
            for worker in fit.pool.workers
            if _takes(worker, prompt_tokens) and (worker.slot in partnered or not pools.prefill.workers)
        ]
        return (alone, fit.overruled) if alone else None

    def _banned(self, pools: PairPools, pairs: Sequence[tuple[int, int]], now: float) -> set[tuple[int, int]]:
        ids = self._ids_of(pools)
        with self._locked() as held:
            if not held:
                return set()
            return {pair for pair in pairs if self._ledger.is_banned(self._words, _key(ids, *pair), now)}

    def _is_short(
        self, pools: PairPools, plan: Plan, candidates: Sequence[tuple[int, int]], prompt_tokens: int
    ) -> bool:
        """Whether decode is quicker without help. SGLang's decode workers cannot prefill."""
        least = plan.pd.min_uncached_tokens
        decodes = {decode for _, decode in candidates}
        if not least or any(w.kv_connector == SGLANG for w in pools.decode.workers if w.slot in decodes):
            return False
        cached = self._router.cached_tokens(decodes, prompt_tokens)
        return prompt_tokens - cached < least

    def _is_left_alone(
        self, pools: PairPools, plan: Plan, candidates: Sequence[tuple[int, int]], failed: Collection[int]
    ) -> bool:
        """Whether there is no prefill worker, or none that has not failed the request, and decode makes up for it."""
        has_none = all(prefill == NOBODY or prefill in failed for prefill, _ in candidates)
        return has_none and _does_without_prefill(pools, plan)

    def _with_room(
        self, candidates: Sequence[tuple[int, int]], asked: PairAsk, prompt_tokens: int, now: float
    ) -> list[tuple[int, int]]:
        """Those whose decode worker has KV memory for the prompt and an answer of the usual length.

        Transfers to a decode worker without it wait there, and fail in the end. An idle worker always has room.
        """
        rooms: dict[int, bool] = {}
        with self._locked() as held:
            if not held:
                return list(candidates)
            mean = self._state.bookings.output_mean
            most = asked.ask.features.max_tokens
            need = (prompt_tokens + int(mean if most is None else min(most, mean))) * CHARS_PER_TOKEN
            for _, decode in candidates:
                if decode not in rooms:
                    rooms[decode] = self._has_room(decode, need, now)
        return [pair for pair in candidates if rooms[pair[1]]]

    def _has_room(self, slot: int, need: int, now: float) -> bool:
        bookings, segment = self._state.bookings, self._state.segment
        capacity = bookings.kv_chars(slot)
        if not capacity or segment.inflight(slot) <= 0:
            return True
        return max(bookings.tokens(slot) * CHARS_PER_TOKEN, 0) + bookings.reserved(slot) + need <= capacity

    def _choose_both(
        self,
        asked: PairAsk,
        table: RoutingTable,
        pools: PairPools,
        candidates: Sequence[tuple[int, int]],
        plan: Plan,
        prompt_tokens: int,
        now: float,
    ) -> Paired:
        assert plan.prefill is not None and plan.decode is not None
        ask = replace(asked.ask, features=_streamed(asked.ask.features, is_stream=True))
        pool = _only(pools.prefill, {prefill for prefill, _ in candidates})
        prefill = self._router.choose(ask, table, pool, plan.prefill, prompt_tokens, now)
        pool = _only(pools.decode, {decode for p, decode in candidates if p == prefill.slot})
        ask = Ask(
            _streamed(asked.ask.features, is_stream=False),
            asked.ask.body_bytes,
            is_retry=True,  # the request has paid for its retries
            is_fetched=True,
        )
        try:
            pool = self._near(pool, prefill.worker)
            decode = self._router.choose(ask, table, pool, plan.decode, prompt_tokens, now)
        except BaseException:
            self._router.finish(prefill, now, None, was_computed=False)
            raise
        return Paired(Side(prefill), Side(decode), _key(self._ids_of(pools), prefill.slot, decode.slot))

    def _near(self, pool: Pool, prefill: WorkerSpec) -> Pool:
        """Those on the prefill worker's host, unless they are much busier."""
        near = [position for position, worker in enumerate(pool.workers) if is_same_host(prefill, worker)]
        if not near or len(near) == len(pool.workers):
            return pool
        loads = self._state.words.survey(pool.slots)
        up = [load for load in loads if load >= 0]
        least = min((loads[position] for position in near if loads[position] >= 0), default=None)
        return pool if least is None or least > min(up) + NEAR_SLACK else pool.only(near)

    def _choose_alone(
        self,
        asked: PairAsk,
        table: RoutingTable,
        pool: Pool,
        candidates: Sequence[tuple[int, int]],
        plan: Plan,
        prompt_tokens: int,
        now: float,
    ) -> Side:
        assert plan.decode is not None
        pool = _only(pool, {decode for _, decode in candidates})
        return Side(self._router.choose(asked.ask, table, pool, plan.decode, prompt_tokens, now))

    def _idle_combined(
        self,
        pools: PairPools,
        candidates: Sequence[tuple[int, int]],
        prompt_tokens: int,
        refused: Collection[int],
        now: float,
        *,
        is_due: bool,
    ) -> PairPools | None:
        """`pools` with the combined workers that have next to nothing to do while pairs have too much.

        AIBrix's rule, by seconds of waiting instead of its queue over the rate at which it shrank. `is_due`: pairs have
        too much, whatever they say.
        """
        if not pools.combined.workers:
            return None
        loads = self._state.words.survey(pools.combined.slots)
        up = [
            worker.slot
            for worker, load in zip(pools.combined.workers, loads, strict=True)
            if load >= 0 and worker.slot not in refused and _takes(worker, prompt_tokens)
        ]
        with self._locked() as held:
            if not held:
                return None
            wait_s = self._state.bookings.wait_s
            if not is_due and all(wait_s(slot, now) <= BUSY_S for slot in {*chain.from_iterable(candidates)}):
                return None
            idle = {slot for slot in up if self._resilience.is_closed(slot) and wait_s(slot, now) < IDLE_S}
        return replace(pools, combined=_only(pools.combined, idle)) if idle else None

    def _choose_combined(
        self,
        asked: PairAsk,
        table: RoutingTable,
        pools: PairPools,
        plan: Plan,
        prompt_tokens: int,
        now: float,
        failed: Collection[int],
    ) -> Alone:
        """Raises RequestError 503."""
        assert plan.prefill is not None
        fit = self._resilience.fit(pools.combined, failed, now)
        side = Side(self._router.choose(asked.ask, table, fit.pool, plan.prefill, prompt_tokens, now))
        if not self._enter(side, fit.overruled, now):
            self.finish(side, now, NEUTRAL, was_computed=False)
            raise pools.combined.nobody("their breakers wait for the results of probes")
        return Alone(side)

    def _enter(self, side: Side, overruled: Collection[int], now: float) -> bool:
        """Whether the side's breaker lets it pass, with the ticket that it takes."""
        booked = side.booked
        if booked.slot in overruled:
            booked.ticket = UNCOUNTED
        elif not self._resilience.is_quiet() and not self._resilience.is_closed(booked.slot):
            ticket = self._resilience.acquire(booked.slot, now)
            if ticket is None:
                return False
            booked.ticket, side.is_probe = ticket, ticket != UNCOUNTED
        return True

    def has_other(self, pools: PairPools, plan: Plan, failed: Collection[int], now: float) -> bool:
        """Whether a pair is left of which neither has failed the request, or a decode worker that does without."""
        has = self._resilience.has_other
        if not has(pools.decode, failed, now):
            return False
        return _does_without_prefill(pools, plan) or has(pools.prefill, failed, now)

    # --- what became of it

    def finish(self, side: Side, now: float, verdict: int, *, was_computed: bool) -> None:
        """Once for a side that the exchange itself does not end."""
        is_news = self._router.finish(side.booked, now, None, was_computed=was_computed, verdict=verdict)
        if is_news or side.is_probe:
            side.is_probe = False
            self._resilience.record(side.booked.slot, side.booked.ticket, VERDICTS[verdict], now)

    def succeeded(self, paired: Paired, now: float) -> None:
        with self._locked() as held:
            if held:
                self._ledger.succeeded(self._words, paired.key, now)

    def failed(self, paired: Paired, pools: PairPools, began: float, now: float) -> tuple[Charge, bool]:
        """As `Ledger.failed`, of an open failure. `began`: when the attempt was sent."""
        ids, prefill, decode = self._ids_of(pools), paired.prefill.booked.slot, paired.decode.booked.slot
        attempt = Failed(
            paired.key,
            key_of_bytes(ids[prefill].encode()),
            key_of_bytes(ids[decode].encode()),
            [_key(ids, p, d) for p, d in pools.compatible if p == prefill and d != decode],
            [_key(ids, p, d) for p, d in pools.compatible if d == decode and p != prefill],
            began,
        )
        with self._locked() as held:
            if not held:
                return Charge.NOBODY, False
            return self._ledger.failed(self._words, attempt, now)

    def _ids_of(self, pools: PairPools) -> dict[int, str]:
        return {worker.slot: worker.id for pool in (pools.prefill, pools.decode) for worker in pool.workers}

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        with self._state.locked(LOCK_DEADLINE_US) as held:
            yield held


def _takes(worker: WorkerSpec, prompt_tokens: int) -> bool:
    return worker.prompt_tokens_min <= prompt_tokens <= worker.prompt_tokens_max


def _does_without_prefill(pools: PairPools, plan: Plan) -> bool:
    """SGLang's decode workers cannot prefill."""
    can = not any(worker.kv_connector == SGLANG for worker in pools.decode.workers)
    return can and plan.pd.decode_without_prefill


def _streamed(features: Features, *, is_stream: bool) -> Features:
    """What a pick reads of them. Who streams shows its first token; a decode worker's is not the end of a prefill."""
    return Features(features.model, is_stream, features.lora, features.max_tokens)


def _only(pool: Pool, slots: Collection[int]) -> Pool:
    return pool.only([position for position, slot in enumerate(pool.slots) if slot in slots])


def _key(ids: dict[int, str], prefill: int, decode: int) -> int:
    return key_of_bytes(f"{ids[prefill]}\0{ids[decode]}".encode())
