"""Metrics and probes on a listener of their own (`metrics_listen`), for Prometheus and load balancers: no token."""

from __future__ import annotations

from aiohttp import hdrs, web

from pointsman.admin_api.answers import answer, text
from pointsman.admin_api.ports import ControlPort

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ProbeHandlers:
    def __init__(self, port: ControlPort) -> None:
        self._port = port

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/metrics", self.metrics),
            web.get("/health", health),
            web.get("/readiness", self.readiness),
        ]

    async def metrics(self, _request: web.Request) -> web.Response:
        return metrics_page(self._port)

    async def readiness(self, _request: web.Request) -> web.Response:
        """What `/readiness` on the data port answers, in the same words."""
        status = self._port.status()
        counts = {"healthy_workers": status.workers_healthy, "total_workers": status.workers_total}
        if status.state == "draining":
            return answer({"status": "not ready", "reason": "draining", **counts}, status=503)
        if not status.can_serve:
            return answer({"status": "not ready", "reason": "insufficient healthy workers", **counts}, status=503)
        return answer({"status": "ready", **counts})


async def health(_request: web.Request) -> web.Response:
    return text("OK")


def metrics_page(port: ControlPort) -> web.Response:
    return web.Response(body=port.metrics(), headers={hdrs.CONTENT_TYPE: METRICS_TYPE})
