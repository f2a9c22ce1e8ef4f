"""The syntax of a worker's URL and its one canonical spelling. Whether the address is allowed is checked elsewhere."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

MAX_URL_LENGTH = 2048
_DEFAULT_PORTS = {"http": 80, "https": 443}
_HOST_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")
_RANK = re.compile(r"[^@]+@\d+")
_PATH = re.compile(r"(/([A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})+)*")


def canonical_url(text: str) -> str:
    """`scheme://host[:port][/path]`: lower-case scheme and host, no default port, no trailing slash.

    Raises ValueError with what is wrong; nothing is guessed or repaired.
    """
    if not text or len(text) > MAX_URL_LENGTH or not text.isascii() or re.search(r"[\x00-\x20\\\x7f]", text):
        raise ValueError("is not a URL: expected http://HOST:PORT")
    scheme, separator, _ = text.partition("://")
    if not separator or scheme.lower() not in _DEFAULT_PORTS:
        raise ValueError("expected a URL that begins with http:// or https://")
    # Not by urlsplit's parts: an empty "?" or "#" leaves no trace in them.
    if "?" in text or "#" in text:
        raise ValueError("a worker's URL has no query and no fragment")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"is not a URL: {error}") from None
    if _RANK.fullmatch(parts.netloc):
        raise ValueError(
            "data-parallel ranks (URL@RANK) are not addressed: name the engine once, without @RANK; it spreads them"
        )
    if "@" in parts.netloc:
        raise ValueError("a worker's URL has no user or password; use api_key")
    host = _canonical_host(parts.hostname or "", bracketed=parts.netloc.startswith("["))
    if port == 0 or parts.netloc.endswith(":"):
        raise ValueError("expected a port from 1 to 65535")
    default = port is None or port == _DEFAULT_PORTS[parts.scheme]
    return f"{parts.scheme}://{host}{'' if default else f':{port}'}{_canonical_path(parts.path)}"


def _canonical_host(host: str, *, bracketed: bool) -> str:
    if bracketed:
        try:
            address = ipaddress.IPv6Address(host)
        except ValueError:
            raise ValueError(f"{host!r} is not an IPv6 address") from None
        if address.scope_id is not None:
            raise ValueError("an IPv6 address with an interface is not supported")
        return f"[{address}]"
    host = host.removesuffix(".")
    last = host.rpartition(".")[2]
    if re.fullmatch(r"\d+|0x[0-9a-f]*", last):  # what resolvers take for a number: 127.1, 2130706433, 0x7f.1
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            raise ValueError(f"{host!r} is not an IPv4 address") from None
    if len(host) > 253 or not _HOST_NAME.fullmatch(host):
        raise ValueError(f"{host!r} is not a host name" if host else "the URL has no host")
    return host


def _canonical_path(path: str) -> str:
    path = path.rstrip("/")
    segments = path.lower().replace("%2e", ".").split("/")
    if not _PATH.fullmatch(path) or "." in segments or ".." in segments:
        raise ValueError(f"{path!r} is not a plain path")
    return path
