"""A request whose prompt one worker computes and whose answer another one generates.

Theory of operation. The exchange is what it is for a plain request, with the *decode* worker: `exchange.booked`,
`exchange.upstream`, the answer that is relayed, deadlines, retries. A `Pair` stands beside it for as long as the
request lives: it picks both workers, keeps the prefill leg with its booking, and asks the machine of the protocol
(`pd.bootstrap`, `pd.two_step`) what follows from what. Each attempt has a machine of its own, and new rooms.

    exchange                                  pair                                      prefill leg
    _pick                ──>                  pick: both workers, both booked
    send                 ──>                  send: machine, Started           ──>      its request
                         <── send_now         Send(DECODE)
    good head, 1st byte  ──>                  tell                             <──      head, first byte, end
    attempt failed       ──>                  failed: who is charged           ──>      cancelled
    attempt_failed       <──                  Fail                             <──      bad head, broken
    end                  ──>                  end                              ──>      cancelled, or drained

The prefill worker is charged from the pick to the first token; then a *hold* says that decode has yet to fetch from it:
it is no load, but a draining worker waits for it, for the lease at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import nan
from typing import TYPE_CHECKING
from uuid import uuid4

import orjson

from pointsman.config.snapshot import WorkerSpec
from pointsman.daemon.dispatch.pairing import Alone, PairAsk, Paired
from pointsman.daemon.errors import RequestError, bad_answer, bad_request, model_not_found, no_decode_memory
from pointsman.daemon.pd import bodies
from pointsman.daemon.pd.bodies import Shape
from pointsman.daemon.pd.bootstrap import BootstrapPair
from pointsman.daemon.pd.ledger import Charge
from pointsman.daemon.pd.legs import (
    OVERLOADED,
    Broken,
    Cancel,
    Command,
    Drain,
    Event,
    Fail,
    Finished,
    FirstByte,
    Headed,
    Leg,
    LetGo,
    Send,
    Started,
    Stopped,
    TimedOut,
    Unload,
)
from pointsman.daemon.pd.two_step import TwoStepPair
from pointsman.daemon.relay.framing import BodyFraming
from pointsman.daemon.relay.heads import ResponseHead
from pointsman.daemon.relay.merging import Merging
from pointsman.daemon.relay.pair_probe import as_probed
from pointsman.daemon.relay.prefill_leg import PrefillLeg
from pointsman.daemon.relay.receiver import NOT_TAKEN
from pointsman.daemon.relay.retrying import attempt_failed, is_retried, status_outcome
from pointsman.daemon.relay.routes import PAIR_PROBE
from pointsman.daemon.resilience.breaker import Verdict
from pointsman.daemon.resilience.retry import Outcome, OutcomeKind
from pointsman.daemon.routing.pairs import MOONCAKE, is_bootstrap
from pointsman.daemon.routing.table import PairPools, Plan, Pool
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.choosing import FAILED, NEUTRAL, SUCCEEDED, Booked

if TYPE_CHECKING:
    from pointsman.daemon.relay.exchange import Exchange

PATHS = frozenset(("/generate", "/v1/completions", "/v1/chat/completions"))
"""What both engines take in two legs."""
GENERATING = frozenset((*PATHS, "/v1/responses", "/v1/messages"))


def pair_up(exchange: Exchange, plan: Plan, regular: Pool | None) -> tuple[Pair | None, Pool]:
    """Whether the request goes to a pair, and otherwise to whom: `regular`, unless only pairs serve its model.

    Raises RequestError.
    """
    if exchange.route is PAIR_PROBE:
        return _probe(exchange, plan)
    pairs, path = exchange.table.pairs_for(exchange.features.model, plan), exchange.route.path
    if pairs is None:
        if regular is None:
            raise model_not_found(exchange.features.model)
        return None, regular
    if path in PATHS:
        return Pair(exchange, pairs, plan, bodies.shape_of(exchange.request.body())), pairs.decode
    if path not in GENERATING:
        return None, pairs.prefill
    if not pairs.combined.workers:
        message = f"prefill and decode workers do not serve {path}; ask {', '.join(sorted(PATHS))}"
        raise bad_request(message, code="not_for_pairs")
    return None, pairs.combined


def _probe(exchange: Exchange, plan: Plan) -> tuple[Pair, Pool]:
    pairs = exchange.table.pairs_of(exchange.features.model)
    if pairs is None:
        raise model_not_found(exchange.features.model)
    pairs, plan = as_probed(pairs, plan)
    return Pair(exchange, pairs, plan, Shape()), pairs.decode


class Pair:
    machine: BootstrapPair | TwoStepPair
    paired: Paired | None = None
    """the workers of the attempt; None: one worker does it alone, or none is picked"""
    decode_body: bytes | None = None
    """what decode is sent in place of the client's body"""
    leg: PrefillLeg | None = None
    prefill_worker: WorkerSpec | None = None
    """who computed the prompt in the last attempt, or was to; None: one worker does it alone"""
    prefill_s = nan
    """from the sending of the last attempt's prefill leg to its first token"""
    transfer_s = nan
    """from there to decode's first byte"""
    merging: Merging | None = None
    """of prefill's input logprobs into decode's answer"""
    waits_since = 0.0
    """for memory at a decode worker"""
    _failure: Fail | None = None
    _is_loaded = False
    """the prefill worker's booking is not over"""
    _holds = False
    _lease: asyncio.TimerHandle | None = None
    _sent_at = 0.0
    _unloaded_at = 0.0
    _is_resent = False

    def __init__(self, exchange: Exchange, pools: PairPools, plan: Plan, shape: Shape) -> None:
        self.exchange = exchange
        self.context = exchange.context
        self.pools = pools
        self.plan = plan
        self.shape = shape
        self._held: list[Callable[[], None]] = []
        """what sends the legs that a pause keeps from their engines"""

    # --- choosing

    def pick(self, prompt_tokens: int, failed: tuple[int, ...]) -> bool:
        """Both workers, booked; the exchange gets the decode worker. False: it waits for memory.

        Raises RequestError when nobody can take it.
        """
        exchange, context, now = self.exchange, self.context, self.context.now()
        self.paired, self.prefill_worker = None, None
        self.prefill_s = self.transfer_s = nan
        if not context.pairs.line.may_go(self):
            self._wait(now)
            return False
        ask = exchange.ask(self.plan, now)
        # vLLM's connectors hand over one sequence
        asked = PairAsk(ask, is_alone=self.shape.transfers is not None and not self._is_bootstrap)
        router = context.pairs.router
        found = router.choose(asked, exchange.table, self.pools, self.plan, prompt_tokens, now, failed)
        if found is None:
            self._wait(now)
            return False
        if isinstance(found, Alone):
            is_combined = found.side.worker.role == "regular"
            context.pairs.counts.event("combined" if is_combined else "decode_alone")
            exchange.take(found.side.booked, found.side.booked, is_probe=found.side.is_probe)
            return True
        self.paired, self._is_loaded, self.waits_since = found, True, 0.0
        self.prefill_worker = found.prefill.worker
        exchange.take(found.decode.booked, found.prefill.booked, is_probe=found.decode.is_probe)
        return True

    @property
    def _is_bootstrap(self) -> bool:
        """Of workers that are mixed, those of the first decode worker decide."""
        return any(is_bootstrap(worker) for worker in self.pools.decode.workers)

    def _wait(self, now: float) -> None:
        """Raises RequestError 503 when it has waited long enough."""
        limit_s = self.plan.pd.headroom_wait_s
        self.waits_since = self.waits_since or now
        if now - self.waits_since >= limit_s:
            self.context.pairs.counts.event("memory_refused")
            self.context.pairs.line.leave(self)
            raise no_decode_memory(limit_s)
        if self.context.pairs.line.join(self):
            self.context.pairs.counts.event("memory_wait")

    # --- sending

    def send(self) -> None:
        """Both legs, or the first one."""
        exchange, paired, now = self.exchange, self.paired, self.context.now()
        if exchange.booked is None:
            return  # it waits for memory
        self._failure, self.decode_body = None, None
        if paired is None:
            exchange.send_now()
            return
        if is_bootstrap(paired.prefill.worker):
            self.machine = BootstrapPair()
            self.merging = Merging(exchange) if self._merges else None
        else:
            self.machine = TwoStepPair(self.plan.pd.kv_lease_s)
        self._sent_at = now
        exchange.note_sent(now)
        self._do(self.machine.receive(Started(), now))

    @property
    def prefill_slot(self) -> int:
        """Of the worker that computes the prompt, or has what decode is to fetch; -1 = none (any more)."""
        is_needed = self.paired is not None and (self._is_loaded or self._holds)
        return self.paired.prefill.booked.slot if self.paired is not None and is_needed else -1

    @property
    def _merges(self) -> bool:
        """Only SGLang's own answers have input logprobs; a client of HTTP/1.0 gets no chunks of ours."""
        exchange = self.exchange
        is_native = exchange.route.path == "/generate"
        return is_native and self.shape.wants_input_logprobs and not exchange.request.is_http_1_0

    @property
    def header_line(self) -> bytes:
        """For the client: who computed the prompt."""
        if self.paired is None:
            return b""
        return b"X-Pointsman-Prefill-Worker: %b\r\n" % self.paired.prefill.worker.id.encode()

    def renew(self) -> None:
        """A connection that was reused turned out to be dead: the attempt begins anew, with the same workers."""
        self._drop_leg()
        self._let_go()
        self._held.clear()
        self._is_resent = True

    def _body(self) -> bytes:
        """The client's, or what asks for the rest of a broken stream."""
        rest = self.exchange.rest()
        return self.exchange.request.body() if rest is None else rest

    def _send_prefill(self) -> None:
        assert self.paired is not None
        worker = self.paired.prefill.worker
        if is_bootstrap(worker):
            # one body for both legs
            rooms = self.context.pairs.take_rooms(self.shape.transfers or 1)
            members = bodies.bootstrap_members(worker.host, worker.bootstrap_port, rooms, self.shape)
            body = self.decode_body = bodies.with_members(self._body(), members)
            collects = self._merges
        else:
            self._transfer_id = f"xfer-{uuid4().hex}"
            is_mooncake = worker.kv_connector == MOONCAKE
            params = bodies.mooncake_asks(self._transfer_id) if is_mooncake else bodies.NIXL_ASKS
            body = bodies.prefill_body(self._body(), params)
            collects = True
        self.context.pairs.counts.sent(Leg.PREFILL)
        self.leg = PrefillLeg(self, worker, body, collects=collects)
        self.leg.start(is_fresh=self._is_resent)

    def _send_decode(self, params: bytes | None) -> None:
        if params is not None:
            self.decode_body = bodies.decode_body(self._body(), params)
        self.context.pairs.counts.sent(Leg.DECODE)
        if self.context.is_paused():
            self.hold(self.exchange.send_now)
        else:
            self.exchange.send_now()

    def hold(self, send: Callable[[], None]) -> None:
        """`send` is called after the pause if the attempt has not ended by then."""
        self._held.append(send)
        self.exchange.hold(self._go_on)

    def _go_on(self) -> None:
        held, self._held = self._held, []
        for send in held:
            send()

    def may_send_decode(self) -> bool:
        """Decode has a connection. False: what prefill told has grown too old, something else has been begun."""
        if self.paired is None or isinstance(self.machine, BootstrapPair):
            return True
        commands = self.machine.can_send_decode(self.context.now())
        self._do(commands)
        self._pass_failure_on(bad_answer("the prefill worker's KV was not fetched in time"))
        return not commands

    # --- what the machine says

    def tell(self, event: Event) -> None:
        self._do(self.machine.receive(event, self.context.now()))

    def _do(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Send(Leg.PREFILL):
                    self._send_prefill()
                case Send(_, params):
                    self._send_decode(params)
                case Cancel(Leg.PREFILL):
                    self._cancel_leg()
                case Cancel():
                    self.exchange.abandon_leg()
                case Drain():
                    if self.leg is not None:
                        self.leg.drain()
                case Unload():
                    self._unload()
                case LetGo():
                    self._let_go()
                case Fail():
                    self._failure = command

    def _cancel_leg(self) -> None:
        if self.leg is not None:
            self.leg.cancel()
            self.leg = None

    def _drop_leg(self) -> None:
        self._cancel_leg()

    def _unload(self) -> None:
        """The prefill is computed."""
        assert self.paired is not None
        now, pairs = self.context.now(), self.context.pairs
        side = self.paired.prefill
        self._unloaded_at = now
        self.prefill_s = now - self._sent_at
        pairs.counts.observe("prefill", self.prefill_s)
        if self._is_loaded:
            self._is_loaded = False
            self.context.router.first_token(side.booked, now)
            pairs.router.finish(side, now, SUCCEEDED, was_computed=True)
        if not self._holds:
            self._holds = True
            self._count_hold(1)
            self._lease = self.context.loop.call_later(self.plan.pd.kv_lease_s, self._lease_over)

    def _lease_over(self) -> None:
        self._let_go()
        self.context.pairs.counts.event("lease_end")

    def _let_go(self) -> None:
        if self._lease is not None:
            self._lease.cancel()
            self._lease = None
        if self._holds:
            self._holds = False
            self._count_hold(-1)

    def _count_hold(self, change: int) -> None:
        assert self.paired is not None
        self.context.count_at(self.paired.prefill.booked.slot, at.L_HOLDS, change)

    # --- the prefill leg

    def prefill_finished(self, answer: bytes | None) -> None:
        assert self.paired is not None
        worker, params = self.paired.prefill.worker, None
        if not is_bootstrap(worker) and answer is not None:
            params = bodies.told_params(answer)
            if worker.kv_connector == MOONCAKE:
                params = self._mooncake_params(worker, params)
        merging = self.merging
        self.tell(Finished(Leg.PREFILL, params))
        if merging is not None:
            merging.prompt_known(answer or b"")
        self._pass_failure_on(bad_answer(f"the prefill worker {worker.url} told nothing for decode"))

    def _mooncake_params(self, worker: WorkerSpec, told: bytes | None) -> bytes:
        host = f"[{worker.host}]" if ":" in worker.host else worker.host
        address = f"http://{host}:{worker.bootstrap_port}"
        tells = bodies.mooncake_tells(self._transfer_id, bodies.engine_id(told), address)
        return orjson.dumps(tells)

    def prefill_broken(self, outcome: Outcome, reason: str | RequestError) -> None:
        """Its connection is gone."""
        self.tell(Broken(Leg.PREFILL, outcome))
        self._pass_failure_on(bad_answer(reason) if isinstance(reason, str) else reason)

    def _pass_failure_on(self, error: RequestError) -> None:
        if self._failure is not None:
            self.exchange.abandon_leg()
            attempt_failed(self.exchange, self._failure.outcome, error)

    def prefill_refused(
        self, leg: PrefillLeg, head: ResponseHead, framing: BodyFraming, data: bytes, position: int
    ) -> int | None:
        """A bad head: what follows. None: nothing, decode has what it needs.

        If no other attempt is made, the client gets this answer: the exchange goes on with the prefill worker alone.
        """
        exchange, connection, outcome = self.exchange, leg.connection, status_outcome(self.exchange, head)
        assert connection is not None
        self.tell(Headed(Leg.PREFILL, outcome))
        if self._failure is None:
            return None
        leg.connection = None
        exchange.abandon_leg()
        exchange.upstream = connection
        if is_retried(exchange, outcome, head, framing, data, position):
            return NOT_TAKEN
        booked, is_probe = self._hand_over()
        exchange.drop_booking()
        exchange.take(booked, booked, is_probe=is_probe)
        connection.exchange = exchange
        return exchange.open(head, framing, data, position)

    def _hand_over(self) -> tuple[Booked, bool]:
        """The booking of the prefill worker, which is the only one from here on, and whether it is a probe."""
        assert self.paired is not None and self.leg is not None
        side = self.paired.prefill
        if self._failure is not None:
            self._count_failure(Leg.PREFILL, self._failure.outcome)
        self.leg.pair, self.leg.heir = None, self.exchange
        self.paired, self.leg, self.merging, self._is_loaded = None, None, None, False
        return side.booked, side.is_probe

    # --- the exchange

    def decode_headed(self) -> None:
        if self.paired is not None:
            self.tell(Headed(Leg.DECODE))

    def decode_began(self) -> None:
        """Its first byte goes to the client."""
        paired, now = self.paired, self.context.now()
        if paired is None:
            return
        self.tell(FirstByte(Leg.DECODE))
        self.transfer_s = now - self._unloaded_at
        self.context.pairs.counts.observe("transfer", self.transfer_s)
        self.context.pairs.router.succeeded(paired, now)

    def failed(self, outcome: Outcome, verdict: Verdict) -> tuple[Verdict, tuple[int, ...]]:
        """The attempt has failed: (what decode's breaker hears, slots that the next one is to avoid)."""
        paired, now = self.paired, self.context.now()
        if paired is None:
            return verdict, () if self.exchange.booked is None else (self.exchange.booked.slot,)
        failure = self._failure
        if failure is None:
            is_timeout = outcome.kind is OutcomeKind.TIMEOUT
            self.tell(TimedOut() if is_timeout else Broken(Leg.DECODE, outcome))
            failure = self._failure or Fail(outcome, Leg.DECODE, is_open=False)
        self._count_failure(failure.leg, outcome)
        slots = [paired.prefill.booked.slot, paired.decode.booked.slot]
        charge = Charge.PREFILL if failure.leg is Leg.PREFILL else Charge.DECODE
        if failure.is_open:
            charge, is_banned = self.context.pairs.router.failed(paired, self.pools, self._sent_at, now)
            self.context.pairs.counts.event("open_failure")
            if is_banned:
                self.context.pairs.counts.event("ban")
        else:
            slots = [slots[failure.leg]]
        self._settle_prefill(verdict if charge is Charge.PREFILL else Verdict.NEUTRAL, now)
        self._forget_attempt()
        return verdict if charge is Charge.DECODE else Verdict.NEUTRAL, tuple(slots)

    def _count_failure(self, leg: Leg, outcome: Outcome) -> None:
        self.context.pairs.counts.failed(leg, _cause(outcome))

    def _settle_prefill(self, verdict: Verdict, now: float) -> None:
        """What its breaker hears, and the end of its booking if it has not ended."""
        assert self.paired is not None
        side = self.paired.prefill
        if self._is_loaded:
            self._is_loaded = False
            told = FAILED if verdict is Verdict.FAILURE else NEUTRAL
            self.context.pairs.router.finish(side, now, told, was_computed=False)
        elif verdict is Verdict.FAILURE:
            self.context.resilience.record(side.booked.slot, side.booked.ticket, verdict, now)

    def _forget_attempt(self) -> None:
        self._drop_leg()
        self._let_go()
        self._held.clear()
        self.paired, self.merging, self._unloaded_at, self._is_resent = None, None, 0.0, False

    def has_other(self, failed: tuple[int, ...], now: float) -> bool:
        return self.context.pairs.router.has_other(self.pools, self.plan, failed, now)

    def end(self, *, is_complete: bool) -> None:
        """The request is over."""
        self.context.pairs.line.leave(self)
        if self.paired is None:
            return
        self.tell(Finished(Leg.DECODE) if is_complete else Stopped())
        if is_complete:
            self.leg = None  # it drains by itself
        self._settle_prefill(Verdict.NEUTRAL, self.context.now())
        self._forget_attempt()


def _cause(outcome: Outcome) -> str:
    if outcome.kind is OutcomeKind.STATUS:
        return "overloaded" if outcome.status in OVERLOADED else "status"
    return _CAUSES[outcome.kind]


_CAUSES = {
    OutcomeKind.CONNECT_FAILED: "connect",
    OutcomeKind.STALE: "reset",
    OutcomeKind.RESET: "reset",
    OutcomeKind.TIMEOUT: "timeout",
    OutcomeKind.ERROR_EVENT: "error_event",
}
