"""The scraper with real questions over loopback; the test is its clock and runs what it spawns."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest
from aiohttp import web

from pointsman.config.load import DeclaredWorker
from pointsman.config.tls_contexts import WorkerTrust
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.layout import STATUS_DOWN, STATUS_PENDING, STATUS_UP
from pointsman.daemon.shm.segment import EngineSignals, Segment
from pointsman.daemon.workers.address import parse as parse_url
from pointsman.daemon.workers.engine_metrics import EngineReport
from pointsman.daemon.workers.incarnation import ANOTHER_PROCESS, REFUSED_THEN_UP, TOTALS_WENT_BACK
from pointsman.daemon.workers.probe import MAX_PAGE_BYTES, ProbeClient
from pointsman.daemon.workers.registry import Worker
from pointsman.daemon.workers.scraper import (
    CAPACITY_INTERVAL_S,
    IDLE_INTERVAL_S,
    MAX_INTERVAL_S,
    SCRAPE_INTERVAL_S,
    Scraper,
)
from pointsman.scripts.simulated_engine import EngineLimits, EngineSettings, SimulatedEngine
from pointsman.scripts.simulated_engine.settings import FLAVORS, Flavor

LLAMACPP = "llamacpp:requests_processing 1\nllamacpp:prompt_tokens_total 8\nllamacpp:prompt_tokens_cached_total 2\n"


class Engine:
    """Answers what the test lays ready; None closes without an answer."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, str] | None] = {}
        self.headers: dict[str, str] = {}
        self.asked: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.port = 0

    async def answer(self, request: web.BaseRequest) -> web.Response:
        self.asked.append(request.path)
        await self.gate.wait()
        planned = self.answers.get(request.path, (404, ""))
        if planned is None:
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        status, text = planned
        return web.Response(status=status, text=text, headers=self.headers)

    def tell(self, text: str) -> None:
        self.answers["/metrics"] = (200, text)


def vllm(running: float = 1, started_at: float = 5) -> str:
    return (
        f"vllm:num_requests_running {running}\nprocess_start_time_seconds {started_at}\n"
        'vllm:cache_config_info{num_gpu_blocks="10",block_size="16"} 1\n'
    )


class Bench:
    """A scraper, its segment, its clock, and the coroutines that it wants to be run."""

    def __init__(self, client: ProbeClient) -> None:
        self.segment = Segment.create(1, 8)
        self.now = 100.0
        self.wanted: list[Coroutine[Any, Any, None]] = []
        self.restarts: list[tuple[int, str]] = []
        self.scraper = Scraper(
            self.segment,
            client,
            lambda _name, work: self.wanted.append(work),
            lambda worker, reason: self.restarts.append((worker.slot, reason)),
        )
        self.scraper._now = lambda: self.now

    def worker(self, port: int, slot: int = 0) -> Worker:
        declared = DeclaredWorker(url=f"http://127.0.0.1:{port}")
        self.segment.set_status(slot, STATUS_UP)
        worker = Worker(f"id{slot}", parse_url(declared.url), slot, "api", declared, address="127.0.0.1")
        self.scraper.track([worker])
        return worker

    async def turn(self) -> int:
        """Runs what is due; says how many questions that were."""
        self.scraper.turn()
        wanted, self.wanted = self.wanted, []
        await asyncio.gather(*wanted)
        return len(wanted)

    async def turn_after(self, seconds: float) -> int:
        self.now += seconds
        return await self.turn()

    def is_due_after(self, seconds: float) -> bool:
        self.scraper.turn()
        assert not self.wanted
        self.now += seconds
        self.scraper.turn()
        wanted, self.wanted = self.wanted, []
        for work in wanted:
            work.close()
        return bool(wanted)

    def load(self, inflight: int, slot: int = 0) -> None:
        self.segment.cells[self.segment.layout.load(0, slot, at.L_INFLIGHT)] = inflight


@pytest.fixture
async def client() -> AsyncIterator[ProbeClient]:
    client = ProbeClient.open(5, WorkerTrust(str))
    yield client
    await client.close()


@pytest.fixture
def bench(client: ProbeClient) -> Bench:
    return Bench(client)


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    engine = Engine()
    runner = web.ServerRunner(web.Server(engine.answer), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    engine.port = runner.addresses[0][1]
    yield engine
    await runner.cleanup()


async def test_a_report_reaches_shared_memory(bench: Bench, engine: Engine) -> None:
    engine.tell(vllm(running=3))
    worker = bench.worker(engine.port)
    assert bench.scraper.report(worker) is None
    assert await bench.turn() == 1
    assert bench.segment.signals(0) == EngineSignals(at_s=100.0, running=3, kv_tokens=160)
    assert bench.scraper.report(worker) == EngineReport("vllm", running=3, kv_tokens=160, started_at=5)
    assert bench.restarts == []


@pytest.mark.parametrize(("inflight", "interval_s"), [(0, IDLE_INTERVAL_S), (1, SCRAPE_INTERVAL_S)])
async def test_a_busy_worker_is_asked_more_often(
    bench: Bench, engine: Engine, inflight: int, interval_s: float
) -> None:
    engine.tell(vllm())
    bench.worker(engine.port)
    bench.load(inflight)
    await bench.turn()
    assert await bench.turn_after(interval_s * 0.89) == 0
    assert await bench.turn_after(interval_s * 0.11) == 1


async def test_a_worker_that_gets_busy_is_asked_soon(bench: Bench, engine: Engine) -> None:
    engine.tell(vllm())
    bench.worker(engine.port)
    await bench.turn()
    assert await bench.turn_after(SCRAPE_INTERVAL_S) == 0
    bench.load(1)
    assert await bench.turn() == 1


@pytest.mark.parametrize("status", [STATUS_PENDING, STATUS_DOWN])
async def test_only_workers_that_are_up_are_asked(bench: Bench, engine: Engine, status: int) -> None:
    bench.worker(engine.port)
    bench.segment.set_status(0, status)
    assert await bench.turn_after(MAX_INTERVAL_S) == 0
    bench.segment.set_status(0, STATUS_UP)
    assert await bench.turn() == 1


async def test_there_is_one_question_at_a_time(bench: Bench, engine: Engine) -> None:
    engine.tell(vllm())
    engine.gate.clear()
    bench.worker(engine.port)
    bench.scraper.turn()
    question = asyncio.ensure_future(bench.wanted.pop())
    assert await bench.turn_after(MAX_INTERVAL_S) == 0
    engine.gate.set()
    await question
    assert await bench.turn() == 1


async def test_many_workers_are_spread(bench: Bench, engine: Engine) -> None:
    workers = [bench.worker(engine.port, slot) for slot in range(8)]
    bench.scraper.track(workers)
    asked = [await bench.turn_after(0.05) for _ in range(10)]
    assert sum(asked) == 8
    assert max(asked) <= 2


@pytest.mark.parametrize("status", [404, 501])
async def test_a_worker_without_metrics_is_asked_seldom_until_it_comes_back(
    bench: Bench, engine: Engine, status: int
) -> None:
    engine.answers["/metrics"] = (status, "")
    worker = bench.worker(engine.port)
    bench.load(1)
    await bench.turn()
    assert await bench.turn_after(MAX_INTERVAL_S * 0.89) == 0
    assert await bench.turn_after(MAX_INTERVAL_S * 0.11) == 1
    bench.scraper.worker_came_up(worker)
    assert await bench.turn() == 1
    engine.tell(vllm())
    assert await bench.turn_after(MAX_INTERVAL_S) == 1
    assert await bench.turn_after(SCRAPE_INTERVAL_S) == 1


@pytest.mark.parametrize("answer", [(500, ""), (200, "vllm:num_requests_running many"), None])
async def test_failures_back_off(bench: Bench, engine: Engine, answer: tuple[int, str] | None) -> None:
    engine.answers["/metrics"] = answer
    bench.worker(engine.port)
    bench.load(1)
    await bench.turn()
    for interval_s in (2, 4, 8, MAX_INTERVAL_S, MAX_INTERVAL_S):
        assert await bench.turn_after(interval_s * 0.89) == 0
        assert await bench.turn_after(interval_s * 0.11) == 1
    assert bench.segment.signals(0) is None
    engine.tell(vllm())
    await bench.turn_after(MAX_INTERVAL_S)
    assert bench.is_due_after(SCRAPE_INTERVAL_S)


async def test_a_page_without_engine_is_no_report(bench: Bench, engine: Engine) -> None:
    engine.tell("process_start_time_seconds 5\n")
    worker = bench.worker(engine.port)
    await bench.turn()
    assert bench.segment.signals(0) is None
    assert bench.scraper.report(worker) == EngineReport(started_at=5)


async def test_an_endless_page_is_refused(bench: Bench, engine: Engine) -> None:
    engine.tell(vllm() + "#" * MAX_PAGE_BYTES)
    worker = bench.worker(engine.port)
    await bench.turn()
    assert bench.scraper.report(worker) is None


@pytest.mark.parametrize("is_replaced", [False, True])
async def test_the_answer_to_a_forgotten_worker_is_not_written(
    bench: Bench, engine: Engine, *, is_replaced: bool
) -> None:
    engine.tell(vllm())
    worker = bench.worker(engine.port)
    bench.scraper.turn()
    bench.scraper.forget(worker)
    if is_replaced:
        bench.scraper.track([worker])
    await bench.wanted.pop()
    assert bench.segment.signals(0) is None
    assert bench.scraper.report(worker) is None
    bench.scraper.worker_went_down(bench.worker(engine.port, 3), is_refused=True)
    bench.scraper.worker_came_up(worker)


async def test_another_start_time_is_reported_once(bench: Bench, engine: Engine) -> None:
    bench.worker(engine.port)
    for started_at in (5, 5, 6, 6):
        engine.tell(vllm(started_at=started_at))
        assert await bench.turn_after(IDLE_INTERVAL_S) == 1
    assert bench.restarts == [(0, ANOTHER_PROCESS)]


async def test_an_engine_without_start_time_is_found_by_its_totals(bench: Bench, engine: Engine) -> None:
    bench.worker(engine.port)
    for page in ("sglang:prompt_tokens_total 9", "sglang:prompt_tokens_total 9", "sglang:num_running_reqs 0"):
        engine.tell(page)
        await bench.turn_after(IDLE_INTERVAL_S)
    assert bench.restarts == [(0, TOTALS_WENT_BACK)]


async def test_an_engine_that_was_refused_and_came_back(bench: Bench, engine: Engine) -> None:
    engine.tell("sglang:prompt_tokens_total 9")
    worker = bench.worker(engine.port)
    await bench.turn()
    bench.scraper.worker_went_down(worker, is_refused=True)
    bench.scraper.worker_came_up(worker)
    assert bench.restarts == [(0, REFUSED_THEN_UP)]
    engine.tell("sglang:prompt_tokens_total 1")
    await bench.turn()
    assert bench.restarts == [(0, REFUSED_THEN_UP)]


@pytest.mark.parametrize(("started_at", "expected"), [(5, []), (6, [(0, ANOTHER_PROCESS)])])
async def test_a_start_time_decides_what_a_refused_connection_meant(
    bench: Bench, engine: Engine, started_at: float, expected: list[tuple[int, str]]
) -> None:
    engine.tell(vllm(started_at=5))
    worker = bench.worker(engine.port)
    await bench.turn()
    bench.scraper.worker_went_down(worker, is_refused=True)
    bench.scraper.worker_came_up(worker)
    assert bench.restarts == []
    engine.tell(vllm(started_at=started_at))
    assert await bench.turn() == 1
    assert bench.restarts == expected


async def test_an_engine_that_gives_no_page_any_more_counts_as_restarted(bench: Bench, engine: Engine) -> None:
    engine.tell(vllm())
    worker = bench.worker(engine.port)
    await bench.turn()
    bench.scraper.worker_went_down(worker, is_refused=True)
    bench.scraper.worker_came_up(worker)
    engine.answers.clear()
    await bench.turn()
    await bench.turn_after(MAX_INTERVAL_S)
    assert bench.restarts == [(0, REFUSED_THEN_UP)]


async def test_a_restart_between_two_probes_is_seen_by_the_scraper(bench: Bench, engine: Engine) -> None:
    engine.tell("sglang:prompt_tokens_total 9")
    worker = bench.worker(engine.port)
    await bench.turn()
    bench.scraper._client = _Refused(bench.scraper._client)  # type: ignore[assignment]
    await bench.turn_after(IDLE_INTERVAL_S)
    assert bench.restarts == []
    await bench.turn_after(MAX_INTERVAL_S)
    assert bench.restarts == [(0, REFUSED_THEN_UP)]
    assert bench.scraper.report(worker) is not None


class _Refused:
    """Asks a port where nobody listens, the first time."""

    def __init__(self, client: ProbeClient) -> None:
        self.client = client
        self.is_done = False

    async def page(self, worker: Worker, path: str) -> object:
        if self.is_done:
            return await self.client.page(worker, path)
        self.is_done = True
        declared = DeclaredWorker(url="http://127.0.0.1:1")
        elsewhere = Worker("x", parse_url(declared.url), 0, "api", declared, address="127.0.0.1")
        return await self.client.page(elsewhere, path)


async def test_an_answer_from_before_the_restart_does_not_count(bench: Bench, engine: Engine) -> None:
    engine.tell(vllm(started_at=5))
    worker = bench.worker(engine.port)
    await bench.turn()
    bench.now += IDLE_INTERVAL_S
    bench.scraper.turn()
    bench.now += 1
    bench.scraper.worker_went_down(worker, is_refused=True)
    bench.scraper.worker_came_up(worker)
    await bench.wanted.pop()
    assert bench.segment.signals(0) == EngineSignals(at_s=100.0, running=1, kv_tokens=160)
    engine.tell(vllm(started_at=6))
    await bench.turn()
    assert bench.restarts == [(0, ANOTHER_PROCESS)]


async def test_llamacpp_is_asked_for_its_capacity_once_per_process(bench: Bench, engine: Engine) -> None:
    engine.tell(LLAMACPP)
    engine.headers["Process-Start-Time-Unix"] = "1"
    engine.answers["/props"] = (200, '{"default_generation_settings":{"n_ctx":512},"total_slots":4}')
    worker = bench.worker(engine.port)
    for _ in range(3):
        await bench.turn_after(IDLE_INTERVAL_S)
    report = bench.scraper.report(worker)
    assert report == EngineReport(
        "llamacpp", running=1, prompt_tokens=10, cached_tokens=2, kv_tokens=2048, instance="1"
    )
    assert bench.segment.kv_tokens(0) == 2048
    assert engine.asked.count("/props") == 1
    engine.headers["Process-Start-Time-Unix"] = "2"
    await bench.turn_after(IDLE_INTERVAL_S)
    assert engine.asked.count("/props") == 2
    assert bench.restarts == [(0, ANOTHER_PROCESS)]


async def test_a_capacity_that_is_not_told_is_asked_for_seldom(bench: Bench, engine: Engine) -> None:
    engine.tell(LLAMACPP)
    worker = bench.worker(engine.port)
    await bench.turn()
    await bench.turn_after(CAPACITY_INTERVAL_S * 0.9)
    assert engine.asked.count("/props") == 1
    await bench.turn_after(CAPACITY_INTERVAL_S)
    assert engine.asked.count("/props") == 2
    assert bench.scraper.report(worker) == EngineReport("llamacpp", running=1, prompt_tokens=10, cached_tokens=2)


@pytest.mark.parametrize("flavor", FLAVORS)
async def test_simulated_engines_tell_all_of_it(bench: Bench, flavor: Flavor) -> None:
    limits = EngineLimits(kv_tokens=16_384, max_sequences=8)
    async with SimulatedEngine(EngineSettings(flavor=flavor, limits=limits)) as engine:
        worker = bench.worker(engine.port)
        async with bench.scraper._client.session.post(
            f"{engine.url}/v1/completions", json={"prompt": "x" * 400, "max_tokens": 1}
        ) as answer:
            assert answer.status == 200
        await bench.turn()
        report = bench.scraper.report(worker)
        assert report is not None
        assert (report.engine, report.running, report.waiting, report.kv_tokens) == (flavor, 0, 0, 16_384)
        assert (report.prompt_tokens, report.cached_tokens) == (100, 0)
        assert report.started_at == engine.context.metrics.started_unix_s
        async with bench.scraper._client.session.post(f"{engine.url}/_sim/restart", json={}):
            pass
        await bench.turn_after(IDLE_INTERVAL_S)
    assert bench.restarts == [(0, ANOTHER_PROCESS)]
