"""What is told of a request: its answer's own header lines, counters, the decision, the recording, the access line."""

from __future__ import annotations

from math import nan

import orjson

from pointsman.daemon.relay.access import path_json
from pointsman.daemon.relay.ending import Ending, termination
from pointsman.daemon.relay.heads import own_lines
from pointsman.daemon.relay.lines import request_line
from pointsman.daemon.relay.routed import Routed
from pointsman.daemon.relay.usage import read_usage
from pointsman.daemon.routing.picking import REASONS
from pointsman.daemon.routing.table import strategy_line
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.choosing import Booked
from pointsman.daemon.shm.decisions import UNKNOWN
from pointsman.daemon.shm.native import key_of_bytes
from pointsman.daemon.shm.recording import Taken

MAX_EXPLANATION_HEADER = 6144
"""bytes; clients read heads of 8 KiB at least"""
_ENDINGS = {ending: ending.encode() for ending in Ending}
_COMPLETE_TEXT = _ENDINGS[Ending.COMPLETE]
_TERMINATED = b"--"
_MAX_KNOWN_MODELS = 256
_known_models: dict[str, bytes] = {}
_COMPLETE = Ending.COMPLETE
_DURATION, _FIRST_BYTE = at.KIND_DURATION, at.KIND_FIRST_BYTE
_REASONS = tuple(reason.encode() for reason in REASONS)


# --- to the client


def own_headers(exchange: Routed) -> bytes:
    """The header lines that we add to a worker's answer."""
    upstream, plan = exchange.upstream, exchange.plan
    assert upstream is not None
    identity = upstream.pool.identity(exchange.table.generation)
    if exchange.pair is not None:
        identity += exchange.pair.header_line
    if exchange.attempts > 1 or exchange.is_exhausted:
        identity += _lines(attempt_headers(exchange))
    if plan is None:
        return own_lines(exchange.request.request_id, identity, b"", b"")
    asked = exchange.asked_strategy
    strategy = strategy_line(asked) if asked else plan.strategy_line
    if exchange.request.wants_explanation and (explanation := _explanation(exchange)) is not None:
        strategy += b"X-Pointsman-Decision: %b\r\n" % explanation
    return own_lines(exchange.request.request_id, identity, plan.profile_line, strategy)


def _lines(headers: tuple[tuple[str, str], ...]) -> bytes:
    return b"".join(b"%b: %b\r\n" % (name.encode(), value.encode()) for name, value in headers)


def error_headers(exchange: Routed) -> tuple[tuple[str, str], ...]:
    """Those that we add to an error of our own."""
    return (("X-Pointsman-Generation", str(exchange.table.generation)), *attempt_headers(exchange))


def attempt_headers(exchange: Routed) -> tuple[tuple[str, str], ...]:
    """After more than one attempt how many; where we gave up, that the client's own retries would multiply ours."""
    found: tuple[tuple[str, str], ...] = ()
    if exchange.attempts > 1 or exchange.is_exhausted:
        found = (("X-Pointsman-Attempts", str(exchange.attempts)),)
    return (*found, ("X-Should-Retry", "false")) if exchange.is_exhausted else found


def _explanation(exchange: Routed) -> bytes | None:
    """The decision, where the client may see it; as much of it as fits into a header."""
    decision = exchange.decision
    if decision is None or decision.explanation is None or not exchange.context.may_explain(exchange.client.peer):
        return None
    text = orjson.dumps(_decision_json(exchange, decision))
    if len(text) > MAX_EXPLANATION_HEADER:
        text = orjson.dumps({**_decision_head(exchange, decision), "explanation": "too long for a header"})
    return text


def _decision_head(exchange: Routed, decision: Booked) -> dict[str, object]:
    """The decision is the prefill worker's where a pair answers."""
    worker, is_of_pair = exchange.worker, decision.worker.role == "prefill"
    return {
        "id": exchange.request.request_id.decode("latin-1"),
        "generation": exchange.table.generation,
        "model": exchange.features.model,
        "profile": exchange.plan.profile if exchange.plan else "",
        "policy": exchange.asked_strategy or (exchange.plan.policy if exchange.plan else ""),
        "worker": decision.worker.url,
        **({"decode_worker": worker.url} if is_of_pair and worker is not None and worker.role == "decode" else {}),
        "reason": reason_name(decision.reason),
        "prompt_tokens": decision.prompt_tokens,
        "matched_tokens": decision.cached_tokens,
        "predicted_ttft_s": round(decision.predicted_s, 6),
    }


def _decision_json(exchange: Routed, decision: Booked) -> dict[str, object]:
    found = _decision_head(exchange, decision)
    if decision.explanation is not None:
        found["explanation"] = decision.explanation.as_json(
            [w.url for w in exchange.table.fleet(decision.worker.role).workers]
        )
    return found


# --- to the operator


def output_tokens(exchange: Routed, ending: Ending) -> int | None:
    """None: the answer is not a whole one, nothing is to be learned from it."""
    head = exchange.head
    if ending is not _COMPLETE or head is None or head.status != 200:
        return None
    usage = exchange.usage = read_usage(exchange.usage_data)
    if usage.output_tokens is None and head.is_event_stream:
        return _counted_tokens(exchange)
    return usage.output_tokens


def _counted_tokens(exchange: Routed) -> int:
    """An engine writes one event a token."""
    return max(exchange.events - 1 if exchange.continued is None else exchange.continued.transcript.tokens, 1)


def tokens_served(exchange: Routed, status: int) -> tuple[int, int]:
    """(of the prompt, of the answer) as the engine counts them, else about; after `output_tokens`."""
    head, decision, usage = exchange.head, exchange.decision, exchange.usage
    prompt, output = usage.prompt_tokens, usage.output_tokens
    if prompt is None:
        prompt = decision.prompt_tokens if decision is not None and head is not None and status < 400 else 0
    if output is None:
        output = _counted_tokens(exchange) if head is not None and head.is_event_stream else 0
    return prompt, output


def report(exchange: Routed, status: int, ending: Ending, now: float) -> None:
    """Once, when the request has ended."""
    context = exchange.context
    started = exchange.request.started
    label = exchange.route.label
    model = exchange.table.model_index.get(exchange.features.model, 0)
    context.series.count(label, model, status)
    context.series.observe(label, _DURATION, now - started)
    if exchange.first_byte_at:
        context.series.observe(label, _FIRST_BYTE, exchange.first_byte_at - started)
    if exchange.decision is not None and exchange.plan is not None:
        _note_decision(exchange, exchange.decision, status, now)
    if exchange.request.key is not None:
        context.key_counts.count(exchange.request.key.label, status, *tokens_served(exchange, status))
    if exchange.taken is not None:
        _record(exchange, exchange.taken, model, status)
    if context.is_line_due(status, ending):
        context.log_line(_log_line(exchange, status, ending, now))


def _note_decision(exchange: Routed, decision: Booked, status: int, now: float) -> None:
    context, usage, started = exchange.context, exchange.usage, exchange.request.started
    head = exchange.head
    first_byte_us = UNKNOWN
    is_of_this_worker = exchange.first_byte_at and not exchange.continuations
    if is_of_this_worker and head is not None and head.is_event_stream and status == 200:
        first_byte_us = int((exchange.first_byte_at - started) * 1e6)
    ended_us = context.wall_us(now)
    if decision.explanation is not None:  # before the decision: whoever finds that is to find this, too
        key = key_of_bytes(exchange.request.request_id)
        context.explanations.note(key, ended_us, orjson.dumps(_decision_json(exchange, decision)))
    context.chooser.note(
        decision,
        exchange.request.request_id,
        context.upstreams.of(decision.worker).key,
        ended_us,
        first_byte_us,
        int((now - started) * 1e6),
        UNKNOWN if usage.output_tokens is None else usage.output_tokens,
        UNKNOWN if usage.prompt_tokens is None else usage.prompt_tokens,
        UNKNOWN if usage.cached_tokens is None else usage.cached_tokens,
        status,
    )


def _record(exchange: Routed, taken: Taken, model: int, status: int) -> None:
    usage, tokens = exchange.usage, exchange.usage.output_tokens
    if tokens is None and exchange.head is not None and exchange.head.is_event_stream:
        tokens = _counted_tokens(exchange)
    exchange.context.recording.end(
        taken,
        prompt_tokens=usage.prompt_tokens,
        output_tokens=tokens,
        model=model,
        is_streamed=exchange.features.is_stream,
        status=status,
    )


def _log_line(exchange: Routed, status: int, ending: Ending, now: float) -> bytes:
    request, plan, decision, usage = exchange.request, exchange.plan, exchange.decision, exchange.usage
    context, started, worker = exchange.context, request.started, exchange.worker
    asked, pair = exchange.asked_strategy, exchange.pair
    prefill = None if pair is None else pair.prefill_worker
    is_routed = decision is not None and plan is not None
    return request_line(
        context.wall_us(now) / 1e6,
        request.request_id,
        context.shard,
        exchange.client.peer_bytes,
        b"" if request.key is None else request.key.name_json,
        request.method,
        exchange.route.path_json or path_json(request),
        status,
        _json_of(exchange.features.model),
        exchange.features.is_stream,
        plan.profile_json if plan is not None else b'""',
        orjson.dumps(asked)[1:-1] if asked else plan.policy_text if plan else b"",
        exchange.table.generation,
        b'""' if worker is None else context.upstreams.of(worker).url_json,
        b"" if prefill is None else context.upstreams.of(prefill).url_json,
        nan if pair is None else pair.prefill_s * 1000,
        nan if pair is None else pair.transfer_s * 1000,
        exchange.attempts,
        exchange.queued_s * 1000,
        (exchange.connected_at - started) * 1000 if exchange.connected_at else nan,
        (exchange.first_byte_at - started) * 1000 if exchange.first_byte_at else nan,
        (now - started) * 1000,
        request.body_size,
        exchange.bytes_out,
        exchange.resends,
        exchange.continuations,
        _reason_text(decision.reason) if decision is not None and is_routed else b"",
        usage.prompt_tokens,
        decision.cached_tokens if decision is not None else 0,
        usage.cached_tokens,
        usage.output_tokens,
        _COMPLETE_TEXT if ending is _COMPLETE else _ENDINGS[ending],  # the hash of an Enum is a Python function
        _TERMINATED if ending is _COMPLETE else termination(ending, status, exchange.blame, _phase(exchange)).encode(),
    )


def _json_of(model: str) -> bytes:
    """Clients name the same few models again and again."""
    known = _known_models.get(model)
    if known is None:
        known = orjson.dumps(model)
        if len(_known_models) < _MAX_KNOWN_MODELS:
            _known_models[model] = known
    return known


def _phase(exchange: Routed) -> str:
    """How far it had come, as `ending.termination` calls it."""
    if exchange.head is not None:
        return "D"
    if exchange.connected_at:
        return "H"
    return "Q" if exchange.worker is None else "C"


def _reason_text(reason: int) -> bytes:
    return _REASONS[reason] if reason >= 0 else b"unlocked"


def reason_name(reason: int) -> str:
    """Of a position in REASONS; the routing state was not to be had for others."""
    return REASONS[reason] if reason >= 0 else "unlocked"
