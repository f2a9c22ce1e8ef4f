"""Fills the registry at the start of control: from the state directory, the command line, the files, and from what a
former control process had published, so that neither a restart nor a crash renames, moves or loses a worker."""

from __future__ import annotations

import time
from collections.abc import Iterator

from pointsman.config.load import DeclaredWorker
from pointsman.config.settings import Settings
from pointsman.config.snapshot import Snapshot, WorkerSpec
from pointsman.daemon.control.reload import Reloader
from pointsman.daemon.errors import ConfigError, ConfigErrors
from pointsman.daemon.shm import layout as at
from pointsman.daemon.shm.segment import Segment
from pointsman.daemon.telemetry.logs import log
from pointsman.daemon.workers.address import parse
from pointsman.daemon.workers.locate import Locator, Wanted, declared
from pointsman.daemon.workers.registry import Candidate, Changes, Drain, Registry, SlotsExhausted
from pointsman.daemon.workers.state import WorkerState


async def fill(
    settings: Settings,
    segment: Segment,
    registry: Registry,
    locator: Locator,
    state: WorkerState,
    reloader: Reloader,
    last: Snapshot | None,
) -> None:
    """Raises ConfigErrors (at a first start only: later, what was good before stays in force) or StateError."""
    registry.remember(last.workers if last else ())
    try:
        await declare_stored(registry, locator, state)
        await _declare_flags(settings, registry, locator, is_first=last is None)
    except SlotsExhausted as error:
        raise ConfigErrors([ConfigError("--max-workers", str(error))]) from None
    await reloader.start(segment.words.get(at.H_CREATED_NS))
    if reloader.errors and last is None:
        raise ConfigErrors(list(reloader.errors))
    if last is not None and reloader.is_workers_file_bad:
        _keep_last_good(registry)
    registry.recall_drains(state.load().drains)
    for worker in registry.forget_remembered(parse):
        segment.set_status(worker.slot, at.STATUS_DRAINING)
        worker.drain = drain_in(segment, worker.slot)
    _adopt_orphans(segment, registry)


def drain_in(segment: Segment, slot: int) -> Drain:
    """What the segment knows of it, for a worker that left under a former control process."""
    close_at_s = segment.close_at_s(slot)
    return Drain() if close_at_s is None else Drain(time.time() + close_at_s - time.monotonic(), "close")


async def declare_stored(registry: Registry, locator: Locator, state: WorkerState) -> Changes:
    """Raises SlotsExhausted or StateError."""
    located = await locator.locate([Wanted(one.worker, one.id, one.address) for one in state.load().workers])
    for worker, reason in located.refused:
        log("worker_dropped", level="error", worker=worker.url, source="api", reason=reason)
    return registry.declare("api", located.candidates)


async def _declare_flags(settings: Settings, registry: Registry, locator: Locator, *, is_first: bool) -> None:
    located = await locator.locate(declared(_given(settings)))
    if located.refused and is_first:
        raise ConfigErrors(
            [ConfigError(_FLAGS[worker.worker_type], f"{worker.url}: {reason}") for worker, reason in located.refused]
        )
    registry.declare("flag", located.candidates)


_FLAGS = {"regular": "--workers", "prefill": "--prefill", "decode": "--decode"}


def _given(settings: Settings) -> Iterator[DeclaredWorker]:
    for url in settings.workers:
        yield DeclaredWorker(url=url)
    for text in settings.prefill:
        url, _, port = text.partition("#")
        yield DeclaredWorker(url=url, worker_type="prefill", bootstrap_port=int(port) if port else None)
    for url in settings.decode:
        yield DeclaredWorker(url=url, worker_type="decode")


def _keep_last_good(registry: Registry) -> None:
    """The workers file became bad before this process started: what nobody else declares was declared by it."""
    registry.declare("file", [_candidate(spec) for spec in registry.remembered()])


def _candidate(spec: WorkerSpec) -> Candidate:
    worker = DeclaredWorker(
        url=spec.url,
        worker_type=spec.role,  # type: ignore[arg-type]  # it was a WorkerType when it was published
        bootstrap_port=spec.bootstrap_port,
        kv_connector=spec.kv_connector,  # type: ignore[arg-type]  # as above
        models=spec.models,
        weight=spec.weight,
        labels=spec.labels,
        api_key=spec.api_key,
        prompt_tokens_min=spec.prompt_tokens_min,
        prompt_tokens_max=spec.prompt_tokens_max,
        kv_tokens=spec.kv_tokens,
    )
    return Candidate(worker, parse(spec.url), spec.address, spec.id)


def _adopt_orphans(segment: Segment, registry: Registry) -> None:
    for slot in range(segment.layout.slots):
        if segment.status(slot) != at.STATUS_FREE and registry.adopt_orphan(slot):
            segment.set_status(slot, at.STATUS_DRAINING)
