"""One question to one worker: bounded, to its pinned address, no redirects, no proxies, no kept connections."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
import yarl

from pointsman.config.tls_contexts import WorkerTrust
from pointsman.daemon.errors import PointsmanError
from pointsman.daemon.workers.registry import Worker

MAX_BODY_BYTES = 64 * 1024
MAX_PAGE_BYTES = 4 * 1024 * 1024
MAX_MODELS = 64
MAX_MODEL_CHARS = 512
MODELS_PATH = "/v1/models"

_REFUSED = frozenset({errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE})


class ProbeFailed(PointsmanError):
    def __init__(self, reason: str, *, is_refused: bool = False, status: int | None = None) -> None:
        super().__init__(reason)
        self.is_refused = is_refused
        """Nobody listens there, or the connection was reset."""
        self.status = status
        """Of an answer that was no 2xx."""


@dataclass(frozen=True, slots=True)
class Page:
    body: bytes
    headers: Mapping[str, str]
    """Names in any case."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Of whatever status."""

    status: int
    body: bytes
    is_cut: bool
    """The body was longer than asked for."""


class _Card(msgspec.Struct):
    id: str


class _Cards(msgspec.Struct):
    data: list[_Card]


_cards = msgspec.json.Decoder(_Cards)


@dataclass(slots=True)
class ProbeClient:
    session: aiohttp.ClientSession
    timeout_s: float
    trust: WorkerTrust

    @classmethod
    def open(cls, timeout_s: float, trust: WorkerTrust) -> ProbeClient:
        """Inside a running loop; to be closed."""
        # A kept connection would be probed instead of the listener, and engines close idle ones at about our pace.
        connector = aiohttp.TCPConnector(force_close=True, limit=0, use_dns_cache=False)
        session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            headers={"User-Agent": "pointsman-probe", "Accept": "*/*"},
            auto_decompress=False,
            trust_env=False,
        )
        return cls(session, timeout_s, trust)

    def _secured(self, worker: Worker) -> dict[str, Any]:
        if not worker.endpoint.is_tls:
            return {}
        return {"server_hostname": worker.endpoint.host, "ssl": self.trust.context()}

    async def close(self) -> None:
        await self.session.close()

    async def get(self, worker: Worker, path: str) -> bytes:
        """The body of a 2xx answer, cut off above MAX_BODY_BYTES. Raises ProbeFailed."""
        return (await self._ask(worker, path, MAX_BODY_BYTES)).body

    async def page(self, worker: Worker, path: str) -> Page:
        """A 2xx answer. Raises ProbeFailed, also when it has more than MAX_PAGE_BYTES."""
        page = await self._ask(worker, path, MAX_PAGE_BYTES)
        if len(page.body) > MAX_PAGE_BYTES:
            raise ProbeFailed(f"{path}: an answer of more than {MAX_PAGE_BYTES // 1024} KiB")
        return page

    async def _ask(self, worker: Worker, path: str, limit_bytes: int) -> Page:
        """A 2xx answer, its body cut off somewhere above the limit. Raises ProbeFailed."""
        try:
            async with self.session.get(
                _url(worker, path),
                headers=_headers(worker),
                allow_redirects=False,
                **self._secured(worker),
            ) as response:
                return Page(await _body(response, limit_bytes), response.headers)
        except ProbeFailed:
            raise
        except Exception as error:  # noqa: BLE001 - boundary: whatever a worker does to the client is its failure
            raise _mapped(error, self.timeout_s) from None

    async def send(
        self, worker: Worker, method: str, path: str, body: bytes = b"", *, timeout_s: float, limit_bytes: int
    ) -> Answer:
        """Any answer, its body cut off at the limit; `body` is JSON. Raises ProbeFailed when there is none in time."""
        headers = _headers(worker) | {"Accept-Encoding": "identity"}
        if body:
            headers["Content-Type"] = "application/json"
        try:
            async with (
                asyncio.timeout(timeout_s),
                self.session.request(
                    method,
                    _url(worker, path),
                    data=body or None,
                    headers=headers,
                    skip_auto_headers=("Content-Type",),
                    allow_redirects=False,
                    **self._secured(worker),
                    timeout=aiohttp.ClientTimeout(total=None),
                ) as response,
            ):
                got = await _read(response, limit_bytes)
                return Answer(response.status, got[:limit_bytes], is_cut=len(got) > limit_bytes)
        except Exception as error:  # noqa: BLE001 - boundary, as above
            raise _mapped(error, timeout_s) from None

    async def models(self, worker: Worker) -> tuple[str, ...]:
        """What the engine says it serves (SGLang, vLLM and llama.cpp all do). Raises ProbeFailed."""
        body = await self.get(worker, MODELS_PATH)
        if len(body) > MAX_BODY_BYTES:
            raise ProbeFailed(f"{MODELS_PATH}: an answer of more than {MAX_BODY_BYTES // 1024} KiB")
        try:
            cards = _cards.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProbeFailed(f"{MODELS_PATH}: {error}") from None
        names = [card.id for card in cards.data if 0 < len(card.id) <= MAX_MODEL_CHARS and card.id.isprintable()]
        return tuple(dict.fromkeys(names))[:MAX_MODELS]


def _url(worker: Worker, path: str) -> yarl.URL:
    endpoint = worker.endpoint
    address = worker.address or ""
    host = f"[{address}]" if ":" in address else address
    scheme = "https" if endpoint.is_tls else "http"
    return yarl.URL(f"{scheme}://{host}:{endpoint.port}{endpoint.base_path}{path}", encoded=True)


def _headers(worker: Worker) -> dict[str, str]:
    headers = {"Host": worker.endpoint.authority}
    if worker.declared.api_key:
        headers["Authorization"] = f"Bearer {worker.declared.api_key}"
    return headers


async def _body(response: aiohttp.ClientResponse, limit_bytes: int) -> bytes:
    if not 200 <= response.status < 300:
        redirected = " (redirects are not followed)" if 300 <= response.status < 400 else ""
        raise ProbeFailed(f"HTTP {response.status}{redirected}", status=response.status)
    return await _read(response, limit_bytes)


async def _read(response: aiohttp.ClientResponse, limit_bytes: int) -> bytes:
    """Until the end, or until somewhere above the limit."""
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > limit_bytes:
            break
    return bytes(body)


def _mapped(error: Exception, timeout_s: float) -> ProbeFailed:
    if isinstance(error, TimeoutError):
        return ProbeFailed(f"no answer within {timeout_s:g} s")
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return ProbeFailed(f"certificate refused: {error.certificate_error}")
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ECONNREFUSED:
        return ProbeFailed("connection refused", is_refused=True)
    if number in _REFUSED:
        return ProbeFailed("connection reset", is_refused=True)
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return ProbeFailed("closed the connection without an answer")
    if isinstance(error, OSError) and error.strerror:
        return ProbeFailed(error.strerror)
    # The text of other errors may quote what the worker sent, which is none of the admin API's answers' business.
    return ProbeFailed(f"not an HTTP answer ({type(error).__name__})")
