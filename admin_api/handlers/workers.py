"""/workers: the worker API of SGLang's gateways, keyed by id or by URL."""

from __future__ import annotations

import math

from aiohttp import web

from pointsman.admin_api import views
from pointsman.admin_api.answers import answer, bad_request
from pointsman.admin_api.ports import ControlPort, WorkerView
from pointsman.admin_api.queries import check_parameters
from pointsman.admin_api.schemas import MAX_DRAIN_S, PatchBody, WorkerBody, read_body, read_drain
from pointsman.config.worker_urls import canonical_url

_STATES = ("draining", "all")
_QUERY = ("model", "state")
_REMOVAL = ("deadline_s", "force")


class WorkerHandlers:
    def __init__(self, port: ControlPort) -> None:
        self._port = port

    def routes(self) -> list[web.RouteDef]:
        one = "/workers/{key:.+}"
        return [
            web.post("/workers", self.add),
            web.post(f"{one}/forget", self.forget),
            web.post(f"{one}/drain", self.drain),
            web.post(f"{one}/undrain", self.undrain),
            web.get("/workers", self.get_all),
            web.get(one, self.get),
            web.put(one, self.replace),
            web.patch(one, self.patch),
            web.delete(one, self.remove),
        ]

    async def add(self, request: web.Request) -> web.Response:
        body = read_body(await request.read(), WorkerBody)
        view = await self._port.add_worker(body.to_request())
        state = "ready" if view.is_healthy else f"{view.status}, it is probed until it answers"
        message = f"Worker {view.url} was added and is {state}"
        return _accepted(view, message, body.warnings())

    async def get_all(self, request: web.Request) -> web.Response:
        state, model = _query(request)
        return answer(views.workers(self._listed(state, model)))

    def _listed(self, state: str | None, model: str | None) -> list[WorkerView]:
        if state == "draining":
            return self._port.list_workers(state="draining", model=model)
        found = self._port.list_workers(model=model)
        if state == "all":
            found = found + self._port.list_workers(state="draining", model=model)
        return list({view.id: view for view in found}.values())

    async def get(self, request: web.Request) -> web.Response:
        return answer(views.worker(self._port.get_worker(_key(request))))

    async def patch(self, request: web.Request) -> web.Response:
        body = read_body(await request.read(), PatchBody)
        if not body.model_fields_set:
            raise bad_request(f"nothing to change; these can be: {', '.join(sorted(PatchBody.model_fields))}")
        view = await self._port.patch_worker(_key(request), body.to_patch())
        return _accepted(view, f"Worker {view.url} was changed")

    async def replace(self, request: web.Request) -> web.Response:
        body = read_body(await request.read(), WorkerBody)
        present = self._port.get_worker(_key(request))
        _check_same(present, body)
        view = await self._port.patch_worker(present.id, body.to_patch())
        return _accepted(view, f"Worker {view.url} was replaced", body.warnings())

    async def forget(self, request: web.Request) -> web.Response:
        view = await self._port.forget_worker(_key(request))
        return answer(views.accepted(view, f"Nothing is believed to be cached at worker {view.url} any more"))

    async def drain(self, request: web.Request) -> web.Response:
        body = read_drain(await request.read())
        view = await self._port.drain_worker(_key(request), body.deadline_s, body.then)
        left = _left(view.in_flight, body.deadline_s, body.then)
        return answer(views.accepted(view, f"Worker {view.url} gets no new requests{left}"), status=202)

    async def undrain(self, request: web.Request) -> web.Response:
        view = await self._port.undrain_worker(_key(request))
        return answer(views.accepted(view, f"Worker {view.url} gets requests again when it is healthy ({view.status})"))

    async def remove(self, request: web.Request) -> web.Response:
        deadline_s = _removal_deadline(request)
        view = await self._port.remove_worker(_key(request), deadline_s)
        left = _left(view.in_flight, deadline_s, "close")
        return answer(views.accepted(view, f"Worker {view.url} was removed{left}"), status=202)


def _accepted(view: WorkerView, message: str, warnings: list[str] | None = None) -> web.Response:
    location = {"Location": views.location(view)}
    return answer(views.accepted(view, message, warnings or ()), status=202, headers=location)


def _key(request: web.Request) -> str:
    """The id, or the worker's URL in its canonical spelling; aiohttp has undone the percent-encoding once."""
    key = request.match_info["key"]
    try:
        return canonical_url(key) if "://" in key else key
    except ValueError:
        return key  # no worker has that name either: the port answers 404


def _left(in_flight: int, deadline_s: float | None, then: str) -> str:
    """What becomes of the requests that run there."""
    if not in_flight:
        return ""
    if deadline_s is None or then == "keep":
        return f"; {in_flight} running requests go on"
    return (
        f"; {in_flight} running requests have {deadline_s:g} s" if deadline_s else f"; {in_flight} requests are ended"
    )


def _removal_deadline(request: web.Request) -> float | None:
    """Seconds that running requests have; None: as long as they need."""
    check_parameters(request, _REMOVAL)
    force, text = request.query.get("force"), request.query.get("deadline_s")
    if force not in (None, "", "0", "1", "false", "true"):
        raise bad_request(f"force: expected 1 or 0, got {force[:60]!r}")
    if force in ("", "1", "true"):
        if text is not None:
            raise bad_request("force ends running requests at once: leave deadline_s out")
        return 0.0
    if text is None:
        return None
    try:
        deadline_s = float(text)
    except ValueError:
        deadline_s = math.nan
    if not 0 <= deadline_s <= MAX_DRAIN_S:
        raise bad_request(f"deadline_s: expected 0 to {MAX_DRAIN_S} seconds, got {text[:60]!r}")
    return deadline_s


def _query(request: web.Request) -> tuple[str | None, str | None]:
    """(state, model)"""
    check_parameters(request, _QUERY)
    state = request.query.get("state")
    if state is not None and state not in _STATES:
        raise bad_request(f"expected state={' or state='.join(_STATES)}, got {state[:60]!r}")
    return state, request.query.get("model")


def _check_same(present: WorkerView, body: WorkerBody) -> None:
    """What cannot change while requests may be on their way to it."""
    try:
        url = canonical_url(body.url)
    except ValueError as error:
        raise bad_request(f"url: {error}") from None
    fixed = ("url", url, present.url), ("worker_type", body.worker_type, present.worker_type)
    of_pairs = (
        ("bootstrap_port", body.bootstrap_port, present.bootstrap_port),
        ("kv_connector", body.kv_connector, present.kv_connector),
    )
    for name, asked, is_now in (*fixed, *of_pairs):
        if asked != is_now:
            raise bad_request(f"{name} cannot change ({is_now!r}); remove the worker and add it anew")
