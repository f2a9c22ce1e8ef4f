"""The documents: valid, complete, and true to what is answered."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any
from unittest.mock import MagicMock

import jsonschema
import msgspec
import pytest
from aiohttp import web

from pointsman.admin_api import views
from pointsman.admin_api.app import build_app
from pointsman.admin_api.auth import Trusting
from pointsman.admin_api.handlers.fanout import OPERATIONS
from pointsman.admin_api.openapi.admin import ADMIN_OPERATIONS, admin_document
from pointsman.admin_api.openapi.data import DATA_OPERATIONS, data_document
from pointsman.admin_api.openapi.document import JsonObject, operation_id
from pointsman.admin_api.openapi.page import page
from pointsman.admin_api.openapi.shapes import Accepted, FanoutAnswer, FlushAnswer, LoadsAnswer, Worker, Workers
from pointsman.admin_api.ports import LoadView, TargetResult
from pointsman.daemon.batches.api import Api, Quota
from pointsman.daemon.relay import routes
from tests.fakes.control_port import FakeControlPort

DOCUMENTS = {"/openapi.json": admin_document, "/openapi-data.json": data_document}


def of_app(app: web.Application) -> set[tuple[str, str]]:
    found = set()
    for route in app.router.routes():
        assert route.resource is not None
        path = route.resource.canonical
        paths = [f"/{name}" for name in OPERATIONS] if path == "/{operation}" else [path]
        found |= {(route.method, path) for path in paths if route.method != "HEAD"}
    return found


def listed(document: JsonObject) -> set[tuple[str, str]]:
    return {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}


def test_every_route_of_the_admin_api_is_in_its_document(port: FakeControlPort) -> None:
    """Whoever adds a route adds it to admin_api/openapi/admin.py."""
    assert listed(admin_document()) == of_app(build_app(port, auth=Trusting()))


def test_every_route_of_the_shards_is_in_the_other_document() -> None:
    served = {
        (method.decode(), path.decode())
        for path, route in routes.build_routes(()).items()
        for method in route.methods
        if method != b"HEAD"
    }
    served.add(("GET", (routes.MODELS_PREFIX + b"{id}").decode()))
    batches = {path for path in of_app(Api(MagicMock(), Quota(0, 0, 0, 0)).app()) if "/operator/" not in path[1]}
    assert listed(data_document()) == served | batches


@pytest.mark.parametrize("path", DOCUMENTS)
def test_documents_hang_together(path: str) -> None:
    """Every reference leads somewhere, every schema is one, every path parameter is declared, ids are unique."""
    document = DOCUMENTS[path]()
    text = json.dumps(document)
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', text):
        place: Any = document
        for key in reference.split("/"):
            place = place[key]
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    assert document["openapi"].startswith("3.1.")
    ids = []
    for where, methods in document["paths"].items():
        for operation in methods.values():
            ids.append(operation["operationId"])
            declared = {p["name"] for p in operation.get("parameters", ()) if p["in"] == "path"}
            assert declared == set(re.findall(r"{(\w+)}", where))
            assert operation["responses"]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'"#/components/(?:schemas|responses)/([^"]+)"', text))
    assert used >= set(document["components"]["responses"]), "described, and not used"


def test_what_is_public_says_so(port: FakeControlPort) -> None:
    document = admin_document()
    public = {path for path, methods in document["paths"].items() for each in methods.values() if "security" in each}
    assert public == {"/health", "/docs", "/openapi.json", "/openapi-data.json"}
    assert document["security"] == [{"token": []}]


# --- answers are what the document says


def fields(kind: type[msgspec.Struct]) -> set[str]:
    return set(kind.__struct_fields__)


def test_answers_about_workers_have_the_fields_of_their_shapes(port: FakeControlPort) -> None:
    view = port.declare("http://127.0.0.1:8000", models=("qwen",))
    assert views.worker(view).keys() == fields(Worker)
    assert views.workers([view]).keys() == fields(Workers)
    assert views.accepted(view, "done").keys() == fields(Accepted)


@pytest.mark.parametrize(
    ("method", "path", "shape"),
    [
        ("POST", "/flush_cache", FlushAnswer),
        ("POST", "/start_profile", FanoutAnswer),
        ("GET", "/get_loads", LoadsAnswer),
    ],
)
async def test_answers_of_fan_outs_have_the_fields_of_their_shapes(
    client: Any, port: FakeControlPort, method: str, path: str, shape: type[msgspec.Struct]
) -> None:
    result = TargetResult(
        id="w1",
        url="http://w1",
        outcome="failed",
        path="/x",
        status=500,
        attempts=3,
        latency_ms=1.5,
        error="no",
        body="",
    )
    port.told, port.loads = (result,), (LoadView(worker="http://w1", load=-1, details=None),)
    body = await (await client.request(method, path)).json()
    assert body.keys() == fields(shape)
    msgspec.convert(body, shape)


# --- how they are served


@pytest.mark.parametrize("path", DOCUMENTS)
async def test_documents_are_served_as_json(client: Any, path: str) -> None:
    response = await client.get(path)
    assert (response.status, response.content_type) == (200, "application/json")
    assert await response.json() == json.loads(json.dumps(DOCUMENTS[path]()))


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.inline: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert "src" not in given, "an asset of its own"
        assert not any(name.startswith("on") or name == "style" for name in given), "what the policy forbids"
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)
        if given.get("id"):
            self.ids.append(str(given["id"]))
        if tag == "a":
            self.links.append(str(given["href"]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            self.inline[self.open[-1]] = data


async def test_the_page_needs_nothing_else_and_is_whole_without_its_script(client: Any) -> None:
    response = await client.get("/docs")
    text = await response.text()
    assert (response.status, response.content_type) == (200, "text/html")
    found = _Page()
    found.feed(text)
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
    assert {link for link in found.links if not link.startswith("#")} == set(DOCUMENTS)
    policy = response.headers["Content-Security-Policy"]
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(found.inline[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    for prefix, operations in (("openapi", ADMIN_OPERATIONS), ("openapi-data", DATA_OPERATIONS)):
        for operation in operations:
            assert f"{prefix}-{operation_id(operation.method, operation.path)}" in found.ids
            assert f"<code>{operation.path}</code>" in text


def test_nothing_of_a_document_is_markup_on_the_page() -> None:
    document = json.loads(json.dumps(admin_document()).replace("The workers", "<script>alert(1)</script>"))
    text = page({"/openapi.json": document})
    assert "&lt;script&gt;alert(1)" in text
    assert "<script>alert(1)" not in text
