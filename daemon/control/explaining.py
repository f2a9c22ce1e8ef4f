"""Why a request would go where: the shards' own code on their state, booking nothing. POST /explain."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import orjson

from pointsman.admin_api.ports import ExplainRequest
from pointsman.config.documents import Document
from pointsman.config.positions import Places
from pointsman.config.profiles_file import read_profiles
from pointsman.config.snapshot import Profile, Snapshot, WorkerSpec
from pointsman.daemon.dispatch.router import Ask, LiveRouter
from pointsman.daemon.errors import ConfigErrors, Fault, RequestError, model_not_found
from pointsman.daemon.routing.checking import FileCheck
from pointsman.daemon.routing.picking import Explanation, Pick
from pointsman.daemon.routing.request import json_features
from pointsman.daemon.routing.table import Header, Plan, Pool, RoutingTable
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.routing_state import RoutingState

DRAFT = "draft"
_STATUS = {at.STATUS_UP: "", at.STATUS_DOWN: "not healthy", at.STATUS_DRAINING: "draining"}


class Explainer:
    """`current`: the configuration in force."""

    def __init__(self, state: RoutingState, current: Callable[[], Snapshot]) -> None:
        self._state = state
        self._current = current
        self._router = LiveRouter(state, -1, Random())
        self._table = RoutingTable(current())

    def explain(self, asked: ExplainRequest) -> dict[str, Any]:
        """Raises RequestError 400 for what cannot be read, 404 for a profile or model that does not exist."""
        table = self._table_in_force()
        features = json_features(orjson.dumps(asked.request))
        tokens = self._router.read_prompt(features)
        headers = {name.lower(): value for name, value in asked.headers.items()}
        plan, by = self._plan(asked, table, headers, features.model, tokens, features.max_tokens)
        pairs = table.pairs_for(features.model, plan)
        pool = table.pool_for(features.model) if pairs is None else pairs.prefill
        if pool is None:
            raise model_not_found(features.model)
        by_profile = plan
        if pairs is not None and plan.prefill is not None:
            plan = plan.prefill  # where the prefix counts; the decode worker is picked among its partners afterwards
        asked_strategy = plan.selection.asked_in(headers)
        found: dict[str, Any] = {
            "generation": table.generation,
            "profile": plan.profile,
            "profile_by": by,
            "policy": asked_strategy or by_profile.policy,
            "policy_by": _policy_by(table.snapshot, by_profile, asked_strategy),
            "model": features.model,
            "prompt_chars": self._router.chain.total_chars,
            "prompt_tokens": tokens,
        }
        picked, side = self._side(Ask(features, 0, headers), table, pool, plan, tokens)
        found |= side
        if pairs is not None and by_profile.decode is not None and picked is not None:
            partners = {decode for prefill, decode in pairs.compatible if prefill == picked.slot}
            pool = pairs.decode.only([at for at, slot in enumerate(pairs.decode.slots) if slot in partners])
            ask = Ask(features, 0)  # headers are for the prefill worker
            _, found["decode"] = self._side(ask, table, pool, by_profile.decode, tokens, "no partner of the other one")
        return found

    def _side(
        self, ask: Ask, table: RoutingTable, pool: Pool, plan: Plan, tokens: int, outside: str = "serves other models"
    ) -> tuple[WorkerSpec | None, dict[str, Any]]:
        """Who would be picked of `pool`, and what is told of that. `outside`: why others of this role are not in it."""
        try:
            explanation, pick = self._router.explain(ask, table, pool, plan, tokens, time.monotonic())
        except RequestError as error:
            if error.status != 503:
                raise
            refusals = self._router.refusals(ask, table, pool, tokens)
            rows = self._candidates(table, pool, outside, None, refusals)
            return None, {"worker": None, "reason": error.message, "candidates": rows}
        worker = table.fleet(pool.role).workers[pick.worker]
        return worker, {
            "worker": worker.url,
            "worker_id": worker.id,
            "reason": pick.reason,
            "better": "least" if explanation.is_least_best else "most",
            "tied": [table.fleet(pool.role).workers[position].url for position in explanation.tied],
            "candidates": self._candidates(table, pool, outside, explanation, explanation.dropped or {}, pick),
        }

    def _table_in_force(self) -> RoutingTable:
        current = self._current()
        if self._table.snapshot is not current:
            self._table = RoutingTable(current)
        return self._table

    def _plan(
        self,
        asked: ExplainRequest,
        table: RoutingTable,
        headers: Mapping[str, str],
        model: str,
        tokens: int,
        max_tokens: int | None,
    ) -> tuple[Plan, str]:
        """(plan, what chose it)"""
        if isinstance(asked.profile, dict):
            return table.plan_of(_draft(asked.profile)), DRAFT

        def header(name: bytes) -> bytes | None:
            value = headers.get(name.decode("latin-1"))
            return None if value is None else value.encode("latin-1", "replace")

        name = asked.profile if asked.profile is not None else headers.get("config-profile")
        plan, is_known = table.plan_for(name, model, asked.path, header, tokens, max_tokens, _key_name(table, header))
        if asked.profile is not None and not is_known:
            raise _error(404, "PROFILE_NOT_FOUND", f"no profile is called {asked.profile[:100]!r}")
        if name is not None and is_known and plan.profile:
            return plan, "header config-profile" if asked.profile is None else "asked for"
        if name is not None and not is_known:
            return plan, f"no profile is called {name[:100]!r}: {_fallback_by(table.snapshot, plan)}"
        return plan, _fallback_by(table.snapshot, plan)

    def _candidates(
        self,
        table: RoutingTable,
        pool: Pool,
        outside: str,
        explanation: Explanation | None,
        refusals: Mapping[int, str],
        pick: Pick | None = None,
    ) -> list[dict[str, Any]]:
        """Every worker there is, who may take it first. `refusals`: why not, by position in the fleet."""
        positions = {worker.slot: position for position, worker in enumerate(table.fleet(pool.role).workers)}
        rows = []
        for worker in table.snapshot.workers:
            position = positions.get(worker.slot)
            row: dict[str, Any] = {"worker": worker.url, "id": worker.id}
            dropped = self._why_not(worker, pool, outside)
            if dropped is None and position is not None:
                if explanation is not None:
                    row |= _numbers(explanation, position)
                dropped = refusals.get(position)
            row["dropped"] = dropped
            row["is_picked"] = pick is not None and position == pick.worker
            rows.append(row)
        return sorted(rows, key=lambda row: (row["dropped"] is not None, not row["is_picked"]))

    def _why_not(self, worker: WorkerSpec, pool: Pool, outside: str) -> str | None:
        if worker.role != pool.role:
            return f"a {worker.role} worker"
        if worker.slot not in pool.slots:
            return outside
        return _STATUS.get(self._state.segment.status(worker.slot), "not healthy yet") or None


def _key_name(table: RoutingTable, header: Header) -> str | None:
    """ "" for a client without a key: no rule for keys holds."""
    if table.snapshot.keys is None:
        return None
    key = table.keys.find(header(b"authorization"), header(b"x-api-key"))
    return "" if key is None else key.name


def _numbers(explanation: Explanation, position: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "total": explanation.totals.get(position),
        "scorers": {
            column.name: {
                "weight": column.weight,
                "raw": column.raw.get(position),
                "normalised": column.normalised.get(position),
                "weighted": column.weighted.get(position),
            }
            for column in explanation.columns
        },
    }
    for name, values in (
        ("matched_chars", explanation.matched_chars),
        ("matched_tokens", explanation.matched_tokens),
        ("predicted_ttft_s", explanation.ttft_s),
    ):
        found[name] = (values or {}).get(position)
    return found


def _policy_by(snapshot: Snapshot, plan: Plan, asked_strategy: str) -> str:
    if snapshot.locked_strategy:
        return "lockedRoutingStrategy"
    if asked_strategy:
        return "header routing-strategy"
    profile = snapshot.profiles.get(plan.profile)
    if plan.profile == DRAFT and profile is None:
        return DRAFT
    return "profile" if profile is not None and (profile.strategy or profile.routing.get("chain")) else "--policy"


def _fallback_by(snapshot: Snapshot, plan: Plan) -> str:
    if not plan.profile:
        return "no profile"
    return "default profile" if plan.profile == snapshot.default_profile else "match"


def _draft(value: dict[str, Any]) -> Profile:
    """Checked as in a file. Raises RequestError 400 with all that is wrong."""
    document = Document("profile", {"profiles": {DRAFT: value}}, Places(), "")
    try:
        return read_profiles(document, FileCheck()).profiles[DRAFT]
    except ConfigErrors as errors:
        text = "; ".join(f"{e.key}: {e.problem}{f' ({e.hint})' if e.hint else ''}" for e in errors.errors)
        raise _error(400, "BAD_PROFILE", text.replace(f"profiles.{DRAFT}", "profile")) from None


def _error(status: int, code: str, message: str) -> RequestError:
    return RequestError(status, code, message, fault=Fault.CLIENT)
