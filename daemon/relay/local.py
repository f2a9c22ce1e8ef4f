"""Endpoints that a shard answers from its own memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from pointsman.daemon.errors import model_not_found
from pointsman.daemon.relay.answers import JSON, TEXT
from pointsman.daemon.relay.inbound import Inbound
from pointsman.daemon.relay.routes import MODELS_PREFIX, ONE_MODEL, Route
from pointsman.daemon.shm import layout as at

if TYPE_CHECKING:
    from pointsman.daemon.relay.context import ShardContext

Answer = tuple[int, bytes, bytes]
"""status, body, content type"""


def answer(context: ShardContext, request: Inbound, route: Route) -> Answer:
    """Raises RequestError."""
    if route is ONE_MODEL:
        return _one_model(context, request)
    if route.path == "/v1/models":
        return _models(context, request)
    if route.path == "/readiness":
        return _readiness(context)
    return 200, b"OK", TEXT


def _readiness(context: ShardContext) -> Answer:
    table = context.table()
    loads = context.words.survey(table.every_slot)
    up = {slot for slot, load in zip(table.every_slot, loads, strict=True) if load >= 0}
    counts = {"healthy_workers": len(up), "total_workers": len(table.every_slot)}
    if context.is_stopping():
        return 503, orjson.dumps({"status": "not ready", "reason": "draining", **counts}), JSON
    if not table.can_serve(up):
        return 503, orjson.dumps({"status": "not ready", "reason": "insufficient healthy workers", **counts}), JSON
    return 200, orjson.dumps({"status": "ready", **counts}), JSON


def _card(context: ShardContext, name: str) -> dict[str, object]:
    created = context.cells[at.H_CREATED_NS] // 1_000_000_000
    return {"id": name, "object": "model", "created": created, "owned_by": "pointsman"}


def _models(context: ShardContext, request: Inbound) -> Answer:
    """Those that the client may use."""
    key = request.key
    cards = [_card(context, name) for name in context.table().model_names if key is None or key.may_use(name)]
    return 200, orjson.dumps({"object": "list", "data": cards}), JSON


def _one_model(context: ShardContext, request: Inbound) -> Answer:
    name = request.text_path[len(MODELS_PREFIX) :]
    if name not in context.table().model_names:
        raise model_not_found(name)
    if request.key is not None:
        request.key.check_model(name)
    return 200, orjson.dumps(_card(context, name)), JSON
