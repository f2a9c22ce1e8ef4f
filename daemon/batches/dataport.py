"""One line as a request to the gateway's own data port: routed, booked and counted like every other, but `bulk`."""

from __future__ import annotations

import io
from collections.abc import Mapping

import aiohttp

from pointsman.config.settings import Settings
from pointsman.daemon.batches.attempts import Answer, Unreachable, parse_retry_after
from pointsman.daemon.batches.owners import KEY_HEADER

CONNECT_TIMEOUT_S = 5.0
LARGE_BYTES = 1 << 20
"""aiohttp wants larger bodies as files, which it writes piece by piece"""
MAX_ANSWER_BYTES = 64 * 1024 * 1024


_EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
"""what listens on all addresses is asked on loopback"""


def data_port_url(settings: Settings) -> str:
    host = _EVERYWHERE.get(settings.host, settings.host)
    return f"{'https' if settings.tls_cert else 'http'}://{f'[{host}]' if ':' in host else host}:{settings.port}"


class DataPort:
    def __init__(self, url: str, headers: Mapping[str, str], timeout_s: float, *, verifies_tls: bool = False) -> None:
        """`headers`: who asks. `timeout_s`: of one whole request; the gateway's own limit comes first.

        The gateway's own port is not asked for its certificate: it is for another name than that of the loopback.
        """
        self._url = url
        self.trouble = ""
        """why the last request got no answer; empty = it got one"""
        self._headers = {"Content-Type": "application/json", **headers}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=15.0, ssl=verifies_tls),
            timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S),
            auto_decompress=True,
        )

    async def send(self, path: str, body: bytes, request_id: str, key: str | None) -> Answer | Unreachable:
        """`key`: name of the API key that the request is for: it may do what the key may, and counts for it."""
        headers = {**self._headers, "X-Request-Id": request_id}
        if key is not None:
            headers[KEY_HEADER] = key
        content = io.BytesIO(body) if len(body) > LARGE_BYTES else body
        try:
            async with self._session.post(
                self._url + path, data=content, headers=headers, allow_redirects=False
            ) as answer:
                data = await _bounded(answer)
                self.trouble = ""
                retry_after_s = parse_retry_after(answer.headers.get("Retry-After"))
                return Answer(answer.status, answer.headers.get("X-Request-Id", request_id), data, retry_after_s)
        except TimeoutError:
            self.trouble = "no answer in time"
        except (aiohttp.ClientError, OSError) as error:
            self.trouble = str(error) or type(error).__name__
        return Unreachable(self.trouble)

    async def close(self) -> None:
        await self._session.close()


async def _bounded(answer: aiohttp.ClientResponse) -> bytes:
    data = bytearray()
    async for piece in answer.content.iter_any():
        data += piece
        if len(data) > MAX_ANSWER_BYTES:
            raise aiohttp.ClientPayloadError(f"the answer has more than {MAX_ANSWER_BYTES} bytes")
    return bytes(data)
