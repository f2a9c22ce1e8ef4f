"""Each fault, seen from a client's socket."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Self

import aiohttp
import pytest

from pointsman.scripts.simulated_engine import EngineSettings, Fault, SimulatedEngine
from pointsman.scripts.simulated_engine.faults import FaultBook, decode_faults
from pointsman.scripts.simulated_engine.text import generate_output

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
STREAM = {"prompt": "x", "stream": True, "max_tokens": 8}


@pytest.fixture
async def engine() -> AsyncIterator[SimulatedEngine]:
    async with SimulatedEngine() as running:
        yield running


@pytest.fixture
async def session(engine: SimulatedEngine) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(engine.url) as client:
        yield client


async def arm(session: aiohttp.ClientSession, *faults: dict[str, object]) -> None:
    async with session.post("/_sim/faults", json=list(faults)) as response:
        assert response.status == 200, await response.text()


async def status_of(session: aiohttp.ClientSession, path: str = COMPLETIONS) -> int:
    """The status of a small request, or of a probe."""
    method = "POST" if path in (COMPLETIONS, CHAT) else "GET"
    document = {"prompt": "x", "messages": [{"content": "x"}]} if method == "POST" else None
    async with session.request(method, path, json=document) as response:
        await response.read()
        return response.status


async def state_of(session: aiohttp.ClientSession) -> Any:
    async with session.get("/_sim/state") as response:
        return await response.json()


class RawClient:
    """One connection that keeps whatever comes, and how it ended."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self._port = engine.port
        self.received = b""

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            return

    async def send(self, document: object, path: str = COMPLETIONS) -> None:
        body = json.dumps(document).encode()
        self._writer.write(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(body)))
        self._writer.write(body)
        await self._writer.drain()

    async def read_until(self, mark: bytes) -> bytes:
        while mark not in self.received:
            data = await self._reader.read(65_536)
            assert data, "the connection ended early"
            self.received += data
        return self.received

    async def read_to_end(self) -> str:
        """How the connection ended: `fin` or `reset`."""
        try:
            while data := await self._reader.read(65_536):
                self.received += data
        except ConnectionResetError:
            return "reset"
        return "fin"

    @property
    def body(self) -> bytes:
        return self.received.partition(b"\r\n\r\n")[2]

    @property
    def tokens(self) -> int:
        return self.received.count(b'"text":"') - self.received.count(b'"text":""')


async def test_the_first_n_requests_fail(session: aiohttp.ClientSession) -> None:
    await arm(session, {"kind": "status", "status": 500, "times": 2})
    assert [await status_of(session) for _ in range(4)] == [500, 500, 200, 200]


async def test_a_burst_in_the_middle(session: aiohttp.ClientSession) -> None:
    await arm(session, {"kind": "status", "status": 502, "skip": 1, "times": 2})
    assert [await status_of(session) for _ in range(4)] == [200, 502, 502, 200]


async def test_a_random_share_fails_and_the_seed_repeats_it(session: aiohttp.ClientSession) -> None:
    fault: dict[str, object] = {"kind": "status", "rate": 0.3, "seed": 5}
    rounds = []
    for _ in range(2):
        await arm(session, fault)
        rounds.append([await status_of(session) for _ in range(60)])
    assert rounds[0] == rounds[1]
    assert 8 <= rounds[0].count(503) <= 28


async def test_retry_after(session: aiohttp.ClientSession) -> None:
    await arm(session, {"kind": "status", "status": 429, "retry_after": 2})
    async with session.post(COMPLETIONS, json={"prompt": "x"}) as response:
        assert response.status == 429
        assert response.headers["Retry-After"] == "2"
        assert (await response.json())["error"]["code"] == 429


async def test_a_fault_of_one_path_leaves_the_others_alone(session: aiohttp.ClientSession) -> None:
    await arm(session, {"kind": "status", "status": 500, "path": CHAT})
    assert [await status_of(session, path) for path in (COMPLETIONS, CHAT)] == [200, 500]


async def test_lying_health_says_200_while_requests_fail(session: aiohttp.ClientSession) -> None:
    await arm(session, {"kind": "status", "status": 500})
    assert [await status_of(session, path) for path in ("/health", "/ping", COMPLETIONS)] == [200, 200, 500]


async def test_health_fails_while_requests_work(session: aiohttp.ClientSession) -> None:
    await arm(session, {"kind": "unhealthy", "status": 503})
    assert [await status_of(session, path) for path in ("/health", "/ping", COMPLETIONS)] == [503, 503, 200]


async def test_slow_start_ends(session: aiohttp.ClientSession) -> None:
    await arm(session, {"kind": "slow_start", "seconds": 60})
    assert [await status_of(session, path) for path in ("/health", COMPLETIONS)] == [503, 503]
    await arm(session, {"kind": "slow_start", "seconds": 0})
    assert [await status_of(session, path) for path in ("/health", COMPLETIONS)] == [200, 200]


async def test_latency_is_added(session: aiohttp.ClientSession) -> None:
    await arm(session, {"kind": "latency", "ms": 50})
    loop = asyncio.get_running_loop()
    before = loop.time()
    assert await status_of(session) == 200
    assert loop.time() - before >= 0.05


async def test_hang_before_the_head_until_the_client_leaves(
    engine: SimulatedEngine, session: aiohttp.ClientSession
) -> None:
    await arm(session, {"kind": "hang"})
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await status_of(session)
    assert await status_of(session, "/health") == 200
    async with asyncio.timeout(30):
        while not (await state_of(session))["disconnects"]:
            pass
    assert engine.context.journal.running == 0


async def test_hang_that_ends(session: aiohttp.ClientSession) -> None:
    await arm(session, {"kind": "hang", "seconds": 0.02})
    assert await status_of(session) == 200


async def test_hang_in_the_middle_of_a_stream(engine: SimulatedEngine, session: aiohttp.ClientSession) -> None:
    await arm(session, {"kind": "hang", "after_tokens": 3})
    async with RawClient(engine) as client:
        await client.send(STREAM)
        await client.read_until(generate_output(b"x", 3)[2].encode())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await client.read_to_end()
        assert client.tokens == 3


async def test_reset_before_the_head(engine: SimulatedEngine, session: aiohttp.ClientSession) -> None:
    await arm(session, {"kind": "reset"})
    async with RawClient(engine) as client:
        await client.send({"prompt": "x"})
        assert await client.read_to_end() == "reset"
        assert client.received == b""
    assert (await state_of(session))["requests"][-1]["outcome"] == "fault"


async def test_close_before_the_head(engine: SimulatedEngine, session: aiohttp.ClientSession) -> None:
    await arm(session, {"kind": "close"})
    async with RawClient(engine) as client:
        await client.send({"prompt": "x"})
        assert await client.read_to_end() == "fin"
        assert client.received == b""


@pytest.mark.parametrize("size", [0, 1, 57])
@pytest.mark.parametrize(("kind", "end"), [("reset", "reset"), ("close", "fin")])
async def test_cut_after_n_body_bytes(
    engine: SimulatedEngine, session: aiohttp.ClientSession, kind: str, end: str, size: int
) -> None:
    await arm(session, {"kind": kind, "after_bytes": size})
    async with RawClient(engine) as client:
        await client.send({"prompt": "x"})
        assert await client.read_to_end() == end
        assert client.received.startswith(b"HTTP/1.1 200 OK\r\n")
        assert len(client.body) == size


@pytest.mark.parametrize(("kind", "end"), [("reset", "reset"), ("close", "fin")])
async def test_cut_in_the_middle_of_a_stream(
    engine: SimulatedEngine, session: aiohttp.ClientSession, kind: str, end: str
) -> None:
    await arm(session, {"kind": kind, "after_tokens": 3})
    async with RawClient(engine) as client:
        await client.send(STREAM)
        assert await client.read_to_end() == end
        assert client.tokens == 3
        assert not client.received.endswith(b"0\r\n\r\n")
    state = await state_of(session)
    assert state["requests_running"] == state["engine"]["running"] == 0


async def test_truncated_stream_ends_with_correct_framing(
    engine: SimulatedEngine, session: aiohttp.ClientSession
) -> None:
    await arm(session, {"kind": "truncate", "after_tokens": 2})
    async with session.post(COMPLETIONS, json=STREAM) as response:
        text = await response.text()
    assert text.count("data: ") == 2
    assert "[DONE]" not in text


async def test_truncated_answer_with_a_length_is_closed(
    engine: SimulatedEngine, session: aiohttp.ClientSession
) -> None:
    await arm(session, {"kind": "truncate", "after_tokens": 2})
    async with RawClient(engine) as client:
        await client.send({"prompt": "x"})
        assert await client.read_to_end() == "fin"
        assert 0 < len(client.body) < int(client.received.lower().partition(b"content-length: ")[2].split()[0])


async def test_drip_sends_byte_by_byte(engine: SimulatedEngine, session: aiohttp.ClientSession) -> None:
    await arm(session, {"kind": "drip", "ms": 0})
    async with RawClient(engine) as client:
        await client.send({**STREAM, "max_tokens": 1})
        await client.read_until(b"\r\n0\r\n\r\n")
        chunks = client.body.split(b"\r\n")
        assert set(chunks[:-3:2]) == {b"1"}


async def test_error_as_the_first_event(session: aiohttp.ClientSession) -> None:
    await arm(session, {"kind": "error_event"})
    for path in (COMPLETIONS, CHAT, "/generate"):
        document = {**STREAM, "messages": [{"content": "x"}], "text": "x"}
        async with session.post(path, json=document) as response:
            assert response.status == 200
            first = (await response.text()).splitlines()[0]
        assert json.loads(first.removeprefix("data: "))["error"]["code"] == 500
    assert await status_of(session) == 200


async def test_refused_connections_until_the_fault_ends(engine: SimulatedEngine) -> None:
    async with aiohttp.ClientSession(engine.url) as kept:
        await arm(kept, {"kind": "refuse"})
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", engine.port)
        # The open connection still works.
        assert await status_of(kept) == 200
        await arm(kept)
        async with RawClient(engine):
            pass


async def test_refused_connections_for_some_seconds() -> None:
    settings = EngineSettings(faults=(Fault(kind="refuse", seconds=0.05),))
    async with SimulatedEngine(settings) as engine:
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", engine.port)
        async with asyncio.timeout(30):
            while True:
                try:
                    async with aiohttp.ClientSession(engine.url) as session:
                        assert await status_of(session) == 200
                    break
                except aiohttp.ClientConnectorError:
                    continue


async def test_faults_combine(session: aiohttp.ClientSession) -> None:
    await arm(session, {"kind": "latency", "ms": 1}, {"kind": "status", "status": 500, "times": 1})
    assert [await status_of(session) for _ in range(2)] == [500, 200]
    counts = [(fault["seen"], fault["struck"]) for fault in (await state_of(session))["faults"]]
    assert counts == [(2, 2), (2, 1)]


@pytest.mark.parametrize("body", [b"nonsense", b'[{"kind":"earthquake"}]', b'{"kind":"status","statsu":500}', b"[1]"])
async def test_an_unknown_fault_is_400_and_changes_nothing(session: aiohttp.ClientSession, body: bytes) -> None:
    await arm(session, {"kind": "status", "status": 500})
    async with session.post("/_sim/faults", data=body) as response:
        assert response.status == 400
    assert await status_of(session) == 500


def test_one_fault_a_list_and_an_object_are_all_understood() -> None:
    one = Fault(kind="status", status=500)
    for body in (b'{"kind":"status","status":500}', b'[{"kind":"status","status":500}]'):
        assert decode_faults(body) == [one]
    assert decode_faults(b'{"faults":[{"kind":"status","status":500}]}') == [one]
    assert decode_faults(b"[]") == decode_faults(b"{}") == []


def test_slow_start_counts_from_when_it_was_armed() -> None:
    book = FaultBook()
    book.arm([Fault(kind="slow_start", seconds=5)], now=100.0)
    assert book.plan("/health", False, now=104.9).before
    assert not book.plan("/health", False, now=105.0).before
