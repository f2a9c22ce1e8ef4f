"""The decisions of late, from the shards' rings: one of them, the newest, and what they say about a worker."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean, quantiles
from typing import Any

import orjson

from pointsman.config.snapshot import WorkerSpec
from pointsman.daemon.errors import Fault, RequestError
from pointsman.daemon.routing.fleet import SIGNAL_STALE_S
from pointsman.daemon.routing.picking import (
    ONLY_ELIGIBLE,
    PREFIX,
    REASONS,
    SPILL,
    STALE,
)
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.decisions import UNKNOWN, DecisionRecord, key_of, read_decisions
from pointsman.daemon.shm.explanations import read_explanations
from pointsman.daemon.shm.routing_state import RoutingState
from pointsman.daemon.shm.segment import Segment

UNLOCKED = "unlocked"
TOP_GROUPS = 5


def newest(segment: Segment) -> Iterator[tuple[int, DecisionRecord]]:
    """(shard, record), of all shards, from the newest on."""
    found = [
        (record.ended_us, shard, record)
        for shard in range(segment.layout.shards)
        for record in read_decisions(segment, shard)
    ]
    found.sort(key=lambda row: row[0], reverse=True)
    return ((shard, record) for _, shard, record in found)


class Decisions:
    def __init__(self, state: RoutingState, workers: Callable[[], Sequence[WorkerSpec]]) -> None:
        self._state = state
        self._segment = state.segment
        self._workers = workers

    def one(self, request_id: str) -> dict[str, Any]:
        """Raises RequestError 404, which says how far back the rings reach."""
        key = key_of(request_id)
        oldest = time.time() * 1e6
        for shard, record in newest(self._segment):
            if record.request_key == key:
                return {
                    "id": request_id,
                    "shard": shard,
                    **self._shown(record),
                    "explanation": self._explanation(shard, key),
                }
            oldest = record.ended_us
        age = time.time() - oldest / 1e6
        message = (
            f"no decision of that id; the ones kept reach back {age:.0f} s ({at.DECISIONS} requests a shard),"
            " and a request has none before it has ended"
        )
        raise RequestError(404, "DECISION_NOT_FOUND", message, fault=Fault.CLIENT)

    def latest(self, limit: int, worker: WorkerSpec | None) -> list[dict[str, Any]]:
        rows = (
            {"shard": shard, **self._shown(record)}
            for shard, record in newest(self._segment)
            if worker is None or _is_of(record, worker)
        )
        return list(islice(rows, limit))

    def why(self, worker: WorkerSpec, last_s: float) -> dict[str, Any]:
        """What went to this worker in the last seconds, and why."""
        now = time.time()
        since_us = (now - last_s) * 1e6
        every = [record for _, record in newest(self._segment)]
        recent = [record for record in every if record.ended_us >= since_us]
        own = [record for record in recent if _is_of(record, worker)]
        covered_s = last_s
        is_cut = any(self._is_full(shard) for shard in range(self._segment.layout.shards))
        if is_cut and every and every[-1].ended_us > since_us:
            covered_s = now - every[-1].ended_us / 1e6
        facts = _facts(own, len(recent))
        load = self._load(worker)
        found = {
            "worker": worker.url,
            "id": worker.id,
            "asked_s": last_s,
            "covered_s": round(covered_s, 1),
            "is_covered": covered_s >= last_s,
            **facts,
            "load": load,
        }
        return found | {"advice": advice(found)}

    def _is_full(self, shard: int) -> bool:
        return self._segment.cells[self._segment.layout.decision_ring(shard)] > at.DECISIONS

    def _load(self, worker: WorkerSpec) -> dict[str, Any]:
        """What is booked beside what the engine says."""
        slot, bookings = worker.slot, self._state.bookings
        told = self._segment.signals(slot)
        return {
            "in_flight": self._segment.inflight(slot),
            "in_line_s": round(bookings.wait_s(slot, time.monotonic()), 4),
            "decoding": bookings.decoding(slot),
            "engine_running": told.running if told else None,
            "engine_waiting": told.waiting if told else None,
            "engine_kv_usage": told.kv_usage if told else None,
            "signal_age_s": round(time.monotonic() - told.at_s, 1) if told else None,
            "kv_tokens": self._state.kv_tokens(slot) or None,
            "index_chars": self._state.index.size(slot),
        }

    def _explanation(self, shard: int, key: int) -> Any:
        for record in read_explanations(self._segment, shard):
            if record.request_key == key:
                return orjson.loads(record.json)["explanation"]
        return None

    def _shown(self, record: DecisionRecord) -> dict[str, Any]:
        worker = next((w for w in self._workers() if _is_of(record, w)), None)
        return {
            "ended_at": record.ended_us / 1e6,
            "worker": worker.url if worker else None,
            "worker_id": worker.id if worker else None,
            "reason": _reason(record),
            "status": record.status,
            "prompt_tokens": record.prompt_tokens,
            "matched_tokens": record.believed_tokens,
            "engine_prompt_tokens": _known(record.engine_prompt_tokens),
            "engine_cached_tokens": _known(record.engine_cached_tokens),
            "output_tokens": _known(record.output_tokens),
            "predicted_ttft_s": record.predicted_us / 1e6,
            "ttft_s": None if record.first_byte_us == UNKNOWN else record.first_byte_us / 1e6,
            "total_s": record.total_us / 1e6,
            "group": f"{record.group:016x}" if record.group else None,
        }


def _is_of(record: DecisionRecord, worker: WorkerSpec) -> bool:
    return record.slot == worker.slot and record.worker_key == key_of(worker.id)


def _reason(record: DecisionRecord) -> str:
    return REASONS[record.reason] if 0 <= record.reason < len(REASONS) else UNLOCKED


def _known(value: int) -> int | None:
    return None if value == UNKNOWN else value


def _facts(own: Sequence[DecisionRecord], total: int) -> dict[str, Any]:
    count = len(own)
    reasons = Counter(map(_reason, own))
    groups = Counter(record.group for record in own if record.group)
    errors = [(record.predicted_us - record.first_byte_us) / 1e6 for record in own if record.first_byte_us != UNKNOWN]
    told = [record for record in own if UNKNOWN not in (record.engine_prompt_tokens, record.engine_cached_tokens)]
    return {
        "requests": count,
        "share_of_requests": round(count / total, 4) if total else None,
        "failed": sum(record.status >= 500 for record in own),
        "reasons": {reason: round(number / count, 4) for reason, number in reasons.most_common()},
        "top_groups": [
            {"group": f"{group:016x}", "requests": number, "share": round(number / count, 4)}
            for group, number in groups.most_common(TOP_GROUPS)
        ],
        "ttft": _errors(errors, [record.first_byte_us / 1e6 for record in own if record.first_byte_us != UNKNOWN]),
        "cache": _cache(told),
    }


def _errors(errors: Sequence[float], real: Sequence[float]) -> dict[str, Any] | None:
    """Predicted minus real, in seconds."""
    if not errors:
        return None
    sizes = sorted(map(abs, errors))
    p90 = quantiles(sizes, n=10, method="inclusive")[8] if len(sizes) > 1 else sizes[0]
    return {
        "measured": len(errors),
        "mean_s": round(fmean(real), 6),
        "mean_error_s": round(fmean(errors), 6),
        "p50_abs_error_s": round(sizes[len(sizes) // 2], 6),
        "p90_abs_error_s": round(p90, 6),
    }


def _cache(told: Sequence[DecisionRecord]) -> dict[str, Any] | None:
    """Shares of prompt tokens, of the requests whose engine told its own."""
    prompt, estimated = sum(r.engine_prompt_tokens for r in told), sum(r.prompt_tokens for r in told)
    if not prompt or not estimated:
        return None
    return {
        "measured": len(told),
        "believed_share": round(sum(r.believed_tokens for r in told) / estimated, 4),
        "engine_share": round(sum(r.engine_cached_tokens for r in told) / prompt, 4),
    }


@dataclass(frozen=True, slots=True)
class _Rule:
    holds: Callable[[dict[str, Any]], bool]
    text: str


def _share(found: dict[str, Any], reason: str) -> float:
    return float(found["reasons"].get(reason, 0.0))


def _overbelieved(found: dict[str, Any]) -> bool:
    cache = found["cache"]
    return cache is not None and cache["measured"] >= 10 and cache["believed_share"] - cache["engine_share"] > 0.2


def _mispredicted(found: dict[str, Any]) -> bool:
    ttft = found["ttft"]
    return ttft is not None and ttft["measured"] >= 10 and ttft["p50_abs_error_s"] > max(0.5 * ttft["mean_s"], 0.05)


_RULES = (
    _Rule(
        lambda f: not f["requests"],
        "nothing went here: is it healthy, does it serve the models that are asked for, is its weight or bucket small?",
    ),
    _Rule(
        lambda f: bool(f["requests"]) and f["failed"] > 0.05 * f["requests"],
        "many requests failed here: see last_error of GET /workers/ID and the engine's log",
    ),
    _Rule(
        _overbelieved,
        "the engine finds much less in its cache than is believed: is prefix caching on? If it does not tell its KV"
        " capacity, declare kv_tokens; after a flush by hand, POST /workers/ID/forget",
    ),
    _Rule(
        lambda f: f["load"]["signal_age_s"] is None or f["load"]["signal_age_s"] > 3 * SIGNAL_STALE_S,
        "the engine's /metrics are not read: policies that go by them use our own counts (docs/engine-metrics.md)",
    ),
    _Rule(lambda f: _share(f, STALE) > 0.1, "engine metrics are often too old: is its /metrics slow or refused?"),
    _Rule(
        lambda f: _share(f, ONLY_ELIGIBLE) > 0.5,
        "most had no other worker to go to: it alone is healthy, or serves that model, label or length",
    ),
    _Rule(
        lambda f: _share(f, SPILL) > 0.3,
        "much comes here because those who hold the prefixes are too busy: more replicas, or more KV memory",
    ),
    _Rule(
        lambda f: bool(f["top_groups"]) and f["requests"] >= 20 and f["top_groups"][0]["share"] > 0.5,
        "one prefix makes up more than half of its requests: a hot prompt, which spills over by itself when it is busy",
    ),
    _Rule(
        _mispredicted,
        "first tokens come much earlier or later than predicted: other traffic reaches the engine, or it was just"
        " started and its costs are still being learned",
    ),
)


def advice(found: dict[str, Any]) -> list[str]:
    """What to look at, the most telling first. Pure; `found` as `Decisions.why` makes it."""
    lines = [rule.text for rule in _RULES if rule.holds(found)]
    if not lines:
        most = max(found["reasons"], key=found["reasons"].get, default=PREFIX)
        lines.append(f"nothing stands out; most picks were made for {most!r}")
    return lines
