"""SGLang's protocol: both legs at once, they meet by the room.

Theory of operation. Each leg is in one of these states:

    idle ── sent ── headed ── begun (a byte of the body) ── finished
              └───────┴──────────┴── failed

and the attempt ends with the first of these:

    event                                     prefill                        decode
    bad head, break, error event              cancel decode, fail            cancel prefill, fail
      … after decode has begun                nothing: decode has the KV     cancel prefill (the client's stream is cut)
    first byte                                its load ends, hold            hold ends, prefill is drained
    no first token in time                    whoever gave no head, if the other one did; open otherwise
    finished                                  as its first byte              prefill is drained

A leg whose partner is gone would wait for the transfer until the engine's own timeout, which is minutes: that is why
nothing is waited for.
"""

from __future__ import annotations

from pointsman.daemon.pd.legs import (
    RUNNING,
    TIMEOUT,
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


class BootstrapPair:
    """One attempt. After `Fail` or `Stopped` it answers nothing more."""

    def __init__(self) -> None:
        self.states = [LegState.IDLE, LegState.IDLE]
        self.is_over = False
        self._is_unloaded = False
        self._is_let_go = False

    @property
    def has_begun(self) -> bool:
        """Decode's answer is under way."""
        return self.states[Leg.DECODE] in (LegState.BEGUN, LegState.FINISHED)

    def receive(self, event: Event, now: float) -> list[Command]:
        """`now`: seconds of a monotonic clock; this protocol has no time of its own."""
        leg = getattr(event, "leg", None)
        if self.is_over or (leg is not None and self.states[leg] not in RUNNING):
            return []
        match event:
            case Started():
                self.states = [LegState.SENT, LegState.SENT]
                return [Send(Leg.PREFILL), Send(Leg.DECODE)]
            case Headed(leg, outcome):
                if outcome is not None:
                    return self._failed(leg, outcome)
                self.states[leg] = max(self.states[leg], LegState.HEADED)
                return []
            case FirstByte(leg):
                self.states[leg] = max(self.states[leg], LegState.BEGUN)
                return self._unload() if leg is Leg.PREFILL else self._begin()
            case Finished(leg):
                return self._finished(leg)
            case Broken(leg, outcome):
                return self._failed(leg, outcome)
            case TimedOut():
                return self._timed_out()
            case Stopped():
                self.is_over = True
                return [*self._cancel(Leg.PREFILL), *self._cancel(Leg.DECODE), *self._let_go()]

    def _unload(self) -> list[Command]:
        if self._is_unloaded:
            return []
        self._is_unloaded = True
        return [Unload()]

    def _let_go(self) -> list[Command]:
        if self._is_let_go or not self._is_unloaded:
            return []
        self._is_let_go = True
        return [LetGo()]

    def _begin(self) -> list[Command]:
        return [*self._unload(), *self._let_go()]

    def _finished(self, leg: Leg) -> list[Command]:
        self.states[leg] = LegState.FINISHED
        if leg is Leg.PREFILL:
            return self._unload()
        self.is_over = True
        drain: list[Command] = [Drain(Leg.PREFILL)] if self.states[Leg.PREFILL] in RUNNING else []
        return [*self._begin(), *drain]

    def _cancel(self, leg: Leg) -> list[Command]:
        return [Cancel(leg)] if self.states[leg] in RUNNING else []

    def _failed(self, leg: Leg, outcome: Outcome) -> list[Command]:
        had_begun = self.has_begun
        self.states[leg] = LegState.FAILED
        if leg is Leg.PREFILL and had_begun:
            return []
        self.is_over = True
        over: list[Command] = [*self._cancel(leg.other), *self._let_go()]
        if had_begun:
            return over
        return [*over, Fail(outcome, leg, is_open_question(outcome))]

    def _timed_out(self) -> list[Command]:
        if self.has_begun:
            return []
        silent = [leg for leg in Leg if self.states[leg] == LegState.SENT]
        culprit = silent[0] if len(silent) == 1 else Leg.DECODE
        self.is_over = True
        over: list[Command] = [*self._cancel(Leg.PREFILL), *self._cancel(Leg.DECODE), *self._let_go()]
        return [*over, Fail(TIMEOUT, culprit, is_open=len(silent) != 1)]
