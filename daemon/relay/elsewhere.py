"""Which requests other processes of ours answer, and where: files and batches the batch runner, fan-outs control.

A fan-out is the operator's affair: it needs an admin token, which control judges, or an address inside of
`admin_networks`. API keys are for those who ask engines, and let nobody in here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pointsman.config.places import BATCH_SOCKET, FANOUT_SOCKET
from pointsman.config.settings import Settings
from pointsman.daemon.errors import RequestError, batches_unavailable, fanouts_unavailable
from pointsman.daemon.relay.routes import BATCHES, FANOUTS, FILES, Route, batch_route
from pointsman.daemon.workers.fanout import LOADS, METRICS, OPERATIONS

BATCH_ANSWER_S = 120.0
FANOUT_ANSWER_S = 3660.0
"""the longest `timeout_s` that may be asked for, and a little more"""


@dataclass(frozen=True, slots=True)
class Destination:
    socket: str
    """path of the unix socket"""
    answer_s: float
    """without a byte from the other process, while it is its turn"""
    unavailable: Callable[[], RequestError]


def fanout_paths(settings: Settings) -> frozenset[bytes]:
    """What `extra_paths` names goes to one worker, as it says there."""
    if not settings.admin_on_data_port:
        return frozenset()
    paths = {f"/{name}" for name in (*OPERATIONS, LOADS.name, METRICS.name)}
    return frozenset(path.encode() for path in paths.difference(settings.extra_paths))


class Elsewhere:
    def __init__(self, settings: Settings) -> None:
        self._destinations: dict[Route, Destination] = {}
        folder = settings.runtime_dir
        if settings.batch_store is not None:
            batches = Destination(f"{folder}/{BATCH_SOCKET}", BATCH_ANSWER_S, batches_unavailable)
            self._destinations |= {FILES: batches, BATCHES: batches}
        self._fanout_paths = fanout_paths(settings)
        if self._fanout_paths:
            self._destinations[FANOUTS] = Destination(f"{folder}/{FANOUT_SOCKET}", FANOUT_ANSWER_S, fanouts_unavailable)

    @property
    def is_empty(self) -> bool:
        return not self._destinations

    def route(self, path: bytes) -> Route | None:
        """None: nobody else answers that, as this gateway is set up."""
        route = FANOUTS if path in self._fanout_paths else batch_route(path)
        return route if route in self._destinations else None

    def destination(self, route: Route) -> Destination:
        return self._destinations[route]
