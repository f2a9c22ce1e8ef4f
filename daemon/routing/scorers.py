"""Scorers: each gives every candidate a number. A policy or a chain turns numbers into a pick.

The names are AIBrix's (`pkg/plugins/gateway/algorithms`), with its polarity. Where its code does not do what the
name says, the name is kept and the promise implemented:

* `throughput`: there twice the mean prompt length plus the mean answer length of a day; here the tokens that the
  worker was sent and gave in about the last minute (half-life 60 s), least first.
* `least-latency`: there the queue term is always 0 and the means are those of a day; here the predicted seconds to
  the end: line, prefill of what is not cached, expected output at the worker's own pace.
* `least-kv-cache`, `least-gpu-cache`, `least-busy-time`, `least-utilization`: there random without the engine's
  gauge; here our own bookkeeping of the same quantity, and the choice counts as degraded.
* `vtc-basic`: there the fairness term is taken over a shuffled list and usage is never corrected; here over the
  workers in declaration order, and what was charged is replaced by real usage at the end.
* `prefix-cache-preble`: there constants of one GPU and model; here the learned cost model.
* `random` in a chain is a constant (there a 400).
"""

from __future__ import annotations

from base64 import urlsafe_b64decode
from binascii import Error as Base64Error
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

from pointsman.daemon.routing.fleet import Signals
from pointsman.daemon.routing.picking import Situation
from pointsman.daemon.routing.prompt import CHARS_PER_TOKEN
from pointsman.daemon.routing.views import LoadView

MAX_KEY = 256
"""Characters of a session key; longer ones are cut."""


class Scores(NamedTuple):
    """By position in `situation.eligible`; None = not scored. `is_degraded`: stands in for a missing or old metric."""

    values: Sequence[float | None]
    is_degraded: bool = False


class Scorer(NamedTuple):
    name: str
    is_least_best: bool
    score: Callable[[Situation], Scores]


def _loads(situation: Situation) -> list[LoadView]:
    return [situation.fleet.loads[worker] for worker in situation.eligible]


def _least_request(situation: Situation) -> Scores:
    return Scores([float(load.in_flight) for load in _loads(situation)])


def _throughput(situation: Situation) -> Scores:
    return Scores([load.served(situation.now) for load in _loads(situation)])


def _prefix_cache(situation: Situation) -> Scores:
    return Scores([100 * situation.matched_share(worker) for worker in situation.eligible])


def _prefix_cache_preble(situation: Situation) -> Scores:
    """Preble's E2: exploit a long match among its holders by load, else explore by predicted seconds of work."""
    fleet, eligible = situation.fleet, situation.eligible
    best = max(situation.depths[worker] for worker in eligible)
    exploits = best > 0 and situation.chain.chars(best) > 0.5 * situation.chain.total_chars
    values: list[float | None] = []
    for worker in eligible:
        load = fleet.loads[worker]
        busy = load.wait_s(situation.now) + load.decoding * load.tpot.value
        if not exploits:
            values.append(busy + situation.prefill_s(worker))
        else:
            values.append(busy if situation.depths[worker] == best else None)
    return Scores(values)


def booked_kv_share(situation: Situation, worker: int) -> float:
    """KV memory of requests in flight, 0..1 of the capacity; of an unknown one: tokens over a million."""
    fleet = situation.fleet
    load = fleet.loads[worker]
    capacity = fleet.kv_chars[worker] or 1_000_000 * CHARS_PER_TOKEN
    held = load.tokens * CHARS_PER_TOKEN + load.reserved_chars
    return min(held / capacity, 1.0)


def _by_signal(
    situation: Situation, read: Callable[[Signals], float | None], own: Callable[[Situation, int], float]
) -> Scores:
    values: list[float | None] = []
    is_degraded = False
    for worker in situation.eligible:
        signals = situation.fleet.loads[worker].fresh_signals(situation.now)
        value = None if signals is None else read(signals)
        if value is None:
            is_degraded = True
            value = own(situation, worker)
        values.append(value)
    return Scores(values, is_degraded)


def _least_gpu_cache(situation: Situation) -> Scores:
    return _by_signal(situation, lambda signals: signals.kv_usage, booked_kv_share)


def _least_kv_cache(situation: Situation) -> Scores:
    def read(signals: Signals) -> float | None:
        return None if signals.kv_usage is None else signals.kv_usage + (signals.cpu_kv_usage or 0.0)

    return _by_signal(situation, read, booked_kv_share)


def _least_busy_time(situation: Situation) -> Scores:
    return _by_signal(
        situation, lambda signals: signals.busy, lambda s, worker: s.fleet.loads[worker].busy(situation.now)
    )


def _least_utilization(situation: Situation) -> Scores:
    def own(situation: Situation, worker: int) -> float:
        load = situation.fleet.loads[worker]
        return max(booked_kv_share(situation, worker), load.busy(situation.now) if load.in_flight else 0.0)

    return _by_signal(situation, lambda signals: signals.utilization, own)


def predicted_latency_s(situation: Situation, worker: int) -> float:
    """Seconds to the end of the answer: line, prefill, expected output at the worker's pace."""
    load, output = situation.fleet.loads[worker], situation.fleet.output_mean.value
    asked = situation.request.max_tokens
    expected = output if asked is None else min(output, asked)
    return load.wait_s(situation.now) + situation.prefill_s(worker) + expected * load.tpot.value


def _least_latency(situation: Situation) -> Scores:
    return Scores([predicted_latency_s(situation, worker) for worker in situation.eligible])


_VTC_WEIGHT_FAIRNESS = 1.0
_VTC_WEIGHT_LOAD = 1.0
_VTC_FULL = 100.0
_VTC_LEAST_BUCKET = 1000.0


def _vtc_basic(situation: Situation) -> Scores:
    """Users are laid out over the workers by the tokens they had: light users to the front, heavy ones to the back."""
    user = situation.request.headers.get("user", "")[:MAX_KEY]
    loads = _loads(situation)
    busy = [_VTC_WEIGHT_LOAD * min(load.in_flight / _VTC_FULL, 1.0) for load in loads]
    if not user:
        return Scores(busy)
    own, least, most = situation.fleet.user_usage(user, situation.now)
    bucket = max(_VTC_LEAST_BUCKET, (least + most) / 2)
    place = min(own / bucket, len(loads) - 1)
    return Scores([_VTC_WEIGHT_FAIRNESS * abs(i - place) + cost for i, cost in enumerate(busy)])


def session_key(headers: Mapping[str, str]) -> str:
    """Who belongs together, by the headers of SGLang and AIBrix; "" = nobody says."""
    for name in ("x-smg-routing-key", "x-aibrix-session-key", "x-session-id"):
        value = headers.get(name)
        if value:
            return value[:MAX_KEY]
    return ""


def rendezvous(key: str, name: str) -> int:
    """Highest random weight of worker `name` for `key`: a worker that leaves moves only its own keys."""
    return int.from_bytes(blake2b(f"{key}\0{name}".encode(), digest_size=8).digest(), "little")


def _named_worker(value: str) -> str:
    """AIBrix's `x-session-id` is the worker's address in base64; "" when it is not."""
    try:
        return urlsafe_b64decode(value + "=" * (-len(value) % 4)).decode()
    except (Base64Error, UnicodeDecodeError, ValueError):
        return ""


def _session_affinity(situation: Situation) -> Scores:
    """1 for the worker that the session belongs to, else 0; nobody is scored for a request without a session."""
    names = [situation.fleet.workers[worker].name for worker in situation.eligible]
    named = _named_worker(situation.request.headers.get("x-session-id", ""))
    hits = [i for i, name in enumerate(names) if named and (name == named or name.rpartition("://")[2] == named)]
    if not hits:
        key = session_key(situation.request.headers)
        if not key:
            return Scores([None] * len(names))
        hits = [max(range(len(names)), key=lambda i: rendezvous(key, names[i]))]
    return Scores([float(i == hits[0]) for i in range(len(names))])


def _constant(situation: Situation) -> Scores:
    return Scores([1.0] * len(situation.eligible))


SCORERS: dict[str, Scorer] = {
    scorer.name: scorer
    for scorer in (
        Scorer("least_request", True, _least_request),
        Scorer("throughput", True, _throughput),
        Scorer("prefix_cache", False, _prefix_cache),
        Scorer("prefix_cache_preble", True, _prefix_cache_preble),
        Scorer("least_kv_cache", True, _least_kv_cache),
        Scorer("least_gpu_cache", True, _least_gpu_cache),
        Scorer("least_latency", True, _least_latency),
        Scorer("least_busy_time", True, _least_busy_time),
        Scorer("least_utilization", True, _least_utilization),
        Scorer("vtc_basic", True, _vtc_basic),
        Scorer("session_affinity", False, _session_affinity),
        Scorer("random", False, _constant),
    )
}
"""By canonical name (`-` is `_`); costs.py adds ours."""
