"""What adding a worker can make a real daemon call: nothing that the table refuses, nothing that an answer names."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from urllib.parse import quote

import pytest

from pointsman.config.load import DeclaredWorker
from pointsman.daemon.workers.address import rules
from pointsman.daemon.workers.locate import Locator, Wanted
from pointsman.daemon.workers.registry import Registry
from tests.daemon.workers.test_address import NETWORKS, OWN_PORTS, REFUSED
from tests.fakes.gateway import Gateway, gateway
from tests.fakes.scripted_worker import OK, ScriptedWorker, Session
from tests.fakes.traffic import Client, completion

ELSEWHERE = [url for url in REFUSED if not any(url.endswith(f":{port}") for port in OWN_PORTS)]
MODELS = b'{"object":"list","data":[{"id":"sim-model"}]}'


@pytest.fixture(scope="module")
def gate() -> Iterator[Gateway]:
    with gateway("--metrics-listen", "127.0.0.1:0") as running:
        yield running


def test_the_table_is_long_enough() -> None:
    assert len(ELSEWHERE) >= 60


def test_the_admin_api_refuses_the_whole_table_and_adds_nobody(gate: Gateway) -> None:
    for url in ELSEWHERE:
        status, answer = gate.admin("POST", "/workers", {"url": url})
        assert status in (400, 422), (url, status, answer)
        assert answer["error"], url
    legacy = ("http://2130706433:8000", "http://169.254.169.254/", "http://[::ffff:127.0.0.1]:8000")
    for url in legacy:
        assert gate.admin("POST", f"/add_worker?url={quote(url, safe='')}")[0] in (400, 422), url
    assert gate.workers() == []


def test_none_of_our_own_ports_is_a_workers(gate: Gateway) -> None:
    (metrics,) = gate.wait_log("ready")["metrics"]
    for port in (gate.port, int(gate.admin_tcp.rpartition(":")[2]), int(metrics.rpartition(":")[2])):
        for host in ("127.0.0.1", "127.0.0.2", "localhost"):
            status, answer = gate.admin("POST", "/workers", {"url": f"http://{host}:{port}"})
            assert status in (400, 422), (host, port)
            assert "is a listener of this gateway" in answer["error"]
    assert gate.workers() == []


# --- redirects


def redirecting(target: str, *, is_healthy: bool) -> ScriptedWorker:
    """Healthy or not, whoever asks it for a completion is sent elsewhere."""
    away = f"HTTP/1.1 307 Temporary Redirect\r\nLocation: {target}/latest\r\nContent-Length: 0\r\n\r\n".encode()
    models = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(MODELS), MODELS)

    def script(session: Session) -> None:
        while (seen := session.read()) is not None:
            if not is_healthy or seen.line.startswith(b"POST"):
                session.write(away)
            else:
                session.write(models if b"/v1/models" in seen.line else OK)

    return ScriptedWorker(script)


def test_no_redirect_is_followed_by_anybody_of_ours() -> None:
    with ExitStack() as stack:
        target = stack.enter_context(ScriptedWorker())
        lying = stack.enter_context(redirecting(target.url, is_healthy=False))
        worker = stack.enter_context(redirecting(target.url, is_healthy=True))
        gate = stack.enter_context(gateway(workers=[worker.url]))

        def is_refused() -> bool:
            (found,) = [each for each in gate.workers() if each["url"] == lying.url]
            return "redirects are not followed" in str(found["last_error"])

        gate.add_worker(lying.url)
        gate.wait_until("the probe says why", is_refused)
        gate.wait_healthy(1)
        with Client((gate.host, gate.port)) as client:
            answer = client.ask(completion())
        assert (answer.status, answer.headers["location"]) == (307, f"{target.url}/latest"), (
            "it is the client's to judge"
        )
        status, told = gate.admin("POST", "/flush_cache")
        assert (status, told["succeeded"]) == (502, [])
        assert target.connections == 0


# --- rebinding


def test_a_name_that_changes_its_mind_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: the first answer is harmless, all later ones are the metadata service."""
    answers = iter(["10.0.0.7"])

    async def look_up(_loop: object, _host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        return [(2, 1, 6, "", (next(answers, "169.254.169.254"), port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", look_up)
    registry = Registry(8, iter("abc").__next__)
    locator = Locator(rules(NETWORKS, OWN_PORTS), registry.pinned)
    worker, stranger = (DeclaredWorker(url=f"http://{name}.example:8000") for name in ("rebinding", "second"))

    async def declare(*workers: DeclaredWorker) -> list[str]:
        located = await locator.locate([Wanted(each) for each in workers])
        registry.declare("file", located.candidates)
        return [reason for _, reason in located.refused]

    async def run() -> None:
        assert await declare(worker) == []
        refused = await declare(worker, stranger)  # as after every edit of the file
        assert [live.address for live in registry.live()] == ["10.0.0.7"]
        assert refused == [f"{stranger.url}: 169.254.169.254 is a link-local or cloud metadata address"]
        assert await declare() == []
        assert await declare(worker) == [f"{worker.url}: 169.254.169.254 is a link-local or cloud metadata address"]

    asyncio.run(run())
