"""One question to a worker, against real servers that answer well, badly or not at all."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from pointsman.config.load import DeclaredWorker
from pointsman.config.tls_contexts import WorkerTrust
from pointsman.daemon.workers.address import parse
from pointsman.daemon.workers.probe import MAX_BODY_BYTES, ProbeClient, ProbeFailed
from pointsman.daemon.workers.registry import Worker

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


def worker_at(port: int, host: str = "127.0.0.1", **fields: object) -> Worker:
    declared = DeclaredWorker(url=f"http://{host}:{port}/base", **fields)  # type: ignore[arg-type]
    return Worker("id", parse(declared.url), 0, "api", declared, address="127.0.0.1")


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[int]:
    runner = web.ServerRunner(web.Server(handler), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        port: int = runner.addresses[0][1]
        yield port
    finally:
        await runner.cleanup()


@pytest.fixture
async def client() -> AsyncIterator[ProbeClient]:
    client = ProbeClient.open(5, WorkerTrust(str))
    yield client
    await client.close()


async def failure(client: ProbeClient, worker: Worker) -> ProbeFailed:
    with pytest.raises(ProbeFailed) as error:
        await client.get(worker, "/health")
    return error.value


async def test_it_asks_the_pinned_address_in_the_name_of_the_host(client: ProbeClient) -> None:
    seen: list[web.BaseRequest] = []

    async def handler(request: web.BaseRequest) -> web.Response:
        seen.append(request)
        return web.Response(text="ok")

    async with serving(handler) as port:
        worker = worker_at(port, "no-such-name.invalid", api_key="sk-1")
        assert await client.get(worker, "/health") == b"ok"
    (request,) = seen
    assert request.path == "/base/health"
    assert request.headers["Host"] == f"no-such-name.invalid:{port}"
    assert request.headers["Authorization"] == "Bearer sk-1"


async def test_proxies_of_the_environment_are_not_used(client: ProbeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")

    async def handler(_request: web.BaseRequest) -> web.Response:
        return web.Response()

    async with serving(handler) as port:
        assert await client.get(worker_at(port), "/health") == b""


async def test_a_redirect_is_a_failure_and_not_followed(client: ProbeClient) -> None:
    paths: list[str] = []

    async def handler(request: web.BaseRequest) -> web.Response:
        paths.append(request.path)
        return web.Response(status=302, headers={"Location": "http://169.254.169.254/latest"})

    async with serving(handler) as port:
        assert str(await failure(client, worker_at(port))) == "HTTP 302 (redirects are not followed)"
    assert paths == ["/base/health"]


async def test_a_long_body_is_cut_off(client: ProbeClient) -> None:
    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"x" * 65536)
        except ConnectionError:
            return response

    async with serving(handler) as port:
        body = await client.get(worker_at(port), "/health")
        assert MAX_BODY_BYTES < len(body) < 10 * MAX_BODY_BYTES
        with pytest.raises(ProbeFailed, match="64 KiB"):
            await client.models(worker_at(port))


async def test_a_refused_connection_is_told_apart(client: ProbeClient, dead_port: int) -> None:
    error = await failure(client, worker_at(dead_port))
    assert (str(error), error.is_refused) == ("connection refused", True)


async def test_a_reset_connection_is_told_apart(client: ProbeClient) -> None:
    async def reset(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _reader.readuntil(b"\r\n\r\n")
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort()

    async with await asyncio.start_server(reset, "127.0.0.1", 0) as server:
        error = await failure(client, worker_at(server.sockets[0].getsockname()[1]))
    assert (str(error), error.is_refused) == ("connection reset", True)


async def test_other_failures_prove_nothing_by_themselves(client: ProbeClient) -> None:
    async def unhealthy(_request: web.BaseRequest) -> web.Response:
        return web.Response(status=503, text="secret of the worker")

    async with serving(unhealthy) as port:
        error = await failure(client, worker_at(port))
    assert (str(error), error.is_refused) == ("HTTP 503", False)


@pytest.mark.parametrize(
    "answer", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"]
)
async def test_what_is_no_answer_is_a_failure_that_quotes_nothing(client: ProbeClient, answer: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        error = await failure(client, worker_at(server.sockets[0].getsockname()[1]))
    assert not error.is_refused
    assert "SSH" not in str(error)


async def test_silence_has_a_deadline() -> None:
    client = ProbeClient.open(0.05, WorkerTrust(str))
    with socket.create_server(("127.0.0.1", 0)) as server:
        error = await failure(client, worker_at(server.getsockname()[1]))
    await client.close()
    assert str(error) == "no answer within 0.05 s"
    assert not error.is_refused


async def models(client: ProbeClient, body: bytes) -> tuple[str, ...]:
    async def handler(request: web.BaseRequest) -> web.Response:
        assert request.path == "/base/v1/models"
        return web.Response(body=body, content_type="application/json")

    async with serving(handler) as port:
        return await client.models(worker_at(port))


async def test_models_are_read_in_order_once_each_and_bounded(client: ProbeClient) -> None:
    body = b'{"object":"list","data":[{"id":"b","owned_by":"vllm"},{"id":"a"},{"id":"b"},{"id":""},{"id":"x\\n"}]}'
    assert await models(client, body) == ("b", "a")
    many = b",".join(b'{"id":"m%d"}' % number for number in range(1000))
    assert len(await models(client, b'{"data":[' + many + b"]}")) == 64


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"data":{}}', b'{"data":[{"id":1}]}', b"\xff"])
async def test_other_models_answers_are_failures(client: ProbeClient, body: bytes) -> None:
    with pytest.raises(ProbeFailed):
        await models(client, body)
