"""One generation of the configuration, compiled for lookups on the request path. Immutable and pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import translate
from re import Pattern
from re import compile as compile_pattern

from pointsman.config.snapshot import Profile, Snapshot, WorkerSpec
from pointsman.daemon.routing.policies import POLICIES, Choice


@dataclass(frozen=True, slots=True)
class Pool:
    """The workers that may serve one model, in declaration order; the three tuples run in parallel."""

    workers: tuple[WorkerSpec, ...]
    slots: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """How a request is routed: the profile's name as shown to the client, and its policy."""

    profile: str
    policy: str
    choose: Choice


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

    def holds(self, model: str, path: str, header: Header) -> bool:
        if self.model is not None and not self.model.match(model):
            return False
        if self.path is not None and not self.path.match(path):
            return False
        if self.key is not None and not self.key.match(bearer_token(header(b"authorization"))):
            return False
        for name, pattern in self.headers:
            value = header(name)
            if value is None or not pattern.match(value.decode("latin-1")):
                return False
        return True


def _pool(workers: Sequence[WorkerSpec]) -> Pool:
    return Pool(tuple(workers), tuple(w.slot for w in workers), tuple(w.weight for w in workers))


def _pattern(glob: str | None) -> Pattern[str] | None:
    return None if glob is None else compile_pattern(translate(glob))


NO_PROFILE = ""


class RoutingTable:
    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.generation = snapshot.generation
        self.model_index = {name: index for index, name in enumerate(snapshot.models)}
        regular = [worker for worker in snapshot.workers if worker.role == "regular"]
        self.everyone = _pool(regular)
        self.every_slot = tuple(worker.slot for worker in snapshot.workers)
        names = dict.fromkeys(name for worker in regular for name in worker.models)
        self._pools = {name: _pool([w for w in regular if not w.models or name in w.models]) for name in names}
        self.model_names = tuple(dict.fromkeys(name for worker in snapshot.workers for name in worker.models))
        self._default = Plan(NO_PROFILE, snapshot.default_policy, POLICIES[snapshot.default_policy])
        self._plans = {name: self._plan(profile) for name, profile in snapshot.profiles.items()}
        if snapshot.default_profile is not None:
            self._default = self._plans[snapshot.default_profile]
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

    def _plan(self, profile: Profile) -> Plan:
        policy = profile.strategy or self.snapshot.default_policy
        return Plan(profile.name, policy, POLICIES[policy])

    def pool_for(self, model: str) -> Pool | None:
        """None when `strict_models` forbids the model; a model that nobody announces goes to any worker otherwise."""
        pool = self._pools.get(model)
        if pool is not None:
            return pool
        if self.snapshot.strict_models and model:
            undeclared = [worker for worker in self.everyone.workers if not worker.models]
            return _pool(undeclared) if undeclared else None
        return self.everyone

    def plan_for(self, asked: str | None, model: str, path: str, header: Header) -> tuple[Plan, bool]:
        """(plan, whether the `config-profile` the client asked for exists).

        Precedence: header `config-profile`, the first `match` that holds, the default profile, the default policy.
        A name that does not exist falls to the rest of the chain, as AIBrix does; the caller counts that.
        """
        known = True
        if asked is not None:
            plan = self._plans.get(asked)
            if plan is not None:
                return plan, True
            known = False
        for rule in self._rules:
            if rule.holds(model, path, header):
                return rule.plan, known
        return self._default, known
