"""From declarations to candidates: URLs checked, names resolved side by side, what is pinned already left as it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from pointsman.config.load import DeclaredWorker
from pointsman.daemon.telemetry.logs import log
from pointsman.daemon.workers.address import AddressRefused, AddressRules, AddressUnknown, Endpoint, parse, resolve
from pointsman.daemon.workers.registry import Candidate


@dataclass(frozen=True, slots=True)
class Wanted:
    declared: DeclaredWorker
    id: str | None = None
    last_address: str | None = None
    """Used when the name does not resolve."""


@dataclass(frozen=True, slots=True)
class Located:
    candidates: list[Candidate] = field(default_factory=list)
    refused: list[tuple[DeclaredWorker, str]] = field(default_factory=list)
    """with the reason"""


@dataclass(frozen=True, slots=True)
class Locator:
    rules: AddressRules
    pinned: Callable[[str], str | None]
    """The address that a known URL was pinned to."""

    async def resolve(self, endpoint: Endpoint) -> str:
        """Raises AddressRefused, AddressUnknown."""
        return self.pinned(endpoint.url) or await resolve(endpoint, self.rules)

    async def locate(self, wanted: Sequence[Wanted]) -> Located:
        """A name that does not resolve now is no reason to refuse a declaration: it is tried again by the probes."""
        answers = await asyncio.gather(*map(self._locate_one, wanted))
        return Located(
            [answer for answer in answers if isinstance(answer, Candidate)],
            [(one.declared, answer) for one, answer in zip(wanted, answers, strict=True) if isinstance(answer, str)],
        )

    async def _locate_one(self, wanted: Wanted) -> Candidate | str:
        try:
            endpoint = parse(wanted.declared.url)
            address: str | None = await self.resolve(endpoint)
        except AddressRefused as error:
            return str(error)
        except AddressUnknown as error:
            endpoint = parse(wanted.declared.url)
            address = self._fallback(wanted.last_address, endpoint)
            log("worker_unresolved", level="warning", worker=endpoint.url, reason=str(error), used=address)
        return Candidate(wanted.declared, endpoint, address, wanted.id)

    def _fallback(self, address: str | None, endpoint: Endpoint) -> str | None:
        allowed = address is not None and self.rules.refusal(address, endpoint.port) is None
        return address if allowed else None


def declared(workers: Iterable[DeclaredWorker]) -> list[Wanted]:
    return [Wanted(worker) for worker in workers]
