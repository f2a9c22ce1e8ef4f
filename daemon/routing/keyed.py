"""Policies that go by a key: the same key, the same worker, unless it has too much to do.

`consistent_hash`: the key is a routing or session header, else who the client says it is; no key at all: least load.
`prefix_hash`: the key is the head of the prompt (about 256 tokens). Both rank the workers by highest random weight and
take the first whose load stays within the bound (consistent hashing with bounded loads, Mirrokni 2016): a hot key
spills to the next of its ranking and comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import msgspec

from pointsman.daemon.routing.picking import (
    LOAD,
    NAMED,
    ONLY_ELIGIBLE,
    PREFIX,
    SPILL,
    Explanation,
    Pick,
    Situation,
    least,
    single_column,
)
from pointsman.daemon.routing.scorers import MAX_KEY, rendezvous, session_key

_IDENTITY_HEADERS = ("authorization", "x-forwarded-for", "cookie")


class KeyedParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    load_factor: float = 1.25
    """The most load over the mean that a key may find at its worker."""
    slack: int = 1
    """Requests above the mean that are always allowed: small fleets at low load must not spill."""
    head_chars: int = 1024
    """Of the prompt, for `prefix_hash`: whole blocks, at least one."""


def header_key(situation: Situation) -> str:
    headers = situation.request.headers
    key = session_key(headers)
    return key or next((headers[name][:MAX_KEY] for name in _IDENTITY_HEADERS if headers.get(name)), "")


def head_key(situation: Situation, head_chars: int) -> str:
    head = situation.chain.head(head_chars)
    return str(head) if head else ""


class Keyed:
    """`is_prefix`: by the head of the prompt instead of by headers."""

    def __init__(self, parameters: KeyedParameters | None = None, *, is_prefix: bool = False) -> None:
        self.parameters = parameters or KeyedParameters()
        self._is_prefix = is_prefix
        self._name = "prefix_hash" if is_prefix else "consistent_hash"

    def pick(self, situation: Situation) -> Pick:
        eligible, loads = situation.eligible, situation.fleet.loads
        if len(eligible) == 1:
            return Pick(eligible[0], ONLY_ELIGIBLE)
        key = self._key(situation)
        if not key:
            return Pick(eligible[least([loads[worker].in_flight for worker in eligible], situation.rng)], LOAD)
        ranking = self._ranking(situation, key)
        bound = self._bound(situation)
        for place, worker in enumerate(ranking):
            if loads[worker].in_flight < bound:
                return Pick(worker, SPILL if place else PREFIX if self._is_prefix else NAMED)
        return Pick(ranking[0], PREFIX if self._is_prefix else NAMED)

    def explain(self, situation: Situation) -> Explanation:
        key = self._key(situation)
        ranking = self._ranking(situation, key) if key else situation.eligible
        bound = self._bound(situation)
        loads = situation.fleet.loads
        places = {worker: float(place) for place, worker in enumerate(ranking)}
        full = {
            w: f"{loads[w].in_flight} requests, bound {bound}" for w in ranking if key and loads[w].in_flight >= bound
        }
        explanation = single_column(self._name, places)
        return Explanation(explanation.columns, places, True, (), full)

    def _key(self, situation: Situation) -> str:
        return head_key(situation, self.parameters.head_chars) if self._is_prefix else header_key(situation)

    def _ranking(self, situation: Situation, key: str) -> Sequence[int]:
        names = situation.fleet.workers
        return sorted(situation.eligible, key=lambda worker: rendezvous(key, names[worker].name), reverse=True)

    def _bound(self, situation: Situation) -> int:
        """Requests in flight at which a worker is full: ceil(factor * mean), at least mean + slack; this one counts."""
        total = 1 + sum(situation.fleet.loads[worker].in_flight for worker in situation.eligible)
        mean = total / len(situation.eligible)
        return max(ceil(self.parameters.load_factor * mean), ceil(mean) + self.parameters.slack)
