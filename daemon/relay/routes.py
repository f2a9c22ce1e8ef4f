"""Which paths are served, and how."""

from __future__ import annotations

from enum import IntEnum

import orjson

from pointsman.daemon.routing.paths import FORM_PATHS, JSON_PATHS
from pointsman.daemon.telemetry.series import ROUTES


class Kind(IntEnum):
    JSON = 0
    """routed; the body is a JSON object"""
    FORM = 1
    """routed; the body is a multipart form"""
    INFO = 2
    """a GET answered by any healthy worker"""
    LOCAL = 3
    """answered by the shard itself"""
    STREAMED = 4
    """answered by another process of ours: body and answer are streamed"""


class Route:
    """`label`: index into telemetry.series.ROUTES. `path_json`: `path` as it stands in the access log, empty where the
    requests' own paths differ. A C struct, immutable (routes.pxd)."""

    def __init__(self, path: str, kind: Kind, methods: tuple[bytes, ...], label: int, path_json: bytes = b"") -> None:
        self.path = path
        self.kind = kind
        self.methods = methods
        self.label = label
        self.path_json = path_json

    @property
    def allowed(self) -> str:
        return b", ".join(self.methods).decode()


INFO_PATHS = ("/get_model_info", "/get_server_info", "/version")
HEALTH_GENERATE = "/health_generate"
"""answered by a worker's own test generation or, where pairs serve, by one of a pair (`PAIR_PROBE`)"""
LOCAL_PATHS = ("/health", "/liveness", "/readiness", "/v1/models")
MODELS_PREFIX = b"/v1/models/"

_POST = (b"POST",)
_GET = (b"GET", b"HEAD")


def _label(name: str) -> int:
    return ROUTES.index(name) if name in ROUTES else 0


def build_routes(extra_paths: tuple[str, ...]) -> dict[bytes, Route]:
    found: list[tuple[str, Kind, tuple[bytes, ...], str]]
    found = [(path, Kind.JSON, _POST, path) for path in JSON_PATHS]
    found += [(path, Kind.FORM, _POST, path) for path in FORM_PATHS]
    found += [(path, Kind.INFO, _GET, "probe") for path in INFO_PATHS]
    found += [(HEALTH_GENERATE, Kind.INFO, (b"GET",), "probe")]
    found += [(path, Kind.LOCAL, _GET, "probe") for path in LOCAL_PATHS if path != "/v1/models"]
    found += [(path, Kind.JSON, _POST, "extra") for path in extra_paths]
    found += [("/v1/models", Kind.LOCAL, _GET, "models")]
    return {
        path.encode(): Route(path, kind, methods, _label(label), orjson.dumps(path))
        for path, kind, methods, label in found
    }


ONE_MODEL = Route("/v1/models/ID", Kind.LOCAL, _GET, _label("models"))
PAIR_PROBE = Route("/v1/completions", Kind.JSON, (), _label("probe"), orjson.dumps(HEALTH_GENERATE))
"""What a GET of HEALTH_GENERATE becomes for a pair (`relay.pair_probe`)."""
FILES = Route("/v1/files", Kind.STREAMED, (), _label("files"))
BATCHES = Route("/v1/batches", Kind.STREAMED, (), _label("batches"))
FANOUTS = Route("/OPERATION", Kind.STREAMED, (), _label("fan_outs"))
NOWHERE = Route("other", Kind.LOCAL, (), 0)
"""label of requests for a path that does not exist"""


def batch_route(path: bytes) -> Route | None:
    """Of the paths that the batch runner answers; it judges the methods.

    No id has a dot or an escape in it: nobody gets elsewhere by `..`, whoever resolves that.
    """
    if b"." in path or b"%" in path:
        return None
    if path.startswith(b"/v1/batches"):
        return BATCHES if path[11:12] in (b"", b"/") else None
    if path.startswith(b"/v1/files"):
        return FILES if path[9:10] in (b"", b"/") else None
    return None
