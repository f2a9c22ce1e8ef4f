"""What the handlers of one engine share, and what belongs to one call."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import orjson
from aiohttp import web

from pointsman.scripts.simulated_engine.driver import EngineDriver, Ticket, Work
from pointsman.scripts.simulated_engine.faults import FaultBook
from pointsman.scripts.simulated_engine.journal import Journal
from pointsman.scripts.simulated_engine.metrics import EngineMetrics
from pointsman.scripts.simulated_engine.model import Engine, RequestTooLargeError
from pointsman.scripts.simulated_engine.reply import Reply
from pointsman.scripts.simulated_engine.settings import EngineSettings

if TYPE_CHECKING:
    from pointsman.scripts.simulated_engine.transfer import Transfers

JsonObject = dict[str, Any]


class ApiError(Exception):
    """An answer other than 200 that the caller earned."""

    def __init__(self, status: int, message: str, error_type: str = "BadRequestError") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.error_type = error_type

    def body(self) -> bytes:
        error = {
            "message": self.message,
            "type": self.error_type,
            "param": None,
            "code": self.status,
        }
        return orjson.dumps({"error": error})


class Listening(Protocol):
    """The engine's listening socket, as faults see it."""

    @property
    def port(self) -> int: ...
    async def refuse(self, seconds: float | None) -> None: ...
    async def accept_again(self) -> None: ...
    @property
    def connections_open(self) -> int: ...


@dataclass(slots=True)
class EngineContext:
    settings: EngineSettings
    model: Engine
    metrics: EngineMetrics
    driver: EngineDriver
    listener: Listening
    journal: Journal = field(default_factory=Journal)
    faults: FaultBook = field(default_factory=FaultBook)
    weight_version: str = "default"
    weight_updates: int = 0
    is_asleep: bool = False
    is_profiling: bool = False
    transfers: "Transfers | None" = None
    """None: this engine does it all."""


@dataclass(slots=True)
class Call:
    """One request on its way through a handler."""

    context: EngineContext
    reply: Reply
    headers: Mapping[str, str]
    query: Mapping[str, str]
    path: str
    body: bytes
    request_id: str
    created_s: int
    ticket: Ticket | None = None
    transfer_params: JsonObject | None = None
    """for decode, in the answer of a prefill engine"""

    def json(self) -> JsonObject:
        if not self.body:
            return {}
        try:
            document = orjson.loads(self.body)
        except orjson.JSONDecodeError as error:
            raise ApiError(400, f"invalid JSON: {error}") from error
        if not isinstance(document, dict):
            raise ApiError(400, "the body has to be a JSON object")
        return document

    def model_name(self, document: JsonObject) -> str:
        """The served model, or 404 if the request names another one."""
        name = document.get("model") or self.context.settings.model
        if name != self.context.settings.model:
            raise ApiError(404, f"The model `{name}` does not exist.", "NotFoundError")
        return str(name)

    def start(self, works: Sequence[Work], *, streams: bool) -> Ticket:
        self.ticket = Ticket(self.request_id, streams)
        try:
            self.context.driver.submit(self.ticket, works)
        except RequestTooLargeError as error:
            raise ApiError(400, str(error)) from error
        return self.ticket

    async def run(self, works: Sequence[Work]) -> Ticket:
        ticket = self.start(works, streams=False)
        await ticket.finish()
        return ticket

    async def send_json(self, document: object, status: int = 200) -> web.StreamResponse:
        if self.transfer_params is not None and isinstance(document, dict):
            document = {**document, "kv_transfer_params": self.transfer_params}
        return await self.reply.send(orjson.dumps(document), status=status)


def choose_request_id(headers: Mapping[str, str]) -> str:
    return headers.get("x-request-id") or uuid.uuid4().hex


def now_s() -> int:
    return int(time.time())
