"""What the engine saw, for tests to look at: requests, bodies, disconnects, connections.

Keeping raw bodies is right only in a simulator.
"""

import base64
import hashlib
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

_RECORDS_KEPT = 256
_BODIES_KEPT = 16
_DISCONNECTS_KEPT = 1024


@dataclass(slots=True, eq=False)
class RequestRecord:
    """`outcome` is the status, or how the request ended without one."""

    number: int
    method: str
    path: str
    raw_headers: tuple[tuple[bytes, bytes], ...]
    peer_port: int
    request_id: str
    started_monotonic_s: float
    body_bytes: int
    body_sha256: str
    body: bytes | None
    outcome: str = "running"

    def describe(self) -> dict[str, object]:
        return {
            "number": self.number,
            "method": self.method,
            "path": self.path,
            "headers": [[k.decode("latin-1"), v.decode("latin-1")] for k, v in self.raw_headers],
            "peer_port": self.peer_port,
            "request_id": self.request_id,
            "started_monotonic_s": self.started_monotonic_s,
            "body_bytes": self.body_bytes,
            "body_sha256": self.body_sha256,
            "body_base64": None if self.body is None else base64.b64encode(self.body).decode(),
            "outcome": self.outcome,
        }


@dataclass(slots=True)
class Journal:
    """`monotonic` times compare across processes of one machine."""

    requests_total: int = 0
    by_path: dict[str, int] = field(default_factory=dict)
    inference_total: int = 0
    running: int = 0
    max_running: int = 0
    aborted_total: int = 0
    disconnects_total: int = 0
    faults_total: int = 0
    connections_total: int = 0
    disconnects: deque[dict[str, object]] = field(default_factory=lambda: deque(maxlen=_DISCONNECTS_KEPT))
    records: deque[RequestRecord] = field(default_factory=lambda: deque(maxlen=_RECORDS_KEPT))
    _with_body: deque[RequestRecord] = field(default_factory=deque)

    def begin(
        self,
        method: str,
        path: str,
        raw_headers: tuple[tuple[bytes, bytes], ...],
        peer_port: int,
        request_id: str,
        body: bytes,
    ) -> RequestRecord:
        self.requests_total += 1
        self.by_path[path] = self.by_path.get(path, 0) + 1
        digest = hashlib.sha256(body).hexdigest()
        record = RequestRecord(
            self.requests_total,
            method,
            path,
            raw_headers,
            peer_port,
            request_id,
            time.monotonic(),
            len(body),
            digest,
            body,
        )
        self.records.append(record)
        self._with_body.append(record)
        if len(self._with_body) > _BODIES_KEPT:
            self._with_body.popleft().body = None
        return record

    def enter(self) -> None:
        self.inference_total += 1
        self.running += 1
        self.max_running = max(self.max_running, self.running)

    def leave(self) -> None:
        self.running -= 1

    def note_disconnect(self, record: RequestRecord) -> None:
        self.disconnects_total += 1
        record.outcome = "disconnect"
        self.disconnects.append(
            {
                "request_id": record.request_id,
                "path": record.path,
                "monotonic_s": time.monotonic(),
                "unix_s": time.time(),
            }
        )

    def restarted(self) -> "Journal":
        """An empty journal that still counts the requests in flight."""
        return Journal(running=self.running, max_running=self.running)

    def describe(self) -> Mapping[str, object]:
        return {
            "requests_total": self.requests_total,
            "requests_by_path": self.by_path,
            "inference_requests_total": self.inference_total,
            "requests_running": self.running,
            "max_concurrent": self.max_running,
            "aborted_total": self.aborted_total,
            "disconnects_total": self.disconnects_total,
            "disconnects": list(self.disconnects),
            "faults_total": self.faults_total,
            "connections_total": self.connections_total,
            "requests": [record.describe() for record in self.records],
        }
