"""Asks many engines the same thing at once: bounded, by one deadline, and again only those that failed.

What the words are and what an answer means is decided in `workers.fanout`. Here is who is asked, when, and what
follows: an engine that lost its cache by it is believed to hold nothing, from before the answer on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from pointsman.admin_api.ports import (
    EngineMetricsView,
    FanoutRequest,
    FanoutView,
    LoadsView,
    LoadView,
    TargetResult,
    WorkerView,
)
from pointsman.daemon.control.catalog import Catalog
from pointsman.daemon.errors import Fault, RequestError
from pointsman.daemon.telemetry.logs import log
from pointsman.daemon.workers import fanout
from pointsman.daemon.workers.engine_metrics import MetricsUnreadable
from pointsman.daemon.workers.fanout import LOADS, METRICS, OPERATIONS, Call, Operation, Verdict
from pointsman.daemon.workers.metrics_page import MergedPage
from pointsman.daemon.workers.probe import Answer, ProbeClient, ProbeFailed
from pointsman.daemon.workers.registry import Worker

MAX_MERGED_BYTES = 64 * 1024 * 1024
UP_METRIC = "pointsman_engine_metrics_up"
_UP_HELP = "1 if the metrics of the worker are on this page."
_DOWN = ("pending", "not_ready")

Forget = Callable[[int], Awaitable[int]]
"""`control.residency.Residency.forget`"""


@dataclass(frozen=True, slots=True)
class _Task:
    """What is asked of everybody. The deadline is of the monotonic clock."""

    operation: Operation
    calls: tuple[Call, ...]
    timeout_s: float
    deadline: float
    turns: asyncio.Semaphore


@dataclass(frozen=True, slots=True)
class _Target:
    worker: Worker
    view: WorkerView


@dataclass(frozen=True, slots=True)
class _Told:
    """The last word of one target."""

    target: _Target
    verdict: Verdict
    call: Call | None = None
    answer: Answer | None = None
    attempts: int = 0
    latency_s: float = 0.0

    @property
    def body(self) -> bytes:
        return self.answer.body if self.answer else b""

    def result(self) -> TargetResult:
        worker = self.target.worker
        return TargetResult(
            id=worker.id,
            url=worker.url,
            outcome=self.verdict.outcome,
            path=self.call.path if self.call else None,
            status=self.answer.status if self.answer else None,
            attempts=self.attempts,
            latency_ms=round(self.latency_s * 1000, 1),
            error=self.verdict.error,
            body=fanout.excerpt(self.body, worker.declared.api_key),
        )


class Fanning:
    def __init__(self, catalog: Catalog, client: ProbeClient, forget: Forget) -> None:
        self._catalog = catalog
        self._client = client
        self._forget = forget
        self._now = time.monotonic

    async def run(self, request: FanoutRequest) -> FanoutView:
        """One of OPERATIONS. Raises RequestError 400, 404 before anybody is asked."""
        operation = OPERATIONS.get(request.operation)
        if operation is None:
            raise RequestError(404, "NOT_FOUND", f"no operation {request.operation[:60]!r}", fault=Fault.CLIENT)
        task, told = await self._ask_all(operation, request)
        return _view(task, told)

    async def loads(self, request: FanoutRequest) -> LoadsView:
        task, told = await self._ask_all(LOADS, request)
        return LoadsView(fanout=_view(task, told), workers=tuple(map(_load, told)))

    async def metrics(self, request: FanoutRequest) -> EngineMetricsView:
        task, told = await self._ask_all(METRICS, request)
        merged = MergedPage()
        merging = _Merging(merged)
        # In a thread: the larger pages take longer than control's heart may stand still.
        told = [await asyncio.to_thread(merging.add, one) for one in told]
        ups = {one.target.worker.url: float(one.verdict.outcome == "succeeded") for one in told}
        merged.set_gauge(UP_METRIC, _UP_HELP, ups)
        return EngineMetricsView(fanout=_view(task, told), page=await asyncio.to_thread(merged.render))

    # --- all of them

    async def _ask_all(self, operation: Operation, request: FanoutRequest) -> tuple[_Task, list[_Told]]:
        calls = operation.spell(request.body, fanout.document_of(request.body))
        targets = self._targets(request)
        timeout_s = operation.timeout_s if request.timeout_s is None else request.timeout_s
        turns = asyncio.Semaphore(operation.at_once)
        task = _Task(operation, calls, timeout_s, self._now() + timeout_s, turns)
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(self._tell(task, target, request.include_down)) for target in targets]
        told = [one.result() for one in asked]
        outcomes = [one.verdict.outcome for one in told]
        counts = {outcome: outcomes.count(outcome) for outcome in ("succeeded", "failed", "unsupported")}
        log("fan_out", level="warning" if counts["failed"] else "info", operation=operation.name, **counts)
        return task, told

    def _targets(self, request: FanoutRequest) -> list[_Target]:
        """Those that were named, or all; never one twice. Raises RequestError 404 when a filter leaves nobody."""
        catalog = self._catalog
        views = [catalog.get(key) for key in request.workers] or catalog.list(state=None, model=None)
        if request.model is not None:
            views = [view for view in views if request.model in view.models]
            if not views:
                message = f"no worker serves {request.model[:200]!r}"
                raise RequestError(404, "MODEL_NOT_FOUND", message, fault=Fault.CLIENT)
        return [_Target(catalog.find(view.id), view) for view in {view.id: view for view in views}.values()]

    # --- one of them

    async def _tell(self, task: _Task, target: _Target, include_down: bool) -> _Told:
        obstacle = _obstacle(target, include_down)
        if obstacle is not None:
            return _Told(target, Verdict("failed", f"not asked: {obstacle}"))
        try:
            async with asyncio.timeout(task.deadline - self._now()):
                await task.turns.acquire()
        except TimeoutError:
            return _Told(target, Verdict("failed", f"not asked: no turn within {task.timeout_s:g} s"))
        try:
            told = await self._ask(task, target)
        finally:
            task.turns.release()
        if told.verdict.outcome == "succeeded" and told.call is not None and told.call.empties_cache:
            held = await self._forget(target.worker.slot)
            log("cache_forgotten", worker=target.worker.url, reason=task.operation.name, chars=held)
        return told

    async def _ask(self, task: _Task, target: _Target) -> _Told:
        """Until it succeeds, cannot, or there are no attempts or no time left."""
        started = self._now()
        attempts = 0
        while True:
            told = await self._attempt(task, target)
            attempts += 1
            pause_s = fanout.pause_s(attempts)
            is_last = attempts >= task.operation.attempts or self._now() + pause_s >= task.deadline
            if told.verdict.is_final or is_last:
                return replace(told, attempts=attempts, latency_s=self._now() - started)
            await asyncio.sleep(pause_s)

    async def _attempt(self, task: _Task, target: _Target) -> _Told:
        """In the words that the engine knows."""
        told = _Told(target, fanout.UNSUPPORTED)
        for call in task.calls:
            told = await self._call(task, target, call)
            if told.verdict.outcome != "unsupported":
                break
        return told

    async def _call(self, task: _Task, target: _Target, call: Call) -> _Told:
        operation = task.operation
        try:
            answer = await self._client.send(
                target.worker,
                call.method,
                call.path,
                call.body,
                timeout_s=max(task.deadline - self._now(), 0.001),
                limit_bytes=operation.answer_bytes,
            )
        except ProbeFailed as error:
            return _Told(target, Verdict("failed", str(error), is_final=False), call)
        return _Told(target, fanout.judge(operation, answer.status, answer.body), call, answer)


def _obstacle(target: _Target, include_down: bool) -> str | None:
    """Why the target cannot be asked."""
    if target.worker.address is None:
        return "its name does not resolve"
    if target.view.status in _DOWN and not include_down:
        why = f" ({target.view.last_error})" if target.view.last_error else ""
        return f"it is {target.view.status}{why}"
    return None


@dataclass(slots=True)
class _Merging:
    page: MergedPage
    total_bytes: int = 0

    def add(self, told: _Told) -> _Told:
        """Its page is on the common one afterwards, or it has failed."""
        if told.verdict.outcome != "succeeded" or told.answer is None:
            return told
        answer = replace(told.answer, body=b"")  # the page itself is nobody's excerpt
        try:
            self._add(told.target.worker.url, told.answer)
        except (MetricsUnreadable, UnicodeDecodeError) as error:
            return replace(told, verdict=Verdict("failed", str(error)), answer=answer)
        return replace(told, answer=answer)

    def _add(self, worker: str, answer: Answer) -> None:
        if answer.is_cut or self.total_bytes + len(answer.body) > MAX_MERGED_BYTES:
            raise MetricsUnreadable("the page is too long")
        self.page.add(worker, answer.body.decode())
        self.total_bytes += len(answer.body)


def _view(task: _Task, told: list[_Told]) -> FanoutView:
    results = tuple(one.result() for one in told)
    return FanoutView(operation=task.operation.name, timeout_s=task.timeout_s, results=results)


def _load(told: _Told) -> LoadView:
    document = fanout.decoded(told.body) if told.verdict.outcome == "succeeded" else None
    return LoadView(worker=told.target.worker.url, load=fanout.tokens_in_use(document), details=document)
