"""Which faults strike a request: decided here, carried out by reply.py, dispatch.py and listener.py.

| kind        | what happens |
| --- | --- |
| status      | answers with `status`, and Retry-After if `retry_after` is given; health stays 200 |
| latency     | waits `ms` before anything else |
| hang        | goes silent, for ever or for `seconds` |
| reset       | closes the connection with RST |
| close       | closes the connection with FIN: without an answer, or with an unfinished one |
| truncate    | ends a stream early but with correct framing; another answer like `close` |
| drip        | sends the body byte by byte, `ms` apart |
| error_event | a stream begins with an error event |
| unhealthy   | health probes get `status` while requests work |
| slow_start  | health probes and requests get 503 for the first `seconds` |
| transfer_error | the KV transfer fails, for both engines (prefill/decode) |
| room_lost   | the engine never meets the other one (SGLang), or tells it nothing (vLLM) |
| refuse      | the listening socket is closed for `seconds`, or until the faults are replaced |

hang, reset, close and truncate strike before the head, or after `after_bytes` of the body, or after
`after_tokens` of a stream (an answer that is not streamed is then cut in the middle).

Any fault can be limited: to one `path`, to the first `times` requests, to those after the first `skip`, to
a share `rate` of them drawn with `seed`.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

FaultKind = Literal[
    "status",
    "latency",
    "hang",
    "reset",
    "close",
    "truncate",
    "drip",
    "error_event",
    "unhealthy",
    "slow_start",
    "refuse",
    "transfer_error",
    "room_lost",
]
HEALTH_PATHS = frozenset({"/health", "/health_generate", "/ping", "/ready"})
_CUTS = frozenset({"hang", "reset", "close", "truncate"})


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kind: FaultKind
    path: str | None = None
    times: int | None = None
    skip: int = 0
    rate: float = 1.0
    seed: int = 0
    status: int = 503
    retry_after: float | None = None
    ms: float = 0.0
    seconds: float | None = None
    after_tokens: int | None = None
    after_bytes: int | None = None

    @property
    def is_mid_body(self) -> bool:
        return self.after_tokens is not None or self.after_bytes is not None


@dataclass(slots=True, frozen=True)
class FaultPlan:
    """What one request suffers, in order: `before` the head, then in its body."""

    before: tuple[Fault, ...] = ()
    cut: Fault | None = None
    drip: Fault | None = None
    error_event: Fault | None = None
    transfer: Fault | None = None

    @property
    def touches_body(self) -> bool:
        return self.cut is not None or self.drip is not None


NO_FAULTS = FaultPlan()


@dataclass(slots=True)
class _ArmedFault:
    fault: Fault
    armed_s: float
    rng: random.Random
    seen: int = 0
    struck: int = 0

    def strikes(self, path: str, is_inference: bool, now: float) -> bool:
        if not self._covers(path, is_inference, now):
            return False
        self.seen += 1
        fault = self.fault
        if self.seen <= fault.skip or (fault.times is not None and self.struck >= fault.times):
            return False
        if fault.rate < 1.0 and self.rng.random() >= fault.rate:
            return False
        self.struck += 1
        return True

    def _covers(self, path: str, is_inference: bool, now: float) -> bool:
        fault = self.fault
        if fault.kind == "refuse":
            return False
        if fault.kind == "slow_start" and now >= self.armed_s + (fault.seconds or 0.0):
            return False
        if fault.path is not None:
            return path == fault.path
        is_health = path in HEALTH_PATHS
        if fault.kind == "unhealthy":
            return is_health
        return is_inference or (is_health and fault.kind == "slow_start")


@dataclass(slots=True)
class FaultBook:
    _armed: list[_ArmedFault] = field(default_factory=list)

    def arm(self, faults: Iterable[Fault], now: float) -> None:
        """Replaces all faults; their counters begin at zero."""
        # A seeded generator is the point: runs repeat.
        self._armed = [_ArmedFault(fault, now, random.Random(fault.seed)) for fault in faults]

    def plan(self, path: str, is_inference: bool, now: float) -> FaultPlan:
        if not self._armed:
            return NO_FAULTS
        struck = [a.fault for a in self._armed if a.strikes(path, is_inference, now)]
        return _compose_plan(struck) if struck else NO_FAULTS

    def refusal(self) -> Fault | None:
        return next((a.fault for a in self._armed if a.fault.kind == "refuse"), None)

    def describe(self) -> list[dict[str, object]]:
        return [{"fault": msgspec.to_builtins(a.fault), "seen": a.seen, "struck": a.struck} for a in self._armed]


def _compose_plan(struck: Sequence[Fault]) -> FaultPlan:
    def first(*kinds: str, mid_body: bool = False) -> Fault | None:
        return next((f for f in struck if f.kind in kinds and f.is_mid_body == mid_body), None)

    cuts_before = tuple(f for f in struck if f.kind in _CUTS and not f.is_mid_body)
    delays = tuple(f for f in struck if f.kind == "latency")
    answers = tuple(f for f in struck if f.kind in ("status", "unhealthy", "slow_start"))
    return FaultPlan(
        before=delays + cuts_before + answers,
        cut=first("hang", "reset", "close", "truncate", mid_body=True),
        drip=first("drip"),
        error_event=first("error_event"),
        transfer=first("transfer_error", "room_lost"),
    )


def decode_faults(data: bytes) -> list[Fault]:
    """A JSON list of faults, one fault, or {"faults": [...]}; raises msgspec.ValidationError."""
    document = msgspec.json.decode(data)
    if isinstance(document, dict):
        document = document.get("faults", [document] if document else [])
    return msgspec.convert(document, list[Fault])
