"""How the daemon is: for people, for Prometheus, for whoever only asks whether it lives."""

from __future__ import annotations

from aiohttp import web

from pointsman.admin_api.answers import answer, text
from pointsman.admin_api.handlers.probes import health, metrics_page
from pointsman.admin_api.ports import ControlPort
from pointsman.daemon.version import VERSION

INDEX = f"""\
pointsman {VERSION}, admin API

GET    /status                what runs, and how
GET    /metrics               for Prometheus
GET    /health                200 while this process lives; asks for no token
GET    /docs                  all of this for browsers, without a token; as OpenAPI: /openapi.json , and of the port
                              that clients connect to: /openapi-data.json
GET    /workers               ?model=NAME  ?state=draining|all
POST   /workers               {{"url": "http://HOST:PORT", "models": […], "weight": 1, "labels": {{…}}, "api_key": "…"}}
GET    /workers/ID            ID is the worker's id, or its URL (percent-encoded)
PATCH  /workers/ID            weight, labels, models, api_key, prompt_tokens_min, prompt_tokens_max, kv_tokens
PUT    /workers/ID            as POST, with the same url
DELETE /workers/ID            no more picks; running requests end. ?deadline_s=60: then they are ended  ?force=1: now
POST   /workers/ID/drain      {{"deadline_s": 60, "then": "close"|"keep"}}: no new ones; what runs is ended then, or not
POST   /workers/ID/undrain    requests again
POST   /workers/ID/forget     its engine's prefix cache is gone (flushed by hand, say)
GET    /workers/ID/why        ?last=10m: what went there, and why
POST   /explain               a request body, or {{"request": {{…}}, "headers": {{…}}, "profile": NAME or draft}}
GET    /decisions             ?limit=50  ?worker=ID: the newest routed requests
GET    /decisions/REQUEST-ID  one of them, with its explanation where it was kept
GET    /config                generation, source, hash, last reload
GET    /config/history        what the files said in the last generations
GET    /config/history/G      in generation G, with its content
GET    /config/diff           ?from=G ?to=G2: what changed
POST   /config/reload         read the files again
POST   /config/rollback       {{"generation": G}}: its profiles and workers, until their files change
POST   /config/apply          {{"kind": "profiles"|"workers", "name": "…", "content": "…", "confirm_within_s": 120}}
POST   /config/confirm        keep what is on trial
POST   /config/release        the files again, whatever is held in their place
GET    /log-level             what is logged
PUT    /log-level             {{"level": "info", "access_sample": 0.1}}
POST   /pause                 {{"mode": "hold" or "reject", "reason": "…"}}: from its answer on no request starts
POST   /resume                requests go on
POST   /upgrade               {{"timeout_s": 60}}: the installed version takes over; answered when it has, or could not
POST   /state/snapshot        write what routing has learned to the state directory, now
POST   /record                {{"minutes": 10}}: the traffic as lines of a trace (lengths, times, hashes; no text)
DELETE /record                end that early
GET    /get_loads             the engines' own words about their load
GET    /engine_metrics        all engines' metrics on one page, labelled by worker
POST   /OPERATION             at all engines, or ?worker=ID ?model=NAME; ?timeout_s=30 ?include_down=1. OPERATION is
                              flush_cache, abort_request, pause_generation, continue_generation,
                              update_weights_from_disk, update_weights_from_distributed, update_weights_from_tensor,
                              release_memory_occupation, resume_memory_occupation, start_profile, stop_profile
POST   /add_worker?url=  POST /remove_worker?url=  GET /list_workers
"""


class StatusHandlers:
    def __init__(self, port: ControlPort) -> None:
        self._port = port

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/", self.index),
            web.get("/health", health),
            web.get("/status", self.status),
            web.get("/metrics", self.metrics),
        ]

    async def index(self, _request: web.Request) -> web.Response:
        return text(INDEX)

    async def status(self, _request: web.Request) -> web.Response:
        return answer(self._port.status())

    async def metrics(self, _request: web.Request) -> web.Response:
        return metrics_page(self._port)
