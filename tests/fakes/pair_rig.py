"""A shard's pairs under test: four workers that do exactly what a test says, behind two shards.

The first pair (slots 0 and 1) has all the weight, so it gets the first attempt; the second one (slots 2 and 3) is good.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pointsman.config.snapshot import WorkerSpec
from pointsman.daemon.resilience import breaker
from pointsman.daemon.shm import layout as at
from pointsman.daemon.telemetry import pair_counts
from tests.fakes.data_plane import DataPlane, worker_spec
from tests.fakes.scripted_worker import ScriptedWorker, Seen, Session

SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"
BODY = b' {"model": "m",  "prompt": "hell\\u00f6", "x": 1.50, "stream": true}\n'
PLAIN = b'{"model":"m","prompt":"hello"}'
PREFILL, DECODE, GOOD_PREFILL, GOOD_DECODE = range(4)
LEGS = [PREFILL, DECODE]
COMBINED = 4
"""a fifth worker, where there is one"""
WAIT_S = 10.0
PARAMS = b'{"do_remote_prefill": true, "remote_block_ids": [[5, 6]], "x": 1.50}'
"""what a prefill worker of vLLM tells for decode"""
Script = Callable[[Session], None]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(text: str) -> bytes:
    return chunk(b"data: " + json.dumps({"text": text}).encode() + b"\n\n")


def answer(status: int, body: bytes, *lines: bytes) -> bytes:
    head = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % (status, len(body))
    return head + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body


def streams(*texts: str) -> Script:
    def script(session: Session) -> None:
        while session.read() is not None:
            session.write(SSE + b"".join(map(event, texts)) + LAST)

    return script


def answers(status: int, body: bytes, *lines: bytes) -> Script:
    def script(session: Session) -> None:
        while session.read() is not None:
            session.write(answer(status, body, *lines))

    return script


@dataclass
class Rig:
    """Four workers behind two shards."""

    plane: DataPlane
    workers: list[ScriptedWorker]

    def publish(
        self, *, urls: dict[int, str] | None = None, connector: str = "sglang", weight: float = 1000.0, **fields: Any
    ) -> None:
        """`weight`: of the first pair."""
        specs = []
        for slot, worker in enumerate(self.workers):
            url = (urls or {}).get(slot, worker.url)
            specs.append(self._spec(slot, url, connector, weight if slot < 2 else 1.0))
        given: dict[str, Any] = {
            "default_pd": {"prefill_policy": "least_request", "decode_policy": "least_request"},
            "default_retry": {"initial_backoff_ms": 1.0, "budget_ratio": 5.0},
        }
        self.plane.publish(*specs, **(given | fields))

    def _spec(self, slot: int, url: str, connector: str, weight: float) -> WorkerSpec:
        role = "prefill" if slot % 2 == 0 else "decode"
        port = 9000 + slot if slot % 2 == 0 else None
        return worker_spec(slot, url, role=role, weight=weight, bootstrap_port=port, kv_connector=connector)

    def post(self, body: bytes = BODY, path: str = "/v1/completions") -> tuple[int, bytes, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection(*self.plane.address, timeout=WAIT_S)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            found = connection.getresponse()
            return found.status, found.read(), found.headers
        finally:
            connection.close()

    def prefills(self) -> int:
        """Requests that prefill workers have read."""
        return sum(self.workers[slot].requests.qsize() for slot in (PREFILL, GOOD_PREFILL))

    def failures(self, slot: int) -> int:
        """That the worker's breaker has counted in a row."""
        return self.plane.segment.cells[self.plane.segment.layout.breaker(slot) + breaker.B_FAILURES]

    def forgive(self) -> None:
        """Breakers as if nobody had failed."""
        segment = self.plane.segment
        for slot in range(4):
            segment.words.fill_zero(segment.layout.breaker(slot), at.BREAKER_WORDS)

    def errors(self) -> dict[tuple[str, str], int]:
        return {key: count for key, count in pair_counts.errors(self.plane.segment).items() if count}

    def is_idle(self) -> bool:
        segment = self.plane.segment
        return all(segment.is_empty(slot) for slot in range(4))


@dataclass
class Turn:
    """What two scripts do together, once or several times in a row."""

    waits: threading.Event = field(default_factory=threading.Event)
    """one has its request, and waits for what the gateway does"""
    has_closed: threading.Event = field(default_factory=threading.Event)
    """the gateway closed its connection"""
    closed: float = 0.0
    struck: float = 0.0
    """when the other one failed"""
    number: int = 0

    def begin(self) -> None:
        self.number += 1
        self.waits.clear()
        self.has_closed.clear()


def silent(session: Session) -> None:
    session.read()
    session.wait_closed()


def waiting(turn: Turn, *, is_headed: bool = False) -> Script:
    """The first request of a turn waits for what the gateway does; those that follow are answered well."""

    def script(session: Session) -> None:
        while session.read() is not None:
            if turn.waits.is_set():
                session.write(SSE + event("good") + LAST)
                continue
            if is_headed:
                session.write(SSE)
            turn.waits.set()
            session.wait_closed()
            turn.closed = time.monotonic()
            turn.has_closed.set()
            return

    return script


def told(seen: Seen) -> dict[str, Any]:
    return dict(json.loads(seen.body))


def publish_with_combined(rig: Rig, url: str, **more: Any) -> None:
    """The pairs take prompts up to 100 tokens."""
    specs = [
        worker_spec(
            slot,
            worker.url,
            role="prefill" if slot % 2 == 0 else "decode",
            bootstrap_port=9000 if slot % 2 == 0 else None,
            prompt_tokens_max=100,
            models=("m",),
        )
        for slot, worker in enumerate(rig.workers)
    ]
    rig.plane.publish(*specs, worker_spec(COMBINED, url, models=("m",), labels={"combined": "true"}), **more)
