"""A server that answers at once, or exactly as late as it is told: what the generator is tested against.

`python -m pointsman.daemon.bench.sink` prints its port and ends with its standard input. It knows no HTTP beyond what
our own generator writes.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import time
from contextlib import suppress
from typing import cast

import uvloop

_LENGTH = re.compile(rb"\r\nContent-Length: (\d+)\r\n")
_TOKENS = re.compile(rb'"max_tokens":(\d+)')
_DOCUMENT = (
    b'{"id":"sink","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"sink"},'
    b'"finish_reason":"length"}],"usage":{"prompt_tokens":8,"completion_tokens":1,"total_tokens":9}}'
)
_ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(_DOCUMENT) + _DOCUMENT
)
_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


_EVENT = _chunk(
    b'data: {"id":"sink","object":"chat.completion.chunk","created":1700000000,"model":"sink","choices":[{"index":0,'
    b'"delta":{"content":" sink"},"logprobs":null,"finish_reason":null}]}\n\n'
)


def _ending(tokens: int) -> bytes:
    return (
        _chunk(b'data: {"id":"sink","choices":[{"index":0,"delta":{},"finish_reason":"length"}]}\n\n')
        + _chunk(b'data: {"choices":[],"usage":{"prompt_tokens":8,"completion_tokens":%d}}\n\n' % tokens)
        + _chunk(b"data: [DONE]\n\n")
        + b"0\r\n\r\n"
    )


class Sink:
    """Counts requests over all connections; the one with number `stall_after` makes everybody wait."""

    def __init__(self, *, delay_s: float, gap_s: float, stall_after: int, stall_s: float) -> None:
        self.delay_s = delay_s
        self.gap_s = gap_s
        self._stall_after = stall_after
        self._stall_s = stall_s
        self._count = 0

    def note_request(self) -> None:
        self._count += 1
        if self._count == self._stall_after:
            time.sleep(self._stall_s)  # on the loop, on purpose: the whole server stands still


class _Session(asyncio.Protocol):
    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._loop = asyncio.get_running_loop()
        self._buffer = b""
        self._transport = cast(asyncio.Transport, None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head = self._buffer.find(b"\r\n\r\n")
        if head < 0:
            return
        length = _LENGTH.search(self._buffer, 0, head + 2)
        if len(self._buffer) < head + 4 + (int(length[1]) if length else 0):
            return
        body, self._buffer = self._buffer, b""
        self._sink.note_request()
        if self._sink.delay_s:
            self._loop.call_later(self._sink.delay_s, self._answer, body)
        else:
            self._answer(body)

    def _answer(self, body: bytes) -> None:
        if b'"stream":true' not in body:
            self._transport.write(_ANSWER)
            return
        tokens = _TOKENS.search(body)
        count = int(tokens[1]) if tokens else 1
        if self._sink.gap_s:
            self._transport.write(_STREAM)
            self._loop.call_later(self._sink.gap_s, self._next, count, count)
        else:
            self._transport.write(_STREAM + _EVENT * count + _ending(count))

    def _next(self, left: int, count: int) -> None:
        if left:
            self._transport.write(_EVENT)
            self._loop.call_later(self._sink.gap_s, self._next, left - 1, count)
        else:
            self._transport.write(_ending(count))


async def _serve(sink: Sink) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Session(sink), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    ended = loop.create_future()
    loop.add_reader(sys.stdin, ended.cancel)
    with suppress(asyncio.CancelledError):
        await ended


def main() -> None:
    parser = argparse.ArgumentParser(prog="sink", description=__doc__)
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--gap-ms", type=float, default=0.0)
    parser.add_argument("--stall-after", type=int, default=0)
    parser.add_argument("--stall-ms", type=float, default=0.0)
    given = parser.parse_args()
    sink = Sink(
        delay_s=given.delay_ms / 1e3,
        gap_s=given.gap_ms / 1e3,
        stall_after=given.stall_after,
        stall_s=given.stall_ms / 1e3,
    )
    asyncio.Runner(loop_factory=uvloop.new_event_loop).run(_serve(sink))


if __name__ == "__main__":
    main()
