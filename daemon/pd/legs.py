"""Events and commands of the pair machines.

A machine is told what happens to the two legs of one attempt and answers what to do, in order. It is driven by
`relay.pair`, which has the connections, and by tests, which have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from pointsman.daemon.resilience.retry import Outcome, OutcomeKind


class Leg(IntEnum):
    PREFILL = 0
    DECODE = 1

    @property
    def other(self) -> Leg:
        return Leg.DECODE if self is Leg.PREFILL else Leg.PREFILL


class LegState(IntEnum):
    IDLE = 0
    SENT = 1
    HEADED = 2
    BEGUN = 3
    FINISHED = 4
    FAILED = 5


RUNNING = (LegState.SENT, LegState.HEADED, LegState.BEGUN)
TIMEOUT = Outcome(OutcomeKind.TIMEOUT)


# --- events


@dataclass(frozen=True, slots=True)
class Started:
    """Workers are picked and booked."""


@dataclass(frozen=True, slots=True)
class Headed:
    """The head of a leg's answer came."""

    leg: Leg
    outcome: Outcome | None = None
    """how it fails the attempt; None: a good head"""


@dataclass(frozen=True, slots=True)
class FirstByte:
    """Of the body. Decode's: it goes to the client, nothing can be taken back from here on."""

    leg: Leg


@dataclass(frozen=True, slots=True)
class Finished:
    """A leg's answer is complete. `params`: what prefill told for decode, where that is so."""

    leg: Leg
    params: bytes | None = None


@dataclass(frozen=True, slots=True)
class Broken:
    """A leg could not be sent, broke, or (its first event) told an error."""

    leg: Leg
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class TimedOut:
    """No first token in time."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """The request is over for a reason that is none of the legs': its client left, a deadline of all of it passed."""


Event = Started | Headed | FirstByte | Finished | Broken | TimedOut | Stopped


# --- commands


@dataclass(frozen=True, slots=True)
class Send:
    leg: Leg
    params: bytes | None = None
    """what prefill told, for decode"""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Close the leg's connection, which aborts its request at the engine."""

    leg: Leg


@dataclass(frozen=True, slots=True)
class Drain:
    """Read the leg's answer to its end and throw it away, so that its connection can be used again."""

    leg: Leg


@dataclass(frozen=True, slots=True)
class Unload:
    """The prefill is computed: its load ends, and a hold on the worker begins, which has the KV that decode fetches."""


@dataclass(frozen=True, slots=True)
class LetGo:
    """Decode has it: the hold ends."""


@dataclass(frozen=True, slots=True)
class Fail:
    """The attempt has failed."""

    outcome: Outcome
    leg: Leg
    """where it was seen"""
    is_open: bool
    """It may be the other leg's fault, or the way between them: `ledger` judges."""


Command = Send | Cancel | Drain | Unload | LetGo | Fail

OVERLOADED = frozenset({429, 503})
MISSING_PARAMS = Outcome(OutcomeKind.STATUS, 502)
"""of a prefill worker that answers well, but says nothing for decode"""


def is_open_question(outcome: Outcome) -> bool:
    """Whether a failed leg may have failed because of the other one.

    An engine that cannot be reached, goes away, is full, or does not like the request speaks for itself. Any other
    error of an engine may be a transfer that did not come about.
    """
    if outcome.kind is OutcomeKind.ERROR_EVENT or outcome.kind is OutcomeKind.STATUS:
        return outcome.counts_as >= 500 and outcome.counts_as not in OVERLOADED
    return False
