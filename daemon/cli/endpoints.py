"""Where the daemon's admin API may be, and what to show there."""

from __future__ import annotations

import http.client
import os
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pointsman.config import listen, places
from pointsman.daemon.errors import PointsmanError

DEFAULT_TCP = "127.0.0.1:8701"
CONNECT_TIMEOUT_S = 3.0
ANSWER_TIMEOUT_S = 30.0
"""adding a worker waits for a probe and for all shards"""


class BadEndpoint(PointsmanError):
    """An address or a token file that the user named cannot be used."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=CONNECT_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CONNECT_TIMEOUT_S)
        try:
            self.sock.connect(self._path)
        except OSError:
            self.sock.close()
            raise


@dataclass(frozen=True, slots=True)
class Endpoint:
    address: str
    """`unix:PATH`, `http://HOST:PORT[/PREFIX]` or `https://…`"""
    token: str | None = None

    @property
    def prefix(self) -> str:
        return "" if self.address.startswith("unix:") else urlsplit(self.address).path.rstrip("/")

    def open(self) -> http.client.HTTPConnection:
        """A connection that is made. Raises OSError."""
        connection = self._connection()
        connection.connect()
        connection.sock.settimeout(ANSWER_TIMEOUT_S)
        return connection

    def _connection(self) -> http.client.HTTPConnection:
        if self.address.startswith("unix:"):
            return _UnixConnection(self.address.removeprefix("unix:"))
        parts = urlsplit(self.address)
        host = parts.hostname or ""
        if parts.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(host, parts.port, timeout=CONNECT_TIMEOUT_S, context=context)
        return http.client.HTTPConnection(host, parts.port, timeout=CONNECT_TIMEOUT_S)


def find(
    given: str | None = None, token_file: str | None = None, environ: Mapping[str, str] = os.environ
) -> tuple[Endpoint, ...]:
    """In the order to try. Raises BadEndpoint.

    `--admin`, else $POINTSMAN_ADMIN: that one alone. Else the sockets of the runtime directories, then loopback TCP.
    """
    named = given or environ.get("POINTSMAN_ADMIN")
    if named:
        return (_endpoint(_address(named), token_file, environ),)
    addresses = [f"unix:{path}" for path in places.admin_sockets(environ)]
    return tuple(_endpoint(address, token_file, environ) for address in (*addresses, f"http://{DEFAULT_TCP}"))


def _address(text: str) -> str:
    if text.startswith(("http://", "https://")):
        return _url(text)
    try:
        checked = listen.admin_address(text)
    except ValueError as error:
        raise BadEndpoint(f"{error}, or a URL") from None
    return checked if checked.startswith("unix:") else f"http://{checked}"


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        is_usable = bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable or set(text) & set("@?# "):
        raise BadEndpoint(f"expected unix:PATH, HOST:PORT or http://HOST:PORT, got {text[:80]!r}")
    return text.rstrip("/")


# --- tokens


def _endpoint(address: str, token_file: str | None, environ: Mapping[str, str]) -> Endpoint:
    if address.startswith("unix:"):
        return Endpoint(address)
    if token_file:
        return Endpoint(address, _named_token(Path(token_file)))
    token = environ.get("POINTSMAN_ADMIN_TOKEN") or None
    # The local daemon's token is for the local daemon: never shown to another machine.
    if token is None and listen.is_loopback(urlsplit(address).netloc):
        token = _local_token(environ)
    return Endpoint(address, token)


def _named_token(path: Path) -> str:
    try:
        token = _first_token(path)
    except OSError as error:
        raise BadEndpoint(f"{path}: {error.strerror}") from None
    if token is None:
        raise BadEndpoint(f"{path}: has no token in it")
    return token


def _local_token(environ: Mapping[str, str]) -> str | None:
    for admin_socket in places.admin_sockets(environ):
        try:
            if token := _first_token(admin_socket.with_name(places.ADMIN_TOKEN)):
                return token
        except OSError:
            continue
    return None


def _first_token(path: Path) -> str | None:
    """The same format as the daemon reads: one token per line, # begins a comment line."""
    lines = (line.strip() for line in path.read_text("utf-8", "replace").splitlines())
    return next((line for line in lines if line and not line.startswith("#")), None)
