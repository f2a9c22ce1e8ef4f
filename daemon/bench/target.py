"""Where requests go."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

WORKER_HEADERS = (b"x-smg-routed-worker-id", b"target-pod")
"""Of which the first that an answer has names the worker that gave it."""


@dataclass(slots=True, frozen=True)
class Target:
    name: str
    url: str
    host: str
    port: int
    tls: ssl.SSLContext | None = None
    headers: Sequence[tuple[str, str]] = ()

    @property
    def authority(self) -> str:
        """The Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


def read_target(
    text: str, *, headers: Sequence[tuple[str, str]] = (), ca_file: str | None = None, name: str | None = None
) -> Target:
    """Of a URL. Raises ValueError with the remedy."""
    parts = urlsplit(text if "://" in text else f"http://{text}")
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
        raise ValueError(f"a URL is http://HOST:PORT or https://HOST:PORT, not {text!r}")
    if parts.path.rstrip("/") not in ("", "/v1") or parts.query or parts.username:
        raise ValueError(f"a URL is http://HOST:PORT without a path, not {text!r}")
    try:
        parts.hostname.encode("idna")
    except UnicodeError:
        raise ValueError(
            f"a URL is http://HOST:PORT; parts of a host's name have 1 to 63 characters, not as in {text!r}"
        ) from None
    tls = None
    if parts.scheme == "https":
        try:
            tls = ssl.create_default_context(cafile=ca_file)
        except OSError as error:
            raise ValueError(f"{ca_file}: {error.strerror or error}") from None
    host = "127.0.0.1" if parts.hostname == "0.0.0.0" else parts.hostname
    port = port or (443 if tls else 80)
    url = f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    return Target(name or url, url, host, port, tls, headers)
