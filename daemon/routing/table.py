"""One generation of the configuration, compiled for lookups on the request path. Immutable and pure."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from fnmatch import translate
from re import Pattern
from re import compile as compile_pattern
from typing import Any

import msgspec
import orjson

from pointsman.config.pd import COMBINED_LABEL, PdSection
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
from pointsman.daemon.routing.chain import parse_strategy
from pointsman.daemon.routing.expected_cost import ExpectedCost, ExpectedCostParameters
from pointsman.daemon.routing.keys import KeyRing
from pointsman.daemon.routing.pairs import is_compatible
from pointsman.daemon.routing.selection import Selection
from pointsman.daemon.routing.strategies import PD, read_profile

NO_PROFILE = ""
AUTO = "auto"
"""`config-profile: auto`: the profile whose hints fit best."""


class Pool:
    """The workers that may serve one model, in declaration order; the first four attributes run in parallel.

    `positions`: among all workers of this role. `model`: "" = any. `has_buckets`: some take only prompts of certain
    lengths. A C struct, immutable (table.pxd).
    """

    def __init__(
        self,
        workers: tuple[WorkerSpec, ...],
        slots: tuple[int, ...],
        weights: tuple[float, ...],
        positions: tuple[int, ...],
        model: str = "",
        has_buckets: bool = False,
        role: str = "regular",
    ) -> None:
        self.workers = workers
        self.slots = slots
        self.weights = weights
        self.positions = positions
        self.model = model
        self.has_buckets = has_buckets
        self.role = role

    def only(self, chosen: Sequence[int]) -> Pool:
        """Those at the positions `chosen` of this pool."""
        if len(chosen) == len(self.workers):
            return self
        return Pool(
            tuple([self.workers[i] for i in chosen]),
            tuple([self.slots[i] for i in chosen]),
            tuple([self.weights[i] for i in chosen]),
            tuple([self.positions[i] for i in chosen]),
            self.model,
            self.has_buckets,
            self.role,
        )

    def nobody(self, why: str = "") -> RequestError:
        """503: no worker of this pool can take the request."""
        total = len(self.workers)
        if total == 0:
            return no_worker(f"no {self._kind}worker is configured for this request; add one with POST /workers")
        what = f"for the model {self.model!r} " if self.model else ""
        if why:
            return no_worker(f"none of the healthy {self._kind}workers {what}may take this request: {why}")
        return no_worker(f"none of the {total} {self._kind}workers {what}is healthy")

    @property
    def _kind(self) -> str:
        return "" if self.role == "regular" else f"{self.role} "


@dataclass(frozen=True, slots=True)
class PairPools:
    """The workers of prefill/decode disaggregation that may serve one model."""

    prefill: Pool
    decode: Pool
    compatible: tuple[tuple[int, int], ...]
    """(slot of a prefill worker, slot of a decode worker) of those that can hand over KV to each other"""
    combined: Pool
    """regular workers that take what no pair can"""


class Plan:
    """How a request is routed: the profile's name as shown to the client, and its compiled policies.

    A C struct, immutable (table.pxd).
    """

    profile: str
    selection: Selection
    prompt_tokens_min: int
    prompt_tokens_max: int
    expected_cost: ExpectedCostParameters | None
    """Of a plan that is nothing but this policy: the short way will do."""
    retry: RetrySection
    timeouts: TimeoutsSection
    limits: LimitsSection
    key_limits: LimitsSection | None
    """`limits`, if they say something of single API keys"""
    priority: int
    """class in which its requests wait for admission"""
    pd: PdSection
    prefill: Plan | None
    decode: Plan | None
    """how each side of a pair is picked; of these two themselves None"""
    is_pd: bool
    """pairs are asked for, though there may be regular workers"""
    is_rate_limited: bool
    """the requests of the profile are counted"""
    continues_streams: bool
    profile_line: bytes
    strategy_line: bytes
    """header lines that tell the client what its request was routed by; the first is empty without a profile"""
    profile_json: bytes
    policy_text: bytes
    """the policy's name as it stands in a JSON string"""

    def __init__(
        self,
        profile: Profile,
        selection: Selection,
        expected_cost: ExpectedCostParameters | None,
        sections: Sections,
        *,
        is_pd: bool = False,
        prefill: Plan | None = None,
        decode: Plan | None = None,
    ) -> None:
        limits = sections.limits
        self._profile, self._sections = profile, sections
        self.profile = profile.name
        self.selection = selection
        self.prompt_tokens_min = profile.prompt_tokens_min
        self.prompt_tokens_max = profile.prompt_tokens_max
        self.expected_cost = expected_cost
        self.retry = sections.retry
        self.timeouts = sections.timeouts
        self.limits = limits
        self.key_limits = limits if limits.key_requests_per_minute or limits.key_tokens_per_minute else None
        self.priority = PRIORITIES.index(limits.priority)
        self.pd = sections.pd
        self.prefill = prefill
        self.decode = decode
        self.is_pd = is_pd
        self.is_rate_limited = bool(limits.requests_per_second)
        self.continues_streams = profile.stream_failure == "continue"
        self.profile_line = b""
        if profile.name != NO_PROFILE:
            self.profile_line = _header_line("X-Pointsman-Profile", profile.name)
        self.strategy_line = strategy_line(self.policy)
        self.profile_json = orjson.dumps(profile.name)
        self.policy_text = orjson.dumps(self.policy)[1:-1]

    @property
    def policy(self) -> str:
        return PD if self.is_pd else self.selection.strategy

    def with_pd(self, pd: PdSection) -> Plan:
        """The same but for what it says of pairs."""
        sections = replace(self._sections, pd=pd)
        own = self.selection, self.expected_cost
        return Plan(self._profile, *own, sections, is_pd=self.is_pd, prefill=self.prefill, decode=self.decode)

    def takes(self, prompt_tokens: int) -> bool:
        return self.prompt_tokens_min <= prompt_tokens <= self.prompt_tokens_max


@dataclass(frozen=True, slots=True)
class Sections:
    """What a profile says besides the routing, over the defaults."""

    retry: RetrySection
    timeouts: TimeoutsSection
    limits: LimitsSection
    pd: PdSection


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


class RoutingTable:
    """Raises RequestError 400 for a snapshot whose strategies do not exist. A C struct (table.pxd)."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.generation = snapshot.generation
        self.breaker = msgspec.convert(snapshot.shared.breaker, BreakerSection)
        self.admission = msgspec.convert(snapshot.shared.admission, AdmissionSection)
        self.model_index = {name: index for index, name in enumerate(snapshot.models)}
        self.keys = KeyRing(snapshot.keys or (), snapshot.key_names)
        self._by_role = {
            role: tuple(worker for worker in snapshot.workers if worker.role == role)
            for role in ("regular", "prefill", "decode")
        }
        self._regular = self._by_role["regular"]
        self._fleets = {role: self._pool(workers, role=role) for role, workers in self._by_role.items()}
        self.everyone = self._fleets["regular"]
        self._pairs, self._undeclared_pairs = self._all_pairs()
        self.has_pairs = bool(self._pairs) or self._undeclared_pairs is not None
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
        usual = next(iter(self._fallbacks), self._default)
        takes_all = usual.takes(0) and usual.takes(MAX_TOKENS)
        self.only_plan = usual if takes_all and not self._rules else None
        """of everybody who asks for no profile, whatever is asked; None: `plan_for` has to look"""

    def fleet(self, role: str) -> Pool:
        """All workers of a role; a pool's `positions` are positions in it."""
        return self._fleets[role]

    @property
    def for_questions(self) -> Pool:
        """Who is asked what any worker answers."""
        return self.everyone if self.everyone.workers else self._fleets["prefill"]

    def can_serve(self, up: Container[int]) -> bool:
        """Whether any model has a worker, or a pair of workers, of which all slots are in `up`."""
        if any(worker.slot in up for worker in self._regular):
            return True
        pairs = [*self._pairs.values(), *([self._undeclared_pairs] if self._undeclared_pairs else [])]
        return any(prefill in up and decode in up for one in pairs for prefill, decode in one.compatible)

    def _all_pairs(self) -> tuple[dict[str, PairPools], PairPools | None]:
        """By model; and for models that nobody announces."""
        paired = (*self._by_role["prefill"], *self._by_role["decode"])
        if not paired:
            return {}, None
        names = dict.fromkeys(name for worker in paired for name in worker.models)
        undeclared = [worker for worker in paired if not worker.models] if self.snapshot.strict_models else paired
        return (
            {name: self._pair_pools([w for w in paired if not w.models or name in w.models], name) for name in names},
            self._pair_pools(undeclared, "") if undeclared else None,
        )

    def _pair_pools(self, workers: Sequence[WorkerSpec], model: str) -> PairPools:
        prefills = [worker for worker in workers if worker.role == "prefill"]
        decodes = [worker for worker in workers if worker.role == "decode"]
        combined = [
            worker
            for worker in self._regular
            if worker.labels.get(COMBINED_LABEL) == "true"
            and (not worker.models or not model or model in worker.models)
        ]
        return PairPools(
            self._pool(prefills, model, "prefill"),
            self._pool(decodes, model, "decode"),
            tuple((p.slot, d.slot) for p in prefills for d in decodes if is_compatible(p, d)),
            self._pool(combined, model),
        )

    @property
    def paired_models(self) -> tuple[str, ...]:
        """Models that prefill or decode workers announce."""
        return tuple(self._pairs)

    def pairs_of(self, model: str) -> PairPools | None:
        """Who of prefill and decode workers serves the model; None: nobody."""
        return self._pairs.get(model) or self._undeclared_pairs

    def pairs_for(self, model: str, plan: Plan) -> PairPools | None:
        """None: requests for the model go to regular workers.

        Pairs serve a model that no regular worker announces, and one that both have where the profile's strategy is
        `pd`. A fleet without regular workers needs no such profile.
        """
        pairs = self._pairs.get(model) or (None if model in self._pools else self._undeclared_pairs)
        if pairs is None or plan.is_pd or not self._regular:
            return pairs
        return None if model in self._pools or model not in self._pairs else pairs

    def _pool(self, workers: Sequence[WorkerSpec], model: str = "", role: str = "regular") -> Pool:
        position_of = {worker.slot: position for position, worker in enumerate(self._by_role[role])}
        return Pool(
            tuple(workers),
            tuple(w.slot for w in workers),
            tuple(w.weight for w in workers),
            tuple(position_of[w.slot] for w in workers),
            model,
            any(map(_has_bucket, workers)),
            role,
        )

    def plan_of(self, profile: Profile) -> Plan:
        """Compiled as a profile of this generation. Raises RequestError 400 for a strategy that does not exist."""
        snapshot = self.snapshot
        strategy = profile.strategy or snapshot.default_policy
        is_pd = parse_strategy(strategy)[0].name == PD
        pd = msgspec.convert(snapshot.default_pd | profile.pd, PdSection)
        selection, cost = self._selection(profile, pd.prefill_policy if is_pd else strategy)
        # a profile's own strategy is for prefills, too, unless it says otherwise
        has_own = not is_pd and profile.strategy and "prefill_policy" not in profile.pd
        prefill = (selection, cost) if is_pd or has_own else self._selection(profile, pd.prefill_policy, is_of_leg=True)
        decode, _ = self._selection(profile, pd.decode_policy, is_of_leg=True)
        sections = Sections(
            msgspec.convert(snapshot.default_retry | profile.retry, RetrySection),
            msgspec.convert(snapshot.default_timeouts | profile.timeouts, TimeoutsSection),
            msgspec.convert(profile.limits, LimitsSection),
            pd,
        )
        return Plan(
            profile,
            selection,
            cost,
            sections,
            is_pd=is_pd,
            prefill=Plan(profile, *prefill, sections, is_pd=is_pd),
            decode=Plan(profile, decode, None, sections, is_pd=is_pd),
        )

    def _selection(
        self, profile: Profile, strategy: str, *, is_of_leg: bool = False
    ) -> tuple[Selection, ExpectedCostParameters | None]:
        """(the compiled policy, its parameters where the short way will do)"""
        parameters: dict[str, Any] = dict(profile.routing)
        parameters["routingStrategy"] = strategy
        parameters["lockedRoutingStrategy"] = "" if is_of_leg else self.snapshot.locked_strategy
        if is_of_leg:
            parameters.pop("chain", None)
        selection = Selection(read_profile(parameters))
        policy = selection.own
        is_plain = isinstance(policy, ExpectedCost) and selection.profile.sticky is None
        return selection, policy.parameters if is_plain and isinstance(policy, ExpectedCost) else None

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
