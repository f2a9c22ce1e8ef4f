"""What may stand in the query of a request: a misspelt parameter is told, not left aside."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from pointsman.admin_api.answers import bad_request
from pointsman.config.nearest import closest


def check_parameters(request: web.Request, known: Sequence[str]) -> None:
    """Raises RequestError 400."""
    for name in request.query:
        if name not in known:
            raise bad_request(f"unknown parameter {name[:60]!r}. {closest(name, known)}".rstrip(". "))
