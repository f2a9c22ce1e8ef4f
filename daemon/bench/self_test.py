"""Whether the generator is good enough for what it measures: what it costs, and whether its figures are true.

Cost is CPU time of this process alone, against a server in another one. Others on the machine can make it more (their
data is in the caches then), never less: a round that is above its bound is tried again, MOST_ROUNDS in all.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

from pointsman.daemon.bench.dialects import Dialect
from pointsman.daemon.bench.loops import Extent
from pointsman.daemon.bench.model import Run
from pointsman.daemon.bench.scenarios import Bench, Load, open_endpoint
from pointsman.daemon.bench.target import read_target
from pointsman.daemon.bench.workloads import basic

MOST_ROUNDS = 3
MOST_US_PER_REQUEST = 50.0
MOST_US_PER_EVENT = 10.0
DELAY_MS = 20.0
TIMER_MS = 1.0
"""What the server's timers are coarse by."""
MOST_ERROR_MS = 5.0
"""Of the least latency against a server that answers DELAY_MS late. The least, because a busy machine makes others
late for real."""
STALL_MS = 500.0
LEAST_SEEN_MS = 200.0
"""Of the 99th percentile when a server stood still for STALL_MS: a quarter of a run of two seconds waited."""


@dataclass(slots=True, frozen=True)
class Check:
    name: str
    value: float
    bound: str
    unit: str
    is_passed: bool
    run: Run


async def self_test(show: Callable[[str], None]) -> list[Check]:
    """`show` is told what is tested next. Raises OSError when the server cannot be started."""
    show("CPU time per request")
    requests = await _tried(_cost_of_requests)
    show("CPU time per event of a stream")
    events = await _tried(_cost_of_events)
    show("a known latency")
    late = await _run(_open(200.0, 1.5), "--delay-ms", f"{DELAY_MS}")
    show("a server that stands still")
    stalled = await _run(_open(200.0, 2.0), "--stall-after", "150", "--stall-ms", f"{STALL_MS}")
    return [
        requests,
        events,
        _between(
            "least of a known latency", late.results.e2e_ms.min, DELAY_MS - TIMER_MS, DELAY_MS + MOST_ERROR_MS, late
        ),
        _at_least("p99 with a server that stood still", stalled.results.e2e_ms.p99, LEAST_SEEN_MS, stalled),
    ]


async def _tried(measure: Callable[[], Awaitable[Check]]) -> Check:
    """The first round below the bound, or the best."""
    rounds = [await measure()]
    while not rounds[-1].is_passed and len(rounds) < MOST_ROUNDS:
        rounds.append(await measure())
    return rounds[-1] if rounds[-1].is_passed else min(rounds, key=lambda check: check.value)


async def _cost_of_requests() -> Check:
    run = await _run(_requests(32, 2.0))
    return _at_most("CPU per request", run.generator.cpu_us_per_request, MOST_US_PER_REQUEST, "µs", run)


async def _cost_of_events() -> Check:
    run = await _run(_streams(200, 600), "--gap-ms", "5")
    return _at_most("CPU per streamed event", run.generator.cpu_us_per_event or 0.0, MOST_US_PER_EVENT, "µs", run)


def _at_most(name: str, value: float, most: float, unit: str, run: Run) -> Check:
    return Check(name, value, f"at most {most:g}", unit, _is_whole(run) and value <= most, run)


def _at_least(name: str, value: float, least: float, run: Run) -> Check:
    return Check(name, value, f"at least {least:g}", "ms", _is_whole(run) and value >= least, run)


def _between(name: str, value: float, least: float, most: float, run: Run) -> Check:
    return Check(name, value, f"{least:g} … {most:g}", "ms", _is_whole(run) and least <= value <= most, run)


def _is_whole(run: Run) -> bool:
    return run.results.requests > 0 and run.results.failed == 0


def _requests(clients: int, seconds: float) -> Load:
    return Load(Extent(warm_up_s=0.5, seconds=seconds), partial(basic, 1), clients=clients)


def _streams(clients: int, requests: int) -> Load:
    """Each event comes by itself, and as many that their cost shows, not that of waking an idle CPU for a few. No
    warm-up: events of one would be in the time of the other."""
    return Load(Extent(warm_up_s=0.0, requests=requests), partial(basic, 100, is_stream=True), clients=clients)


def _open(rate: float, seconds: float) -> Load:
    return Load(Extent(warm_up_s=0.3, seconds=seconds), partial(basic, 1), rate=rate, pattern="constant")


async def _run(load: Load, *arguments: str) -> Run:
    async with _sink(*arguments) as url:
        endpoint = await open_endpoint(
            read_target(url),
            timeout_s=30.0,
            pid=None,
            model="sink",
            dialect=lambda model: Dialect("chat", model),
        )
        try:
            return await Bench("self-test", {}, lambda _: None).once("self-test", endpoint, load)
        finally:
            await endpoint.driver.close()


@asynccontextmanager
async def _sink(*arguments: str) -> AsyncIterator[str]:
    command = [sys.executable, "-m", "pointsman.daemon.bench.sink", *arguments]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        port = (await process.stdout.readline()).decode().strip()
        if not port:
            raise OSError("the server of the self-test does not start")
        yield f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
