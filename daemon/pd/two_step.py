"""vLLM's protocol: prefill first, then decode with the parameters that prefill's answer has for it.

Theory of operation.

    prefill sent ──> prefilled (its parameters are good for the lease) ──> decode sent ──> begun ──> finished
         ^   │              │                                                  │
         │   v              │ older than the lease when decode could be sent   v
         │  failed          v                                                failed: another full pair
         └──────────── prefill again, once

The prefill worker keeps the blocks for the lease, then they may hold another prompt's KV, and nothing refuses to serve
them: parameters that are older are dropped here. `params` are opaque; of an engine that tells none (Mooncake's form)
the driver hands in what it made itself.
"""

from __future__ import annotations

from pointsman.daemon.pd.legs import (
    MISSING_PARAMS,
    RUNNING,
    TIMEOUT,
    Broken,
    Cancel,
    Command,
    Event,
    Fail,
    Finished,
    FirstByte,
    Headed,
    Leg,
    LegState,
    LetGo,
    Send,
    Started,
    Stopped,
    TimedOut,
    Unload,
    is_open_question,
)
from pointsman.daemon.resilience.retry import Outcome

MAX_PREFILLS = 2
"""of one attempt: the first one, and one for parameters that grew old"""


class TwoStepPair:
    """One attempt. `lease_s`: how long prefill's parameters are good."""

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        self.states = [LegState.IDLE, LegState.IDLE]
        self.is_over = False
        self._params: bytes | None = None
        self._told_at = 0.0
        self._prefills = 0
        self._is_held = False

    @property
    def has_begun(self) -> bool:
        return self.states[Leg.DECODE] in (LegState.BEGUN, LegState.FINISHED)

    def receive(self, event: Event, now: float) -> list[Command]:
        """`now`: seconds of a monotonic clock."""
        leg = getattr(event, "leg", None)
        if self.is_over or (leg is not None and self.states[leg] not in RUNNING):
            return []
        match event:
            case Started():
                return self._prefill()
            case Headed(leg, outcome):
                if outcome is not None:
                    return self._failed(leg, outcome)
                self.states[leg] = max(self.states[leg], LegState.HEADED)
                return []
            case FirstByte(leg):
                self.states[leg] = max(self.states[leg], LegState.BEGUN)
                return self._let_go() if leg is Leg.DECODE else []
            case Finished(Leg.PREFILL, params):
                return self._prefilled(params, now)
            case Finished():
                self.states[Leg.DECODE] = LegState.FINISHED
                self.is_over = True
                return self._let_go()
            case Broken(leg, outcome):
                return self._failed(leg, outcome)
            case TimedOut():
                leg = Leg.PREFILL if self.states[Leg.PREFILL] in RUNNING else Leg.DECODE
                return [] if self.has_begun else [*self._cancel(leg), *self._fail(leg, TIMEOUT, is_open=False)]
            case Stopped():
                self.is_over = True
                return [*self._cancel(Leg.PREFILL), *self._cancel(Leg.DECODE), *self._let_go()]

    def can_send_decode(self, now: float) -> list[Command]:
        """Decode has a connection: empty, go on; otherwise the parameters are too old for it, do this instead."""
        if now - self._told_at < self.lease_s:
            return []
        over = self._let_go()
        self.states[Leg.DECODE] = LegState.IDLE
        if self._prefills >= MAX_PREFILLS:
            return [*over, *self._fail(Leg.DECODE, TIMEOUT, is_open=False)]
        return [*over, *self._prefill()]

    def _prefill(self) -> list[Command]:
        self.states[Leg.PREFILL] = LegState.SENT
        self._prefills += 1
        return [Send(Leg.PREFILL)]

    def _prefilled(self, params: bytes | None, now: float) -> list[Command]:
        self.states[Leg.PREFILL] = LegState.FINISHED
        if params is None:
            return self._fail(Leg.PREFILL, MISSING_PARAMS, is_open=False)
        self._params, self._told_at, self._is_held = params, now, True
        self.states[Leg.DECODE] = LegState.SENT
        return [Unload(), Send(Leg.DECODE, params)]

    def _let_go(self) -> list[Command]:
        if not self._is_held:
            return []
        self._is_held = False
        return [LetGo()]

    def _cancel(self, leg: Leg) -> list[Command]:
        return [Cancel(leg)] if self.states[leg] in RUNNING else []

    def _failed(self, leg: Leg, outcome: Outcome) -> list[Command]:
        had_begun = self.has_begun
        self.states[leg] = LegState.FAILED
        if had_begun:
            self.is_over = True
            return self._let_go()
        # prefill had nothing but the client's request to stumble over; decode had prefill's blocks, too
        return self._fail(leg, outcome, is_open=leg is Leg.DECODE and is_open_question(outcome))

    def _fail(self, leg: Leg, outcome: Outcome, *, is_open: bool) -> list[Command]:
        self.is_over = True
        return [*self._let_go(), Fail(outcome, leg, is_open)]
