"""The course of an upgrade as the old supervisor decides it. Pure: it is told what has happened, and says what to do.

    STARTING ── standing by, no rollout under way ──> YIELDING ── control has yielded ──> TAKING_OVER ── serving ──>
    commit. From any of them: the new one ended or failed, or the time is over ──> give up.

From YIELDING on the old daemon has no control process that could serve: after a give-up it needs another one.
"""

from __future__ import annotations

from enum import Enum, auto
from math import inf

YIELD_S = 12.0
"""for control to end what it does and to save what was learned; then it is killed, and its lock and sockets go"""


class Phase(Enum):
    STARTING = auto()
    YIELDING = auto()
    TAKING_OVER = auto()


class Step(Enum):
    YIELD = auto()
    """Tell control to give up the state directory and the admin sockets."""
    KILL_CONTROL = auto()
    GO = auto()
    COMMIT = auto()
    GIVE_UP = auto()
    """See `failure`."""


class Upgrade:
    def __init__(self, now: float, timeout_s: float) -> None:
        self.started = now
        self.timeout_s = timeout_s
        self.phase = Phase.STARTING
        self.failure = ""
        self.is_standing_by = False
        self.has_yielded = False
        self.is_serving = False
        self._yield_until = 0.0

    @property
    def holds_control(self) -> bool:
        """Control has been asked to yield: it must not be started again before the end."""
        return self.phase is not Phase.STARTING

    def failed(self, reason: str) -> None:
        """The first reason is the best one."""
        self.failure = self.failure or reason

    def step(self, now: float, *, is_control_running: bool, is_rolling_out: bool) -> Step | None:
        """What to do now, once each; call it again after it was done, until it returns None."""
        if now - self.started > self.timeout_s:
            self.failed(f"not ready within {self.timeout_s:g} s")
        if self.failure:
            return Step.GIVE_UP
        if self.phase is Phase.STARTING and self.is_standing_by and not is_rolling_out:
            self.phase = Phase.YIELDING
            self._yield_until = now + YIELD_S
            return Step.YIELD
        if self.phase is Phase.YIELDING:
            if self.has_yielded or not is_control_running:
                self.phase = Phase.TAKING_OVER
                return Step.GO
            if now > self._yield_until:
                self._yield_until = inf
                return Step.KILL_CONTROL
            return None
        if self.phase is Phase.TAKING_OVER and self.is_serving:
            return Step.COMMIT
        return None
