"""One generation of the configuration, compiled for lookups on the request path. Immutable and pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import translate
from re import Pattern
from re import compile as compile_pattern
from typing import Any

import msgspec
import orjson

from pointsman.config.resilience import (
    PRIORITIES,
    AdmissionSection,
    BreakerSection,
    LimitsSection,
    RetrySection,
    TimeoutsSection,
)
from pointsman.config.snapshot import MAX_TOKENS, Profile, Snapshot, WorkerSpec
from pointsman.daemon.errors import RequestError, no_worker
from pointsman.daemon.routing.auto_profile import Hints, pick_profile
from pointsman.daemon.routing.expected_cost import ExpectedCost, ExpectedCostParameters
from pointsman.daemon.routing.keys import KeyRing
from pointsman.daemon.routing.selection import Selection
from pointsman.daemon.routing.strategies import read_profile

AUTO = "auto"
"""`config-profile: auto`: the profile whose hints fit best."""


@dataclass(frozen=True, slots=True)
class Pool:
    """The workers that may serve one model, in declaration order; the first four run in parallel."""

    workers: tuple[WorkerSpec, ...]
    slots: tuple[int, ...]
    weights: tuple[float, ...]
    positions: tuple[int, ...]
    """among all regular workers"""
    model: str = ""
    """"" = any"""
    has_buckets: bool = False
    """some take only prompts of certain lengths"""

    def only(self, chosen: Sequence[int]) -> Pool:
        """Those at the positions `chosen` of this pool."""
        if len(chosen) == len(self.workers):
            return self
        return replace(
            self,
            workers=tuple(self.workers[i] for i in chosen),
            slots=tuple(self.slots[i] for i in chosen),
            weights=tuple(self.weights[i] for i in chosen),
            positions=tuple(self.positions[i] for i in chosen),
        )

    def nobody(self, why: str = "") -> RequestError:
        """503: no worker of this pool can take the request."""
        total = len(self.workers)
        if total == 0:
            return no_worker("no worker is configured for this request; add one with POST /workers")
        what = f"for the model {self.model!r} " if self.model else ""
        if why:
            return no_worker(f"none of the healthy workers {what}may take this request: {why}")
        return no_worker(f"none of the {total} workers {what}is healthy")


@dataclass(frozen=True, slots=True)
class Plan:
    """How a request is routed: the profile's name as shown to the client, and its compiled policies."""

    profile: str
    selection: Selection
    prompt_tokens_min: int = 0
    prompt_tokens_max: int = MAX_TOKENS
    expected_cost: ExpectedCostParameters | None = None
    """Of a plan that is nothing but this policy: the short way will do."""

    retry: RetrySection = field(default_factory=RetrySection)
    timeouts: TimeoutsSection = field(default_factory=TimeoutsSection)
    limits: LimitsSection = field(default_factory=LimitsSection)
    key_limits: LimitsSection | None = None
    """`limits`, if they say something of single API keys"""
    stream_failure: str = "error"
    priority: int = PRIORITIES.index("default")
    """class in which its requests wait for admission"""

    profile_line: bytes = b""
    strategy_line: bytes = b""
    """header lines that tell the client what its request was routed by; the first is empty without a profile"""
    profile_json: bytes = b""
    policy_text: bytes = b""
    """the policy's name as it stands in a JSON string"""

    @property
    def policy(self) -> str:
        return self.selection.strategy

    def takes(self, prompt_tokens: int) -> bool:
        return self.prompt_tokens_min <= prompt_tokens <= self.prompt_tokens_max


Header = Callable[[bytes], bytes | None]
"""The first value of a request header, by its name in lower case."""


def bearer_token(authorization: bytes | None) -> str:
    """ "" when the client presents none."""
    scheme, _, token = (authorization or b"").partition(b" ")
    return token.strip().decode("latin-1") if scheme.lower() == b"bearer" else ""


@dataclass(frozen=True, slots=True)
class _Rule:
    plan: Plan
    model: Pattern[str] | None
    path: Pattern[str] | None
    key: Pattern[str] | None
    headers: tuple[tuple[bytes, Pattern[str]], ...]

    def holds(self, model: str, path: str, header: Header, key: str | None) -> bool:
        if self.model is not None and not self.model.match(model):
            return False
        if self.path is not None and not self.path.match(path):
            return False
        if self.key is not None and not self.key.match(bearer_token(header(b"authorization")) if key is None else key):
            return False
        for name, pattern in self.headers:
            value = header(name)
            if value is None or not pattern.match(value.decode("latin-1")):
                return False
        return True


def _pattern(glob: str | None) -> Pattern[str] | None:
    return None if glob is None else compile_pattern(translate(glob))


def _has_bucket(worker: WorkerSpec) -> bool:
    return worker.prompt_tokens_min > 0 or worker.prompt_tokens_max < MAX_TOKENS


def _header_line(name: str, value: str) -> bytes:
    return f"{name}: {value}\r\n".encode("latin-1", "replace")


def strategy_line(strategy: str) -> bytes:
    return _header_line("Routing-Strategy", strategy)


NO_PROFILE = ""


class RoutingTable:
    """Raises RequestError 400 for a snapshot whose strategies do not exist."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.generation = snapshot.generation
        self.breaker = msgspec.convert(snapshot.shared.breaker, BreakerSection)
        self.admission = msgspec.convert(snapshot.shared.admission, AdmissionSection)
        self.model_index = {name: index for index, name in enumerate(snapshot.models)}
        self.keys = KeyRing(snapshot.keys or (), snapshot.key_names)
        self._regular = tuple(worker for worker in snapshot.workers if worker.role == "regular")
        self.everyone = self._pool(self._regular)
        self.every_slot = tuple(worker.slot for worker in snapshot.workers)
        names = dict.fromkeys(name for worker in self._regular for name in worker.models)
        self._pools = {
            name: self._pool([w for w in self._regular if not w.models or name in w.models], name) for name in names
        }
        self.model_names = tuple(dict.fromkeys(name for worker in snapshot.workers for name in worker.models))
        self._default = self.plan_of(Profile(NO_PROFILE, routing=snapshot.default_routing))
        self._plans = {name: self.plan_of(profile) for name, profile in snapshot.profiles.items()}
        self._hints = {
            name: Hints(hints.prompt_tokens_gte, hints.prompt_tokens_lt, hints.max_tokens_gte, hints.max_tokens_lt)
            for name, hints in ((name, profile.hints) for name, profile in snapshot.profiles.items())
        }
        default = snapshot.default_profile
        self._fallbacks = () if default is None else (self._plans[default],)
        self._rules = tuple(
            _Rule(
                self._plans[match.profile],
                _pattern(match.model),
                _pattern(match.path),
                _pattern(match.key),
                tuple((n.lower().encode("latin-1"), compile_pattern(translate(v))) for n, v in match.headers.items()),
            )
            for match in snapshot.matches
        )

    def _pool(self, workers: Sequence[WorkerSpec], model: str = "") -> Pool:
        position_of = {worker.slot: position for position, worker in enumerate(self._regular)}
        return Pool(
            tuple(workers),
            tuple(w.slot for w in workers),
            tuple(w.weight for w in workers),
            tuple(position_of[w.slot] for w in workers),
            model,
            any(map(_has_bucket, workers)),
        )

    def plan_of(self, profile: Profile) -> Plan:
        """Compiled as a profile of this generation. Raises RequestError 400 for a strategy that does not exist."""
        snapshot = self.snapshot
        parameters: dict[str, Any] = dict(profile.routing)
        parameters["routingStrategy"] = profile.strategy or snapshot.default_policy
        parameters["lockedRoutingStrategy"] = snapshot.locked_strategy
        selection = Selection(read_profile(parameters))
        policy = selection.own
        is_plain = isinstance(policy, ExpectedCost) and selection.profile.sticky is None
        limits = msgspec.convert(profile.limits, LimitsSection)
        return Plan(
            profile.name,
            selection,
            profile.prompt_tokens_min,
            profile.prompt_tokens_max,
            policy.parameters if is_plain and isinstance(policy, ExpectedCost) else None,
            msgspec.convert(snapshot.default_retry | profile.retry, RetrySection),
            msgspec.convert(snapshot.default_timeouts | profile.timeouts, TimeoutsSection),
            limits,
            limits if limits.key_requests_per_minute or limits.key_tokens_per_minute else None,
            profile.stream_failure,
            PRIORITIES.index(limits.priority),
            b"" if profile.name == NO_PROFILE else _header_line("X-Pointsman-Profile", profile.name),
            strategy_line(selection.strategy),
            orjson.dumps(profile.name),
            orjson.dumps(selection.strategy)[1:-1],
        )

    def early_plan(self, asked: str | None) -> Plan:
        """What is known of a request's plan before its body is."""
        plan = self._plans.get(asked) if asked else None
        return plan or next(iter(self._fallbacks), self._default)

    def pool_for(self, model: str) -> Pool | None:
        """None when `strict_models` forbids the model; a model that nobody announces goes to any worker otherwise."""
        pool = self._pools.get(model)
        if pool is not None:
            return pool
        if self.snapshot.strict_models and model:
            undeclared = [worker for worker in self._regular if not worker.models]
            return self._pool(undeclared) if undeclared else None
        return self.everyone

    def plan_for(
        self,
        asked: str | None,
        model: str,
        path: str,
        header: Header,
        prompt_tokens: int = 0,
        max_tokens: int | None = None,
        key: str | None = None,
    ) -> tuple[Plan, bool]:
        """(plan, whether the `config-profile` the client asked for exists).

        `key`: the name of the client's key; None: keys have no names here, rules go by the bearer token.

        Precedence: header `config-profile`, the first `match` that holds, the default profile, the default policy.
        A name that does not exist falls to the rest of the chain, as AIBrix does; the caller counts that. So does a
        profile of the file whose length bucket does not hold the prompt; one that the client names is taken anyhow.
        """
        known = True
        if asked is not None:
            name = pick_profile(self._hints, prompt_tokens, max_tokens) if asked == AUTO else asked
            plan = None if name is None else self._plans.get(name)
            if plan is not None:
                return plan, True
            known = asked == AUTO
        for rule in self._rules:
            if rule.holds(model, path, header, key) and rule.plan.takes(prompt_tokens):
                return rule.plan, known
        for plan in self._fallbacks:
            if plan.takes(prompt_tokens):
                return plan, known
        return self._default, known
