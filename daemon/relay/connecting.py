"""What it says of a worker that a new connection to it failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pointsman.config.snapshot import WorkerSpec
from pointsman.daemon.errors import RequestError, connect_failed, worker_timeout
from pointsman.daemon.relay.upstream import REFUSED
from pointsman.daemon.resilience.timeouts import DEADLINES, MISSED, Deadline
from pointsman.daemon.shm import layout as at

if TYPE_CHECKING:
    from pointsman.daemon.relay.context import ShardContext


def connect_failure(context: ShardContext, worker: WorkerSpec, error: OSError) -> RequestError:
    """What the client is told; it is counted, and a worker that refuses is down for all shards."""
    context.count_at(worker.slot, at.L_CONNECT_FAILURES)
    if error.errno in REFUSED:
        context.segment.set_status(worker.slot, at.STATUS_DOWN, expected=at.STATUS_UP)
    if isinstance(error, TimeoutError):
        context.count(at.G_TIMEOUTS + DEADLINES.index(Deadline.CONNECT))
        code = MISSED[Deadline.CONNECT].code
        return worker_timeout(f"the worker {worker.url} took no connection in time", code)
    return connect_failed(f"the worker {worker.url} cannot be reached: {error.strerror or error}")
