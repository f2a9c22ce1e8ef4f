"""Runs loads against targets and makes a report of them, of as many as there were when somebody interrupts."""

from __future__ import annotations

import asyncio
import gc
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from time import monotonic_ns
from typing import Any

import msgspec

from pointsman.daemon.bench import summary
from pointsman.daemon.bench.answer import Answer
from pointsman.daemon.bench.arrivals import Pattern, Timed, arrivals
from pointsman.daemon.bench.connection import Job
from pointsman.daemon.bench.dialects import Dialect, Wire
from pointsman.daemon.bench.driver import Driver
from pointsman.daemon.bench.histogram import Histogram
from pointsman.daemon.bench.loops import ClosedLoop, Encode, Extent, Loop, OpenLoop
from pointsman.daemon.bench.meter import Meter
from pointsman.daemon.bench.model import FORMAT, Overhead, Report, Run, Steady, System, WarmUp
from pointsman.daemon.bench.outcome import CONNECT, GENERATOR, TIMEOUT, Verdict
from pointsman.daemon.bench.tally import Recorder, Tally
from pointsman.daemon.bench.target import Target
from pointsman.daemon.bench.trace_load import TraceLoad
from pointsman.daemon.bench.workloads import Workload
from pointsman.daemon.version import VERSION

SLICE_NS = 50_000_000
WATCH_EVERY_S = 0.25
PROGRESS_SUCCESS = 0.95
"""A level of `progressive` with a lower success rate is the last one."""
ROUND_WARM_UP = 0.15
"""Share of a slice of `compare` that is not measured."""
LEAST_TURNS = 2
"""Requests of each client of a level of `progressive`, at least: or the level would not be reached."""


class Unreachable(Exception):
    """Nobody answered; the message says what was tried."""


@dataclass(slots=True, frozen=True)
class Load:
    """One of `clients` (closed loop), `rate` (open loop, requests a second) and `trace` (open loop, its times)."""

    extent: Extent
    workload: Callable[[], Workload] | None = None
    clients: int | None = None
    rate: float | None = None
    pattern: Pattern = "poisson"
    seed: int = 0
    trace: TraceLoad | None = None


@dataclass(slots=True, frozen=True)
class Progress:
    """What is shown while a load runs."""

    name: str
    is_warm_up: bool
    share: float | None
    """of the load that is done; None: not known"""
    seconds: float
    tally: Tally
    in_flight: int


Watch = Callable[[Progress], None]


@dataclass(slots=True)
class Endpoint:
    """A target with its connections, and how requests are written for it."""

    target: Target
    driver: Driver
    encode: Encode
    pid: int | None
    model: str | None


@dataclass(slots=True)
class _Measured:
    """What came of one target so far: several recorders when there were several slices."""

    name: str
    endpoint: Endpoint
    load: Load
    meter: Meter
    begun: datetime
    begun_ns: int
    recorders: list[Recorder] = field(default_factory=list)

    def run(self, ended: datetime) -> Run:
        tally, warm_up = Tally(), Tally()
        for recorder in self.recorders:
            tally.merge(recorder.measured)
            warm_up.merge(recorder.warm_up)
        succeeded_per_s, tokens_per_s = summary.throughput(self.recorders)
        ended_since = sum(recorder.ended_since for recorder in self.recorders)
        is_one = len(self.recorders) == 1
        points = [
            point
            for recorder in self.recorders
            for point in summary.points(recorder.timeline, (recorder.measure_from_ns - self.begun_ns) / 1e9)
        ]
        return Run(
            name=self.name,
            url=self.endpoint.target.url,
            concurrency=self.load.clients,
            rate=self.load.rate,
            start_time=_stamp(self.begun),
            end_time=_stamp(ended),
            duration_secs=round((ended - self.begun).total_seconds(), 3),
            warm_up=WarmUp(
                warm_up.requests, warm_up.failed, round(self.load.extent.warm_up_s * len(self.recorders), 3)
            ),
            results=summary.results(tally, succeeded_per_s, tokens_per_s),
            steady=summary.steadiness(self.recorders[0]) if is_one else Steady(None, ["measured in slices"]),
            workers=dict(tally.workers.most_common()),
            connections=self.endpoint.driver.connects,
            generator=summary.generator_cost(
                tally, self.meter.own_cpu_ns, self.meter.wall_ns, ended_since, self.meter.events
            ),
            gateway=self.meter.gateway_cost(ended_since),
            timeline=points,
            distributions=summary.distributions(tally),
        )


class Bench:
    """`watch` is called a few times a second. `interrupt` ends the load and waits for what runs, twice does not."""

    def __init__(self, benchmark_type: str, configuration: dict[str, Any], watch: Watch) -> None:
        self.runs: list[Run] = []
        self.overheads: list[Overhead] = []
        self.findings: list[str] = []
        self.is_interrupted = False
        self._type = benchmark_type
        self._configuration = configuration
        self._watch = watch
        self._begun = _now()
        self._loop: Loop | None = None
        self._waiting: asyncio.Task[None] | None = None

    def interrupt(self) -> None:
        if self.is_interrupted and self._waiting is not None:
            self._waiting.cancel()
        self.is_interrupted = True
        if self._loop is not None:
            self._loop.stop()

    def report(self) -> Report:
        ended = _now()
        findings = [*self.findings, *(one for run in self.runs for one in summary.findings(run))]
        if self.is_interrupted:
            findings.insert(0, "interrupted before its end")
        return Report(
            format=FORMAT,
            benchmark_type=self._type,
            start_time=_stamp(self._begun),
            end_time=_stamp(ended),
            duration_secs=round((ended - self._begun).total_seconds(), 3),
            is_interrupted=self.is_interrupted,
            configuration=self._configuration,
            runs=self.runs,
            overheads=self.overheads,
            findings=findings,
            system_info=_system(),
        )

    async def once(self, name: str, endpoint: Endpoint, load: Load) -> Run:
        """One load against one target."""
        measured = self._begin(name, endpoint, load)
        await self._slice(measured, load)
        return self._end(measured)

    async def levels(self, endpoint: Endpoint, load: Load, levels: Sequence[int], requests_per_level: int) -> None:
        """One load after the other, each with more clients, until one fails too often. Only the first has a warm-up."""
        for number, clients in enumerate(levels):
            if self.is_interrupted:
                return
            extent = Extent(
                load.extent.warm_up_s if number == 0 else 0.0, max(requests_per_level, LEAST_TURNS * clients)
            )
            run = await self.once(f"c={clients}", endpoint, replace(load, extent=extent, clients=clients))
            if run.results.success_rate < PROGRESS_SUCCESS and not self.is_interrupted:
                rate = f"{run.results.success_rate:.1%} of the requests"
                self.findings.append(
                    f"ended at {clients} clients: only {rate} succeeded ({PROGRESS_SUCCESS:.0%} wanted)"
                )
                return

    async def compare(self, endpoints: Sequence[Endpoint], load: Load, rounds: int, slice_s: float) -> None:
        """Rounds in which every target is loaded for `slice_s`, each round begun by another one, behind a warm-up of
        each. Overheads are over the first target."""
        warm_up = replace(load, extent=Extent(0.0, seconds=load.extent.warm_up_s))
        for endpoint in endpoints:
            if warm_up.extent.seconds and not self.is_interrupted:
                await self._slice(self._begin(f"{endpoint.target.name} (warm-up)", endpoint, warm_up), warm_up)
        load = replace(load, extent=Extent(ROUND_WARM_UP * slice_s, seconds=slice_s * (1 - ROUND_WARM_UP)))
        measured = [self._begin(endpoint.target.name, endpoint, load) for endpoint in endpoints]
        for number in range(rounds):
            turn = number % len(measured)
            for one in (*measured[turn:], *measured[:turn]):
                if not self.is_interrupted:
                    await self._slice(one, load)
        self.runs += [one.run(_now()) for one in measured if one.recorders]
        self._compare_rounds(measured)

    def _compare_rounds(self, measured: Sequence[_Measured]) -> None:
        first, *others = measured
        for other in others:
            pairs = list(zip(other.recorders, first.recorders, strict=False))
            for measure, pick in (("e2e", _e2e), ("ttft", _ttft)):
                samples = [(pick(mine), pick(theirs)) for mine, theirs in pairs]
                self.overheads += summary.overhead(other.name, first.name, measure, samples)

    def _begin(self, name: str, endpoint: Endpoint, load: Load) -> _Measured:
        return _Measured(
            name, endpoint, load, Meter(endpoint.pid, lambda: endpoint.driver.events), _now(), monotonic_ns()
        )

    def _end(self, measured: _Measured) -> Run:
        run = measured.run(_now())
        self.runs.append(run)
        if measured.meter.is_lost:
            self.findings.append(f"{run.name}: a process of the gateway ended meanwhile: its CPU time is not known")
        return run

    async def _slice(self, measured: _Measured, load: Load) -> None:
        driver = measured.endpoint.driver
        gc.collect()
        gc.freeze()
        loop = _make_loop(driver, measured.endpoint.encode, load)
        measured.meter.run_from(loop.recorder.measure_from_ns)
        self._loop = loop
        self._waiting = asyncio.create_task(loop.run())
        watcher = asyncio.create_task(self._show(measured, load, loop))
        if not measured.recorders and load.extent.warm_up_s:
            measured.begun = datetime.fromtimestamp(_now().timestamp() + load.extent.warm_up_s, UTC)
            measured.begun_ns = loop.recorder.measure_from_ns
        with suppress(asyncio.CancelledError):  # by `interrupt`
            await self._waiting
        gc.unfreeze()
        measured.meter.stop()
        watcher.cancel()
        self._loop = self._waiting = None
        loop.recorder.close_window(monotonic_ns())
        measured.recorders.append(loop.recorder)

    async def _show(self, measured: _Measured, load: Load, loop: Loop) -> None:
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            recorder = loop.recorder
            seconds = (monotonic_ns() - recorder.measure_from_ns) / 1e9
            is_warm_up = seconds < 0
            share = None
            if load.extent.requests:
                share = recorder.measured.requests / load.extent.requests
            elif load.extent.seconds:
                share = min(seconds / load.extent.seconds, 1.0)
            tally = recorder.warm_up if is_warm_up else recorder.measured
            progress = Progress(
                name=measured.name,
                is_warm_up=is_warm_up,
                share=1 + seconds / load.extent.warm_up_s if is_warm_up else share,
                seconds=max(seconds, 0.0),
                tally=tally,
                in_flight=measured.endpoint.driver.in_flight,
            )
            self._watch(progress)


def _e2e(recorder: Recorder) -> Histogram:
    return recorder.measured.e2e


def _ttft(recorder: Recorder) -> Histogram:
    return recorder.measured.ttft


def _make_loop(driver: Driver, encode: Encode, load: Load) -> Loop:
    if load.trace is not None:
        return OpenLoop(driver, load.trace.timed(), encode, load.extent, SLICE_NS, load.trace.followers)
    assert load.workload is not None
    workload = load.workload()
    if load.rate is not None:
        timed = _timed(load.rate, load.pattern, load.seed, workload)
        return OpenLoop(driver, timed, encode, load.extent, SLICE_NS)
    assert load.clients is not None
    return ClosedLoop(driver, load.clients, workload, encode, load.extent, SLICE_NS)


def _timed(rate: float, pattern: Pattern, seed: int, workload: Workload) -> Timed:
    for number, at_s in enumerate(arrivals(pattern, rate, Random(seed))):
        yield at_s, number, workload(number)


async def open_endpoint(
    target: Target,
    *,
    timeout_s: float,
    pid: int | None,
    model: str | None,
    dialect: Callable[[str | None], Dialect],
) -> Endpoint:
    """Asks the target for its models: `model` None takes the first. Raises Unreachable."""
    driver = Driver(target, timeout_s)
    try:
        found = await _first_model(driver, target)
    except Unreachable:
        await driver.close()
        raise
    model = model or found
    spoken = dialect(model)
    wire = Wire(target.authority, spoken.path, target.headers)
    return Endpoint(target, driver, lambda ask: wire.request(spoken.body(ask)), pid, model)


async def _first_model(driver: Driver, target: Target) -> str | None:
    lines = ["GET /v1/models HTTP/1.1", f"Host: {target.authority}", *(f"{n}: {v}" for n, v in target.headers), "", ""]
    ended: asyncio.Future[tuple[Verdict, int, bytes]] = asyncio.get_running_loop().create_future()

    def note(_job: Job, verdict: Verdict, answer: Answer, _end_ns: int) -> None:
        ended.set_result((verdict, answer.status, answer.body))

    wire = "\r\n".join(lines).encode()
    driver.send(Job(wire, is_stream=False, intended_ns=monotonic_ns(), gaps=Histogram(), ended=note))
    verdict, status, body = await ended
    if verdict.kind in (CONNECT, GENERATOR, TIMEOUT):
        raise Unreachable(f"{target.url} does not answer: {verdict.detail or verdict.kind}")
    if status in (401, 403):
        raise Unreachable(f"{target.url} wants an API key: put it into $POINTSMAN_API_KEY or $OPENAI_API_KEY")
    if status != 200:
        return None
    with suppress(msgspec.MsgspecError, IndexError):
        return msgspec.json.decode(body, type=_Models).data[0].id
    return None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def _now() -> datetime:
    return datetime.now(UTC)


def _stamp(time: datetime) -> str:
    return time.isoformat(timespec="milliseconds")


def _system() -> System:
    return System(
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        python_version=platform.python_version(),
        pointsman_version=VERSION,
        cpu_count=os.cpu_count() or 0,
        cpu_model=_cpu_model(),
    )


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return ""
