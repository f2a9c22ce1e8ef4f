"""Which workers exist, who declared them, and which slot of shared memory each one has. Pure.

Ownership. A worker is known by its URL and held by up to three sources: the command line ("flag"), the workers file
("file") and the admin API ("api"). It lives as long as one of them holds it, and its settings are those of the
strongest holder: file, then api, then flag. A file owns what it declares: the admin API may neither change nor remove
it, because the next reload would bring it back.

Drains. A worker that is drained gets no new requests, and is not removed: it stays as it is until somebody lifts the
drain. Whoever declared it, a drain belongs to the API, so a file's worker can be drained, too. A removed worker is
drained for good.

Slots. A slot belongs to one worker from its registration until its last request has ended. A removed worker is
therefore kept as `leaving` until somebody who can see shared memory calls `release`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

from pointsman.config.load import DeclaredWorker
from pointsman.config.snapshot import WorkerSpec
from pointsman.daemon.errors import Fault, PointsmanError, RequestError, bad_request
from pointsman.daemon.workers.address import Endpoint

Source = Literal["flag", "file", "api"]

ORDER: tuple[Source, ...] = ("flag", "file", "api")
"""declaration order"""
STRENGTH: tuple[Source, ...] = ("file", "api", "flag")
"""whose settings count"""


class SlotsExhausted(PointsmanError):
    """More workers than `max_workers`; slots of removed workers count until their last request has ended."""


class Drain(Struct, frozen=True):
    """No new requests."""

    by: float | None = None
    """When those that run are to have ended, in Unix seconds; None: whenever they do."""
    then: Literal["close", "keep"] = "keep"
    """What happens to those that have not."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that somebody declares, its URL checked; `address` is None while its name does not resolve."""

    declared: DeclaredWorker
    endpoint: Endpoint
    address: str | None
    id: str | None = None
    """The id that it had before a restart."""


@dataclass(slots=True)
class Worker:
    id: str
    endpoint: Endpoint
    slot: int
    source: Source
    declared: DeclaredWorker
    address: str | None = None
    """Checked and pinned for the life of the worker."""
    discovered: tuple[str, ...] = ()
    """Models that the engine itself announces."""
    is_leaving: bool = False
    drain: Drain | None = None

    @property
    def is_draining(self) -> bool:
        return self.is_leaving or self.drain is not None

    @property
    def url(self) -> str:
        return self.endpoint.url

    @property
    def models(self) -> tuple[str, ...]:
        return self.declared.models or self.discovered


@dataclass(slots=True)
class Changes:
    added: list[Worker] = field(default_factory=list)
    removed: list[Worker] = field(default_factory=list)


class Registry:
    def __init__(self, slots: int, new_id: Callable[[], str], workers_file: str | None = None) -> None:
        self._new_id = new_id
        self._workers_file = workers_file
        self._slots = slots
        self._held: dict[Source, dict[str, DeclaredWorker]] = {source: {} for source in ORDER}
        self._live: dict[str, Worker] = {}
        self._leaving: dict[str, Worker] = {}
        self._orphans: set[int] = set()
        self._remembered: dict[str, WorkerSpec] = {}

    # --- looking

    def live(self) -> list[Worker]:
        """In declaration order: the command line's, the file's, then the API's as they arrived."""
        return [
            worker for source in ORDER for url in self._held[source] if (worker := self._live[url]).source == source
        ]

    def leaving(self) -> list[Worker]:
        return list(self._leaving.values())

    def draining(self) -> list[Worker]:
        """The live ones that are drained, then those that leave."""
        return [worker for worker in self.live() if worker.is_draining] + self.leaving()

    @property
    def orphans(self) -> frozenset[int]:
        """Slots that a former control process left in use by workers of which nothing else is known."""
        return frozenset(self._orphans)

    def at(self, url: str) -> Worker | None:
        return self._live.get(url)

    def has(self, worker: Worker) -> bool:
        """Whether it still has its slot."""
        return self._live.get(worker.url) is worker or self._leaving.get(worker.id) is worker

    def find(self, key: str) -> Worker:
        """By id or canonical URL, live ones first. Raises RequestError 404."""
        for pool in (self._live, self._leaving):
            for worker in pool.values():
                if key in (worker.id, worker.url):
                    return worker
        raise RequestError(404, "WORKER_NOT_FOUND", f"no worker {key[:200]}", fault=Fault.CLIENT)

    def held_by(self, source: Source) -> list[tuple[Worker, DeclaredWorker]]:
        return [(self._live[url], declared) for url, declared in self._held[source].items()]

    # --- declarations

    def declare(self, source: Source, wanted: Sequence[Candidate]) -> Changes:
        """Make `source` hold exactly `wanted`: all of it, or SlotsExhausted and nothing."""
        self._require_slots([c for c in wanted if c.endpoint.url not in self._live])
        before = self._held[source]
        self._held[source] = {c.endpoint.url: c.declared for c in wanted}
        changes = Changes()
        for candidate in wanted:
            known = self._live.get(candidate.endpoint.url)
            if known is None:
                changes.added.append(self._register(candidate, source))
            elif known.address is None:
                known.address = candidate.address
        for url in before.keys() | self._held[source].keys():
            gone = self._settle(url)
            if gone is not None:
                changes.removed.append(gone)
        return changes

    def add(self, candidate: Candidate) -> Worker:
        """By the API. Raises RequestError 409 for a URL that somebody holds, 503 when no slot is free."""
        url = candidate.endpoint.url
        if url in self._live:
            raise RequestError(409, "WORKER_ALREADY_EXISTS", f"worker {url} already exists", fault=Fault.CLIENT)
        try:
            self._require_slots([candidate])
        except SlotsExhausted as error:
            raise RequestError(503, "WORKER_LIMIT", str(error), fault=Fault.OPERATOR) from None
        self._held["api"][url] = candidate.declared
        return self._register(candidate, "api")

    def remove(self, key: str) -> Worker:
        """By the API; a worker that is leaving already stays so. Raises RequestError 404, 409."""
        worker = self.find(key)
        if worker.is_leaving:
            return worker
        self._refuse_files(worker)
        for source in ORDER:
            self._held[source].pop(worker.url, None)
        self._settle(worker.url)
        return worker

    def patch(
        self,
        key: str,
        *,
        weight: float | UnsetType = UNSET,
        labels: dict[str, str] | UnsetType = UNSET,
        models: tuple[str, ...] | UnsetType = UNSET,
        api_key: str | UnsetType | None = UNSET,
        prompt_tokens_min: int | UnsetType = UNSET,
        prompt_tokens_max: int | UnsetType = UNSET,
        kv_tokens: int | UnsetType | None = UNSET,
    ) -> Worker:
        """By the API. Raises RequestError 400, 404, 409."""
        worker = self.find(key)
        if worker.is_leaving:
            raise RequestError(409, "WORKER_DRAINING", f"worker {worker.url} is being removed", fault=Fault.CLIENT)
        self._refuse_files(worker)
        given = {
            "weight": weight,
            "labels": labels,
            "models": models,
            "api_key": api_key,
            "prompt_tokens_min": prompt_tokens_min,
            "prompt_tokens_max": prompt_tokens_max,
            "kv_tokens": kv_tokens,
        }
        changes = {name: value for name, value in given.items() if value is not UNSET}
        changed = replace(worker.declared, **changes)
        if changed.prompt_tokens_min > changed.prompt_tokens_max:
            message = f"prompt_tokens_min ({changed.prompt_tokens_min}) is above prompt_tokens_max"
            raise bad_request(f"{message} ({changed.prompt_tokens_max})", code="BAD_REQUEST")
        self._held[worker.source][worker.url] = changed
        self._settle(worker.url)
        return worker

    # --- drains

    def drain(self, key: str, drain: Drain) -> Worker:
        """Also one that leaves: its deadline may change. Raises RequestError 404."""
        worker = self.find(key)
        worker.drain = drain
        return worker

    def undrain(self, key: str) -> Worker:
        """Nothing happens to one that is not drained. Raises RequestError 404, 409."""
        worker = self.find(key)
        if worker.is_leaving:
            message = f"worker {worker.url} is being removed; add it again when it is gone"
            raise RequestError(409, "WORKER_DRAINING", message, fault=Fault.CLIENT)
        worker.drain = None
        return worker

    def drains(self) -> dict[str, Drain]:
        """Of the live workers, by URL: what is to survive a restart."""
        return {worker.url: worker.drain for worker in self.live() if worker.drain is not None}

    def recall_drains(self, drains: Mapping[str, Drain]) -> None:
        """Those and no others; one of a worker that nobody declares any more is of no use."""
        for worker in self._live.values():
            worker.drain = drains.get(worker.url)

    # --- slots

    def remember(self, specs: Iterable[WorkerSpec]) -> None:
        """What a former control process published: the same URL gets the same id, slot and address again."""
        self._remembered = {spec.url: spec for spec in specs}

    def forget_remembered(self, endpoint_of: Callable[[str], Endpoint]) -> list[Worker]:
        """Those that no source declares any more become leaving."""
        gone = []
        for spec in self._remembered.values():
            worker = Worker(
                spec.id,
                endpoint_of(spec.url),
                spec.slot,
                "api",
                DeclaredWorker(url=spec.url),
                spec.address,
                spec.models,
            )
            self._leave(worker)
            gone.append(worker)
        self._remembered = {}
        return gone

    def remembered(self) -> list[WorkerSpec]:
        """Those that no source has declared so far."""
        return list(self._remembered.values())

    def pinned(self, url: str) -> str | None:
        """The address that a known worker was pinned to."""
        if url in self._live:
            return self._live[url].address
        return self._remembered[url].address if url in self._remembered else None

    def adopt_orphan(self, slot: int) -> bool:
        """A slot that is in use, says shared memory; True when no worker here has it."""
        is_orphan = slot not in self._used()
        if is_orphan:
            self._orphans.add(slot)
        return is_orphan

    def release(self, slot: int) -> None:
        """The last request on a leaving worker's slot has ended."""
        self._orphans.discard(slot)
        for worker in self.leaving():
            if worker.slot == slot:
                del self._leaving[worker.id]

    def _used(self) -> set[int]:
        used = {worker.slot for pool in (self._live, self._leaving) for worker in pool.values()}
        return used | self._orphans | {spec.slot for spec in self._remembered.values()}

    def _require_slots(self, new: Sequence[Candidate]) -> None:
        needed = sum(candidate.endpoint.url not in self._remembered for candidate in new)
        free = self._slots - len(self._used())
        if needed > free:
            hint = f", {len(self._leaving) + len(self._orphans)} of them by removed workers that still have requests"
            busy = hint if self._leaving or self._orphans else ""
            raise SlotsExhausted(f"max_workers is {self._slots}: {free} slots are free{busy}, {needed} needed")

    # --- keeping holders and workers in step

    def _register(self, candidate: Candidate, source: Source) -> Worker:
        url = candidate.endpoint.url
        known = self._remembered.pop(url, None)
        used = self._used()
        worker = Worker(
            id=candidate.id or (known.id if known else self._new_id()),
            endpoint=candidate.endpoint,
            slot=known.slot if known else next(slot for slot in range(self._slots) if slot not in used),
            source=source,
            declared=candidate.declared,
            address=known.address if known else candidate.address,
            discovered=known.models if known and not candidate.declared.models else (),
        )
        self._live[url] = worker
        return worker

    def _settle(self, url: str) -> Worker | None:
        """Give a live worker the settings of its strongest holder; returns it when nobody holds it any more."""
        worker = self._live.get(url)
        if worker is None:
            return None
        for source in STRENGTH:
            declared = self._held[source].get(url)
            if declared is not None:
                worker.source, worker.declared = source, declared
                return None
        del self._live[url]
        self._leave(worker)
        return worker

    def _leave(self, worker: Worker) -> None:
        worker.is_leaving = True
        self._leaving[worker.id] = worker

    def _refuse_files(self, worker: Worker) -> None:
        if worker.source == "file":
            message = f"worker {worker.url} is declared in {self._workers_file}; edit that file"
            raise RequestError(409, "WORKER_DECLARED_IN_FILE", message, fault=Fault.CLIENT)
