"""Workers as the API shows them: our fields, and those that clients of SGLang's gateways look for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

import msgspec

from pointsman.admin_api.ports import WorkerView

UNKNOWN_MODEL = "unknown"
DEFAULT_PRIORITY = 50
DEFAULT_COST = 1.0


def worker(view: WorkerView) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(view)
    return fields | {
        "model_id": view.models[0] if view.models else UNKNOWN_MODEL,
        "load": view.in_flight,
        "connection_mode": "http",
        "priority": DEFAULT_PRIORITY,
        "cost": DEFAULT_COST,
    }


def workers(views: Iterable[WorkerView]) -> dict[str, Any]:
    shown = [worker(view) for view in views]
    roles = [view["worker_type"] for view in shown]
    return {
        "workers": shown,
        "total": len(shown),
        "stats": {f"{role}_count": roles.count(role) for role in ("prefill", "decode", "regular")},
    }


def location(view: WorkerView) -> str:
    return f"/workers/{quote(view.id, safe='')}"


def accepted(view: WorkerView, message: str, warnings: Iterable[str] = ()) -> dict[str, Any]:
    """The union of what generations 2 and 3 answer to a change."""
    return {
        "status": "accepted",
        "success": True,
        "worker_id": view.id,
        "url": view.url,
        "location": location(view),
        "message": message,
        "warnings": list(warnings),
        "worker": worker(view),
    }
