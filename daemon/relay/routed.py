"""What is known of a routed request: by whoever drives it (`exchange`), and by whoever tells of it (`telling`)."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from pointsman.config.snapshot import WorkerSpec
from pointsman.daemon.errors import Fault, RequestError
from pointsman.daemon.relay.framing import BodyFraming
from pointsman.daemon.relay.heads import ResponseHead
from pointsman.daemon.relay.inbound import Inbound
from pointsman.daemon.relay.receiver import Receiver
from pointsman.daemon.relay.routes import Route
from pointsman.daemon.relay.upstream import UpstreamConnection
from pointsman.daemon.relay.usage import NO_USAGE, Usage
from pointsman.daemon.routing.body import Features
from pointsman.daemon.routing.table import Plan, Pool, RoutingTable
from pointsman.daemon.shm.choosing import Booked
from pointsman.daemon.shm.recording import Taken

if TYPE_CHECKING:
    from pointsman.daemon.relay.context import ShardContext
    from pointsman.daemon.relay.continued import Continued
    from pointsman.daemon.relay.exchange import Exchange
    from pointsman.daemon.relay.pair import Pair
    from pointsman.daemon.relay.passage import Passage


class Caller:
    """The client's side, as who answers it sees it."""

    context: ShardContext
    transport: asyncio.Transport
    exchange: Exchange | Passage | None
    is_closed: bool
    is_write_paused: bool
    peer: str
    peer_bytes: bytes

    def release_body(self, request: Inbound) -> None:
        """The body is not needed any more; may be said more than once."""
        raise NotImplementedError

    def hold(self, request: Inbound, more_bytes: int) -> None:
        """Besides its body so much is kept for the request, until the body is released."""
        raise NotImplementedError

    def write_error(self, request: Inbound, error: RequestError, headers: tuple[tuple[str, str], ...] = ()) -> bool:
        """Returns whether the connection stays open."""
        raise NotImplementedError

    def write_soon(self, answer: bytes) -> None:
        """A whole answer, with the other answers of this turn of the event loop; nothing of it is written later."""
        raise NotImplementedError

    def exchange_ended(self, request: Inbound, is_keep_alive: bool) -> None:
        """Called once by every exchange, after its answer (or the reason for none) was written."""
        raise NotImplementedError

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """The connection holds its tasks: nothing is collected while it runs, nothing outlives the shard unseen."""
        raise NotImplementedError


class Routed(Receiver):
    """What `_begin` does not set begins as None, 0 or False: it is a C struct (routed.pxd)."""

    plan: Plan | None
    pool: Pool | None
    worker: WorkerSpec | None
    booked: Booked | None
    """what is charged for it now"""
    decision: Booked | None
    """what was charged last"""
    taken: Taken | None
    """for whoever records the traffic"""
    asked_strategy: str
    usage: Usage
    upstream: UpstreamConnection | None
    head: ResponseHead | None
    """of the answer, once it was passed on"""
    framing: BodyFraming | None
    status: int
    attempts: int
    resends: int
    continuations: int
    is_exhausted: bool
    """we tried again and gave up, or had no retries left: the client should not do the same at once"""
    queued_s: float
    connected_at: float
    first_byte_at: float
    is_keep_alive: bool
    is_ended: bool
    blame: Fault | None
    """whose fault the error was that it ended with"""
    continued: Continued | None
    """of a stream that another worker may have to continue"""
    pair: Pair | None
    """of a request whose prompt another worker computes"""

    def _begin(self, client: Caller, request: Inbound, route: Route, features: Features, table: RoutingTable) -> None:
        self.client = client
        self.context: ShardContext = client.context
        self.request = request
        self.route = route
        self.features = features
        self.table = table
        self.method = request.method
        self.asked_strategy = ""
        self.usage = NO_USAGE
        self.usage_data = b""
        self.attempts = 1
